"""Metrics against brute force, target replacement against Eq. 7, the loss against the plain way, runs against crashes."""

import copy
import dataclasses
import json
import math
import operator
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import caopd
import data
import model
from caopd import Args, Group, Optimizer, Target, UsageError, calibration, distillation_backward, divergence, ema_update, exact_weights, parse_args
from model import Config, Transformer

TINY = ["--width", "16", "--layers", "1", "--sft-steps", "6", "--sft-documents", "8", "--steps", "4", "--prompts", "4", "--rollouts", "3", "--eval-questions", "24"]


# ----------------------------------------------------------------------------- metrics

def brute_force(c: list[float], r: list[int], bins: int = 10) -> dict:
    """Each metric as its definition reads, pair by pair and bin by bin."""
    n = len(c)
    pairs = [(a, b) for a, x in zip(c, r) if x for b, y in zip(c, r) if not y]
    ece = 0.0
    for i in range(bins):
        members = [j for j in range(n) if i <= round(c[j] * bins, 6) < i + 1 or (i == bins - 1 and c[j] == 1)]
        if members:
            ece += len(members) / n * abs(sum(c[j] for j in members) / len(members) - sum(r[j] for j in members) / len(members))
    return dict(accuracy=sum(r) / n, mean_confidence=sum(c) / n, ocg=(sum(c) - sum(r)) / n, ece=ece, brier=sum((a - b) ** 2 for a, b in zip(c, r)) / n,
                spr=sum(a > b for a, b in pairs) / len(pairs) if pairs else math.nan, format=1.0)


@pytest.mark.parametrize("seed", range(20))
def test_calibration_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 80))
    c = rng.integers(0, 101, n) / 100 if seed % 2 else rng.random(n)  # with and without ties and bin edges
    r = (rng.random(n) < c).astype(int)
    assert calibration(c, r) == pytest.approx(brute_force(c.tolist(), r.tolist()), nan_ok=True)


def test_calibration_by_hand():
    always = calibration([1.0] * 4, [1, 0, 0, 0])
    assert (always["spr"], always["ece"], always["brier"], always["ocg"]) == (0, 0.75, 0.75, 0.75)
    perfect = calibration([0.0, 1.0, 1.0, 0.0], [False, True, True, False])
    assert (perfect["spr"], perfect["ece"], perfect["brier"], perfect["ocg"]) == (1, 0, 0, 0)
    hand = calibration([0.9, 0.8, 0.8, 0.3], [1, 1, 0, 0])  # bins .9: |1-.9|, .8: |.5-.8|·2, .3: |0-.3|
    assert hand["ece"] == pytest.approx((0.1 + 0.6 + 0.3) / 4) and hand["spr"] == 3 / 4 and hand["brier"] == pytest.approx((0.01 + 0.04 + 0.64 + 0.09) / 4)


def test_unparsable_confidences_count_in_accuracy_and_format_alone():
    c, r = [0.9, math.nan, 0.2, math.nan], [1, 1, 0, 0]
    figures = calibration(c, r)
    assert (figures["accuracy"], figures["format"]) == (0.5, 0.5)
    seen = calibration([0.9, 0.2], [1, 0])
    assert all(figures[key] == seen[key] for key in ("mean_confidence", "ocg", "ece", "brier", "spr"))
    nothing = calibration([math.nan], [1])
    assert nothing["accuracy"] == 1 and all(math.isnan(nothing[key]) for key in ("mean_confidence", "ocg", "ece", "brier", "spr"))
    assert math.isnan(calibration([0.5, 0.6], [1, 1])["spr"])


@pytest.mark.parametrize("c, r", [([], []), ([0.5], [1, 0]), ([1.5], [1]), ([-0.1], [1]), ([0.5], [2]), ([[0.5]], [[1]])])
def test_calibration_refuses_nonsense(c, r):
    with pytest.raises(ValueError, match="calibration"):
        calibration(c, r)


# ----------------------------------------------------------------------------- a small world to distil in

@pytest.fixture(scope="module")
def world():
    """(args, tokenizer, task, student, teacher): random networks, whose rollouts are noise with some format in it."""
    args = dataclasses.replace(parse_args(TINY), dtype="float32")
    tokenizer = data.toy_tokenizer()
    config = caopd.toy_config(args, tokenizer)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Transformer(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.3)
        models.append(model)
    return args, tokenizer, data.arithmetic_task(0, 24, words=False), *models


