"""Exact answers of offline learners, against known numbers and numerical minimisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from jaxrl_llm.kernels import bellman
from jaxrl_llm.kernels.offline_fixed_points import (
    advantage_weighted_policy,
    conservative_control,
    conservative_evaluation,
    conservative_q,
    expectile,
    implicit_values,
)
from tests import oracles

BEHAVIOUR = oracles.M2_BEHAVIOUR
evaluate = jax.jit(conservative_evaluation)
control = jax.jit(conservative_control)
implicit = jax.jit(implicit_values)


# Conservative evaluation


def test_conservative_evaluation_gives_the_oracle(x64):
    solution = evaluate(
        oracles.two_state_mdp(),
        jnp.array(oracles.M2_EVALUATED),
        jnp.array(BEHAVIOUR),
        penalty_coefficient=0.5,
    )
    assert solution.converged
    np.testing.assert_allclose(solution.value, oracles.M2_CONSERVATIVE_VALUE, atol=1e-4)


@pytest.mark.slow
def test_conservative_evaluation_is_stationary_for_its_objective(x64):
    """The gradient of the population objective in Q vanishes at the fixed point."""
    mdp = oracles.random_mdp(0, 4, 3, 0.9)
    random = np.random.default_rng(0)
    behaviour, policy = jnp.array(random.dirichlet(np.ones(3), size=(2, 4)))
    solution = evaluate(mdp, policy, behaviour, penalty_coefficient=0.7)
    target = bellman.q_values(mdp, solution.value)

    def objective(q):
        conservative = jnp.sum((policy - behaviour) * q)
        return 0.7 * conservative + 0.5 * jnp.sum(behaviour * (q - target) ** 2)

    np.testing.assert_allclose(jax.grad(objective)(solution.q), np.zeros((4, 3)), atol=1e-9)
    expected = np.sum(policy * solution.q, axis=-1)
    np.testing.assert_allclose(solution.value, expected, atol=1e-9)


def test_conservative_evaluation_without_penalty_or_off_policy_is_policy_evaluation(x64):
    mdp, behaviour = oracles.two_state_mdp(), jnp.array(BEHAVIOUR)
    evaluated = jnp.array(oracles.M2_EVALUATED)
    free = evaluate(mdp, evaluated, behaviour, penalty_coefficient=0.0)
    np.testing.assert_allclose(free.value, oracles.M2_EVALUATED_VALUE, atol=1e-4)
    on_policy = evaluate(mdp, behaviour, behaviour, penalty_coefficient=5.0)
    np.testing.assert_allclose(on_policy.value, oracles.M2_BEHAVIOUR_VALUE, atol=1e-4)
    lower = evaluate(mdp, evaluated, behaviour, penalty_coefficient=0.1)
    assert (lower.value < free.value).all()


# Conservative control


@pytest.mark.slow
def test_conservative_control_gives_the_oracle(x64):
    mdp, behaviour = oracles.two_state_mdp(), jnp.array(BEHAVIOUR)
    solution = control(mdp, behaviour, penalty_coefficient=1.0)
    assert solution.converged
    np.testing.assert_allclose(solution.q, oracles.M2_CONSERVATIVE_Q, atol=1e-4)
    np.testing.assert_allclose(solution.value, solution.q.max(-1), atol=1e-5)
    np.testing.assert_array_equal(solution.policy, [1, 0])


@pytest.mark.slow
def test_conservative_control_with_a_small_penalty_is_the_optimum_of_the_data(x64):
    mdp = oracles.two_state_mdp()
    all_actions = control(mdp, jnp.array(BEHAVIOUR), penalty_coefficient=1e-7)
    np.testing.assert_allclose(all_actions.q, oracles.M2_Q, atol=1e-4)
    never_second = jnp.array([[1.0, 0], [0.5, 0.5]])
    held = control(mdp, never_second, penalty_coefficient=1e-7)
    best = max(
        (bellman.policy_evaluation(mdp, jnp.array([0, action])).value for action in (0, 1)),
        key=lambda value: value[0],
    )
    np.testing.assert_allclose(held.value, best, atol=1e-4)
    assert held.q[0, 1] == -np.inf
    assert held.policy[0] == 0


def test_conservative_control_reads_nothing_of_terminal_states(x64):
    """The behaviour of an end may be anything, all 0 included."""
    mdp = oracles.terminal_mdp(0, 4, 3, 0.9)
    behaviour = np.full((4, 3), 1 / 3)
    behaviour[3] = 0
    solution = control(mdp, jnp.array(behaviour), penalty_coefficient=0.1)
    assert solution.converged
    assert np.isfinite(solution.q).all()
    np.testing.assert_array_equal(solution.q[3], np.zeros(3))


def test_conservative_q_minimises_its_objective(x64):
    random = np.random.default_rng(0)
    for scale, coefficient in ((1, 1.0), (30, 50.0), (100, 0.01)):
        target, data = scale * random.normal(size=4), random.dirichlet(np.ones(4))
        q = conservative_q(jnp.array(target), jnp.array(data), coefficient)
        gradient = coefficient * (softmax(q) - data) + data * (q - target)
        np.testing.assert_allclose(gradient, np.zeros(4), atol=1e-9 * scale * coefficient**0.5)
    found = minimize(
        lambda q: coefficient * (logsumexp(q) - data @ q) + 0.5 * data @ (q - target) ** 2, target
    )
    np.testing.assert_allclose(q, found.x, atol=1e-2)


def test_conservative_q_leaves_a_soft_policy_of_the_data_alone(x64):
    data = jnp.array([0.2, 0.3, 0.5])
    q = conservative_q(jnp.log(data) + 3, data, 2.0)
    np.testing.assert_allclose(q, jnp.log(data) + 3, atol=1e-12)


def test_conservative_q_in_float32_is_finite_for_extreme_targets():
    data = jnp.array([0.9, 0.1 - 1e-6, 1e-6])
    for target in ([1e4, 0, -1e4], [0, 0, 1e4]):
        q = conservative_q(jnp.array(target, jnp.float32), data, 1.0)
        assert np.isfinite(q).all()


# Implicit values


@pytest.mark.parametrize("level", oracles.M2_IMPLICIT_VALUE)
def test_implicit_values_give_the_oracle(level, x64):
    behaviour = jnp.array(BEHAVIOUR)
    solution = implicit(oracles.two_state_mdp(), behaviour, expectile_level=level)
    assert solution.converged
    np.testing.assert_allclose(solution.value, oracles.M2_IMPLICIT_VALUE[level], atol=1e-4)


def test_implicit_values_near_level_one_are_the_optimum_of_the_data(x64):
    mdp = oracles.two_state_mdp()
    never_second = jnp.array([[1.0, 0], [0.5, 0.5]])
    held = implicit(mdp, never_second, expectile_level=1 - 1e-7)
    best = bellman.policy_evaluation(mdp, jnp.array([0, 0])).value
    np.testing.assert_allclose(held.value, best, atol=1e-4)
    assert held.policy[0] == 0


def test_implicit_values_vmap_over_levels_equals_a_loop(x64):
    mdp, behaviour = oracles.random_mdp(0, 4, 3, 0.9), jnp.full((4, 3), 1 / 3)
    levels = jnp.array([0.2, 0.5, 0.9])
    batched = jax.vmap(lambda level: implicit(mdp, behaviour, expectile_level=level))(levels)
    loop = [implicit(mdp, behaviour, expectile_level=level).value for level in levels]
    np.testing.assert_allclose(batched.value, loop, atol=1e-9)
    assert (jnp.diff(batched.value, axis=0) > 0).all()


@pytest.mark.parametrize("level", [0.01, 0.3, 0.5, 0.8, 0.99])
def test_expectile_balances_what_lies_above_and_below(level, x64):
    random = np.random.default_rng(0)
    values, weights = random.normal(size=(5, 6)), random.dirichlet(np.ones(6), size=5)
    result = np.asarray(expectile(jnp.array(values), jnp.array(weights), level))[:, None]
    above = np.sum(weights * np.maximum(values - result, 0), axis=1)
    below = np.sum(weights * np.maximum(result - values, 0), axis=1)
    np.testing.assert_allclose(level * above, (1 - level) * below, atol=1e-12)


def test_expectile_reads_nothing_of_weight_zero():
    values, weights = jnp.array([1.0, jnp.inf, 3.0, -jnp.inf]), jnp.array([0.5, 0, 0.5, 0])
    for level, expected in ((0.5, 2.0), (0.75, 2.5), (0.25, 1.5)):
        np.testing.assert_allclose(expectile(values, weights, level), expected, rtol=1e-6)


def test_expectile_gradient_is_a_law(x64):
    """Of each value's share: positive, and in all 1."""
    values, weights = jnp.array([1.0, 2, 4]), jnp.array([0.2, 0.5, 0.3])
    gradient = jax.grad(expectile)(values, weights, 0.9)
    assert (gradient > 0).all()
    np.testing.assert_allclose(gradient.sum(), 1, rtol=1e-12)


# The policy


def test_advantage_weighted_policy_gives_the_oracle(x64):
    behaviour = jnp.array(BEHAVIOUR)
    solution = implicit(oracles.two_state_mdp(), behaviour, expectile_level=0.7)
    policy = advantage_weighted_policy(
        solution.q, solution.value, behaviour, inverse_temperature=3.0
    )
    np.testing.assert_allclose(policy, oracles.M2_ADVANTAGE_WEIGHTED, atol=1e-5)


def test_advantage_weighted_policy_clips_its_weights():
    q, value, behaviour = jnp.array([[2.0, 50, 0]]), jnp.zeros(1), jnp.array([[0.5, 0.2, 0.3]])
    policy = advantage_weighted_policy(q, value, behaviour, inverse_temperature=10.0)
    weights = np.array([0.5 * 100, 0.2 * 100, 0.3])
    np.testing.assert_allclose(policy[0], weights / weights.sum(), rtol=1e-5)
    cloned = advantage_weighted_policy(q, value, behaviour, inverse_temperature=0.0)
    np.testing.assert_allclose(cloned, behaviour, rtol=1e-6)
