"""Cross-entropy on the replaced tokens (`caopd-direct`): the confidence without a teacher.

The value to state is known: μ̂ stands in ỹ. Cross-entropy on it is the forward KL from a point
mass, with the gradient p − e_ỹ. Its minimum is the law of μ̂ given the prompt, p(c) = P(μ̂ = c). So

    E[c] = μ                                     at any K; no error of copying, and nothing to drift

    Brier over the floor μ(1 − μ), by readout    sampled from p    μ(1 − μ)/K
                                                 the mean of p     0
                                                 the mode of p     (mode − μ)², at most 1/K²

It is written in tokens: the minimum at each token given those before is the law's own conditional,
and their product the law itself. Two decimals move E[c] by at most .005, and by nothing where K
divides 100.

K is also a way to spend N completions on N/K prompts. Where prompts that look alike share what is
learned, their mean confidence has the variance

    E[μ(1 − μ)]/N + Var(μ)·K/N                   the first term does not know K, the second wants 1

The token that ends the answer must not be learned like this. It is the student's own choice, which
ỹ repeats, and the choice decides which loss it gets. Let the student end its answer here with
probability p, the teacher with q. Where the student ended, the loss is cross-entropy, with weight w
(1 in Eq. 7). Where it went on, it is the reverse KL. Their mean has the gradient, on p's logit,

    p (1 − p) [(1 − p)(logit p − logit q) − w]

As long as q < 1/(1 + w e^(1+w)), .119 for w = 1, it is 0 at two values of p, both over q. p rests
at the lower one, and from beyond the upper one it runs to 1. For a larger q it is never 0, and p
runs to 1 from anywhere. So answers end more often than the teacher would end them, and may end
early. The trainer learns this token from the teacher, as it does the answer, and p = q is stable.
"""

import numpy as np

from rollouts import direct_confidence, mode, student_confidence
from worlds import binomial, figure, show, softmax


def over_the_floor(rollouts: int, mu: float) -> tuple[float, float, float]:
    """Brier over μ(1 − μ) of a confidence that is sampled, the mean, and the mode of p."""
    _, sampled, expected = direct_confidence(rollouts, mu)
    floor = mu * (1 - mu)
    return sampled - floor, expected - floor, (mode(rollouts, mu) - mu) ** 2


def descend(rollouts: int, mu: float, updates: int = 4000, rate: float = 1.0) -> np.ndarray:
    """p(c) [K + 1] after gradient descent on the expected cross-entropy, E[p − e_ỹ]."""
    logits, law = np.zeros(rollouts + 1), binomial(rollouts, mu)
    for _ in range(updates):
        logits = logits - rate * (softmax(logits) - law)
    return softmax(logits)


def by_character(rollouts: int, mu: float) -> dict[str, float]:
    """The law of what is written, `0.00` to `1.00`, as a product over characters of the conditional
    that is the minimum of cross-entropy at each of them."""
    strings = [f"{k / rollouts:.2f}" for k in range(rollouts + 1)]
    law, written = binomial(rollouts, mu), {}
    for string in set(strings):
        probability, before = 1.0, law.sum()
        for t in range(len(string)):
            after = sum(p for p, s in zip(law, strings) if s.startswith(string[:t + 1]))
            probability, before = probability * after / before, after
        written[string] = float(probability)
    return written


def variance_of_the_mean(p_x: np.ndarray, mu: np.ndarray, completions: int, rollouts: int) -> float:
    """Of the mean μ̂ of N/K prompts drawn from p_x [X] with success rates mu [X]."""
    within = p_x @ (mu * (1 - mu))
    between = p_x @ (mu - p_x @ mu) ** 2
    return float(within + rollouts * between) / completions


def ending_gradient(p: float, q: float, weight: float = 1.0) -> float:
    """Gradient on logit p of cross-entropy where the answer ended and reverse KL where it went on.
    """
    compared = p * (1 - p) * (np.log(p / (1 - p)) - np.log(q / (1 - q)))  # of KL(p‖q)
    return float(p * weight * (p - 1) + (1 - p) * compared)


