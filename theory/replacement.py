"""Target replacement: a student that is two tables, an answer head and a confidence head, trained by OPD and by CaOPD.

    Eq. 7:  L(x) = KL(π_θ(a|x) ‖ π_T(a|x,z))  +  KL(π_θ(c|x) ‖ π_T(c|x,z))
                   capability cloning             calibration

The teacher's answer table is the student's first one with z's push towards the right answer; its confidence table is
peaked at the value that its context states: 1.00 for OPD, the μ̂(x) of K fresh rollouts for CaOPD.
"""

import numpy as np

from worlds import entropy, figure, kl, show, softmax

ANSWERS, LEVELS = 5, np.linspace(0, 1, 9)  # answer 0 is right; confidences 0, 1/8, ..., 1
START = np.array([0.05, 0.15, 0.3, 0.45, 0.6, 0.8])  # μ(x) of the six prompts before training
PUSH = np.array([0.0, 2.5, 0.5, 1.5, 1.0, 3.0])  # how much the demonstration helps on each prompt


def kl_gradient(logits: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """d KL(softmax(logits)‖teacher) / d logits = p ⊙ (log p/q − KL), over the last axis."""
    p = softmax(logits)
    return p * (np.log(p / teacher) - kl(p, teacher)[..., None])


def start() -> tuple[np.ndarray, np.ndarray]:
    """(answer logits [X, A], confidence logits [X, C]): success START, and a habit of high confidence."""
    wrong = np.log((1 - START) / (ANSWERS - 1))[:, None].repeat(ANSWERS - 1, axis=1)
    return np.concatenate([np.log(START)[:, None], wrong], axis=1), np.tile(3 * LEVELS, (len(START), 1))


def mu_hat(rng: np.random.Generator, answers: np.ndarray, rollouts: int) -> np.ndarray:
    """The share of right answers among K rollouts of each prompt, [X]."""
    return rng.binomial(rollouts, softmax(answers)[:, 0]) / rollouts


def train(method: str, updates: int = 400, rollouts: int = 8, rate: float = 0.1, sharpness: float = 6.0,
          seed: int = 0) -> dict[str, np.ndarray]:
    """Trains both heads; returns success μ(x) and mean confidence [updates, X], and answer entropy [updates]."""
    rng, (answers, confidence) = np.random.default_rng(seed), start()
    answer_teacher = softmax(answers + PUSH[:, None] * np.eye(ANSWERS)[0])
    path = {"mu": [], "confidence": [], "entropy": []}
    for _ in range(updates):
        stated = np.ones(len(START)) if method == "opd" else mu_hat(rng, answers, rollouts)
        level = np.abs(LEVELS - stated[:, None]).argmin(1)
        confidence_teacher = softmax(sharpness * np.eye(len(LEVELS))[level])
        answers = answers - rate * kl_gradient(answers, answer_teacher)  # the same for both methods: I_a is untouched
        confidence = confidence - rate * kl_gradient(confidence, confidence_teacher)
        path["mu"].append(softmax(answers)[:, 0])
        path["confidence"].append(softmax(confidence) @ LEVELS)
        path["entropy"].append(entropy(softmax(answers)).mean())
    return {name: np.array(values) for name, values in path.items()}


if __name__ == "__main__":
    print(__doc__)
    runs = {"OPD": train("opd"), "CaOPD": train("caopd")}
    rows = []
    for name, path in runs.items():
        for t in (0, 24, 99, 399):
            gap = path["confidence"][t] - path["mu"][t]
            rows.append([f"{name}, update {t + 1}", path["mu"][t].mean(), path["confidence"][t].mean(), float(gap.mean()),
                         float(np.abs(gap).mean()), path["entropy"][t]])
    show(["", "success μ", "confidence", "OCG", "mean |c − μ(x)|", "answer entropy"], rows)
    seeds = [train("caopd", seed=s) for s in range(20)]
    error = np.array([np.abs(p["confidence"][-100:] - p["mu"][-100:]).mean() for p in seeds])
    print(f"\n  CaOPD's |c − μ(x)| over the last 100 updates, 20 seeds: {error.mean():.3f} ± {error.std():.3f}."
          "\n  The success curves of the two methods are the same curve: replacement changes the confidence head's target and nothing else."
          "\n  OPD's confidence goes to 1 on every prompt. CaOPD's follows a μ(x) that is itself moving, a little behind it.")
    save, axes = figure("replacement", 9.0, 3.4, panels=2)
    if save:
        for axis, (name, path) in zip(axes, runs.items()):
            for x in range(len(START)):
                axis.plot(path["mu"][:, x], color=f"C{x}", lw=1.2, ls="--")
                axis.plot(path["confidence"][:, x], color=f"C{x}", lw=1.2)
            axis.set(xlabel="update", title=f"{name}: success (dashed) and confidence, six prompts", ylim=(0, 1.03))
            axis.title.set_fontsize(9)
        save()
