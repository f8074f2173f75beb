"""Draws how training went: accuracy, confidence, losses and format over the updates.

    python figures/curves.py METRICS.jsonl ... [--out OUT.png]    by default curves.png beside it
    python figures/curves.py experiments/curves/*.jsonl --out figures/curves.png
                                                                  RESULTS.md's figure, untrained

Each file is the metrics.jsonl of one seed. A line is a method's mean over the seeds, and the shade
goes from the lowest seed to the highest; points are means over 20 updates. The losses are the two
sums of Eq. 7, a KL or, where it says CE, the cross-entropy on the replaced tokens. --thin FILE
keeps just the points of one metrics.jsonl, and is how the files in experiments/curves were made.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from caopd import METHODS, target_cross_entropy, title
from reliability import GREY, FigureError, pyplot, save

WINDOW = 20  # updates that a point is the mean of
PANELS = {  # key of metrics.jsonl: the panel's title, and its vertical axis
    "accuracy": ("accuracy", "share of rollouts"),
    "confidence": ("stated confidence", "mean over rollouts"),
    "overconfidence": ("stated confidence − accuracy", "mean over rollouts"),
    "loss_answer": ("loss on the answer, $I_a$", "nats a token of the step"),
    "loss_confidence": ("loss on the confidence, $I_c$", "nats a token of the step"),
    "format": ("a confidence can be read", "share of rollouts")}
SHARES = "accuracy", "confidence", "format"
KEPT = "accuracy", "confidence", "format", "loss_answer", "loss_confidence"
COLORS = {"opd": "#c0392b", "caopd": "#1f5fa8", "caopd-direct": "#1e8449"}
OTHERS = "#8e44ad", "#d68910", "#16a085", "#7f8c8d", "#2c3e50", "#a04000", "#5d6d7e"


def read_points(path: Path) -> dict[str, list[dict]]:
    """The points of each method in a metrics.jsonl. Raises FigureError for any other file."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row["stage"] in METHODS]
        return {name: points([row for row in rows if row["stage"] == name])
                for name in dict.fromkeys(row["stage"] for row in rows)}
    except OSError as error:
        raise FigureError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise FigureError(f"{path}: not a metrics.jsonl of caopd.py") from None


def points(rows: list[dict]) -> list[dict]:
    """Means over the updates of each window, which a row that is such a mean already keeps."""
    windows = {}
    for row in rows:
        windows.setdefault(row["step"] // WINDOW, []).append(row)
    means = []
    for window, its in windows.items():
        point = {"step": window * WINDOW}
        for key in KEPT:
            values = [row[key] for row in its if row[key] is not None]
            point[key] = round(fmean(values), 5) if values else None
        means.append(point)
    return means


def seeds_of(files: list[dict[str, list[dict]]], name: str, key: str) -> tuple[list, list[list]]:
    """(updates, a list of values for each update, one a seed); points without a value are out."""
    by_update = {}
    for seed in files:
        for point in seed.get(name, []):
            value = (point["confidence"] - point["accuracy"]
                     if key == "overconfidence" and point["confidence"] is not None
                     else point.get(key))
            if value is not None:
                by_update.setdefault(point["step"] + WINDOW / 2, []).append(value)
    return list(by_update), list(by_update.values())


def spread_apart(places: list[float], gap: float, bottom: float, top: float) -> list[float]:
    """Moves places as far as it takes to stand `gap` apart, in their order, from `bottom` to
    `top`."""
    order, moved = sorted(range(len(places)), key=places.__getitem__), list(places)
    for below, above in zip(order, order[1:]):
        moved[above] = max(moved[above], moved[below] + gap)
    risen = moved[order[-1]] - places[order[-1]]
    down = min(max(risen / 2, moved[order[-1]] - top), moved[order[0]] - bottom)
    return [place - down for place in moved]


def label(name: str, key: str) -> str:
    cross_entropy = (key == "loss_confidence"
                     and METHODS[name].confidence_loss is target_cross_entropy)
    return title(name) + (" (CE)" if cross_entropy else "")


def draw_panel(axes, files: list[dict], names: list[str], key: str) -> None:
    """A line a method, named at its end."""
    ends = {}
    for i, name in enumerate(names):
        updates, values = seeds_of(files, name, key)
        if updates:
            color = COLORS.get(name, OTHERS[i % len(OTHERS)])
            means = [fmean(v) for v in values]
            axes.fill_between(updates, [min(v) for v in values], [max(v) for v in values],
                              color=color, alpha=0.15, lw=0)
            axes.plot(updates, np.array(means), color=color, lw=1.6)
            ends[name] = (updates[-1], means[-1], color)
    low, high = axes.get_ylim()
    negative = any(line.get_ydata().min() < 0 for line in axes.lines)
    low, high = (0, 1.03) if key in SHARES else (low if negative else 0, high)
    axes.set(ylim=(low, high), xlim=(0, None), xlabel="update", ylabel=PANELS[key][1])
    heights = [y for _, y, _ in ends.values()]
    places = spread_apart(heights, 0.09 * (high - low), low, high) if ends else []
    for (name, (x, _, color)), y in zip(ends.items(), places):
        axes.annotate(label(name, key), (x, y), xytext=(5, 0), textcoords="offset points",
                      color=color, va="center", fontsize=8.5, annotation_clip=False)
    if key == "overconfidence":
        axes.axhline(0, color=GREY, lw=0.7, ls=(0, (4, 3)), zorder=0)
    axes.set_title(PANELS[key][0], loc="left", fontsize=10, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)


def draw(files: list[dict], path: Path) -> None:
    """Writes the figure: six panels over the updates."""
    names = [name for name in METHODS if any(name in seed for seed in files)]
    if not names:
        raise FigureError("no method in these files; give the metrics.jsonl of a run")
    plt = pyplot()
    figure, grid = plt.subplots(2, 3, figsize=(12, 5.8))
    for axes, key in zip(grid.flat, PANELS):
        draw_panel(axes, files, names, key)
    figure.tight_layout(w_pad=2.5, h_pad=1.8)
    save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="curves.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, nargs="+", metavar="METRICS.jsonl")
    parser.add_argument("--out", type=Path, metavar="OUT.png")
    parser.add_argument("--thin", type=Path, metavar="FILE.jsonl",
                        help="write the points, no figure")
    flags = parser.parse_args()
    out = flags.thin or flags.out or flags.metrics[0].with_name("curves.png")
    try:
        files = [read_points(path) for path in flags.metrics]
        if flags.thin:
            rows = ({"stage": name} | point for name, its in files[0].items() for point in its)
            out.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            draw(files, out)
    except FigureError as error:
        print(f"curves.py: error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
