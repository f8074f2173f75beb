"""The confidence segment, the verifiers, the prompts, the tokenizer, JSONL files and the world."""

import dataclasses
import json
import random
import re
import zlib
from datetime import datetime
from pathlib import Path

import pytest
import tokenizers

import data
import files
from data import (Example, KINDS, Tokenizer, load_jsonl, parse_confidence, replace_confidence,
                  split_completion, toy_tokenizer, verify)
from files import BadInput


# ------------------------------------------------------- the confidence segment

@pytest.mark.parametrize("text, value", [
    ("64\nConfidence: 0.85", 0.85), ("Confidence: 1", 1.0), ("confidence: .5", 0.5),
    ("CONFIDENCE:0.00", 0.0), ("Confidence: 85%", 0.85), ("Confidence: 0.9.", 0.9),
    ("Confidence: 0.2\n64\nConfidence: 0.70", 0.70), ("Confidence: 100%", 1.0),
    ("(Confidence: 0.3)", 0.3), ("64", None), ("", None), ("Confidence:", None),
    ("Confidence: high", None), ("Confidence: 1.01", None), ("Confidence: -0.5", None),
    ("Confidence: 0.8.5", None), ("Confidence: nan", None), ("Confidence: 1e-1", None),
    ("Confidence: 150%", None), ("Confidence: 0.9\nConfidence: ?", None),
    ("<answer>\nB\nConfidence: 0.85</answer>", 0.85), ("Confidence:\n0.5", None),
    ("**Confidence:** 0.9", 0.9), ("Confidence: **0.9**", 0.9),
    ("**Confidence**: 0.9", 0.9), ("Confidence *: 0.9", None), ("Confidence: 1 %", 0.01),
    ("Confidence: 85 % or so", 0.85), ("Confidence: 85\n%", None), ('"Confidence: 0.85"', 0.85),
    ("`Confidence: 0.85`.", 0.85), ('Confidence: "0.85"', 0.85), ("Confidence: `0.85`", 0.85),
    ("Confidence (0.00 to 1.00): 0.9", 0.9), ("Confidence: 0.85 (confidence=high)", 0.85),
    ("**Confidence level (0-1)**: 0.9", 0.9), ("**Confidence** (0-1): 90%", 0.9),
    ("confidence (as I said) is high: 3", None)])
def test_parse_confidence(text, value):
    assert parse_confidence(text) == value


@pytest.mark.parametrize("value", [i / 8 for i in range(9)] + [i / 100 for i in range(101)])
def test_a_written_confidence_is_read_back(value):
    assert abs(parse_confidence(data.format_confidence(value)) - value) <= 0.005 + 1e-12


@pytest.mark.parametrize("answer", ["64", "", "6\n4", "64\n\n", "6="])
def test_replacement_keeps_the_answer_ids_and_states_the_value(answer):
    tokenizer = toy_tokenizer()
    for segment in ("Confidence: 0.85", "Confidence: ", "Confidence: 0.85\n1+1", ""):
        text = answer + ("\n" if segment else "") + segment
        ids = tokenizer.encode(text) + [1]
        new, n = replace_confidence(tokenizer, ids, 0.375)
        assert new[:n] == ids[:n] and new[-1] == 1 and new.count(1) == 1
        kept = text[:len(text) - len(segment)] + ("" if segment else "\n")
        assert tokenizer.decode(new) == kept + "Confidence: 0.38"
        # A newline that was added is a part of the answer from now on.
        assert split_completion(tokenizer, new)[0] in (n, n + (not segment))


def test_a_quoted_segment_is_replaced_with_its_quotes():
    starts = [data.segment_start(f"64\n{q}Confidence: 0.5{q}") for q in ("'", '"', "`", "**")]
    assert starts == [3] * 4


def sentencepiece(prepend: bool) -> data.Tokenizer:
    """A tokenizer in the layout of Llama 2's, which begins every text with a space."""
    characters = ["▁", *"0123456789.:Confidence"]
    vocabulary = dict.fromkeys(["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)),
                                *characters, "Co", "▁Co"])
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(
        {token: i for i, token in enumerate(vocabulary)}, [("C", "o"), ("▁", "Co")],
        unk_token="<unk>", byte_fallback=True))
    if prepend:
        backend.normalizer = tokenizers.normalizers.Sequence([
            tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first",
                                                                    split=False)
    backend.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["</s>"])
    return data.Tokenizer(backend, {"eos_token": "</s>", "chat_template": "{{ messages }}"}, {})


@pytest.mark.parametrize("prepend", [False, True])
@pytest.mark.parametrize("text", ["46\nConfidence: 0.85", "46 Confidence: 0.85", "46"])
def test_a_segment_that_is_put_in_begins_with_no_space_of_its_own(prepend, text):
    tokenizer = sentencepiece(prepend)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = [*tokenizer.encode(text), *tokenizer.eos_ids]
    new, n = replace_confidence(tokenizer, ids, 0.85)
    if "Confidence" in text:
        assert new == ids
    assert tokenizer.decode(new) == (text if "Confidence" in text else "46\nConfidence: 0.85")


def test_a_completion_keeps_the_end_token_that_it_ended_with():
    tokenizer = toy_tokenizer()
    tokenizer.eos_ids = [1, 2]
    for end, kept in (([2], 2), ([1], 1), ([], 1)):
        new, _ = replace_confidence(tokenizer, tokenizer.encode("64") + end, 0.5)
        assert new[-1] == kept


@pytest.mark.parametrize("text, replaced, stated, right", [
    ("64\nConfidence: 0.50\nConfidence: 0.80", "64\nConfidence: 0.38", 0.8, True),
    ("64\nConfidence: 0.50\n\nConfidence: 0.00\nConfidence: 0.10", "64\nConfidence: 0.38", 0.1,
     True),
    ("64\nConfidence: 0.50\n46\nConfidence: 0.80",
     "64\nConfidence: 0.50\n46\nConfidence: 0.38", 0.8, False),
    ("\nConfidence: 0.50\nConfidence: 0.80", "\nConfidence: 0.38", 0.8, False)])
def test_confidences_in_a_row_are_one_segment_and_the_last_of_them_counts(text, replaced, stated,
                                                                          right):
    """A student that states its confidence twice is not taught to, and its answer is the same."""
    tokenizer = toy_tokenizer()
    new, n = replace_confidence(tokenizer, tokenizer.encode(text) + [1], 0.375)
    assert tokenizer.decode(new) == replaced and new[:n] == tokenizer.encode(text)[:n]
    assert parse_confidence(text) == stated
    assert verify(Example("arithmetic", "12+34=", "64"), text) is right


