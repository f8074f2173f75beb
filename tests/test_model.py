"""The network against the reference library's logits, the sampler against the full forward pass, files against bad files."""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import Config, ModelError, Transformer, Tree, generate

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("llama", "llama3", "qwen2", "qwen3", "olmo3")
CPU = torch.device("cpu")


def golden(name: str) -> tuple[Transformer, dict]:
    return Transformer.from_pretrained(GOLDEN / name), load_file(GOLDEN / name / "golden.safetensors")


def tiny(seed: int = 0, vocabulary: int = 11, **changes) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(Config(**dict(model_type="llama", vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, head_dim=4) | changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(1.0 if weight.dim() == 1 else 0.0, 0.5)
    return model


# ----------------------------------------------------------------------------- the network

@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_completions_are_the_reference_librarys(name):
    model, expected = golden(name)
    with torch.no_grad():
        logits = model(expected["input_ids"])
    assert (logits - expected["logits"]).abs().max() < 1e-4
    assert generate(model, expected["input_ids"].tolist(), 12, temperature=0) == expected["greedy"].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_both_spellings_of_the_rotary_parameters(name, tmp_path):
    shutil.copytree(GOLDEN / name, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    rope = config.pop("rope_parameters")
    rope = rope.get("full_attention", rope)  # olmo3 keeps two sets; its sliding layers are never scaled
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope == {"rope_type": "default"} else {"type" if k == "rope_type" else k: v for k, v in rope.items()}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    assert Config.from_pretrained(tmp_path / "m") == Config.from_pretrained(GOLDEN / name)


def test_attention_is_causal():
    model, expected = golden("qwen3")
    ids = expected["input_ids"].clone()
    ids[:, 40:] = 1
    with torch.no_grad():
        assert torch.allclose(model(ids)[:, :40], expected["logits"][:, :40], atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_save_and_load_round_trip(name, tmp_path):
    model, expected = golden(name)
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_dtype_is_kept_or_chosen_and_tied_weights_are_one_tensor(tmp_path):
    model = golden("llama")[0].to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in Transformer.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in Transformer.from_pretrained(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_library_loads_what_we_save(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, expected = golden(name)
    model.save_pretrained(tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert (reference(expected["input_ids"]).logits - expected["logits"]).abs().max() < 1e-4


# ----------------------------------------------------------------------------- one pass per prompt

KINDS = [dict(model_type="llama"), dict(model_type="qwen2"), dict(model_type="qwen3"),
         dict(model_type="olmo3", sliding_window=3, layer_types=["sliding_attention", "full_attention"])]

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
COMPLETIONS = [[[1, 2], [3]], [[4, 5, 6, 7], [8, 9]], [[2], [10, 3, 1]]]


def plain(model: Transformer) -> torch.Tensor:
    """The logits that predict each completion token, the plain way: a full forward pass for each copy of a prompt."""
    return torch.cat([model(torch.tensor([p + c]))[0, len(p) - 1:-1] for p, group in zip(PROMPTS, COMPLETIONS) for c in group])


def shared(model: Transformer) -> torch.Tensor:
    tree = Tree(PROMPTS, COMPLETIONS, CPU)
    assert len(tree.input_ids) == sum(map(len, PROMPTS)) + sum(len(c) - 1 for group in COMPLETIONS for c in group)
    return model.logits(model.hidden(tree.input_ids, tree.positions, tree)[tree.predicts])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("changes", KINDS, ids=lambda changes: changes["model_type"])
def test_a_tree_gives_the_logits_and_gradients_of_separate_sequences(changes, recompute):
    a, b = tiny(**changes).double(), tiny(**changes).double()
    b.recompute = recompute
    weights = torch.randn(len(Tree(PROMPTS, COMPLETIONS, CPU).targets), 11, dtype=torch.double)
    out_a, out_b = plain(a), shared(b)
    assert torch.allclose(out_a, out_b, atol=1e-10)
    (out_a * weights).sum().backward()
    (out_b * weights).sum().backward()
    assert all(torch.allclose(p.grad, q.grad, atol=1e-9) for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("completions", [[[[5, 6, 7]], [[6, 2], [7]]], [[[5]], [[6, 2, 3], [7]]], [[[5]], [[6], [7, 1]]]])
def test_a_tree_with_single_token_completions_anywhere(completions):
    """A completion that is one end token has nothing to feed back: its row in the padded batch is empty."""
    model, prompts = tiny(), [[1, 2], [3]]
    tree = Tree(prompts, completions, CPU)
    ours = model.logits(model.hidden(tree.input_ids, tree.positions, tree)[tree.predicts])
    separate = [model(torch.tensor([p + c]))[0, len(p) - 1:-1] for p, group in zip(prompts, completions) for c in group]
    assert torch.allclose(ours, torch.cat(separate), atol=1e-5)


def test_a_tree_of_single_token_completions():
    model = tiny()
    tree = Tree([[1, 2], [3]], [[[5]], [[6], [7]]], CPU)
    out = model.logits(model.hidden(tree.input_ids, tree.positions, tree)[tree.predicts])
    assert torch.allclose(out[0], model(torch.tensor([[1, 2]]))[0, -1], atol=1e-5)
    assert torch.equal(out[1], out[2]) and tree.targets.tolist() == [5, 6, 7]


# ----------------------------------------------------------------------------- the sampler

def greedy_by_forward(model: Transformer, prompt: list[int], steps: int, eos: tuple = ()) -> list[int]:
    """No cache at all: the whole sequence again for every token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in eos:
            break
    return ids[len(prompt):]


@pytest.mark.parametrize("changes", KINDS, ids=lambda changes: changes["model_type"])
@pytest.mark.parametrize("seed", range(3))
def test_cached_decoding_equals_the_full_forward_pass(seed, changes, monkeypatch):
    monkeypatch.setattr("model.STEPS", 7)  # the room that a step looks at grows on the way
    model = tiny(seed, **changes).double()
    rng = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, 11, (int(n),), generator=rng).tolist() for n in torch.randint(1, 30, (9,), generator=rng)]
    eos = (0, 1, 2)  # rows end at different steps, so the cache is compacted on the way
    expected = [greedy_by_forward(model, p, 25, eos) for p in prompts]
    assert generate(model, prompts, 25, temperature=0, eos_ids=eos) == expected


@pytest.mark.parametrize("seed", range(3))
def test_samples_that_share_a_prompts_keys_see_their_own_alone(seed, monkeypatch):
    """Each sampled token must have the full forward pass's probabilities: here it is the sampled one that is asked for."""
    asked = []
    monkeypatch.setattr("model.sample", lambda logits, *_: asked.append(logits) or torch.multinomial(logits.softmax(-1), 1)[:, 0])
    torch.manual_seed(seed)
    model, prompts = tiny(seed).double(), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    drawn = generate(model, prompts, 12, eos_ids=(0, 1), num_samples=4)
    running = list(range(12))
    for step, logits in enumerate(asked):
        if len(logits) < len(running):  # compacted: rows that had ended are gone
            running = [row for row in running if len(drawn[row]) > step]
        for row, ours in zip(running, logits):
            if len(drawn[row]) > step:
                assert torch.allclose(ours, model(torch.tensor([prompts[row // 4] + drawn[row][:step]]))[0, -1], atol=1e-9)
    assert len(running) < 12


def joint(model: Transformer, prompt: list[int]) -> torch.Tensor:
    """Exact probabilities of the next two tokens, [V, V]."""
    with torch.no_grad():
        first = model(torch.tensor([prompt]))[0, -1].softmax(-1)
        second = torch.stack([model(torch.tensor([prompt + [v]]))[0, -1].softmax(-1) for v in range(len(first))])
    return first[:, None] * second


def assert_frequencies(pairs: list[list[int]], probability: torch.Tensor) -> None:
    """Every pair's frequency within 5 standard errors, and the chi-square statistic within 5 of its mean."""
    count = torch.zeros_like(probability)
    for a, b in pairs:
        count[a, b] += 1
    n, expected = len(pairs), probability * len(pairs)
    assert ((count - expected).abs() <= 5 * (expected * (1 - probability)).sqrt() + 1).all()
    common = expected > 5
    chi2 = ((count - expected)[common] ** 2 / expected[common]).sum()
    assert abs(chi2 - common.sum()) < 5 * (2 * common.sum()) ** 0.5 + 5, n


def test_samples_of_one_prefill_are_distributed_as_separate_ones():
    model, prompts = tiny(3, vocabulary=5), [[1, 2], [3, 4, 0, 1]]
    together = generate(model, prompts, 2, num_samples=4000, generator=torch.Generator().manual_seed(0))
    separate = generate(model, [prompts[1]] * 4000, 2, generator=torch.Generator().manual_seed(1))
    assert_frequencies(together[:4000], joint(model, prompts[0]))
    assert_frequencies(together[4000:], joint(model, prompts[1]))
    assert_frequencies(separate, joint(model, prompts[1]))


@pytest.mark.parametrize("temperature, top_k, top_p", [(0.7, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.6), (1.5, 4, 0.8)])
def test_temperature_top_k_and_top_p_against_brute_force(temperature, top_k, top_p):
    model, prompt = tiny(5, vocabulary=6), [1, 2, 3]
    with torch.no_grad():
        p = (model(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1).tolist()
    ranked = sorted(range(6), key=lambda v: -p[v])[:top_k or 6]
    total = sum(p[v] for v in ranked)
    kept, mass = [], 0.0
    for v in ranked:  # the smallest set of the likeliest tokens whose mass reaches top_p
        if mass >= top_p:
            break
        kept.append(v)
        mass += p[v] / total
    norm = sum(p[v] for v in kept)
    drawn = [ids[0] for ids in generate(model, [prompt], 1, temperature, top_k, top_p, num_samples=20000, generator=torch.Generator().manual_seed(0))]
    for v in range(6):
        q = p[v] / norm if v in kept else 0.0
        assert abs(drawn.count(v) / 20000 - q) <= 5 * (q * (1 - q) / 20000) ** 0.5, (v, q)


def test_end_tokens_order_and_reproducibility():
    model = tiny(1)
    prompts = [[1], [2, 3], [4, 5, 6]]
    runs = [generate(model, prompts, 9, eos_ids=[7], num_samples=5, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert len(runs[0]) == 15
    assert all(7 not in ids[:-1] and (ids[-1] == 7 or len(ids) == 9) for ids in runs[0])
    greedy = generate(model, prompts, 6, temperature=0, num_samples=2)
    assert greedy == [greedy_by_forward(model, p, 6) for p in prompts for _ in range(2)]


@pytest.mark.parametrize("change", [dict(prompts=[]), dict(prompts=[[1], []]), dict(max_new_tokens=0), dict(num_samples=0), dict(temperature=-1.0),
                                    dict(temperature=float("nan")), dict(top_p=0.0), dict(top_p=1.5), dict(top_k=-1)])
def test_sampler_refuses_nonsense(change):
    with pytest.raises(ModelError, match="generate"):
        generate(tiny(), **{"prompts": [[1]], "max_new_tokens": 3} | change)


# ----------------------------------------------------------------------------- bad directories

def broken(tmp_path: Path, name: str = "qwen3", **config) -> Path:
    shutil.copytree(GOLDEN / name, tmp_path / "m")
    raw = json.loads((tmp_path / "m/config.json").read_text()) | config
    (tmp_path / "m/config.json").write_text(json.dumps(raw))
    return tmp_path / "m"


@pytest.mark.parametrize("config, words", [
    (dict(model_type="gpt2"), "'gpt2' is not supported"), (dict(hidden_act="gelu"), "hidden_act"), (dict(attention_bias=True), "attention_bias"),
    (dict(rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4)), "rotary"), (dict(quantization_config=dict(bits=4)), "quantization"),
    (dict(layer_types=["sliding_attention"]), "layer_types"), (dict(use_sliding_window=True), "use_sliding_window"),
    (dict(hidden_size="many"), "hidden_size"), (dict(num_hidden_layers=0), "num_hidden_layers"), (dict(num_key_value_heads=3), "key-value heads"),
    (dict(num_hidden_layers=4), "missing, the first is model.layers.3"), (dict(num_hidden_layers=2), "unexpected tensor model.layers.2"),
    (dict(intermediate_size=41), r"has shape \[40, 32\]|has shape \[32, 40\]"), (dict(model_type="llama"), "unexpected tensor"),
    (dict(rope_parameters=None, rope_scaling=dict(rope_type="llama3", factor=8.0)), "rotary"),
    (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32, mscale=2.0)), "rotary"),
    (dict(model_type="olmo3"), "sliding_window"), (dict(model_type="olmo3", sliding_window=8, layer_types=["full_attention"]), "layer_types")])
def test_refuses_configurations_it_does_not_compute(tmp_path, config, words):
    with pytest.raises(ModelError, match=words):
        Transformer.from_pretrained(broken(tmp_path, **config))


def test_refuses_missing_and_broken_files(tmp_path):
    with pytest.raises(ModelError, match="no config.json"):
        Transformer.from_pretrained(tmp_path)
    m = broken(tmp_path)
    whole = (m / "model.safetensors").read_bytes()
    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (m / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ModelError, match="not a readable safetensors file"):
            Transformer.from_pretrained(m)
    (m / "model.safetensors").unlink()
    (m / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="pickles are never opened"):
        Transformer.from_pretrained(m)
    (m / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not readable as JSON"):
        Transformer.from_pretrained(m)
    (m / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="JSON object"):
        Transformer.from_pretrained(m)


def test_refuses_a_bad_index_and_other_dtypes(tmp_path):
    m = broken(tmp_path, "qwen2")
    index = json.loads((m / "model.safetensors.index.json").read_text())
    (m / "model-00002-of-00003.safetensors").rename(m / "away")
    with pytest.raises(ModelError, match="model-00002-of-00003.safetensors is missing"):
        Transformer.from_pretrained(m)
    index["weight_map"] = {name: "../" + shard for name, shard in index["weight_map"].items()}
    (m / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="weight_map"):
        Transformer.from_pretrained(m)
    (tmp_path / "other").mkdir()
    other = broken(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()}, other / "model.safetensors")
    with pytest.raises(ModelError, match="F8_E4M3"):
        Transformer.from_pretrained(other)


def test_loading_holds_the_weights_once(tmp_path):
    """A load in a fresh process may grow by the file's size and a little, not by twice that."""
    import subprocess
    import sys
    tiny(vocabulary=100_000, hidden_size=256, head_dim=64, tie_word_embeddings=True).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    script = ("import resource, sys; from model import Transformer; import torch\n"
              "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
              "model = Transformer.from_pretrained(sys.argv[1]); sum(float(p.sum()) for p in model.parameters())\n"
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    grown = int(subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout)
    assert grown * 1024 < 1.5 * size, (grown * 1024 / size)
