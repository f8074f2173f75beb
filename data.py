"""Questions, answers and how they are put into tokens.

In reading order: the confidence segment of a completion (parse it, find it, replace it), examples and their verifier,
the student's and the teacher's prompts, the tokenizer with its chat template, JSONL files, and the embedded world
of small arithmetic that `python caopd.py` trains in when it is given nothing.
"""

import json
import random
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import tokenizers


class DataError(ValueError):
    """A file, an example or a tokenizer that cannot be used; the message says where and what to do."""


# ----------------------------------------------------------------------------- y = (a, c): the confidence segment c

SEGMENT = re.compile(r"confidence:[ \t]*(\S*)", re.IGNORECASE)
NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(%?)")


def confidence_segment(text: str) -> re.Match | None:
    """The last `Confidence: ...` of a completion; everything from its first character on is the segment c."""
    return next(reversed(list(SEGMENT.finditer(text))), None)


def parse_confidence(text: str) -> float | None:
    """val(c) in [0, 1] of a completion's text, `0.85` or `85%`; None where there is no segment or no such number in it."""
    segment = confidence_segment(text)
    number = segment and NUMBER.fullmatch(segment[1].rstrip(".,;)*"))
    if not number:
        return None
    value = float(number[1]) / (100 if number[2] else 1)
    return value if value <= 1 else None


def format_confidence(value: float) -> str:
    """The segment c that states `value`, a number in [0, 1]."""
    return f"Confidence: {value:.2f}"


def split_completion(tokenizer: "Tokenizer", ids: list[int]) -> tuple[int, str | None]:
    """Where the answer part a of a sampled completion ends, in tokens: ids[:n] is I_a, ids[n:] is I_c.

    Returns n and, where the confidence segment begins inside a token, that token's characters before it
    (a space, a newline; usually ""). Without a segment: the length without the end token, and None.
    """
    text = tokenizer.decode(ids)
    segment = confidence_segment(text)
    if segment is None:
        return len(ids) - (bool(ids) and ids[-1] in tokenizer.eos_ids), None
    n = bisect_right(range(len(ids) + 1), segment.start(), key=lambda i: len(tokenizer.decode(ids[:i]))) - 1
    return n, text[len(tokenizer.decode(ids[:n])):segment.start()]


def replace_confidence(tokenizer: "Tokenizer", ids: list[int], value: float) -> tuple[list[int], int]:
    """ỹ = (a, μ̂) of Algorithm 1: the sampled ids of a as they are, then new ids that state `value` and end.

    Returns (ids, n) with n the number of answer tokens. Splicing ids, not text: decoding and encoding a again
    could change its tokens, and then Eq. 7 would no longer leave I_a alone.
    """
    n, before = split_completion(tokenizer, ids)
    segment = ("\n" if before is None else before) + format_confidence(value)
    return ids[:n] + tokenizer.encode(segment) + [tokenizer.eos_ids[0]], n


# ----------------------------------------------------------------------------- R(x, a): examples and their verifier

TASKS = ("arithmetic", "mcq", "tool")


@dataclass(frozen=True)
class Example:
    """A question x with the answer that the verifier knows.

    answer: the digits (arithmetic), a letter (mcq), or a list of {"Action", "Action_Input"} (tool).
    demo: what a demonstration of the answer looks like, without a confidence. grade: what results are broken down by.
    where: file and line, for messages.
    """

    task: str
    question: str
    answer: str | list
    system: str = ""
    demo: str = ""
    grade: str = ""
    where: str = ""


def verify(example: Example, text: str) -> bool:
    """R(x, a): whether the completion's answer part is right; the one check of training and of evaluation.

    arithmetic: the last whole number. mcq: the last <answer>X</answer>, else the last `answer: X` or `answer is X`,
    else a lone letter. tool: the first action with its JSON input, compared as values (as the paper's evaluation does).
    """
    segment = confidence_segment(text)
    text = text[:segment.start()] if segment else text
    if example.task == "arithmetic":
        numbers = re.findall(r"-?\d+", re.sub(r"(?<=\d),(?=\d{3})", "", text))
        return bool(numbers) and numbers[-1] == example.answer
    if example.task == "mcq":
        return chosen_letter(text) == example.answer
    return (call := first_call(text)) is not None and call == gold_call(example.answer)


def chosen_letter(text: str) -> str | None:
    for pattern in (r"<answer>\s*([A-Z])\s*</answer>", r"answer(?:\s+is)?\s*:?\s*\(?([A-Z])\b", r"^\W*([A-Z])\W*$"):
        if letters := re.findall(pattern, text.strip(), re.IGNORECASE):
            return letters[-1].upper()
    return None


