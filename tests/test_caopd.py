"""caopd.py against independent oracles: target replacement and the loss against Eq. 7, estimators
against enumeration, readouts against brute force, and runs against crashes and bad requests."""

import copy
import ctypes
import dataclasses
import functools
import itertools
import json
import math
import operator
import os
import re
import shutil
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import caopd
import data
import files
import model
import optim
import pipeline
from caopd import (METHODS, AdamW, Args, Completion, Group, Rollout, Sampling, Target,
                   accumulate_gradient, calibration, ema_update, make_targets, parse_args)
from files import BadInput, fingerprint, to_json
from memory import check_memory, keep_freed_memory, memory_needed, return_freed_memory
from metrics import VALUES
from model import Config, Transformer
from stage import TROUBLE, Stage
from test_data import sentencepiece
from test_metrics import FIGURES, brute_force

TINY = ["--width", "16", "--layers", "1", "--sft-steps", "6", "--sft-documents", "8",
        "--steps", "4", "--prompts", "4", "--rollouts", "3", "--eval-questions", "24",
        "--oracle", "0", "--paper-samples", "0"]
CPU = torch.device("cpu")
END = 1  # the end token of the embedded world


# ----------------------------------------------------------------------------- models and worlds


def noisy(config: Config, seed: int, noise: float = 0.3) -> Transformer:
    """A random network, whose completions are noise with some of the format in it."""
    torch.manual_seed(seed)
    network = Transformer(config)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight) * noise)
    return network


@pytest.fixture(scope="module")
def world():
    """(args, tokenizer, task, student, teacher) of the embedded world, with random networks."""
    args = dataclasses.replace(parse_args(TINY), dtype="float32")
    tokenizer = data.toy_tokenizer()
    config = pipeline.toy_model(args, tokenizer)
    task = data.arithmetic_task(0, 24, words=False)
    return args, tokenizer, task, noisy(config, 0), noisy(config, 1)


@pytest.fixture(scope="module")
def real_model(tmp_path_factory) -> Path:
    """A Hugging Face directory as a user would pass it: random weights, a character tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    vocabulary = ["<eos>", "<user>", "<assistant>", *string.printable]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {token: i for i, token in enumerate(vocabulary)}, unk_token="<eos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(vocabulary[:3])
    template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}<assistant>"
    config = {"eos_token": "<eos>", "chat_template": template}
    data.Tokenizer(backend, config, {}).save_pretrained(directory)
    torch.manual_seed(0)
    Transformer(Config("qwen2", len(vocabulary), 16, 24, 1, 4, 2, 4,
                       max_position_embeddings=1024)).save_pretrained(directory)
    return directory


SMALL = ["--width", "48", "--layers", "2", "--sft-steps", "250", "--sft-documents", "48",
         "--sft-lr", "1e-2", "--sft-noise", "0.1", "--sft-answers", "0.2", "--steps", "3",
         "--prompts", "8", "--rollouts", "4", "--eval-questions", "100", "--eval-samples", "2",
         "--oracle", "2", "--paper-samples", "3", "--method", ",".join(METHODS)]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> Path:
    """The directory of one run with all methods.

    Its base knows some sums of two digits, and follows demonstrations well enough to teach.
    """
    out = tmp_path_factory.mktemp("small")
    sums = functools.partial(data.arithmetic_task, grades=("1+1",), eval_grades=("1+1",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "arithmetic_task", sums)
        assert caopd.main([*SMALL, "--out", str(out)]) == 0
    return out


def hand_made(tokenizer, question: str, answer: str, *texts: str, task: str = "arithmetic",
              end: int = END) -> Group:
    """A group of rollouts with these texts. One that ends in ~ was truncated there."""
    example = data.Example(task, question, answer, demo=answer)
    rollouts = []
    for text in texts:
        truncated, text = text.endswith("~"), text.removesuffix("~")
        ids = tokenizer.encode(text) + ([] if truncated else [end])
        correct = not truncated and data.verify(example, text)
        confidence = None if truncated else data.parse_confidence(text)
        rollouts.append(Rollout(ids, text, truncated, correct, confidence))
    return Group(example, tokenizer.chat([{"role": "user", "content": question}]), rollouts)


def some_groups(tokenizer) -> list[Group]:
    """Rollouts that are right, wrong, without a segment, with text after it, and truncated."""
    return [hand_made(tokenizer, "12+34=", "64", "64\nConfidence: 0.90", "54\nConfidence: 1.00",
                      "64", "64\nConfidence: 0.~"),
            hand_made(tokenizer, "7*8=", "65", "65\nConfidence: 0.50\n1", "\nConfidence: 0.50",
                      "65\nConfidence: 0.25", "1111~")]


def outcome(*correct: bool) -> Group:
    """A group of which nothing matters but which rollouts are correct."""
    example = data.Example("arithmetic", "1+1=", "2")
    return Group(example, [2], [Rollout([END], "", False, bool(r), None) for r in correct])


def targets_of(groups: list[Group], tokenizer, task, confidence: Callable | None,
               context: str | None = "demo") -> list[Target]:
    """The targets of a method without a reward."""
    return [target for group in groups for target in make_targets(
        group, confidence and confidence(group), [0.0] * len(group.rollouts), tokenizer,
        task.wording, context)]


# ----------------------------------------------------------------------------- step 1: rollout


def test_rollout_keeps_the_rollouts_of_a_prompt_together_and_verifies_them(world):
    args, tokenizer, task, student, _ = world
    examples = task.draw(5, "distill", 0)
    groups = caopd.rollout(student, tokenizer, examples, task.wording, 3,
                           caopd.rollout_sampling(args), torch.Generator().manual_seed(0))
    assert [group.example for group in groups] == examples
    for group in groups:
        assert len(group.rollouts) == 3
        assert group.prompt == tokenizer.chat([{"role": "user", "content": group.example.question}])
        for rollout in group.rollouts:
            assert rollout.text == tokenizer.decode(rollout.ids)
            assert rollout.truncated == (rollout.ids[-1] != END)
            assert rollout.correct == (rollout.ids[-1] == END
                                       and data.verify(group.example, rollout.text))
    assert len({rollout.truncated for group in groups for rollout in group.rollouts}) == 2


def test_a_truncated_completion_is_wrong_whatever_it_says(world, monkeypatch):
    args, tokenizer, task, student, _ = world
    example = data.Example("arithmetic", "12+34=", "64", demo="64")
    right, wrong = (tokenizer.encode(text) for text in ("64\nConfidence: 0.90", "54"))
    sampled = [right + [END], right, wrong + [END], wrong]
    monkeypatch.setattr(caopd, "generate", lambda *_, **__: sampled)
    group, = caopd.rollout(student, tokenizer, [example], task.wording, 4,
                           caopd.rollout_sampling(args), torch.Generator())
    assert [rollout.ids for rollout in group.rollouts] == sampled
    assert [rollout.truncated for rollout in group.rollouts] == [False, True, False, True]
    assert [rollout.correct for rollout in group.rollouts] == [True, False, False, False]


@pytest.mark.parametrize("costs, budget, batches", [
    ([3, 3, 3], 6, [[0, 1], [2]]), ([9, 1, 1], 4, [[0], [1, 2]]), ([], 4, []),
    ([1, 9, 1], 4, [[0], [1], [2]])])
def test_micro_batches(costs, budget, batches):
    assert caopd.micro_batches(costs, budget) == batches


# --------------------------------------------------------------------- step 2: empirical confidence


def test_empirical_confidence_counts_truncated_rollouts_as_wrong(world):
    groups = some_groups(world[1])
    assert [[rollout.correct for rollout in group.rollouts] for group in groups] == \
        [[True, False, True, False], [True, False, True, False]]
    assert [caopd.mu_hat(group) for group in groups] == [0.5, 0.5]


def test_leave_one_out_by_hand():
    assert caopd.leave_one_out(outcome(1, 0, 0, 1)) == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1 / 3])
    assert caopd.leave_one_out(outcome(1, 0)) == [0, 1]
    assert caopd.leave_one_out(outcome(1, 1, 1)) == [1, 1, 1]


@pytest.mark.parametrize("k", [2, 3, 5, 8])
@pytest.mark.parametrize("mu", [0.1, 0.5, 0.7])
def test_mu_hat_tells_a_rollout_its_own_outcome_and_leave_one_out_does_not(k, mu):
    """Enumeration of all 2^K outcomes: E[target | R=1] - E[target | R=0] is 1/K, and 0."""
    gaps = {}
    for estimate in (caopd.mu_hat, caopd.leave_one_out):
        sums, mass = [0.0, 0.0], [0.0, 0.0]
        for correct in itertools.product((0, 1), repeat=k):
            probability = mu ** sum(correct) * (1 - mu) ** (k - sum(correct))
            stated = np.broadcast_to(estimate(outcome(*correct)), k)
            assert np.mean(stated) == pytest.approx(sum(correct) / k)
            for r, value in zip(correct, stated):
                sums[r] += probability * value
                mass[r] += probability
        gaps[estimate] = sums[1] / mass[1] - sums[0] / mass[0]
    assert gaps[caopd.mu_hat] == pytest.approx(1 / k)
    assert gaps[caopd.leave_one_out] == pytest.approx(0, abs=1e-12)


def test_self_consistency_compares_answers_and_not_texts(world):
    group = hand_made(world[1], "12+34=", "64", "64\nConfidence: 0.20", "3*2\n64", "54", "+", "64")
    group.reference = "64\nConfidence: 1.00"
    assert caopd.self_consistency(group) == 0.6
    group.reference = "1+54"  # The reference may be wrong, and agreement with it counts.
    assert caopd.self_consistency(group) == 0.2
    for rollout in group.rollouts:
        rollout.correct = not rollout.correct
    assert caopd.self_consistency(group) == 0.2


def test_self_consistency_compares_choices_in_any_form(world):
    group = hand_made(world[1], "Which?", "A", "<answer>\nB\n</answer>", "The answer is B.", "b",
                      "<answer>A</answer>\nConfidence: 0.50", "Answer B, not A", task="mcq")
    group.reference = "I think so.\n<answer>B</answer>\nConfidence: 0.90"
    assert caopd.self_consistency(group) == 0.8


def test_a_truncated_rollout_states_nothing_and_agrees_with_none(world):
    """Cut off behind "0.", a confidence of 0.95 would read as 0.00."""
    group = hand_made(world[1], "12+34=", "64", "64\nConfidence: 0.~", "64\nConfidence: 0.50")
    assert [rollout.confidence for rollout in group.rollouts] == [None, 0.5]
    assert caopd.calibrated_correctness(group.rollouts[0]) == 0
    group.reference = "64"
    assert caopd.self_consistency(group) == 0.5 == caopd.mu_hat(group)


def test_a_solution_states_the_value_that_the_teacher_is_told(world):
    """Under leave-one-out too, where each rollout has a value of its own."""
    _, tokenizer, task, *_ = world
    group = hand_made(tokenizer, "12+34=", "64", "64\nConfidence: 0.90", "64\nConfidence: 0.80",
                      "54\nConfidence: 0.70", "54\nConfidence: 0.70")
    targets = make_targets(group, caopd.leave_one_out(group), [0.0] * 4, tokenizer, task.wording,
                           "solution")
    for target in targets:
        assert tokenizer.decode(target.teacher_prompt).endswith("64\nConfidence: 0.50")


@pytest.mark.parametrize("name", ["sampled", "vopd", "caopd-vopd", "grpo", "rlcr"])
def test_estimators_from_samples_need_temperature_one(name):
    with pytest.raises(BadInput, match="--temperature 0.7"):
        parse_args(["--method", name, "--temperature", "0.7"])
    parse_args(["--method", "opd,caopd,caopd-direct", "--temperature", "0.7"])


def test_a_reference_without_an_answer_agrees_with_none(world):
    group = hand_made(world[1], "12+34=", "64", "", "+", "64", "\nConfidence: 0.64")
    for reference in ("", "+", "\nConfidence: 0.64"):
        group.reference = reference
        assert caopd.self_consistency(group) == 0


def test_references_are_the_teachers_own_answers(world, monkeypatch):
    """The teacher is asked once a prompt, with its context (x, z)."""
    args, tokenizer, task, student, teacher = world
    groups, asked = some_groups(tokenizer), []

    def generate(network, prompts, *_, num_samples, **__):
        asked.append((network, prompts, num_samples))
        return [tokenizer.encode(f"{i}1") + [END] for i in range(len(prompts))]
    monkeypatch.setattr(caopd, "generate", generate)
    caopd.add_references(groups, teacher, tokenizer, task.wording, caopd.rollout_sampling(args),
                         torch.Generator())
    (network, prompts, samples), = asked
    assert network is teacher and samples == 1
    assert [tokenizer.decode(prompt) for prompt in prompts] == \
        ["12+34=\n64\nConfidence: 1.00", "7*8=\n65\nConfidence: 1.00"]
    assert [group.reference for group in groups] == ["01", "11"]


def test_a_reference_that_was_cut_off_agrees_with_none(world, monkeypatch):
    args, tokenizer, task, _, teacher = world
    group = hand_made(tokenizer, "12+34=", "64", "6", "64")
    for end, agree in (([END], 0.5), ([], 0.0)):
        monkeypatch.setattr(caopd, "generate", lambda *_, **__: [tokenizer.encode("64") + end])
        caopd.add_references([group], teacher, tokenizer, task.wording,
                             caopd.rollout_sampling(args), torch.Generator())
        assert caopd.self_consistency(group) == agree


# ----------------------------------------------------------------------- step 3: target replacement


def test_replacement_touches_nothing_but_the_confidence(world):
    _, tokenizer, task, *_ = world
    for group in some_groups(tokenizer):
        for rollout, correct in zip(group.rollouts, (True, False, False, False)):
            rollout.correct = correct  # mu_hat is 0.25
        (opd,), (ours,) = (targets_of([group], tokenizer, task, f) for f in (None, caopd.mu_hat))
        assert opd.sequences == [rollout.ids for rollout in group.rollouts]
        assert ours.prompt == opd.prompt == group.prompt
        assert sum(ours.completions.values()) == sum(opd.completions.values()) == 4
        kept, ours_kept = ({(y.ids[:y.answer_length], y.answer_length, y.truncated)
                            for y in target.completions} for target in (opd, ours))
        assert kept == ours_kept
        for replaced in ours.completions:
            if replaced.truncated:
                assert replaced in opd.completions and replaced.ids[-1] != END
            else:
                assert data.parse_confidence(tokenizer.decode(replaced.ids)) == 0.25
                assert replaced.ids[-1] == END
        said = [data.parse_confidence(tokenizer.decode(t.teacher_prompt)) for t in (opd, ours)]
        assert said == [1.0, 0.25]  # z and z̃
        assert len(opd.teacher_prompt) == len(ours.teacher_prompt)


def test_the_teacher_is_told_in_words_what_to_state(real_model):
    tokenizer = data.Tokenizer.from_pretrained(real_model)
    group = hand_made(tokenizer, "12+34?", "46", "46\nConfidence: 0.9", "45", "46", "1", end=0)
    wording = data.WORDS
    opd, ours = (make_targets(group, confidence, [0.0] * 4, tokenizer, wording, "demo")[0]
                 for confidence in (None, caopd.mu_hat(group)))
    report = wording.report.format(confidence="0.50")
    assert report not in tokenizer.decode(opd.teacher_prompt)
    assert report in tokenizer.decode(ours.teacher_prompt)
    assert "46\nConfidence: 1.00" in tokenizer.decode(opd.teacher_prompt)
    assert "46\nConfidence: 0.50" in tokenizer.decode(ours.teacher_prompt)
    assert "response could look like this:\n46\n" in tokenizer.decode(ours.teacher_prompt)
    solved, _ = make_targets(group, caopd.mu_hat(group), [0.0] * 4, tokenizer, wording, "solution")
    assert "is a correct solution:\n46\n" in tokenizer.decode(solved.teacher_prompt)
    assert "could look like" not in tokenizer.decode(solved.teacher_prompt)


@pytest.mark.parametrize("replace", [
    places for n in range(4) for places in itertools.combinations(caopd.REPLACEMENTS, n)])
def test_each_of_the_replacements_can_be_left_out(real_model, replace):
    tokenizer = data.Tokenizer.from_pretrained(real_model)
    group = hand_made(tokenizer, "12+34?", "46", "46\nConfidence: 0.9", "45", "46", "1", end=0)
    target, = make_targets(group, caopd.mu_hat(group), [0.0] * 4, tokenizer, data.WORDS, "demo",
                           replace)
    stated = {data.parse_confidence(tokenizer.decode(ids)) for ids in target.sequences}
    assert stated == ({0.5} if "completion" in replace else {0.9, None})
    context = tokenizer.decode(target.teacher_prompt)
    assert ("46\nConfidence: 0.50" in context) == ("demonstration" in replace)
    assert ("46\nConfidence: 1.00" in context) == ("demonstration" not in replace)
    report = data.WORDS.report.format(confidence="0.50")
    assert (report in context) == ("instruction" in replace)


def test_a_method_without_a_teacher_on_the_confidence_leaves_the_answers_end_to_it(world):
    """What it learns token by token is what was replaced, and not where the student stopped."""
    _, tokenizer, task, *_ = world
    for group in some_groups(tokenizer):
        plain, ended = (make_targets(group, caopd.mu_hat(group), [0.0] * 4, tokenizer, task.wording,
                                     "demo", end_in_answer=flag)[0] for flag in (False, True))
        assert plain.sequences == ended.sequences
        for one, other in zip(plain.completions, ended.completions):
            assert other.answer_length - one.answer_length == (not one.truncated)
            learned = tokenizer.decode(other.ids[other.answer_length:])
            assert one.truncated or learned == f"{caopd.mu_hat(group):.2f}"


def test_each_rollout_states_its_own_leave_one_out_estimate(world):
    _, tokenizer, task, *_ = world
    group = hand_made(tokenizer, "7*8=", "65", "65", "6\nConfidence: 0.50", "7", "65", "1~")
    (target,) = targets_of([group], tokenizer, task, caopd.leave_one_out)
    stated = [data.parse_confidence(tokenizer.decode(ids)) for ids in target.sequences]
    assert stated == [0.25, 0.5, 0.5, None] and list(target.completions.values()) == [2, 1, 1, 1]
    assert data.parse_confidence(tokenizer.decode(target.teacher_prompt)) == 0.4  # mu_hat


def test_a_method_without_a_teacher_has_no_context(world):
    _, tokenizer, task, *_ = world
    group = some_groups(tokenizer)[0]
    advantages = [0.5, -1.0, 2.0, 0.0]
    target, = make_targets(group, None, advantages, tokenizer, task.wording, None)
    assert target.teacher_prompt == []
    assert [y.advantage for y in target.completions] == advantages
    assert target.sequences == [rollout.ids for rollout in group.rollouts]


def test_solution_context_is_a_correct_rollout_or_none(world):
    _, tokenizer, task, *_ = world
    group = some_groups(tokenizer)[0]
    for confidence, first, second in ((None, "64\nConfidence: 0.90", "64"),
                                      (caopd.mu_hat, *["64\nConfidence: 0.50"] * 2)):
        shown = targets_of([group], tokenizer, task, confidence, "solution")
        assert [tokenizer.decode(target.teacher_prompt) for target in shown] == \
            ["12+34=\n" + first, "12+34=\n" + second]
    for rollout in group.rollouts:
        rollout.correct = False
    for confidence in (None, caopd.mu_hat):
        assert targets_of([group], tokenizer, task, confidence, "solution") == []


@pytest.mark.parametrize("correct", list(itertools.product((False, True), repeat=4)))
def test_no_rollout_is_shown_its_own_solution(world, correct):
    """Every rollout has another correct one in its teacher's context, or it is left out."""
    _, tokenizer, task, *_ = world
    group = hand_made(tokenizer, "7*8=", "65", "1", "2", "3", "4")
    for rollout, right in zip(group.rollouts, correct):
        rollout.correct = right
    targets = make_targets(group, None, [10.0, 20.0, 30.0, 40.0], tokenizer, task.wording,
                           "solution")
    scored = []
    for target in targets:
        shown = tokenizer.decode(target.teacher_prompt).removeprefix("7*8=\n")
        assert correct[int(shown) - 1]
        texts = [tokenizer.decode(ids) for ids in target.sequences]
        assert shown not in texts
        for y, text in zip(target.completions, texts):
            assert y.advantage == 10.0 * int(text) and y.answer_length == 1 and not y.truncated
        scored += texts
    alone = [k for k in range(4) if sum(correct) - correct[k] == 0]  # No other one is correct.
    assert sorted(scored) == [str(k + 1) for k in range(4) if k not in alone]


