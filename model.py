"""A decoder-only transformer, its KV cache and its sampler, from scratch.

Reads and writes Hugging Face directories (config.json and *.safetensors) of four families:

    llama    Llama 2 and 3, SmolLM2 (llama3 and yarn rope scaling included)
    qwen2    Qwen2, Qwen2.5: the same, with a bias on the q, k and v projections
    qwen3    Qwen3: the same, with an RMSNorm on each head of q and k
    olmo3    OLMo 3: RMSNorm on all of q and k, and on what attention and MLP put out instead of
             what they take in; three layers of four look back over a sliding window

One idea shapes the file. Everything but attention treats tokens one at a time, so the tokens of
all sequences lie end to end in one flat list [T], without padding, and an `Attend` object knows
which token sees which. There are three:

    Packed         several sequences side by side: the plain forward pass and the prefill
    SharedPrefix   K completions that branch off one prompt, which is computed once for all
    KVCache        one new token of each completion, which looks back at stored keys and values

Shapes: T tokens, B prompts, N completions, K completions of one prompt, P and C tokens of the
longest prompt and completion, H query heads, G key-value heads, D hidden size, d head size,
V vocabulary.
"""

import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from files import BadInput, finite, from_json, read_object, replacing, within, write_text
from ranks import is_sharded, whole


class NotFinite(BadInput):
    """Logits that hold NaN or infinity. prompt: the token ids that they come after."""

    def __init__(self, message: str, prompt: list[int]):
        super().__init__(message)
        self.prompt = prompt


# --------------------------------------------------------------------------------- configuration

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
                 "qwen3": "Qwen3ForCausalLM", "olmo3": "Olmo3ForCausalLM"}
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass
class Config:
    """The part of config.json that the forward pass depends on, in Hugging Face's own names.

    Raises BadInput for numbers that do not go together.
    """

    model_type: str
    vocab_size: int = within(1, 2 ** 24)
    hidden_size: int = within(1, 2 ** 20)
    intermediate_size: int = within(1, 2 ** 24)
    num_hidden_layers: int = within(1, 1024)
    num_attention_heads: int = within(1, 2 ** 12)
    num_key_value_heads: int = within(0, 2 ** 12, default=0)  # 0 is num_attention_heads
    head_dim: int = within(0, 2 ** 12, default=0)  # 0 is hidden_size / heads, qwen3: 128
    max_position_embeddings: int = within(1, 2 ** 31, default=2048)
    rms_norm_eps: float = within(0, 0.01, default=1e-6)
    rope_theta: float = within(2, 1e12, default=10000.0)
    rope_scaling: dict | None = None  # {"rope_type": "llama3" or "yarn", and its parameters}
    sliding_window: int | None = within(1, 2 ** 31, default=None)  # olmo3: itself included
    layer_types: list[str] | None = None  # olmo3: SLIDING or FULL for each layer
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        heads = self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        default = 128 if self.model_type == "qwen3" else self.hidden_size // heads
        self.head_dim = self.head_dim or default
        if heads % self.num_key_value_heads or self.head_dim % 2 or not self.head_dim:
            raise BadInput(f"{heads} heads of size {self.head_dim} cannot share "
                           f"{self.num_key_value_heads} key-value heads")
        types = self.layer_types or []
        if self.model_type != "olmo3":
            if set(types) - {FULL}:
                raise BadInput(f"layer_types = {types} is not supported")
            self.sliding_window = self.layer_types = None
        elif (self.sliding_window is None or len(types) != self.num_hidden_layers
              or set(types) - {SLIDING, FULL}):
            raise BadInput(f"olmo3 needs a sliding_window and layer_types, "
                           f"{SLIDING!r} or {FULL!r} for each layer")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Config":
        """Reads directory/config.json.

        Raises BadInput if it is missing or broken, or describes a network that this file does
        not compute.
        """
        path = Path(directory) / "config.json"
        raw = read_object(path, required=True)
        refuse_variants(path, raw)
        if raw["model_type"] == "olmo3":  # It has other defaults in the reference library.
            raw = {"rms_norm_eps": 1e-5, "rope_theta": 5e5} | raw
        raw["rope_theta"], raw["rope_scaling"] = rope_parameters(path, raw)
        return from_json(cls, raw, str(path))

    def window(self, layer: int) -> int | None:
        """How many tokens the layer sees, itself included; None where it sees all."""
        sliding = self.layer_types and self.layer_types[layer] == SLIDING
        return self.sliding_window if sliding else None

    def to_dict(self) -> dict:
        """The config.json that the reference library reads back as the same network."""
        raw = asdict(self)
        if self.layer_types:  # Transformers 5.23 reads the sliding layers' theta only from here.
            plain = {"rope_type": "default", "rope_theta": self.rope_theta}
            raw["rope_parameters"] = {FULL: plain | (self.rope_scaling or {}), SLIDING: plain}
        else:
            del raw["sliding_window"], raw["layer_types"]
        return raw | {"architectures": [ARCHITECTURES[self.model_type]], "hidden_act": "silu",
                      "attention_bias": False, "use_sliding_window": False}


def refuse_variants(path: Path, raw: dict) -> None:
    """Refuses other families, and options of the known ones that would change the network."""
    family = raw.get("model_type")
    if family not in list(ARCHITECTURES):  # A dict would ask for the hash, which a list lacks.
        raise BadInput(f"{path}: model family {family!r} is not supported; "
                       f"supported are {', '.join(ARCHITECTURES)}")
    refused = {
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": raw.get("attention_bias"),
        "mlp_bias": raw.get("mlp_bias"),
        "use_sliding_window": raw.get("use_sliding_window"),
        "quantization_config": raw.get("quantization_config"),
        "partial_rotary_factor": raw.get("partial_rotary_factor", 1) != 1}
    for name, value in refused.items():
        if value:
            raise BadInput(f"{path}: {name} = {raw[name]!r} is not supported")


