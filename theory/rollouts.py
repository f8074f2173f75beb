"""How many rollouts: μ̂ is Binomial(K, μ)/K, and the divergence decides what a student makes of its scatter.

A teacher that reports the μ̂ of its context has a confidence table q(c|μ̂); the student, who sees no μ̂, is left with a pool:

    reverse KL   p(c) ∝ exp E_μ̂ log q(c|μ̂)     for a teacher that copies μ̂ with error ε: ∝ exp(P(μ̂ = c) · log odds),
                                                 hence towards the mode of μ̂ as the teacher sharpens
    forward KL   p(c) = E_μ̂ q(c|μ̂)             its mean confidence is unbiased: E[μ̂] = μ, up to ε
    direct       p(c) = P(μ̂ = c)               cross-entropy on the replaced tokens, with no teacher

The last is the forward KL from a point mass on μ̂. There is no error of copying, so E[c] = μ exactly
at any K. A confidence sampled from p pays its variance μ(1 − μ)/K in Brier over the floor μ(1 − μ),
and the mean of p, the expected readout, pays nothing.
"""

from math import comb

import numpy as np

from replacement import kl_gradient
from worlds import figure, show, softmax


def binomial(rollouts: int, mu: float) -> np.ndarray:
    """P(μ̂ = k/K), [K + 1]."""
    return np.array([comb(rollouts, k) * mu ** k * (1 - mu) ** (rollouts - k) for k in range(rollouts + 1)])


def reporter(rollouts: int, sharpness: float) -> np.ndarray:
    """q(c|μ̂) [K + 1, K + 1] on the levels k/K: the level that the context states has `sharpness` more logit than the others."""
    return softmax(sharpness * np.eye(rollouts + 1))


def student_confidence(rollouts: int, mu: float, sharpness: float, kind: str) -> float:
    """Mean confidence of the student at the minimum of the expected divergence, kind reverse or forward."""
    weights, teacher = binomial(rollouts, mu), reporter(rollouts, sharpness)
    p = softmax(weights @ np.log(teacher)) if kind == "reverse" else weights @ teacher
    return float(p @ np.linspace(0, 1, rollouts + 1))


def direct_confidence(rollouts: int, mu: float) -> tuple[float, float, float]:
    """(mean confidence, Brier of a sampled confidence, Brier of the mean) of p(c) = P(μ̂ = c).

    The confidence and the outcome R of a new answer are independent given the prompt.
    """
    p, levels = binomial(rollouts, mu), np.linspace(0, 1, rollouts + 1)
    mean = p @ levels
    brier = [mu * (1 - c) ** 2 + (1 - mu) * c ** 2 for c in (levels, mean)]
    return float(mean), float(p @ brier[0]), float(brier[1])


def mode(rollouts: int, mu: float) -> float:
    """The likeliest μ̂: ⌊(K + 1) μ⌋ / K (the level below is as likely where (K + 1) μ is whole). It is 0 below μ = 1/(K + 1)
    and 1 above K/(K + 1)."""
    return min(int((rollouts + 1) * mu + 1e-12), rollouts) / rollouts


def calibration_error(rollouts: int, sharpness: float, kind: str, mus: np.ndarray = np.linspace(0.01, 0.99, 99)) -> tuple[float, float]:
    """(mean |c − μ|, mean of c − μ where μ > 1/2) over evenly spread success rates."""
    gap = np.array([student_confidence(rollouts, mu, sharpness, kind) - mu for mu in mus])
    return float(np.abs(gap).mean()), float(gap[mus > 0.5].mean())


def slow_return(stuck: float, target: int = 7, rollouts: int = 8, sharpness: float = 6.0, rate: float = 0.1, kind: str = "reverse") -> int:
    """Updates until half the mass has moved to the level target/K, starting with log-odds `stuck` on 0.00."""
    logits, teacher = stuck * np.eye(rollouts + 1)[0], reporter(rollouts, sharpness)[target]
    for update in range(10 ** 6):
        p = softmax(logits)
        if p[target] > 0.5:
            return update
        logits = logits - rate * (kl_gradient(logits, teacher) if kind == "reverse" else p - teacher)
    return 10 ** 6


if __name__ == "__main__":
    print(__doc__)
    print("  Confidence of the student at the minimum, teacher sharpness 12 (rows: K, columns: μ(x)):\n")
    mus, counts = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95), (1, 2, 4, 8, 16, 32)
    for kind in ("reverse", "forward"):
        show([f"{kind} KL", *(f"μ = {m}" for m in mus)],
             [[f"K = {k}", *(student_confidence(k, m, 12.0, kind) for m in mus)] for k in counts])
        print()
    print("  Distance from μ over evenly spread success rates, and the bias where the student is mostly right (μ > 1/2):\n")
    rows = []
    for k in counts:
        soft, sharp, linear = (calibration_error(k, s, kind) for s, kind in ((4.0, "reverse"), (12.0, "reverse"), (12.0, "forward")))
        rows.append([f"K = {k}", soft[0], sharp[0], sharp[1], linear[0], linear[1]])
    show(["", "reverse, sharpness 4", "reverse, 12", "bias", "forward, 12", "bias"], rows)
    print("\n  At K = 1 reverse KL rounds μ to 0 or 1: a student that is right more than half the time becomes certain. That is the paper's"
          "\n  ablation: small K stays overconfident, and from K = 8 on the mode of μ̂ is within 1/K of μ. The price of a large K is a pool that"
          "\n  needs a sharper teacher, since every single level becomes rare (compare the columns for sharpness 4 and 12).\n")
    print("  Cross-entropy on the replaced tokens: mean confidence, and what Brier pays over the floor "
          "at μ = .8:\n")
    floor = 0.8 * 0.2
    directs = [(k, direct_confidence(k, 0.8)) for k in counts]
    show(["", "mean confidence", "sampled, over the floor", "expected, over the floor"],
         [[f"K = {k}", mean, sampled - floor, abs(round(expected - floor, 12))]
          for k, (mean, sampled, expected) in directs])
    print()
    print("  The mode of μ̂ is at an end for μ < 1/(K+1) or μ > K/(K+1): "
          f"at K = 8, {mode(8, 0.11):.2f} up to μ = .11 and {mode(8, 0.89):.2f} from .89 on.")
    print("  A student that has been driven to 0.00 comes back slowly, for the gradient of reverse KL carries its own vanished mass:\n")
    odds = (0.0, 4.0, 8.0, 12.0)
    show(["updates until half the mass is on .88", *(f"log-odds {o:g}" for o in odds)],
         [[kind, *(slow_return(o, kind=kind) for o in odds)] for kind in ("reverse", "forward")])
    save, axes = figure("rollouts", 9.0, 3.6, panels=2)
    if save:
        grid = np.linspace(0.005, 0.995, 199)
        for axis, kind in zip(axes, ("reverse", "forward")):
            for k in (1, 2, 8, 32):
                axis.plot(grid, [student_confidence(k, m, 12.0, kind) for m in grid], label=f"K = {k}", lw=1.2)
            axis.plot([0, 1], [0, 1], color="0.6", ls="--", lw=1)
            axis.set(xlabel="success rate μ(x)", ylabel="the student's confidence", title=f"{kind} KL, teacher sharpness 12")
            axis.legend(fontsize=8)
        save()
