"""Reading and writing files that may be a stranger's, or broken, or cut short.

A file that cannot be used is a BadInput, whose message is a sentence for the user.
"""

import dataclasses
import fcntl
import json
import math
import os
import reprlib
import shutil
import types
import typing
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ranks import collected, first, parted_like


class BadInput(ValueError):
    """A file, a flag or a request that cannot be served. The message says which, and why."""


def read_text(path: Path, absent: str | None = None) -> str:
    """Returns a file's text, or `absent`, where that is given, if there is no such file.

    Raises BadInput where the file cannot be read as UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        if absent is None:
            raise BadInput(f"{path}: there is no such file") from None
        return absent
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as UTF-8 text ({error})") from None


UNFINISHED = ".unfinished-"  # begins the name of a directory with a file that is being written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which becomes `path` in one step where the block ends well.

    So a file is complete or as it was before. What a killed process was writing stays in a
    directory of its own, with whatever the library that wrote it has put beside it.
    """
    with TemporaryDirectory(prefix=UNFINISHED, dir=path.parent) as directory:
        unfinished = Path(directory) / path.name
        yield unfinished
        os.umask(umask := os.umask(0))
        with suppress(OSError):  # Some file systems have no modes.
            unfinished.chmod(0o666 & ~umask)  # safetensors writes files that others may not read.
        os.replace(unfinished, path)


def write_text(path: Path, text: str) -> None:
    """Writes a file that is complete or, if the writing is cut short, as it was before."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Makes a directory that this process alone writes to, and removes what a killed one left.

    The claim is a lock that the system takes back when the process ends, however it ends.
    Raises BadInput where another process has it, and for whatever the system refuses in the block
    (a full disk, a missing permission): files are replaced as a whole, so what was there is kept.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: no directory can be made there ({error.strerror}); choose "
                       "another place") from None
    try:
        with (out / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(f"--out {out}: another process is writing there; wait for it, or "
                               "choose another directory") from None
            for pattern in (f"{UNFINISHED}*", f"*/{UNFINISHED}*", f"*/adapter/{UNFINISHED}*"):
                for directory in out.glob(pattern):
                    shutil.rmtree(directory)
            yield
    except (OSError, SafetensorError) as error:
        raise BadInput(f"--out {out}: {error}; what was saved before is kept, and the same command "
                       "goes on from it") from error


class Unbroken:
    """A stream for words that may get lost: writing to it never fails.

    What its encoding lacks is shown as ?. Once its reader is gone (`| head -1`, a closed terminal)
    or its disk is full, words go nowhere and the run goes on.
    """

    def __init__(self, stream: TextIO | None):
        """stream: None, which Python has for one that was closed from the start, shows nothing."""
        self.stream = stream or open(os.devnull, "w")

    def write(self, text: str) -> int:
        known = self.stream.encoding or "utf-8"
        try:
            self.stream.write(text.encode(known, "replace").decode(known))
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


# What a model directory is read from, beside its *.safetensors and *.jinja.
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json",
               "tokenizer.json", "tokenizer_config.json")


def fingerprint(directory: Path) -> int:
    """A checksum of everything that a model directory is read from.

    Raises BadInput where some of it may not be read.
    """
    total = 0
    try:
        for path in sorted(directory.iterdir()):
            read = path.name in MODEL_FILES or path.suffix in (".safetensors", ".jinja")
            if read and path.is_file():
                total = zlib.crc32(path.name.encode(), total)
                with path.open("rb") as file:
                    while part := file.read(2 ** 24):
                        total = zlib.crc32(part, total)
    except OSError as error:
        raise BadInput(f"{directory}: {error.filename or ''} cannot be read "
                       f"({error.strerror})") from None
    return total


DEEPEST = 100  # levels of nesting: what works on JSON later may recurse more than reading it does


def parse_json(text: str, where: str) -> object:
    """Parses JSON in the strict sense: no NaN, no Infinity, no halves of a character.

    where: what the message names, a file or a line of one.
    Raises BadInput for anything else, nesting over DEEPEST included.
    """
    def refuse(constant: str):
        raise ValueError(f"{constant} is not a number in JSON")

    def read_float(digits: str) -> float:
        number = float(digits)
        return number if math.isfinite(number) else refuse(f"{digits}, infinite once it is read,")

    try:
        value = json.loads(text, parse_constant=refuse, parse_float=read_float)
        if depth(value) > DEEPEST:
            raise RecursionError
        if "\\u" in text:  # Escapes can write half a character, a surrogate, which UTF-8 cannot.
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise BadInput(f"{where}: not JSON that can be read (it is nested too deeply)") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise BadInput(f"{where}: not JSON ({line}column {error.colno}: {error.msg})") from None
    except ValueError as error:
        raise BadInput(f"{where}: not JSON ({error})") from None


def depth(value: object) -> int:
    inside = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, inside), default=0) if isinstance(value, (dict, list)) else 0


def read_object(path: Path, required: bool = False) -> dict:
    """Returns the JSON object in a file, or {} where there is none and it is not `required`.

    Raises BadInput where it cannot be read, is not JSON, or holds something else.
    """
    text = read_text(path, absent=None if required else "{}")
    return an_object(parse_json(text, str(path)), str(path))


def an_object(value: object, where: str) -> dict:
    if not isinstance(value, dict):
        raise BadInput(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def to_json(value, indent: int | None = None) -> str:
    """Strict JSON: figures that do not exist (NaN) are null."""
    existing = map_leaves(lambda v: None if isinstance(v, float) and not math.isfinite(v) else v,
                          value)
    return json.dumps(existing, indent=indent)


def map_leaves(change: Callable, value):
    """A nested value with `change` applied to all in it that is no dict and no list."""
    if isinstance(value, dict):
        return {key: map_leaves(change, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_leaves(change, item) for item in value]
    return change(value)


# ------------------------------------------------------- JSON against its description, a dataclass

def within(least: float, most: float, default=dataclasses.MISSING):
    """A dataclass's field whose number, or each number of its list, is from `least` to `most`."""
    return dataclasses.field(default=default, metadata={"range": (least, most)})


