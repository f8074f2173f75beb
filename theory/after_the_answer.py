"""A confidence stated after the answer: what it can reach, what each target teaches it, what lasts.

The deployed student writes a, then c, so c may depend on both. With μ(x,a) = P(R = 1|x,a):

    E(c − R)² = F + E(c − μ(x,a))²,  F = E Var(R|x,a)          the floor of any c(x,a)
    E[μ(x)(1 − μ(x))] = F + B,  B = E Var(μ(x,a)|x)            the floor of any c(x): B stays on the
                                                                table

A rollout is told T = λR + (1 − λ)·(success rate of the other K − 1). Leave-one-out is λ = 0, the
target R (K = 1) is λ = 1, and μ̂, which contains the rollout's own R, is λ = 1/K. Cross-entropy on
T in a table of (x,a) has its minimum at the law of T given (x,a), and so

    E[T|x,a] = μ(x) + λ(μ(x,a) − μ(x))         expected readout:  Brier = F + (1 − λ)² B
    Var(T|x,a), added by a sampled readout:    λ² F + (1 − λ)² (F + B) / (K − 1)

The sampled readout is best at λ* = G/(F + G), G = B + (F + B)/(K − 1). B can be had on a *new*
question only as far as what a says of R is shared between questions. Where R is a function of
(x,a), as under a verifier, a table of (x,a) reaches 0 on its training questions by heart.

One such confidence needs no training: the probability of the answer itself. With a* the one right
answer, μ(x) = π(a*|x), and

    E[(π(a|x) − R)²|x] = μ(x)(1 − μ(x)) + Σ_{a≠a*} π(a|x) (π(a|x)² − μ(x)²)

so that it is at least as good as every c(x) where a* is the likeliest answer. Where a wrong one is,
it may pay more.
"""

import numpy as np

from prompt_level import spr, spr_ceiling
from worlds import figure, show, softmax


def parts(p_x: np.ndarray, answers: np.ndarray, success: np.ndarray) -> tuple[float, float]:
    """(F, B) = (E Var(R|x,a), E Var(μ(x,a)|x)).

    p_x [X]; answers [X, A] = π_θ(a|x); success [X, A] = μ(x,a) = P(R = 1|x,a).
    """
    mu = (answers * success).sum(1)  # μ(x), [X]
    floor = p_x @ (answers * success * (1 - success)).sum(1)
    between = p_x @ (answers * (success - mu[:, None]) ** 2).sum(1)
    return float(floor), float(between)


def stated(answers: np.ndarray, success: np.ndarray, own: float) -> np.ndarray:
    """E[T|x,a], [X, A], where own = λ is the weight of the rollout's own R."""
    mu = (answers * success).sum(1, keepdims=True)
    return mu + own * (success - mu)


def brier(floor: float, between: float, own: float, rollouts: int) -> tuple[float, float]:
    """(expected readout, sampled readout) after training on T with weight own = λ and K ≥ 2."""
    expected = floor + (1 - own) ** 2 * between
    noise = own ** 2 * floor + (1 - own) ** 2 * (floor + between) / (rollouts - 1)
    return expected, expected + noise


def best_weight(floor: float, between: float, rollouts: int) -> float:
    """λ* of the sampled readout: G/(F + G), G = B + (F + B)/(K − 1)."""
    gain = between + (floor + between) / (rollouts - 1)
    return gain / (floor + gain)


def likelihood_over_the_floor(answers: np.ndarray, right: int) -> float:
    """Brier of c = π(a|x) over μ(1 − μ), for a prompt with answers [A] = π(a|x), one of them right.
    """
    wrong = np.delete(answers, right)
    return float((wrong * (wrong ** 2 - answers[right] ** 2)).sum())


# ------------------------------------------------------------------- what lasts on new questions

# A kind of question fixes what the student believes: b[s, a] is how often answer a is the right one
# of a question of kind s. The student samples from belief itself, and so is calibrated. Of a single
# question, R is a function of the answer.