def test_rollouts_without_a_solution_are_counted(world, tmp_path, monkeypatch):
    """A lone success is left out, and so is a whole prompt without one."""
    args, tokenizer, task, student, _ = world
    rows = {"lone": ("64", "5", "4", "3"), "none": ("1", "2", "3", "4"),
            "both": ("64", "64\nConfidence: 0.50", "1", "2")}
    for name, left_out in (("lone", 1), ("none", 4), ("both", 0)):
        group = hand_made(tokenizer, "12+34=", "64", *rows[name])
        monkeypatch.setattr(caopd, "rollout", lambda *_: [group])
        out = tmp_path / name
        out.mkdir()
        once = dataclasses.replace(args, steps=1, context="solution")
        for method in ("caopd", "grpo"):
            caopd.train(copy.deepcopy(student), method, tokenizer, task, once, out)
        ours, grpo = metrics(out)
        assert ours["left_out"] == left_out and grpo["left_out"] == 0
        assert (ours["loss"] == 0) == (name == "none")


# --------------------------------------------------------------------------- rewards and advantages


@pytest.mark.parametrize("text, graded, reward", [
    ("64\nConfidence: 0.80", 1, 0.5 + 0.5 + 0.5 * (1 - 0.04)),
    ("64\nConfidence: 1.00", 1, 1.5), ("64\nConfidence: 0.00", 1, 1.0),
    ("54\nConfidence: 0.80", 0, 0.5 + 0.5 * (1 - 0.64)),
    ("54\nConfidence: 0.00", 0, 1.0), ("54\nConfidence: 1.00", 0, 0.5),
    ("64", 1, 0.0), ("64\nConfidence: 1.11", 1, 0.0), ("54\nConfidence: ", 0, 0.0)])
def test_rewards_by_hand(world, text, graded, reward):
    rollout = hand_made(world[1], "12+34=", "64", text).rollouts[0]
    assert METHODS["grpo"].reward(rollout) == graded
    assert METHODS["rlcr"].reward(rollout) == pytest.approx(reward)


def test_advantages_by_hand():
    reward = caopd.correctness
    centered = caopd.group_advantages(outcome(1, 0, 0, 0), reward, False)
    assert centered == [0.75, -0.25, -0.25, -0.25]
    standardized = caopd.group_advantages(outcome(1, 0, 0, 0), reward, True)
    assert standardized == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-3)  # over 0.5
    for correct in ((1, 1, 1), (0, 0, 0, 0)):
        for standardize in (False, True):
            group = outcome(*correct)
            assert caopd.group_advantages(group, reward, standardize) == [0.0] * len(correct)
    assert caopd.group_advantages(outcome(1, 0), None, False) == [0.0, 0.0]
    assert METHODS["grpo"].standardize and not METHODS["rlcr"].standardize


def log_probability(network: Transformer, prompt: list[int], ids: list[int]) -> torch.Tensor:
    logits = network(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum()


@pytest.mark.parametrize("advantage", [0.7, -0.7])
@pytest.mark.parametrize("text", ["64\nConfidence: 0.90", "54", "6"])
def test_the_policy_gradient_raises_what_has_a_positive_advantage(world, advantage, text):
    """Its gradient is -A ∇ log π(y), and a step against it moves log π(y) the way that A says."""
    _, tokenizer, task, student, _ = world
    student = copy.deepcopy(student)
    group = hand_made(tokenizer, "12+34=", "64", text)
    targets = make_targets(group, None, [advantage], tokenizer, task.wording, None)
    grpo = METHODS["grpo"]

    def backward():
        accumulate_gradient(student, None, targets, grpo.answer_loss, grpo.confidence_loss, 0, 1.0)
    ids = group.rollouts[0].ids
    g = gradient(student, backward)
    plain = gradient(student, lambda: (
        -advantage * log_probability(student, group.prompt, ids)).backward())
    assert torch.allclose(g, plain, rtol=1e-4, atol=1e-5 * float(g.abs().max()))
    with torch.no_grad():
        before = log_probability(student, group.prompt, ids)
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(student.parameters()) - 1e-3 * g / g.norm(),
            student.parameters())
        after = log_probability(student, group.prompt, ids)
    assert (after - before) * advantage > 0


def test_reinforcement_learning_makes_no_teacher(world, tmp_path, monkeypatch):
    args, tokenizer, task, student, _ = world

    def no_teacher(*_):
        raise AssertionError("a teacher was made")
    monkeypatch.setattr(caopd, "make_teacher", no_teacher)
    once = dataclasses.replace(args, steps=1)
    for name in ("grpo", "rlcr"):
        caopd.train(copy.deepcopy(student), name, tokenizer, task, once, tmp_path)
    with pytest.raises(AssertionError, match="a teacher was made"):
        caopd.train(copy.deepcopy(student), "opd", tokenizer, task, once, tmp_path)


# ----------------------------------------------------------------------------- step 4: the loss


def gradient(network: Transformer, backward: Callable) -> torch.Tensor:
    """What backward() leaves in the network's gradients, flat."""
    network.zero_grad()
    backward()
    found = torch.cat([p.grad.flatten() for p in network.parameters()])
    network.zero_grad()
    return found


def assert_same_gradient(g: torch.Tensor, expected: torch.Tensor) -> None:
    assert g.abs().max() > 0
    assert torch.allclose(g, expected, rtol=1e-4, atol=1e-5 * float(g.abs().max()))


@pytest.mark.parametrize("kind", caopd.DIVERGENCES)
def test_the_gradient_at_answer_positions_is_opds(world, kind):
    """Eq. 7: with the context held fixed, replacement leaves the sum over I_a and its gradient."""
    _, tokenizer, task, student, teacher = world
    loss, groups = caopd.DIVERGENCES[kind], some_groups(tokenizer)
    opd, ours = (targets_of(groups, tokenizer, task, f) for f in (None, caopd.mu_hat))
    ours = [dataclasses.replace(target, teacher_prompt=t.teacher_prompt)
            for target, t in zip(ours, opd)]

    def backward(targets, on_confidence):
        return accumulate_gradient(student, teacher, targets, loss, on_confidence, 0, 1.0)
    (a, c, _), (a_ours, c_ours, _) = backward(opd, loss), backward(ours, loss)
    assert a == pytest.approx(a_ours, rel=1e-6) and c != pytest.approx(c_ours, rel=1e-2)
    g, g_ours = (gradient(student, lambda: backward(targets, nothing)) for targets in (opd, ours))
    assert_same_gradient(g, g_ours)


def test_divergences_by_enumeration_and_closed_form():
    torch.manual_seed(0)
    s, t = torch.randn(7, 5, dtype=torch.double), torch.randn(7, 5, dtype=torch.double)
    p, q = s.softmax(-1), t.softmax(-1)
    m = (p + q) / 2
    reverse, forward, jsd = (caopd.DIVERGENCES[kind] for kind in ("reverse", "forward", "jsd"))

    def kl(a, b):
        return torch.stack([sum(a[i, v] * (a[i, v] / b[i, v]).log() for v in range(5))
                            for i in range(7)])
    assert torch.allclose(reverse(s, t).double(), kl(p, q), atol=1e-6)
    assert torch.allclose(forward(s, t).double(), kl(q, p), atol=1e-6)
    assert torch.allclose(jsd(s, t).double(), (kl(p, m) + kl(q, m)) / 2, atol=1e-6)
    two = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.5, 0.5]]).log()
    by_hand = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert reverse(*two).item() == pytest.approx(by_hand, abs=1e-6)
    by_hand = 0.5 * math.log(0.625) + 0.5 * math.log(2.5)
    assert forward(*two).item() == pytest.approx(by_hand, abs=1e-6)
    for loss in (reverse, forward, jsd):
        assert loss(s, s).abs().max() < 1e-6


