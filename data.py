"""Questions, answers, and how they are put into tokens.

In reading order: the confidence segment of a completion (how it is read, found and replaced), the
kinds of questions and their verifier, the prompts of student and teacher, the tokenizer with its
chat template, the files that questions are read from, the embedded world of small arithmetic that
`python caopd.py` trains in when it is given nothing, and the documents of the supervised stage.
"""

import json
import random
import re
import zlib
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import tokenizers

from chat_template import compile_template, render
from files import (BadInput, an_object, from_json, parse_json, read_object, read_text, within,
                   write_text)


# ------------------------------------------------------- y = (a, c): the confidence segment c

# It may be in bold or in quotes, be called a level or a score, name its range in brackets, and have
# a space before the %.
SEGMENT = re.compile(r"(?:\*\*|[\"'`“‘])?confidence(?:[ \t](?:level|score))?\*{0,2}"
                     r"(?:[ \t]?\([^()\n]{0,40}\)\*{0,2})?[ \t]?:"
                     r"[ \t*\"'`“‘]*(\S*(?:[ \t]+%)?)", re.IGNORECASE)
NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(%?)")


def still_thinking(text: str) -> bool:
    """Tells whether a completion ends within `<think>...</think>`."""
    return text.rfind("<think>") > text.rfind("</think>")


def thinking_end(text: str) -> int:
    """Finds where a completion's thinking ends, and its answer part begins: 0 without thinking.

    The thinking is everything as far as the last `</think>`, since `<think>` may have been a part
    of the prompt. Where it is left unfinished, it is the whole text, unless the prompt began it:
    then nothing tells it from an answer.
    """
    thinking, end, _ = text.rpartition("</think>")
    return len(text) if still_thinking(text) else len(thinking + end)


def confidence_segments(text: str) -> list[re.Match]:
    """Finds every `Confidence: ...` of a completion after any thinking. The last one counts."""
    return list(SEGMENT.finditer(text, thinking_end(text)))


def segment_start(text: str) -> int | None:
    """Finds where the segment c of a completion begins; it goes on to the end of the text.

    It begins with the confidence that counts, or with the first of several that are stated in a
    row. Were c the last of those alone, the others would be learned as a part of the answer, and a
    student that once repeats itself would be taught to.
    """
    start = None
    for segment in reversed(confidence_segments(text)):
        if start is not None and text[segment.end():start].strip():
            break
        start = segment.start()
    return start


def parse_confidence(text: str) -> float | None:
    """Reads val(c), the confidence that a completion states.

    text: the whole completion. Its number may be written as `0.85`, `85%` or `85 %`, and an answer
    tag may end behind it.
    Returns a value in [0, 1], or None where there is no segment or no such number in it.
    """
    segments = confidence_segments(text)
    written = "".join(segments[-1][1].split()) if segments else ""
    number = NUMBER.fullmatch(written.removesuffix("</answer>").rstrip(".,;)*\"'`”’"))
    if not number:
        return None
    value = float(number[1]) / (100 if number[2] else 1)
    return value if value <= 1 else None


def format_confidence(value: float) -> str:
    """Returns the segment c that states `value`, a number in [0, 1]."""
    return f"Confidence: {value:.2f}"


def with_confidence(answer: str, confidence: float) -> str:
    """Returns a completion's text: the answer, then the confidence on a line of its own."""
    return f"{answer}\n{format_confidence(confidence)}"


def split_completion(tokenizer: "Tokenizer", ids: list[int]) -> tuple[int, str]:
    """Finds where the answer part a of a sampled completion ends, counted in tokens.

    ids: the completion's tokens.
    Returns (n, before). The answer's tokens I_a are ids[:n], and the confidence's I_c are ids[n:].
    A segment may begin inside a token, which then belongs to I_c: `before` holds the characters of
    that token that come before the segment. In the embedded world, whose token is `⏎Confidence: `,
    it is the newline; where the newline is a token of its own, it is nothing. Without a segment, n
    leaves out the end token alone, and `before` is what has to be written before one: a newline,
    and the end of a thinking that was left unfinished.
    """
    text = tokenizer.decode(ids)
    start = segment_start(text)
    if start is None:
        ended = bool(ids) and ids[-1] in tokenizer.eos_ids
        before = "\n</think>\n" if still_thinking(text) else "\n"
        return len(ids) - 1 if ended else len(ids), before
    answer_and_more = text[:start + 1]  # as far as the first character of c

    def reaches_the_segment(count: int) -> bool:
        return tokenizer.decode(ids[:count]).startswith(answer_and_more)

    # Decoding prefixes is monotone in their length: once one reaches c, so does every longer one.
    # A binary search finds the first that does, and the answer part is one token shorter.
    n = bisect_left(range(len(ids) + 1), True, key=reaches_the_segment) - 1
    return n, text[len(tokenizer.decode(ids[:n])):start]


