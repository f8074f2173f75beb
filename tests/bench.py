"""Speed and memory, beside the libraries one would otherwise reach for, measured in turn.

    pip install transformers trl datasets

    python tests/bench.py peers --model smollm2 --tool tooluse_test.jsonl
        sampler and training step, against transformers and TRL
    python tests/bench.py law --model smollm2
        what a step costs as K and P grow
    python tests/bench.py shapes --device cuda --dtype bfloat16
        the shapes of Qwen3 with random weights, on a GPU
    python tests/bench.py memory --dtype bfloat16 --new 1024
        on paper: what those shapes need, and the least that a step can take

This is no test: pytest does not collect it, and nothing here asserts a time. Every measurement of
`peers` runs in a process of its own, so that its peak memory is its own. Completions never end
early, so that the work is equal.
"""

import argparse
import dataclasses
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "theory")]

import caopd
import data
import pipeline
from files import BadInput
from memory import memory_free, memory_needed
from model import Config, Transformer, generate
from worlds import show

K = 8


# ------------------------------------------------------------------------------------- measuring

def wait(device: torch.device) -> float:
    """The time, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(work: Callable, device: torch.device, rounds: int) -> float:
    """Median seconds of work(), after one call that is not counted."""
    taken = []
    for _ in range(rounds + 1):
        began = wait(device)
        work()
        taken.append(wait(device) - began)
    return statistics.median(taken[1:])


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The machine's own floating-point operations a second, in a product as large as a layer's."""
    m, k, n = (8192, 8192, 8192) if device.type == "cuda" else (2048, 576, 1536)
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    return 2 * m * k * n / seconds(lambda: [a @ b for _ in range(20)], device, 5) * 20


def memory_rate(device: torch.device) -> float:
    """Bytes a second of reading a tensor much larger than any cache."""
    x = torch.ones(2 ** (30 if device.type == "cuda" else 27), device=device)
    return 4 * x.numel() / seconds(lambda: x.sum(), device, 5)


def peak_memory(device: torch.device) -> float:
    """Most bytes held so far: by the GPU's allocator, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ------------------------------------------------------------- peers: the work, ours and theirs

def questions(flags: argparse.Namespace) -> tuple[list[data.Example], int]:
    """The questions of a step that is not counted and of the rounds that are, and how many make
    a step.

    They are tool-use requests, of the quartiles' lengths in turn and --batch at a time, or short
    arithmetic in words, four at a time.
    """
    if flags.prompts == "tool":
        examples = sorted(data.load_jsonl(flags.tool, "tool"), key=lambda e: len(e.question))
        quarters = islice(chain([2], cycle([1, 2, 3])), flags.batch * (flags.rounds + 1))
        return [examples[len(examples) * quarter // 4] for quarter in quarters], flags.batch
    task = data.arithmetic_task(0, 8, words=True)
    return task.draw(4 * (flags.rounds + 1), "bench", 0), 4


def endless(directory: str) -> data.Tokenizer:
    """The tokenizer without an end token, so that completions never end early."""
    tokenizer = data.Tokenizer.from_pretrained(directory)
    tokenizer.eos_ids = []
    return tokenizer


def settings(flags: argparse.Namespace) -> caopd.Args:
    return caopd.parse_args([
        "--model", flags.model, "--method", "opd", "--steps", str(flags.rounds + 1),
        "--rollouts", str(K), "--lr", "1e-6", "--max-new-tokens", str(flags.new),
        "--micro-tokens", "2048", "--device", flags.device, "--dtype", flags.dtype])


def chats(example: data.Example) -> tuple[list[dict], list[dict]]:
    """What the student and OPD's teacher read: x and (x, z)."""
    demo = data.with_confidence(example.demo, 1.0)
    return (data.student_messages(example, data.WORDS),
            data.teacher_messages(example, data.WORDS, demo))


def privileged(example: data.Example) -> str:
    """What the teacher's message adds to the student's."""
    student, teacher = (chat[-1]["content"] for chat in chats(example))
    return teacher.removeprefix(student)


