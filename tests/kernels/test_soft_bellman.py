"""Entropy-regularised optima against exact numbers, closed forms and their limits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import make_mdp
from jaxrl_llm.kernels import bellman
from jaxrl_llm.kernels.soft_bellman import (
    soft_policy_evaluation,
    soft_value,
    soft_value_iteration,
)
from tests import oracles

solve = jax.jit(soft_value_iteration)
evaluate = jax.jit(soft_policy_evaluation)


def test_soft_value_iteration_of_two_states_gives_the_oracle(x64):
    solution = solve(oracles.two_state_mdp(), temperature=1.0)
    assert solution.converged
    np.testing.assert_allclose(solution.q, oracles.M2_SOFT_Q, atol=1e-4)
    np.testing.assert_allclose(solution.value, oracles.M2_SOFT_VALUE, atol=1e-4)
    greedy = solution.policy[jnp.arange(2), jnp.array([1, 0])]
    np.testing.assert_allclose(greedy, oracles.M2_SOFT_GREEDY_PROBABILITY, atol=1e-5)


def test_soft_value_iteration_of_one_state_has_a_closed_form(x64):
    """V = log(e + e²) / (1 - .5) at temperature 1: every step adds the same."""
    mdp = make_mdp(np.ones((1, 2, 1)), np.array([[1.0, 2.0]]), 0.5)
    solution = solve(mdp, temperature=1.0, tolerance=1e-12)
    np.testing.assert_allclose(solution.value, [2 * np.log(np.e + np.e**2)], atol=1e-10)


def test_soft_value_iteration_without_temperature_is_the_optimum(x64):
    mdp = oracles.treatment_mdp()
    for temperature, atol in ((1e-2, 0.11), (1e-5, 1e-3)):
        solution = solve(mdp, temperature=temperature)
        assert solution.converged
        np.testing.assert_allclose(solution.value, oracles.TREATMENT_VALUE, atol=atol)
    np.testing.assert_array_equal(solution.policy.argmax(-1), oracles.TREATMENT_POLICY)


def test_soft_value_iteration_never_takes_a_masked_action(x64):
    mdp = oracles.random_mdp(0, 6, 3, 0.9, masked=True)
    solution = solve(mdp, temperature=0.5, tolerance=1e-10)
    np.testing.assert_array_equal(np.asarray(solution.policy)[~np.asarray(mdp.action_mask)], 0)
    np.testing.assert_allclose(solution.policy.sum(-1), np.ones(6), rtol=1e-12)
    # A forbidden action is as one that costs a fortune.
    fortune = jnp.where(mdp.action_mask[..., None], mdp.reward, -1e4)
    free = replace(mdp, reward=fortune, action_mask=jnp.ones_like(mdp.action_mask))
    expected = solve(free, temperature=0.5, tolerance=1e-10).value
    np.testing.assert_allclose(solution.value, expected, atol=1e-8)


def test_soft_value_iteration_gives_terminal_states_no_entropy(x64):
    """Straight to the end or round once more: p = e^{-1 - V} of staying at temperature 1."""
    mdp = oracles.corridor(2, step=-1.0, arrival=0.0)
    solution = solve(mdp, temperature=1.0, tolerance=1e-12)
    assert solution.value[1] == 0
    # exp(V) = e^-1 + 2 e^-1 exp(V)
    expected = np.log(np.exp(-1) / (1 - 2 * np.exp(-1)))
    np.testing.assert_allclose(solution.value[0], expected, atol=1e-10)


def test_soft_value_iteration_stopped_early_says_so():
    solution = solve(oracles.treatment_mdp(), temperature=1.0, max_iterations=3)
    assert int(solution.iterations) == 3
    assert not solution.converged
    assert solution.residual > 1


def test_soft_value_iteration_vmap_over_temperatures_equals_a_loop(x64):
    mdp = oracles.two_state_mdp()
    temperatures = jnp.array([0.1, 1.0, 3.0])
    batched = jax.vmap(lambda temperature: solve(mdp, temperature=temperature))(temperatures)
    loop = [solve(mdp, temperature=temperature).value for temperature in temperatures]
    np.testing.assert_allclose(batched.value, loop, atol=1e-8)


def test_soft_policy_evaluation_of_the_optimum_is_the_optimum(x64):
    mdp = oracles.random_mdp(1, 6, 3, 0.9, masked=True)
    best = solve(mdp, temperature=0.5, tolerance=1e-12)
    solution = evaluate(mdp, best.policy, temperature=0.5)
    assert solution.converged
    np.testing.assert_allclose(solution.value, best.value, atol=1e-9)
    np.testing.assert_allclose(solution.policy, best.policy, atol=1e-9)
    worse = evaluate(mdp, bellman.uniform_policy(mdp), temperature=0.5)
    assert (worse.value < solution.value).all()


@pytest.mark.parametrize("form", [lambda mdp: mdp, bellman.successor_form], ids=["dense", "lists"])
def test_soft_policy_evaluation_adds_the_entropy_of_each_step(form, x64):
    mdp = form(oracles.two_state_mdp())
    uniform = jnp.full((2, 2), 0.5)
    plain = bellman.policy_evaluation(mdp, uniform).value
    for temperature in (0.0, 2.0):
        solution = evaluate(mdp, uniform, temperature=temperature)
        bonus = temperature * np.log(2) / (1 - oracles.M2_DISCOUNT)
        np.testing.assert_allclose(solution.value, plain + bonus, atol=1e-10)


def test_soft_policy_evaluation_of_a_policy_that_never_ends_is_finite_and_not_converged():
    mdp = oracles.corridor(3, step=-1.0, arrival=0.0)
    never = jnp.tile(jnp.array([1.0, 0, 0]), (3, 1))
    solution = evaluate(mdp, never, temperature=1.0)
    np.testing.assert_array_equal(solution.value, np.zeros(3))
    assert not solution.converged


def test_soft_value_is_finite_for_large_values_and_differentiates_to_the_policy():
    q, mask = jnp.array([1000.0, 999, 5]), jnp.array([True, True, False])
    gradient = jax.grad(soft_value)(q, 2.0, mask)
    np.testing.assert_allclose(gradient, [0.622459, 0.377541, 0], rtol=1e-5)
    np.testing.assert_allclose(soft_value(q, 2.0, mask), 1000 + 2 * np.log(1 + np.exp(-0.5)))
