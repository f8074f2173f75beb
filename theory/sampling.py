"""A confidence belongs to a way of sampling: μ is measured at temperature 1, answers come at 0.6.

Answers have probability π(a|x) at temperature 1 and π^β / Σ π^β at β = 1/T. With α_β(x) the share
of right ones, so that μ = α_1, the slope is a covariance, under the distribution at β:

    dα/dβ = Cov(R, log π) = α (E[log π|R = 1] − E[log π])

    μ − α_β = −∫₁^β Cov(R, log π)        the bias of stating μ where answers come at β

Sharper sampling raises accuracy while the right answers are the likelier ones, on (geometric)
average. Of two answers the log-odds are β times those at 1, and μ decides. Of more its rivals do:
under greedy decoding, β → ∞, the same μ = .4 becomes 0 against one wrong answer of .6, and 1
against six of .1. So α_β is no function of μ, and the best one leaves E Var(α_β|μ). In Brier the
mismatch costs E(μ − α_β)² over the floor E α_β(1 − α_β).

A decoder sharpens token by token, Π_t π(y_t|y_<t)^β / Z(y_<t): another distribution, unless
Π_t Z(y_<t) is the same for all sequences. What follows a token does not count for choosing it.
"""

import numpy as np

from prompt_level import spr
from worlds import figure, show


def sharpen(p: np.ndarray, beta: float) -> np.ndarray:
    """p^β / Σ p^β over the last axis; β = inf is greedy, whose ties go to the first."""
    if np.isinf(beta):
        return np.eye(p.shape[-1])[p.argmax(-1)]
    powers = (p / p.max(-1, keepdims=True)) ** beta
    return powers / powers.sum(-1, keepdims=True)


def nucleus(p: np.ndarray, top_p: float) -> np.ndarray:
    """The likeliest answers that together reach top_p, renormalized; over the last axis."""
    order = np.argsort(-p, axis=-1, kind="stable")
    ranked = np.take_along_axis(p, order, -1)
    kept = np.empty(p.shape)
    np.put_along_axis(kept, order, ranked * (ranked.cumsum(-1) - ranked < top_p), -1)
    return kept / kept.sum(-1, keepdims=True)


def deployed(p: np.ndarray, temperature: float = 0.6, top_p: float = 0.95) -> np.ndarray:
    """How the paper evaluates: temperature first, then the nucleus."""
    return nucleus(sharpen(p, 1 / temperature), top_p)


def slope(p: np.ndarray, right: np.ndarray, beta: float) -> np.ndarray:
    """dα/dβ = Cov(R, log π) under π^β / Z, for positive p [..., A] and right [..., A] in {0, 1}."""
    q, log_p = sharpen(p, beta), np.log(p)
    mean = (q * log_p).sum(-1, keepdims=True)
    return (q * right * (log_p - mean)).sum(-1)


def rivals(mu: float, wrong: int) -> np.ndarray:
    """One right answer of probability μ, first, and `wrong` equally likely others."""
    return np.append(mu, np.full(wrong, (1 - mu) / wrong))


def by_token(first: np.ndarray, second: np.ndarray, beta: float) -> np.ndarray:
    """Sequences of two tokens as a decoder samples them, [V, W].

    first: p(y_1) [V]. second: p(y_2|y_1) [V, W].
    """
    return sharpen(first, beta)[:, None] * sharpen(second, beta)


def population(rng: np.random.Generator, prompts: int, wrong: int) -> np.ndarray:
    """π [X, 1 + wrong], the right answer first; μ spread evenly, its rivals by a Dirichlet."""
    mu = (np.arange(prompts) + 0.5) / prompts
    return np.hstack([mu[:, None], (1 - mu)[:, None] * rng.dirichlet(np.ones(wrong), prompts)])