def token_gradients(loss: Callable, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """[M, V, V]: the gradient with respect to student logits if token v were the sampled one."""
    count, size = s.shape
    leaf = s.repeat_interleave(size, 0).requires_grad_()
    tokens = torch.arange(size).repeat(count)
    loss(leaf, t.repeat_interleave(size, 0), tokens, torch.zeros(len(tokens))).sum().backward()
    return leaf.grad.double().view(count, size, size)


def mean_and_variance(loss: Callable, s: torch.Tensor,
                      t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the gradient [M, V] over tokens v ~ π_θ, by enumeration. The variance [M] is a trace."""
    p, g = s.double().softmax(-1), token_gradients(loss, s, t)
    mean = torch.einsum("mv,mvw->mw", p, g)
    return mean, torch.einsum("mv,mvw->m", p, (g - mean[:, None]) ** 2)


def random_logits() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(scale * torch.randn(count, size, generator=generator) for _ in range(2))
            for scale in (0.1, 1.0, 2.0) for size in (2, 3, 7, 21, 60) for count in (1, 8)]


@pytest.mark.parametrize("loss", [caopd.sampled_kl, caopd.vopd])
def test_the_expected_gradient_of_single_samples_is_that_of_the_full_kl(loss):
    for s, t in random_logits():
        log_p, log_q = s.double().log_softmax(-1), t.double().log_softmax(-1)
        ratio = log_p - log_q
        kl = (log_p.exp() * ratio).sum(-1, keepdim=True)
        exact = log_p.exp() * (ratio - kl)  # ∇ KL(π_θ‖π_T), in closed form
        mean, _ = mean_and_variance(loss, s, t)
        assert (mean - exact).abs().max() < 1e-6
        leaf = s.clone().requires_grad_()
        caopd.kl(leaf, t).sum().backward()
        assert (mean - leaf.grad.double()).abs().max() < 1e-6
        log_p = (s.double() - 0.01 * mean).log_softmax(-1)  # after a step against the mean
        assert ((log_p.exp() * (log_p - log_q)).sum(-1) < kl[:, 0]).all()


def test_the_expected_gradient_of_caopd_vopd_is_that_of_the_full_kl_where_an_answer_can_end():
    """Token 0 ends the answer, and is the first one of I_c where the method leaves it there. Then
    the choice of the token would decide which loss it gets."""
    end_in_answer = METHODS["caopd-vopd"].end_in_answer
    for s, t in random_logits():
        leaf, p = s.clone().requires_grad_(), s.softmax(-1)
        for token in range(s.shape[1]):
            loss = caopd.eq7(leaf, t, torch.full((len(s),), token), torch.zeros(len(s)),
                             torch.full((len(s),), token > 0 or end_in_answer), caopd.vopd,
                             caopd.forward_kl)
            (p[:, token] * loss).sum().backward()
        full = s.clone().requires_grad_()
        caopd.kl(full, t).sum().backward()
        assert (leaf.grad - full.grad).abs().max() < 1e-5


def test_the_baseline_lowers_the_variance_on_average():
    """It does so by much where there are many tokens, and not always where there are few."""
    before, after = {}, {}
    for s, t in random_logits():
        for sums, loss in ((before, caopd.sampled_kl), (after, caopd.vopd)):
            variance = float(mean_and_variance(loss, s, t)[1].sum())
            sums[s.shape[1]] = sums.get(s.shape[1], 0.0) + variance
    print("\nvariance of vOPD's gradient over that without the baseline, by number of tokens: "
          + ", ".join(f"{size} {after[size] / before[size]:.2f}" for size in before))
    assert sum(after.values()) < 0.8 * sum(before.values())
    assert after[60] < 0.6 * before[60] and after[21] < 0.8 * before[21]


def test_the_baseline_lowers_the_variance_on_the_toys_own_rollouts(small_run):
    tokenizer = data.Tokenizer.from_pretrained(small_run / "base")
    base = Transformer.from_pretrained(small_run / "base")
    task = data.arithmetic_task(0, 8, words=False, grades=("1+1",))
    groups = caopd.rollout(base, tokenizer, task.draw(16, "distill", 0), task.wording, 4,
                           Sampling(16), torch.Generator().manual_seed(0))
    totals = {loss: np.zeros(2) for loss in (caopd.sampled_kl, caopd.vopd)}  # on I_a, on I_c
    for target in targets_of(groups, tokenizer, task, None):
        for y in target.completions:
            n = y.answer_length
            with torch.no_grad():
                s, t = (base(torch.tensor([[*prompt, *y.ids]]))[0, len(prompt) - 1:-1]
                        for prompt in (target.prompt, target.teacher_prompt))
            for loss in totals:
                variance = mean_and_variance(loss, s, t)[1]
                totals[loss] += float(variance[:n].sum()), float(variance[n:].sum())
    ratio = totals[caopd.vopd] / totals[caopd.sampled_kl]
    print(f"\nthe toy's own rollouts: vOPD's gradient has {ratio[0]:.2f} of the variance on I_a "
          f"that it has without the baseline, and {ratio[1]:.2f} on I_c")
    assert (ratio < 0.9).all()


def test_the_loss_of_a_replaced_token_is_the_forward_kl_from_a_point_mass():
    for s, t in random_logits():
        count, size = s.shape
        tokens = torch.arange(count) % size
        one_hot = torch.nn.functional.one_hot(tokens, size)
        leaf, other = s.clone().requires_grad_(), s.clone().requires_grad_()
        loss = caopd.target_cross_entropy(leaf, t, tokens, torch.zeros(count))
        loss.sum().backward()
        assert (leaf.grad - (s.softmax(-1) - one_hot)).abs().max() < 1e-6
        point_mass = caopd.forward_kl(other, 1e4 * one_hot)
        point_mass.sum().backward()
        assert torch.allclose(loss, point_mass, atol=1e-5)
        assert (leaf.grad - other.grad).abs().max() < 1e-6


@pytest.mark.parametrize("k, mu", [(1, 0.3), (4, 0.3), (8, 0.55)])
def test_replaced_tokens_over_many_draws_teach_a_mean_confidence_of_mu(k, mu):
    """Gradient descent on the expected loss, with mu_hat ~ Binomial(K, mu) / K as the token."""
    share = torch.tensor([math.comb(k, j) * mu ** j * (1 - mu) ** (k - j) for j in range(k + 1)])
    logits = torch.zeros(k + 1, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.02)
    for _ in range(1000):
        loss = caopd.target_cross_entropy(logits.expand(k + 1, -1), None, torch.arange(k + 1), None)
        (share * loss).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    p = logits.softmax(-1).detach()
    assert float((p * torch.arange(k + 1) / k).sum()) == pytest.approx(mu, abs=1e-3)
    assert torch.allclose(p, share, atol=2e-3)


def plain_loss(student: Transformer, teacher: Transformer | None, targets: list[Target],
               answer_loss: Callable, confidence_loss: Callable,
               skip_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain way: each completion in a forward pass of its own, all its logits at once."""
    answer = confidence = torch.zeros(())
    for target in targets:
        for y, count in target.completions.items():
            s = student(torch.tensor([[*target.prompt, *y.ids]]))[0, len(target.prompt) - 1:-1]
            t = None
            if teacher is not None:
                with torch.no_grad():
                    t = teacher(torch.tensor([[*target.teacher_prompt, *y.ids]]))
                t = t[0, len(target.teacher_prompt) - 1:-1]
            inputs = s, t, torch.tensor(y.ids), torch.full((len(y.ids),), y.advantage)
            on_answer, on_confidence = answer_loss(*inputs), confidence_loss(*inputs)
            for position in range(skip_tokens, len(y.ids)):
                if position < y.answer_length:
                    answer = answer + count * on_answer[position]
                elif not y.truncated:
                    confidence = confidence + count * on_confidence[position]
    return answer, confidence


def plain_copies(teacher: Transformer, targets: list[Target], skip_tokens: int) -> int:
    """How many tokens of I_c the teacher, asked about one completion at a time, would write."""
    copies = 0
    for target in targets:
        for y, count in target.completions.items():
            read = torch.tensor([[*target.teacher_prompt, *y.ids]])
            said = teacher(read)[0].argmax(-1).tolist()[len(target.teacher_prompt) - 1:-1]
            in_confidence = range(max(y.answer_length, skip_tokens), len(y.ids))
            copies += count * sum(said[t] == y.ids[t] for t in in_confidence if not y.truncated)
    return copies


@pytest.mark.parametrize("name, flags, skip, at_once", [
    ("caopd", [], 0, 2 ** 24), ("caopd", [], 3, 40), ("caopd", ["--divergence", "forward"], 1, 100),
    ("caopd", ["--divergence", "jsd", "--confidence-divergence", "jsd"], 0, 20),
    ("caopd", ["--divergence", "jsd", "--confidence-divergence", "reverse"], 0, 100),
    ("caopd-direct", [], 0, 60), ("sampled", [], 0, 60), ("vopd", [], 1, 60),
    ("caopd-vopd", ["--confidence-divergence", "reverse"], 0, 60), ("rlcr", [], 2, 60)])
def test_shared_prompts_and_chunks_change_neither_loss_nor_gradient(world, monkeypatch, name, flags,
                                                                    skip, at_once):
    _, tokenizer, task, student, teacher = world
    monkeypatch.setattr(caopd, "LOGITS_AT_ONCE", at_once)
    method, args = METHODS[name], parse_args([*TINY, *flags])
    teacher = teacher if method.teacher else None
    targets = [target for group in some_groups(tokenizer) for target in make_targets(
        group, method.confidence and method.confidence(group), [0.3, -1.0, 2.0, -0.5], tokenizer,
        task.wording, "demo" if method.teacher else None)]
    losses = caopd.choose_losses(method, args)
    if name == "caopd":
        chosen = [args.divergence, args.confidence_divergence]
        assert list(losses) == [caopd.DIVERGENCES[kind] for kind in chosen]
    *ours, copied = accumulate_gradient(student, teacher, targets, *losses, skip, 1.0)
    assert copied == (0 if teacher is None else plain_copies(teacher, targets, skip))
    plain = plain_loss(student, teacher, targets, *losses, skip)
    assert ours == pytest.approx([part.item() for part in plain], rel=1e-5, abs=1e-5)
    g = gradient(student, lambda: accumulate_gradient(student, teacher, targets, *losses, skip,
                                                      0.5))
    g_plain = gradient(student, (0.5 * sum(plain)).backward)
    assert_same_gradient(g, g_plain)


@pytest.mark.parametrize("at_once", [2 ** 24, 60])
def test_the_supervised_gradient_is_that_of_plain_cross_entropy(world, monkeypatch, at_once):
    _, _, _, student, _ = world
    monkeypatch.setattr(caopd, "LOGITS_AT_ONCE", at_once)
    prompts, completions = [[4, 5, 6], [7]], [[8, 9, 3, 1], [5, 1]]
    plain = 0.0
    for prompt, ids in zip(prompts, completions):
        logits = student(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1]
        plain -= logits.log_softmax(-1)[range(len(ids)), ids].sum()

    def ours() -> float:
        return caopd.supervised_gradient(student, prompts, completions, 0.5)
    assert ours() == pytest.approx(plain.item(), rel=1e-5)
    assert_same_gradient(gradient(student, ours), gradient(student, (0.5 * plain).backward))


@pytest.mark.parametrize("kind", caopd.DIVERGENCES)
def test_the_divergence_of_the_confidence_is_that_of_a_replaced_one_alone(kind):
    """OPD has the one divergence of Eq. 2, whatever is chosen for a confidence that is replaced."""
    for flags in (["--divergence", kind], ["--confidence-divergence", kind]):
        args = parse_args([*TINY, *flags])
        opd, ours = (caopd.choose_losses(METHODS[name], args) for name in ("opd", "caopd"))
        assert opd == (caopd.DIVERGENCES[args.divergence],) * 2
        assert ours == (caopd.DIVERGENCES[args.divergence],
                        caopd.DIVERGENCES[args.confidence_divergence])
    assert parse_args([]).confidence_divergence == "forward"
    direct = caopd.choose_losses(METHODS["caopd-direct"], args)
    assert direct == (caopd.kl, caopd.target_cross_entropy)


def nothing(student_logits: torch.Tensor, *_) -> torch.Tensor:
    return 0.0 * student_logits.float().sum(-1)


def test_caopd_vopd_has_the_full_kl_on_the_confidence_and_vopds_loss_on_the_answer(world):
    _, tokenizer, task, student, teacher = world
    targets = targets_of(some_groups(tokenizer), tokenizer, task, caopd.mu_hat)

    def backward(*losses):
        return accumulate_gradient(student, teacher, targets, *losses, 0, 1.0)

    def losses_of(name):
        return caopd.choose_losses(METHODS[name], parse_args(TINY))
    both, caopds, vopds = (backward(*losses_of(n)) for n in ("caopd-vopd", "caopd", "vopd"))
    assert both[1] == pytest.approx(caopds[1], rel=1e-6)
    assert both[0] == pytest.approx(vopds[0], rel=1e-6)
    assert both[0] != pytest.approx(caopds[0], rel=1e-2)
    assert both[1] != pytest.approx(vopds[1], rel=1e-2)
    g, on_answer, on_confidence = (gradient(student, lambda: backward(*losses)) for losses in (
        losses_of("caopd-vopd"), (losses_of("vopd")[0], nothing),
        (nothing, losses_of("caopd")[1])))
    assert_same_gradient(g, on_answer + on_confidence)
    assert on_answer.abs().max() > 0 and on_confidence.abs().max() > 0


def test_layers_that_are_computed_again_or_visit_change_neither_loss_nor_gradient(world):
    _, tokenizer, task, student, teacher = world
    targets = targets_of(some_groups(tokenizer), tokenizer, task, caopd.mu_hat)

    def backward(student, teacher):
        return accumulate_gradient(student, teacher, targets, caopd.kl, caopd.kl, 0, 1.0)
    plain, g_plain = backward(student, teacher), gradient(
        student, lambda: backward(student, teacher))
    away, again = caopd.make_teacher(teacher, "cpu"), copy.deepcopy(student)
    again.recompute = True
    assert any(isinstance(module, caopd.Offloaded) for module in away.modules())
    pairs = list(zip(away.parameters(), teacher.parameters(), strict=True))
    assert all(p.data_ptr() != q.data_ptr() for p, q in pairs)
    assert all(torch.equal(p, q) for p, q in pairs)  # the order that the EMA relies on
    assert backward(again, away) == pytest.approx(plain, rel=1e-6)
    g = gradient(again, lambda: backward(again, away))
    assert torch.allclose(g, g_plain, rtol=1e-5, atol=1e-6 * float(g.abs().max()))


def test_no_gradient_reaches_the_teacher_and_equal_contexts_give_no_loss(world):
    _, tokenizer, task, student, _ = world
    teacher = copy.deepcopy(student)
    targets = [dataclasses.replace(target, teacher_prompt=target.prompt)
               for target in targets_of(some_groups(tokenizer), tokenizer, task, None)]
    *losses, _ = accumulate_gradient(student, teacher, targets, caopd.kl, caopd.kl, 0, 1.0)
    assert abs(sum(losses)) < 1e-4 and all(p.grad is None for p in teacher.parameters())
    student.zero_grad()


def test_masks_by_hand():
    target = Target([1], [1], {Completion((5, 6, 7, 1), 2): 3,
                               Completion((5, 6, 7), 2, truncated=True): 1, Completion((1,), 0): 1})
    answer, confidence = caopd.loss_weights([target], 1)
    assert answer.tolist() == [0, 3, 0, 0] + [0, 1, 0] + [0]
    assert confidence.tolist() == [0, 0, 3, 3] + [0, 0, 0] + [0]


@pytest.mark.parametrize("confidence", [None, caopd.mu_hat])
def test_rollouts_that_came_out_the_same_are_scored_once_and_count_as_often(world, confidence):
    _, tokenizer, task, student, teacher = world
    group = hand_made(tokenizer, "12+34=", "64", "64\nConfidence: 0.90", "54\nConfidence: 0.70",
                      "64\nConfidence: 0.90", "64\nConfidence: 0.20", "64\nConfidence: 0.90")
    target, = targets_of([group], tokenizer, task, confidence)
    counts = list(target.completions.values())
    assert counts == ([3, 1, 1] if confidence is None else [4, 1])
    together = accumulate_gradient(student, teacher, [target], caopd.kl, caopd.kl, 0, 0.0)
    apart = [dataclasses.replace(target, completions={y: 1})
             for y, count in target.completions.items() for _ in range(count)]
    assert len(apart) == 5
    each = accumulate_gradient(student, teacher, apart, caopd.kl, caopd.kl, 0, 0.0)
    assert together == pytest.approx(each, rel=1e-5)


def test_what_differs_in_its_parts_is_not_merged(world):
    """The same tokens may belong to I_a in one rollout and to I_c in another."""
    _, tokenizer, task, *_ = world
    group = hand_made(tokenizer, "12+34=", "64", "64", "64")
    targets = make_targets(group, None, [1.0, -1.0], tokenizer, task.wording, None)
    assert [(y.advantage, count) for y, count in targets[0].completions.items()] == \
        [(1.0, 1), (-1.0, 1)]


# ----------------------------------------------------------------------------- the methods

NO_REWARD = (None, False)  # and so not standardized
SPECIFIED = {  # what replaces c, the losses on I_a and I_c, the reward
    "opd": (None, caopd.kl, caopd.kl, NO_REWARD),
    "caopd": (caopd.mu_hat, caopd.kl, caopd.forward_kl, NO_REWARD),
    "caopd-sc": (caopd.self_consistency, caopd.kl, caopd.forward_kl, NO_REWARD),
    "caopd-direct": (caopd.mu_hat, caopd.kl, caopd.target_cross_entropy, NO_REWARD),
    "caopd-direct-loo": (caopd.leave_one_out, caopd.kl, caopd.target_cross_entropy, NO_REWARD),
    "sampled": (None, caopd.sampled_kl, caopd.sampled_kl, NO_REWARD),
    "vopd": (None, caopd.vopd, caopd.vopd, NO_REWARD),
    "caopd-vopd": (caopd.mu_hat, caopd.vopd, caopd.forward_kl, NO_REWARD),
    "grpo": (None, caopd.policy_gradient, caopd.policy_gradient, (caopd.correctness, True)),
    "rlcr": (None, caopd.policy_gradient, caopd.policy_gradient,
             (caopd.calibrated_correctness, False))}


@pytest.mark.parametrize("name", METHODS)
def test_an_update_of_each_method_against_the_plain_way(world, tmp_path, monkeypatch, name):
    """The logged losses and the norm of the gradient are those of Eq. 7 over all its tokens."""
    args, tokenizer, task, student, _ = world
    confidence, answer_loss, confidence_loss, (reward, standardize) = SPECIFIED[name]
    once = dataclasses.replace(args, steps=1, micro_tokens=64)  # two micro-batches
    groups = some_groups(tokenizer)
    referred = []

    def add_references(groups, *_):
        referred.extend(groups)
        for group, reference in zip(groups, ("54", "65")):
            group.reference = reference
    monkeypatch.setattr(caopd, "rollout", lambda *_: groups)
    monkeypatch.setattr(caopd, "add_references", add_references)
    caopd.train(copy.deepcopy(student), name, tokenizer, task, once, tmp_path)
    row, = metrics(tmp_path)
    assert (referred == groups) == (name == "caopd-sc")

    targets = [target for group in groups for target in make_targets(
        group, confidence and confidence(group),
        caopd.group_advantages(group, reward, standardize), tokenizer, task.wording,
        None if reward else "demo",
        end_in_answer=name in ("caopd-direct", "caopd-direct-loo", "caopd-vopd"))]
    count = sum(int(mask.sum()) for mask in caopd.loss_weights(targets, 0))
    teacher, student = (None if reward else copy.deepcopy(student)), copy.deepcopy(student)
    sums = plain_loss(student, teacher, targets, answer_loss, confidence_loss, 0)
    assert [row["loss_answer"], row["loss_confidence"]] == pytest.approx(
        [part.item() / count for part in sums], rel=1e-4, abs=1e-6)
    assert row["loss"] == pytest.approx(row["loss_answer"] + row["loss_confidence"])
    g = gradient(student, (sum(sums) / count).backward)
    assert row["grad_norm"] == pytest.approx(float(g.norm()), rel=1e-4)
    stated = [c for group in groups for rollout in group.rollouts if not rollout.truncated
              and (c := data.parse_confidence(rollout.text)) is not None]
    assert row["confidence"] == pytest.approx(sum(stated) / len(stated))
    assert [row[key] for key in ("accuracy", "format", "truncated", "left_out")] == \
        [0.5, len(stated) / 8, 0.25, 0]


# ----------------------------------------------------------------------------- the update


def tiny_model(dtype=torch.float32) -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config("llama", 11, 16, 24, 1, 4, 2, 4)).to(dtype)


SEED = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_small_steps_and_ema_increments_survive_bfloat16(rounding):
    """At lr 1e-5 a bfloat16 weight alone would not move, nor would its EMA. Float32 weights carry
    both, and so does chance on average."""
    stored = torch.float32 if rounding == "nearest" else torch.bfloat16
    student = tiny_model(torch.bfloat16).to(stored)
    student.compute_dtype = torch.bfloat16
    before = [p.detach().float().clone() for p in student.parameters()]
    optimizer, teacher = AdamW(student, 0.0, 1.0), caopd.make_teacher(student, "same")
    for step in range(300):
        sum(p.float().sum() for p in student.parameters()).backward()
        optimizer.step(step, 1e-5, SEED)  # Every weight should fall by lr a step.
        ema_update(teacher, student, 0.01, SEED)
    student_fell, teacher_fell = 300e-5, sum(1e-5 * (1 - 0.99 ** (300 - t)) for t in range(300))
    for name, network, fell in (("student", student, student_fell),
                                ("teacher", teacher, teacher_fell)):
        assert all(w.dtype == stored for w in network.parameters())
        moved = torch.cat([(b - w.detach().float()).flatten()
                           for b, w in zip(before, network.parameters())])
        if rounding == "nearest":
            assert torch.allclose(moved, torch.full_like(moved, fell), rtol=0.02, atol=1e-6), name
        else:  # a mean with its standard error: norm weights of 1.0 have neighbours 0.004 away
            assert abs(moved.mean() - fell) < 5 * moved.std() / len(moved) ** 0.5, name
            assert moved.std() > 0, name
    alone = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(300):
        alone -= 1e-5
    assert alone.item() == 1.0  # the trap
    computed = student.for_inference()
    assert all(w.dtype == torch.bfloat16 for w in computed.parameters())
    shown = torch.cat([(b - p.float()).flatten() for b, p in zip(before, computed.parameters())])
    assert shown.mean().item() == pytest.approx(student_fell, rel=0.1)


def test_stochastic_rounding_is_one_of_two_neighbours_and_right_on_average():
    x = torch.tensor([1.0, 1.001, -1.001, 3.14159, 1e-20, 0.0, 257.0]).repeat(20000, 1)
    rounded = optim.round_stochastically(x, torch.Generator().manual_seed(1)).float()
    exact = x[0].double()
    for i in range(x.shape[1]):
        values = rounded[:, i].double().unique()
        assert len(values) <= 2 and values.min() <= exact[i] <= values.max()
        error = rounded[:, i].double().std() / 20000 ** 0.5
        assert abs(rounded[:, i].double().mean() - exact[i]) <= 5 * error


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_is_torchs(weight_decay):
    """The updates are those of torch.optim.AdamW with clipping. Norms and biases do not decay."""
    a, b = tiny_model(), tiny_model()
    groups = [{"params": [p for p in b.parameters() if p.dim() == 2], "weight_decay": weight_decay},
              {"params": [p for p in b.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    assert all(group["params"] for group in groups)
    ours, reference = AdamW(a, weight_decay, 1.0), torch.optim.AdamW(groups, 1e-2, (0.9, 0.95))
    for step in range(6):
        ids = torch.tensor([[1, 2, step]])
        a(ids).square().sum().backward()
        b(ids).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(b.parameters(), 1.0)
        assert ours.step(step, 1e-2, SEED) == pytest.approx(float(norm), rel=1e-4)
        reference.step()
        reference.zero_grad()
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(a.parameters(), b.parameters()))


def test_gradients_add_up_over_micro_batches():
    a, b = tiny_model(), tiny_model()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    one, two = AdamW(a, 0.0, 1.0), AdamW(b, 0.0, 1.0)
    a(ids).square().sum().backward()
    for row in ids:
        b(row[None]).square().sum().backward()
    assert one.step(0, 1e-2, SEED) == pytest.approx(two.step(0, 1e-2, SEED), rel=1e-4)
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(a.parameters(), b.parameters()))


def test_the_learning_rate_warms_up_and_falls():
    rates = [optim.warmup_cosine(step, 20, 30) for step in range(20)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0]) and rates[11] == pytest.approx(0.5)
    assert 0 < rates[19] < 0.01
    assert all(x >= y for x, y in zip(rates[2:], rates[3:]))
    rates = [optim.warmup_stable_decay(step, 20) for step in range(20)]
    assert rates == pytest.approx([0.5] + [1.0] * 14 + [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


@pytest.mark.parametrize("rate, expected", [(0.0, 1.0), (1.0, 3.0), (0.25, 1.5)])
def test_ema(rate, expected):
    teacher, student = tiny_model(), tiny_model()
    with torch.no_grad():
        for average, weight in zip(teacher.parameters(), student.parameters()):
            average.fill_(1.0)
            weight.fill_(3.0)
    ema_update(teacher, student, rate, SEED)
    assert all((average == expected).all() for average in teacher.parameters())
    assert all((weight == 3.0).all() for weight in student.parameters())


# ----------------------------------------------------------------------------- evaluation

# Texts of the embedded world: the answer, what is before the segment (None where there is none),
# the segment as far as it goes, and whether an end token follows.
TOY_TEXTS = [("64", "\n", "Confidence: 0.90", True), ("5", None, "", True),
             ("64", "\n", "Confidence: 0.", False), ("1111", None, "", False),
             ("", "\n", "Confidence: 0.50", True), ("7", "\n", "Confidence: 1.11", True)]
WORD_TEXTS = TOY_TEXTS + [("It is 64,", " ", "confidence: 85%", True),
                          ("", "", "Confidence: 0.5\nand so on", True),
                          ("64.", "\n", "Confidence: ", False), ("64.", "\n", "Confid", False)]


def uneven_tokenizer(plain: data.Tokenizer) -> data.Tokenizer:
    """The embedded world's tokenizer with some numbers in fewer tokens than others."""
    backend = json.loads(plain.backend.to_str())
    merged = ["1.00", "0.95", "00"]
    size = len(backend["model"]["vocab"])
    backend["model"]["vocab"] |= {token: size + i for i, token in enumerate(merged)}
    units = r"\nConfidence: |1\.00|0\.95|0\.9|00|[\s\S]"
    backend["pre_tokenizer"]["pattern"] = {"Regex": units}
    return data.Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(backend)), plain.config,
                          plain.generation)


@pytest.mark.parametrize("kind", ["toy", "uneven", "characters"])
def test_what_is_thought_of_answers_against_brute_force(world, real_model, kind, monkeypatch):
    """One full forward pass for each of the 101 completions, and the product of its tokens."""
    tokenizer, config = world[1], world[3].config
    if kind == "uneven":
        tokenizer = uneven_tokenizer(tokenizer)
        config = dataclasses.replace(config, vocab_size=tokenizer.backend.get_vocab_size())
        lengths = {len(tokenizer.encode(f"\nConfidence: {i / 100:.2f}")) for i in range(101)}
        assert lengths == {2, 3, 4, 5}
    if kind == "characters":
        tokenizer, config = data.Tokenizer.from_pretrained(real_model), Config.from_pretrained(
            real_model)
    texts = WORD_TEXTS if kind == "characters" else TOY_TEXTS
    network, end, groups = noisy(config, 0), tokenizer.eos_ids[0], []
    expected, of_answers = [], []
    for question, texts in (("1+2=", TOY_TEXTS), ("12*34=", texts)):
        prompt = tokenizer.chat([{"role": "user", "content": question}])
        rollouts = []
        for answer, before, segment, ended in texts:
            whole = answer + (before or "") + segment
            ids = tokenizer.encode(whole) + [end] * ended
            rollouts.append(Rollout(ids, whole, not ended, False, None))
            if segment == "Confid":  # It is no segment, and so a part of the answer.
                answer, before = whole, None
            start = prompt + tokenizer.encode(answer)
            # A newline that is a token of its own belongs to the answer. One more token ends it.
            i_a = tokenizer.encode(answer + (before or "") * (kind == "characters"))
            with_end = ids[:len(i_a) + 1]
            before = "\n" if before is None else before
            with torch.no_grad():
                of_answers.append(log_probability(network, prompt, with_end).exp().item())
                scores = [float(log_probability(network, start, tokenizer.encode(
                    before + f"Confidence: {i / 100:.2f}"))) for i in range(101)]
            expected.append(np.exp(scores) / np.exp(scores).sum())
        groups.append(Group(data.Example("arithmetic", question, "1"), prompt, rollouts))
    expected = np.stack(expected)
    assert expected.max() > 0.05 and abs(expected[0] - expected[1]).max() > 0.01
    for tokens_at_once in (1, 700, 10 ** 6):
        monkeypatch.setattr(caopd, "LOGITS_AT_ONCE", tokens_at_once)
        with torch.no_grad():
            likelihoods, p = caopd.score_answers(network, tokenizer, groups, tokens_at_once)
        assert p.shape == expected.shape and abs(p - expected).max() < 1e-5
        assert likelihoods == pytest.approx(of_answers, rel=1e-4)
        assert p.sum(1) == pytest.approx(np.ones(len(p)))


def test_readouts_are_of_what_the_model_would_state(small_run, monkeypatch):
    """Stated, likeliest and mean confidence are scored on the same sampled answers."""
    tokenizer = data.Tokenizer.from_pretrained(small_run / "base")
    base = Transformer.from_pretrained(small_run / "base")
    task = data.arithmetic_task(0, 40, words=False, eval_grades=("1+1",))
    seen, real = [], caopd.score_answers

    def record(network, tokenizer, groups, tokens_at_once):
        seen.append((groups, real(network, tokenizer, groups, tokens_at_once)))
        return seen[-1][1]
    monkeypatch.setattr(caopd, "score_answers", record)
    figures, answers = caopd.evaluate(base, tokenizer, task.held_out, task.wording, Sampling(16), 0,
                                      samples=3)
    (groups, (likelihoods, p)), = seen
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    correct = [int(rollout.correct) for rollout in rollouts]
    assert len(rollouts) == len(p) == 120 and 0 < sum(correct) < 120
    assert [group.example for group in groups] == task.held_out
    greedy = [float(row.argmax()) / 100 for row in p]
    mean = [sum(i / 100 * float(x) for i, x in enumerate(row)) for row in p]
    stated = [data.parse_confidence(rollout.text) for rollout in rollouts]
    stated = calibration([math.nan if c is None else c for c in stated], correct)
    readouts = figures["readouts"]
    assert readouts["stated"] == stated == {key: figures[key] for key in FIGURES}
    assert readouts["greedy"] == pytest.approx(brute_force(greedy, correct))
    assert readouts["expected"] == pytest.approx(brute_force(mean, correct))
    assert readouts["likelihood"] == pytest.approx(brute_force(likelihoods.tolist(), correct))
    assert sum(row["count"] for row in figures["reliability"]) == round(120 * stated["format"])
    assert [(row["text"], row["correct"], row["confidence"]) for row in answers] == [
        (rollout.text, rollout.correct, rollout.confidence) for rollout in rollouts]
    assert [row["expected"] for row in answers] == pytest.approx(mean)
    assert [row["likelihood"] for row in answers] == likelihoods.tolist()


def test_the_papers_way_and_the_oracle_sample_as_they_say(world, monkeypatch):
    _, tokenizer, task, student, _ = world
    asked, real = [], caopd.rollout

    def record(network, tokenizer, examples, wording, samples, sampling, generator):
        asked.append((samples, sampling.temperature, sampling.top_p, len(examples)))
        return real(network, tokenizer, examples, wording, samples, sampling, generator)
    monkeypatch.setattr(caopd, "rollout", record)
    figures, _ = caopd.evaluate(student, tokenizer, task.held_out, task.wording,
                                Sampling(16, 0.9, 0.8), 0, 2, 4, 3)
    assert asked == [(2, 0.9, 0.8, 24), (4, 0.9, 0.8, 24), (3, 0.6, 0.95, 24)]
    plain, _ = caopd.evaluate(student, tokenizer, task.held_out, task.wording,
                              Sampling(16, 0.9, 0.8), 0, 2)
    assert figures.keys() - plain.keys() == {"oracle", "paper"}
    for its in figures["by_grade"].values():
        assert its.pop("oracle").keys() >= set(FIGURES)
    assert to_json(plain) == to_json({key: figures[key] for key in plain})


# ----------------------------------------------------------------------------- whole runs


def run(out: Path, *flags: str) -> dict:
    """What results.json holds of a tiny run, but for the seconds that each model took."""
    assert caopd.main([*TINY, "--out", str(out), *flags]) == 0
    results = json.loads((out / "results.json").read_text())
    for row in results.values():
        if isinstance(row, dict):
            row.pop("seconds", None)
    return results


def weights(directory: Path) -> list[torch.Tensor]:
    return list(Transformer.from_pretrained(directory).state_dict().values())


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_method_runs_from_start_to_table(small_run):
    rows = metrics(small_run)
    assert [(row["stage"], row["step"]) for row in rows] == \
        [("base", step) for step in range(250)] + [(name, s) for name in METHODS for s in range(3)]
    before = weights(small_run / "base")
    for name in METHODS:
        after = weights(small_run / name)
        assert all(weight.isfinite().all() for weight in after), name
        assert any(not torch.equal(x, y) for x, y in zip(before, after)), name
        mine = [row for row in rows if row["stage"] == name]
        assert all(math.isfinite(row["loss"]) and row["left_out"] == 0 for row in mine)
        assert any(0 < row["accuracy"] < 1 for row in mine), "no update had anything to tell apart"


def test_the_methods_share_their_base_and_their_first_rollouts(small_run):
    """A method differs from another in what it makes of its rollouts, and in nothing before."""
    first = [row for row in metrics(small_run) if row["stage"] != "base" and row["step"] == 0]
    assert len({(row["accuracy"], row["confidence"], row["truncated"]) for row in first}) == 1
    by_name = {row["stage"]: row for row in first}
    direct = by_name["caopd-direct"]["loss_answer"]
    assert by_name["caopd"]["loss_answer"] != direct == by_name["caopd-direct-loo"]["loss_answer"]
    assert by_name["caopd"]["loss_confidence"] != by_name["caopd-direct"]["loss_confidence"]


def test_answers_to_held_out_questions_are_kept(small_run):
    """With them every figure of what is stated can be computed again."""
    results = json.loads((small_run / "results.json").read_text())
    for name in ("base", *METHODS):
        lines = (small_run / "answers" / f"{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        stated = calibration([math.nan if row["confidence"] is None else row["confidence"]
                              for row in rows], [row["correct"] for row in rows])
        assert stated == pytest.approx({key: results[name][key] for key in FIGURES}, nan_ok=True)
        assert {row["grade"] for row in rows} == results[name]["by_grade"].keys()
        for row in rows:
            example = data.typed_question(row["question"], words=False)
            assert row["correct"] == (not row["truncated"] and data.verify(example, row["text"]))