@dataclass
class Rope:
    """What config.json says of a rotary embedding of any kind."""

    rope_type: str | None = None
    type: str = "default"  # the older name
    rope_theta: float | None = None
    partial_rotary_factor: float = within(1, 1, default=1)

    @property
    def kind(self) -> str:
        return self.rope_type or self.type


@dataclass
class Llama3:
    """What config.json says besides where the kind is llama3."""

    factor: float = within(1, 1e6)
    low_freq_factor: float = within(1e-6, 1e6)
    high_freq_factor: float = within(1e-6, 1e6)
    original_max_position_embeddings: int = within(1, 2 ** 31)

    def __post_init__(self):
        if self.low_freq_factor >= self.high_freq_factor:
            raise BadInput("low_freq_factor should be less than high_freq_factor")


@dataclass
class Yarn:
    """What config.json says besides where the kind is yarn."""

    factor: float = within(1, 1e6)
    original_max_position_embeddings: int = within(1, 2 ** 31)
    attention_factor: float = within(1e-6, 1e6, default=0)  # 0 is yarn's own, 0.1 ln(factor) + 1
    beta_fast: float = within(1e-6, 1e6, default=32)
    beta_slow: float = within(1e-6, 1e6, default=1)

    def __post_init__(self):
        self.attention_factor = self.attention_factor or 0.1 * math.log(self.factor) + 1


SCALINGS = {"llama3": Llama3, "yarn": Yarn}


def rope_parameters(path: Path, raw: dict) -> tuple[float, dict | None]:
    """(theta, scaling), from `rope_parameters` (transformers 5) or the older `rope_theta` and
    `rope_scaling`. olmo3 has a set for each layer type; its sliding layers are never scaled."""
    where = f"{path}: rotary embedding"
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    full, sliding = given, {}
    if isinstance(given, dict):
        full, sliding = given.get(FULL, given), given.get(SLIDING, {})
    rope, windowed = from_json(Rope, full, where), from_json(Rope, sliding, where)
    theta = raw.get("rope_theta", 10000.0) if rope.rope_theta is None else rope.rope_theta
    names = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    scaling = {}
    if rope.kind in SCALINGS:
        scaling = asdict(from_json(SCALINGS[rope.kind], full, where))
    unknown = rope.kind != "default" and full.keys() - scaling.keys() - names
    if (rope.kind not in {"default", *SCALINGS} or unknown or windowed.kind != "default"
            or windowed.rope_theta not in (None, theta)):
        raise BadInput(f"{where} {given!r} is not supported; 'default', 'llama3' and 'yarn' are")
    return theta, {"rope_type": rope.kind} | scaling if scaling else None


# ---------------------------------------------------------------------------- rotary embedding

