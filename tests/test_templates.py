"""Chat templates of the families render as the reference library's apply_chat_template does.

    pip install transformers && python -m pytest -m slow tests/test_templates.py

CAOPD_TEMPLATES names a folder with more of them, NAME.jinja, to compare in the same way.
"""

import json
import os
from datetime import datetime
from pathlib import Path

import jinja2
import pytest

import chat_template
from data import Tokenizer
from files import BadInput
from make_templates import CHATS, TEMPLATES, TODAY, cases, write_tokenizer

EXPECTED = {}  # of a template: chat, arguments, text
for template, *row in json.loads((TEMPLATES / "expected.json").read_text(encoding="utf-8")):
    EXPECTED.setdefault(template, []).append(row)
MORE = Path(os.environ.get("CAOPD_TEMPLATES", TEMPLATES))


class Clock(datetime):
    @classmethod
    def now(cls):
        return TODAY


def test_no_template_is_left_out():
    assert set(EXPECTED) == {path.stem for path in TEMPLATES.glob("*.jinja")}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_template_renders_as_in_the_reference_library(tmp_path, monkeypatch, name):
    monkeypatch.setattr(chat_template, "datetime", Clock)
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    write_tokenizer(tmp_path, template)
    assert [(chat, arguments) for chat, arguments, _ in EXPECTED[name]] == cases(template)
    for chat, arguments, text in EXPECTED[name]:
        tokenizer = Tokenizer.from_pretrained(tmp_path, arguments)
        ids = tokenizer.chat(CHATS[chat])
        assert tokenizer.backend.decode(ids, skip_special_tokens=False) == text, (chat, arguments)
        assert ids == tokenizer.encode(text)


def test_thinking_is_turned_off_where_the_template_can():
    for name, off in (("qwen3", "<think>\n\n</think>\n\n"), ("smollm3", "<think>\n\n</think>\n")):
        texts = {json.dumps(arguments): text for chat, arguments, text in EXPECTED[name]
                 if chat == "question"}
        assert texts['{"enable_thinking": false}'].endswith(f"assistant\n{off}")
        assert texts["{}"] == texts['{"enable_thinking": true}']
        assert texts["{}"].endswith("assistant\n")


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted({*TEMPLATES.glob("*.jinja"), *MORE.glob("*.jinja")}),
                         ids=lambda path: path.stem)
def test_a_template_gives_the_tokens_of_the_reference_library(tmp_path, path):
    transformers = pytest.importorskip("transformers")
    template = path.read_text(encoding="utf-8")
    write_tokenizer(tmp_path, template)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for chat, arguments in cases(template):
        tokenizer, messages = Tokenizer.from_pretrained(tmp_path, arguments), CHATS[chat]
        try:
            expected = reference.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, **arguments)
        except jinja2.TemplateError:  # some refuse a system message in the middle
            with pytest.raises(BadInput, match="the chat template failed"):
                tokenizer.chat(messages)
        else:
            assert tokenizer.chat(messages) == expected
