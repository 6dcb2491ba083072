"""Pictures of alignment: what was gained, at what distance from the reference, and if it lasts.

    figure = kl_reward_frontier({"PPO": Curve(kl, gold, low, high), "DPO": Curve(kl, gold)})
    plotting.save_figure(figure, directory / "frontier.png")

In the style of `plotting`. Curves are named where they end, and differ in their marks too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxrl_llm.training.plotting import COLORS, GREY, INK, SMALL, new_figure, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = ("o", "s", "^", "D", "v", "P")
_BEFORE = "#B8B8B8"
_LABEL_CHARACTERS = 26

Triple = tuple[float, float, float]


class _End(NamedTuple):
    """Where a curve ends, and what it looks like there."""

    name: str
    x: float
    y: float
    color: str
    mark: str


class Curve(NamedTuple):
    """What one algorithm reaches as it goes on, each `[T]`, or a number where it is one point.

    Attributes:
      kl: KL from the reference, nats a response.
      reward: mean gold score, or whatever is to be high.
      low: end of the reward's confidence interval; None where there is none.
      high: likewise.
    """

    kl: ArrayLike
    reward: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None


def kl_reward_frontier(
    curves: Mapping[str, Curve],
    *,
    optimum: Curve | None = None,
    best_of_n: Mapping[int, tuple[float, float]] | None = None,
    square_root: bool = False,
    title: str = "",
    xlabel: str = "KL from the reference (nats a response)",
    ylabel: str = "Gold score",
    footer: str = "",
) -> Figure:
    """Reward against KL from the reference, a curve an algorithm: high and to the left is good.

    Args:
      curves: by name, in the order of training; points that are not finite are left out.
      optimum: the exact frontier, above which there is no policy; shaded.
      best_of_n: n to its KL and reward; joined, and each n written where there is room.
      square_root: scales the KL axis, which gives small distances their room.
      title: of the picture.
      xlabel: what `kl` is.
      ylabel: what `reward` is.
      footer: a line below, such as `research only, not for clinical use`.

    Raises:
      ValueError: if there is no curve, or naming one that has no point or whose shapes differ.
    """
    drawn = {name: _arrays(f"curves[{name!r}]", curve) for name, curve in curves.items()}
    if not drawn:
        raise ValueError("curves is empty; give at least one")
    figure, axes = new_figure(7.2, 4.4, title, footer)
    if square_root:
        axes.set_xscale("function", functions=(_signed_root, _signed_square))
    ends = []
    for (name, curve), (color, mark) in zip(drawn.items(), _styles(), strict=False):
        kl, reward = curve["kl"], curve["reward"]
        axes.plot(kl, reward, color=color, linewidth=1.8, marker=mark, markersize=4.5, zorder=3)
        if "low" in curve and kl.size > 1:
            axes.fill_between(kl, curve["low"], curve["high"], color=color, alpha=0.15, linewidth=0)
        elif "low" in curve:
            axes.vlines(kl, curve["low"], curve["high"], color=color, linewidth=1.4, zorder=3)
        ends.append(_End(name, float(kl[-1]), float(reward[-1]), color, mark))
    if best_of_n:
        points = np.array(sorted(best_of_n.values()), float)
        axes.plot(*points.T, color=INK, linewidth=1.0, linestyle=":", marker="*", markersize=8)
        kl, reward = map(float, points[-1])
        ends.append(_End("best of n", kl, reward, INK, "*"))
    exact = None if optimum is None else _arrays("optimum", optimum)
    if exact is not None:
        axes.plot(exact["kl"], exact["reward"], color=GREY, linewidth=1.2, linestyle="--")
        ends.append(_End("optimum", float(exact["kl"][-1]), float(exact["reward"][-1]), GREY, ""))
    axes.margins(y=0.08)
    axes.autoscale_view()
    right = max(axes.dataLim.x1, 1e-9)
    # A little room at the left of 0, for its marks.
    pad = 0.02
    if square_root:
        axes.set_xlim(-right * pad**2, right * (1 + pad) ** 2)
    else:
        axes.set_xlim(-right * pad, right * (1 + pad))
    if exact is not None:
        bottom, top = axes.get_ylim()
        axes.fill_between(exact["kl"], exact["reward"], top, color=GREY, alpha=0.1, linewidth=0)
        axes.set_ylim(bottom, top)
    axes.set_xlabel(f"{xlabel}, square-root scale" if square_root else xlabel)
    axes.set_ylabel(ylabel)
    _name_ends(axes, ends, inches=4.4)
    _write_numbers(axes, best_of_n or {})
    return figure


def gold_against_proxy(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    *,
    title: str = "",
    xlabel: str = r"$\sqrt{\mathrm{KL}}$ from the reference ($\sqrt{\mathrm{nats}}$)",
    ylabel: str = "Score",
    footer: str = "",
) -> Figure:
    """What is maximised rises while what is meant falls: over-optimisation, a colour a reward.

    The proxy is dashed, the gold score solid, and a ring shows where it is highest. Both share one
    axis, so give the proxy in the unit of the gold score, or both as gains in deviations.

    Args:
      curves: by name of the reward model: square root of the KL, proxy and gold score, `[T]` each.
      title: of the picture.
      xlabel: what the first is.
      ylabel: what the others are.
      footer: a line below, such as `research only, not for clinical use`.

    Raises:
      ValueError: if there is no curve, or naming one that has no point or whose shapes differ.

    Source: Gao, Schulman and Hilton (2023), "Scaling laws for reward model overoptimization",
      arXiv:2210.10760, whose figure 1 has these axes.
    """
    if not curves:
        raise ValueError("curves is empty; give at least one")
    figure, axes = new_figure(7.2, 4.4, title, footer)
    ends = []
    for (name, curve), (color, mark) in zip(curves.items(), _styles(), strict=False):
        root, proxy, gold = _finite_rows(
            f"curves[{name!r}]", dict(zip(("sqrt_kl", "proxy", "gold"), curve, strict=True))
        ).values()
        axes.plot(root, proxy, "--", color=color, linewidth=1.4, marker=mark, markersize=3.5)
        axes.plot(root, gold, "-", color=color, linewidth=2.2, marker=mark, markersize=4.5)
        best = int(gold.argmax())
        axes.plot(
            root[best], gold[best], "o", markersize=12, markerfacecolor="none",
            markeredgecolor=color, markeredgewidth=1.6, zorder=4,
        )  # fmt: skip
        ends.append(_End(name, float(root[-1]), float(gold[-1]), color, mark))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.margins(x=0.03, y=0.1)
    _name_ends(axes, ends, inches=4.4)
    keys = [
        axes.plot([], [], "--", color=INK, linewidth=1.4)[0],
        axes.plot([], [], "-", color=INK, linewidth=2.2)[0],
        axes.plot([], [], "o", color=INK, markersize=9, markerfacecolor="none")[0],
    ]
    names = ["proxy: what is maximised", "gold: what is meant", "gold at its highest"]
    axes.legend(
        keys, names, frameon=False, fontsize=SMALL, ncols=3, loc="lower left",
        bbox_to_anchor=(-0.02, 1.0), columnspacing=1.5, handlelength=2.2,
    )  # fmt: skip
    return figure


def before_after_bars(
    measures: Mapping[str, tuple[Triple, Triple]],
    *,
    names: tuple[str, str] = ("before", "after"),
    title: str = "",
    xlabel: str = "Mean score",
    footer: str = "",
) -> Figure:
    """Two bars a measure with their intervals, each named and with its number.

    Args:
      measures: by name, of one unit: mean, low and high before, and the same after.
      names: of the two.
      title: of the picture.
      xlabel: what the measures are, with their unit.
      footer: a line below, such as `research only, not for clinical use`.

    Raises:
      ValueError: if there is no measure, or naming one that is not finite.
    """
    if not measures:
        raise ValueError("measures is empty; give at least one")
    numbers = np.array([[before[:3], after[:3]] for before, after in measures.values()], float)
    for index, name in enumerate(measures):
        if not np.isfinite(numbers[index]).all():
            raise ValueError(f"measures[{name!r}] is {numbers[index].tolist()}; it must be finite")
    height = 0.62 * len(measures) + 1.3
    figure, axes = new_figure(6.8, height, title, footer)
    lowest, highest = min(0.0, float(numbers.min())), max(0.0, float(numbers.max()))
    span = (highest - lowest) or 1.0
    row = np.arange(len(measures))
    styles = ((-0.2, _BEFORE), (0.2, COLORS[0]))
    for which, (shift, color) in enumerate(styles):
        mean, low, high = numbers[:, which].T
        axes.barh(row + shift, mean, height=0.36, color=color)
        axes.hlines(row + shift, low, high, color=INK, linewidth=1.2)
        for place, number, end in zip(row + shift, mean, np.maximum(high, 0), strict=True):
            text = f"{names[which]} {_number(number, span)}"
            axes.text(
                end + 0.015 * span, place, text, color=INK, fontsize=SMALL, va="center_baseline"
            )
    # Room for the longest text, which is about 0.07 inches a character.
    characters = max(map(len, names)) + 6
    axes.set_xlim(lowest - 0.02 * span * (lowest < 0), highest + span * characters * 0.018)
    axes.set_yticks(row, [textwrap.fill(name, _LABEL_CHARACTERS) for name in measures])
    axes.set_ylim(len(measures) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    if lowest < 0:
        axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel(xlabel)
    return figure


def calibration_picture(
    confidence: ArrayLike,
    accuracy: ArrayLike,
    weight: ArrayLike,
    *,
    title: str = "",
    xlabel: str = "Predicted probability",
    ylabel: str = "Share that was right",
    footer: str = "",
) -> Figure:
    """A reliability diagram: a point a bin, its area the number of cases, its gap to the diagonal.

    Args:
      confidence: `[bins]`, mean probability in each, in [0, 1].
      accuracy: `[bins]`, share of cases in it that were right.
      weight: `[bins]`, number of cases in it; bins of none are left out.
      title: of the picture.
      xlabel: what `confidence` is.
      ylabel: what `accuracy` is.
      footer: a line below, such as `research only, not for clinical use`.

    Raises:
      ValueError: if the shapes differ or every bin is empty.
    """
    given = {"confidence": confidence, "accuracy": accuracy, "weight": weight}
    drawn = _finite_rows("calibration", given)
    filled = drawn["weight"] > 0
    if not filled.any():
        raise ValueError("weight has no bin above 0; there is nothing to draw")
    predicted, right, number = (drawn[name][filled] for name in given)
    figure, axes = new_figure(4.8, 4.8, title, footer)
    start = np.floor(10 * min(predicted.min(), right.min()) - 1e-9) / 10
    low = float(np.clip(start, 0.0, 0.9))
    axes.plot([low, 1], [low, 1], color=GREY, linewidth=1.2, linestyle="--", zorder=1)
    axes.vlines(predicted, predicted, right, color=COLORS[1], linewidth=1.6, zorder=2)
    area = 260 * number / number.max()
    axes.scatter(
        predicted, right, s=np.maximum(area, 6), color=COLORS[0], edgecolor="white",
        linewidth=0.8, zorder=3, clip_on=False,
    )  # fmt: skip
    pad = 0.03 * (1 - low)
    axes.set_xlim(low - pad, 1 + pad)
    axes.set_ylim(low - pad, 1 + pad)
    axes.set_aspect("equal")
    style: dict[str, Any] = {"fontsize": SMALL, "color": GREY, "transform": axes.transAxes}
    axes.text(0.03, 0.97, "too modest", va="top", **style)
    axes.text(0.97, 0.1, "too sure", ha="right", **style)
    cases = f"area: number of cases, at most {number.max():,.0f}"
    axes.text(0.97, 0.03, cases, ha="right", **style)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure


def _styles() -> Iterator[tuple[str, str]]:
    """Colours and marks without end; the numbers of both are coprime, so pairs repeat late."""
    return zip(cycle(COLORS), cycle(_MARKS), strict=False)


def _arrays(place: str, curve: Curve) -> dict[str, NDArray[np.float64]]:
    """The fields of a curve that are given."""
    if (curve.low is None) != (curve.high is None):
        raise ValueError(f"{place} has one end of its interval; give low and high, or neither")
    fields = {name: field for name, field in curve._asdict().items() if field is not None}
    return _finite_rows(place, fields)


def _finite_rows(place: str, given: Mapping[str, ArrayLike]) -> dict[str, NDArray[np.float64]]:
    """Each as `[T]`, without the points at which one of them is not finite."""
    arrays = {name: np.atleast_1d(np.asarray(field, float)) for name, field in given.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{place} has the shapes {listed}; all must be [T]")
    finite = np.isfinite(list(arrays.values())).all(0)
    if not finite.any():
        raise ValueError(f"{place} has no finite point; there is nothing to draw")
    return {name: array[finite] for name, array in arrays.items()}


def _name_ends(axes: Axes, ends: Sequence[_End], *, inches: float) -> None:
    """Names curves at the right of the axes, apart from each other, a line to each one's end.

    Args:
      axes: whose limits are final.
      ends: in any order.
      inches: height of the figure, of which the axes have about three quarters.
    """
    ends = sorted(ends, key=lambda end: end.y)
    bottom, top = axes.get_ylim()
    heights = [(end.y - bottom) / (top - bottom) for end in ends]
    names = [textwrap.fill(end.name, _LABEL_CHARACTERS) for end in ends]
    num_lines = max(name.count("\n") + 1 for name in names)
    gap = 1.3 * SMALL * num_lines / (0.75 * 72 * inches)
    for end, name, height in zip(ends, names, spread(heights, gap), strict=True):
        axes.annotate(
            name, xy=(end.x, end.y), xytext=(1.06, height), textcoords="axes fraction",
            fontsize=SMALL, color=INK, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": end.color, "linewidth": 0.9, "linestyle": ":",
                        "alpha": 0.6, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip
        axes.plot(
            [1.035], [height], transform=axes.transAxes, color=end.color, marker=end.mark,
            markersize=6, linestyle="", clip_on=False,
        )  # fmt: skip


def _write_numbers(axes: Axes, best_of_n: Mapping[int, tuple[float, float]]) -> None:
    """Writes n beside each point that is 18 points of type or more from the last one so named.

    The best of 1 is the reference itself.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    last = -np.inf
    for number, point in sorted(best_of_n.items(), key=lambda item: item[1]):
        place = 72 / figure.dpi * axes.transData.transform(point)
        if number > 1 and np.hypot(*(place - last)) >= 18:
            last = place
            axes.annotate(
                f"{number}", xy=point, xytext=(-5, 3), textcoords="offset points", ha="right",
                fontsize=SMALL - 1, color=INK,
            )  # fmt: skip


def _number(number: float, span: float) -> str:
    """With as many decimals as the span of the axis makes visible."""
    fewest = 2 if span < 100 else 0
    decimals = int(np.clip(1 - np.floor(np.log10(span)), fewest, 4))
    # Adding 0 turns a negative zero into a positive one.
    return f"{round(number, decimals) + 0.0:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _signed_root(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sign(values) * np.sqrt(np.abs(values))


def _signed_square(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sign(values) * np.square(values)