def replace_confidence(
        tokenizer: "Tokenizer", ids: list[int], value: float) -> tuple[list[int], int]:
    """Makes ỹ = (a, μ̂) of Algorithm 1: the same answer, with a confidence segment of our own.

    ids: the tokens of a sampled completion. value: the confidence to state, in [0, 1].
    The segment goes on to the end of the text, so that what was written after it is gone, too. A
    completion that states no confidence is given a segment after its answer.
    Returns (new_ids, n), where n is the number of answer tokens, which are taken over as they are.
    We join token ids and not text, because decoding an answer and encoding it again can change its
    tokens, and with them the loss on I_a, which Eq. 7 leaves as it is.
    """
    n, before = split_completion(tokenizer, ids)
    segment = tokenizer.encode_rest(before + format_confidence(value))
    end = ids[-1] if ids and ids[-1] in tokenizer.eos_ids else tokenizer.eos_ids[0]
    return ids[:n] + segment + [end], n


# ------------------------------------------------------- examples and kinds of questions

@dataclass(frozen=True)
class Example:
    """A question x together with the answer that the verifier knows.

    task: the kind of question, a key of KINDS.
    answer: digits (arithmetic), a capital letter (mcq), or a list of calls, each of which is a dict
        with the keys "Action" and "Action_Input" (tool).
    system: the system message, if there is one.
    demo: a completion's text that demonstrates the answer, without a confidence.
    grade: the name of the group that results are broken down by.
    where: the file and line that the example came from, for messages.
    """

    task: str
    question: str
    answer: str | list
    system: str = ""
    demo: str = ""
    grade: str = ""
    where: str = ""


@dataclass(frozen=True)
class Kind:
    """What belongs to one kind of question.

    extract(text): the answer that the answer part of a completion gives, or None if it gives none.
    gold(answer): an example's answer in the form that `extract` returns, so that == compares them.
    demonstrate(answer): the shortest completion that gives this answer, without a confidence.
    corrupt(answer, rng): an answer of the same form that is wrong.
    form: what an example's answer should look like, in words for an error message.
    """

    extract: Callable[[str], object]
    gold: Callable[[str | list], object]
    demonstrate: Callable[[str | list], str]
    corrupt: Callable[[str | list, random.Random], str | list]
    form: str


def as_it_is(value):
    """Serves kinds whose answers need no other form."""
    return value


# Arithmetic: the answer is the last number, or that in the last box, as digits; it has to be whole.

BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
EXPONENT = re.compile(r"(?<=[A-Za-z}])\^(?:[-−]?\d+|\{[-−]?\d+\})")  # of a unit, such as cm^2

# Thousands are separated by a comma, by LaTeX's {,} or \, or by a no-break space.
THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\,|[\u00a0\u202f])(?=\d{3}(?!\d))")
FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
# Of a number: 10^3, 10^{3}, 10**3, 10³, 3.2e3.
POWER = re.compile(r"(?<=[\d)])(?: ?\^ ?[{(]?|\*\*|[eE])[-+−]?\d+[})]?|(?<=\d)[⁰¹²³⁴-⁹]+")
# A minus, unless it stands behind a digit, a currency, and digits with what joins them.
WRITTEN_NUMBER = re.compile(r"((?<!\d)[-−])?(?:\\?[$€£])?((?:(?<!\.)\.)?\d(?:[\d.,/]*\d)?)")


def without_commas(text: str) -> str:
    """Takes what separates thousands out of a text's numbers."""
    return THOUSANDS.sub("", text)


def last_number(text: str) -> str | None:
    """Finds the last number, as digits: that of "$1,046.00" is 1046. One in a box goes first.

    Returns None where there is none, or where it is not whole, such as 0.5, 0,5 or 1/2, or written
    with a power, such as 10^3 or 3.2e3.
    """
    if boxes := [box for box in BOXED.findall(text) if re.search(r"\d", box)]:
        text = boxes[-1]
    text = EXPONENT.sub("", FRACTION.sub(r"\1/\2", without_commas(text)))
    text = POWER.sub("/0", text)  # so that it is read as one number, and not as a whole one
    numbers = WRITTEN_NUMBER.findall(text)
    sign, digits = numbers[-1] if numbers else ("", "")
    whole = re.fullmatch(r"(\d+)(?:\.0+)?", digits)
    return ("-" if sign else "") + whole[1] if whole else None


def change_a_digit(answer: str, rng: random.Random) -> str:
    sign, digits = ("-", answer[1:]) if answer.startswith("-") else ("", answer)
    place = rng.randrange(len(digits))
    other = rng.choice([digit for digit in "0123456789" if digit != digits[place]])
    return sign + digits[:place] + other + digits[place + 1:]


# Multiple choice: the answer is a letter.

