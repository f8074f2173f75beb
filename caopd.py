"""CaOPD: on-policy distillation that keeps a model honest about what it knows (arXiv 2604.16830), in one file.

On-policy distillation (OPD) scores a student's own completions token by token with a teacher: the same network,
shown privileged context z. Algorithm 1 of the paper, whose order is the order of this file:

    1. rollout                 K completions y = (a, c) of each prompt x: an answer and a verbalized confidence
    2. empirical confidence    verify them; mu_hat(x) = share of correct ones
    3. target replacement      c becomes mu_hat, in the student's completion and in the teacher's context  <- CaOPD
    4. distillation loss       KL(student || teacher) at every token of the completion                     (Eq. 2, Eq. 7)

OPD is the same without step 3. What this file simplifies: one device, one process, one update per batch of rollouts.

    python caopd.py                                   the embedded world, from nothing to the table
    python caopd.py --model DIR --task arithmetic     the same on a real model
    python caopd.py --help
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import random
import sys
import time
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.adamw import adamw
from tqdm import tqdm

import data
from data import DataError, Example, Task, Tokenizer
from model import Config, ModelError, Transformer, Tree, generate


class UsageError(ValueError):
    """A flag that asks for something impossible; the message names the flag."""


# ----------------------------------------------------------------------------- the command line

RUN, DISTILL, SAMPLE, BASE, TOY, EVAL, HARDWARE = (
    "what to run", "distillation", "lengths and sampling", "supervised stage (makes the base)",
    "the embedded world's transformer", "evaluation", "hardware")


def flag(group: str, default, help: str, choices: tuple | None = None):
    return dataclasses.field(default=default, metadata={"group": group, "help": help, "choices": choices})


@dataclass
class Args:
    """The command line: one field a flag. None stands for a default that depends on --model (see DEFAULTS)."""

    method: str = flag(
        RUN, "both", "distill with opd, with caopd, or with both from the same base", ("opd", "caopd", "both"))
    task: str = flag(
        RUN, "arithmetic", "the questions and their verifier; mcq and tool need --train and --eval", data.TASKS)
    model: str = flag(RUN, "", "a Hugging Face model directory, or a hub name; without it, the embedded world")
    train: str = flag(RUN, "", "JSONL file to train on: `prompt`, `answer`, optionally `system`, `demo`, `grade`")
    eval: str = flag(RUN, "", "JSONL file of held-out questions, in the same form")
    out: str = flag(RUN, "", "directory for results, metrics and models (default out/toy, or out/TASK with --model)")
    seed: int = flag(RUN, 0, "seed of everything random")
    figure: bool = flag(RUN, False, "also draw OUT/reliability.png (needs matplotlib)")

    steps: int = flag(DISTILL, None, "updates of each method")
    prompts: int = flag(DISTILL, None, "prompts x a step")
    rollouts: int = flag(DISTILL, 8, "K, completions a prompt: the paper finds calibration wants K >= 8")
    lr: float = flag(DISTILL, None, "AdamW's peak learning rate: 10%% warm-up, then cosine to zero")
    divergence: str = flag(
        DISTILL, "reverse", "KL(student||teacher) as in Eq. 2, KL(teacher||student), or Jensen-Shannon",
        ("reverse", "forward", "jsd"))
    teacher_rate: float = flag(
        DISTILL, None, "EMA rate of the teacher, a step: 0 is a frozen teacher, 1 the live student")
    context: str = flag(
        DISTILL, "demo", "privileged context z: a demonstration (SDFT), or a correct rollout of the student (SDPO)",
        ("demo", "solution"))
    skip_tokens: int = flag(DISTILL, 0, "leave the first tokens of each completion out of the loss (the paper: 3)")
    clip: float = flag(DISTILL, 1.0, "largest gradient norm")

    max_prompt: int = flag(SAMPLE, 1024, "longest prompt in tokens; a longer one is refused, never cut")
    skip_long: bool = flag(SAMPLE, False, "leave longer prompts out, counted, instead of refusing")
    max_new_tokens: int = flag(SAMPLE, None, "longest completion in tokens; one cut off here counts as wrong")
    temperature: float = flag(SAMPLE, 1.0, "sampling temperature of rollouts and evaluation")

    sft_steps: int = flag(
        BASE, None, "updates that teach the format, the habit of high confidence, and how to follow a demonstration")
    sft_documents: int = flag(BASE, None, "documents a step, half closed-book, half open-book")
    sft_lr: float = flag(BASE, None, "peak learning rate")
    sft_noise: float = flag(
        BASE, None, "share of wrong closed-book answers, so that the base knows better than it writes")
    sft_answers: float = flag(
        BASE, None, "share of the updates, at the start, that teach answers alone, in documents that stop before the confidence")

    width: int = flag(TOY, 128, "hidden size")
    layers: int = flag(TOY, 3, "number of layers")

    eval_questions: int = flag(EVAL, None, "most held-out questions to ask")
    oracle: int = flag(
        EVAL, 0, "also estimate each held-out question's success rate mu(x) from N samples, and add what a confidence "
        "c = mu(x) would score")
    device: str = flag(HARDWARE, "auto", "cpu, cuda or cuda:i; auto takes a GPU where there is one")
    dtype: str = flag(
        HARDWARE, "auto", "auto is bfloat16 for --model where the hardware multiplies it natively, else float32",
        ("auto", "float32", "bfloat16"))
    rounding: str = flag(
        HARDWARE, "nearest", "for bfloat16: nearest also keeps float32 copies of student and teacher to add small steps to; "
        "stochastic keeps bfloat16 alone, rounded at random and right on average, in 14 bytes a weight instead of 24",
        ("nearest", "stochastic"))
    recompute: bool = flag(
        HARDWARE, False, "in training, keep each layer's input alone and compute the layer again for its gradient: "
        "a third slower, several times less memory a token")
    teacher_device: str = flag(
        HARDWARE, "same", "cpu keeps the teacher's layers in main memory and brings them over one at a time", ("same", "cpu"))
    micro_tokens: int = flag(
        HARDWARE, None, "tokens computed at once; lower it when memory runs out: the loss stays the same, samples are drawn "
        "in another order")
    save_every: int = flag(HARDWARE, 50, "steps between checkpoints; an interrupted run goes on from the last one")


DEFAULTS = {  # field: (embedded world, --model)
    "steps": (300, 100), "prompts": (16, 32), "lr": (3e-4, 1e-5), "teacher_rate": (0.0035, 0.01),
    "sft_steps": (900, 0), "sft_documents": (128, 32), "sft_lr": (3e-3, 2e-4), "sft_noise": (0.25, 0.2),
    "sft_answers": (0.6, 0.0), "max_new_tokens": (16, 1024), "eval_questions": (2000, 500), "micro_tokens": (16384, 4096)}


# ----------------------------------------------------------------------------- Algorithm 1, steps 1 and 2

@dataclass
class Group:
    """A prompt x with its K rollouts."""

    example: Example
    prompt: list[int]
    completions: list[list[int]]  # y_k = (a_k, c_k), K lists of sampled ids
    correct: list[bool]  # R(x, a_k)

    @property
    def mu_hat(self) -> float:
        """μ̂(x) = (1/K) Σ_k R(x, a_k)."""
        return sum(self.correct) / len(self.correct)


def ended(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """Whether a completion ended by itself, rather than being cut off at the length limit."""
    return ids[-1] in tokenizer.eos_ids


SAMPLING = 4  # sampling keeps keys and values alone, so it takes this many times --micro-tokens at once


def rollout(student: Transformer, tokenizer: Tokenizer, task: Task, examples: list[Example], samples: int, args: Args,
            generator: torch.Generator) -> list[Group]:
    """Steps 1 and 2: samples completions of each example's prompt and verifies them.

    Returns a Group an example, each with `samples` completions. A completion that was cut off counts as wrong.
    """
    prompts = [tokenizer.chat(data.student_messages(example, task.wording)) for example in examples]
    groups = []
    longest = [len(prompt) + samples * args.max_new_tokens for prompt in prompts]
    for batch in micro_batches(longest, SAMPLING * args.micro_tokens):
        sampled = generate(student, [prompts[i] for i in batch], args.max_new_tokens, args.temperature,
                           eos_ids=tokenizer.eos_ids, num_samples=samples, generator=generator)
        for n, i in enumerate(batch):
            completions = sampled[n * samples:(n + 1) * samples]
            correct = [ended(tokenizer, y) and data.verify(examples[i], tokenizer.decode(y)) for y in completions]
            groups.append(Group(examples[i], prompts[i], completions, correct))
    return groups


def micro_batches(tokens: list[int], budget: int) -> list[list[int]]:
    """Cuts items, in order, into runs that hold at most `budget` tokens together (or a single item)."""
    batches, room = [], -1
    for i, cost in enumerate(tokens):
        if cost > room or not batches:
            batches.append([])
            room = budget
        batches[-1].append(i)
        room -= cost
    return batches


# ----------------------------------------------------------------------------- step 3: target replacement

@dataclass
class Target:
    """What is distilled for one prompt: the student reads x, the teacher (x, z) or (x, z̃), both score the same tokens."""

    prompt: list[int]
    teacher_prompt: list[int]
    completions: list[list[int]]  # K lists of ids
    answer_lengths: list[int]  # K: completion[:n] is I_a, completion[n:] is I_c
    cut_off: list[bool]  # K: no end token, so I_c is left out of the loss

    @property
    def tokens(self) -> int:
        return max(len(self.prompt), len(self.teacher_prompt)) + sum(map(len, self.completions))


def opd_target(group: Group, tokenizer: Tokenizer, task: Task, args: Args) -> Target | None:
    """Plain OPD: the completions as they were sampled; a demonstration in z is sure of itself, as the paper's are."""
    demo = data.stated(group.example.demo, 1.0) if args.context == "demo" else solution(group, tokenizer, group.completions)
    if demo is None:
        return None
    lengths = [data.split_completion(tokenizer, y)[0] for y in group.completions]
    return make_target(group, tokenizer, group.completions, lengths, data.teacher_messages(group.example, task.wording, demo))


