"""What fits: the memory that a run will hold, told before it begins, and what would make it less.

Everything is in bytes, on one device. Fragmentation comes on top.
"""

import ctypes
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import ranks
from caopd import (LOGITS_AT_ONCE, METHODS, SAMPLED, Args, check_together, methods_of,
                   saved_stages)
from data import Task, Tokenizer
from files import BadInput
from model import Config, Transformer
from questions import longest_prompt


def keep_freed_memory() -> None:
    """Has glibc's malloc keep the memory of freed tensors for the next ones.

    It would give it back to the system in each step, which clears every page before it lends it
    again (tests/BENCH.md). Up to 1 GiB more may be held.
    """
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    call_glibc("mallopt", trim_threshold, 2 ** 30)
    # The most that it takes; larger tensors go back as before.
    call_glibc("mallopt", mmap_threshold, 2 ** 25)


def return_freed_memory() -> None:
    """Has glibc's malloc give back all that is free, also what lies between tensors in use."""
    call_glibc("malloc_trim", 0)


def call_glibc(function: str, *numbers: int) -> None:
    """Calls it where there is one: other C libraries stay as they are."""
    try:
        getattr(ctypes.CDLL(None), function)(*numbers)
    except (AttributeError, OSError):
        pass


def check_memory(config: Config, task: Task, tokenizer: Tokenizer, args: Args,
                 device: torch.device) -> None:
    """Says what the run needs and what there is; refuses one that cannot fit, with what helps."""
    if device.type == "cpu":  # An offloaded teacher lies in the same memory.
        args = replace(args, teacher_device="same")
    typical = task.draw(64, "memory", 0) if saved_stages(args) else task.held_out[:64]
    prompts = [longest_prompt(example, tokenizer, task.wording, args) for example in typical]
    longest = max(prompts) + args.rollouts * args.max_new_tokens
    parts = memory_needed(config, prompts, args, ranks.size())
    free = memory_free(device)
    needed = sum(parts.values())
    shown = ", ".join(f"{name} {size / 2 ** 30:.1f}" for name, size in parts.items())
    each = f" for each of {ranks.size()} processes" if ranks.size() > 1 else ""
    print(f"Memory: about {needed / 2 ** 30:.1f} GiB needed on {device}{each} ({shown}), "
          f"{free / 2 ** 30:.1f} free.")
    if needed <= free:
        return
    remedies = {"--recompute": {"recompute": True},
                f"--micro-tokens {longest}": {"micro_tokens": longest},
                "--dtype bfloat16 --rounding stochastic": {"dtype": "bfloat16",
                                                           "rounding": "stochastic"},
                "--lora-rank 16": {"lora_rank": 16}}
    if device.type == "cuda" and ranks.size() == 1:
        remedies["--teacher-device cpu"] = {"teacher_device": "cpu"}
    offers = []
    for name, change in remedies.items():
        changed = replace(args, **change)
        try:
            check_together(changed)
        except BadInput:  # A flag that these do not go with is no help.
            continue
        offers.append((sum(memory_needed(config, prompts, changed, ranks.size()).values()), name))
    helps = ", ".join(f"{name} {size / 2 ** 30:.1f} GiB" for size, name in sorted(offers)
                      if size < 0.99 * needed)
    raise BadInput(f"{args.model or 'the embedded world'}: a step needs about "
                   f"{needed / 2 ** 30:.1f} GiB on {device} ({shown}), and "
                   f"{free / 2 ** 30:.1f} are free. What each of these alone would bring it to: "
                   f"{helps or 'no flag helps, take a smaller model'}")


