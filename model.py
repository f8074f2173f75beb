"""A decoder-only transformer, its key-value cache and its sampler, from scratch.

Reads and writes Hugging Face directories (config.json and *.safetensors) of four families:

    llama    Llama 2 and 3, SmolLM2 (llama3 and yarn rope scaling included)
    qwen2    Qwen2, Qwen2.5         the same, with a bias on the q, k and v projections
    qwen3    Qwen3                  the same, with an RMSNorm on the heads of q and k
    olmo3    OLMo 3                 RMSNorm on all of q and k, and on what attention and MLP put out instead of
                                    what they take in; three layers of four look back over a sliding window

One idea shapes the file. Everything but attention treats tokens one at a time, so the tokens of all
sequences lie end to end in one flat list [T], without padding, and a small object knows which token sees which:

    Packed   several sequences side by side: the plain forward pass and the sampler's prefill
    Tree     several completions that branch off one prompt: the prompt is computed once for all of them
    Decode   one new token for each running sequence, looking back at its prompt's keys, which it shares with
             the prompt's other samples, and at its own, in a preallocated cache

Shapes: T tokens, B prompts, N completions, L layers, H heads, G key-value heads, D hidden size, d head size, V vocabulary.
"""

import json
import math
import os
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ModelError(ValueError):
    """A model directory, or a request to a model, that cannot be served; the message is for the user."""


