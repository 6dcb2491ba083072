"""Pictures of off-policy evaluation: estimates beside the truth, and the data they rest on.

In the style of `plotting`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from jaxrl_llm.training.plotting import COLORS, GREY, INK, SMALL, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Estimate = tuple[float, float, float]
# What is farther off than this many times the span of the truths and the middle estimates is cut.
_ZOOM = 1.6


def forest(
    estimates: Mapping[str, Mapping[str, Estimate]],
    *,
    exact: Mapping[str, float] | None = None,
    title: str = "",
    xlabel: str = "Value",
    footer: str = "",
) -> Figure:
    """Each estimator's estimate and interval as a point and a line, beside the exact value.

    An interval that leaves the picture ends in an arrow, and an estimate that does is written out.

    Args:
      estimates: by target policy, then by estimator: value, low, high.
      exact: value of each target policy, where it is known.
      title: of the picture.
      xlabel: what is estimated.
      footer: a line below, such as `research only, not for clinical use`.

    Raises:
      ValueError: if there is nothing to draw, or naming what is not finite.
    """
    if not estimates:
        raise ValueError("estimates is empty; give at least one policy")
    for policy, found in estimates.items():
        for name, triple in found.items():
            if not np.all(np.isfinite(triple)):
                raise ValueError(f"estimates[{policy!r}][{name!r}] is {triple}; it must be finite")
    exact = exact or {}
    numbers = np.array([triple for found in estimates.values() for triple in found.values()], float)
    centre = np.array([*exact.values(), *np.quantile(numbers[:, 0], [0.25, 0.75])])
    reach = max(_ZOOM * float(np.ptp(centre)), 0.25 * float(np.abs(centre).max()), 1e-9)
    low = max(float(np.min(numbers, initial=centre.min())), float(centre.min()) - reach)
    high = min(float(np.max(numbers, initial=centre.max())), float(centre.max()) + reach)
    margin = 0.06 * (high - low) or reach
    limits = low - margin, high + margin
    rows = max(len(found) for found in estimates.values())
    figure, *panels = new_figure(
        3.0 * len(estimates) + 1.0, 0.3 * rows + 1.7, title, footer, [1] * len(estimates)
    )
    for axes, (policy, found) in zip(panels, estimates.items(), strict=True):
        _draw_forest(axes, found, limits, exact.get(policy))
        axes.set_title(policy, fontsize=SMALL + 0.5, loc="left")
        axes.set_xlabel(xlabel, fontsize=SMALL)
        if axes is not panels[0]:
            axes.tick_params(labelleft=False)
    return figure


def effective_sample_sizes(
    sizes: Mapping[str, ArrayLike],
    *,
    num_trajectories: int,
    threshold: float,
    title: str = "",
    footer: str = "",
) -> Figure:
    """How many trajectories' worth of data is left at each step, on a logarithmic axis.

    Args:
      sizes: `[T]` by target policy.
      num_trajectories: of the log.
      threshold: below which no estimate is to be trusted; drawn across.
      title: of the picture.
      footer: a line below.
    """
    figure, axes = new_figure(6.8, 3.8, title, footer)
    for (name, values), color, dashes in zip(
        sizes.items(), cycle(COLORS), cycle(("-", "--", "-.", ":")), strict=False
    ):
        size = np.asarray(values, float)
        steps = np.arange(1, size.size + 1)
        axes.plot(
            steps, np.where(size > 0, size, np.nan), dashes, color=color, linewidth=1.8, label=name
        )
    axes.set_yscale("log")
    axes.set_ylim(0.8, 1.5 * num_trajectories)
    for level, text in ((threshold, "too few below"), (num_trajectories, "trajectories logged")):
        axes.axhline(level, color=GREY, linewidth=0.9, linestyle=":")
        axes.annotate(
            f"{level:g} {text}", xy=(1, level), xycoords=axes.get_yaxis_transform(),
            xytext=(-2, 2), textcoords="offset points", ha="right", va="bottom",
            fontsize=SMALL - 1, color=GREY,
        )  # fmt: skip
    axes.set_xlabel("Decision")
    axes.set_ylabel("Effective sample size")
    axes.legend(frameon=False, fontsize=SMALL, loc="lower right")
    return figure


def _draw_forest(
    axes: Axes, found: Mapping[str, Estimate], limits: Sequence[float], exact: float | None
) -> None:
    left, right = limits
    axes.set_xlim(left, right)
    axes.set_ylim(len(found) - 0.5, -0.7)
    axes.set_yticks(range(len(found)), list(found))
    axes.grid(axis="y", visible=False)
    if exact is not None:
        axes.axvline(exact, color=COLORS[1], linewidth=1.4, linestyle="--", zorder=1)
        axes.annotate(
            f"exact {exact:.4g}", xy=(exact, 1), xycoords=axes.get_xaxis_transform(),
            xytext=(3, -2), textcoords="offset points", fontsize=SMALL - 1, color=COLORS[1],
            va="top",
        )  # fmt: skip
    for row, (value, low, high) in enumerate(found.values()):
        start, stop = max(low, left), min(high, right)
        if start < stop:
            axes.plot([start, stop], [row, row], color=COLORS[0], linewidth=1.8, zorder=2)
        for end, is_cut, mark in ((left, low < left, "<"), (right, high > right, ">")):
            if is_cut and start < stop:
                axes.plot(end, row, mark, color=COLORS[0], markersize=5, clip_on=False, zorder=2)
        if left <= value <= right:
            axes.plot(value, row, "o", color=COLORS[0], markersize=5, zorder=3)
        else:
            side, at, shift = ("left", left, 8) if value < left else ("right", right, -8)
            axes.annotate(
                f"{value:.3g}", xy=(at, row), xytext=(shift, 0), textcoords="offset points",
                ha=side, va="center", fontsize=SMALL - 1, color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6}, zorder=4,
            )  # fmt: skip
