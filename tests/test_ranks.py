"""Runs on two and on four processes against the same runs on one: every figure, every weight, every
checkpoint. Also: a process that dies, and what several processes refuse."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks_worker import PATIENCE, as_torchrun, run
from safetensors.torch import load_file
from test_caopd import real_model  # noqa: F401 (a fixture)

import caopd
import pipeline
import ranks
from files import BadInput
from memory import memory_needed
from model import Config, Transformer

ROOT = Path(__file__).parents[1]
# 5 prompts and 3 questions divide by neither 2 nor 4, and a rank has several micro-batches.
COMMON = ["--steps", "2", "--rollouts", "3", "--teacher-rate", "0.2", "--max-new-tokens", "8",
          "--eval-questions", "3", "--oracle", "0", "--paper-samples", "0", "--device", "cpu"]
# Seed 5 asks questions that the worker's hash calls right at every update, as GRPO needs.
WORLD = [*COMMON, "--width", "16", "--layers", "2", "--sft-steps", "2", "--sft-documents", "5",
         "--prompts", "5", "--micro-tokens", "100", "--save-every", "1", "--seed", "5"]
REAL = [*COMMON, "--prompts", "3", "--lr", "1e-3"]  # with --model
RUNS = {
    "methods": [*WORLD, "--method", "opd,caopd,grpo"],
    # Two prompts leave two of four ranks without any. Contexts are lacking where no rollout is
    # right, and norms of two numbers leave ranks without a part of them.
    "few": [*WORLD, "--width", "8", "--layers", "1", "--prompts", "2", "--rollouts", "2",
            "--steps", "3", "--context", "solution", "--method", "caopd", "--oracle", "2",
            "--paper-samples", "1"],
    "untied, recomputed": [*REAL, "--dtype", "float32", "--method", "caopd-sc", "--recompute"],
    "adapters": [*REAL, "--dtype", "float32", "--method", "opd", "--lora-rank", "2",
                 "--save-adapter"],
    "bfloat16": [*REAL, "--dtype", "bfloat16", "--method", "opd"],
    "stochastic": [*REAL, "--dtype", "bfloat16", "--rounding", "stochastic", "--method", "opd"]}
ROUNDED = "bfloat16", "stochastic"  # to 8 bits, in another order by each number of processes
COMPARED = [(name, 2) for name in RUNS] + [("methods", 4), ("few", 4)]
INTERRUPTED = {"flags": [*WORLD, "--method", "caopd"], "stop": ["caopd", 0]}


def environment() -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, real_model):  # noqa: F811
    """The directory of each run, by its name and the number of processes."""
    root, found = tmp_path_factory.mktemp("ranks"), {}

    def job(name: str, processes: int, **given) -> dict:
        found[name, processes] = root / f"{name}-{processes}"
        flags = given.pop("flags", None) or RUNS[name]
        if name in RUNS and RUNS[name][:len(REAL)] == REAL:
            flags = ["--model", str(real_model), *flags]
        return {"flags": [*flags, "--out", str(found[name, processes])], **given}

    def resuming(name: str, processes: int) -> dict:
        """A job that goes on from the checkpoint of so many processes."""
        resumed = job(name, int(name[-1]), flags=INTERRUPTED["flags"])
        shutil.copytree(found["interrupted", processes], found[name, int(name[-1])])
        return resumed

    for name in RUNS:
        run(**job(name, 1))
    run(**job("interrupted", 1, **INTERRUPTED))
    of_two, of_four = ([job(name, n) for name, n in COMPARED if n == size] for size in (2, 4))
    jobs = [(2, [*of_two, job("interrupted", 2, **INTERRUPTED)]),
            (4, [*of_four, resuming("1 to 4", 1)])]
    subprocess.run([sys.executable, ROOT / "tests/ranks_worker.py", json.dumps(jobs)], check=True,
                   env=environment())
    run(**resuming("2 to 1", 2))
    return found


def read(path: Path):
    """The JSON of a file, or of each line of a .jsonl."""
    text = path.read_text()
    return list(map(json.loads, text.splitlines())) if path.suffix == ".jsonl" else json.loads(text)


def steps(out: Path, method: str) -> list[dict]:
    return [row for row in read(out / "metrics.jsonl") if row["stage"] == method]


def assert_close(found: object, expected: object, tolerance: float, where: str = "") -> None:
    """Compares nested figures, but for the seconds that they took."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected.keys() - {"seconds", "settings", "inputs"}:
            assert_close(found[key], expected[key], tolerance, f"{where} {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected)):
            assert_close(a, b, tolerance, f"{where} {i}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True), where
    else:
        assert found == expected, where


def assert_same_tensors(found: Path, expected: Path, tolerance: float = 2e-6) -> None:
    found, expected = load_file(found), load_file(expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=tolerance,
                                   atol=tolerance, msg=lambda words: f"{name}: {words}")


@pytest.mark.parametrize("name, processes", [its for its in COMPARED if its[0] not in ROUNDED])
def test_several_processes_do_what_one_does(outcomes, name, processes):
    alone, together = outcomes[name, 1], outcomes[name, processes]
    for file in ("metrics.jsonl", "results.json", "samples.jsonl", "answers/base.jsonl"):
        assert_close(read(together / file), read(alone / file), 2e-5)
    files = sorted(path.relative_to(alone) for path in alone.glob("*/**/*.safetensors"))
    assert files and files == sorted(
        path.relative_to(together) for path in together.glob("*/**/*.safetensors"))
    for file in files:  # AdamW divides by what may be a small gradient.
        assert_same_tensors(together / file, alone / file, 1e-5)


@pytest.mark.parametrize("name", ROUNDED)
def test_several_processes_do_about_what_one_does_in_bfloat16(outcomes, name):
    """The first step samples the same; later ones need not."""
    alone, together = outcomes[name, 1], outcomes[name, 2]
    assert_close(steps(together, "opd")[0], steps(alone, "opd")[0], 0.01)
    weights = "opd/model.safetensors"
    assert_same_tensors(together / weights, alone / weights, 0.01)


def test_the_runs_above_are_worth_comparing(outcomes):
    """Gradients are there, and contexts are lacking where they should be."""
    for (name, _), out in outcomes.items():
        rows = [row for row in read(out / "metrics.jsonl") if row["stage"] != "base"]
        assert rows and all(row["grad_norm"] > 0 or row["left_out"] for row in rows), name
    left_out = [row["left_out"] for row in steps(outcomes["few", 1], "caopd")]
    assert max(left_out) == 4 and min(left_out) < 4  # all of a step's rollouts, and not always


def test_checkpoints_are_those_of_one_process_gradients_included(outcomes):
    """After one update the first moment is a tenth of the gradient."""
    name = "caopd/checkpoint.safetensors"
    assert_same_tensors(outcomes["interrupted", 2] / name, outcomes["interrupted", 1] / name)


@pytest.mark.parametrize("name, processes", [("1 to 4", 4), ("2 to 1", 1)])
def test_a_run_goes_on_with_another_number_of_processes(outcomes, name, processes):
    out, whole = outcomes[name, processes], outcomes["methods", 1]
    assert_same_tensors(out / "caopd/model.safetensors", whole / "caopd/model.safetensors")
    assert_close(steps(out, "caopd"), steps(whole, "caopd"), 2e-5)


# ------------------------------------------------------------------- what a user sees of it


def test_a_killed_process_ends_all_with_one_sentence_and_the_run_resumes(tmp_path):
    out = tmp_path / "out"
    flags = [*WORLD, "--sft-steps", "100000", "--out", str(out)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", str(ROOT / "caopd.py"), *flags]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.STDOUT) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not (out / "base/checkpoint.safetensors").exists():
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.1)
            os.kill(int(children(process.pid)[1]), signal.SIGKILL)
            words, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode != 0
    assert words.count("The same command goes on from the last checkpoint.") == 1
    assert not re.search(r'File ".*(caopd|ranks)\.py"', words)  # torchrun's own report is another
    last = steps(out, "base")[-1]["step"]
    run(flags, stop=["base", last + 5])
    assert [row["step"] for row in steps(out, "base")] == list(range(last + 6))


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    pretend(monkeypatch, 1, 2)
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("auto", "cuda", "cuda:1"):
        assert str(pipeline.pick_device(name)) == "cuda:1"
    assert current == ["cuda:1"] * 3


def pretend(monkeypatch, rank: int, size: int) -> None:
    for name, value in as_torchrun(rank, size).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("flags, words", [
    (["--ask", "1+1"], "leave out torchrun"), (["--explain"], "leave out torchrun"),
    (["--teacher-device", "cpu"], "--teacher-device cpu: with several processes"),
    (["--device", "cuda:1"], "say --device cuda")])
def test_what_several_processes_refuse(monkeypatch, capsys, flags, words):
    pretend(monkeypatch, 0, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BadInput, match=re.escape(words)):
        pipeline.pick_device(caopd.parse_args(flags).device)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_shares_are_all_of_it_once_and_passes_are_as_many_on_every_rank(monkeypatch, size):
    costs = [3, 9, 4, 4, 20, 1, 1, 1, 6, 2, 8]
    for n in range(len(costs) + 1):
        batches = []
        for rank in range(size):
            pretend(monkeypatch, rank, size)
            batches.append(caopd.own_batches(costs[:n], 10))
            assert [i for batch in batches[-1] for i in batch] == ranks.share(list(range(n)))
            assert all(sum(costs[i] for i in batch) <= 10 or len(batch) == 1
                       for batch in batches[-1])
        assert len({len(its) for its in batches}) == 1
        assert not any(all(not its[k] for its in batches) for k in range(len(batches[0])))
        if size == 1:
            assert batches == [caopd.micro_batches(costs[:n], 10)]


def test_rank_0_has_the_random_numbers_of_one_process_and_no_two_ranks_have_the_same(monkeypatch):
    def drawn() -> int:
        return caopd.seeded(0, "rollout", 3, torch.device("cpu")).initial_seed()

    alone, seeds = drawn(), []
    for rank in range(4):
        pretend(monkeypatch, rank, 4)
        seeds.append(drawn())
    assert seeds[0] == alone and len(set(seeds)) == 4


def test_eight_processes_need_an_eighth_of_the_weights_and_a_copy_to_sample_from():
    config = Config("qwen3", 1000, 512, 2048, 8, 8, 4, 64, tie_word_embeddings=True)
    args = caopd.parse_args(["--max-new-tokens", "1", "--dtype", "bfloat16", "--recompute"])
    with torch.device("meta"):
        weights = sum(w.numel() for w in Transformer(config).parameters())
    alone, each = (memory_needed(config, [8], args, processes) for processes in (1, 8))
    for name in ("weights, gradient and optimizer", "teacher"):
        assert each[name] == alone[name] / 8
    assert alone["weights, gradient and optimizer"] == 16 * weights
    assert each["working memory"] > 2 * weights
    assert sum(each.values()) < sum(alone.values()) / 2


def test_a_world_size_that_torchrun_has_not_set_is_not_ours(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "64")  # as other launchers leave it behind
    assert ranks.size() == 1 and ranks.rank() == 0


def test_one_process_has_every_function_give_back_what_it_gets():
    items, weights = [1, 2], {"a": torch.ones(2)}
    assert ranks.share(items) is ranks.gather(items) is ranks.from_first(items) is items
    assert ranks.collected(weights) is weights and ranks.first()
    assert ranks.local(weights["a"]) is ranks.whole(weights["a"]) is weights["a"]
