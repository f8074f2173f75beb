"""Proposition 1, identifiability: no function of the prompt can follow the teacher's success rate.

    min_g E(μ_T(X,Z) − g(X))² = E Var(μ_T | X)
    reached at g = E[μ_T | X], and zero if and only if I(R;Z|X) = 0

And what the proposition leaves out: g is the success rate of the teacher's own mixture
Σ_z p(z|x) π_T(·|x,z). It is the student's μ(x) if the student samples from that mixture, and
otherwise by coincidence alone.
"""

import numpy as np

from worlds import World, bernoulli, random_world, show, success_world


def best_predictor(world: World) -> np.ndarray:
    """g(x) = E[μ_T | X = x], [X]."""
    return world.given_x(world.mu_teacher)


def residual(world: World) -> float:
    """E(μ_T − g)² at the best g, which is E Var(μ_T | X)."""
    return world.mean((world.mu_teacher - best_predictor(world)[:, None]) ** 2)


def brier(confidence, mu):
    """E(c − R)² of stating c where answers are right with probability μ: μ(1 − μ) + (c − μ)²."""
    return mu * (1 - mu) + (confidence - mu) ** 2


NAMED = {
    "context says nothing": success_world([[0.3, 0.3], [0.9, 0.9]]),
    "a hint that helps": success_world([[0.4, 0.8]]),
    "half of the contexts give the answer away": success_world([[0.3, 1.0], [0.6, 1.0]]),
    # Another answer under each context, both right half of the time: Z moves A, and not R.
    "context moves the answer, not the success": World(
        np.ones(1), np.full((1, 2), 0.5),
        np.array([[[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]]), np.array([[1.0, 0.0, 1.0, 0.0]])),
}


def main() -> None:
    print(__doc__)
    show(["world", "E Var(μ_T|X)", "I(R;Z|X)", "I(A;Z|X)"],
         [[name, residual(w), w.information(bernoulli(w.mu_teacher)), w.information(w.teacher)]
          for name, w in NAMED.items()])
    rng, gaps = np.random.default_rng(0), []
    for _ in range(1000):
        world = random_world(rng)
        other = np.clip(best_predictor(world) + rng.normal(0, 0.2, 4), 0, 1)
        gaps.append(world.mean((world.mu_teacher - other[:, None]) ** 2) - residual(world))
    print("\n  1000 random worlds: another g(x) was worse in every one, by at least "
          f"{min(gaps):.1e}.")
    print("\n  The bridge: teacher success .4 and .8 with equal odds, so g = .6. What each target "
          "costs at deployment (Brier):\n")
    show(["the student's μ(x)", "states 1.0", "states g = .6", "states its μ(x)"],
         [[f"{mu:.1f}" + ("  (as the mixture)" if mu == 0.6 else ""), brier(1.0, mu),
           brier(0.6, mu), brier(mu, mu)] for mu in (0.2, 0.4, 0.6)])
    print("\n  Averaging the teacher's success over contexts is not enough in general: a student "
          "that never saw z and\n"
          f"  succeeds .2 of the time pays {brier(0.6, 0.2):.2f} for stating .6, twice the "
          f"{brier(0.2, 0.2):.2f} it pays for stating its own\n"
          "  success rate, which only its own rollouts reveal.")


if __name__ == "__main__":
    main()
