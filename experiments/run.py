"""Experiments in the embedded world, one command each, several seeds. RESULTS.md has what was run.

    python experiments/run.py default      what `python caopd.py` does, for every seed
    python experiments/run.py methods      every row of METHODS, from the same base
    python experiments/run.py rollouts     K = 1 to 32 rollouts a prompt
    python experiments/run.py divergence   what is minimized on the confidence, and how it is read
    python experiments/run.py ablation     with and without each place where mu_hat is stated
    python experiments/run.py adapters     adapters (LoRA) in place of all weights
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
from dataclasses import asdict, replace
from itertools import combinations, permutations
from pathlib import Path
from statistics import fmean, stdev

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import caopd
import data
import pipeline
from files import BadInput, to_json, write_text
from metrics import COLUMNS, number
from model import Transformer
from share import markdown

EXPECTED = "expected ECE", "Brier", "SPR"


# ------------------------------------------------------------------ cells: one run of caopd.py


def cell(out: Path, seed: int, name: str, *flags: str) -> dict:
    """results.json of one run: read where it is finished with these flags, else made.

    All cells of a seed share a directory, and with it the base model.
    """
    directory = out / f"seed{seed}"
    kept = directory / "cells" / f"{name}.json"
    args = caopd.parse_args(["--seed", str(seed), "--out", str(directory), "--overwrite", *flags])
    if kept.exists():
        results, mine = json.loads(kept.read_text()), asdict(args)
        its = asdict(caopd.Args()) | results["settings"]  # flags that came later had their default
        places = ("out", "device", "dtype", "overwrite")  # where it ran, not what it made
        if all(its[key] == mine[key] for key in mine if key not in places):
            return results
    print(f"{name}, seed {seed}:", flush=True)
    pipeline.run(args)
    results = json.loads((directory / "results.json").read_text())
    methods = caopd.methods_of(args)
    results = {key: value for key, value in results.items()  # Other cells' methods may be there.
               if key not in caopd.METHODS or key in methods}
    results["curves"] = curves(directory / "metrics.jsonl", methods)
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
    mean = number(fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {number(stdev(values))}"


def metrics(runs: list[dict]) -> list[str]:
    """A column for each of COLUMNS, over the runs of all seeds."""
    return [spread([run[key] for run in runs]) for key in COLUMNS]


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


EQ7 = "--confidence-divergence", "reverse"  # Eq. 7 as it is written


def methods(out: Path, seeds: list[int]) -> tuple[str, dict]:
    """Every method from the same base, with the default schedule and the paper's reverse KL."""
    return table_of_methods({seed: cell(out, seed, "methods", "--method", ",".join(caopd.METHODS),
                                        *EQ7) for seed in seeds})


def table_of_methods(runs: dict[int, dict]) -> tuple[str, dict]:
    rows = []
    for name in ("base", *caopd.METHODS):
        its = [run[name] for run in runs.values() if name in run]
        if its:
            floor = spread([run["oracle"]["brier"] for run in its])
            seconds = "–" if name == "base" else f"{fmean(run['seconds'] for run in its):.0f}"
            rows.append([caopd.title(name), *metrics(its), *expected(its), floor, seconds])
    header = ["", *COLUMNS.values(), *EXPECTED, "Brier floor", "seconds"]
    return markdown(header, rows), runs


def grid(out: Path, seeds: list[int], cells: dict[str, list[str]]) -> tuple[str, dict]:
    """A row for each cell, flags by name, which begin with the one method that is trained."""
    runs, rows = {}, []
    for name, flags in cells.items():
        method = flags[1]
        made_anyway = len(flags) == 2 and method in DEFAULT.split(",")
        where = ("default", "--method", DEFAULT) if made_anyway else (name, *flags)
        runs[name] = {seed: cell(out, seed, *where) for seed in seeds}
        its = [run[method] for run in runs[name].values()]
        floor = spread([run["oracle"]["brier"] for run in its])
        rows.append([name, *metrics(its), *expected(its), floor])
    header = ["", *COLUMNS.values(), *EXPECTED, "Brier floor"]
    return markdown(header, rows), runs


