"""Each identity of theory/ against independent brute force, each inequality on hundreds of random worlds, each equality case."""

import subprocess
import sys
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "theory"))

import collapse
import identifiability
import optimism
import prompt_level
import replacement
import rollouts
from worlds import bernoulli, entropy, kl, random_world, softmax, success_world

WORLDS = [random_world(np.random.default_rng(seed)) for seed in range(300)]


def enumerate_information(world, table) -> float:
    """I(V;Z|X) from the joint p(x,z,v), term by term."""
    total = 0.0
    for x in range(len(world.p_x)):
        joint = world.p_z[x][:, None] * table[x]
        for z, v in product(*map(range, joint.shape)):
            if joint[z, v] > 0:
                total += world.p_x[x] * joint[z, v] * np.log(joint[z, v] / (joint[z].sum() * joint[:, v].sum()))
    return total


# ----------------------------------------------------------------------------- 1. identifiability

def test_the_best_predictor_is_the_conditional_mean_and_leaves_its_variance():
    for world in WORLDS:
        mu = world.mu_teacher
        for x in range(len(mu)):  # least squares, with weights p(z|x)
            g, *_ = np.linalg.lstsq(np.sqrt(world.p_z[x])[:, None], np.sqrt(world.p_z[x]) * mu[x], rcond=None)
            assert abs(g[0] - identifiability.best_predictor(world)[x]) < 1e-12
        by_hand = sum(world.p_x[x] * (world.p_z[x] @ mu[x] ** 2 - (world.p_z[x] @ mu[x]) ** 2) for x in range(len(mu)))
        assert abs(identifiability.residual(world) - by_hand) < 1e-12
        other = identifiability.best_predictor(world) + np.random.default_rng(0).normal(size=len(mu))
        assert world.mean((mu - other[:, None]) ** 2) > identifiability.residual(world)


def test_the_residual_is_zero_if_and_only_if_success_is_independent_of_the_context():
    for world in WORLDS:
        assert (identifiability.residual(world) > 1e-12) == (world.information(bernoulli(world.mu_teacher)) > 1e-12)
    named = identifiability.NAMED
    assert identifiability.residual(named["context says nothing"]) < 1e-12
    moved = named["context moves the answer, not the success"]
    assert identifiability.residual(moved) < 1e-12 and abs(moved.information(moved.teacher) - np.log(2)) < 1e-12
    assert abs(identifiability.residual(named["a hint that helps"]) - 0.04) < 1e-12


def test_the_bridge_g_is_the_success_of_the_teachers_mixture():
    for world in WORLDS:
        assert np.allclose((world.mixture * world.right).sum(1), identifiability.best_predictor(world), atol=1e-12)
    assert abs(identifiability.best_predictor(success_world([[0.4, 0.8]]))[0] - 0.6) < 1e-12
    rng = np.random.default_rng(0)
    right = rng.random(200_000) < 0.2
    for c in (0.2, 0.6, 1.0):
        losses = (c - right) ** 2
        assert abs(losses.mean() - identifiability.brier(c, 0.2)) < 5 * losses.std() / len(losses) ** 0.5 + 1e-12


# ----------------------------------------------------------------------------- 2. entropy collapse