def rope_frequencies(config: Config, scaling: dict | None, device: torch.device) -> Tensor:
    """Rotation speed of each pair of dimensions, float32 [d/2]: θ^(−2i/d) for pair i.

    Scaling divides the speed of slow pairs by `factor` and leaves that of fast ones as it is.
    """
    pair = torch.arange(config.head_dim // 2, device=device, dtype=torch.float32)
    speed = config.rope_theta ** (-2 * pair / config.head_dim)
    if scaling is None:
        return speed
    keep = (llama3_unscaled(speed, scaling) if scaling["rope_type"] == "llama3"
            else yarn_unscaled(pair, config, scaling))
    return keep * speed + (1 - keep) * speed / scaling["factor"]


def llama3_unscaled(speed: Tensor, scaling: dict) -> Tensor:
    """Share of each pair's speed that stays, [d/2]: linear in its turns in the old context."""
    turns = scaling["original_max_position_embeddings"] * speed / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    return ((turns - low) / (high - low)).clamp(0, 1)


def yarn_unscaled(pair: Tensor, config: Config, scaling: dict) -> Tensor:
    """The same share as yarn has it: linear in the pair's index, from beta_fast to beta_slow."""
    def index(turns: float) -> float:  # of the pair that turns so often in the old context
        speed = turns * 2 * math.pi / scaling["original_max_position_embeddings"]
        return -config.head_dim / 2 * math.log(speed, config.rope_theta)
    low = max(math.floor(index(scaling["beta_fast"])), 0)
    high = min(math.ceil(index(scaling["beta_slow"])), config.head_dim - 1)
    return 1 - ((pair - low) / max(high - low, 0.001)).clamp(0, 1)


def rope_table(config: Config, positions: Tensor, window: int | None,
               dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, signed_sin) [T, 1, d] for `rotate`, of positions [T] in layers with that window.

    signed_sin is −sin in the first half of the dimensions and sin in the second. The sign is that
    of the textbook's rotate_half, put in here once instead of in every layer.
    """
    scaling = config.rope_scaling if window is None else None  # Sliding layers are never scaled.
    speed = rope_frequencies(config, scaling, positions.device)
    angle = torch.outer(positions.float(), speed)[:, None]  # [T, 1, d/2]
    factor = (scaling or {}).get("attention_factor", 1.0)  # Yarn stretches both q and k by it.
    cos, sin = angle.cos() * factor, angle.sin() * factor
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary embedding [T, H, d] of heads x [T, H, d]: the pair (a, b) of dimensions i and i + d/2
    becomes (a cos − b sin, b cos + a sin)."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # (b, a)
    return x * cos + swapped * signed_sin


# ----------------------------------------------------------------------------------- the network

class Attend(Protocol):
    """Which token sees which: attention is the one place where the tokens of a pass meet.

    Packed, SharedPrefix and KVCache implement it, and Transformer.hidden calls it.
    """

    def mask(self, window: int | None, queries_per_key: int, dtype: torch.dtype) -> Any:
        """The causal mask of the layers that look back over `window` tokens (None: over all).

        It is asked for once in a pass for each window, and handed to __call__ as it is.
        queries_per_key: H/G. Query heads that share a key-value head are stacked as further rows of
        its queries (`attention`), and the mask is repeated for them; dtype: that of the scores.
        """

    def __call__(self, layer: int, mask: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention of the layer with this index: [T, H, d] from q [T, H, d] and
        k, v [T, G, d]."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b in the dtype of x: [T, out] from x [T, in], weight [out, in] and bias [out]."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if x.device.type != "cpu" or len(x) > 32:
        return F.linear(x, weight, bias)
    out = (weight @ x.T).T  # With few rows, a CPU is 2 to 3 times as fast this way round.
    return out if bias is None else out + bias


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LoRALinear(nn.Module):
    """y = W x + b + (α/r) B A x: W [out, in] and b stay, A [r, in] and B [out, r] are learned.

    B starts at zero, so the layer starts as it was. A and B are float32 masters, cast to the dtype
    of x as W is. (LoRA, arXiv 2106.09685, Section 4.1.)
    """

    def __init__(self, frozen: Linear, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias, self.scale = frozen.weight, frozen.bias, alpha / rank
        outputs, inputs = frozen.weight.shape
        device = frozen.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, device=device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, device=device))
        nn.init.uniform_(self.lora_A, -inputs ** -0.5, inputs ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        learned = linear(linear(x, self.lora_A), self.lora_B)
        return linear(x, self.weight, self.bias) + self.scale * learned

    def merged(self) -> Tensor:
        """W + (α/r) B A, in the dtype of W and on the CPU, where there is room for a copy."""
        learned = self.lora_B.detach() @ self.lora_A.detach()
        return (self.weight + self.scale * learned).to(self.weight.dtype).cpu()


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if x.dtype.itemsize >= 4:
            return F.rms_norm(x, x.shape[-1:], weight, self.eps)
        # The mean of squares needs float32.
        return weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        bias = config.model_type == "qwen2"
        self.q_proj = Linear(config.hidden_size, q_size, bias=bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=False)
        per_head = config.model_type == "qwen3"
        if per_head or config.model_type == "olmo3":
            self.q_norm = RMSNorm(config.head_dim if per_head else q_size, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim if per_head else kv_size, config.rms_norm_eps)

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q [T, H, d] and k [T, G, d] after the RMSNorm, if any: over each head (qwen3), or over
        all of them together (olmo3)."""
        if not hasattr(self, "q_norm"):
            return q, k
        if self.q_norm.weight.numel() == self.head_dim:
            return self.q_norm(q), self.k_norm(k)
        return self.q_norm(q.flatten(1)).view_as(q), self.k_norm(k.flatten(1)).view_as(k)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
        """[T, D] from x [T, D]. attend: an Attend that already has its layer and mask."""
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in projections)
        q, k = self.normed(q, k)
        out = attend(rotate(q, *rope), rotate(k, *rope), v)  # [T, H, d]
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
    """x + attention(norm(x)), then x + mlp(norm(x)).

    In olmo3 x + norm(attention(x)), then x + norm(mlp(x)).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.norm_first = config.model_type != "olmo3"
        self.self_attn, self.mlp = Attention(config), MLP(config)
        if self.norm_first:
            self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not self.norm_first:
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
        if self.norm_first:
            x = x + self.self_attn(self.input_layernorm(x), rope, attend)
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(self.self_attn(x, rope, attend))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class Embedding(nn.Embedding):
    """nn.Embedding, which draws no values on the device `meta`.

    PyTorch would load its compiler to draw them there, which takes seconds.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Transformer(nn.Module):
    """Embedding, layers, norm and head.

    Module names are Hugging Face's, so the state dict is the file format.
    """

    recompute = False  # Activation checkpointing: keep each layer's input alone for the gradient.
    compute_dtype: torch.dtype | None = None  # None computes in the dtype of the weights.

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.is_meta:
                continue  # It has a shape and no values.
            if weight.dim() == 2:  # The deviation is 1/√D, and less for what the residual adds up.
                adds_up = name.endswith(("o_proj.weight", "down_proj.weight"))
                terms = 2 * config.num_hidden_layers if adds_up else 1
                nn.init.normal_(weight, std=(config.hidden_size * terms) ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def hidden(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Final hidden states [T, D], in the computing dtype, of a flat list of tokens.

        input_ids, positions: int64 [T]; attend: knows which token sees which.
        """
        x = self.model.embed_tokens(input_ids)  # [T, D]
        x = x.to(self.compute_dtype or x.dtype)
        windows = [self.config.window(layer) for layer in range(self.config.num_hidden_layers)]
        queries_per_key = self.config.num_attention_heads // self.config.num_key_value_heads
        ropes = {w: rope_table(self.config, positions, w, x.dtype) for w in set(windows)}
        masks = {w: attend.mask(w, queries_per_key, x.dtype) for w in set(windows)}
        for i, (layer, window) in enumerate(zip(self.model.layers, windows)):
            inputs = x, ropes[window], partial(attend, i, masks[window])
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Projects hidden states [T, D] onto the vocabulary, [T, V]."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return linear(hidden, head.weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Next-token logits [B, T, V] of input_ids, int64 [B, T], rows without padding."""
        rows = Packed([input_ids.shape[1]] * input_ids.shape[0], input_ids.device)
        hidden = self.hidden(input_ids.flatten(), rows.positions, rows)
        return self.logits(hidden).view(*input_ids.shape, -1)

    def add_adapters(self, rank: int, alpha: float) -> None:
        """Freezes the network and puts a LoRALinear in place of every linear layer but the head.

        rank: r, the inner size of an adapter; alpha: its output is multiplied by alpha / r.
        """
        self.requires_grad_(False)
        for block in list(self.model.layers.modules()):
            for name, child in block.named_children():
                if isinstance(child, Linear):
                    setattr(block, name, LoRALinear(child, rank, alpha))

    def adapters(self) -> dict[str, LoRALinear]:
        """The adapters by the name of the layer that each belongs to."""
        return {name: module for name, module in self.named_modules()
                if isinstance(module, LoRALinear)}

    def for_inference(self) -> "Transformer":
        """The whole network with its weights stored in the computing dtype, to sample from and to
        save.

        Returns a copy without gradients, or self where the weights are stored like that already.
        Adapters are small and stay in float32. Of a sharded network every rank has to ask for it.
        """
        dtype = self.compute_dtype
        stored = (w.dtype for name, w in self.named_parameters() if "lora" not in name)
        if not is_sharded(self) and (dtype is None or all(found == dtype for found in stored)):
            return self
        weights = {name: w.detach() if "lora" in name else w.detach().to(dtype)
                   for name, w in self.state_dict().items()}
        copy = self.outline().requires_grad_(False)
        copy.load_state_dict({name: whole(w) for name, w in weights.items()}, assign=True)
        return copy

    def outline(self) -> "Transformer":
        """The same network, adapters included, whose tensors have shapes and no memory."""
        with torch.device("meta"):
            outline = Transformer(self.config)
            if adapted := self.adapters():
                one = next(iter(adapted.values()))
                rank = len(one.lora_A)
                outline.add_adapters(rank, one.scale * rank)
        for weight, own in zip(outline.parameters(), self.parameters()):
            weight.data = weight.data.to(own.dtype)
        outline.compute_dtype, outline.recompute = self.compute_dtype, self.recompute
        return outline

    @classmethod
    def from_weights(cls, config: Config, weights: dict[str, Tensor]) -> "Transformer":
        """The network that holds these very tensors; they must be those of its state dict."""
        with torch.device("meta"):  # Modules on this device have shapes and no memory.
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        return model

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype | None = None,
                        device: str | torch.device = "cpu") -> "Transformer":
        """Loads a Hugging Face directory, tensor by tensor, never holding the weights twice.

        dtype: float32, bfloat16 or float16; None keeps what the files hold.
        Raises BadInput for a directory that is no supported model, a file that cannot be read,
        and a tensor that is missing, unexpected, of the wrong shape or not finite.
        """
        directory = Path(directory)
        config = Config.from_pretrained(directory)
        with torch.device("meta"):
            expected = cls(config).state_dict()
        tied, weights = {}, {}
        if config.tie_word_embeddings:  # Some exporters write the head all the same.
            tied = {"lm_head.weight": expected["model.embed_tokens.weight"]}
        for path in weight_files(directory):
            weights |= read_weights(path, expected | tied, dtype, device)
        if missing := sorted(expected.keys() - weights.keys()):
            raise BadInput(f"{directory}: {len(missing)} tensors are missing, "
                           f"the first is {missing[0]}")
        for head in tied.keys() & weights.keys():
            if not (weights.pop(head) == weights["model.embed_tokens.weight"]).all():
                raise BadInput(f"{directory}: config.json ties {head} to the embedding, and the "
                               "files hold two that differ; set tie_word_embeddings to false there "
                               "if the head is meant")
        return cls.from_weights(config, weights)

    def merged(self) -> dict[str, Tensor]:
        """The state dict of the network without adapters that computes the same."""
        adapted, weights = self.adapters(), {}
        for name, weight in self.state_dict().items():
            layer, _, part = name.rpartition(".")
            if layer in adapted and part == "weight":
                weights[name] = adapted[layer].merged()
            elif not part.startswith("lora"):
                weights[name] = weight.detach().contiguous()
        return weights

    def save_adapter(self, directory: str | Path, base: str) -> None:
        """Writes the adapters alone, as the library `peft` reads them.

        base: the model that they belong to, a directory or a hub name.
        """
        directory, adapted = Path(directory), self.adapters()
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / "adapter_model.safetensors") as unfinished:
            save_file({f"base_model.model.{name}.{part}.weight": getattr(module, part).detach()
                       for name, module in adapted.items() for part in ("lora_A", "lora_B")},
                      unfinished, metadata={"format": "pt"})
        one = next(iter(adapted.values()))
        rank = len(one.lora_A)
        described = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "r": rank, "lora_alpha": one.scale * rank, "lora_dropout": 0.0, "bias": "none",
            "target_modules": sorted({name.rpartition(".")[2] for name in adapted})}
        write_text(directory / "adapter_config.json", json.dumps(described, indent=2) + "\n")

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes model.safetensors and then config.json; each is complete or as it was before.

        Adapters are merged into the weights that they belong to.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / "model.safetensors") as unfinished:
            save_file(self.merged(), unfinished, metadata={"format": "pt"})
        dtype = str(self.model.embed_tokens.weight.dtype).removeprefix("torch.")
        config = json.dumps(self.config.to_dict() | {"torch_dtype": dtype}, indent=2)
        write_text(directory / "config.json", config + "\n")


