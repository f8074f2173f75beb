"""The generalization gap: μ̂ is measured on training prompts, so on new ones confidence is
optimistic by the drop in accuracy, as long as it does not drop itself.

    OCG_new − OCG_trained
        = (accuracy_trained − accuracy_new) − (confidence_trained − confidence_new)

The last difference was small where we measured it (.012 at most): the student has learned to tell
kinds of prompts apart, and not single ones. Nothing forces it to be. Shown on the small
transformer: each model of `python caopd.py` answers questions it was distilled on, and held-out
ones of the same grades. Several directories are several seeds.

    python theory/generalization.py [DIRECTORY ...]        by default out/toy
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import caopd
import data
from files import BadInput
from model import Transformer
from worlds import show

WORLDS = {"2*1: hundreds of products, partly known by heart": ("2*1",),
          "2+2, 3+3: sums, of which every digit follows the same rule": ("2+2", "3+3")}
HEADER = ["", "accuracy, trained", "held out", "confidence, trained", "held out", "OCG, trained",
          "held out"]


def ask_both(directory: Path, name: str, grades: tuple[str, ...], questions: int) -> np.ndarray:
    """[3, 2]: accuracy, confidence and OCG, on trained and on held-out questions, about `questions`
    answers each."""
    made = json.loads((directory / "results.json").read_text())["settings"]
    args = replace(caopd.parse_args([]), **made)
    task = data.arithmetic_task(args.seed, questions, words=False, split=args.split,
                                eval_grades=grades)
    trained = {e for step in range(args.steps)
               for e in task.draw(args.prompts, "distill", step) if e.grade in grades}
    sampling = caopd.Sampling(args.max_new_tokens, args.eval_temperature, args.eval_top_p)
    model = Transformer.from_pretrained(directory / name).for_inference()
    columns = []
    for side in (trained, set(task.held_out)):
        asked = sorted(side, key=lambda e: e.question)
        asked = asked[::-(-len(asked) // questions)]  # of many, evenly spread over all
        generator = caopd.seeded(args.seed, "generalization", 1, model.device)
        samples = max(1, questions // len(asked))  # answers to each, where there are few
        groups = caopd.ask(model, data.toy_tokenizer(), asked, task.wording, samples, sampling,
                           generator, name)
        figures = caopd.calibration(*caopd.stated_and_correct(groups))
        columns.append([figures[key] for key in ("accuracy", "mean_confidence", "ocg")])
    return np.array(columns).T


def main(directories: list[Path], questions: int = 400) -> int:
    print(__doc__)
    try:
        for title, grades in WORLDS.items():
            rows = []
            for name in ("base", "opd", "caopd"):
                seeds = np.array([ask_both(d, name, grades, questions) for d in directories])
                mean = seeds.mean(0)
                spread = seeds.std(0, ddof=1) if len(seeds) > 1 else np.full(mean.shape, np.nan)
                rows.append([caopd.title(name), *(
                    f"{m:.3f}" + ("" if np.isnan(s) else f" ± {s:.3f}")
                    for m, s in zip(mean.ravel(), spread.ravel()))])
            print(f"  {title}\n")
            show(HEADER, rows)
            known, said, ocg = mean.T[0]
            new, says, ocg_new = mean.T[1]
            print(f"\n  From trained to new questions CaOPD's accuracy changes by "
                  f"{new - known:+.3f} and its stated confidence by {says - said:+.3f},\n"
                  f"  so OCG changes by {ocg_new - ocg:+.3f}, from {ocg:+.3f} to {ocg_new:+.3f}.\n")
    except (BadInput, OSError) as error:
        print(f"  {error}. Run `python caopd.py` first: this file looks at the models it leaves "
              "in out/toy (or in the directories given).", file=sys.stderr)
        return 2
    print(f"  n = {len(directories)} seeds" + (", ± standard deviation (n − 1)."
                                               if len(directories) > 1 else "."))
    return 0


if __name__ == "__main__":
    sys.exit(main([Path(d) for d in sys.argv[1:]] or [Path("out/toy")]))
