"""Layouts are consistent, moves go where they should, slips to the sides."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from jaxrl_llm.envs.grid_layout import Layout, walk
from tests.envs.grids import tables

# S . G
# . # X
SMALL = Layout(
    rows=2, columns=3, start=(0, 0), goals=((0, 2),), obstacles=((1, 1),), hazards=((1, 2),)
)


def test_layout_numbers_cells_by_row():
    assert SMALL.num_states == 6
    assert [SMALL.state((row, column)) for row in range(2) for column in range(3)] == list(range(6))
    assert SMALL.state_names[5] == "row 1, column 2"
    np.testing.assert_array_equal(SMALL.at((0, 1), (1, 2)), [0, 1, 0, 0, 0, 1])
    np.testing.assert_array_equal(SMALL.at(), np.zeros(6))
    np.testing.assert_array_equal(SMALL.closed, [0, 0, 1, 0, 1, 1])


def test_neighbours_stop_at_walls_and_obstacles():
    up, down, left, right = SMALL.neighbours().T
    np.testing.assert_array_equal(up[[0, 1, 3]], [0, 1, 0])
    np.testing.assert_array_equal(down[[0, 1, 3]], [3, 1, 3])
    np.testing.assert_array_equal(left[[0, 1, 3]], [0, 0, 3])
    np.testing.assert_array_equal(right[[0, 1, 3]], [1, 2, 3])


def test_neighbours_follow_the_order_of_the_actions():
    names = ("Left", "Down", "Right", "Up")
    other = Layout(rows=2, columns=3, start=(0, 0), goals=((0, 2),), action_names=names)
    plain = Layout(rows=2, columns=3, start=(0, 0), goals=((0, 2),))
    order = [plain.action_names.index(name) for name in names]
    np.testing.assert_array_equal(other.neighbours(), plain.neighbours()[:, order])


def test_walk_slips_to_both_sides_and_never_back():
    grid = Layout(rows=3, columns=3, start=(1, 1), goals=((0, 0),))
    target = grid.neighbours()
    transition, reward = tables(walk(grid, target, target.astype(float), slip=0.3, discount=0.9))
    # From the middle: up 1, down 7, left 3, right 5.
    expected = np.zeros((4, 9))
    expected[:2, [3, 5]], expected[2:, [1, 7]] = 0.15, 0.15
    expected[[0, 1, 2, 3], [1, 7, 3, 5]] = 0.7
    np.testing.assert_allclose(transition[4], expected, atol=1e-6)
    np.testing.assert_allclose(reward[4], expected @ np.arange(9), rtol=1e-5)


def test_walk_stays_where_it_ended():
    transition, reward = tables(
        walk(SMALL, SMALL.neighbours(), np.ones((6, 4)), slip=0.5, discount=0.9)
    )
    closed = SMALL.closed
    np.testing.assert_array_equal(transition[closed], np.eye(6)[closed][:, None].repeat(4, 1))
    np.testing.assert_array_equal(reward[closed], 0)
    np.testing.assert_allclose(reward[~closed], 1, rtol=1e-6)


def test_walk_without_slip_lists_one_successor():
    mdp = walk(SMALL, SMALL.neighbours(), np.zeros((6, 4)), slip=0.0, discount=0.5)
    assert mdp.successor.shape == (24, 1)
    np.testing.assert_array_equal(mdp.initial, [1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(mdp.terminal, SMALL.closed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows is 0; it must be at least 1"),
        ({"columns": 0}, "columns is 0; it must be at least 1"),
        ({"goals": ()}, "goals is empty; name at least one"),
        (
            {"goals": ((0, 3),)},
            "goals[0] is (0, 3); it must be a (row, column) of a grid of 2 x 3 cells",
        ),
        ({"start": (-1, 0)}, "start is (-1, 0); it must be a (row, column)"),
        ({"start": (0,)}, "start is (0,); it must be a (row, column)"),
        ({"start": (0, 2)}, "start is (0, 2), and so is goals[0]; a cell is one thing"),
        (
            {"obstacles": ((1, 1), (0, 2))},
            "obstacles[1] is (0, 2), and so is goals[0]; a cell is one thing",
        ),
        ({"hazards": ((1, 1), (1, 1))}, "hazards[1] is (1, 1), and so is hazards[0]"),
        ({"action_names": ("Up", "Down")}, "action_names is ('Up', 'Down'); it must be"),
    ],
)
def test_layout_refuses(options, message):
    good: dict[str, Any] = {"rows": 2, "columns": 3, "start": (0, 0), "goals": ((0, 2),)}
    with pytest.raises(ValueError, match=re.escape(message)):
        Layout(**{**good, **options})


@pytest.mark.parametrize("slip", [-0.1, 1.1, float("nan")])
def test_walk_refuses_a_slip_that_is_no_probability(slip):
    with pytest.raises(ValueError, match=r"slip is .*; it must be in \[0, 1\]"):
        walk(SMALL, SMALL.neighbours(), np.zeros((6, 4)), slip=slip, discount=0.9)


def test_walk_without_discount_needs_a_way_out():
    cut = Layout(rows=2, columns=3, start=(0, 0), goals=((0, 2),), obstacles=((0, 1), (1, 1)))
    arguments = cut, cut.neighbours(), np.zeros((6, 4))
    walk(*arguments, slip=0.0, discount=0.9)
    with pytest.raises(ValueError, match=r"no way leads from cell \(0, 0\) to a goal; remove"):
        walk(*arguments, slip=0.0, discount=1.0)
    # Cells that are walled in are no concern of anybody.
    walk(SMALL, SMALL.neighbours(), np.zeros((6, 4)), slip=0.0, discount=1.0)
