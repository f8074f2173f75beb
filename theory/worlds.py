"""Finite worlds in which every probability is a table and every expectation a sum.

Entropies are in nats. Shapes: X prompts, Z contexts, A answers. Shared by the files of this folder.
"""

from dataclasses import dataclass
from math import comb
from pathlib import Path

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def entropy(p: np.ndarray) -> np.ndarray:
    """H(p) = −Σ p log p over the last axis, with 0 log 0 = 0."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p‖q) = Σ p log(p/q) over the last axis; q must cover p."""
    return (p * np.log(np.where(p > 0, p, 1.0) / np.where(p > 0, q, 1.0))).sum(-1)


def kl_gradient(logits: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """d KL(softmax(logits)‖teacher) / d logits = p ⊙ (log p/q − KL), over the last axis."""
    p = softmax(logits)
    return p * (np.log(p / teacher) - kl(p, teacher)[..., None])


def bernoulli(mu: np.ndarray) -> np.ndarray:
    """[..., 2]: the distribution (1 − μ, μ) of R."""
    return np.stack([1 - mu, mu], axis=-1)


def binomial(n: int, mu: float) -> np.ndarray:
    """P(μ̂ = k/n) of n rollouts, [n + 1]."""
    return np.array([comb(n, k) * mu ** k * (1 - mu) ** (n - k) for k in range(n + 1)])


@dataclass(frozen=True)
class World:
    """p_x [X]; p_z [X, Z] = p(z|x); teacher [X, Z, A] = π_T(a|x,z); right [X, A] = R(x,a)."""

    p_x: np.ndarray
    p_z: np.ndarray
    teacher: np.ndarray
    right: np.ndarray

    @property
    def mu_teacher(self) -> np.ndarray:
        """μ_T(x,z) = Σ_a π_T(a|x,z) R(x,a), [X, Z]."""
        mu = np.einsum("xza,xa->xz", self.teacher, self.right)
        return mu.clip(0, 1)  # Rounding can pass 1.

    @property
    def mixture(self) -> np.ndarray:
        """The teacher's own mixture Σ_z p(z|x) π_T(a|x,z), [X, A]."""
        return np.einsum("xz,xza->xa", self.p_z, self.teacher)

    def given_x(self, values: np.ndarray) -> np.ndarray:
        """E[values|X], [X] from [X, Z]."""
        return (self.p_z * values).sum(-1)

    def mean(self, values: np.ndarray) -> float:
        """E[values] of a table [X] or [X, Z]."""
        return float(self.p_x @ (self.given_x(values) if values.ndim == 2 else values))

    def information(self, distribution: np.ndarray) -> float:
        """I(V;Z|X) = E KL(p(v|x,z) ‖ p(v|x)) of a variable with table p(v|x,z) [X, Z, V]."""
        marginal = np.einsum("xz,xzv->xv", self.p_z, distribution)
        return self.mean(kl(distribution, np.broadcast_to(marginal[:, None], distribution.shape)))


def random_world(rng: np.random.Generator, prompts: int = 4, contexts: int = 3,
                 answers: int = 5) -> World:
    """Every table drawn at random, some of it nearly deterministic."""
    return World(
        p_x=rng.dirichlet(np.ones(prompts)), p_z=rng.dirichlet(np.ones(contexts), prompts),
        teacher=softmax(rng.normal(size=(prompts, contexts, answers)) * rng.uniform(0.1, 6)),
        right=(rng.random((prompts, answers)) < 0.4).astype(float))


def success_world(mu_teacher: list[list[float]], p_z: list[list[float]] | None = None) -> World:
    """A world of two answers, wrong and right, with the given μ_T [X, Z].

    Contexts are equally likely unless p_z is given.
    """
    mu = np.array(mu_teacher, dtype=float)
    prompts, contexts = mu.shape
    equal = np.full(mu.shape, 1 / contexts)
    return World(np.full(prompts, 1 / prompts), equal if p_z is None else np.array(p_z, float),
                 bernoulli(mu), np.tile([0.0, 1.0], (prompts, 1)))


def show(header: list[str], rows: list[list]) -> None:
    """Prints a table; floats with three decimals."""
    cells = [header] + [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row]
                        for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for first, *others in cells:
        print("  " + "  ".join([first.ljust(widths[0])]
                               + [cell.rjust(w) for cell, w in zip(others, widths[1:])]))


def figure(name: str, width: float = 6.0, height: float = 3.6, panels: int = 1):
    """(save, axes): matplotlib axes, and a function that writes figures/NAME.png beside this file.

    (None, None) without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        print("  (no figure: it needs matplotlib)")
        return None, None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, panels, figsize=(width, height), squeeze=False)

    def save():
        path = Path(__file__).parent / "figures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        fig.tight_layout()
        fig.savefig(path, dpi=130)
        plt.close(fig)
        print(f"  figure: {path.relative_to(Path(__file__).parents[1])}")
    return save, axes[0]
