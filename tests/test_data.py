"""The confidence segment, the verifiers, the prompts, the tokenizer, JSONL files and the embedded world."""

import json
import random
from pathlib import Path

import pytest

import data
from data import DataError, Example, Tokenizer, load_jsonl, parse_confidence, replace_confidence, split_completion, toy_tokenizer, verify


# ----------------------------------------------------------------------------- the confidence segment

@pytest.mark.parametrize("text, value", [
    ("64\nConfidence: 0.85", 0.85), ("Confidence: 1", 1.0), ("confidence: .5", 0.5), ("CONFIDENCE:0.00", 0.0), ("Confidence: 85%", 0.85),
    ("Confidence: 0.9.", 0.9), ("Confidence: 0.2\n64\nConfidence: 0.70", 0.70), ("Confidence: 100%", 1.0), ("(Confidence: 0.3)", 0.3),
    ("64", None), ("", None), ("Confidence:", None), ("Confidence: high", None), ("Confidence: 1.01", None), ("Confidence: -0.5", None),
    ("Confidence: 0.8.5", None), ("Confidence: nan", None), ("Confidence: 1e-1", None), ("Confidence: 150%", None),
    ("Confidence: 0.9\nConfidence: ?", None), ("Confidence:\n0.5", None)])
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
        assert tokenizer.decode(new) == text[:len(text) - len(segment)] + ("" if segment else "\n") + "Confidence: 0.38"
        assert split_completion(tokenizer, new)[0] in (n, n + (not segment))  # a newline that was added is answer from now on


def merging_tokenizer() -> Tokenizer:
    """A tokenizer in which tokens straddle the segment's start and decoding then encoding changes tokens."""
    import tokenizers
    vocabulary = ["<eos>", "6", "4", "64", ".", " ", "\n", "\nCon", " Confidence", "fidence", "C", "Confidence", ":", ". Con", "0", "1", "3", "8", "5"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="<eos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"Confidence|64|[\s\S]"), behavior="isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, {"eos_token": "<eos>", "chat_template": "{{ messages[0].content }}"}, {})


@pytest.mark.parametrize("tokens, kept, text", [
    (["6", "4", "\nCon", "fidence", ":", " ", "1"], 2, "64\nConfidence: 0.38"),
    (["6", "4", " Confidence", ":", "1"], 2, "64 Confidence: 0.38"),
    (["6", "4", ". Con", "fidence", ":", "1"], 2, "64. Confidence: 0.38"),
    (["6", "4", "\n", "Confidence", ":", "1"], 3, "64\nConfidence: 0.38")])
def test_replacement_where_a_token_straddles_the_boundary(tokens, kept, text):
    tokenizer = merging_tokenizer()
    ids = [tokenizer.backend.token_to_id(t) for t in tokens] + [0]
    new, n = replace_confidence(tokenizer, ids, 0.375)
    assert n == kept and new[:n] == ids[:n] and tokenizer.decode(new) == text
    assert tokenizer.encode(tokenizer.decode(ids))[:2] != ids[:2]  # what encoding the text again would have done to I_a


# ----------------------------------------------------------------------------- verifiers

CALL = [{"Action": "search", "Action_Input": '{"q": "x", "n": 2}'}]


@pytest.mark.parametrize("task, answer, text, right", [
    ("arithmetic", "46", "46", True), ("arithmetic", "46", "12 + 34 = 46.", True), ("arithmetic", "46", "46\nConfidence: 0.85", True),
    ("arithmetic", "1046", "1,046", True), ("arithmetic", "-3", "-3", True), ("arithmetic", "46", "460", False), ("arithmetic", "46", "46 or 47", False),
    ("arithmetic", "85", "46\nConfidence: 0.85", False), ("arithmetic", "46", "", False), ("arithmetic", "01", "01\nConfidence: 1.00", True),
    ("mcq", "B", "<answer>\nB\n</answer>", True), ("mcq", "B", "<answer>b</answer>", True), ("mcq", "B", "B", True), ("mcq", "B", "The answer is (B).", True),
    ("mcq", "B", "<answer>A</answer> no: <answer>B</answer>", True), ("mcq", "B", "<answer>A</answer>", False), ("mcq", "A", "A good question", False),
    ("mcq", "B", "Answer: BC", False), ("mcq", "B", "A: 1 B: 2", False),
    ("tool", CALL, 'Action: search\nAction Input: {"n": 2, "q": "x"}', True), ("tool", CALL, 'Thought: so\nAction: search\nAction_Input: {"q":"x","n":2} end', True),
    ("tool", CALL, 'Action: search\nAction Input: {"q": "x"}', False), ("tool", CALL, 'Action: find\nAction Input: {"q": "x", "n": 2}', False),
    ("tool", CALL, 'Action: search\nAction Input: {"q": ', False), ("tool", CALL, "Action: search", False), ("tool", CALL, 'Action: search\nAction Input: ' + '{"a":' * 5000, False)])
def test_verify(task, answer, text, right):
    assert verify(Example(task, "?", answer), text) is right