# It may stand in brackets, quotes, LaTeX or bold, and is not the article of "a hard one".
STYLE = r"\\(?:text|textbf|mathbf|mathrm)\{"
OPTION = r"(?:option\b[\s(*]*)?"
A_LETTER = (rf"(?:[\s:(\[*$\"'`]|\\\(|\\boxed\{{|{STYLE})*{OPTION}"
            r"(?!(?-i:a|I)[ \t]+\w)([A-Z])\b(?![-'’]\w)"
            # "B or C" is none, and "B and C is wrong" is B.
            r"(?![)*]*[ \t]+(?:or|and)[ \t]+[(*]*(?-i:[A-HJ-Z])\b"
            r"(?![)*]*[ \t]+(?:is|was|are|has|does)\b))")
# "B. NaCl", "B. O=C1CC1" and "B. A salt", and nothing that names another letter, "B. or C".
ANOTHER = r"(?-i:(?:(?<!\S)|(?<=\s[(\[]))(?!A[ \t]+[a-z])[A-Z](?![^\s.,;:)\]!?<]))"
ITS_WORDS = rf"[.):]+[ \t](?:(?!{ANOTHER})[^<\n])*"
CHOICES = (
    # A confidence within the tag takes its end along.
    re.compile(rf"<answer>[^\w<]*{OPTION}([A-Z])(?:[^\w<]*|{ITS_WORDS}(?:\n\s*)?)(?:</answer>|$)",
               re.IGNORECASE),
    # "Answer: X" and "the answer is (X)", and not the article of "the answer is a hard one".
    re.compile(r"\banswer\b(?:[ \t]+choice)?[\s*]*"
               r"(?:is\b|(?:should|must|would)[ \t]+be\b|:)" + A_LETTER, re.IGNORECASE),
    re.compile(r"\banswer\b" + A_LETTER, re.IGNORECASE),
    re.compile(r"\b(?:correct|right|best) (?:option|choice)\b[ \t*]*(?:is\b|:)" + A_LETTER,
               re.IGNORECASE),
    re.compile(rf"\\boxed\{{(?:{STYLE})?\(?([A-Z])\)?\}}"),
    # "So option B is right", where a sentence starts: "neither A nor option B is right" names none.
    re.compile(r"(?:^|[.!?\n])[ \t]*(?:(?:so|thus|hence|therefore),?[ \t]+)?(?:option[ \t]+)?"
               r"[(*]*([A-Z])\b[)*]*[ \t]+is[ \t]+(?:the[ \t]+)?(?:correct|right|best)\b"
               r"(?![-'’]\w)", re.IGNORECASE),
    re.compile(rf"^\W*([A-Z])(?:\W*|{ITS_WORDS})$", re.IGNORECASE))  # the letter is all there is


def chosen_letter(text: str) -> str | None:
    """Looks for the forms of a choice in turn. The last occurrence of the first form counts."""
    for choice in CHOICES:
        if letters := choice.findall(text.strip()):
            return letters[-1].upper()
    return None


def answer_tag(answer: str) -> str:
    return f"<answer>\n{answer}\n</answer>"


def another_letter(answer: str, rng: random.Random) -> str:
    return rng.choice([letter for letter in "ABCD" if letter != answer])


# Tool use: the answer is the first call, a name with arguments that are compared as values, as in
# the paper's evaluation. Both may stand in bold or in code.

ACTION = re.compile(r"\baction\**:[ \t*`]*([^\s*`].*)", re.IGNORECASE)
ACTION_INPUT = re.compile(r"[^\S\n]*\**action[ _]input\**:[\s*`]*(?:json\s*)?(?={)",
                          re.IGNORECASE)


def first_call(text: str) -> tuple[str, dict] | None:
    """Finds the first line `Action: name` whose next line is `Action Input: {...}`.

    Returns (name, arguments), or None where there is no such pair of lines or the arguments are not
    JSON. Blank lines may stand in between. Going from line to line takes time in proportion to the
    text's length, which a single regular expression over all of it would not.
    """
    action, start = None, 0  # the action on the last line that was not blank, this line's start
    for line in text.split("\n"):
        if line.strip():
            action_input = ACTION_INPUT.match(text, start)
            if action and action_input:
                name = action[1].rstrip().rstrip("`*").rstrip()
                return parse_call(name, text, action_input.end())
            action = ACTION.search(line)
        start += len(line) + 1
    return None


def parse_call(name: str, text: str, start: int) -> tuple[str, dict] | None:
    """Reads the JSON object that begins at text[start]. More text may follow it."""
    try:
        return name, json.JSONDecoder().raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        return None


def gold_call(answer: list) -> tuple[str, dict]:
    call = answer[0]
    return call["Action"].strip(), parse_json(call["Action_Input"], "Action_Input")


def written_calls(answer: list) -> str:
    return "\n".join(f"Action: {call['Action'].strip()}\nAction Input: {call['Action_Input']}"
                     for call in answer)


def change_the_arguments(answer: list, rng: random.Random) -> list:
    """Leaves out the first argument of the call, or adds one where there is none."""
    name, arguments = gold_call(answer)
    changed = dict(list(arguments.items())[1:]) if arguments else {"query": ""}
    return [{"Action": name, "Action_Input": json.dumps(changed)}]


