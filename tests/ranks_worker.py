"""Runs commands of caopd.py, one after the other, on every rank that torchrun starts.

    python -m torch.distributed.run --nproc-per-node 2 tests/ranks_worker.py JOBS.json

test_ranks.py runs the same commands in one process. So that all of them sample the same whatever
their number, each question here has random numbers of its own. Its answers are right or wrong as a
hash of the question says, because networks this small are never right.
"""

import json
import sys
import zlib
from contextlib import contextmanager, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch

import caopd
import ranks

SAMPLE, REFER, SAVE = caopd.rollout, caopd.add_references, caopd.Stage.save_if_due


def number(*key) -> int:
    return zlib.crc32(repr(key).encode())


def one_by_one(student, tokenizer, examples, *rest):
    """`caopd.rollout` with random numbers that depend on the question alone."""
    *rest, _ = rest
    model, groups = student.for_inference(), []  # Every rank gathers the weights once.
    for example in examples:
        generator = torch.Generator().manual_seed(number(example.question))
        groups += SAMPLE(model, tokenizer, [example], *rest, generator)
        for k, rollout in enumerate(groups[-1].rollouts):
            rollout.correct = number(example.question, k) % 5 == 0
    return groups


def refer_one_by_one(groups, teacher, *rest):
    *rest, _ = rest
    model = teacher.for_inference()
    for group in groups:
        generator = torch.Generator().manual_seed(number(group.example.question, "reference"))
        REFER([group], model, *rest, generator)


@contextmanager
def alike(stop: list | None):
    """Within it, runs do the same however many ranks they have.

    stop: a stage and a step, after which the run is interrupted.
    """
    def save_and_stop(stage, step):
        SAVE(stage, step)
        if stop == [stage.name, step]:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caopd, "rollout", one_by_one)
        patch.setattr(caopd, "add_references", refer_one_by_one)
        patch.setattr(caopd.Stage, "save_if_due", save_and_stop)
        yield


def run(flags: list[str], stop: list | None = None) -> None:
    with alike(stop):
        code = caopd.main(flags)
    assert code == (130 if stop else 0), (flags, code)


if __name__ == "__main__":
    with ranks.connected():
        ranks.connected = nullcontext  # once for all commands
        for job in json.loads(Path(sys.argv[1]).read_text()):
            run(**job)