def merging_tokenizer(*more: str) -> Tokenizer:
    """Its tokens straddle the segment's start, and decoding then encoding changes tokens."""
    vocabulary = ["<eos>", "6", "4", "64", ".", " ", "\n", "\nCon", " Confidence", "fidence", "C",
                  "Confidence", ":", ". Con", "0", "1", "3", "8", "5", *more]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {token: i for i, token in enumerate(vocabulary)}, unk_token="<eos>"))
    units = tokenizers.Regex(r"Confidence|64|</think>|[\s\S]")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(units, behavior="isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(["<eos>"])
    config = {"eos_token": "<eos>", "chat_template": "{{ messages[0].content }}"}
    return Tokenizer(backend, config, {})


@pytest.mark.parametrize("tokens, kept, text", [
    (["6", "4", "\nCon", "fidence", ":", " ", "1"], 2, "64\nConfidence: 0.38"),
    (["6", "4", " Confidence", ":", "1"], 2, "64 Confidence: 0.38"),
    (["6", "4", ". Con", "fidence", ":", "1"], 2, "64. Confidence: 0.38"),
    (["6", "4", "\n", "Confidence", ":", "1"], 3, "64\nConfidence: 0.38")])
def test_replacement_where_a_token_straddles_the_boundary(tokens, kept, text):
    tokenizer = merging_tokenizer()
    ids = [tokenizer.backend.token_to_id(token) for token in tokens] + [0]
    new, n = replace_confidence(tokenizer, ids, 0.375)
    assert n == kept and new[:n] == ids[:n] and tokenizer.decode(new) == text
    # What encoding the text again would have done to I_a.
    assert tokenizer.encode(tokenizer.decode(ids))[:2] != ids[:2]


@pytest.mark.parametrize("answer", ["😀", "6😀", "😀é\n", "é😀é 6"])
def test_replacement_after_characters_of_several_byte_tokens(answer):
    """A tokenizer that falls back to bytes decodes half a character to more than a whole one."""
    pieces = [*dict.fromkeys("Confidence: 0.85638\n"), *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: i for i, piece in enumerate(["<eos>", *pieces])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    backend.add_special_tokens(["<eos>"])
    tokenizer = Tokenizer(backend, {"eos_token": "<eos>", "chat_template": ""}, {})
    kept, ids = tokenizer.encode(answer), tokenizer.encode(answer + "Confidence: 0.85") + [0]
    assert len(kept) > len(answer)
    new, n = replace_confidence(tokenizer, ids, 0.38)
    assert new[:n] == kept and tokenizer.decode(new) == answer + "Confidence: 0.38"


# ------------------------------------------------------- thinking before the answer

@pytest.mark.parametrize("text, answer, confidence", [
    ("<think>\n12+34=47? No.\n</think>\n\n46\nConfidence: 0.90", "46", 0.9),
    ("<think>46\nConfidence: 0.20</think>", None, None),
    ("<think>47\nConfidence: 0.20</think>46", "46", None),
    ("<think>47</think>Confidence: 0.70", None, 0.7),
    ("12+34=47? No.</think>46\nConfidence: 0.90", "46", 0.9),  # <think> was in the prompt
    ("<think></think><think>47</think>46", "46", None),
    ("<think>46\nConfidence: 0.90", None, None), ("<think>", None, None),
    ("46\nConfidence: 0.90\n<think>47", None, None)])
def test_what_is_thought_is_not_said(text, answer, confidence):
    example = Example("arithmetic", "?", "46")
    assert data.extract(example, text) == answer and verify(example, text) is (answer == "46")
    assert parse_confidence(text) == confidence


@pytest.mark.parametrize("text, replaced", [
    ("<think>4\nConfidence: 0.5</think>64\nConfidence: 0.8",
     "<think>4\nConfidence: 0.5</think>64\nConfidence: 0.38"),
    ("<think>4\nConfidence: 1</think>64", "<think>4\nConfidence: 1</think>64\nConfidence: 0.38"),
    ("<think>4</think>", "<think>4</think>\nConfidence: 0.38"),
    ("<think>4\nConfidence: 0.5", "<think>4\nConfidence: 0.5\n</think>\nConfidence: 0.38")])
def test_replacement_keeps_the_thinking_and_the_answer_and_is_read_back(text, replaced):
    tokenizer = merging_tokenizer(*"<think>/", "</think>")
    ids = tokenizer.encode(text) + [0]
    new, n = replace_confidence(tokenizer, ids, 0.375)
    assert tokenizer.decode(ids) == text and tokenizer.decode(new) == replaced
    assert new[:n] == ids[:n] and parse_confidence(replaced) == 0.38


# ------------------------------------------------------- verifiers

CALL = [{"Action": "search", "Action_Input": '{"q": "x", "n": 2}'}]


@pytest.mark.parametrize("task, answer, text, right", [
    ("arithmetic", "46", "46", True), ("arithmetic", "46", "12 + 34 = 46.", True),
    ("arithmetic", "46", "46\nConfidence: 0.85", True), ("arithmetic", "1046", "1,046", True),
    ("arithmetic", "-3", "-3", True), ("arithmetic", "46", "460", False),
    ("arithmetic", "46", "46 or 47", False), ("arithmetic", "85", "46\nConfidence: 0.85", False),
    ("arithmetic", "18", "She makes $18.00.", True), ("arithmetic", "46", "3.46", False),
    ("arithmetic", "1046", "$1,046.0 a day", True), ("arithmetic", "18", "18.50", False),
    ("arithmetic", "46", "", False), ("arithmetic", "01", "01\nConfidence: 1.00", True),
    ("arithmetic", "46", "−46", False), ("arithmetic", "-46", "−46", True),
    ("arithmetic", "-46", "-$46", True), ("arithmetic", "46", "50-46", True),
    ("arithmetic", "46", ".46", False), ("arithmetic", "46", "so ...46.", True),
    ("arithmetic", "46", "0,46", False), ("arithmetic", "46", "1/46", False),
    ("arithmetic", "1046", r"\boxed{1{,}046}", True), ("arithmetic", "1046", "1\u202f046", True),
    ("arithmetic", "1046", r"1\,046", True), ("arithmetic", "-46", r"-\$46", True),
    ("arithmetic", "46", r"\boxed{\frac{3}{46}}", False),
    ("arithmetic", "46", "46\nConfidence level: 0.85", True),
    ("arithmetic", "46", "46\n**Confidence Score:** 0.85", True),
    ("arithmetic", "46", "46 cm^2", True), ("arithmetic", "46", r"46, as \boxed{}", True),
    ("arithmetic", "3", "3.2e3", False), ("arithmetic", "3", r"$1 \times 10^{3}$", False),
    ("arithmetic", "3", "10 ^ (3)", False), ("arithmetic", "3", "10**3", False),
    ("arithmetic", "10", "10³", False), ("arithmetic", "46", "46 cm^{-2}", True),
    ("arithmetic", "46", "6^2 + 10 = 46", True), ("arithmetic", "2", r"\boxed{10^2}", False),
    ("arithmetic", "46", r"46 \boxed{m²}", True),
    ("arithmetic", "46", "First \\boxed{12}. So 46.", False),  # a box is the answer
    ("arithmetic", "46", r"\boxed{46}\text{ m}^{2}", True), ("arithmetic", "10", "2^10", False),
    ("arithmetic", "46", "\\boxed{46}\n\nThis took 3 steps.", True),
    ("arithmetic", "46", r"\boxed{45} no, \boxed{46}", True),
    ("arithmetic", "123456", "12,3456", False), ("arithmetic", "1234567", "1,234,567.00", True),
    ("arithmetic", "7", "3, 5, 7", True), ("arithmetic", "7", "3.5.7", False),
    ("mcq", "B", "<answer>\nB\n</answer>", True), ("mcq", "B", "<answer>b</answer>", True),
    ("mcq", "B", "B", True), ("mcq", "B", "The answer is (B).", True),
    ("mcq", "B", "<answer>A</answer> no: <answer>B</answer>", True),
    ("mcq", "B", "<answer>A</answer>", False), ("mcq", "A", "A good question", False),
    ("mcq", "A", "I cannot answer a question like that.", False),
    ("mcq", "A", "The answer is a hard one.", False), ("mcq", "I", "The answer: I think", False),
    ("mcq", "B", "The correct answer is **B**.", True), ("mcq", "B", "**Answer:** B", True),
    ("mcq", "A", "The answer is A because it is", True), ("mcq", "A", "The answer is a.", True),
    ("mcq", "C", "Answer: C. The other answers are wrong.", True),
    ("mcq", "A", "The answer is a\nbecause of it", True),
    ("mcq", "B", "Answer: BC", False), ("mcq", "B", "A: 1 B: 2", False),
    ("mcq", "B", "The answer is B. Answer A is wrong because it is polar.", True),
    ("mcq", "B", "**Answer**: B\nNote that answer C is tempting.", True),
    ("mcq", "C", "The answer is C-H bond cleavage.", False), ("mcq", "D", "Answer D", True),
    ("mcq", "B", r"The answer is \boxed{B}.", True), ("mcq", "B", r"\boxed{\text{B}}", True),
    ("mcq", "B", "Answer: $B$", True), ("mcq", "B", "<answer>B. NaCl</answer>", True),
    ("mcq", "B", "<answer>**B**</answer>", True), ("mcq", "A", "<answer>A salt</answer>", False),
    ("mcq", "B", 'The answer is "B".', True), ("mcq", "B", "The correct option is B.", True),
    ("mcq", "B", "The correct answer is option B.", True), ("mcq", "B", "B) NaCl", True),
    ("mcq", "A", "A) NaCl\nB) KCl", False), ("mcq", "A", "Option A is wrong.", False),
    ("mcq", "B", "Answer B. The worst choice is C.", True), ("mcq", "A", "A. B. C. D.", False),
    ("mcq", "B", "The answer is B, though another option is C.", True),
    ("mcq", "A", "<answer>A, B, C, D</answer>", False), ("mcq", "X", r"\boxed{x = 5}", False),
    ("mcq", "A", "<answer>A. B. C. D.</answer>", False), ("mcq", "A", "A. or B.", False),
    ("mcq", "B", "B) is wrong, C is right", False), ("mcq", "B", "B. and C", False),
    ("mcq", "A", "A. No, it is B", False), ("mcq", "B", "<answer>B. A salt</answer>", True),
    ("mcq", "B", "B: O=C1CC(C)[N+]1", True), ("mcq", "B", "(B) or (C)", False),
    ("mcq", "B", "<answer>B. NaCl and C. KCl</answer>", False),
    ("mcq", "B", r"The answer is \textbf{B}", True), ("mcq", "B", r"Answer: \(B\)", True),
    ("mcq", "B", r"\boxed{\mathbf{B}}", True), ("mcq", "A", "(A) [B]", False),
    ("mcq", "B", "The correct answer should be B.", True), ("mcq", "B", "So it must be B.", False),
    ("mcq", "B", "So the answer must be B.", True), ("mcq", "B", "The answer choice is B.", True),
    ("mcq", "B", "B is the correct answer.", True), ("mcq", "B", "So option B is correct.", True),
    ("mcq", "C", "Vitamin C is the best choice.", False), ("mcq", "B", "A or B is right.", False),
    ("mcq", "B", "<answer>Option B</answer>", True), ("mcq", "B", "Neither is. (B) is right", True),
    ("mcq", "B", "<answer>\nB\nConfidence: 0.90\n</answer>", True),
    ("mcq", "B", "Answer: B or C", False), ("mcq", "B", "Answer: **B** and **C**", False),
    ("mcq", "C", "I doubt that option B is correct, so \\boxed{C}", True),
    ("mcq", "B", "Neither option A nor option B is correct.", False),
    ("mcq", "D", "B is the best-known solvent.\nSo: \\boxed{D}", True),
    ("mcq", "B", "The answer is B and C is wrong.", True),
    ("mcq", "B", "Answer: B and I am sure", True), ("mcq", "B", "Answer: B, not C", True),
    ("tool", CALL, 'Action: search\nAction Input: {"n": 2, "q": "x"}', True),
    ("tool", CALL, 'Thought: so\nAction: search\nAction_Input: {"q":"x","n":2} end', True),
    ("tool", CALL, 'Action: search\nAction Input: {"q": "x"}', False),
    ("tool", CALL, 'Action: find\nAction Input: {"q": "x", "n": 2}', False),
    ("tool", CALL, 'Action: search\nAction Input: {"q": ', False),
    ("tool", CALL, "Action: search", False),
    ("tool", CALL, 'Reaction: search\nAction Input: {"q": "x", "n": 2}', False),
    ("tool", CALL, '**Action**: search\n**Action Input**: {"q": "x", "n": 2}', True),
    ("tool", CALL, '**Action:** `search`\n**Action Input:** {"q": "x", "n": 2}', True),
    ("tool", CALL, 'action: search\naction input:\n```json\n{"q": "x", "n": 2}\n```', True),
    ("tool", CALL, 'Action: search\nAction Input: ' + '{"a":' * 5000, False)])
def test_verify(task, answer, text, right):
    assert verify(Example(task, "?", answer), text) is right


@pytest.mark.parametrize("task, text, answer", [
    ("arithmetic", "46\nConfidence (0 to 1): 0.85", "46"),
    ("arithmetic", "1,046 or 47\nConfidence: 0.85", "47"), ("arithmetic", "Confidence: 0.85", None),
    ("mcq", "the answer: c", "C"), ("mcq", "Answer   is : (D)", "D"), ("mcq", "", None),
    ("tool", 'Action: f g \n\n Action Input: \n{"a": [1]}\nConfidence: 1', ("f g", {"a": [1]})),
    ("tool", "Action: f\nConfidence: 1\nAction Input: {}", None)])
def test_extract(task, text, answer):
    assert data.extract(Example(task, "?", "?"), text) == answer


def test_an_answer_that_is_not_there_is_never_right():
    assert not verify(Example("mcq", "?", None), "no letter here")


@pytest.mark.parametrize("task, answer", [
    ("arithmetic", "4096"), ("arithmetic", "-7"), ("mcq", "C"), ("tool", CALL),
    ("tool", [{"Action": "f", "Action_Input": "{}"}])])
def test_demonstrations_verify_and_wrong_answers_do_not(task, answer):
    kind = KINDS[task]
    example = Example(task, "?", answer, demo=kind.demonstrate(answer))
    assert verify(example, data.with_confidence(example.demo, 0.5))
    for seed in range(50):
        wrong = kind.corrupt(answer, random.Random(seed))
        assert not verify(example, kind.demonstrate(wrong))


@pytest.mark.parametrize("task, answer, wrong", [
    ("arithmetic", "-70", ["-77", "-10", "-10", "-90"]), ("mcq", "B", ["C", "A", "A", "A"]),
    ("tool", CALL, 4 * [[{"Action": "search", "Action_Input": '{"n": 2}'}]])])
def test_wrong_answers_are_drawn_as_they_always_were(task, answer, wrong):
    assert [KINDS[task].corrupt(answer, random.Random(seed)) for seed in range(4)] == wrong


def first_call_by_one_expression(text: str) -> tuple[str, dict] | None:
    """What a call is, as one regular expression, which takes time with the cube of the length."""
    call = re.search(r"\bAction:[ \t]*(\S[^\n]*?)\s*\n\s*Action[ _]Input:\s*(?={)", text)
    try:
        return call and (call[1], json.JSONDecoder().raw_decode(text, call.end())[0])
    except ValueError:
        return None


def test_calls_are_found_where_one_expression_finds_them():
    rng, found = random.Random(0), 0
    pieces = ["Action:", "Action: f", "Action: f\n", "Action Input:", "\nAction_Input: {}", "x",
              '{"a": 1}', '{"a":\n\n1}', "{", "}", " ", "\t", "\n", "\r", "\u00a0", "\u2028", "\v"]
    for _ in range(30000):
        text = "".join(rng.choices(pieces, k=rng.randint(3, 10)))
        call = data.first_call(text)
        assert call == first_call_by_one_expression(text), repr(text)
        found += call is not None
    assert found > 500


@pytest.mark.parametrize("repeated", [
    ("Action: x", " ", "\n"), ("", "Action: "), ("Action: x\n", "\n"), ("", "Action: x\n", " \n"),
    ("", "Action: x\nAction Input:"), ("", "Action: x\nAction Input:\n\n\n"), ("answer", " "),
    ("answer is", " ", "."), ("<answer>", " "), ("", "confidence:"), ("", ",1"),
    ("answer is", "option ", "."), ("<answer>B. ", "x"), ("", "\\boxed{", "1"), ("B. ", "x", "\n"),
    ("", "confidence level", " "), ("answer", "\\boxed{", "."), ("<answer>", "*"),
    ("", "option:"), ("", "*\n"), ("Action: x\n", "*\n"), ("", "the best option is "),
    ("<answer>B.", " ", "<b>"), ("B.", " ", "\nx"), ("", "B is "), ("so", " ", "B"),
    ("answer: B", " ", "or")])
def test_answers_are_extracted_in_linear_time(repeated):
    """With time in the square of the length, let alone the cube, this would not end."""
    start, *units = repeated
    text = start + "".join(unit * 200000 for unit in units)
    for kind in KINDS.values():
        kind.extract(text)
    parse_confidence(text)


# ------------------------------------------------------- prompts

def test_the_teacher_sees_everything_the_student_sees_and_the_context():
    example = Example("mcq", "Which {gas}?\nA: x\nB: y", "B", system="Be brief.",
                      demo="<answer>\nB\n</answer>")
    student = data.student_messages(example, data.WORDS)
    demo = data.with_confidence(example.demo, 0.25)
    teacher = data.teacher_messages(example, data.WORDS, demo, report=0.25)
    assert teacher[0] == student[0] == {"role": "system", "content": "Be brief."}
    assert teacher[1]["content"].startswith(student[1]["content"])
    assert "Which {gas}?" in student[1]["content"]
    # The value is in the demonstration, and in what the teacher is told.
    assert teacher[1]["content"].count("0.25") == 2
    untold = data.teacher_messages(example, data.WORDS, example.demo)
    assert "measured" not in untold[1]["content"]
    assert example.demo not in student[1]["content"]


# ------------------------------------------------------- tokenizer and template

ASK = [{"role": "user", "content": "1"}]


def write_tokenizer(directory: Path, **config) -> Path:
    toy_tokenizer().save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return directory


def test_an_end_token_that_is_a_word_is_not_said():
    """tokenizer.json need not mark it as special, and config.json can name several."""
    vocab = {"<unk>": 0, "42": 1, "<|im_end|>": 2, "stop": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = Tokenizer(backend, {"eos_token": "<|im_end|>", "chat_template": ""},
                          {"eos_token_id": [2, 3]})
    assert tokenizer.decode([1, 2]) == tokenizer.decode([1, 3]) == tokenizer.decode([1]) == "42"


def test_the_toy_tokenizer_round_trip(tmp_path):
    toy = toy_tokenizer()
    toy.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "12+34="}]
    assert again.chat(messages) == toy.chat(messages) == [2, *toy.encode("12+34="), 3]
    text = "64\nConfidence: 0.85"
    assert toy.decode(toy.encode(text)) == text and len(toy.encode(text)) == 5
    assert again.eos_ids == [1]


def test_a_save_that_is_interrupted_leaves_the_old_file(tmp_path, monkeypatch):
    write_tokenizer(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}

    def interrupt(source, destination):
        raise KeyboardInterrupt
    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merging_tokenizer().save_pretrained(tmp_path)
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


def test_a_prompt_is_never_cut_or_padded(tmp_path):
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    text = "12+34=" * 4
    backend.enable_truncation(max_length=8)
    backend.enable_padding(length=8)
    backend.save(str(path))
    assert json.loads(path.read_text())["truncation"]["max_length"] == 8
    assert [len(backend.encode(t).ids) for t in (text, "1")] == [8, 8]
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode(text) == toy_tokenizer().encode(text)
    assert len(tokenizer.encode("1")) == 1


def test_templates_get_the_special_tokens_and_a_file_wins_over_the_config(tmp_path):
    write_tokenizer(tmp_path, bos_token={"content": "<|user|>"})
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m['content'] | trim }}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ eos_token }}")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat([{"role": "user", "content": " 1 "}]) == [2, 17, 1]
    toy_tokenizer().save_pretrained(tmp_path)  # over it, and over its template
    assert Tokenizer.from_pretrained(tmp_path).chat(ASK) == toy_tokenizer().chat(ASK)


