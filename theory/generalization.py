"""The generalization gap: μ̂ is measured on training prompts, so confidence on new prompts is optimistic by the drop in accuracy.

    OCG_new − OCG_trained = (accuracy_trained − accuracy_new) − (confidence_trained − confidence_new)

The last difference is small, since confidence is a function of the prompt's looks, which do not change. Shown on the
small transformer: each model of `python caopd.py` answers questions it was distilled on, and held-out ones of the same grades.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import caopd
import data
from model import ModelError, Transformer
from worlds import show


def gap(directory: Path, grades: tuple[str, ...], questions: int = 2000) -> list[list]:
    """Rows (model, accuracy and confidence on trained and on held-out questions, OCG on both) for the models in `directory`."""
    made = json.loads((directory / "results.json").read_text())["settings"]
    args = replace(caopd.parse_args([]), **made)
    tokenizer, task = data.toy_tokenizer(), data.arithmetic_task(args.seed, questions, words=False)
    trained = {e for step in range(args.steps) for e in task.draw(args.prompts, "distill", step) if e.grade in grades}
    sides = [sorted(trained, key=lambda e: e.question)[:questions], sorted({e for e in task.held_out if e.grade in grades}, key=lambda e: e.question)]
    rows = []
    for name in ("base", "opd", "caopd"):
        model = Transformer.from_pretrained(directory / name)
        old, new = (caopd.evaluate(model, tokenizer, replace(task, held_out=side), args, name) for side in sides)
        rows.append([caopd.NAMES[name], old["accuracy"], new["accuracy"], old["mean_confidence"], new["mean_confidence"], old["ocg"], new["ocg"]])
    return rows


if __name__ == "__main__":
    print(__doc__)
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "out/toy")
    header = ["", "accuracy, trained", "held out", "confidence, trained", "held out", "OCG, trained", "held out"]
    try:
        for title, grades in (("1*1, 2*1: few questions, many of them memorized", ("1*1", "2*1")),
                              ("2+2, 3+3: more questions than anyone could memorize", ("2+2", "3+3"))):
            print(f"  {title}\n")
            show(header, gap(directory, grades))
            print()
    except (ModelError, OSError) as error:
        print(f"  {error}. Run `python caopd.py` first: this file looks at the models it leaves in out/toy (or in the directory given).", file=sys.stderr)
        sys.exit(2)
    print("  Where training questions are known by heart, the same stated confidence is honest on them and optimistic on new ones.")
