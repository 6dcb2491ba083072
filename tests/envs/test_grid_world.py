"""The grid world against a naive model of it and a closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import grid_world
from jaxrl_llm.kernels import bellman
from tests.envs.grids import tables

solve = jax.jit(bellman.value_iteration)


def naive(size, goals, obstacles, slip):
    """Tables by walking from every free cell, one move at a time."""
    steps = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}
    sides = {"Up": "Left Right", "Down": "Left Right", "Left": "Up Down", "Right": "Up Down"}
    transition, reward = np.zeros((size**2, 4, size**2)), np.zeros((size**2, 4))
    for state in range(size**2):
        row, column = divmod(state, size)
        if (row, column) in (*goals, *obstacles):
            transition[state, :, state] = 1
            continue
        for action, meant in enumerate(grid_world.action_names):
            one, other = sides[meant].split()
            for move, chance in ((meant, 1 - slip), (one, slip / 2), (other, slip / 2)):
                to = row + steps[move][0], column + steps[move][1]
                blocked = min(to) < 0 or max(to) >= size or to in obstacles
                end = state if blocked else to[0] * size + to[1]
                gain = -1.0 if blocked else 10.0 if to in goals else -0.1
                transition[state, action, end] += chance
                reward[state, action] += chance * gain
    return transition, reward


@pytest.mark.parametrize("slip", [0.0, 0.2, 1.0])
def test_mdp_has_the_tables_of_a_naive_walk(slip, x64):
    goals, obstacles = ((3, 3), (0, 2)), ((1, 1), (2, 1), (3, 1))
    mdp = grid_world.mdp(size=4, goals=goals, obstacles=obstacles, slip=slip)
    transition, reward = naive(4, goals, obstacles, slip)
    ours = tables(mdp)
    np.testing.assert_allclose(ours[0], transition, atol=1e-12)
    np.testing.assert_allclose(ours[1], reward, atol=1e-12)
    np.testing.assert_array_equal(np.flatnonzero(mdp.terminal), [2, 5, 9, 13, 15])


@pytest.mark.parametrize("discount", [0.95, 1.0])
def test_mdp_without_obstacles_has_the_closed_form(discount, x64):
    value = solve(grid_world.mdp(discount=discount), tolerance=1e-10).value
    # d moves to the goal: d - 1 of them cost .1, the last one pays 10.
    distance = 8 - np.add.outer(np.arange(5), np.arange(5)).ravel()
    steps = [sum(-0.1 * discount**k for k in range(d - 1)) for d in distance]
    expected = np.array(steps) + 10 * discount ** (distance - 1.0)
    np.testing.assert_allclose(value, np.where(distance == 0, 0, expected), atol=1e-8)


def test_mdp_with_slip_keeps_away_from_nothing_but_loses_value(x64):
    values = [
        float(solve(grid_world.mdp(slip=slip), tolerance=1e-10).value[0])
        for slip in (0.0, 0.1, 0.3, 0.6)
    ]
    assert values == sorted(values, reverse=True)
    assert values[0] - values[3] > 1


def test_mdp_of_a_large_grid_is_listed(x64):
    mdp = grid_world.mdp(size=200)
    assert mdp.successor.shape == (160_000, 1)
    assert mdp.num_states == 40_000


def test_names_match_the_tables():
    mdp = grid_world.mdp(size=3)
    assert mdp.action_mask.shape == (
        len(grid_world.state_names(size=3)),
        len(grid_world.action_names),
    )
    assert grid_world.state_names(size=3)[5] == "row 1, column 2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 1}, "size is 1; it must be at least 2"),
        ({"obstacles": ((4, 4),)}, r"obstacles\[0\] is \(4, 4\), and so is goals\[0\]"),
        ({"goals": ((5, 5),)}, r"goals\[0\] is \(5, 5\); .* of a grid of 5 x 5 cells"),
        ({"goals": ()}, "goals is empty"),
        ({"slip": 1.5}, r"slip is 1.5; it must be in \[0, 1\]"),
        ({"discount": 1.5}, r"discount is 1.5; it must be in \[0, 1\]"),
        (
            {"obstacles": ((0, 1), (1, 0)), "discount": 1.0},
            r"discount is 1 and no way leads from cell \(0, 0\) to a goal",
        ),
    ],
)
def test_mdp_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        grid_world.mdp(**options)


def test_make_walks_to_the_goal():
    environment = grid_world.make(size=2, max_steps=3)
    params = environment.default_params
    state, observation = environment.reset(jax.random.key(0), params)
    assert int(observation) == 0
    rewards, ended = [], []
    for seed, action in enumerate(("Up", "Right", "Down")):
        number = jnp.int32(grid_world.action_names.index(action))
        state, step = environment.step(jax.random.key(seed), state, number, params)
        rewards.append(round(float(step.reward), 3))
        ended.append(bool(step.terminated))
    assert rewards == [-1.0, -0.1, 10.0]
    assert ended == [False, False, True]
    assert environment.name == "grid_world"
