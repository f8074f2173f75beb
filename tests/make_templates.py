"""Makes tests/golden/templates/expected.json: what the reference library renders with them.

    pip install transformers && python tests/make_templates.py

Kept beside the fixtures so that they can be made again; the fast tests need only the six packages.
"""

import json
import tempfile
from datetime import datetime
from pathlib import Path
from unittest import mock

import tokenizers

TEMPLATES = Path(__file__).parent / "golden" / "templates"
TODAY = datetime(2026, 3, 4)

USER = {"role": "user", "content": "  What is 12 + 34?\n"}
SYSTEM = {"role": "system", "content": " Be brief.\n"}
THOUGHT = {"role": "assistant", "content": "<think>\n12 + 34 is 46.\n</think>\n\n46"}
PLAIN = {"role": "assistant", "content": "46 “é” 😀"}
CHATS = {
    "question": [USER], "system": [SYSTEM, USER],
    "turns": [USER, PLAIN, USER], "thought": [SYSTEM, USER, THOUGHT, USER],
    "answered": [USER, THOUGHT], "late system": [USER, SYSTEM, USER],
    "mode": [{"role": "system", "content": "Be brief. /no_think"}, USER],
    "override": [{"role": "system", "content": "Be brief. /system_override"}, USER]}
TOOL = {"type": "function", "function": {"name": "añadir", "description": "<adds>"}}
ARGUMENTS = [{}, {"enable_thinking": True}, {"enable_thinking": False}, {"tools": [TOOL]},
             {"xml_tools": [TOOL]}, {"date_string": "5 May 2025"}]


def write_tokenizer(directory: Path, template: str) -> None:
    """A model directory's tokenizer: each byte is a token, and so is each mark of the families."""
    special = ["<|end|>", "<|begin_of_text|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>",
               "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(
        {token: i for i, token in enumerate([*special, *letters])}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.add_tokens(["<think>", "</think>"])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>",
         "eos_token": "<|end|>", "clean_up_tokenization_spaces": False}))


def cases(template: str) -> list[tuple[str, dict]]:
    """The chats and the arguments to render a template with: those that it knows."""
    return [(chat, arguments) for chat in CHATS for arguments in ARGUMENTS
            if all(name in template for name in arguments)]


def expected(path: Path) -> list:
    from transformers import AutoTokenizer
    template = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(Path(directory), template)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    return [[chat, arguments, tokenizer.apply_chat_template(
        CHATS[chat], add_generation_prompt=True, tokenize=False, **arguments)]
        for chat, arguments in cases(template)]


if __name__ == "__main__":
    with mock.patch("transformers.utils.chat_template_utils.datetime") as clock:
        clock.now.return_value = TODAY
        rows = [[path.stem, *row] for path in sorted(TEMPLATES.glob("*.jinja"))
                for row in expected(path)]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (TEMPLATES / "expected.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
