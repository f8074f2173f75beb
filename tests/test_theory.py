"""theory/: identities against independent brute force, inequalities on hundreds of random worlds,
equality cases, and the statements that its README makes."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

THEORY = Path(__file__).parents[1] / "theory"
sys.path.insert(0, str(THEORY))

import caopd
import collapse
import data
import generalization
import identifiability
import in_the_trainer
import optimism
import pipeline
import prompt_level
import replacement
import rollouts
import scaling
from metrics import bin_of, oracle
from worlds import (World, bernoulli, binomial, entropy, kl, kl_gradient, random_world, softmax,
                    success_world)

WORLDS = [random_world(np.random.default_rng(seed)) for seed in range(300)]


def enumerate_information(world, table) -> float:
    """I(V;Z|X) from the joint p(x,z,v), term by term."""
    total = 0.0
    for x in range(len(world.p_x)):
        joint = world.p_z[x][:, None] * table[x]
        for z, v in product(*map(range, joint.shape)):
            if joint[z, v] > 0:
                independent = joint[z].sum() * joint[:, v].sum()
                total += world.p_x[x] * joint[z, v] * np.log(joint[z, v] / independent)
    return total


# ------------------------------------------------------------------------- 1. identifiability

def test_the_best_predictor_is_the_conditional_mean_and_leaves_its_variance():
    for world in WORLDS:
        mu, best = world.mu_teacher, identifiability.best_predictor(world)
        by_hand = 0.0
        for x in range(len(mu)):  # least squares, with weights p(z|x)
            root = np.sqrt(world.p_z[x])
            g, *_ = np.linalg.lstsq(root[:, None], root * mu[x], rcond=None)
            assert abs(g[0] - best[x]) < 1e-12
            variance = world.p_z[x] @ mu[x] ** 2 - (world.p_z[x] @ mu[x]) ** 2
            by_hand += world.p_x[x] * variance
        assert abs(identifiability.residual(world) - by_hand) < 1e-12
        other = best + np.random.default_rng(0).normal(size=len(mu))
        assert world.mean((mu - other[:, None]) ** 2) > identifiability.residual(world)


def test_the_residual_is_zero_if_and_only_if_success_is_independent_of_the_context():
    for world in WORLDS:
        information = world.information(bernoulli(world.mu_teacher))
        assert (identifiability.residual(world) > 1e-12) == (information > 1e-12)
    named = identifiability.NAMED
    silent = named["context says nothing"]
    moved = named["context moves the answer, not the success"]
    for world in (silent, moved):
        assert world.information(bernoulli(world.mu_teacher)) < 1e-12
        assert identifiability.residual(world) < 1e-12
    assert abs(moved.information(moved.teacher) - np.log(2)) < 1e-12
    assert abs(identifiability.residual(named["a hint that helps"]) - 0.04) < 1e-12


def test_the_bridge_g_is_the_success_of_the_teachers_mixture():
    for world in WORLDS:
        success = (world.mixture * world.right).sum(1)
        assert np.allclose(success, identifiability.best_predictor(world), atol=1e-12)
    assert abs(identifiability.best_predictor(success_world([[0.4, 0.8]]))[0] - 0.6) < 1e-12
    rng = np.random.default_rng(0)
    right = rng.random(200_000) < 0.2
    for c in (0.2, 0.6, 1.0):
        losses = (c - right) ** 2
        error = abs(losses.mean() - identifiability.brier(c, 0.2))
        assert error < 5 * losses.std() / len(losses) ** 0.5 + 1e-12


def test_g_can_be_right_for_a_student_that_is_not_the_mixture():
    """"Only if the student samples from the mixture" and "cannot repair" would both be false."""
    world = World(np.ones(1), np.array([[0.5, 0.5]]),
                  np.array([[[0.4, 0.0, 0.6], [0.8, 0.0, 0.2]]]), np.array([[1.0, 1.0, 0.0]]))
    student = np.array([0.1, 0.5, 0.4])  # right as often as the mixture, with another answer
    mu, g = float(student @ world.right[0]), identifiability.best_predictor(world)[0]
    assert np.abs(student - world.mixture[0]).max() > 0.4 and identifiability.residual(world) > 0.03
    assert identifiability.brier(g, mu) == pytest.approx(mu * (1 - mu), abs=1e-12)  # the floor


# ------------------------------------------------------------------------- 2. entropy collapse

def test_information_and_entropy():
    for world in WORLDS:
        information = world.information(world.teacher)
        assert abs(information - enumerate_information(world, world.teacher)) < 1e-12
        lost = world.mean(entropy(world.mixture)) - world.mean(entropy(world.teacher))
        assert abs(lost - information) < 1e-12
        assert information > 0
    same = success_world([[0.3, 0.3]])
    assert same.information(same.teacher) == pytest.approx(0, abs=1e-15)


def test_a_student_can_be_sharper_than_its_teacher():
    """The entropy of Prop. 2 is the mixture's: reverse KL's student keeps what all contexts say."""
    teachers, p_z = np.array([[0.6, 0.4 - 1e-6, 1e-6], [0.6, 1e-6, 0.4 - 1e-6]]), np.full(2, 0.5)
    student = entropy(collapse.reverse_pool(p_z, teachers))
    assert student < 0.05 < p_z @ entropy(teachers) < entropy(collapse.forward_pool(p_z, teachers))


@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_descent_finds_the_minimizer(kind):
    """Against the closed form, and against random competitors. A swapped KL fails both."""
    pool = {"reverse": collapse.reverse_pool, "forward": collapse.forward_pool,
            "jsd": collapse.jsd_pool}[kind]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        p_z, teachers = rng.dirichlet(np.ones(3)), softmax(rng.normal(size=(3, 4)))
        found = collapse.descend(p_z, teachers, kind)
        assert np.abs(found - pool(p_z, teachers)).max() < 1e-6

        def cost(p):
            return sum(p_z[z] * brute_divergence(p, teachers[z], kind) for z in range(3))
        assert cost(found) == pytest.approx(collapse.objective(found, p_z, teachers, kind),
                                            abs=1e-12)
        for _ in range(50):
            other = softmax(np.log(found) + rng.normal(size=4) * 0.3)
            assert cost(other) >= cost(found) - 1e-9


def brute_divergence(p, q, kind) -> float:
    def d(a, b):
        return sum(x * np.log(x / y) for x, y in zip(a, b))
    return {"reverse": d(p, q), "forward": d(q, p),
            "jsd": 0.5 * d(p, (p + q) / 2) + 0.5 * d(q, (p + q) / 2)}[kind]


@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_gradients_by_finite_differences(kind):
    rng = np.random.default_rng(0)
    logits, p_z = rng.normal(size=4), rng.dirichlet(np.ones(3))
    teachers = softmax(rng.normal(size=(3, 4)))
    for i in range(4):
        step = 1e-6 * np.eye(4)[i]
        up, down = (collapse.objective(softmax(logits + s), p_z, teachers, kind)
                    for s in (step, -step))
        slope = collapse.gradient(logits, p_z, teachers, kind)[i]
        assert (up - down) / 2e-6 == pytest.approx(slope, abs=1e-8)


def student_entropies(sharpness: float, odds=collapse.P_Z) -> list[float]:
    """[reverse, jsd, forward]"""
    return [float(entropy(pool(odds, collapse.sharp_teachers(sharpness))))
            for pool in (collapse.reverse_pool, collapse.jsd_pool, collapse.forward_pool)]


def test_sharp_teachers_collapse_reverse_kl_and_not_forward_kl():
    reverse, jsd, forward = student_entropies(12.0)
    assert reverse < 0.45 < jsd < forward
    assert forward == pytest.approx(entropy(collapse.P_Z), abs=0.01)
    assert student_entropies(60.0)[0] < 1e-3


def test_the_jsd_student_is_converged_where_descent_is_not():
    teachers = collapse.sharp_teachers(12.0)
    p = collapse.jsd_pool(collapse.P_Z, teachers)
    slope = collapse.gradient(np.log(p), collapse.P_Z, teachers, "jsd")
    assert np.abs(slope).max() < 1e-12
    assert float(entropy(p)) == pytest.approx(0.874, abs=5e-4)
    unfinished = collapse.descend(collapse.P_Z, teachers, "jsd", 1500)
    assert float(entropy(unfinished)) > float(entropy(p)) + 0.005


def test_collapse_needs_unequal_odds():
    equal = np.full(3, 1 / 3)
    for sharpness in (12.0, 60.0):
        assert student_entropies(sharpness, equal)[0] >= np.log(3) - 1e-9
    tied = np.array([0.4, 0.4, 0.2])
    assert student_entropies(60.0, tied)[0] == pytest.approx(np.log(2), abs=1e-3)


def test_soft_teachers_turn_the_order_round_in_this_family_alone():
    reverse, jsd, forward = student_entropies(1.0)
    assert reverse > jsd > forward
    reverse, jsd, forward = student_entropies(4.0)
    assert jsd < forward < reverse
    shares = [collapse.flattest(spread) for spread in (0.25, 1.0, 4.0, 8.0)]
    assert 0.5 > shares[0] > 0.4 and shares == sorted(shares, reverse=True) and shares[3] < 0.07


def test_the_feedback_of_a_following_teacher():
    ends = [float(entropy(collapse.feedback(kind, rate)[-1])) for kind, rate in
            (("reverse", 0.0), ("reverse", 0.05), ("reverse", 1.0), ("forward", 1.0))]
    frozen, slow, live, forward = ends
    assert frozen == pytest.approx(student_entropies(1.0)[0], abs=1e-6)
    assert live < slow < 0.05 < 0.5 < forward < frozen


@pytest.mark.parametrize("odds, push", [(0.8, 1.0), (0.8, 1.3), (0.8, 1.6), (0.8, 2.0),
                                        (0.6, 0.3), (0.6, 0.6), (0.7, 0.7), (0.7, 1.1)])
def test_forward_kl_keeps_a_mixture_if_the_push_is_over_the_log_odds(odds, push):
    end = collapse.feedback("forward", 1.0, np.array([odds, 1 - odds]), push, 20000, lr=1.0)[-1]
    collapsed = end[0] > 0.98
    assert collapsed == (push < np.log(odds / (1 - odds)))


def test_reverse_kl_with_a_following_teacher_needs_one_likeliest_context():
    ends = [collapse.feedback("reverse", 1.0, np.array(odds))[-1]
            for odds in ((0.5, 0.3, 0.2), (0.4, 0.4, 0.2))]
    assert ends[0].max() > 0.99
    assert ends[1][:2] == pytest.approx([0.5, 0.5], abs=0.01)


def test_per_token_pools_weigh_contexts_by_their_prior():
    """Enumerates (z, y_1) with y_1 from the student, and differentiates its second token."""
    for seed in range(100):
        rng = np.random.default_rng(seed)
        p_z = rng.dirichlet(np.ones(3))
        first, second = (softmax(2 * rng.normal(size=shape)) for shape in ((3, 2), (3, 2, 2)))
        pool = collapse.per_token_pool(p_z, first, second)
        student_first = pool.sum(1)
        for prefix in range(2):
            student = pool[prefix] / student_first[prefix]
            gradient = sum(p_z[z] * student_first[prefix] * (student - second[z, prefix])
                           for z in range(3))
            assert np.abs(gradient).max() < 1e-12
        posterior = np.einsum("z,za,zab->ab", p_z, first, second)  # the mixture of sequences
        assert np.abs(pool - posterior).max() > 1e-6


def test_two_tokens_are_enough_to_leave_the_mixture():
    says = np.eye(2)
    pool = collapse.per_token_pool(np.full(2, 0.5), says, np.repeat(says[:, None], 2, axis=1))
    assert np.array_equal(pool, np.full((2, 2), 0.25))


# ------------------------------------------------------------------------- 3. optimism

def test_selection_overstates_by_the_covariance():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        p, mu, w = rng.dirichlet(np.ones(5)), rng.random(5), rng.random(5)
        gap = optimism.helpful_mean(p, mu, w) - p @ mu
        assert gap == pytest.approx(optimism.optimism(p, mu, w), abs=1e-12)
        for growing in (np.exp(3 * mu), mu, mu ** 2, optimism.best_of(p, mu, 4), (mu > 0.5) + 1e-3):
            assert optimism.optimism(p, mu, growing) >= -1e-12
        assert optimism.optimism(p, mu, 1 - mu) <= 1e-12
        assert optimism.optimism(p, mu, np.full(5, 0.7)) == pytest.approx(0, abs=1e-12)
        assert optimism.optimism(p, np.full(5, 0.4), w) == pytest.approx(0, abs=1e-12)


def test_against_the_student_a_helpful_average_is_sufficient_and_not_necessary():
    counted = {(optimistic, helps): 0 for optimistic in (True, False) for helps in (True, False)}
    for seed in range(300):
        rng = np.random.default_rng(seed)
        p, mu, student = rng.dirichlet(np.ones(5)), rng.random(5), rng.random(1)
        world, w = success_world([mu.tolist()], [p.tolist()]), mu[None]
        ocg = optimism.student_ocg(world, w, student)
        assert ocg == pytest.approx(optimism.optimism(p, mu, mu) + p @ mu - student[0], abs=1e-12)
        counted[bool(ocg >= 0), bool(p @ mu >= student[0])] += 1
    assert counted[False, True] == 0  # sufficient
    assert counted[True, False] > 20  # not necessary
    p, mu = optimism.EXAMPLE
    world = success_world([mu.tolist()], [p.tolist()])
    stated = [optimism.student_ocg(world, mu[None], np.array([m])) for m in (0.5, 0.7)]
    assert stated == pytest.approx([0.119, -0.081], abs=1e-3)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_by_enumeration(n):
    p, mu = np.array([0.2, 0.3, 0.1, 0.4]), np.array([0.5, 0.1, 0.5, 0.9])  # with a tie
    w = optimism.best_of(p, mu, n)
    total = sum(np.prod(p[list(draw)]) * mu[list(draw)].max()
                for draw in product(range(4), repeat=n))
    assert optimism.helpful_mean(p, mu, w) == pytest.approx(total, abs=1e-12)
    assert (p * w).sum() == pytest.approx(1, abs=1e-12)


def test_demonstrations_kept_because_they_succeeded_by_monte_carlo():
    rng, (p, mu) = np.random.default_rng(0), optimism.EXAMPLE
    z = rng.choice(4, 400_000, p=p)
    kept = mu[z[rng.random(len(z)) < mu[z]]]
    error = abs(kept.mean() - optimism.helpful_mean(p, mu, mu))
    assert error < 5 * kept.std() / len(kept) ** 0.5


# ------------------------------------------------------------------------- 4. target replacement

def test_the_gradient_of_both_heads_by_finite_differences():
    rng = np.random.default_rng(0)
    logits, teacher = rng.normal(size=5), softmax(rng.normal(size=5))
    for i in range(5):
        step = 1e-6 * np.eye(5)[i]
        slope = (kl(softmax(logits + step), teacher) - kl(softmax(logits - step), teacher)) / 2e-6
        assert slope == pytest.approx(kl_gradient(logits, teacher)[i], abs=1e-8)


def test_opd_saturates_and_caopd_follows_with_the_same_answers():
    opd, ours = replacement.train("opd"), replacement.train("caopd")
    assert np.array_equal(opd["mu"], ours["mu"])
    assert np.allclose(ours["mu"][0], replacement.START, atol=0.05)
    final = replacement.start()[0] + replacement.PUSH[:, None] * np.eye(5)[0]
    assert np.abs(ours["mu"][-1] - softmax(final)[:, 0]).max() < 0.02  # the frozen teacher's end
    assert opd["confidence"][-1].min() > 0.97
    gap = (ours["confidence"] - ours["mu"])[-100:].mean()
    assert abs(gap) < 0.05 < 0.3 < (opd["confidence"] - opd["mu"])[-100:].mean()


def test_the_distance_of_caopd_is_a_bias_of_the_method_and_no_lag():
    """A target that moves would leave a distance that shrinks when it stands still."""
    runs = [replacement.train("caopd", seed=seed) for seed in range(5)]
    found = np.mean([replacement.distance(run) for run in runs])
    assert np.abs(runs[0]["mu"][-1] - runs[0]["mu"][-100]).max() < 0.004
    assert found == pytest.approx(replacement.predicted_distance(6.0), abs=0.005)
    assert replacement.distance(replacement.train("caopd", 4000)) > 0.9 * found
    sharper = np.mean([replacement.distance(replacement.train("caopd", sharpness=12.0, seed=seed))
                       for seed in range(5)])
    assert sharper < 0.6 * found


def test_the_semi_gradient_is_not_the_gradient_of_the_divergence_it_samples():
    """Per-token KL on the student's own prefixes is the sequence KL; the sampling of the prefix is
    not differentiated, which leaves a term out of the first token's gradient."""
    left_out = []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        first, second, to_first, to_second = (2 * rng.normal(size=shape)
                                              for shape in (2, (2, 2), 2, (2, 2)))
        to_first, to_second = softmax(to_first), softmax(to_second)
        later = kl(softmax(second), to_second)  # by prefix

        def objective(logits, sampled_from):
            return kl(softmax(logits), to_first) + softmax(sampled_from) @ later
        sequence = (softmax(first)[:, None] * softmax(second)).ravel()
        teacher = (to_first[:, None] * to_second).ravel()
        assert objective(first, first) == pytest.approx(kl(sequence, teacher), abs=1e-12)
        up, down = first + np.array([1e-6, 0.0]), first - np.array([1e-6, 0.0])
        semi = (objective(up, first) - objective(down, first)) / 2e-6
        full = (objective(up, up) - objective(down, down)) / 2e-6
        p = softmax(first)
        assert semi == pytest.approx(kl_gradient(first, to_first)[0], abs=1e-7)
        assert full - semi == pytest.approx(p[0] * (later[0] - p @ later), abs=1e-7)
        left_out.append(abs(full - semi))
    assert max(left_out) > 0.1


