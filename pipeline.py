"""From a command line to its results: the model, the base, each method, and what --out keeps.

caopd.py has what a method does; here is what surrounds it. `run` is the whole of it: it reads the
inputs, makes the base model and then each method's model from it, asks them all, and writes
results.json. What the same settings have made before is taken up again, and what others have made
is refused.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

import data
import ranks
from caopd import (EVAL, METHODS, NOTHING, Args, eval_sampling, evaluate, methods_of, saved_stages,
                   settings, supervise, train)
from data import Task, Tokenizer
from files import (BadInput, claimed, fingerprint, from_json, map_leaves, parse_json, read_object,
                   read_text, to_json, write_text)
from memory import check_memory, keep_freed_memory, return_freed_memory
from model import Config, Transformer
from questions import make_task
from share import model_card
from stage import Logged
from tables import print_tables

# ----------------------------------------------------------------------------------------- the run


def run(args: Args) -> dict:
    """Everything, from flags to table; returns what results.json holds of the models.

    A model or figures that the same settings have made are not made again. What others have made is
    only written over with --overwrite.
    """
    began, device, out = time.perf_counter(), pick_device(args.device), Path(args.out)
    keep_freed_memory()
    args = replace(args, dtype=pick_dtype(args, device))
    origin, config, tokenizer, task = read_inputs(args)
    asked = [dataclasses.astuple(replace(example, where="")) for example in task.held_out]
    identity = {"settings": dataclasses.asdict(replace(args, overwrite=False, track="")),
                "inputs": data.checksum([task.fingerprint, asked])}
    names, stages = ("base", *methods_of(args)), saved_stages(args)

    def still_to_do() -> tuple[dict, list[str]]:
        figures = figures_there(names, identity, task, args, out)
        return figures, [name for name in names if name not in figures]

    figures, missing = still_to_do()
    again = args.overwrite and not missing
    if missing or again:
        check_memory(config, task, tokenizer, args, device)
        if origin:
            load_model(origin, config, args, device)  # A broken one is refused before a write.
    else:
        print(f"{out} has the results of this command; --overwrite makes them again.")

    with claimed(out) if ranks.first() else nullcontext():
        figures, missing = still_to_do()  # Another command may have ended there in the meantime.
        if again and not missing:
            figures, missing = forget(names, figures, out), names
        if missing:
            write_results(out, figures, identity, began)
            start = origin if "base" not in stages else make_model(
                "base", origin, config, tokenizer, task, args, device, out)
        for name in missing:
            figures[name] = make_figures(name, start, config, tokenizer, task, args, device, out)
            if name in stages and ranks.first():  # any other base has its own card
                card = model_card(name, figures, settings(args, name, task), args)
                write_text(out / name / "README.md", card)
            write_results(out, figures, identity, began)
        for name in names if ranks.first() else ():
            (out / name / "checkpoint.safetensors").unlink(missing_ok=True)
    results = {name: figures[name] for name in names}
    print_tables(results, args, out)
    return results


def read_inputs(args: Args) -> tuple[Path | None, Config, Tokenizer, Task]:
    """The directory of --model, if there is one, the network's shape, its tokenizer, the questions.

    Raises BadInput for what cannot be read, and for what cannot be served.
    """
    origin = find_model(args.model)
    if origin is None:
        tokenizer = data.toy_tokenizer()
        config = toy_model(args, tokenizer)
        return None, config, tokenizer, make_task(tokenizer, config, args)
    refuse_to_write_over(origin, args, Path(args.out))
    config = Config.from_pretrained(origin)
    tokenizer = Tokenizer.from_pretrained(origin, json.loads(args.template_args))
    task = make_task(tokenizer, config, args)
    # Other weights under the same name make another run.
    inputs = data.checksum([task.fingerprint, fingerprint(origin)])
    return origin, config, tokenizer, replace(task, fingerprint=inputs)


def refuse_to_write_over(origin: Path, args: Args, out: Path) -> None:
    """A model in --out that the run itself would replace cannot be what the run starts from."""
    for name in saved_stages(args):
        if origin.resolve() == (out / name).resolve():
            raise BadInput(f"--model {args.model}: this run saves a model of its own there; choose "
                           "another --out")


def make_model(name: str, start: Path | None, config: Config, tokenizer: Tokenizer, task: Task,
               args: Args, device: torch.device, out: Path) -> Path:
    """The directory of a stage's model: the one that is there, or what training makes of `start`.

    name: a method, or "base" for the supervised stage.
    """
    directory, base = out / name, name == "base"
    if made(directory, settings(args, name, task)):
        print(f"Reusing the {'base ' if base else ''}model in {directory}: it was made with the "
              "same settings.")
        return directory
    model = load_model(start, config, args, device)
    if base:
        supervise(model, tokenizer, task, args, out)
    else:
        train(model, name, tokenizer, task, args, out)
    model = model.for_inference()
    if args.save_adapter and not base and ranks.first():
        origin = str(start) if "base" in saved_stages(args) else args.model
        model.save_adapter(directory / "adapter", origin)
    save(model, tokenizer, directory)
    return ranks.from_first(directory)  # Other ranks wait until rank 0 has saved.


def make_figures(name: str, start: Path, config: Config, tokenizer: Tokenizer, task: Task,
                 args: Args, device: torch.device, out: Path) -> dict:
    """Trains method `name` from the base model in `start`, unless its model is there, and asks it.

    name: a method, or "base" for the base model itself. It is asked as it was saved, so that the
    figures are those of the model in --out: adapters are merged, and weights are in --dtype. Its
    answers are kept in answers/NAME.jsonl.
    """
    source = start
    if name != "base":
        source = make_model(name, start, config, tokenizer, task, args, device, out)
        ranks.free_unused()
    model = load_model(source, config, args, device)
    if name == "base":
        print(introduction(model, task, args))
    figures, answers = evaluate(model, tokenizer, task.held_out, task.wording, eval_sampling(args),
                                args.seed, args.eval_samples, args.oracle, args.paper_samples, name)
    if ranks.first():
        (out / "answers").mkdir(exist_ok=True)
        write_text(out / "answers" / f"{name}.jsonl",
                   "".join(to_json(row) + "\n" for row in answers))
    seconds = training_seconds(out, name) if name in saved_stages(args) else 0.0
    return {"seconds": seconds} | figures


def introduction(model: Transformer, task: Task, args: Args) -> str:
    """What is trained, where, and what it is asked."""
    weights = sum(p.numel() for p in model.parameters())
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapters = f", {learned:,} of them in adapters," if learned < weights else ""
    order = "" if args.model else " Its answers are written last digit first."
    return (f"{args.model or 'The embedded world'}: {weights:,} parameters{adapters} in "
            f"{args.dtype} on {model.device}, {len(task.held_out)} {args.split} questions, seed "
            f"{args.seed}.{order}")


# ------------------------------------------------------------------------------------------ models


def pick_device(name: str) -> torch.device:
    """The device of --device, which becomes the current one: streams and graphs are made there.

    `cuda` is the first one, or that of this rank.
    """
    count = torch.cuda.device_count()
    places = [f"cuda:{i}" for i in range(count)]
    own = f"cuda:{ranks.own_gpu()}"
    place = {"auto": own if count else "cpu", "cuda": own}.get(name, name)
    if place not in ("cpu", own) and ranks.size() > 1:
        raise BadInput(f"--device {name}: each of several processes has a GPU of its own; say "
                       "--device cuda")
    if place not in ("cpu", *places):
        raise BadInput(f"--device {name}: no such device here; there is "
                       f"{' and '.join(['cpu', *places])}")
    if place != "cpu":
        torch.cuda.set_device(place)
    return torch.device(place)


def pick_dtype(args: Args, device: torch.device) -> str:
    """bfloat16 for real models where the hardware multiplies it; emulating it would be slower."""
    if args.dtype != "auto":
        return args.dtype
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
    return "bfloat16" if args.model and native else "float32"


def find_model(name: str) -> Path | None:
    """The model's directory, which is downloaded for a hub name; None for the embedded world."""
    if not name:
        return None
    if os.path.isdir(name):  # Path.is_dir raises where a name is too long.
        if not os.path.exists(os.path.join(name, "config.json")):
            raise BadInput(f"--model {name}: not a Hugging Face model directory; it has no "
                           "config.json that can be read")
        return Path(name)
    if os.path.exists(name) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise BadInput(f"--model {name}: no such directory, or none that may be entered; pass a "
                       "Hugging Face model directory or a hub name like owner/model")
    try:
        from huggingface_hub import snapshot_download
        texts_and_weights = ["*.json", "*.safetensors", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=texts_and_weights))
    except Exception as error:  # whatever is missing (network, model, access), the remedy is one
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"--model {name}: not a directory, and not to be had from the hub "
                       f"({reason}); download it elsewhere and pass its directory") from None


