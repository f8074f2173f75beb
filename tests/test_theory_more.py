"""theory/ continued: estimators, direct, after_the_answer, drift, sampling. Identities against
enumeration, directions on hundreds of random worlds, and what their tables print."""

import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

THEORY = Path(__file__).parents[1] / "theory"
sys.path.insert(0, str(THEORY))

import after_the_answer
import caopd
import direct
import drift
import estimators
import pipeline
import prompt_level
import rollouts
import sampling
from worlds import binomial, kl, softmax


def random_tables(seed: int, tokens: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """A student and a teacher over a few tokens, flat or sharp; every other pair is alike."""
    rng = np.random.default_rng(seed)
    ours, its = (rng.normal(size=tokens) * rng.uniform(0.3, 3) for _ in "pq")
    return softmax(ours), softmax(ours + 0.3 * its if seed % 2 else its)


def exact_gradient(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """d KL(p‖q) / d logits, by autograd through the trainer's own loss."""
    logits = torch.tensor(np.log(p), requires_grad=True)
    log_p = logits.log_softmax(-1)
    (log_p.exp() * (log_p - torch.tensor(np.log(q)))).sum().backward()
    return logits.grad.numpy()


def slopes(loss, logits: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """By central differences."""
    return np.array([(loss(softmax(logits + d)) - loss(softmax(logits - d))) / (2 * step)
                     for d in step * np.eye(len(logits))])


# ------------------------------------------------------------------------- estimators

@pytest.mark.parametrize("name, loss", [("sampled", caopd.sampled_kl), ("vopd", caopd.vopd)])
def test_the_sampled_estimators_are_the_trainers(name, loss):
    """The trainer's token loss, differentiated at every token, averaged over y ~ p."""
    for seed in range(100):
        p, q = random_tables(seed)
        b = -float(kl(p, q)) if name == "vopd" else 0.0
        each = []
        for y in range(len(p)):
            logits = torch.tensor(np.log(p)[None], requires_grad=True)
            loss(logits, torch.tensor(np.log(q)[None]), torch.tensor([y])).sum().backward()
            each.append(logits.grad.double().numpy()[0])
        each = np.array(each)
        mean = p @ each
        # The trainer computes in float32.
        assert estimators.sampled_mean(p, q, b, p) == pytest.approx(mean, abs=1e-5)
        assert estimators.sampled_variance(p, q, b) == pytest.approx(
            p @ ((each - mean) ** 2).sum(1), rel=1e-4, abs=1e-5)


def test_any_baseline_leaves_the_mean_and_the_best_one_has_the_least_variance():
    better = []
    for seed in range(200):
        p, q = random_tables(seed)
        exact, v, best = exact_gradient(p, q), -float(kl(p, q)), estimators.best_baseline(p, q)
        r, w = np.log(q / p), ((np.eye(6) - p) ** 2).sum(1)
        assert estimators.norms(p) == pytest.approx(w, abs=1e-12)
        for b in (0.0, v, best, 3.7, *(estimators.top_k_baseline(p, q, k) for k in range(1, 7))):
            each = -(r - b)[:, None] * (np.eye(6) - p)  # [V, V], a gradient for each sampled token
            assert p @ each == pytest.approx(exact, abs=1e-12)
            assert estimators.sampled_mean(p, q, b, p) == pytest.approx(exact, abs=1e-12)
            variance = estimators.sampled_variance(p, q, b)
            assert variance == pytest.approx(p @ ((each - exact) ** 2).sum(1), abs=1e-12)
            least = estimators.sampled_variance(p, q, best)
            assert variance - least == pytest.approx((p @ w) * (b - best) ** 2, abs=1e-10)
        assert estimators.top_k_baseline(p, q, 6) == pytest.approx(v, abs=1e-12)
        better.append(estimators.sampled_variance(p, q, v) < estimators.sampled_variance(p, q, 0.0))
        assert better[-1] == (abs(v - best) < abs(best))
    assert 0.6 < np.mean(better) < 1  # usually, not always


@pytest.mark.parametrize("kind", estimators.KINDS)
def test_the_gradients_of_top_k_sums(kind):
    for seed in range(100):
        p, q = random_tables(seed)
        for k in (1, 2, 5):
            s = estimators.likeliest(p, k)
            assert s.sum() == k and p[s].min() >= p[~s].max()
            by_hand = sum(p[v] * np.log(p[v] / q[v]) for v in range(6) if s[v])
            if kind == "tail":
                by_hand += p[~s].sum() * np.log(p[~s].sum() / q[~s].sum())
            if kind == "renormalized":
                by_hand = by_hand / p[s].sum() - np.log(p[s].sum() / q[s].sum())
            assert estimators.truncated_kl(p, q, s, kind) == pytest.approx(by_hand, abs=1e-12)
            found = estimators.truncated_gradient(p, q, s, kind)
            assert found == pytest.approx(
                slopes(lambda x: estimators.truncated_kl(x, q, s, kind), np.log(p)), abs=1e-7)


def test_where_top_k_sums_are_negative_and_where_they_rest():
    negative = 0
    for seed in range(300):
        p, q = random_tables(seed)
        s = estimators.likeliest(p, 3)
        P, Q = p[s].sum(), q[s].sum()
        losses = {kind: estimators.truncated_kl(p, q, s, kind) for kind in estimators.KINDS}
        assert -1e-12 <= losses["tail"] <= kl(p, q) + 1e-12 and losses["renormalized"] >= -1e-12
        assert (losses["truncated"] < 0) == (np.log(Q / P) > losses["renormalized"])
        negative += losses["truncated"] < 0
        # The truncated sum is least at q/e on S, wherever the rest goes.
        least = np.where(s, q / np.e, q * (1 - Q / np.e) / (1 - Q))
        assert least.sum() == pytest.approx(1, abs=1e-12)
        value = estimators.truncated_kl(least, q, s, "truncated")
        assert value == pytest.approx(-Q / np.e, abs=1e-12)
        at_least = {kind: estimators.truncated_gradient(least, q, s, kind)
                    for kind in estimators.KINDS}
        assert at_least["truncated"] == pytest.approx(0, abs=1e-12)
        assert losses["truncated"] >= -Q / np.e - 1e-12
        # At the teacher itself it pushes S down; the two others rest there.
        at_teacher = estimators.truncated_gradient(q, q, s, "truncated")
        assert at_teacher == pytest.approx(q * (s - Q), abs=1e-12) and at_teacher[s].min() > 0
        for kind in ("tail", "renormalized"):
            assert estimators.truncated_gradient(q, q, s, kind) == pytest.approx(0, abs=1e-12)
        # With a tail: right on S is enough. Renormalized: right within S is enough.
        skewed = np.where(s, q, np.roll(q, 1))
        skewed = np.where(s, q, skewed * (1 - Q) / skewed[~s].sum())
        assert estimators.truncated_gradient(skewed, q, s, "tail") == pytest.approx(0, abs=1e-12)
        assert at_least["renormalized"] == pytest.approx(0, abs=1e-12)
    assert 20 < negative < 280


def test_descent_on_a_truncated_sum_leaves_a_student_worse_than_it_was():
    for seed in range(5):
        p, q = estimators.random_pair(np.random.default_rng(seed))
        after = {kind: float(kl(estimators.descend(q, p, 10, kind, 1500), q))
                 for kind in estimators.KINDS}
        assert after["truncated"] > kl(p, q) > after["renormalized"] > 0
        assert after["tail"] < kl(p, q)


@pytest.mark.parametrize("method", ["full", "sampled", "vopd", "direct"])
def test_gradients_on_replaced_tokens_by_enumeration(method):
    """The trainer's losses at the replaced token of each level, each teacher told its own."""
    losses = {"full": caopd.kl, "sampled": caopd.sampled_kl, "vopd": caopd.vopd,
              "direct": caopd.target_cross_entropy}
    for seed in range(30):
        rng = np.random.default_rng(seed)
        logits, law = rng.normal(size=5), binomial(4, rng.random())
        teachers = softmax(rng.normal(size=(5, 5)) * 2)
        total = np.zeros(5)
        for level in range(5):
            x = torch.tensor(logits[None], requires_grad=True)
            losses[method](x, torch.tensor(np.log(teachers[level][None])),
                           torch.tensor([level])).sum().backward()
            total += law[level] * x.grad.double().numpy()[0]
        found = estimators.on_replaced(logits, law, teachers, method)
        assert found == pytest.approx(total, abs=1e-5)
        if method in ("sampled", "vopd"):  # the tokens are not the student's samples
            full = estimators.on_replaced(logits, law, teachers, "full")
            assert np.linalg.norm(found - full) > 0.01 * np.linalg.norm(full)


def test_vopd_on_replaced_tokens_states_the_root_of_the_odds():
    for mu in (0.3, 0.8, 0.9):
        root = np.sqrt(mu / (1 - mu))
        vopd = estimators.rests(1, mu, 300.0, "vopd")
        assert vopd == pytest.approx(root / (1 + root), abs=5e-3)
        assert estimators.rests(1, mu, 12.0, "direct") == pytest.approx(mu, abs=1e-6)
    full, vopd = (estimators.rests(1, 0.8, 12.0, method) for method in ("full", "vopd"))
    assert vopd < 0.68 < 0.99 < full
    assert estimators.rests(8, 0.8, 12.0, "full") == pytest.approx(
        rollouts.student_confidence(8, 0.8, 12.0, "reverse"), abs=1e-2)


# ------------------------------------------------------------------------- direct

@pytest.mark.parametrize("k, mu", [*product((1, 3, 8), (0.1, 0.5, 0.83))])
def test_what_each_readout_of_cross_entropy_pays(k, mu):
    """By enumeration of the K outcomes and of the new answer's R."""
    law = {}
    for outcome in product((0, 1), repeat=k):
        c = sum(outcome) / k
        law[c] = law.get(c, 0.0) + float(np.prod([mu if r else 1 - mu for r in outcome]))

    def brier(c):
        return mu * (1 - c) ** 2 + (1 - mu) * c ** 2

    mean = sum(p * c for c, p in law.items())
    readouts = sum(p * brier(c) for c, p in law.items()), brier(mean), brier(rollouts.mode(k, mu))
    assert law[rollouts.mode(k, mu)] == pytest.approx(max(law.values()), abs=1e-12)
    found = direct.over_the_floor(k, mu)
    assert found == pytest.approx([b - mu * (1 - mu) for b in readouts], abs=1e-12)
    assert found[0] == pytest.approx(mu * (1 - mu) / k, abs=1e-12)
    assert found[1] == pytest.approx(0, abs=1e-12) and found[2] <= 1 / k ** 2
    assert direct.descend(k, mu) == pytest.approx(list(law[c / k] for c in range(k + 1)), abs=1e-3)


def test_cross_entropy_is_the_forward_kl_from_a_point_mass():
    """Value and gradient of the trainer's two losses, the second with a teacher that is certain."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        values, token = rng.normal(size=6), rng.integers(6)
        certain = torch.full((1, 6), -200.0, dtype=torch.float64)
        certain[0, token] = 200.0
        grads = []
        for loss in (caopd.target_cross_entropy, caopd.forward_kl):
            x = torch.tensor(values[None], requires_grad=True)
            value = loss(x, certain, torch.tensor([token])).sum()
            value.backward()
            grads.append((value.item(), *x.grad[0].tolist()))
        assert grads[0] == pytest.approx(grads[1], abs=1e-6)
        assert grads[0][1:] == pytest.approx(softmax(values) - np.eye(6)[token], abs=1e-6)


def test_the_law_is_learned_through_its_tokens_up_to_two_decimals():
    for k, mu in product((1, 2, 4, 5, 8, 16, 32), (0.05, 0.37, 0.8, 0.99)):
        law, by_hand = binomial(k, mu), {}
        for level in range(k + 1):
            string = f"{level / k:.2f}"
            by_hand[string] = by_hand.get(string, 0.0) + law[level]
        written = direct.by_character(k, mu)
        assert written == pytest.approx(by_hand, abs=1e-12)
        off = abs(sum(float(string) * p for string, p in written.items()) - mu)
        assert off <= 0.005 and (off < 1e-12 or 100 % k)


def test_what_completions_teach_of_prompts_that_look_alike():
    """By enumeration: 4 completions as 4/K prompts, each of one of two success rates."""
    p_x, mu = np.array([0.3, 0.7]), np.array([0.2, 0.9])
    for k in (1, 2, 4):
        first = second = 0.0
        for prompts in product((0, 1), repeat=4 // k):
            for outcome in product((0, 1), repeat=4):
                rate = mu[np.repeat(prompts, k)]
                chance = np.prod(p_x[list(prompts)]) * np.prod(np.where(outcome, rate, 1 - rate))
                first += chance * np.mean(outcome)
                second += chance * np.mean(outcome) ** 2
        assert direct.variance_of_the_mean(p_x, mu, 4, k) == pytest.approx(
            second - first ** 2, abs=1e-12)


@pytest.mark.parametrize("weight", [0.5, 1.0, 4.0])
def test_cross_entropy_on_the_end_of_an_answer_feeds_itself(weight):
    """By the trainer's own losses, over the two tokens that can be sampled: the end, or more."""
    for p, q in product((0.02, 0.3, 0.9), (0.001, 0.1, 0.5)):
        logit = torch.tensor(np.log(p / (1 - p)), requires_grad=True)
        student, teacher = (torch.stack([x, torch.zeros_like(x)])[None] for x in (
            logit, torch.tensor(np.log(q / (1 - q)))))
        ended = weight * caopd.target_cross_entropy(student, None, torch.tensor([0]))
        went_on = caopd.kl(student, teacher)
        (p * ended + (1 - p) * went_on).sum().backward()
        found = direct.ending_gradient(p, q, weight)
        assert found == pytest.approx(logit.grad.item(), rel=1e-4, abs=1e-7)
        assert found == pytest.approx(
            p * (1 - p) * ((1 - p) * np.log(p * (1 - q) / (q * (1 - p))) - weight), abs=1e-12)
    tips, grid = direct.tipping_point(weight), np.linspace(1e-5, 1 - 1e-5, 20001)
    for q, runs_away in ((0.97 * tips, False), (1.03 * tips, True)):
        pulls = [direct.ending_gradient(p, q, weight) for p in grid]
        assert (max(pulls) < 0) == runs_away
    assert direct.where_it_ends(2 * tips, weight) > 0.999
    assert direct.where_it_ends(tips / 2, weight) < 1 / (1 + weight)  # where the pull is weakest


# ------------------------------------------------------------------------- after_the_answer

@pytest.mark.parametrize("seed", range(40))
def test_what_each_target_reaches_by_enumeration(seed):
    """Every outcome (a_k, R_k) of K = 3 rollouts; the first one's target, given its answer."""
    rng = np.random.default_rng(seed)
    answers = rng.dirichlet(np.ones(3), 2)  # two prompts, three answers
    success = rng.random((2, 3)) if seed % 2 else (rng.random((2, 3)) < 0.5).astype(float)
    p_x, own = np.array([0.4, 0.6]), rng.random()
    mean, square = np.zeros((2, 3)), np.zeros((2, 3))
    for x in range(2):
        cells = [(a, r, answers[x, a] * (success[x, a] if r else 1 - success[x, a]))
                 for a, r in product(range(3), (0, 1))]
        for drawn in product(cells, repeat=3):
            chance = np.prod([c[2] for c in drawn])
            told = own * drawn[0][1] + (1 - own) * (drawn[1][1] + drawn[2][1]) / 2
            mean[x, drawn[0][0]] += chance * told / answers[x, drawn[0][0]]
            square[x, drawn[0][0]] += chance * told ** 2 / answers[x, drawn[0][0]]
    assert after_the_answer.stated(answers, success, own) == pytest.approx(mean, abs=1e-12)

    def brier(c):
        return float(p_x @ (answers * (success * (1 - c) ** 2 + (1 - success) * c ** 2)).sum(1))

    floor, between = after_the_answer.parts(p_x, answers, success)
    sampled = brier(mean) + float(p_x @ (answers * (square - mean ** 2)).sum(1))
    found = after_the_answer.brier(floor, between, own, 3)
    assert found == pytest.approx([brier(mean), sampled], abs=1e-12)
    assert floor == pytest.approx(brier(success), abs=1e-12)
    mu = (answers * success).sum(1)
    assert floor + between == pytest.approx(prompt_level.brier_floor(p_x, mu), abs=1e-12)
    if floor + between < 1e-12:
        return  # R is certain: all targets are the same
    best = after_the_answer.best_weight(floor, between, 3)
    grid = [after_the_answer.brier(floor, between, v, 3)[1] for v in np.linspace(0, 1, 201)]
    assert after_the_answer.brier(floor, between, best, 3)[1] <= min(grid) + 1e-12
    if seed % 2 == 0:
        assert floor == 0 and best == 1  # a verifier: R is a function of the answer


def test_mu_hat_is_the_mixture_with_weight_one_over_k():
    rng = np.random.default_rng(0)
    for k in (2, 5, 8):
        kinds, right, counts = after_the_answer.ask(rng, after_the_answer.BELIEFS, 60, k)
        hits = counts[np.arange(60), right]
        mixture = after_the_answer.mean_target(right, counts, 1 / k)
        assert mixture[counts > 0] == pytest.approx(
            np.repeat(hits / k, 4).reshape(60, 4)[counts > 0], abs=1e-12)
        loo = after_the_answer.mean_target(right, counts, 0.0)
        assert (counts * loo).sum(1) == pytest.approx(hits, abs=1e-12)  # the same mean
        assert counts.sum() == 60 * k and np.bincount(kinds).tolist() == [10] * 6


def test_a_confidence_that_sees_the_answer_passes_both_prompt_level_yardsticks():
    for seed in range(200):
        b = np.random.default_rng(seed).dirichlet(np.ones(4), 5)
        p_x, mu = np.full(5, 0.2), (b ** 2).sum(1)
        floor, between = after_the_answer.parts(p_x, b, b)
        floors = after_the_answer.calibrated(b)
        assert floors["kind"] == pytest.approx(floor + between, abs=1e-12) and between > 0
        assert floors["kind and answer"] == pytest.approx(floor, abs=1e-12)
        # Who knows the right answer a* ~ b by heart, and not the one given, a ~ b, best says how
        # likely it is.
        by_heart = sum(0.2 * b[s, star] * b[s, a] * (b[s, star] - (star == a)) ** 2
                       for s, star, a in product(range(5), range(4), range(4)))
        assert floors["question"] == pytest.approx(by_heart, abs=1e-12)
        cells = (p_x[:, None] * b).ravel()
        for own in (1 / 8, 1.0):
            c = after_the_answer.stated(b, b, own).ravel()
            assert prompt_level.spr(cells, b.ravel(), c) > prompt_level.spr_ceiling(p_x, mu)


@pytest.mark.parametrize("seed", range(40))
def test_the_likelihood_beats_every_prompt_level_confidence_where_the_right_answer_leads(seed):
    """By enumeration of the answers; a wrong answer that leads may cost more than it gains."""
    rng = np.random.default_rng(seed)
    answers = rng.dirichlet(np.full(4, rng.choice([0.3, 1.0, 3.0])))
    over = []
    for right in range(4):
        mu = answers[right]
        brier = sum(p * (p - (a == right)) ** 2 for a, p in enumerate(answers))
        over.append(after_the_answer.likelihood_over_the_floor(answers, right))
        assert over[-1] == pytest.approx(brier - mu * (1 - mu), abs=1e-12)
    assert over[answers.argmax()] < 0 < over[answers.argmin()]


def test_the_target_r_is_learned_by_heart_and_new_questions_know_nothing_of_it():
    beliefs, ends = after_the_answer.BELIEFS, {}
    for questions, k in ((384, 1), (48, 8)):
        runs = []
        for seed in range(3):
            kinds, right, counts = after_the_answer.ask(np.random.default_rng(seed), beliefs,
                                                        questions, k)
            targets = [after_the_answer.mean_target(right, counts, own) for own in (1.0, 1 / k)]
            runs.append([after_the_answer.learn(kinds, right, counts, t, beliefs, 1500)
                         for t in targets])
        ends[k] = np.mean(runs, axis=0)  # [target, trained or new, updates]
    (trained, new), (mu_trained, mu_new) = ends[8]
    floor = after_the_answer.calibrated(beliefs)
    assert trained[-1] < 0.04 < floor["kind and answer"] < new.min()
    assert new[-1] > new.min() + 0.005  # best early
    assert new.min() < floor["kind"] < mu_new[-1] and mu_trained[-1] > 0.1
    assert ends[1][0, 1].min() < new.min()  # more questions, not more rollouts


# ------------------------------------------------------------------------- drift

def test_the_decay_under_a_frozen_teacher_is_the_laws():
    path = drift.train(0.0, 4000)
    moved = path["student"][-1] / drift.SHARPNESS
    assert moved - moved[-1] == pytest.approx(drift.decay() - drift.decay()[-1], abs=2e-3)
    assert np.array_equal(path["teacher"][-1], path["teacher"][0])
    pool = softmax(drift.SHARPNESS * drift.STATED) @ drift.LEVELS  # the logarithmic pool itself
    assert path["confidence"][-1] == pytest.approx(pool, abs=2e-3)


def test_a_following_teacher_pays_the_decay_again_and_again():
    """A student that keeps up (a small ρ) obeys the law until copying ends."""
    rate, updates = 0.0005, 7000
    path = drift.train(rate, updates)
    law = drift.law(rate * np.arange(updates))
    for t in (1000, 2000, 4000):
        grown, due = path["teacher"][t], law[t]
        assert (grown - grown[-1])[[1, 4, 7]] == pytest.approx((due - due[-1])[[1, 4, 7]], rel=0.15)
    first_order = rate * 1000 * drift.SHARPNESS * drift.decay()
    assert law[1000] == pytest.approx(first_order, rel=0.05)
    copied, delta = drift.copying(path["teacher"][-1]), drift.decay()
    at = np.argmax([drift.copying(b)[4] < 0.5 for b in path["teacher"][::20]]) * 20 * rate
    due = drift.lost_at(delta[-1] - delta[4])
    assert at == pytest.approx(due, rel=0.05) and copied[4] < 0.5 < copied[0]  # 0.00 is stated more
    grown = drift.law(np.array([due]))[0]
    assert grown[-1] - grown[4] == pytest.approx(drift.SHARPNESS)
    assert drift.lost_at(1 / (len(drift.MU) + 1)) == np.inf


def test_what_counts_is_rate_times_updates():
    frozen = drift.error(drift.train(0.0, 4800)["confidence"])
    errors = {rate: drift.error(drift.train(rate, 4800)["confidence"])
              for rate in (0.0005, 0.001, 0.002, 0.004)}
    at_four = [errors[rate][int(4.0 / rate) - 1] for rate in (0.001, 0.002, 0.004)]
    assert max(at_four) < 1.2 * min(at_four) and min(at_four) > 5 * frozen[-1]
    assert errors[0.0005][1199] < 1.5 * frozen[-1] < 0.1 < errors[0.004][1199]


def test_what_keeps_the_copying():
    m = drift.STATED.mean(0)
    for method, rate, kept in (("caopd", 0.0, True), ("replay", 0.0035, True),
                               ("caopd", 0.0035, False)):
        path = drift.train(rate, 1200, method)
        assert (m @ drift.copying(path["teacher"][-1]) > 0.95) == kept
        assert (drift.error(path["confidence"][-1]) < 0.05) == kept
        assert (path["confidence"][-1][6] < 0.3) == kept  # μ = .1
    direct_path = drift.train(0.0035, 1200, "direct")
    assert drift.error(direct_path["confidence"][-1]) < 0.01
    carried = drift.train(0.0035, 1200, "carried")["confidence"][-1]
    assert carried[5] == pytest.approx(0.5, abs=0.05) and carried[6] < 0.05  # each to its own mode


def test_the_decay_is_measured_on_saved_models(tmp_path):
    import data
    tokenizer = data.toy_tokenizer()
    args = caopd.parse_args(["--width", "16", "--layers", "1"])
    for seed, name in enumerate(("base", "caopd")):
        torch.manual_seed(seed)
        model = caopd.Transformer(pipeline.toy_model(args, tokenizer))
        pipeline.save(model, tokenizer, tmp_path / name)
    rows = drift.measure(tmp_path, questions=4)
    assert [row[0] for row in rows] == ["base", "CaOPD"] and rows[0][-1] == 0
    assert all(0 < row[1] < 0.05 and -1 < row[2] < 1 for row in rows)  # they know nothing yet
    assert rows[1][-1] == pytest.approx(1 - rows[1][3] / rows[0][3])


def test_the_decay_is_the_share_of_the_margin_that_is_lost(tmp_path, monkeypatch):
    """Two made-up models that are told a level, in the demonstration and in the instruction."""
    import data
    from metrics import VALUES
    for name in ("base", "caopd"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("model.Transformer.from_pretrained", lambda path: path.name)
    monkeypatch.setattr(data, "arithmetic_task", lambda *_, **__: SimpleNamespace(
        held_out=[data.typed_question("4+5", words=True)], wording=data.WORDS))
    contexts = []
    monkeypatch.setattr(data, "teacher_messages", lambda example, wording, demo, report: (
        contexts.append((data.parse_confidence(demo), report)) or []))
    monkeypatch.setattr(data, "toy_tokenizer", lambda: SimpleNamespace(
        chat=lambda messages: [], encode=lambda text: [], eos_ids=[0]))

    def score_answers(model, tokenizer, groups, micro_tokens):
        told, certain = (0.6, 0.2) if model == "base" else (0.4, 0.4 / 3 ** 0.5)
        (demonstrated, instructed), (group,) = contexts[-1], groups
        assert demonstrated == instructed == group.rollouts[0].confidence
        p = np.zeros((1, len(VALUES)))
        p[0, round(100 * instructed)], p[0, -1] = told, certain
        return np.ones(1), p

    monkeypatch.setattr(caopd, "score_answers", score_answers)
    base, trained = drift.measure(tmp_path, questions=1)
    assert base[1] == pytest.approx(0.6) and base[3] == pytest.approx(np.log(3))
    assert trained[3] == pytest.approx(np.log(3) / 2) and trained[4] == pytest.approx(0.5)


# ------------------------------------------------------------------------- sampling

def test_the_bias_is_the_integral_of_a_covariance():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        p = rng.dirichlet(np.ones(5))
        right = (rng.random(5) < 0.4).astype(float)
        for beta in (0.5, 1.0, 2.3):
            q = p ** beta / (p ** beta).sum()
            assert sampling.sharpen(p, beta) == pytest.approx(q, abs=1e-12)
            covariance = (q @ (right * np.log(p))) - (q @ right) * (q @ np.log(p))
            assert sampling.slope(p, right, beta) == pytest.approx(covariance, abs=1e-12)
            step = 1e-5
            ahead, back = (sampling.sharpen(p, beta + d) @ right for d in (step, -step))
            assert covariance == pytest.approx((ahead - back) / (2 * step), abs=1e-6)
            if 0 < right.sum() < 5:  # right answers that are likelier, on geometric average
                mean = [q[right == r] @ np.log(p[right == r]) / q[right == r].sum() for r in (0, 1)]
                assert (covariance > 0) == (mean[1] > mean[0])
        nodes, weights = np.polynomial.legendre.leggauss(40)
        half = (1 / 0.6 - 1) / 2
        integral = half * sum(w * sampling.slope(p, right, 1 + half * (1 + node))
                              for node, w in zip(nodes, weights))
        bias = p @ right - sampling.sharpen(p, 1 / 0.6) @ right
        assert bias == pytest.approx(-integral, abs=1e-12)


def test_of_two_answers_mu_decides_and_of_more_its_rivals():
    for mu in np.linspace(0.01, 0.99, 99):
        odds = (mu / (1 - mu)) ** (1 / 0.6)
        two = sampling.sharpen(sampling.rivals(mu, 1), 1 / 0.6)[0]
        assert two == pytest.approx(odds / (1 + odds), abs=1e-12)
        for wrong in (1, 3, 12):
            gained = sampling.sharpen(sampling.rivals(mu, wrong), 1 / 0.6)[0] - mu
            if abs(mu - 1 / (wrong + 1)) > 1e-6:
                assert (gained > 0) == (mu > 1 / (wrong + 1))
    greedy = [sampling.sharpen(sampling.rivals(0.4, n), np.inf)[0] for n in (1, 6)]
    assert greedy == [0.0, 1.0]


def test_the_nucleus_by_hand():
    cut = sampling.nucleus(np.array([0.1, 0.5, 0.1, 0.3]), 0.75)
    assert cut == pytest.approx([0, 5 / 8, 0, 3 / 8])
    for seed in range(100):
        p = np.random.default_rng(seed).dirichlet(np.ones(6))
        kept, total = [], 0.0
        for a in sorted(range(6), key=lambda a: -p[a]):
            kept.append(a)
            total += p[a]
            if total >= 0.7:
                break
        by_hand = np.array([p[a] / total if a in kept else 0.0 for a in range(6)])
        assert sampling.nucleus(p, 0.7) == pytest.approx(by_hand, abs=1e-12)
    rows = np.random.default_rng(0).dirichlet(np.ones(6), 9)
    assert sampling.nucleus(rows, 0.7) == pytest.approx(
        np.array([sampling.nucleus(p, 0.7) for p in rows]), abs=1e-12)
    assert sampling.deployed(rows) == pytest.approx(
        sampling.nucleus(sampling.sharpen(rows, 1 / 0.6), 0.95), abs=1e-12)


def test_stating_mu_where_answers_come_sharper():
    """Underconfident with more than one way of being wrong, more so with more; Brier's price."""
    rng, gaps = np.random.default_rng(0), []
    for wrong in (1, 3, 12):
        p = sampling.population(rng, 400, wrong)
        assert p.sum(1) == pytest.approx(1, abs=1e-12)
        mu, accuracy = p[:, 0], sampling.sharpen(p, 1 / 0.6)[:, 0]
        gaps.append((mu - accuracy).mean())
        p_x = np.full(400, 1 / 400)
        assert prompt_level.expected_brier(p_x, accuracy, mu) == pytest.approx(
            (accuracy * (1 - accuracy)).mean() + ((mu - accuracy) ** 2).mean(), abs=1e-12)
        assert prompt_level.spr(p_x, accuracy, mu) > prompt_level.spr(p_x, mu, mu)
        hotter = sampling.sharpen(p, 1 / 1.4)[:, 0]
        assert (mu - hotter).mean() >= -1e-12
    assert abs(gaps[0]) < 1e-12 and 0 > gaps[1] > gaps[2]


def test_a_decoder_that_sharpens_token_by_token_samples_another_distribution():
    first, second = np.array([0.6, 0.4]), np.array([[1 / 3] * 3, [0.9, 0.05, 0.05]])
    joint = first[:, None] * second
    assert sampling.by_token(first, second, 1.0) == pytest.approx(joint, abs=1e-12)
    assert np.unravel_index(joint.argmax(), joint.shape) == (1, 0)
    assert sampling.by_token(first, second, np.inf)[1, 0] == 0  # greedy never gets there
    for beta in (1.5, 3.0):
        whole = sampling.sharpen(joint.ravel(), beta).reshape(joint.shape)
        found = sampling.by_token(first, second, beta)
        assert found.sum() == pytest.approx(1, abs=1e-12)
        assert found[1, 0] < joint[1, 0] < whole[1, 0]
        alike = np.array([second[1], second[1]])  # all prefixes have the same Z
        whole = sampling.sharpen((first[:, None] * alike).ravel(), beta).reshape(2, 3)
        assert sampling.by_token(first, alike, beta) == pytest.approx(whole, abs=1e-12)


# ------------------------------------------------------------------------- as a reader runs it

@pytest.mark.parametrize("name", ["estimators", "direct", "after_the_answer", "drift", "sampling"])
def test_each_claim_runs_on_its_own(name, tmp_path):
    """In a copy of the folder, without matplotlib: a test does not draw over tracked figures."""
    copy = shutil.copytree(THEORY, tmp_path / "theory",
                           ignore=shutil.ignore_patterns("figures", "__pycache__"))
    (copy / "matplotlib.py").write_text("raise ImportError")
    result = subprocess.run([sys.executable, str(copy / f"{name}.py")], capture_output=True,
                            text=True, cwd=tmp_path)
    assert result.returncode == 0 and "nan" not in result.stdout, result.stderr
    assert "it needs matplotlib" in result.stdout and len(result.stdout.splitlines()) > 20
    assert not (copy / "figures").exists()
