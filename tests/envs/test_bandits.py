"""Problems beside their regrets summed by hand."""

import jax
import numpy as np
import pytest

from jaxrl_llm.envs import bandits


def test_bernoulli_repeats_its_arms():
    problem = bandits.bernoulli((0.9, 0.8, 0.5), 10)
    assert (problem.horizon, problem.num_arms, problem.noise) == (10, 3, "bernoulli")
    np.testing.assert_allclose(problem.uniform_regret, 10 * (0.1 + 0.4) / 3, rtol=1e-5)
    assert problem.fixed_regret == pytest.approx(0, abs=1e-5)


def test_swapping_trades_places_halfway():
    problem = bandits.swapping((0.5, 0.9, 0.8), 5)
    expected = [[0.9, 0.8, 0.5]] * 2 + [[0.5, 0.8, 0.9]] * 3
    np.testing.assert_allclose(problem.expected_reward, expected, rtol=1e-6)
    np.testing.assert_allclose(problem.fixed_regret, 5 * 0.9 - max(3.3, 4.0, 3.7), rtol=1e-5)


def test_linear_rewards_are_one_matrix_of_the_contexts():
    problem = bandits.linear(jax.random.key(0), 50, num_arms=3, num_features=4, deviation=0.1)
    context, reward = np.asarray(problem.context), np.asarray(problem.expected_reward)
    assert context.shape == (50, 4)
    assert problem.noise == "gaussian"
    weight, _, rank, _ = np.linalg.lstsq(context, reward, rcond=None)
    assert rank == 4
    np.testing.assert_allclose(context @ weight, reward, atol=1e-5)
    np.testing.assert_array_equal(context[:, 0], np.ones(50))
    np.testing.assert_allclose(reward.std(axis=0), np.linalg.norm(weight[1:], axis=0), rtol=0.4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bandits.bernoulli((0.5, 1.5), 10), r"probability\[1\] is 1.5"),
        (lambda: bandits.bernoulli((), 10), "probability is empty"),
        (lambda: bandits.swapping((0.5,), 0), "horizon is 0"),
        (lambda: bandits.linear(jax.random.key(0), 5, num_arms=0), "num_arms is 0"),
        (lambda: bandits.linear(jax.random.key(0), 5, deviation=-1.0), "deviation is -1.0"),
    ],
)
def test_a_problem_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
