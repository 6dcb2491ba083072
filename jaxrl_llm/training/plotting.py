"""Pictures of a run, as matplotlib figures that nobody else's settings touch.

    figure = learning_curve(steps, returns, references={"optimum": 0.88}, title="PPO", ...)
    save_figure(figure, directory / "learning_curve.png")

The colours are those of Okabe and Ito, told apart by colour-blind readers too, and no meaning hangs
on colour alone: lines differ in dashes, cells carry numbers.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxrl_llm import checks
from jaxrl_llm.data.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")
INK, GREY, _PALE = "#222222", "#666666", "#DDDDDD"
_FONT, SMALL = 10.0, 8.5  # points
_MAX_NUMBERED_CELLS = 200
_MAX_SHARP_ROWS = 1_000  # more have less than a pixel each, and are averaged
_NAME_CHARACTERS = 32
_ROUND_NUMBERS = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]


def learning_curve(
    steps: ArrayLike,
    values: ArrayLike,
    *,
    references: Mapping[str, float] | None = None,
    title: str = "",
    xlabel: str = "Environment steps",
    ylabel: str = "Return",
    footer: str = "",
) -> Figure:
    """The median over seeds with its 25-75 % band, each seed thinly, and levels to compare with.

    Args:
      steps: `[T]`.
      values: `[seeds, T]`; NaN where a seed has no value.
      references: levels drawn across and named at the right, such as random or the optimum.
      title: of the picture.
      xlabel: what `steps` are.
      ylabel: what `values` are.
      footer: a line below, such as `research only, not for clinical use`.

    Raises:
      ValueError: if the shapes do not agree.
    """
    steps, values = np.asarray(steps, float), np.asarray(values, float)
    if steps.ndim != 1 or values.ndim != 2 or values.shape[1] != steps.size or not values.size:
        wanted = f"it must be [seeds, {steps.size}] for steps of shape {steps.shape}"
        raise ValueError(f"values has shape {values.shape}; {wanted}")
    for name, level in (references or {}).items():
        if not math.isfinite(level):
            raise ValueError(f"references[{name!r}] is {level}; it must be finite")
    from matplotlib.ticker import EngFormatter

    figure, axes = new_figure(6.8, 4.0, title, footer)
    color = COLORS[0]
    num_seeds = values.shape[0]
    if num_seeds > 1:
        for curve in values:
            axes.plot(steps, curve, color=color, linewidth=0.6, alpha=0.3, label="_seed")
        low, median, high = _quartiles(values)
        axes.fill_between(
            steps, low, high, color=color, alpha=0.18, linewidth=0, label="25\N{EN DASH}75 %"
        )
        label = f"median of {num_seeds} seeds"
    else:
        median, label = values[0], "one seed"
    axes.plot(steps, median, color=color, linewidth=2.0, label=label, **_dot_if_single(steps))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.0 if steps.size > 1 else 0.5, y=0.08)
    _draw_references(axes, references or {}, inches=4.0)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=SMALL, loc="best")
    return figure


def policy_heatmap(
    policy: ArrayLike,
    state_names: Sequence[str],
    action_names: Sequence[str],
    *,
    value: ArrayLike | None = None,
    title: str = "",
    value_name: str = "value",
    footer: str = "",
) -> Figure:
    """What a policy does in each state: a row a state, a column an action.

    A small picture has its numbers in the cells (`value` if it is given, probabilities if not). A
    large one shows `value` as a second picture beside the first, and only some of the names.

    Args:
      policy: action probabilities `[S, A]`, or one action a state `[S]` (integers).
      state_names: `S` names.
      action_names: `A` names.
      value: of each action `[S, A]` or state `[S]`.
      title: of the picture.
      value_name: what `value` is, with its unit.
      footer: a line below, such as `research only, not for clinical use`.

    Raises:
      ValueError: if the shapes or an action do not agree with the names.
    """
    probability = checks.action_probabilities(policy, len(state_names), len(action_names))
    shape = probability.shape
    numbers = None if value is None else np.asarray(value, float)
    if numbers is not None and numbers.shape not in (shape, shape[:1]):
        raise ValueError(f"value has shape {numbers.shape}; it must be {shape} or {shape[:1]}")
    is_small = probability.size <= _MAX_NUMBERED_CELLS
    is_certain = bool(np.all((probability == 0) | (probability == 1)))
    beside = None
    if numbers is not None and not (is_small and numbers.shape == shape):
        beside = numbers.reshape(shape[0], -1)

    cell = 0.62 if is_small else 0.24
    widths = [max(1.2, min(9.0, cell * shape[1]))]
    if beside is not None:
        widths.append(max(0.6, min(9.0, cell * beside.shape[1])))
    longest = min(_NAME_CHARACTERS, max(map(len, state_names)))
    height = max(1.2, min(8.0, (0.32 if is_small else 0.2) * shape[0]))
    width = sum(widths) + 0.085 * longest + (0.6 if is_certain else 1.4)
    figure, first, *rest = new_figure(
        max(4.2, width), height + 1.6, title, footer, width_ratios=widths
    )

    image = _draw_cells(first, probability, "Blues", vmin=0, vmax=1.15)
    best = probability == probability.max(axis=1, keepdims=True)
    if is_small and beside is None and numbers is not None:
        _number_cells(image, probability, numbers, best)
    elif is_small and not is_certain:
        _number_cells(image, probability, probability, best)
    elif not is_certain:
        _color_bar(image, "probability", 1.0, widths[0])
    _name_cells(first, "y", state_names, height)
    _name_cells(first, "x", action_names, widths[0])
    if beside is not None:
        image = _draw_cells(rest[0], beside, "cividis")
        rest[0].set_yticks([])
        names = action_names if beside.shape == shape else [value_name if is_small else ""]
        _name_cells(rest[0], "x", names, widths[1])
        if is_small:
            _number_cells(image, beside, beside, np.zeros(beside.shape, bool))
        else:
            _color_bar(image, value_name, float(np.nanmax(beside)), widths[1])
    return figure


def convergence(
    curves: Mapping[str, ArrayLike],
    *,
    rate: float | None = None,
    title: str = "",
    xlabel: str = "Iteration",
    ylabel: str = "Sup-norm Bellman residual",
    footer: str = "",
) -> Figure:
    """Residual against iteration on a logarithmic axis, a line a solver.

    Args:
      curves: residuals `[K]` by solver, the first after one iteration. Those that are not positive
        or not finite have no place on the axis and are left out.
      rate: the factor an iteration that theory promises, such as the discount; drawn from the
        largest first residual.
      title: of the picture.
      xlabel: what is counted.
      ylabel: what the residuals are.
      footer: a line below.

    Raises:
      ValueError: if no curve has a positive residual.
    """
    drawable = {}
    for name, curve in curves.items():
        residual = np.asarray(curve, float)
        if residual.ndim != 1:
            raise ValueError(
                f"curves[{name!r}] has shape {residual.shape}; it must be [iterations]"
            )
        drawable[name] = np.where(np.isfinite(residual) & (residual > 0), residual, np.nan)
    points = np.concatenate([np.zeros(0), *drawable.values()])
    if np.all(np.isnan(points)):
        raise ValueError("curves has no positive residual; there is nothing to draw")
    figure, axes = new_figure(6.8, 4.0, title, footer)
    styles = zip(cycle(COLORS), cycle(_DASHES), strict=False)
    for (name, residual), (color, dashes) in zip(drawable.items(), styles, strict=False):
        iteration = np.arange(1, residual.size + 1)
        single = _dot_if_single(residual[np.isfinite(residual)])
        axes.plot(iteration, residual, dashes, color=color, linewidth=1.8, label=name, **single)
    if rate is not None:
        iteration = np.arange(1, max(residual.size for residual in drawable.values()) + 1)
        firsts = [residual[0] for residual in drawable.values() if np.isfinite(residual[:1]).any()]
        first = max(firsts, default=np.nanmax(points))
        label = rf"$\gamma^k$, $\gamma$ = {rate:g}"
        predicted = first * rate ** (iteration - 1.0)
        axes.plot(iteration, predicted, ":", color=INK, linewidth=1.2, label=label, zorder=3)
    axes.set_yscale("log")
    axes.set_ylim(np.nanmin(points) / 2, np.nanmax(points) * 2)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, fontsize=SMALL, loc="best")
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a PNG at 150 dots an inch, whole or not at all, and returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())
    return path


def new_figure(
    width: float, height: float, title: str, footer: str, width_ratios: Sequence[float] = (1,)
) -> tuple[Any, ...]:
    """A figure and its axes side by side, in the common style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(width_ratios), squeeze=False, width_ratios=width_ratios)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=INK, labelsize=SMALL, color=GREY)
        axes.grid(color=_PALE, linewidth=0.6)
        axes.set_axisbelow(True)
    if title:
        wrapped = "\n".join(textwrap.wrap(title, max(20, int(width * 11))))
        figure.suptitle(wrapped, fontsize=_FONT + 1.5, fontweight="bold", x=0.01, ha="left")
    if footer:
        figure.supxlabel(footer, fontsize=SMALL - 1, color=GREY, x=0.01, ha="left")
    return figure, *panels