def caopd_target(group: Group, tokenizer: Tokenizer, task: Task, args: Args) -> Target | None:
    """Target replacement: ỹ = (a, μ̂) for the student, z̃ = z with μ̂ for the teacher, who is told to report it.

    A completion that was cut off has no c to replace and stays as it is.
    """
    replaced = [data.replace_confidence(tokenizer, y, group.mu_hat) if ended(tokenizer, y)
                else (y, data.split_completion(tokenizer, y)[0]) for y in group.completions]
    completions, lengths = map(list, zip(*replaced))
    demo = data.stated(group.example.demo, group.mu_hat) if args.context == "demo" else solution(group, tokenizer, completions)
    if demo is None:
        return None
    return make_target(group, tokenizer, completions, lengths,
                       data.teacher_messages(group.example, task.wording, demo, report=group.mu_hat))


def solution(group: Group, tokenizer: Tokenizer, completions: list[list[int]]) -> str | None:
    """SDPO's privileged context: the first correct rollout. None where there is none; the prompt is then skipped."""
    return tokenizer.decode(completions[group.correct.index(True)]) if any(group.correct) else None


def make_target(group: Group, tokenizer: Tokenizer, completions: list[list[int]], lengths: list[int],
                teacher: list[dict]) -> Target:
    cut_off = [not ended(tokenizer, y) for y in group.completions]
    return Target(group.prompt, tokenizer.chat(teacher), completions, lengths, cut_off)


TARGETS = {"opd": opd_target, "caopd": caopd_target}


# ----------------------------------------------------------------------------- step 4: the distillation loss

