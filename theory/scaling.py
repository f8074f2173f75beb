"""The scaling law in miniature: how accuracy and stated confidence move as the network grows.

The world of `python caopd.py` with the network's width as the axis, a shorter schedule and three
seeds. Finished cells are kept in out/scaling, and an interrupted cell goes on from its checkpoint,
so the command can be stopped and given again:

    python theory/scaling.py                               widths 16 to 128, three seeds
    python theory/scaling.py --widths 512 1024 --device cuda
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import caopd
import data
import pipeline
from files import BadInput
from model import Transformer
from worlds import figure, show

SCHEDULE = ["--method", "opd,caopd", "--sft-steps", "700", "--steps", "150", "--prompts", "24",
            "--teacher-rate", "0.005", "--eval-questions", "1000", "--oracle", "0",
            "--paper-samples", "0"]
MARKERS = {"base": "o", "opd": "s", "caopd": "^"}


def cell(width: int, seed: int, out: Path, device: str) -> dict:
    """results.json of one network: read where it is finished with these settings, else made."""
    directory = out / f"width{width}-seed{seed}"
    rate = 3e-3 * (128 / width) ** 0.5  # Wider networks want smaller steps.
    args = caopd.parse_args([
        *SCHEDULE, "--width", str(width), "--seed", str(seed), "--sft-lr", str(rate),
        "--lr", str(rate / 10), "--out", str(directory), "--device", device, "--overwrite"])
    kept = directory / "results.json"
    if kept.exists():
        results = json.loads(kept.read_text())
        decisive = asdict(args).keys() - {"device", "dtype", "out", "overwrite"}
        if "caopd" in results and all(results["settings"].get(name) == getattr(args, name)
                                      for name in decisive):
            return results
    print(f"width {width}, seed {seed}:")
    pipeline.run(args)
    return json.loads(kept.read_text())


def parameters(width: int) -> int:
    args = caopd.parse_args(["--width", str(width)])
    network = Transformer(pipeline.toy_model(args, data.toy_tokenizer()))
    return sum(p.numel() for p in network.parameters())


def spread(values: list[float]) -> str:
    """Mean and standard deviation of a sample of seeds; a single seed has no deviation."""
    values = np.array(values, dtype=float)  # A figure that does not exist is null in JSON.
    deviation = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{deviation}"


def print_table(cells: dict[int, list[dict]]) -> None:
    """A row a width: its parameters, and each model's accuracy and confidence over the seeds."""
    header, rows = ["width", "parameters"], []
    for name in MARKERS:
        header += [f"{caopd.title(name)} accuracy", "conf."]
    for width, runs in cells.items():
        row = [str(width), f"{parameters(width):,}"]
        for name in MARKERS:
            for key in ("accuracy", "mean_confidence"):
                row.append(spread([results[name][key] for results in runs]))
        rows.append(row)
    show(header, rows)
    n = "/".join(sorted({str(len(runs)) for runs in cells.values()}))
    print(f"\n  Mean ± standard deviation (n − 1) over n = {n} seeds, on held-out questions.\n"
          "  OPD's flat 1.00 is built in: copying is taught, and z always says 1.00. The evidence "
          "is that\n  CaOPD's confidence, by the same copying, follows accuracy.")


def draw(cells: dict[int, list[dict]]) -> None:
    """Confidence against accuracy: a mark for each network, larger for a wider one."""
    save, axes = figure("scaling", 4.6, 4.2)
    if not save:
        return
    for name, marker in MARKERS.items():
        points = [(results[name]["accuracy"], results[name]["mean_confidence"])
                  for runs in cells.values() for results in runs]
        sizes = [6 * (np.log2(width) - 2) ** 1.5 for width, runs in cells.items() for _ in runs]
        axes[0].scatter(*np.array(points, dtype=float).T, s=sizes, marker=marker, alpha=0.7,
                        label=caopd.title(name))
    axes[0].plot([0, 1], [0, 1], color="0.6", ls="--", lw=1)
    axes[0].set(xlabel="accuracy", ylabel="mean stated confidence", xlim=(0, 1), ylim=(0, 1.03),
                title="larger marks: wider networks")
    axes[0].legend(fontsize=8)
    save()


def main() -> int:
    parser = argparse.ArgumentParser(prog="scaling.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128],
                        help="hidden sizes, multiples of 8 [16 32 64 128]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--device", default="auto", help="as of caopd.py [auto]")
    parser.add_argument("--out", type=Path, default=Path("out/scaling"),
                        help="where cells are kept [out/scaling]")
    flags = parser.parse_args()
    try:
        cells = {width: [cell(width, seed, flags.out, flags.device) for seed in flags.seeds]
                 for width in flags.widths}
    except BadInput as error:
        print(f"scaling.py: error: {error}", file=sys.stderr)
        return 2
    print("\n" + __doc__.split("\n\n")[0] + "\n")
    print_table(cells)
    draw(cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