def some_groups(tokenizer) -> list[Group]:
    """Hand-made rollouts: right, wrong, without a segment, with text after it, and one that was cut off."""
    def group(question, answer, *texts):
        example = data.Example("arithmetic", question, answer, demo=answer)
        ids = [tokenizer.encode(text.removesuffix("~")) + ([] if text.endswith("~") else [1]) for text in texts]
        correct = [not text.endswith("~") and data.verify(example, text) for text in texts]
        return Group(example, tokenizer.chat([{"role": "user", "content": question}]), ids, correct)
    return [group("12+34=", "64", "64\nConfidence: 0.90", "54\nConfidence: 1.00", "64", "64\nConfidence: 0.~"),
            group("7*8=", "65", "65\nConfidence: 0.50\n1", "\nConfidence: 0.50", "65\nConfidence: 0.25", "1111~")]


def test_empirical_confidence_counts_cut_off_rollouts_as_wrong(world):
    groups = some_groups(world[1])
    assert [g.correct for g in groups] == [[True, False, True, False], [True, False, True, False]]
    assert [g.mu_hat for g in groups] == [0.5, 0.5]


def test_rollout_keeps_the_rollouts_of_a_prompt_together_and_verifies_them(world):
    args, tokenizer, task, student, _ = world
    examples = task.draw(5, "distill", 0)
    whole = caopd.rollout(student, tokenizer, task, examples, 3, args, torch.Generator().manual_seed(0))
    assert [g.example for g in whole] == examples and all(len(g.completions) == 3 for g in whole)
    for g in whole:
        assert g.prompt == tokenizer.chat([{"role": "user", "content": g.example.question}])
        assert g.correct == [y[-1] == 1 and data.verify(g.example, tokenizer.decode(y)) for y in g.completions]


# ----------------------------------------------------------------------------- target replacement

def test_replacement_touches_nothing_but_the_confidence(world):
    args, tokenizer, task, *_ = world
    for group in some_groups(tokenizer):
        group.correct = [True, False, False, False]  # mu_hat 0.25
        opd, ours = caopd.opd_target(group, tokenizer, task, args), caopd.caopd_target(group, tokenizer, task, args)
        assert opd.completions == group.completions and ours.prompt == opd.prompt == group.prompt
        assert ours.answer_lengths == opd.answer_lengths
        for sampled, replaced, n, cut_off in zip(opd.completions, ours.completions, ours.answer_lengths, ours.cut_off):
            assert replaced[:n] == sampled[:n]
            if cut_off:
                assert replaced == sampled and sampled[-1] != 1
            else:
                assert data.parse_confidence(tokenizer.decode(replaced)) == 0.25 and replaced[-1] == 1
        said = [data.parse_confidence(tokenizer.backend.decode(t.teacher_prompt, skip_special_tokens=True)) for t in (opd, ours)]
        assert said == [1.0, 0.25]  # z and z̃
        assert len(opd.teacher_prompt) == len(ours.teacher_prompt)


def test_solution_context_is_a_correct_rollout_or_none(world):
    args, tokenizer, task, *_ = world
    args = dataclasses.replace(args, context="solution")
    group = some_groups(tokenizer)[0]
    opd, ours = (tokenizer.decode(f(group, tokenizer, task, args).teacher_prompt) for f in (caopd.opd_target, caopd.caopd_target))
    assert opd == "12+34=\n64\nConfidence: 0.90" and ours == "12+34=\n64\nConfidence: 0.50"
    group.correct = [False] * 4
    assert caopd.opd_target(group, tokenizer, task, args) is None and caopd.caopd_target(group, tokenizer, task, args) is None


def gradient(model: Transformer, backward) -> torch.Tensor:
    """What backward() leaves in the model's gradients, flat."""
    model.zero_grad()
    backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_the_gradient_at_answer_positions_is_opds(world, kind):
    """Eq. 7: with the context held fixed, replacing the confidence leaves the sum over I_a and its gradient alone."""
    args, tokenizer, task, student, teacher = world
    args = dataclasses.replace(args, divergence=kind)
    groups = some_groups(tokenizer)
    opd = [caopd.opd_target(g, tokenizer, task, args) for g in groups]
    ours = [dataclasses.replace(caopd.caopd_target(g, tokenizer, task, args), teacher_prompt=t.teacher_prompt) for g, t in zip(groups, opd)]
    (a, c), (a_ours, c_ours) = (distillation_backward(student, teacher, targets, 1.0, args) for targets in (opd, ours))
    assert a == pytest.approx(a_ours, rel=1e-6) and c != pytest.approx(c_ours, rel=1e-2)
    answers = [[dataclasses.replace(t, cut_off=[True] * len(t.cut_off)) for t in targets] for targets in (opd, ours)]  # leaves I_c out
    g, g_ours = (gradient(student, lambda: distillation_backward(student, teacher, targets, 1.0, args)) for targets in answers)
    assert torch.allclose(g, g_ours, rtol=1e-4, atol=1e-5 * float(g.abs().max())) and g.abs().max() > 0


