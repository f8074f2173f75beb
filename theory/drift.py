"""A teacher that follows its student forgets how to copy, which is all that it was there for.

The confidence head has logits that student and teacher share, and a part of its own for each:

    student  b + θ_x          prompt x           teacher  b̄ + s·e_j     its context states level j

b̄ is the moving average of b, at rate ρ an update. Along ỹ the student meets a teacher that states
μ̂(x), and reverse KL goes to their logarithmic pool b̄ + s·m_x, m_x = P(μ̂(x) = ·). The student is
never asked to copy, so nothing keeps b where copying works. Descent with one rate for all parts
gives b the share X/(X + 1) of the mean of what X prompts ask for. While b̄ stays put, b stops at

    b − b̄ = s·δ,  δ = X/(X + 1) · m̄,  m̄ = mean of m_x

and the student, were it shown level j, would prefer j over the favourite f by s(1 − (δ_f − δ_j))
where it was s: a decay that can be measured. A teacher that follows takes it over, and the student
then pays it again. To first order in ρt, for a student that keeps up,

    b̄(t) = b̄(0) + ρ t s δ

    ρ t (δ_f − δ_j) > 1                    the teacher no longer copies level j
    ρ t (δ_f − δ_j) > m_x(j) − m_x(f)      prompt x no longer states its level j, but f

whatever the sharpness s. First the rare levels go, and in the end every prompt says f.

    python theory/drift.py [DIRECTORY]     measures δ in the models of caopd.py too [out/toy]
"""

import sys
from pathlib import Path

import numpy as np

from worlds import binomial, figure, kl_gradient, show, softmax

ROLLOUTS, LEVELS, SHARPNESS = 8, np.linspace(0, 1, 9), 6.0
MU = np.array([1.0, 0.99, 0.98, 0.95, 0.9, 0.5, 0.1, 0.0])  # most prompts are easy: f is 1.00
STATED = np.array([binomial(ROLLOUTS, mu) for mu in MU])  # m_x, [X, C]


def decay() -> np.ndarray:
    """δ = X/(X + 1) · m̄, [C]."""
    return len(MU) / (len(MU) + 1) * STATED.mean(0)


def law(passed: np.ndarray) -> np.ndarray:
    """b̄ [T, C] where ρt = passed [T], for a student that keeps up.

    θ_x takes what b leaves, 1/(X + 1) of each move, so b̄ slows down: s·X·m̄·(1 − e^(−ρt/(X + 1))).
    """
    grown = (len(MU) + 1) * (1 - np.exp(-np.asarray(passed) / (len(MU) + 1)))
    return SHARPNESS * grown[:, None] * decay()


def lost_at(delta: float) -> float:
    """ρt at which the teacher has lost a level by `law`, of which the student loses a share
    delta = δ_f − δ_j; infinite for one that it keeps for ever."""
    share = (len(MU) + 1) * delta
    return -(len(MU) + 1) * np.log1p(-1 / share) if share > 1 else np.inf


def copying(b: np.ndarray) -> np.ndarray:
    """P(says j | told j) with shared logits b [C], [C]."""
    return np.diag(softmax(b + SHARPNESS * np.eye(len(b))))


def train(rate: float, updates: int, method: str = "caopd",
          lr: float = 4.0) -> dict[str, np.ndarray]:
    """Gradient descent: the student's mean confidence [T, X], its b and the teacher's b̄, [T, C].

    method: caopd; direct (cross-entropy on μ̂, no teacher); replay (caopd, and with every update a
    document for each stated level to copy); carried (the teacher also reads its average of θ_x).
    """
    b, theta = np.zeros(len(LEVELS)), np.zeros(STATED.shape)
    b_bar, theta_bar = b, theta
    path = {"confidence": [], "student": [], "teacher": []}
    for _ in range(updates):
        p = softmax(b + theta)
        for values, value in zip(path.values(), (p @ LEVELS, b, b_bar)):
            values.append(value)
        pool = softmax(b_bar + SHARPNESS * STATED + (theta_bar if method == "carried" else 0.0))
        gradient = (p - STATED if method == "direct" else kl_gradient(b + theta, pool)) / len(MU)
        shared = gradient.sum(0)
        if method == "replay":
            told = STATED.mean(0)
            shared = shared + told @ softmax(b + SHARPNESS * np.eye(len(b))) - told
        b, theta = b - lr * shared, theta - lr * gradient
        b_bar, theta_bar = b_bar + rate * (b - b_bar), theta_bar + rate * (theta - theta_bar)
    return {name: np.array(values) for name, values in path.items()}


def error(confidence: np.ndarray) -> np.ndarray:
    """Mean |c − μ| over prompts, [T]."""
    return np.abs(confidence - MU).mean(-1)


# ------------------------------------------------------------------- the small transformer


