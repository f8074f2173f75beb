"""AdamW and its learning rates, with small updates that survive bfloat16.

bfloat16 has 8 bits of mantissa: an AdamW step of relative size 1e-5, or 0.01 of it for the EMA,
would round to nothing. With --rounding nearest, student and teacher keep float32 master weights,
which Linear casts where it uses them. With --rounding stochastic they keep bfloat16 alone, and a
value between two bfloat16 numbers becomes one of them at random, the nearer one more often, so
that it is right on average.
"""

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw

import ranks
from model import Transformer


class AdamW:
    """AdamW with gradient clipping. Moments are float32; a weight's gradient has its own dtype.

    Weight decay is for matrices alone: norms and biases have none, as in the reference trainers.
    Frozen weights, such as those under an adapter, are left alone. Of a sharded model each rank
    updates its part.
    """

    def __init__(self, model: Transformer, weight_decay: float, clip: float):
        self.parameters = {name: w for name, w in model.named_parameters() if w.requires_grad}
        self.weight_decay, self.clip = weight_decay, clip
        self.moments = {}
        for name, weight in self.parameters.items():
            weight.grad = torch.zeros_like(weight)  # backward passes add to it
            self.moments[name] = tuple(torch.zeros_like(weight, dtype=torch.float32) for _ in "mv")

    @torch.no_grad()
    def step(self, step: int, lr: float, generator: torch.Generator) -> float:
        """Makes update number `step` (from 0), clears the gradients, returns their norm unclipped.

        generator: for stochastic rounding.
        """
        gradients = [ranks.local(weight.grad) for weight in self.parameters.values()]
        norm = torch.stack([g.norm(dtype=torch.float32) for g in gradients]).norm()
        norm = ranks.total_norm(norm)
        shrink = (self.clip / (norm + 1e-6)).clamp(max=1.0)
        for (name, weight), gradient in zip(self.parameters.items(), gradients):
            weight, m, v = map(ranks.local, (weight, *self.moments[name]))
            value = weight.detach().float()  # the weight itself, where it is float32
            adamw([value], [gradient.mul_(shrink).float()], [m], [v], [],
                  [torch.full((), float(step), device=m.device)], lr=lr, beta1=0.9, beta2=0.95,
                  eps=1e-8, weight_decay=self.weight_decay if weight.dim() == 2 else 0.0,
                  amsgrad=False, maximize=False, fused=True)
            store(weight, value, generator)
            gradient.zero_()
        return float(norm)

    def tensors(self) -> dict[str, Tensor]:
        """All that an update changes, by name."""
        named = {f"student.{name}": weight for name, weight in self.parameters.items()}
        for name, (m, v) in self.moments.items():
            named |= {f"m.{name}": m, f"v.{name}": v}
        return named


def store(weight: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """weight ← value, a float32 tensor; copying a weight onto itself does nothing."""
    exact = weight.dtype == torch.float32
    weight.copy_(value if exact else round_stochastically(value, generator))


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down at random so that the mean is x.

    bfloat16 is the upper half of float32's bits, so adding noise below it does the carrying.
    """
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2 ** 16, bits.shape, dtype=torch.int32, device=x.device,
                          generator=generator)
    return ((bits + noise) & -2 ** 16).view(torch.float32).to(torch.bfloat16)


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to zero.

    Warm-up takes at most a tenth of the run.
    """
    warmup = max(1, min(warmup, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def warmup_stable_decay(step: int, steps: int) -> float:
    """Share of the peak learning rate in the supervised stage: linear up over the first tenth,
    constant, and over the last 30 % linear down to zero."""
    return min(1.0, 10 * (step + 1) / steps, (steps - step) / (0.3 * steps))
