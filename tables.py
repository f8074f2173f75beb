"""The tables that a run prints: its figures, the readouts, the grades, and reliability as text."""

import textwrap
from pathlib import Path

from caopd import METHODS, PAPER, Args, saved_stages, title
from metrics import COLUMNS, number

LEGEND = (
    "How to read it. ±: one standard error, over questions. OCG: mean confidence − accuracy. "
    "stated: the confidence as it was written, where there is one; greedy and expected: the "
    "likeliest one and the mean, of the model's own distribution after every answer. likelihood: "
    "the probability that the model gives to the answer itself, whatever it states (next to "
    "nothing for a long one). "
    "floor: Brier of a confidence equal to the success rate μ(x); SPR of μ̂: that of an estimate "
    "of μ(x), no bound. gap closed: how much of Brier's gap from OPD to the floor, by what is "
    "stated / expected. The diagram: █ how much of a bin is right, │ what it says, and its share "
    "of the answers.")


def print_tables(results: dict, args: Args, out: Path) -> None:
    """Prints every table of a run."""
    print(f"\n{table(results)}\n\n{readout_table(results)}\n\n{grade_table(results)}\n\n"
          f"{diagram(results)}")
    if args.paper_samples:
        print(f"\nAs the paper evaluates, temperature {PAPER['temperature']} and top-p "
              f"{PAPER['top_p']}, {args.paper_samples} answers per question:\n"
              f"{table({name: row['paper'] for name, row in results.items()})}")
    print("\n" + textwrap.fill(LEGEND, 100))
    there = [name for name in ("results.json", "answers", "metrics.jsonl", "samples.jsonl")
             if (out / name).exists()]
    models = ["the models"] * bool(saved_stages(args))
    print(f"\nEverything is in {out} ({', '.join(there + models)}).")
    others = [name for name in METHODS if name not in results and (out / name).is_dir()]
    if "base" not in saved_stages(args) and Path(args.model) != out / "base":
        others += ["base"] * (out / "base").is_dir()  # the table's base is --model itself
    if others:
        print(f"Also there, from other commands and not in this table: {', '.join(others)}.")


def table(results: dict) -> str:
    """The metrics of each model with their standard errors over questions, a row per model."""
    lines = [f"{'':18}" + "".join(f"{column:>12}" for column in COLUMNS.values())]
    for name, row in results.items():
        cells = (f"{number(row[key], '+' if key == 'ocg' else '')} ±{number(row['stderr'][key])}"
                 for key in COLUMNS)
        lines.append(f"{title(name):18}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def readout_table(results: dict) -> str:
    """ECE / Brier / SPR of each readout, then what the best prompt-level confidence would score.

    Where OPD is there: how much of Brier's gap from OPD to that floor is closed.
    """
    readouts = ["stated", "greedy", "expected", "likelihood"]
    words = list(readouts)
    if any("oracle" in row for row in results.values()):
        words += ["floor / SPR of μ̂"] + ["gap closed"] * ("opd" in results)
    lines = [f"{'ECE / Brier / SPR':18}" + "".join(f"{word:>20}" for word in words)]
    for name, row in results.items():
        cells = [" / ".join(number(row["readouts"][word][key]) for key in ("ece", "brier", "spr"))
                 if word in row["readouts"] else "–" for word in readouts]  # older runs have three
        if best := row.get("oracle"):
            cells.append(f"{number(best['brier'])} / {number(best['spr'])}")
        if best and "opd" in results and results["opd"]["brier"] > best["brier"]:
            worst, gap = results["opd"]["brier"], results["opd"]["brier"] - best["brier"]
            closed = ((worst - row["readouts"][key]["brier"]) / gap
                      for key in ("stated", "expected"))
            cells.append(" / ".join("–" if share != share else f"{round(share, 2) + 0:.0%}"
                                    for share in closed))  # + 0: no -0%
        lines.append(f"{title(name):18}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def grade_table(results: dict) -> str:
    """Accuracy / mean confidence by grade, a row per grade."""
    grades = next(iter(results.values()))["by_grade"]
    lines = [f"{'accuracy / confidence':22}" + "".join(f"{title(name):>17}" for name in results)]
    for grade in grades:
        figures = [row["by_grade"][grade] for row in results.values()]
        cells = (f"{number(f['accuracy'])} / {number(f['mean_confidence'])}" for f in figures)
        lines.append(f"{grade[:20]:22}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def diagram(results: dict) -> str:
    """Reliability as text: █ is a bin's accuracy, │ its mean confidence, then its share."""
    width = 16  # of an accuracy of 1
    lines = ["confidence   " + "".join(f"{title(name):<{width + 8}}" for name in results)]
    for i in range(9, -1, -1):
        cells = []
        for row in results.values():
            b, total = row["reliability"][i], sum(b["count"] for b in row["reliability"])
            bar, share = [" "] * (width + 1), " " * 7
            if b["count"]:
                bar[:round(b["accuracy"] * width)] = "█" * round(b["accuracy"] * width)
                bar[round(b["confidence"] * width)] = "│"
                share = f"{b['count'] / total:>5.0%}  "
            cells.append("".join(bar) + share)
        lines.append(f"{i / 10:.1f} to {(i + 1) / 10:.1f}   " + "".join(cells))
    return "\n".join(lines)