def measure(directory: Path, questions: int = 48) -> list[list]:
    """Rows of what the models in `directory` do where a teacher would: told a value, the right
    answer behind them, do they state it? Mean over the levels k/8 below 1.00.

    The margin is log P(told value) − log P(1.00), in nats.
    """
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch

    import caopd
    import data
    from metrics import VALUES
    from model import Transformer
    tokenizer, task = data.toy_tokenizer(), data.arithmetic_task(0, questions, words=False)
    rows, before = [], None
    for name in ("base", "opd", "caopd", "caopd-direct"):
        if not (directory / name).exists():
            continue
        model, said = Transformer.from_pretrained(directory / name), []
        for level in np.round(LEVELS[:-1], 2):
            groups = []
            for example in task.held_out:
                text = data.with_confidence(example.demo, level)
                messages = data.teacher_messages(example, task.wording, text, report=level)
                ids = tokenizer.encode(text) + [tokenizer.eos_ids[0]]
                groups.append(caopd.Group(example, tokenizer.chat(messages),
                                          [caopd.Rollout(ids, text, False, True, level)]))
            with torch.no_grad():
                _, p = caopd.score_answers(model, tokenizer, groups, 16384)
            said.append([p[:, round(100 * level)], p[:, -1], p @ VALUES - level])
        told, certain, off = np.array(said).transpose(1, 0, 2)  # [levels, questions] each
        margin = float(np.log((told + 1e-30) / (certain + 1e-30)).mean())
        before = margin if before is None else before
        rows.append([caopd.title(name), float(told.mean()), float(off.mean()), margin,
                     1 - margin / before])
    return rows


if __name__ == "__main__":
    print(__doc__)
    frozen, delta, shown = train(0.0, 4000), decay(), (0, 1, 4, 7)
    measured = (frozen["student"][-1] - frozen["student"][0]) / SHARPNESS
    print(f"  Eight prompts, μ = {', '.join(f'{mu:g}' for mu in MU)}, K = 8. δ_f − δ_j for f ="
          "\n  1.00, measured as what a student loses of its copying under a frozen teacher:\n")
    show(["level j", "X/(X+1) (m̄_f − m̄_j)", "measured", "lost at ρt, first order", "by the law"],
         [[f"{LEVELS[j]:.2f}", float(delta[-1] - delta[j]), float(measured[-1] - measured[j]),
           1 / float(delta[-1] - delta[j]), float(lost_at(delta[-1] - delta[j]))]
          for j in shown])
    rates, updates = (0.0, 0.0003, 0.001, 0.0035, 0.01), (300, 600, 1200, 2400, 4800)
    paths = {rate: train(rate, updates[-1]) for rate in rates}
    print("\n  Mean |c − μ| by EMA rate ρ and updates, and ρt in brackets:\n")
    show(["", *(f"{t} updates" for t in updates)],
         [[f"ρ = {rate:g}", *(f"{error(path['confidence'][t - 1]):.3f} ({rate * t:.1f})"
                              for t in updates)] for rate, path in paths.items()])
    print("\n  What prompts of μ = 1, .9, .5, .1, 0 say after 1,200 updates:\n")
    rows = []
    for name, rate, method in (("CaOPD, frozen teacher", 0.0, "caopd"),
                               ("CaOPD, ρ = 0.0035", 0.0035, "caopd"),
                               ("with documents to copy", 0.0035, "replay"),
                               ("teacher reads θ̄_x too", 0.0035, "carried"),
                               ("CaOPD-direct", 0.0035, "direct")):
        path = train(rate, 1200, method)
        rows.append([name, *(float(path["confidence"][-1][x]) for x in (0, 4, 5, 6, 7)),
                     float(STATED.mean(0) @ copying(path["teacher"][-1]))])
    show(["", "1", ".9", ".5", ".1", "0", "teacher copies"], rows)
    print("\n  A rate is slow only against the length of the run: what counts is ρt·δ. A frozen"
          "\n  teacher, documents to copy, or no teacher for the confidence: each keeps the"
          "\n  confidence where it was. A smaller ρ only postpones.")
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "out/toy")
    if (directory / "base").exists():
        print(f"\n  The models in {directory}, told k/8 < 1 as a teacher is:\n")
        show(["", "P(says it)", "says more by", "margin over 1.00, nats", "δ"], measure(directory))
    else:
        print(f"\n  (δ of the small transformer is not measured: no models in {directory})")
    save, axes = figure("drift", 10.0, 4.0, panels=2)
    if save:
        grid = np.geomspace(0.0003, 0.03, 13)
        at = np.unique(np.geomspace(100, 4800, 24).astype(int))
        errors = [error(train(rate, 4800)["confidence"][at - 1]) for rate in grid]
        mesh = axes[0].pcolormesh(at, grid, errors, shading="nearest", cmap="viridis", vmin=0)
        axes[0].figure.colorbar(mesh, ax=axes[0], label="mean |c − μ|")
        axes[0].plot(at, 1 / (delta[-1] - delta[4]) / at, color="w", ls="--",
                     label="ρt (δ_f − δ_j) = 1, level .50")
        axes[0].set(xscale="log", yscale="log", xlabel="updates t", ylabel="EMA rate ρ",
                    ylim=(grid[0], grid[-1]), title="calibration")
        axes[0].legend(fontsize=8, loc="lower left", facecolor="0.3", labelcolor="w")
        path, step = train(0.001, 9000), np.arange(0, 9000, 50)
        for color, j in enumerate(shown):
            axes[1].plot(0.001 * step, [copying(b)[j] for b in path["teacher"][step]],
                         color=f"C{color}", label=f"told {LEVELS[j]:.2f}")
            axes[1].plot(0.001 * step, [copying(b)[j] for b in law(0.001 * step)],
                         color=f"C{color}", ls=":")
        axes[1].set(xlabel="ρt", ylabel="P(teacher says what it is told)", ylim=(0, 1.03),
                    title="copying at ρ = 0.001 (dotted: the law)")
        axes[1].legend(fontsize=8)
        save()
