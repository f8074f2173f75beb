"""share.py: model cards that parse and say what was measured, and trackers that are sent it."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch

import caopd
import data
import share
from caopd import METHODS, parse_args
from metrics import number
from model import Transformer, generate

TINY = ["--width", "16", "--layers", "1", "--sft-steps", "3", "--sft-documents", "4",
        "--steps", "2", "--prompts", "2", "--rollouts", "2", "--eval-questions", "8",
        "--oracle", "0"]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert caopd.main([*TINY, "--method", "both", "--out", str(out)]) == 0
    return out


def front_matter(card: str) -> dict:
    """The YAML of a card, each line of which is written as a key and a value in JSON."""
    start, yaml, _ = card.split("---\n", 2)
    pairs = (line.split(": ", 1) for line in yaml.splitlines())
    return {key: json.loads(value) for key, value in pairs} if not start else {}


def test_every_model_that_was_made_has_a_card(out):
    results = json.loads((out / "results.json").read_text())
    for name in ("base", "opd", "caopd"):
        card = (out / name / "README.md").read_text()
        assert front_matter(card)["library_name"] == "transformers"
        assert "base_model" not in front_matter(card)  # the embedded world is on no hub
        rows = [line for line in card.splitlines() if line.startswith("| " + caopd.title(name))]
        assert len(rows) == 2 and "temperature 1, top-p 1" in rows[0] and "0.6" in rows[1]
        for row, its in zip(rows, (results[name], results[name]["paper"])):
            assert number(its["accuracy"]) in row.split("|")[2]
        settings = json.loads(card.split("```json\n")[1].split("```")[0])
        assert settings["stage"] == name and settings["seed"] == 0
        assert ("steps" in settings) == (name != "base")  # what decides a method decides no base
        assert "8 held-out questions" in card


@pytest.mark.parametrize("model, base", [
    ("owner/model-1.5B", "owner/model-1.5B"), (str(Path(__file__).parent), None), ("", None)])
def test_the_base_model_is_named_where_it_has_a_name(out, model, base):
    text = (out / "results.json").read_text().replace("null", "NaN")
    results = {name: row for name, row in json.loads(text).items() if name in ("base", "caopd")}
    for name in METHODS:
        args = parse_args(["--model", model] if model else [])
        card = share.model_card(name, results | {name: results["caopd"]}, {"stage": name}, args)
        assert front_matter(card).get("base_model") == base
        assert (data.WORDS.instruction.strip() in card) == bool(model)
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(card.split("---\n")[1]) == front_matter(card)


def assert_the_reference_library_answers_the_same(ours: Transformer, saved: Path,
                                                  chats: list[list[dict]], length: int) -> None:
    """`ours` against what transformers makes of the directory it was saved in: greedy tokens."""
    transformers = pytest.importorskip("transformers")
    tokenizer = data.Tokenizer.from_pretrained(saved)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    template = transformers.AutoTokenizer.from_pretrained(saved)
    prompts = [tokenizer.chat(chat) for chat in chats]
    completions = generate(ours, prompts, length, temperature=0, eos_ids=tokenizer.eos_ids)
    for chat, prompt, ids in zip(chats, prompts, completions):
        assert template.apply_chat_template(chat, add_generation_prompt=True, tokenize=True,
                                            return_dict=False) == prompt
        whole = theirs.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False)
        assert whole[0, len(prompt):].tolist() == ids
        assert template.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


@pytest.mark.slow
def test_a_saved_model_answers_in_the_reference_library_with_the_same_tokens(out):
    ours = Transformer.from_pretrained(out / "caopd", dtype=torch.float32)
    examples = data.arithmetic_task(0, 40, words=False).held_out
    chats = [data.student_messages(example, data.SYMBOLS) for example in examples]
    assert_the_reference_library_answers_the_same(ours, out / "caopd", chats, 16)


# ----------------------------------------------------------------------------- trackers


class Recorder:
    """Stands for wandb, for trackio and for a SummaryWriter: it keeps what it is sent."""

    def __init__(self, *args, **kwargs):
        self.started, self.sent, self.ended = (args, kwargs), [], 0

    def log(self, figures, step):
        self.sent.append((step, figures))

    def add_scalar(self, name, value, step):
        self.sent.append((step, {name: value}))

    def add_text(self, name, text, step):
        self.sent.append((step, {name: text}))

    def finish(self):
        self.ended += 1

    close = finish


@pytest.mark.parametrize("service", caopd.TRACKERS)
def test_a_tracker_is_sent_the_figures_and_the_samples(tmp_path, monkeypatch, service):
    runs = []

    def start(*args, **kwargs):
        runs.append(Recorder(*args, **kwargs))
        return runs[-1]
    module = types.ModuleType(service)
    module.init, module.Table = start, lambda columns, data: (columns, data)
    module.SummaryWriter, module.__spec__ = start, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, service, module)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    flags = [*TINY, "--method", "opd", "--paper-samples", "0", "--out", str(tmp_path)]
    assert caopd.main([*flags, "--track", service]) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    base, opd = runs
    assert base.ended == opd.ended == 1 and "opd" in str(opd.started)
    for run, name in ((base, "base"), (opd, "opd")):
        sent = {(step, key): value for step, figures in run.sent for key, value in figures.items()}
        for row in (row for row in rows if row["stage"] == name):
            figures = {key: row[key] for key in row.keys() - {"stage", "step"}}
            assert all(sent.get((row["step"], key)) == figures[key] for key in figures)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    kept = [figures["samples"] for _, figures in opd.sent if "samples" in figures]
    assert len(kept) == 2 and samples[0]["question"] in str(kept[0])


def test_a_tracker_that_is_not_installed_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(caopd, "find_spec", lambda name: None)
    assert caopd.main([*TINY, "--out", str(tmp_path / "out"), "--track", "wandb"]) == 2
    error = capsys.readouterr().err
    assert "--track wandb: it is not installed; pip install wandb" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()
