"""Everything that a GPU must show, checked and measured by one command in about ten minutes.

    python tests/gpu.py                       all parts, on the first GPU
    python tests/gpu.py --parts toy,resume    some of them
    python tests/gpu.py --device cpu          in small, in minutes: it shows that this script works
    python tests/gpu.py --model DIR           with that model, TRL's step beside ours as well

It writes a table, and the same in --json (gpu.json). Weights are random, so nothing is downloaded.
Each part runs in a process of its own: one that fails, or that leaves the device unusable, hides
none of the others. The exit code is 1 where a part failed. Without a GPU, --device is cpu.

    toy         `python caopd.py`: under a minute, OPD says 1.00 and ranks nothing, CaOPD is honest
    sampler     with CUDA graphs and without, the same tokens, greedy ones the likeliest of a plain
                pass; on a second GPU too
    gradients   loss and gradient in float32, the CPU's; the teacher follows the student
    bfloat16    loss and gradient in bfloat16, those in float32
    rounding    stochastic rounding is right on average, and so is an EMA on an offloaded teacher
    recompute   --recompute and --teacher-device cpu: the same loss and gradient, in less memory
    resume      a run that was interrupted ends as one that was not
    memory      peak memory of a step in float32, and the estimate
    0.6B ...    Qwen3's shapes in bfloat16: memory, decoding as a share of the memory bandwidth, a
                training step as a share of the rate of matrix products
    peers       transformers: the same logits, and the time of its sampler; TRL with --model
    ...-lora    sampler (against the merged model), gradients, bfloat16, resume, memory, 0.6B ...
                as --lora-rank has them: adapters, on weights that student and teacher share; what
                they save in memory and time shows beside the part that learns all weights
"""

import argparse
import copy
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import bench
import caopd
import model as network
import optim
import pipeline
from model import Config, Transformer, generate

TIME_LIMIT = 150  # seconds of a part
TOKENS = 2000  # of the random vocabulary


class Missing(Exception):
    """What a part needs and is not there: it is left out, and has not failed."""


def check(holds: bool, wish: str) -> None:
    if not holds:
        raise AssertionError(f"it should be that {wish}")


# -------------------------------------------------------------------------------- what parts share