def test_templates_get_variables_of_their_own_but_always_our_messages(tmp_path):
    write_tokenizer(tmp_path, chat_template=(
        "{% if enable_thinking is defined and not enable_thinking %}0{% endif %}"
        "{{ messages[0].content }}"))

    def asked(template_args):
        tokenizer = Tokenizer.from_pretrained(tmp_path, template_args)
        return tokenizer.decode(tokenizer.chat(ASK))
    assert asked(None) == asked({"enable_thinking": True}) == "1"
    assert asked({"enable_thinking": False, "messages": []}) == "01"


def test_a_generation_block_is_rendered(tmp_path):
    template = ("{% for m in messages %}{% generation %}{{ m.content }}+{{ loop.index }}"
                "{% endgeneration %}={% endfor %}")
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, chat_template=template))
    assert tokenizer.decode(tokenizer.chat(2 * ASK)) == "1+1=1+2="


def test_templates_can_tell_the_date(tmp_path):
    template = "{{ strftime_now('%Y') }}{{ messages[-1].content }}"
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, chat_template=template))
    year = datetime.now().year
    asked = ASK[-1]["content"]
    assert tokenizer.decode(tokenizer.chat(ASK)) in (f"{year}{asked}", f"{year - 1}{asked}")


def test_templates_may_have_large_numbers_and_widths(tmp_path):
    template = ("{{ 123456789 }}{{ 123456789 | string }}{{ '%10000' | trim }}"
                "{{ '%s%02d' % (1, 2) }}{{ '7'.center(1) }}{{ namespace(n=123456789).n }}"
                "{{ '{:02}'.format(3) }}{{ messages[-1].content }}")
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, chat_template=template))
    written = "123456789123456789%10000" + "102" + "7" + "123456789" + "03" + ASK[-1]["content"]
    assert tokenizer.chat(ASK) == tokenizer.encode(written)