def test_information_and_entropy():
    for world in WORLDS:
        information = world.information(world.teacher)
        assert abs(information - enumerate_information(world, world.teacher)) < 1e-12
        assert abs(world.mean(entropy(world.mixture)) - world.mean(entropy(world.teacher)) - information) < 1e-12
        assert information > 0
    assert success_world([[0.3, 0.3]]).information(success_world([[0.3, 0.3]]).teacher) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_descent_finds_the_minimizer(kind):
    """Against the closed form where there is one; against random competitors always. A swapped KL fails both."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        p_z, teachers = rng.dirichlet(np.ones(3)), softmax(rng.normal(size=(3, 4)))
        found = collapse.descend(p_z, teachers, kind)
        if kind != "jsd":
            closed = (collapse.reverse_pool if kind == "reverse" else collapse.forward_pool)(p_z, teachers)
            assert np.abs(found - closed).max() < 1e-6
        best = sum(p_z[z] * brute_divergence(found, teachers[z], kind) for z in range(3))
        assert best == pytest.approx(collapse.objective(found, p_z, teachers, kind), abs=1e-12)
        for _ in range(50):
            other = softmax(np.log(found) + rng.normal(size=4) * 0.3)
            assert sum(p_z[z] * brute_divergence(other, teachers[z], kind) for z in range(3)) >= best - 1e-9


def brute_divergence(p, q, kind) -> float:
    def d(a, b):
        return sum(x * np.log(x / y) for x, y in zip(a, b))
    return {"reverse": d(p, q), "forward": d(q, p), "jsd": 0.5 * d(p, (p + q) / 2) + 0.5 * d(q, (p + q) / 2)}[kind]


@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_gradients_by_finite_differences(kind):
    rng = np.random.default_rng(0)
    logits, p_z, teachers = rng.normal(size=4), rng.dirichlet(np.ones(3)), softmax(rng.normal(size=(3, 4)))
    for i in range(4):
        step = 1e-6 * np.eye(4)[i]
        slope = (collapse.objective(softmax(logits + step), p_z, teachers, kind) - collapse.objective(softmax(logits - step), p_z, teachers, kind)) / 2e-6
        assert slope == pytest.approx(collapse.gradient(logits, p_z, teachers, kind)[i], abs=1e-8)


def student_entropies(sharpness: float) -> tuple[float, float, float]:
    """(reverse, jsd, forward)"""
    t = collapse.sharp_teachers(sharpness)
    return tuple(float(entropy(p)) for p in (collapse.reverse_pool(collapse.P_Z, t), collapse.descend(collapse.P_Z, t, "jsd"), collapse.forward_pool(collapse.P_Z, t)))


def test_sharp_teachers_collapse_reverse_kl_and_not_forward_kl():
    reverse, jsd, forward = student_entropies(12.0)
    assert reverse < 0.45 < jsd < forward and forward == pytest.approx(entropy(collapse.P_Z), abs=0.01)
    assert float(entropy(collapse.reverse_pool(collapse.P_Z, collapse.sharp_teachers(60.0)))) < 1e-3


def test_soft_teachers_turn_the_order_round():
    reverse, jsd, forward = student_entropies(1.0)
    assert reverse > jsd > forward
    reverse, jsd, forward = student_entropies(4.0)
    assert jsd < forward < reverse


def test_the_feedback_of_a_following_teacher():
    frozen, slow, live, forward = (collapse.feedback(kind, rate)[-1] for kind, rate in (("reverse", 0.0), ("reverse", 0.05), ("reverse", 1.0), ("forward", 1.0)))
    assert frozen == pytest.approx(student_entropies(1.0)[0], abs=1e-6)
    assert live < slow < 0.05 < 0.5 < forward < frozen


# ----------------------------------------------------------------------------- 3. optimism

def test_selection_overstates_by_the_covariance():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        p, mu = rng.dirichlet(np.ones(5)), rng.random(5)
        w = rng.random(5)
        assert optimism.helpful_mean(p, mu, w) - p @ mu == pytest.approx(optimism.optimism(p, mu, w), abs=1e-12)
        for growing in (np.exp(3 * mu), mu, mu ** 2, optimism.best_of(p, mu, 4), (mu > 0.5) + 1e-3):
            assert optimism.optimism(p, mu, growing) >= -1e-12
        assert optimism.optimism(p, mu, 1 - mu) <= 1e-12
        assert optimism.optimism(p, mu, np.full(5, 0.7)) == pytest.approx(0, abs=1e-12)
        assert optimism.optimism(p, np.full(5, 0.4), w) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_by_enumeration(n):
    p, mu = np.array([0.2, 0.3, 0.1, 0.4]), np.array([0.5, 0.1, 0.5, 0.9])  # with a tie
    total = sum(np.prod(p[list(draw)]) * mu[list(draw)].max() for draw in product(range(4), repeat=n))
    assert optimism.helpful_mean(p, mu, optimism.best_of(p, mu, n)) == pytest.approx(total, abs=1e-12)
    assert (p * optimism.best_of(p, mu, n)).sum() == pytest.approx(1, abs=1e-12)


def test_demonstrations_kept_because_they_succeeded_by_monte_carlo():
    rng, (p, mu) = np.random.default_rng(0), optimism.EXAMPLE
    z = rng.choice(4, 400_000, p=p)
    kept = mu[z[rng.random(len(z)) < mu[z]]]
    assert abs(kept.mean() - optimism.helpful_mean(p, mu, mu)) < 5 * kept.std() / len(kept) ** 0.5


# ----------------------------------------------------------------------------- 4. target replacement

def test_the_gradient_of_both_heads_by_finite_differences():
    rng = np.random.default_rng(0)
    logits, teacher = rng.normal(size=5), softmax(rng.normal(size=5))
    for i in range(5):
        step = 1e-6 * np.eye(5)[i]
        slope = (kl(softmax(logits + step), teacher) - kl(softmax(logits - step), teacher)) / 2e-6
        assert slope == pytest.approx(replacement.kl_gradient(logits, teacher)[i], abs=1e-8)


def test_opd_saturates_and_caopd_follows_with_the_same_answers():
    opd, ours = replacement.train("opd"), replacement.train("caopd")
    assert np.array_equal(opd["mu"], ours["mu"]) and np.allclose(ours["mu"][0], replacement.START, atol=0.05)
    final = replacement.start()[0] + replacement.PUSH[:, None] * np.eye(5)[0]
    assert np.abs(ours["mu"][-1] - softmax(final)[:, 0]).max() < 0.02  # where the frozen teacher leads, in closed form
    assert opd["confidence"][-1].min() > 0.97
    assert np.abs(ours["confidence"][-100:] - ours["mu"][-100:]).mean() < 0.12
    assert abs((ours["confidence"] - ours["mu"])[-100:].mean()) < 0.05 < 0.3 < (opd["confidence"] - opd["mu"])[-100:].mean()


# ----------------------------------------------------------------------------- 5. how many rollouts

@pytest.mark.parametrize("k, mu", [(1, 0.3), (4, 0.5), (8, 0.2), (16, 0.9)])
def test_binomial_and_its_mode(k, mu):
    p = rollouts.binomial(k, mu)
    by_enumeration = np.zeros(k + 1)
    if k <= 8:
        for outcome in product((0, 1), repeat=k):
            by_enumeration[sum(outcome)] += np.prod([mu if r else 1 - mu for r in outcome])
        assert np.allclose(p, by_enumeration, atol=1e-12)
    assert p.sum() == pytest.approx(1) and p @ np.arange(k + 1) / k == pytest.approx(mu)
    assert p[round(rollouts.mode(k, mu) * k)] == pytest.approx(p.max())


def test_forward_kl_is_unbiased_and_reverse_kl_goes_to_the_mode():
    assert rollouts.student_confidence(4, 0.4, 600.0, "reverse") == pytest.approx(3 / 8)  # (K + 1)μ = 2: two modes, 1/4 and 2/4
    for k, mu in product((1, 4, 8), (0.15, 0.42, 0.83)):
        assert rollouts.student_confidence(k, mu, 30.0, "forward") == pytest.approx(mu, abs=1e-6)
        assert rollouts.student_confidence(k, mu, 600.0, "reverse") == pytest.approx(rollouts.mode(k, mu), abs=1e-6)
    for kind in ("reverse", "forward"):  # the closed form is the minimum: descent on the expected divergence agrees
        weights, teacher = rollouts.binomial(4, 0.4), rollouts.reporter(4, 3.0)
        assert collapse.descend(weights, teacher, kind) @ np.linspace(0, 1, 5) == pytest.approx(rollouts.student_confidence(4, 0.4, 3.0, kind), abs=1e-5)


def test_small_k_is_overconfident_and_a_vanished_mass_returns_slowly():
    errors = [rollouts.calibration_error(k, 12.0, "reverse") for k in (1, 2, 4, 8)]
    assert [e[0] for e in errors] == sorted((e[0] for e in errors), reverse=True) and errors[0][1] > 0.15 > 0.05 > errors[3][1]
    assert (rollouts.mode(8, 0.11), rollouts.mode(8, 0.112), rollouts.mode(8, 0.89)) == (0.0, 0.125, 1.0)
    returns = [rollouts.slow_return(o) for o in (0.0, 8.0, 12.0)]
    assert returns[2] > 2 * returns[1] > 4 * returns[0] > 0 and rollouts.slow_return(12.0, kind="forward") < returns[2] / 10


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
    # The frequencies are where cross-entropy over the outcomes is least: no random table beats it.
    p = np.array(list(levels.values()))
    for seed in range(50):
        other = softmax(np.log(p) + np.random.default_rng(seed).normal(size=len(p)))
        assert -p @ np.log(other) > -p @ np.log(p)


# ----------------------------------------------------------------------------- 6. what a prompt-level confidence can reach

def test_the_brier_decomposition_by_enumeration():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        p, mu, c = rng.dirichlet(np.ones(5)), rng.random(5), rng.random(5)
        total = sum(p[x] * (mu[x] if r else 1 - mu[x]) * (c[x] - r) ** 2 for x, r in product(range(5), (0, 1)))
        assert prompt_level.expected_brier(p, mu, c) == pytest.approx(total, abs=1e-12)
        assert prompt_level.brier_floor(p, mu) + p @ (c - mu) ** 2 == pytest.approx(total, abs=1e-12)
        assert prompt_level.expected_brier(p, mu, c) >= prompt_level.expected_brier(p, mu, mu)


def test_the_spr_ceiling_over_every_order_of_the_prompts():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        p, mu = rng.dirichlet(np.ones(5)), np.round(rng.random(5), 1)  # with ties
        best = max(prompt_level.spr(p, mu, np.array(order, dtype=float)) for order in permutations(range(5)))
        assert prompt_level.spr_ceiling(p, mu) == pytest.approx(best, abs=1e-12)
        assert prompt_level.spr(p, mu, mu) <= best + 1e-12 and prompt_level.spr(p, mu, np.ones(5)) == 0
        if len(set(mu)) == 5:
            assert prompt_level.spr(p, mu, mu) == pytest.approx(best, abs=1e-12)


def test_spr_is_the_metric_of_the_trainer():
    from caopd import calibration
    rng = np.random.default_rng(0)
    p, mu, c = np.full(4, 0.25), np.array([0.1, 0.4, 0.6, 0.9]), np.array([0.2, 0.2, 0.7, 0.9])
    x = rng.integers(0, 4, 200_000)
    measured = calibration(c[x], rng.random(len(x)) < mu[x])
    assert measured["spr"] == pytest.approx(prompt_level.spr(p, mu, c), abs=0.01)
    assert measured["brier"] == pytest.approx(prompt_level.expected_brier(p, mu, c), abs=0.01)


def test_the_oracles_brier_floor_is_unbiased():
    from caopd import oracle
    rng = np.random.default_rng(0)
    mu = rng.random(20_000)
    for n in (2, 4, 16):
        estimate = oracle(rng.binomial(n, mu) / n, (rng.random(len(mu)) < mu).astype(float), n)["brier"]
        assert estimate == pytest.approx((mu * (1 - mu)).mean(), abs=0.004)


# ----------------------------------------------------------------------------- each file as a reader runs it

@pytest.mark.parametrize("name", ["identifiability", "optimism", "replacement", "prompt_level", "collapse", "rollouts"])
def test_each_claim_runs_on_its_own(name, tmp_path):
    path = Path(identifiability.__file__).parent / f"{name}.py"
    result = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and len(result.stdout.splitlines()) > 12 and "nan" not in result.stdout
