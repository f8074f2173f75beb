"""The generalization gap: μ̂ is measured on training prompts, so on new ones confidence is
optimistic by the drop in accuracy.

    OCG_new − OCG_trained
        = (accuracy_trained − accuracy_new) − (confidence_trained − confidence_new)

The last difference is small, since confidence is a function of the prompt's looks, which do not
change. Shown on the small transformer: each model of `python caopd.py` answers questions it was
distilled on, and held-out ones of the same grades.

    python theory/generalization.py [DIRECTORY]        by default out/toy
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import caopd
import data
from files import BadInput
from model import Transformer
from worlds import show

WORLDS = {"1*1, 2*1: few questions, many of them memorized": ("1*1", "2*1"),
          "2+2, 3+3: more questions than anyone could memorize": ("2+2", "3+3")}
HEADER = ["", "accuracy, trained", "held out", "confidence, trained", "held out", "OCG, trained",
          "held out"]


def ask_both(directory: Path, grades: tuple[str, ...], questions: int = 2000) -> list[list]:
    """Rows (model, accuracy, confidence and OCG, each on trained and on held-out questions) for
    the models in `directory`."""
    made = json.loads((directory / "results.json").read_text())["settings"]
    args = replace(caopd.parse_args([]), **made)
    tokenizer = data.toy_tokenizer()
    task = data.arithmetic_task(args.seed, questions, words=False, split=args.split)
    trained = {e for step in range(args.steps)
               for e in task.draw(args.prompts, "distill", step) if e.grade in grades}
    held_out = {e for e in task.held_out if e.grade in grades}
    sides = [sorted(side, key=lambda e: e.question)[:questions] for side in (trained, held_out)]
    sampling = caopd.Sampling(args.max_new_tokens, args.eval_temperature, args.eval_top_p)
    rows = []
    for name in ("base", "opd", "caopd"):
        model = Transformer.from_pretrained(directory / name)
        figures = [caopd.evaluate(model, tokenizer, side, task.wording, sampling, args.seed,
                                  name=name) for side in sides]
        keys = ("accuracy", "mean_confidence", "ocg")
        rows.append([caopd.title(name), *(side[key] for key in keys for side in figures)])
    return rows


def main() -> int:
    print(__doc__)
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "out/toy")
    try:
        for title, grades in WORLDS.items():
            print(f"  {title}\n")
            rows = ask_both(directory, grades)
            show(HEADER, rows)
            _, known, new, said, says, ocg, ocg_new = rows[-1]
            print(f"\n  From trained to new questions CaOPD's accuracy changes by "
                  f"{new - known:+.3f} and its stated confidence by {says - said:+.3f},\n"
                  f"  so OCG changes by {ocg_new - ocg:+.3f}, from {ocg:+.3f} to {ocg_new:+.3f}.\n")
    except (BadInput, OSError) as error:
        print(f"  {error}. Run `python caopd.py` first: this file looks at the models it leaves "
              "in out/toy (or in the directory given).", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
