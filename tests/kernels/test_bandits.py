"""Indices and posteriors by hand, the exact regret by counting every history."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import bandits
from jaxrl_llm.kernels.bandits import Arms

SEEN = Arms(jnp.array([4.0, 1.0, 0.0]), jnp.array([3.0, 0.0, 0.0]))


def ucb1_law(arms):
    return jax.nn.one_hot(jnp.argmax(bandits.ucb1_index(arms)), arms.pulls.size)


def soft_law(arms):
    return jax.nn.softmax(3 * arms.mean)


def by_counting(law, mean, horizon):
    """Expected regret `[T]`: every sequence of arms and rewards with its probability."""
    law, mean = jax.jit(law), np.asarray(mean)
    regret, level = np.zeros(horizon), {((0, 0), (0, 0)): 1.0}
    for time in range(horizon):
        following = {}
        for (count, total), mass in level.items():
            pi = np.asarray(law(Arms(jnp.array(count, float), jnp.array(total, float))))
            regret[time] += mass * pi @ (mean.max() - mean)
            for arm, reward in itertools.product(range(2), range(2)):
                chance = pi[arm] * (mean[arm] if reward else 1 - mean[arm])
                new = (
                    tuple(n + (k == arm) for k, n in enumerate(count)),
                    tuple(s + reward * (k == arm) for k, s in enumerate(total)),
                )
                following[new] = following.get(new, 0) + mass * chance
        level = following
    return np.cumsum(regret)


def test_arms_record_counts_and_averages():
    arms = Arms.unknown(2)
    for arm, reward in ((0, 1.0), (0, 0.0), (1, 0.5)):
        arms = arms.record(jnp.array(arm), jnp.array(reward))
    np.testing.assert_array_equal(arms.pulls, [2, 1])
    np.testing.assert_array_equal(arms.mean, [0.5, 0.5])
    np.testing.assert_array_equal(Arms.unknown(3).mean, np.zeros(3))


def test_ucb1_index_matches_its_equation():
    index = bandits.ucb1_index(SEEN)
    expected = [0.75 + math.sqrt(2 * math.log(5) / 4), math.sqrt(2 * math.log(5))]
    np.testing.assert_allclose(index[:2], expected, rtol=1e-6)
    assert index[2] == jnp.inf
    np.testing.assert_allclose(bandits.ucb1_index(SEEN, width=0.0)[:2], [0.75, 0], atol=1e-7)


def test_beta_posterior_counts_successes_and_failures():
    alpha, beta = bandits.beta_posterior(SEEN)
    np.testing.assert_array_equal(alpha, [4, 1, 1])
    np.testing.assert_array_equal(beta, [2, 2, 1])


def test_gaussian_posterior_matches_bayes_rule_on_a_grid():
    mean, deviation = bandits.gaussian_posterior(
        SEEN, noise=0.5, prior_mean=0.2, prior_deviation=2.0
    )
    grid = np.linspace(-20, 20, 40_001)
    for arm, (count, total) in enumerate(zip(*map(np.asarray, SEEN), strict=True)):
        # Up to a factor, the likelihood of rewards depends on their count and total alone.
        log_law = -((grid - 0.2) ** 2) / 8 + (total * grid - count * grid**2 / 2) / 0.25
        law = np.exp(log_law - log_law.max())
        law /= law.sum()
        average = law @ grid
        np.testing.assert_allclose(mean[arm], average, atol=1e-4)
        spread = math.sqrt(law @ (grid - average) ** 2)
        np.testing.assert_allclose(deviation[arm], spread, rtol=1e-3)


def test_exp3_law_mixes_the_weights_with_uniform():
    law = bandits.exp3_law(jnp.log(jnp.array([1.0, 3.0])), 0.2)
    np.testing.assert_allclose(law, [0.8 * 0.25 + 0.1, 0.8 * 0.75 + 0.1], rtol=1e-6)
    np.testing.assert_allclose(bandits.exp3_law(jnp.array([0.0, 5.0]), 1.0), [0.5, 0.5])


def test_exp3_update_estimates_every_reward_without_bias():
    """Averaged over the arm drawn, a log-weight moves by mixing / K times its arm's reward."""
    start, reward, mixing = jnp.array([0.0, -1.0, 0.5]), jnp.array([0.3, 0.9, 0.1]), 0.3
    law = bandits.exp3_law(start, mixing)
    moved = np.zeros(3)
    for arm in range(3):
        new = bandits.exp3_update(start, law, jnp.array(arm), reward[arm], mixing)
        other = (arm + 1) % 3  # an arm that was not drawn shows the shift of all
        moved += float(law[arm]) * np.asarray((new - new[other]) - (start - start[other]))
        assert new.max() == 0
    np.testing.assert_allclose(moved, mixing / 3 * reward, atol=1e-6)


