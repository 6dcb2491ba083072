"""Cliff walking against Gymnasium's tables and the book's numbers."""

from __future__ import annotations

from functools import partial

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import cliff_walking
from jaxrl_llm.kernels import bellman
from tests.envs.grids import gymnasium_tables, tables

START, GOAL = 36, 47


@pytest.mark.parametrize("slip", [0.0, 2 / 3])
def test_mdp_has_the_tables_of_gymnasium(slip, x64):
    transition, reward, _ = gymnasium_tables(
        gymnasium.make("CliffWalking-v1", is_slippery=slip > 0)
    )
    walkable = np.arange(START + 1)  # nobody is ever in the cliff, and the goal is the end
    ours = tables(cliff_walking.mdp(slip=slip))
    np.testing.assert_allclose(ours[0][walkable], transition[walkable], atol=1e-12)
    np.testing.assert_allclose(ours[1][walkable], reward[walkable], atol=1e-12)


def test_mdp_has_the_published_optimum(x64):
    solution = jax.jit(bellman.value_iteration)(cliff_walking.mdp())
    assert solution.converged
    assert float(solution.value[START]) == -13
    # One up, eleven right, one down.
    path, state = [], START
    target = cliff_walking.LAYOUT.neighbours()
    while state != GOAL:
        action = int(solution.policy[state])
        path.append(cliff_walking.action_names[action])
        state = int(target[state, action])
    assert path == ["Up", *["Right"] * 11, "Down"]


def test_a_fall_leads_back_to_the_start_and_does_not_end():
    mdp = cliff_walking.mdp()
    right = cliff_walking.action_names.index("Right")
    row = mdp.row[START, right]
    assert (int(mdp.successor[row, 0]), float(mdp.reward[row, 0])) == (START, -100.0)
    assert np.flatnonzero(mdp.terminal).tolist() == list(range(37, 48))
    np.testing.assert_array_equal(mdp.initial, np.arange(48) == START)


def test_names_match_the_tables():
    assert cliff_walking.mdp().action_mask.shape == (
        len(cliff_walking.state_names),
        len(cliff_walking.action_names),
    )
    assert cliff_walking.state_names[START] == "row 3, column 0"


def test_mdp_refuses_a_slip_that_is_no_probability():
    with pytest.raises(ValueError, match=r"slip is 2; it must be in \[0, 1\]"):
        cliff_walking.mdp(slip=2)


def test_make_ends_only_where_asked():
    assert cliff_walking.make().name == "cliff_walking"
    environment = cliff_walking.make(max_steps=1)
    params = environment.default_params
    state, _ = environment.reset(jax.random.key(0), params)
    step = environment.step(jax.random.key(1), state, jnp.int32(1), params)[1]
    assert (float(step.reward), bool(step.terminated), bool(step.truncated)) == (-100, False, True)


@pytest.mark.slow
def test_mdp_is_safest_above_the_edge_for_one_who_explores(x64):
    """What SARSA learns with epsilon .1: it costs 20.7 an episode, the greedy edge 13."""
    problem = cliff_walking.mdp()
    solution = jax.jit(partial(bellman.expected_sarsa, epsilon=0.1))(problem)
    start = cliff_walking.LAYOUT.state(cliff_walking.LAYOUT.start)
    assert solution.converged
    np.testing.assert_allclose(solution.value[start], -20.7, atol=0.05)
    greedy = bellman.policy_evaluation(problem, solution.policy).value[start]
    np.testing.assert_allclose(greedy, -15, atol=1e-6)
