"""Proposition 2, entropy collapse: what the teacher loses, and what the student inherits of it.

    H(A|X) − E H(A|X,Z) = I(A;Z|X)                                   the teacher is more certain, by what z says of A

For the student, who sees no z, the divergence decides. With a fixed teacher, per prompt:

    argmin_p E_z KL(p‖π_z) ∝ exp E_z log π_z      reverse KL: the logarithmic pool, the normalized geometric mean
    argmin_p E_z KL(π_z‖p) = E_z π_z              forward KL: the linear pool, the arithmetic mean
    argmin_p E_z JSD(p, π_z)                      no closed form; a compromise between the two

When the teacher is the student itself with z added, the pool is fed back: its logits grow with every round.
"""

import numpy as np

from worlds import entropy, figure, kl, random_world, show, softmax


def reverse_pool(p_z: np.ndarray, teachers: np.ndarray) -> np.ndarray:
    """The p that minimizes Σ_z p(z) KL(p‖π_z), [A] from [Z], [Z, A]."""
    return softmax(p_z @ np.log(teachers))


def forward_pool(p_z: np.ndarray, teachers: np.ndarray) -> np.ndarray:
    """The p that minimizes Σ_z p(z) KL(π_z‖p), [A]."""
    return p_z @ teachers


def objective(p: np.ndarray, p_z: np.ndarray, teachers: np.ndarray, kind: str) -> float:
    """Σ_z p(z) D(p, π_z) for kind reverse, forward or jsd."""
    m = (p + teachers) / 2
    p = p[None] + 0 * teachers  # [Z, A]
    each = {"reverse": kl(p, teachers), "forward": kl(teachers, p), "jsd": (kl(p, m) + kl(teachers, m)) / 2}[kind]
    return float(p_z @ each)


def gradient(logits: np.ndarray, p_z: np.ndarray, teachers: np.ndarray, kind: str) -> np.ndarray:
    """d objective / d logits of p = softmax(logits): p ⊙ (s − p·s), with s the derivative by p. [A]"""
    p = softmax(logits)
    if kind == "forward":
        return p - p_z @ teachers
    other = teachers if kind == "reverse" else (p + teachers) / 2
    s = p_z @ np.log(p / other) * (1.0 if kind == "reverse" else 0.5)
    return p * (s - p @ s)


def descend(p_z: np.ndarray, teachers: np.ndarray, kind: str, steps: int = 4000, rate: float = 1.0) -> np.ndarray:
    """The student after gradient descent from the uniform distribution, [A]."""
    logits = np.zeros(teachers.shape[1])
    for _ in range(steps):
        logits -= rate * gradient(logits, p_z, teachers, kind)
    return softmax(logits)


P_Z = np.array([0.5, 0.3, 0.2])


def sharp_teachers(sharpness: float) -> np.ndarray:
    """Three contexts, each raising the logit of the answer it demonstrates, over four answers. [Z, A]"""
    return softmax(sharpness * np.eye(3, 4))


def feedback(kind: str, rate: float, steps: int = 2000, push: float = 1.0, lr: float = 0.5) -> np.ndarray:
    """Student entropy over time when the teacher is an EMA of the student's own logits with z's push added. [steps]

    rate 0 is the frozen teacher, 1 the live student.
    """
    student, ema, path = np.zeros(4), np.zeros(4), []
    for _ in range(steps):
        student = student - lr * gradient(student, P_Z, softmax(ema + push * np.eye(3, 4)), kind)
        ema = (1 - rate) * ema + rate * student
        path.append(entropy(softmax(student)))
    return np.array(path)


if __name__ == "__main__":
    print(__doc__)
    rng = np.random.default_rng(0)
    worlds = [random_world(rng) for _ in range(1000)]
    error = max(abs(w.mean(entropy(w.mixture)) - w.mean(entropy(w.teacher)) - w.information(w.teacher)) for w in worlds)
    print(f"  The identity on 1000 random worlds holds to {error:.0e}.\n")
    print("  Student entropy H(A|x) against teacher sharpness, contexts with odds .5 .3 .2 (pool in closed form; descent: gradient descent):\n")
    rows, sharpness = [], [0.0, 1.0, 2.0, 4.0, 8.0, 12.0]
    for s in sharpness:
        teachers = sharp_teachers(s)
        students = (reverse_pool(P_Z, teachers), descend(P_Z, teachers, "reverse"), descend(P_Z, teachers, "jsd"),
                    forward_pool(P_Z, teachers), descend(P_Z, teachers, "forward"))
        rows.append([f"{s:g}", float(P_Z @ entropy(teachers)), *(float(entropy(p)) for p in students)])
    show(["sharpness", "teacher", "reverse pool", "descent", "JSD descent", "forward pool", "descent"], rows)
    print("\n  With sharp teachers reverse KL collapses onto the likeliest context's answer, forward KL keeps the H(A|X) of the teacher's mixture,"
          "\n  and JSD stops in between. With soft teachers the order is the other way round: the geometric mean of disagreeing teachers is the"
          "\n  flattest of the three, and around sharpness 4 JSD is below both. Proposition 2 speaks of the teacher; it becomes a statement about"
          "\n  the student only through the divergence and the sharpness.\n")
    rates = [0.0, 0.01, 0.05, 1.0]
    print("  Self-distillation, entropy after 2000 updates (log 4 = 1.386 at the start), by the teacher's EMA rate:\n")
    show(["divergence", *(f"rate {r:g}" for r in rates)],
         [[k, *(float(feedback(k, r)[-1]) for r in rates)] for k in ("reverse", "jsd", "forward")])
    print("\n  A frozen teacher pushes once. A teacher that follows the student pushes again and again, and reverse KL then ends at one answer:"
          "\n  the EMA rate sets the clock, not the destination. Forward KL loses entropy too, but comes to rest at a mixture.")
    save, axes = figure("collapse", 9.0, 3.6, panels=2)
    if save:
        grid = np.linspace(0, 12, 25)
        for kind, pool in (("reverse", reverse_pool), ("forward", forward_pool)):
            axes[0].plot(grid, [entropy(pool(P_Z, sharp_teachers(s))) for s in grid], label=f"{kind} KL")
        axes[0].plot(grid, [entropy(descend(P_Z, sharp_teachers(s), "jsd", 1500)) for s in grid], label="JSD")
        axes[0].plot(grid, [P_Z @ entropy(sharp_teachers(s)) for s in grid], color="0.5", ls="--", label="the teacher, E H(A|X,Z)")
        axes[0].set(xlabel="teacher sharpness", ylabel="entropy (nats)", title="student, fixed teacher")
        for r in rates:
            axes[1].plot(feedback("reverse", r), label=f"reverse, rate {r:g}")
        axes[1].plot(feedback("forward", 1.0), color="0.3", ls=":", label="forward, rate 1")
        axes[1].set(xlabel="update", title="student that teaches itself")
        for axis in axes:
            axis.set_ylim(0, 1.9)
            axis.legend(fontsize=8, ncols=2, loc="upper right")
        save()
