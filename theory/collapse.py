"""Proposition 2, entropy collapse: what the teacher loses, and what the student inherits of it.

    H(A|X) − E H(A|X,Z) = I(A;Z|X)      H(A|X) is the entropy of the teacher's own mixture

The proposition compares the teacher with its mixture. For the student, who sees no z, the
divergence decides. With a fixed teacher, per prompt, on one symbol:

    argmin_p E_z KL(p‖π_z)   ∝ exp E_z log π_z             reverse KL: the logarithmic pool
    argmin_p E_z KL(π_z‖p)   = E_z π_z                     forward KL: the linear pool
    argmin_p E_z JSD(p, π_z) ∝ exp E_z log (p + π_z)/2     a fixed point between the two

When the teacher is the student itself with z added, the pool is fed back: its logits grow with
every round. Reverse KL ends at the answer of the likeliest context, if one is likeliest. Forward KL
ends there too, unless z pushes harder than the log-odds by which that context leads another.
"""

import numpy as np

from worlds import entropy, figure, kl, random_world, show, softmax


def reverse_pool(p_z: np.ndarray, teachers: np.ndarray) -> np.ndarray:
    """The p that minimizes Σ_z p(z) KL(p‖π_z), [A] from [Z], [Z, A]."""
    return softmax(p_z @ np.log(teachers))


def forward_pool(p_z: np.ndarray, teachers: np.ndarray) -> np.ndarray:
    """The p that minimizes Σ_z p(z) KL(π_z‖p), [A]."""
    return p_z @ teachers


def jsd_pool(p_z: np.ndarray, teachers: np.ndarray) -> np.ndarray:
    """The p that minimizes Σ_z p(z) JSD(p, π_z), [A]: where its derivative by p,
    ½ Σ_z p(z) log(p/m_z) with m_z = (p + π_z)/2, is the same for every answer."""
    p = forward_pool(p_z, teachers)
    for _ in range(1000):
        p, before = reverse_pool(p_z, (p + teachers) / 2), p
        if np.abs(p - before).max() < 1e-14:
            break
    return p


def objective(p: np.ndarray, p_z: np.ndarray, teachers: np.ndarray, kind: str) -> float:
    """Σ_z p(z) D(p, π_z) for kind reverse, forward or jsd."""
    m = (p + teachers) / 2
    p = p[None] + 0 * teachers  # [Z, A]
    each = {"reverse": kl(p, teachers), "forward": kl(teachers, p),
            "jsd": (kl(p, m) + kl(teachers, m)) / 2}[kind]
    return float(p_z @ each)


def gradient(logits: np.ndarray, p_z: np.ndarray, teachers: np.ndarray, kind: str) -> np.ndarray:
    """d objective / d logits of p = softmax(logits): p ⊙ (s − p·s), s the derivative by p. [A]"""
    p = softmax(logits)
    if kind == "forward":
        return p - p_z @ teachers
    other = teachers if kind == "reverse" else (p + teachers) / 2
    s = p_z @ np.log(p / other) * (1.0 if kind == "reverse" else 0.5)
    return p * (s - p @ s)


def descend(p_z: np.ndarray, teachers: np.ndarray, kind: str, steps: int = 4000,
            rate: float = 1.0) -> np.ndarray:
    """The student after gradient descent from the uniform distribution, [A].

    With sharp teachers it is slow: a vanishing probability hardly moves.
    """
    logits = np.zeros(teachers.shape[1])
    for _ in range(steps):
        logits -= rate * gradient(logits, p_z, teachers, kind)
    return softmax(logits)


