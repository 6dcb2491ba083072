"""Both representations of an MDP give the same expectations."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import bellman
from tests import oracles

POLICY = np.array([2, 0, 1, 1, 2])


@pytest.fixture(params=["dense", "dense, reward of the action", "successors"])
def problem(request, x64):
    """A problem in one representation, and its arrays `transition` and expected `reward`."""
    mdp = oracles.garnet_mdp(0, num_states=5, num_actions=3, discount=0.9, branching=3)
    transition = np.asarray(mdp.transition)
    reward = np.einsum("sat,sat->sa", transition, np.asarray(mdp.reward))
    if request.param == "successors":
        return bellman.successor_form(mdp), transition, reward
    if "action" in request.param:
        return replace(mdp, reward=jnp.array(reward)[..., None]), transition, reward
    return mdp, transition, reward


def test_mdp_knows_its_size(problem):
    mdp, _, _ = problem
    assert (mdp.num_states, mdp.num_actions) == (5, 3)


def test_mdp_expect_matches_einsum(problem):
    mdp, transition, _ = problem
    value = np.random.default_rng(1).normal(size=5)
    expected = np.einsum("sat,t->sa", transition, value)
    np.testing.assert_allclose(mdp.expect(jnp.array(value)), expected, atol=1e-14)


def test_mdp_expected_reward_matches_einsum(problem):
    mdp, _, reward = problem
    np.testing.assert_allclose(mdp.expected_reward(), reward, atol=1e-14)


@pytest.mark.slow
def test_mdp_under_matches_einsum(problem):
    mdp, transition, _ = problem
    stochastic = np.random.default_rng(2).dirichlet(np.ones(3), size=5)
    expected = np.einsum("sa,sat->st", stochastic, transition)
    np.testing.assert_allclose(mdp.under(jnp.array(stochastic)), expected, atol=1e-14)
    chain = mdp.under(jnp.array(POLICY))
    np.testing.assert_allclose(chain, transition[np.arange(5), POLICY], atol=1e-14)


def test_mdp_restrict_keeps_one_action_a_state(problem):
    mdp, transition, reward = problem
    mdp = replace(mdp, action_mask=mdp.action_mask.at[0, 2].set(False))
    restricted = mdp.restrict(jnp.array(POLICY))
    value = np.random.default_rng(3).normal(size=5)
    assert (restricted.num_states, restricted.num_actions) == (5, 1)
    states = np.arange(5)
    expected = transition[states, POLICY] @ value
    np.testing.assert_allclose(restricted.expect(jnp.array(value))[:, 0], expected, atol=1e-14)
    expected = reward[states, POLICY]
    np.testing.assert_allclose(restricted.expected_reward()[:, 0], expected, atol=1e-14)
    np.testing.assert_array_equal(restricted.action_mask[:, 0], [False, True, True, True, True])
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, (mdp, restricted))
    assert dtypes[0] == dtypes[1]


def test_mdp_methods_vmap_equal_a_loop(problem):
    mdp, _, _ = problem
    values = jnp.array(np.random.default_rng(4).normal(size=(3, 5)))
    loop = jnp.stack([mdp.expect(value) for value in values])
    np.testing.assert_allclose(jax.jit(jax.vmap(mdp.expect))(values), loop, atol=1e-14)