# ------------------------------------------------------------------------- 5. how many rollouts

@pytest.mark.parametrize("k, mu", [(1, 0.3), (4, 0.5), (8, 0.2), (16, 0.9)])
def test_binomial_and_its_mode(k, mu):
    p = binomial(k, mu)
    by_enumeration = np.zeros(k + 1)
    if k <= 8:
        for outcome in product((0, 1), repeat=k):
            by_enumeration[sum(outcome)] += np.prod([mu if r else 1 - mu for r in outcome])
        assert np.allclose(p, by_enumeration, atol=1e-12)
    assert p.sum() == pytest.approx(1) and p @ np.arange(k + 1) / k == pytest.approx(mu)
    assert p[round(rollouts.mode(k, mu) * k)] == pytest.approx(p.max())
    assert all(abs(rollouts.mode(k, m) - m) <= 1 / k for m in np.linspace(0, 1, 101))


def test_reverse_kl_goes_to_the_mode_and_forward_kl_to_the_mean():
    two_modes = rollouts.student_confidence(4, 0.4, 600.0, "reverse")  # (K + 1)μ = 2: ¼ and 2/4
    assert two_modes == pytest.approx(3 / 8)
    for k, mu in product((1, 4, 8), (0.15, 0.42, 0.83)):
        assert rollouts.student_confidence(k, mu, 30.0, "forward") == pytest.approx(mu, abs=1e-6)
        reverse = rollouts.student_confidence(k, mu, 600.0, "reverse")
        assert reverse == pytest.approx(rollouts.mode(k, mu), abs=1e-6)
    for kind in ("reverse", "forward"):  # descent on the expected divergence agrees
        found = collapse.descend(binomial(4, 0.4), rollouts.reporter(4, 3.0), kind)
        assert found @ np.linspace(0, 1, 5) == pytest.approx(
            rollouts.student_confidence(4, 0.4, 3.0, kind), abs=1e-5)


