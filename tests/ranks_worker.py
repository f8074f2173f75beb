"""Runs commands of caopd.py, one after the other, on several ranks, for test_ranks.py.

    python tests/ranks_worker.py '[[2, [{"flags": ["--out", "x"]}]]]'

It is given numbers of ranks, each with its commands. The ranks are forks of this process, which has
imported everything: a new interpreter takes seconds. test_ranks.py runs the same commands in one
process. So that all sample the same whatever their number, each question here has random numbers of
its own. Its answers are right or wrong as a hash of the question says, because networks this small
are never right.
"""

import gc
import json
import os
import signal
import socket
import sys
import traceback
import zlib
from contextlib import contextmanager, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
import torch.distributed.fsdp

import caopd
import pipeline
import ranks
from model import Transformer
from stage import Stage

SAMPLE, REFER, SAVE = caopd.rollout, caopd.add_references, Stage.save_if_due
EVALUATE = caopd.evaluate


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


def evaluate_alone(model, *rest):
    """`caopd.evaluate`, which needs the memory of all sharded models but the one it evaluates."""
    sharded = [it for it in gc.get_objects()
               if issubclass(type(it), Transformer) and ranks.is_sharded(it)]
    assert len(sharded) == ranks.is_sharded(model)
    return EVALUATE(model, *rest)


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
        patch.setattr(pipeline, "evaluate", evaluate_alone)
        patch.setattr(Stage, "save_if_due", save_and_stop)
        yield


def run(flags: list[str], stop: list | None = None) -> None:
    with alike(stop):
        code = caopd.main(flags)
    assert code == (130 if stop else 0), (flags, code)


PATIENCE = 300  # seconds: ranks that wait for each other for ever are a failure


def as_torchrun(rank: int, size: int) -> dict[str, str]:
    """What torchrun tells a rank in its environment."""
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
            "TORCHELASTIC_RUN_ID": "test"}


def together(size: int, jobs: list[dict]) -> bool:
    """Runs the commands on `size` ranks; whether all went well."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(size):
        if pid := os.fork():
            started.append(pid)
            continue
        signal.alarm(PATIENCE)
        os.environ |= as_torchrun(rank, size) | {"MASTER_ADDR": "localhost",
                                                 "MASTER_PORT": str(port)}
        try:
            with ranks.connected():
                ranks.connected = nullcontext  # once for all commands
                for job in jobs:
                    run(**job)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return not any([os.waitpid(pid, 0)[1] for pid in started])


if __name__ == "__main__":
    torch.set_num_threads(1)  # A fork takes no threads with it.
    with torch.device("meta"):
        torch.nn.Embedding(1, 1)  # imports half of torch
    sys.exit(not all([together(size, jobs) for size, jobs in json.loads(sys.argv[1])]))
