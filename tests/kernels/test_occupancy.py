"""Occupancies against their dual identity, and constrained optima against linear programming."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from jaxrl_llm.kernels import bellman
from jaxrl_llm.kernels.occupancy import (
    constrained_optimum,
    discounted_occupancy,
    occupancy_policy,
)
from tests import oracles

occupancy_of = jax.jit(discounted_occupancy)
solve = jax.jit(constrained_optimum)


def linear_program(mdp, cost, budget):
    """The occupancy LP: max d · r over flows that start at the initial law, within the budget."""
    states, actions = mdp.num_states, mdp.num_actions
    alive = ~np.asarray(mdp.terminal)
    leaving = np.repeat(np.eye(states), actions, axis=1)
    entering = np.asarray(mdp.transition, np.float64).reshape(-1, states).T
    flow = (leaving - float(mdp.discount) * entering)[alive]
    # No constraint holds in a terminal state: what enters it has left.
    usable = (np.asarray(mdp.action_mask) & alive[:, None]).ravel()
    result = linprog(
        -np.asarray(mdp.expected_reward()).ravel(),
        A_eq=flow,
        b_eq=np.asarray(mdp.initial)[alive],
        A_ub=np.ravel(cost)[None],
        b_ub=[budget],
        bounds=[(0, None if allowed else 0) for allowed in usable],
    )
    assert result.success
    return -result.fun, -result.ineqlin.marginals[0]


@pytest.mark.slow
@pytest.mark.parametrize("form", [lambda mdp: mdp, bellman.successor_form], ids=["dense", "lists"])
def test_discounted_occupancy_is_the_dual_of_the_value(form, x64):
    mdp = oracles.random_mdp(0, 5, 3, 0.9)
    policy = jnp.array(np.random.default_rng(0).dirichlet(np.ones(3), size=5))
    occupancy = occupancy_of(form(mdp), policy)
    value = bellman.policy_evaluation(mdp, policy).value
    earned = jnp.sum(occupancy * mdp.expected_reward())
    np.testing.assert_allclose(earned, mdp.initial @ value, rtol=1e-10)
    np.testing.assert_allclose(jnp.sum(occupancy), 10, rtol=1e-10)
    np.testing.assert_allclose(occupancy_policy(occupancy, mdp.action_mask), policy, atol=1e-12)


def test_discounted_occupancy_sums_discounted_visits(x64):
    mdp = oracles.two_state_mdp()
    policy = np.array(oracles.M2_BEHAVIOUR)
    law, expected = np.array([1.0, 0]), np.zeros((2, 2))
    for time in range(400):
        expected += 0.9**time * law[:, None] * policy
        law = np.einsum("s,sa,sat->t", law, policy, oracles.M2_TRANSITION)
    np.testing.assert_allclose(occupancy_of(mdp, jnp.array(policy)), expected, atol=1e-10)


def test_discounted_occupancy_of_episodes_counts_visits(x64):
    mdp = oracles.corridor(4, step=-1.0, arrival=0.0)
    mdp = replace(mdp, initial=jnp.array([0.5, 0, 0, 0.5]))
    occupancy = occupancy_of(mdp, jnp.ones(4, int))
    np.testing.assert_allclose(occupancy, [[0, 0.5, 0]] * 3 + [[0, 0, 0]], atol=1e-12)
    np.testing.assert_array_equal(occupancy_of(mdp, jnp.zeros(4, int)), np.zeros((4, 3)))


def test_occupancy_policy_shares_where_nothing_is_visited():
    mask = jnp.array([[True, False, True], [True, True, True]])
    policy = occupancy_policy(jnp.array([[0.0, 0, 0], [1, 3, 0]]), mask)
    np.testing.assert_allclose(policy, [[0.5, 0, 0.5], [0.25, 0.75, 0]])


@pytest.mark.slow
def test_constrained_optimum_of_two_states_gives_the_oracle(x64):
    solution = solve(oracles.two_state_mdp(), jnp.array(oracles.M2_COST), oracles.M2_BUDGET)
    assert solution.feasible
    np.testing.assert_allclose(solution.reward, oracles.M2_CONSTRAINED_RETURN, atol=1e-4)
    np.testing.assert_allclose(solution.cost, oracles.M2_BUDGET, rtol=1e-12)
    np.testing.assert_allclose(solution.multiplier, oracles.M2_MULTIPLIER, atol=1e-5)
    np.testing.assert_allclose(solution.policy, oracles.M2_CONSTRAINED, atol=1e-5)


@pytest.mark.slow
def test_constrained_optimum_matches_linear_programming(x64):
    for seed in range(6):
        mdp = oracles.random_mdp(seed, 6, 3, 0.9, masked=True)
        cost = np.random.default_rng(seed).random((6, 3))
        free = solve(mdp, jnp.array(cost), 1e9)
        least = -bellman.policy_iteration(replace(mdp, reward=-jnp.array(cost)[..., None])).value
        cheapest = float(mdp.initial @ least)
        for share in (0.1, 0.5, 0.9):
            budget = cheapest + share * (float(free.cost) - cheapest)
            best, multiplier = linear_program(mdp, cost, budget)
            solution = solve(mdp, jnp.array(cost), budget)
            np.testing.assert_allclose(solution.reward, best, atol=1e-7)
            np.testing.assert_allclose(solution.multiplier, multiplier, rtol=1e-5)
            np.testing.assert_allclose(solution.cost, budget, rtol=1e-9)


@pytest.mark.slow
def test_constrained_optimum_keeps_its_promises_when_followed(x64):
    mdp, cost = oracles.two_state_mdp(), jnp.array(oracles.M2_COST)
    solution = solve(mdp, cost, oracles.M2_BUDGET)
    for amount, reward in ((solution.reward, mdp.reward), (solution.cost, cost[..., None])):
        value = bellman.policy_evaluation(replace(mdp, reward=reward), solution.policy).value
        np.testing.assert_allclose(mdp.initial @ value, amount, rtol=1e-10)


def test_constrained_optimum_without_a_binding_budget_is_the_optimum(x64):
    mdp = oracles.two_state_mdp()
    solution = solve(mdp, jnp.array(oracles.M2_COST), 100.0)
    np.testing.assert_allclose(solution.reward, oracles.M2_Q[0].max(), atol=1e-4)
    np.testing.assert_allclose(solution.policy, [[0, 1], [1, 0]], atol=1e-12)
    assert solution.multiplier == 0
    assert solution.feasible


def test_constrained_optimum_of_an_impossible_budget_costs_least(x64):
    cost = jnp.array(oracles.M2_COST) + 1
    solution = solve(oracles.two_state_mdp(), cost, 9.0)
    assert not solution.feasible
    np.testing.assert_allclose(solution.cost, 10, rtol=1e-10)
    np.testing.assert_allclose(solution.policy, [[1, 0], [0, 1]], atol=1e-12)
    assert solution.multiplier == 0


@pytest.mark.slow
def test_constrained_optimum_of_an_episode_matches_linear_programming(x64):
    """Undiscounted; action 0, which leads to the end, costs most."""
    mdp = oracles.terminal_mdp(1, 6, 3)
    cost = np.random.default_rng(1).random((6, 3)) + np.array([1.0, 0, 0])
    free = solve(mdp, jnp.array(cost), 1e9)
    budget = 0.97 * float(free.cost)
    best, _ = linear_program(mdp, cost, budget)
    np.testing.assert_allclose(solve(mdp, jnp.array(cost), budget).reward, best, atol=1e-7)


@pytest.mark.slow
def test_constrained_optimum_vmap_over_budgets_equals_a_loop(x64):
    mdp, cost = oracles.two_state_mdp(), jnp.array(oracles.M2_COST)
    budgets = jnp.array([-1.0, 3.0, 5.0, 100.0])
    batched = jax.vmap(lambda budget: solve(mdp, cost, budget))(budgets)
    loop = [solve(mdp, cost, budget) for budget in budgets]
    np.testing.assert_allclose(batched.reward, [each.reward for each in loop], rtol=1e-10)
    np.testing.assert_array_equal(batched.feasible, [False, True, True, True])
    assert (jnp.diff(batched.reward[1:]) > 0).all()