def calibrated(beliefs: np.ndarray) -> dict[str, float]:
    """Brier floors of the four things that c may depend on, kinds [S, A] equally likely.

    On new questions c can know the kind, or kind and answer; by heart, the question, or all of R.
    """
    second, third = (beliefs ** 2).sum(1), (beliefs ** 3).sum(1)
    return {"kind": float((second * (1 - second)).mean()),  # E[R|s] = Σ b²
            "kind and answer": float((second - third).mean()),  # E[R|s,a] = b
            "question": float((second - third).mean()),  # μ(x) = b of the right answer
            "question and answer": 0.0}


def ask(rng: np.random.Generator, beliefs: np.ndarray, questions: int,
        rollouts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training questions, as many of each kind: (kinds [N], right answers [N], counts [N, A])."""
    kinds = np.arange(questions) % len(beliefs)
    right = np.array([rng.choice(beliefs.shape[1], p=beliefs[s]) for s in kinds])
    return kinds, right, rng.multinomial(rollouts, beliefs[kinds])


def mean_target(right: np.ndarray, counts: np.ndarray, own: float) -> np.ndarray:
    """Mean of T over the rollouts of a question that gave answer a, [N, A]; own is λ."""
    total, is_right = counts.sum(1, keepdims=True), np.eye(counts.shape[1])[right]
    hits = (counts * is_right).sum(1, keepdims=True)
    others = (hits - is_right) / np.maximum(total - 1, 1)
    return own * is_right + (1 - own) * others


def learn(kinds: np.ndarray, right: np.ndarray, counts: np.ndarray, targets: np.ndarray,
          beliefs: np.ndarray, updates: int, rate: float = 30.0) -> tuple[np.ndarray, np.ndarray]:
    """Brier over the updates, (on the training questions, on new ones), [updates] each.

    Cross-entropy on the targets by gradient descent; the logit of c is u[kind, a], which new
    questions share, plus v[question, a], which they do not have.
    """
    u, v = np.zeros(beliefs.shape), np.zeros(counts.shape)
    is_right, p = np.eye(counts.shape[1])[right], beliefs[kinds]
    trained, new = [], []
    for _ in range(updates):
        c, shared = 1 / (1 + np.exp(-(u[kinds] + v))), 1 / (1 + np.exp(-u))
        trained.append((p * (c - is_right) ** 2).sum(1).mean())
        misses = beliefs * (1 - shared) ** 2 + (1 - beliefs) * shared ** 2  # [S, A]
        new.append((beliefs * misses).sum(1).mean())
        gradient = counts * (c - targets) / counts.sum()
        v -= rate * gradient
        np.add.at(u, kinds, -rate * gradient)
    return np.array(trained), np.array(new)


BELIEFS = softmax(np.array([0.3, 0.8, 1.5, 2.2, 3.0, 4.0])[:, None] * np.array([1.0, 0, 0, 0]))


if __name__ == "__main__":
    print(__doc__)
    p_x, rollouts = np.full(len(BELIEFS), 1 / len(BELIEFS)), 8
    floor, between = parts(p_x, BELIEFS, BELIEFS)
    mu = (BELIEFS ** 2).sum(1)
    print("  Six kinds of questions, four answers, a calibrated student: its likeliest answer has"
          f"\n  {', '.join(f'{b:.2f}' for b in BELIEFS.max(1))}. "
          f"F = {floor:.3f}, B = {between:.3f}.\n")
    rows = []
    best = best_weight(floor, between, rollouts)
    for name, own in (("leave-one-out", 0.0), ("μ̂", 1 / rollouts), ("λ*", best),
                      ("half and half", 0.5), ("R", 1.0)):
        c = stated(BELIEFS, BELIEFS, own)
        order = spr((p_x[:, None] * BELIEFS).ravel(), BELIEFS.ravel(), c.ravel())
        rows.append([name, own, *brier(floor, between, own, rollouts), order])
    show(["target, K = 8", "λ", "Brier, expected", "Brier, sampled", "SPR, expected"], rows)
    print(f"\n  Prompt-level: Brier {floor + between:.3f}, SPR {spr_ceiling(p_x, mu):.3f}."
          "\n  μ̂ leaves (1 − 1/K)² of B on the table, and passes the prompt-level SPR all the"
          "\n  same: it breaks the ties of one prompt the right way.\n")
    print("  What the confidence may depend on, and its floor:\n")
    show(["", "Brier floor"], [[k, v] for k, v in calibrated(BELIEFS).items()])
    print("\n  To know the answer on a new question is worth exactly what knowing μ(x) by heart is"
          "\n  on a trained one: R = 1 where the given and the right answer agree, both from b.\n")
    print("  What the probability of the answer itself pays over μ(1 − μ), where all wrong answers"
          "\n  are as likely as each other:\n")
    mus = (0.1, 0.3, 0.5, 0.7, 0.9)
    rows = [[f"{n} wrong answers", *(likelihood_over_the_floor(
        np.array([m, *[(1 - m) / n] * n]), 0) for m in mus)] for n in (1, 3, 10)]
    show(["", *(f"μ = {m}" for m in mus)], rows)
    print("\n  Brier on trained questions | on new ones, 2,000 updates (a logit for each kind and"
          "\n  answer, and one for each question and answer), 3 seeds:\n")
    rows, curves = [], {}
    for questions, k in ((768, 1), (96, 8), (12, 64)):
        for name, own in (("μ̂", 1 / k), ("R", 1.0)):
            if k == 1 and name == "μ̂":
                continue  # it is R
            runs = []
            for seed in range(3):
                kinds, right, counts = ask(np.random.default_rng(seed), BELIEFS, questions, k)
                targets = mean_target(right, counts, own)
                runs.append(learn(kinds, right, counts, targets, BELIEFS, 2000))
            trained, new = np.mean(runs, axis=0)
            curves[questions, name] = trained, new
            rows.append([f"{questions} questions x {k} rollouts, {name}", float(trained[-1]),
                         float(new[-1]), float(new.min()), int(new.argmin())])
    show(["768 completions", "trained", "new", "new, at best", "at update"], rows)
    print("\n  With the target R the training questions are learned by heart, and their Brier says"
          "\n  nothing of the new ones, which are best early. Rollouts of one question share one R"
          "\n  for each answer: what lasts is paid for in different questions.")
    save, axes = figure("after_the_answer", 10.0, 3.8, panels=2)
    if save:
        grid = np.linspace(0, 1, 101)
        curve = np.array([brier(floor, between, v, rollouts) for v in grid])
        axes[0].plot(grid, curve[:, 0], label="expected readout")
        axes[0].plot(grid, curve[:, 1], label="sampled readout")
        axes[0].axhline(floor + between, color="0.5", ls="--", lw=1, label="floor of c(x), F + B")
        axes[0].axhline(floor, color="0.2", ls=":", lw=1, label="floor of c(x,a), F")
        for value, name in ((0, "LOO"), (1 / rollouts, "μ̂"), (1, "R")):
            axes[0].annotate(name, (value, brier(floor, between, value, rollouts)[0]), ha="center",
                             xytext=(0, -14), textcoords="offset points", fontsize=9)
        axes[0].set(xlabel="λ, weight of the rollout's own R", ylabel="Brier", ylim=(0.1, None),
                    title="what a target reaches, K = 8")
        for name, color in (("μ̂", "C0"), ("R", "C3")):
            trained, new = curves[96, name]
            axes[1].plot(np.arange(1, 2001), trained, color=color, ls="--", lw=1.2,
                         label=f"target {name}, trained questions")
            axes[1].plot(np.arange(1, 2001), new, color=color,
                         label=f"target {name}, new questions")
        axes[1].axhline(floor, color="0.2", ls=":", lw=1, label="floor on new ones, F")
        axes[1].set(xlabel="update", xscale="log", ylabel="Brier", ylim=(0, 0.42),
                    title="96 questions, 8 rollouts each")
        axes[0].legend(fontsize=8)
        axes[1].legend(fontsize=8, loc="upper right")
        save()
