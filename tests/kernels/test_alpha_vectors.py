"""Plans over beliefs against the tiger's published values, brute force, and the MDP."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import make_mdp
from jaxrl_llm.envs import diagnosis, hidden, tiger
from jaxrl_llm.kernels import alpha_vectors, bellman
from jaxrl_llm.kernels import belief as belief_kernel

pytestmark = pytest.mark.slow

# V* at even odds, and the undiscounted optimum with 1, 2, ... steps to go.
TIGER_VALUE = 19.371368
TIGER_HORIZONS = [-1, -2, 2.72, 2.42125, 3.60915]

solve = jax.jit(alpha_vectors.point_based_value_iteration)
informed = jax.jit(belief_kernel.fast_informed_bound)
bound = jax.jit(alpha_vectors.sawtooth_bound)
backup = jax.jit(alpha_vectors.point_based_backup)


@cache
def solved_tiger():
    with jax.enable_x64(True):
        pomdp = tiger.pomdp()
        beliefs = jnp.asarray(belief_kernel.belief_grid(2, 100))
        return jax.device_get(solve(pomdp, beliefs, tolerance=1e-11))


def random_pomdp(seed=0, *, observation=None, discount=0.7):
    random = np.random.default_rng(seed)
    transition = random.dirichlet(np.ones(3), (3, 2))
    law = random.dirichlet(np.ones(2), (2, 3)) if observation is None else observation
    initial = random.dirichlet(np.ones(3))
    mdp = make_mdp(transition, random.normal(size=(3, 2)), discount, initial=initial)
    return hidden.make_pomdp(mdp, law)


def tree_value(pomdp, belief, horizon):
    """The optimum by trying every action at every belief that can be reached."""
    if horizon == 0:
        return 0.0
    transition = np.asarray(pomdp.mdp.transition)
    law, best = np.asarray(pomdp.observation), -np.inf
    reward = np.asarray(pomdp.mdp.expected_reward())
    for action in range(pomdp.mdp.num_actions):
        value = belief @ reward[:, action]
        for seen in law[action].T:
            following = belief @ transition[:, action] * seen
            total = following.sum()
            if total > 0:
                rest = tree_value(pomdp, following / total, horizon - 1)
                value += float(pomdp.mdp.discount) * total * rest
        best = max(best, value)
    return best


def test_finite_horizon_has_the_tigers_published_values(x64):
    pomdp = tiger.pomdp()
    undiscounted = replace(pomdp, mdp=replace(pomdp.mdp, discount=jnp.array(1.0)))
    found = alpha_vectors.finite_horizon(undiscounted, 5)
    values = [np.max(plans.vectors @ np.full(2, 0.5)) for plans in found]
    np.testing.assert_allclose(values, TIGER_HORIZONS, atol=1e-12)
    # The fewest plans: of horizon 1 each action has one.
    assert sorted(found[0].actions.tolist()) == [0, 1, 2]


def test_finite_horizon_is_the_tree_of_all_histories(x64):
    pomdp = random_pomdp()
    found = alpha_vectors.finite_horizon(pomdp, 3)
    for belief in belief_kernel.belief_grid(3, 3):
        for horizon, plans in enumerate(found, 1):
            value = np.max(plans.vectors @ belief)
            np.testing.assert_allclose(value, tree_value(pomdp, belief, horizon), atol=1e-10)


def test_point_based_value_iteration_reaches_the_tigers_value_from_below(x64):
    pomdp, found = tiger.pomdp(), solved_tiger()
    value = np.max(found.plans.vectors @ np.full(2, 0.5))
    assert found.converged
    np.testing.assert_allclose(value, TIGER_VALUE, atol=5e-7)
    # What an exact backup may still gain, anywhere: V* is at most 20 times that higher.
    excess = alpha_vectors.bellman_excess(pomdp, found.plans.vectors)
    assert excess / (1 - 0.95) < 1e-7
    # Opening waits for two growls more on one side than on the other: .9698.
    action = jax.vmap(found.plans.action)(jnp.array([[0.5, 0.5], [0.85, 0.15], [0.9698, 0.0302]]))
    np.testing.assert_array_equal(action, [tiger.LISTEN, tiger.LISTEN, tiger.OPEN_RIGHT])


def test_point_based_value_iteration_in_float32_stays_below_the_truth():
    beliefs = jnp.asarray(belief_kernel.belief_grid(2, 100), jnp.float32)
    found = solve(tiger.pomdp(), beliefs)
    value = float(found.plans.value(jnp.full(2, 0.5)))
    assert found.converged
    assert TIGER_VALUE - 5e-3 < value < TIGER_VALUE + 1e-4


def test_point_based_value_iteration_is_below_at_every_stop(x64):
    """Values rise with every sweep, at every belief of the grid, and end at V*."""
    pomdp, beliefs = tiger.pomdp(), jnp.asarray(belief_kernel.belief_grid(2, 100))
    optimum = np.asarray(beliefs) @ solved_tiger().plans.vectors.T
    values = []
    for sweeps in (1, 2, 10, 50):
        found = solve(pomdp, beliefs, tolerance=1e-11, max_iterations=sweeps)
        assert not found.converged
        assert found.iterations == sweeps
        values.append(np.max(np.asarray(beliefs) @ np.asarray(found.plans.vectors).T, axis=1))
    assert (np.diff([*values, optimum.max(axis=1)], axis=0) >= -1e-9).all()


@pytest.mark.slow
def test_sawtooth_bound_is_above_the_plans_and_below_fib(x64):
    pomdp, beliefs = diagnosis.pomdp(), belief_kernel.belief_grid(2, 40)
    beliefs = jnp.asarray(np.pad(beliefs, ((0, 0), (0, 1))))
    plans = solve(pomdp, beliefs, tolerance=1e-9).plans
    above = bound(pomdp, beliefs, tolerance=1e-9)
    assert above.converged
    between = (beliefs[1:] + beliefs[:-1]) / 2
    upper, lower = jax.vmap(above.value)(between), jax.vmap(plans.value)(between)
    fib = jnp.max(between @ informed(pomdp, tolerance=1e-9).q, axis=1)
    assert (fib >= upper - 1e-8).all()
    assert (upper >= lower - 1e-8).all()
    assert (upper - lower).max() < 0.35 * (fib - lower).max()


def test_sawtooth_bound_of_reachable_beliefs_meets_the_tigers_value(x64):
    """Where the successors of every belief are among them, nothing is lost by interpolation."""
    pomdp = tiger.pomdp()
    beliefs = jnp.asarray(belief_kernel.reachable_beliefs(pomdp, 12))
    above = bound(pomdp, beliefs, tolerance=1e-9)
    value = float(above.value(pomdp.mdp.initial))
    np.testing.assert_allclose(value, TIGER_VALUE, atol=2e-6)


def test_sawtooth_interpolates_and_is_homogeneous():
    beliefs = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    values = jnp.array([4.0, 2.0, 1.0])
    found = alpha_vectors.sawtooth(beliefs, values, jnp.array([0.75, 0.25]))
    np.testing.assert_allclose(found, 2.5)  # half-way from (.5, 1) to (1, 4)
    half = alpha_vectors.sawtooth(beliefs, values, jnp.array([0.375, 0.125]))
    np.testing.assert_allclose(half, 1.25)
    # A value above the plane through the corners says nothing.
    useless = alpha_vectors.sawtooth(beliefs, values.at[2].set(9.0), jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(useless, 3.0)


def test_value_is_convex_and_piecewise_linear(x64):
    pomdp = random_pomdp(3)
    vectors = np.asarray(alpha_vectors.finite_horizon(pomdp, 3)[-1].vectors)
    random = np.random.default_rng(0)
    first, second = random.dirichlet(np.ones(3), (2, 200))
    share = random.random((200, 1))

    def value(beliefs):
        return np.max(beliefs @ vectors.T, axis=1)

    mixed = np.array([tree_value(pomdp, b, 3) for b in share * first + (1 - share) * second])
    chord = share[:, 0] * value(first) + (1 - share[:, 0]) * value(second)
    assert (mixed <= chord + 1e-10).all()
    assert (chord - mixed).max() > 1e-3


@pytest.mark.slow
def test_point_based_value_iteration_of_a_seen_state_is_the_mdp(x64):
    pomdp = random_pomdp(3, observation=np.eye(3))
    found = solve(pomdp, jnp.eye(3), tolerance=1e-12)
    solution = bellman.policy_iteration(pomdp.mdp, tolerance=1e-12)
    values = jnp.max(found.plans.vectors, axis=0)
    np.testing.assert_allclose(values, solution.value, atol=1e-10)
    actions = jax.vmap(found.plans.action)(jnp.eye(3))
    np.testing.assert_array_equal(actions, solution.policy)


def test_point_based_value_iteration_of_useless_observations_is_an_open_loop_plan(x64):
    """Nothing is learned, so the belief follows from the actions alone: try all sequences."""
    pomdp = random_pomdp(4, observation=np.full((3, 2), 0.5), discount=0.3)
    transition, reward = np.asarray(pomdp.mdp.transition), np.asarray(pomdp.mdp.expected_reward())

    def open_loop(belief, steps):
        if steps == 0:
            return 0.0
        return max(
            belief @ reward[:, a] + 0.3 * open_loop(belief @ transition[:, a], steps - 1)
            for a in range(2)
        )

    initial = np.asarray(pomdp.mdp.initial)
    beliefs = belief_kernel.reachable_beliefs(pomdp, 9, separation=1e-9)
    found = solve(pomdp, jnp.asarray(beliefs), tolerance=1e-12)
    value = float(found.plans.value(pomdp.mdp.initial))
    np.testing.assert_allclose(value, open_loop(initial, 12), atol=1e-5)


def test_point_based_backup_is_the_best_of_the_exact_backup(x64):
    pomdp = random_pomdp(5)
    vectors = np.random.default_rng(1).normal(size=(4, 3))
    exact = alpha_vectors.exact_backup(pomdp, vectors)
    beliefs = belief_kernel.belief_grid(3, 4)
    batched, actions = jax.vmap(alpha_vectors.point_based_backup, (None, None, 0))(
        pomdp, jnp.asarray(vectors), jnp.asarray(beliefs)
    )
    for index in range(0, len(beliefs), 3):
        belief = beliefs[index]
        best = np.max(exact.vectors @ belief)
        np.testing.assert_allclose(batched[index] @ belief, best, atol=1e-12)
        one, action = backup(pomdp, jnp.asarray(vectors), jnp.asarray(belief))
        np.testing.assert_allclose(one, batched[index], atol=1e-12)
        assert action == actions[index]


def test_point_based_backup_of_nothing_to_come_is_the_best_reward():
    pomdp = random_pomdp()
    reward = np.asarray(pomdp.mdp.expected_reward())
    vector, action = backup(pomdp, jnp.zeros((1, 3)), jnp.array([0.2, 0.5, 0.3]))
    assert action == np.argmax(np.array([0.2, 0.5, 0.3]) @ reward)
    np.testing.assert_allclose(vector, reward[:, int(action)], rtol=1e-6)


def test_bellman_excess_is_that_of_a_fine_grid(x64):
    pomdp = tiger.pomdp()
    vectors = np.asarray(belief_kernel.blind_policies(pomdp))
    beliefs = belief_kernel.belief_grid(2, 2000)
    improved = np.asarray(alpha_vectors.exact_backup(pomdp, vectors).vectors)
    gain = np.max(beliefs @ improved.T, axis=1) - np.max(beliefs @ vectors.T, axis=1)
    excess = alpha_vectors.bellman_excess(pomdp, vectors)
    assert gain.max() > 1
    np.testing.assert_allclose(excess, gain.max(), rtol=1e-3)
    assert excess >= gain.max() - 1e-9


def test_prune_keeps_the_maximum_and_nothing_else():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(60, 3))
    vectors = np.concatenate([vectors, vectors[:5]])
    kept = alpha_vectors.prune(vectors)
    beliefs = random.dirichlet(np.ones(3), 20_000)
    winners = np.unique(np.argmax(beliefs @ vectors.T, axis=1))
    assert set(winners) <= set(kept.tolist())
    assert len(kept) <= len(winners) + 2  # slivers that no random belief falls into
    np.testing.assert_allclose(
        np.max(beliefs @ vectors.T, axis=1), np.max(beliefs @ vectors[kept].T, axis=1)
    )
    np.testing.assert_array_equal(alpha_vectors.prune(np.zeros((3, 2))), [0])