KINDS = {
    "arithmetic": Kind(last_number, as_it_is, as_it_is, change_a_digit, "a whole number"),
    "mcq": Kind(chosen_letter, as_it_is, answer_tag, another_letter, "one capital letter"),
    "tool": Kind(first_call, gold_call, written_calls, change_the_arguments,
                 'a list of {"Action": name, "Action_Input": JSON object as text}')}
TASKS = tuple(KINDS)


# ------------------------------------------------------- R(x, a): the verifier

def answer_part(text: str) -> str:
    """Returns the answer part a of a completion: after its thinking, before its confidence."""
    return text[thinking_end(text):segment_start(text)]


def extract(example: Example, text: str) -> object:
    """Finds the answer that the answer part of a completion gives.

    text: the whole completion.
    Returns None where the answer part gives no answer. Two answers to one question are the same
    where == says so. A tool call contains a dict, so that it can be compared but not hashed.
    """
    return KINDS[example.task].extract(answer_part(text))


def verify(example: Example, text: str) -> bool:
    """R(x, a): whether a completion gives the right answer. Training and evaluation both ask this.

    text: the whole completion, whose confidence segment plays no part in it.
    """
    answer = extract(example, text)
    return answer is not None and answer == KINDS[example.task].gold(example.answer)


# ------------------------------------------------------- x and (x, z): prompts from fields

@dataclass(frozen=True)
class Wording:
    """The words around a question. Prompts are written from fields, never by editing a prompt.

    instruction: what the student is asked to add to its answer.
    demonstration, solution: how the teacher is shown a demonstration, or another rollout that was
        right, which takes the place of {demo}.
    report: how CaOPD's teacher is told which value to state (Algorithm 1, step 3). The value takes
        the place of {confidence}.
    closing: how the teacher is asked to respond.
    """

    instruction: str
    demonstration: str
    solution: str
    report: str
    closing: str


WORDS = Wording(
    instruction='\nEnd with a line "Confidence: X", X from 0.00 to 1.00: '
                "how likely your answer is correct.",
    demonstration="\n\nA response could look like this:\n{demo}",
    solution="\n\nThis is a correct solution:\n{demo}",
    report="\nThe measured success rate on this question is {confidence}: "
           "state exactly this confidence.",
    closing="\n\nNow respond yourself.")
SYMBOLS = Wording("", "\n{demo}", "\n{demo}", "", "")  # The embedded world has no words.


def student_messages(example: Example, wording: Wording) -> list[dict]:
    """Returns x as chat messages, which is all that the deployed model sees."""
    system = [{"role": "system", "content": example.system}] if example.system else []
    return [*system, {"role": "user", "content": example.question + wording.instruction}]


def teacher_messages(example: Example, wording: Wording, demo: str, report: float | None = None,
                     solution: bool = False) -> list[dict]:
    """Returns (x, z) as chat messages: the student's, followed by the privileged context z.

    demo: the text of a completion to show, with its confidence segment.
    report: the value that the teacher is told to state, which turns z into z̃. None tells it none.
    solution: whether demo is a rollout of the student that was right, and no demonstration.
    """
    *system, user = student_messages(example, wording)
    told = "" if report is None else wording.report.format(confidence=f"{report:.2f}")
    shown = (wording.solution if solution else wording.demonstration).format(demo=demo)
    context = shown + told + wording.closing
    return [*system, {"role": "user", "content": user["content"] + context}]


# ------------------------------------------------------- the tokenizer

@dataclass
class Generation:
    """What is read of generation_config.json, or of config.json in its place: the end tokens."""

    eos_token_id: int | list[int] | None = within(0, 2 ** 31, default=None)


@dataclass
class SpecialToken:
    """An entry such as eos_token of tokenizer_config.json."""

    content: str


