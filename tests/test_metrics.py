"""metrics.py against independent oracles: definitions by brute force, and the spread of draws."""

import math

import numpy as np
import pytest

from metrics import bootstrap, calibration, number, oracle

FIGURES = ("accuracy", "mean_confidence", "ocg", "ece", "brier", "spr", "format")
CALIBRATION = ("mean_confidence", "ocg", "ece", "brier", "spr")


def brute_force(c: list[float], r: list[int], bins: int = 10) -> dict:
    """Each metric as its definition reads, pair by pair and bin by bin."""
    n = len(c)
    pairs = [(a, b) for a, x in zip(c, r) if x for b, y in zip(c, r) if not y]
    ece = 0.0
    for i in range(bins):
        members = [j for j in range(n) if i <= round(c[j] * bins, 6) < i + 1
                   or (i == bins - 1 and c[j] == 1)]
        if members:
            said = sum(c[j] for j in members) / len(members)
            right = sum(r[j] for j in members) / len(members)
            ece += len(members) / n * abs(said - right)
    return dict(accuracy=sum(r) / n, mean_confidence=sum(c) / n, ocg=(sum(c) - sum(r)) / n, ece=ece,
                brier=sum((a - b) ** 2 for a, b in zip(c, r)) / n,
                spr=sum(a > b for a, b in pairs) / len(pairs) if pairs else math.nan, format=1.0)


@pytest.mark.parametrize("seed", range(20))
def test_calibration_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 80))
    c = rng.integers(0, 101, n) / 100 if seed % 2 else rng.random(n)  # with ties and bin edges
    r = (rng.random(n) < c).astype(int)
    assert calibration(c, r) == pytest.approx(brute_force(c.tolist(), r.tolist()), nan_ok=True)


def test_calibration_by_hand():
    always = calibration([1.0] * 4, [1, 0, 0, 0])
    assert [always[key] for key in ("spr", "ece", "brier", "ocg")] == [0, 0.75, 0.75, 0.75]
    perfect = calibration([0.0, 1.0, 1.0, 0.0], [False, True, True, False])
    assert [perfect[key] for key in ("spr", "ece", "brier", "ocg")] == [1, 0, 0, 0]
    hand = calibration([0.9, 0.8, 0.8, 0.3], [1, 1, 0, 0])  # |1 - .9|, 2 times |.5 - .8|, |0 - .3|
    assert hand["ece"] == pytest.approx((0.1 + 0.6 + 0.3) / 4)
    assert hand["brier"] == pytest.approx((0.01 + 0.04 + 0.64 + 0.09) / 4)
    assert hand["spr"] == 3 / 4


def test_unparsable_confidences_count_in_accuracy_and_format_alone():
    c, r = [0.9, math.nan, 0.2, math.nan], [1, 1, 0, 0]
    figures = calibration(c, r)
    assert (figures["accuracy"], figures["format"]) == (0.5, 0.5)
    seen = calibration([0.9, 0.2], [1, 0])
    assert all(figures[key] == seen[key] for key in CALIBRATION)
    nothing = calibration([math.nan], [1])
    assert nothing["accuracy"] == 1 and all(math.isnan(nothing[key]) for key in CALIBRATION)
    assert math.isnan(calibration([0.5, 0.6], [1, 1])["spr"])


@pytest.mark.parametrize("c, r", [
    ([], []), ([0.5], [1, 0]), ([1.5], [1]), ([-0.1], [1]), ([0.5], [2]), ([[0.5]], [[1]])])
def test_calibration_refuses_nonsense(c, r):
    with pytest.raises(ValueError, match="calibration"):
        calibration(c, r)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_the_standard_error_of_accuracy_is_the_binomials(p):
    n = 500
    correct = np.arange(n) < p * n
    stderr = bootstrap(np.random.default_rng(1).random(n), correct, range(n), ["g"] * n)
    assert stderr["accuracy"] == pytest.approx((p * (1 - p) / n) ** 0.5, rel=0.15)


