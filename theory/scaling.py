"""The scaling law in miniature: how accuracy and stated confidence move as the network grows.

The world of `python caopd.py` with the network's width as the axis, a shorter schedule, three seeds. Finished cells are kept
in out/scaling and an interrupted cell goes on from its checkpoint, so the command can be stopped and given again:

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
from model import Transformer
from worlds import figure, show

SCHEDULE = ["--sft-steps", "700", "--steps", "150", "--prompts", "24", "--teacher-rate", "0.005",
            "--eval-questions", "1000"]


def cell(width: int, seed: int, out: Path, device: str) -> dict:
    """results.json of one network: read where it is finished with these settings, else made."""
    directory = out / f"width{width}-seed{seed}"
    rate = 3e-3 * (128 / width) ** 0.5  # wider networks want smaller steps
    args = caopd.parse_args([*SCHEDULE, "--width", str(width), "--seed", str(seed), "--sft-lr", str(rate), "--lr", str(rate / 10),
                             "--out", str(directory), "--device", device])
    finished = directory / "results.json"
    if finished.exists():
        results, mine = json.loads(finished.read_text()), asdict(args)
        if all(results["settings"][name] == mine[name] for name in mine if name not in ("device", "dtype", "out")):
            return results
    print(f"width {width}, seed {seed}:")
    caopd.run(args)
    return json.loads(finished.read_text())


def parameters(width: int) -> int:
    args = caopd.parse_args(["--width", str(width)])
    return sum(p.numel() for p in Transformer(caopd.toy_config(args, data.toy_tokenizer())).parameters())


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values):.2f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="scaling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128], help="hidden sizes, multiples of 8 [16 32 64 128]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--device", default="auto", help="as of caopd.py [auto]")
    parser.add_argument("--out", type=Path, default=Path("out/scaling"), help="where cells are kept [out/scaling]")
    flags = parser.parse_args()
    try:
        cells = {width: [cell(width, seed, flags.out, flags.device) for seed in flags.seeds] for width in flags.widths}
    except caopd.UsageError as error:
        print(f"scaling.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n" + __doc__.split("\n\n")[0] + "\n")
    show(["width", "parameters", *(f"{caopd.NAMES[m]} {k}" for m in ("base", "opd", "caopd") for k in ("accuracy", "conf."))],
         [[str(w), f"{parameters(w):,}", *(spread([r[m][k] for r in runs]) for m in caopd.NAMES for k in ("accuracy", "mean_confidence"))]
          for w, runs in cells.items()])
    print("\n  Mean and standard deviation over seeds, on held-out questions.")
    save, axes = figure("scaling", 4.6, 4.2)
    if save:
        for method, marker in (("base", "o"), ("opd", "s"), ("caopd", "^")):
            points = [(r[method]["accuracy"], r[method]["mean_confidence"]) for runs in cells.values() for r in runs]
            sizes = [6 * (np.log2(w) - 2) ** 1.5 for w, runs in cells.items() for _ in runs]
            axes[0].scatter(*np.array(points).T, s=sizes, marker=marker, alpha=0.7, label=caopd.NAMES[method])
        axes[0].plot([0, 1], [0, 1], color="0.6", ls="--", lw=1)
        axes[0].set(xlabel="accuracy", ylabel="mean stated confidence", xlim=(0, 1), ylim=(0, 1.03), title="larger marks: wider networks")
        axes[0].legend(fontsize=8)
        save()
