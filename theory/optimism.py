"""Proposition 3, optimism: contexts that were picked because they help overstate success.

    E_helpful[μ_T|x] − E[μ_T|x] = Cov(μ_T, w|x) / E[w|x] ≥ 0      for weights w(z) growing with μ_T
    E_helpful[μ_T|x] − μ(x)     = Cov(μ_T, w|x) / E[w|x] + (E[μ_T|x] − μ(x))

Special cases: best of n contexts, and contexts kept because the teacher that read them was right
(w = μ_T). A context that is itself a verified answer has w = R(z), which grows with μ_T only if the
teacher is right more often after right demonstrations than after wrong ones. The second line is
what a student of success μ(x) is told too much. Its last term can have either sign, so contexts
that help on average, E[μ_T|x] ≥ μ(x), are sufficient for optimism and not necessary.
"""

import numpy as np

from worlds import World, figure, show, success_world


def helpful_mean(p: np.ndarray, mu: np.ndarray, w: np.ndarray) -> float:
    """E_helpful[μ_T] = Σ p w μ_T / Σ p w, for contexts with odds p, success mu, weight w, [Z]."""
    return float((p * w * mu).sum() / (p * w).sum())


def optimism(p: np.ndarray, mu: np.ndarray, w: np.ndarray) -> float:
    """Cov(μ_T, w) / E[w]: by how much selection with weight w overstates E[μ_T]."""
    mean_mu, mean_w = (p * mu).sum(), (p * w).sum()
    return float((p * (mu - mean_mu) * (w - mean_w)).sum() / mean_w)


def best_of(p: np.ndarray, mu: np.ndarray, n: int) -> np.ndarray:
    """w(z) of keeping the context with the highest μ_T of n: P(z is kept)/p(z); ties share. [Z]"""
    below = np.array([p[mu < m].sum() for m in mu])
    level = np.array([p[mu == m].sum() for m in mu])
    return ((below + level) ** n - below ** n) / level


def student_ocg(world: World, w: np.ndarray, mu_student: np.ndarray) -> float:
    """OCG of a student with success mu_student [X] that adopts the confidence of contexts selected
    with weights w [X, Z]: E over prompts of E_helpful[μ_T|x] − μ(x)."""
    stated = np.array([helpful_mean(p, mu, weight)
                       for p, mu, weight in zip(world.p_z, world.mu_teacher, w)])
    return world.mean(stated - mu_student)


EXAMPLE = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.3, 0.7, 1.0])  # p(z), μ_T(z)


def main() -> None:
    print(__doc__)
    p, mu = EXAMPLE
    selections = {f"w = exp({s:g} μ_T)": np.exp(s * mu) for s in (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)}
    selections |= {f"best of {n}": best_of(p, mu, n) for n in (1, 2, 4, 16)}
    selections["kept because the teacher succeeded (w = μ_T)"] = mu
    print(f"  Contexts with μ_T = {mu.tolist()} and odds {p.tolist()}: E[μ_T] = {p @ mu:.3f}\n")
    show(["selection", "E_helpful[μ_T]", "Cov(μ_T,w)/E[w]"],
         [[name, helpful_mean(p, mu, w), round(optimism(p, mu, w), 9) + 0.0]  # no −0.000
          for name, w in selections.items()])
    equal = success_world([[0.5, 0.5, 0.5]])
    unmoved = optimism(equal.p_z[0], equal.mu_teacher[0], np.arange(1.0, 4.0))
    unselected = round(optimism(p, mu, np.ones(4)), 9) + 0.0
    print(f"\n  Equality: no selection (w constant: {unselected:+.3f}), or success that does not "
          f"depend on the context ({unmoved:+.3f}).")
    world = success_world([mu.tolist()], [p.tolist()])
    print("\n  OCG of a student that adopts the teacher's mean confidence, by its own success "
          "rate:\n")
    show(["the student's μ", "any context", "teacher succeeded", "best of 16"],
         [[f"{m:.2f}"] + [student_ocg(world, w[None], np.array([m]))
                          for w in (np.ones(4), mu, best_of(p, mu, 16))]
          for m in (0.2, float(p @ mu), 0.5, 0.7)])
    print("\n  Selection alone makes the target optimistic by its covariance with success; a "
          "demonstration that never fails (μ_T = 1)\n"
          "  is the end of that road. A student of success .5 beats the average context (.37) and "
          "is told too much all the\n"
          "  same; one of .7 is told too little by contexts that are kept because the teacher "
          "succeeded with them.")
    save, axes = figure("optimism", 9.0, 3.4, panels=2)
    if save:
        strengths, counts = np.linspace(0, 16, 100), range(1, 17)
        axes[0].plot(strengths, [helpful_mean(p, mu, np.exp(s * mu)) for s in strengths])
        axes[0].set(xlabel="strength s of the weight w = exp(s μ_T)", title="soft selection")
        axes[1].plot(counts, [helpful_mean(p, mu, best_of(p, mu, n)) for n in counts], "o-", ms=3)
        axes[1].set(xlabel="contexts n of which the best is kept", title="best of n")
        for axis in axes:
            axis.axhline(helpful_mean(p, mu, mu), color="tab:green", lw=1,
                         label="kept because the teacher succeeded")
            axis.axhline(p @ mu, color="0.5", ls="--", lw=1, label="no selection, E[μ_T]")
            axis.set(ylabel="implied confidence target", ylim=(0, 1.05))
            axis.legend(fontsize=8, loc="lower right")
        save()


if __name__ == "__main__":
    main()