def our_sampler(flags: argparse.Namespace) -> list[float]:
    """Seconds of a rollout, for each round."""
    tokenizer, device = endless(flags.model), torch.device(flags.device)
    model = Transformer.from_pretrained(flags.model, getattr(torch, flags.dtype), device)
    examples, step = questions(flags)
    prompts = [tokenizer.chat(chats(example)[0]) for example in examples[step:]]
    return [seconds(partial(generate, model, prompts[i:i + step], flags.new, num_samples=K),
                    device, 1) for i in range(0, len(prompts), step)]


def their_sampler(flags: argparse.Namespace) -> list[float]:
    """The same with `generate` of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    device, dtype = torch.device(flags.device), getattr(torch, flags.dtype)
    tokenizer = AutoTokenizer.from_pretrained(flags.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=dtype).to(device)
    examples, step = questions(flags)
    asked = [chats(example)[0] for example in examples[step:]]

    def work(i: int) -> None:
        batch = tokenizer.apply_chat_template(
            asked[i:i + step], add_generation_prompt=True, padding=True, return_tensors="pt",
            return_dict=True).to(device)
        model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, num_return_sequences=K,
                       min_new_tokens=flags.new, max_new_tokens=flags.new)
    return [seconds(partial(work, i), device, 1) for i in range(0, len(asked), step)]


def our_step(flags: argparse.Namespace, recompute: bool) -> list[float]:
    """Seconds of a step of OPD, for each round: rollout, loss, gradient, AdamW and EMA."""
    examples, step = questions(flags)
    args = dataclasses.replace(settings(flags), prompts=step, save_every=10 ** 6,
                               recompute=recompute)
    task = data.Task(data.WORDS, lambda n, stage, i: examples[n * i:n * (i + 1)], [])
    config = Config.from_pretrained(flags.model)
    model = pipeline.load_model(Path(flags.model), config, args, torch.device(flags.device))
    with tempfile.TemporaryDirectory() as out:
        caopd.train(model, "opd", endless(flags.model), task, args, Path(out))
        rows = (Path(out) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["seconds"] for row in rows][1:]


def their_step(flags: argparse.Namespace, checkpointing: bool) -> list[float]:
    """The same with TRL's trainer for self-distillation."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.sdft import SDFTTrainer
    device, dtype, taken = torch.device(flags.device), getattr(torch, flags.dtype), []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = wait(device)

        def on_step_end(self, *_, **__):
            taken.append(wait(device) - self.began)

    rows = [{"prompt": chats(example)[0], "privileged_context": privileged(example)}
            for example in questions(flags)[0]]
    model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(flags.model, padding_side="left")
    with tempfile.TemporaryDirectory() as out:
        trainer = SDFTTrainer(
            model=model, args=their_settings(flags, checkpointing, out), callbacks=[Clock()],
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
    return taken[1:]


def their_settings(flags: argparse.Namespace, checkpointing: bool, out: str):
    """TRL's configuration for the step that `settings` describes."""
    from trl.experimental.sdft import SDFTConfig
    args, step = settings(flags), questions(flags)[1]
    # Long prompts go through one by one, as ours do by --micro-tokens.
    passes = flags.batch if flags.prompts == "tool" else 1
    return SDFTConfig(
        output_dir=out, max_steps=args.steps, learning_rate=args.lr, num_generations=K,
        per_device_train_batch_size=step * K // passes, gradient_accumulation_steps=passes,
        max_prompt_length=None, max_completion_length=flags.new, temperature=1.0, top_k=0,
        top_p=1.0, generation_kwargs={"min_new_tokens": flags.new},
        distillation_mode="full_logits", distillation_alpha=1.0, num_loss_tokens_to_skip=0,
        teacher_model_kind="ema", teacher_update_rate=args.teacher_rate, teacher_sync_steps=1,
        teacher_prompt_template="{prompt}{privileged_context}", bf16=False,
        gradient_checkpointing=checkpointing, shuffle_dataset=False, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
        use_cpu=flags.device == "cpu")


JOBS = {"our sampler": our_sampler, "transformers": their_sampler,
        "our step": partial(our_step, recompute=False),
        "our step, --recompute": partial(our_step, recompute=True),
        "TRL": partial(their_step, checkpointing=False),
        "TRL, checkpointing": partial(their_step, checkpointing=True)}
WORK = {"sampler": ("our sampler", "transformers"),
        "training step": ("our step", "TRL", "our step, --recompute", "TRL, checkpointing")}


# ------------------------------------------------------------------------------ peers: the tables

def child(flags: argparse.Namespace, job: str) -> dict | None:
    """Runs a job in a process of its own. Returns None, and says so in one sentence, where its
    library is missing."""
    names = ("model", "tool", "device", "dtype", "rounds", "batch", "new", "prompts")
    options = chain.from_iterable((f"--{name}", str(getattr(flags, name))) for name in names)
    done = subprocess.run([sys.executable, __file__, "peers", "--job", job, *options],
                          capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["failed"])[-1]
        print(f"{job}: {reason} (the peers need pip install transformers trl datasets)",
              file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def useful_operations(flags: argparse.Namespace) -> tuple[float, float]:
    """Floating-point operations that a rollout and a whole step cannot do without: 2 a weight and
    token, in the mean over rounds."""
    config, tokenizer = Config.from_pretrained(flags.model), endless(flags.model)
    with torch.device("meta"):
        layers = sum(p.numel() for p in Transformer(config).model.layers.parameters())
    head, new = config.vocab_size * config.hidden_size, K * flags.new
    (examples, step), rollouts, steps = questions(flags), [], []
    for example in examples[step:]:
        student, teacher = (len(tokenizer.chat(chat)) for chat in chats(example))
        rollouts.append(2 * (layers * (student + new) + head * new))
        # The gradient costs twice its forward pass, and the teacher one forward pass.
        passes = layers * (3 * (student + new) + teacher + new) + head * 4 * new
        steps.append(rollouts[-1] + 2 * passes)
    return step * statistics.mean(rollouts), step * statistics.mean(steps)


def peers(flags: argparse.Namespace) -> None:
    """Sampler and training step, ours and theirs in turn, on long prompts and on short ones."""
    rate = matrix_rate(getattr(torch, flags.dtype), torch.device(flags.device))
    print(f"{flags.device}, {flags.dtype}, {torch.get_num_threads()} threads, matrix products at "
          f"{rate / 1e9:.0f} GFLOP/s; median of {flags.rounds} rounds")
    for flags.prompts, flags.new in (("tool", 64), ("short", 16)):
        prompts = questions(flags)[1]
        for (work, jobs), operations in zip(WORK.items(), useful_operations(flags)):
            results = {job: result for job in jobs if (result := child(flags, job))}
            mine, rows = results.get(jobs[0]), []
            for job, its in results.items():
                times, more = (its[key] / mine[key] if mine else math.nan
                               for key in ("seconds", "memory"))
                rows.append([job, f"{its['seconds']:.2f}",
                             f"{prompts * K * flags.new / its['seconds']:.0f}",
                             f"{its['memory'] / 2 ** 30:.2f}",
                             f"{operations / its['seconds'] / rate:.0%}",
                             f"{times:.2f}", f"{more:.2f}"])
            print(f"\n{work}, {flags.prompts} prompts: {prompts} x {K} completions "
                  f"of {flags.new} tokens")
            show(["", "seconds", "new tokens/s", "peak GiB", "of matrix rate", "seconds / ours",
                  "memory / ours"], rows)


# ------------------------------------------------------------------------------------ law, shapes

def random_step(model: Transformer, teacher: Transformer, prompt: int, samples: int,
                new: int) -> tuple[float, float]:
    """Seconds of a rollout, and of its loss with its gradient, for one prompt of random tokens.

    prompt: its length P; samples: K; new: C.
    """
    device, ids = model.device, torch.randint(model.config.vocab_size, (prompt,)).tolist()
    began = wait(device)
    completions = generate(model, [ids], new, num_samples=samples)
    sampled = wait(device)
    # Advantages tell apart completions that happen to be the same, so that all K are computed.
    target = caopd.Target(ids, ids, {caopd.Completion(tuple(completion), new, advantage=float(k)): 1
                                     for k, completion in enumerate(completions)})
    caopd.accumulate_gradient(model, teacher, [target], caopd.kl, caopd.kl, skip_tokens=0,
                              scale=1.0)
    return sampled - began, wait(device) - sampled


def law(flags: argparse.Namespace) -> None:
    """A step costs P + K·C tokens, and not the K·(P + C) of trainers that copy the prompt."""
    model = Transformer.from_pretrained(flags.model, getattr(torch, flags.dtype), flags.device)
    new = flags.new
    random_step(model, model, 64, 2, 4)
    many = [(512, samples) for samples in (1, 2, 4, 8, 16)]
    long = [(prompt, K) for prompt in (128, 256, 512, 1024, 2048)]
    for title, cases in ((f"K at P = 512, C = {new}", many), (f"P at K = {K}, C = {new}", long)):
        rows = []
        for prompt, samples in cases:
            runs = [random_step(model, model, prompt, samples, new) for _ in range(flags.rounds)]
            rollout, update = map(statistics.median, zip(*runs))
            ours, copies = prompt + samples * new, samples * (prompt + new)
            rows.append([f"P = {prompt}, K = {samples}", ours, copies, f"{rollout:.2f}",
                         f"{update:.2f}", f"{1000 * update / ours:.1f}",
                         f"{1000 * update / copies:.1f}"])
        print(f"\n{title}")
        show(["", "P + K·C", "K·(P + C)", "rollout s", "loss and gradient s", "ms / (P + K·C)",
              "ms / K·(P + C)"], rows)


QWEN3 = {  # hidden size, that of the MLP, layers, query heads, tied embeddings
    "0.6B": (1024, 3072, 28, 16, True), "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True), "8B": (4096, 12288, 36, 32, False),
    "14B": (5120, 17408, 40, 40, False), "32B": (5120, 25600, 64, 64, False)}
MEASURED = ["0.6B", "1.7B", "8B"]


def qwen3(size: str) -> Config:
    """The shape of a Qwen3: all have 8 key-value heads of size 128 and the same vocabulary."""
    hidden, inner, layers, heads, tied = QWEN3[size]
    return Config("qwen3", 151936, hidden, inner, layers, heads, 8, 128, rope_theta=1e6,
                  max_position_embeddings=40960, tie_word_embeddings=tied)


def moved(student: Transformer) -> Transformer:
    """A teacher that is not the student: every weight that is learned is a little off."""
    teacher = caopd.make_teacher(student, "same")
    for average, weight in zip(teacher.parameters(), student.parameters()):
        if weight.requires_grad:
            average.add_(torch.randn_like(average), alpha=0.02)
    return teacher


def whole_step(config: Config, flags: argparse.Namespace,
               args: caopd.Args) -> tuple[int, int, float, float]:
    """The numbers of weights and of those that are learned, and seconds of the last round's
    rollout and of its update: loss, gradient, AdamW and EMA, for a student with random weights."""
    device, dtype = torch.device(flags.device), getattr(torch, flags.dtype)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = Transformer(config)
        torch.set_default_dtype(torch.float32)
    if args.lora_rank:
        model.add_adapters(args.lora_rank, 2 * args.lora_rank)
    model.recompute, teacher = args.recompute, moved(model)
    optimizer = caopd.AdamW(model, args.weight_decay, args.clip)
    generator = torch.Generator(device).manual_seed(0)

    def follow() -> None:
        optimizer.step(0, 1e-6, generator)
        caopd.ema_update(teacher, model, 0.01, generator)

    sampling, update = 0.0, 0.0
    for _ in range(flags.rounds + 1):
        sampling, update = random_step(model, teacher, flags.prompt, K, flags.new)
        update += seconds(follow, device, 1)
    learned = sum(weight.numel() for weight in optimizer.parameters.values())
    return sum(p.numel() for p in model.parameters()), learned, sampling, update


def shape_args(flags: argparse.Namespace, *extra: str) -> caopd.Args:
    """A step's flags, for what it is to need in memory; `extra` says what saves some."""
    return caopd.parse_args([
        "--rollouts", str(K), "--max-new-tokens", str(flags.new), "--dtype", flags.dtype,
        "--micro-tokens", "1", "--eval-questions", "1", "--oracle", "0", "--paper-samples", "0",
        *extra])


def read_bytes(config: Config, flags: argparse.Namespace, weights: int) -> float:
    """What a rollout reads: each decoding step all weights, and on average this many keys and
    values."""
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * (
        flags.prompt + K * flags.new / 2)
    return flags.new * getattr(torch, flags.dtype).itemsize * (weights + cached)


def update_operations(weights: int, learned: int, tokens: int) -> float:
    """2 a weight and token: of the student's pass, of its gradient (once to go on to what stands
    before, and once for the weight itself where it is learned), of the teacher's pass."""
    return 2 * (3 * weights + learned) * tokens


def shape(config: Config, flags: argparse.Namespace, args: caopd.Args) -> dict:
    """Memory and speed of a step of a network of this shape with random weights; of one that does
    not fit, the estimated memory alone. Bytes, seconds, and shares of what the device can do."""
    device, dtype = torch.device(flags.device), getattr(torch, flags.dtype)
    tokens = flags.prompt + K * flags.new
    figures = {"estimated": sum(memory_needed(config, [flags.prompt], args).values())}
    if figures["estimated"] > memory_free(device):
        return figures
    rate, bandwidth = matrix_rate(dtype, device), memory_rate(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    weights, learned, sampling, update = whole_step(config, flags, args)
    read = read_bytes(config, flags, weights)
    return figures | {
        "peak": peak_memory(device), "rollout": sampling, "update": update,
        "tokens/s": K * flags.new / sampling, "of bandwidth": read / sampling / bandwidth,
        "of matrix rate": update_operations(weights, learned, tokens) / update / rate,
        "matrix rate": rate, "bandwidth": bandwidth}


def shapes(flags: argparse.Namespace) -> None:
    """Random weights in the shapes of Qwen3: speed needs no download."""
    args = shape_args(flags, "--rounding", "stochastic", "--recompute")
    print(f"{flags.device}, {flags.dtype}; one prompt, P = {flags.prompt}, K = {K}, "
          f"C = {flags.new}\n")
    rows = []
    for size in flags.sizes:
        its = shape(qwen3(size), flags, args)
        row = [size, f"{its['estimated'] / 2 ** 30:.0f}"]
        if "peak" not in its:
            rows.append(row + ["does not fit"] + [""] * 7)
            continue
        rows.append(row + [f"{its['peak'] / 2 ** 30:.0f}", f"{its['rollout']:.1f}",
                           f"{its['tokens/s']:.0f}", f"{its['of bandwidth']:.0%}",
                           f"{its['update']:.1f}", f"{its['of matrix rate']:.0%}",
                           f"{its['bandwidth'] / 1e9:.0f}", f"{its['matrix rate'] / 1e12:.1f}"])
    show(["Qwen3-", "estimated GiB", "peak GiB", "rollout s", "tokens/s", "of bandwidth",
          "update s", "of matrix rate", "GB/s", "TFLOP/s"], rows)


# ---------------------------------------------------------------------------------------- on paper

SAVINGS = {  # by what it is called in the table
    "all weights": (), "--recompute": ("--recompute",),
    "stochastic": ("--recompute", "--rounding", "stochastic"),
    "LoRA, rank 16": ("--recompute", "--lora-rank", "16")}
CARDS = {"24 GB card": (1.0e12, 165e12), "H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12)}
PLACES = {"24 GB card": (24, 1), "H100": (79, 1), "H200": (139, 1),  # GiB of a card, and how many
          "eight H100": (79, 8)}


def needed(size: str, saving: str, processes: int, flags: argparse.Namespace) -> dict[str, float]:
    """GiB of a step of one prompt on each card, by purpose."""
    args = shape_args(flags, *SAVINGS[saving], "--prompts", str(processes))
    parts = memory_needed(qwen3(size), [flags.prompt], args, processes)
    return {name: bytes / 2 ** 30 for name, bytes in parts.items()}


def memory(flags: argparse.Namespace) -> None:
    """What a step of one prompt is to need, by the formula that caopd.py prints before it starts,
    and the least time it can take: decoding waits for memory, the update for products. Then the
    same for each of eight cards that share weights, with a prompt of its own, and what fits where.
    """
    print(f"{flags.dtype}; one prompt, P = {flags.prompt}, K = {K}, C = {flags.new}: GiB needed, "
          "and the seconds of\nrollout + update at all of a card's bandwidth and matrix rate\n")
    rows, tokens = [], flags.prompt + K * flags.new
    for size in flags.sizes:
        config = qwen3(size)
        with torch.device("meta"):
            weights = sum(p.numel() for p in Transformer(config).parameters())
        read = read_bytes(config, flags, weights)
        products = update_operations(weights, weights, tokens)
        times = [f"{read / bandwidth:.1f} + {products / rate:.1f}"
                 for bandwidth, rate in CARDS.values()]
        rows.append([size, *(f"{sum(needed(size, saving, 1, flags).values()):.0f}"
                             for saving in SAVINGS), *times])
    show(["Qwen3-", *SAVINGS, *CARDS], rows)
    print("\nGiB on each of eight cards\n")
    show(["Qwen3-", *SAVINGS],
         [[size, *(f"{sum(needed(size, saving, 8, flags).values()):.0f}" for saving in SAVINGS)]
          for size in flags.sizes])
    print("\nThe first of these ways that fits, and what takes most of the card then\n")
    show(["Qwen3-", *PLACES], [[size, *(what_fits(size, *place, flags)
                                        for place in PLACES.values())] for size in flags.sizes])


def what_fits(size: str, room: float, processes: int, flags: argparse.Namespace) -> str:
    """The first of SAVINGS that fits into `room` GiB a card, and what takes most of it."""
    for saving in SAVINGS:
        parts = needed(size, saving, processes, flags)
        if sum(parts.values()) <= room:
            return f"{saving}: {max(parts, key=parts.get).split(',')[0]}"
    return "nothing"


# ------------------------------------------------------------------------------- the command line

def command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=("peers", "law", "shapes", "memory"))
    add("--model", default="", help="a Hugging Face model directory (peers, law)")
    add("--tool", default="", help="tool-use requests as JSONL (peers)")
    add("--device", default="cpu", help="[cpu]")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="[float32]")
    add("--rounds", type=int, default=3, help="counted rounds [3]")
    add("--batch", type=int, default=1, help="tool-use prompts a step (peers) [1]")
    add("--new", type=int, default=64, help="C, new tokens a completion (law, shapes, memory) [64]")
    add("--prompt", type=int, default=1024, help="P, tokens of the prompt (shapes, memory) [1024]")
    add("--sizes", nargs="+", choices=list(QWEN3), help="(shapes [0.6B 1.7B 8B], memory [all])")
    # These two say what a child process runs.
    add("--prompts", default="tool", choices=("tool", "short"), help=argparse.SUPPRESS)
    add("--job", choices=list(JOBS), help=argparse.SUPPRESS)
    return parser.parse_args()


def run(flags: argparse.Namespace) -> None:
    flags.sizes = flags.sizes or (MEASURED if flags.what == "shapes" else list(QWEN3))
    if flags.what in ("peers", "law") and not flags.model:
        raise BadInput(f"{flags.what} needs --model DIR")
    if flags.what == "peers" and not flags.tool and not (flags.job and flags.prompts == "short"):
        raise BadInput("peers needs --tool FILE.jsonl")
    if flags.job:
        taken = JOBS[flags.job](flags)
        print(json.dumps({"seconds": statistics.median(taken),
                          "memory": peak_memory(torch.device(flags.device))}))
    else:
        {"peers": peers, "law": law, "shapes": shapes, "memory": memory}[flags.what](flags)


def main() -> int:
    try:
        run(command_line())
    except BadInput as error:
        print("bench.py: error:", error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
