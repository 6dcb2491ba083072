"""The picture of a grid draws its values, its moves and its marks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.quiver import Quiver

from jaxrl_llm.envs.grid_layout import Layout
from jaxrl_llm.training import grid_picture, plotting

# S . G
# . # X
GRID = Layout(
    rows=2, columns=3, start=(0, 0), goals=((0, 2),), obstacles=((1, 1),), hazards=((1, 2),)
)
POLICY = np.array([1, 3, 0, 0, 0, 0])  # down, right, -, up
VALUE = np.array([-1.25, 2.0, 99.0, 0.5, 99.0, 99.0])


def drawn(figure: Figure) -> tuple[Any, Any]:
    """The axes and the arrows."""
    axes = figure.axes[0]
    (quiver,) = (item for item in axes.collections if isinstance(item, Quiver))
    return axes, quiver


def test_grid_policy_colours_open_cells_by_value():
    axes, _ = drawn(grid_picture.grid_policy(POLICY, VALUE, GRID))
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(shown, [[-1.25, 2.0, np.nan], [0.5, np.nan, np.nan]])
    numbers = {t.get_position(): t.get_text() for t in axes.texts if "." in t.get_text()}
    assert numbers == {(0, 0.33): "−1.25", (1, 0.33): "2.00", (0, 1.33): "0.50"}


def test_grid_policy_draws_one_arrow_an_open_cell_in_the_direction_of_the_move():
    axes, quiver = drawn(grid_picture.grid_policy(POLICY, VALUE, GRID))
    assert axes.yaxis_inverted()
    np.testing.assert_allclose(quiver.U, [0, 0.6, 0])
    np.testing.assert_allclose(quiver.V, [0.6, 0, -0.6])
    middle = np.stack([quiver.X + quiver.U / 2, quiver.Y + quiver.V / 2], axis=1)
    np.testing.assert_allclose(middle, [[0, -0.12], [1, -0.12], [0, 0.88]], atol=1e-12)


def test_grid_policy_draws_arrows_as_long_as_they_are_probable():
    policy = np.tile([0.5, 0.0, 0.01, 0.49], (6, 1))
    _, quiver = drawn(grid_picture.grid_policy(policy, VALUE, GRID))
    assert quiver.N == 6  # two in each of three open cells
    np.testing.assert_allclose(quiver.V[::2] / quiver.U[1::2], -0.5 / 0.49)
    np.testing.assert_allclose([quiver.X[::2], quiver.X[1::2]], [[0, 1, 0]] * 2)


def test_grid_policy_marks_and_names_what_is_on_the_grid():
    figure = grid_picture.grid_policy(POLICY, VALUE, GRID, title="T", value_name="V", footer="F")
    axes, _ = drawn(figure)
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "start",
        "goal",
        "hazard",
        "obstacle",
    ]
    faces = {to_hex(patch.get_facecolor()): patch.get_xy() for patch in axes.patches[1:]}
    assert faces == {
        to_hex(plotting.COLORS[2]): (1.5, -0.5),
        to_hex(plotting.COLORS[1]): (1.5, 0.5),
        to_hex(plotting.INK): (0.5, 0.5),
    }
    letters = {t.get_text(): t.get_position() for t in axes.texts if t.get_text() in ("G", "X")}
    assert letters == {"G": (2, 0), "X": (2, 1)}
    assert axes.child_axes[0].get_ylabel() == "V"
    assert (figure.get_suptitle(), figure.get_supxlabel()) == ("T", "F")


def test_grid_policy_of_an_empty_grid_names_start_and_goal():
    grid = Layout(rows=1, columns=2, start=(0, 0), goals=((0, 1),))
    axes, _ = drawn(grid_picture.grid_policy([3, 0], [1.0, 0.0], grid))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["start", "goal"]


def test_grid_policy_of_a_large_grid_has_no_numbers():
    grid = Layout(rows=20, columns=20, start=(0, 0), goals=((19, 19),))
    axes, quiver = drawn(grid_picture.grid_policy(np.zeros(400, int), np.arange(400.0), grid))
    assert [text.get_text() for text in axes.texts] == ["G"]
    assert quiver.N == 399


def test_grid_policy_can_be_saved(tmp_path):
    figure = grid_picture.grid_policy(POLICY, VALUE, GRID, title="Grid")
    pixels = imread(plotting.save_figure(figure, tmp_path / "grid.png"))
    assert pixels.std() > 0.05


def test_grid_policy_refuses_another_grid():
    with pytest.raises(ValueError, match=r"value has shape \(2,\); it must be \(6,\)"):
        grid_picture.grid_policy(POLICY, [0.0, 1.0], GRID)
    with pytest.raises(ValueError, match=r"policy is int64\[2\]; it must be"):
        grid_picture.grid_policy([0, 1], VALUE, GRID)