@dataclass
class Index:
    """model.safetensors.index.json: which file of the same directory holds which tensor."""

    weight_map: dict

    def __post_init__(self):
        if not all(isinstance(s, str) and s == Path(s).name for s in self.weight_map.values()):
            raise BadInput("weight_map must map tensor names to file names in the same directory")


def weight_files(directory: Path) -> list[Path]:
    """The directory's safetensors files: the single file, or the shards that the index names.

    Where there are both, the single file is read, as it is by transformers.
    """
    index, files = directory / "model.safetensors.index.json", [directory / "model.safetensors"]
    if os.path.lexists(index) and not os.path.isfile(files[0]):
        shards = from_json(Index, read_object(index), str(index)).weight_map
        files = [directory / shard for shard in sorted(set(shards.values()))]
    for path in files:
        if not os.path.isfile(path):  # Path.is_file raises where a name is too long.
            raise BadInput(f"{directory}: {path.name} is missing; weights are read from "
                           "safetensors files alone (pickles are never opened)")
    return files


def read_weights(path: Path, expected: dict[str, Tensor], dtype: torch.dtype | None,
                 device: str | torch.device) -> dict[str, Tensor]:
    """The tensors of one file by name. expected: those that it may hold, of these shapes."""
    weights = {}
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():
                if name.endswith("rotary_emb.inv_freq"):  # Every reader computes it itself.
                    continue
                check_tensor(path, name, file.get_slice(name), expected)
                weights[name] = file.get_tensor(name)
                if dtype is not None:
                    weights[name] = weights[name].to(dtype)
                finite(weights[name], name, str(path))
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a readable safetensors file ({error})") from None
    return weights