def per_token_pool(p_z: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Two-token answers where the per-token forward KL is least, [A, A].

    first [Z, A] and second [Z, A, A]: the teacher's next token, the second one by prefix. Prefixes
    are the student's own, who sees no z: every context is weighted by p(z) at both of them, however
    unlikely that context makes the prefix.
    """
    return forward_pool(p_z, first)[:, None] * np.einsum("z,zab->ab", p_z, second)


P_Z = np.array([0.5, 0.3, 0.2])


def sharp_teachers(sharpness: float) -> np.ndarray:
    """Three contexts, each raising the logit of the answer it demonstrates, of four. [Z, A]"""
    return softmax(sharpness * np.eye(3, 4))


def feedback(kind: str, rate: float, odds: np.ndarray = P_Z, push: float = 1.0, steps: int = 2000,
             lr: float = 0.5) -> np.ndarray:
    """The student over time, [steps, A], when its teacher is an EMA of its own logits plus z.

    Each of the contexts, whose probabilities are `odds` [Z], adds `push` to the logit of its own
    answer; one answer has no context. rate 0 is the frozen teacher, 1 the live student.
    """
    demonstrated = push * np.eye(len(odds), len(odds) + 1)
    student, ema, path = np.zeros(len(odds) + 1), np.zeros(len(odds) + 1), []
    for _ in range(steps):
        student = student - lr * gradient(student, odds, softmax(ema + demonstrated), kind)
        ema = (1 - rate) * ema + rate * student
        path.append(softmax(student))
    return np.array(path)


def flattest(spread: float, worlds: int = 2000, seed: int = 0) -> float:
    """How often reverse KL's student has more entropy than forward KL's, over random teachers whose
    logits have the standard deviation `spread`."""
    rng, count = np.random.default_rng(seed), 0
    for _ in range(worlds):
        p_z, teachers = rng.dirichlet(np.ones(3)), softmax(spread * rng.normal(size=(3, 4)))
        flatter = entropy(reverse_pool(p_z, teachers)) > entropy(forward_pool(p_z, teachers))
        count += bool(flatter)
    return count / worlds


def main() -> None:
    print(__doc__)
    rng = np.random.default_rng(0)
    worlds = [random_world(rng) for _ in range(1000)]
    error = max(abs(w.mean(entropy(w.mixture)) - w.mean(entropy(w.teacher))
                    - w.information(w.teacher)) for w in worlds)
    print(f"  The identity on 1000 random worlds holds to {error:.0e}.\n")
    print("  Student entropy H(A|x) against teacher sharpness, contexts with odds .5 .3 .2:\n")
    rows = []
    for s in (0.0, 1.0, 2.0, 4.0, 8.0, 12.0):
        teachers = sharp_teachers(s)
        rows.append([f"{s:g}", float(P_Z @ entropy(teachers)),
                     *(float(entropy(pool(P_Z, teachers)))
                       for pool in (reverse_pool, jsd_pool, forward_pool))])
    show(["sharpness", "teacher", "reverse KL", "JSD", "forward KL"], rows)
    shares = ", ".join(f"{flattest(s):.0%} at {s:g}" for s in (0.25, 1.0, 4.0, 8.0))
    print("\n  With sharp teachers reverse KL collapses onto the likeliest context's answer, "
          "forward KL keeps the mixture's\n"
          "  entropy, and JSD stops in between. With soft ones the order turns round in this "
          "family, whose contexts\n"
          "  contradict each other. Over random teachers reverse KL's student is the flatter one "
          f"in {shares}\n"
          "  (standard deviation of the logits).")
    equal = np.full(3, 1 / 3)
    print("\n  Collapse needs unequal odds as well: with three equally likely contexts reverse KL "
          f"has {entropy(reverse_pool(equal, sharp_teachers(12.0))):.3f} nats at sharpness 12.\n")
    rates = [0.0, 0.01, 0.05, 1.0]
    print("  Self-distillation, entropy after 2000 updates (log 4 = 1.386 at the start), by the "
          "teacher's EMA rate:\n")
    show(["divergence", *(f"rate {r:g}" for r in rates)],
         [[k, *(float(entropy(feedback(k, r)[-1])) for r in rates)]
          for k in ("reverse", "jsd", "forward")])
    print("\n  A frozen teacher pushes once. One that follows the student pushes again and again: "
          "the rate sets the clock.\n"
          "  Where that ends, two contexts, live teacher, probability of the likelier one's "
          "answer:\n")
    show(["odds, log-odds", "push", "reverse", "forward"],
         [[f"{q:g} to {1 - q:.1g}, {np.log(q / (1 - q)):.2f}", push,
           *(float(feedback(kind, 1.0, np.array([q, 1 - q]), push, 20000)[-1, 0])
             for kind in ("reverse", "forward"))]
          for q, push in ((0.5, 1.0), (0.6, 1.0), (0.8, 1.0), (0.8, 2.0))])
    says = np.eye(2)
    two = per_token_pool(np.full(2, 0.5), says, np.repeat(says[:, None], 2, axis=1))
    print("\n  Two tokens: one context says AA, the other BB, with equal odds. The mixture gives "
          "½ to each. Per-token forward\n"
          f"  KL on the student's prefixes gives {two[0, 0]:g} to each of AA, AB, BA and BB.")
    draw()


def draw() -> None:
    save, axes = figure("collapse", 9.0, 3.6, panels=2)
    if not save:
        return
    grid = np.linspace(0, 12, 25)
    for name, pool in (("reverse KL", reverse_pool), ("JSD", jsd_pool),
                       ("forward KL", forward_pool)):
        axes[0].plot(grid, [entropy(pool(P_Z, sharp_teachers(s))) for s in grid], label=name)
    axes[0].plot(grid, [P_Z @ entropy(sharp_teachers(s)) for s in grid], color="0.5", ls="--",
                 label="the teacher, E H(A|X,Z)")
    axes[0].set(xlabel="teacher sharpness", title="student, fixed teacher")
    for rate in (0.0, 0.01, 0.05, 1.0):
        axes[1].plot(entropy(feedback("reverse", rate)), label=f"reverse, rate {rate:g}")
    axes[1].plot(entropy(feedback("forward", 1.0)), color="0.3", ls=":", label="forward, rate 1")
    axes[1].set(xlabel="update", title="student that teaches itself, push 1")
    for axis in axes:
        axis.set(ylabel="entropy (nats)", ylim=(0, 1.9))
        axis.legend(fontsize=8, ncols=2, loc="upper right")
    save()


if __name__ == "__main__":
    main()
