"""Gains and relative values against stationary laws, every policy there is and periodic chains."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import make_mdp
from jaxrl_llm.kernels import bellman
from jaxrl_llm.kernels.average_reward import average_reward_evaluation, relative_value_iteration
from tests import oracles

solve = jax.jit(relative_value_iteration)
evaluate = jax.jit(average_reward_evaluation)


def poisson(mdp, policy):
    """(gain, bias with bias(0) = 0) of probabilities `[S, A]`, by solving Poisson's equation."""
    chain = np.einsum("sa,sat->st", policy, mdp.transition)
    reward = np.sum(policy * np.asarray(mdp.expected_reward()), axis=-1)
    matrix = np.eye(len(chain)) - chain
    matrix[:, 0] = 1  # the unknown bias of state 0 is 0; its column holds the gain
    solution = np.linalg.solve(matrix, reward)
    return solution[0], np.concatenate([[0], solution[1:]])


def stationary_gain(mdp, policy):
    """The stationary law times the reward, by the eigenvector of eigenvalue 1."""
    chain = np.einsum("sa,sat->st", policy, mdp.transition)
    eigenvalues, vectors = np.linalg.eig(chain.T)
    law = np.real(vectors[:, np.argmin(np.abs(eigenvalues - 1))])
    return law / law.sum() @ np.sum(policy * np.asarray(mdp.expected_reward()), axis=-1)


def howard(mdp):
    """The best gain by policy iteration on Poisson's equation, and its relative values."""
    reward, transition = np.asarray(mdp.expected_reward()), np.asarray(mdp.transition)
    chosen = np.asarray(mdp.action_mask).argmax(-1)
    for _ in range(100):
        gain, bias = poisson(mdp, np.eye(mdp.num_actions)[chosen])
        q = np.where(mdp.action_mask, reward + transition @ bias, -np.inf)
        better = q.argmax(-1)
        if np.array_equal(chosen, better):
            return gain, bias, chosen
        chosen = better
    raise AssertionError("the reference did not converge")


def test_relative_value_iteration_matches_howards_policy_iteration(x64):
    for seed in range(5):
        mdp = oracles.random_mdp(seed, 6, 3, 0.9, masked=True)
        gain, bias, policy = howard(mdp)
        solution = solve(mdp, tolerance=1e-10)
        assert solution.converged
        np.testing.assert_allclose(solution.gain, gain, atol=1e-9)
        np.testing.assert_allclose(solution.bias, bias, atol=1e-7)
        np.testing.assert_array_equal(solution.policy, policy)


def test_relative_value_iteration_finds_the_best_gain_of_every_policy(x64):
    mdp = oracles.random_mdp(7, 5, 2, 0.9)
    every = [
        stationary_gain(mdp, np.eye(2)[list(actions)])
        for actions in itertools.product(range(2), repeat=5)
    ]
    np.testing.assert_allclose(solve(mdp).gain, max(every), atol=1e-6)


@pytest.mark.slow
def test_relative_value_iteration_is_the_limit_of_discounted_values(x64):
    mdp = oracles.two_state_mdp()
    patient = replace(mdp, discount=jnp.asarray(0.99999))
    value = bellman.policy_iteration(patient).value
    np.testing.assert_allclose(solve(mdp).gain, 1e-5 * value, atol=1e-4)
    np.testing.assert_allclose(solve(mdp).bias, value - value[0], atol=1e-4)


@pytest.mark.parametrize("period", [2, 3, 5])
def test_relative_value_iteration_solves_periodic_chains(period, x64):
    """A ring on which one can also stay, at no reward: the gain is the mean around the ring."""
    states = np.arange(period)
    ring = np.eye(period)[(states + 1) % period]
    transition = np.stack([ring, np.eye(period)], axis=1)
    reward = np.stack([states + 1.0, np.zeros(period)], axis=1)
    solution = solve(make_mdp(transition, reward, 0.9), tolerance=1e-10)
    assert solution.converged
    np.testing.assert_allclose(solution.gain, (period + 1) / 2, atol=1e-9)
    np.testing.assert_array_equal(solution.policy, np.zeros(period))
    without_laziness = solve(
        make_mdp(transition[:, :1], reward[:, :1], 0.9), step_size=1.0, max_iterations=200
    )
    assert not without_laziness.converged


def test_relative_value_iteration_of_two_separate_chains_is_not_converged():
    mdp = make_mdp(np.eye(2)[:, None], np.array([1.0, 2.0]), 0.9)
    solution = solve(mdp, max_iterations=50)
    assert not solution.converged
    assert solution.residual == 1
    assert int(solution.iterations) == 50


def test_relative_value_iteration_absorbs_in_terminal_states(x64):
    """With an end, nothing is earned in the long run, and the bias is the undiscounted value."""
    mdp = oracles.corridor(4, step=-1.0, arrival=5.0)
    solution = solve(mdp, tolerance=1e-10)
    np.testing.assert_allclose(solution.gain, 0, atol=1e-9)
    np.testing.assert_allclose(solution.bias + 2, [2, 3, 4, 0], atol=1e-8)


def test_relative_value_iteration_of_successors_equals_dense(x64):
    mdp = oracles.garnet_mdp(0, 6, 3, 0.9, branching=4)
    dense, sparse = solve(mdp), solve(bellman.successor_form(mdp))
    np.testing.assert_allclose(sparse.gain, dense.gain, atol=1e-10)
    np.testing.assert_array_equal(sparse.policy, dense.policy)


def test_relative_value_iteration_vmap_equals_a_loop(x64):
    mdps = [oracles.random_mdp(seed, 6, 3, 0.9, masked=True) for seed in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *mdps)
    batched = jax.vmap(solve)(batch)
    loop = [solve(mdp) for mdp in mdps]
    np.testing.assert_allclose(batched.gain, [each.gain for each in loop], atol=1e-10)
    np.testing.assert_allclose(batched.iterations, [each.iterations for each in loop])


def test_average_reward_evaluation_is_the_stationary_law_times_the_reward(x64):
    mdp = oracles.random_mdp(2, 6, 3, 0.9)
    policy = np.random.default_rng(0).dirichlet(np.ones(3), size=6)
    solution = evaluate(mdp, jnp.array(policy), tolerance=1e-10)
    gain, bias = poisson(mdp, policy)
    np.testing.assert_allclose(solution.gain, stationary_gain(mdp, policy), atol=1e-9)
    np.testing.assert_allclose(solution.gain, gain, atol=1e-9)
    np.testing.assert_allclose(solution.bias, bias, atol=1e-7)
    assert solution.gain < solve(mdp).gain


def test_average_reward_evaluation_of_integers_equals_one_hot(x64):
    mdp = oracles.random_mdp(2, 6, 3, 0.9)
    policy = jnp.array([0, 1, 2, 0, 1, 2])
    integers, one_hot = evaluate(mdp, policy), evaluate(mdp, jnp.eye(3)[policy])
    np.testing.assert_allclose(integers.gain, one_hot.gain, atol=1e-10)