def check_tensor(path: Path, name: str, stored, expected: dict[str, Tensor]) -> None:
    """Refuses a tensor (`stored` is safetensors' slice of it) that the network does not have."""
    if name not in expected:
        raise BadInput(f"{path}: unexpected tensor {name}; "
                       "config.json describes a network without it")
    if list(stored.get_shape()) != list(expected[name].shape):
        raise BadInput(f"{path}: tensor {name} has shape {list(stored.get_shape())}, "
                       f"config.json asks for {list(expected[name].shape)}")
    if stored.get_dtype() not in ("F32", "F16", "BF16"):
        raise BadInput(f"{path}: tensor {name} is stored as {stored.get_dtype()}; "
                       "only F32, F16 and BF16 are read")


# ------------------------------------------------------------------------------ who sees whom

def end_to_end(lists: list, device: torch.device) -> Tensor:
    """The numbers of several lists or ranges in one flat int64 tensor [T]."""
    return torch.tensor([x for numbers in lists for x in numbers], device=device)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Copies tokens of the flat x [T, H, d] into a batch [B, H, S, d], by index [B, S]."""
    return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]).transpose(1, 2)


class Padding:
    """The way from sequences that lie end to end to a padded batch of them, and back.

    index: the flat token in each place of the batch, [B, S]; padding holds token 0, which is
    always there. places: the place of each token among the B · S, [T].
    """

    def __init__(self, lengths: list[int], device: torch.device, first: int = 0):
        """lengths: of B sequences; first: where in the flat list the first of them starts."""
        starts = torch.tensor(list(accumulate(lengths, initial=first))[:-1], device=device)
        positions = torch.arange(max(lengths), device=device)
        inside = positions < torch.tensor(lengths, device=device)[:, None]  # [B, S]
        self.index = (starts[:, None] + positions) * inside
        self.places = inside.flatten().nonzero()[:, 0]

    def unpad(self, x: Tensor) -> Tensor:
        """[T, H, d] of these sequences from x [B, H, S, d]."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.places)


NEVER = torch.iinfo(torch.long).max  # The position of hidden keys: it is later than every query.


def positions_of_keys(lengths: Tensor, width: int, own: int) -> Tensor:
    """Positions [N, width + own] of the keys that a row may see: first those of its prompt, of
    lengths [N] and padded to `width`, then `own` that follow the prompt."""
    prompt = torch.arange(width, device=lengths.device)
    later = lengths[:, None] + torch.arange(own, device=lengths.device)
    return torch.cat([torch.where(prompt < lengths[:, None], prompt, NEVER), later], dim=1)