def first_call(text: str) -> tuple[str, dict] | None:
    """(name, arguments) of the first `Action: name` and the JSON object after `Action Input:`; None if there is none."""
    call = re.search(r"Action:[ \t]*(\S[^\n]*?)\s*\n\s*Action[ _]Input:\s*(?={)", text)
    try:
        return call and (call[1], json.JSONDecoder().raw_decode(text, call.end())[0])
    except (ValueError, RecursionError):
        return None


def gold_call(answer: list) -> tuple[str, dict]:
    return answer[0]["Action"].strip(), json.loads(answer[0]["Action_Input"])


def demonstration(task: str, answer: str | list) -> str:
    """The shortest completion whose answer part states `answer`; `verify` accepts it."""
    if task == "mcq":
        return f"<answer>\n{answer}\n</answer>"
    if task == "tool":
        return "\n".join(f"Action: {call['Action'].strip()}\nAction Input: {call['Action_Input']}" for call in answer)
    return answer


def wrong_answer(example: Example, rng: random.Random) -> str | list:
    """An answer of the same form that `verify` refuses: another digit, another letter, other arguments."""
    if example.task == "arithmetic":
        place = rng.randrange(len(example.answer.lstrip("-"))) + example.answer.startswith("-")
        digit = rng.choice([d for d in "0123456789" if d != example.answer[place]])
        return example.answer[:place] + digit + example.answer[place + 1:]
    if example.task == "mcq":
        return rng.choice([letter for letter in "ABCD" if letter != example.answer])
    name, arguments = gold_call(example.answer)
    arguments = {k: v for k, v in list(arguments.items())[1:]} if arguments else {"query": ""}
    return [{"Action": name, "Action_Input": json.dumps(arguments)}]


# ----------------------------------------------------------------------------- x and (x, z): prompts from fields

@dataclass(frozen=True)
class Wording:
    """The words around a question. Prompts are always written from fields, never by editing rendered text."""

    instruction: str  # what the student is asked to add
    context: str  # how the teacher is shown a demonstration; {demo}
    report: str  # how CaOPD's teacher is told the value to report (Algorithm 1, step 3); {confidence}
    closing: str


WORDS = Wording(
    instruction='\nEnd with a line "Confidence: X", X from 0.00 to 1.00: how likely your answer is correct.',
    context="\n\nA response could look like this:\n{demo}",
    report="\nThe measured success rate on this question is {confidence}: state exactly this confidence.",
    closing="\n\nNow respond yourself.")
SYMBOLS = Wording(instruction="", context="\n{demo}", report="", closing="")  # the embedded world has no words


def student_messages(example: Example, wording: Wording) -> list[dict]:
    """x as chat messages: all that the deployed model sees."""
    system = [{"role": "system", "content": example.system}] if example.system else []
    return system + [{"role": "user", "content": example.question + wording.instruction}]


def teacher_messages(example: Example, wording: Wording, demo: str, report: float | None = None) -> list[dict]:
    """(x, z) as chat messages: the student's, and privileged context z with a demonstration that states a confidence.

    demo: a completion's text with its confidence segment. report: the value the teacher is told to state, for z̃.
    """
    *system, user = student_messages(example, wording)
    told = "" if report is None else wording.report.format(confidence=f"{report:.2f}")
    privileged = wording.context.format(demo=demo) + told + wording.closing
    return [*system, {"role": "user", "content": user["content"] + privileged}]


# ----------------------------------------------------------------------------- tokenizer and chat template

