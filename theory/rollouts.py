"""How many rollouts: μ̂ is Binomial(K, μ)/K, and the divergence decides what its scatter does.

A teacher that reports the μ̂ of its context has a confidence table q(c|μ̂), here with sharpness s:
the reported level has s more logit than each of the K others. The student sees no μ̂ and is left
with a pool:

    reverse KL   p(c) ∝ exp(s · P(μ̂ = c))   towards the mode of μ̂ as s grows
    forward KL   p(c) = E_μ̂ q(c|μ̂)          E[c] = w μ + (1 − w)/2,  w = (e^s − 1)/(e^s + K)
    direct       p(c) = P(μ̂ = c)            E[c] = μ

The last is cross-entropy on the replaced tokens, the forward KL from a point mass on μ̂, without a
teacher that could err in copying. A confidence sampled from it pays its variance μ(1 − μ)/K in
Brier over the floor μ(1 − μ); its mean, the expected readout, pays nothing.

All of this is for a μ̂ of other rollouts. Where the K rollouts are distilled themselves, as in the
released code and in ours, μ̂ contains the R of the rollout that states it, and tells a right one
1/K more than a wrong one. At K = 1 the target is R itself. Leaving one out removes that.
"""

import numpy as np

from worlds import binomial, figure, kl_gradient, show, softmax


def reporter(rollouts: int, sharpness: float) -> np.ndarray:
    """q(c|μ̂) on the levels k/K, [K + 1, K + 1]: the level that the context states has `sharpness`
    more logit than the others."""
    return softmax(sharpness * np.eye(rollouts + 1))


def student_confidence(rollouts: int, mu: float, sharpness: float, kind: str) -> float:
    """Mean confidence of the student at the minimum of the expected divergence, kind reverse or
    forward."""
    weights, teacher = binomial(rollouts, mu), reporter(rollouts, sharpness)
    p = softmax(weights @ np.log(teacher)) if kind == "reverse" else weights @ teacher
    return float(p @ np.linspace(0, 1, rollouts + 1))


def forward_bias(rollouts: int, mu: float, sharpness: float) -> float:
    """E[c] − μ under forward KL, (1 − w)(½ − μ): what the teacher copies wrongly pulls to ½."""
    w = np.expm1(sharpness) / (np.exp(sharpness) + rollouts)
    return float((1 - w) * (0.5 - mu))


def direct_confidence(rollouts: int, mu: float) -> tuple[float, float, float]:
    """(mean confidence, Brier of a sampled confidence, Brier of the mean) of p(c) = P(μ̂ = c).

    The confidence and the outcome R of a new answer are independent given the prompt.
    """
    p, levels = binomial(rollouts, mu), np.linspace(0, 1, rollouts + 1)
    mean = p @ levels
    brier = [mu * (1 - c) ** 2 + (1 - mu) * c ** 2 for c in (levels, mean)]
    return float(mean), float(p @ brier[0]), float(brier[1])


def mode(rollouts: int, mu: float) -> float:
    """The likeliest μ̂: ⌊(K + 1) μ⌋ / K; the level below is as likely where (K + 1) μ is whole.

    It is 0 below μ = 1/(K + 1) and 1 above K/(K + 1).
    """
    return min(int((rollouts + 1) * mu + 1e-12), rollouts) / rollouts


def calibration_error(rollouts: int, sharpness: float, kind: str,
                      mus: np.ndarray = np.linspace(0.01, 0.99, 99)) -> tuple[float, float]:
    """(mean |c − μ|, mean of c − μ where μ > ½) over evenly spread success rates.

    Where μ < ½ the bias is the same with the other sign.
    """
    gap = np.array([student_confidence(rollouts, mu, sharpness, kind) - mu for mu in mus])
    return float(np.abs(gap).mean()), float(gap[mus > 0.5].mean())


def slow_return(stuck: float, kind: str, optimizer: str, target: int = 7, rollouts: int = 8,
                sharpness: float = 6.0, rate: float = 0.1) -> int:
    """Updates until half the mass has moved to target/K, starting with log-odds `stuck` on 0.00.

    optimizer: descent, or adamw with the trainer's moments (.9 and .95).
    """
    logits, teacher = stuck * np.eye(rollouts + 1)[0], reporter(rollouts, sharpness)[target]
    m = v = np.zeros(rollouts + 1)
    for update in range(10 ** 6):
        p = softmax(logits)
        if p[target] > 0.5:
            return update
        gradient = kl_gradient(logits, teacher) if kind == "reverse" else p - teacher
        if optimizer == "adamw":
            m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient ** 2
            mean, square = m / (1 - 0.9 ** (update + 1)), v / (1 - 0.95 ** (update + 1))
            gradient = mean / (np.sqrt(square) + 1e-8)
        logits = logits - rate * gradient
    return 10 ** 6


