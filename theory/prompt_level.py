"""What a prompt-level confidence can reach: the two yardsticks of any c(x).

    Brier   E(c − R)² = E[μ(1 − μ)] + E(c − μ)²       the first term is the floor, reached at c = μ
    SPR     P(c⁺ > c⁻), pairs of a right and a wrong answer: no function of x beats one that orders all prompts by μ and ties none

The second has a ceiling below 1, since easy prompts are answered wrong now and then and hard ones right:
`python caopd.py --oracle N` prints both for the real thing.
"""

from itertools import combinations

import numpy as np

from worlds import figure, show


def brier_floor(p_x: np.ndarray, mu: np.ndarray) -> float:
    """E[μ(1 − μ)], the smallest Brier score of any function of x; p_x, mu [X]."""
    return float(p_x @ (mu * (1 - mu)))


def expected_brier(p_x: np.ndarray, mu: np.ndarray, c: np.ndarray) -> float:
    """E(c − R)² of stating c(x), summed over prompts and outcomes."""
    return float(p_x @ (mu * (c - 1) ** 2 + (1 - mu) * c ** 2))


def spr(p_x: np.ndarray, mu: np.ndarray, c: np.ndarray) -> float:
    """P(c⁺ > c⁻) for a right answer and a wrong one drawn independently; ties count as zero."""
    right, wrong = p_x * mu, p_x * (1 - mu)
    return float(right @ (c[:, None] > c[None, :]) @ wrong / (right.sum() * wrong.sum()))


def spr_ceiling(p_x: np.ndarray, mu: np.ndarray) -> float:
    """The highest SPR of any function of x: every pair of prompts ordered by μ; a prompt with itself is always a tie."""
    won = sum(p_x[i] * p_x[j] * max(mu[i] * (1 - mu[j]), mu[j] * (1 - mu[i])) for i, j in combinations(range(len(mu)), 2))
    return float(won / ((p_x @ mu) * (p_x @ (1 - mu))))


WORLDS = {  # μ(x) of equally likely prompts
    "half easy, half hopeless (1, 0)": [1.0] * 4 + [0.0] * 4,
    "polarized (.95, .05)": [0.95] * 4 + [0.05] * 4,
    "evenly spread": [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9],
    "all the same (.5)": [0.5] * 8,
}

if __name__ == "__main__":
    print(__doc__)
    rows = []
    for name, values in WORLDS.items():
        mu, p = np.array(values), np.full(len(values), 1 / len(values))
        always = np.ones(len(mu))
        rows.append([name, brier_floor(p, mu), expected_brier(p, mu, always), spr_ceiling(p, mu), spr(p, mu, mu), spr(p, mu, always)])
    show(["μ(x) of eight prompts", "Brier floor", "always 1.0", "SPR ceiling", "SPR of c = μ", "always 1.0"], rows)
    print("\n  Where prompts share a success rate, c = μ ties them and SPR pays: an arbitrary order among equals would score more, without meaning"
          "\n  anything. So SPR rewards confidences that are spread, and only differences between prompts of different success are real ones.\n")
    mu, p, rng = np.array(WORLDS["evenly spread"]), np.full(8, 1 / 8), np.random.default_rng(0)
    print("  Confidences that miss μ, in the evenly spread world: Brier rises by the square of the miss, exactly.\n")
    rows = []
    for miss in (0.0, 0.05, 0.1, 0.2):
        c = mu + miss * rng.choice((-1, 1), 8)
        rows.append([f"μ ± {miss:.2f}", expected_brier(p, mu, c), brier_floor(p, mu) + float(p @ (c - mu) ** 2), spr(p, mu, c)])
    show(["stated", "Brier", "floor + E(c − μ)²", "SPR"], rows)
    save, axes = figure("prompt_level")
    if save:
        spread = np.linspace(0, 0.5, 60)
        pairs = [(np.array([0.5 + s, 0.5 - s]), np.full(2, 0.5)) for s in spread]
        axes[0].plot(spread, [brier_floor(p, m) for m, p in pairs], label="Brier floor")
        axes[0].plot(spread, [spr(p, m, m) for m, p in pairs], label="SPR of c = μ")
        axes[0].set(xlabel="two kinds of prompts, μ = ½ ± s: s", ylim=(0, 1.02))
        axes[0].legend(fontsize=8)
        save()