def test_the_standard_error_is_over_questions_and_not_over_answers():
    """Eight equal answers to a question say no more than one of them does."""
    rng = np.random.default_rng(2)
    confidence, correct, asked = rng.random(200), rng.random(200) < 0.4, range(200)
    grades = rng.choice(["hard", "easy"], 200)
    once = bootstrap(confidence, correct, asked, grades)
    often = [np.repeat(x, 8) for x in (confidence, correct, asked, grades)]
    assert bootstrap(*often) == pytest.approx(once)
    again = [np.tile(x, 8) for x in (confidence, correct, asked, grades)]  # they come again later
    assert bootstrap(*again) == pytest.approx(once)
    independent = bootstrap(rng.random(1600), rng.random(1600) < 0.4, np.repeat(asked, 8),
                            np.repeat(grades, 8))
    assert independent["accuracy"] < 0.6 * once["accuracy"]


def test_the_standard_error_is_that_of_asking_other_questions_of_the_same_grades():
    """Against the spread of what is measured when each grade's questions are drawn anew."""
    rng, success = np.random.default_rng(3), {"easy": 0.98, "middling": 0.5, "hard": 0.02}
    grades = np.repeat(list(success), 100)
    chance = np.array([success[grade] for grade in grades])

    def ask() -> tuple[np.ndarray, np.ndarray]:
        return (chance + rng.uniform(-0.02, 0.02, 300)).round(2), rng.random(300) < chance
    measured = [calibration(*ask()) for _ in range(300)]
    alone = bootstrap(*ask(), range(300), range(300))  # a grade each is as good as none
    assert alone["accuracy"] == pytest.approx((0.25 / 300) ** 0.5, rel=0.15)
    for key in ("accuracy", "ocg", "brier"):
        truth = np.std([figures[key] for figures in measured])
        errors = [bootstrap(*ask(), range(300), grades)[key] for _ in range(8)]
        assert np.mean(errors) == pytest.approx(truth, rel=0.2)
    pooled = bootstrap(*ask(), range(300), ["g"] * 300)["accuracy"]
    assert pooled > 1.4 * np.std([figures["accuracy"] for figures in measured])


@pytest.mark.parametrize("samples", [2, 4, 16])
def test_the_oracles_floor_is_unbiased(samples):
    """The mean over many draws of mu_hat is E[mu (1 - mu)], and without the correction it is not.
    """
    rng = np.random.default_rng(samples)
    mu = np.linspace(0, 1, 21)
    draws = rng.binomial(samples, mu, (4000, len(mu))) / samples
    floors = np.array([oracle(drawn, np.arange(len(mu)) % 2, samples)["brier"]
                       for drawn in draws])
    error = floors.std() / len(floors) ** 0.5
    truth = (mu * (1 - mu)).mean()
    assert abs(floors.mean() - truth) < 4 * error
    assert abs((draws * (1 - draws)).mean() - truth) > 4 * error


def test_the_oracle_scores_mu_hat_itself_in_all_else():
    mu, correct = np.array([0.0, 0.25, 0.5, 1.0]), np.array([0, 1, 0, 1])
    best, plain = oracle(mu, correct, 4), brute_force(mu.tolist(), correct.tolist())
    assert best["brier"] == pytest.approx((0.25 * 0.75 + 0.5 * 0.5) / 4 * 4 / 3)
    assert {key: best[key] for key in FIGURES if key != "brier"} == pytest.approx(
        {key: plain[key] for key in FIGURES if key != "brier"})


def test_bootstrap_passes_over_resamples_without_a_figure():
    """SPR does not exist in a resample without the one wrong answer."""
    confidence, correct = np.full(6, 0.5), np.array([1.0] * 5 + [0.0])
    assert bootstrap(confidence, correct, range(6), ["g"] * 6)["spr"] == 0


def test_numbers_are_written_without_the_zero_before_the_point():
    assert [number(x) for x in (0.5, -0.25, 1.0, math.nan)] == [".500", "-.250", "1.000", "–"]
    assert [number(x, "+") for x in (0.25, -0.0004, 0.0)] == ["+.250", "+.000", "+.000"]
