"""Moments, laws and tails of returns against every path through small problems."""

from collections import defaultdict
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import make_mdp
from jaxrl_llm.kernels import bellman
from jaxrl_llm.kernels.finite_horizon import horizon_evaluation
from jaxrl_llm.kernels.return_distribution import (
    conditional_value_at_risk,
    return_law,
    return_moments,
)
from tests import oracles

moments = jax.jit(return_moments)
law = jax.jit(return_law, static_argnums=2, static_argnames=("lowest", "highest"))


def every_path(mdp, policy, state, horizon):
    """{return: probability} from `state`, walking every path; `policy` is `[T, S, A]`."""
    transition = np.asarray(mdp.transition)
    reward = np.broadcast_to(mdp.reward, transition.shape)
    discount, terminal = float(mdp.discount), np.asarray(mdp.terminal)
    paths = {(state, 0.0): 1.0}
    for time in range(horizon):
        longer = defaultdict(float)
        for (here, total), chance in paths.items():
            if terminal[here]:
                longer[here, total] += chance
                continue
            for action, there in np.ndindex(*transition.shape[1:]):
                step = policy[time, here, action] * transition[here, action, there]
                if step > 0:
                    earned = total + discount**time * reward[here, action, there]
                    longer[there, round(float(earned), 9)] += chance * step
        paths = longer
    result = defaultdict(float)
    for (_, total), chance in paths.items():
        result[total] += chance
    return result


@pytest.fixture
def dice(x64):
    """Rewards -1, 0, 1 or 2 for each next state, an end, and a policy that depends on time."""
    random = np.random.default_rng(0)
    mdp = oracles.terminal_mdp(0, 4, 2)
    reward = random.integers(-1, 3, size=mdp.transition.shape).astype(float)
    policy = random.dirichlet(np.ones(2), size=(4, 4))
    return replace(mdp, reward=jnp.array(reward)), policy


def test_return_moments_match_every_path(x64):
    """An acyclic problem, so that a few steps are all the return there is."""
    random = np.random.default_rng(1)
    upper = np.triu(random.random((4, 2, 4)).swapaxes(0, 1), 1).swapaxes(0, 1)
    upper[3] = 1
    transition = upper / upper.sum(-1, keepdims=True)
    mdp = make_mdp(transition, random.normal(size=(4, 2, 4)), 0.9, terminal=np.arange(4) == 3)
    policy = random.dirichlet(np.ones(2), size=4)
    result = moments(mdp, jnp.array(policy))
    sparse = moments(bellman.successor_form(mdp), jnp.array(policy))
    assert result.converged
    for state in range(4):
        paths = every_path(mdp, np.tile(policy, (4, 1, 1)), state, 4)
        values, chances = np.array(list(paths)), np.array(list(paths.values()))
        mean = values @ chances
        np.testing.assert_allclose(result.mean[state], mean, atol=1e-8)
        np.testing.assert_allclose(
            result.variance[state], chances @ (values - mean) ** 2, atol=1e-8
        )
    np.testing.assert_allclose(sparse.variance, result.variance, atol=1e-12)


def test_return_moments_of_independent_rewards_have_a_closed_form(x64):
    """Rewards 0 or 1 by a fair coin, discount .9: mean 5, variance .25 / (1 - .81)."""
    mdp = make_mdp(np.full((2, 1, 2), 0.5), np.array([[[0.0, 1.0]], [[0.0, 1.0]]]), 0.9)
    result = moments(mdp, jnp.array([0, 0]))
    np.testing.assert_allclose(result.mean, [5, 5], rtol=1e-12)
    np.testing.assert_allclose(result.variance, np.full(2, 0.25 / 0.19), rtol=1e-12)


def test_return_moments_obey_the_second_moment_recursion(x64):
    """M = E[r² + 2 discount r V' + discount² M'], Sobel's form, on a stochastic policy."""
    mdp = oracles.random_mdp(0, 5, 2, 0.95)
    policy = np.random.default_rng(0).dirichlet(np.ones(2), size=5)
    result = moments(mdp, jnp.array(policy))
    second = np.asarray(result.variance + result.mean**2)
    mean, reward = np.asarray(result.mean), np.asarray(mdp.reward)
    inner = reward**2 + 2 * 0.95 * reward * mean + 0.95**2 * second
    expected = np.einsum("sa,sat,sat->s", policy, mdp.transition, inner)
    np.testing.assert_allclose(second, expected, rtol=1e-10)
    assert (np.asarray(result.variance) > 0).all()