def test_exp3_mixing_minimises_the_bound():
    """The regret of EXP3 is at most (e - 1) mixing T + K ln K / mixing."""
    arms, horizon = 5, 1000
    best = bandits.exp3_mixing(arms, horizon)

    def bound(mixing):
        return (math.e - 1) * mixing * horizon + arms * math.log(arms) / mixing

    assert bound(best) == pytest.approx(bandits.exp3_bound(arms, horizon))
    assert bound(best) < min(bound(0.99 * best), bound(1.01 * best))
    assert bandits.exp3_mixing(arms, 1) == 1


def test_ucb1_bound_and_lai_robbins_slope_match_their_sums():
    mean = [0.9, 0.8, 0.5]
    bound = 8 * math.log(2000) * (1 / 0.1 + 1 / 0.4) + (1 + math.pi**2 / 3) * 0.5
    assert float(bandits.ucb1_bound(jnp.array(mean), 2000)) == pytest.approx(bound, rel=1e-5)

    def divergence(p, q):
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    slope = 0.1 / divergence(0.8, 0.9) + 0.4 / divergence(0.5, 0.9)
    assert float(bandits.lai_robbins_slope(jnp.array(mean))) == pytest.approx(slope, rel=1e-5)
    assert bandits.lai_robbins_slope(jnp.array([0.4, 0.4])) == 0


def test_pseudo_regret_adds_gaps_to_the_best_arm_of_each_round():
    expected = jnp.array([[0.9, 0.5], [0.9, 0.5], [0.1, 0.5]])
    regret = bandits.pseudo_regret(expected, jnp.array([0, 1, 0]))
    np.testing.assert_allclose(regret, [0, 0.4, 0.8], rtol=1e-6)


@pytest.mark.parametrize("law", [ucb1_law, soft_law])
def test_exact_regret_matches_every_history_counted(law, x64):
    mean = jnp.array([0.7, 0.4])
    exact = jax.jit(lambda mean: bandits.exact_regret(law, mean, 8))(mean)
    np.testing.assert_allclose(exact, by_counting(law, mean, 8), atol=1e-12)


def test_exact_regret_of_a_fixed_law_is_a_line(x64):
    exact = bandits.exact_regret(lambda _: jnp.array([0.25, 0.75]), jnp.array([0.2, 0.6]), 4)
    np.testing.assert_allclose(exact, 0.25 * 0.4 * np.arange(1, 5), atol=1e-14)


@pytest.mark.parametrize(("horizon", "total"), [(1, 0.5), (10, 6.0218), (20, 12.4313)])
def test_bayes_optimal_total_matches_published(horizon, total, x64):
    assert float(bandits.bayes_optimal_total(horizon)) == pytest.approx(total, abs=5e-5)


def test_bayes_optimal_total_of_two_rounds_by_hand(x64):
    """Half at first; then 2/3 after a success, else the other arm, 1/2."""
    total = 0.5 + 0.5 * 2 / 3 + 0.5 * 0.5
    assert float(bandits.bayes_optimal_total(2)) == pytest.approx(total, abs=1e-12)
