"""The questions of a run: generated ones, or those of files, within the limits of length."""

from dataclasses import replace

from tqdm import tqdm

import data
import ranks
from caopd import METHODS, Args, held_out_share, saved_stages
from data import Example, Task, Tokenizer, Wording
from files import BadInput
from model import Config


def make_task(tokenizer: Tokenizer, config: Config, args: Args) -> Task:
    """The generated questions, or those of --train and --eval, within the limits of length."""
    last = max(*tokenizer.backend.get_vocab().values(), *tokenizer.eos_ids)
    if last >= config.vocab_size:
        raise BadInput(f"{tokenizer.origin}: its token {last} is outside the model's vocabulary "
                       f"of {config.vocab_size}: tokenizer and weights do not belong together")
    if args.model and not knows_words(tokenizer):
        raise BadInput(f"--model {args.model}: its tokenizer cannot spell a question in words; a "
                       "model of the embedded world is looked at with --ask and --explain")
    if args.train or args.eval:
        return task_of_files(tokenizer, config, args)
    task = data.arithmetic_task(args.seed, args.eval_questions, bool(args.model), args.split)
    every_grade = task.held_out + task.draw(64, "lengths", 0)
    fitting(every_grade, tokenizer, task.wording, config, replace(args, skip_long=False))
    return task


def knows_words(tokenizer: Tokenizer) -> bool:
    """Whether it can spell a question in words; the embedded world's tokenizer cannot."""
    return tokenizer.decode(tokenizer.encode("What is")).strip() == "What is"


def task_of_files(tokenizer: Tokenizer, config: Config, args: Args) -> Task:
    """The questions of --train, if any, and those of --eval or the share of --train held out."""
    def read(paths: list[str]) -> list[Example]:
        examples = [example for path in paths for example in data.load_jsonl(path, args.task)]
        return fitting(examples, tokenizer, data.WORDS, config, args)

    train, share = read(args.train) if args.train else [], held_out_share(args)
    if share or args.split == "validation":
        if args.eval and not share:
            print(f"Note: {' '.join(args.eval)} is not read: --split validation asks a fifth of "
                  f"{' '.join(args.train)}.")
        sides = [data.side(example.question, share or 0.2) for example in train]
        unseen = {args.split, "held-out" if share else args.split}
        held_out = [example for example, side in zip(train, sides) if side == args.split]
        train = [example for example, side in zip(train, sides) if side not in unseen]
    else:
        held_out = read(args.eval)
    if not held_out or args.train and not train:
        raise BadInput(f"--split {args.split}: {' '.join(args.train)} has too few questions to "
                       "leave some for both sides")
    if shared := len({e.question.strip() for e in train} & {e.question.strip() for e in held_out}):
        print(f"Note: {shared} held-out questions are also in {' '.join(args.train)}; figures on "
              "them are not held out.")
    if len(held_out) > args.eval_questions and args.explain is None:
        print(f"Note: the first {args.eval_questions} of {len(held_out)} {args.split} questions "
              "are asked (--eval-questions).")
    return data.listed_task(train, held_out[:args.eval_questions], args.seed)


def fitting(examples: list[Example], tokenizer: Tokenizer, wording: Wording, config: Config,
            args: Args) -> list[Example]:
    """The examples within --max-prompt and the model's positions.

    Longer ones are refused, or left out and counted with --skip-long.
    """
    kept, limit = [], config.max_position_embeddings
    shown = "demonstration" if args.context == "demo" else "solution"
    for example in tqdm(examples, desc="reading", unit="prompt", leave=False,
                        disable=len(examples) < 500 or not ranks.first()):
        prompt = len(tokenizer.chat(data.student_messages(example, wording)))
        total = longest_prompt(example, tokenizer, wording, args) + args.max_new_tokens
        if prompt <= args.max_prompt and total <= limit:
            kept.append(example)
        elif not args.skip_long:
            which = (f"{example.where}: the prompt" if example.where
                     else f"the prompt {example.question!r}")
            problem = (f"has {prompt} tokens, over --max-prompt {args.max_prompt}"
                       if prompt > args.max_prompt else
                       f"with {shown} and completion takes {total} tokens, over the model's "
                       f"{limit}")
            from_files = args.train or args.eval
            helps = ", or leave such prompts out with --skip-long" if from_files else ""
            raise BadInput(f"{which} {problem}; change the limits{helps}")
    if len(kept) < len(examples):
        left_out = len(examples) - len(kept)
        print(f"Left out {left_out} of {len(examples)} questions for their length.")
    if not kept:
        raise BadInput(f"--max-prompt {args.max_prompt}: no question is left")
    return kept


def longest_prompt(example: Example, tokenizer: Tokenizer, wording: Wording, args: Args) -> int:
    """Tokens of the longest prompt that an example makes: (x, z̃), or x where nothing reads z.

    A solution in place of a demonstration may be as long as a completion can be.
    """
    if not any(name == "base" or METHODS[name].teacher for name in saved_stages(args)):
        return len(tokenizer.chat(data.student_messages(example, wording)))
    solution = args.context == "solution"
    demo = data.with_confidence("" if solution else example.demo, 1.0)
    prompt = tokenizer.chat(data.teacher_messages(example, wording, demo, 1.0, solution))
    return len(prompt) + args.max_new_tokens * solution