def test_return_moments_of_a_certain_return_have_no_variance():
    mdp = oracles.corridor(5, step=-1.0, arrival=4.0)
    result = moments(mdp, jnp.ones(5, int))
    np.testing.assert_allclose(result.mean, [0, 1, 2, 3, 0], atol=1e-5)
    np.testing.assert_allclose(result.variance, np.zeros(5), atol=1e-5)


def test_return_moments_of_a_policy_that_never_ends_are_finite_and_not_converged():
    result = moments(oracles.corridor(3, step=-1.0, arrival=0.0), jnp.zeros(3, int))
    assert not result.converged
    np.testing.assert_array_equal(result.mean, np.zeros(3))
    np.testing.assert_array_equal(result.variance, np.zeros(3))


def test_return_law_matches_every_path(dice):
    mdp, policy = dice
    result = law(mdp, jnp.array(policy), 4, lowest=-1, highest=2)
    assert result.on_lattice
    assert result.support.tolist() == list(range(-4, 9))
    for state in range(4):
        paths = every_path(mdp, policy, state, 4)
        expected = [paths.get(float(total), 0.0) for total in result.support]
        np.testing.assert_allclose(result.probability[state], expected, atol=1e-8)


def test_return_law_has_the_mean_of_horizon_evaluation(dice):
    mdp, policy = dice
    result = law(mdp, jnp.array(policy), 4, lowest=-1, highest=2)
    mean = horizon_evaluation(mdp, jnp.array(policy), 4)[0]
    np.testing.assert_allclose(result.probability @ result.support, mean, atol=1e-10)
    np.testing.assert_allclose(result.probability.sum(-1), np.ones(4), rtol=1e-12)


def test_return_law_of_other_units_is_scaled(dice):
    mdp, policy = dice
    small = replace(mdp, reward=mdp.reward / 4)
    expected = law(mdp, jnp.array(policy), 4, lowest=-1, highest=2)
    result = law(small, jnp.array(policy), 4, lowest=-1, highest=2, unit=0.25)
    assert result.on_lattice
    np.testing.assert_allclose(result.support, expected.support / 4)
    np.testing.assert_allclose(result.probability, expected.probability, atol=1e-12)


@pytest.mark.parametrize("change", [0.5, 3.0], ids=["between atoms", "out of bounds"])
def test_return_law_says_when_a_reward_is_not_on_the_lattice(change, dice):
    mdp, policy = dice
    state, action, following = np.argwhere(np.asarray(mdp.transition) > 0)[0]
    off = replace(mdp, reward=mdp.reward.at[state, action, following].add(change))
    assert not law(off, jnp.array(policy), 4, lowest=-1, highest=2).on_lattice


def test_return_law_of_no_steps_is_nothing_for_certain(dice):
    mdp, _ = dice
    result = law(mdp, jnp.zeros(4, int), 0, lowest=-1, highest=2)
    np.testing.assert_array_equal(result.probability, np.ones((4, 1)))
    np.testing.assert_array_equal(result.support, [0])


def test_conditional_value_at_risk_is_the_mean_of_the_worst_share(x64):
    support = np.array([-10.0, -2, 0, 3])
    probability = np.array([0.1, 0.2, 0.3, 0.4])
    sample = np.repeat(support, [100, 200, 300, 400])  # a thousand equally likely patients
    for share in (50, 100, 250, 600, 1000):
        result = conditional_value_at_risk(jnp.array(support), jnp.array(probability), share / 1000)
        np.testing.assert_allclose(result, sample[:share].mean(), atol=1e-12)


def test_conditional_value_at_risk_is_the_best_of_rockafellar_and_uryasev(x64):
    """CVaR = max_z z - E[(z - G)+] / level, attained at an atom."""
    random = np.random.default_rng(0)
    support, probability = np.sort(random.normal(size=20)), random.dirichlet(np.ones(20))
    shortfall = np.maximum(support[:, None] - support, 0) @ probability
    for level in (0.05, 0.3, 1.0):
        result = conditional_value_at_risk(jnp.array(support), jnp.array(probability), level)
        np.testing.assert_allclose(result, np.max(support - shortfall / level), atol=1e-12)


def test_conditional_value_at_risk_vmap_over_states_equals_a_loop(dice):
    mdp, policy = dice
    result = law(mdp, jnp.array(policy), 4, lowest=-1, highest=2)
    risk = jax.vmap(conditional_value_at_risk, in_axes=(None, 0, None))
    batched = risk(result.support, result.probability, 0.2)
    loop = [conditional_value_at_risk(result.support, row, 0.2) for row in result.probability]
    np.testing.assert_allclose(batched, loop, rtol=1e-12)
    assert (batched <= result.probability @ result.support).all()
