"""Draws the reliability diagrams of a results.json, a panel for each model in it.

    python figures/reliability.py RESULTS.json [OUT.png]     by default reliability.png beside it

A bar is the share of correct answers among those whose stated confidence lies in its bin. It
should end on the dashed diagonal. The strip below says how many percent of the answers the bin
holds, and the fewer they are, the paler is the bar: pale bars hardly count in the ECE.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from caopd import title
from metrics import number

BARS, CONFIDENCE, ACCURACY, GREY = "#2f6fab", "#c0392b", "#1e8449", "0.45"
IN_A_ROW, FORMATS = 4, (".png", ".svg", ".pdf")
DRAWN = {"reliability", "accuracy", "mean_confidence", "ece", "ocg", "spr"}


class FigureError(ValueError):
    """A figure that cannot be drawn; the message is for the user."""


def read_results(path: Path) -> dict[str, dict]:
    """The models of a results.json, by name. Raises FigureError for any other file."""
    try:
        everything = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FigureError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise FigureError(f"{path}: not a results.json of caopd.py, since it is no JSON") from None
    rows = everything.items() if isinstance(everything, dict) else ()
    models = {name: row for name, row in rows if isinstance(row, dict) and row.keys() >= DRAWN}
    if not models:
        raise FigureError(f"{path}: not a results.json of caopd.py, since there is no model in it")
    return models


def pyplot():
    """matplotlib, which is optional: the trainer does without it."""
    try:
        import matplotlib
    except ImportError:
        raise FigureError("the figure needs matplotlib (pip install matplotlib)") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.linewidth": 0.6, "axes.edgecolor": GREY,
                         "xtick.color": "0.25", "ytick.color": "0.25"})
    return plt


def save(figure, path: Path) -> None:
    """Writes a figure in the format that the name of its file ends in."""
    if path.suffix not in FORMATS:
        raise FigureError(f"{path}: the figure's name should end in {', '.join(FORMATS)}")
    try:
        figure.savefig(path, dpi=140)
    except OSError as error:
        raise FigureError(f"{path}: cannot be written ({error.strerror})") from None


def percent(share: float) -> str:
    return "<1" if 0 < share < 0.005 else f"{100 * share:.0f}"


def draw_bars(axes, bins: list[dict]) -> None:
    """The accuracy of each bin, paler where there are few answers behind it."""
    total, width = sum(b["count"] for b in bins), 1 / len(bins)
    axes.plot([0, 1], [0, 1], color="0.35", lw=0.9, ls=(0, (4, 3)), zorder=3)
    for i, b in enumerate(bins):
        if b["count"]:
            strength = 0.08 + 0.92 * math.sqrt(b["count"] / total)
            axes.bar((i + 0.5) * width, b["accuracy"], 0.9 * width, color=BARS, alpha=strength)


def draw_means(axes, row: dict) -> None:
    """Mean confidence and accuracy as thin lines, named outside the axes, where nothing else is."""
    confidence, accuracy = row["mean_confidence"], row["accuracy"]
    axes.axhline(accuracy, color=ACCURACY, lw=1.1, zorder=2)
    axes.text(1.03, min(max(accuracy, 0.05), 0.95), f"accuracy\n{number(accuracy)}", va="center",
              color=ACCURACY, fontsize=8)
    if confidence is not None:
        axes.axvline(confidence, color=CONFIDENCE, lw=1.1, zorder=2, clip_on=False)
        axes.text(min(max(confidence, 0.36), 0.74), 1.025, f"mean confidence {number(confidence)}",
                  ha="center", color=CONFIDENCE, fontsize=8)


def draw_title(axes, name: str, row: dict) -> None:
    """The model's name, and below it the figures that the diagram is about."""
    figures = [("ECE", row["ece"], ""), ("OCG", row["ocg"], "+"), ("SPR", row["spr"], "")]
    words = [f"{word} {'none' if value is None else number(value, sign).replace('-', '−')}"
             for word, value, sign in figures]
    axes.text(0.5, 1.22, title(name), ha="center", fontsize=11, fontweight="bold")
    axes.text(0.5, 1.125, "    ".join(words), ha="center", fontsize=9)


def draw_strip(axes, bins: list[dict]) -> None:
    """How many percent of the answers each bin holds."""
    total, width = sum(b["count"] for b in bins), 1 / len(bins)
    for i, b in enumerate(bins):
        if b["count"]:
            share, middle = b["count"] / total, (i + 0.5) * width
            axes.bar(middle, share, 0.9 * width, color="0.7")
            axes.text(middle, share + 0.07, percent(share), ha="center", fontsize=7.5, color="0.2")


def draw_panel(figure, upper, lower, name: str, row: dict) -> tuple:
    """One model: the axes of its bars in the place `upper`, and of the strip in `lower`."""
    above = figure.add_subplot(upper, xlim=(0, 1), ylim=(0, 1))
    below = figure.add_subplot(lower, xlim=(0, 1), ylim=(0, 1.35))
    draw_bars(above, row["reliability"])
    draw_means(above, row)
    draw_title(above, name, row)
    draw_strip(below, row["reliability"])
    ticks = [i / 5 for i in range(6)]
    labels = ["0", ".2", ".4", ".6", ".8", "1"]
    above.set(xticks=ticks, yticks=ticks, xticklabels=[], yticklabels=labels)
    below.set(xticks=ticks, yticks=[], xticklabels=labels, xlabel="stated confidence")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    below.spines["left"].set_visible(False)
    return above, below


def draw(models: dict[str, dict], path: Path) -> None:
    """Writes the figure: the panels side by side, at most four in a row."""
    plt = pyplot()
    rows = math.ceil(len(models) / IN_A_ROW)
    columns = math.ceil(len(models) / rows)
    width, height = 2.85 * columns + 0.4, 3.75  # inches, of a row
    margins = {"left": 0.6 / width, "right": 1 - 0.7 / width, "top": 0.82, "bottom": 0.14}
    figure = plt.figure(figsize=(width, height * rows))
    subfigures = figure.subfigures(rows, squeeze=False)[:, 0]
    for place, (name, row) in enumerate(models.items()):
        i, j = divmod(place, columns)
        grid = subfigures[i].add_gridspec(2, columns, height_ratios=[3.6, 1], hspace=0.12,
                                          wspace=0.45, **margins)
        above, below = draw_panel(subfigures[i], grid[0, j], grid[1, j], name, row)
        if j == 0:
            above.set_ylabel("share correct")
            below.set_ylabel("% of\nanswers")
        if place == 0:
            above.text(0.52, 0.55, "calibrated", rotation=45, rotation_mode="anchor",
                       transform_rotates_text=True, fontsize=8, color="0.35")
    save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="reliability.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT.png")
    flags = parser.parse_args()
    out = flags.out or flags.results.with_name("reliability.png")
    try:
        draw(read_results(flags.results), out)
    except FigureError as error:
        print(f"reliability.py: error: {error}", file=sys.stderr)
        return 2
    print(f"figure: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
