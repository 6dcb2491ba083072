"""Grids as text: each cell shows what it is."""

from __future__ import annotations

import numpy as np
import pytest

from jaxrl_llm.envs import grid_view
from jaxrl_llm.envs.grid_layout import Layout

# S . G
# . # X
GRID = Layout(
    rows=2, columns=3, start=(0, 0), goals=((0, 2),), obstacles=((1, 1),), hazards=((1, 2),)
)
LEGEND = "S start   G goal   # obstacle   X hazard"


def lines(text):
    return text.splitlines()


def test_ascii_policy_shows_moves_and_marks():
    text = grid_view.ascii_policy(np.array([1, 3, 0, 2, 0, 0]), GRID)
    assert lines(text) == ["Sv > G", " < # X", "", f"^ v < > move   {LEGEND}"]


def test_ascii_policy_follows_the_order_of_the_actions():
    names = ("Left", "Down", "Right", "Up")
    grid = Layout(rows=1, columns=5, start=(0, 0), goals=((0, 4),), action_names=names)
    assert lines(grid_view.ascii_policy([0, 1, 2, 3, 0], grid)) == [
        "S< v > ^ G",
        "",
        "^ v < > move   S start   G goal",
    ]


def test_ascii_policy_shows_the_most_probable_move():
    probability = np.full((6, 4), 0.2)
    probability[:, 3] = 0.4
    integers = grid_view.ascii_policy(np.full(6, 3), GRID)
    assert grid_view.ascii_policy(probability, GRID) == integers


def test_ascii_values_line_up():
    text = grid_view.ascii_values([-10.04, 2.0, 0.0, -0.001, 7.0, 7.0], GRID)
    assert lines(text) == ["S-10.0   2.0     G", "   0.0     #     X", "", LEGEND]
    assert lines(grid_view.ascii_values(np.arange(6.0), GRID, decimals=0))[0] == "S0 1 G"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([0, 1], r"policy is int64\[2\]; it must be probabilities \[6, 4\] or integers \[6\]"),
        (np.zeros(6), r"policy is float64\[6\]; it must be probabilities"),
        ([0, 4, 0, 0, 0, 0], r"policy\[1\] is 4; it must be in \[0, 3\]"),
        ([0, -1, 0, 0, 0, 0], r"policy\[1\] is -1; it must be in \[0, 3\]"),
    ],
)
def test_ascii_policy_refuses(policy, message):
    with pytest.raises(ValueError, match=message):
        grid_view.ascii_policy(policy, GRID)


def test_ascii_values_refuse_another_grid():
    with pytest.raises(ValueError, match=r"value has shape \(5,\); it must be \(6,\)"):
        grid_view.ascii_values(np.zeros(5), GRID)