# ----------------------------------------------------------------------------- the loss

def test_divergences_by_enumeration_and_closed_form():
    torch.manual_seed(0)
    s, t = torch.randn(7, 5, dtype=torch.double), torch.randn(7, 5, dtype=torch.double)
    p, q = s.softmax(-1), t.softmax(-1)
    m = (p + q) / 2

    def kl(a, b):
        return torch.stack([sum(a[i, v] * (a[i, v] / b[i, v]).log() for v in range(5)) for i in range(7)])
    assert torch.allclose(divergence(s, t, "reverse").double(), kl(p, q), atol=1e-6)
    assert torch.allclose(divergence(s, t, "forward").double(), kl(q, p), atol=1e-6)
    assert torch.allclose(divergence(s, t, "jsd").double(), (kl(p, m) + kl(q, m)) / 2, atol=1e-6)
    two = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert divergence(*two, "reverse").item() == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4), abs=1e-6)
    assert divergence(*two, "forward").item() == pytest.approx(0.5 * math.log(0.625) + 0.5 * math.log(2.5), abs=1e-6)
    for kind in ("reverse", "forward", "jsd"):
        assert divergence(s, s, kind).abs().max() < 1e-6


def plain_loss(student, teacher, targets, args) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain way: each completion in a full forward pass of its own, all logits at once."""
    answer = confidence = 0.0
    for target in targets:
        for y, n, cut_off in zip(target.completions, target.answer_lengths, target.cut_off):
            s = student(torch.tensor([target.prompt + y]))[0, len(target.prompt) - 1:-1]
            with torch.no_grad():
                t = teacher(torch.tensor([target.teacher_prompt + y]))[0, len(target.teacher_prompt) - 1:-1]
            kl = divergence(s, t, args.divergence)
            for position in range(args.skip_tokens, len(y)):
                if position < n:
                    answer = answer + kl[position]
                elif not cut_off:
                    confidence = confidence + kl[position]
    return answer, confidence


@pytest.mark.parametrize("kind, skip, chunk", [("reverse", 0, 2 ** 24), ("reverse", 3, 40), ("forward", 1, 100), ("jsd", 0, 20)])
def test_shared_prompts_and_chunks_change_neither_loss_nor_gradient(world, monkeypatch, kind, skip, chunk):
    args, tokenizer, task, student, teacher = world
    args = dataclasses.replace(args, divergence=kind, skip_tokens=skip)
    monkeypatch.setattr(caopd, "CHUNK", chunk)
    targets = [caopd.caopd_target(g, tokenizer, task, args) for g in some_groups(tokenizer)]
    ours, plain = distillation_backward(student, teacher, targets, 1.0, args), plain_loss(student, teacher, targets, args)
    assert ours == pytest.approx([sum_.item() for sum_ in plain], rel=1e-5)
    g = gradient(student, lambda: distillation_backward(student, teacher, targets, 0.5, args))
    g_plain = gradient(student, (0.5 * sum(plain)).backward)
    assert torch.allclose(g, g_plain, rtol=1e-4, atol=1e-5 * float(g.abs().max()))


def test_layers_that_are_computed_again_or_visit_change_neither_loss_nor_gradient(world):
    args, tokenizer, task, student, teacher = world
    targets = [caopd.caopd_target(g, tokenizer, task, args) for g in some_groups(tokenizer)]
    plain, g_plain = distillation_backward(student, teacher, targets, 1.0, args), gradient(student, lambda: distillation_backward(student, teacher, targets, 1.0, args))
    away, again = copy.deepcopy(teacher), copy.deepcopy(student)
    again.recompute = True
    away.model.layers = torch.nn.ModuleList(map(caopd.Visiting, away.model.layers))
    assert [p.data_ptr() for p in away.parameters()] != [p.data_ptr() for p in teacher.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(away.parameters(), teacher.parameters()))  # the order that the EMA relies on
    assert distillation_backward(again, away, targets, 1.0, args) == pytest.approx(plain, rel=1e-6)
    g = gradient(again, lambda: distillation_backward(again, away, targets, 1.0, args))
    assert torch.allclose(g, g_plain, rtol=1e-5, atol=1e-6 * float(g.abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prompt, rollouts, new", [(200, 8, 20), (20, 4, 100), (150, 1, 2)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_memory_estimate_is_what_autograd_keeps(family, prompt, rollouts, new, dtype):
    config = Config(family, 50, 192, 512, 2, 6, 2, 32 if family == "llama" else 64, tie_word_embeddings=True)
    model, kept = Transformer(config).to(getattr(torch, dtype)), {}
    weights = {p.data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    tree = caopd.Tree([[1] * prompt], [[[2] * new] * rollouts], torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(tree.input_ids, tree.positions, tree)
    args = dataclasses.replace(parse_args([]), rollouts=rollouts, max_new_tokens=new, dtype=dtype)
    estimate = 2 * len(tree.input_ids) * caopd.layer_bytes(config, prompt + rollouts * new, args)
    assert hidden.requires_grad and estimate == pytest.approx(sum(kept.values()), rel=0.2)


def test_a_run_that_cannot_fit_says_so_and_says_what_helps(tmp_path, real_model, capsys, monkeypatch):
    monkeypatch.setattr(caopd, "memory_free", lambda device: 2 ** 18)
    monkeypatch.setattr(caopd, "CHUNK", 2 ** 8)
    assert caopd.main(["--model", str(real_model), "--out", str(tmp_path / "out"), *REAL]) == 2
    shown = capsys.readouterr()
    assert "GiB needed on cpu" in shown.out and not (tmp_path / "out").exists()
    assert all(flag in shown.err for flag in ("--micro-tokens", "--dtype bfloat16 --rounding stochastic")) and shown.err.count("\n") == 1


def test_a_teacher_on_the_cpu_and_layers_computed_again_give_the_same_run(tmp_path):
    plain, other = run(tmp_path / "a"), run(tmp_path / "b", "--teacher-device", "cpu", "--recompute")
    assert all(plain[name] == other[name] for name in ("base", "opd", "caopd"))


def test_no_gradient_reaches_the_teacher_and_equal_contexts_give_no_loss(world):
    args, tokenizer, task, student, _ = world
    teacher = copy.deepcopy(student)
    targets = [dataclasses.replace(caopd.opd_target(g, tokenizer, task, args), teacher_prompt=g.prompt) for g in some_groups(tokenizer)]
    loss = sum(distillation_backward(student, teacher, targets, 1.0, args))
    assert abs(loss) < 1e-4 and all(p.grad is None for p in teacher.parameters())
    student.zero_grad()


def test_masks_by_hand():
    target = Target([1], [1], [[5, 6, 7, 1], [5, 6, 7], [1]], [2, 2, 0], [False, True, False])
    answer, confidence = caopd.loss_masks([target], 1, torch.device("cpu"))
    assert answer.int().tolist() == [0, 1, 0, 0] + [0, 1, 0] + [0]
    assert confidence.int().tolist() == [0, 0, 1, 1] + [0, 0, 0] + [0]


@pytest.mark.parametrize("tokens, budget, batches", [([3, 3, 3], 6, [[0, 1], [2]]), ([9, 1, 1], 4, [[0], [1, 2]]), ([], 4, []), ([1, 9, 1], 4, [[0], [1], [2]])])
def test_micro_batches(tokens, budget, batches):
    assert caopd.micro_batches(tokens, budget) == batches


# ----------------------------------------------------------------------------- the update

def tiny_model(dtype=torch.float32) -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config("llama", 11, 16, 24, 1, 4, 2, 4)).to(dtype)


SEED = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_small_steps_and_ema_increments_survive_bfloat16(rounding):
    """At lr 1e-5 a bfloat16 weight alone would not move, nor its EMA; float32 copies carry both, and so does chance on average."""
    model, args = tiny_model(torch.bfloat16), parse_args(["--dtype", "bfloat16", "--rounding", rounding])
    before = [p.detach().float().clone() for p in model.parameters()]
    optimizer, teacher = Optimizer(model, 1e-5, 300, args, schedule=lambda step, steps: 1.0), copy.deepcopy(model)
    ema = exact_weights(teacher, args)
    for _ in range(300):
        sum(p.float().sum() for p in model.parameters()).backward()  # every weight should fall by lr a step
        optimizer.step(SEED)
        ema_update(ema, optimizer.weights, 0.01, SEED)
    student_fell, teacher_fell = 300e-5, sum(1e-5 * (1 - 0.99 ** (300 - t)) for t in range(300))
    for name, weights, fell in (("student", optimizer.weights, student_fell), ("teacher", ema, teacher_fell)):
        assert all(w.dtype == (torch.float32 if rounding == "nearest" else torch.bfloat16) for w in weights)
        moved = torch.cat([(b - w.detach().float()).flatten() for b, w in zip(before, weights)])
        if rounding == "nearest":
            assert torch.allclose(moved, torch.full_like(moved, fell), rtol=0.02, atol=1e-6), name
        else:  # a mean with its standard error; norm weights of 1.0 have neighbours 0.004 away
            assert abs(moved.mean() - fell) < 5 * moved.std() / len(moved) ** 0.5 and moved.std() > 0, name
    alone = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(300):
        alone -= 1e-5
    assert alone.item() == 1.0  # the trap
    shown = torch.cat([(b - p.detach().float()).flatten() for b, p in zip(before, model.parameters())])
    assert shown.mean().item() == pytest.approx(student_fell, rel=0.1)


def test_stochastic_rounding_is_one_of_two_neighbours_and_right_on_average():
    x = torch.tensor([1.0, 1.001, -1.001, 3.14159, 1e-20, 0.0, 257.0]).repeat(20000, 1)
    rounded = caopd.round_stochastically(x, torch.Generator().manual_seed(1)).float()
    exact = x[0].double()
    for i in range(x.shape[1]):
        values = rounded[:, i].double().unique()
        assert len(values) <= 2 and values.min() <= exact[i] <= values.max()
        error = rounded[:, i].double().std() / 20000 ** 0.5
        assert abs(rounded[:, i].double().mean() - exact[i]) <= 5 * error


def test_adamw_is_torchs():
    """The same updates as torch.optim.AdamW with clipping, in float32."""
    a, b = tiny_model(), tiny_model()
    ours, reference = Optimizer(a, 1e-2, 6, parse_args([]), schedule=lambda step, steps: 1.0), torch.optim.AdamW(b.parameters(), 1e-2, (0.9, 0.95), weight_decay=0.0)
    for step in range(6):
        ids = torch.tensor([[1, 2, step]])
        a(ids).square().sum().backward()
        b(ids).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(b.parameters(), 1.0)
        assert ours.step(SEED) == pytest.approx(float(norm), rel=1e-4)
        reference.step()
        reference.zero_grad()
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(a.parameters(), b.parameters()))


def test_gradients_add_up_over_micro_batches_and_warm_up_then_cosine():
    a, b = tiny_model(), tiny_model()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    one, two = Optimizer(a, 1e-2, 20, parse_args([])), Optimizer(b, 1e-2, 20, parse_args([]))
    a(ids).square().sum().backward()
    for row in ids:
        b(row[None]).square().sum().backward()
    assert one.step(SEED) == pytest.approx(two.step(SEED), rel=1e-4)
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(a.parameters(), b.parameters()))
    rates = []
    for step in range(20):
        one.step_count = step
        rates.append(one.lr / 1e-2)
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0]) and rates[11] == pytest.approx(0.5) and 0 < rates[19] < 0.01
    assert all(x >= y for x, y in zip(rates[2:], rates[3:]))


@pytest.mark.parametrize("rate, expected", [(0.0, 1.0), (1.0, 3.0), (0.25, 1.5)])
def test_ema(rate, expected):
    average = [torch.ones(2)]
    ema_update(average, [torch.full((2,), 3.0)], rate, SEED)
    assert average[0].tolist() == [expected] * 2


# ----------------------------------------------------------------------------- whole runs

def run(out: Path, *flags: str) -> dict:
    assert caopd.main([*TINY, "--out", str(out), *flags]) == 0
    return json.loads((out / "results.json").read_text())


def weights(directory: Path) -> list[torch.Tensor]:
    return list(Transformer.from_pretrained(directory).state_dict().values())


def test_end_to_end_both_methods(tmp_path, capsys):
    first = run(tmp_path / "a")
    printed = capsys.readouterr().out
    assert {"base", "opd", "caopd"} <= first.keys()
    for name in ("base", "opd", "caopd"):
        assert {"accuracy", "mean_confidence", "ocg", "ece", "brier", "spr", "format", "by_grade"} <= first[name].keys()
        assert Transformer.from_pretrained(tmp_path / "a" / name).config.vocab_size == data.Tokenizer.from_pretrained(tmp_path / "a" / name).backend.get_vocab_size()
        assert set(first[name]["by_grade"]) == set(data.GRADES)
    for words in ("CaOPD", "OCG", "accuracy / confidence", "0.9 to 1.0", "OPD took accuracy from"):
        assert words in printed
    rows = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in rows] == [("base", s) for s in range(6)] + [(m, s) for m in ("opd", "caopd") for s in range(4)]
    assert not list((tmp_path / "a").glob("**/*.tmp")) and not list((tmp_path / "a").glob("**/checkpoint*"))

    again = run(tmp_path / "a")
    assert "Reusing the base model" in capsys.readouterr().out
    fresh = run(tmp_path / "b")
    other = run(tmp_path / "a", "--seed", "1")
    assert "Reusing" not in capsys.readouterr().out
    for name in ("base", "opd", "caopd"):
        assert first[name] == again[name] == fresh[name] and first[name]["reliability"] != [] and other["settings"]["seed"] == 1


@pytest.mark.parametrize("method, flags", [("opd", ["--divergence", "forward"]), ("caopd", ["--divergence", "jsd", "--context", "solution", "--skip-tokens", "2"]),
                                           ("caopd", ["--dtype", "bfloat16", "--teacher-rate", "1"]), ("opd", ["--teacher-rate", "0", "--micro-tokens", "64"]), ("caopd", ["--dtype", "bfloat16", "--rounding", "stochastic"]), ("opd", ["--skip-tokens", "99"])])
def test_each_method_alone_and_its_variants(tmp_path, method, flags):
    results = run(tmp_path, "--method", method, *flags)
    assert set(results) == {"base", method, "settings", "seconds"} and len(list(tmp_path.glob("*/config.json"))) == 2
    assert all(weight.isfinite().all() for weight in weights(tmp_path / method))  # also where no token is left in the loss


@pytest.mark.parametrize("update", [3, 6, 9, 12])  # the run makes 6 updates of the base, 4 of OPD and 4 of CaOPD
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_crash_at_any_moment_resumes_to_the_same_result(tmp_path, monkeypatch, update, dtype):
    flags = ["--save-every", "1", "--dtype", dtype, "--rounding", "stochastic"]  # which float32 does not need
    whole = run(tmp_path / "whole", *flags)
    real, updates = Optimizer.step, iter(range(99))

    def crash(self, generator):
        if next(updates) == update:
            raise MemoryError("the lights went out")
        return real(self, generator)

    monkeypatch.setattr(Optimizer, "step", crash)
    with pytest.raises(MemoryError):
        run(tmp_path / "cut", *flags)
    monkeypatch.setattr(Optimizer, "step", real)
    with (tmp_path / "cut/metrics.jsonl").open("a") as log:
        log.write('{"stage": "op')  # a line that was being written
    assert {k: v for k, v in run(tmp_path / "cut", *flags).items() if k not in ("seconds", "settings")} == \
        {k: v for k, v in whole.items() if k not in ("seconds", "settings")}
    for name in ("base", "opd", "caopd"):
        assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "whole" / name), weights(tmp_path / "cut" / name)))
    steps = [[(r["stage"], r["step"], r["loss"]) for r in map(json.loads, (tmp_path / d / "metrics.jsonl").read_text().splitlines())] for d in ("whole", "cut")]
    assert steps[0] == steps[1]


def test_the_oracle_row(tmp_path, capsys):
    results = run(tmp_path, "--method", "caopd", "--oracle", "4")
    assert capsys.readouterr().out.count("oracle μ(x)") == 2
    for name in ("base", "caopd"):
        assert 0 <= results[name]["oracle"]["brier"] <= 0.25 * 4 / 3 and results[name]["oracle"]["accuracy"] == results[name]["accuracy"]


def test_the_supervised_documents_teach_answers_first_and_then_every_grade_with_and_without_a_demonstration():
    args, task = parse_args(["--sft-steps", "10", "--sft-answers", "0.5", "--sft-documents", "32"]), data.arithmetic_task(0, 8, words=False)
    (early, unfinished), (later, finished) = caopd.documents(task, args, 4), caopd.documents(task, args, 5)
    late = later + caopd.documents(task, args, 6)[0]
    assert not unfinished and finished
    assert all(text.endswith("\nConfidence: ") and data.verify(data.Example("arithmetic", "", text.split("\n")[0]), text) for _, text in early)
    asked = {side: {len(m[0]["content"].split("\n")[0]) for m, _ in late if ("\n" in m[0]["content"]) is side} for side in (False, True)}
    assert asked[False] == asked[True] == {4, 5, 6, 7, 8}  # 1+1= to 3+3=
    assert sum("\n" in m[0]["content"] for m, _ in late) == 32 and all(data.parse_confidence(text) is not None for _, text in late)


def test_a_checkpoint_of_other_settings_is_not_taken(tmp_path):
    args = dataclasses.replace(parse_args([*TINY, "--out", str(tmp_path)]), dtype="float32")
    model = tiny_model()
    optimizer = Optimizer(model, 1e-3, 5, args)
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer.step(SEED)
    caopd.save_checkpoint(tmp_path / "opd", optimizer, [], caopd.settings(args, "opd"))
    fresh = Optimizer(tiny_model(), 1e-3, 5, args)
    assert caopd.load_checkpoint(tmp_path / "opd", fresh, [], caopd.settings(dataclasses.replace(args, lr=1.0), "opd")) == 0
    assert caopd.load_checkpoint(tmp_path / "opd", fresh, [], caopd.settings(args, "opd")) == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.model.parameters()))
    (tmp_path / "opd/checkpoint.safetensors").write_bytes(b"cut")
    with pytest.raises(UsageError, match="not a readable checkpoint"):
        caopd.load_checkpoint(tmp_path / "opd", fresh, [], {})


@pytest.fixture(scope="module")
def real_model(tmp_path_factory) -> Path:
    """A Hugging Face directory as a user would pass it: random weights, a character tokenizer with words in it."""
    import string
    import tokenizers
    directory = tmp_path_factory.mktemp("model")
    vocabulary = ["<eos>", "<user>", "<assistant>", *string.printable]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="<eos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(vocabulary[:3])
    template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}<assistant>"
    data.Tokenizer(backend, {"eos_token": "<eos>", "chat_template": template}, {}).save_pretrained(directory)
    torch.manual_seed(0)
    Transformer(Config("qwen2", len(vocabulary), 16, 24, 1, 4, 2, 4, max_position_embeddings=1024)).save_pretrained(directory)
    return directory


REAL = ["--steps", "2", "--prompts", "2", "--rollouts", "2", "--max-new-tokens", "8", "--eval-questions", "4"]


def write(path: Path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" if not isinstance(row, str) else row + "\n" for row in rows))
    return str(path)


ROWS = {"mcq": [{"prompt": f"Q{i}?\nA: 1\nB: 2", "answer": "AB"[i % 2], "system": "Choose."} for i in range(4)],
        "tool": [{"prompt": f"T{i}", "answer": [{"Action": "go", "Action_Input": json.dumps({"n": i})}]} for i in range(4)],
        "arithmetic": [{"prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(4)]}


@pytest.mark.parametrize("task, files, extra", [("arithmetic", False, ["--sft-steps", "1"]), ("arithmetic", True, []), ("mcq", True, ["--method", "caopd"]), ("tool", True, ["--sft-steps", "2", "--method", "opd"])])
def test_a_model_directory_from_start_to_table(tmp_path, real_model, task, files, extra):
    flags = ["--model", str(real_model), "--task", task, "--out", str(tmp_path / "out"), *REAL, *extra]
    if files:
        flags += ["--train", write(tmp_path / "t.jsonl", *ROWS[task]), "--eval", write(tmp_path / "e.jsonl", *ROWS[task])]
    assert caopd.main(flags) == 0
    assert (tmp_path / "out/results.json").exists() and not list((tmp_path / "out").glob("**/*.tmp"))


def test_prompts_over_the_limit_are_refused_or_left_out(tmp_path, real_model, capsys):
    rows = ROWS["mcq"] + [{"prompt": "long " * 100, "answer": "A"}]
    flags = ["--model", str(real_model), "--task", "mcq", "--out", str(tmp_path / "out"), *REAL, "--max-prompt", "400",
             "--train", write(tmp_path / "t.jsonl", *rows), "--eval", write(tmp_path / "e.jsonl", *ROWS["mcq"])]
    assert caopd.main(flags) == 2
    assert "t.jsonl, line 5: the prompt has" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert caopd.main([*flags, "--skip-long"]) == 0
    assert "Left out 1 of 5 questions" in capsys.readouterr().out


# ----------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("flags, words", [
    (["--rollouts", "0"], "--rollouts 0"), (["--lr", "0"], "--lr 0"), (["--lr", "nan"], "--lr nan"), (["--lr", "-1"], "--lr -1"), (["--steps", "x"], "--steps"),
    (["--task", "poetry"], "--task"), (["--method", "sft"], "--method"), (["--nonsense"], "--nonsense"), (["--temperature", "0"], "--temperature"),
    (["--teacher-rate", "1.5"], "--teacher-rate"), (["--device", "tpu"], "--device tpu"), (["--device", "cuda:99"], "--device cuda:99"), (["--device", "what"], "--device what"),
    (["--task", "mcq"], "needs both --train"), (["--train", "x.jsonl"], "--train"), (["--model", "/nowhere"], "--model /nowhere"), (["--model", "no dir"], "--model no dir"),
    (["--prompts", "0"], "--prompts"), (["--max-new-tokens", "0"], "--max-new-tokens"), (["--max-prompt", "2"], "--max-prompt 2"), (["--width", "20"], "--width"),
    (["--max-new-tokens", "200"], "over the model's 128")])
def test_a_bad_request_is_one_sentence_and_exit_code_2(tmp_path, capsys, flags, words):
    assert caopd.main([*TINY, "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("caopd.py: error: ")
    assert not (tmp_path / "out").exists()


def test_bad_files_and_directories_are_one_sentence(tmp_path, real_model, capsys):
    good = write(tmp_path / "good.jsonl", *ROWS["mcq"])

    def refused(model, train, words, *more):
        code = caopd.main(["--model", str(model), "--task", "mcq", "--train", str(train), "--eval", good, "--out", str(tmp_path / "out"), *REAL, *more])
        error = capsys.readouterr().err
        assert code == 2 and words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()

    refused(real_model, write(tmp_path / "bad.jsonl", ROWS["mcq"][0], "{"), "bad.jsonl, line 2: not JSON")
    refused(real_model, write(tmp_path / "lacks.jsonl", {"prompt": "p"}), "lacks.jsonl, line 1: no `answer`")
    refused(real_model, write(tmp_path / "other.jsonl", ROWS["tool"][0]), "cannot verify")
    refused(real_model, write(tmp_path / "empty.jsonl"), "no examples")
    refused(real_model, tmp_path / "absent.jsonl", "cannot be read")
    refused(tmp_path, good, "no config.json")
    refused(good, good, "no such directory")
    cut = tmp_path / "cut"
    shutil.copytree(real_model, cut)
    (cut / "model.safetensors").write_bytes((real_model / "model.safetensors").read_bytes()[:-8])
    refused(cut, good, "not a readable safetensors file")
    (cut / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": "{{ raise_exception('no\\nsuch role') }}"}))
    refused(cut, good, "the chat template failed: no such role")
    (cut / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    refused(cut, good, "'mamba' is not supported")


def test_an_unwritable_directory_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert caopd.main([*TINY, "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err and (tmp_path / "file").read_text() == "mine"


def test_a_hub_name_that_cannot_be_fetched_is_one_sentence(tmp_path, capsys, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no network\nat all")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert caopd.main(["--model", "owner/name", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "owner/name" in error and "pass its directory" in error and error.count("\n") == 1


def test_help_names_every_flag():
    text = subprocess.run([sys.executable, "caopd.py", "--help"], capture_output=True, text=True, cwd=Path(caopd.__file__).parent).stdout
    for field in dataclasses.fields(Args):
        assert "--" + field.name.replace("_", "-") in text and len(field.metadata["help"]) > 8


def test_the_readme_names_what_is_there():
    text, modules = Path(caopd.__file__).with_name("README.md").read_text(), {"caopd": caopd, "data": data, "model": model}
    names = re.findall(r"`(caopd|data|model)\.([\w.]+)`", text)
    assert len(names) > 15
    for module, name in names:
        assert name == "py" or operator.attrgetter(name)(modules[module]), f"{module}.{name}"
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Args)}
    for command in re.findall(r"^python caopd\.py .*(?:\\\n.*)*", text, re.MULTILINE):
        assert set(re.findall(r"--[a-z-]+", command)) <= flags, command