def causal_mask(queries: Tensor, keys: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """What to add to the scores [N, Q, S] of queries and keys at positions [N, Q] and [N, S]: 0
    for the past, or a window of it, and −∞ for the rest."""
    age = queries[:, :, None] - keys[:, None]
    seen = age >= 0 if window is None else (age >= 0) & (age < window)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(~seen, -torch.inf)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention [B, H, Q, d] of q [B, H, Q, d] to k, v [B, G, S, d], where
    mask [B, H/G · Q, S] is added to the scores."""
    queries_per_key = q.shape[1] // k.shape[1]
    # Query heads that share a key-value head stand below each other, so that no key is copied.
    q = q.unflatten(1, (-1, queries_per_key)).flatten(2, 3)  # [B, G, H/G · Q, d]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    return out.unflatten(2, (queries_per_key, -1)).flatten(1, 2)


class Packed(Attend):
    """Causal attention within each of several sequences that lie end to end."""

    def __init__(self, lengths: list[int], device: torch.device, keep_kv: bool = False):
        """lengths: of B sequences; keep_kv: collect keys and values, for a KVCache."""
        self.padding = Padding(lengths, device)
        self.positions = end_to_end([range(n) for n in lengths], device)  # [T]
        self.kv = [] if keep_kv else None  # (keys, values) [B, G, P, d] of each layer

    def mask(self, window: int | None, queries_per_key: int, dtype: torch.dtype) -> Tensor | None:
        """[1, P, P], or None where attention is causal and nothing more."""
        longest = self.padding.index.shape[1]
        if window is None or window >= longest:
            return None
        positions = torch.arange(longest, device=self.positions.device)[None]
        return causal_mask(positions, positions, window, dtype)

    def __call__(self, layer: int, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (gather(x, self.padding.index) for x in (q, k, v))  # [B, H or G, P, d]
        if self.kv is not None:
            self.kv.append((k, v))
        queries_per_key = q.shape[1] // k.shape[1]
        if queries_per_key > 1 and (mask is not None or q.dtype == torch.float32):
            # With a mask, or in float32, no fused GPU kernel lets heads share keys, and the plain
            # one would store all P² scores.
            k, v = (x.repeat_interleave(queries_per_key, dim=1) for x in (k, v))
        # Padding needs no mask: it stands on the right, where causal attention never looks.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                             enable_gqa=True)
        return self.padding.unpad(out)


class SharedPrefix(Attend):
    """K completions branch off each prompt, whose keys and values are computed once for all.

    The flat list holds every prompt, then every completion but for its last token, which predicts
    nothing: P + K·C tokens where K copies of the prompt would cost K·(P + C), as in the plain way
    that tests/test_model.py compares with.

    prompts: B lists of ids; completions: B lists of K lists of ids, none empty.
    input_ids, positions: int64 [T]; tokens: those of the completions in order, int64 [M];
    predicts: the flat token that predicts each of them, int64 [M]; path [N, P + C]: the flat tokens
    whose keys a completion meets, those of its prompt and then its own.
    """

    def __init__(self, prompts: list[list[int]], completions: list[list[list[int]]],
                 device: torch.device):
        flat = [ids for group in completions for ids in group]  # N completions
        owner = [b for b, group in enumerate(completions) for _ in group]  # N prompt indices
        inputs = [ids[:-1] for ids in flat]
        lengths, widths = [len(ids) for ids in prompts], [len(ids) for ids in inputs]
        ends, self.prompt_tokens = list(accumulate(lengths)), sum(lengths)
        starts = accumulate(widths, initial=self.prompt_tokens)
        later = [range(lengths[b], lengths[b] + n) for b, n in zip(owner, widths)]
        # The last token of the prompt predicts the first one of each completion.
        predicts = [(ends[b] - 1, *range(start, start + n))
                    for b, start, n in zip(owner, starts, widths)]
        self.input_ids = end_to_end(prompts + inputs, device)
        self.positions = end_to_end([range(n) for n in lengths] + later, device)
        self.tokens = end_to_end(flat, device)
        self.predicts = end_to_end(predicts, device)
        self.prompts, self.branches = Packed(lengths, device), None
        if max(widths) > 0:  # Completions of a single token feed nothing back.
            self.branches = Padding(widths, device, first=self.prompt_tokens)
            width = self.branches.index.shape[1]  # C
            length = torch.tensor(lengths, device=device)[owner]  # [N]
            self.path = torch.cat([self.prompts.padding.index[owner], self.branches.index], dim=1)
            self.key_positions = positions_of_keys(length, max(lengths), width)  # [N, P + C]
            self.query_positions = self.key_positions[:, max(lengths):]  # [N, C]

    def mask(self, window: int | None, queries_per_key: int,
             dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Those of the prompts, [1, P, P], and of the completions, [N, H/G · C, P + C]."""
        branches = None
        if self.branches is not None:
            branches = causal_mask(self.query_positions, self.key_positions, window, dtype)
            branches = branches.repeat(1, queries_per_key, 1)
        return self.prompts.mask(window, queries_per_key, dtype), branches

    def __call__(self, layer: int, mask: tuple[Tensor | None, Tensor | None], q: Tensor, k: Tensor,
                 v: Tensor) -> Tensor:
        prompt = self.prompts(layer, mask[0], *(x[:self.prompt_tokens] for x in (q, k, v)))
        if self.branches is None:
            return prompt
        # Gathering repeats the keys of a prompt for each completion, and sums their gradients.
        q, k, v = gather(q, self.branches.index), gather(k, self.path), gather(v, self.path)
        return torch.cat([prompt, self.branches.unpad(attention(q, k, v, mask[1]))])


# -------------------------------------------------------------------------------- the KV cache

STEPS = 32  # decoding steps that share a CUDA graph, and so one shape of the keys


class KVCache(Attend):
    """Keys and values of all tokens so far, so that a decoding step computes one token a row.

    A row is a running completion, and K rows share a prompt. A layer stores, for each prompt, its P
    keys once, and after them R · K places for its rows' own, K for each decoding step. With K = 3:

        p0 p1 ... | a0 b0 c0 | a1 b1 c1 | .  .  . | ...
        prompt      step 0     step 1     to come

    In decoding, attention spends its time on reading the keys. So the rows a, b and c meet all keys
    of their prompt in one product that reads them once, and the mask hides those of other rows.

    prefill: a Packed(keep_kv=True) that has read the prompts; lengths: of the B prompts;
    samples: K; room: R, how many tokens each row may append.
    """

    steps_per_shape = 1  # A CUDA graph needs one shape for many decoding steps (`Decoder`).

    def __init__(self, prefill: Packed, lengths: list[int], samples: int, room: int):
        device = prefill.positions.device
        self.width, self.room, self.used = max(lengths), room, 0  # P, R, steps done
        self.owner = torch.arange(len(lengths), device=device).repeat_interleave(samples)  # [N]
        self.lengths = torch.tensor(lengths, device=device)[self.owner]  # [N], of the row's prompt
        self.positions = self.lengths.clone()  # [N], of the row's next token
        self.layers = []  # (keys, values) [B, G, P + R · K, d] of each layer
        while prefill.kv:  # Layer by layer, so that only one is ever held twice.
            pair = prefill.kv.pop(0)
            self.layers.append(tuple(F.pad(x, (0, 0, 0, room * samples)) for x in pair))
        self.place_rows()

    def place_rows(self) -> None:
        """Lays rows out by prompt, [B, K], and works out what each may see of the cache."""
        # Prompts with fewer rows than others are padded, like shorter sequences.
        self.padding = Padding(self.owner.bincount().tolist(), self.owner.device)
        samples = torch.arange(self.padding.index.shape[1], device=self.owner.device)  # [K]
        self.next_places = self.width + self.used * len(samples) + samples  # [K]
        positions = positions_of_keys(self.lengths, self.width, self.room)  # [N, P + R]
        mine = samples == self.padding.places[:, None, None] % len(samples)  # [N, 1, K]
        own = torch.where(mine, positions[:, self.width:, None], NEVER)  # [N, R, K]
        self.key_positions = torch.cat([positions[:, :self.width], own.flatten(1)], dim=1)

    @property
    def horizon(self) -> int:
        """How many steps of its own a row looks at: those done, this one, and as many of those to
        come as share its shape."""
        return min(self.room, (self.used // self.steps_per_shape + 1) * self.steps_per_shape)

    def mask(self, window: int | None, queries_per_key: int, dtype: torch.dtype) -> Tensor:
        """[B, H/G · K, P + horizon · K]"""
        keys = self.key_positions[:, :self.width + self.horizon * len(self.next_places)]
        mask = causal_mask(self.positions[:, None], keys, window, dtype)  # [N, 1, S]
        return mask[self.padding.index, 0].repeat(1, queries_per_key, 1)

    def __call__(self, layer: int, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (gather(x, self.padding.index) for x in (q, k, v))  # [B, H or G, K, d]
        keys, values = self.layers[layer]
        keys.index_copy_(2, self.next_places, k)
        values.index_copy_(2, self.next_places, v)
        seen = mask.shape[-1]
        return self.padding.unpad(attention(q, keys[:, :, :seen], values[:, :, :seen], mask))

    def advance(self) -> None:
        """Goes on to the next token, in place, because a CUDA graph reads these very tensors."""
        self.used += 1
        self.next_places += len(self.next_places)
        self.positions += 1

    def keep_rows(self, rows: Tensor) -> None:
        """Drops every row but `rows` [N'], and every prompt that is left without one."""
        places, samples = self.padding.places[rows], self.padding.index.shape[1]
        prompts, self.owner = self.owner[rows].unique(return_inverse=True)  # [B'], [N']
        self.lengths, self.positions = self.lengths[rows], self.positions[rows]
        self.place_rows()
        places = places[self.padding.index]  # [B', K']
        for layer, pair in enumerate(self.layers):  # Again only one is held twice.
            self.layers[layer] = tuple(
                compacted(x, self.width, self.used, samples, prompts, places) for x in pair)


def compacted(cached: Tensor, width: int, used: int, samples: int, prompts: Tensor,
              places: Tensor) -> Tensor:
    """[B', G, P + R · K', d] of the rows that stay, from a layer's keys or values, `cached`
    [B, G, P + R · K, d].

    width: P; used: steps done, of R; samples: K; prompts: those that stay, [B'];
    places: b · K + k of each row, [B', K'].
    """
    own = cached[:, :, width:].unflatten(2, (-1, samples))  # [B, G, R, K, d]
    kept = own[:, :, :used][places // samples, :, :, places % samples]  # [B', K', G, used, d]
    kept = kept.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B', G, used · K', d]
    size = width + own.shape[2] * places.shape[1]
    compact = cached.new_zeros(len(prompts), cached.shape[1], size, cached.shape[3])
    compact[:, :, :width] = cached[prompts, :, :width]
    compact[:, :, width:width + kept.shape[2]] = kept
    return compact


class Decoder:
    """Runs decoding steps. On a GPU it replays CUDA graphs, because the kernels of a step are so
    short that launching each costs more than running it."""

    def __init__(self, model: Transformer, cache: KVCache):
        self.model, self.cache = model, cache
        self.graph, self.shape = None, None
        self.stream = None
        if model.device.type == "cuda":
            self.stream, cache.steps_per_shape = torch.cuda.Stream(model.device), STEPS

    def step(self, tokens: Tensor) -> Tensor:
        """Appends tokens [N] to the rows; returns the logits [N, V] of their successors."""
        shape = len(tokens), self.cache.horizon
        if self.stream is not None and shape != self.shape:
            self.graph, self.shape = None, shape  # The old graph frees its memory.
            try:
                self.graph = RecordedStep(self.forward, tokens, self.stream)
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph for the sampler ({str(error).splitlines()[0]}): "
                              "it decodes kernel by kernel")
        logits = self.forward(tokens) if self.graph is None else self.graph(tokens)
        self.cache.advance()
        return logits

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.logits(self.model.hidden(tokens, self.cache.positions, self.cache))


class RecordedStep:
    """A CUDA graph of the kernels that function(tokens) launches; a call replays them all at once.

    They use the same memory every time, so whatever changes between calls must change in place.
    Recording calls the function twice, on the side stream `stream`, and raises RuntimeError if a
    graph cannot hold what it does.
    """

    def __init__(self, function: Callable, tokens: Tensor, stream: torch.cuda.Stream):
        self.graph, self.tokens = torch.cuda.CUDAGraph(), tokens.clone()
        caller = torch.cuda.current_stream(tokens.device)
        stream.wait_stream(caller)
        # After a capture that fails it is this outer context that makes `caller` current again.
        with torch.cuda.device(tokens.device), torch.cuda.stream(stream):
            function(self.tokens)  # Libraries set themselves up in their first call.
            caller.wait_stream(stream)
            with torch.cuda.graph(self.graph, stream=stream):
                self.logits = function(self.tokens)

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits


# ----------------------------------------------------------------------------------- the sampler

def sample(logits: Tensor, temperature: float, top_k: int, top_p: float,
           generator: torch.Generator | None) -> Tensor:
    """Draws a token per row of logits [N, V], int64 [N]: temperature, then the k likeliest, then
    the nucleus of mass p. The token is -1 where a logit is NaN or +infinity."""
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)  # It is that of a NaN where there is one.
        return torch.where(logits.gather(-1, token).isfinite(), token, -1)[:, 0]
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        logits = nucleus(logits, top_p)
    # Inverting the distribution function takes one random number per row, torch.multinomial V.
    mass = logits.softmax(-1).double().cumsum(-1)
    uniform = torch.rand(len(mass), 1, dtype=torch.double, device=mass.device, generator=generator)
    # The token is the first with more mass up to it than drawn, so never one of mass zero.
    token = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)
    return torch.where(mass[:, -1:].isfinite(), token, -1)[:, 0]


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The logits [N, V] of the likeliest tokens that together have mass p; −∞ for the others."""
    ordered, order = logits.sort(descending=True)
    share = ordered.softmax(-1)
    before = share.cumsum(-1).sub_(share)  # the mass of all likelier tokens
    return logits.scatter(-1, order, ordered.masked_fill_(before >= top_p, -torch.inf))


def check_request(vocabulary: int, prompts: list[list[int]], max_new_tokens: int,
                  temperature: float, top_k: int, top_p: float,
                  eos_ids: list[int] | tuple[int, ...], num_samples: int) -> None:
    """Raises BadInput for arguments of `generate` that make no sense."""
    if not prompts or not all(prompts):
        raise BadInput("generate: every prompt needs at least one token")
    if (max_new_tokens < 1 or num_samples < 1 or not temperature >= 0 or top_k < 0
            or not 0 < top_p <= 1):
        raise BadInput(f"generate: out of range: max_new_tokens={max_new_tokens}, "
                       f"num_samples={num_samples}, temperature={temperature}, "
                       f"top_k={top_k}, top_p={top_p}")
    named = [(f"prompt {i}", ids) for i, ids in enumerate(prompts)] + [("eos_ids", eos_ids)]
    for name, ids in named:
        for token in ids:
            if not 0 <= token < vocabulary:
                raise BadInput(f"generate: {name} holds token id {token}, which is outside the "
                               f"vocabulary of {vocabulary}")


def prefill(model: Transformer, prompts: list[list[int]], samples: int,
            room: int) -> tuple[Tensor, KVCache]:
    """Reads each prompt once: the logits [N, V] of its samples' first tokens, and the cache."""
    lengths = [len(prompt) for prompt in prompts]
    packed = Packed(lengths, model.device, keep_kv=True)
    hidden = model.hidden(end_to_end(prompts, model.device), packed.positions, packed)
    last = torch.tensor(lengths, device=model.device).cumsum(0) - 1
    logits = model.logits(hidden[last]).repeat_interleave(samples, dim=0)
    return logits, KVCache(packed, lengths, samples, room)


@torch.inference_mode()
def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             eos_ids: list[int] | tuple[int, ...] = (), num_samples: int = 1,
             generator: torch.Generator | None = None) -> list[list[int]]:
    """Samples completions of prompts of any lengths; each prompt is computed once.

    temperature: 0 is greedy; top_k: 0 is off; top_p: 1 is off; eos_ids: tokens that end a
    completion; generator: on the model's device, None uses torch's global one.
    Returns len(prompts) * num_samples lists of ids, the samples of a prompt together, without the
    prompt, with the end token where one was sampled (others were cut off at max_new_tokens).
    Raises BadInput for arguments that make no sense, NotFinite for logits that are not finite.
    """
    check_request(model.config.vocab_size, prompts, max_new_tokens, temperature, top_k, top_p,
                  eos_ids, num_samples)
    logits, cache = prefill(model, prompts, num_samples, max_new_tokens)
    decoder = Decoder(model, cache)
    out = torch.zeros(len(logits), max_new_tokens, dtype=torch.long, device=model.device)
    count = torch.zeros(len(logits), dtype=torch.long, device=model.device)
    ends = torch.tensor(list(eos_ids), dtype=torch.long, device=model.device)
    rows = torch.arange(len(logits), device=model.device)  # completions that the cache still holds
    running = torch.ones(len(logits), dtype=torch.bool, device=model.device)
    for step in range(max_new_tokens):
        tokens = sample(logits, temperature, top_k, top_p, generator)
        broken = tokens < 0
        out[rows, step] = tokens
        count[rows] += running
        running &= ~torch.isin(tokens, ends)
        # One transfer for both: each makes the CPU wait for the device.
        alive, failed = torch.stack([running.sum(), broken.sum()]).tolist()
        if failed:
            prompt = int(rows[broken][0]) // num_samples
            raise NotFinite(f"generate: the logits of prompt {prompt} are not finite; the weights "
                            "hold NaN or infinity, or the dtype overflows", prompts[prompt])
        if alive == 0 or step + 1 == max_new_tokens:
            break
        if alive <= 0.75 * len(rows):  # Dropping rows copies the cache, so not for every one.
            kept = running.nonzero()[:, 0]
            rows, tokens, running = rows[kept], tokens[kept], running[kept]
            cache.keep_rows(kept)
        logits = decoder.step(tokens)
    return [ids[:n] for ids, n in zip(out.tolist(), count.tolist())]