def _quartiles(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[3, T]`, over the seeds that have a value; NaN where none has."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        return np.nanquantile(values, [0.25, 0.5, 0.75], axis=0)


def _dot_if_single(points: NDArray[np.float64]) -> dict[str, str]:
    """A line of one point is invisible without its marker."""
    return {"marker": "o"} if points.size == 1 else {}


def _draw_references(axes: Axes, references: Mapping[str, float], inches: float) -> None:
    """Levels across, their names apart from each other at the right; `inches` is the height."""
    levels = sorted(references.items(), key=lambda item: item[1])
    styles = zip(cycle(COLORS[1:]), cycle(_DASHES[1:]), strict=False)
    lines = [
        axes.axhline(level, linestyle=dashes, color=color, linewidth=1.2, label=f"_{name}")
        for (name, level), (color, dashes) in zip(levels, styles, strict=False)
    ]
    axes.autoscale_view()
    bottom, top = axes.get_ylim()
    heights = [(level - bottom) / (top - bottom) for _, level in levels]
    # The axes are about four fifths of the figure's height.
    gap = 1.4 * SMALL / (0.8 * 72 * inches)
    for (name, level), line, at in zip(levels, lines, spread(heights, gap), strict=True):
        axes.annotate(
            f"{name} {level:.3g}",
            xy=(1, level),
            xycoords=axes.get_yaxis_transform(),
            xytext=(1.03, at),
            textcoords="axes fraction",
            color=INK,
            fontsize=SMALL,
            va="center",
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.7},
            annotation_clip=False,
        )


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Ascending positions in [0, 1] moved apart by at least `gap`, and as little as that takes.

    Least squares: without their gaps, positions that must stay in order are pooled to their mean.
    Where [0, 1] is too short for all of them, they go beyond 1.

    >>> spread([0.5, 0.5], 0.25)
    [0.375, 0.625]
    """
    pools: list[tuple[float, int]] = []
    for index, position in enumerate(positions):
        mean, count = position - index * gap, 1
        while pools and pools[-1][0] >= mean:
            before, number = pools.pop()
            mean = (before * number + mean * count) / (number + count)
            count += number
        pools.append((mean, count))
    highest = max(0.0, 1 - (len(positions) - 1) * gap)
    pooled = [min(max(mean, 0.0), highest) for mean, count in pools for _ in range(count)]
    return [mean + index * gap for index, mean in enumerate(pooled)]


def _draw_cells(axes: Axes, numbers: NDArray[np.float64], colors: str, **limits: Any) -> AxesImage:
    """One coloured cell an element, without a frame."""
    interpolation = "nearest" if len(numbers) <= _MAX_SHARP_ROWS else "auto"
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.tick_params(length=0, which="both")
    return axes.imshow(numbers, cmap=colors, aspect="auto", interpolation=interpolation, **limits)


def _number_cells(
    image: AxesImage,
    shades: NDArray[np.float64],
    numbers: NDArray[np.float64],
    bold: NDArray[np.bool_],
) -> None:
    """Writes each cell's number, readable on the colour that its shade has."""
    largest = np.max(np.abs(numbers), initial=0.0, where=np.isfinite(numbers))
    decimals = 2 if largest < 10 else 1 if largest < 1_000 else 0
    red, green, blue, _ = np.moveaxis(np.asarray(image.to_rgba(shades)), -1, 0) ** 2.2
    # Black and white have equal contrast (as WCAG defines it) with a luminance of 0.18.
    is_dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.18
    for (row, column), number in np.ndenumerate(numbers):
        image.axes.text(
            column,
            row,
            # Adding 0 turns a negative zero into a positive one.
            f"{round(number, decimals) + 0.0:.{decimals}f}".replace("-", "\N{MINUS SIGN}"),
            ha="center",
            va="center",
            fontsize=SMALL,
            fontweight="bold" if bold[row, column] else "normal",
            color="white" if is_dark[row, column] else "black",
        )


def _color_bar(image: AxesImage, name: str, highest: float, inches: float) -> None:
    """At the right of a picture that is `inches` wide; the same size for every picture."""
    place = image.axes.inset_axes((1 + 0.1 / inches, 0.0, 0.14 / inches, 0.4))
    bar = image.axes.figure.colorbar(image, cax=place)
    bar.set_label(name, fontsize=SMALL)
    place.spines[:].set_visible(False)
    place.set_ylim(top=highest)
    place.tick_params(labelsize=SMALL, color=GREY)


def _name_cells(axes: Axes, which: Literal["x", "y"], names: Sequence[str], inches: float) -> None:
    """Names the rows or columns, as many as there is room for, the first and evenly on."""
    short = [textwrap.shorten(name, _NAME_CHARACTERS, placeholder="…") for name in names]
    crowding = len(names) * 1.25 * SMALL / (72 * inches)
    every = next(number for number in _ROUND_NUMBERS if number >= crowding)
    shown = range(0, len(names), every)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(list(shown), [short[index] for index in shown])
    if len(names) <= 60:
        axis.set_ticks(np.arange(1, len(names)) - 0.5, minor=True)
        axis.grid(which="minor", color="white", linewidth=1.2)
    if which == "x":
        axes.xaxis.tick_top()
        # Names wider than their columns stand on end.
        if max(map(len, short)) * 0.62 * SMALL > 72 * inches * every / len(names):
            axis.set_tick_params(labelrotation=90)
    axis.set_tick_params(length=0, which="both")
