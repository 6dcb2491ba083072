"""Krylov evaluation and expected SARSA: against direct solves, NumPy and each other's limits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import bellman
from jaxrl_llm.types import SuccessorMDP
from tests import oracles

pytestmark = pytest.mark.slow

krylov = jax.jit(bellman.krylov_policy_evaluation)
expected_sarsa = jax.jit(bellman.expected_sarsa)

FORMS = {"dense": lambda mdp: mdp, "successors": bellman.successor_form}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("kind", ["actions", "probabilities"])
def test_krylov_policy_evaluation_equals_a_direct_solve(form, kind, x64):
    mdp = oracles.garnet_mdp(0, 30, 3, 0.99)
    random = np.random.default_rng(0)
    policy = random.integers(3, size=30)
    if kind == "probabilities":
        policy = random.dirichlet(np.ones(3), size=30)
    solution = krylov(form(mdp), jnp.array(policy), tolerance=1e-9)
    expected = bellman.policy_evaluation(mdp, jnp.array(policy))
    assert solution.converged
    assert int(solution.iterations) < 20
    np.testing.assert_allclose(solution.value, expected.value, atol=1e-6)
    np.testing.assert_array_equal(solution.policy, expected.policy)


def test_krylov_policy_evaluation_solves_what_has_no_matrix():
    """The matrix of 200,000 states would take 160 GB; the residual is checked in NumPy."""
    random, states = np.random.default_rng(0), 200_000
    successor = random.integers(states, size=(2 * states, 2), dtype=np.int32)
    probability = random.dirichlet(np.ones(2), size=2 * states).astype(np.float32)
    reward = random.random((2 * states, 2), dtype=np.float32)
    mdp = SuccessorMDP(
        successor=jnp.array(successor),
        probability=jnp.array(probability),
        reward=jnp.array(reward),
        row=jnp.arange(2 * states, dtype=jnp.int32).reshape(states, 2),
        discount=jnp.float32(0.95),
        initial=jnp.full(states, 1 / states),
        terminal=jnp.zeros(states, bool),
        action_mask=jnp.ones((states, 2), bool),
    )
    solution = krylov(mdp, bellman.uniform_policy(mdp), tolerance=1e-3)
    assert solution.converged
    value = np.asarray(solution.value, np.float64)
    q = np.sum(probability * (reward + 0.95 * value[successor]), axis=1).reshape(states, 2)
    residual = np.abs(q.mean(1) - value).max()
    assert residual < 1e-3
    np.testing.assert_allclose(solution.residual, residual, atol=1e-4)


def test_krylov_policy_evaluation_counts_undiscounted_steps(x64):
    mdp = oracles.corridor(12, step=-1.0, arrival=0.0)
    solution = krylov(mdp, jnp.ones(12, int))
    assert solution.converged
    np.testing.assert_allclose(solution.value, -np.arange(11.0, -1, -1), atol=1e-5)


def test_krylov_policy_evaluation_of_a_policy_that_never_ends_is_finite_and_not_converged():
    mdp = oracles.corridor(3, step=-1.0, arrival=0.0)
    solution = krylov(mdp, jnp.zeros(3, int), max_iterations=50)
    assert not solution.converged
    assert np.isfinite(solution.value).all()
    assert solution.residual > 0.5


def test_expected_sarsa_gives_the_oracle(x64):
    solution = expected_sarsa(oracles.two_state_mdp(), epsilon=0.1)
    assert solution.converged
    np.testing.assert_allclose(solution.q, oracles.M2_EXPECTED_SARSA_Q, atol=1e-4)


@pytest.mark.slow
def test_expected_sarsa_is_between_the_optimum_and_the_uniform_policy(x64):
    mdp = oracles.random_mdp(0, 6, 3, 0.9, masked=True)
    greedy = expected_sarsa(mdp, epsilon=0.0, tolerance=1e-10)
    np.testing.assert_allclose(greedy.value, bellman.policy_iteration(mdp).value, atol=1e-8)
    uniform = expected_sarsa(mdp, epsilon=1.0, tolerance=1e-10)
    expected = bellman.policy_evaluation(mdp, bellman.uniform_policy(mdp)).value
    np.testing.assert_allclose(uniform.value, expected, atol=1e-8)
    some = expected_sarsa(mdp, epsilon=0.3, tolerance=1e-10).value
    assert (uniform.value < some).all()
    assert (some < greedy.value).all()


def test_expected_sarsa_is_the_best_policy_that_explores_so_much(x64):
    """Its problem is the one in which the environment overrides the action with chance epsilon."""
    mdp, epsilon = oracles.random_mdp(1, 6, 3, 0.9), 0.3
    reward = mdp.expected_reward()
    overridden = replace(
        mdp,
        transition=(1 - epsilon) * mdp.transition
        + epsilon * jnp.mean(mdp.transition, axis=1, keepdims=True),
        reward=((1 - epsilon) * reward + epsilon * jnp.mean(reward, 1, keepdims=True))[..., None],
    )
    expected = bellman.policy_iteration(overridden).value
    solution = expected_sarsa(mdp, epsilon=epsilon, tolerance=1e-10)
    np.testing.assert_allclose(solution.value, expected, atol=1e-8)
