"""Mutated input of every kind that a stranger can hand over: it works, or a sentence refuses it.

    python tests/fuzz.py                                    every kind, 2000 cases each
    python tests/fuzz.py --kind config --cases 100000 --seed 7

A case that ends in any exception but BadInput, takes over LIMIT seconds of computing, or is accepted and breaks
an invariant is a failure. Each distinct failure is printed once, with a case that was made smaller
for as long as it failed alike. The exit code is 1 where there is one. Everything runs in this
process, on models of a few hundred weights. tests/test_fuzz.py calls the same function.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import math
import operator
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import types
import typing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import safetensors.torch
import tokenizers
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import caopd
import data
import model
from caopd import Args, Stage
from data import Tokenizer
from files import BadInput
from model import Config, Transformer

LIMIT = 5  # seconds of computing for a case, however busy the machine is
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------- mutations

Content = bytes | str | list | None  # of a file, of a text, of a command line; None is a directory

ODD = ["null", "true", "false", "0", "1", "2", "3", "-1", "0.5", "-0.0", "1e300", "1e-300", "1e999",
       "-1e999", "NaN", "Infinity", "1e400", str(2 ** 31), str(2 ** 63), str(2 ** 64), "9" * 400,
       "9" * 5000, '""', '"x"', '"0"', r'"\ud800"', r'"\u0000"', '"' + "é" * 300 + '"', '"../x"',
       '"/etc/passwd"', '"full_attention"', "[]", "[0]", '["x"]', "[[]]", "[null]", "{}",
       '{"content": 1}', '{"x": {}}', '"{% for %}"']
ODD += [left * n + "1" + right * n for n in (90, 900, 100000)
        for left, right in (("[", "]"), ('{"a":', "}"))]
NAMES = ["x", "", "\ud800", "\0", "é" * 300, "content", "../x", "a/b"]


def places(value: object, path: tuple = ()) -> typing.Iterator[tuple]:
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
            holder[key] = copy.deepcopy(functools.reduce(operator.getitem, rng.choice(paths), value))
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


@contextlib.contextmanager
def put(path: Path, content: bytes | None):
    """The file at `path` holds this for a while."""
    before = path.read_bytes() if path.exists() else None
    path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)
    try:
        yield
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)


# ------------------------------------------------------------------------------- the kinds

# A kind makes a case, (name, content), and tries it: `attempt` returns where the input is accepted
# and keeps the invariants, raises BadInput where it is refused, and anything else is a failure.

def fits(value: object, kind: object) -> bool:
    """Whether a value is of an annotated type, strictly: True is no int, infinity is no float."""
    if isinstance(kind, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return type(value) is list and all(fits(item, *typing.get_args(kind)) for item in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is kind


def tiny(**changes) -> Config:
    return Config(**dict(model_type="qwen3", vocab_size=24, hidden_size=8, intermediate_size=8,
                         num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                         head_dim=4, eos_token_id=1) | changes)


class ConfigFile:
    """config.json of each family."""

    def __init__(self, scratch: Path):
        self.directory, self.again = scratch, scratch / "again"
        self.again.mkdir()
        golden = sorted((ROOT / "tests" / "golden").glob("*/config.json"))
        self.seeds = {path.parent.name: path.read_bytes() for path in golden}

    def case(self, rng: random.Random) -> tuple[str, Content]:
        name = rng.choice(list(self.seeds))
        return name, mutated(rng, "config.json", self.seeds[name])

    def attempt(self, name: str, content: Content) -> None:
        with put(self.directory / "config.json", content):
            config = Config.from_pretrained(self.directory)
        for one in fields(Config):
            value = getattr(config, one.name)
            assert fits(value, one.type), f"{one.name} is no {one.type}"
        positions = torch.tensor([0, 1, config.max_position_embeddings - 1])
        for window in (None, config.sliding_window):
            if config.head_dim < 2 ** 20:
                cos, sin = model.rope_table(config, positions, window, torch.float32)
                assert bool((cos + sin).isfinite().all()), "the rotary table is not finite"
        (self.again / "config.json").write_text(json.dumps(config.to_dict()))
        assert Config.from_pretrained(self.again) == config, "written, it reads otherwise"


class Weights:
    """A model directory: safetensors headers and bytes, and a config.json of other shapes."""

    files = ("model.safetensors",) * 4 + ("config.json",)

    def __init__(self, scratch: Path):
        self.directory = scratch
        torch.manual_seed(0)
        self.model = Transformer(tiny())
        self.model.save_pretrained(scratch)
        self.seeds = {name: (scratch / name).read_bytes() for name in self.files
                      if (scratch / name).exists()}

    def case(self, rng: random.Random) -> tuple[str, Content]:
        name = rng.choice(self.files)
        return name, mutated(rng, name, self.seeds[name])

    def attempt(self, name: str, content: Content) -> Transformer:
        with put(self.directory / name, content):
            loaded = Transformer.from_pretrained(self.directory, dtype=torch.float32)
        expected = self.model.state_dict()
        if name == "config.json":
            with torch.device("meta"):
                expected = Transformer(loaded.config).state_dict()
            loaded(torch.tensor([[1, 2, 3]]))
        assert loaded.state_dict().keys() == expected.keys(), "other tensors"
        for key, weight in loaded.state_dict().items():
            assert weight.shape == expected[key].shape and weight.dtype == torch.float32, key
            assert bool(weight.isfinite().all()), "a weight is not finite"
        return loaded


class Index(Weights):
    """model.safetensors.index.json over two shards."""

    files = ("model.safetensors.index.json",)

    def __init__(self, scratch: Path):
        super().__init__(scratch)
        (scratch / "model.safetensors").unlink()
        weights = list(self.model.state_dict().items())
        shards = {"a.safetensors": dict(weights[:4]), "b.safetensors": dict(weights[4:])}
        for shard, tensors in shards.items():
            model.save_file(tensors, scratch / shard)
        named = {key: shard for shard, tensors in shards.items() for key in tensors}
        self.seeds = {self.files[0]: json.dumps({"metadata": {}, "weight_map": named}).encode()}

    def attempt(self, name: str, content: Content) -> None:
        loaded = super().attempt(name, content)
        assert all(map(torch.equal, loaded.parameters(), self.model.parameters())), "other weights"


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12+34= é😀\n"}]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}"


def byte_level() -> Tokenizer:
    """A tokenizer of bytes, with merges that straddle the beginning of a confidence."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("C", "o"), ("Co", "n"), ("Ċ", "Con"), ("f", "i"), ("Ġ", "Con"), ("0", "."), ("Ġ", "0.")]
    vocabulary = ["<eos>", *alphabet, *("".join(merge) for merge in merges)]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(
        {token: i for i, token in enumerate(vocabulary)}, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    config = {"eos_token": {"content": "<eos>"}, "chat_template": TEMPLATE}
    return Tokenizer(backend, config, {"eos_token_id": [0]})


class TokenizerFiles:
    """tokenizer.json and the files beside it, of a tokenizer of words and of one of bytes."""

    def __init__(self, scratch: Path):
        self.directory = scratch
        for name, tokenizer in (("words", data.toy_tokenizer()), ("bytes", byte_level())):
            tokenizer.save_pretrained(scratch / name)
            Transformer(tiny()).save_pretrained(scratch / name)
            (scratch / name / "chat_template.jinja").write_text(TEMPLATE)
        self.names = [str(path.relative_to(scratch)) for path in sorted(scratch.glob("*/*.*"))
                      if path.suffix != ".safetensors"]

    def case(self, rng: random.Random) -> tuple[str, Content]:
        name = rng.choice(self.names)
        return name, mutated(rng, name, (self.directory / name).read_bytes())

    def attempt(self, name: str, content: Content) -> None:
        path = self.directory / name
        with put(path, content):
            tokenizer = Tokenizer.from_pretrained(path.parent)
        assert tokenizer.eos_ids, "no end token"
        for token in tokenizer.eos_ids:
            assert type(token) is int and 0 <= token < 2 ** 31, "an end token is no token"
        ids = tokenizer.chat(CHAT)
        assert type(tokenizer.decode(ids + tokenizer.eos_ids)) is str
        tokenizer.save_pretrained(self.directory / "again")
        again = Tokenizer.from_pretrained(self.directory / "again")
        assert again.chat(CHAT) == ids and again.eos_ids == tokenizer.eos_ids, "saved, it differs"


class Template(TokenizerFiles):
    """chat_template.jinja: pieces of templates in any order, and what a hostile one would try."""

    pieces = """{% for m in messages %}|{% endfor %}|{{ m.role }}|{{ messages[0].content }}|{% if
        messages[0].role == 'system' %}|{% endif %}|{% else %}|{{ m['content'] | trim }}|{{ x }}|{%-
        set ns = namespace(n=0) %}|{% set ns.n = ns.n + 1 %}|{{ raise_exception('no') }}|{% break %}
        |{{ strftime_now('%Y') }}|{{ strftime_now(1) }}|{{ messages | tojson }}|{{ x.y.z }}|{{ 1/0 }}
        |{{ 'a' * 10**9 }}|{{ lipsum(n=10**9) }}|{% for i in range(99999) %}|{{ 9**9**9 }}|{{ ''
        .__class__.__mro__ }}|{{ '%999999999d' % 1 }}|{{ 'a'.center(10**9) }}|{{ [1] * 10**9 }}|{{
        range(10**9) | list }}|{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}|{% include 'x' %}
        |{% extends 'x' %}|{% generation %}|{% endgeneration %}|{{ messages.append(1) }}|{{ '\ud800' }}
        |{{ "%s" | format(1, 2) }}|{% raw %}|{# |{{ |{% set m = messages[1] %}|{{ eos_token }}|{{
        cycler }}|{{ messages | map('x') | list }}|{{ '{0.__class__}'.format(1) }}|{{ dict(a=1) }}|{%
        filter upper %}|{% endfilter %}|{{ 'x' | indent(10**9) }}|{{ self }}|{% block b %}{{ self.b()
        }}{% endblock %}|{{ [[1]] | tojson(indent='x') }}|{{ messages | tojson(indent=10**9) }}|"""

    def case(self, rng: random.Random) -> tuple[str, Content]:
        text = "".join(rng.choices(self.pieces.split("|"), k=rng.randrange(1, 8)))
        if rng.random() < 0.2:
            text = rng.choice(("{% for m in messages %}", "{% for i in range(99999) %}")) * \
                rng.choice((1, 3, 30)) + text + "{% endfor %}" * rng.choice((1, 3, 30))
        content = text.encode(errors="surrogatepass")
        name = "words/chat_template.jinja"
        return name, mutated(rng, name, content) if rng.random() < 0.3 else content


class Jsonl:
    """A file of questions, of each task."""

    call = [{"Action": "search", "Action_Input": '{"q": "x", "n": 2}'}]
    rows = {"arithmetic": [{"prompt": "1+1=", "answer": 2, "grade": "easy"},
                           {"prompt": "2+2=", "answer": "-4", "demo": "it is -4", "system": "s"}],
            "mcq": [{"prompt": "Which?", "answer": "B"},
                    {"prompt": "Who?", "answer": "C", "demo": "The answer is C"}],
            "tool": [{"prompt": "Find x.", "answer": call}, {"prompt": "Both.", "answer": 2 * call}]}

    def __init__(self, scratch: Path):
        self.path, self.tokenizer = scratch / "questions.jsonl", byte_level()

    def case(self, rng: random.Random) -> tuple[str, Content]:
        task = rng.choice(list(self.rows))
        content = "\n".join(map(json.dumps, self.rows[task])).encode()
        return task, mutated(rng, self.path.name, content)

    def attempt(self, name: str, content: Content) -> None:
        with put(self.path, content):
            examples = data.load_jsonl(self.path, name)
        assert examples, "no examples"
        for example in examples:
            assert data.verify(example, example.demo), "its own demonstration is wrong"
            for one in ("question", "system", "demo", "grade"):
                assert type(getattr(example, one)) is str, one
            json.dumps(example.grade).encode()
        task = data.listed_task(examples, examples, 0)
        for step in (0, 1):
            for document in data.documents(task, 4, step, 2, 0.5, 0.5, 0):
                self.tokenizer.chat(document.messages)
                self.tokenizer.encode(document.completion)


class Flags:
    """The command line; and, now and then, all of main with a model that is refused at the end."""

    odd = ["0", "1", "2", "8", "-1", "0.5", "1e-40", "1e30", "1e999", "nan", "inf", "-inf", "", "x",
           "auto", "cpu", "cpu:1", "cuda:0", "cuda:99", "meta", "both", "opd,", "caopd,caopd", "\0",
           "\ud800", "é" * 300, "../x", "/etc/passwd", "/dev/null", "a/b", "~", "1_0", " 1", "٣",
           str(2 ** 31), str(2 ** 63), str(2 ** 64), str(10 ** 12), "9" * 400, "9" * 5000]

    def __init__(self, scratch: Path):
        self.broken, self.out = scratch / "broken", scratch / "out"
        tokenizer = data.toy_tokenizer()
        tokenizer.save_pretrained(self.broken)
        Transformer(tiny(vocab_size=21)).save_pretrained(self.broken)
        (self.broken / "model.safetensors").write_bytes(b"x" * 100)
        self.vocabulary = tokenizer

    def case(self, rng: random.Random) -> tuple[str, Content]:
        argv = []
        for one in rng.choices(fields(Args), k=rng.randrange(1, 4)):
            usual = one.metadata["choices"] or [str(one.default)]
            argv.append("--" + one.name.replace("_", "-")[:rng.choice((99, 99, 99, 3))])
            if one.type is not bool or rng.random() < 0.05:
                argv.append(rng.choice(self.odd if rng.random() < 0.7 else usual))
        return "main" if rng.random() < 0.01 else "flags", argv

    def attempt(self, name: str, content: Content) -> None:
        if name == "main":
            return self.run([*content, f"--model={self.broken}", f"--out={self.out}"])
        args = caopd.parse_args(content)
        for one in fields(Args):
            value = getattr(args, one.name)
            assert fits(value, one.type), f"{one.name} is no {one.type}"
        device = caopd.pick_device(args.device)
        torch.empty(1, device=device)
        args = replace(args, dtype=caopd.pick_dtype(args, device))
        caopd.seeded(args.seed, "rollout", 0, CPU)
        torch.manual_seed(args.seed)
        caopd.find_model(args.model if "/" not in args.model else "")  # never asks the hub
        caopd.memory_needed(caopd.toy_model(args, self.vocabulary), 100, args)

    def run(self, argv: list[str]) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = caopd.main(argv)
        assert code == 2 and not self.out.exists(), f"exit code {code}, or something was written"
        raise BadInput(printed.getvalue())


class Output:
    """What an earlier run left in --out: metrics.jsonl and a checkpoint."""

    settings = {"stage": "opd", "questions": 0, "seed": 0}

    def __init__(self, scratch: Path):
        self.out, self.model = scratch, Transformer(tiny())
        self.optimizer = caopd.AdamW(self.model, 0.0, 1.0)
        stage = self.stage()
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
            for step in stage.steps(3):
                stage.log(step, {"loss": 0.5, "format": 1.0})
                stage.save_if_due(step)
        self.names = [str(path.relative_to(scratch)) for path in sorted(scratch.rglob("*.*"))]

    def stage(self) -> Stage:
        return Stage("opd", self.out, self.settings, self.optimizer, None, 1)

    def case(self, rng: random.Random) -> tuple[str, Content]:
        name = rng.choice(self.names)
        return name, mutated(rng, name, (self.out / name).read_bytes())

    def attempt(self, name: str, content: Content) -> None:
        metrics = self.out / "metrics.jsonl"
        with put(metrics, metrics.read_bytes()), put(self.out / name, content):
            stage = self.stage()
            assert type(stage.start) is int and 0 <= stage.start < 2 ** 31, "a step that is none"
            rows = [json.loads(line) for line in metrics.read_text().splitlines()]
            assert all(row.get("stage") != "opd" or row["step"] < stage.start for row in rows)
        if stage.start and name.endswith(".safetensors"):
            for key, stored in safetensors.torch.load(content).items():
                tensor = self.optimizer.tensors().get(key, stored)
                assert tensor.dtype == stored.dtype and torch.equal(tensor, stored), "other tensors"
                assert bool(tensor.isfinite().all()), "tensors that are not finite"


class Text:
    """What a model may write, read by the parser of confidences and by each verifier."""

    pieces = ["Confidence:", "confidence: ", "CONFIDENCE:\t", "Confidence: 0.85", "Conﬁdence: ", "%",
              "1", "0.", ".5", "85%", "9" * 5000, "٣", "²", "½", "nan", "inf", "1e5", "-", ",000", " ",
              "\n", "\r", "\t", "\u2028", "\0", "\ud800", "é", "😀", "<answer>", "</answer>", "A", "b",
              "answer is ", "the answer: (", "<think>", "</think>", ")", "Action: x", "Action: search", "Action Input: {",
              "Action_Input: ", '{"q": "x", "n": 2}', '{"q": NaN}', "{}", "[" * 2000, '{"a":' * 2000,
              "}", '"', "x", " " * 500, "\n" * 500, "Action: x\n" * 200, "A " * 500, "1," * 500]
    examples = [data.Example("arithmetic", "", "64"), data.Example("mcq", "", "B"),
                data.Example("tool", "", Jsonl.call)]

    def __init__(self, scratch: Path):
        pass

    def case(self, rng: random.Random) -> tuple[str, Content]:
        pieces = rng.choices(self.pieces, k=rng.randrange(12))
        if rng.random() < 0.2:
            pieces.append(chr(rng.randrange(0x110000)))
        return "text", "".join(rng.sample(pieces, len(pieces)))

    def attempt(self, name: str, content: Content) -> None:
        value, segment = data.parse_confidence(content), data.confidence_segment(content)
        assert value is None or type(value) is float and 0 <= value <= 1, "a confidence out of range"
        answer = content[:segment.start()] if segment else content
        if data.still_thinking(content):
            answer += "</think>"
        restated = data.stated(answer, 0.37)
        assert data.parse_confidence(restated) == 0.37, "the segment that was put in is not read"
        for example in self.examples:
            assert type(data.verify(example, content)) is bool
            # repr, since NaN among a call's arguments is not equal to itself
            before, after = (repr(data.extract(example, text)) for text in (content, restated))
            assert before == after, f"{example.task}: the confidence changes the answer"


class Tokens:
    """What a model may write, as token ids: the splice leaves the answer's tokens alone."""

    def __init__(self, scratch: Path):
        self.tokenizers = {"words": data.toy_tokenizer(), "bytes": byte_level()}

    def case(self, rng: random.Random) -> tuple[str, Content]:
        name = rng.choice(list(self.tokenizers))
        tokenizer, ids = self.tokenizers[name], []
        for _ in range(rng.randrange(8)):
            piece = rng.choice([p for p in Text.pieces if len(p) < 100 and p != "\ud800"])
            ids += tokenizer.encode(piece)
            if rng.random() < 0.3:
                ids.append(rng.randrange(tokenizer.backend.get_vocab_size()))
        return name, ids + tokenizer.eos_ids[:rng.randrange(2)]

    def attempt(self, name: str, content: Content) -> None:
        tokenizer = self.tokenizers[name]
        text, value = tokenizer.decode(content), len(content) % 101 / 100
        segment = data.confidence_segment(text)
        n, before = data.split_completion(tokenizer, content)
        new, kept = data.replace_confidence(tokenizer, content, value)
        assert n == kept and new[:n] == content[:n], "the answer's tokens have changed"
        assert new[-1] == tokenizer.eos_ids[0], "no end"
        answer = text[:segment.start()] if segment else text + before
        assert tokenizer.decode(new) == answer + data.format_confidence(value), "another text"
        assert data.parse_confidence(tokenizer.decode(new)) == value, "another confidence"


KINDS = {"config": ConfigFile, "weights": Weights, "index": Index, "tokenizer": TokenizerFiles,
         "template": Template, "jsonl": Jsonl, "flags": Flags, "output": Output, "text": Text,
         "tokens": Tokens}


# ------------------------------------------------------------------------------- the run

class Hang(BaseException):
    """A case took over LIMIT seconds. No `except Exception` on the way catches it."""


@dataclass
class Report:
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    failures: dict[str, list] = field(default_factory=dict)  # where it failed: [count, name, content]


def outcome(kind, name: str, content: Content) -> str:
    """"accepted", "refused", or where and how the attempt failed."""
    def ring(*_):
        raise Hang(f"over {LIMIT} seconds")

    signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            kind.attempt(name, content)
    except BadInput:
        return "refused"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        frame = [frame for frame in traceback.extract_tb(error.__traceback__)
                 if Path(frame.filename).parent in (ROOT, ROOT / "tests") and frame.name != "ring"][-1]
        why = str(error) if isinstance(error, AssertionError) else ""
        return f"{Path(frame.filename).name}:{frame.lineno} {type(error).__name__} {why}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "accepted"


def shrunk(kind, name: str, content: Content, failure: str, attempts: int = 600) -> Content:
    """The content without whatever it fails alike without: ever smaller parts are left out."""
    size = len(content or "")
    while size and "Hang" not in failure:
        start = 0
        while start < len(content) and attempts:
            shorter, attempts = content[:start] + content[start + size:], attempts - 1
            if outcome(kind, name, shorter) == failure:
                content = shorter
            else:
                start += size
        size //= 2
    return content


def fuzz(name: str, cases: int, seed: int) -> Report:
    """Tries so many cases of a kind."""
    report = Report()
    with tempfile.TemporaryDirectory() as scratch:
        kind = KINDS[name](Path(scratch))
        for i in range(cases):
            case = kind.case(random.Random(f"{seed} {name} {i}"))
            result = outcome(kind, *case)
            report.cases += 1
            report.accepted += result == "accepted"
            report.refused += result == "refused"
            if result in report.failures:
                report.failures[result][0] += 1
            elif result not in ("accepted", "refused"):
                report.failures[result] = [1, case[0], shrunk(kind, *case, result)]
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=KINDS, action="append", help="one kind (all)")
    parser.add_argument("--cases", type=int, default=2000, help="of each kind [2000]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 ** 32, -1))  # a case has 4 GiB
    failed = False
    print(f"{'kind':12}{'cases':>10}{'accepted':>10}{'refused':>10}{'failed':>10}")
    for name in options.kind or KINDS:
        report = fuzz(name, options.cases, options.seed)
        count = sum(count for count, *_ in report.failures.values())
        print(f"{name:12}{report.cases:>10}{report.accepted:>10}{report.refused:>10}{count:>10}",
              flush=True)
        for failure, (count, file, content) in report.failures.items():
            print(f"    {failure}\n        {count} times; {file}: {content!r:.400}", flush=True)
        failed |= bool(report.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
