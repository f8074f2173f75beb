"""Interrupts runs of caopd.py in every way that a machine can, and compares what they end in.

    python tests/crash.py                          every file operation in four ways, and 60 kills
    python tests/crash.py --random 3 --every 20    a sample (tests/test_caopd.py runs one)

A tiny run of the embedded world is made once without an interruption, and its file operations in
--out are counted: a file opened for writing, renamed or removed, a directory made or removed. Then,
at each of them, a run of its own
    is killed (SIGKILL) just before the operation,
    is killed in the middle of the file that was being written, which stays cut in half,
    finds the disk full (ENOSPC), which has to end in one sentence and exit code 2,
    is asked to stop (SIGTERM), which has to end as Ctrl-C does, with exit code 130;
and --random runs are killed one to three times at moments that --seed draws. Each is then given
again until it ends, and every file that it leaves must have the bytes of the uninterrupted run's.
The seconds that metrics.jsonl and results.json report are left out. Linux only.
"""

import argparse
import errno
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import caopd

FLAGS = ["--width", "16", "--layers", "1", "--sft-steps", "4", "--sft-documents", "4",
         "--steps", "3", "--prompts", "2", "--rollouts", "2", "--eval-questions", "8",
         "--oracle", "0", "--paper-samples", "0", "--save-every", "1", "--method", "opd,caopd",
         "--out", "out"]
KILLED, CUT, FULL, STOPPED = ("killed before it", "killed within a file", "disk full",
                              "asked to stop")
RANDOM = "killed at random"
EXIT_CODES = {KILLED: -signal.SIGKILL, CUT: -signal.SIGKILL, FULL: 2, STOPPED: 130}
WRITES = {"open", "os.mkdir", "os.rename"}  # a full disk refuses these
REMOVES = {"os.remove", "os.rmdir"}