if __name__ == "__main__":
    print(__doc__)
    examples = {"right .6, one rival": rivals(0.6, 1), "right .6, six rivals": rivals(0.6, 6),
                "right .4, one rival": rivals(0.4, 1), "right .4, six rivals": rivals(0.4, 6),
                "right .3, rivals .4 .3": np.array([0.3, 0.4, 0.3]),
                "right .1, nine rivals": rivals(0.1, 9)}
    rows = []
    for name, p in examples.items():
        accuracies = (sharpen(p, 1 / 0.6)[0], deployed(p)[0], sharpen(p, np.inf)[0])
        slope_at_1 = float(slope(p, np.eye(len(p))[0], 1.0))
        rows.append([name, slope_at_1, float(p[0]), *map(float, accuracies),
                     float(p[0] - accuracies[1])])
    show(["", "slope at β = 1", "μ", "at 0.6", "0.6 and top-p .95", "greedy", "μ − accuracy"], rows)
    print("\n  Of equals greedy takes the first: in the last row that is the right one.\n")
    print("  400 prompts with μ spread evenly over [0, 1], each stating its μ exactly:\n")
    rng, rows, bias = np.random.default_rng(0), [], {}
    ways = {"temperature 1": lambda p: p, "0.6": lambda p: sharpen(p, 1 / 0.6),
            "0.6 and top-p .95": deployed, "greedy": lambda p: sharpen(p, np.inf)}
    for wrong in (1, 3, 12):
        p = population(rng, 400, wrong)
        mu, p_x = p[:, 0], np.full(400, 1 / 400)
        for way, sample in ways.items():
            accuracy = sample(p)[:, 0]
            floor, miss = accuracy * (1 - accuracy), (mu - accuracy) ** 2
            ocg = round(float((mu - accuracy).mean()), 9) + 0.0  # no −0.000
            rows.append([f"{wrong} wrong, {way}", float(accuracy.mean()), ocg,
                         float(np.abs(mu - accuracy).mean()), float(floor.mean()),
                         float(miss.mean()), spr(p_x, accuracy, mu)])
    show(["answers, sampling", "accuracy", "OCG", "mean |c − α|", "Brier floor", "over it", "SPR"],
         rows)
    print("\n  With μ spread evenly, sharper sampling makes a calibrated confidence underconfident"
          "\n  in the mean where there is more than one way of being wrong, the more so the more"
          "\n  there are. Where most prompts are hard it can be overconfident. SPR rises, for"
          "\n  prompts polarize.\n")
    first = np.array([0.6, 0.4])
    second = np.array([[1 / 3, 1 / 3, 1 / 3], [0.9, 0.05, 0.05]])
    rows = [[f"β = {beta:.2f}", float(sharpen((first[:, None] * second).ravel(), beta)[3]),
             float(by_token(first, second, beta)[1, 0])] for beta in (1.0, 1 / 0.6, 3.0, np.inf)]
    print("  The likeliest of six sequences begins with the less likely token: 0.4 · 0.9 = 0.36.\n")
    show(["its probability", "whole sequences sharpened", "token by token"], rows)
    save, axes = figure("sampling", 10.0, 3.8, panels=2)
    if save:
        grid = np.linspace(0.005, 0.995, 199)
        for color, wrong in enumerate((1, 3, 12)):
            axes[0].plot(grid, [sharpen(rivals(m, wrong), 1 / 0.6)[0] for m in grid],
                         color=f"C{color}", label=f"{wrong} wrong, temperature 0.6")
            axes[0].axvline(1 / (wrong + 1), color=f"C{color}", ls=":", lw=1)
        axes[0].plot([0, 1], [0, 1], color="0.6", ls="--", lw=1)
        axes[0].set(xlabel="stated: μ(x), measured at temperature 1", ylabel="accuracy",
                    title="equally likely wrong answers (dotted: greedy's step)")
        temperatures = np.linspace(0.1, 1.5, 57)
        for wrong in (1, 3, 12):
            p = population(np.random.default_rng(0), 400, wrong)
            axes[1].plot(temperatures, [(p[:, 0] - sharpen(p, 1 / t)[:, 0]).mean()
                                        for t in temperatures], label=f"{wrong} wrong answers")
        axes[1].axvline(0.6, color="0.6", ls=":", lw=1)
        axes[1].axhline(0, color="0.6", ls="--", lw=1)
        axes[1].set(xlabel="temperature of the deployed student", ylabel="OCG of stating μ",
                    title="prompts with μ spread evenly")
        axes[0].title.set_fontsize(10)
        for axis in axes:
            axis.legend(fontsize=8)
        save()
