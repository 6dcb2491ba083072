"""The picture of a policy on a grid: values as colours, moves as arrows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxrl_llm import checks
from jaxrl_llm.envs.grid_layout import STEPS, Layout
from jaxrl_llm.training.plotting import COLORS, GREY, INK, SMALL, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Face, hatch: no value has these.
_GOAL, _HAZARD, _OBSTACLE = (COLORS[2], ""), (COLORS[1], "//"), (INK, "xx")
_MAX_NUMBERED_CELLS = 150
_RAREST_ARROW = 0.02  # a shorter one is a dot


def grid_policy(
    policy: ArrayLike,
    value: ArrayLike,
    layout: Layout,
    *,
    title: str = "",
    value_name: str = "value",
    footer: str = "",
) -> Figure:
    """Each cell in the colour of its value, with an arrow for each move, as long as it is probable.

    Args:
      policy: one action a state `[S]` (integers), or action probabilities `[S, A]`.
      value: `[S]`; those of goals, hazards and obstacles are not drawn.
      layout: of the problem.
      title: of the picture.
      value_name: what `value` is, with its unit.
      footer: a line below.

    Raises:
      ValueError: if the policy or the values are not of that grid.
    """
    probability = checks.action_probabilities(policy, layout.num_states, len(layout.action_names))
    numbers = np.asarray(value, float)
    if numbers.shape != (layout.num_states,):
        raise ValueError(f"value has shape {numbers.shape}; it must be ({layout.num_states},)")
    cell = min(0.72, 9.0 / layout.columns, 7.0 / layout.rows)
    width, height = cell * layout.columns, cell * layout.rows
    figure, axes = new_figure(max(4.2, width + 1.4), height + 1.3, title, footer)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.tick_params(length=0, which="both")

    shape = layout.rows, layout.columns
    is_open = ~layout.closed
    shown = np.where(is_open, numbers, np.nan).reshape(shape)
    image = axes.imshow(shown, cmap="cividis", interpolation="nearest")
    place = axes.inset_axes((1 + 0.12 / width, 0.0, 0.14 / width, 1.0))
    figure.colorbar(image, cax=place).set_label(value_name, fontsize=SMALL)
    place.spines[:].set_visible(False)
    place.tick_params(labelsize=SMALL, color=GREY)
    for axis, count in ((axes.xaxis, layout.columns), (axes.yaxis, layout.rows)):
        axis.set_ticks(np.arange(0, count, max(1, round(count / 12))))
        if count <= 30:
            axis.set_ticks(np.arange(1, count) - 0.5, minor=True)
            axis.grid(which="minor", color="white", linewidth=1.2)

    is_small = layout.num_states <= _MAX_NUMBERED_CELLS
    _draw_arrows(axes, probability, layout, raised=0.12 if is_small else 0.0)
    if is_small:
        _write_numbers(axes, shown)
    _draw_marks(axes, layout, cell)
    return figure


def _draw_arrows(
    axes: Axes, probability: NDArray[np.float64], layout: Layout, *, raised: float
) -> None:
    from matplotlib.patheffects import withStroke

    step = np.array([STEPS[name] for name in layout.action_names])
    state, action = np.nonzero((probability > _RAREST_ARROW) & ~layout.closed[:, None])
    row, column = np.divmod(state, layout.columns)
    # One arrow alone is centred; several share the centre as their tail.
    is_alone = probability[state, action] > 1 - _RAREST_ARROW
    length = np.where(is_alone, 0.6, 0.36 * probability[state, action])
    down, right = length * step[action, 0], length * step[action, 1]
    back = 0.5 * is_alone
    axes.quiver(
        column - back * right,
        row - raised - back * down,
        right,
        down,
        angles="xy",
        scale_units="xy",
        scale=1,
        units="xy",
        width=0.06,
        headwidth=4,
        headlength=4,
        headaxislength=3.5,
        color="black",
        path_effects=[withStroke(linewidth=1.6, foreground="white")],
    )


def _write_numbers(axes: Axes, numbers: NDArray[np.float64]) -> None:
    from matplotlib.patheffects import withStroke

    largest = np.nanmax(np.abs(numbers), initial=0.0)
    decimals = 2 if largest < 10 else 1 if largest < 100 else 0
    for (row, column), number in np.ndenumerate(numbers):
        if np.isfinite(number):
            axes.text(
                column,
                row + 0.33,
                f"{round(number, decimals) + 0.0:.{decimals}f}".replace("-", "\N{MINUS SIGN}"),
                ha="center",
                va="center",
                fontsize=SMALL - 1.5,
                path_effects=[withStroke(linewidth=1.6, foreground="white")],
            )


def _draw_marks(axes: Axes, layout: Layout, inches: float) -> None:
    """Goals, hazards and obstacles in their own colours, and what these mean."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    kinds = (
        ("goal", "G", layout.goals, _GOAL),
        ("hazard", "X", layout.hazards, _HAZARD),
        ("obstacle", "", layout.obstacles, _OBSTACLE),
    )
    row, column = layout.start
    ring = Rectangle(
        (column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor=COLORS[4], linewidth=2.5
    )
    axes.add_patch(ring)
    handles = {"start": ring}
    for name, letter, cells, (color, hatch) in kinds:
        for row, column in cells:
            handles[name] = Rectangle(
                (column - 0.5, row - 0.5), 1, 1, facecolor=color, edgecolor="white", hatch=hatch
            )
            axes.add_patch(handles[name])
            axes.text(
                column,
                row,
                letter,
                ha="center",
                va="center",
                fontsize=min(11.0, 0.45 * 72 * inches),
                fontweight="bold",
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )
    axes.legend(
        handles.values(),
        handles.keys(),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.3 / (inches * layout.rows)),
        ncols=4,
        frameon=False,
        fontsize=SMALL,
    )