def loss_masks(targets: list[Target], skip_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(answer_mask, confidence_mask), bool [M] over all completion tokens in order: I_a and I_c of Eq. 7."""
    answer, confidence = [], []
    for target in targets:
        for ids, n, cut_off in zip(target.completions, target.answer_lengths, target.cut_off):
            answer += [skip_tokens <= t < n for t in range(len(ids))]
            confidence += [t >= max(n, skip_tokens) and not cut_off for t in range(len(ids))]
    return torch.tensor(answer, device=device), torch.tensor(confidence, device=device)


def divergence(student_logits: Tensor, teacher_logits: Tensor, kind: str) -> Tensor:
    """Per-token divergence over the full vocabulary, in nats, [M] from logits [M, V].

    reverse: KL(π_θ‖π_T) = Σ_v π_θ (log π_θ − log π_T), Eq. 2. forward: KL(π_T‖π_θ).
    jsd: ½ KL(π_θ‖m) + ½ KL(π_T‖m) with m the mean of the two.
    """
    p, q = student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    if kind == "reverse":
        return (p.exp() * (p - q)).sum(-1)
    if kind == "forward":
        return (q.exp() * (q - p)).sum(-1)
    m = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1)


CHUNK = 2 ** 24  # logits held at once: 64 MiB in float32


def distillation_backward(student: Transformer, teacher: Transformer, targets: list[Target], scale: float,
                          args: Args) -> tuple[float, float]:
    """Eq. 7 and its backward pass: adds scale · ∇(Σ_{I_a} KL + Σ_{I_c} KL) to the student's gradients.

    Returns the two sums of the per-token divergence, in nats: over I_a (capability cloning) and over I_c (calibration).
    Each prompt is computed once for its K completions, and logits only where the loss looks, a chunk of tokens at a time:
    a chunk is differentiated down to the hidden states before the next is made, so tokens × vocabulary is never held.
    """
    completions = [target.completions for target in targets]
    answer_mask, confidence_mask = loss_masks(targets, args.skip_tokens, student.device)
    counted = answer_mask | confidence_mask  # [M]
    with torch.no_grad():
        tree = Tree([target.teacher_prompt for target in targets], completions, student.device)
        privileged = teacher.hidden(tree.input_ids, tree.positions, tree)[tree.predicts[counted]]  # [M', D]
    tree = Tree([target.prompt for target in targets], completions, student.device)
    hidden = student.hidden(tree.input_ids, tree.positions, tree)[tree.predicts[counted]]  # [M', D]

    size = max(1, CHUNK // student.config.vocab_size)
    kl, gradients = [], []
    for h, h_teacher in zip(hidden.detach().split(size), privileged.split(size)):
        with torch.no_grad():
            teacher_logits = teacher.logits(h_teacher)
        chunk = divergence(student.logits(h.requires_grad_()), teacher_logits, args.divergence)
        (scale * chunk.sum()).backward()
        kl.append(chunk.detach())
        gradients.append(h.grad)
    hidden.backward(torch.cat(gradients))
    kl = torch.cat(kl)
    return kl[answer_mask[counted]].sum().item(), kl[confidence_mask[counted]].sum().item()


# ----------------------------------------------------------------------------- the update: AdamW and the EMA teacher

# bfloat16 has 8 bits of mantissa: an AdamW step of relative size 1e-5, or 0.01 of it for the EMA, would round to nothing.
# --rounding nearest keeps float32 copies of student and EMA to add such steps to. --rounding stochastic keeps bfloat16
# alone and rounds a sum up or down at random, up with the share of the gap that it has passed: right on average.

def exact_weights(model: Transformer, args: Args) -> list[Tensor]:
    """What updates are added to: the model's own weights, or float32 copies where they are narrower and --rounding is nearest."""
    return [weight if weight.dtype == torch.float32 or args.rounding == "stochastic" else weight.detach().float()
            for weight in model.parameters()]


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down at random so that the mean is x. bfloat16 is the upper half of float32's bits."""
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2 ** 16, bits.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((bits + noise) & -2 ** 16).view(torch.float32).to(torch.bfloat16)


def store(weight: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """weight ← value, in float32; copying a tensor onto itself does nothing."""
    weight.copy_(value if weight.dtype == torch.float32 else round_stochastically(value, generator))


@torch.no_grad()
def write_back(model: Transformer, weights: list[Tensor]) -> None:
    for parameter, weight in zip(model.parameters(), weights):
        parameter.copy_(weight)  # copying a tensor onto itself does nothing


def cosine(step: int, steps: int) -> float:
    """Share of the peak learning rate: warm-up over the first tenth of the steps, then a cosine down to zero."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def trapezoid(step: int, steps: int) -> float:
    """The same for the supervised stage, whose documents change half-way: level in between, down over the last 30 %."""
    return min(1.0, 10 * (step + 1) / steps, (steps - step) / (0.3 * steps))


class Optimizer:
    """AdamW with gradient clipping and a schedule (step, steps) -> share of the peak rate. Moments are float32."""

    def __init__(self, model: Transformer, lr: float, steps: int, args: Args, schedule=cosine):
        self.model, self.peak, self.steps, self.clip, self.schedule, self.step_count = model, lr, steps, args.clip, schedule, 0
        self.weights = exact_weights(model, args)
        self.moments = [tuple(torch.zeros_like(weight, dtype=torch.float32) for _ in "mv") for weight in self.weights]
        self.gradients = [torch.zeros_like(weight) for weight in self.weights]
        for parameter, gradient in zip(model.parameters(), self.gradients):
            if gradient.dtype == parameter.dtype:
                parameter.grad = gradient  # backward passes add to it
            else:
                parameter.register_post_accumulate_grad_hook(partial(self.collect, gradient))

    @staticmethod
    def collect(gradient: Tensor, parameter: Tensor) -> None:
        """Moves what a backward pass left for one bfloat16 weight to its float32 sum, as soon as it is there."""
        gradient += parameter.grad
        parameter.grad = None

    @property
    def lr(self) -> float:
        return self.peak * self.schedule(self.step_count, self.steps)

    @torch.no_grad()
    def step(self, generator: torch.Generator) -> float:
        """Updates the model; `generator` is for stochastic rounding. Returns the gradient norm before clipping."""
        norm = torch.stack([g.norm(dtype=torch.float32) for g in self.gradients]).norm()
        shrink = (self.clip / (norm + 1e-6)).clamp(max=1.0)
        for weight, gradient, (m, v) in zip(self.weights, self.gradients, self.moments):
            value = weight.float()  # the weight itself where it is float32
            step = torch.full((), float(self.step_count), device=m.device)
            adamw([value], [gradient.mul_(shrink).float()], [m], [v], [], [step], lr=self.lr, beta1=0.9, beta2=0.95, eps=1e-8,
                  weight_decay=0.0, amsgrad=False, maximize=False, fused=True)
            store(weight, value, generator)
            gradient.zero_()
        write_back(self.model, self.weights)
        self.step_count += 1
        return float(norm)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name; `load` takes it back."""
        return {f"{name}.{i}": tensor.detach() for i, (weight, (m, v)) in enumerate(zip(self.weights, self.moments))
                for name, tensor in (("weight", weight), ("m", m), ("v", v))}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor], step: int) -> None:
        self.step_count = step
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])
        write_back(self.model, self.weights)


@torch.no_grad()
def ema_update(averages: list[Tensor], weights: list[Tensor], rate: float, generator: torch.Generator) -> None:
    """Teacher weights ← (1 − rate) · teacher + rate · student, in float32; `generator` is for stochastic rounding."""
    for average, weight in zip(averages, weights):
        store(average, average.float().lerp_(weight.to(average.device).float(), rate), generator)


# ----------------------------------------------------------------------------- the loop