def test_samples_are_kept_from_every_place_of_the_batch(small_run):
    rows = [json.loads(line) for line in (small_run / "samples.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == set(METHODS)
    assert len(rows) == len(METHODS) * 3 * 4  # 3 steps of 8 prompts, a sample of every second one
    for row in rows:
        assert list(row) == ["stage", "step", "question", "answer", "confidence", "mu_hat",
                             "correct"]
        example = data.typed_question(row["question"], words=False)
        assert row["correct"] == data.verify(example, row["answer"])
        assert row["mu_hat"] in (0, 0.25, 0.5, 0.75, 1) and row["mu_hat"] >= row["correct"] / 4
    groups = [Group(data.Example("arithmetic", str(i), ""), [], outcome(1, 0).rollouts)
              for i in range(16)]
    picked = [[int(row["question"]) for row in caopd.pick_samples(groups, step)]
              for step in range(5)]
    assert picked == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15], [0, 4, 8, 12]]


def test_samples_are_shown_at_the_first_step_and_at_the_last(tmp_path, capsys):
    run(tmp_path, "--method", "opd")
    shown = re.findall(r"^opd, step (\d): .* says .*, mu_hat \d.\d\d, (?:right|wrong)$",
                       capsys.readouterr().out, re.MULTILINE)
    assert shown == ["0"] * 4 + ["3"] * 4


def test_what_results_json_holds(small_run):
    results = json.loads((small_run / "results.json").read_text())
    assert list(results) == ["base", *METHODS, "settings", "inputs", "seconds"]
    for name in ("base", *METHODS):
        row = results[name]
        assert row.keys() >= {*FIGURES, "by_grade", "reliability", "stderr", "readouts", "oracle",
                              "paper", "questions", "truncated"}
        assert row["questions"] == 100 and len(row["reliability"]) == 10
        assert list(row["readouts"]) == ["stated", "greedy", "expected", "likelihood"]
        grade, = row["by_grade"].values()
        for figures in (row["stderr"], row["oracle"], row["paper"], row["paper"]["stderr"], grade,
                        *row["readouts"].values()):
            assert figures.keys() >= set(FIGURES)
        whole = {key: row[key] for key in FIGURES}
        assert row["readouts"]["stated"] == whole and 0 < row["accuracy"] < 1
        assert grade == whole | {"readouts": row["readouts"], "oracle": row["oracle"]}
        assert row["oracle"]["accuracy"] == row["accuracy"]
        assert 0 <= row["oracle"]["brier"] <= 0.25 * 2
        assert 0 < row["stderr"]["accuracy"] < 0.1
    assert results["settings"]["sft_lr"] == 1e-2 and results["settings"]["rollouts"] == 4