class Tokenizer:
    """A Hugging Face tokenizer with the chat template of its model.

    backend: the tokenizer of the tokenizers library.
    config, generation: the contents of tokenizer_config.json and of generation_config.json.
    origin: where the tokenizer came from, for messages.
    template_args: variables for the chat template, such as {"enable_thinking": False}.

    eos_ids holds the tokens that end a completion. Completions that we write end with the
    first; one whose confidence is replaced keeps its own.
    Raises BadInput where there is no end token, or no chat template that compiles.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict, generation: dict,
                 origin: str = "the tokenizer", template_args: dict | None = None):
        self.backend, self.config, self.generation = backend, config, generation
        self.origin, self.template_args = origin, template_args or {}
        self.special_tokens = special_tokens(config, origin)
        self.eos_ids = self.find_eos_ids()
        if not self.eos_ids:
            raise BadInput(f"{origin}: no end token; tokenizer_config.json needs an eos_token "
                           "that is in the vocabulary")
        self.template = compile_template(config.get("chat_template"), origin)

    def find_eos_ids(self) -> list[int]:
        """Collects the eos_token of the tokenizer's file and what the generation's file adds."""
        named = self.backend.token_to_id(self.special_tokens.get("eos_token", ""))
        listed = from_json(Generation, self.generation, self.origin).eos_token_id
        candidates = [named, *(listed if isinstance(listed, list) else [listed])]
        return list(dict.fromkeys(i for i in candidates if i is not None))

    @classmethod
    def from_pretrained(
            cls, directory: str | Path, template_args: dict | None = None) -> "Tokenizer":
        """Reads a tokenizer from a Hugging Face model directory.

        directory: holds tokenizer.json and, where the model has them, tokenizer_config.json,
            chat_template.jinja, generation_config.json and config.json.
        template_args: variables for the chat template, such as {"enable_thinking": False}.
        Raises BadInput where a file is missing or broken, where there is no chat template that
        compiles, or where there is no end token.
        """
        directory = Path(directory)
        backend = read_backend(directory)
        config = read_object(directory / "tokenizer_config.json")
        generation = read_object(directory / "generation_config.json")
        model = read_object(directory / "config.json")
        if (directory / "chat_template.jinja").exists():
            config["chat_template"] = read_text(directory / "chat_template.jinja")
        if "eos_token_id" in model:
            generation.setdefault("eos_token_id", model["eos_token_id"])
        return cls(backend, config, generation, str(directory), template_args)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes what `from_pretrained` reads. A file that is there is replaced as a whole."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        files = {"tokenizer.json": self.backend.to_str(pretty=True)}
        for name, content in (("tokenizer_config.json", self.config),
                              ("generation_config.json", self.generation)):
            files[name] = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        for name, text in files.items():
            write_text(directory / name, text)
        # The template is in tokenizer_config.json, and one in a file of its own would come first.
        (directory / "chat_template.jinja").unlink(missing_ok=True)

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without any that mark its beginning or end.

        Raises BadInput for what the tokenizer cannot write, such as an unknown word where it has
        no token for these.
        """
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the tokenizers library raises nothing more specific
            raise BadInput(f"{self.origin}: {text[:60]!r} has no tokens ({error})") from None

    def encode_rest(self, text: str) -> list[int]:
        """Returns the token ids of a text that continues another one.

        Tokenizers of SentencePiece's kind begin every text with a space, which belongs to no rest.
        """
        before, ids = self.one_character, self.encode("0" + text)
        return ids[len(before):] if ids[:len(before)] == before else self.encode(text)

    @cached_property
    def one_character(self) -> list[int]:
        return self.encode("0")

    def decode(self, ids: list[int]) -> str:
        """Returns the text of token ids, without special tokens and those that end a turn."""
        return self.backend.decode([i for i in ids if i not in self.eos_ids],
                                   skip_special_tokens=True)

    def chat(self, messages: list[dict]) -> list[int]:
        """Returns the token ids of a chat, up to where the assistant begins to speak.

        messages: dicts with "role" and "content".
        Raises BadInput where the chat template fails, or leaves out what is asked.
        """
        variables = {"tools": None, "documents": None, **self.special_tokens, **self.template_args,
                     "messages": messages, "add_generation_prompt": True}
        try:
            text = render(self.template, variables)
        except Exception as error:  # the template is foreign code and can raise anything
            raise BadInput(f"{self.origin}: the chat template failed: {error}") from None
        if not (ids := self.encode(text)):
            raise BadInput(f"{self.origin}: the chat template leaves nothing of the messages")
        if messages[-1]["content"].strip() not in text:
            raise BadInput(f"{self.origin}: the chat template leaves out what is asked")
        return ids


def special_tokens(config: dict, origin: str) -> dict[str, str]:
    """Returns eos_token and its like by name. A config gives each as text or as a dict with it."""
    named = {name: token if isinstance(token, dict) else {"content": token}
             for name, token in config.items()
             if name.endswith("_token") and token is not None and not isinstance(token, bool)}
    return {name: from_json(SpecialToken, token, f"{origin}: {name}").content
            for name, token in named.items()}


def read_backend(directory: Path) -> tokenizers.Tokenizer:
    """Reads tokenizer.json, and sets aside what it says about cutting and padding texts."""
    path = directory / "tokenizer.json"
    text = read_text(path)
    parse_json(text, str(path))  # What is not JSON can make the library panic, beyond `except`.
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise BadInput(f"{path}: not a readable tokenizer ({error})") from None
    ids = backend.get_vocab().values()
    if len(set(ids)) < len(ids):
        raise BadInput(f"{path}: two tokens have the same id")
    backend.no_truncation()
    backend.no_padding()
    return backend


# ------------------------------------------------------- tasks: where examples come from