def toy_model(args: Args, tokenizer: Tokenizer) -> Config:
    """The embedded world's transformer: a Qwen3 of about 0.6 M parameters at width 128."""
    end = tokenizer.eos_ids[0]
    return Config(model_type="qwen3", vocab_size=tokenizer.backend.get_vocab_size(),
                  hidden_size=args.width, intermediate_size=11 * args.width // 4,
                  num_hidden_layers=args.layers, num_attention_heads=4, num_key_value_heads=4,
                  head_dim=args.width // 4, max_position_embeddings=128, tie_word_embeddings=True,
                  eos_token_id=end, pad_token_id=end)


def load_model(source: Path | None, config: Config, args: Args,
               device: torch.device) -> Transformer:
    """A model to train, sharded over the ranks: from its directory, or of random weights.

    Its weights are float32 masters, or bfloat16 with --rounding stochastic; it computes in --dtype.
    With --lora-rank it is kept in --dtype, and its adapters are the float32 masters.
    """
    return_freed_memory()  # of the model before
    computed = getattr(torch, args.dtype)
    adapted = source is not None and args.lora_rank > 0  # random weights are not worth adapting
    stored = computed if adapted or args.rounding == "stochastic" else torch.float32
    # A model that needs several devices may be too large for one: sharding moves it, by the layer.
    place = device if ranks.size() == 1 else torch.device("cpu")
    if source:
        model = Transformer.from_pretrained(source, dtype=stored, device=place)
    else:
        torch.manual_seed(args.seed)
        model = Transformer(config).to(place, stored)
    model.compute_dtype, model.recompute = computed, args.recompute
    if adapted:
        torch.manual_seed(args.seed)
        model.add_adapters(args.lora_rank, args.lora_alpha or 2 * args.lora_rank)
    return ranks.shard(model, device)