def test_end_to_end_both_methods(tmp_path, capsys):
    flags = ["--oracle", "2", "--paper-samples", "2"]
    first = run(tmp_path / "a", *flags)
    printed = capsys.readouterr().out
    assert {"base", "opd", "caopd"} <= first.keys()
    for name in ("base", "opd", "caopd"):
        assert {*FIGURES, "by_grade"} <= first[name].keys()
        saved = Transformer.from_pretrained(tmp_path / "a" / name).config
        tokenizer = data.Tokenizer.from_pretrained(tmp_path / "a" / name)
        assert saved.vocab_size == tokenizer.backend.get_vocab_size()
        assert set(first[name]["by_grade"]) == set(data.GRADES)
    for words in ("CaOPD", "OCG", "accuracy / confidence", "0.9 to 1.0", "floor / SPR of μ̂",
                  "gap closed", "temperature 0.6 and top-p 0.95"):
        assert words in printed
    assert [(row["stage"], row["step"]) for row in metrics(tmp_path / "a")] == \
        [("base", s) for s in range(6)] + [
            (m, s) for m in ("opd", "caopd", "caopd-direct") for s in range(4)]
    assert not list((tmp_path / "a").glob("**/.unfinished*"))
    assert not list((tmp_path / "a").glob("**/checkpoint*"))

    again = run(tmp_path / "a", *flags, "--overwrite")
    assert "Reusing the base model" in capsys.readouterr().out
    fresh = run(tmp_path / "b", *flags)
    other = run(tmp_path / "a", *flags, "--seed", "1", "--overwrite")
    assert "Reusing" not in capsys.readouterr().out and other["settings"]["seed"] == 1
    assert first["settings"] == again["settings"]
    for name in ("base", "opd", "caopd"):
        assert first[name] == again[name] == fresh[name] and first[name]["reliability"] != []


@pytest.mark.parametrize("method, flags", [
    ("opd", ["--divergence", "forward"]),
    ("caopd", ["--divergence", "jsd", "--context", "solution", "--skip-tokens", "2"]),
    ("caopd", ["--dtype", "bfloat16", "--teacher-rate", "1"]),
    ("opd", ["--teacher-rate", "0", "--micro-tokens", "64"]),
    ("caopd", ["--dtype", "bfloat16", "--rounding", "stochastic"]),
    ("opd", ["--skip-tokens", "99"]), ("grpo", ["--skip-tokens", "99"]),
    ("caopd-vopd", ["--confidence-divergence", "reverse", "--weight-decay", "0.1"])])
def test_each_method_alone_and_its_variants(tmp_path, method, flags):
    results = run(tmp_path, "--method", method, *flags)
    assert set(results) == {"base", method, "settings", "inputs", "seconds"}
    assert len(list(tmp_path.glob("*/config.json"))) == 2
    after = weights(tmp_path / method)  # also where no token is left in the loss
    assert all(weight.isfinite().all() for weight in after)
    if "99" in flags:
        assert all(torch.equal(x, y) for x, y in zip(weights(tmp_path / "base"), after))


@pytest.mark.parametrize("flags", [[], ["--dtype", "bfloat16"]])
def test_a_teacher_on_the_cpu_and_layers_computed_again_give_the_same_run(tmp_path, flags):
    plain = run(tmp_path / "a", *flags)
    other = run(tmp_path / "b", *flags, "--teacher-device", "cpu", "--recompute")
    assert all(plain[name] == other[name] for name in ("base", "opd", "caopd"))


CUT = ["--save-every", "1", "--rounding", "stochastic"]  # which float32 does not need


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory) -> Callable:
    """Runs without a crash, by flags, each made once."""
    @functools.cache
    def whole_run(*flags: str) -> tuple[Path, dict]:
        out = tmp_path_factory.mktemp("whole")
        return out, run(out, *CUT, *flags)
    return whole_run


def crash(out: Path, update: int, *flags: str) -> None:
    """A run that dies in its update with this number, counted over all its stages."""
    real, updates = AdamW.step, itertools.count()

    def step(self, *rest):
        if next(updates) == update:
            raise MemoryError("the lights went out")
        return real(self, *rest)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(AdamW, "step", step)
        run(out, *CUT, *flags)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (out / name).open("a") as log:
            log.write('{"stage": "op')  # a line that was being written


def assert_same_outcome(out: Path, results: dict, whole: Path, expected: dict) -> None:
    names = results.keys() - {"settings", "inputs", "seconds"}
    assert {name: results[name] for name in names} == {name: expected[name] for name in names}
    assert names == expected.keys() - {"settings", "inputs", "seconds"} and len(names) > 1
    for name in names:
        pairs = zip(weights(whole / name), weights(out / name))
        assert all(torch.equal(a, b) for a, b in pairs), name
    steps = [[(row["stage"], row["step"], row["loss"]) for row in metrics(d)] for d in (whole, out)]
    assert steps[0] == steps[1]
    samples = [(directory / "samples.jsonl").read_bytes() for directory in (whole, out)]
    assert samples[0] == samples[1] and samples[0].count(b"\n") >= 8


# A run makes 6 updates of the base and 4 of each method.
@pytest.mark.parametrize("update", [3, 6, 9, 12])
@pytest.mark.parametrize("dtype, method", [
    ("float32", "both"), ("bfloat16", "both"), ("float32", "grpo,caopd-sc")])
def test_a_crash_at_any_moment_resumes_to_the_same_result(tmp_path, whole_runs, capsys, update,
                                                          dtype, method):
    flags = ["--dtype", dtype, "--method", method]
    whole, expected = whole_runs(*flags)
    crash(tmp_path, update, *flags)
    results = run(tmp_path, *CUT, *flags)
    assert_same_outcome(tmp_path, results, whole, expected)
    stage_start = 0 if update < 6 else 6 + (update - 6) // 4 * 4
    resumed = "Going on from step" in capsys.readouterr().out
    assert resumed == (update > 6 and update > stage_start)


def test_adapters_learn_alone_and_resume_to_the_same_result(tmp_path, whole_runs, capsys):
    flags = ["--dtype", "bfloat16", "--lora-rank", "2", "--teacher-rate", "0.3"]
    whole, expected = whole_runs(*flags)
    crash(tmp_path, 12, *flags)
    with safe_open(tmp_path / "caopd/checkpoint.safetensors", "pt") as file:
        assert all("lora" in name for name in file.keys())
        assert any(name.startswith("teacher") for name in file.keys())
    assert_same_outcome(tmp_path, run(tmp_path, *CUT, *flags), whole, expected)
    assert "Going on from step" in capsys.readouterr().out
    base, learned = (Transformer.from_pretrained(whole / name).state_dict()
                     for name in ("base", "caopd"))
    linear = [torch.equal(base[name], learned[name]) for name in base if "proj" in name]
    others = [torch.equal(base[name], learned[name]) for name in base if "proj" not in name]
    assert not any(linear) and all(others)


def test_the_teacher_shares_what_the_student_does_not_learn(world):
    student = copy.deepcopy(world[3])
    student.add_adapters(2, alpha=4.0)
    teacher = caopd.make_teacher(student, "same")
    for (name, w), average in zip(student.named_parameters(), teacher.parameters(), strict=True):
        assert (w.data_ptr() == average.data_ptr()) == (not w.requires_grad) == ("lora" not in name)
    before = {name: average.clone() for name, average in teacher.named_parameters()}
    learned = [w for w in student.parameters() if w.requires_grad]
    with torch.no_grad():
        for weight in learned:
            weight.add_(1.0)
    ema_update(teacher, student, 0.25, torch.Generator())
    for name, average in teacher.named_parameters():
        expected = before[name] + 0.25 * ("lora" in name)
        assert torch.allclose(average, expected)


@pytest.mark.parametrize("changed", [["--save-every", "3"], ["--recompute"],
                                     ["--oracle", "2", "--overwrite"], ["--teacher-device", "cpu"]])
def test_a_run_goes_on_under_flags_that_decide_nothing(tmp_path, whole_runs, capsys, changed):
    whole, expected = whole_runs("--dtype", "float32", "--method", "both")
    crash(tmp_path, 8, "--dtype", "float32")
    results = run(tmp_path, *CUT, "--dtype", "float32", *changed)
    assert "Going on from step 2" in capsys.readouterr().out
    for name in ("base", "opd", "caopd"):
        for grade in results[name]["by_grade"].values():
            grade.pop("oracle", None)  # --oracle adds figures and changes none
        assert {key: results[name][key] for key in expected[name]} == expected[name]
        pairs = zip(weights(whole / name), weights(tmp_path / name))
        assert all(torch.equal(a, b) for a, b in pairs), name


def test_a_run_that_falls_apart_says_so_once(tmp_path, capsys):
    run(tmp_path, "--method", "opd", "--max-new-tokens", "2", "--temperature", "5")
    printed = capsys.readouterr().out
    assert printed.count("state no confidence") == printed.count("are cut off") == 1
    assert "opd, step 0: over half" in printed and "prefers another" not in printed
    # A teacher that hardly copies, and none on I_c.
    run(tmp_path / "other", "--method", "caopd,caopd-direct")
    assert capsys.readouterr().out.count("prefers another token") == 1


def test_only_a_teacher_that_is_asked_to_copy_is_watched(tmp_path):
    """Both sides have to state mu_hat, and some completion has to have an I_c."""
    for i, (flags, watched) in enumerate([
            ((), True), (("--max-new-tokens", "1"), True), (("--replace", "completion"), False),
            (("--replace", "demonstration,instruction"), False)]):
        run(tmp_path / str(i), "--method", "caopd", *flags)
        rows = [row for row in metrics(tmp_path / str(i)) if row["stage"] == "caopd"]
        assert all(("copied" in row) == watched for row in rows)
        assert all((row["copied"] is None) == (row["truncated"] == 1) for row in rows if watched)
    assert rows[-1]["truncated"] < 1


def test_weights_that_overflow_stop_the_run_and_keep_the_last_good_checkpoint(tmp_path, capsys,
                                                                              monkeypatch):
    flags = [*TINY, "--out", str(tmp_path), "--method", "caopd", "--save-every", "2"]
    step, calls, checkpoint = AdamW.step, [], tmp_path / "caopd/checkpoint.safetensors"

    def blown(self, *args):
        norm = step(self, *args)
        calls.append(checkpoint.read_bytes() if checkpoint.exists() else None)
        if len(calls) == 9:  # the supervised stage has six, so it is step 2 of CaOPD
            self.parameters["model.embed_tokens.weight"].data.fill_(math.inf)
        return norm

    with monkeypatch.context() as patch:
        patch.setattr(AdamW, "step", blown)
        assert caopd.main(flags) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(error) == 1
    assert re.search(r"caopd, step 3: the logits after '.*=' are not finite; try .*--lr", error[0])
    assert calls[8] == checkpoint.read_bytes()
    assert caopd.main(flags) == 0 and "Going on from step 2" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["base", "caopd"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch, stage):
    if stage == "base":
        loss = caopd.cross_entropy
        monkeypatch.setattr(caopd, "cross_entropy",
                            lambda *args, **options: loss(*args, **options) * math.nan)
    else:
        monkeypatch.setitem(caopd.DIVERGENCES, "reverse",
                            lambda *logits: caopd.kl(*logits) * math.nan)
    assert caopd.main([*TINY, "--out", str(tmp_path), "--method", "caopd"]) == 2
    error = capsys.readouterr().err
    assert f"error: {stage}, step 0: the loss is nan and its gradient has norm nan; try" in error
    assert not (tmp_path / stage / "checkpoint.safetensors").exists()


def test_a_stated_confidence_without_finite_logits_is_no_figure(world, monkeypatch):
    _, tokenizer, task, student, _ = world
    broken, seven = copy.deepcopy(student), tokenizer.encode("7")[0]
    sampled = caopd.ask(student, tokenizer, task.held_out[:4], task.wording, 1, Sampling(12),
                        torch.Generator().manual_seed(0), "x")
    monkeypatch.setattr(caopd, "ask", lambda *_: sampled)
    with torch.no_grad():
        broken.model.embed_tokens.weight[seven] = math.nan
    with pytest.raises(BadInput, match="x, evaluation: the logits after .* are not finite"):
        caopd.evaluate(broken, tokenizer, task.held_out[:4], task.wording, Sampling(12), 0,
                       name="x")


@pytest.mark.parametrize("said, right, collapsed", [
    ((0.5, 0.5, 0.5, 0.5), (1, 1, 0, 0), True), ((0.5, 0.5, 0.4, 0.4), (1, 1, 0, 0), False),
    ((0.5, 0.5, 0.5, 0.5), (1, 0, 0, 1), False), ((None, None, None, None), (1, 1, 0, 0), False)])
def test_one_confidence_for_all_is_a_collapse_where_success_differs(said, right, collapsed):
    example = data.Example("arithmetic", "1+1=", "2")
    rollouts = [Rollout([END], "", False, bool(r), c) for c, r in zip(said, right)]
    groups = [Group(example, [2], rollouts[:2]), Group(example, [2], rollouts[2:])]
    share = caopd.summarize(groups, [], np.zeros(2))["collapse"]
    assert TROUBLE["collapse"][0](share) == collapsed


@pytest.mark.parametrize("lr, flags, still", [
    ("1e-30", [], True), ("1e-4", [], False),
    ("1e-2", ["--skip-tokens", "99", "--weight-decay", "0.1"], True)])  # decay alone is no learning
def test_updates_that_never_move_a_weight_are_told_once(tmp_path, capsys, lr, flags, still):
    assert caopd.main([*TINY, "--out", str(tmp_path), "--method", "caopd", "--lr", lr,
                       "--steps", "7", *flags]) == 0
    said = capsys.readouterr().out
    assert said.count("caopd, step 4: no update has moved a weight so far; raise --lr") == still


@pytest.mark.parametrize("later, resumed, warned", [
    (0.3, False, True), (0.3, True, True), (0.47, False, False), (0.7, False, False)])
def test_an_accuracy_that_falls_is_told_once(tmp_path, capsys, later, resumed, warned):
    """At the 40th update there are 20 to compare with the first 20, before it never."""
    def stage():
        return Stage("opd", tmp_path, {}, AdamW(tiny_model(), 0.0, 1.0).tensors(), 1)
    row, running = {"loss": 1.0, "grad_norm": 1.0}, stage()
    for step in running.steps(60):
        running.log(step, row | {"accuracy": (0.5 if step < 20 else later) + step % 2 * 0.1})
        running.save_if_due(step)
        if resumed and step == 25:
            break
    if resumed:
        running = stage()
        assert running.start == 26
        for step in running.steps(60):
            running.log(step, row | {"accuracy": later + step % 2 * 0.1})
    told = re.findall(r"opd, step (\d+): the completions of the last 20", capsys.readouterr().out)
    assert len(told) == warned and all(int(step) == 39 for step in told)


@pytest.mark.parametrize("before, after, warned", [(1.0, 0.0, 1), (0.0, 1.0, 0), (1.0, 1.0, 0)])
def test_an_accuracy_that_does_not_vary_falls_too(tmp_path, capsys, before, after, warned):
    stage = Stage("opd", tmp_path, {}, AdamW(tiny_model(), 0.0, 1.0).tensors(), 100)
    for step in stage.steps(45):
        stage.log(step, {"loss": 1.0, "grad_norm": 1.0, "accuracy": before if step < 20 else after})
    assert capsys.readouterr().out.count("the completions of the last 20") == warned


def test_a_checkpoint_of_other_settings_is_not_taken(tmp_path):
    args = dataclasses.replace(parse_args([*TINY, "--out", str(tmp_path)]), dtype="float32")
    task = data.arithmetic_task(0, 4, words=False)

    def stage(network, args, task=task):
        return Stage("opd", tmp_path, caopd.settings(args, "opd", task),
                     AdamW(network, 0.0, 1.0).tensors(), 1)
    trained = tiny_model()
    optimizer = AdamW(trained, 0.0, 1.0)
    first = Stage("opd", tmp_path, caopd.settings(args, "opd", task), optimizer.tensors(), 1)
    for step in first.steps(5):
        trained(torch.tensor([[1, 2]])).sum().backward()
        optimizer.step(step, 1e-3, SEED)
        first.save_if_due(step)
        break
    fresh, saved = tiny_model(), tmp_path / "opd/checkpoint.safetensors"
    untouched, content = [weight.clone() for weight in fresh.parameters()], saved.read_bytes()
    elsewhere = dataclasses.replace(task, fingerprint=task.fingerprint + 1)
    for other in ((dataclasses.replace(args, lr=1.0),), (args, elsewhere)):
        assert stage(fresh, *other).start == 0
        assert all(torch.equal(a, b) for a, b in zip(untouched, fresh.parameters()))
        assert not saved.exists()  # The other run drops its rows, too.
        saved.write_bytes(content)
    assert stage(fresh, args).start == 1
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), fresh.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(untouched, fresh.parameters()))
    (tmp_path / "metrics.jsonl").write_text('[1]\n')
    with pytest.raises(BadInput, match="metrics.jsonl, line 1: expected a JSON object"):
        stage(fresh, args)
    path = tmp_path / "opd/checkpoint.safetensors"
    tensors = load_file(path)
    name, good = next(iter(tensors)), {"step": "1",
                                       "settings": json.dumps(first.checkpoint.settings)}
    for changed, metadata, words in [
            ({}, {}, "no `settings`"), ({}, good | {"step": "-1"}, "`step` should be"),
            ({}, good | {"step": "x"}, "not JSON"), ({}, good | {"settings": "[]"}, "an object"),
            ({name: tensors[name].double()}, good, "another dtype"),
            ({name: tensors[name][:1]}, good, "another dtype or shape"),
            ({name: tensors[name] * torch.nan}, good, "holds NaN"), (None, good, "readable")]:
        broken = {name: tensors[name]} if changed is None else tensors | changed
        save_file(broken, path, metadata=metadata)
        with pytest.raises(BadInput, match=f"checkpoint.safetensors .delete it.*{words}"):
            stage(fresh, args)
    path.write_bytes(b"cut")
    with pytest.raises(BadInput, match="not a readable checkpoint"):
        stage(fresh, args)
    path.unlink()
    path.mkdir()
    with pytest.raises(BadInput, match="not a readable checkpoint"):
        stage(fresh, args)


