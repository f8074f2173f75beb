"""Speed and memory, beside the libraries one would otherwise reach for, measured in the same run and in turn.

    pip install transformers trl datasets
    python tests/bench.py peers --model smollm2 --tool tooluse_test.jsonl    sampler and training step against transformers and TRL
    python tests/bench.py law --model smollm2                                what a step costs as K and P grow
    python tests/bench.py shapes --device cuda --dtype bfloat16              Qwen3 shapes with random weights, on a GPU

Not a test: pytest does not collect it, and nothing here asserts a time. Every measurement of `peers` runs in a process
of its own, so that its peak memory is its own; completions never end early, so that the work is equal.
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
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "theory")]

import caopd
import data
from model import Config, ModelError, Transformer, generate
from worlds import show

K = 8


# ----------------------------------------------------------------------------- measuring

def wait(device: torch.device) -> float:
    """The time, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(work, device: torch.device, rounds: int) -> float:
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


# ----------------------------------------------------------------------------- the work, ours and the peers'

def questions(flags) -> tuple[list[data.Example], int]:
    """The prompts of a step that is not counted and of the rounds that are, and how many make a step.

    Tool-use requests, of the quartiles' lengths in turn, --batch at a time; or short arithmetic in words, four at a time.
    """
    if flags.prompts == "tool":
        examples = sorted(data.load_jsonl(flags.tool, "tool"), key=lambda example: len(example.question))
        quarters = islice(chain([2], cycle([1, 2, 3])), flags.batch * (flags.rounds + 1))
        return [examples[len(examples) * quarter // 4] for quarter in quarters], flags.batch
    return data.arithmetic_task(0, 8, words=True).draw(4 * (flags.rounds + 1), "bench", 0), 4


def endless(directory: str) -> data.Tokenizer:
    """The tokenizer without an end token, so that completions never end early."""
    tokenizer = data.Tokenizer.from_pretrained(directory)
    tokenizer.eos_ids = [-1]
    return tokenizer


def settings(flags) -> caopd.Args:
    return caopd.parse_args(["--model", flags.model, "--steps", str(flags.rounds + 1), "--rollouts", str(K), "--lr", "1e-6", "--method", "opd",
                             "--max-new-tokens", str(flags.new), "--micro-tokens", "2048", "--device", flags.device, "--dtype", flags.dtype])


def chats(example: data.Example) -> tuple[list[dict], list[dict]]:
    """What the student and OPD's teacher read: x and (x, z)."""
    return data.student_messages(example, data.WORDS), data.teacher_messages(example, data.WORDS, data.stated(example.demo, 1.0))


def privileged(example: data.Example) -> str:
    """What the teacher's message adds to the student's."""
    student, teacher = (chat[-1]["content"] for chat in chats(example))
    return teacher.removeprefix(student)


def our_sampler(flags) -> list[float]:
    tokenizer, device = endless(flags.model), torch.device(flags.device)
    model = Transformer.from_pretrained(flags.model, getattr(torch, flags.dtype), device)
    examples, step = questions(flags)
    prompts = [tokenizer.chat(data.student_messages(example, data.WORDS)) for example in examples[step:]]
    return [seconds(lambda: generate(model, prompts[i:i + step], flags.new, num_samples=K), device, 1)
            for i in range(0, len(prompts), step)]


def their_sampler(flags) -> list[float]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    device, tokenizer = torch.device(flags.device), AutoTokenizer.from_pretrained(flags.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=getattr(torch, flags.dtype)).to(device)
    examples, step = questions(flags)
    asked = [data.student_messages(example, data.WORDS) for example in examples[step:]]

    def work(i: int):
        batch = tokenizer.apply_chat_template(asked[i:i + step], add_generation_prompt=True, padding=True, return_tensors="pt",
                                              return_dict=True).to(device)
        model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, min_new_tokens=flags.new, max_new_tokens=flags.new,
                       num_return_sequences=K)
    return [seconds(lambda: work(i), device, 1) for i in range(0, len(asked), step)]


def our_step(flags, recompute: bool) -> list[float]:
    examples, step = questions(flags)
    args = dataclasses.replace(settings(flags), prompts=step, save_every=10 ** 6, recompute=recompute)
    task = data.Task(data.WORDS, lambda n, stage, i: examples[n * i:n * (i + 1)], [])
    model = Transformer.from_pretrained(flags.model, getattr(torch, flags.dtype), flags.device)
    with tempfile.TemporaryDirectory() as out:
        caopd.distill(model, endless(flags.model), task, "opd", args, Path(out))
        return [json.loads(line)["seconds"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()][1:]


def their_step(flags, checkpointing: bool) -> list[float]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    args, (examples, step), taken = settings(flags), questions(flags), []
    backward = flags.batch if flags.prompts == "tool" else 1  # passes a step: long prompts one by one, as ours by --micro-tokens

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = wait(torch.device(flags.device))

        def on_step_end(self, *_, **__):
            taken.append(wait(torch.device(flags.device)) - self.began)
    rows = [{"prompt": data.student_messages(example, data.WORDS), "privileged_context": privileged(example)} for example in examples]
    with tempfile.TemporaryDirectory() as out:
        config = SDFTConfig(
            output_dir=out, max_steps=args.steps, per_device_train_batch_size=step * K // backward, gradient_accumulation_steps=backward,
            num_generations=K, max_prompt_length=None, max_completion_length=flags.new,
            generation_kwargs={"min_new_tokens": flags.new}, temperature=1.0, top_k=0, top_p=1.0,
            distillation_mode="full_logits", distillation_alpha=1.0, num_loss_tokens_to_skip=0, teacher_model_kind="ema",
            teacher_update_rate=args.teacher_rate, teacher_sync_steps=1, teacher_prompt_template="{prompt}{privileged_context}",
            learning_rate=args.lr, bf16=False, gradient_checkpointing=checkpointing, shuffle_dataset=False, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=flags.device == "cpu")
        model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=getattr(torch, flags.dtype))
        tokenizer = AutoTokenizer.from_pretrained(flags.model, padding_side="left")
        SDFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()]).train()
    return taken[1:]


