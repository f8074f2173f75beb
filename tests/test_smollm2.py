"""Real weights: SmolLM2-135M-Instruct, its logits and greedy completions, against the reference
library.

    pip install transformers && CAOPD_SMOLLM2=DIR python -m pytest -m slow tests/test_smollm2.py
"""

import os

import pytest
import torch

import pipeline
from data import Tokenizer
from model import Transformer, generate
from test_share import assert_the_reference_library_answers_the_same

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif("CAOPD_SMOLLM2" not in os.environ,
                                 reason="CAOPD_SMOLLM2 names no model directory")]

PROMPTS = {
    "facts": ["What is the capital of France?", "Who wrote Hamlet?", "Name three noble gases.",
              "When did the Second World War end?"],
    "arithmetic": ["What is 12 + 34?", "What is 7 times 8?",
                   "Is 91 a prime number?", "Half of 250 is"],
    "code": ["Write a Python function that reverses a string.", "def fibonacci(n):",
             "What does `git rebase` do?", "SELECT name FROM"],
    "prose": ["Write two sentences about the sea.", "Once upon a time, in a village by the river,",
              "Tell me a joke.", "A haiku about autumn:"],
    "other scripts and lengths": ["Übersetze: Guten Morgen, schöne Welt! 😀",
                                  "日本の首都はどこですか。", "x",
                                  "List the numbers: " + ", ".join(map(str, range(150)))],
}


def test_greedy_completions_and_logits_are_the_reference_librarys():
    transformers = pytest.importorskip("transformers")
    directory = os.environ["CAOPD_SMOLLM2"]
    model = Transformer.from_pretrained(directory, dtype=torch.float32)
    tokenizer = Tokenizer.from_pretrained(directory)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    template = transformers.AutoTokenizer.from_pretrained(directory)
    chats = [[{"role": "user", "content": text}] for kind in PROMPTS.values() for text in kind]
    prompts = [tokenizer.chat(chat) for chat in chats]
    assert prompts == [template.apply_chat_template(chat, add_generation_prompt=True, tokenize=True,
                                                    return_dict=False) for chat in chats]
    # Prompts of different lengths, all in one batch.
    ours = generate(model, prompts, 40, temperature=0, eos_ids=tokenizer.eos_ids)
    worst = 0.0
    for prompt, ids in zip(prompts, ours):
        theirs = reference.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
        assert theirs[0, len(prompt):].tolist() == ids
        with torch.no_grad():
            sequence = torch.tensor([prompt + ids])
            worst = max(worst, float((model(sequence) - reference(sequence).logits).abs().max()))
    print(f"20 prompts of 5 kinds: greedy completions identical, largest logit difference "
          f"{worst:.1e}")
    assert worst < 1e-3


def test_what_we_save_answers_in_the_reference_library_with_the_same_tokens(tmp_path):
    directory = os.environ["CAOPD_SMOLLM2"]
    model = Transformer.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():  # as after training: other weights than it came with
        for weight in model.parameters():
            weight.mul_(1 + 1e-3 * torch.randn(weight.shape, generator=torch.manual_seed(0)))
    pipeline.save(model, Tokenizer.from_pretrained(directory), tmp_path / "saved")
    chats = [[{"role": "user", "content": text}] for text in PROMPTS["facts"]]
    assert_the_reference_library_answers_the_same(model, tmp_path / "saved", chats, 24)