def test_the_oracle_row(tmp_path, capsys):
    results = run(tmp_path, "--method", "caopd", "--oracle", "4")
    line = next(line for line in capsys.readouterr().out.splitlines() if "SPR of μ̂" in line)
    assert line.index("floor") > line.index("expected")
    for name in ("base", "caopd"):
        oracle = results[name]["oracle"]
        assert 0 <= oracle["brier"] <= 0.25 * 4 / 3
        assert oracle["accuracy"] == results[name]["accuracy"]
        assert oracle["format"] == 1
    assert "oracle" not in run(tmp_path / "none", "--method", "caopd")["caopd"]


# ----------------------------------------------------------------------------- settings


def another(field: dataclasses.Field, value):
    """A value of a flag that differs from this one."""
    if field.metadata["choices"]:
        return next(choice for choice in field.metadata["choices"] if choice != value)
    if isinstance(value, bool):
        return not value
    if value is None or isinstance(value, list):
        return ["47*8"]
    return value + "x" if isinstance(value, str) else value + 8


@pytest.mark.parametrize("field", dataclasses.fields(Args), ids=lambda field: field.name)
def test_a_flag_decides_what_it_says(field):
    args, task = parse_args(TINY), data.arithmetic_task(0, 4, words=False)
    changed = dataclasses.replace(args, **{field.name: another(field, getattr(args, field.name))})
    stages = [stage for stage in ("base", "opd")
              if caopd.settings(args, stage, task) != caopd.settings(changed, stage, task)]
    assert stages == {caopd.ALL: ["base", "opd"], caopd.METHOD: ["opd"],
                      caopd.NOTHING: []}[field.metadata["decides"]]


def test_stages_and_questions_tell_settings_apart():
    args, task = parse_args(TINY), data.arithmetic_task(0, 4, words=False)
    settings = [caopd.settings(args, stage, task) for stage in ("base", "opd", "caopd")]
    for split, grades in (("validation", tuple(data.GRADES)), ("held-out", ("1+1",))):
        other = data.arithmetic_task(0, 4, False, split, grades)
        settings += [caopd.settings(args, stage, other) for stage in ("base", "opd")]
    assert all(a != b for a, b in itertools.combinations(settings, 2))
    same = data.arithmetic_task(0, 9, False, eval_grades=("1+1",))  # It asks other questions.
    assert caopd.settings(args, "opd", same) == settings[1]


def test_a_base_is_used_again_only_where_all_that_decides_it_is_the_same(tmp_path, capsys):
    def reused(*flags: str) -> bool:
        run(tmp_path, "--method", "grpo", "--overwrite", *flags)
        return "Reusing the base model" in capsys.readouterr().out
    assert not reused() and reused() and reused("--steps", "2") and reused("--method", "opd")
    for flags in (["--clip", "0.5"], ["--sft-noise", "0.5"], ["--dtype", "bfloat16"],
                  ["--split", "validation"]):
        assert not reused(*flags) and reused(*flags)
    assert not reused()


def test_a_base_is_not_used_again_after_other_questions_or_weights(tmp_path, real_model, capsys):
    train, weights = tmp_path / "train.jsonl", tmp_path / "model"
    rows = [*ROWS["mcq"], {"prompt": "long " * 20, "answer": "A"}]
    evaluate = write(tmp_path / "e.jsonl", *ROWS["mcq"])
    shutil.copytree(real_model, weights)

    def reused(*flags: str) -> bool:
        assert caopd.main(["--model", str(weights), "--task", "mcq", "--train", str(train),
                           "--eval", evaluate, "--out", str(tmp_path / "out"), *REAL, "--overwrite",
                           "--sft-steps", "1", "--method", "opd", *flags]) == 0
        return "Reusing the base model" in capsys.readouterr().out
    write(train, *rows)
    assert not reused() and reused() and reused("--steps", "3")
    write(train, *rows[:-1], rows[-1] | {"answer": "B"})
    assert not reused() and reused()
    write(train, *rows)
    assert not reused() and reused("--max-prompt", "500", "--skip-long")
    assert not reused("--max-prompt", "180", "--skip-long")
    assert reused("--max-prompt", "181", "--skip-long") and not reused()
    noisy(Config.from_pretrained(weights), 1).save_pretrained(weights)
    assert not reused() and reused()


# ----------------------------------------------------------------------------- what is written


def test_a_flag_with_several_files_can_be_repeated():
    args = parse_args(["--model", "m", "--task", "mcq", "--train", "a", "b", "--train", "c",
                       "--eval", "0.1"])
    assert args.train == ["a", "b", "c"]


def test_a_finished_command_shows_its_results_and_does_nothing_else(tmp_path, capsys, monkeypatch):
    def without_seconds(text: str) -> str:
        return text[text.index("accuracy  mean conf."):]
    flags = ["--method", "opd", "--oracle", "2", "--paper-samples", "2"]
    first = run(tmp_path, *flags)
    shown = capsys.readouterr().out
    before = {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "make_figures", None)
        assert run(tmp_path, *flags) == first
    again = capsys.readouterr().out
    assert "has the results of this command" in again and "--overwrite" in again
    assert without_seconds(again) == without_seconds(shown)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()}

    (tmp_path / "opd" / "config.json").unlink()  # Its model is not whole.
    assert run(tmp_path, *flags)["opd"] == first["opd"]
    assert "has the results" not in capsys.readouterr().out
    run(tmp_path, "--method", "grpo", *flags[2:])
    shown = capsys.readouterr().out
    assert "has the results" not in shown and "not in this table: opd." in shown
    assert "not in this table" not in again


def test_what_a_command_has_made_serves_others(tmp_path, capsys, monkeypatch):
    """A method more adds a row and trains itself alone, other ways of asking only ask again."""
    first = run(tmp_path, "--method", "opd")
    both = run(tmp_path, "--method", "grpo")
    assert [name for name in both if name in ("base", *METHODS)] == ["base", "opd", "grpo"]
    assert both["opd"] == first["opd"] and both["base"] == first["base"]
    rows, printed = metrics(tmp_path), capsys.readouterr().out
    assert printed.count("held-out questions") == 1  # The base is asked once.

    monkeypatch.setattr(pipeline, "train", None)
    assert run(tmp_path, "--method", "opd,grpo") == both
    again = run(tmp_path, "--method", "opd,grpo", "--eval-samples", "3", "--overwrite")
    assert capsys.readouterr().out.count("Reusing the model in") == 2
    assert again["opd"] != first["opd"] and metrics(tmp_path) == rows
    once_more = run(tmp_path, "--method", "opd,grpo", "--overwrite")
    assert all(once_more[name] == both[name] for name in ("base", "opd", "grpo"))


def test_results_of_other_methods_stay_where_their_models_are_gone(tmp_path):
    first = run(tmp_path, "--method", "opd")
    shutil.rmtree(tmp_path / "opd")
    both = run(tmp_path, "--method", "grpo")
    assert both["opd"] == first["opd"] and "grpo" in both


def test_results_of_a_command_that_ended_in_the_meantime_stay(tmp_path, monkeypatch):
    run(tmp_path, "--method", "opd")

    def meanwhile(*_):
        monkeypatch.undo()
        run(tmp_path, "--method", "rlcr")
    monkeypatch.setattr(pipeline, "check_memory", meanwhile)
    assert {"opd", "rlcr", "grpo"} <= run(tmp_path, "--method", "grpo").keys()


def test_the_same_questions_in_another_place_are_the_same(tmp_path, real_model, capsys):
    train, moved = (write(tmp_path / name, *ROWS["mcq"]) for name in ("a.jsonl", "b.jsonl"))
    flags = ["--model", str(real_model), "--task", "mcq", *REAL, "--out", str(tmp_path / "out"),
             "--method", "grpo"]
    assert caopd.main([*flags, "--train", train, "--eval", train]) == 0
    assert caopd.main([*flags, "--train", moved, "--eval", moved]) == 0
    assert "has the results of this command" in capsys.readouterr().out


def test_figures_are_those_of_the_model_as_it_is_saved(tmp_path, real_model):
    """Adapters are merged, in bfloat16, when they are saved: a run that is interrupted after that
    asks the merged model, and has to find what a whole run found."""
    flags = ["--model", str(real_model), *REAL, "--method", "opd", "--lora-rank", "2",
             "--dtype", "bfloat16", "--lr", "1e-3", "--oracle", "0", "--paper-samples", "0"]
    assert caopd.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "evaluate", lambda *args, ask=pipeline.evaluate:
                      ask(*args) if args[-1] == "base" else interrupt())
        assert caopd.main([*flags, "--out", str(tmp_path / "cut")]) == 130
    assert caopd.main([*flags, "--out", str(tmp_path / "cut")]) == 0
    whole, cut = (json.loads((tmp_path / name / "results.json").read_text())
                  for name in ("whole", "cut"))
    for name in ("base", "opd"):
        assert whole[name].pop("seconds") >= 0 and cut[name].pop("seconds") >= 0
        assert whole[name] == cut[name]


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("other, words", [
    (["--lr", "1e-5"], "with --lr 0.0006, not 1e-05"), (["--seed", "1"], "with --seed 0, not 1"),
    (["--eval-questions", "2"], "with --eval-questions 24, not 2")])
