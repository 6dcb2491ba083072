"""What to do as the belief changes, and how far it is known: tables and a picture of a POMDP.

    show_bounds(title, bounds, (value, missing), tried)
    show_plans(directory / "tiger.png", plans, ends, bounds, action_names, title, axis, footer)

In the style of `plotting`. Actions differ in colour, and are named where they are best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxrl_llm.kernels.alpha_vectors import AlphaVectors, prune
from jaxrl_llm.training import plotting, report
from jaxrl_llm.training.evaluate import Estimate
from jaxrl_llm.training.plotting import COLORS, GREY, INK, SMALL, new_figure, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_NUM_POINTS = 401
_EXACT = "V* is proved: beside it, by how much it may be higher than what is printed."
_NARROW = 0.075  # of the axis: a region's name stands on end


class Region(NamedTuple):
    """A stretch of beliefs with one best action, from `low` to `high`, both in [0, 1]."""

    low: float
    high: float
    action: int


def action_regions(
    plans: AlphaVectors, start: NDArray[np.float64], end: NDArray[np.float64]
) -> list[Region]:
    """The best action along the beliefs (1 - x) start + x end, x from 0 to 1.

    >>> from jaxrl_llm.kernels.alpha_vectors import AlphaVectors
    >>> plans = AlphaVectors(np.array([[0.0, 0.0], [-1.0, 3.0]]), np.array([0, 1], np.int32))
    >>> [tuple(region) for region in action_regions(plans, np.array([1.0, 0]), np.array([0, 1.0]))]
    [(0.0, 0.25, 0), (0.25, 1.0, 1)]
    """
    vectors = np.asarray(plans.vectors, np.float64)
    useful = prune(vectors)
    lines, actions = vectors[useful] @ np.stack([start, end], axis=1), np.asarray(plans.actions)
    # Two lines a + c x meet at (a_i - a_j) / (c_j - c_i): between crossings one line is highest.
    first, slope = lines[:, 0], lines[:, 1] - lines[:, 0]
    rise, fall = first[:, None] - first, slope - slope[:, None]
    crossings = rise[fall != 0] / fall[fall != 0]
    crossings = np.sort(crossings[(crossings > 0) & (crossings < 1)])
    found: list[Region] = []
    for low, high in pairwise([0.0, *crossings.tolist(), 1.0]):
        if high - low < 1e-12:
            continue
        best = int(actions[useful[np.argmax(first + slope * (low + high) / 2)]])
        if found and found[-1].action == best:
            found[-1] = found[-1]._replace(high=high)
        else:
            found.append(Region(found[-1].high if found else 0.0, high, best))
    return found


def show_bounds(
    title: str,
    bounds: Mapping[str, float],
    exact: tuple[float, float],
    tried: Mapping[str, Estimate],
) -> None:
    """A table of bounds on V*, and of the sampled return of policies, at the initial belief.

    Args:
      title: of the problem.
      bounds: by name.
      exact: V* to within what may be missing: V* lies between the first and the sum of both.
      tried: mean returns from the initial belief, by policy.
    """
    value, missing = exact
    ordered = sorted(bounds.items(), key=lambda bound: -bound[1])
    rows = [(name, f"{at:.6f}", f"{at - value:+.6f}", "") for name, at in ordered]
    above = sum(at > value for at in bounds.values())
    rows.insert(above, ("V*", f"{value:.6f}", f"+{missing:.1e}", ""))
    for name, found in tried.items():
        interval = f"{found.low:.3f} to {found.high:.3f}"
        row = f"tried: {name}", f"{found.mean:.6f}", f"{found.mean - value:+.6f}", interval
        rows.append(row)
    columns = ("bound or policy", "value", "minus V*", "95 % interval")
    footer = f"{_EXACT}\n{report.RESEARCH_ONLY}"
    report.print_table(f"{title}: value at the initial belief", columns, rows, footer=footer)


def show_plans(
    path: Path,
    plans: AlphaVectors,
    ends: NDArray[np.float64],
    bounds: Mapping[str, ArrayLike],
    action_names: Sequence[str],
    title: str,
    axis: str,
) -> None:
    """The best action by thresholds of the belief, in a table and a picture.

    Args:
      path: of the picture.
      plans: the solution.
      ends: `[2, S]`, the first and last of the beliefs shown.
      bounds: values `[N]` by name, at N beliefs evenly from end to end.
      action_names: of each action.
      title: of the problem.
      axis: what grows from 0 to 1 between the ends.
    """
    regions = action_regions(plans, *ends)
    rows = [
        (action_names[region.action], f"{region.low:.4f}", f"{region.high:.4f}")
        for region in regions
    ]
    columns = ("best action", "from", "to")
    table = f"{title}: what to do, by {axis[0].lower()}{axis[1:]}"
    report.print_table(table, columns, rows, footer=report.RESEARCH_ONLY)
    figure = value_over_belief(
        plans,
        *ends,
        bounds=bounds,
        action_names=action_names,
        title=f"{title}: the value of a belief, and what to do",
        xlabel=axis,
        ylabel="Expected discounted reward",
        footer=report.RESEARCH_ONLY,
    )
    plotting.save_figure(figure, path)


def value_over_belief(
    plans: AlphaVectors,
    start: ArrayLike,
    end: ArrayLike,
    *,
    bounds: Mapping[str, ArrayLike],
    action_names: Sequence[str],
    title: str = "",
    xlabel: str = "Belief",
    ylabel: str = "Value",
    footer: str = "",
) -> Figure:
    """The value and its alpha-vectors with the best action shaded, beside the bounds on it.

    Args:
      plans: the solution.
      start: `[S]`, the belief at the left.
      end: `[S]`, the belief at the right.
      bounds: values `[N]` at N beliefs evenly from `start` to `end`, by name.
      action_names: of each action.
      title: of the picture.
      xlabel: what grows from 0 to 1.
      ylabel: what a value is.
      footer: a line below, such as `research only, not for clinical use`.

    Raises:
      ValueError: if the shapes do not agree.
    """
    ends = np.stack([np.asarray(start, float), np.asarray(end, float)])
    vectors = np.asarray(plans.vectors, float)
    if ends.shape != (2, vectors.shape[1]):
        raise ValueError(f"start has shape {ends.shape[1:]}; it must be [{vectors.shape[1]}]")
    for name, values in bounds.items():
        if np.ndim(values) != 1 or np.size(values) < 2:
            raise ValueError(f"bounds[{name!r}] has shape {np.shape(values)}; it must be [beliefs]")
    regions = action_regions(plans, *ends)
    share = np.linspace(0, 1, _NUM_POINTS)
    useful = prune(vectors)
    lines = np.stack([1 - share, share], axis=1) @ ends @ vectors[useful].T
    value = lines.max(axis=1)

    figure, first, second = new_figure(10.4, 4.3, title, footer, width_ratios=(1.45, 1))
    colors = dict(zip(range(len(action_names)), cycle(COLORS), strict=False))
    _shade(first, regions, action_names, colors)
    for line, action in zip(lines.T, np.asarray(plans.actions)[useful], strict=True):
        first.plot(share, line, color=colors[int(action)], linewidth=0.8, alpha=0.75)
    first.plot(share, value, color=INK, linewidth=2.4)
    room = max(float(np.ptp(value)), 1e-9)
    first.set_ylim(value.min() - 0.35 * room, value.max() + 0.1 * room)
    first.set_ylabel(ylabel)
    first.set_title("Each thin line is a plan", fontsize=SMALL, color=GREY, loc="left", pad=16)

    curves = {name: np.asarray(values, float) for name, values in bounds.items()}
    for curve, color, dashes in zip(curves.values(), cycle(COLORS), cycle(_DASHES), strict=False):
        at = np.linspace(0, 1, curve.size)
        second.plot(at, curve, linestyle=dashes, color=color, linewidth=1.6, zorder=3)
    second.plot(share, value, color=INK, linewidth=2.4)
    second.set_title("Bounds on it", fontsize=SMALL, color=GREY, loc="left", pad=16)
    _name_ends(second, {"value": value[-1]} | {name: curve[-1] for name, curve in curves.items()})
    for axes in (first, second):
        axes.set_xlim(0, 1)
        axes.set_xlabel(xlabel)
    return figure


def _name_ends(axes: Axes, ends: Mapping[str, float]) -> None:
    """Names curves at the right of where they end, apart from each other."""
    low, high = axes.get_ylim()
    order = sorted(ends, key=lambda name: ends[name])
    heights = spread([(ends[name] - low) / (high - low) for name in order], 0.06)
    for name, height in zip(order, heights, strict=True):
        axes.annotate(
            name,
            xy=(1, ends[name]),
            xycoords=axes.get_yaxis_transform(),
            xytext=(1.06, height),
            textcoords="axes fraction",
            fontsize=SMALL,
            color=INK,
            va="center",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7},
            annotation_clip=False,
        )


def _shade(
    axes: Axes, regions: Sequence[Region], action_names: Sequence[str], colors: Mapping[int, str]
) -> None:
    """Each region in the colour of its action, with the name inside at the foot."""
    style: dict[str, Any] = {"fontsize": SMALL, "color": INK, "ha": "center"}
    for low, high, action in regions:
        axes.axvspan(low, high, color=colors[action], alpha=0.13, linewidth=0)
        # A name wider than its region stands on end.
        is_narrow = high - low < max(_NARROW, 0.019 * len(action_names[action]))
        axes.text(
            (low + high) / 2,
            0.03,
            action_names[action],
            transform=axes.get_xaxis_transform(),
            rotation=90 if is_narrow else 0,
            va="bottom",
            **style,
        )
    edges: NDArray[np.float64] = np.array([region.high for region in regions[:-1]])
    for edge in edges:
        axes.axvline(edge, color=GREY, linewidth=0.8)
        axes.annotate(
            f"{edge:.2f}",
            (edge, 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 2),
            textcoords="offset points",
            va="bottom",
            **style,
        )
