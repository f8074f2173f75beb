"""Eq. 2 from fewer numbers: what each cheaper estimate of a token's KL does to its gradient.

At one prefix the student is p = softmax(logits), the teacher q; r = log q/p, V = E_p r = −KL(p‖q).
The exact gradient by the logits is G = p ⊙ (V − r). All of the others are estimates of it:

    single sample   −(r_y − b)(e_y − p), y ~ p      mean G for every constant b, with variance
                                                     E[(r − b)² w] − |G|², w_y = |e_y − p|²
    vOPD            b = V                            lower than b = 0 iff |V − b*| < |b*|
    vOPD, top-k     b = −KL(p̃‖q̃), p̃ and q̃          a baseline like any other: no bias, at the
                    renormalized over k tokens       price of E[w] (b − b*)²
    the best        b* = E[r w] / E[w]
    truncated       Σ_{v∈S} p log p/q                least at p = q/e on S: −Q/e, Q = q(S); negative
                                                     once log Q/P > KL(p̃‖q̃), P = p(S)
    with a tail     the same + the rest as one token least wherever p = q on S; never over the KL
    renormalized    KL(p̃‖q̃)                         least wherever p̃ = q̃: P is free

S holds the k tokens that the student likes best. A sampled estimator has the mean G only for
samples of the student. A replaced token ỹ is none: its mean gradient has another zero.
"""

import numpy as np

from rollouts import reporter
from worlds import binomial, figure, kl, kl_gradient, show, softmax


