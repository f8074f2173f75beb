"""Reading and writing files that may be a stranger's, or broken, or cut short.

A file that cannot be used is a BadInput, whose message is a sentence for the user.
"""

import json
import os
from pathlib import Path


class BadInput(ValueError):
    """A file, a flag or a request that cannot be served. The message says which, and why."""


def read_text(path: Path) -> str:
    """Returns a file's text. Raises BadInput where it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as UTF-8 text ({error})") from None


def write_text(path: Path, text: str) -> None:
    """Writes a file that is complete or, if the writing is cut short, not there."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def parse_json(text: str, where: str) -> object:
    """Parses JSON in the strict sense, which has no NaN and no Infinity.

    where: what the message names, a file or a line of one.
    Raises BadInput for anything else, nesting too deep to follow included.
    """
    def refuse(constant: str):
        raise ValueError(f"{constant} is not a number in JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise BadInput(f"{where}: not JSON that can be read (it is nested too deeply)") from None
    except ValueError as error:
        raise BadInput(f"{where}: not JSON ({error})") from None


def read_object(path: Path, required: bool = False) -> dict:
    """Returns the JSON object in a file of a model directory, or {} where there is no such file.

    Raises BadInput where it is `required` and missing, cannot be read, is not JSON, or holds
    something else.
    """
    if not path.exists():
        if required:
            raise BadInput(f"{path.parent}: no {path.name} there; "
                           "pass a Hugging Face model directory")
        return {}
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
