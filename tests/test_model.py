"""The network against the reference library's logits, the sampler against the full forward pass,
and bad directories and requests."""

import copy
import gc
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from files import BadInput
from memory import activation_bytes
from model import Config, Decoder, KVCache, SharedPrefix, Transformer, generate, sample

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("llama", "llama3", "qwen2", "qwen3", "olmo3")
CPU = torch.device("cpu")
KINDS = [dict(model_type="llama"), dict(model_type="qwen2"), dict(model_type="qwen3"),
         dict(model_type="olmo3", sliding_window=3,
              layer_types=["sliding_attention", "full_attention"])]


def test_the_size_of_a_head_is_that_of_the_reference_where_a_config_has_none():
    sizes = {kind: Config(kind, 10, 64, 8, 1, 4).head_dim for kind in ("llama", "qwen2", "qwen3")}
    assert sizes == {"llama": 16, "qwen2": 16, "qwen3": 128}


def family(changes: dict) -> str:
    return changes["model_type"]


def golden(name: str) -> tuple[Transformer, dict]:
    expected = load_file(GOLDEN / name / "golden.safetensors")
    return Transformer.from_pretrained(GOLDEN / name), expected


def tiny(seed: int = 0, vocabulary: int = 11, **changes) -> Transformer:
    torch.manual_seed(seed)
    fields = dict(model_type="llama", vocab_size=vocabulary, hidden_size=16, intermediate_size=24,
                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    model = Transformer(Config(**fields | changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(1.0 if weight.dim() == 1 else 0.0, 0.5)
    return model


# -------------------------------------------------------------------------------------- the network

@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_completions_are_the_reference_librarys(name):
    model, expected = golden(name)
    with torch.no_grad():
        logits = model(expected["input_ids"])
    assert (logits - expected["logits"]).abs().max() < 1e-4
    drawn = generate(model, expected["input_ids"].tolist(), 12, temperature=0)
    assert drawn == expected["greedy"].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_both_spellings_of_the_rotary_parameters(name, tmp_path):
    shutil.copytree(GOLDEN / name, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    rope = config.pop("rope_parameters")
    rope = rope.get("full_attention", rope)  # Of olmo3's two sets, only this one is ever scaled.
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None
    if rope != {"rope_type": "default"}:
        config["rope_scaling"] = rope | {"type": rope["rope_type"]}
        del config["rope_scaling"]["rope_type"]
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
    weights, loaded = model.state_dict(), again.state_dict()
    assert weights.keys() == loaded.keys()
    assert all(torch.equal(weights[name], loaded[name]) for name in weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_dtype_is_kept_or_chosen_and_tied_weights_are_one_tensor(tmp_path):
    model = golden("llama")[0].to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    kept = Transformer.from_pretrained(tmp_path)
    chosen = Transformer.from_pretrained(tmp_path, dtype=torch.float32)
    assert {weight.dtype for weight in kept.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in chosen.parameters()} == {torch.float32}
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_library_loads_what_we_save(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, expected = golden(name)
    model.save_pretrained(tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = reference(expected["input_ids"]).logits
    assert (logits - expected["logits"]).abs().max() < 1e-4


# ------------------------------------------------------------------------------ one pass per prompt

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
COMPLETIONS = [[[1, 2], [3]], [[4, 5, 6, 7], [8, 9]], [[2], [10, 3, 1]]]


def separately(model: Transformer, prompts: list, completions: list) -> torch.Tensor:
    """The logits that predict each completion token, each from a pass over its whole sequence."""
    return torch.cat([model(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1]
                      for prompt, group in zip(prompts, completions) for ids in group])


def shared(model: Transformer, prompts: list, completions: list) -> torch.Tensor:
    """The same logits, where each prompt is computed once."""
    prefix = SharedPrefix(prompts, completions, CPU)
    fed_back = sum(len(ids) - 1 for group in completions for ids in group)
    assert len(prefix.input_ids) == sum(map(len, prompts)) + fed_back
    hidden = model.hidden(prefix.input_ids, prefix.positions, prefix)
    return model.logits(hidden[prefix.predicts])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("changes", KINDS, ids=family)
def test_a_shared_prefix_gives_the_logits_and_gradients_of_separate_sequences(changes, recompute):
    a, b = tiny(**changes).double(), tiny(**changes).double()
    b.recompute = recompute
    out_a, out_b = separately(a, PROMPTS, COMPLETIONS), shared(b, PROMPTS, COMPLETIONS)
    assert torch.allclose(out_a, out_b, atol=1e-10)
    weights = torch.randn_like(out_a)
    (out_a * weights).sum().backward()
    (out_b * weights).sum().backward()
    assert all(torch.allclose(p.grad, q.grad, atol=1e-9)
               for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("completions", [
    [[[5, 6, 7]], [[6, 2], [7]]], [[[5]], [[6, 2, 3], [7]]], [[[5]], [[6], [7, 1]]]])
def test_a_shared_prefix_with_single_token_completions_anywhere(completions):
    """A completion that is one end token feeds nothing back: its row in the batch is empty."""
    model, prompts = tiny(), [[1, 2], [3]]
    ours, plain = shared(model, prompts, completions), separately(model, prompts, completions)
    assert torch.allclose(ours, plain, atol=1e-5)


def test_a_shared_prefix_of_single_token_completions():
    model, prompts, completions = tiny(), [[1, 2], [3]], [[[5]], [[6], [7]]]
    ours, plain = shared(model, prompts, completions), separately(model, prompts, completions)
    assert torch.allclose(ours, plain, atol=1e-5) and torch.equal(ours[1], ours[2])
    assert SharedPrefix(prompts, completions, CPU).tokens.tolist() == [5, 6, 7]


@pytest.mark.parametrize("stored, computing", [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("prompt, rollouts, new", [(200, 8, 20), (20, 4, 100), (150, 1, 2)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_activation_estimate_is_what_autograd_keeps(family, prompt, rollouts, new, stored,
                                                        computing):
    config = Config(family, 50, 192, 512, 2, 6, 2, 32 if family == "llama" else 64,
                    tie_word_embeddings=True)
    model, kept = Transformer(config).to(stored), {}
    model.compute_dtype = computing
    weights = {weight.data_ptr() for weight in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    prefix = SharedPrefix([[1] * prompt], [[[2] * new] * rollouts], CPU)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(prefix.input_ids, prefix.positions, prefix)
    a_token = activation_bytes(config, prompt + rollouts * new, rollouts, new, computing)
    estimate = config.num_hidden_layers * len(prefix.input_ids) * a_token
    if stored != computing:  # Autograd also keeps the weights that were cast.
        layers = sum(weight.numel() for weight in model.model.layers.parameters())
        estimate += computing.itemsize * layers
    assert hidden.requires_grad and estimate == pytest.approx(sum(kept.values()), rel=0.2)


# ----------------------------------------------------------------------------------- master weights

@pytest.mark.parametrize("changes", [*KINDS, dict(tie_word_embeddings=True)], ids=str)
def test_float32_weights_that_compute_in_bfloat16(changes):
    model = tiny(**changes)
    model.compute_dtype = torch.bfloat16
    stored = model.for_inference()
    assert {weight.dtype for weight in stored.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in stored.parameters())
    ours, theirs = (shared(m, PROMPTS, COMPLETIONS) for m in (model, stored))
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)
    ours.float().square().sum().backward()
    assert all(w.dtype == w.grad.dtype == torch.float32 for w in model.parameters())
    assert all(w.grad.isfinite().all() and w.grad.any() for w in model.parameters())
    seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
    drawn = [generate(m, PROMPTS, 9, num_samples=2, generator=g)
             for m, g in zip((model, stored), seeded)]
    assert drawn[0] == drawn[1]


def test_a_copy_keeps_its_computing_dtype_and_only_another_one_is_converted():
    model = tiny()
    assert model.for_inference() is model
    model.compute_dtype = torch.float32
    assert model.for_inference() is model
    model.compute_dtype = torch.bfloat16
    again = copy.deepcopy(model)
    assert again.compute_dtype == torch.bfloat16 and Transformer.compute_dtype is None
    stored = model.for_inference()
    assert stored is not model and stored.for_inference() is stored


# -------------------------------------------------------------------------------------- the sampler

def greedy_by_forward(model: Transformer, prompt: list[int], steps: int,
                      eos: tuple = ()) -> list[int]:
    """No cache at all: the whole sequence again for every token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in eos:
            break
    return ids[len(prompt):]


@pytest.mark.parametrize("changes", KINDS, ids=family)
@pytest.mark.parametrize("seed", range(3))
def test_cached_decoding_equals_the_full_forward_pass(seed, changes, monkeypatch):
    # What a step looks at grows on the way, by a token a step or, as on a GPU, now and then.
    monkeypatch.setattr("model.KVCache.steps_per_shape", (1, 7, 32)[seed])
    model = tiny(seed, **changes).double()
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (9,), generator=rng).tolist()
    prompts = [torch.randint(0, 11, (n,), generator=rng).tolist() for n in lengths]
    eos = (0, 1, 2)  # Rows end at different steps, so the cache is compacted on the way.
    expected = [greedy_by_forward(model, p, 25, eos) for p in prompts]
    assert generate(model, prompts, 25, temperature=0, eos_ids=eos) == expected


@pytest.mark.parametrize("seed", range(3))
def test_samples_that_share_a_prompts_keys_see_their_own_alone(seed, monkeypatch):
    """Each token must be sampled from the logits of the full forward pass."""
    asked = []

    def recording(logits: torch.Tensor, *_) -> torch.Tensor:
        asked.append(logits)
        return torch.multinomial(logits.softmax(-1), 1)[:, 0]

    monkeypatch.setattr("model.sample", recording)
    torch.manual_seed(seed)
    model, prompts = tiny(seed).double(), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    drawn = generate(model, prompts, 12, eos_ids=(0, 1), num_samples=4)
    running = list(range(12))
    for step, logits in enumerate(asked):
        if len(logits) < len(running):  # The cache was compacted: rows that had ended are gone.
            running = [row for row in running if len(drawn[row]) > step]
        for row, ours in zip(running, logits):
            if len(drawn[row]) > step:
                ids = torch.tensor([prompts[row // 4] + drawn[row][:step]])
                assert torch.allclose(ours, model(ids)[0, -1], atol=1e-9)
    assert len(running) < 12


def joint(model: Transformer, prompt: list[int]) -> torch.Tensor:
    """Exact probabilities of the next two tokens, [V, V]."""
    with torch.no_grad():
        first = model(torch.tensor([prompt]))[0, -1].softmax(-1)
        second = torch.stack([model(torch.tensor([prompt + [v]]))[0, -1].softmax(-1)
                              for v in range(len(first))])
    return first[:, None] * second


def assert_frequencies(pairs: list[list[int]], probability: torch.Tensor) -> None:
    """Each pair's frequency within 5 standard errors, and chi-square within 5 of its mean."""
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
    a, b = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    together = generate(model, prompts, 2, num_samples=4000, generator=a)
    separate = generate(model, [prompts[1]] * 4000, 2, generator=b)
    assert_frequencies(together[:4000], joint(model, prompts[0]))
    assert_frequencies(together[4000:], joint(model, prompts[1]))
    assert_frequencies(separate, joint(model, prompts[1]))


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (0.7, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.6), (1.5, 4, 0.8)])
def test_temperature_top_k_and_top_p_against_brute_force(temperature, top_k, top_p):
    model, prompt = tiny(5, vocabulary=6), [1, 2, 3]
    with torch.no_grad():
        p = (model(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1).tolist()
    ranked = sorted(range(6), key=lambda v: -p[v])[:top_k or 6]
    total = sum(p[v] for v in ranked)
    kept, mass = [], 0.0
    for v in ranked:  # The nucleus is the smallest set of the likeliest whose mass reaches top_p.
        if mass >= top_p:
            break
        kept.append(v)
        mass += p[v] / total
    norm = sum(p[v] for v in kept)
    completions = generate(model, [prompt], 1, temperature, top_k, top_p, num_samples=20000,
                           generator=torch.Generator().manual_seed(0))
    drawn = [ids[0] for ids in completions]
    for v in range(6):
        q = p[v] / norm if v in kept else 0.0
        assert abs(drawn.count(v) / 20000 - q) <= 5 * (q * (1 - q) / 20000) ** 0.5, (v, q)


def test_end_tokens_order_and_reproducibility():
    model = tiny(1)
    prompts = [[1], [2, 3], [4, 5, 6]]
    runs = [generate(model, prompts, 9, eos_ids=[7], num_samples=5,
                     generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert len(runs[0]) == 15
    assert all(7 not in ids[:-1] and (ids[-1] == 7 or len(ids) == 9) for ids in runs[0])
    greedy = generate(model, prompts, 6, temperature=0, num_samples=2)
    assert greedy == [greedy_by_forward(model, p, 6) for p in prompts for _ in range(2)]


@pytest.mark.parametrize("change", [
    dict(prompts=[]), dict(prompts=[[1], []]), dict(max_new_tokens=0), dict(num_samples=0),
    dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_p=0.0), dict(top_p=1.5),
    dict(top_k=-1)])
def test_sampler_refuses_nonsense(change):
    with pytest.raises(BadInput, match="generate"):
        generate(tiny(), **{"prompts": [[1]], "max_new_tokens": 3} | change)


@pytest.mark.parametrize("change, words", [
    (dict(prompts=[[1], [2, 11]]), "prompt 1 holds token id 11"),
    (dict(prompts=[[-1]]), "prompt 0 holds token id -1"),
    (dict(eos_ids=[2, 11]), "eos_ids holds token id 11"),
    (dict(eos_ids=(-1,)), "eos_ids holds token id -1")])
def test_sampler_refuses_tokens_outside_the_vocabulary(change, words):
    with pytest.raises(BadInput, match=words + ", which is outside the vocabulary of 11"):
        generate(tiny(), **{"prompts": [[1]], "max_new_tokens": 3} | change)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("call", [1, 3])  # the prefill, and a later step
def test_logits_that_are_not_finite_are_refused(temperature, value, call, monkeypatch):
    model, calls, plain = tiny(), [], Transformer.logits

    def breaking(self, hidden: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        logits = plain(self, hidden)
        if len(calls) == call:  # The prefill has one row a prompt, a step has three.
            logits[-1 if call == 1 else -3:, 2] = value
        return logits

    monkeypatch.setattr(Transformer, "logits", breaking)
    with pytest.raises(BadInput, match="logits of prompt 1 are not finite"):
        generate(model, [[1, 2], [3]], 6, temperature, num_samples=3)


@pytest.mark.parametrize("temperature, top_k, top_p", [(0, 0, 1.0), (1.0, 0, 1.0), (1.0, 3, 0.5)])
def test_no_token_is_drawn_from_logits_that_are_not_finite(temperature, top_k, top_p):
    logits = torch.full((3, 5), float("nan"))
    logits[1, :4] = 0.0
    logits[2, 1:] = -torch.inf
    logits[2, 0] = 0.0
    drawn = sample(logits, temperature, top_k, top_p, None)
    assert drawn.tolist() == [-1, -1, 0]


def test_nothing_keeps_a_cache_alive_after_sampling(monkeypatch):
    """Reference counts alone must free it: the garbage collector may come too late for a GPU."""
    caches = []

    class Watched(KVCache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(weakref.ref(self))
            caches.extend(weakref.ref(tensor) for pair in self.layers for tensor in pair)

    monkeypatch.setattr("model.KVCache", Watched)
    gc.disable()
    try:
        for seed in range(3):
            generate(tiny(seed), PROMPTS, 12, eos_ids=(0, 1), num_samples=4)
        assert len(caches) == 15 and not any(reference() for reference in caches)
    finally:
        gc.enable()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is Linux's")
def test_memory_is_flat_over_fifty_calls():
    def resident() -> int:
        return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

    model, prompt = tiny(head_dim=64), [1] * 1000
    cache = 2 * 2 * 2 * 64 * 4 * len(prompt)  # bytes: keys and values, layers, heads, sizes
    gc.disable()
    try:
        for call in range(50):
            if call == 10:
                before = resident()
            generate(model, [prompt], 4, num_samples=4)
        assert resident() - before < 8 * cache
    finally:
        gc.enable()


class OnGPU(Decoder):
    """A decoder that believes it has a stream, so that it asks for CUDA graphs of 5 steps."""

    def __init__(self, model: Transformer, cache: KVCache):
        super().__init__(model, cache)
        self.stream, cache.steps_per_shape = "side stream", 5


class FakeGraph:
    """Stands for a CUDA graph: it replays on a tensor of its own, whose shape must not change."""

    recorded = 0

    def __init__(self, function, tokens: torch.Tensor, stream: str):
        FakeGraph.recorded += 1
        self.function, self.tokens = function, tokens.clone()
        self.shape = function(self.tokens).shape

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        assert tokens.shape == self.tokens.shape
        self.tokens.copy_(tokens)
        logits = self.function(self.tokens)
        assert logits.shape == self.shape
        return logits


def refusing_graph(*_) -> None:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def test_a_graph_is_recorded_when_shapes_change_and_only_then(monkeypatch):
    settings = dict(max_new_tokens=23, temperature=0, eos_ids=(0, 1, 2))
    plain = generate(tiny(1), PROMPTS, **settings)
    monkeypatch.setattr("model.Decoder", OnGPU)
    monkeypatch.setattr("model.RecordedStep", FakeGraph)
    monkeypatch.setattr(FakeGraph, "recorded", 0)
    assert generate(tiny(1), PROMPTS, **settings) == plain
    steps = max(map(len, plain)) - 1
    compactions = len({len(ids) for ids in plain}) - 1
    assert 0 < FakeGraph.recorded <= -(-steps // 5) + compactions < steps


def test_a_graph_that_cannot_be_recorded_leaves_the_sampler_working(monkeypatch):
    plain = generate(tiny(1), PROMPTS, 12, temperature=0)
    monkeypatch.setattr("model.Decoder", OnGPU)
    monkeypatch.setattr("model.RecordedStep", refusing_graph)
    with pytest.warns(UserWarning, match="sampler .operation.*capturing.: it decodes"):
        assert generate(tiny(1), PROMPTS, 12, temperature=0) == plain


# ---------------------------------------------------------------------------------- bad directories

def broken(tmp_path: Path, name: str = "qwen3", **config) -> Path:
    shutil.copytree(GOLDEN / name, tmp_path / "m")
    raw = json.loads((tmp_path / "m/config.json").read_text()) | config
    (tmp_path / "m/config.json").write_text(json.dumps(raw))
    return tmp_path / "m"


@pytest.mark.parametrize("config, words", [
    (dict(model_type="gpt2"), "'gpt2' is not supported"), (dict(hidden_act="gelu"), "hidden_act"),
    (dict(attention_bias=True), "attention_bias"),
    (dict(rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4)), "rotary"),
    (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, mscale=2.0,
                               original_max_position_embeddings=32)), "rotary"),
    (dict(rope_parameters=None, rope_scaling=dict(rope_type="llama3", factor=8.0)), "rotary"),
    (dict(quantization_config=dict(bits=4)), "quantization"),
    (dict(use_sliding_window=True), "use_sliding_window"),
    (dict(layer_types=["sliding_attention"]), "layer_types"),
    (dict(hidden_size="many"), "hidden_size"),
    (dict(hidden_size="many", head_dim=None), "hidden_size"),
    (dict(num_hidden_layers=0), "num_hidden_layers"),
    (dict(num_key_value_heads=3), "key-value heads"),
    (dict(num_hidden_layers=4), "missing, the first is model.layers.3"),
    (dict(num_hidden_layers=2), "unexpected tensor model.layers.2"),
    (dict(intermediate_size=41), r"has shape \[40, 32\]|has shape \[32, 40\]"),
    (dict(model_type="llama"), "unexpected tensor"), (dict(model_type="olmo3"), "sliding_window"),
    (dict(model_type="olmo3", sliding_window=8, layer_types=["full_attention"]), "layer_types"),
    (dict(model_type="olmo3", sliding_window=-1), "`sliding_window` should be from 1"),
    (dict(model_type={}), "model family {} is not"), (dict(model_type=None), "family None is not"),
    (dict(layer_types=1), "`layer_types` should be a list, of text alone"),
    (dict(layer_types=[{}]), "`layer_types` should be"), (dict(vocab_size=True), "vocab_size"),
    (dict(head_dim=2 ** 64), "`head_dim` should be from 0 to 4096"), (dict(head_dim=3), "size 3"),
    (dict(num_hidden_layers=10 ** 9), "`num_hidden_layers` should be from 1 to 1024"),
    (dict(hidden_size=None), "no `hidden_size`"), (dict(hidden_size=32.0), "a whole number"),
    (dict(tie_word_embeddings=2), "`tie_word_embeddings` should be true or false, not 2"),
    (dict(rms_norm_eps=1), "rms_norm_eps"), (dict(rms_norm_eps="1e-6"), "should be a number"),
    (dict(max_position_embeddings=1e300), "max_position_embeddings"),
    (dict(eos_token_id=True), "`eos_token_id` should be a whole number or a list"),
    (dict(eos_token_id=[0, "1"]), "eos_token_id"), (dict(eos_token_id=2 ** 63), "eos_token_id"),
    (dict(quantization_config=[[[[[[[1]]]]]]]), "quantization"),
    (dict(hidden_act={}), "hidden_act"),
    (dict(rope_parameters=[1]), "rotary"), (dict(rope_parameters=dict(rope_theta=0)), "rope_theta"),
    (dict(rope_parameters=dict(rope_type=[])), "`rope_type` should be text"),
    (dict(rope_parameters=None, rope_theta="x"), "rope_theta"),
    (dict(rope_parameters=dict(full_attention=3)), "rotary embedding: expected a JSON object"),
    (dict(rope_parameters=dict(rope_type="yarn", factor=True, rope_theta=1e4)), "factor"),
    (dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=4,
                               high_freq_factor=4, original_max_position_embeddings=32)),
     "low_freq_factor should be less")])
def test_refuses_configurations_it_does_not_compute(tmp_path, config, words):
    with pytest.raises(BadInput, match=words):
        Transformer.from_pretrained(broken(tmp_path, **config))


def test_refuses_missing_and_broken_files(tmp_path):
    with pytest.raises(BadInput, match="config.json: there is no such file"):
        Transformer.from_pretrained(tmp_path)
    m = broken(tmp_path)
    whole = (m / "model.safetensors").read_bytes()
    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (m / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(BadInput, match="not a readable safetensors file"):
            Transformer.from_pretrained(m)
    (m / "model.safetensors").unlink()
    (m / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BadInput, match="pickles are never opened"):
        Transformer.from_pretrained(m)
    for content, words in [(b"{", "not JSON"), (b"", "not JSON"), (b"[]", "JSON object"),
                           (b"\xff", "UTF-8"), (b'{"a":' * 500 + b"1" + b"}" * 500, "nested"),
                           (b'{"model_type": "\\ud800"}', "surrogates not allowed")]:
        (m / "config.json").write_bytes(content)
        with pytest.raises(BadInput, match=f"config.json: .*{words}"):
            Transformer.from_pretrained(m)


def test_a_head_that_is_said_to_be_tied_may_be_stored_and_not_be_another(tmp_path):
    m = broken(tmp_path, "llama")
    plain = load_file(m / "model.safetensors")
    embedding = plain["model.embed_tokens.weight"]
    save_file(plain | {"lm_head.weight": embedding.clone()}, m / "model.safetensors")
    loaded = Transformer.from_pretrained(m)
    assert loaded.state_dict().keys() == golden("llama")[0].state_dict().keys()
    for head, words in [(embedding + 1e-3, "files hold two that differ"),
                        (embedding[:, :3].contiguous(), "has shape"),
                        (embedding * torch.nan, "lm_head.weight")]:
        save_file(plain | {"lm_head.weight": head}, m / "model.safetensors")
        with pytest.raises(BadInput, match=words):
            Transformer.from_pretrained(m)


def test_olmo3_has_the_reference_librarys_defaults(tmp_path):
    """Those of its Olmo3Config in transformers 5.24."""
    path = broken(tmp_path, "olmo3") / "config.json"
    raw = json.loads(path.read_text())
    del raw["rms_norm_eps"], raw["rope_parameters"]
    path.write_text(json.dumps(raw))
    config = Config.from_pretrained(path.parent)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 5e5)


def test_refuses_a_bad_index_other_dtypes_and_what_is_not_finite(tmp_path):
    m = broken(tmp_path, "qwen2")
    index = json.loads((m / "model.safetensors.index.json").read_text())
    (m / "model-00002-of-00003.safetensors").rename(m / "away")
    with pytest.raises(BadInput, match="model-00002-of-00003.safetensors is missing"):
        Transformer.from_pretrained(m)
    index["weight_map"] = {name: "../" + shard for name, shard in index["weight_map"].items()}
    for bad in (index, {}, {"weight_map": []}, {"weight_map": {"a": 1}}):
        (m / "model.safetensors.index.json").write_text(json.dumps(bad))
        with pytest.raises(BadInput, match="weight_map"):
            Transformer.from_pretrained(m)
    for shard in ("x" * 300, "", "\0"):
        (m / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(BadInput, match="is missing"):
            Transformer.from_pretrained(m)
    (tmp_path / "other").mkdir()
    other = broken(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    narrow = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    save_file(narrow, other / "model.safetensors")
    with pytest.raises(BadInput, match="F8_E4M3"):
        Transformer.from_pretrained(other)
    for value in (torch.nan, torch.inf, -torch.inf):
        tensors["model.norm.weight"][3] = value
        save_file(tensors, other / "model.safetensors")
        with pytest.raises(BadInput, match="tensor model.norm.weight holds NaN or infinity"):
            Transformer.from_pretrained(other)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(BadInput, match="tensor model.norm.weight holds NaN or infinity"):
        Transformer.from_pretrained(other, dtype=torch.float16)


def test_a_model_that_is_saved_over_shards_is_the_one_that_is_loaded(tmp_path):
    directory = broken(tmp_path, "qwen2")
    assert (directory / "model.safetensors.index.json").exists()
    model = Transformer.from_pretrained(directory)
    model.model.norm.weight.data.fill_(7)
    model.save_pretrained(directory)
    assert (Transformer.from_pretrained(directory).model.norm.weight == 7).all()


def test_loading_holds_the_weights_once(tmp_path):
    """A load in a fresh process may grow by the file's size and a little, not by twice that."""
    large = tiny(vocabulary=100_000, hidden_size=256, head_dim=64, tie_word_embeddings=True)
    large.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    script = ("import resource, sys, torch\n"
              "from model import Transformer\n"
              "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
              "model = Transformer.from_pretrained(sys.argv[1])\n"
              "sum(float(weight.sum()) for weight in model.parameters())\n"
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    shown = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True,
                           text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    assert int(shown) * 1024 < 1.5 * size, int(shown) * 1024 / size


# --------------------------------------------------------------------------------------- adapters

def adapted(changes: dict, rank: int = 3) -> tuple[Transformer, Transformer]:
    """A network with adapters that have learned something, and the one under them."""
    plain, model = tiny(**changes), tiny(**changes)
    model.add_adapters(rank, alpha=5.0)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(weight, std=0.3)
    return model, plain


@pytest.mark.parametrize("changes", KINDS, ids=family)
def test_adapters_start_as_nothing_and_are_merged_into_what_they_compute(changes, tmp_path):
    ids = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    plain, fresh = tiny(**changes), tiny(**changes)
    fresh.add_adapters(3, alpha=5.0)
    assert torch.equal(plain(ids), fresh(ids))
    model, _ = adapted(changes)
    learned = {name for name, w in model.named_parameters() if w.requires_grad}
    assert len(learned) == 2 * 7 * 2 and all("lora" in name for name in learned)  # 2 layers of 7
    model.save_pretrained(tmp_path)
    merged = Transformer.from_pretrained(tmp_path)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert torch.allclose(merged(ids), model(ids), atol=1e-5)
    assert (merged(ids) - plain(ids)).abs().max() > 0.1


@pytest.mark.parametrize("changes", KINDS, ids=family)
def test_an_adapters_gradient_is_that_of_the_weight_it_adds_to(changes, tmp_path):
    """With W' = W + s·B·A: ∂L/∂B = s·∂L/∂W'·Aᵀ and ∂L/∂A = s·Bᵀ·∂L/∂W'."""
    model, _ = adapted(changes)
    model.save_pretrained(tmp_path)
    merged = Transformer.from_pretrained(tmp_path)
    ids = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    for network in (model, merged):
        network(ids).logsumexp(-1).sum().backward()
    scale, found = 5.0 / 3, dict(model.named_parameters())
    for name, weight in merged.named_parameters():
        layer, _, part = name.rpartition(".")
        if f"{layer}.lora_A" not in found or part != "weight":
            continue
        a, b = found[f"{layer}.lora_A"], found[f"{layer}.lora_B"]
        assert torch.allclose(b.grad, scale * weight.grad @ a.T, atol=1e-4, rtol=1e-4)
        assert torch.allclose(a.grad, scale * b.T @ weight.grad, atol=1e-4, rtol=1e-4)
        assert a.grad.abs().max() > 0


def test_the_sampler_reads_the_adapters(tmp_path):
    model, plain = adapted(KINDS[2])
    model.save_pretrained(tmp_path)
    merged, prompts = Transformer.from_pretrained(tmp_path), [[1, 2, 3], [4, 5]]
    model.compute_dtype = torch.float32
    assert model.for_inference() is model
    drawn = [generate(network, prompts, 12, temperature=0) for network in (model, merged, plain)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_loads_the_adapters_to_the_same_logits(name, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model, expected = golden(name)
    model.add_adapters(3, alpha=5.0)
    for adapter in model.adapters().values():
        torch.nn.init.normal_(adapter.lora_B, std=0.3)
    model.save_adapter(tmp_path, base=str(GOLDEN / name))
    reference = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name)
    with torch.no_grad():
        alone = reference(expected["input_ids"]).logits
        theirs = peft.PeftModel.from_pretrained(reference, tmp_path)(expected["input_ids"]).logits
        ours = model(expected["input_ids"])
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (ours - alone).abs().max() > 1e-2
