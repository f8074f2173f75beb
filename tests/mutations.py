"""Changes of files, texts and JSON that tests/fuzz.py tries: by the byte and by the structure."""

import copy
import functools
import json
import math
import operator
import random
import struct
from collections.abc import Iterator

Content = bytes | str | list | None  # of a file, of a text, of a command line; None is a directory

ODD = ["null", "true", "false", "0", "1", "2", "3", "-1", "0.5", "-0.0", "1e300", "1e-300", "1e999",
       "-1e999", "NaN", "Infinity", "1e400", str(2 ** 31), str(2 ** 63), str(2 ** 64), "9" * 400,
       "9" * 5000, '""', '"x"', '"0"', r'"\ud800"', r'"\u0000"', '"' + "é" * 300 + '"', '"../x"',
       '"/etc/passwd"', '"full_attention"', "[]", "[0]", '["x"]', "[[]]", "[null]", "{}",
       '{"content": 1}', '{"x": {}}', '"{% for %}"']
ODD += [left * n + "1" + right * n for n in (90, 900, 100000)
        for left, right in (("[", "]"), ('{"a":', "}"))]
NAMES = ["x", "", "\ud800", "\0", "é" * 300, "content", "../x", "a/b"]


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The paths of everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inside:
        yield (*path, key)
        if isinstance(item, (dict, list)):
            yield from places(item, (*path, key))


def mutated_json(rng: random.Random, value: dict | list) -> bytes:
    """JSON text in which something is replaced, missing, given twice, or under another name."""
    value, spliced = copy.deepcopy(value), {}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        paths = list(places(value))
        if not paths:
            break
        *path, key = rng.choice(paths)
        holder = functools.reduce(operator.getitem, path, value)
        change = rng.choice(("odd", "odd", "odd", "borrowed", "twice", "drop", "rename"))
        if change == "drop":
            del holder[key]
        elif change == "rename" and isinstance(holder, dict):
            holder[rng.choice(NAMES)] = holder.pop(key)
        elif change == "borrowed":
            other = functools.reduce(operator.getitem, rng.choice(paths), value)
            holder[key] = copy.deepcopy(other)
        else:
            new = rng.choice(ODD)
            if change == "twice" and isinstance(holder, dict):
                new = f"{json.dumps(holder[key])}, {json.dumps(key)}: {new}"
            spliced[f'"@{len(spliced)}@"'], holder[key] = new, f"@{len(spliced)}@"
    text = json.dumps(value)
    for mark, new in reversed(spliced.items()):
        text = text.replace(mark, new)
    return text.encode()


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes that are cut off, left out, doubled, overwritten or flipped."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        i = rng.randrange(len(changed) + 1)
        j = min(len(changed), i + rng.choice((1, 2, 8, 64)))
        match rng.randrange(6):
            case 0: del changed[i:]
            case 1: del changed[i:j]
            case 2: changed[i:i] = changed[i:j]
            case 3: changed[i:j] = rng.randbytes(j - i)
            case 4: changed[i:j] = bytes(rng.choice(b'0123456789.-e"[]{},:') for _ in range(i, j))
            case 5: changed[i:j] = bytes(byte ^ 1 << rng.randrange(8) for byte in changed[i:j])
    return bytes(changed)


def mutated_tensors(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with another header, other lengths, or numbers that are none."""
    length = int.from_bytes(content[:8], "little")
    header, body = content[8:8 + length], content[8 + length:]
    match rng.randrange(4):
        case 0: body = mutated_bytes(rng, body)
        case 1:
            place = 4 * rng.randrange(len(body) // 4)
            number = struct.pack("<f", rng.choice((math.nan, math.inf, -math.inf, 3e38, -0.0)))
            body = body[:place] + number + body[place + 4:]
        case _: header = mutated_json(rng, json.loads(header))
    length = rng.choice((0, 1, 2 ** 63, 2 ** 64 - 1)) if rng.random() < 0.05 else len(header)
    return length.to_bytes(8, "little") + header + body


def mutated(rng: random.Random, name: str, content: bytes) -> bytes | None:
    """What may stand in a file's place: a directory, other bytes, or a change of what it holds."""
    if rng.random() < 0.01:
        return rng.choice((None, b""))
    if rng.random() < 0.3:
        return mutated_bytes(rng, content)
    if name.endswith(".safetensors"):
        return mutated_tensors(rng, content)
    if name.endswith(".json"):
        return mutated_json(rng, json.loads(content))
    if name.endswith(".jsonl"):
        lines = content.splitlines()
        i = rng.randrange(len(lines))
        return b"\n".join([*lines[:i], mutated_json(rng, json.loads(lines[i])), *lines[i + 1:]])
    return mutated_bytes(rng, content)
