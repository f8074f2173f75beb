"""What a prompt-level confidence can reach: the two yardsticks of any c(x).

    Brier   E(c − R)² = E[μ(1 − μ)] + E(c − μ)²     the first term is the floor, reached at c = μ
    SPR     P(c⁺ > c⁻), a right answer against a wrong one, ties counting zero: no deterministic
            function of x beats one that orders all prompts by μ and ties none

The second has a ceiling below 1, since easy prompts are answered wrong now and then and hard ones
right. A confidence that is *sampled* given x breaks ties, of a prompt with itself too, and comes as
near as one likes to AUROC(μ) = P(μ⁺ > μ⁻) + ½ P(μ⁺ = μ⁻), which no confidence that is drawn without
a look at the answer can exceed. A confidence stated *after* the answer may depend on it, and can
pass both yardsticks.
`python caopd.py --oracle N` prints both for the real thing.
"""

from itertools import combinations

import numpy as np

from worlds import binomial, figure, show


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


def sampled_spr(p_x: np.ndarray, mu: np.ndarray, q: np.ndarray) -> float:
    """The same for a confidence that is sampled: q(c|x) over ascending levels, [X, C]."""
    right, wrong = (p_x * mu) @ q, (p_x * (1 - mu)) @ q  # [C]
    below = np.cumsum(wrong) - wrong
    return float(right @ below / (right.sum() * wrong.sum()))


def spr_ceiling(p_x: np.ndarray, mu: np.ndarray) -> float:
    """The highest SPR of any deterministic function of x: every pair of prompts ordered by μ; a
    prompt with itself is always a tie."""
    won = sum(p_x[i] * p_x[j] * max(mu[i] * (1 - mu[j]), mu[j] * (1 - mu[i]))
              for i, j in combinations(range(len(mu)), 2))
    return float(won / ((p_x @ mu) * (p_x @ (1 - mu))))


def auroc(p_x: np.ndarray, mu: np.ndarray) -> float:
    """P(μ⁺ > μ⁻) + ½ P(μ⁺ = μ⁻): the ceiling of a confidence that is sampled given x."""
    return (1 + spr(p_x, mu, mu) - spr(p_x, mu, -mu)) / 2


WORLDS = {  # μ(x) of equally likely prompts
    "half easy, half hopeless (1, 0)": [1.0] * 4 + [0.0] * 4,
    "polarized (.95, .05)": [0.95] * 4 + [0.05] * 4,
    "evenly spread": [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9],
    "all the same (.5)": [0.5] * 8,
}


def main() -> None:
    print(__doc__)
    p, rows = np.full(8, 1 / 8), []
    for name, values in WORLDS.items():
        mu, always = np.array(values), np.ones(8)
        rows.append([name, brier_floor(p, mu), expected_brier(p, mu, always), spr(p, mu, always),
                     spr(p, mu, mu), spr_ceiling(p, mu), auroc(p, mu)])
    show(["μ(x) of eight prompts", "Brier floor", "always 1.0", "its SPR", "SPR of c = μ",
          "SPR ceiling", "sampled (AUROC)"], rows)
    print("\n  Where prompts share a success rate, c = μ ties them and SPR pays: any order "
          "among equals would score\n"
          "  more, without meaning anything. So SPR rewards confidences that are spread, and only "
          "differences between\n"
          "  prompts of different success are real ones.\n")
    print("  Noise can raise SPR as well: c = μ̂ of N other answers, drawn for each answer anew.\n")
    counts = (1, 2, 4, 16, 64)
    show(["SPR", *(f"N = {n}" for n in counts), "c = μ"],
         [[name, *(sampled_spr(p, mu, np.array([binomial(n, m) for m in mu])) for n in counts),
           spr(p, mu, mu)] for name, mu in ((n, np.array(WORLDS[n])) for n in list(WORLDS)[1:3])])
    mu, rng = np.array(WORLDS["evenly spread"]), np.random.default_rng(0)
    print("\n  Confidences that miss μ, in the evenly spread world: Brier rises by the square of "
          "the miss, exactly.\n")
    rows = []
    for miss in (0.0, 0.05, 0.1, 0.2):
        c = mu + miss * rng.choice((-1, 1), 8)
        rows.append([f"μ ± {miss:.2f}", expected_brier(p, mu, c),
                     brier_floor(p, mu) + float(p @ (c - mu) ** 2), spr(p, mu, c)])
    show(["stated", "Brier", "floor + E(c − μ)²", "SPR"], rows)
    draw()


def draw() -> None:
    save, axes = figure("prompt_level", 9.0, 3.6, panels=2)
    if not save:
        return
    spread, p = np.linspace(0, 0.5, 60), np.full(8, 1 / 8)
    worlds = [np.repeat([0.5 + s, 0.5 - s], 4) for s in spread]
    axes[0].plot(spread, [brier_floor(p, mu) for mu in worlds], color="C1")
    axes[0].set(ylabel="Brier floor", ylim=(0, 0.26), title="smallest Brier score of a c(x)")
    axes[1].plot(spread, [auroc(p, mu) for mu in worlds], color="0.5", ls="--",
                 label="AUROC, ceiling of a sampled confidence")
    axes[1].plot(spread, [spr_ceiling(p, mu) for mu in worlds], color="C0",
                 label="ceiling of a function of x")
    values = [spr(p, mu, mu) for mu in worlds]
    axes[1].plot(spread[1:], values[1:], color="C3", label="c = μ, which ties four prompts")
    axes[1].plot(spread[:1], values[:1], "o", color="C3", ms=4)  # at 0 all eight are tied
    axes[1].plot(spread[:1], values[1:2], "o", color="C3", ms=4, mfc="white")
    axes[1].set(ylabel="SPR", ylim=(-0.03, 1.03), title="largest SPR")
    axes[1].legend(fontsize=8, loc="lower right")
    for axis in axes:
        axis.set(xlabel="s: four prompts have μ = ½ + s, four ½ − s")
    save()


if __name__ == "__main__":
    main()