def save(model: Transformer, tokenizer: Tokenizer, directory: Path) -> None:
    """Saves a Hugging Face directory. Every rank calls it, and rank 0 writes.

    config.json is written last, so that a directory that has one is complete.
    """
    model = model.for_inference()
    if ranks.first():
        tokenizer.save_pretrained(directory)
        model.save_pretrained(directory)


# -------------------------------------------------------------------------------- what --out holds


def made(directory: Path, identity: dict) -> bool:
    """Whether a model that is complete and was made with these settings lies there."""
    there = all((directory / name).exists() for name in ("config.json", "model.safetensors"))
    try:
        there = there and read_object(directory / "settings.json") == identity
    except BadInput:
        there = False
    return ranks.from_first(there)


def figures_there(names: Sequence[str], identity: dict, task: Task, args: Args, out: Path) -> dict:
    """The figures in --out that stay, by model: those of other commands, and of `names` those whose
    models are there.

    Raises BadInput for what other settings have made, unless --overwrite is given.
    """
    figures, conflict = ranks.from_first(already_there(out, identity, task, args))
    if conflict and not args.overwrite:
        raise BadInput(f"--out {out}: {conflict}; choose another --out, or --overwrite")
    trained = [name for name in names if name in saved_stages(args)]  # --model itself may be base
    return {name: its for name, its in figures.items()
            if name not in trained or made(out / name, settings(args, name, task))}


def already_there(out: Path, identity: dict, task: Task, args: Args) -> tuple[dict, str]:
    """The figures that --out has by model, and what in it other settings have made, in words.

    Figures that other settings have made are left out.
    """
    try:
        everything = read_object(out / "results.json")
    except BadInput as error:
        return {}, str(error)
    figures = map_leaves(lambda v: math.nan if v is None else v, {
        name: row for name, row in everything.items() if name in ("base", *METHODS)})
    decisive = {field.name: getattr(args, field.name) for field in dataclasses.fields(Args)
                if field.metadata["group"] == EVAL or field.metadata["decides"] != NOTHING}
    found = everything.get("settings", {}) | {"inputs": everything.get("inputs")}
    words = difference(found, decisive | {"inputs": identity["inputs"]})
    if figures and words:
        return {}, f"results.json was made {words}"
    for name in saved_stages(args):
        try:
            found = read_object(out / name / "settings.json")
        except BadInput as error:
            return figures, str(error)
        words = difference(found, settings(args, name, task))
        if words and (found or (out / name / "config.json").exists()):
            return figures, f"{name} was made {words}"
    return figures, ""


def difference(found: dict, wanted: dict) -> str:
    """The first setting that is another one than wanted, in words; nothing if none is."""
    for key, value in wanted.items():
        if key not in found:
            return "without a record of its settings"
        if found[key] != value:
            return (f"with --{key.replace('_', '-')} {found[key]!r}, not {value!r}"
                    if hasattr(Args, key) else "of other questions, or from another model")
    return ""


def forget(names: Sequence[str], figures: dict, out: Path) -> dict:
    """For --overwrite: the figures without those of `names`, whose models no longer count as made.

    The base model stays: the same settings would make the same one.
    """
    for name in names if ranks.first() else ():
        if name != "base":
            (out / name / "config.json").unlink()
            (out / name / "checkpoint.safetensors").unlink(missing_ok=True)  # with all its updates
    return {name: its for name, its in figures.items() if name not in names}


def write_results(out: Path, figures: dict, identity: dict, began: float) -> None:
    """Writes results.json: the figures by model, then what made them. Without figures it goes.

    So do answers that belong to no figures.
    """
    if not ranks.first():
        return
    for path in (out / "answers").glob("*.jsonl"):
        if path.stem not in figures:
            path.unlink()
    if not figures:
        return (out / "results.json").unlink(missing_ok=True)
    ordered = {name: figures[name] for name in ("base", *METHODS) if name in figures}
    everything = ordered | identity | {"seconds": time.perf_counter() - began}
    write_text(out / "results.json", to_json(everything, indent=2) + "\n")


def training_seconds(out: Path, stage: str) -> float:
    """How long all updates of a stage took, over all runs that it was made in."""
    where = str(out / "metrics.jsonl")
    lines = read_text(out / "metrics.jsonl", absent="").splitlines(True)
    rows = [from_json(Logged, parse_json(line, where), where) for line in lines
            if line.endswith("\n")]  # A killed run may have left half a line of another stage.
    return sum(row.seconds for row in rows if row.stage == stage)