def seeded(args: Args, stage: str, step: int, device: torch.device) -> torch.Generator:
    """A generator that depends on seed, stage and step alone, so that resuming needs no random state."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{args.seed} {stage} {step}".encode()))


def distill(student: Transformer, tokenizer: Tokenizer, task: Task, method: str, args: Args, out: Path) -> Transformer:
    """Algorithm 1 with target replacement (method "caopd") or without ("opd"). Trains `student` in place and returns it.

    The teacher is an EMA of the student, equal to it at the start. Each step logs a line to out/metrics.jsonl.
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    if args.teacher_device == "cpu":
        teacher.model.layers = torch.nn.ModuleList(Visiting(layer.cpu()) for layer in teacher.model.layers)
    student.recompute = args.recompute
    optimizer, ema = Optimizer(student, args.lr, args.steps, args), exact_weights(teacher, args)
    start = load_checkpoint(out / method, optimizer, ema, settings(args, method))
    write_back(teacher, ema)
    log = Log(out / "metrics.jsonl", method, start)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=f"{method:>6}", unit="step", dynamic_ncols=True)
    for step in bar:
        began = time.perf_counter()
        generator = seeded(args, "rollout", step, student.device)
        groups = rollout(student, tokenizer, task, task.draw(args.prompts, "distill", step), args.rollouts, args, generator)
        targets = [t for group in groups if (t := TARGETS[method](group, tokenizer, task, args)) is not None]
        count = max(1, sum(int(mask.sum()) for mask in loss_masks(targets, args.skip_tokens, torch.device("cpu"))))
        kl_answer = kl_confidence = 0.0
        for batch in micro_batches([target.tokens for target in targets], args.micro_tokens):
            # Eq. 2 sums over t; AdamW does not see the constant
            answer, confidence = distillation_backward(student, teacher, [targets[i] for i in batch], 1 / count, args)
            kl_answer, kl_confidence = kl_answer + answer / count, kl_confidence + confidence / count
        generator = seeded(args, "rounding", step, student.device)
        lr, norm = optimizer.lr, optimizer.step(generator)
        ema_update(ema, optimizer.weights, args.teacher_rate, generator)
        write_back(teacher, ema)

        texts = [tokenizer.decode(y) for group in groups for y in group.completions]
        said = [c for text in texts if (c := data.parse_confidence(text)) is not None]
        row = {"stage": method, "step": step,
               "loss": kl_answer + kl_confidence, "kl_answer": kl_answer, "kl_confidence": kl_confidence,
               "accuracy": mean([g.mu_hat for g in groups]), "confidence": mean(said), "format": len(said) / len(texts),
               "cut_off": mean([not ended(tokenizer, y) for g in groups for y in g.completions]),
               "skipped_prompts": len(groups) - len(targets), "lr": lr, "grad_norm": norm, "seconds": time.perf_counter() - began}
        log.write(row)
        bar.set_postfix_str(f"accuracy {row['accuracy']:.2f}, says {row['confidence']:.2f}, KL {row['loss']:.3f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_checkpoint(out / method, optimizer, ema, settings(args, method))
    log.close()
    return student


class Visiting(torch.nn.Module):
    """A teacher's layer for --teacher-device cpu: its weights stay there, and visit the device of its input to compute."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *rest) -> Tensor:
        visitors = {name: weight.to(x.device) for name, weight in self.layer.named_parameters()}
        return torch.func.functional_call(self.layer, visitors, (x, *rest))


def documents(task: Task, args: Args, step: int) -> tuple[list[tuple[list[dict], str]], bool]:
    """The (messages, completion) pairs of a supervised step, and whether their completions end.

    Answers alone at first, which stop where a confidence would follow; then half closed-book, half open-book.
    """
    rng, examples = random.Random(f"{args.seed} documents {step}"), task.draw(args.sft_documents, "base", step)
    if step < args.sft_answers * args.sft_steps:
        return [data.answer_only(example, task.wording) for example in examples], False
    half = len(examples) // 2
    return ([data.closed_book(example, task.wording, rng, args.sft_noise) for example in examples[:half]]
            + [data.open_book(example, task.wording, rng) for example in examples[half:]]), True


def supervise(model: Transformer, tokenizer: Tokenizer, task: Task, args: Args, out: Path) -> Transformer:
    """The supervised stage that makes the base model: cross-entropy on completions. Trains `model` in place and returns it."""
    model.recompute = args.recompute
    optimizer = Optimizer(model, args.sft_lr, args.sft_steps, args, trapezoid)
    start = load_checkpoint(out / "base", optimizer, [], settings(args, "base"))
    log = Log(out / "metrics.jsonl", "base", start)
    bar = tqdm(range(start, args.sft_steps), initial=start, total=args.sft_steps, desc="  base", unit="step", dynamic_ncols=True)
    for step in bar:
        began, (pairs, end) = time.perf_counter(), documents(task, args, step)
        prompts = [tokenizer.chat(messages) for messages, _ in pairs]
        completions = [[tokenizer.encode(text) + tokenizer.eos_ids[:end]] for _, text in pairs]
        count, total = sum(len(ids) for group in completions for ids in group), 0.0
        for batch in micro_batches([len(p) + len(c[0]) for p, c in zip(prompts, completions)], args.micro_tokens):
            tree = Tree([prompts[i] for i in batch], [completions[i] for i in batch], model.device)
            logits = model.logits(model.hidden(tree.input_ids, tree.positions, tree)[tree.predicts])  # [M, V]
            loss = torch.nn.functional.cross_entropy(logits.float(), tree.targets, reduction="sum") / count
            loss.backward()
            total += loss.item()
        lr, norm = optimizer.lr, optimizer.step(seeded(args, "rounding", step, model.device))
        log.write({"stage": "base", "step": step, "loss": total, "lr": lr, "grad_norm": norm,
                   "seconds": time.perf_counter() - began})
        bar.set_postfix_str(f"cross-entropy {total:.3f}")
        if (step + 1) % (10 * args.save_every) == 0:
            save_checkpoint(out / "base", optimizer, [], settings(args, "base"))
    log.close()
    return model


def mean(values: list) -> float:
    return sum(values) / len(values) if values else float("nan")


# ----------------------------------------------------------------------------- what survives a crash

def settings(args: Args, stage: str) -> dict:
    """What determines a stage's result: flags by name, and the contents of the training file."""
    shared = ["task", "model", "train", "seed", "sft_steps", "sft_documents", "sft_lr", "sft_noise", "sft_answers", "clip",
              "width", "layers", "dtype", "rounding"]
    distilled = ["steps", "prompts", "rollouts", "lr", "divergence", "teacher_rate", "context", "skip_tokens", "max_prompt",
                 "skip_long", "max_new_tokens", "temperature", "micro_tokens"]
    chosen = {name: getattr(args, name) for name in shared + (distilled if stage != "base" else [])}
    return chosen | {"stage": stage, "train_crc": zlib.crc32(Path(args.train).read_bytes()) if args.train else 0}


def save_checkpoint(directory: Path, optimizer: Optimizer, ema: list[Tensor], identity: dict) -> None:
    """Writes the state of a stage after a step, complete or not at all; safetensors, so nothing is ever unpickled."""
    directory.mkdir(parents=True, exist_ok=True)
    state = optimizer.tensors() | {f"ema.{i}": weight for i, weight in enumerate(ema)}
    save_file(state, directory / "checkpoint.tmp", metadata={"step": str(optimizer.step_count), "settings": json.dumps(identity)})
    os.replace(directory / "checkpoint.tmp", directory / "checkpoint.safetensors")


def load_checkpoint(directory: Path, optimizer: Optimizer, ema: list[Tensor], identity: dict) -> int:
    """Goes on from directory/checkpoint.safetensors where it has the same settings; returns the step to go on from."""
    path = directory / "checkpoint.safetensors"
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt", device=str(optimizer.model.device)) as file:
            if json.loads(file.metadata()["settings"]) != identity:
                return 0
            step, state = int(file.metadata()["step"]), {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise UsageError(f"{path}: not a readable checkpoint ({error}); delete it to start this stage again") from None
    optimizer.load(state, step)
    for i, weight in enumerate(ema):
        weight.copy_(state[f"ema.{i}"])
    tqdm.write(f"Going on from step {step} of an interrupted run ({path}).")
    return step


class Log:
    """metrics.jsonl: a JSON line a step. A stage that starts at `step` first drops its own lines from there on."""

    def __init__(self, path: Path, stage: str, step: int):
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed while writing
            if row.get("stage") != stage or row["step"] < step:
                kept.append(line + "\n")
        path.with_suffix(".tmp").write_text("".join(kept))
        os.replace(path.with_suffix(".tmp"), path)
        self.file = path.open("a", buffering=1)

    def write(self, row: dict) -> None:
        self.file.write(to_json(row) + "\n")

    def close(self) -> None:
        self.file.close()


def to_json(value, indent: int | None = None) -> str:
    """Strict JSON: figures that do not exist (NaN) are null."""
    def clean(v):
        if isinstance(v, dict):
            return {key: clean(item) for key, item in v.items()}
        if isinstance(v, (list, tuple)):
            return [clean(item) for item in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v
    return json.dumps(clean(value), indent=indent)


# ----------------------------------------------------------------------------- evaluation

def bin_of(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The equal-width bin [i/bins, (i+1)/bins) of each confidence; 1.0 belongs to the last."""
    return np.minimum((confidence * bins + 1e-9).astype(int), bins - 1)  # 0.29 * 100 is 28.999999999999996


def calibration(confidence, correct, bins: int = 10) -> dict:
    """The metrics of section 5: how often the model is right, and what its stated confidence says about it.

    confidence: [N] floats in [0, 1]; NaN where no confidence could be parsed. correct: [N] booleans or 0/1.
    Returns accuracy and format (share of parsable confidences) over all N; and over the parsable ones
    mean_confidence, ocg = mean c − accuracy, ece = Σ_bins n_b/n |accuracy_b − mean c_b|, brier = mean (c − R)²,
    spr = P(c⁺ > c⁻) over (correct, wrong) pairs, ties counting as zero. A figure with nothing to average is NaN.
    Raises ValueError for arrays that are empty, of different lengths, or out of range.
    """
    c, r = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    shaped = c.ndim == 1 and c.shape == r.shape and len(c) > 0 and bins > 0
    if not shaped or not np.isin(r, (0, 1)).all() or (c < 0).any() or (c > 1).any():
        raise ValueError("calibration: needs two non-empty arrays of one length, confidences in [0, 1] or NaN, correct in {0, 1}")
    accuracy, parsed = r.mean(), ~np.isnan(c)
    c, r = c[parsed], r[parsed]
    figures = {"accuracy": float(accuracy), "format": float(parsed.mean())}
    if len(c) == 0:
        return figures | dict.fromkeys(("mean_confidence", "ocg", "ece", "brier", "spr"), math.nan)
    which = bin_of(c, bins)
    ece = sum(abs((r - c)[which == b].sum()) for b in range(bins)) / len(c)
    right, wrong = c[r == 1], np.sort(c[r == 0])
    pairs = len(right) * len(wrong)
    spr = np.searchsorted(wrong, right, side="left").sum() / pairs if pairs else math.nan  # "left" counts c⁻ < c⁺ strictly
    return figures | {"mean_confidence": float(c.mean()), "ocg": float(c.mean() - r.mean()), "ece": float(ece),
                      "brier": float(((c - r) ** 2).mean()), "spr": float(spr)}


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = 10) -> list[dict]:
    """The reliability diagram's bins: count, mean confidence and accuracy (NaN where empty) of the parsable confidences."""
    parsed = ~np.isnan(confidence)
    c, r = confidence[parsed], correct[parsed]
    members = [bin_of(c, bins) == b for b in range(bins)]
    return [{"count": int(m.sum()), "confidence": float(c[m].mean()) if m.any() else math.nan,
             "accuracy": float(r[m].mean()) if m.any() else math.nan} for m in members]


def ask(model: Transformer, tokenizer: Tokenizer, task: Task, samples: int, args: Args, name: str) -> list[Group]:
    """Every held-out question, sampled as in deployment, with a progress bar."""
    groups, generator = [], seeded(args, "evaluation", samples, model.device)
    with tqdm(total=len(task.held_out), desc=f"{name:>6}", unit="question", dynamic_ncols=True) as bar:
        for start in range(0, len(task.held_out), 500):
            groups += rollout(model, tokenizer, task, task.held_out[start:start + 500], samples, args, generator)
            bar.update(len(groups) - bar.n)
    return groups


def evaluate(model: Transformer, tokenizer: Tokenizer, task: Task, args: Args, name: str) -> dict:
    """Asks every held-out question once; returns the metrics, also by grade, the reliability bins and the oracle's figures."""
    groups = ask(model, tokenizer, task, 1, args, name)
    stated = [data.parse_confidence(tokenizer.decode(group.completions[0])) for group in groups]
    confidence = np.array([math.nan if c is None else c for c in stated])
    correct = np.array([group.mu_hat for group in groups])
    grades = np.array([group.example.grade for group in groups])
    by_grade = {}
    for grade in dict.fromkeys(grades):
        its = grades == grade
        by_grade[str(grade)] = calibration(confidence[its], correct[its]) | {"count": int(its.sum())}
    figures = calibration(confidence, correct) | {
        "questions": len(groups), "cut_off": mean([not ended(tokenizer, group.completions[0]) for group in groups]),
        "by_grade": by_grade, "reliability": reliability(confidence, correct)}
    if args.oracle:
        mu = [group.mu_hat for group in ask(model, tokenizer, task, args.oracle, args, name)]
        figures["oracle"] = oracle(mu, correct, args.oracle)
    return figures


def oracle(mu: list[float], correct: np.ndarray, samples: int) -> dict:
    """What the best prompt-level confidence would score: c = μ(x), estimated from `samples` other answers to each question.

    Brier is the floor E[μ(1 − μ)], unbiased: E[μ̂(1 − μ̂)] = (1 − 1/N) μ(1 − μ). SPR and ECE are those of μ̂ itself,
    whose sampling error costs a little. theory/prompt_level.py has both yardsticks exactly.
    """
    mu = np.asarray(mu)
    return calibration(mu, correct) | {"brier": float((mu * (1 - mu)).mean() * samples / (samples - 1))}


# ----------------------------------------------------------------------------- what the user sees

NAMES = {"base": "base", "opd": "OPD", "caopd": "CaOPD"}
COLUMNS = {"accuracy": "accuracy", "mean_confidence": "mean conf.", "ocg": "OCG", "ece": "ECE", "brier": "Brier", "spr": "SPR",
           "format": "format"}


def table(results: dict) -> str:
    """The metrics of each model, a row a model."""
    lines = [f"{'':14}" + "".join(f"{title:>12}" for title in COLUMNS.values())]
    for name, row in results.items():
        for title, figures in ((NAMES[name], row), ("  oracle μ(x)", row.get("oracle"))):
            if figures:
                cells = (f"{figures[key]:>+12.3f}" if key == "ocg" else f"{figures[key]:>12.3f}" for key in COLUMNS)
                lines.append(f"{title:14}" + "".join(cells))
    return "\n".join(lines)


def grade_table(results: dict) -> str:
    """Accuracy / mean confidence by grade, a row a grade."""
    grades = next(iter(results.values()))["by_grade"]
    lines = [f"{'accuracy / confidence':24}" + "".join(f"{NAMES[name]:>14}" for name in results)]
    for grade in grades:
        cells = [row["by_grade"][grade] for row in results.values()]
        lines.append(f"{grade[:22]:24}" + "".join(f"{cell['accuracy']:>7.2f} / {cell['mean_confidence']:.2f}" for cell in cells))
    return "\n".join(lines)


def diagram(results: dict, width: int = 20) -> str:
    """Reliability diagrams as text: █ is the accuracy of a confidence bin, │ what it says on average, then its share."""
    total = {name: max(1, sum(b["count"] for b in row["reliability"])) for name, row in results.items()}
    lines = ["confidence   " + "".join(f"{NAMES[name]:<{width + 8}}" for name in results)]
    for i in range(9, -1, -1):
        cells = []
        for name, row in results.items():
            b = row["reliability"][i]
            bar = [" "] * (width + 1)
            if b["count"]:
                bar[:round(b["accuracy"] * width)] = "█" * round(b["accuracy"] * width)
                bar[round(b["confidence"] * width)] = "│"
            cells.append("".join(bar) + (f"{b['count'] / total[name]:>5.0%}  " if b["count"] else " " * 7))
        lines.append(f"{i / 10:.1f} to {(i + 1) / 10:.1f}   " + "".join(cells))
    return "\n".join(lines)


def findings(results: dict) -> str:
    """A sentence on each method, written from its figures."""
    base, lines = results["base"], []
    for name in ("opd", "caopd"):
        if name in results:
            row = results[name]
            gap = "more" if row["ocg"] > 0 else "less"
            lines.append(f"{NAMES[name]} took accuracy from {base['accuracy']:.2f} to {row['accuracy']:.2f}. It says "
                         f"{row['mean_confidence']:.2f} on average, {abs(row['ocg']):.2f} {gap} than it gets right "
                         f"(base: {base['ocg']:+.2f}); a right answer states a higher confidence than a wrong one in "
                         f"{row['spr']:.0%} of pairs, and ECE is {row['ece']:.3f} (base: {base['ece']:.3f}).")
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """Reliability diagrams side by side; matplotlib is optional and imported only here."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(results), figsize=(3.4 * len(results), 3.6), sharey=True, squeeze=False)
    for axis, (name, row) in zip(axes[0], results.items()):
        filled = [(i, b) for i, b in enumerate(row["reliability"]) if b["count"]]
        total = sum(b["count"] for _, b in filled)
        axis.plot([0, 1], [0, 1], color="0.6", lw=1, ls="--", zorder=1)
        axis.bar([(i + 0.5) / 10 for i, _ in filled], [b["accuracy"] for _, b in filled], width=0.09,
                 color=[plt.cm.Blues(0.25 + 0.7 * b["count"] / total) for _, b in filled], edgecolor="0.3", lw=0.6, zorder=2)
        axis.axvline(row["mean_confidence"], color="tab:red", lw=1.2, label="mean confidence")
        axis.axhline(row["accuracy"], color="tab:green", lw=1.2, label="accuracy")
        axis.set(title=f"{NAMES[name]}\nECE {row['ece']:.3f}   OCG {row['ocg']:+.2f}   SPR {row['spr']:.2f}",
                 xlabel="stated confidence", xlim=(0, 1.02), ylim=(0, 1.02))
        axis.title.set_fontsize(10)
    axes[0][0].set_ylabel("share correct")
    axes[0][0].legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ----------------------------------------------------------------------------- what fits

def layer_bytes(config: Config, longest: int, args: Args) -> float:
    """What one layer keeps of a token for its gradient; `longest` is the tokens of a prompt with its K completions."""
    heads, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    # attention gathers K · (P + C) keys for the P + K · C tokens
    repeated = args.rollouts * (longest - (args.rollouts - 1) * args.max_new_tokens) / longest
    numbers = 6 * config.hidden_size + 4 * config.intermediate_size + 5 * heads + (8 + 2 * repeated) * keys
    norms = 2 * config.hidden_size + heads + keys  # they are computed in float32
    return 4 * numbers if args.dtype == "float32" else 2 * (numbers + norms)


def memory_needed(config: Config, longest: int, args: Args) -> dict[str, float]:
    """Bytes a distillation step will hold on the device, by purpose, `longest` as above. Fragmentation comes on top."""
    with torch.device("meta"):
        model = Transformer(config)
    weights, layers = (sum(p.numel() for p in part.parameters()) for part in (model, model.model.layers))
    size = 2 if args.dtype == "bfloat16" else 4
    copy = 4 if size == 2 and args.rounding == "nearest" else 0  # bytes of a float32 copy, where there is one
    resident = weights - layers if args.teacher_device == "cpu" else weights  # the teacher's weights that stay on the device
    step = longest * max(args.prompts, args.sft_documents if args.sft_steps else 0)  # at most
    tokens, layer = max(longest, min(args.micro_tokens, step)), layer_bytes(config, longest, args)
    kept = config.num_hidden_layers * size * config.hidden_size + layer if args.recompute else config.num_hidden_layers * layer
    cache = 2 * size * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # keys and values of a token
    losing, sampling = tokens * kept + 6 * 4 * CHUNK, max(longest, min(SAMPLING * args.micro_tokens, step)) * cache + tokens * layer
    updating = (0 if size == 4 else 16) * config.vocab_size * config.hidden_size  # float32 copies of the largest tensor
    return {"weights, gradient and optimizer": weights * (size + copy + (copy or size) + 8), "teacher": resident * (size + copy),
            "working memory": max(losing, sampling, updating)}


def memory_free(device: torch.device) -> float:
    """Bytes that can still be had: of the GPU's own memory, or of main memory; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return math.inf


def teacher_length(example: Example, tokenizer: Tokenizer, wording: data.Wording) -> int:
    """Tokens of (x, z̃), the longest prompt that an example makes."""
    return len(tokenizer.chat(data.teacher_messages(example, wording, data.stated(example.demo, 1.0), report=1.0)))


def check_memory(config: Config, task: Task, tokenizer: Tokenizer, args: Args, device: torch.device) -> None:
    """Prints what the run will need and what there is; refuses one that cannot fit, and names the flags that help."""
    sample = task.draw(64, "memory", 0)
    longest = max(teacher_length(example, tokenizer, task.wording) for example in sample) + args.rollouts * args.max_new_tokens
    parts, free = memory_needed(config, longest, args), memory_free(device)
    needed = sum(parts.values())
    shown = ", ".join(f"{name} {size / 2 ** 30:.1f}" for name, size in parts.items())
    print(f"Memory: about {needed / 2 ** 30:.1f} GiB needed on {device} ({shown}), {free / 2 ** 30:.1f} free.")
    if needed <= free:
        return
    remedies = {"--recompute": {"recompute": True}, f"--micro-tokens {longest}": {"micro_tokens": longest},
                "--dtype bfloat16 --rounding stochastic": {"dtype": "bfloat16", "rounding": "stochastic"},
                "--teacher-device cpu": {"teacher_device": "cpu"}}
    offers = [(sum(memory_needed(config, longest, dataclasses.replace(args, **change)).values()), name)
              for name, change in remedies.items() if device.type == "cuda" or name != "--teacher-device cpu"]
    helps = ", ".join(f"{name} {size / 2 ** 30:.1f} GiB" for size, name in sorted(offers) if size < 0.99 * needed)
    raise UsageError(f"{args.model or 'the embedded world'}: a step needs about {needed / 2 ** 30:.1f} GiB on {device} ({shown}), and "
                     f"{free / 2 ** 30:.1f} are free. What each of these alone would bring it to: "
                     f"{helps or 'no flag helps, take a smaller model'}")


# ----------------------------------------------------------------------------- main

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message} (see --help)")


def parse_args(argv: list[str] | None) -> Args:
    """Reads the command line into Args and fills in the defaults that depend on --model. Raises UsageError."""
    parser = Parser(prog="caopd.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for field in dataclasses.fields(Args):
        group, help, choices = (field.metadata[key] for key in ("group", "help", "choices"))
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        name, default = "--" + field.name.replace("_", "-"), field.default
        if field.type is bool:
            groups[group].add_argument(name, action="store_true", help=help)
            continue
        toy, real = DEFAULTS.get(field.name, (default, default))
        shown = f" [{toy}]" if toy == real and toy != "" else f" [{toy}; with --model {real}]" if toy != real else ""
        word = "PATH" if field.name in ("train", "eval", "out") else "NAME"
        metavar = None if choices else {int: "N", float: "X", str: word}[field.type]
        groups[group].add_argument(name, type=field.type, default=default, choices=choices, metavar=metavar, help=help + shown)
    args = Args(**vars(parser.parse_args(argv)))
    for name, defaults in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[bool(args.model)])
    args.out = args.out or os.path.join("out", args.task if args.model else "toy")
    check(args)
    return args


def check(args: Args) -> None:
    """Refuses what cannot work before anything is loaded or written."""
    def refuse(name: str, wish: str):
        raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: it should be {wish}")

    for name in ("steps", "prompts", "rollouts", "max_prompt", "max_new_tokens", "sft_documents", "width", "layers",
                 "eval_questions", "micro_tokens", "save_every"):
        if getattr(args, name) < 1:
            refuse(name, "at least 1")
    for name in ("sft_steps", "skip_tokens"):
        if getattr(args, name) < 0:
            refuse(name, "0 or more")
    if args.oracle < 0 or args.oracle == 1:
        refuse("oracle", "at least 2 samples a question, or 0")
    for name in ("lr", "sft_lr", "clip", "temperature"):
        if not (math.isfinite(getattr(args, name)) and getattr(args, name) > 0):
            refuse(name, "a positive number")
    for name in ("teacher_rate", "sft_noise", "sft_answers"):
        if not 0 <= getattr(args, name) <= 1:
            refuse(name, "between 0 and 1")
    if args.width % 8:
        refuse("width", "a multiple of 8 (the embedded world's transformer has 4 heads)")
    if bool(args.train) != bool(args.eval) or args.task != "arithmetic" and not args.train:
        raise UsageError(f"--task {args.task} needs both --train FILE.jsonl and --eval FILE.jsonl")
    if args.train and not args.model:
        raise UsageError("--train and --eval need --model: the embedded world's tiny tokenizer knows arithmetic alone")
    if args.figure:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UsageError("--figure needs matplotlib: pip install matplotlib, or leave the flag out "
                             "(tables and text diagrams are printed anyway)") from None


def pick_device(args: Args) -> torch.device:
    if args.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise UsageError(f"--device {args.device}: it should be cpu, cuda or cuda:i") from None
    if device.type not in ("cpu", "cuda") or device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {args.device}: no such device here; there are cpu and "
                         f"{torch.cuda.device_count()} cuda devices")
    return device


def pick_dtype(args: Args, device: torch.device) -> torch.dtype:
    """bfloat16 for real models where it is the fast one: on a CPU that only emulates it, float32 is 3 times as fast."""
    if args.dtype != "auto":
        return getattr(torch, args.dtype)
    able = device.type == "cuda" or any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
    return torch.bfloat16 if args.model and able else torch.float32


def find_model(name: str) -> Path | None:
    """A directory as it is; a hub name through huggingface_hub, weights and texts only; None for the embedded world."""
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UsageError(f"--model {name}: no such directory; pass a Hugging Face model directory or a hub name like owner/model")
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # no network, no such model, no access, no huggingface_hub: the remedy is the same
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"--model {name}: not a directory, and not to be had from the hub ({reason}); "
                         "download it elsewhere and pass its directory") from None


def fitting(examples: list[Example], tokenizer: Tokenizer, wording: data.Wording, config: Config, args: Args) -> list[Example]:
    """The examples within --max-prompt and the model's positions; the rest are refused or, with --skip-long, counted."""
    kept = []
    for example in tqdm(examples, desc="reading", unit="prompt", leave=False, disable=len(examples) < 500):
        prompt = len(tokenizer.chat(data.student_messages(example, wording)))
        total = teacher_length(example, tokenizer, wording) + args.max_new_tokens
        if prompt <= args.max_prompt and total <= config.max_position_embeddings:
            kept.append(example)
        elif not args.skip_long:
            which = f"{example.where}: the prompt" if example.where else f"the prompt {example.question!r}"
            limit = (f"has {prompt} tokens, over --max-prompt {args.max_prompt}" if prompt > args.max_prompt else
                     f"with demonstration and completion takes {total} tokens, over the model's {config.max_position_embeddings}")
            raise UsageError(f"{which} {limit}; change the limits, or leave such prompts out with --skip-long")
    if len(kept) < len(examples):
        print(f"Left out {len(examples) - len(kept)} of {len(examples)} questions for their length.")
    if not kept:
        raise UsageError(f"--max-prompt {args.max_prompt}: no question is left")
    return kept


def make_task(tokenizer: Tokenizer, config: Config, args: Args) -> Task:
    if not args.train:
        task = data.arithmetic_task(args.seed, args.eval_questions, words=bool(args.model))
        return dataclasses.replace(task, held_out=fitting(task.held_out, tokenizer, task.wording, config, args))
    train, held_out = (fitting(data.load_jsonl(path, args.task), tokenizer, data.WORDS, config, args)
                       for path in (args.train, args.eval))
    if shared := len({e.question for e in train} & {e.question for e in held_out}):
        print(f"Note: {shared} held-out questions are also in {args.train}; figures on them are not held out.")
    return data.listed_task(train, held_out[:args.eval_questions], args.seed)


def toy_config(args: Args, tokenizer: Tokenizer) -> Config:
    """The embedded world's transformer: a Qwen3 of about 0.6 M parameters at width 128."""
    end = tokenizer.eos_ids[0]
    return Config(model_type="qwen3", vocab_size=tokenizer.backend.get_vocab_size(), hidden_size=args.width,
                  intermediate_size=11 * args.width // 4, num_hidden_layers=args.layers, num_attention_heads=4,
                  num_key_value_heads=4, head_dim=args.width // 4, max_position_embeddings=128, tie_word_embeddings=True,
                  eos_token_id=end, pad_token_id=end)


def newborn(config: Config, args: Args, device: torch.device) -> Transformer:
    """The embedded world's transformer before it has learned anything."""
    torch.manual_seed(args.seed)
    return Transformer(config).to(device, getattr(torch, args.dtype))


def make_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "probe.tmp").touch()
        (out / "probe.tmp").unlink()
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written to ({error.strerror})") from None


