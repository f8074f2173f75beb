"""Experiments in the embedded world, one command each, several seeds. RESULTS.md has what was run.

    python experiments/run.py default      what `python caopd.py` does, for every seed
    python experiments/run.py methods      every row of METHODS, from the same base
    python experiments/run.py rollouts     K = 1 to 32 rollouts a prompt
    python experiments/run.py divergence   what is minimized on the confidence, and how it is read
    python experiments/run.py ablation     with and without each place where mu_hat is stated
    python experiments/run.py drift        more updates, a teacher that stays or one that follows
    python experiments/run.py transfer     train on additions, test on multiplications, and back
    python experiments/run.py continual    train on one, then on the other

A finished cell is kept in --out and an interrupted one goes on from its checkpoint, so a command
can be stopped and given again. The table is printed as Markdown, mean ± standard deviation over
seeds, and kept with all its cells in experiments/NAME.json.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import caopd
import data
from files import BadInput, write_text
from share import markdown

EXPECTED = "expected ECE", "Brier", "SPR"


# ------------------------------------------------------------------ cells: one run of caopd.py


def cell(out: Path, seed: int, name: str, *flags: str) -> dict:
    """results.json of one run: read where it is finished with these flags, else made.

    All cells of a seed share a directory, and with it the base model.
    """
    directory = out / f"seed{seed}"
    kept = directory / "cells" / f"{name}.json"
    args = caopd.parse_args(["--seed", str(seed), "--out", str(directory), *flags])
    if kept.exists():
        results, mine = json.loads(kept.read_text()), asdict(args)
        its = asdict(caopd.Args()) | results["settings"]  # flags that came later had their default
        places = ("out", "device", "dtype", "overwrite")  # where it ran, not what it made
        if all(its[key] == mine[key] for key in mine if key not in places):
            return results
    print(f"{name}, seed {seed}:", flush=True)
    caopd.run(args)
    results = json.loads((directory / "results.json").read_text())
    results["curves"] = curves(directory / "metrics.jsonl", args.method.split(","))
    kept.parent.mkdir(exist_ok=True)
    write_text(kept, json.dumps(results))
    return results


CURVES = "accuracy", "confidence", "format", "copied", "loss_answer", "loss_confidence", "grad_norm"


def curves(metrics: Path, methods: list[str], width: int = 50) -> dict:
    """A row for every `width` updates of each method, with the means of what its steps logged."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = {}
    for name in methods:
        its, found[name] = [row for row in rows if row["stage"] == name], []
        for start in range(0, len(its), width):
            window = its[start:start + width]
            values = {key: [row[key] for row in window if row.get(key) is not None]
                      for key in CURVES}
            found[name].append({"step": window[0]["step"]}
                               | {key: fmean(them) for key, them in values.items() if them})
    return found