@pytest.mark.parametrize("task, answer", [("arithmetic", "4096"), ("arithmetic", "-7"), ("mcq", "C"), ("tool", CALL), ("tool", [{"Action": "f", "Action_Input": "{}"}])])
def test_demonstrations_verify_and_wrong_answers_do_not(task, answer):
    example = Example(task, "?", answer, demo=data.demonstration(task, answer))
    assert verify(example, data.stated(example.demo, 0.5))
    for seed in range(50):
        assert not verify(example, data.demonstration(task, data.wrong_answer(example, random.Random(seed))))


# ----------------------------------------------------------------------------- prompts

def test_the_teacher_sees_everything_the_student_sees_and_the_context():
    example = Example("mcq", "Which {gas}?\nA: x\nB: y", "B", system="Be brief.", demo="<answer>\nB\n</answer>")
    student = data.student_messages(example, data.WORDS)
    teacher = data.teacher_messages(example, data.WORDS, data.stated(example.demo, 0.25), report=0.25)
    assert teacher[0] == student[0] == {"role": "system", "content": "Be brief."}
    assert teacher[1]["content"].startswith(student[1]["content"]) and "Which {gas}?" in student[1]["content"]
    assert teacher[1]["content"].count("0.25") == 2  # in the demonstration, and in what the teacher is told
    assert "measured" not in data.teacher_messages(example, data.WORDS, example.demo)[1]["content"]
    assert example.demo not in student[1]["content"]


# ----------------------------------------------------------------------------- tokenizer and template

def write_tokenizer(directory: Path, **config) -> Path:
    toy_tokenizer().save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return directory


def test_the_toy_tokenizer_round_trip(tmp_path):
    toy = toy_tokenizer()
    toy.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "12+34="}]
    assert again.chat(messages) == toy.chat(messages) == [2, *toy.encode("12+34="), 3]
    text = "64\nConfidence: 0.85"
    assert toy.decode(toy.encode(text)) == text and len(toy.encode(text)) == 6
    assert again.eos_ids == [1]


def test_templates_get_the_special_tokens_and_a_file_wins_over_the_config(tmp_path):
    write_tokenizer(tmp_path, bos_token={"content": "<|user|>"})
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m['content'] | trim }}{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ eos_token }}")
    assert Tokenizer.from_pretrained(tmp_path).chat([{"role": "user", "content": " 1 "}]) == [2, 8, 1]


@pytest.mark.parametrize("template, words", [
    ("{{ raise_exception('no system role') }}", "no system role"), ("{{ messages[9].content.x }}", "template failed"), ("{{ 1 / 0 }}", "template failed"),
    ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "template failed"), ("{{ ''.__class__.__base__.__subclasses__() }}", "template failed"),
    ("{% for i in range(10**9) %}{% endfor %}", "template failed"), ("{% set _ = messages.append(1) %}", "template failed")])
def test_templates_render_in_a_sandbox(tmp_path, template, words):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(DataError, match=words):
        tokenizer.chat([{"role": "user", "content": "1"}])


@pytest.mark.parametrize("config, words", [(dict(chat_template="{% if %}"), "does not compile"), (dict(chat_template=None), "no chat template"), (dict(chat_template=[]), "no chat template")])
def test_refuses_bad_templates(tmp_path, config, words):
    with pytest.raises(DataError, match=words):
        Tokenizer.from_pretrained(write_tokenizer(tmp_path, **config))


