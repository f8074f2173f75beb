"""Mutated input of every kind that a stranger can hand over: it works, or a sentence refuses it.

    python tests/fuzz.py                                        2000 cases of every kind
    python tests/fuzz.py --kind config --cases 100000 --seed 7

A case that ends in any exception but BadInput, takes over LIMIT seconds of computing, or is
accepted and breaks an invariant is a failure. Each distinct failure is printed once, with a case
made as small as it can be while it fails alike, and the exit code is 1. Everything runs in this
process, on a few hundred weights. tests/test_fuzz.py calls the same function. A crash of the whole
process is seen by everyone: the case before it is the one to look at, and a seed brings it back.
"""

import argparse
import contextlib
import io
import json
import math
import random
import resource
import signal
import sys
import tempfile
import traceback
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
import pipeline
import questions
from caopd import Args
from data import Tokenizer
from files import BadInput, claimed, fits
from memory import memory_needed
from model import Config, Transformer
from mutations import Content, mutated
from stage import Stage

LIMIT = 5  # seconds of computing for a case, however busy the machine is
ARGS = caopd.parse_args(["--eval-questions", "1"])


# ------------------------------------------------------------------------------- the kinds


class Kind:
    """A kind of input: it makes cases, (name, content), and tries them.

    `attempt` returns where a case is accepted and keeps the invariants, and raises BadInput where
    it is refused. Anything else is a failure. seeds: the files to change, by their names.
    """

    def __init__(self, scratch: Path):
        self.directory, self.seeds = scratch, {}

    def keep_files(self) -> None:
        """The files that are there become the seeds."""
        self.seeds = {str(path.relative_to(self.directory)): path.read_bytes()
                      for path in sorted(self.directory.rglob("*.*")) if path.stat().st_size}

    def case(self, rng: random.Random) -> tuple[str, Content]:
        name = rng.choice(list(self.seeds))
        return name, mutated(rng, name, self.seeds[name])

    @contextlib.contextmanager
    def put(self, name: str, content: Content):
        """The file holds this content for a while."""
        path = self.directory / name
        path.unlink()
        path.mkdir() if content is None else path.write_bytes(content)
        try:
            yield path
        finally:
            path.rmdir() if path.is_dir() else path.unlink()
            path.write_bytes(self.seeds[name])


def check_fields(made: object) -> None:
    """Every field of a dataclass is of the annotated type, and no number is infinite."""
    for one in fields(made):
        value = getattr(made, one.name)
        assert value is one.default or fits(value, one.type), f"{one.name} is no {one.type}"
        assert not isinstance(value, float) or math.isfinite(value), f"{one.name} is not finite"


def tiny() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config("qwen3", vocab_size=300, hidden_size=8, intermediate_size=8,
                              num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                              head_dim=4, eos_token_id=1))


class ConfigFile(Kind):
    """config.json of each family."""

    def __init__(self, scratch: Path):
        super().__init__(scratch)
        for path in (ROOT / "tests" / "golden").glob("*/config.json"):
            (scratch / path.parent.name).mkdir()
            (scratch / path.parent.name / path.name).write_bytes(path.read_bytes())
        self.keep_files()
        (scratch / "again").mkdir()

    def attempt(self, name: str, content: Content) -> None:
        with self.put(name, content) as path:
            config = Config.from_pretrained(path.parent)
        check_fields(config)
        positions = torch.tensor([0, 1, config.max_position_embeddings - 1])
        for window in (None, config.sliding_window):
            cos, sin = model.rope_table(config, positions, window, torch.float32)
            assert bool((cos + sin).isfinite().all()), "the rotary table is not finite"
        again = self.directory / "again"
        (again / "config.json").write_text(json.dumps(config.to_dict()))
        assert Config.from_pretrained(again) == config, "written, it reads otherwise"


