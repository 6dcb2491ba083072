"""The shared parts of the Bellman solvers: choices, rounding, direct solves and batches."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import make_mdp
from jaxrl_llm.kernels import fixed_point
from jaxrl_llm.types import Solution
from tests import oracles

# What leads in from the left of a corridor of n states takes n - 1 steps.
STEPS = np.array([3.0, 2, 1, 0])
RIGHT = jnp.array([1, 1, 1, 0])


def test_greedy_breaks_ties_to_the_lowest_index():
    q = jnp.array([[1.0, 3, 3], [2, 2, 2], [0, -1, 5]])
    np.testing.assert_array_equal(fixed_point.greedy(q), [1, 0, 2])
    assert fixed_point.greedy(q).dtype == jnp.int32


def test_greedy_chooses_among_allowed_actions_only():
    q = jnp.array([[9.0, 3, 3], [9, -1e30, 1]])
    mask = jnp.array([[False, True, True], [False, True, False]])
    np.testing.assert_array_equal(fixed_point.greedy(q, mask), [1, 1])


def test_greedy_ties_what_lies_within_the_slack():
    q = jnp.array([1.0, 1.9, 2.0, 2.0])
    assert [int(fixed_point.greedy(q, slack=slack)) for slack in (0.0, 0.15, 1.5)] == [2, 1, 0]
    mask = jnp.array([False, False, True, True])
    assert int(fixed_point.greedy(q, mask, slack=1.5)) == 2


def test_average_of_integers_equals_one_hot():
    q = jnp.arange(6.0).reshape(3, 2)
    policy = jnp.array([1, 0, 1])
    expected = np.array([1.0, 2, 5])
    np.testing.assert_array_equal(fixed_point.average(q, policy), expected)
    np.testing.assert_array_equal(fixed_point.average(q, jax.nn.one_hot(policy, 2)), expected)


def test_model_reads_nothing_of_terminal_states():
    mdp = oracles.corridor(4, step=-1.0, arrival=5.0)
    rubbish = replace(
        mdp, transition=mdp.transition.at[3].set(0.25), reward=mdp.reward.at[3].set(100.0)
    )
    value = jnp.array([1.0, 2, 3, 0])
    expected = fixed_point.Model.of(mdp).look_ahead(value)
    np.testing.assert_array_equal(fixed_point.Model.of(rubbish).look_ahead(value), expected)
    np.testing.assert_array_equal(expected[3], np.zeros(3))
    np.testing.assert_array_equal(expected[:, 1], [1.0, 2, 4, 0])


def test_model_solve_counts_the_steps_to_the_end(x64):
    model = fixed_point.Model.of(oracles.corridor(4, step=-1.0, arrival=5.0))
    evaluation = model.solve(RIGHT)
    np.testing.assert_allclose(evaluation.duration, STEPS, atol=1e-12)
    np.testing.assert_allclose(evaluation.value, np.where(STEPS > 0, 5 - STEPS, 0), atol=1e-12)
    assert evaluation.ends


@pytest.mark.slow
def test_model_solve_discounts_the_steps(x64):
    evaluation = fixed_point.Model.of(oracles.treatment_mdp()).solve(jnp.zeros(5, int))
    np.testing.assert_allclose(evaluation.duration, np.full(5, 10.0), rtol=1e-12)


@pytest.mark.parametrize("policy", [[0, 0, 0, 0], [1, 2, 1, 1]], ids=["circles", "partly"])
def test_model_solve_is_zero_where_the_policy_never_ends(policy):
    model = fixed_point.Model.of(oracles.corridor(4, step=-1.0, arrival=5.0))
    evaluation = model.solve(jnp.array(policy))
    assert not evaluation.ends
    np.testing.assert_array_equal(evaluation.value, np.zeros(4))


def test_model_threshold_is_the_larger_of_tolerance_and_rounding():
    model = fixed_point.Model.of(oracles.treatment_mdp())
    epsilon = np.finfo(np.float32).eps
    assert model.threshold(1e-3, jnp.ones(5)) == jnp.float32(1e-3)
    assert model.threshold(0.0, jnp.array([1.0, -180, 2, 3, 4])) == jnp.float32(8 * 180 * epsilon)


def test_model_threshold_is_the_tolerance_where_rewards_drown_in_rounding():
    model = fixed_point.Model.of(oracles.treatment_mdp())
    assert model.threshold(1e-3, jnp.full(5, 1e9)) == jnp.float32(1e-3)


def test_fixed_point_stops_where_an_update_changes_nothing():
    mdp = make_mdp(np.ones((1, 1, 1)), 1.0, 0.5)
    model = fixed_point.Model.of(mdp)
    stuck = fixed_point.fixed_point(
        model, model.best, lambda iterate: (jnp.minimum(model.best(iterate.q), 1.5), ()), 1e-6, 1000
    )
    assert int(stuck.iterations) == 3
    np.testing.assert_allclose(stuck.residual, 0.25)
    assert not stuck.converged


def test_fixed_point_starts_from_the_given_value():
    mdp = make_mdp(np.ones((1, 1, 1)), 1.0, 0.5)
    model = fixed_point.Model.of(mdp)
    solution = fixed_point.fixed_point(
        model, model.best, lambda iterate: (model.best(iterate.q), ()), 1e-6, 10, jnp.array([2.0])
    )
    assert int(solution.iterations) == 0
    assert solution.converged


@pytest.mark.parametrize(
    ("size", "lockstep"), [(3, True), (64, False)], ids=["lockstep", "in turn"]
)
def test_batchable_vmap_equals_a_loop(size, lockstep):
    """A "solver" of one line, so that only the batching is compiled; `size` crosses the limit."""
    assert (size * size < fixed_point._SEQUENTIAL_SIZE) is lockstep

    def solve(mdp, tolerance, max_iterations):
        value = mdp.expected_reward()[:, 0] * mdp.discount + tolerance
        q = mdp.expect(value)
        policy = jnp.argmax(q, -1).astype(jnp.int32)
        sums = jnp.sum(value)
        return Solution(
            value=value,
            q=q,
            policy=policy,
            iterations=max_iterations,
            residual=sums,
            converged=sums > 0,
        )

    def call(mdp, tolerance):
        return fixed_point.batchable(solve, mdp, tolerance, 7)

    mdps = [oracles.random_mdp(seed, size, 1, 0.5 + seed / 10) for seed in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *mdps)
    tolerances = jnp.array([0.0, 1.0, 2.0])
    batched = jax.jit(jax.vmap(call))(batch, tolerances)
    loop = [call(mdp, tolerance) for mdp, tolerance in zip(mdps, tolerances, strict=True)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), batched, stacked)