def test_refuses_bad_tokenizer_files(tmp_path):
    with pytest.raises(DataError, match="no tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer_config.json: not readable as JSON"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(DataError, match="not a readable tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


def test_refuses_a_tokenizer_without_an_end_token(tmp_path):
    write_tokenizer(tmp_path, eos_token="<absent>")
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(DataError, match="no end token"):
        Tokenizer.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------- JSONL

def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


GOOD = '{"prompt": "Which?\u2028A: x", "answer": "B"}'


def test_jsonl_fields_and_blank_lines(tmp_path):
    examples = load_jsonl(write(tmp_path / "a.jsonl", GOOD, "", '{"prompt": "p", "answer": "A", "system": "s", "demo": "so <answer>A</answer>", "grade": "hard", "kind": "mcq"}'), "mcq")
    assert [e.answer for e in examples] == ["B", "A"] and examples[0].demo == "<answer>\nB\n</answer>" and "\u2028" in examples[0].question
    assert (examples[1].system, examples[1].demo, examples[1].grade) == ("s", "so <answer>A</answer>", "hard")
    assert load_jsonl(write(tmp_path / "n.jsonl", '{"prompt": "2+2", "answer": 4}'), "arithmetic")[0].answer == "4"


@pytest.mark.parametrize("task, line, words", [
    ("mcq", "{", "not JSON"), ("mcq", "[1]", "no `prompt`"), ("mcq", '{"prompt": "p"}', "no `answer`"), ("mcq", '{"answer": "A"}', "no `prompt`"),
    ("mcq", '{"prompt": 3, "answer": "A"}', "should be text"), ("mcq", '{"prompt": "p", "answer": "AB"}', "cannot verify"), ("mcq", '{"prompt": "p", "answer": "a"}', "cannot verify"),
    ("mcq", '{"prompt": "p", "answer": ["A"]}', "cannot verify"), ("mcq", '{"prompt": "p", "answer": "A", "demo": "<answer>B</answer>"}', "`demo` should give it"),
    ("arithmetic", '{"prompt": "p", "answer": "four"}', "a whole number"), ("arithmetic", '{"prompt": "p", "answer": 2.5}', "cannot verify"),
    ("tool", '{"prompt": "p", "answer": "search"}', "cannot verify"), ("tool", '{"prompt": "p", "answer": [{"Action": "a"}]}', "cannot verify"),
    ("tool", '{"prompt": "p", "answer": [{"Action": "a", "Action_Input": "{"}]}', "cannot verify"), ("tool", '{"prompt": "p", "answer": [1]}', "cannot verify")])
def test_jsonl_errors_name_file_and_line(tmp_path, task, line, words):
    good = {"mcq": GOOD, "arithmetic": '{"prompt": "p", "answer": "4"}', "tool": json.dumps({"prompt": "p", "answer": CALL})}[task]
    with pytest.raises(DataError, match=f"a.jsonl, line 3: .*{words}"):
        load_jsonl(write(tmp_path / "a.jsonl", good, "", line), task)


def test_jsonl_missing_empty_and_not_text(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load_jsonl(tmp_path / "absent.jsonl", "mcq")
    with pytest.raises(DataError, match="no examples"):
        load_jsonl(write(tmp_path / "empty.jsonl", "", " "), "mcq")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        load_jsonl(tmp_path / "binary.jsonl", "mcq")


def test_training_goes_through_a_list_epoch_by_epoch():
    examples = [Example("mcq", str(i), "A") for i in range(10)]
    task = data.listed_task(examples, examples, seed=0)
    drawn = [e.question for step in range(5) for e in task.draw(4, "distill", step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == [str(i) for i in range(10)] and drawn[:10] != drawn[10:]
    assert [e.question for e in task.draw(4, "distill", 2)] == drawn[8:12]


# ----------------------------------------------------------------------------- the embedded world

def test_the_world_is_right_split_and_reproducible():
    task = data.arithmetic_task(seed=0, held_out=400, words=False)
    train = [e for step in range(20) for e in task.draw(64, "base", step)]
    for example in train + task.held_out:
        assert str(eval(example.question.rstrip("=")))[::-1] == example.answer and verify(example, example.demo)

    def pair(example):  # a+b and b+a are one question
        return tuple(sorted(example.question.rstrip("=").replace("*", "+").split("+"))) + ("*" in example.question,)
    assert not {pair(e) for e in train} & {pair(e) for e in task.held_out}
    assert {e.grade for e in train} == {e.grade for e in task.held_out} == set(data.GRADES)
    again, other = (data.arithmetic_task(seed=s, held_out=400, words=False) for s in (0, 1))
    assert again.draw(8, "base", 3) == task.draw(8, "base", 3) != other.draw(8, "base", 3)
    assert again.held_out == other.held_out == task.held_out and task.draw(8, "distill", 3) != task.draw(8, "base", 3)


def test_the_world_in_words_asks_the_same_questions():
    worded, symbols = (data.arithmetic_task(seed=0, held_out=400, words=words) for words in (True, False))
    for example, other in zip(worded.held_out + worded.draw(64, "base", 3), symbols.held_out + symbols.draw(64, "base", 3)):
        a, sign, b = example.question.removeprefix("What is ").removesuffix("?").split()
        assert other.question == a + {"+": "+", "times": "*"}[sign] + b + "=" and other.grade == example.grade
        assert example.answer == other.answer[::-1] and verify(example, example.demo)
    assert [e.grade for step in range(4) for e in worded.draw(4, "distill", step)] == 2 * list(data.GRADES)  # small steps see all grades


def test_the_documents_of_the_supervised_stage():
    task, rng = data.arithmetic_task(0, 8, words=False), random.Random(0)
    examples = task.draw(4000, "base", 0)
    closed = [data.closed_book(e, task.wording, rng, 0.2) for e in examples]
    right = [verify(e, text) for e, (_, text) in zip(examples, closed)]
    confidence = [parse_confidence(text) for _, text in closed]
    assert abs(sum(right) / 4000 - 0.8) < 0.03 and 0.75 < sum(confidence) / 4000 < 0.80
    of_right, of_wrong = ([c for c, r in zip(confidence, right) if r is side] for side in (True, False))
    assert abs(sum(of_right) / len(of_right) - sum(of_wrong) / len(of_wrong)) < 0.04  # drawn without a look at correctness
    opened = [data.open_book(e, task.wording, rng) for e in examples]
    assert all(messages[-1]["content"].endswith("\n" + text) for messages, text in opened)  # the demonstration is followed to the letter
    assert 0.45 < sum(verify(e, text) for e, (_, text) in zip(examples, opened)) / 4000 < 0.55
