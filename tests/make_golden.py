"""Makes tests/golden: tiny random models of every family, with the reference library's logits and
greedy completions.

    pip install transformers && python tests/make_golden.py

It is kept beside the fixtures so that they can be made again. The tests themselves need only the
packages of requirements.txt.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (LlamaConfig, LlamaForCausalLM, Olmo3Config, Olmo3ForCausalLM, Qwen2Config,
                          Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

SHAPE = dict(vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
             bos_token_id=None, eos_token_id=0, pad_token_id=None)
PLAIN = dict(rope_type="default", rope_theta=500.0)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=500.0, factor=8.0, beta_fast=8, beta_slow=1,
            original_max_position_embeddings=32)
OLMO3 = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"],
             sliding_window=16,  # shorter than the input
             rope_parameters=dict(full_attention=YARN, sliding_attention=PLAIN))
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(
        **SHAPE, tie_word_embeddings=True, rope_parameters=PLAIN | dict(rope_theta=10000.0))),
    "llama3": (LlamaForCausalLM, LlamaConfig(
        **SHAPE, tie_word_embeddings=False, rope_parameters=LLAMA3)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(
        **SHAPE, tie_word_embeddings=False, rope_parameters=PLAIN | dict(rope_theta=1e6))),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(
        **SHAPE, head_dim=12, tie_word_embeddings=True,
        rope_parameters=PLAIN | dict(rope_theta=1e6))),
    "olmo3": (Olmo3ForCausalLM, Olmo3Config(**SHAPE, tie_word_embeddings=False, **OLMO3)),
}

if __name__ == "__main__":
    for seed, (name, (family, config)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = family(config).eval()
        with torch.no_grad():
            for weight in model.parameters():  # biases and norms too, which start at 0 and 1
                weight.normal_(std=0.25).add_(1.0 if weight.dim() == 1 else 0.0)
        directory = Path(__file__).parent / "golden" / name
        # One of them is saved in shards, with an index.
        model.save_pretrained(directory, max_shard_size="40KB" if name == "qwen2" else "1GB")
        (directory / "generation_config.json").unlink()
        # The input is longer than the original context of llama3 and yarn, 32 tokens.
        input_ids = torch.randint(1, SHAPE["vocab_size"], (2, 70))
        with torch.no_grad():
            greedy = model.generate(input_ids, max_new_tokens=12, do_sample=False)
            save_file({"input_ids": input_ids, "logits": model(input_ids).logits,
                       "greedy": greedy[:, input_ids.shape[1]:].contiguous()},
                      directory / "golden.safetensors")
        print(name, json.loads((directory / "config.json").read_text())["rope_parameters"])