def test_forward_kl_is_biased_by_a_teacher_of_finite_sharpness():
    """By enumeration of the level that the teacher reports and the one that it writes."""
    for k, mu, s in product((1, 4, 32), (0.1, 0.5, 0.9), (1.0, 4.0, 12.0)):
        levels, total = np.arange(k + 1) / k, 0.0
        for reported, weight in enumerate(binomial(k, mu)):
            odds = [np.exp(s) if written == reported else 1.0 for written in range(k + 1)]
            total += weight * sum(o * c for o, c in zip(odds, levels)) / sum(odds)
        assert total - mu == pytest.approx(rollouts.forward_bias(k, mu, s), abs=1e-12)
        assert total == pytest.approx(rollouts.student_confidence(k, mu, s, "forward"), abs=1e-12)
    assert rollouts.forward_bias(32, 0.9, 4.0) == pytest.approx(-0.152, abs=5e-4)


def test_small_k_polarizes_and_is_not_overconfident_on_the_whole():
    mus = np.linspace(0.01, 0.99, 99)
    for k in (1, 2, 8, 32):
        for kind in ("reverse", "forward"):
            gap = [rollouts.student_confidence(k, mu, 12.0, kind) - mu for mu in mus]
            assert gap == pytest.approx([-g for g in reversed(gap)], abs=1e-12)  # about ½
    errors = [rollouts.calibration_error(k, 12.0, "reverse") for k in (1, 2, 4, 8)]
    distances = [distance for distance, _ in errors]
    assert distances == sorted(distances, reverse=True)
    assert errors[0][1] == pytest.approx(0.196, abs=5e-4) and errors[3][1] < 0.05