def spread(values: list) -> str:
    """Mean ± sample standard deviation; – where a figure does not exist for some seed."""
    if any(value is None or value != value for value in values):
        return "–"
    mean = caopd.number(fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {caopd.number(stdev(values))}"


def metrics(runs: list[dict]) -> list[str]:
    """A column for each of caopd.COLUMNS, over the runs of all seeds."""
    return [spread([run[key] for run in runs]) for key in caopd.COLUMNS]


def expected(runs: list[dict]) -> list[str]:
    """ECE, Brier and SPR of the expected readout."""
    return [spread([run["readouts"]["expected"][key] for run in runs])
            for key in ("ece", "brier", "spr")]


# ------------------------------------------------------------------ the experiments


DEFAULT = caopd.Args.method  # what a run without arguments trains


def default(out: Path, seeds: list[int]) -> tuple[str, dict]:
    """The run without arguments: stated confidence, the expected one, and the yardsticks."""
    return table_of_methods({seed: cell(out, seed, "default", "--method", DEFAULT)
                             for seed in seeds})


def methods(out: Path, seeds: list[int]) -> tuple[str, dict]:
    """Every method from the same base, with the default schedule."""
    others = [name for name in caopd.METHODS if name not in DEFAULT.split(",")]
    return table_of_methods({
        seed: cell(out, seed, "default", "--method", DEFAULT)
        | cell(out, seed, "others", "--method", ",".join(others)) for seed in seeds})


def table_of_methods(runs: dict[int, dict]) -> tuple[str, dict]:
    rows = []
    for name in ("base", *caopd.METHODS):
        its = [run[name] for run in runs.values() if name in run]
        if its:
            floor = spread([run["oracle"]["brier"] for run in its])
            seconds = f"{fmean(run['seconds'] for run in its):.0f}"
            rows.append([caopd.title(name), *metrics(its), *expected(its), floor, seconds])
    header = ["", *caopd.COLUMNS.values(), *EXPECTED, "Brier floor", "seconds"]
    return markdown(header, rows), runs


def grid(out: Path, seeds: list[int], cells: dict[str, list[str]]) -> tuple[str, dict]:
    """A row for each cell, flags by name, of the one method that its flags name."""
    runs = {name: {seed: cell(out, seed, name, *flags) for seed in seeds}
            for name, flags in cells.items()}
    rows = []
    for name, flags in cells.items():
        method = flags[flags.index("--method") + 1]
        its = [run[method] for run in runs[name].values()]
        floor = spread([run["oracle"]["brier"] for run in its])
        rows.append([name, *metrics(its), *expected(its), floor])
    header = ["", *caopd.COLUMNS.values(), *EXPECTED, "Brier floor"]
    return markdown(header, rows), runs


def rollouts(out: Path, seeds: list[int]) -> tuple[str, dict]:
    """CaOPD with K rollouts a prompt, and always 128 completions a step."""
    return grid(out, seeds, {
        f"caopd, K = {k}": ["--method", "caopd", "--rollouts", str(k), "--prompts", str(128 // k)]
        for k in (1, 2, 4, 8, 16, 32)})


def divergence(out: Path, seeds: list[int]) -> tuple[str, dict]:
    """The loss on I_c, while I_a keeps the reverse KL."""
    cells = {f"{kind} KL": ["--method", "caopd", "--confidence-divergence", kind]
             for kind in caopd.DIVERGENCES}
    cells["cross-entropy"] = ["--method", "caopd-direct"]
    cells["cross-entropy, leave one out"] = ["--method", "caopd-direct-loo"]
    cells["OPD, forward KL everywhere"] = ["--method", "opd", "--divergence", "forward"]
    return grid(out, seeds, cells)


def ablation(out: Path, seeds: list[int]) -> tuple[str, dict]:
    """CaOPD that states mu_hat in the completion alone, or in the teacher's demonstration alone.

    The embedded world has no words, and so no instruction to leave out.
    """
    return grid(out, seeds, {
        f"caopd, {places}": ["--method", "caopd", "--replace", places]
        for places in ("completion,demonstration", "completion", "demonstration")})


def drift(out: Path, seeds: list[int]) -> tuple[str, dict]:
    """CaOPD trained twice as long, with a teacher that stays and with one that follows."""
    return grid(out, seeds, {
        f"caopd, 1200 updates, teacher rate {rate}": [
            "--method", "caopd", "--steps", "1200", "--teacher-rate", rate]
        for rate in ("0", "0.0035")})


SIDES = {"additions": tuple(grade for grade in data.GRADES if "+" in grade),
         "multiplications": tuple(grade for grade in data.GRADES if "*" in grade)}


def stages(out: Path, seed: int, name: str, order: list[str]) -> dict:
    """Trains on each side in turn; the metrics on both sides before, between and after."""
    kept = out / f"seed{seed}" / "cells" / f"{name} {' '.join(order)}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    cell(out, seed, "default", "--method", DEFAULT)  # makes the base
    base, tokenizer = out / f"seed{seed}" / "base", data.toy_tokenizer()
    args = caopd.parse_args(["--seed", str(seed), "--dtype", "float32"])
    model = caopd.load_model(base, None, args, torch.device("cpu"))
    sampling, history = caopd.Sampling(args.max_new_tokens), {}
    for stage in ["base", *order]:
        grades = SIDES.get(stage, tuple(data.GRADES))
        task = data.arithmetic_task(seed, 0, words=False, grades=grades)
        if stage != "base":
            caopd.train(model, name, tokenizer, task, args, kept.with_suffix("") / stage)
        history[stage] = {}
        for side, grades in SIDES.items():
            asked = data.arithmetic_task(seed, 1000, words=False, eval_grades=grades).held_out
            history[stage][side] = caopd.evaluate(model, tokenizer, asked, task.wording, sampling,
                                                  seed, oracle_samples=8, name=name)
    write_text(kept, caopd.to_json(history))
    return history


def table_of_stages(out: Path, seeds: list[int], orders: list[list[str]]) -> tuple[str, dict]:
    names = ("opd", "caopd", "caopd-direct")
    runs = {f"{name}: {', then '.join(order)}": {seed: stages(out, seed, name, order)
                                                for seed in seeds}
            for name in names for order in orders}
    rows = []
    for label, by_seed in runs.items():
        last = list(next(iter(by_seed.values())))[-1]
        for side in SIDES:
            its = [history[last][side] for history in by_seed.values()]
            rows.append([label, side, *metrics(its), *expected(its)])
    header = ["trained on", "tested on", *caopd.COLUMNS.values(), *EXPECTED]
    return markdown(header, rows), runs


def transfer(out: Path, seeds: list[int]) -> tuple[str, dict]:
    """Out of distribution: train on one side, test on both."""
    return table_of_stages(out, seeds, [["additions"], ["multiplications"]])


def continual(out: Path, seeds: list[int]) -> tuple[str, dict]:
    """Train on one side, then on the other, with the same settings and no replay."""
    return table_of_stages(out, seeds, [["additions", "multiplications"],
                                        ["multiplications", "additions"]])


EXPERIMENTS = {f.__name__: f for f in (default, methods, rollouts, divergence, ablation, drift,
                                       transfer, continual)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--out", type=Path, default=Path("out/experiments"),
                        help="where cells are kept [out/experiments]")
    flags = parser.parse_args()
    try:
        text, runs = EXPERIMENTS[flags.what](flags.out, flags.seeds)
    except BadInput as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    write_text(HERE / f"{flags.what}.json", caopd.to_json(runs) + "\n")
    print("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