def random_model(device: torch.device, dtype: torch.dtype = torch.float32,
                 rank: int = 0) -> Transformer:
    """Random weights with shared heads, large enough to be uneven: logits spread over some nats.

    rank: of the adapters on them, which are float32; 0 is none.
    """
    big = device.type == "cuda"
    hidden, layers = (512, 8) if big else (64, 2)
    torch.manual_seed(0)
    made = Transformer(Config("qwen3", TOKENS, hidden, 3 * hidden, layers, 8, 2, hidden // 8))
    made = made.to(device, dtype)
    return adapted(made, rank) if rank else made


def adapted(made: Transformer, rank: int) -> Transformer:
    """Gives a model adapters of this rank that have learned something; returns it."""
    made.add_adapters(rank, alpha=2 * rank)
    for adapter in made.adapters().values():  # At zero, B would leave A without a gradient.
        torch.nn.init.normal_(adapter.lora_B, std=0.1)
    return made


def targets(prompts: int, prompt: int, samples: int, new: int) -> list[caopd.Target]:
    """Random prompts with a longer one for the teacher, and random completions."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(TOKENS, (count,), generator=generator).tolist()

    return [caopd.Target(tokens(prompt + i), tokens(prompt + 9),
                         {caopd.Completion(tuple(tokens(new - i - k % 2)), new // 2): 1
                          for k in range(samples)}) for i in range(prompts)]


def gradient(student: Transformer, teacher: Transformer,
             learned: list[caopd.Target]) -> tuple[float, torch.Tensor]:
    """The loss of Eq. 7 and its gradient, float32 on the CPU, of a student that has none yet. The
    gradient is that of the weights that it learns."""
    losses = caopd.accumulate_gradient(student, teacher, learned, caopd.kl,
                                       caopd.target_cross_entropy, skip_tokens=0, scale=1e-3)
    grads = [weight.grad.float().cpu().flatten() for weight in student.parameters()
             if weight.requires_grad]
    student.zero_grad()
    return losses[0] + losses[1], torch.cat(grads)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def peak(device: torch.device, work) -> float:
    """GiB that work() takes at most, beside what is held already; 0 on a CPU, which cannot say."""
    if device.type != "cuda":
        work()
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return (torch.cuda.max_memory_allocated(device) - before) / 2 ** 30


# ---------------------------------------------------------------------------------------- the parts

SMALL_WORLD = ["--width", "16", "--layers", "1", "--sft-steps", "6", "--sft-documents", "8",
               "--steps", "4", "--prompts", "4", "--rollouts", "3", "--eval-questions", "24",
               "--oracle", "0", "--paper-samples", "0", "--method", "opd,caopd",
               "--teacher-rate", "0.1"]


def toy(device: torch.device, flags: argparse.Namespace) -> dict:
    small, began = device.type == "cpu", time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        code = caopd.main(["--out", out, "--device", str(device)] + SMALL_WORLD * small)
        check(code == 0, "the run ends with exit code 0")
        results = json.loads((Path(out) / "results.json").read_text())
    opd, ours, taken = results["opd"], results["caopd"], time.perf_counter() - began
    figures = {"toy_seconds": taken, "opd_says": opd["mean_confidence"], "opd_spr": opd["spr"],
               "caopd_ece": ours["ece"], "caopd_spr": ours["spr"], "caopd": ours["accuracy"]}
    if not small:
        check(taken < 60, f"the toy takes under a minute, and not {taken:.0f} seconds")
        check(opd["mean_confidence"] > 0.99 and opd["spr"] < 0.02, f"OPD says 1.00: {figures}")
        check(ours["ece"] < 0.12 and ours["spr"] > 0.8, f"CaOPD is honest: {figures}")
    return figures


class Plain(network.Decoder):
    """A decoder that never asks for a graph."""

    def __init__(self, *args):
        super().__init__(*args)
        self.stream = None


def shortfall(model: Transformer, prompt: list[int], completion: list[int]) -> float:
    """How far below the likeliest token's logit those of the completion are, at most."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion], device=model.device))
    logits = logits[0, len(prompt) - 1:-1]
    chosen = logits[range(len(completion)), completion]
    return (logits.max(-1).values - chosen).max().item()


def sampler(device: torch.device, flags: argparse.Namespace, rank: int = 0) -> dict:
    figures = {}
    devices = [device] if device.type == "cpu" else [
        torch.device("cuda", i) for i in range(min(2, torch.cuda.device_count()))]
    prompts = [target.prompt for target in targets(3, 20, 1, 8)]
    for place in devices:
        made = random_model(place, rank=rank)
        merged = Transformer.from_weights(made.config, made.merged()).to(place)
        for name, options in (("greedy", {"temperature": 0.0}), ("sampled", {"top_p": 0.95})):
            drawn = {}
            for kind, decoder in (("graph", network.Decoder), ("plain", Plain)):
                draw = partial(generate, made, prompts, 80, num_samples=4, eos_ids=range(20),
                               generator=torch.Generator(place).manual_seed(0), **options)
                with patch.object(network, "Decoder", decoder), warnings.catch_warnings():
                    warnings.simplefilter("error")  # of a graph that could not be recorded
                    began = bench.wait(place)
                    drawn[kind] = draw()
                    figures[f"{name}_{kind}_s"] = bench.wait(place) - began
            check(drawn["graph"] == drawn["plain"], f"{name} tokens are the same on {place}")
            if name == "greedy":  # The same tokens would be too much: logits may all but tie.
                off = max(shortfall(merged, prompts[i // 4], ids)
                          for i, ids in enumerate(drawn["graph"]))
                check(off < 1e-3, f"they are the plain pass's likeliest, and not {off:.1e} below")
        check(len(set(map(len, drawn["plain"]))) > 1, "samples end at different lengths")
    return figures | {"below_likeliest": off, "devices": len(devices)}


def gradients(device: torch.device, flags: argparse.Namespace, rank: int = 0) -> dict:
    student, learned = random_model(device, rank=rank), targets(3, 40, 4, 12)
    teacher = bench.moved(student)
    loss, grad = gradient(copy.deepcopy(student).cpu(), copy.deepcopy(teacher).cpu(), learned)
    found, its = gradient(student, teacher, learned)
    figures = {"loss": loss, "loss_off": abs(found / loss - 1), "gradient_off": distance(its, grad)}
    check(figures["loss_off"] < 1e-4 and figures["gradient_off"] < 1e-3, f"they agree: {figures}")
    caopd.ema_update(teacher, student, 1.0, torch.Generator(device))
    check(all(map(torch.equal, teacher.parameters(), student.parameters())),
          "a teacher that follows all the way ends as the student")
    return figures


def bfloat16(device: torch.device, flags: argparse.Namespace, rank: int = 0) -> dict:
    stored = torch.bfloat16 if rank else torch.float32  # as `pipeline.load_model` has it
    student, learned = random_model(device, stored, rank), targets(3, 40, 4, 12)
    teacher, results = bench.moved(student), []
    for dtype in (torch.float32, torch.bfloat16):
        student.compute_dtype = teacher.compute_dtype = dtype
        results.append(gradient(student, teacher, learned))
    (loss, grad), (found, its) = results
    args = caopd.parse_args(["--model", "any"])
    figures = {"loss_off": abs(found / loss - 1), "gradient_off": distance(its, grad),
               "auto": pipeline.pick_dtype(args, device)}
    check(figures["loss_off"] < 0.05 and figures["gradient_off"] < 0.2, f"near: {figures}")
    return figures


def rounding(device: torch.device, flags: argparse.Namespace) -> dict:
    generator = torch.Generator(device).manual_seed(0)
    value = torch.full((2 ** 20,), 1 + 2 ** -10, device=device)  # an eighth of the way up
    rounded = optim.round_stochastically(value, generator).float()
    up = (rounded > 1).float().mean().item()
    check(set(rounded.unique().tolist()) == {1.0, 1 + 2 ** -7}, "values go to their neighbours")
    check(abs(up - 1 / 8) < 0.002, f"an eighth of them go up, and not {up:.4f}")

    student = random_model(device, torch.bfloat16)
    teacher, rate, followed = caopd.make_teacher(student, "cpu"), 1e-3, 40
    before = torch.cat([w.flatten().float().cpu() for w in teacher.parameters()])
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(1.0)
    for _ in range(followed):  # steps that rounding to the nearest would lose
        caopd.ema_update(teacher, student, rate, generator)
    after = torch.cat([w.flatten().float().cpu() for w in teacher.parameters()])
    share = (after - before).mean().item() / (1 - (1 - rate) ** followed)
    check(abs(share - 1) < 0.05, f"an EMA in bfloat16 goes all of its way, and not {share:.3f}")
    optimizer = caopd.AdamW(student, 0.0, 1.0)
    matrix = student.model.layers[-1].mlp.down_proj.weight
    still = matrix.detach().clone()
    caopd.accumulate_gradient(student, teacher, targets(1, 20, 2, 8), caopd.kl, caopd.kl, 0, 1e-3)
    norm = optimizer.step(0, 1e-4, generator)
    changed = (matrix != still).float().mean().item()
    check(0 < norm and 0 < changed < 0.5, f"a small update moves some: {changed:.3f}")
    return {"up": up, "ema": share, "moved": changed}


def recompute(device: torch.device, flags: argparse.Namespace) -> dict:
    student, learned = random_model(device), targets(4, 200, 4, 40)
    teacher, results, figures = bench.moved(student), {}, {}
    variants = {"plain": (False, "same"), "recompute": (True, "same"), "offloaded": (False, "cpu")}
    for name, (again, place) in variants.items():
        student.recompute = again
        scorer = caopd.make_teacher(teacher, place)
        figures[f"{name}_gib"] = peak(device, lambda: results.update(
            {name: gradient(student, scorer, learned)}))
    for name in ("recompute", "offloaded"):
        off = distance(results[name][1], results["plain"][1])
        check(off < 1e-4, f"{name} leaves the gradient as it is, and not {off:.1e} off")
        check(abs(results[name][0] / results["plain"][0] - 1) < 1e-5, f"{name} leaves the loss")
        figures[f"{name}_off"] = off
    check(device.type == "cpu" or figures["recompute_gib"] < 0.7 * figures["plain_gib"],
          f"--recompute saves memory: {figures}")
    return figures


def resume(device: torch.device, flags: argparse.Namespace, rank: int = 0) -> dict:
    step, adapters = caopd.AdamW.step, ["--lora-rank", str(rank), "--save-adapter"] * bool(rank)

    def ended(out: str, interrupted_at: int | None) -> torch.Tensor:
        """The weights of a run, which may be interrupted and given again."""
        argv = ["--out", out, "--device", str(device), "--save-every", "2", *adapters, *SMALL_WORLD]
        calls = iter(range(10 ** 6))

        def interrupting(*args):
            if next(calls) == interrupted_at:
                raise KeyboardInterrupt
            return step(*args)

        with patch.object(caopd.AdamW, "step", interrupting):
            codes = [caopd.main(argv)] + [caopd.main(argv)] * (interrupted_at is not None)
        check(codes == [0] or codes == [130, 0], f"the exit codes are 0, or 130 and 0: {codes}")
        trained = Transformer.from_pretrained(Path(out) / "caopd")
        return torch.cat([weight.flatten() for weight in trained.parameters()])

    with tempfile.TemporaryDirectory() as out:
        whole, again, resumed = (ended(f"{out}/{name}", at) for name, at in (
            ("whole", None), ("again", None), ("resumed", 13)))  # in CaOPD, after a checkpoint
    figures = {"resumed_off": distance(resumed, whole), "again_off": distance(again, whole),
               "equal": torch.equal(resumed, whole)}
    # A GPU adds up in any order, so that two whole runs may differ, too.
    check(figures["resumed_off"] <= 1e-3 + 10 * figures["again_off"], f"it is the run's: {figures}")
    check(device.type == "cuda" or figures["equal"], "it is the run's to the last bit")
    return figures


def measured(config: Config, device: torch.device, dtype: str, long: bool, *extra: str) -> dict:
    """Figures of `bench.shape`, whose memory has to be near the estimate."""
    prompt, new, rounds = (1024, 64, 1) if long else (64, 8, 1)
    work = argparse.Namespace(device=str(device), dtype=dtype, prompt=prompt, new=new,
                              rounds=rounds)
    figures = bench.shape(config, work, bench.shape_args(work, *extra))
    if "peak" not in figures:
        raise Missing(f"{figures['estimated'] / 2 ** 30:.0f} GiB are needed")
    ratio = figures["peak"] / figures["estimated"]
    if device.type == "cuda":
        check(0.6 < ratio < 1.1, f"peak memory is near the estimate, and not {ratio:.2f} of it")
    return figures | {"peak/estimated": ratio}


def memory(device: torch.device, flags: argparse.Namespace, rank: int = 0) -> dict:
    big = device.type == "cuda"
    config = bench.qwen3("0.6B") if big else random_model(device).config
    return measured(config, device, "float32", big, "--lora-rank", str(rank))


def shape(size: str, device: torch.device, flags: argparse.Namespace, rank: int = 0) -> dict:
    if device.type == "cpu":
        raise Missing("it needs a GPU")
    return measured(bench.qwen3(size), device, "bfloat16", True, "--rounding", "stochastic",
                    "--recompute", "--lora-rank", str(rank))


def peers(device: torch.device, flags: argparse.Namespace) -> dict:
    if importlib.util.find_spec("transformers") is None:
        raise Missing("it needs pip install transformers, and trl datasets for TRL")
    from transformers import AutoModelForCausalLM
    ours, prompt = random_model(device), torch.arange(1, 41, device=device)[None]
    with tempfile.TemporaryDirectory() as directory:
        ours.save_pretrained(directory)
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device)
    with torch.no_grad():
        off = distance(ours(prompt).cpu(), theirs(prompt).logits.float().cpu())
    check(off < 1e-3, f"the logits are the same, and not {off:.1e} off")
    figures = {"logits_off": off, "our_sampler_s": bench.seconds(
        lambda: generate(ours, prompt.tolist(), 64, num_samples=8), device, 2)}
    figures["their_sampler_s"] = bench.seconds(lambda: theirs.generate(
        prompt, do_sample=True, top_k=0, num_return_sequences=8, min_new_tokens=64,
        max_new_tokens=64), device, 2)
    if flags.model:
        job = argparse.Namespace(model=flags.model, tool="", device=str(device), rounds=2, batch=1,
                                 dtype="float32", new=16, prompts="short")
        for name in ("our step", "TRL"):
            if done := bench.child(job, name):
                figures[f"{name}_s"] = done["seconds"]
                figures[f"{name}_gib"] = done["memory"] / 2 ** 30
    return figures


PARTS = {"toy": toy, "sampler": sampler, "gradients": gradients, "bfloat16": bfloat16,
         "rounding": rounding, "recompute": recompute, "resume": resume, "memory": memory,
         **{size: partial(shape, size) for size in bench.MEASURED}, "peers": peers}
PARTS |= {f"{name}-lora": partial(PARTS[name], rank=16) for name in (
    "sampler", "gradients", "bfloat16", "resume", "memory", *bench.MEASURED)}


# -------------------------------------------------------------------------------- how they are run

def outcome(name: str, flags: argparse.Namespace) -> dict:
    """Runs a part here; returns its figures, and what became of it."""
    began, result = time.perf_counter(), {"part": name, "figures": {}, "reason": ""}
    try:
        figures = PARTS[name](pipeline.pick_device(flags.device), flags)
        result |= {"figures": figures, "status": "ok"}
    except Missing as missing:
        result |= {"status": "left out", "reason": str(missing)}
    except Exception as error:  # Whatever it is, it goes into the table, and the next part runs.
        result |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    return result | {"seconds": time.perf_counter() - began}


def apart(name: str, flags: argparse.Namespace) -> dict:
    """`outcome` in a process of its own, within TIME_LIMIT."""
    command = [sys.executable, __file__, "--only", name, "--device", flags.device,
               "--model", flags.model]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True)
        try:
            process.wait(TIME_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        said.seek(0)
        last = (said.read().strip().splitlines() or [""])[-1]
    if process.returncode == 0:
        return json.loads(last)
    return {"part": name, "status": "failed", "figures": {}, "seconds": TIME_LIMIT,
            "reason": f"exit code {process.returncode}: {last}"}


def shown(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def line(result: dict) -> str:
    figures = ", ".join(f"{name} {shown(value)}" for name, value in result["figures"].items())
    said = " ".join(f"{figures} {result['reason']}".split())
    return f"{result['part']:15}{result['status']:10}{result['seconds']:6.0f} s  {said}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="auto", help="cuda, cuda:i or cpu [the first GPU, else cpu]")
    add("--parts", default=",".join(PARTS), help="separated by commas [all]")
    add("--model", default="", help="a Hugging Face model directory, for TRL beside our step")
    add("--json", default="gpu.json", help="[gpu.json]")
    add("--only", choices=list(PARTS), help=argparse.SUPPRESS)  # for a process of its own
    flags = parser.parse_args(argv)
    flags.device = str(pipeline.pick_device(flags.device))
    if flags.only:
        print("\n" + json.dumps(outcome(flags.only, flags)))
        return 0
    if unknown := set(flags.parts.split(",")) - PARTS.keys():
        parser.error(f"--parts: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    results, began = [], time.perf_counter()
    gpu = flags.device != "cpu"
    machine = {"device": torch.cuda.get_device_name(flags.device) if gpu else "cpu",
               "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    for name in flags.parts.split(","):
        results.append(apart(name, flags))
        print(line(results[-1]), flush=True)
        report = machine | {"seconds": time.perf_counter() - began, "parts": results}
        Path(flags.json).write_text(json.dumps(report, indent=2) + "\n")
    failed = [result["part"] for result in results if result["status"] == "failed"]
    print(f"{len(results)} parts in {report['seconds']:.0f} seconds, "
          f"failed: {', '.join(failed) or 'none'}; everything is in {flags.json}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
