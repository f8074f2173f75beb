"""What a stated confidence is worth: the paper's metrics, their errors, and yardsticks.

All of it is computed from arrays, without a model, which caopd.py asks. The last section is how
figures are written.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np


def calibration(confidence, correct, bins: int = 10) -> dict:
    """The metrics of the paper's section 5: how often a model is right, and what it says of that.

    confidence: [N] floats in [0, 1]; NaN where no confidence could be parsed.
    correct: [N] booleans or 0/1.
    Returns accuracy and format (the share of parsable confidences) over all N, and over the answers
    whose confidence can be parsed mean_confidence, ocg = mean c − mean R, ece = Σ_bins n_b/n
    |mean R_b − mean c_b|, brier = mean (c − R)², and spr = P(c⁺ > c⁻) over (correct, wrong) pairs
    with ties counted as zero. Where format is under 1, mean R is therefore not `accuracy`. A figure
    with nothing to average is NaN.
    Bins are [i/10, (i+1)/10), to the digit. The released code cuts at np.linspace(0, 1, 11), which
    puts .3, .6 and .7 a bin lower, and its headline counts an unparsable confidence as 0.0;
    theory/in_the_trainer.py has both on the same answers.
    Raises ValueError for arrays that are empty, of different lengths, or out of range.
    """
    c, r = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    shaped = c.ndim == 1 and c.shape == r.shape and len(c) > 0 and bins > 0
    if not shaped or not np.isin(r, (0, 1)).all() or (c < 0).any() or (c > 1).any():
        raise ValueError("calibration: needs two non-empty arrays of one length, confidences in "
                         "[0, 1] or NaN, correct in {0, 1}")
    accuracy, parsed = r.mean(), ~np.isnan(c)
    c, r = c[parsed], r[parsed]
    figures = {"accuracy": float(accuracy), "format": float(parsed.mean())}
    if len(c) == 0:
        return figures | dict.fromkeys(("mean_confidence", "ocg", "ece", "brier", "spr"), math.nan)
    which = bin_of(c, bins)
    ece = abs(np.bincount(which, r - c)).sum() / len(c)
    right, wrong = c[r == 1], np.sort(c[r == 0])
    pairs = len(right) * len(wrong)
    beaten = np.searchsorted(wrong, right, side="left").sum()  # "left" counts c⁻ < c⁺ strictly
    return figures | {
        "mean_confidence": float(c.mean()), "ocg": float(c.mean() - r.mean()), "ece": float(ece),
        "brier": float(((c - r) ** 2).mean()), "spr": float(beaten / pairs) if pairs else math.nan}


def bin_of(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The bin [i/bins, (i+1)/bins) of each confidence; 1.0 belongs to the last."""
    # The nudge is for products such as 0.29 * 100 = 28.999999999999996.
    return np.minimum((confidence * bins + 1e-9).astype(int), bins - 1)


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[dict]:
    """The reliability diagram: count, mean confidence and accuracy of 10 bins, NaN if empty."""
    parsed = ~np.isnan(confidence)
    c, r = confidence[parsed], correct[parsed]
    members = [bin_of(c, 10) == b for b in range(10)]
    return [{"count": int(m.sum()), "confidence": float(c[m].mean()) if m.any() else math.nan,
             "accuracy": float(r[m].mean()) if m.any() else math.nan} for m in members]


def bootstrap(confidence: np.ndarray, correct: np.ndarray, questions: Sequence[int],
              grades: Sequence[str]) -> dict:
    """Standard error of each figure of `calibration`: over 200 draws of the different questions,
    with replacement, each with all of its answers.

    Questions are drawn within their grade (grades of under 10 questions together), so that the
    shares of hard and easy ones stay as they are. The toy's are fixed; left to chance they would
    make its accuracy seem to vary more than it does.
    confidence, correct: [N] answers; questions: the number, from 0, of what each answers, [N];
    grades: of each answer's question, [N].
    """
    order, last = np.argsort(questions, kind="stable"), np.bincount(questions).cumsum()
    answers = np.split(order, last[:-1])  # of each question
    grade = [grades[rows[0]] for rows in answers]
    sizes = Counter(grade)
    grade = np.array([g if sizes[g] >= 10 else "" for g in grade])
    members = [np.flatnonzero(grade == g) for g in dict.fromkeys(grade.tolist())]
    rng, drawn = np.random.default_rng(0), []
    for _ in range(200):
        again = np.concatenate([rng.choice(m, len(m)) for m in members])
        rows = np.concatenate([answers[q] for q in again])
        drawn.append(calibration(confidence[rows], correct[rows]))
    errors = {}
    for key in drawn[0]:
        values = [figures[key] for figures in drawn if not math.isnan(figures[key])]
        errors[key] = float(np.std(values)) if values else math.nan
    return errors


VALUES = np.arange(101) / 100  # the confidences that a completion can state


def expected(p: np.ndarray) -> np.ndarray:
    """The mean confidence [N] by distributions p [N, 101] over VALUES, whose sum may pass 1."""
    return (p @ VALUES).clip(0, 1)


def every_readout(confidence: np.ndarray, correct: np.ndarray, p: np.ndarray,
                  likelihood: np.ndarray, mu: np.ndarray | None = None, samples: int = 0) -> dict:
    """The metrics of the confidence as it was stated, and the same under `readouts` for each of

        stated      the confidence that was sampled, as a user reads it, where there is one
        greedy      the likeliest one of VALUES after the sampled answer
        expected    their mean, by the model's own probabilities
        likelihood  the probability of the answer itself, whatever is stated

    The last one shows what the network knows even where it does not state it. It is near 0 for a
    long answer, right or wrong, and so no confidence there.

    confidence, correct: [N]; p: the distribution over VALUES after each answer, [N, 101];
    likelihood: π_θ(a|x) of each answer, [N]; mu: μ̂(x) of each answer's question, [N], from
    `samples` other answers. With it `oracle` has what the best prompt-level confidence would score.
    """
    stated = calibration(confidence, correct)
    figures = stated | {"readouts": {
        "stated": stated, "greedy": calibration(VALUES[p.argmax(1)], correct),
        "expected": calibration(expected(p), correct),
        "likelihood": calibration(likelihood, correct)}}
    return figures if mu is None else figures | {"oracle": oracle(mu, correct, samples)}


def oracle(mu: np.ndarray, correct: np.ndarray, samples: int) -> dict:
    """What the best prompt-level confidence, c = μ(x), would score.

    mu: μ̂(x) of each answer's question, [N], from `samples` other answers; correct: [N].
    Brier is the floor E[μ(1 − μ)], unbiased: E[μ̂(1 − μ̂)] = (1 − 1/S) μ(1 − μ) for S samples. SPR
    and ECE are those of μ̂ itself, whose scatter can lower SPR and, by breaking ties, raise it:
    neither is a bound. theory/prompt_level.py has both yardsticks exactly.
    """
    floor = float((mu * (1 - mu)).mean() * samples / (samples - 1))
    return calibration(mu, correct) | {"brier": floor}


# ----------------------------------------------------------------------- how they are written

COLUMNS = {"accuracy": "accuracy", "mean_confidence": "mean conf.", "ocg": "OCG", "ece": "ECE",
           "brier": "Brier", "spr": "SPR", "format": "format"}


def number(value: float, sign: str = "") -> str:
    """Three decimals, without the zero before the point; – for a figure that there is not."""
    if math.isnan(value):
        return "–"
    value = round(value, 3) + 0.0  # so that no −.000 is written
    return f"{value:{sign}.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:{sign}.3f}"