def test_what_other_settings_have_made_is_kept(tmp_path, capsys, interrupted, other, words):
    flags = [*TINY, "--method", "opd", "--save-every", "1", "--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        if interrupted:
            patch.setattr(caopd, "pick_samples", lambda groups, step: interrupt() if step else [])
        assert caopd.main(flags) == (130 if interrupted else 0)
    before = {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()}
    assert caopd.main([*flags, *other]) == 2
    error = capsys.readouterr().err
    assert f"was made {words}; choose another --out, or --overwrite" in error
    assert before == {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()}
    assert caopd.main(flags) == 0


def test_an_interrupted_other_run_leaves_no_results_that_it_has_written_over(tmp_path, capsys):
    """A finished run, another one in its place that is cut off, and the first command again."""
    first = ["--method", "opd", "--out", str(tmp_path)]
    assert caopd.main([*TINY, *first]) == 0
    rows = in_order(metrics(tmp_path))
    for where, other in (("step_gradient", ["--lr", "1e-5"]), ("cross_entropy", ["--seed", "1"])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(caopd, where, interrupt)
            assert caopd.main([*TINY, *first, *other, "--overwrite"]) == 130
        assert caopd.main([*TINY, *first]) == 2
        capsys.readouterr()
        assert caopd.main([*TINY, *first, "--overwrite"]) == 0
        assert "has the results of this command" not in capsys.readouterr().out
        assert in_order(metrics(tmp_path)) == rows


def test_overwrite_makes_a_finished_model_again_whose_command_was_cut_off(tmp_path):
    """Its checkpoint, of all its updates, is still there, and would leave nothing to do."""
    flags = [*TINY, "--method", "opd", "--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "caopd", dataclasses.replace(METHODS["caopd"], confidence=interrupt))
        assert caopd.main([*flags, "--method", "opd,caopd"]) == 130
    assert (tmp_path / "opd" / "config.json").exists()
    assert (tmp_path / "opd" / "checkpoint.safetensors").exists()
    before = metrics(tmp_path)
    assert caopd.main([*flags, "--overwrite"]) == 0
    seconds = [[row["seconds"] for row in rows if row["stage"] == "opd"]
               for rows in (before, metrics(tmp_path))]
    assert len(seconds[0]) == len(seconds[1]) > 0 and seconds[0] != seconds[1]


def test_a_run_never_goes_on_from_a_checkpoint_whose_rows_another_one_dropped(tmp_path):
    flags = [*TINY, "--method", "opd", "--save-every", "1", "--out", str(tmp_path), "--overwrite"]

    def cut_off(after: int, *more: str) -> None:
        step, calls = caopd.step_gradient, itertools.count()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(caopd, "step_gradient",
                          lambda *args: step(*args) if next(calls) < after else interrupt())
            assert caopd.main([*flags, *more]) == 130
    cut_off(3)
    cut_off(0, "--lr", "1e-5")
    assert caopd.main(flags) == 0
    assert [row["step"] for row in metrics(tmp_path) if row["stage"] == "opd"] == [0, 1, 2, 3]


def test_a_model_directory_is_known_by_what_is_read_from_it(real_model, tmp_path, monkeypatch):
    model = shutil.copytree(real_model, tmp_path / "model")
    before = fingerprint(model)
    (model / "results.json").write_text("{}")
    (model / "directory.json").mkdir()
    (model / "chat_template.jinja").symlink_to("nowhere")
    assert fingerprint(model) == before
    (model / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert fingerprint(model) != before
    monkeypatch.setattr(Path, "open", lambda self, *_: os.open(tmp_path / "none" / self.name, 0))
    with pytest.raises(BadInput, match="config.json cannot be read"):
        fingerprint(model)


def test_what_is_saved_has_the_permissions_of_any_new_file(small_run, tmp_path):
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in small_run.glob("**/*") if path.is_file()}
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_a_run_from_a_model_in_its_own_out_finishes_and_goes_on(real_model, tmp_path, capsys):
    model = shutil.copytree(real_model, tmp_path / "model")
    flags = ["--model", str(model), "--out", str(model), *REAL, "--method", "opd"]
    assert caopd.main(flags) == caopd.main(flags) == 0
    assert "has the results of this command" in capsys.readouterr().out


def in_order(rows: list[dict]) -> list[dict]:
    """Rows by stage and step, without the seconds they took."""
    return sorted(({key: value for key, value in row.items() if key != "seconds"} for row in rows),
                  key=lambda row: (row["stage"], row["step"]))


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_nothing_that_tells_of_an_old_model_stays_beside_a_new_one(tmp_path, real_model):
    flags = ["--model", str(real_model), "--out", str(tmp_path), *REAL, "--method", "opd"]
    assert caopd.main([*flags, "--lora-rank", "2", "--save-adapter"]) == 0
    adapter, card = tmp_path / "opd/adapter/adapter_model.safetensors", tmp_path / "opd/README.md"
    assert adapter.exists() and card.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "model_card", interrupt)
        assert caopd.main([*flags, "--seed", "1", "--overwrite"]) == 130
    assert (tmp_path / "opd/model.safetensors").exists() and not card.exists()
    assert not adapter.exists() and not (adapter.parent / "adapter_config.json").exists()


@pytest.mark.parametrize("taught", [False, True])
def test_an_adapter_names_the_model_that_it_was_trained_on(tmp_path, real_model, taught):
    flags = ["--model", str(real_model), "--out", str(tmp_path), *REAL, "--method", "opd",
             "--lora-rank", "2", "--save-adapter", "--sft-steps", str(2 * taught),
             "--dtype", "float32"]  # where merging rounds least
    assert caopd.main(flags) == 0
    config = json.loads((tmp_path / "opd/adapter/adapter_config.json").read_text())
    origin = Path(config["base_model_name_or_path"])
    assert origin == (tmp_path / "base" if taught else real_model)
    base, trained = (load_file(path / "model.safetensors") for path in (origin, tmp_path / "opd"))
    adapter = load_file(tmp_path / "opd/adapter/adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    merged = base[f"{name}.weight"] + config["lora_alpha"] / config["r"] * b @ a
    assert torch.allclose(merged, trained[f"{name}.weight"], atol=1e-7)


def test_a_model_that_the_run_would_write_over_is_refused(tmp_path, real_model, capsys):
    flags = ["--out", str(tmp_path), *REAL]
    assert caopd.main(["--model", str(real_model), *flags, "--method", "opd", "--sft-steps",
                       "1"]) == 0
    for name, *more in (("opd", "--method", "caopd,opd"), ("base", "--sft-steps", "2")):
        before = (tmp_path / name / "model.safetensors").read_bytes()
        assert caopd.main(["--model", str(tmp_path / name), *flags, *more]) == 2
        assert "choose another --out" in capsys.readouterr().err
        assert (tmp_path / name / "model.safetensors").read_bytes() == before
    assert caopd.main(["--model", str(tmp_path / "opd"), *flags, "--method", "caopd",
                       "--overwrite"]) == 0


def test_results_are_made_again_for_other_questions_to_ask(tmp_path, real_model, capsys):
    train, evaluate = write(tmp_path / "t.jsonl", *ROWS["mcq"]), tmp_path / "e.jsonl"

    def done(*more: str) -> bool:
        assert caopd.main(["--model", str(real_model), "--task", "mcq", "--train", train, "--eval",
                           str(evaluate), "--out", str(tmp_path / "out"), *REAL, *more,
                           "--method", "opd"]) == 0
        return "has the results of this command" in capsys.readouterr().out
    write(evaluate, *ROWS["mcq"])
    assert not done() and done()
    write(evaluate, ROWS["mcq"][0] | {"prompt": "another"})
    assert not done("--overwrite") and done()


@pytest.mark.parametrize("kind", ["reader gone", "disk full", "ascii"])
def test_words_that_cannot_be_shown_do_not_end_a_run(tmp_path, monkeypatch, kind):
    reader, writer = os.pipe()
    if kind == "reader gone":
        os.close(reader)
    elif kind == "disk full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), writer)
    words = open(writer, "w", encoding="ascii" if kind == "ascii" else "utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", words)
        patch.setattr(sys, "stderr", words)
        run(tmp_path, "--method", "opd", "--width", "48", "--sft-steps", "1", "--steps", "1")
    words.close()
    assert not list(tmp_path.glob("**/checkpoint*"))
    if kind == "ascii":
        shown = open(reader, encoding="ascii").read()
        assert "Everything is in" in shown


def test_one_process_writes_in_a_directory(tmp_path, capsys):
    with files.claimed(tmp_path):
        assert caopd.main([*TINY, "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "another process is writing there" in error and error.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    run(tmp_path, "--method", "opd")


def test_a_full_disk_is_one_sentence_and_keeps_what_was_there(tmp_path, whole_runs, capsys,
                                                              monkeypatch):
    """crash.py has the other writes; the library that writes tensors has errors of its own."""
    flags = ["--dtype", "float32", "--method", "both"]
    real, calls = files.save_file, itertools.count()

    def full(tensors, path, metadata):
        real(tensors, path, metadata=metadata)
        if next(calls) == 8:  # the second step of OPD
            raise SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(files, "save_file", full)
    assert caopd.main([*TINY, *CUT, *flags, "--out", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "No space left" in shown.err.splitlines()[-1] and "Traceback" not in shown.err
    results = run(tmp_path, *CUT, *flags)
    assert "Going on from step" in capsys.readouterr().out
    assert_same_outcome(tmp_path, results, *whole_runs(*flags))


PEAK = """
import itertools, caopd
step, updates = caopd.AdamW.step, itertools.count()

def cut_off(*inputs):  # in the given update of this process
    if next(updates) == {update}:
        raise KeyboardInterrupt
    return step(*inputs)
caopd.AdamW.step = cut_off
caopd.main({flags})
status = open("/proc/self/status").read()
print("peak", status[status.index("VmHWM"):].split()[1])
"""


@pytest.mark.slow
def test_resuming_takes_no_more_memory_than_running(tmp_path):
    """A network of 29 M parameters, whose checkpoint is 460 MB: 4 updates of the base, then two of
    a method in each process."""
    flags = ["--width", "768", "--layers", "4", "--sft-steps", "4", "--sft-documents", "2",
             "--steps", "9", "--prompts", "1", "--rollouts", "2", "--eval-questions", "2",
             "--oracle", "0", "--paper-samples", "0", "--save-every", "1", "--method", "caopd",
             "--micro-tokens", "64", "--out", str(tmp_path)]
    peaks = []
    for update in (6, 2):
        done = subprocess.run([sys.executable, "-c", PEAK.format(update=update, flags=flags)],
                              capture_output=True, text=True, cwd=Path(caopd.__file__).parent)
        peaks.append(int(done.stdout.split()[-1]))
        assert "Interrupted" in done.stderr
    assert "Going on from step 2" in done.stdout
    assert peaks[1] < 1.05 * peaks[0]


def test_interrupted_runs_end_in_the_bytes_of_a_whole_one():
    """A sample of what crash.py does to real processes."""
    script = Path(__file__).with_name("crash.py")
    done = subprocess.run([sys.executable, script, "--random", "1", "--every", "50"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ----------------------------------------------------------------------------- the split


def side_of(question: str) -> str:
    """The side of the split of a question of the embedded world, like 12+34=."""
    a, op, b = re.fullmatch(r"(\d+)([+*])(\d+)=", question).groups()
    return data.side(f"{min(int(a), int(b))}{op}{max(int(a), int(b))}")


def watch(monkeypatch, maker: str) -> tuple[list, list]:
    """Two lists that fill with the questions that are trained on, and with those that are asked.

    maker: the function of data.py that makes the task.
    """
    trained, asked = [], []
    make, evaluate, rollout = getattr(data, maker), caopd.evaluate, caopd.rollout

    def make_and_watch(*rest, **named):
        task = make(*rest, **named)

        def draw(*rest):
            trained.extend(example.question for example in task.draw(*rest))
            return task.draw(*rest)
        return dataclasses.replace(task, draw=draw)

    def watch_rollout(student, tokenizer, examples, *rest):
        rolled_out.extend(example.question for example in examples)
        return rollout(student, tokenizer, examples, *rest)

    def watch_evaluation(network, tokenizer, examples, *rest, **named):
        assert set(rolled_out) <= set(trained)  # so far by training
        result = evaluate(network, tokenizer, examples, *rest, **named)
        asked.extend(example.question for example in examples)
        rolled_out.clear()
        return result
    rolled_out = []
    monkeypatch.setattr(data, maker, make_and_watch)
    monkeypatch.setattr(caopd, "rollout", watch_rollout)
    monkeypatch.setattr(pipeline, "evaluate", watch_evaluation)
    return trained, asked


@pytest.mark.parametrize("flags, trained_on, asked_of", [
    ([], {"train", "validation"}, {"held-out"}),
    (["--split", "validation"], {"train"}, {"validation"})])
def test_the_split_decides_what_is_trained_on_and_what_is_asked(tmp_path, monkeypatch, flags,
                                                                trained_on, asked_of):
    trained, asked = watch(monkeypatch, "arithmetic_task")
    run(tmp_path, "--method", "opd", *flags)
    assert set(map(side_of, trained)) == trained_on and set(map(side_of, asked)) == asked_of
    assert len(trained) >= 6 * 8 + 4 * 4 and len(asked) == 2 * 24


@pytest.mark.parametrize("flags, evaluates", [
    ([], True), (["--split", "validation"], True), (["--split", "validation"], False)])
def test_the_split_of_a_training_file(tmp_path, real_model, monkeypatch, capsys, flags, evaluates):
    """The validation side is a part of --train, and needs no --eval."""
    questions = [f"Q{i}?" for i in range(20)]
    train = write(tmp_path / "t.jsonl", *({"prompt": q, "answer": "A"} for q in questions))
    held_out = write(tmp_path / "e.jsonl", {"prompt": "held out?", "answer": "B"})
    trained, asked = watch(monkeypatch, "listed_task")
    assert caopd.main(["--model", str(real_model), "--task", "mcq", "--train", train,
                       *(["--eval", held_out] if evaluates else []), *REAL, "--method", "opd",
                       "--prompts", "20", "--out", str(tmp_path / "out"), *flags]) == 0
    kept = [q for q in questions if data.side(q) == "validation"]
    assert 4 < len(kept) < 16
    assert (f"{held_out} is not read" in capsys.readouterr().out) == (evaluates and flags != [])
    if flags:
        assert set(trained) == set(questions) - set(kept) and set(asked) == set(kept[:4])
    else:
        assert set(trained) == set(questions) and set(asked) == {"held out?"}


@pytest.mark.parametrize("flags", [[], ["--split", "validation"]])
def test_a_share_of_several_training_files_is_held_out(tmp_path, real_model, monkeypatch, flags):
    questions = [f"Q{i}?" for i in range(40)]
    files = [write(tmp_path / f"{i}.jsonl", *({"question": q, "answer": "A"}
                                              for q in questions[i::2])) for i in range(2)]
    trained, asked = watch(monkeypatch, "listed_task")
    assert caopd.main(["--model", str(real_model), "--task", "mcq", "--train", *files, "--eval",
                       "0.1", "--out", str(tmp_path / "out"), *REAL, "--method", "opd",
                       "--prompts", "40", "--eval-questions", "40", *flags]) == 0
    sides = {q: data.side(q, 0.1) for q in questions}
    assert set(sides.values()) == {"train", "validation", "held-out"}
    assert set(asked) == {q for q in questions if sides[q] == (flags or ["held-out"])[-1]}
    unseen = {"held-out", "validation"} if flags else {"held-out"}
    assert set(trained) == {q for q in questions if sides[q] not in unseen}


def test_a_question_with_a_space_at_its_end_is_on_the_same_side(tmp_path, real_model, monkeypatch,
                                                               capsys):
    questions = [f"Q{i}?{space}" for i in range(30) for space in ("", " ")]
    train = write(tmp_path / "t.jsonl", *({"prompt": q, "answer": "A"} for q in questions))
    flags = ["--model", str(real_model), "--task", "mcq", "--train", train, *REAL, "--method",
             "opd", "--prompts", "60", "--eval-questions", "60"]
    trained, asked = watch(monkeypatch, "listed_task")
    assert caopd.main([*flags, "--eval", "0.2", "--out", str(tmp_path / "a")]) == 0
    assert asked and not {q.strip() for q in trained} & {q.strip() for q in asked}
    capsys.readouterr()
    evaluate = write(tmp_path / "e.jsonl", {"prompt": "Q7? ", "answer": "A"},
                     {"prompt": "Q99?", "answer": "A"})
    assert caopd.main([*flags, "--eval", evaluate, "--out", str(tmp_path / "b")]) == 0
    assert "Note: 1 held-out questions are also in" in capsys.readouterr().out


def test_a_model_of_the_toy_is_refused_as_one_that_reads_words(small_run, tmp_path, capsys):
    code = caopd.main(["--model", str(small_run / "opd"), "--method", "base", "--max-new-tokens",
                       "16", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2 and "cannot spell a question in words" in error and error.count("\n") == 1


def test_a_split_that_leaves_no_question_is_one_sentence(tmp_path, real_model, capsys):
    asked = write(tmp_path / "e.jsonl", {"prompt": "held out?", "answer": "B"})
    for side in ("validation", "train"):  # All training questions are on this side.
        questions = [q for q in map(str, range(20)) if data.side(q) == side]
        train = write(tmp_path / "t.jsonl", *({"prompt": q, "answer": "A"} for q in questions))
        code = caopd.main(["--model", str(real_model), "--task", "mcq", "--train", train, "--eval",
                           asked, "--out", str(tmp_path / "out"), *REAL, "--split", "validation"])
        error = capsys.readouterr().err
        assert code == 2 and "validation" in error and error.count("\n") == 1


# ----------------------------------------------------------------------------- real models

REAL = ["--steps", "2", "--prompts", "2", "--rollouts", "2", "--max-new-tokens", "8",
        "--eval-questions", "4", "--oracle", "0", "--paper-samples", "0"]


def write(path: Path, *rows) -> str:
    """A JSONL file of these rows. A text stands for a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


ROWS = {
    "mcq": [{"prompt": f"Q{i}?\nA: 1\nB: 2", "answer": "AB"[i % 2], "system": "Choose."}
            for i in range(4)],
    "tool": [{"prompt": f"T{i}", "answer": [{"Action": "go", "Action_Input": f'{{"n": {i}}}'}]}
             for i in range(4)],
    "arithmetic": [{"prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(4)]}


@pytest.mark.parametrize("task, files, extra", [
    ("arithmetic", False, ["--sft-steps", "1", "--oracle", "2", "--paper-samples", "2"]),
    ("arithmetic", True, ["--method", "caopd-sc,rlcr"]), ("mcq", True, ["--method", "caopd"]),
    ("tool", True, ["--sft-steps", "2", "--method", "opd"])])
def test_a_model_directory_from_start_to_table(tmp_path, real_model, task, files, extra):
    flags = ["--model", str(real_model), "--task", task, "--out", str(tmp_path / "out"), *REAL]
    if files:
        flags += ["--train", write(tmp_path / "t.jsonl", *ROWS[task]),
                  "--eval", write(tmp_path / "e.jsonl", *ROWS[task])]
    assert caopd.main([*flags, *extra]) == 0
    assert (tmp_path / "out/results.json").exists()
    assert not list((tmp_path / "out").glob("**/*.tmp"))


def test_prompts_over_the_limit_are_refused_or_left_out(tmp_path, real_model, capsys):
    rows = ROWS["mcq"] + [{"prompt": "long " * 100, "answer": "A"}]
    flags = ["--model", str(real_model), "--task", "mcq", "--out", str(tmp_path / "out"), *REAL,
             "--max-prompt", "400", "--train", write(tmp_path / "t.jsonl", *rows),
             "--eval", write(tmp_path / "e.jsonl", *ROWS["mcq"])]
    assert caopd.main(flags) == 2
    assert "t.jsonl, line 5: the prompt has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert caopd.main([*flags, "--skip-long"]) == 0
    assert "Left out 1 of 5 questions" in capsys.readouterr().out


def test_generated_questions_over_the_limit_are_always_refused(tmp_path, capsys):
    """A generated task has no list to leave questions out of, and 713+170= takes 10 tokens."""
    run(tmp_path / "fits", "--method", "grpo", "--max-prompt", "10")
    for flags in ([], ["--skip-long"]):
        out = tmp_path / "out"
        assert caopd.main([*TINY, "--out", str(out), "--max-prompt", "9", *flags]) == 2
        assert "has 10 tokens, over --max-prompt 9" in capsys.readouterr().err and not out.exists()


RETURNED = """
import resource, torch
from memory import keep_freed_memory, return_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

keep_freed_memory()
tensors = [torch.ones(2 ** 20 if i % 2 else 2 ** 10) for i in range(80)]
del tensors[1::2]
before = resident()
return_freed_memory()
print(before - resident(), sum(tensor.sum() for tensor in tensors).item())
"""

KEPT = """
import ctypes, torch
from memory import keep_freed_memory
{keep}
tensors = [torch.ones(2 ** 20) for _ in range(20)]
del tensors
class Mallinfo(ctypes.Structure):
    _fields_ = [("sizes", ctypes.c_size_t * 10)]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo
print(mallinfo().sizes[8])
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"),
                    reason="another C library than glibc 2.33 or later")
def test_freed_memory_is_kept_for_the_next_tensors():
    """What malloc holds for reuse (`fordblks`) once 80 MiB of tensors are freed. The system's own
    count of pages it had to lend is no measure: some kernels keep none."""
    held = []
    for keep in ("", "keep_freed_memory()"):
        done = subprocess.run([sys.executable, "-c", KEPT.format(keep=keep)], check=True,
                              capture_output=True, text=True, cwd=Path(caopd.__file__).parent)
        held.append(int(done.stdout) / 2 ** 20)
    assert held[0] < 20 and held[1] > 80


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim")
                    or not os.path.exists("/proc/self/statm"), reason="no glibc, or no Linux")
def test_freed_memory_between_tensors_in_use_is_returned():
    done = subprocess.run([sys.executable, "-c", RETURNED], check=True, capture_output=True,
                          text=True, cwd=Path(caopd.__file__).parent)
    returned, kept = map(float, done.stdout.split())
    assert returned > 120 * 2 ** 20 and kept == 40 * 2 ** 10


def test_memory_is_kept_or_not_without_glibc(monkeypatch):
    for error in (OSError, AttributeError):
        def refuse(name):
            raise error
        monkeypatch.setattr(ctypes, "CDLL", refuse)
        assert keep_freed_memory() is None and return_freed_memory() is None


def test_a_model_is_asked_as_it_is(tmp_path, real_model, capsys):
    """--method base trains nothing, and so needs no questions to train on, and less memory."""
    asked = write(tmp_path / "e.jsonl", *ROWS["mcq"])
    flags = ["--model", str(real_model), "--task", "mcq", *REAL]
    assert caopd.main([*flags, "--method", "base", "--eval", asked,
                       "--out", str(tmp_path / "base")]) == 0
    assert "GiB needed on cpu (weights" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "base").iterdir()}
    assert files == {"answers", "lock", "results.json"}
    assert caopd.main([*flags, "--method", "opd", "--train", asked, "--eval", asked,
                       "--out", str(tmp_path / "opd")]) == 0
    assert "Note: the first" not in capsys.readouterr().out
    alone, beside = (json.loads((tmp_path / name / "results.json").read_text())
                     for name in ("base", "opd"))
    assert alone["base"] == beside["base"] and "opd" not in alone
    assert caopd.main([*flags, "--method", "base", "--eval", asked, "--eval-questions", "3",
                       "--out", str(tmp_path / "three")]) == 0
    assert "Note: the first 3 of 4 held-out questions are asked" in capsys.readouterr().out


def test_answers_of_other_settings_do_not_stay(tmp_path):
    run(tmp_path, "--method", "opd,caopd")
    assert len(list((tmp_path / "answers").iterdir())) == 3
    run(tmp_path, "--method", "opd", "--eval-temperature", "0.5", "--overwrite")
    assert {path.stem for path in (tmp_path / "answers").iterdir()} == {"base", "opd"}


def test_the_toys_base_is_made_without_a_method(tmp_path):
    assert run(tmp_path, "--method", "base")["base"] == run(tmp_path, "--method", "opd")["base"]


def test_only_what_reads_a_demonstration_needs_room_for_it(tmp_path, real_model, capsys):
    rows = [row | {"demo": "long " * 200 + "<answer>B</answer>"} for row in ROWS["mcq"]]
    path = write(tmp_path / "q.jsonl", *(row for row in rows if row["answer"] == "B"))
    for method, code in (("grpo", 0), ("opd", 2)):
        assert caopd.main(["--model", str(real_model), "--task", "mcq", "--train", path, "--eval",
                           path, *REAL, "--method", method, "--out", str(tmp_path / "o")]) == code
    assert "with demonstration and completion takes" in capsys.readouterr().err


def test_a_run_that_cannot_fit_says_so_and_says_what_helps(tmp_path, real_model, capsys,
                                                           monkeypatch):
    monkeypatch.setattr("memory.memory_free", lambda device: 2 ** 18)
    monkeypatch.setattr("memory.LOGITS_AT_ONCE", 2 ** 8)
    out = tmp_path / "out"
    assert caopd.main(["--model", str(real_model), "--out", str(out), *REAL]) == 2
    shown = capsys.readouterr()
    assert "GiB needed on cpu" in shown.out and not out.exists()
    for flags in ("--micro-tokens", "--dtype bfloat16 --rounding stochastic"):
        assert flags in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("flags, offered, refused", [
    (["--method", "opd"], ("--teacher-device cpu", "--lora-rank"), ()),
    (["--method", "caopd-sc"], ("--lora-rank",), ("--teacher-device",)),
    (["--teacher-device", "cpu"], ("--recompute",), ("--lora-rank",))])
def test_what_helps_is_what_goes_with_the_other_flags(monkeypatch, flags, offered, refused):
    monkeypatch.setattr("memory.memory_free", lambda device: 24 * 2 ** 30)
    args = dataclasses.replace(parse_args([*TINY, *flags]), dtype="float32")
    config = Config("qwen3", 151_936, 4096, 12_288, 36, 32, 8, 128)  # Qwen3-8B
    task = data.arithmetic_task(0, 4, words=False)
    with pytest.raises(BadInput) as error:
        check_memory(config, task, data.toy_tokenizer(), args, torch.device("cuda:0"))
    helps = str(error.value).partition("would bring it to")[2]
    assert all(flag in helps for flag in offered) and not any(flag in helps for flag in refused)


@pytest.mark.parametrize("closed, flags, code", [
    (">&-", [*TINY, "--method", "base"], 0), ("2>&-", ["--method", "nope"], 2)])
def test_a_stream_that_was_closed_from_the_start_is_no_error(tmp_path, closed, flags, code):
    """Python has None for it."""
    done = subprocess.run(["sh", "-c", f'"$0" caopd.py "$@" {closed}', sys.executable, *flags,
                           "--out", str(tmp_path)], capture_output=True,
                          cwd=Path(caopd.__file__).parent)
    assert done.returncode == code and b"Traceback" not in done.stderr


def test_out_of_memory_on_a_gpu_names_the_flags_to_turn(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore.")

    monkeypatch.setattr(caopd, "accumulate_gradient", full)
    assert caopd.main([*TINY, "--out", str(tmp_path)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1 and all(flag in error[0] for flag in (
        "--micro-tokens", "--recompute", "--teacher-device cpu", "--rounding stochastic"))


@pytest.mark.parametrize("name, count, chosen", [
    ("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cuda", 2, "cuda:0"), ("cuda:1", 2, "cuda:1"),
    ("cpu", 2, "cpu")])
def test_the_chosen_gpu_becomes_the_current_one(monkeypatch, name, count, chosen):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert str(pipeline.pick_device(name)) == chosen
    assert current == ([chosen] if chosen != "cpu" else [])


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_picked_only_where_the_gpu_multiplies_it(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: native or including_emulation)
    chosen = pipeline.pick_dtype(parse_args(["--model", "m"]), torch.device("cuda:0"))
    assert chosen == ("bfloat16" if native else "float32")


def test_the_estimate_counts_what_evaluation_samples(monkeypatch):
    """By hand: logits of all answers to the only question, its keys and values, and their masks."""
    monkeypatch.setattr("memory.LOGITS_AT_ONCE", 2 ** 8)
    args = dataclasses.replace(parse_args(TINY), dtype="float32", eval_questions=1, prompts=1)
    config = Config("qwen3", 1000, 16, 24, 1, 4, 2, 4, tie_word_embeddings=True)
    new = args.max_new_tokens
    needed = [sum(memory_needed(config, [20], dataclasses.replace(args, oracle=n)).values())
              for n in (10_000, 20_000)]
    logits, cached = 10_000 * 1000 * (4 + 5 * 4 + 8), 10_000 * new * 2 * 4 * 2 * 4
    masks = 24 * (20_000 * (20 + 20_000 * new) - 10_000 * (20 + 10_000 * new))
    assert needed[1] - needed[0] == pytest.approx(logits + cached + masks)


@pytest.mark.parametrize("flags, processes", [
    ([], 1), (["--teacher-device", "cpu"], 1), ([], 4), (["--lora-rank", "3"], 4)])
def test_a_method_without_a_teacher_needs_no_memory_for_one(flags, processes):
    config = Config("qwen3", 1000, 16, 24, 1, 4, 2, 4, tie_word_embeddings=True)
    for methods, has_one in (("grpo,rlcr", False), ("grpo,opd", True)):
        args = dataclasses.replace(parse_args([*TINY, "--method", methods, *flags]),
                                   dtype="float32")
        assert (memory_needed(config, [20], args, processes)["teacher"] > 0) == has_one


def test_help_tells_of_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "up to 15 % longer" in " ".join(text.split())
    for field in dataclasses.fields(Args):
        assert f"--{field.name.replace('_', '-')} " in text + " "


@pytest.mark.parametrize("prepend", [False, True])
def test_the_segments_whose_probability_is_read_are_those_that_are_put_in(prepend):
    tokenizer = sentencepiece(prepend)
    branches = caopd.ConfidenceTree(tokenizer, "\n")
    ids = tokenizer.encode("46")
    for i, value in enumerate(VALUES):
        put_in, n = data.replace_confidence(tokenizer, ids, value)
        read = branches.start + branches.tokens[i][branches.real[i] > 0].tolist()
        assert put_in[n:-1] == read


def test_adapters_are_all_that_is_held_beside_the_model():
    """By hand: 2 bytes a weight of the model; of an adapter, the float32 value, gradient, moments
    and average."""
    args = dataclasses.replace(parse_args([*TINY, "--lora-rank", "3"]), dtype="bfloat16")
    config = Config("qwen3", 1000, 16, 24, 1, 4, 2, 4, tie_word_embeddings=True)
    needed = memory_needed(config, [20], args)
    weights = sum(p.numel() for p in Transformer(config).parameters())
    adapters = 3 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 24))
    assert needed["weights, gradient and optimizer"] == 2 * weights + (4 + 4 + 8) * adapters
    assert needed["teacher"] == 4 * adapters


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("flags, words", [
    (["--model", ""], "--model: its value is empty"),
    (["--rollouts", "0"], "--rollouts 0"), (["--lr", "0"], "--lr 0"), (["--lr", "nan"], "--lr nan"),
    (["--lr", "-1"], "--lr -1"), (["--steps", "x"], "--steps"), (["--task", "poetry"], "--task"),
    (["--method", "sft"], "--method"), (["--method", "opd,sft"], "--method opd,sft"),
    (["--method", "opd,"], "--method opd,"),
    (["--method", "opd,opd"], "each once"), (["--method", ""], "--method"),
    (["--nonsense"], "--nonsense"), (["--temperature", "0"], "--temperature"),
    (["--teacher-rate", "1.5"], "--teacher-rate"), (["--device", "tpu"], "--device tpu"),
    (["--device", "cuda:99"], "--device cuda:99"), (["--device", "what"], "--device what"),
    (["--task", "mcq"], "needs both --train"), (["--train", "x.jsonl"], "need --model"),
    (["--model", "m", "--train", "x.jsonl"], "needs both --train"),
    (["--model", "m", "--eval", "x.jsonl", "--split", "validation"], "needs both --train"),
    *((["--model", "m", "--train", "x.jsonl", "--eval", share],
       f"--eval {share}: a share should be")
      for share in ("0", "0.8", "1", "-0.1", "nan", "1e999")),
    (["--train", "x.jsonl", "--eval", "x.jsonl"], "need --model"),
    (["--model", "/nowhere"], "--model /nowhere"), (["--model", "no dir"], "--model no dir"),
    (["--prompts", "0"], "--prompts"), (["--max-new-tokens", "0"], "--max-new-tokens"),
    (["--max-prompt", "2"], "--max-prompt 2"), (["--width", "20"], "--width"),
    (["--max-new-tokens", "200"], "over the model's 128"),
    (["--max-new-tokens", "100", "--context", "solution"], "with solution and completion takes"),
    (["--oracle", "1"], "--oracle 1"),
    (["--split", "test"], "--split"), (["--eval-top-p", "0"], "--eval-top-p 0"),
    (["--paper-samples", "-1"], "--paper-samples -1"), (["--eval-samples", "0"], "--eval-samples"),
    (["--template-args", "{enable_thinking: false}"], "--template-args: not JSON"),
    (["--save-adapter"], "only --lora-rank N"), (["--lora-rank", "-1"], "--lora-rank -1"),
    (["--lora-rank", "4", "--teacher-device", "cpu"], "takes next to no memory"),
    (["--replace", "answer"], "--replace answer: it should be one or several of completion"),
    (["--template-args", "[]"], "--template-args []: it should be a JSON object"),
    (["--method", "caopd-sc", "--context", "solution"], "caopd-sc needs --context demo"),
    (["--method", "caopd-sc", "--teacher-device", "cpu"], "leave out --teacher-device"),
    (["--method", "opd,grpo", "--rollouts", "1"], "--rollouts 1"),
    (["--method", "rlcr", "--rollouts", "1"], "--rollouts 1"),
    (["--method", "opd", "--context", "solution", "--rollouts", "1"], "--rollouts 1"),
    (["--method", "caopd-direct-loo", "--rollouts", "1"], "--rollouts 1"),
    (["--method", "opd,caopd-direct", "--replace", "demonstration"], "--replace demonstration"),
    (["--seed", str(2 ** 64)], "--seed 18446744073709551616: it should be a whole number below"),
    (["--oracle", str(2 ** 63)], "--oracle 9223372036854775808"),
    (["--width", str(10 ** 12)], "--width 1000000000000"), (["--layers", "9999"], "--layers 9999"),
    (["--eval-questions", str(10 ** 9)], "--eval-questions 1000000000: it should be between 1 and"),
    (["--device", "cpu:1"], "--device cpu:1"), (["--lr", "1e30"], "--lr 1e+30"),
    (["--temperature", "1e-40"], "--temperature 1e-40: it should be at least 0.001"),
    (["--eval-temperature", "1e-9"], "--eval-temperature 1e-09"),
    (["--method", "base", "--explain", "1+1"], "--explain with --method base"),
    (["--method", "base,opd"], "--method base,opd: it should be one or several of"),
    (["--method", "base", "--model", "m", "--eval", "0.1"], "needs both --train"),
    (["--method", "grpo", "--model", "m", "--eval", "x.jsonl"], "needs both --train"),
    (["--lora-alpha", "16"], "--lora-alpha: only --lora-rank N"),
    (["--method", "caopd", "--replace", "instruction"], "teacher has no instruction")])
def test_a_bad_request_is_one_sentence_and_exit_code_2(tmp_path, capsys, flags, words):
    assert caopd.main([*TINY, "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("caopd.py: error: ")
    assert not (tmp_path / "out").exists()


def test_bad_files_and_directories_are_one_sentence(tmp_path, real_model, capsys):
    good = write(tmp_path / "good.jsonl", *ROWS["mcq"])

    def refused(model, train, words):
        code = caopd.main(["--model", str(model), "--task", "mcq", "--train", str(train),
                           "--eval", good, "--out", str(tmp_path / "out"), *REAL])
        error = capsys.readouterr().err
        assert code == 2 and words in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()

    bad = write(tmp_path / "bad.jsonl", ROWS["mcq"][0], "{")
    refused(real_model, bad, "bad.jsonl, line 2: not JSON")
    lacks = write(tmp_path / "lacks.jsonl", {"prompt": "p"})
    refused(real_model, lacks, "lacks.jsonl, line 1: no `answer`")
    refused(real_model, write(tmp_path / "other.jsonl", ROWS["tool"][0]), "cannot verify")
    refused(real_model, write(tmp_path / "empty.jsonl"), "no examples")
    refused(real_model, tmp_path / "absent.jsonl", "absent.jsonl: there is no such file")
    refused(tmp_path, good, "not a Hugging Face model directory")
    refused(good, good, "no such directory")
    refused("x" * 300, good, "no such directory")
    refused(real_model, "x" * 300, "File name too long")
    cut = tmp_path / "cut"
    shutil.copytree(real_model, cut)
    (cut / "model.safetensors").write_bytes((real_model / "model.safetensors").read_bytes()[:-8])
    refused(cut, good, "not a readable safetensors file")
    (cut / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": "<eos>", "chat_template": "{{ raise_exception('no\\nsuch role') }}"}))
    refused(cut, good, "the chat template failed: no such role")
    small = json.loads((cut / "config.json").read_text()) | {"vocab_size": 20}
    (cut / "config.json").write_text(json.dumps(small))
    refused(cut, good, "is outside the model's vocabulary of 20")
    (cut / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    refused(cut, good, "'mamba' is not supported")


def test_the_template_gets_its_arguments(tmp_path, real_model, capsys):
    quiet = tmp_path / "quiet"
    shutil.copytree(real_model, quiet)
    (quiet / "chat_template.jinja").write_text(
        "{% if enable_thinking is not false %}{{ raise_exception('it thinks') }}{% endif %}"
        "<user>{{ messages[-1].content }}")
    flags = ["--model", str(quiet), "--max-prompt", "1", "--out", str(tmp_path / "out")]
    for given, words in (("{}", "it thinks"), ('{"enable_thinking": false}', "tokens")):
        assert caopd.main([*REAL, *flags, "--template-args", given]) == 2
        assert words in capsys.readouterr().err


def test_a_model_in_out_that_another_run_starts_from_keeps_its_card(real_model, tmp_path):
    flags = [*REAL, "--out", str(tmp_path), "--model"]
    assert caopd.main([*flags, str(real_model), "--method", "opd"]) == 0
    card = (tmp_path / "opd" / "README.md").read_text()
    assert caopd.main([*flags, str(tmp_path / "opd"), "--method", "caopd", "--overwrite"]) == 0
    assert (tmp_path / "opd" / "README.md").read_text() == card
    assert (tmp_path / "caopd" / "README.md").exists()


def test_an_unwritable_directory_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert caopd.main([*TINY, "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_hub_name_that_cannot_be_fetched_is_one_sentence(tmp_path, capsys, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no network\nat all")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert caopd.main(["--model", "owner/name", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "owner/name" in error and "pass its directory" in error and error.count("\n") == 1


def test_help_names_every_flag_and_every_flag_says_what_it_decides():
    text = subprocess.run([sys.executable, "caopd.py", "--help"], capture_output=True, text=True,
                          cwd=Path(caopd.__file__).parent).stdout
    for field in dataclasses.fields(Args):
        assert "--" + field.name.replace("_", "-") in text and len(field.metadata["help"]) > 8
        assert field.metadata["decides"] in (caopd.ALL, caopd.METHOD, caopd.NOTHING)
    assert all(name in text for name in METHODS)


def test_the_readme_names_what_is_there():
    text = Path(caopd.__file__).with_name("README.md").read_text()
    modules = {"caopd": caopd, "data": data, "model": model}
    names = re.findall(r"`(caopd|data|model)\.([\w.]+)`", text)
    assert len(names) > 15
    for module, name in names:
        assert name == "py" or operator.attrgetter(name)(modules[module]), f"{module}.{name}"
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Args)}
    for command in re.findall(r"^python caopd\.py .*(?:\\\n.*)*", text, re.MULTILINE):
        assert set(re.findall(r"--[a-z-]+", command)) <= flags, command