JOBS = {"our sampler": our_sampler, "transformers": their_sampler,
        "our step": partial(our_step, recompute=False), "our step, --recompute": partial(our_step, recompute=True),
        "TRL": partial(their_step, checkpointing=False), "TRL, checkpointing": partial(their_step, checkpointing=True)}
WORK = {"sampler": ("our sampler", "transformers"),
        "training step": ("our step", "TRL", "our step, --recompute", "TRL, checkpointing")}


# ----------------------------------------------------------------------------- peers

def child(flags, job: str) -> dict | None:
    """Runs a job in a process of its own; None, with one sentence, where its library is missing."""
    names = ("model", "tool", "device", "dtype", "rounds", "batch", "new", "prompts")
    command = [sys.executable, __file__, "peers", "--job", job, *(str(part) for name in names for part in (f"--{name}", getattr(flags, name)))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["failed"])[-1]
        print(f"{job}: {reason} (the peers need pip install transformers trl datasets)", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def useful_operations(flags) -> tuple[float, float]:
    """Floating-point operations that a rollout and a whole step cannot do without, mean over rounds: 2 a weight and token."""
    config, tokenizer, (examples, step) = Config.from_pretrained(flags.model), endless(flags.model), questions(flags)
    with torch.device("meta"):
        layers = sum(p.numel() for p in Transformer(config).model.layers.parameters())
    head, rollouts, steps = config.vocab_size * config.hidden_size, [], []
    for example in examples[step:]:
        student, teacher = (len(tokenizer.chat(chat)) for chat in chats(example))
        new = K * flags.new
        rollouts.append(2 * (layers * (student + new) + head * new))
        steps.append(rollouts[-1] + 2 * (layers * (3 * (student + new) + teacher + new) + head * 4 * new))
    return step * statistics.mean(rollouts), step * statistics.mean(steps)


def peers(flags) -> None:
    rate = matrix_rate(getattr(torch, flags.dtype), torch.device(flags.device))
    print(f"{flags.device}, {flags.dtype}, {torch.get_num_threads()} threads, matrix products at {rate / 1e9:.0f} GFLOP/s; median of {flags.rounds} rounds")
    for flags.prompts, flags.new in (("tool", 64), ("short", 16)):
        prompts, new = questions(flags)[1], flags.new
        for (work, jobs), operations in zip(WORK.items(), useful_operations(flags)):
            results = {job: result for job in jobs if (result := child(flags, job))}  # ours and theirs in turn
            mine, rows = results.get(jobs[0]), []
            for job, its in results.items():
                times, more = (its[key] / mine[key] if mine else math.nan for key in ("seconds", "memory"))
                rows.append([job, f"{its['seconds']:.2f}", f"{prompts * K * new / its['seconds']:.0f}", f"{its['memory'] / 2 ** 30:.2f}",
                             f"{operations / its['seconds'] / rate:.0%}", f"{times:.2f}", f"{more:.2f}"])
            print(f"\n{work}, {flags.prompts} prompts: {prompts} x {K} completions of {new} tokens")
            show(["", "seconds", "new tokens/s", "peak GiB", "of matrix rate", "seconds / ours", "memory / ours"], rows)


# ----------------------------------------------------------------------------- law, shapes

def random_step(model: Transformer, prompt: int, samples: int, new: int, args: caopd.Args, teacher: Transformer) -> tuple[float, float]:
    """Seconds of a rollout, and of its loss with its gradient, for one prompt of random tokens."""
    device, vocabulary = model.device, model.config.vocab_size
    ids = torch.randint(vocabulary, (prompt,)).tolist()
    began = wait(device)
    completions = generate(model, [ids], new, num_samples=samples)
    sampled = wait(device)
    target = caopd.Target(ids, ids, completions, [new] * samples, [False] * samples)
    caopd.distillation_backward(model, teacher, [target], 1.0, args)
    return sampled - began, wait(device) - sampled


def law(flags) -> None:
    model = Transformer.from_pretrained(flags.model, getattr(torch, flags.dtype), flags.device)
    args, new = settings(flags), flags.new
    random_step(model, 64, 2, 4, args, model)
    for title, cases in ((f"K at P = 512, C = {new}", [(512, k) for k in (1, 2, 4, 8, 16)]),
                         (f"P at K = {K}, C = {new}", [(p, K) for p in (128, 256, 512, 1024, 2048)])):
        rows = []
        for prompt, samples in cases:
            runs = [random_step(model, prompt, samples, new, args, model) for _ in range(flags.rounds)]
            rollout, update = map(statistics.median, zip(*runs))
            ours, copies = prompt + samples * new, samples * (prompt + new)
            rows.append([f"P = {prompt}, K = {samples}", ours, copies, f"{rollout:.2f}", f"{update:.2f}", f"{1000 * update / ours:.1f}",
                         f"{1000 * update / copies:.1f}"])
        print(f"\n{title}")
        show(["", "P + K·C", "K·(P + C)", "rollout s", "loss and gradient s", "ms / (P + K·C)", "ms / K·(P + C)"], rows)


QWEN3 = {"0.6B": (1024, 3072, 28, 16, True), "1.7B": (2048, 6144, 28, 16, True), "8B": (4096, 12288, 36, 32, False)}


def shapes(flags) -> None:
    """Random weights in the shapes of Qwen3 (8 key-value heads of size 128, a vocabulary of 151,936): speed needs no download."""
    device, dtype = torch.device(flags.device), getattr(torch, flags.dtype)
    rate, bandwidth, rows = matrix_rate(dtype, device), memory_rate(device), []
    for name in flags.sizes:
        hidden, inner, layers, heads, tied = QWEN3[name]
        config = Config("qwen3", 151936, hidden, inner, layers, heads, 8, 128, max_position_embeddings=40960, rope_theta=1e6,
                        tie_word_embeddings=tied)
        args = caopd.parse_args(["--rollouts", str(K), "--max-new-tokens", str(flags.new), "--dtype", flags.dtype, "--recompute",
                                 "--micro-tokens", "1", "--rounding", "stochastic"])
        needed = sum(caopd.memory_needed(config, flags.prompt + K * flags.new, args).values())
        if needed > caopd.memory_free(device):
            rows.append([name, f"{needed / 2 ** 30:.0f}", *["does not fit"] + [""] * 5])
            continue
        with torch.device(device):
            torch.set_default_dtype(dtype)
            model, teacher = Transformer(config), Transformer(config).requires_grad_(False)
            torch.set_default_dtype(torch.float32)
        model.recompute, optimizer = True, caopd.Optimizer(model, 1e-6, 100, args)
        weights, (sampling, update) = sum(p.numel() for p in model.parameters()), (0.0, 0.0)
        for _ in range(flags.rounds + 1):  # the last one counts
            sampling, update = random_step(model, flags.prompt, K, flags.new, args, teacher)
            generator = torch.Generator(device).manual_seed(0)
            averages = list(teacher.parameters())
            update += seconds(lambda: (optimizer.step(generator), caopd.ema_update(averages, optimizer.weights, 0.01, generator)), device, 1)
        size, tokens = dtype.itemsize, flags.prompt + K * flags.new
        cache = 2 * layers * 8 * 128 * (flags.prompt + K * flags.new / 2)  # numbers that a decode step reads on average
        read = flags.new * size * (weights + cache)
        rows.append([name, f"{needed / 2 ** 30:.0f}", f"{peak_memory(device) / 2 ** 30:.0f}", f"{sampling:.1f}",
                     f"{K * flags.new / sampling:.0f}", f"{read / sampling / bandwidth:.0%}", f"{update:.1f}",
                     f"{2 * weights * 4 * tokens / update / rate:.0%}"])
        del model, teacher, optimizer, averages
    print(f"{flags.device}, {flags.dtype}: matrix products at {rate / 1e12:.1f} TFLOP/s, reading at {bandwidth / 1e9:.0f} GB/s; "
          f"one prompt, P = {flags.prompt}, K = {K}, C = {flags.new}\n")
    show(["Qwen3-", "estimated GiB", "peak GiB", "rollout s", "tokens/s", "of bandwidth", "update s", "of matrix rate"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("peers", "law", "shapes"))
    parser.add_argument("--model", default="", help="a Hugging Face model directory (peers, law)")
    parser.add_argument("--tool", default="", help="tool-use requests as JSONL (peers)")
    parser.add_argument("--device", default="cpu", help="[cpu]")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="[float32]")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds [3]")
    parser.add_argument("--batch", type=int, default=1, help="tool-use prompts a step (peers) [1]")
    parser.add_argument("--new", type=int, default=64, help="C, new tokens a completion (law, shapes) [64]")
    parser.add_argument("--prompt", type=int, default=1024, help="P, tokens of the prompt (shapes) [1024]")
    parser.add_argument("--sizes", nargs="+", default=list(QWEN3), choices=list(QWEN3), help="(shapes) [all]")
    parser.add_argument("--prompts", default="tool", choices=("tool", "short"), help=argparse.SUPPRESS)
    parser.add_argument("--job", choices=list(JOBS), help=argparse.SUPPRESS)  # what a child process runs
    flags = parser.parse_args()
    try:
        if flags.job:
            taken = JOBS[flags.job](flags)
            print(json.dumps({"seconds": statistics.median(taken), "memory": peak_memory(torch.device(flags.device))}))
        elif flags.what != "shapes" and not flags.model or flags.what == "peers" and not flags.tool:
            raise caopd.UsageError(f"{flags.what} needs --model DIR" + (" and --tool FILE.jsonl" if flags.what == "peers" else ""))
        else:
            {"peers": peers, "law": law, "shapes": shapes}[flags.what](flags)
    except (caopd.UsageError, data.DataError, ModelError) as error:
        print("bench.py: error:", error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