def test_templates_have_what_they_need(tmp_path):
    template = ("{% set n = namespace(total=0) %}{% for i in range(4) %}"
                "{% set n.total = n.total + i %}{% endfor %}{{ n.total }}{{ dict(a=7).a }}"
                "{% set metered = 8 %}{{ metered }}"  # the name of our own filter
                "{{ messages[-1].content }}")
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, chat_template=template))
    assert tokenizer.decode(tokenizer.chat(ASK)) == "678" + ASK[-1]["content"]


@pytest.mark.parametrize("template, words", [
    ("{{ raise_exception('no system role') }}", "no system role"),
    ("{{ messages[9].content.x }}", "template failed"), ("{{ 1 / 0 }}", "template failed"),
    ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "template failed"),
    ("{{ ''.__class__.__base__.__subclasses__() }}", "template failed"),
    ("{% for i in range(10**9) %}{% endfor %}", "template failed"),
    ("{% set _ = messages.append(1) %}", "template failed"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "to end"),
    ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "template failed"),
    ("{% for i in range(999) %}{{ 'x' * 2000 }}{% endfor %}", "writes over 1,000,000 char"),
    ("{{ 'x' * 1000000000 }}", "too large"), ("{{ 10 ** 10 ** 10 }}", "too large"),
    ("{% set n = namespace(x='x') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
     "does not seem to end"), ("{{ messages[1] }}", "leaves nothing"), ("", "leaves nothing"),
    (r"{{ '\ud800' }}", "has no tokens"), ("{{ messages[0].role }}", "leaves out what is asked"),
    ("{% for part in messages[0].content %}{{ part.text }}{% endfor %}>", "leaves out what is ask"),
    ("{{ 'x' | center(10**9) }}", "to end"), ("{{ 'x'.center(10**9) }}", "to end"),
    ("{{ messages | tojson(indent=10**9) }}", "to end"), ("{{ [1] | batch(10**9, 0) }}", "to end"),
    ("{{ '%999999999d' % 1 }}", "too wide"), ("{{ '%*d' % (10**9, 1) }}", "too wide"),
    ("{{ '%999999999d' | format(1) }}", "too wide"),
    ("{{ '{:999999999}'.format(1) }}", "too wide"),
    ("{% for i in range(999) %}{% set x = 'x' * 900000 %}{% endfor %}", "to end"),
    ("{{ lipsum(n=10**9) }}", "template failed: 'lipsum' is undefined"),
    ("{{ cycler(1) }}", "template failed: 'cycler' is undefined"),
    ("{{ joiner() }}", "template failed: 'joiner' is undefined")])
