"""What the tables leave open, measured on the small transformer of `python caopd.py`.

    replacement.py   there the answer's gradient is OPD's exactly. Here the teacher's context is
                     z̃ on I_a too, and answer and confidence share their weights: how much is that?
    rollouts.py      there a confidence driven to 0.00 returns slowly under plain gradient descent.
                     Here it is AdamW, a network, and a teacher that may follow the student.

And the two conventions of ECE, ours and that of the paper's released code, on the same answers.

    python theory/in_the_trainer.py [DIRECTORY]        by default out/toy; a few minutes of one core
"""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

import caopd
import data
from files import BadInput
from model import SharedPrefix, Transformer
from worlds import show

PROMPTS, STEP_SIZE, LIMIT = 8, 6e-4, 100  # the learning rate is the toy's peak


def sample(student: Transformer, seed: int, prompts: int, rollouts: int) -> list[caopd.Group]:
    """On-policy rollouts of training questions."""
    task = data.arithmetic_task(seed, 100, words=False)
    generator = caopd.seeded(seed, "in the trainer", 0, student.device)
    return caopd.rollout(student.for_inference(), data.toy_tokenizer(),
                         task.draw(prompts, "distill", 0), task.wording, rollouts,
                         caopd.Sampling(16), generator)


def targets_of(groups: list[caopd.Group], value: float | None = None) -> list[caopd.Target]:
    """ỹ and z̃ that state μ̂, or the same `value` everywhere."""
    tokenizer, targets = data.toy_tokenizer(), []
    for group in groups:
        stated = caopd.mu_hat(group) if value is None else value
        targets += caopd.make_targets(group, stated, [0.0] * len(group.rollouts), tokenizer,
                                      data.SYMBOLS, "demo")
    return targets


def as_opd_reads(groups: list[caopd.Group], targets: list[caopd.Target]) -> list[caopd.Target]:
    """The same completions with OPD's context z, whose demonstration says 1.00."""
    tokenizer = data.toy_tokenizer()
    return [replace(target, teacher_prompt=tokenizer.chat(data.teacher_messages(
        group.example, data.SYMBOLS, data.with_confidence(group.example.demo, 1.0))))
        for group, target in zip(groups, targets)]