def save(model: Transformer, tokenizer: Tokenizer, directory: Path) -> None:
    """A Hugging Face directory; config.json comes last, so what has one is complete."""
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


def run(args: Args) -> dict:
    """Everything, from flags to table; returns what results.json holds."""
    began, device, out = time.perf_counter(), pick_device(args), Path(args.out)
    args = dataclasses.replace(args, dtype=str(pick_dtype(args, device)).removeprefix("torch."))
    if origin := find_model(args.model):
        config, tokenizer = Config.from_pretrained(origin), Tokenizer.from_pretrained(origin)
    else:
        tokenizer = data.toy_tokenizer()
        config = toy_config(args, tokenizer)
    task = make_task(tokenizer, config, args)
    check_memory(config, task, tokenizer, args, device)
    base = out / "base"
    made, identity = base / "settings.json", json.dumps(settings(args, "base"), indent=2)
    reuse = made.exists() and made.read_text() == identity
    load = partial(Transformer.from_pretrained, dtype=getattr(torch, args.dtype), device=device)
    model = load(base) if reuse else load(origin) if origin else newborn(config, args, device)
    make_writable(out)
    if reuse:
        print(f"Reusing the base model in {base}: it was made with the same settings.")
    elif args.sft_steps or not origin:
        made.unlink(missing_ok=True)
        save(supervise(model, tokenizer, task, args, out), tokenizer, base)
        made.write_text(identity)
    start = base if args.sft_steps or not origin else origin
    weights = sum(p.numel() for p in model.parameters())
    print(f"{args.model or 'The embedded world'}: {weights:,} parameters in {args.dtype} on {device}, "
          f"{len(task.held_out)} held-out questions, seed {args.seed}.")
    results = {"base": evaluate(model, tokenizer, task, args, "base")}
    methods = ["opd", "caopd"] if args.method == "both" else [args.method]
    for method in methods:
        del model  # one student and one teacher at a time
        model = load(start)
        distill(model, tokenizer, task, method, args, out)
        save(model, tokenizer, out / method)
        results[method] = evaluate(model, tokenizer, task, args, method)

    seconds = time.perf_counter() - began
    everything = results | {"settings": dataclasses.asdict(args), "seconds": seconds}
    (out / "results.tmp").write_text(to_json(everything, indent=2) + "\n")
    os.replace(out / "results.tmp", out / "results.json")
    print(f"\n{table(results)}\n\n{grade_table(results)}\n\n{diagram(results)}\n\n{findings(results)}")
    for method in methods:
        (out / method / "checkpoint.safetensors").unlink(missing_ok=True)
    (out / "base" / "checkpoint.safetensors").unlink(missing_ok=True)
    if args.figure:
        draw(results, out / "reliability.png")
    print(f"\nEverything is in {out} (results.json, metrics.jsonl, the models), after {seconds:.0f} seconds.")
    return results


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 0, 2 for a request that cannot be served, 130 when interrupted."""
    try:
        run(parse_args(argv))
    except (UsageError, DataError, ModelError) as error:
        print("caopd.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