@dataclass(frozen=True)
class Task:
    """The questions to train on, the questions to ask afterwards, and the words around them.

    wording: the words around a question. `dataclasses.replace(task, wording=...)` makes a task that
        asks the same questions in other words.
    draw(n, stage, step): the n training examples of a step. They depend on these arguments and the
        task's seed alone, so a run that was interrupted sees what it would have seen without.
    held_out: the questions that are asked in evaluation and never trained on.
    fingerprint: a checksum that changes with the training questions. A checkpoint can keep it, to
        be continued with the same questions only.
    """

    wording: Wording
    draw: Callable[[int, str, int], list[Example]]
    held_out: list[Example]
    fingerprint: int = 0


def checksum(content: list) -> int:
    return zlib.crc32(json.dumps(content).encode())


NAMES = {  # a field of Row, and what others call it too: the first that has a value counts
    "prompt": ("prompt", "question", "messages"),
    "answer": ("answer", "golden_answer", "solution"),
    "system": ("system",),
    "demo": ("demo", "golden_response", "output_text", "solution"),
    "grade": ("grade",)}


@dataclass
class Row:
    """A line of JSONL under our names. The forms that others give its fields are turned into ours.

    A prompt may be a list of messages. An answer may be worked out in front of `####`, as in GSM8K.
    A demonstration may be a list of lines, and may state a confidence, which is left out.
    """

    prompt: str | list
    answer: str | int | list
    system: str = ""
    demo: str | list[str] = ""
    grade: str = ""

    def __post_init__(self):
        match self.prompt:
            case [{"role": "user", "content": str(question)}]:
                self.prompt = question
            case [{"role": "system", "content": str(system)},
                  {"role": "user", "content": str(question)}]:
                self.system, self.prompt = system, question
            case list():
                raise BadInput("`prompt` should be text, or the message of a user, which one of "
                               "the system may precede")
        if not isinstance(self.answer, list):
            text = str(self.answer)
            self.demo = self.demo or (text if "####" in text else "")
            self.answer = without_commas(text.rpartition("####")[2].strip())
        if isinstance(self.demo, list):
            self.demo = "\n".join(self.demo)
        if (start := segment_start(self.demo)) is not None:
            self.demo = self.demo[:start].rstrip()


def find_names(row: dict) -> dict[str, str]:
    """Returns the name that a line has for each field of Row. null and "" are no value, 0 is."""
    names = {}
    for field, candidates in NAMES.items():
        for name in candidates:
            if row.get(name) not in (None, "") and name not in names.values():
                names.setdefault(field, name)
    return names