COUNTS = (1, 2, 4, 8, 16, 32)


def main() -> None:
    print(__doc__)
    print("  Confidence of the student at the minimum, teacher sharpness 12 (K by μ(x)):\n")
    mus = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
    for kind in ("reverse", "forward"):
        show([f"{kind} KL", *(f"μ = {m}" for m in mus)],
             [[f"K = {k}", *(student_confidence(k, m, 12.0, kind) for m in mus)] for k in COUNTS])
        print()
    print("  Mean |c − μ| over evenly spread success rates / bias where μ > ½ (below ½: the "
          "opposite), by sharpness s:\n")
    settings = [(kind, s) for s in (4.0, 12.0) for kind in ("reverse", "forward")]
    show(["", *(f"{kind}, s = {s:g}" for kind, s in settings)],
         [[f"K = {k}", *("{:.3f} / {:+.3f}".format(*calibration_error(k, s, kind))
                         for kind, s in settings)] for k in COUNTS])
    print("\n  At K = 1 a sharp reverse KL rounds μ to 0 or 1: it polarizes, and is overconfident "
          "only where the student is\n"
          "  right more than half the time. The mode of μ̂ is within 1/K of μ. A large K needs a "
          "sharper teacher: there are\n"
          "  more levels to copy wrongly (at K = 32, s = 4 and μ = .9 forward KL is off by "
          f"{forward_bias(32, 0.9, 4.0):+.3f}), and under\n"
          "  reverse KL μ̂ spreads over more of them, so that exp(s · P) flattens.\n")
    print("  Cross-entropy on the replaced tokens: mean confidence, and what Brier pays over the "
          "floor at μ = .8:\n")
    floor, directs = 0.8 * 0.2, [(k, direct_confidence(k, 0.8)) for k in COUNTS]
    show(["", "mean confidence", "sampled, over the floor", "expected, over the floor"],
         [[f"K = {k}", mean, sampled - floor, abs(round(expected - floor, 12))]
          for k, (mean, sampled, expected) in directs])
    print("\n  The mode of μ̂ is at an end for μ < 1/(K+1) or μ > K/(K+1): at K = 8, "
          f"{mode(8, 0.11):.2f} up to μ = .11 and {mode(8, 0.89):.2f} from .89 on.\n"
          "  The toy writes the tenths first, in one token, and the nine levels of K = 8 differ in "
          "them.\n")
    print("  Updates until half the mass is on .88, for a student driven to 0.00 with these "
          "log-odds:\n")
    odds = (0.0, 4.0, 8.0, 12.0)
    show(["", *(f"{o:g}" for o in odds)],
         [[f"{kind}, {optimizer}", *(slow_return(o, kind, optimizer) for o in odds)]
          for optimizer in ("descent", "adamw") for kind in ("reverse", "forward")])
    print("\n  Reverse KL's gradient carries the vanished mass as a factor. Plain gradient descent "
          "is slowed by it, and AdamW,\n"
          "  which divides by the gradient's size, hardly is. in_the_trainer.py has a network.")
    draw()


def draw() -> None:
    save, axes = figure("rollouts", 12.0, 3.8, panels=3)
    if not save:
        return
    grid = np.linspace(0.005, 0.995, 199)
    for axis, (kind, s) in zip(axes, (("reverse", 12.0), ("reverse", 4.0), ("forward", 4.0))):
        for k in (1, 2, 8, 32):
            axis.plot(grid, [student_confidence(k, m, s, kind) - m for m in grid], lw=1.3,
                      label=f"K = {k}")
        axis.axhline(0, color="0.6", ls="--", lw=1)
        axis.set(xlabel="success rate μ(x)", ylabel="confidence − μ", ylim=(-0.55, 0.55),
                 title=f"{kind} KL, teacher sharpness {s:g}")
        axis.legend(fontsize=8, ncols=2)
    save()


if __name__ == "__main__":
    main()