def memory_free(device: torch.device) -> float:
    """Bytes that a process can still have on the device; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(row.split(":") for row in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0]) / ranks.size()
    except (OSError, KeyError, ValueError):
        return math.inf


def memory_needed(config: Config, prompts: list[int], args: Args,
                  processes: int = 1) -> dict[str, float]:
    """Bytes that a distillation step or an evaluation will hold on the device, by purpose.

    Where nothing is trained, those of an evaluation alone.

    prompts: lengths of typical prompts; processes: how many share weights and prompts.
    """
    weights = weight_bytes(config, args, processes)
    longest = max(prompts) + args.rollouts * args.max_new_tokens  # tokens of a prompt and its K
    own, documents, asked = (math.ceil(items / processes) for items in (
        args.prompts, args.sft_documents if args.sft_steps else 0, args.eval_questions))
    tokens = max(longest, min(args.micro_tokens, longest * max(own, documents)))  # at once
    layer = activation_bytes(config, longest, args.rollouts, args.max_new_tokens,
                             getattr(torch, args.dtype))  # of a token
    kept = config.num_hidden_layers * layer  # of a token, for its gradient
    if args.recompute:
        kept = config.num_hidden_layers * bytes_computed(args) * config.hidden_size + layer
    losing = tokens * kept + 6 * 4 * LOGITS_AT_ONCE + weights.passing
    rolling = weights.sampled + sampling_bytes(config, prompts, own, args.rollouts, tokens * layer,
                                               args)
    samples = max(args.eval_samples, args.paper_samples, args.oracle)
    evaluating = weights.sampled + sampling_bytes(config, prompts, asked, samples, tokens * layer,
                                                  args)
    if not saved_stages(args):
        return {"weights": weights.stored, "working memory": evaluating}
    # Evaluating begins when teacher, gradient and optimizer have gone.
    training = weights.gradient + weights.moments
    return {"weights, gradient and optimizer": weights.stored + training,
            "teacher": weights.teacher,
            "working memory": max(losing, weights.updating, rolling,
                                  evaluating - training - weights.teacher)}


def activation_bytes(config: Config, tokens_per_prompt: int, rollouts: int, completion: int,
                     dtype: torch.dtype) -> float:
    """Bytes that one layer keeps of one token for its gradient, when it reads a SharedPrefix.

    tokens_per_prompt: P + K·C, a prompt with its completions; rollouts: K; completion: C;
    dtype: what the layer computes in. Weights that are cast to it are kept on top, once a pass.
    """
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    prompt = tokens_per_prompt - rollouts * completion
    # Attention gathers K · (P + C) keys, and as many values, for P + K · C tokens.
    gathered = rollouts * (prompt + completion) / tokens_per_prompt
    numbers = (6 * config.hidden_size + 4 * config.intermediate_size + 5 * q_size
               + (8 + 2 * gathered) * kv_size)
    if dtype == torch.float32 or config.sliding_window:  # Packed repeats shared heads.
        numbers += 2 * (q_size - kv_size) * prompt / tokens_per_prompt
    if dtype == torch.float32:
        return 4 * numbers
    norms = 2 * config.hidden_size + q_size + kv_size  # They are computed in float32.
    return 2 * (numbers + norms)


@dataclass
class WeightBytes:
    """What there is of the weights on a device, in bytes."""

    stored: float  # the student's
    gradient: float
    moments: float  # AdamW's
    teacher: float
    passing: float  # copies for a forward and backward pass
    sampled: float  # the copy that is sampled from
    updating: float  # of the largest matrix, while it is updated


def weight_bytes(config: Config, args: Args, processes: int) -> WeightBytes:
    """What the weights take on each device, where `processes` of them share the model."""
    with torch.device("meta"):
        model = Transformer(config)
    every, in_layers = (sum(p.numel() for p in part.parameters())
                        for part in (model, model.model.layers))
    computed = bytes_computed(args)
    exact = computed == 4 or args.rounding == "nearest" or args.lora_rank > 0
    stored = 4 if exact else 2  # bytes of a weight that is learned
    learned, frozen = every, 0
    cast = 0 if stored == computed else computed * every
    if args.lora_rank:  # The model stays as it is computed with, and is never cast.
        model.add_adapters(args.lora_rank, 1.0)
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen, cast = every, 0
    taught = any(METHODS[name].teacher for name in methods_of(args))
    averaged = taught * (every - in_layers if args.teacher_device == "cpu" else learned)
    kept, gradient, moments = frozen * computed + learned * stored, learned * stored, 8 * learned
    teacher, passing, sampled = averaged * stored, 0 if args.recompute else cast, cast
    updating = 16 * config.vocab_size * config.hidden_size if stored == 2 else 0  # in float32
    if processes > 1:
        # A pass gathers embedding and head of student and teacher, the gradient and its sum over
        # the ranks, and three layers: one computes, one comes, of one the gradient goes.
        outside = 2 * computed if args.lora_rank else 3 * stored + 4
        passing = outside * (every - in_layers) + (
            3 * computed * in_layers / config.num_hidden_layers)
        sampled, teacher = computed * every, teacher + taught * computed * frozen
        kept, gradient, moments, teacher, updating = (
            spread / processes for spread in (kept, gradient, moments, teacher, updating))
    return WeightBytes(kept, gradient, moments, teacher, passing, sampled, updating)


def bytes_computed(args: Args) -> int:
    """Bytes of a number where it is computed with."""
    return 2 if args.dtype == "bfloat16" else 4


def sampling_bytes(config: Config, prompts: list[int], questions: int, samples: int,
                   prefill: float, args: Args) -> float:
    """Bytes of keys and values, masks, and what reading the prompts or drawing a token holds.

    questions, samples: how many, and completions of each; prefill: bytes of reading the prompts.
    """
    computed = bytes_computed(args)
    each = max(prompts) + samples * args.max_new_tokens
    sampled = max(each, min(SAMPLED * args.micro_tokens, questions * each))
    cache = 2 * computed * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    rows = sampled * samples / (min(prompts) + samples * args.max_new_tokens)
    # A row's logits are there as they are computed and, for the nucleus, which takes the most:
    # five times in float32 (also sorted, their shares, the sums of these, and what is left of
    # them), and their order in int64.
    drawing = rows * config.vocab_size * (computed + 5 * 4 + 8)
    # Each row knows of each token whether it may see it: positions, their distances and the mask.
    seeing = 24 * samples * sampled
    return sampled * cache + seeing + max(prefill, drawing)