# ----------------------------------------------------------------------------- configuration

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
                 "olmo3": "Olmo3ForCausalLM"}
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass
class Config:
    """The part of config.json that the forward pass depends on, under Hugging Face's own names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or the parameters of {"rope_type": "llama3"} or {"rope_type": "yarn"}
    sliding_window: int | None = None  # olmo3: how many tokens a sliding layer sees, itself included
    layer_types: list[str] | None = None  # olmo3: "sliding_attention" or "full_attention" for each layer
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Config":
        """Reads directory/config.json.

        Raises ModelError if it is missing or broken, or describes a network this file does not compute.
        """
        path = Path(directory) / "config.json"
        raw = read_json(path)
        if raw.get("model_type") not in ARCHITECTURES:
            raise ModelError(f"{path}: model family {raw.get('model_type')!r} is not supported; "
                             f"supported are {', '.join(ARCHITECTURES)}")
        refuse_variants(path, raw)
        theta, scaling = rope_parameters(path, raw)
        heads, olmo = raw.get("num_attention_heads"), raw["model_type"] == "olmo3"
        derived = {"rope_theta": theta, "rope_scaling": scaling, "num_key_value_heads": raw.get("num_key_value_heads") or heads,
                   "head_dim": raw.get("head_dim") or (raw.get("hidden_size") or 0) // (heads or 1),
                   "sliding_window": raw.get("sliding_window") if olmo else None,
                   "layer_types": raw.get("layer_types") if olmo else None}
        fields = {name: raw[name] for name in cls.__dataclass_fields__ if raw.get(name) is not None} | derived
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim"):
            if not isinstance(fields.get(name), int) or fields[name] < 1:
                raise ModelError(f"{path}: {name} must be a positive whole number, not {fields.get(name)!r}")
        if heads % fields["num_key_value_heads"] or fields["head_dim"] % 2:
            raise ModelError(f"{path}: {heads} heads of size {fields['head_dim']} cannot share "
                             f"{fields['num_key_value_heads']} key-value heads")
        if olmo and not (isinstance(fields["sliding_window"], int) and fields["sliding_window"] > 0
                         and isinstance(fields["layer_types"], list) and len(fields["layer_types"]) == fields["num_hidden_layers"]
                         and set(fields["layer_types"]) <= {SLIDING, FULL}):
            raise ModelError(f"{path}: olmo3 needs a sliding_window and layer_types, {SLIDING!r} or {FULL!r} for each layer")
        return cls(**fields)

    def window(self, layer: int) -> int | None:
        """How many tokens the layer sees, itself included; None where it sees all."""
        return self.sliding_window if self.layer_types and self.layer_types[layer] == SLIDING else None

    def to_dict(self) -> dict:
        """The config.json that the reference library reads back as the same network."""
        raw = asdict(self)
        if self.layer_types:  # the newer spelling as well: of the older, transformers 5.23 does not read the sliding layers' theta
            plain = {"rope_type": "default", "rope_theta": self.rope_theta}
            raw["rope_parameters"] = {FULL: plain | (self.rope_scaling or {}), SLIDING: plain}
        else:
            del raw["sliding_window"], raw["layer_types"]
        return raw | {"architectures": [ARCHITECTURES[self.model_type]], "hidden_act": "silu",
                      "attention_bias": False, "use_sliding_window": False}


def read_json(path: Path) -> dict:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent}: no {path.name} there; pass a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def refuse_variants(path: Path, raw: dict) -> None:
    """Refuses options of the known families that would change the network silently."""
    layers = {FULL} if raw["model_type"] == "olmo3" else set(raw.get("layer_types") or [FULL])
    for name, refused in {"hidden_act": raw.get("hidden_act", "silu") != "silu", "attention_bias": raw.get("attention_bias"),
                          "mlp_bias": raw.get("mlp_bias"), "use_sliding_window": raw.get("use_sliding_window"),
                          "quantization_config": raw.get("quantization_config"), "layer_types": layers != {FULL},
                          "partial_rotary_factor": raw.get("partial_rotary_factor", 1) != 1}.items():
        if refused:
            raise ModelError(f"{path}: {name} = {raw[name]!r} is not supported")


ROPE = {"llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "original_max_position_embeddings"}}


def rope_parameters(path: Path, raw: dict) -> tuple[float, dict | None]:
    """(theta, scaling), from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before it).

    Sliding layers are never scaled, so of olmo3's two sets of parameters the full layers' says all.
    """
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    sliding = rope.get(SLIDING, {}) if isinstance(rope, dict) else {}
    rope = rope.get(FULL, rope) if isinstance(rope, dict) else rope
    refusal = ModelError(f"{path}: rotary embedding {rope!r} is not supported; 'default' and complete 'llama3' and 'yarn' are")
    if not isinstance(rope, dict) or rope.get("partial_rotary_factor", 1) != 1:
        raise refusal
    kind, theta = rope.get("rope_type", rope.get("type", "default")), rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    values = {name: rope[name] for name in ROPE.get(kind, ()) if rope.get(name) is not None}
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"} | ROPE.get(kind, rope.keys())
    if kind == "yarn":
        factor = max(1, rope.get("factor") or 1)
        values = {"attention_factor": 0.1 * math.log(factor) + 1, "beta_fast": 32, "beta_slow": 1} | values
    numbers = all(isinstance(value, (int, float)) and value > 0 for value in (theta, *values.values()))
    if kind not in ("default", *ROPE) or not numbers or values.keys() != ROPE.get(kind, set()) or rope.keys() - known \
            or sliding.get("rope_type", "default") != "default" or sliding.get("rope_theta", theta) != theta:
        raise refusal
    return float(theta), {"rope_type": kind} | values if values else None


# ----------------------------------------------------------------------------- the network

def rope_frequencies(config: Config, device: torch.device) -> Tensor:
    """Rotation speed of each pair of dimensions, [d/2]: θ^(−2i/d), where scaling slows the slow ones down by `factor`."""
    pair = torch.arange(config.head_dim // 2, device=device, dtype=torch.float32)
    speed = config.rope_theta ** (-2 * pair / config.head_dim)
    if config.rope_scaling is None:
        return speed
    s = config.rope_scaling
    if s["rope_type"] == "llama3":  # keep: 1 for pairs that turn often within the original context, 0 for those that hardly do
        turns = s["original_max_position_embeddings"] * speed / (2 * math.pi)
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    else:  # yarn: the same idea, linear in the pair's index between the pairs that turn beta_fast and beta_slow times
        def index(turns: float) -> float:
            speed = turns * 2 * math.pi / s["original_max_position_embeddings"]
            return -config.head_dim / 2 * math.log(speed, config.rope_theta)
        low, high = max(math.floor(index(s["beta_fast"])), 0), min(math.ceil(index(s["beta_slow"])), config.head_dim - 1)
        keep = 1 - ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    return keep * speed + (1 - keep) * speed / s["factor"]


def rope_tables(config: Config, positions: Tensor, dtype: torch.dtype) -> dict[bool, tuple[Tensor, Tensor]]:
    """cos and (−sin, sin) [T, 1, d] of positions [T]: for layers that see everything, and unscaled for sliding layers (key True)."""
    tables = {}
    for sliding in {config.window(layer) is not None for layer in range(config.num_hidden_layers)}:
        scaled = replace(config, rope_scaling=None) if sliding else config
        angle = torch.outer(positions.float(), rope_frequencies(scaled, positions.device))[:, None]  # [T, 1, d/2]
        factor = (scaled.rope_scaling or {}).get("attention_factor", 1.0)  # yarn's own, on both q and k
        cos, sin = angle.cos() * factor, angle.sin() * factor
        tables[sliding] = torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)
    return tables


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads x [T, H, d]: dimensions i and i + d/2, (a, b), become (a cos − b sin, b cos + a sin)."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, [T, out] from x [T, in]. With few rows, as in decoding, a CPU is 2 to 3 times as fast the other way round."""
    if x.device.type != "cpu" or len(x) > 32:
        return F.linear(x, weight, bias)
    out = (weight @ x.T).T
    return out if bias is None else out + bias


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype.itemsize >= 4:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)  # the mean of squares needs float32


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        bias = config.model_type == "qwen2"
        self.q_proj = Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=False)
        per_head = config.model_type == "qwen3"
        if per_head or config.model_type == "olmo3":
            self.q_norm = RMSNorm(config.head_dim if per_head else queries, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim if per_head else keys, config.rms_norm_eps)

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """RMSNorm over each head of q [T, H, d] and k [T, G, d] (qwen3), over all of them together (olmo3), or none."""
        if not hasattr(self, "q_norm"):
            return q, k
        if self.q_norm.weight.numel() == self.head_dim:
            return self.q_norm(q), self.k_norm(k)
        return self.q_norm(q.flatten(1)).view_as(q), self.k_norm(k.flatten(1)).view_as(k)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.normed(q, k)
        out = attend(rotate(q, *rope), rotate(k, *rope), v)  # [T, H, d] from [T, H, d], [T, G, d], [T, G, d]
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); in olmo3 x + norm(attention(x)), then x + norm(mlp(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.norm_first = config.model_type != "olmo3"
        self.self_attn, self.mlp = Attention(config), MLP(config)
        names = (("input_layernorm", "post_attention_layernorm") if self.norm_first
                 else ("post_attention_layernorm", "post_feedforward_layernorm"))
        for name in names:
            setattr(self, name, RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend) -> Tensor:
        if self.norm_first:
            x = x + self.self_attn(self.input_layernorm(x), rope, attend)
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(self.self_attn(x, rope, attend))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class Transformer(nn.Module):
    """Embedding, layers, norm and head; module names are Hugging Face's, so the state dict is the file format.

    recompute: in training, keep each layer's input alone and compute the layer again for its backward pass.
    """

    recompute = False

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():  # 1/√D, smaller where layers add up; loading replaces it
            if weight.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=(config.hidden_size * (2 * config.num_hidden_layers if residual else 1)) ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def hidden(self, input_ids: Tensor, positions: Tensor, attend) -> Tensor:
        """Final hidden states [T, D] of the flat tokens input_ids [T] at positions [T].

        attend: the file's one idea. attend.mask(window, share, dtype) is asked once for each kind of layer, where `share` heads
        of q meet one of k, and attend(layer, mask, q, k, v) once for each layer: [T, H, d] from q [T, H, d] and k, v [T, G, d].
        """
        x = self.model.embed_tokens(input_ids)
        rope = rope_tables(self.config, positions, x.dtype)
        windows = [self.config.window(layer) for layer in range(self.config.num_hidden_layers)]
        share = self.config.num_attention_heads // self.config.num_key_value_heads
        masks = {window: attend.mask(window, share, x.dtype) for window in set(windows)}
        for i, (layer, window) in enumerate(zip(self.model.layers, windows)):
            inputs = x, rope[window is not None], partial(attend, i, masks[window])
            x = checkpoint(layer, *inputs, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else layer(*inputs)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Projects hidden states [T, D] onto the vocabulary, [T, V]."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return linear(hidden, head.weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Next-token logits [B, T, V] of input_ids [B, T], int64, every row a full sequence without padding."""
        rows = Packed([input_ids.shape[1]] * input_ids.shape[0], input_ids.device)
        hidden = self.hidden(input_ids.flatten(), rows.positions, rows)
        return self.logits(hidden).view(*input_ids.shape, -1)

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype | None = None,
                        device: str | torch.device = "cpu") -> "Transformer":
        """Loads a Hugging Face directory, tensor by tensor, so that the weights are never held twice.

        dtype: float32, bfloat16 or float16; None keeps what the files hold.
        Raises ModelError for a directory that is no supported model, a file that cannot be read,
        and a tensor that is missing, unexpected or of the wrong shape.
        """
        directory = Path(directory)
        with torch.device("meta"):  # shapes only
            model = cls(Config.from_pretrained(directory))
        expected, tensors = model.state_dict(), {}
        for path in weight_files(directory):
            try:
                with safe_open(path, framework="pt", device=str(device)) as file:
                    for name in file.keys():
                        if name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight" and model.config.tie_word_embeddings:
                            continue  # written by some exporters, and recomputed or tied by every reader
                        check_tensor(path, name, file.get_slice(name), expected)
                        tensor = file.get_tensor(name)
                        tensors[name] = tensor if dtype is None else tensor.to(dtype)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: not a readable safetensors file ({error})") from None
        if missing := sorted(expected.keys() - tensors.keys()):
            raise ModelError(f"{directory}: {len(missing)} tensors are missing, the first is {missing[0]}")
        model.load_state_dict(tensors, assign=True)
        return model.requires_grad_(True)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors; each is complete or absent, and config.json comes last."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, directory / "model.safetensors.tmp", metadata={"format": "pt"})
        dtype = str(self.model.embed_tokens.weight.dtype).removeprefix("torch.")
        (directory / "config.json.tmp").write_text(json.dumps(self.config.to_dict() | {"torch_dtype": dtype}, indent=2) + "\n")
        for name in ("model.safetensors", "config.json"):
            os.replace(directory / f"{name}.tmp", directory / name)


def weight_files(directory: Path) -> list[Path]:
    """The directory's safetensors files: the shards that the index names, or the single file."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) and s == Path(s).name for s in shards.values()):
            raise ModelError(f"{index}: weight_map must map tensor names to file names in the same directory")
        files = [directory / shard for shard in sorted(set(shards.values()))]
    else:
        files = [single]
    for path in files:
        if not path.is_file():
            raise ModelError(f"{directory}: {path.name} is missing; weights are read from safetensors files alone "
                             "(pickles are never opened)")
    return files


def check_tensor(path: Path, name: str, stored, expected: dict[str, Tensor]) -> None:
    if name not in expected:
        raise ModelError(f"{path}: unexpected tensor {name}; config.json describes a network without it")
    if list(stored.get_shape()) != list(expected[name].shape):
        raise ModelError(f"{path}: tensor {name} has shape {list(stored.get_shape())}, "
                         f"config.json asks for {list(expected[name].shape)}")
    if stored.get_dtype() not in ("F32", "F16", "BF16"):
        raise ModelError(f"{path}: tensor {name} is stored as {stored.get_dtype()}; only F32, F16 and BF16 are read")


# ----------------------------------------------------------------------------- who sees whom

def padded_index(lengths: list[int], starts: list[int], device: torch.device) -> Tensor:
    """Flat token index [B, max length] of the sequences at `starts`; padding points at token 0, which is always there."""
    steps = torch.arange(max(lengths), device=device)
    lengths, starts = torch.tensor(lengths, device=device), torch.tensor(starts, device=device)
    return (starts[:, None] + steps) * (steps < lengths[:, None])


def gather(x: Tensor, index: Tensor) -> Tensor:
    """[T, H, d] -> [B, H, S, d] by index [B, S]."""
    return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]).transpose(1, 2)


def scatter(x: Tensor, flat: Tensor) -> Tensor:
    """[B, H, S, d] -> [T, H, d], taking the rows flat [T] of the padded [B * S]."""
    return x.transpose(1, 2).flatten(0, 1).index_select(0, flat)


def unpadded(lengths: list[int], device: torch.device) -> Tensor:
    """Where each token of the flat list stands in the padded [B * max length], [T]."""
    width = max(lengths)
    return torch.tensor([row * width + t for row, n in enumerate(lengths) for t in range(n)], device=device)


NEVER = torch.iinfo(torch.long).max  # the position of padding among the keys: later than every query


def key_positions(lengths: Tensor, width: int, own: int) -> Tensor:
    """Positions [N, width + own] of the keys a row sees: its prompt's, of `lengths` [N], then its own, which follow them."""
    prompt, later = torch.arange(width, device=lengths.device), torch.arange(own, device=lengths.device)
    return torch.cat([torch.where(prompt < lengths[:, None], prompt, NEVER), lengths[:, None] + later], dim=1)


def visible(queries: Tensor, keys: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """What to add to the scores [N, Q, S] of queries and keys at positions [N, Q] and [N, S]: 0 for the past, or a window
    of it, and −∞ for the rest."""
    age = queries[:, :, None] - keys[:, None]
    seen = age >= 0 if window is None else (age >= 0) & (age < window)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention [B, H, Q, d] of q [B, H, Q, d] to k, v [B, G, S, d], with mask [B, H/G · Q, S] added to the scores."""
    share = q.shape[1] // k.shape[1]
    q = q.unflatten(1, (-1, share)).flatten(2, 3)  # heads that share keys stand below each other: [B, G, H/G · Q, d]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    return out.unflatten(2, (share, -1)).flatten(1, 2)


class Packed:
    """Causal attention within each of several sequences that lie end to end. `keep=True` keeps keys and values."""

    def __init__(self, lengths: list[int], device: torch.device, keep: bool = False):
        self.index = padded_index(lengths, list(accumulate(lengths, initial=0))[:-1], device)  # [B, P]
        self.flat = unpadded(lengths, device)  # [T]
        self.positions = torch.tensor([t for n in lengths for t in range(n)], device=device)  # [T]
        self.kept = [] if keep else None  # per layer: keys, values [B, G, P, d]

    def mask(self, window: int | None, share: int, dtype: torch.dtype) -> Tensor | None:
        """[1, P, P], or None where attention is causal and nothing more."""
        steps = torch.arange(self.index.shape[1], device=self.index.device)[None]
        return None if window is None or window >= steps.shape[1] else visible(steps, steps, window, dtype)

    def __call__(self, layer: int, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (gather(x, self.index) for x in (q, k, v))
        if self.kept is not None:
            self.kept.append((k, v))
        # padding stands on the right, where causal attention never looks
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return scatter(out, self.flat)


class Tree:
    """K completions branch off each prompt: all of them attend to one copy of its keys and values.

    The flat list holds every prompt, then every completion but for its last token, which predicts nothing: P + K·C
    tokens where K copies of the prompt would cost K·(P + C). The plain way stands beside it in tests/test_model.py.

    prompts: B lists of ids; completions: B lists of K lists of ids, none empty.
    input_ids, positions [T]; targets [M]: the completion tokens in order; predicts [M]: the flat token that predicts each.
    """

    def __init__(self, prompts: list[list[int]], completions: list[list[list[int]]], device: torch.device):
        owner = [b for b, group in enumerate(completions) for _ in group]  # the prompt of each completion
        inputs = [branch[:-1] for group in completions for branch in group]
        lengths = [len(prompt) for prompt in prompts]
        self.prompts = Packed(lengths, device)
        self.tokens = sum(lengths)  # prompt tokens come first
        starts = list(accumulate((len(ids) for ids in inputs), initial=self.tokens))
        ends = list(accumulate(lengths))  # one past each prompt
        self.input_ids = torch.tensor([token for ids in prompts + inputs for token in ids], device=device)
        self.positions = torch.tensor([t for n in lengths for t in range(n)]
                                      + [lengths[b] + t for b, ids in zip(owner, inputs) for t in range(len(ids))], device=device)
        self.targets = torch.tensor([token for group in completions for branch in group for token in branch], device=device)
        self.predicts = torch.tensor([i for b, start, ids in zip(owner, starts, inputs)
                                      for i in (ends[b] - 1, *range(start, start + len(ids)))], device=device)
        widths = [len(ids) for ids in inputs]
        self.branch = None if max(widths) == 0 else padded_index(widths, starts[:-1], device)  # [N, C]
        if self.branch is not None:
            owner, self.flat = torch.tensor(owner, device=device), unpadded(widths, device)
            width, length = self.branch.shape[1], torch.tensor(lengths, device=device)[owner]  # C, [N]
            self.path = torch.cat([self.prompts.index[owner], self.branch], dim=1)  # [N, P + C]: a completion's keys in the flat list
            self.queries = length[:, None] + torch.arange(width, device=device)  # [N, C]
            self.keys = key_positions(length, max(lengths), width)  # [N, P + C]

    def mask(self, window: int | None, share: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Of the prompts, and of the completions [N, H/G · C, P + C]."""
        branch = None if self.branch is None else visible(self.queries, self.keys, window, dtype).repeat(1, share, 1)
        return self.prompts.mask(window, share, dtype), branch

    def __call__(self, layer: int, masks: tuple[Tensor | None, Tensor | None], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prompt = self.prompts(layer, masks[0], q[:self.tokens], k[:self.tokens], v[:self.tokens])
        if self.branch is None:
            return prompt
        # gathering repeats a prompt's keys, and sums their gradients
        out = attention(gather(q, self.branch), gather(k, self.path), gather(v, self.path), masks[1])
        return torch.cat([prompt, scatter(out, self.flat)])


class Decode:
    """The cache of the sampler: a prompt's keys, once, and after them room for those of all its samples' tokens to come.

    Rows stand by prompt, [B, K], padded where a prompt has fewer left than another. All rows of a prompt meet all its keys
    in one product, and a mask leaves each its own: decoding waits for what it reads, and that is read once.
    Finished rows are dropped, and so are prompts without a row.
    """

    def __init__(self, prefill: Packed, lengths: list[int], samples: int, room: int):
        device, self.width, self.room = prefill.index.device, prefill.index.shape[1], room
        self.owner = torch.arange(len(lengths), device=device).repeat_interleave(samples)  # [N]: the prompt of each row
        self.lengths = torch.tensor(lengths, device=device)[self.owner]  # [N]: of each row's prompt
        self.positions = self.lengths.clone()  # [N]: of the token that comes next
        self.used, self.end, self.step = 0, 0, None
        self.cache = []  # L x (keys, values) [B, G, P + room · K, d]
        while prefill.kept:  # layer by layer, so that only one is ever held twice
            self.cache.append(tuple(F.pad(x, (0, 0, 0, room * samples)) for x in prefill.kept.pop(0)))
        self.place_rows()

    def place_rows(self) -> None:
        """Where rows stand: index [B, K] and flat [N], padded like the sequences of Packed; and what stands where in the cache."""
        counts, device = self.owner.bincount().tolist(), self.owner.device
        self.index = padded_index(counts, list(accumulate(counts, initial=0))[:-1], device)
        self.flat, samples = unpadded(counts, device), torch.arange(max(counts), device=device)
        self.slots = self.width + self.used * len(samples) + samples  # [K]: of the next token's keys
        keys, mine = key_positions(self.lengths, self.width, self.room), samples == self.flat[:, None, None] % len(samples)
        own = torch.where(mine, keys[:, self.width:, None], NEVER)  # [N, room, K]
        self.keys = torch.cat([keys[:, :self.width], own.flatten(1)], dim=1)  # [N, P + room · K]

    def keep(self, rows: Tensor) -> None:
        """Drops every row but `rows` [N'], layer by layer."""
        old, samples = self.flat[rows], self.index.shape[1]
        prompts, self.owner = self.owner[rows].unique(return_inverse=True)
        self.lengths, self.positions, self.step = self.lengths[rows], self.positions[rows], None
        self.place_rows()
        b, k = old[self.index] // samples, old[self.index] % samples  # [B', K']
        for layer, pair in enumerate(self.cache):
            own = (x[:, :, self.width:].unflatten(2, (-1, samples))[b, :, :, k] for x in pair)  # [B', K', G, room, d]
            self.cache[layer] = tuple(torch.cat([x[prompts, :, :self.width], new.permute(0, 2, 3, 1, 4).flatten(2, 3)], dim=2)
                                      for x, new in zip(pair, own))

    def advance(self, model: Transformer, tokens: Tensor) -> Tensor:
        """Appends tokens [N]; returns the logits [N, V] of their successors."""
        end = min(self.room, (self.used // STEPS + 1) * STEPS)  # shapes stay the same for STEPS tokens
        if self.step is None or end != self.end:
            self.end = end
            self.step = recorded(lambda tokens: model.logits(model.hidden(tokens, self.positions, self)), tokens)
        logits = self.step(tokens)
        self.used += 1
        self.slots.add_(len(self.slots)), self.positions.add_(1)
        return logits

    def mask(self, window: int | None, share: int, dtype: torch.dtype) -> Tensor:
        """[B, H/G · K, P + C · K]"""
        keys = self.keys[:, :self.width + self.end * len(self.slots)]
        return visible(self.positions[:, None], keys, window, dtype)[self.index, 0].repeat(1, share, 1)

    def __call__(self, layer: int, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (gather(x, self.index) for x in (q, k, v))  # [B, H, K, d], twice [B, G, K, d]
        keys, values = self.cache[layer]
        keys.index_copy_(2, self.slots, k)
        values.index_copy_(2, self.slots, v)
        seen = mask.shape[-1]
        return scatter(attention(q, keys[:, :, :seen], values[:, :, :seen], mask), self.flat)


STEPS = 32  # decoding steps of one shape


def recorded(step, tokens: Tensor):
    """The function step(tokens) as a CUDA graph: its kernels are so short that launching each costs more than running it.

    Where there is no GPU, or the graph cannot be recorded, the function itself.
    """
    if not tokens.is_cuda:
        return step
    fixed, side, graph = tokens.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    try:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(fixed)  # the libraries set themselves up on the first call; it writes to the slot that the graph writes again
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            out = step(fixed)
    except RuntimeError as error:
        warnings.warn(f"no CUDA graph for the sampler ({str(error).splitlines()[0]}): it decodes kernel by kernel")
        return step

    def replay(tokens: Tensor) -> Tensor:
        fixed.copy_(tokens)
        graph.replay()
        return out
    return replay


# ----------------------------------------------------------------------------- the sampler

def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Draws a token per row of logits [N, V]: temperature, then the k likeliest, then the nucleus of mass p. [N]"""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of the likelier tokens
        logits = logits.scatter(-1, order, ordered.masked_fill(before >= top_p, -torch.inf))
    # by inverting the distribution function: one random number a row, where torch.multinomial draws one for each of V
    mass = logits.softmax(-1).double().cumsum(-1)
    drawn = torch.rand(len(mass), 1, dtype=torch.double, device=mass.device, generator=generator) * mass[:, -1:]
    return torch.searchsorted(mass, drawn, right=True)[:, 0]  # the first token with more mass up to it; never one of mass zero


@torch.inference_mode()
def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, eos_ids: list[int] | tuple[int, ...] = (), num_samples: int = 1,
             generator: torch.Generator | None = None) -> list[list[int]]:
    """Samples completions of token-id prompts of any lengths; each prompt is computed once, whatever num_samples.

    temperature: 0 is greedy; top_k: 0 is off; top_p: 1 is off; eos_ids: tokens that end a completion;
    generator: on the model's device, None uses torch's global one.
    Returns len(prompts) * num_samples lists of ids, the samples of a prompt together, without the prompt,
    with the end token where one was sampled (a list without one was cut off at max_new_tokens).
    Raises ModelError for arguments that make no sense.
    """
    if not prompts or not all(prompts):
        raise ModelError("generate: every prompt needs at least one token")
    if max_new_tokens < 1 or num_samples < 1 or not temperature >= 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ModelError(f"generate: out of range: max_new_tokens={max_new_tokens}, num_samples={num_samples}, "
                         f"temperature={temperature}, top_k={top_k}, top_p={top_p}")
    lengths = [len(prompt) for prompt in prompts]
    prefill = Packed(lengths, model.device, keep=True)
    flat = torch.tensor([token for prompt in prompts for token in prompt], device=model.device)
    hidden = model.hidden(flat, prefill.positions, prefill)
    last = torch.tensor(lengths, device=model.device).cumsum(0) - 1
    logits = model.logits(hidden[last]).repeat_interleave(num_samples, dim=0)  # [N, V]
    cache = Decode(prefill, lengths, num_samples, max_new_tokens)

    out = torch.zeros(len(logits), max_new_tokens, dtype=torch.long, device=model.device)
    count = torch.full((len(logits),), max_new_tokens, device=model.device)
    ends = torch.tensor(list(eos_ids), dtype=torch.long, device=model.device)
    rows = torch.arange(len(logits), device=model.device)  # the completions that the cache still holds
    running = torch.ones(len(logits), dtype=torch.bool, device=model.device)
    for step in range(max_new_tokens):
        tokens = sample(logits, temperature, top_k, top_p, generator)
        out[rows, step] = tokens
        ended = torch.isin(tokens, ends) & running
        count[rows[ended]] = step + 1
        running &= ~ended
        alive = int(running.sum())
        if alive == 0 or step + 1 == max_new_tokens:
            break
        if alive <= 0.75 * len(rows):  # finished rows stop costing; a copy for every single one would cost more
            kept = running.nonzero()[:, 0]
            rows, tokens, running = rows[kept], tokens[kept], running[kept]
            cache.keep(kept)
        logits = cache.advance(model, tokens)
    return [ids[:n] for ids, n in zip(out.tolist(), count.tolist())]