def test_the_ends_of_the_mode_and_the_first_token_of_each_level():
    ends = [rollouts.mode(8, mu) for mu in (0.11, 0.112, 0.89)]
    assert ends == [0.0, 0.125, 1.0]
    tokenizer = data.toy_tokenizer()
    first = [tokenizer.encode("\n" + data.format_confidence(level))[1]
             for level in np.arange(9) / 8]
    assert len(set(first)) == 9


def test_a_vanished_mass_returns_slowly_by_plain_descent_alone():
    returns = [rollouts.slow_return(o, "reverse", "descent") for o in (0.0, 8.0, 12.0)]
    assert returns[2] > 2 * returns[1] > 4 * returns[0] > 0
    assert rollouts.slow_return(12.0, "forward", "descent") < returns[2] / 10
    adamw = [rollouts.slow_return(12.0, kind, "adamw") for kind in ("reverse", "forward")]
    assert adamw == [70, 62]


@pytest.mark.parametrize("k, mu", [*product((1, 2, 5, 8), (0.1, 0.5, 0.83))])
def test_cross_entropy_on_replaced_tokens_is_unbiased_and_pays_only_for_sampling(k, mu):
    """By enumeration of all outcomes of K rollouts, and of the answer that is then stated about."""
    mean, sampled, expected = rollouts.direct_confidence(k, mu)
    levels = {}  # what the student's minimum states, c = mu_hat as often as it occurs
    for outcome in product((0, 1), repeat=k):
        c = sum(outcome) / k
        probability = np.prod([mu if r else 1 - mu for r in outcome])
        levels[c] = levels.get(c, 0.0) + probability
    brier = sum(p * (mu * (1 - c) ** 2 + (1 - mu) * c ** 2) for c, p in levels.items())
    assert mean == pytest.approx(mu, abs=1e-12)
    assert sampled == pytest.approx(brier, abs=1e-12)
    assert sampled - mu * (1 - mu) == pytest.approx(mu * (1 - mu) / k, abs=1e-12)
    assert expected == pytest.approx(mu * (1 - mu), abs=1e-12)