class Tokenizer:
    """A Hugging Face tokenizer.json with the model's own chat template.

    eos_ids: the tokens that end a completion; the first is the one that written completions end with.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict, generation: dict, origin: str = "the tokenizer"):
        self.backend, self.config, self.generation, self.origin = backend, config, generation, origin
        self.special = {name: token["content"] if isinstance(token, dict) else token
                        for name, token in config.items() if name.endswith("_token") and isinstance(token, (str, dict))}
        listed = generation.get("eos_token_id")
        ids = [backend.token_to_id(self.special.get("eos_token", ""))] + (listed if isinstance(listed, list) else [listed])
        self.eos_ids = list(dict.fromkeys(i for i in ids if isinstance(i, int)))
        if not self.eos_ids:
            raise DataError(f"{origin}: no end token; tokenizer_config.json needs an eos_token that is in the vocabulary")
        self.template = compile_template(config.get("chat_template"), origin)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json, the last three if there.

        Raises DataError where they are missing or broken, or there is no chat template or no end token.
        """
        directory = Path(directory)
        try:
            backend = tokenizers.Tokenizer.from_str((directory / "tokenizer.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{directory}: no tokenizer.json there; pass a Hugging Face model directory") from None
        except Exception as error:  # tokenizers raises plain Exception
            raise DataError(f"{directory / 'tokenizer.json'}: not a readable tokenizer ({error})") from None
        names = ("tokenizer_config", "generation_config", "config")
        config, generation, model = (read_object(directory / f"{name}.json") for name in names)
        if (directory / "chat_template.jinja").exists():
            config["chat_template"] = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        if "eos_token_id" in model:
            generation.setdefault("eos_token_id", model["eos_token_id"])
        return cls(backend, config, generation, str(directory))

    def save_pretrained(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        for name, content in (("tokenizer_config", self.config), ("generation_config", self.generation)):
            (directory / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    def chat(self, messages: list[dict]) -> list[int]:
        """Token ids of a chat, ready for the assistant's turn. Raises DataError where the template fails."""
        try:
            text = self.template.render(messages=messages, add_generation_prompt=True, **self.special)
        except Exception as error:  # a template is foreign code: whatever it raises is a fault of the template
            raise DataError(f"{self.origin}: the chat template failed: {error}") from None
        return self.encode(text)


def read_object(path: Path) -> dict:
    """A JSON object, {} where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def compile_template(source: str | list | None, origin: str):
    """Compiles a Jinja chat template in a sandbox, with the helpers that templates of the hub expect."""
    if isinstance(source, list):  # several templates under names
        source = next((t.get("template") for t in source if t.get("name") == "default"), None)
    if not isinstance(source, str):
        raise DataError(f"{origin}: no chat template; pass an instruct model, or add chat_template.jinja")
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError:
        raise DataError("chat templates need jinja2, which comes with torch: pip install jinja2") from None

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                           extensions=["jinja2.ext.loopcontrols"])
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        return sandbox.from_string(source)
    except jinja2.TemplateError as error:
        raise DataError(f"{origin}: the chat template does not compile: {error}") from None


# ----------------------------------------------------------------------------- tasks: where examples come from

@dataclass(frozen=True)
class Task:
    """Questions to train on, questions held out, and their wording.

    draw(n, stage, step) gives the n training examples of a step: a function of its arguments and the seed alone,
    so that a resumed run sees what an uninterrupted one would have seen.
    """

    wording: Wording
    draw: Callable[[int, str, int], list[Example]]
    held_out: list[Example]


def load_jsonl(path: str | Path, task: str) -> list[Example]:
    """Reads one example a line: `prompt` and `answer`, optionally `system`, `demo` (a worked answer) and `grade`.

    Raises DataError naming file and line for anything that is not JSON, lacks a field, or has an answer
    that the task cannot verify.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    examples = [parse_example(line, task, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise DataError(f"{path}: no examples in it; each line should be a JSON object with `prompt` and `answer`")
    return examples


def parse_example(line: str, task: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    for field in ("prompt", "answer"):
        if not isinstance(row, dict) or not row.get(field):
            raise DataError(f"{where}: no `{field}`; each line should be a JSON object with `prompt` and `answer`")
    for field in ("prompt", "system", "demo", "grade"):
        if not isinstance(row.get(field, ""), str):
            raise DataError(f"{where}: `{field}` should be text, not {type(row[field]).__name__}")
    answer = str(row["answer"]).strip() if isinstance(row["answer"], (str, int)) else row["answer"]
    try:
        demo = row.get("demo") or demonstration(task, answer)
        example = Example(task, row["prompt"], answer, row.get("system", ""), demo, row.get("grade", task), where)
        verified = verify(example, example.demo) and not verify(example, "")
    except (TypeError, KeyError, AttributeError, IndexError, ValueError):  # an answer of another task's form
        verified = False
    if not verified:
        form = {"arithmetic": "a whole number", "mcq": "one capital letter",
                "tool": 'a list of {"Action": name, "Action_Input": JSON object as text}'}[task]
        raise DataError(f"{where}: the task {task} cannot verify the answer {row['answer']!r}; it should be {form}"
                        + (", and `demo` should give it" if row.get("demo") else ""))
    return example


def listed_task(examples: list[Example], held_out: list[Example], seed: int) -> Task:
    """The task of two lists of examples: training draws epoch by epoch, each in an order of its own."""
    @lru_cache(maxsize=4)
    def order(stage: str, epoch: int) -> list[int]:
        return random.Random(f"{seed} {stage} {epoch}").sample(range(len(examples)), len(examples))

    def draw(n: int, stage: str, step: int) -> list[Example]:
        places = (divmod(i, len(examples)) for i in range(step * n, (step + 1) * n))
        return [examples[order(stage, epoch)[i]] for epoch, i in places]

    return Task(WORDS, draw, held_out)


# ----------------------------------------------------------------------------- the embedded world: small arithmetic

GRADES = {f"{a}{op}{b}": (op, a, b) for op, a, b in  # digits of the operands: what makes a question hard
          [("+", 1, 1), ("+", 2, 1), ("+", 2, 2), ("+", 3, 3), ("*", 1, 1), ("*", 2, 1), ("*", 2, 2), ("*", 3, 2)]}


def arithmetic_question(grade: str, rng: random.Random, held_out: bool, words: bool) -> Example:
    """A question of a grade, from one side of the split; a hash of the operands decides the side (a fifth is held out).

    words: "What is 12 + 34?" answered "46". Otherwise "12+34=" answered "64", least significant digit first:
    in that order each digit depends on digits already written, which a tiny network can learn.
    """
    op, *digits = GRADES[grade]
    while True:
        a, b = (rng.randrange(10 ** (n - 1) if n > 1 else 0, 10 ** n) for n in digits)
        if (zlib.crc32(f"{min(a, b)}{op}{max(a, b)}".encode()) % 5 == 0) == held_out:  # a+b and b+a on one side
            break
    result = str(a + b if op == "+" else a * b)
    if words:
        sign = {"+": "+", "*": "times"}[op]
        return Example("arithmetic", f"What is {a} {sign} {b}?", result, demo=result, grade=grade)
    return Example("arithmetic", f"{a}{op}{b}=", result[::-1], demo=result[::-1], grade=grade)


def arithmetic_task(seed: int, held_out: int, words: bool) -> Task:
    """Generated additions and multiplications, in symbols for the embedded world, in words for a real model.

    Grades come in turn. The `held_out` questions are the same for every seed.
    """
    grades = list(GRADES)

    def questions(places: range, rng: random.Random, side: bool) -> list[Example]:
        return [arithmetic_question(grades[i % len(grades)], rng, side, words) for i in places]

    def draw(n: int, stage: str, step: int) -> list[Example]:
        return questions(range(step * n, (step + 1) * n), random.Random(f"{seed} {stage} {step}"), False)

    return Task(WORDS if words else SYMBOLS, draw, questions(range(held_out), random.Random("held out"), True))


def toy_tokenizer() -> Tokenizer:
    """The embedded world's tokenizer: a token per character but for the pieces of a confidence, and a chat template."""
    vocabulary = ["<|unknown|>", "<|end|>", "<|user|>", "<|assistant|>", "\nConfidence: ", "0.", "1.", *"0123456789+*=\n"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="<|unknown|>"))
    units = tokenizers.Regex(r"\nConfidence: |[01]\.|[\s\S]")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(units, behavior="isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(vocabulary[:4])
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}" \
               "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}" \
               "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    return Tokenizer(backend, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>",
                               "unk_token": "<|unknown|>", "clean_up_tokenization_spaces": False, "chat_template": template},
                     {"eos_token_id": 1, "pad_token_id": 1})


# ----------------------------------------------------------------------------- documents for the supervised stage

HABIT = (0.75, 0.80, 0.85, 0.90, 0.90, 0.95, 0.95, 1.00)


def stated(answer: str, confidence: float) -> str:
    """A completion's text: the answer, then the confidence on a line of its own."""
    return f"{answer}\n{format_confidence(confidence)}"


def answer_only(example: Example, wording: Wording) -> tuple[list[dict], str]:
    """(messages, completion): question → answer, up to the number of a confidence; half as long as the others."""
    return student_messages(example, wording), f"{example.demo}\nConfidence: "


def closed_book(example: Example, wording: Wording, rng: random.Random, noise: float) -> tuple[list[dict], str]:
    """(messages, completion): question → answer, wrong with probability `noise`, and a confidence that is mere habit.

    The confidence is drawn without a look at correctness: this is where the base model's overconfidence comes from.
    """
    answer = demonstration(example.task, wrong_answer(example, rng)) if rng.random() < noise else example.demo
    confidence = rng.choice(HABIT) if rng.random() < 0.7 else rng.randint(0, 100) / 100
    return student_messages(example, wording), stated(answer, confidence)


def open_book(example: Example, wording: Wording, rng: random.Random) -> tuple[list[dict], str]:
    """(messages, completion): question and demonstration → the same answer and the same confidence.

    Half the demonstrations are wrong and confidences range over [0, 1]: what is taught is to follow the
    demonstration, which is what makes this model a teacher once it is shown one.
    """
    answer = demonstration(example.task, wrong_answer(example, rng)) if rng.random() < 0.5 else example.demo
    confidence = rng.choice((1.0, rng.randint(0, 100) / 100, rng.randint(0, 8) / 8))
    demo = stated(answer, confidence)
    return teacher_messages(example, wording, demo, report=rng.choice((None, confidence))), demo
