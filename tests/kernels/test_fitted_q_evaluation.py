"""Tabular fitted Q evaluation against regression by hand, and against the truth."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import bellman
from jaxrl_llm.kernels import fitted_q_evaluation as fqe
from jaxrl_llm.types import Transition
from tests import oracles
from tests.kernels.test_off_policy_evaluation import GAMMA, TARGET, exact_q, simulate

STATES, ACTIONS, PSEUDO = 4, 3, 0.1
evaluate = jax.jit(fqe.fitted_q_evaluation, static_argnames="fallback")


def logged(seed=0, num=30):
    """Random steps in which state 3 is reached and never left, and some pairs never occur."""
    random = np.random.default_rng(seed)
    state, action = random.integers(0, 3, num), random.integers(0, 2, num)
    return transition(
        observation=state,
        action=action + (state == 1),
        reward=random.normal(size=num).astype(np.float32),
        terminated=random.random(num) < 0.3,
        next_observation=random.integers(0, STATES, num),
    )


def transition(**columns: Any) -> Any:
    """Steps in NumPy, none of them cut short."""
    columns["truncated"] = np.zeros(len(columns["action"]), bool)
    return Transition(**columns, extras={})


def policy(seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(ACTIONS), STATES).astype(np.float32)


def regression(steps, count, policy, gamma, fallback, sweeps=400):
    """Q by repeated averages of the targets of each pair, pseudo-visits and all."""
    q = np.zeros((STATES, ACTIONS))
    for _ in range(sweeps):
        v = (policy * q).sum(1)
        target = steps.reward + gamma * np.where(steps.terminated, 0, v[steps.next_observation])
        everywhere = np.average(target, weights=count)
        for s in range(STATES):
            here = (steps.observation == s) & (count > 0)
            guess = np.average(target[here], weights=count[here]) if here.any() else everywhere
            guess = guess if fallback == "state_mean" else fallback
            for a in range(ACTIONS):
                pair = here & (steps.action == a)
                total = (target * count)[pair].sum() + PSEUDO * guess
                q[s, a] = total / (count[pair].sum() + PSEUDO)
    return q


@pytest.mark.parametrize("fallback", ["state_mean", 0.0, -2.0])
def test_fitted_q_evaluation_is_the_fixed_point_of_regression(fallback, x64):
    steps, count = logged(), np.random.default_rng(1).integers(0, 3, 30)
    solution = evaluate(steps, count, policy(), gamma=0.9, fallback=fallback)
    expected = regression(steps, count, policy(), 0.9, fallback)
    np.testing.assert_allclose(solution.q, expected, atol=1e-6)
    np.testing.assert_allclose(solution.value, (policy() * expected).sum(1), atol=1e-6)
    assert solution.converged
    if fallback != "state_mean":
        np.testing.assert_allclose(solution.q[3], fallback, atol=1e-9)


@pytest.mark.slow
def test_iterative_evaluation_of_the_empirical_process_agrees():
    steps = logged()
    mdp = fqe.empirical_mdp(steps, jnp.ones(30), num_states=STATES, num_actions=ACTIONS, gamma=0.9)
    np.testing.assert_allclose(mdp.transition.sum(-1), 1, rtol=1e-5)
    law = np.vstack([policy(), np.ones((1, ACTIONS)) / ACTIONS])
    found = bellman.iterative_policy_evaluation(mdp, jnp.asarray(law))
    expected = evaluate(steps, np.ones(30), policy(), gamma=0.9)
    np.testing.assert_allclose(found.q[:-1], expected.q, atol=1e-4)


@pytest.mark.slow
def test_fitted_q_evaluation_of_a_long_log_is_the_truth():
    log = simulate(2, 20_000)
    found = evaluate(log.steps, log.mask, jnp.asarray(TARGET), gamma=GAMMA)
    np.testing.assert_allclose(found.q, exact_q(TARGET), rtol=0.03)


def test_fitted_q_evaluation_reads_neither_padding_nor_what_follows_an_end():
    steps = logged()
    count = np.arange(30) < 20
    expected = evaluate(steps, count, policy(), gamma=0.9).q
    spoilt = steps.replace(
        reward=np.where(count, steps.reward, 99),
        next_observation=np.where(steps.terminated, 3, steps.next_observation),
    )
    np.testing.assert_allclose(evaluate(spoilt, count, policy(), gamma=0.9).q, expected, rtol=1e-6)


def test_fitted_q_evaluation_without_discount_ends_where_a_loop_was_logged():
    """State 0 was left by action 1 alone; the policy takes action 0, which stays."""
    zero = np.zeros(4, int)
    steps = transition(
        observation=zero,
        action=np.array([0, 0, 0, 1]),
        reward=np.array([0.0, 0, 0, 1], np.float32),
        terminated=np.array([False, False, False, True]),
        next_observation=zero,
    )
    always_stay = jnp.array([[1.0, 0.0]])
    found = evaluate(steps, np.ones(4), always_stay, gamma=1.0)
    assert found.converged
    np.testing.assert_allclose(found.value, 1, rtol=1e-4)


def test_an_empty_log_is_worth_nothing():
    found = evaluate(logged(), np.zeros(30), policy(), gamma=1.0)
    np.testing.assert_array_equal(found.q, 0)


def test_cross_fitted_q_leaves_out_the_fold():
    log = simulate(3, 60)
    fold = jnp.arange(60) % 3
    fit = jax.jit(partial(fqe.cross_fitted_q, num_folds=3, gamma=GAMMA))
    q = fit(log, fold, jnp.asarray(TARGET))
    for held_out in range(3):
        count = np.asarray(log.mask) & (np.asarray(fold) != held_out)
        expected = evaluate(log.steps, count, jnp.asarray(TARGET), gamma=GAMMA).q
        np.testing.assert_allclose(q[held_out], expected, rtol=1e-5)
    assert q.shape == (3, *oracles.M2_REWARD.shape)