# ------------------------------------------------------------------------- 6. prompt level

def test_the_brier_decomposition_by_enumeration():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        p, mu, c = rng.dirichlet(np.ones(5)), rng.random(5), rng.random(5)
        total = sum(p[x] * (mu[x] if r else 1 - mu[x]) * (c[x] - r) ** 2
                    for x, r in product(range(5), (0, 1)))
        expected = prompt_level.expected_brier(p, mu, c)
        assert expected == pytest.approx(total, abs=1e-12)
        floor = prompt_level.brier_floor(p, mu)
        assert floor + p @ (c - mu) ** 2 == pytest.approx(total, abs=1e-12)
        assert expected >= prompt_level.expected_brier(p, mu, mu)


def test_the_spr_ceiling_over_every_order_of_the_prompts():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        p, mu = rng.dirichlet(np.ones(5)), np.round(rng.random(5), 1)  # with ties
        best = max(prompt_level.spr(p, mu, np.array(order, dtype=float))
                   for order in permutations(range(5)))
        assert prompt_level.spr_ceiling(p, mu) == pytest.approx(best, abs=1e-12)
        assert prompt_level.spr(p, mu, mu) <= best + 1e-12
        assert prompt_level.spr(p, mu, np.ones(5)) == 0
        if len(set(mu)) == 5:
            assert prompt_level.spr(p, mu, mu) == pytest.approx(best, abs=1e-12)