class FileOperations:
    """An audit hook that counts the file operations in `out` and lets something happen at one."""

    def __init__(self, out: Path, happens: str = "", at: int = -1):
        self.out, self.happens, self.at, self.seen = out, happens, at, []
        self.written, self.size = "", 0  # the file that was opened last, and its size then

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in WRITES | REMOVES or not isinstance(arguments[0], (str, os.PathLike)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        path = self.resolve(arguments[0], arguments[-1] if event != "open" else -1)
        if not path.startswith(str(self.out)) or event == "os.mkdir" and os.path.isdir(path):
            return
        self.seen.append(event)
        if len(self.seen) - 1 == self.at:
            self.interrupt(path if event == "os.rename" else self.written)
        self.written, self.size = path if event == "open" else "", size(path)

    def resolve(self, path: str | os.PathLike, directory: int) -> str:
        """The absolute path; `directory` is the descriptor that it is relative to, if not -1."""
        base = os.readlink(f"/proc/self/fd/{directory}") if directory >= 0 else os.getcwd()
        return os.path.join(base, os.fspath(path))

    def interrupt(self, unfinished: str) -> None:
        if self.happens == FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), unfinished)
        if self.happens == STOPPED:
            return os.kill(os.getpid(), signal.SIGTERM)
        if self.happens == CUT and os.path.isfile(unfinished):
            before = self.size if unfinished == self.written else 0
            os.truncate(unfinished, (before + size(unfinished)) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def size(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def start(directory: Path, hook: FileOperations | None = None) -> int:
    """Starts a run with its --out in `directory` and its words in directory/log; its process id.

    A fork of this process, which has imported everything: a new interpreter takes seconds.
    """
    directory.mkdir(exist_ok=True)
    if pid := os.fork():
        return pid
    os.chdir(directory)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        if hook:
            sys.addaudithook(hook)
        code = caopd.main(FLAGS)
        if hook and hook.at < 0:
            Path("operations.json").write_text(json.dumps(hook.seen))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def finish(pid: int, patience: float = 120) -> int:
    """Waits for a process; its exit code, negative for a signal. One that hangs is killed."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"a run took over {patience} seconds")


def left_behind(directory: Path) -> dict[str, bytes]:
    """Every file in --out with its bytes, without the seconds that things took."""
    files = {}
    for path in sorted((directory / "out").glob("**/*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name in ("metrics.jsonl", "results.json"):
                content = re.sub(rb'"seconds": [0-9.e-]+', b"", content)
            files[str(path.relative_to(directory))] = content
    return files


def differences(directory: Path, expected: dict[str, bytes]) -> list[str]:
    """Gives the command again, and says what is then not as in the uninterrupted run."""
    code = finish(start(directory))
    if code != 0:
        return [f"the next run ended with {code}: {last_words(directory)}"]
    files = left_behind(directory)
    return [f"{name} {'differs' if name in files.keys() & expected.keys() else 'is too much'}"
            if name in files else f"{name} is missing"
            for name in sorted(files.keys() | expected.keys())
            if files.get(name) != expected.get(name)]


def last_words(directory: Path) -> str:
    return " / ".join((directory / "log").read_text(errors="replace").splitlines()[-3:])


def interrupted_at(directory: Path, happens: str, at: int) -> list[str]:
    """A run to which this happens at its file operation number `at`; what is wrong with how it
    ended."""
    code = finish(start(directory, FileOperations(directory / "out", happens, at)))
    words = (directory / "log").read_text(errors="replace")
    if code != EXIT_CODES[happens] or "Traceback" in words:
        return [f"ended with {code}: {last_words(directory)}"]
    return []


def killed_at_random(directory: Path, rng: random.Random, seconds: float) -> int:
    """Kills one to three runs that go on from each other, each within `seconds`; how many it hit.

    A run that had ended by then counts as none.
    """
    hit = 0
    for _ in range(rng.randint(1, 3)):
        pid, moment = start(directory), rng.uniform(0, seconds)
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        hit += finish(pid) == -signal.SIGKILL
    return hit


def main() -> int:
    parser = argparse.ArgumentParser(prog="crash.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments [0]")
    parser.add_argument("--random", type=int, default=60, help="runs killed at random [60]")
    parser.add_argument("--every", type=int, default=1, metavar="N",
                        help="take every Nth file operation, from one that --seed draws [1: all]")
    flags = parser.parse_args()
    rng, interruptions, failed = random.Random(flags.seed), Counter(), Counter()
    torch.set_num_threads(1)  # a fork takes no threads with it
    with torch.device("meta"):
        torch.nn.Embedding(1, 1)  # imports half of torch, here once and not in every run

    with tempfile.TemporaryDirectory() as temporary:
        whole, began = Path(temporary) / "whole", time.monotonic()
        code = finish(start(whole, FileOperations(whole / "out")))
        seconds = time.monotonic() - began
        if code != 0:
            print(f"the uninterrupted run ended with {code}: {last_words(whole)}")
            return 1
        operations = json.loads((whole / "operations.json").read_text())
        expected = left_behind(whole)
        print(f"The uninterrupted run: {len(operations)} file operations, {len(expected)} files, "
              f"{seconds:.1f} seconds.", flush=True)

        def report(kind: str, where: str, directory: Path, wrong: list[str]) -> None:
            wrong = wrong + differences(directory, expected)
            failed[kind] += bool(wrong)
            for line in wrong:
                print(f"{kind}, {where}: {line}", flush=True)

        for happens in EXIT_CODES:
            for at in range(rng.randrange(flags.every), len(operations), flags.every):
                if happens == FULL and operations[at] not in WRITES:
                    continue
                directory = Path(temporary) / f"{happens} {at}"
                wrong = interrupted_at(directory, happens, at)
                interruptions[happens] += 1
                report(happens, f"operation {at} ({operations[at]})", directory, wrong)
        for run in range(flags.random):
            directory = Path(temporary) / f"random {run}"
            interruptions[RANDOM] += killed_at_random(directory, rng, seconds)
            report(RANDOM, f"run {run}", directory, [])

    print(f"\n{'interruption':24}{'how often':>12}{'runs that ended otherwise':>28}")
    for kind, count in interruptions.items():
        print(f"{kind:24}{count:>12}{failed[kind]:>28}")
    print(f"{'all':24}{interruptions.total():>12}{failed.total():>28}")
    return 1 if failed.total() else 0


if __name__ == "__main__":
    sys.exit(main())
