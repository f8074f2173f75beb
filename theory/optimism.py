"""Proposition 3, optimism: contexts that were picked because they help overstate success.

    E_helpful[μ_T|x] − E[μ_T|x] = Cov(μ_T, w|x) / E[w|x] ≥ 0      for weights w(z) that grow with μ_T

Special cases: best of n contexts, and demonstrations kept because they succeeded (w = μ_T).
"""

import numpy as np

from worlds import World, figure, show, success_world


def helpful_mean(p: np.ndarray, mu: np.ndarray, w: np.ndarray) -> float:
    """E_helpful[μ_T] = Σ p w μ_T / Σ p w, for contexts with probability p [Z], success mu [Z], weight w [Z]."""
    return float((p * w * mu).sum() / (p * w).sum())


def optimism(p: np.ndarray, mu: np.ndarray, w: np.ndarray) -> float:
    """Cov(μ_T, w) / E[w]: by how much selection with weight w overstates E[μ_T]."""
    mean_mu, mean_w = (p * mu).sum(), (p * w).sum()
    return float((p * (mu - mean_mu) * (w - mean_w)).sum() / mean_w)


def best_of(p: np.ndarray, mu: np.ndarray, n: int) -> np.ndarray:
    """w(z) of keeping the context with the highest μ_T among n drawn: P(z is kept) / p(z); ties share. [Z]"""
    below = np.array([p[mu < m].sum() for m in mu])
    level = np.array([p[mu == m].sum() for m in mu])
    return ((below + level) ** n - below ** n) / level


def student_ocg(world: World, w: np.ndarray, mu_student: np.ndarray) -> float:
    """E over prompts of the confidence taken over from selected contexts minus the student's own success [X]; w [X, Z]."""
    stated = np.array([helpful_mean(p, mu, weight) for p, mu, weight in zip(world.p_z, world.mu_teacher, w)])
    return world.mean(stated - mu_student)


EXAMPLE = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.3, 0.7, 1.0])  # p(z), μ_T(z): helpful contexts are rare

if __name__ == "__main__":
    print(__doc__)
    p, mu = EXAMPLE
    strengths = [0.0, 1.0, 2.0, 4.0, 8.0, 16.0]
    rows = [[f"w = exp({s:g} μ_T)", helpful_mean(p, mu, np.exp(s * mu)), optimism(p, mu, np.exp(s * mu))] for s in strengths]
    rows += [[f"best of {n}", helpful_mean(p, mu, best_of(p, mu, n)), optimism(p, mu, best_of(p, mu, n))] for n in (1, 2, 4, 16)]
    rows += [["kept because it succeeded (w = μ_T)", helpful_mean(p, mu, mu), optimism(p, mu, mu)]]
    print(f"  Contexts with μ_T = {mu.tolist()} and odds {p.tolist()}: E[μ_T] = {(p * mu).sum():.3f}\n")
    show(["selection", "E_helpful[μ_T]", "Cov(μ_T,w)/E[w]"], rows)
    equal = success_world([[0.5, 0.5, 0.5]])
    print(f"\n  Equality: no selection (w constant: {optimism(p, mu, np.ones(4)):+.3f}), or success that does not depend on the context "
          f"({optimism(equal.p_z[0], equal.mu_teacher[0], np.arange(1.0, 4.0)):+.3f}).")
    world = success_world([mu.tolist()], [p.tolist()])
    rows = [[f"{m:.2f}"] + [student_ocg(world, w[None], np.array([m])) for w in (np.ones(4), mu, best_of(p, mu, 16))]
            for m in (0.2, float((p * mu).sum()), 0.6)]
    print("\n  OCG of a student that adopts the teacher's mean confidence, by its own success rate:\n")
    show(["the student's μ", "any context", "succeeded", "best of 16"], rows)
    print("\n  Selection alone makes the target optimistic by its covariance with success; a verified demonstration (μ_T = 1)"
          "\n  is the end of that road. The inequality is against E[μ_T|x]: against μ(x) itself it needs E[μ_T|x] ≥ μ(x) as well.")
    save, axes = figure("optimism")
    if save:
        s = np.linspace(0, 16, 100)
        axes[0].plot(s, [helpful_mean(p, mu, np.exp(v * mu)) for v in s], label="w = exp(s μ_T)")
        axes[0].plot(range(1, 17), [helpful_mean(p, mu, best_of(p, mu, n)) for n in range(1, 17)], "o-", ms=3, label="best of n = s")
        axes[0].axhline(helpful_mean(p, mu, mu), color="tab:green", lw=1, label="kept because it succeeded")
        axes[0].axhline((p * mu).sum(), color="0.5", ls="--", lw=1, label="no selection, E[μ_T]")
        axes[0].set(xlabel="strength of selection s", ylabel="implied confidence target", ylim=(0, 1.05))
        axes[0].legend(fontsize=8, loc="lower right")
        save()