def from_json(description: type, value: object, where: str):
    """Makes an instance of a dataclass from a JSON object.

    description: the dataclass. Its annotations say what each field holds: int, float, bool, str,
        dict, list, list[...], or several of them joined by |. Its __post_init__ may refuse more.
    value: the object, as parsed. Keys that the dataclass does not have are passed over, and null is
        the same as no key.
    where: what the message names, a file or a line of one.
    Raises BadInput for anything else, for a field without default that is missing, and for numbers
    out of the field's range, which is at most that of 64 bits.
    """
    given = {key: item for key, item in an_object(value, where).items() if item is not None}
    made = {}
    for field in dataclasses.fields(description):
        if field.name in given:
            made[field.name] = given[field.name]
            if problem := misfit(made[field.name], field):
                raise BadInput(f"{where}: `{field.name}` should be {problem}, "
                               f"not {reprlib.repr(made[field.name])}")
        elif field.default is dataclasses.MISSING:
            raise BadInput(f"{where}: no `{field.name}`")
    try:
        return description(**made)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def misfit(value: object, field: dataclasses.Field) -> str:
    """What a field should hold, in words, if the value is something else; otherwise nothing."""
    if not fits(value, field.type):
        return in_words(field.type)
    least, most = field.metadata.get("range", (-2 ** 63, 2 ** 63 - 1))
    numbers = [x for x in (value if isinstance(value, list) else [value])
               if isinstance(x, (int, float))]
    return "" if all(least <= x <= most for x in numbers) else f"from {least} to {most}"


def fits(value: object, kind) -> bool:
    """Whether a JSON value is what an annotation says. True is no int, and an int is a float."""
    if isinstance(kind, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return type(value) is list and all(fits(item, *typing.get_args(kind)) for item in value)
    return type(value) is kind or kind is float and type(value) is int


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text",
         dict: "an object", list: "a list"}


def in_words(kind) -> str:
    inner = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return " or ".join(in_words(one) for one in inner if one is not types.NoneType)
    return WORDS[kind] if not inner else f"a list, of {in_words(*inner)} alone"


def finite(tensor: Tensor, name: str, where: str) -> Tensor:
    """The tensor as it is. Raises BadInput where it holds NaN or infinity."""
    if not all(end.isfinite() for end in tensor.aminmax()):
        raise BadInput(f"{where}: tensor {name} holds NaN or infinity")
    return tensor


# ---------------------------------------------------------------------------- checkpoints

@dataclasses.dataclass
class Progress:
    """What a checkpoint says of itself, beside its tensors."""

    settings: dict  # those it was made with
    step: int = within(0, 2 ** 63)  # the next one


class Checkpoint:
    """A file with the tensors of an interrupted run, complete or absent, and never unpickled.

    settings: the run's; a checkpoint of others is passed over.
    tensors: all that a step of the run changes, by name. In the file they are whole, however many
    ranks share them. Every rank saves and resumes; rank 0 writes.
    """

    def __init__(self, path: Path, settings: dict, tensors: dict[str, Tensor]):
        self.path, self.settings, self.tensors = path, settings, tensors

    def save(self, step: int) -> None:
        """step: the one to go on from."""
        tensors = collected({name: tensor.detach() for name, tensor in self.tensors.items()})
        if not first():
            return
        metadata = {"step": str(step), "settings": json.dumps(self.settings)}
        with replacing(self.path) as unfinished:
            save_file(tensors, unfinished, metadata=metadata)

    @torch.no_grad()
    def resume(self) -> int:
        """Fills the tensors from the file, one by one, and returns the step to go on from.

        That is 0, and the tensors stay as they are, where there is no file or it has other
        settings. Raises BadInput for a file that cannot be used.
        """
        if not self.path.exists():
            return 0
        where = f"{self.path} (delete it to start this stage again)"
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = (file.metadata() or {}).items()
            raw = {key: parse_json(text, where) for key, text in metadata}
            progress = from_json(Progress, raw, where)
            if progress.settings != self.settings:
                return 0
            for name, tensor in self.tensors.items():
                # Opened anew for each tensor: what an open file has shown stays in memory.
                with safe_open(self.path, framework="pt", device=str(tensor.device)) as file:
                    stored = file.get_tensor(name)
                if (stored.dtype, stored.shape) != (tensor.dtype, tensor.shape):
                    raise BadInput(f"{where}: tensor {name} is of another dtype or shape")
                tensor.copy_(parted_like(finite(stored, name, where), tensor))
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{where}: not a readable checkpoint ({error})") from None
        return progress.step