def reward(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """r = log q − log p, [V]."""
    return np.log(q) - np.log(p)


def likeliest(p: np.ndarray, k: int) -> np.ndarray:
    """S: whether a token is one of the k that p likes best, bool [V]."""
    chosen = np.zeros(len(p), dtype=bool)
    chosen[np.argsort(-p, kind="stable")[:k]] = True
    return chosen


def norms(p: np.ndarray) -> np.ndarray:
    """w_y = |e_y − p|² = 1 − 2 p_y + |p|², [V]: the square of ∇ log π(y) by the logits."""
    return 1 - 2 * p + p @ p


# ------------------------------------------------------------------- sampled: no bias, but variance


def best_baseline(p: np.ndarray, q: np.ndarray) -> float:
    """b* = E[r w] / E[w], of the constants the one with the least variance."""
    w = norms(p)
    return float(p @ (reward(p, q) * w) / (p @ w))


def top_k_baseline(p: np.ndarray, q: np.ndarray, k: int) -> float:
    """−KL(p̃‖q̃), both renormalized over the student's k likeliest tokens; V itself at k = V."""
    s = likeliest(p, k)
    return -float(kl(p[s] / p[s].sum(), q[s] / q[s].sum()))


def sampled_mean(p: np.ndarray, q: np.ndarray, b: float, drawn: np.ndarray) -> np.ndarray:
    """Mean of −(r_y − b)(e_y − p) over y ~ drawn, [V]. It is G where drawn is p."""
    advantage = drawn * (reward(p, q) - b)
    return p * advantage.sum() - advantage


def sampled_variance(p: np.ndarray, q: np.ndarray, b: float) -> float:
    """The trace of its covariance over y ~ p: E[(r − b)² w] − |G|²."""
    mean = sampled_mean(p, q, b, p)
    return float(p @ ((reward(p, q) - b) ** 2 * norms(p)) - mean @ mean)


# ------------------------------------------------------------------- top-k sums: no variance, bias


def truncated_kl(p: np.ndarray, q: np.ndarray, s: np.ndarray, kind: str) -> float:
    """The loss over the tokens S, bool [V]; kind: truncated, tail or renormalized."""
    P, Q = p[s].sum(), q[s].sum()
    if kind == "renormalized":
        return float(kl(p[s] / P, q[s] / Q))
    rest = (1 - P) * np.log((1 - P) / (1 - Q)) if kind == "tail" else 0.0
    return float(-(p * reward(p, q))[s].sum() + rest)


def truncated_gradient(p: np.ndarray, q: np.ndarray, s: np.ndarray, kind: str) -> np.ndarray:
    """d truncated_kl / d logits with S held fixed, [V]: p ⊙ (f − p·f), f the derivative by p."""
    P, Q = p[s].sum(), q[s].sum()
    if kind == "truncated":
        f = np.where(s, 1 - reward(p, q), 0.0)
    elif kind == "tail":
        f = np.where(s, -reward(p, q), np.log((1 - P) / (1 - Q)))
    else:
        f = np.where(s, (-reward(p, q) + np.log(Q / P) - truncated_kl(p, q, s, kind)) / P, 0.0)
    return p * (f - p @ f)


KINDS = ("truncated", "tail", "renormalized")


def descend(q: np.ndarray, start: np.ndarray, k: int, kind: str, updates: int = 2000,
            rate: float = 1.0) -> np.ndarray:
    """The student [V] after gradient descent, S chosen anew in each update as trainers do."""
    logits = np.log(start)
    for _ in range(updates):
        p = softmax(logits)
        logits = logits - rate * truncated_gradient(p, q, likeliest(p, k), kind)
    return softmax(logits)


# ------------------------------------------------------------------- tokens that are no samples


def on_replaced(logits: np.ndarray, weights: np.ndarray, teachers: np.ndarray,
                method: str) -> np.ndarray:
    """Mean gradient [C] on one confidence token that states level j with probability weights [C].

    teachers [C, C]: row j is the teacher whose context states j.
    method: full (the KL of Eq. 7), sampled or vopd (at the replaced token), direct (cross-entropy).
    """
    p = softmax(logits)
    if method == "direct":
        return p - weights
    if method == "full":
        return weights @ kl_gradient(logits, teachers)
    b = -kl(p, teachers) if method == "vopd" else 0.0
    advantage = weights * (np.log(np.diag(teachers) / p) - b)
    return p * advantage.sum() - advantage


def rests(rollouts: int, mu: float, sharpness: float, method: str, updates: int = 3000) -> float:
    """Mean confidence where descent on replaced tokens comes to rest, μ̂ ~ Binomial(K, μ)/K."""
    weights, teachers = binomial(rollouts, mu), reporter(rollouts, sharpness)
    logits = np.zeros(rollouts + 1)
    rate = 1.0 if method == "direct" else 3 / sharpness  # the teacher's log-odds scale the gradient
    for _ in range(updates):
        logits = logits - rate * on_replaced(logits, weights, teachers, method)
    return float(softmax(logits) @ np.linspace(0, 1, rollouts + 1))


# ------------------------------------------------------------------- tables and figure

VOCABULARY = 50


def random_pair(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A student with a long tail (Zipf, exponent 1.5) and a teacher unlike it, [V] each."""
    zipf = -1.5 * np.log(np.arange(1, VOCABULARY + 1))
    p = softmax(zipf + 0.5 * rng.normal(size=VOCABULARY))
    return p, softmax(np.log(p) + rng.normal(size=VOCABULARY))


def print_sampled(pairs: list, ks: list[int]) -> None:
    def row(name, baseline):
        ratio = np.array([sampled_variance(p, q, baseline(p, q)) / sampled_variance(p, q, 0.0)
                          for p, q in pairs])
        return [name, float(np.median(ratio)), float(ratio.max()), float((ratio < 1).mean())]
    show(["variance over that of b = 0", "median", "largest", "share below 1"],
         [row("vOPD, b = V", lambda p, q: -float(kl(p, q)))]
         + [row(f"vOPD, top-{k}", lambda p, q, k=k: top_k_baseline(p, q, k)) for k in ks]
         + [row("b*, the best constant", best_baseline)])


def bias(p: np.ndarray, q: np.ndarray, k: int, kind: str) -> float:
    """|gradient − G| / |G|."""
    exact = kl_gradient(np.log(p), q)
    off = truncated_gradient(p, q, likeliest(p, k), kind) - exact
    return float(np.linalg.norm(off) / np.linalg.norm(exact))


def print_truncated(pairs: list, ks: list[int], ended: dict) -> None:
    rows = []
    for kind in KINDS:
        for k in ks:
            losses = [truncated_kl(p, q, likeliest(p, k), kind) for p, q in pairs]
            at_teacher = [np.linalg.norm(truncated_gradient(q, q, likeliest(q, k), kind))
                          for _, q in pairs]
            rows.append([f"{kind}, k = {k}", float(np.mean(np.array(losses) < 0)),
                         float(np.median([bias(p, q, k, kind) for p, q in pairs])),
                         float(np.median(at_teacher)), ended[kind][k]])
    show(["", "loss < 0", "|bias| / |G|", "|gradient| at p = q", "KL after descent"], rows)


if __name__ == "__main__":
    print(__doc__)
    rng = np.random.default_rng(0)
    pairs, ks = [random_pair(rng) for _ in range(200)], [1, 2, 5, 10, 20]
    p, q = pairs[0]
    print(f"  200 random students and teachers over {VOCABULARY} tokens.\n")
    print_sampled(pairs, ks)
    print("\n  All of these have the mean G. The baseline is worth a tenth of the variance here, a"
          "\n  top-k one nearly as much, and either can also raise it.\n")
    ended = {kind: {k: float(kl(descend(q, p, k, kind), q)) for k in ks} for kind in KINDS}
    print_truncated(pairs, ks, ended)
    print(f"\n  The last column is of the first pair, whose KL was {kl(p, q):.3f} before. Without"
          "\n  its tail the sum rewards the student for leaving S, even where it is the teacher"
          "\n  already. With the tail as one token nothing pulls at p = q.\n")
    rows = []
    for k, mu in ((1, 0.6), (1, 0.8), (1, 0.9), (8, 0.6), (8, 0.8), (8, 0.9)):
        rows.append([f"K = {k}, μ = {mu}"]
                    + [rests(k, mu, 12.0, m) for m in ("full", "sampled", "vopd", "direct")])
    print("  Confidence on replaced tokens, teacher sharpness 12:\n")
    show(["", "full KL", "single sample", "vOPD", "cross-entropy"], rows)
    print("\n  At K = 1 a sharp teacher leaves vOPD the square root of the odds of μ: .8 becomes"
          "\n  2/3. Full KL goes to the mode. Only cross-entropy rests at μ itself.")
    save, axes = figure("estimators", 12.0, 3.8, panels=3)
    if save:
        grid = list(range(1, VOCABULARY - 1, 2))
        for kind in KINDS:
            axes[0].plot(grid, [np.median([bias(p, q, k, kind) for p, q in pairs[:50]])
                                for k in grid], label=kind)
            axes[1].plot(ks, list(ended[kind].values()), "o-", ms=3, label=kind)
        axes[0].set(xlabel="k", ylabel="|bias| / |G|", ylim=(0, None),
                    title="the gradient of a top-k sum")
        axes[1].axhline(kl(p, q), color="0.5", ls="--", lw=1, label="before training")
        axes[1].set(xlabel="k", ylabel="KL(student‖teacher)", xticks=ks, title="where descent ends")
        mus = np.linspace(0.02, 0.98, 33)
        for method, name in (("full", "full KL"), ("vopd", "vOPD"), ("direct", "cross-entropy")):
            axes[2].plot(mus, [rests(1, m, 12.0, method) for m in mus], label=name)
        root = np.sqrt(mus / (1 - mus))
        axes[2].plot(mus, root / (1 + root), color="0.3", ls=":", label="√ of the odds of μ")
        axes[2].set(xlabel="success rate μ(x)", ylabel="confidence",
                    title="on replaced tokens, K = 1")
        for axis in axes:
            axis.legend(fontsize=8)
        save()