def rollouts(out: Path, seeds: list[int]) -> tuple[str, dict]:
    """CaOPD with K rollouts a prompt, and always 128 completions a step."""
    return grid(out, seeds, {
        f"caopd, K = {k}": ["--method", "caopd", "--rollouts", str(k), "--prompts", str(128 // k),
                            *EQ7]
        for k in (1, 2, 4, 8, 16, 32)})


def divergence(out: Path, seeds: list[int]) -> tuple[str, dict]:
    """The loss on a replaced confidence, while I_a keeps the reverse KL."""
    return grid(out, seeds, {
        "CaOPD, reverse KL": ["--method", "caopd", *EQ7],
        "CaOPD, Jensen-Shannon": ["--method", "caopd", "--confidence-divergence", "jsd"],
        "CaOPD, forward KL": ["--method", "caopd"],
        "CaOPD-direct, cross-entropy": ["--method", "caopd-direct"],
        "CaOPD, forward KL, 1,200 updates": ["--method", "caopd", "--steps", "1200"]})


def ablation(out: Path, seeds: list[int]) -> tuple[str, dict]:
    """CaOPD that states mu_hat in all, two, or one of the places where the paper states it.

    The embedded world has no words, and so no instruction to leave out. Here its teacher is also
    told the value that it shall state, on a line of its own, and the base has learned to state it.
    """
    data.SYMBOLS = replace(data.SYMBOLS, report="\n{confidence}")
    words = {3: "all three", 2: "{} and {}", 1: "{} alone"}
    return grid(out / "told", seeds, {
        words[count].format(*places): [
            "--method", "caopd", "--replace", ",".join(places), *EQ7]
        for count in words for places in combinations(caopd.REPLACEMENTS, count)})


def adapters(out: Path, seeds: list[int]) -> tuple[str, dict]:
    """Adapters (LoRA) of two ranks beside the run that learns all weights, from the same bases."""
    rank_8, rank_128 = ("--lora-rank", "8", "--lr", "3e-3"), ("--lora-rank", "128", "--lr", "1e-3")
    return grid(out, seeds, {
        "OPD": ["--method", "opd"],
        "CaOPD": ["--method", "caopd"],
        "OPD, rank 8": ["--method", "opd", *rank_8],
        "CaOPD, rank 8": ["--method", "caopd", *rank_8],
        "CaOPD, rank 128": ["--method", "caopd", *rank_128]})


def drift(out: Path, seeds: list[int]) -> tuple[str, dict]:
    """CaOPD trained twice as long, with a teacher that stays and with one that follows."""
    return grid(out, seeds, {
        f"caopd, 1200 updates, teacher rate {rate}": [
            "--method", "caopd", "--steps", "1200", "--teacher-rate", rate, *EQ7]
        for rate in ("0", "0.0035")})


SIDES = {"additions": tuple(grade for grade in data.GRADES if "+" in grade),
         "multiplications": tuple(grade for grade in data.GRADES if "*" in grade)}


def trained(out: Path, seed: int, name: str, sides: tuple[str, ...]) -> Path:
    """The directory of the model that method `name` makes of the base, trained on each of these
    sides in turn. It is made where it is missing, from the model of all sides but the last."""
    directory = out / f"seed{seed}" / "stages" / " ".join((name, *sides))
    if not sides:
        cell(out, seed, "default", "--method", DEFAULT)  # makes the base
        return out / f"seed{seed}" / "base"
    if not (directory / "config.json").exists():
        # A side has about half of the grades: with half of the updates each is asked as often.
        args = caopd.parse_args(["--seed", str(seed), "--dtype", "float32", "--steps", "300"])
        start = trained(out, seed, name, sides[:-1])
        model = pipeline.load_model(start, None, args, torch.device("cpu"))
        task = data.arithmetic_task(seed, 0, words=False, grades=SIDES[sides[-1]])
        caopd.train(model, name, data.toy_tokenizer(), task, args, directory)
        pipeline.save(model, data.toy_tokenizer(), directory)
        (directory / name / "checkpoint.safetensors").unlink()
    return directory


def tested(out: Path, seed: int, name: str, sides: tuple[str, ...]) -> dict[str, dict]:
    """The metrics of that model on each side, 1,000 held-out questions each.

    They are kept, as the models are, whatever has become of the defaults since: to make them again,
    take another --out.
    """
    kept = out / f"seed{seed}" / "cells" / f"{' '.join((name, *sides))}.json"
    if not kept.exists():
        model, figures = Transformer.from_pretrained(trained(out, seed, name, sides)), {}
        for side, grades in SIDES.items():
            task = data.arithmetic_task(seed, 1000, words=False, eval_grades=grades)
            figures[side], _ = caopd.evaluate(
                model, data.toy_tokenizer(), task.held_out, task.wording,
                caopd.eval_sampling(caopd.parse_args([])), seed, name=name)
        write_text(kept, to_json(figures))
    return json.loads(kept.read_text())


def table_of_stages(out: Path, seeds: list[int],
                    orders: list[tuple[str, ...]]) -> tuple[str, dict]:
    """A row for each method, order of sides to train on, and side to test on."""
    runs = {f"{caopd.title(name)}, {' then '.join(sides) or 'not trained'}":
            {seed: tested(out, seed, name, sides) for seed in seeds}
            for sides in orders for name in (DEFAULT.split(",") if sides else ("base",))}
    rows = []
    for label, by_seed in runs.items():
        for side in SIDES:
            its = [figures[side] for figures in by_seed.values()]
            rows.append([label, side, *metrics(its), *expected(its)])
    return markdown(["trained on", "tested on", *COLUMNS.values(), *EXPECTED], rows), runs


def transfer(out: Path, seeds: list[int]) -> tuple[str, dict]:
    """Out of distribution: train on one side, test on both."""
    return table_of_stages(out, seeds, [(), *((side,) for side in SIDES)])


def continual(out: Path, seeds: list[int]) -> tuple[str, dict]:
    """Train on one side, then on the other, with the same settings and no replay."""
    return table_of_stages(out, seeds, list(permutations(SIDES)))


EXPERIMENTS = {f.__name__: f for f in (default, methods, rollouts, divergence, ablation, adapters,
                                       drift, transfer, continual)}


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
    write_text(HERE / f"{flags.what}.json", to_json(runs) + "\n")
    print("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