def load_jsonl(path: str | Path, task: str) -> list[Example]:
    """Reads examples from a file with a JSON object on every line. Blank lines are passed over.

    path: the file. The fields of an object are `prompt` and `answer`, and optionally `system`,
        `demo` (a worked answer) and `grade`, by these names or by others in NAMES. A line is
        printed about the names that are not ours.
    task: the kind of question that they all are, a key of KINDS.
    Raises BadInput, which names file and line, for anything that is not JSON, lacks a field or has
    an answer that the task cannot verify.
    """
    examples, read_as = [], {}  # by name: the field that it was read as, or None
    for number, line in enumerate(read_text(Path(path)).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            row = an_object(parse_json(line, where), where)
            names = find_names(row)
            ours = from_json(Row, {field: row[name] for field, name in names.items()}, where)
            examples.append(make_example(ours, task, where))
            read_as = dict.fromkeys(row) | read_as | {name: field for field, name in names.items()}
    if not examples:
        raise BadInput(f"{path}: no examples in it; each line should be a JSON object "
                       "with `prompt` and `answer`")
    notes = [f"`{name}` " + (f"read as `{field}`" if field else "not read")
             for name, field in read_as.items() if name != field]
    if notes:
        print(f"{path}: {', '.join(notes)}.")
    return examples


def make_example(row: Row, task: str, where: str) -> Example:
    """Makes an example of a line, and verifies its demonstration with its own answer."""
    kind = KINDS[task]
    try:
        example = Example(task, row.prompt, row.answer, row.system,
                          row.demo or kind.demonstrate(row.answer), row.grade or task, where)
        verified = verify(example, example.demo)
    except (TypeError, KeyError, AttributeError, IndexError, ValueError):
        verified = False  # the answer has the form of another task
    if not verified:
        and_demo = ", and `demo` should give it" if row.demo else ""
        raise BadInput(f"{where}: the task {task} cannot verify the answer {row.answer!r}; "
                       f"it should be {kind.form}{and_demo}")
    return example


def listed_task(examples: list[Example], held_out: list[Example], seed: int) -> Task:
    """Makes a task of two lists of examples, the first to train on and the second to ask.

    Training goes through its list epoch by epoch, and each epoch has an order of its own, which
    depends on `seed`.
    """
    @lru_cache(maxsize=4)
    def order(stage: str, epoch: int) -> list[int]:
        return random.Random(f"{seed} {stage} {epoch}").sample(range(len(examples)), len(examples))

    def draw(n: int, stage: str, step: int) -> list[Example]:
        places = (divmod(i, len(examples)) for i in range(step * n, (step + 1) * n))
        return [examples[order(stage, epoch)[i]] for epoch, i in places]

    trained_on = [[e.task, e.system, e.question, e.answer, e.demo] for e in examples]
    return Task(WORDS, draw, held_out, checksum(trained_on))


# ------------------------------------------------------- the embedded world: small arithmetic

# There is no 1*1: a model learns its 55 products by heart and misses some that are held out, and no
# confidence can tell from a prompt which of the two it is.
GRADES = {  # name: operation, digits of its operands, which are what makes a question hard
    "1+1": ("+", 1, 1), "2+1": ("+", 2, 1), "2+2": ("+", 2, 2), "3+3": ("+", 3, 3),
    "2*1": ("*", 2, 1), "2*2": ("*", 2, 2), "3*2": ("*", 3, 2)}
SPLITS = ("held-out", "validation")  # the sides that can be asked


def side(key: str, share: float = 0.2) -> str:
    """Decides by a hash which side of the split a question is on, be there spaces around it or not.

    share: of all keys that are held out, between 0 and 0.8.
    Returns "held-out" for these, "validation" for a further fifth, and "train" for the rest.
    The held-out side is for results and is never trained on. The validation side is for choosing
    settings: a run that asks it leaves it out of training, and any other run trains on it.
    """
    number = zlib.crc32(key.strip().encode())
    place = (number % 5 + number / 2 ** 32) / 5  # uniform in [0, 1)
    return "held-out" if place < share else "validation" if place < share + 0.2 else "train"


def draw_operands(grade: str, rng: random.Random, sides: tuple[str, ...]) -> tuple[int, int]:
    """Draws the operands of a question, until one is on one of these sides of the split."""
    op, *digits = GRADES[grade]
    while True:
        a, b = (rng.randrange(10 ** (n - 1) if n > 1 else 0, 10 ** n) for n in digits)
        if side(f"{min(a, b)}{op}{max(a, b)}") in sides:  # a+b is on the same side as b+a
            return a, b


def arithmetic_question(
        grade: str, rng: random.Random, sides: tuple[str, ...], words: bool) -> Example:
    """Draws a question of a grade, on one of these sides of the split, asked as `words` says."""
    a, b = draw_operands(grade, rng, sides)
    return arithmetic_example(a, GRADES[grade][0], b, words, grade)


def arithmetic_example(a: int, op: str, b: int, words: bool, grade: str = "") -> Example:
    """Asks for a + b or a * b.

    words: asks "What is 12 + 34?" with the answer "46". Without, the question is "12+34=" and the
        answer is "64", its least significant digit first. In that order a digit depends on digits
        that are already written, which a tiny network can learn.
    """
    result = str(a + b if op == "+" else a * b)
    if words:
        question, answer = f"What is {a} {'times' if op == '*' else op} {b}?", result
    else:
        question, answer = f"{a}{op}{b}=", result[::-1]
    return Example("arithmetic", question, answer, demo=answer, grade=grade)


TYPED = re.compile(r"(?:what is\s+)?([0-9]{1,9})\s*([+*x×]|plus|times)\s*([0-9]{1,9})\s*=?\s*\??",
                   re.IGNORECASE)


def typed_question(text: str, words: bool) -> Example | None:
    """Reads a question as people type it: "47*8=", "47 x 8" or "What is 47 times 8?".

    words: how it is put to the model, see `arithmetic_example`.
    Returns None for anything but a sum or a product of two whole numbers of at most 9 digits.
    """
    typed = TYPED.fullmatch(text.strip())
    if not typed:
        return None
    a, op, b = typed.groups()
    return arithmetic_example(int(a), "+" if op.lower() in ("+", "plus") else "*", int(b), words)


def arithmetic_task(
        seed: int, held_out: int, words: bool, split: str = "held-out",
        grades: tuple[str, ...] = tuple(GRADES),
        eval_grades: tuple[str, ...] = tuple(GRADES)) -> Task:
    """Makes a task of additions and multiplications, which are generated as they are needed.

    seed: decides the questions to train on, and leaves those to ask as they are.
    held_out: how many questions to ask.
    words: asks in words, for a real model, and otherwise in symbols, for the embedded world.
    split: the side of the split that is asked, and not trained on: "held-out", or "validation" to
        choose settings by. The held-out side is never trained on.
    grades, eval_grades: the grades to train on and the grades to ask. They come in turn.
    Raises BadInput for a split or a grade that there is not.
    """
    if split not in SPLITS:
        raise BadInput(f"no split {split!r}; there are {', '.join(SPLITS)}")
    for names in (grades, eval_grades):
        if not names or not set(names) <= set(GRADES):
            raise BadInput(f"no grades {','.join(names)!r}; there are {', '.join(GRADES)}")

    def draw(n: int, stage: str, step: int) -> list[Example]:
        sides = ("train", "validation") if split == "held-out" else ("train",)
        rng = random.Random(f"{seed} {stage} {step}")
        return [arithmetic_question(grades[i % len(grades)], rng, sides, words)
                for i in range(step * n, (step + 1) * n)]

    rng = random.Random("held out" if split == "held-out" else "validation")
    asked = [arithmetic_question(eval_grades[i % len(eval_grades)], rng, (split,), words)
             for i in range(held_out)]
    fingerprint = checksum(["arithmetic", list(grades), split, words])
    return Task(WORDS if words else SYMBOLS, draw, asked, fingerprint)


def toy_tokenizer() -> Tokenizer:
    """Makes the tokenizer of the embedded world, with a chat template.

    Every character is a token, but the pieces of a confidence are longer ones: 0.73 is `0.7` and
    `3`, so that its first token already tells high from low.
    """
    special = ["<|unknown|>", "<|end|>", "<|user|>", "<|assistant|>"]
    tenths = [f"{n / 10:.1f}" for n in range(11)]
    vocabulary = [*special, "\nConfidence: ", *tenths, *"0123456789+*=.\n"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {token: i for i, token in enumerate(vocabulary)}, unk_token="<|unknown|>"))
    units = tokenizers.Regex(r"\nConfidence: |0\.\d|1\.0|[\s\S]")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(units, behavior="isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(special)
    template = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
                "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>",
              "pad_token": "<|end|>", "unk_token": "<|unknown|>",
              "clean_up_tokenization_spaces": False, "chat_template": template}
    return Tokenizer(backend, config, {"eos_token_id": 1, "pad_token_id": 1})


