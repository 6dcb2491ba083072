"""One episode as a clinician reads a chart: vitals, doses and events above one time axis.

    save(
        path, "Glucose under PPO", time,
        [Series("Glucose", "mg/dL", glucose, normal=(70, 180))],
        [Doses("Insulin", "U/h", insulin)],
        [Event(7.5, "Meal"), Event(23.0, "Discharge")],
        time_unit="hours",
    )

From the top: a row a kind of event, marked where it happened; a panel a vital sign, its normal
range shaded and what lies outside of it filled; a panel a drug, as steps. In the style of
`plotting`: readable without telling colours apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxrl_llm.training.plotting import COLORS, GREY, INK, SMALL, new_figure, save_figure
from jaxrl_llm.training.report import RESEARCH_ONLY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOOTER = f"{RESEARCH_ONLY} SYNTHETIC."
_BLUE, _VERMILION, _GREEN = COLORS[0], COLORS[1], COLORS[2]
_MARKERS = ("v", "o", "s", "D", "^", "P", "X")
_WIDTH, _VITAL, _DRUG, _ROW = 8.6, 1.25, 0.8, 0.3  # inches
_GAP, _MARGIN = 0.3, 1.15  # inches: between panels; of title, time axis and footer
_FEW = 40  # measurements, each of which gets a dot
# Distances between ticks that a clock or a calendar has.
_TICKS = {
    "minutes": (1, 2, 5, 10, 15, 30, 60, 120, 240),
    "hours": (0.25, 0.5, 1, 2, 3, 6, 12, 24, 48, 168),
    "days": (1, 2, 7, 14, 28, 50, 100, 200, 500, 1_000),
}
_MOST_TICKS = 12


@dataclass(frozen=True)
class Series:
    """A vital sign or laboratory value.

    Attributes:
      name: such as `Glucose`.
      unit: such as `mg/dL`; empty where it has none.
      values: `[T]`; NaN where it was not measured.
      normal: the normal range, low and high, infinite where it has no end; None where unknown.
      is_logarithmic: drawn on a logarithmic axis, which takes positive values alone.
    """

    name: str
    unit: str
    values: ArrayLike
    normal: tuple[float, float] | None = None
    is_logarithmic: bool = False


@dataclass(frozen=True)
class Doses:
    """What was given of a drug.

    Attributes:
      name: such as `Insulin`.
      unit: such as `U/h`; empty for 1 = given and 0 = not.
      values: `[T]`, from each time to the next.
    """

    name: str
    unit: str
    values: ArrayLike


@dataclass(frozen=True)
class Event:
    """Something that happened, such as `Meal`, `Death` or `Discharge`, at `time`."""

    time: float
    name: str


def save(
    path: str | Path,
    title: str,
    time: ArrayLike,
    series: Sequence[Series],
    doses: Sequence[Doses] = (),
    events: Sequence[Event] = (),
    *,
    time_unit: str = "hours",
    footer: str = FOOTER,
) -> Path:
    """Draws one episode and writes it as a PNG.

    Args:
      path: of the picture.
      title: of the picture.
      time: `[T]`, increasing, in `time_unit`.
      series: from top to bottom, at least one.
      doses: below them.
      events: above them; those of one name share a row.
      time_unit: `minutes`, `hours` and `days` get the ticks of a clock or calendar.
      footer: a line below.

    Returns:
      `path`.

    Raises:
      ValueError: if the shapes do not agree, times do not increase, a number is not finite where it
        must be, or a normal range is empty.
    """
    figure = draw(title, time, series, doses, events, time_unit=time_unit, footer=footer)
    return save_figure(figure, path)


def draw(
    title: str,
    time: ArrayLike,
    series: Sequence[Series],
    doses: Sequence[Doses] = (),
    events: Sequence[Event] = (),
    *,
    time_unit: str = "hours",
    footer: str = FOOTER,
) -> Figure:
    """The figure that `save` writes; the same arguments."""
    times = _check_time(time)
    if not series:
        raise ValueError("series is empty; give at least one")
    vitals = [_check_series(one, times) for one in series]
    drugs = [_check_values(f"doses[{one.name!r}]", one.values, times) for one in doses]
    for event in events:
        if not math.isfinite(event.time):
            raise ValueError(f"events[{event.name!r}] is at {event.time}; it must be finite")

    names = list(dict.fromkeys(event.name for event in events))
    heights = [_ROW * len(names)] * bool(names) + [_VITAL] * len(vitals) + [_DRUG] * len(drugs)
    figure, panels = _stack(heights, title, footer)
    rest = iter(panels)
    if names:
        _draw_events(next(rest), names, events)
    for one, values in zip(series, vitals, strict=True):
        _draw_series(next(rest), one, times, values)
    for one, values in zip(doses, drugs, strict=True):
        _draw_doses(next(rest), one, times, values)
    for panel, event in itertools.product(panels, events):
        panel.axvline(event.time, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    _draw_clock(panels[-1], times, events, time_unit)
    return figure


def _stack(heights: Sequence[float], title: str, footer: str) -> tuple[Figure, list[Axes]]:
    """Panels of these heights in inches, one below another above one time axis."""
    height = sum(heights) + _GAP * len(heights) + _MARGIN
    figure, *panels = new_figure(_WIDTH, height, title, footer, [1.0] * len(heights))
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    for panel, cell in zip(panels, grid, strict=True):
        panel.set_subplotspec(cell)
    for panel in panels[:-1]:
        panel.sharex(panels[-1])
        panel.tick_params(labelbottom=False, bottom=False)
    return figure, panels


def _draw_events(panel: Axes, names: Sequence[str], events: Sequence[Event]) -> None:
    """A row a name, from the top."""
    for row, (name, marker) in enumerate(zip(names, itertools.cycle(_MARKERS), strict=False)):
        at = [event.time for event in events if event.name == name]
        panel.plot(at, [row] * len(at), marker, color=INK, markersize=6, clip_on=False)
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.grid(False)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)


def _draw_series(
    panel: Axes, series: Series, times: NDArray[np.float64], values: NDArray[np.float64]
) -> None:
    known = np.isfinite(values)
    marker = "o" if known.sum() <= _FEW else None
    panel.plot(times[known], values[known], color=INK, linewidth=1.6, marker=marker, markersize=3)
    if series.is_logarithmic:
        panel.set_yscale("log")
    else:
        panel.locator_params(axis="y", nbins=4)
    panel.margins(y=0.12)
    _name(panel, series.name, series.unit)
    if series.normal is None:
        return
    low, high = series.normal
    at, curve = times[known], values[known]
    # Where values lie outside, the nearest end of the range is in sight; the far one need not be.
    panel.update_datalim(np.stack([at, np.clip(curve, low, high)], axis=1))
    panel.autoscale_view()
    bottom, top = panel.get_ylim()
    panel.axhspan(max(low, bottom), min(high, top), color=_GREEN, alpha=0.16, linewidth=0)
    for end, is_outside in ((low, curve < low), (high, curve > high)):
        style: dict[str, Any] = {"color": _VERMILION, "alpha": 0.45, "linewidth": 0}
        panel.fill_between(at, curve, end, where=is_outside, interpolate=True, **style)
    panel.set_ylim(bottom, top)
    inside = np.mean((curve >= low) & (curve <= high)) if known.any() else 0.0
    _say(panel, f"normal {_range(low, high)}\n{inside:.0%} of values")


def _draw_doses(
    panel: Axes, doses: Doses, times: NDArray[np.float64], values: NDArray[np.float64]
) -> None:
    last = times[-1] - times[-2] if len(times) > 1 else 1.0
    edges = np.append(times, times[-1] + last)
    panel.stairs(values, edges, fill=True, color=_BLUE, alpha=0.35, linewidth=0)
    panel.stairs(values, edges, color=_BLUE, linewidth=1.4)
    top = float(np.max(values, initial=0.0))
    panel.set_ylim(min(0.0, float(values.min())), 1.15 * top if top > 0 else 1.0)
    if doses.unit:
        panel.locator_params(axis="y", nbins=3)
    else:
        panel.set_yticks([0, 1], ["no", "yes"])
    _name(panel, doses.name, doses.unit)
    _say(panel, f"given {np.mean(values > 0):.0%}\nof the time")


def _draw_clock(
    panel: Axes, times: NDArray[np.float64], events: Sequence[Event], time_unit: str
) -> None:
    from matplotlib.ticker import MultipleLocator

    shown = [*times[[0, -1]], *(event.time for event in events)]
    first, last = min(shown), max(shown)
    margin = 0.01 * (last - first) or 0.5
    panel.set_xlim(first - margin, last + margin)
    panel.set_xlabel(f"Time ({time_unit})")
    for distance in _TICKS.get(time_unit, ()):
        if (last - first) / distance <= _MOST_TICKS:
            panel.xaxis.set_major_locator(MultipleLocator(distance))
            break


def _name(panel: Axes, name: str, unit: str) -> None:
    text = f"{name} ({unit})" if unit else name
    panel.set_title(text, fontsize=SMALL + 0.5, color=INK, loc="left", pad=3)


def _say(panel: Axes, text: str) -> None:
    """At the right, beside the panel."""
    style: dict[str, Any] = {"fontsize": SMALL - 1, "color": GREY, "va": "center"}
    panel.text(1.01, 0.5, text, transform=panel.transAxes, **style)


def _range(low: float, high: float) -> str:
    if not math.isfinite(high):
        return f"from {low:g}"
    return f"{low:g}\N{EN DASH}{high:g}" if math.isfinite(low) else f"up to {high:g}"


def _check_time(time: ArrayLike) -> NDArray[np.float64]:
    times = np.asarray(time, float)
    if times.ndim != 1 or not times.size:
        raise ValueError(f"time has shape {times.shape}; it must be [T], with at least one time")
    if not np.isfinite(times).all():
        raise ValueError(f"time[{np.isfinite(times).argmin()}] is not finite; give every time")
    late = np.flatnonzero(np.diff(times) <= 0)
    if late.size:
        at = late[0] + 1
        raise ValueError(
            f"time[{at}] is {times[at]:g}, after {times[at - 1]:g}; times must increase"
        )
    return times


def _check_series(series: Series, times: NDArray[np.float64]) -> NDArray[np.float64]:
    name = f"series[{series.name!r}]"
    values = _check_values(name, series.values, times, may_be_missing=True)
    if series.is_logarithmic and np.nanmin(values, initial=np.inf) <= 0:
        raise ValueError(
            f"{name}.values has {np.nanmin(values):g}; a logarithmic axis takes positive values"
        )
    if series.normal is not None and not series.normal[0] < series.normal[1]:
        raise ValueError(f"{name}.normal is {series.normal}; low must be below high")
    return values


def _check_values(
    name: str, values: ArrayLike, times: NDArray[np.float64], *, may_be_missing: bool = False
) -> NDArray[np.float64]:
    array = np.asarray(values, float)
    if array.shape != times.shape:
        raise ValueError(
            f"{name}.values has shape {array.shape}; it must be {times.shape}, one a time"
        )
    wrong = np.isinf(array) | (np.isnan(array) & (not may_be_missing))
    if wrong.any():
        at = wrong.argmax()
        raise ValueError(f"{name}.values[{at}] is {array[at]}; it must be finite")
    return array