def tipping_point(weight: float = 1.0) -> float:
    """The teacher's q above which p runs to 1 from anywhere."""
    return float(1 / (1 + weight * np.exp(1 + weight)))


def where_it_ends(q: float, weight: float = 1.0, updates: int = 30_000) -> float:
    """p after gradient descent from p = q."""
    logit = np.log(q / (1 - q))
    for _ in range(updates):
        p = 1 / (1 + np.exp(-logit))
        if p > 1 - 1e-6:
            break
        logit -= ending_gradient(p, q, weight)
    return float(p)


if __name__ == "__main__":
    print(__doc__)
    counts, mus = (1, 2, 4, 8, 16, 32), np.linspace(0.01, 0.99, 99)
    rows = []
    for k in counts:
        means = [student_confidence(k, 0.8, 4.0, kind) for kind in ("reverse", "forward")]
        written = by_character(k, 0.8)
        rows.append([f"K = {k}", *means, direct_confidence(k, 0.8)[0],
                     sum(float(string) * p for string, p in written.items())])
    print("  Mean confidence at μ = .8, by a teacher that copies at sharpness 4 and by none:\n")
    show(["", "reverse KL", "forward KL", "cross-entropy", "in two decimals"], rows)
    print("\n  What Brier pays over the floor, in the mean of evenly spread success rates:\n")
    costs = {k: np.array([over_the_floor(k, m) for m in mus]).clip(0).mean(0) for k in counts}
    show(["", "sampled", "mean", "mode"], [[f"K = {k}", *map(float, costs[k])] for k in counts])
    mu = np.array([0.1, 0.5, 0.9])
    print("\n  Standard deviation of what 512 completions teach of prompts that look alike:\n")
    even = np.full(3, 1 / 3)
    rows = [[name, *(variance_of_the_mean(even, values, 512, k) ** 0.5 for k in counts)]
            for name, values in (("all of success .5", np.full(3, 0.5)), (".1, .5 and .9", mu))]
    show(["", *(f"K = {k}" for k in counts)], rows)
    qs = (0.001, 0.01, 0.1, 0.12, 0.3)
    print("\n  How often the student ends its answer, if cross-entropy is on that token too:\n")
    show(["the teacher's q", *map(str, qs), "tips at q ="],
         [[f"weight {w}", *(where_it_ends(q, w) for q in qs), tipping_point(w)] for w in (1, 4)])
    print("\n  A large K sharpens the sampled confidence. Its mean is the same at any K, and"
          "\n  N completions teach the more of it the more prompts they are spent on.")
    save, axes = figure("direct", 10.0, 3.8, panels=2)
    if save:
        grid = np.linspace(0.005, 0.995, 199)
        for color, kind in enumerate(("reverse", "forward")):
            for k, style in ((8, "-"), (32, ":")):
                axes[0].plot(grid, [student_confidence(k, m, 4.0, kind) for m in grid], style,
                             color=f"C{color}", label=f"{kind} KL, K = {k}")
        axes[0].plot(grid, [direct_confidence(8, m)[0] for m in grid], color="C2",
                     label="cross-entropy, any K")
        axes[0].set(xlabel="success rate μ(x)", ylabel="mean confidence",
                    title="a teacher that copies at sharpness 4, and none")
        for column, name in enumerate(("sampled", "mean", "mode")):
            axes[1].plot(counts, [costs[k][column] for k in counts], "o-", ms=3, label=name)
        axes[1].set(xlabel="rollouts K", xscale="log", xticks=counts, xticklabels=counts,
                    ylabel="Brier over the floor", title="readouts of cross-entropy's minimum")
        axes[1].minorticks_off()
        for axis in axes:
            axis.title.set_fontsize(10)
            axis.legend(fontsize=8)
        save()