class Weights(Kind):
    """A model directory: safetensors headers and bytes, and a config.json of other shapes."""

    def __init__(self, scratch: Path):
        super().__init__(scratch)
        self.model = tiny()
        self.model.save_pretrained(scratch)
        self.keep_files()

    def attempt(self, name: str, content: Content) -> Transformer:
        with self.put(name, content):
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

    def __init__(self, scratch: Path):
        super().__init__(scratch)
        (scratch / "model.safetensors").unlink()  # It would be read in place of the shards.
        weights = list(self.model.state_dict().items())
        shards = {"a.safetensors": dict(weights[:4]), "b.safetensors": dict(weights[4:])}
        for shard, tensors in shards.items():
            model.save_file(tensors, scratch / shard)
        named = {key: shard for shard, tensors in shards.items() for key in tensors}
        index = scratch / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": named}))
        self.seeds = {index.name: index.read_bytes()}

    def attempt(self, name: str, content: Content) -> None:
        loaded = super().attempt(name, content)
        assert all(map(torch.equal, loaded.parameters(), self.model.parameters())), "other weights"


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12+34= é😀\n"}]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}"


def byte_level() -> Tokenizer:
    """A tokenizer of bytes, with merges that straddle the beginning of a confidence."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("C", "o"), ("Co", "n"), ("Ċ", "Con"), ("Ġ", "Con"), ("0", "."), ("Ġ", "0.")]
    vocabulary = ["<eos>", *alphabet, *("".join(merge) for merge in merges)]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(
        {token: i for i, token in enumerate(vocabulary)}, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    config = {"eos_token": {"content": "<eos>"}, "chat_template": TEMPLATE}
    return Tokenizer(backend, config, {"eos_token_id": [0]})


class TokenizerFiles(Kind):
    """tokenizer.json and the files beside it, of a tokenizer of words and of one of bytes."""

    def __init__(self, scratch: Path):
        super().__init__(scratch)
        for name, tokenizer in (("words", data.toy_tokenizer()), ("bytes", byte_level())):
            tokenizer.save_pretrained(scratch / name)
            (scratch / name / "config.json").write_text(json.dumps(tiny().config.to_dict()))
            (scratch / name / "chat_template.jinja").write_text(TEMPLATE)
        self.keep_files()

    def attempt(self, name: str, content: Content) -> None:
        with self.put(name, content) as path:
            tokenizer = Tokenizer.from_pretrained(path.parent)
            questions.make_task(tokenizer, tiny().config, ARGS)
        for token in tokenizer.eos_ids:
            assert type(token) is int and 0 <= token < 300, "an end token is none of the model's"
        ids = tokenizer.chat(CHAT)
        assert ids and max(ids) < 300, "a token is none of the model's"
        assert type(tokenizer.decode(ids + tokenizer.eos_ids)) is str
        tokenizer.save_pretrained(self.directory / "again")
        again = Tokenizer.from_pretrained(self.directory / "again")
        assert again.chat(CHAT) == ids and again.eos_ids == tokenizer.eos_ids, "saved, it differs"


class Template(TokenizerFiles):
    """chat_template.jinja: pieces of templates in any order, and what a hostile one would try."""

    pieces = """{% for m in messages %}|{% endfor %}|{{ m.role }}|{{ messages[0].content }}|{% if
        messages[0].role == 'system' %}|{% endif %}|{% else %}|{{ m['content'] | trim }}|{{ x }}|
        {%- set ns = namespace(n=0) %}|{% set ns.n = ns.n + 1 %}|{{ raise_exception('no') }}|
        {% break %}|{{ strftime_now('%Y') }}|{{ strftime_now(1) }}|{{ messages | tojson }}|
        {{ x.y.z }}|{{ 1/0 }}|{{ 'a' * 10**9 }}|{{ lipsum(n=10**9) }}|{{ 9**9**9 }}|{{ '%s' % x }}|
        {% for i in range(99999) %}|{{ ''.__class__.__mro__ }}|{{ '%999999999d' % 1 }}|{% raw %}|
        {{ 'a'.center(10**9) }}|{{ [1] * 10**9 }}|{{ range(10**9) | list }}|{% include 'x' %}|{# |
        {% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}|{% extends 'x' %}|{% generation %}|
        {% endgeneration %}|{{ messages.append(1) }}|{{ '\ud800' }}|{{ "%s" | format(1, 2) }}|{{ |
        {% set m = messages[1] %}|{{ eos_token }}|{{ cycler }}|{{ messages | map('x') | list }}|
        {{ '{0.__class__}'.format(1) }}|{{ dict(a=1) }}|{% filter upper %}|{% endfilter %}|
        {{ 'x' | indent(10**9) }}|{{ self }}|{% block b %}{{ self.b() }}{% endblock %}|
        {{ [[1]] | tojson(indent='x') }}|{{ messages | tojson(indent=10**9) }}|"""

    def case(self, rng: random.Random) -> tuple[str, Content]:
        text = "".join(rng.choices(self.pieces.split("|"), k=rng.randrange(1, 8)))
        text = rng.choice(("", "{{ messages[-1].content }}")) + text  # or it is soon refused
        if rng.random() < 0.2:
            loop = rng.choice(("{% for m in messages %}", "{% for i in range(99999) %}"))
            text = loop * rng.choice((1, 3, 30)) + text + "{% endfor %}" * rng.choice((1, 3, 30))
        name, content = "words/chat_template.jinja", text.encode(errors="surrogatepass")
        return name, mutated(rng, name, content) if rng.random() < 0.3 else content


class Jsonl(Kind):
    """A file of questions, of each task."""

    call = [{"Action": "search", "Action_Input": '{"q": "x", "n": 2}'}]
    rows = {"arithmetic": [{"prompt": "1+1=", "answer": 2, "grade": "easy"},
                           {"prompt": "2+2=", "answer": "-4", "demo": "is -4", "system": "s"}],
            "mcq": [{"prompt": "Which?", "answer": "B"},
                    {"prompt": "Who?", "answer": "C", "demo": "The answer is C"}],
            "tool": [{"prompt": "Find x.", "answer": call}, {"prompt": "Two.", "answer": 2 * call}]}

    def __init__(self, scratch: Path):
        super().__init__(scratch)
        self.tokenizer = byte_level()
        for task, rows in self.rows.items():
            (scratch / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        self.keep_files()

    def attempt(self, name: str, content: Content) -> None:
        with self.put(name, content) as path:
            examples = data.load_jsonl(path, path.stem)
        assert examples, "no examples"
        for example in examples:
            assert data.verify(example, example.demo), "its own demonstration is wrong"
            texts = example.question, example.system, example.demo, example.grade
            assert all(type(text) is str for text in texts), "a text is none"
        task = data.listed_task(examples, examples, 0)
        for document in sum((data.documents(task, 4, step, 2, 0.5, 0.5, 0) for step in (0, 1)), []):
            self.tokenizer.chat(document.messages)
            self.tokenizer.encode(document.completion)


class Flags(Kind):
    """The command line; and, now and then, all of main with a model that is refused at the end."""

    odd = ["0", "1", "2", "8", "-1", "0.5", "1e-40", "1e30", "1e999", "nan", "inf", "-inf", "", "x",
           "auto", "cpu", "cpu:1", "cuda:0", "cuda:99", "meta", "both", "opd,", "caopd,caopd", "\0",
           "\ud800", "é" * 300, "../x", "/etc/passwd", "/dev/null", "a/b", "~", "1_0", " 1", "٣",
           str(2 ** 31), str(2 ** 63), str(2 ** 64), str(10 ** 12), "9" * 400, "9" * 5000]

    def __init__(self, scratch: Path):
        self.broken, self.out = scratch / "broken", scratch / "out"
        self.tokenizer = data.toy_tokenizer()
        self.tokenizer.save_pretrained(self.broken)
        tiny().save_pretrained(self.broken)
        (self.broken / "model.safetensors").write_bytes(b"x" * 100)

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
        check_fields(args)
        device = pipeline.pick_device(args.device)
        torch.empty(1, device=device)
        args = replace(args, dtype=pipeline.pick_dtype(args, device))
        caopd.seeded(args.seed, "rollout", 0, device)
        torch.manual_seed(args.seed)
        pipeline.find_model(args.model if "/" not in args.model else "")  # never asks the hub
        memory_needed(pipeline.toy_model(args, self.tokenizer), [100], args)

    def run(self, argv: list[str]) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = caopd.main(argv)
        assert code == 2 and not self.out.exists(), f"exit code {code}, or something was written"
        raise BadInput(printed.getvalue())


class Output(Kind):
    """What an earlier run left in --out: metrics.jsonl and a checkpoint."""

    def __init__(self, scratch: Path):
        super().__init__(scratch)
        self.optimizer = caopd.AdamW(tiny(), 0.0, 1.0)
        stage = self.stage()
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
            for step in stage.steps(3):
                stage.log(step, {"loss": 0.5, "grad_norm": 1.0, "format": 1.0})
                stage.save_if_due(step)
        self.keep_files()

    def stage(self) -> Stage:
        return Stage("opd", self.directory, {"seed": 0}, self.optimizer.tensors(), 1)

    def attempt(self, name: str, content: Content) -> None:
        metrics = self.directory / "metrics.jsonl"
        with (self.put("metrics.jsonl", self.seeds["metrics.jsonl"]), self.put(name, content),
              claimed(self.directory)):
            start = self.stage().start
            rows = list(map(json.loads, metrics.read_text().splitlines()))
        assert type(start) is int and start >= 0, "a step that is none"
        assert all(row["stage"] != "opd" or row["step"] < start for row in rows), "rows to be made"
        if start and name.endswith(".safetensors"):
            for key, stored in safetensors.torch.load(content).items():
                tensor = self.optimizer.tensors().get(key, stored)
                assert tensor.dtype == stored.dtype and torch.equal(tensor, stored), "other tensors"
                assert bool(tensor.isfinite().all()), "tensors that are not finite"


class Text(Kind):
    """What a model may write, read by the parser of confidences and by each verifier."""

    pieces = ["Confidence:", "confidence: ", "CONFIDENCE:\t", "Confidence: 0.85", "Conﬁdence: ",
              "%", "1", "0.", ".5", "85%", "9" * 5000, "٣", "²", "½", "nan", "inf", "1e5", "-",
              ",000", " ", "\n", "\r", "\t", "\u2028", "\0", "\ud800", "é", "😀", "<answer>",
              "</answer>", "A", "b", "answer is ", "the answer: (", "<think>", "</think>", ")",
              "Action: x", "Action: search", "Action Input: {", "Action_Input: ", "{}", "}", '"',
              '{"q": "x", "n": 2}', '{"q": NaN}', "[" * 2000, '{"a":' * 2000, "x", " " * 500,
              "\n" * 500, "Action: x\n" * 200, "A " * 500, "1," * 500]
    examples = [data.Example("arithmetic", "", "64"), data.Example("mcq", "", "B"),
                data.Example("tool", "", Jsonl.call)]

    def case(self, rng: random.Random) -> tuple[str, Content]:
        pieces = rng.choices(self.pieces, k=rng.randrange(12))
        if rng.random() < 0.2:
            pieces.append(chr(rng.randrange(0x110000)))
        return "text", "".join(rng.sample(pieces, len(pieces)))

    def attempt(self, name: str, content: Content) -> None:
        value = data.parse_confidence(content)
        assert value is None or type(value) is float and 0 <= value <= 1, "a confidence of none"
        answer = content[:data.segment_start(content)]
        if data.still_thinking(content):
            answer += "</think>"
        restated = data.with_confidence(answer, 0.37)
        assert data.parse_confidence(restated) == 0.37, "the segment that was put in is not read"
        for example in self.examples:
            assert type(data.verify(example, content)) is bool
            # repr, since NaN among a call's arguments is not equal to itself
            before, after = (repr(data.extract(example, text)) for text in (content, restated))
            assert before == after, f"{example.task}: the confidence changes the answer"


class Tokens(Kind):
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
        start = data.segment_start(text)
        n, before = data.split_completion(tokenizer, content)
        new, kept = data.replace_confidence(tokenizer, content, value)
        assert n == kept and new[:n] == content[:n], "the answer's tokens have changed"
        assert new[-1] == tokenizer.eos_ids[0], "no end"
        answer = text + before if start is None else text[:start]
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
    failures: dict[str, list] = field(default_factory=dict)  # where: [count, name, content]


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
        ours = [frame for frame in traceback.extract_tb(error.__traceback__)
                if frame.filename.startswith(str(ROOT)) and frame.name != "ring"]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {type(error).__name__}"
        return f"{where} {error}" if isinstance(error, AssertionError) else where
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
