"""What surrounds the two training loops of caopd.py, `supervise` and `train`: each goes through the
steps of a Stage, which shows progress, logs, warns, saves checkpoints, and resumes from them.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance

from torch import Tensor
from tqdm import tqdm

import ranks
from files import (BadInput, Checkpoint, from_json, parse_json, read_text, to_json, within,
                   write_text)

REMEDY = ("try a lower learning rate (--lr, --sft-lr), a lower --clip or --dtype float32, or "
          "another --model; the last checkpoint is as it was")

WINDOW = 20  # updates at the start of a run, and the last ones, whose accuracy is compared

TROUBLE = {  # by a figure of a step: when it tells of trouble, and what to say then
    "format": (lambda share: share < 0.5, "over half of the completions state no confidence; a "
               "teacher that drifts does that (--teacher-rate 0), and so does a model that never "
               "learned the format (--sft-steps)"),
    "collapse": (lambda share: share > 0.95, "nearly all completions state one and the same "
                 "confidence, though some questions go better than others; OPD ends there, CaOPD "
                 "may pass through it early, and one that stays has a teacher that no longer "
                 "reports what it is told (--teacher-rate 0, --method caopd-direct)"),
    "moved": (lambda share: share == 0, "no update has moved a weight so far; raise --lr, or give "
              "the method something to learn from (GRPO needs rollouts that differ, --context "
              "solution a correct one)"),
    "truncated": (lambda share: share > 0.5, "over half of the completions are cut off; raise "
                  "--max-new-tokens"),
    "copied": (lambda share: share < 0.95, "for over 5 % of the tokens that state a replaced "
               "confidence the teacher prefers another token, and teaches that; a base learns to "
               "copy by more --sft-steps, a teacher that stays does not forget it (--teacher-rate "
               "0), and --method caopd-direct learns the confidence without a teacher"),
    "fallen": (lambda errors: errors > 3, f"the completions of the last {WINDOW} updates are right "
               f"less often than those of the first {WINDOW}, by over three standard errors; the "
               "student may be coming apart, which a lower --lr or more --prompts per step can "
               "prevent")}


@dataclass
class Logged:
    """What is read back from a line of metrics.jsonl or samples.jsonl."""

    stage: str
    step: int = within(0, 2 ** 63)
    accuracy: float | None = within(0, 1, default=None)  # of the step's rollouts
    seconds: float = within(0, 2 ** 63, default=0.0)  # that the step took


# What tells of an earlier model in a stage's directory; config.json says that one is complete.
OLD_MODEL = ("config.json", "README.md", "adapter/adapter_config.json",
             "adapter/adapter_model.safetensors", "checkpoint.safetensors")

LOOK_EVERY = 120  # seconds between two showings of samples


class Stage:
    """One training loop's steps, logs and checkpoint. Every rank has one; rank 0 writes and speaks.

    settings: all that determines the stage's result; a checkpoint of others is not taken.
    tensors: all that an update changes, by name.
    """

    def __init__(self, name: str, out: Path, settings: dict, tensors: dict[str, Tensor],
                 save_every: int, track: str = ""):
        self.name, self.save_every = name, save_every
        self.metrics, self.samples = out / "metrics.jsonl", out / "samples.jsonl"
        self.tracker, self.next_look, self.warned = None, 0.0, set()
        self.accuracies = []  # of the rollouts of every update so far
        self.pushed = False  # by any gradient so far; weight decay alone does not count as learning
        if ranks.first():
            (out / name).mkdir(parents=True, exist_ok=True)
        if track and ranks.first():
            from share import Tracker
            self.tracker = Tracker(track, name, out, settings)
        self.checkpoint = Checkpoint(out / name / "checkpoint.safetensors", settings, tensors)
        self.start = self.checkpoint.resume()
        if len(set(ranks.gather([self.start]))) > 1:  # Nobody goes on before all have read.
            raise BadInput(f"--out {out}: all processes have to see the same directory")
        if self.start:
            tqdm.write(f"Going on from step {self.start} of an interrupted run "
                       f"({self.checkpoint.path}).")
        # A row of the last layer's last matrix stands for all that an update should move.
        self.watched = [ranks.local(weight.detach())[:1] for key, weight in tensors.items()
                        if key.startswith("student.") and "down_proj" in key][-1]
        self.at_start = self.watched.clone()
        if ranks.first():
            if self.start == 0:  # Its rows and its model are made anew, and the old ones go first.
                for outdated in OLD_MODEL:
                    (out / name / outdated).unlink(missing_ok=True)
            self.drop_rows_from(self.start)
            write_text(out / name / "settings.json", json.dumps(settings, indent=2) + "\n")

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are left to do, with a progress bar."""
        self.total, self.began = total, time.perf_counter()
        self.bar = tqdm(range(self.start, total), initial=self.start, total=total,
                        desc=f"{self.name:>6}", unit="step", dynamic_ncols=True,
                        disable=not ranks.first())
        yield from self.bar
        if self.tracker:
            self.tracker.finish()

    def log(self, step: int, row: dict, samples: Sequence[dict] = ()) -> None:
        """Writes a step's figures and samples to the logs, and shows them.

        Raises BadInput for a loss or a gradient that is not finite.
        """
        now = time.perf_counter()
        place, row = {"stage": self.name, "step": step}, row | {"seconds": now - self.began}
        self.began = now
        if ranks.first():
            self.write(self.metrics, place, [row])
            self.write(self.samples, place, samples)
        if not math.isfinite(row["loss"] + row["grad_norm"]):
            raise BadInput(f"{self.name}, step {step}: the loss is {row['loss']} and its "
                           f"gradient has norm {row['grad_norm']}; {REMEDY}")
        shown = {"accuracy": "accuracy", "confidence": "says", "loss": "loss"}
        self.bar.set_postfix_str(", ".join(f"{word} {row[key]:.2f}" for key, word in shown.items()
                                           if key in row))
        if now < self.next_look and step + 1 < self.total:
            samples = ()
        else:
            self.next_look = now + LOOK_EVERY
            self.show_samples(step, samples)
        if self.tracker:
            self.tracker.log(step, row, samples)
        self.warn(step, row)

    @staticmethod
    def write(path: Path, place: dict, rows: Sequence[dict]) -> None:
        """Adds a line for each row, which tells its place, a stage and a step, first."""
        with path.open("a") as file:
            file.writelines(to_json(place | row) + "\n" for row in rows)

    def warn(self, step: int, row: dict) -> None:
        """Says what is wrong with a step's figures, each thing once."""
        self.pushed |= row["grad_norm"] > 0
        if step + 1 == self.start + 5:
            row["moved"] = self.pushed * (self.watched != self.at_start).float().mean().item()
        if "accuracy" in row:
            self.accuracies.append(row["accuracy"])
        if len(self.accuracies) >= 2 * WINDOW:
            row["fallen"] = fall(self.accuracies[:WINDOW], self.accuracies[-WINDOW:])
        for key, (wrong, words) in TROUBLE.items():
            if key in row and key not in self.warned and wrong(row[key]):
                self.warned.add(key)
                tqdm.write(f"{self.name}, step {step}: {words}.")

    def show_samples(self, step: int, samples: Sequence[dict]) -> None:
        """Prints samples, so that a run which learns nonsense is seen at once."""
        for sample in samples:
            question, answer = (" ".join(sample[key].split()) for key in ("question", "answer"))
            says = "nothing" if sample["confidence"] is None else f"{sample['confidence']:.2f}"
            tqdm.write(f"{self.name}, step {step}:  {question[-32:]} {answer[-32:]}  says {says}, "
                       f"mu_hat {sample['mu_hat']:.2f}, "
                       f"{'right' if sample['correct'] else 'wrong'}")

    def save_if_due(self, step: int) -> None:
        """Saves a checkpoint after every --save-every steps, and after the last one."""
        if (step + 1) % self.save_every == 0 or step + 1 == self.total:
            self.checkpoint.save(step + 1)

    def drop_rows_from(self, step: int) -> None:
        """Takes this stage's rows from `step` on out of both logs, since they are made again, and
        recalls the accuracies of those that stay."""
        for path in (self.metrics, self.samples):
            kept = []
            for number, line in enumerate(read_text(path, absent="").splitlines(True), 1):
                if line.endswith("\n"):  # unless the run was killed while it wrote this last line
                    where = f"{path}, line {number}"
                    row = from_json(Logged, parse_json(line, where), where)
                    if row.stage != self.name or row.step < step:
                        kept.append(line)
                        if row.stage == self.name and row.accuracy is not None:
                            self.accuracies.append(row.accuracy)
            write_text(path, "".join(kept))


def fall(before: list[float], after: list[float]) -> float:
    """How many standard errors the second mean lies below the first one; infinitely many where
    neither varies and it lies lower at all."""
    lower = fmean(before) - fmean(after)
    error = math.sqrt(variance(before) / len(before) + variance(after) / len(after))
    if error == 0:
        return math.inf if lower > 0 else 0.0
    return lower / error