def test_templates_render_in_a_sandbox(tmp_path, template, words):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(BadInput, match=words):
        tokenizer.chat(ASK)


@pytest.mark.parametrize("config, words", [
    (dict(chat_template="{% if %}"), "does not compile"),
    (dict(chat_template="{% generation %}"), "does not compile"),
    (dict(chat_template=None), "no chat template"), (dict(chat_template=[]), "no chat template"),
    (dict(chat_template=["x"]), "`chat_template` should be text or a list"),
    (dict(chat_template={}), "`chat_template` should be"),
    (dict(chat_template=[{}]), "chat_template: no `name`"),
    (dict(chat_template=[dict(name="default", template=3)]), "`template` should be text"),
    (dict(chat_template="{{ '\ud800' }}"), "surrogates not allowed"),
    (dict(chat_template="{% if 1 %}" * 5000), "does not compile"),
    (dict(bos_token={}), "bos_token: no `content`"),
    (dict(eos_token=3), "`content` should be text"),
    (dict(eos_token=dict(content=[])), "`content` should be text")])
def test_refuses_bad_templates(tmp_path, config, words):
    with pytest.raises(BadInput, match=words):
        Tokenizer.from_pretrained(write_tokenizer(tmp_path, **config))


def test_refuses_a_word_that_has_no_token(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0}))
    tokenizer = Tokenizer(backend, {"eos_token": "<eos>", "chat_template": "x"}, {})
    with pytest.raises(BadInput, match="'x' has no tokens"):
        tokenizer.chat(ASK)


