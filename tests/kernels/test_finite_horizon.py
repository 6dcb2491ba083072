"""Backward induction against every policy there is, and against its limits."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import make_mdp
from jaxrl_llm.kernels import bellman
from jaxrl_llm.kernels.finite_horizon import backward_induction, horizon_evaluation
from tests import oracles

induction = jax.jit(backward_induction, static_argnums=1)
evaluation = jax.jit(horizon_evaluation, static_argnums=2)


def undiscounted(mdp):
    """At discount 1 and without a terminal state, which `make_mdp` refuses."""
    return replace(mdp, discount=jnp.ones_like(mdp.discount))


def naive_evaluation(mdp, policies, final):
    """V `[..., T + 1, S]` of actions `[..., T, S]`, by a loop over time."""
    states, terminal = np.arange(mdp.num_states), np.asarray(mdp.terminal)
    transition, reward = np.asarray(mdp.transition), np.asarray(mdp.expected_reward())
    discount = float(mdp.discount)
    values = [np.broadcast_to(np.where(terminal, 0, final), policies[..., 0, :].shape)]
    for time in reversed(range(policies.shape[-2])):
        policy = policies[..., time, :]
        following = np.einsum("...st,...t->...s", transition[states, policy], values[0])
        values.insert(0, np.where(terminal, 0, reward[states, policy] + discount * following))
    return np.stack(values, axis=-2)


@pytest.mark.parametrize("discount", [0.9, 1.0])
def test_backward_induction_finds_the_best_of_every_policy_over_time(discount, x64):
    mdp = oracles.random_mdp(3, 3, 2, 0.9, masked=True)
    mdp = replace(mdp, discount=jnp.asarray(discount))
    final = np.array([0.5, -1.0, 0.0])
    solution = induction(mdp, 4, final_value=jnp.array(final))
    allowed = [np.flatnonzero(row) for row in np.asarray(mdp.action_mask)]
    policies = np.array(list(itertools.product(*(allowed * 4)))).reshape(-1, 4, 3)
    assert len(policies) > 200
    every = naive_evaluation(mdp, policies, final)
    np.testing.assert_allclose(solution.value, every.max(0), atol=1e-12)
    best = naive_evaluation(mdp, np.asarray(solution.policy), final)
    np.testing.assert_allclose(best, solution.value, atol=1e-12)


def test_backward_induction_depends_on_the_time_left(x64):
    mdp = oracles.corridor(4, step=0.0, arrival=1.0)
    solution = induction(mdp, 2)
    np.testing.assert_array_equal(solution.value[0], [0, 1, 1, 0])
    np.testing.assert_array_equal(solution.value[1], [0, 0, 1, 0])
    np.testing.assert_array_equal(solution.value[2], np.zeros(4))


def test_backward_induction_over_a_long_horizon_is_the_stationary_optimum(x64):
    solution = induction(oracles.treatment_mdp(), 300)
    np.testing.assert_allclose(solution.value[0], oracles.TREATMENT_VALUE, atol=1e-5)
    np.testing.assert_array_equal(solution.policy[0], oracles.TREATMENT_POLICY)


def test_backward_induction_of_successors_equals_dense(x64):
    mdp = oracles.terminal_mdp(0, 5, 3)
    dense, sparse = induction(mdp, 3), induction(bellman.successor_form(mdp), 3)
    np.testing.assert_allclose(sparse.value, dense.value, atol=1e-12)
    np.testing.assert_array_equal(dense.value[:, -1], np.zeros(4))


def test_backward_induction_of_no_steps_is_the_final_value():
    mdp = oracles.corridor(3, step=-1.0, arrival=0.0)
    solution = induction(mdp, 0, final_value=jnp.array([2.0, 3.0, 1000.0]))
    np.testing.assert_array_equal(solution.value, [[2, 3, 0]])
    assert solution.policy.shape == (0, 3)


def test_backward_induction_vmap_equals_a_loop(x64):
    mdps = [oracles.random_mdp(seed, 3, 2, 0.9) for seed in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *mdps)
    batched = jax.vmap(lambda mdp: backward_induction(mdp, 3))(batch)
    for index, mdp in enumerate(mdps):
        np.testing.assert_allclose(batched.value[index], induction(mdp, 3).value, atol=1e-12)


def test_horizon_evaluation_of_each_form_of_policy_matches_a_loop(x64):
    mdp = undiscounted(oracles.random_mdp(1, 4, 3, 0.9))
    over_time = jnp.array(np.random.default_rng(0).integers(3, size=(5, 4)))
    expected = naive_evaluation(mdp, np.asarray(over_time), np.zeros(4))
    np.testing.assert_allclose(evaluation(mdp, over_time, 5), expected, atol=1e-12)
    one_hot = jax.nn.one_hot(over_time, 3, dtype=expected.dtype)
    np.testing.assert_allclose(evaluation(mdp, one_hot, 5), expected, atol=1e-12)
    stationary = naive_evaluation(mdp, np.tile(over_time[0], (5, 1)), np.zeros(4))
    np.testing.assert_allclose(evaluation(mdp, over_time[0], 5), stationary, atol=1e-12)
    np.testing.assert_allclose(evaluation(mdp, one_hot[0], 5), stationary, atol=1e-12)


def test_horizon_evaluation_of_a_long_horizon_is_policy_evaluation(x64):
    value = evaluation(oracles.two_state_mdp(), jnp.array(oracles.M2_BEHAVIOUR), 300)
    np.testing.assert_allclose(value[0], oracles.M2_BEHAVIOUR_VALUE, atol=1e-4)


def test_horizon_evaluation_is_differentiable_in_the_reward(x64):
    mdp, policy = oracles.two_state_mdp(), jnp.array(oracles.M2_BEHAVIOUR)

    def value(reward):
        return horizon_evaluation(replace(mdp, reward=reward), policy, 6)[0, 0]

    gradient = jax.grad(value)(mdp.reward)
    # Linear in the reward: the gradient is the discounted number of visits over six steps.
    np.testing.assert_allclose(jnp.sum(gradient), (1 - 0.9**6) / 0.1, rtol=1e-12)
    np.testing.assert_allclose(jnp.sum(gradient * mdp.reward), value(mdp.reward), rtol=1e-12)


def test_horizon_evaluation_refuses_a_policy_of_another_length():
    mdp = make_mdp(np.ones((1, 1, 1)), 1.0, 0.5)
    with pytest.raises(ValueError, match="policy has 3 steps; it must have the horizon's 2"):
        horizon_evaluation(mdp, jnp.zeros((3, 1), int), 2)