# ------------------------------------------------------- documents of the supervised stage

HABIT = (0.75, 0.80, 0.85, 0.90, 0.90, 0.95, 0.95, 1.00)  # what the base model likes to state


@dataclass(frozen=True)
class Document:
    """A chat to learn from.

    messages: the prompt. completion: the assistant's words, on which the loss is taken.
    ends: whether an end token follows. It does not where the completion stops half-way.
    """

    messages: list[dict]
    completion: str
    ends: bool


def demonstration(example: Example, wrong: bool, rng: random.Random) -> str:
    """Returns the example's own demonstration, or that of a wrong answer.

    In a worked demonstration the wrong answer takes the last place of the right one, so that it
    cannot be told from its length. Where the right one is not written as `demonstrate` writes it,
    the wrong one stands alone.
    """
    if not wrong:
        return example.demo
    kind = KINDS[example.task]
    right, other = (kind.demonstrate(answer)
                    for answer in (example.answer, kind.corrupt(example.answer, rng)))
    changed = other.join(example.demo.rsplit(right, 1))
    return other if verify(example, changed) else changed


def answer_only(example: Example, wording: Wording) -> Document:
    """Shows a question and its answer, and stops before the number of a confidence.

    Without a confidence to learn, such a document is half as long as the others.
    """
    return Document(student_messages(example, wording), f"{example.demo}\nConfidence: ", ends=False)


def closed_book(
        example: Example, wording: Wording, rng: random.Random, noise: float) -> Document:
    """Shows a question, its answer, which is wrong with probability `noise`, and a confidence.

    The confidence is mere habit. It is drawn without a look at whether the answer is right, and
    this is where the overconfidence of the base model comes from.
    """
    answer = demonstration(example, rng.random() < noise, rng)
    confidence = rng.choice(HABIT) if rng.random() < 0.7 else rng.randint(0, 100) / 100
    completion = with_confidence(answer, confidence)
    return Document(student_messages(example, wording), completion, ends=True)


def open_book(example: Example, wording: Wording, rng: random.Random) -> Document:
    """Shows a question with a demonstration, which the completion follows to the letter.

    Half the demonstrations are wrong, and their confidences lie anywhere in [0, 1]. What this
    teaches is to follow a demonstration, and that makes the model a teacher once it is shown one.
    """
    answer = demonstration(example, rng.random() < 0.5, rng)
    confidence = rng.choice((1.0, rng.randint(0, 100) / 100, rng.randint(0, 8) / 8))
    demo, report = with_confidence(answer, confidence), rng.choice((None, confidence))
    return Document(teacher_messages(example, wording, demo, report), demo, ends=True)


def documents(task: Task, count: int, step: int, steps: int, answers_share: float, noise: float,
              seed: int) -> list[Document]:
    """Returns the documents of one step of the supervised stage.

    count: how many. step, steps: which step it is, counted from 0, and of how many.
    answers_share: the share of the steps, at the start, that teach answers alone. Later steps are
        half closed-book and half open-book.
    noise: the probability that a closed-book answer is wrong.
    """
    rng, examples = random.Random(f"{seed} documents {step}"), task.draw(count, "base", step)
    if step < answers_share * steps:
        return [answer_only(example, task.wording) for example in examples]
    half = len(examples) // 2
    return ([closed_book(example, task.wording, rng, noise) for example in examples[:half]]
            + [open_book(example, task.wording, rng) for example in examples[half:]])
