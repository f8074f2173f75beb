"""--explain and --ask of caopd.py: one question through the algorithm, and the models side by side.

    python caopd.py --explain "47*8"         one question through Algorithm 1, token by token
    python caopd.py --ask "47*8" "12+34"     every model in --out, side by side

Both take the models in --out, and --model first where it is given. Models that were made from a
real one are asked with the flags of their run, --model among them. All that is printed comes out of
the trainer's own functions, and nothing is written to disk.
"""

import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from os.path import commonprefix
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

import data
from caopd import (METHODS, Args, Group, Method, Rollout, Target, TokenLoss, add_references,
                   choose_losses, eq7, eval_sampling, held_out_share, hidden_states, loss_weights,
                   method_targets, methods_of, mu_hat, rollout, rollout_sampling, score_answers,
                   seeded, title)
from data import Example, Tokenizer, Wording
from files import BadInput, read_object
from metrics import expected
from model import Config, SharedPrefix, Transformer
from pipeline import difference, find_model, load_model, pick_device, pick_dtype
from questions import fitting, knows_words, make_task

# ------------------------------------------------------------------- what --explain and --ask share


def run(args: Args) -> None:
    """Serves --explain, then --ask. Raises BadInput where there is no model or no answer."""
    device = pick_device(args.device)
    args = replace(args, dtype=pick_dtype(args, device))
    sources = find_models(args)
    first = next(iter(sources.values()))
    tokenizer = Tokenizer.from_pretrained(first, json.loads(args.template_args))
    config = Config.from_pretrained(first)
    words = knows_words(tokenizer)
    if words and not args.model:
        raise BadInput(f"--out {args.out}: its models were made from a real one; give the flags "
                       "of that run, --model among them")
    # The embedded world's models are asked in its own symbols, even where --model names one.
    args = replace(args, model=args.model if words else "",
                   max_new_tokens=min(args.max_new_tokens, config.max_position_embeddings // 2))
    with torch.no_grad():
        if args.explain is not None:
            for text in args.explain or [None]:
                explain(text, sources, tokenizer, config, args, device)
        if args.ask is not None:
            for texts in [args.ask] if args.ask else typed_lines():
                ask(texts, sources, tokenizer, config, args, device)


def find_models(args: Args) -> dict[str, Path]:
    """The models to look at, by name: --model where it is given, then what is in --out."""
    made = {name: Path(args.out) / name for name in ("base", *METHODS)
            if (Path(args.out) / name / "config.json").exists()}  # written last: it is complete
    found = {}
    if origin := find_model(args.model):  # One that is named like another in --out shows its path.
        name = Path(args.model).name
        taken = name in made and not made[name].samefile(origin)
        found[args.model if taken else name] = origin
    found |= made
    note_other_bases(made)
    if not found:
        raise BadInput(f"--out {args.out}: there are no models in it yet; "
                       f"`python caopd.py --out {args.out}` makes them")
    return found


def note_other_bases(made: dict[str, Path]) -> None:
    """Says of which models it was another base that they were trained from: one of other flags."""
    theirs = {name: read_object(path / "settings.json") for name, path in made.items()
              if (path / "settings.json").exists()}
    base = theirs.get("base", {})
    for name, settings in theirs.items():
        if words := difference(settings, {key: base[key] for key in base if key != "stage"}):
            print(f"Note: {title(name)} was made {words}, and so not from the base that is here.")


def wording(args: Args) -> Wording:
    return data.WORDS if args.model else data.SYMBOLS


@lru_cache  # several questions may be typed
def questions(paths: tuple[str, ...], task: str) -> dict[str, Example]:
    return {example.question.strip(): example
            for path in paths for example in data.load_jsonl(path, task)}


def read_question(text: str, args: Args) -> Example | None:
    """A typed question with its answer: one out of the files, a sum or a product; else None."""
    paths = (*args.train, *(args.eval if held_out_share(args) is None else ()))
    known = questions(paths, args.task).get(text.strip())
    return known or data.typed_question(text, words=bool(args.model))


def answer_part(text: str) -> str:
    """The text of a in y = (a, c), on one line."""
    return visible(data.answer_part(text).strip("\n"))


def visible(text: str) -> str:
    """The text on one line, with its newlines and a space at either end to be seen."""
    return re.sub("^ | $", "␣", text.replace("\n", "⏎"))


def shorten(text: str, width: int) -> str:
    """The end of a text, which is where the answer is."""
    return text if len(text) <= width else "…" + text[1 - width:]


# ----------------------------------------------------------------------------------------- --ask


@dataclass
class Reply:
    """What a model makes of a question in K completions."""

    answer: str  # the most frequent one
    count: int  # how many of the K give it
    stated: float | None  # mean of the confidences that are stated; None where there is none
    expected: float  # mean of E[c] after each answer, under the model's own distribution of c
    correct: int


def typed_lines() -> Iterator[list[str]]:
    """The questions of standard input, one at a time; at a terminal, up to an empty line.

    Raises BadInput for a line that is not text.
    """
    typed = sys.stdin.isatty()
    if typed:
        print("One question a line; an empty line ends.")
    try:
        for line in sys.stdin:
            line.encode()  # Some locales let bytes through that are no text.
            if line.strip():
                yield [line]
            elif typed:
                return
    except UnicodeError:
        raise BadInput("--ask: standard input is not text in UTF-8") from None


def ask(texts: list[str], sources: dict[str, Path], tokenizer: Tokenizer, config: Config,
        args: Args, device: torch.device) -> None:
    """Prints a table for each question, a row per model. One model at a time is in memory."""
    examples = []
    for text in texts:
        example = read_question(text, args)
        if example is None and not args.model:
            raise BadInput(f"--ask {text.strip()!r}: the embedded world knows sums and products "
                           "of whole numbers, such as 12+34 or 47*8")
        examples.append(example or Example("arithmetic", text.strip(), answer=""))
    fitting(examples, tokenizer, wording(args), config, replace(args, skip_long=False))
    columns = {}
    for name, source in sources.items():
        model = Transformer.from_pretrained(source, dtype=getattr(torch, args.dtype), device=device)
        columns[name] = replies(model, tokenizer, examples, args)
    for i, example in enumerate(examples):
        print(ask_table(example, {name: its[i] for name, its in columns.items()}, args) + "\n")


def replies(model: Transformer, tokenizer: Tokenizer, examples: list[Example],
            args: Args) -> list[Reply]:
    """Asks each example K = --rollouts times, as --eval-temperature and --eval-top-p say."""
    sampling = eval_sampling(args)
    generator = seeded(args.seed, "ask", 0, model.device)
    groups = rollout(model, tokenizer, examples, wording(args), args.rollouts, sampling, generator)
    _, p = score_answers(model.for_inference(), tokenizer, groups, sampling.micro_tokens)
    means = expected(p).reshape(len(groups), -1).mean(1)  # [Q]
    return [reply(group, float(mean)) for group, mean in zip(groups, means)]


def reply(group: Group, expected: float) -> Reply:
    (answer, count), = Counter(given_answer(group.example, rollout)
                               for rollout in group.rollouts).most_common(1)
    stated = [r.confidence for r in group.rollouts if r.confidence is not None]
    return Reply(answer, count, fmean(stated) if stated else None, expected,
                 sum(r.correct for r in group.rollouts))


def given_answer(example: Example, rollout: Rollout) -> str:
    """What the verifier would read; without a known answer, all that stands before c."""
    if not example.answer:
        return answer_part(rollout.text)
    answer = data.extract(example, rollout.text)
    return "none" if answer is None else str(answer)


def ask_table(example: Example, rows: dict[str, Reply], args: Args) -> str:
    """Answer, stated and expected confidence, and success of each model."""
    def usual(digits: str) -> str:  # the embedded world writes the last digit first
        return digits[::-1] if digits.isdecimal() and not args.model else digits

    space, width = (" ", 44) if args.model else ("", 24)
    lines = [(visible(example.question) + space + usual(str(example.answer))).rstrip(),
             f"    {'':14}{'answer':>{width}}{'states':>12}{'expects':>10}{'right':>12}"]
    for name, its in rows.items():
        answer = f"{shorten(usual(its.answer), width - 8)} ({its.count}×)"
        states = "nothing" if its.stated is None else f"{its.stated:.2f}"
        right = f"{its.correct} of {args.rollouts}" if example.answer else "unknown"
        lines.append(f"    {shorten(title(name), 14):14}{answer:>{width}}{states:>12}"
                     f"{its.expected:>10.2f}{right:>12}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- --explain

ROWS = 12  # tokens at either end of a long answer that are shown


def explain(text: str | None, sources: dict[str, Path], tokenizer: Tokenizer, config: Config,
            args: Args, device: torch.device) -> None:
    """Algorithm 1 on one question, as it begins: the teacher is still the student.

    Where a method's trained model is in --out, it is set beside them.
    """
    base = "base" if args.sft_steps and "base" in sources else next(iter(sources))
    student = load_model(sources[base], None, args, device)
    group = choose_group(text, student, tokenizer, config, args)
    methods = {name: METHODS[name] for name in methods_of(args)}
    if any(method.reference for method in methods.values()):
        add_references([group], student, tokenizer, wording(args), rollout_sampling(args),
                       seeded(args.seed, "reference", 0, device))
    print(f"x, all that the student reads\n{indented(spelled(tokenizer, group.prompt))}\n\n"
          f"1. Rollout: K = {args.rollouts} completions y = (a, c) of {title(base)}, verified\n"
          f"{rollout_table(group)}\n\n"
          f"2. Empirical confidence\n{empirical(group, methods)}\n\n"
          "3. Target replacement, in a completion y and in what the teacher reads: [was → is]")
    targets, titles = {}, {}
    for name, method in methods.items():
        sampled, targets[name] = (first_target(method, group, tokenizer, args, replacing)
                                  for replacing in (False, True))
        titles.setdefault(replacement(sampled, targets[name], tokenizer), []).append(title(name))
    for text, its in titles.items():
        print(f"   {', '.join(its)}\n{text}")
    if any(targets.values()):
        print("\n4. The loss, token by token: each model's likeliest token and its probability")
    for name, target in targets.items():
        if target is not None:
            trained = load_model(sources[name], None, args, device) if name in sources else None
            print(loss_table(name, target, student, trained, tokenizer, args) + "\n")


def choose_group(text: str | None, student: Transformer, tokenizer: Tokenizer, config: Config,
                 args: Args) -> Group:
    """The question that was typed, or of 8 held-out ones that with μ̂ nearest to ½, rolled out."""
    if text is not None:
        example = read_question(text, args)
        if example is None:
            raise BadInput(f"--explain {text!r}: the algorithm has to know the answer; "
                           "take a sum or a product such as 47*8, or a question of the files")
        examples = fitting([example], tokenizer, wording(args), config,
                           replace(args, skip_long=False))
    else:
        examples = make_task(tokenizer, config, args).held_out[:8]
    groups = rollout(student, tokenizer, examples, wording(args), args.rollouts,
                     rollout_sampling(args), seeded(args.seed, "explain", 0, student.device))
    group = min(groups, key=lambda group: abs(mu_hat(group) - 0.5))
    group.rollouts.sort(key=lambda rollout: not rollout.correct)  # the first is the one followed
    return group


def first_target(method: Method, group: Group, tokenizer: Tokenizer, args: Args,
                 replacing: bool) -> Target | None:
    """The first completion that the method scores, in a Target of its own; None if it has none.

    replacing: whether step 3 is done, as far as the method does it.
    """
    confidence = method.confidence(group) if method.confidence and replacing else None
    targets = method_targets(method, group, confidence, tokenizer, wording(args), args)
    if not targets:
        return None
    return replace(targets[0], completions={next(iter(targets[0].completions)): 1})


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Token ids as text on one line, special tokens included."""
    return visible(tokenizer.backend.decode(ids, skip_special_tokens=False))


def indented(text: str) -> str:
    return textwrap.fill(text, 98, initial_indent=" " * 6, subsequent_indent=" " * 9)


def rollout_table(group: Group) -> str:
    """Every rollout in a line: its answer, the confidence it states, and the verdict."""
    answers = [shorten(answer_part(rollout.text), 56) for rollout in group.rollouts]
    width, lines = max(map(len, answers)), []
    for k, (answer, r) in enumerate(zip(answers, group.rollouts), 1):
        states = "states nothing" if r.confidence is None else f"c = {r.confidence:.2f}"
        verdict = "right" if r.correct else "cut off" if r.truncated else "wrong"
        lines.append(f"   {k:3}  a = {answer:{width}}   {states:14}   {verdict}")
    return "\n".join(lines)


def empirical(group: Group, methods: dict[str, Method]) -> str:
    """μ̂, and the estimates of methods that put another one in its place."""
    correct = sum(rollout.correct for rollout in group.rollouts)
    stated = [r.confidence for r in group.rollouts if r.confidence is not None]
    says = f", where the mean confidence stated is {fmean(stated):.3f}" if stated else ""
    lines = [f"μ̂(x) = {correct}/{len(group.rollouts)} = {mu_hat(group):.3f}{says}"]
    for method in methods.values():
        if method.confidence not in (None, mu_hat):
            estimate = method.confidence(group)
            why = "the share that agrees with the teacher's own answer"
            if isinstance(estimate, list):
                estimate = estimate[0]
                why = "the success rate of the other rollouts, for the first one"
            lines.append(f"{method.title} takes {estimate:.3f}, {why}")
    return "\n".join(map(indented, lines))


def replacement(sampled: Target | None, target: Target | None, tokenizer: Tokenizer) -> str:
    """y → ỹ and (x, z) → (x, z̃), with what was replaced in brackets."""
    if sampled is None or target is None:
        return indented("left out: no other rollout is right, so that there is no context")
    before, after = ((t.sequences[0], t.teacher_prompt) for t in (sampled, target))
    labels = ("y       ", "(x, z)  ") if before == after else ("ỹ       ", "(x, z̃)  ")
    return "\n".join(indented(label + changes(spelled(tokenizer, was), spelled(tokenizer, now)))
                     for label, was, now in zip(labels, before, after) if was)


def changes(was: str, now: str) -> str:
    """Two texts in one, with what differs as [was → now]; a number changes as a whole."""
    was, now = (re.findall(r"\d+\.?\d*|\D", text) for text in (was, now))
    start = len(commonprefix([was, now]))
    end = len(commonprefix([was[start:][::-1], now[start:][::-1]]))
    middle = " → ".join("".join(text[start:len(text) - end]) for text in (was, now))
    return "".join(now) if was == now else "".join(
        [*now[:start], f"[{middle}]", *now[len(now) - end:]])


def loss_table(name: str, target: Target, student: Transformer, trained: Transformer | None,
               tokenizer: Tokenizer, args: Args) -> str:
    """A line per token of ỹ: what each model holds for likeliest there, and the term of Eq. 7."""
    losses = choose_losses(METHODS[name], args)
    y, = target.completions
    ids, n = list(y.ids), y.answer_length
    in_answer, in_confidence = (w.bool() for w in loss_weights([target], args.skip_tokens))
    logits, teacher_logits = next_token_logits(student, target.prompt, ids), None
    columns = [["", *("I_a" if t < n else "I_c" for t in range(len(ids)))],
               ["token", *(shorten(spelled(tokenizer, [i]), 13) for i in ids)],
               ["student", *likeliest(tokenizer, logits)]]
    if METHODS[name].teacher:
        teacher_logits = next_token_logits(student, target.teacher_prompt, ids)
        columns.append(["teacher", *likeliest(tokenizer, teacher_logits)])
    loss = token_losses(logits, teacher_logits, target, losses)
    columns.append(["   loss", *(f"{x:7.3f}" if counted else f"{'–':>7}"
                                 for x, counted in zip(loss, in_answer | in_confidence))])
    if trained is not None:
        columns.append(["after training", *likeliest(tokenizer, next_token_logits(
            trained, target.prompt, ids))])
    widths = [max(map(len, column)) for column in columns]
    heading, *rows = ("   " + "  ".join(map(str.ljust, row, widths)).rstrip()
                      for row in zip(*columns))
    if n > 2 * ROWS + 1:
        rows[ROWS:n - ROWS] = [f"   ... {n - 2 * ROWS} more tokens of I_a"]
    sums = (f"{function.__name__} on {part} {loss[mask].sum():.3f}" for function, part, mask in
            zip(losses, ("I_a", "I_c"), (in_answer, in_confidence)))
    if not METHODS[name].teacher:
        sums = [*sums, f"advantage {y.advantage:+.3f}"]
    return "\n".join([f"   {title(name)}: {', '.join(sums)}", heading, *rows])


def next_token_logits(model: Transformer, prompt: list[int], completion: list[int]) -> Tensor:
    """[M, V]: what the model expects at each token of the completion."""
    shared = SharedPrefix([prompt], [[completion]], model.device)
    every = torch.ones(len(completion), dtype=torch.bool, device=model.device)
    return model.logits(hidden_states(model, shared, every))


def token_losses(logits: Tensor, teacher_logits: Tensor | None, target: Target,
                 losses: tuple[TokenLoss, TokenLoss]) -> Tensor:
    """[M]: the terms of Eq. 7 of a Target's only completion, in nats."""
    y, = target.completions
    tokens = torch.tensor(y.ids, device=logits.device)  # [M]
    advantages = torch.full_like(tokens, y.advantage, dtype=torch.float32)
    is_answer = torch.arange(len(tokens), device=logits.device) < y.answer_length
    return eq7(logits, teacher_logits, tokens, advantages, is_answer, *losses).cpu()


def likeliest(tokenizer: Tokenizer, logits: Tensor) -> list[str]:
    """The likeliest token of each row of logits [M, V], and its probability."""
    probability, token = logits.float().softmax(-1).max(-1)
    return [f"{shorten(spelled(tokenizer, [i]), 13):13} {p:.2f}"
            for i, p in zip(token.tolist(), probability.tolist())]