@torch.no_grad()
def answer_logits(model: Transformer, prompts: list[list[int]],
                  targets: list[caopd.Target]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the tokens of I_a, [M, V], and how many rollouts each token stands for, [M]."""
    mask, _ = caopd.loss_weights(targets, 0)
    shared = SharedPrefix(prompts, [t.sequences for t in targets], model.device)
    return model.logits(caopd.hidden_states(model, shared, mask > 0)), mask[mask > 0]


def nothing(student_logits: torch.Tensor, *_) -> torch.Tensor:
    """A token loss that leaves its part of Eq. 7 out."""
    return 0.0 * student_logits.sum(-1)


def gradient(student: Transformer, teacher: Transformer, targets: list[caopd.Target],
             answer_loss, confidence_loss) -> torch.Tensor:
    """The gradient of the two parts of Eq. 7, all weights in one vector."""
    for weight in student.parameters():
        weight.grad = None
    caopd.accumulate_gradient(student, teacher, targets, answer_loss, confidence_loss, 0, 1.0)
    return torch.cat([weight.grad.flatten() for weight in student.parameters()])


def context_on_the_answer(models: dict[str, Transformer], seed: int) -> None:
    """Prints what z̃ changes on I_a, and what the shared weights do to it."""
    base = models["base"]
    groups = sample(base, seed, 8 * PROMPTS, 8)
    ours = targets_of(groups)
    opd = as_opd_reads(groups, ours)
    told, count = answer_logits(base, [t.teacher_prompt for t in ours], ours)
    shown, _ = answer_logits(base, [t.teacher_prompt for t in opd], opd)
    student, trained_opd, trained_caopd = (
        answer_logits(models[name], [t.prompt for t in ours], ours)[0]
        for name in ("base", "opd", "caopd"))

    def per_token(divergences: torch.Tensor) -> float:
        return float((count * divergences).sum() / count.sum())

    print(f"  {len(groups)} prompts, K = 8, {int(count.sum())} tokens of I_a, in nats a token:\n")
    rows = [["KL(π_T given z ‖ π_T given z̃), the effect of z̃ on I_a", caopd.kl(shown, told)],
            ["KL(π_θ ‖ π_T given z), what OPD minimizes there", caopd.kl(student, shown)],
            ["KL(π_θ ‖ π_T given z̃), what CaOPD minimizes there", caopd.kl(student, told)],
            ["KL(OPD ‖ base) of the trained students", caopd.kl(trained_opd, student)],
            ["KL(OPD ‖ CaOPD) of the trained students", caopd.kl(trained_opd, trained_caopd)]]
    show(["", "mean"], [[name, f"{per_token(values):.4f}"] for name, values in rows])

    a_opd = gradient(base, base, opd, caopd.kl, nothing)
    a_ours = gradient(base, base, ours, caopd.kl, nothing)
    c_ours = gradient(base, base, ours, nothing, caopd.kl)
    print()
    show(["gradients of that batch", "ratio of norms", "cosine"],
         [[name, float(b.norm() / a.norm()), float(torch.cosine_similarity(a, b, 0))]
          for name, a, b in (("I_a given z̃, to I_a given z", a_opd, a_ours),
                             ("I_c, to I_a, both given z̃", a_ours, c_ours))])


@torch.no_grad()
def probability_of(model: Transformer, prompts: list[list[int]],
                   targets: list[caopd.Target]) -> float:
    """Mean probability that a completion states the confidence its target states."""
    _, mask = caopd.loss_weights(targets, 0)
    shared = SharedPrefix(prompts, [t.sequences for t in targets], model.device)
    logits = model.logits(caopd.hidden_states(model, shared, mask > 0))
    nll = caopd.target_cross_entropy(logits, None, shared.tokens[mask > 0])
    # Each completion's segment is as long as any other's: "\nConfidence: ", tenths, a digit, end.
    return float((-nll.view(-1, 4).sum(1)).exp().mean())


def updates_to_return(base: Transformer, groups: list[caopd.Group], loss, driven: int,
                      rate: float) -> tuple[float, float, int]:
    """Drives the confidence to 0.00 for `driven` updates, then asks for .88.

    loss: on I_c, both ways; on I_a it is the reverse KL. rate: the teacher's EMA.
    Returns (P(0.00) of the student and P(.88) of the teacher shown .88, both at the turn; updates
    until the student's P(.88) is over one half, LIMIT + 1 where it never was).
    """
    student, teacher = copy.deepcopy(base), caopd.make_teacher(base, "same")
    optimizer = caopd.AdamW(student, 0.0, 1.0)
    away, back = targets_of(groups, 0.0), targets_of(groups, 0.88)
    at_zero = copies = 0.0
    for update in range(driven + LIMIT + 1):
        if update == driven:
            at_zero = probability_of(student, [t.prompt for t in away], away)
            copies = probability_of(teacher, [t.teacher_prompt for t in back], back)
        targets = away if update < driven else back
        if update >= driven and probability_of(student, [t.prompt for t in back], back) > 0.5:
            return at_zero, copies, update - driven
        tokens = sum(int(mask.sum()) for mask in caopd.loss_weights(targets, 0))
        caopd.accumulate_gradient(student, teacher, targets, caopd.kl, loss, 0, 1 / tokens)
        generator = caopd.seeded(0, "rounding", update, student.device)
        optimizer.step(update, STEP_SIZE, generator)
        caopd.ema_update(teacher, student, rate, generator)
    return at_zero, copies, LIMIT + 1


def slow_return(base: Transformer, seed: int) -> None:
    groups = sample(base, seed, PROMPTS, 4)
    rows = []
    for name, loss, rate in (("reverse KL, frozen teacher", caopd.kl, 0.0),
                             ("forward KL, frozen teacher", caopd.forward_kl, 0.0),
                             ("cross-entropy on the token", caopd.target_cross_entropy, 0.0),
                             ("reverse KL, EMA 0.05", caopd.kl, 0.05)):
        for driven in (0, 50):
            at_zero, copies, updates = updates_to_return(base, groups, loss, driven, rate)
            rows.append([name, driven, at_zero, copies,
                         updates if updates <= LIMIT else f"over {LIMIT}"])
    print("\n  A confidence driven to 0.00, then asked for .88 (AdamW at 6e-4, fixed rollouts):\n")
    show(["loss on I_c", "updates driven", "P(0.00) then", "teacher copies .88", "to return"], rows)


def released_ece(confidence: np.ndarray, correct: np.ndarray) -> float:
    """ECE as the released code has it; confidence, correct: [N], NaN where none could be parsed.

    What states no confidence counts as 0.0. Bins are cut at `np.linspace(0, 1, 11)`, whose edges at
    .3, .6 and .7 are a rounding above these numbers, which therefore fall a bin lower than ours.
    """
    c = np.nan_to_num(confidence, nan=0.0)
    which = np.digitize(c, np.linspace(0, 1, 11)[1:-1])
    return sum(abs((correct - c)[which == b].sum()) for b in range(10)) / len(c)


def both_conventions(models: dict[str, Transformer], seed: int) -> None:
    """Prints ECE of answers sampled as the paper evaluates."""
    task, rows = data.arithmetic_task(seed, 250, words=False), []
    sampling = caopd.Sampling(16, **caopd.PAPER)
    for name, model in models.items():
        generator = caopd.seeded(seed, "in the trainer", 1, model.device)
        groups = caopd.ask(model.for_inference(), data.toy_tokenizer(), task.held_out, task.wording,
                           4, sampling, generator, name)
        c, r = caopd.stated_and_correct(groups)
        ours = caopd.calibration(c, r)
        rows.append([caopd.title(name), ours["format"], ours["ece"], released_ece(c, r)])
    print(f"\n  ECE at temperature 0.6 and top-p 0.95, 4 answers to {len(groups)} questions:\n")
    show(["", "format", "ours", "as released"], rows)


def main() -> int:
    print(__doc__)
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "out/toy")
    try:
        seed = json.loads((directory / "results.json").read_text())["settings"]["seed"]
        models = {name: Transformer.from_pretrained(directory / name)
                  for name in ("base", "opd", "caopd")}
    except (BadInput, OSError) as error:
        print(f"  {error}. Run `python caopd.py` first: this file looks at the models it leaves "
              "in out/toy (or in the directory given).", file=sys.stderr)
        return 2
    context_on_the_answer(models, seed)
    slow_return(models["base"], seed)
    both_conventions(models, seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