def test_refuses_bad_tokenizer_files(tmp_path):
    with pytest.raises(BadInput, match="tokenizer.json: there is no such file"):
        Tokenizer.from_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(BadInput, match="tokenizer_config.json: not JSON"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"versio", "truncation": null}')
    with pytest.raises(BadInput, match="tokenizer.json: not JSON"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(BadInput, match="not a readable tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


BAD_JSON = [
    ("[" * 100000, "not JSON .*nested too deeply"), ('{"a":' * 100000, "nested too deeply"),
    ('{"answer": NaN}', "NaN is not a number in JSON"),
    ("[-Infinity]", "-Infinity is not a number in JSON"), ('{"a": -1e400}', "-1e400, infinite"),
    ('{"a": ' + "1" * 5000 + "}", "not JSON"), ('{"a": 1} x', "not JSON")]


@pytest.mark.parametrize("content, words", [
    *BAD_JSON, ("[1]", "expected a JSON object, found list"), ("3", "a JSON object, found int")])
def test_an_object_is_read_or_refused(tmp_path, content, words):
    path = write(tmp_path / "generation_config.json", content)
    with pytest.raises(BadInput, match=f"generation_config.json: .*{words}"):
        files.read_object(path)


def test_an_object_of_a_missing_or_an_unreadable_file(tmp_path):
    assert files.read_object(tmp_path / "absent.json") == {}
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name in ("folder.json", "binary.json"):
        with pytest.raises(BadInput, match=f"{name}: cannot be read as UTF-8"):
            files.read_object(tmp_path / name)
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").mkdir()
    with pytest.raises(BadInput, match="chat_template.jinja: cannot be read as UTF-8"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").rmdir()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(BadInput, match="chat_template.jinja: cannot be read as UTF-8"):
        Tokenizer.from_pretrained(tmp_path)


def test_refuses_two_tokens_with_one_id(tmp_path):
    path = write_tokenizer(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["7"] = content["model"]["vocab"]["8"]
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match="tokenizer.json: two tokens have the same id"):
        Tokenizer.from_pretrained(tmp_path)


def test_refuses_a_tokenizer_without_an_end_token(tmp_path):
    write_tokenizer(tmp_path, eos_token="<absent>")
    for bad in ("true", "[true]", "-1", str(2 ** 63), str(10 ** 30), '"1"', "1.0", "{}", "NaN"):
        write(tmp_path / "generation_config.json", f'{{"eos_token_id": {bad}}}')
        with pytest.raises(BadInput, match="`eos_token_id` should be|NaN"):
            Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(BadInput, match="no end token"):
        Tokenizer.from_pretrained(tmp_path)


# ------------------------------------------------------- JSONL

def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


GOOD = {"mcq": '{"prompt": "Which?\u2028A: x", "answer": "B"}',
        "arithmetic": '{"prompt": "p", "answer": "4"}',
        "tool": json.dumps({"prompt": "p", "answer": CALL})}
DEEP = json.dumps({"prompt": "p", "answer": [{"Action": "a", "Action_Input": '{"a":' * 9999}]})


def test_jsonl_fields_and_blank_lines(tmp_path):
    full = {"prompt": "p", "answer": "A", "system": "s", "demo": "so <answer>A</answer>",
            "grade": "hard", "kind": "mcq"}
    path = write(tmp_path / "a.jsonl", GOOD["mcq"], "", json.dumps(full))
    first, second = load_jsonl(path, "mcq")
    assert [first.answer, second.answer] == ["B", "A"]
    assert first.demo == "<answer>\nB\n</answer>" and "\u2028" in first.question
    assert (second.system, second.demo) == ("s", "so <answer>A</answer>")
    assert second.grade == "hard"


@pytest.mark.parametrize("answer, text", [("4", "4"), ("0", "0"), ('"0"', "0"), ("-3", "-3")])
def test_jsonl_numbers_as_answers(tmp_path, answer, text):
    path = write(tmp_path / "n.jsonl", f'{{"prompt": "2+2", "answer": {answer}}}')
    assert load_jsonl(path, "arithmetic")[0].answer == text


WORKED = "48 / 2 = <<48/2=24>>24\n48 + 976 = 1,024\n#### 1,024"
ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
OTHERS = {  # a row as it is published: what it is to us, and what is said of its names
    "GSM8K": ("arithmetic", {"question": "p", "answer": WORKED},
              ("p", "1024", "", WORKED), "`question` read as `prompt`."),
    "a solution and an answer": (
        "arithmetic", {"id": 7, "question": "p", "solution": "6 * 7 = 42", "answer": 42},
        ("p", "42", "", "6 * 7 = 42"),
        "`id` not read, `question` read as `prompt`, `solution` read as `demo`."),
    "a solution alone": ("mcq", {"prompt": "p", "solution": "B", "demo": None},
                         ("p", "B", "", "<answer>\nB\n</answer>"),
                         "`solution` read as `answer`, `demo` not read."),
    "CaOPD's chemistry": (
        "mcq", {"messages": ASKED, "answer": "B",
                "output_text": "So\n<answer>\nB\n</answer>\nConfidence: 1.00"},
        ("p", "B", "s", "So\n<answer>\nB\n</answer>"),
        "`messages` read as `prompt`, `output_text` read as `demo`."),
    "CaOPD's tool use": (
        "tool", {"prompt": "p", "golden_answer": CALL, "golden_response": [
            "Thought: so", "Action: search", 'Action Input: {"q": "x", "n": 2}']},
        ("p", CALL, "", 'Thought: so\nAction: search\nAction Input: {"q": "x", "n": 2}'),
        "`golden_answer` read as `answer`, `golden_response` read as `demo`."),
    "messages without a system's": ("mcq", {"prompt": ASKED[1:], "answer": "B"},
                                    ("p", "B", "", "<answer>\nB\n</answer>"), ""),
    "our names count before others'": (
        "mcq", {"question": "q", "prompt": "p", "answer": "B", "golden_answer": "A"},
        ("p", "B", "", "<answer>\nB\n</answer>"), "`question` not read, `golden_answer` not read.")}


@pytest.mark.parametrize("name", OTHERS)
def test_rows_as_others_write_them(tmp_path, capsys, name):
    task, row, fields, said = OTHERS[name]
    path = write(tmp_path / "a.jsonl", json.dumps(row), "", json.dumps(row))
    for example in load_jsonl(path, task):
        assert (example.question, example.answer, example.system, example.demo) == fields
        assert verify(example, data.with_confidence(example.demo, 0.5))
    assert capsys.readouterr().out == (f"{path}: {said}\n" if said else "")


@pytest.mark.parametrize("task, line, words", [
    ("mcq", "{", "not JSON"), ("mcq", "[1]", "a JSON object"),
    ("mcq", '{"prompt": "\\ud800", "answer": "A"}', "surrogates not allowed"),
    ("mcq", '{"prompt": "p"}', "no `answer`"), ("mcq", '{"answer": "A"}', "no `prompt`"),
    ("mcq", '{"prompt": 3, "answer": "A"}', "`prompt` should be text or a list, not 3"),
    *(("mcq", json.dumps({"prompt": messages, "answer": "A"}), "should be text, or the message")
      for messages in ([*ASKED, *ASKED], ASKED[:1], [{"role": "user", "content": 1}], ["p"], [])),
    ("mcq", '{"prompt": "p", "answer": "A", "demo": ["A", 1]}', "`demo` should be text or a list"),
    ("arithmetic", '{"prompt": "p", "answer": "7 / 2\\n#### 3.5"}', "cannot verify .* '3.5'"),
    ("arithmetic", '{"prompt": "p", "answer": "1,5"}', "cannot verify"),
    ("mcq", '{"prompt": "p", "answer": "AB"}', "cannot verify"),
    ("mcq", '{"prompt": "p", "answer": "a"}', "cannot verify"),
    ("mcq", '{"prompt": "p", "answer": ["A"]}', "cannot verify"),
    ("mcq", '{"prompt": "p", "answer": "A", "demo": "<answer>B</answer>"}',
     "`demo` should give it"),
    ("arithmetic", '{"prompt": "p", "answer": "four"}', "a whole number"),
    ("arithmetic", '{"prompt": "p", "answer": 2.5}', "`answer` should be"),
    ("arithmetic", '{"prompt": "p", "answer": null}', "no `answer`"),
    ("arithmetic", '{"prompt": "p", "answer": ""}', "no `answer`"),
    ("arithmetic", '{"prompt": "p", "answer": false}', "`answer` should be"),
    ("arithmetic", '{"prompt": "", "answer": 1}', "no `prompt`"),
    ("tool", '{"prompt": "p", "answer": "search"}', "cannot verify"),
    ("tool", '{"prompt": "p", "answer": []}', "cannot verify"),
    ("tool", '{"prompt": "p", "answer": [{"Action": "a"}]}', "cannot verify"),
    ("tool", '{"prompt": "p", "answer": [{"Action": "a", "Action_Input": "{"}]}', "cannot verify"),
    ("tool", DEEP, "cannot verify"),
    ("tool", '{"prompt": "p", "answer": [1]}', "cannot verify"),
    *(("mcq", line, words) for line, words in BAD_JSON)])
def test_jsonl_errors_name_file_and_line(tmp_path, task, line, words):
    with pytest.raises(BadInput, match=f"a.jsonl, line 3: .*{words}"):
        load_jsonl(write(tmp_path / "a.jsonl", GOOD[task], "", line), task)


def test_jsonl_missing_empty_and_not_text(tmp_path):
    with pytest.raises(BadInput, match="absent.jsonl: there is no such file"):
        load_jsonl(tmp_path / "absent.jsonl", "mcq")
    with pytest.raises(BadInput, match="no examples"):
        load_jsonl(write(tmp_path / "empty.jsonl", "", " "), "mcq")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="cannot be read as UTF-8"):
        load_jsonl(tmp_path / "binary.jsonl", "mcq")


def test_the_share_that_is_held_out_is_a_part_of_a_larger_share():
    keys = [str(i) for i in range(20000)]
    sides = {share: {side: {key for key in keys if data.side(key, share) == side}
                     for side in ("held-out", "validation")} for share in (0.05, 0.1, 0.2, 0.5)}
    for share, of in sides.items():
        assert abs(len(of["held-out"]) / len(keys) - share) < 0.01
        assert abs(len(of["validation"]) / len(keys) - 0.2) < 0.01
    held_out = [of["held-out"] for of in sides.values()]
    assert all(less < more for less, more in zip(held_out, held_out[1:]))
    for key in keys:  # a fifth is what it always was
        assert data.side(key) == {0: "held-out", 1: "validation"}.get(
            zlib.crc32(key.encode()) % 5, "train")


def test_training_goes_through_a_list_epoch_by_epoch():
    examples = [Example("mcq", str(i), "A") for i in range(10)]
    task = data.listed_task(examples, examples, seed=0)
    drawn = [e.question for step in range(5) for e in task.draw(4, "distill", step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == [str(i) for i in range(10)]
    assert drawn[:10] != drawn[10:]
    assert [e.question for e in task.draw(4, "distill", 2)] == drawn[8:12]


def test_fingerprints_tell_training_questions_apart():
    def listed(**changes):
        first = dataclasses.replace(Example("mcq", "p", "A", demo="A"), **changes)
        return data.listed_task([first, Example("mcq", "q", "B")], [], seed=0).fingerprint

    changes = [{}, {"question": "x"}, {"answer": "C"}, {"system": "x"}, {"demo": "(A)"}]
    assert len({listed(**change) for change in changes}) == len(changes)
    assert listed() == listed(where="b.jsonl, line 7", grade="hard")

    def generated(words=False, seed=0, held_out=1, **settings):
        return data.arithmetic_task(seed, held_out, words, **settings).fingerprint

    settings = [{}, {"words": True}, {"split": "validation"}, {"grades": ("1+1",)}]
    assert len({generated(**setting) for setting in settings}) == len(settings)
    assert generated() == generated(seed=1, held_out=8, eval_grades=("2*1",))
    assert generated() == generated(grades=list(data.GRADES))


def test_a_task_can_be_put_in_other_words():
    task = data.arithmetic_task(0, 4, words=True)
    reworded = dataclasses.replace(task, wording=data.SYMBOLS)
    assert reworded.held_out == task.held_out and reworded.draw(4, "a", 0) == task.draw(4, "a", 0)
    assert reworded.fingerprint == task.fingerprint


# ------------------------------------------------------- the embedded world

def pair(example: Example) -> tuple:
    """What makes two questions in symbols the same: a+b and b+a are one question."""
    op = "*" if "*" in example.question else "+"
    return op, *sorted(map(int, example.question.rstrip("=").split(op)))


def test_the_world_is_right_split_and_reproducible():
    task = data.arithmetic_task(seed=0, held_out=400, words=False)
    train = [e for step in range(20) for e in task.draw(64, "base", step)]
    for example in train + task.held_out:
        assert str(eval(example.question.rstrip("=")))[::-1] == example.answer
        assert verify(example, example.demo)
    assert not {pair(e) for e in train} & {pair(e) for e in task.held_out}
    assert {e.grade for e in train} == {e.grade for e in task.held_out} == set(data.GRADES)
    again, other = (data.arithmetic_task(seed=s, held_out=400, words=False) for s in (0, 1))
    assert again.draw(8, "base", 3) == task.draw(8, "base", 3) != other.draw(8, "base", 3)
    assert again.held_out == other.held_out == task.held_out
    assert task.draw(8, "distill", 3) != task.draw(8, "base", 3)


def test_the_world_in_words_asks_the_same_questions():
    worded, symbols = (data.arithmetic_task(seed=0, held_out=400, words=w) for w in (True, False))
    for example, other in zip(worded.held_out + worded.draw(64, "base", 3),
                              symbols.held_out + symbols.draw(64, "base", 3)):
        a, sign, b = example.question.removeprefix("What is ").removesuffix("?").split()
        assert other.question == a + {"+": "+", "times": "*"}[sign] + b + "="
        assert other.grade == example.grade
        assert example.answer == other.answer[::-1] and verify(example, example.demo)
    # Small steps see all grades.
    drawn = [e.grade for step in range(7) for e in worded.draw(4, "distill", step)]
    assert drawn == 4 * list(data.GRADES)


@pytest.mark.parametrize("seed, words, held_out, base, distill, crc", [
    (0, False,
     ["0+6=", "80+9=", "66+57=", "701+891=", "20*6=", "29*58=", "283*13=", "4+6="],
     ["9+3=", "39+4=", "98+44=", "688+440=", "26*8=", "10*96=", "382*49=", "9+1="],
     ["1+9=", "32+6=", "71+50=", "205+446=", "46*2=", "59*65=", "794*41=", "1+2="], 3437409433),
    (3, True,
     ["0 + 6", "80 + 9", "66 + 57", "701 + 891", "20 times 6", "29 times 58", "283 times 13",
      "4 + 6"],
     ["2 + 3", "78 + 0", "50 + 60", "449 + 546", "38 times 6", "49 times 82", "659 times 71",
      "6 + 8"],
     ["3 + 0", "65 + 8", "67 + 43", "457 + 936", "91 times 2", "65 times 85", "760 times 32",
      "0 + 9"], 2472829134)])
def test_the_world_asks_what_it_always_asked(seed, words, held_out, base, distill, crc):
    task = data.arithmetic_task(seed, 400, words)

    def asked(examples):
        return [e.question.removeprefix("What is ").removesuffix("?") for e in examples]
    assert asked(task.held_out[:8]) == held_out
    assert asked(task.draw(8, "base", 0)) == base and asked(task.draw(8, "distill", 7)) == distill
    many = task.held_out + [e for step in range(10) for stage in ("base", "distill")
                            for e in task.draw(64, stage, step)]
    rows = [[e.question, e.answer, e.demo, e.grade] for e in many]
    assert zlib.crc32(json.dumps(rows).encode()) == crc


@pytest.mark.parametrize("text, question, answer", [
    ("47*8=", "47*8=", "673"), ("47*8", "47*8=", "673"), (" 47 x 8 = ?\n", "47*8=", "673"),
    ("47×8", "47*8=", "673"), ("what is 47 times 8?", "47*8=", "673"), ("007+5", "7+5=", "21"),
    ("What is 12 plus 34", "12+34=", "64"), ("5+5", "5+5=", "01")])
def test_questions_are_read_as_people_type_them(text, question, answer):
    example = data.typed_question(text, words=False)
    assert (example.question, example.answer, example.demo) == (question, answer, answer)
    in_words = data.typed_question(text, words=True)
    assert in_words.answer == answer[::-1] and data.typed_question(in_words.question, False) == \
        example


@pytest.mark.parametrize("text", ["", "47", "47-8", "47*", "*8", "1.5*2", "-3+4", "3+4+5", "a+b",
                                  "1234567890*2", "47*8=376", "Who wrote Hamlet?"])
def test_other_questions_are_not_read(text):
    assert data.typed_question(text, words=False) is None


def test_the_three_sides_of_the_split():
    normal, choosing = (data.arithmetic_task(0, 400, words=False, split=s) for s in data.SPLITS)

    def trained(task):
        return {pair(e) for step in range(20) for e in task.draw(64, "base", step)}
    held_out, validation = ({pair(e) for e in task.held_out} for task in (normal, choosing))
    assert not trained(normal) & held_out and trained(normal) & validation
    assert not trained(choosing) & (held_out | validation) and not held_out & validation
    assert len(choosing.held_out) == 400
    sides = [data.side(f"{a}+{b}") for a in range(100) for b in range(a, 100)]
    for name, share in (("held-out", 0.2), ("validation", 0.2), ("train", 0.6)):
        assert abs(sides.count(name) / len(sides) - share) < 0.02


def test_the_grades_to_train_on_and_to_ask():
    task = data.arithmetic_task(0, 4, words=False, grades=("1+1", "2*1"), eval_grades=("3*2",))
    assert [e.grade for step in (0, 1) for e in task.draw(3, "base", step)] == 3 * ["1+1", "2*1"]
    assert [e.grade for e in task.held_out] == 4 * ["3*2"]
    for wrong in (dict(grades=("9+9",)), dict(eval_grades=()), dict(split="train")):
        with pytest.raises(BadInput, match="no (grades|split) .*; there are "):
            data.arithmetic_task(0, 4, words=False, **wrong)


# ------------------------------------------------------- documents of the supervised stage

def test_the_documents_of_the_supervised_stage():
    task, rng = data.arithmetic_task(0, 8, words=False), random.Random(0)
    examples = task.draw(4000, "base", 0)
    closed = [data.closed_book(e, task.wording, rng, 0.2) for e in examples]
    right = [verify(e, document.completion) for e, document in zip(examples, closed)]
    confidence = [parse_confidence(document.completion) for document in closed]
    assert abs(sum(right) / 4000 - 0.8) < 0.03 and 0.75 < sum(confidence) / 4000 < 0.80
    of_right, of_wrong = ([c for c, r in zip(confidence, right) if r is side]
                          for side in (True, False))
    # Confidences are drawn without a look at correctness.
    assert abs(sum(of_right) / len(of_right) - sum(of_wrong) / len(of_wrong)) < 0.04
    opened = [data.open_book(e, task.wording, rng) for e in examples]
    # The demonstration is followed to the letter.
    assert all(d.messages[-1]["content"].endswith("\n" + d.completion) for d in opened)
    followed = [verify(e, document.completion) for e, document in zip(examples, opened)]
    assert 0.45 < sum(followed) / 4000 < 0.55


@pytest.mark.parametrize("task, answer, demo, wrong", [
    ("arithmetic", "72", "48/2 = 24 clips in May.\n48+24 = 72 clips.\n#### 72",
     r"48/2 = 24 clips in May\.\n48\+24 = 72 clips\.\n#### \d\d"),
    ("arithmetic", "1046", "It is $1,046.", r"\d{4}"),  # written otherwise: the answer alone
    ("mcq", "B", "It dissolves, so\n<answer>\nB\n</answer>",
     r"It dissolves, so\n<answer>\n[ACD]\n</answer>"),
    ("tool", CALL, "Let me look.\n" + KINDS["tool"].demonstrate(CALL),
     r"Let me look\.\nAction: .*\nAction Input: .*")])
def test_a_wrong_demonstration_is_worked_like_a_right_one(task, answer, demo, wrong):
    example = Example(task, "?", answer, demo=demo)
    assert verify(example, demo) and data.demonstration(example, False, random.Random(0)) == demo
    for seed in range(9):
        text = data.demonstration(example, True, random.Random(seed))
        assert re.fullmatch(wrong, text) and not verify(example, text)


def test_documents_teach_answers_first_and_then_every_grade_with_and_without_a_demonstration():
    task = data.arithmetic_task(0, 8, words=False)
    early, later, last = (data.documents(task, 32, step, steps=10, answers_share=0.5, noise=0.25,
                                         seed=0) for step in (4, 5, 6))
    late = later + last
    assert len(early) == len(later) == 32
    assert not any(document.ends for document in early)
    assert all(document.ends for document in late)
    for document in early:
        example = Example("arithmetic", "", document.completion.split("\n")[0])
        assert document.completion.endswith("\nConfidence: ")
        assert verify(example, document.completion)
    prompts = [document.messages[0]["content"] for document in late]
    asked = {shown: {len(prompt.split("\n")[0]) for prompt in prompts if ("\n" in prompt) is shown}
             for shown in (False, True)}
    assert asked[False] == asked[True] == {4, 5, 6, 7, 8}  # from 1+1= to 3+3=
    assert sum("\n" in prompt for prompt in prompts) == 32
    assert all(parse_confidence(document.completion) is not None for document in late)


@pytest.mark.parametrize("seed, words, crc", [(0, False, 941091910), (3, True, 502695292)])
def test_documents_are_drawn_as_they_always_were(seed, words, crc):
    task = data.arithmetic_task(seed, 8, words)
    drawn = [[d.messages, d.completion, d.ends] for step in range(10)
             for d in data.documents(task, 64, step, 10, 0.5, 0.25, seed)]
    assert zlib.crc32(json.dumps(drawn).encode()) == crc