def test_a_sampled_confidence_passes_the_ceiling_of_a_deterministic_one_up_to_auroc():
    passed = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        p, mu = rng.dirichlet(np.ones(4)), np.round(rng.random(4), 1)
        if not 0 < p @ mu < 1:
            continue
        top = prompt_level.auroc(p, mu)
        by_pairs = sum(p[i] * p[j] * mu[i] * (1 - mu[j]) * ((mu[i] > mu[j]) + (mu[i] == mu[j]) / 2)
                       for i, j in product(range(4), repeat=2)) / ((p @ mu) * (p @ (1 - mu)))
        assert top == pytest.approx(by_pairs, abs=1e-12)
        q = rng.dirichlet(np.full(20, 0.3), 4)
        assert prompt_level.sampled_spr(p, mu, q) <= top + 1e-12
        # Uniform over 500 levels of a block of its own, blocks in the order of μ: ties are rare.
        order, jittered = {m: i for i, m in enumerate(sorted(set(mu)))}, np.zeros((4, 2000))
        for x in range(4):
            jittered[x, 500 * order[mu[x]]:500 * (order[mu[x]] + 1)] = 1 / 500
        reached = prompt_level.sampled_spr(p, mu, jittered)
        assert top - 0.002 < reached <= top + 1e-12
        passed += reached > prompt_level.spr_ceiling(p, mu)
    assert passed > 100
    p, c = np.full(4, 0.25), np.array([0.2, 0.2, 0.7, 0.9])  # one level each: the old definition
    mu, levels = np.array([0.1, 0.4, 0.6, 0.9]), np.array([0.2, 0.7, 0.9])
    q = (c[:, None] == levels).astype(float)
    assert prompt_level.sampled_spr(p, mu, q) == pytest.approx(prompt_level.spr(p, mu, c))


def test_noise_in_mu_hat_can_raise_spr_as_well_as_lower_it():
    mu, p = np.array(prompt_level.WORLDS["polarized (.95, .05)"]), np.full(8, 1 / 8)
    noisy = [prompt_level.sampled_spr(p, mu, np.array([binomial(n, m) for m in mu]))
             for n in (1, 16)]
    assert noisy[0] < prompt_level.spr(p, mu, mu) < noisy[1] < prompt_level.auroc(p, mu)
    rng, x = np.random.default_rng(0), np.random.default_rng(1).integers(0, 8, 20_000)
    measured = oracle(rng.binomial(16, mu[x]) / 16, rng.random(len(x)) < mu[x], 16)
    assert measured["spr"] == pytest.approx(noisy[1], abs=0.01)


def test_spr_is_the_metric_of_the_trainer():
    rng = np.random.default_rng(0)
    p, mu, c = np.full(4, 0.25), np.array([0.1, 0.4, 0.6, 0.9]), np.array([0.2, 0.2, 0.7, 0.9])
    x = rng.integers(0, 4, 200_000)
    measured = caopd.calibration(c[x], rng.random(len(x)) < mu[x])
    assert measured["spr"] == pytest.approx(prompt_level.spr(p, mu, c), abs=0.01)
    assert measured["brier"] == pytest.approx(prompt_level.expected_brier(p, mu, c), abs=0.01)


