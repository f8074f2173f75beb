"""Results that others can use: model cards, and trackers that show a run while it goes on."""

import importlib
import json
import math
from pathlib import Path

import data
from caopd import METHODS, PAPER, Args, title
from metrics import COLUMNS, number

ABOUT = {
    "base": "the model before distillation",
    "opd": "on-policy distillation: a copy of the model that is shown the answer scores the "
           "model's own completions. It gains accuracy, and states more confidence than it earns",
    "caopd": "calibration-aware on-policy distillation: the confidence that its completions state "
             "was replaced by the success rate of its own rollouts",
    "caopd-sc": "calibration-aware on-policy distillation without a verifier: the confidence that "
                "its completions state was replaced by how many of its own rollouts agree with an "
                "answer of its teacher"}


def model_card(name: str, results: dict, settings: dict, args: Args) -> str:
    """README.md of a saved model, in Markdown behind YAML front matter.

    name: of the model, a key of `results`, which holds its figures and those of the base.
        settings: all that decided how it was made.
    """
    origin = args.model or "the embedded world"
    tags = ["caopd", "on-policy-distillation", "calibration", "confidence"]
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if args.model and not Path(args.model).exists():  # a name on the hub
        front |= {"base_model": args.model, "base_model_relation": "finetune"}
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    about = ABOUT.get(name) or ABOUT.get(name.split("-")[0], "trained with another objective, to "
                                         "compare with")
    asks = (f"Its questions end with `{data.WORDS.instruction.strip()}`\n" if args.model else
            'It knows sums and products alone, as "12+34=", and writes the last digit first.\n')
    maker = (f"`caopd.py --method {name}`" if name in METHODS else
             "the supervised stage of `caopd.py`")
    return f"""---
{header}
---
# {title(name)}, from {origin}

{about[0].upper() + about[1:]} ([The Illusion of Certainty](https://arxiv.org/abs/2604.16830)). The
completions end with `Confidence: X`, X from 0.00 to 1.00. {asks}
## Figures

{figures(name, results, args)}

A confidence belongs to a way of sampling: at another temperature the same figures do not hold.
± is one standard error over questions.

## How it was made

By {maker}, with these settings:

```json
{json.dumps(settings, indent=1)}
```
"""


def figures(name: str, results: dict, args: Args) -> str:
    """A Markdown table: this model and the base, and once more as the paper evaluates."""
    asked = f"temperature {args.eval_temperature:g}, top-p {args.eval_top_p:g}"
    paper = f"temperature {PAPER['temperature']:g}, top-p {PAPER['top_p']:g}"
    rows = {f"{title(n)}, {asked}": results[n] for n in dict.fromkeys(("base", name))}
    if "paper" in results[name]:
        rows[f"{title(name)}, {paper}"] = results[name]["paper"]
    cells = [[label, *(f"{number(row[key])} ± {number(row['stderr'][key])}" for key in COLUMNS)]
             for label, row in rows.items()]
    table = markdown(["", *COLUMNS.values()], cells)
    return f"On {results[name]['questions']} {args.split} questions:\n\n{table}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Tracker:
    """One run of wandb, trackio or TensorBoard: the figures of every step, samples now and then."""

    def __init__(self, service: str, name: str, out: Path, settings: dict):
        self.service = service
        if service == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            self.run = SummaryWriter(str(out / "tensorboard" / name))
        else:  # trackio has the interface of wandb
            self.module = importlib.import_module(service)
            self.run = self.module.init(project="caopd", name=f"{out.name} {name}", config=settings)

    def log(self, step: int, figures: dict, samples: list[dict]) -> None:
        """figures: numbers by name; samples: rows with the same keys, or none."""
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        rows = [list(sample.values()) for sample in samples]
        if self.service == "tensorboard":
            for name, value in figures.items():
                self.run.add_scalar(name, value, step)
            if rows:
                self.run.add_text("samples", "\n\n".join(map(str, samples)), step)
        else:
            table = {"samples": self.module.Table(columns=[*samples[0]], data=rows)} if rows else {}
            self.run.log(figures | table, step=step)

    def finish(self) -> None:
        self.run.close() if self.service == "tensorboard" else self.run.finish()
