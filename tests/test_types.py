"""`Mean` adds exactly; both representations of an MDP give the same expectations."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import bellman
from jaxrl_llm.types import Mean
from tests import oracles

POLICY = np.array([2, 0, 1, 1, 2])


def test_mean_of_unequal_minibatches_is_the_mean_of_all():
    values = np.random.default_rng(0).integers(-50, 50, size=12).astype(np.float32)
    parts = [Mean.of(jnp.array(part)) for part in np.split(values, [1, 4, 4])]
    assert (parts[0] + parts[1] + parts[2] + parts[3]).mean == np.float32(values.mean())


def test_mean_of_masked_minibatches_is_the_mean_of_what_was_kept():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    mask = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    rows = jax.vmap(Mean.of)(jnp.array(values), jnp.array(mask))
    total = jax.tree.map(jnp.sum, rows)
    assert total.mean == values[mask].mean()
    np.testing.assert_array_equal(rows.mean, [0.0, 5.5, 0.0])
    average_of_averages = float(rows.mean.mean())
    assert average_of_averages != float(total.mean)


def test_mean_ignores_nan_where_masked():
    part = Mean.of(jnp.array([1.0, jnp.nan]), jnp.array([True, False]))
    assert part.mean == 1.0


def test_mean_of_nothing_is_zero_with_finite_gradients():
    def mean(values):
        return Mean.of(values, jnp.zeros(3, bool)).mean

    value, gradient = jax.value_and_grad(mean)(jnp.ones(3))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros(3))


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.int32, jnp.bfloat16])
def test_mean_counts_in_float32_at_least(dtype):
    """A bool cannot count to 2, and bfloat16 not beyond 256."""
    values = jnp.concatenate([jnp.ones(300), jnp.zeros(301)]).astype(dtype)
    for part in (Mean.of(values), Mean.of(values, jnp.ones(601, bool))):
        assert part.total.dtype == part.weight.dtype == jnp.float32
        assert (float(part.total), float(part.weight)) == (300.0, 601.0)


def test_mean_keeps_float64(x64):
    assert Mean.of(jnp.array([0.1])).mean == 0.1


def test_mean_is_a_pytree_that_scans():
    def body(total, value):
        return total + Mean.of(value), None

    zero = Mean(total=jnp.zeros(()), weight=jnp.zeros(()))
    total, _ = jax.lax.scan(body, zero, jnp.arange(6.0).reshape(3, 2))
    assert total.mean == 2.5


# MDPs


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
