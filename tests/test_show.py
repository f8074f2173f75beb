"""show.py: what --explain prints is what the trainer computes, and --ask asks every model."""

import dataclasses
import io
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import caopd
import data
import pipeline
import show
import tables
from caopd import METHODS, parse_args
from model import Config, Transformer

TINY = ["--width", "16", "--layers", "1", "--sft-steps", "40", "--sft-documents", "16",
        "--sft-answers", "0", "--sft-lr", "1e-2", "--steps", "2", "--prompts", "2",
        "--rollouts", "4", "--eval-questions", "8", "--oracle", "0", "--paper-samples", "0"]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The directory of a run: a base that has the format and hardly an answer, OPD and CaOPD."""
    out = tmp_path_factory.mktemp("out")
    assert caopd.main([*TINY, "--method", "both", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def speaking_model(out, tmp_path_factory) -> Path:
    """A model whose tokenizer spells words: characters, with the template of the toy."""
    directory = tmp_path_factory.mktemp("speaking")
    tokenizer = data.toy_tokenizer()
    vocabulary = ["<|unknown|>", "<|end|>", "<|user|>", "<|assistant|>",
                  *map(chr, range(32, 127)), "\n"]
    backend = type(tokenizer.backend)(type(tokenizer.backend.model)(
        {token: i for i, token in enumerate(vocabulary)}, unk_token="<|unknown|>"))
    backend.pre_tokenizer, backend.decoder = tokenizer.backend.pre_tokenizer, \
        tokenizer.backend.decoder
    backend.add_special_tokens(vocabulary[:4])
    data.Tokenizer(backend, tokenizer.config, tokenizer.generation).save_pretrained(directory)
    torch.manual_seed(0)
    Transformer(Config("qwen2", len(vocabulary), 16, 24, 1, 4, 2, 4,
                       max_position_embeddings=512)).save_pretrained(directory)
    return directory


def printed(capsys, *flags: str) -> str:
    assert caopd.main([str(flag) for flag in flags]) == 0
    return capsys.readouterr().out


# ----------------------------------------------------------------------------- --explain


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("flags", [[], ["--skip-tokens", "1", "--divergence", "jsd"]])
def test_the_terms_shown_are_those_that_the_trainer_sums(name, flags):
    args = dataclasses.replace(parse_args([*TINY, "--rollouts", "3", *flags]), dtype="float32")
    tokenizer, texts = data.toy_tokenizer(), ("65\nConfidence: 0.90", "64\nConfidence: 0.30", "61")
    student, teacher = (pipeline.load_model(None, pipeline.toy_model(args, tokenizer),
                                            dataclasses.replace(args, seed=s), torch.device("cpu"))
                        for s in (0, 1))
    example, rollouts = data.typed_question("7*8", words=False), []
    for text in texts:
        correct, confidence = data.verify(example, text), data.parse_confidence(text)
        rollouts.append(caopd.Rollout([*tokenizer.encode(text), 1], text, False, correct,
                                      confidence))
    group = caopd.Group(example, tokenizer.chat(data.student_messages(example, data.SYMBOLS)),
                        rollouts, reference=texts[0])
    target = show.first_target(METHODS[name], group, tokenizer, args, replacing=True)
    losses, (ids,) = caopd.choose_losses(METHODS[name], args), target.sequences
    assert ids[:2] == rollouts[0].ids[:2]
    teacher_logits = show.next_token_logits(teacher, target.teacher_prompt, ids) \
        if METHODS[name].teacher else None
    terms = show.token_losses(show.next_token_logits(student, target.prompt, ids), teacher_logits,
                              target, losses)
    for weight in student.parameters():
        weight.grad = torch.zeros_like(weight)
    *sums, _ = caopd.accumulate_gradient(student, teacher if METHODS[name].teacher else None,
                                         [target], *losses, args.skip_tokens, 1.0)
    masks = caopd.loss_weights([target], args.skip_tokens)
    assert [(terms.detach() * mask).sum().item() for mask in masks] == pytest.approx(sums, abs=1e-4)


def test_a_gap_of_nothing_can_be_printed():
    """OPD may reach the floor exactly: nothing is ever right, and all of it is stated as 0.00."""
    figures = dict.fromkeys(("ece", "brier", "spr"), 0.0)
    row = {"brier": 0.0, "oracle": figures,
           "readouts": dict.fromkeys(("stated", "greedy", "expected", "likelihood"), figures)}
    assert "OPD" in tables.readout_table({"opd": row})


def test_a_gap_of_a_confidence_that_is_never_stated_is_a_dash():
    worst, none, best = ({"ece": x, "brier": x, "spr": x} for x in (1.0, math.nan, 0.5))
    opd = {"brier": 1.0, "oracle": best, "readouts": {"stated": worst, "expected": worst}}
    other = {"brier": math.nan, "oracle": best, "readouts": {"stated": none, "expected": best}}
    table = tables.readout_table({"opd": opd, "caopd": other})
    assert "– / 100%" in table and "nan" not in table


def test_a_question_is_followed_through_the_algorithm(out, capsys):
    text = printed(capsys, *TINY, "--out", out, "--method", "both", "--explain", "3+4")
    assert "<|user|>3+4=<|assistant|>" in text
    verdicts = re.findall(r"^ +\d  a = .*(right|wrong|cut off)$", text, re.MULTILINE)
    share = verdicts.count("right") / 4
    assert len(verdicts) == 4 and f"μ̂(x) = {verdicts.count('right')}/4 = {share:.3f}" in text
    assert f"Confidence: [1.00 → {share:.2f}]<|assistant|>" in text  # z̃, and z is as it was
    assert "<|user|>3+4=⏎7⏎Confidence: 1.00<|assistant|>" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    tables = re.findall(r"kl on I_a ([\d.]+), (?:forward_)?kl on I_c ([\d.]+)\n(.*?)\n\n",
                        text, re.DOTALL)
    assert len(tables) == 2
    for on_answer, on_confidence, table in tables:
        heading, *rows = table.splitlines()
        assert heading.split() == ["token", "student", "teacher", "loss", "after", "training"]
        for part, total in (("I_a", on_answer), ("I_c", on_confidence)):
            terms = [float(row.split()[6]) for row in rows if row.split()[0] == part]
            assert sum(terms) == pytest.approx(float(total), abs=0.01) and terms


def test_a_held_out_question_is_found_and_a_model_explained_alone(out, capsys):
    text = printed(capsys, *TINY, "--out", out / "none", "--model", out / "caopd",
                   "--method", "grpo,caopd-sc", "--explain")
    assert "completions y = (a, c) of CaOPD, verified" in text
    assert "policy_gradient on I_a" in text and "after training" not in text
    assert printed(capsys, *TINY, "--out", out, "--explain", "1+1", "2+2").count("2. Emp") == 2


def test_the_base_that_a_run_made_of_a_real_model_is_the_one_explained(speaking_model, tmp_path,
                                                                        capsys):
    flags = [*TINY, "--model", speaking_model, "--out", tmp_path, "--method", "opd",
             "--max-new-tokens", "8"]
    assert caopd.main([*map(str, flags)]) == 0
    assert "completions y = (a, c) of base, verified" in printed(capsys, *flags, "--explain", "3+4")


def test_what_changes_between_two_texts():
    assert show.changes("a 0.90 b", "a 0.95 b") == "a [0.90 → 0.95] b"
    assert show.changes("64⏎", "64⏎Confidence: 0.50") == "64⏎[ → Confidence: 0.50]"
    assert show.changes("aa", "aaa") == "aa[ → a]" and show.changes("same", "same") == "same"


def test_the_middle_of_a_long_answer_is_left_out():
    args, tokenizer = parse_args(TINY), data.toy_tokenizer()
    student = Transformer(pipeline.toy_model(args, tokenizer))
    ids = tokenizer.encode(40 * "1" + "\nConfidence: 0.50")
    target = caopd.Target([2], [2, 3], {caopd.Completion(tuple(ids), 40): 1})
    text = show.loss_table("opd", target, student, None, tokenizer, args)
    assert "   ... 16 more tokens of I_a\n" in text
    assert (text.count("   I_a  "), text.count("   I_c  ")) == (24, 3)


# ----------------------------------------------------------------------------- --ask


def test_a_model_that_is_named_like_those_in_out_is_shown_beside_them(out, tmp_path):
    shutil.copytree(out / "opd", tmp_path / "opd")
    args = parse_args(["--model", str(tmp_path / "opd"), "--out", str(out), "--ask", "3+4"])
    found = show.find_models(args)
    assert found[str(tmp_path / "opd")] == tmp_path / "opd" and found["opd"] == out / "opd"


def test_a_model_of_another_base_than_the_one_shown_is_noted(out, tmp_path, capsys):
    shutil.copytree(out, tmp_path / "out")
    flags = [*TINY, "--out", tmp_path / "out", "--ask", "3+4"]
    assert "Note" not in printed(capsys, *flags)
    where = tmp_path / "out" / "opd" / "settings.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | {"sft_steps": 7}))
    text = printed(capsys, *flags)
    assert "Note: OPD was made with --sft-steps 7, not " in text and text.count("Note") == 1


def test_models_are_asked_side_by_side(out, capsys, monkeypatch):
    flags = [*TINY, "--out", out, "--ask"]
    text = printed(capsys, *flags, "3+4", "What is 12 times 34?")
    first, second = text.split("\n\n")[:2]
    assert first.startswith("3+4=7\n") and second.startswith("12*34=408\n")
    for table in (first, second):
        rows = [row.split() for row in table.splitlines()[2:]]
        assert [row[0] for row in rows] == ["base", "OPD", "CaOPD"]
        for _, _, count, stated, expected, right, _, k in rows:
            assert 1 <= int(count.strip("(×)")) <= 4 and k == "4" and 0 <= int(right) <= 4
            assert 0 <= float(expected) <= 1 and (stated == "nothing" or 0 <= float(stated) <= 1)
    lines = "3+4\nWhat is 12 times 34?\n\n5+5\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    piped = printed(capsys, *flags)
    assert piped.startswith(printed(capsys, *flags, "3+4")) and "12*34=408" in piped
    assert "5+5=10" in piped  # a pipe is read to its end, and a terminal to an empty line
    for errors in ("strict", "surrogateescape"):
        broken = io.TextIOWrapper(io.BytesIO(b"3+4\n\xff\n"), "utf-8", errors)
        monkeypatch.setattr("sys.stdin", broken)
        assert caopd.main([str(flag) for flag in flags]) == 2
        assert "--ask: standard input is not text in UTF-8" in capsys.readouterr().err
    terminal = io.StringIO(lines)
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    typed = printed(capsys, *flags)
    assert "12*34=408" in typed and "5+5" not in typed


def test_a_reply_by_hand(out):
    """Two right answers of three, stated 0.9 and 0.5; the third states nothing."""
    example = data.typed_question("5+7", words=False)  # 12, written 21
    rollouts = [caopd.Rollout([], text, False, data.verify(example, text),
                              data.parse_confidence(text))
                for text in ("21\nConfidence: 0.90", "21\nConfidence: 0.50", "3")]
    reply = show.reply(caopd.Group(example, [], rollouts), 0.25)
    assert dataclasses.astuple(reply) == ("21", 2, pytest.approx(0.7), 0.25, 2)
    row = show.ask_table(example, {"opd": reply}, parse_args(TINY)).splitlines()[-1].split()
    assert row == ["OPD", "12", "(2×)", "0.70", "0.25", "2", "of", "4"]


def test_a_question_without_a_known_answer_is_asked_of_a_model_with_words(
        speaking_model, tmp_path, capsys):
    flags = ["--model", speaking_model, "--max-new-tokens", "8", "--rollouts", "2",
             "--out", tmp_path]
    text = printed(capsys, *flags, "--ask", "Who wrote Hamlet?", "3+4")
    hamlet, sum_ = text.split("\n\n")[:2]
    assert hamlet.startswith("Who wrote Hamlet?\n") and "unknown" in hamlet
    assert sum_.startswith("What is 3 + 4? 7") and " of 2" in sum_
    file = tmp_path / "q.jsonl"
    file.write_text('{"prompt": "Which letter?", "answer": "B"}\n')
    text = printed(capsys, *flags, "--task", "mcq", "--train", file, "--eval", file,
                   "--ask", "Which letter?")
    assert text.startswith("Which letter? B") and " of 2" in text


@pytest.mark.parametrize("flags, words", [
    (["--ask", "3+4"], "makes them"), (["--explain"], "makes them"),
    (["--out", "RUN", "--ask", "3+4", "Who wrote Hamlet?"], "--ask 'Who wrote Hamlet?'"),
    (["--out", "RUN", "--explain", "3-4"], "--explain '3-4'"),
    (["--out", "RUN", "--ask", "3+4", "--max-prompt", "2"], "--max-prompt 2"),
    (["--out", "WORDS", "--ask", "3+4"], "--model among them")])
def test_what_cannot_be_asked_is_one_sentence(out, speaking_model, tmp_path, capsys, flags, words):
    shutil.copytree(speaking_model, tmp_path / "words" / "base")
    places = {"RUN": str(out), "WORDS": str(tmp_path / "words")}
    flags = ["--out", str(tmp_path / "out"), *(places.get(flag, flag) for flag in flags)]
    assert caopd.main(flags) == 2
    shown = capsys.readouterr()
    assert words in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert not (tmp_path / "out").exists()