def test_the_oracles_brier_floor_is_unbiased():
    rng = np.random.default_rng(0)
    mu = rng.random(20_000)
    for n in (2, 4, 16):
        right = (rng.random(len(mu)) < mu).astype(float)
        estimate = oracle(rng.binomial(n, mu) / n, right, n)["brier"]
        assert estimate == pytest.approx((mu * (1 - mu)).mean(), abs=0.004)


# ------------------------------------------------------------------------- 8. in the trainer

def test_the_released_ece_bins_three_values_lower_and_counts_the_unparsable_as_zero():
    edges = np.linspace(0, 1, 11)
    lower = [c for c in np.arange(101) / 100
             if bin_of(np.array([c]), 10)[0] != np.digitize(c, edges[1:-1])]
    assert lower == [0.3, 0.6, 0.7]
    for c in np.arange(101) / 100:  # our bins are [i/10, (i+1)/10), by whole numbers
        assert bin_of(np.array([c]), 10)[0] == min(round(100 * c) // 10, 9)
    c, r = np.array([0.3, 0.35, 0.25]), np.array([0, 1, 1])  # .3 offsets .35 here, .25 there
    assert caopd.calibration(c, r)["ece"] == pytest.approx((0.75 + 0.35) / 3)
    assert in_the_trainer.released_ece(c, r) == pytest.approx((0.45 + 0.65) / 3)
    c, r = np.array([0.9, np.nan]), np.array([1, 1])
    assert caopd.calibration(c, r)["ece"] == pytest.approx(0.1)
    assert in_the_trainer.released_ece(c, r) == pytest.approx((0.1 + 1.0) / 2)


def test_ece_is_never_under_the_gap_of_the_same_answers():
    """What two cells of the paper's tables do cannot come from one set of answers."""
    for seed in range(200):
        rng = np.random.default_rng(seed)
        c, r = np.round(rng.random(50) ** 0.3, 2), rng.random(50) < 0.6
        figures = caopd.calibration(c, r)
        assert figures["ece"] >= abs(figures["ocg"]) - 1e-12
        assert in_the_trainer.released_ece(c, r) >= abs(figures["ocg"]) - 1e-12


@pytest.fixture(scope="module")
def toy():
    """(a tiny untrained student, groups of written rollouts of two questions)."""
    args = caopd.parse_args(["--width", "16", "--layers", "1"])
    torch.manual_seed(0)
    tokenizer = data.toy_tokenizer()
    student = caopd.Transformer(pipeline.toy_model(args, tokenizer))
    task, groups = data.arithmetic_task(0, 10, words=False), []
    for example in task.draw(2, "distill", 0):
        prompt = tokenizer.chat(data.student_messages(example, data.SYMBOLS))
        rollouts_ = [caopd.Rollout(tokenizer.encode(data.with_confidence(example.demo, c))
                                   + [tokenizer.eos_ids[0]], "", False, c > 0.5, c)
                     for c in (0.25, 0.75)]
        groups.append(caopd.Group(example, prompt, rollouts_))
    return student, groups


def test_what_is_compared_on_the_answer_differs_in_the_teachers_context_alone(toy):
    student, groups = toy
    ours = in_the_trainer.targets_of(groups)
    opd = in_the_trainer.as_opd_reads(groups, ours)
    tokenizer = data.toy_tokenizer()
    for a, b in zip(ours, opd):
        assert a.completions == b.completions and a.prompt == b.prompt
        assert tokenizer.decode(a.teacher_prompt) == tokenizer.decode(b.teacher_prompt).replace(
            "1.00", "0.50")
    told, count = in_the_trainer.answer_logits(student, [t.teacher_prompt for t in ours], ours)
    shown, _ = in_the_trainer.answer_logits(student, [t.teacher_prompt for t in opd], opd)
    answers = sum(y.answer_length * count for t in ours for y, count in t.completions.items())
    assert int(count.sum()) == answers and len(told) == len(count)
    assert caopd.kl(shown, told).max() > 0  # z̃ does reach the answer's positions
    parts = [in_the_trainer.gradient(student, student, ours, *losses) for losses in
             ((caopd.kl, in_the_trainer.nothing), (in_the_trainer.nothing, caopd.kl),
              (caopd.kl, caopd.kl))]
    assert torch.allclose(parts[0] + parts[1], parts[2], atol=1e-5)


def test_the_table_of_the_answers_gradients_compares_z_with_itself_where_z_says_1(
        toy, monkeypatch, capsys):
    """All rollouts right: then z̃ says 1.00 as z does, and the two gradients on I_a are one."""
    student, groups = toy
    models = dict.fromkeys(("base", "opd", "caopd"), student)

    def printed(groups):
        monkeypatch.setattr(in_the_trainer, "sample", lambda *_: groups)
        in_the_trainer.context_on_the_answer(models, 0)
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if "I_a" in line]
        return [float(lines[1][-1]), *map(float, lines[-2][-2:])]  # the effect of z̃, norms, cosine

    right = [replace(group, rollouts=[replace(y, correct=True) for y in group.rollouts])
             for group in groups]
    assert printed(right) == [0.0, 1.0, 1.0]
    effect, norms, cosine = printed(groups)
    assert effect > 0 and norms != 1 and cosine < 1


def test_the_probability_of_a_confidence_is_the_product_over_its_tokens(toy):
    student, groups = toy
    ours = in_the_trainer.targets_of(groups)
    each = []
    for target in ours:
        for y, count in target.completions.items():
            ids = torch.tensor([target.prompt + list(y.ids)])
            log_p = student(ids)[0].detach().log_softmax(-1)
            start = len(target.prompt) + y.answer_length
            segment = torch.arange(start, ids.shape[1])
            each.append(float(log_p[segment - 1, ids[0, segment]].sum().exp()))
    asked = in_the_trainer.probability_of(student, [t.prompt for t in ours], ours)
    assert asked == pytest.approx(np.mean(each), rel=1e-4)


def test_a_confidence_is_driven_and_asked_back(toy, monkeypatch):
    student, groups = toy
    monkeypatch.setattr(in_the_trainer, "LIMIT", 2)
    monkeypatch.setattr(in_the_trainer, "STEP_SIZE", 1e-2)
    fresh = in_the_trainer.updates_to_return(student, groups, caopd.target_cross_entropy, 0, 0.0)
    driven = in_the_trainer.updates_to_return(student, groups, caopd.target_cross_entropy, 60, 0.0)
    assert driven[0] > 0.9 > 0.1 > fresh[0]  # P(0.00) at the turn
    assert fresh[1] == driven[1]  # the frozen teacher has not moved
    assert driven[2] == 3  # never in two updates


def test_the_generalization_gap_says_what_it_needs(tmp_path, capsys):
    assert generalization.main([tmp_path]) == 2 and "python caopd.py" in capsys.readouterr().err


def test_the_generalization_gap_tells_practised_questions_from_new_ones(tmp_path, monkeypatch):
    """A model that is right on what it was trained on alone, and always says .75."""
    flags = {"steps": 3, "prompts": 32, "seed": 0}
    (tmp_path / "results.json").write_text(json.dumps({"settings": flags}))
    task = data.arithmetic_task(0, 10, words=False)
    practised = {e.question for step in range(3) for e in task.draw(32, "distill", step)}

    def ask(model, tokenizer, examples, wording, samples, *_):
        return [caopd.Group(e, [], [caopd.Rollout([], "", False, e.question in practised, 0.75)]
                            * samples) for e in examples]

    monkeypatch.setattr(caopd, "ask", ask)
    monkeypatch.setattr(generalization.Transformer, "from_pretrained", lambda _: SimpleNamespace(
        for_inference=lambda: SimpleNamespace(device=torch.device("cpu"))))
    accuracy, confidence, ocg = generalization.ask_both(tmp_path, "caopd", ("2*1",), 40)
    assert accuracy.tolist() == [1, 0] and confidence.tolist() == [0.75, 0.75]
    assert ocg.tolist() == [-0.25, 0.75]


def test_the_scaling_table_has_accuracy_before_confidence(capsys):
    run = {name: {"accuracy": a, "mean_confidence": c}
           for name, a, c in (("base", 0.1, 0.2), ("opd", 0.3, 0.4), ("caopd", 0.5, 0.6))}
    scaling.print_table({16: [run]})
    row = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["16"])
    assert row.split()[2:] == ["0.10", "0.20", "0.30", "0.40", "0.50", "0.60"]


def test_the_spread_over_seeds_is_that_of_a_sample():
    assert scaling.spread([0.08, 0.19, 0.25]) == "0.17 ± 0.09"  # with n it would be 0.07
    assert scaling.spread([0.08]) == "0.08"


# ------------------------------------------------------------------------- as a reader runs it

@pytest.mark.parametrize("name", ["identifiability", "optimism", "replacement", "prompt_level",
                                  "collapse", "rollouts"])
def test_each_claim_runs_on_its_own(name, tmp_path):
    """In a copy of the folder: a test does not draw over the figures that are tracked."""
    copy = shutil.copytree(THEORY, tmp_path / "theory",
                           ignore=shutil.ignore_patterns("figures", "__pycache__"))
    result = subprocess.run([sys.executable, str(copy / f"{name}.py")], capture_output=True,
                            text=True, cwd=tmp_path)
    assert result.returncode == 0 and "nan" not in result.stdout, result.stderr
    assert len(result.stdout.splitlines()) > 12
