"""What a sweep found: its ranking as a table, with the winner to copy, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jaxrl_llm.training import report
from jaxrl_llm.training.plotting import COLORS, GREY, INK, SMALL, new_figure, save_figure
from jaxrl_llm.training.sweep import Ranking

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_ROWS = 10
_WIDE = 20.0  # ratio of the largest value to the least, from which an axis is logarithmic
_BEST, _DIVERGED = "\N{BLACK STAR}", "\N{MULTIPLICATION SIGN}"


def show(
    path: Path,
    title: str,
    ranking: Ranking,
    *,
    references: Mapping[str, float] | None = None,
    score_name: str = "score",
    prefix: str = "",
) -> None:
    """The ranking in a table, which ends with the best point as flags, and in a picture.

    Args:
      path: of the picture.
      title: of both.
      ranking: of the sweep.
      references: scores to compare with, such as the optimum, by name.
      score_name: what a score is.
      prefix: of the flags, such as `ppo`.
    """
    print_ranking(title, ranking, references=references, score_name=score_name, prefix=prefix)
    save_figure(draw(title, ranking, references=references, score_name=score_name), path)


def print_ranking(
    title: str,
    ranking: Ranking,
    *,
    references: Mapping[str, float] | None = None,
    score_name: str = "score",
    prefix: str = "",
) -> None:
    """The table alone; the arguments are those of `show`. Many points show the best and worst."""
    num_points, num_seeds = ranking.score.shape
    order = ranking.order.tolist()
    ranks = list(range(num_points))
    if num_points > _MOST_ROWS + 1:
        ranks = [*ranks[:_MOST_ROWS], num_points - 1]
    rows = [
        [name, *[""] * len(ranking.points), f"{level:.4f}", "", "", ""]
        for name, level in (references or {}).items()
    ]
    for rank in ranks:
        index = order[rank]
        values = [f"{value:g}" for value in ranking.point(index).values()]
        numbers = ranking.mean[index], ranking.standard_error[index], _worst(ranking.score[index])
        cells = [f"{number:.4f}" if np.isfinite(number) else "" for number in numbers]
        diverged = int(ranking.num_diverged[index])
        rows.append([str(rank + 1), *values, *cells, str(diverged) if diverged else ""])
    names = [name.replace("_", "\n", 1).replace("_", " ") for name in ranking.points]
    columns = ("rank", *names, score_name, f"± over\n{num_seeds} seeds", "worst\nseed", "diverged")
    flags = f"Best: {ranking.flags(order[0], prefix)}"
    report.print_table(title, columns, rows, footer=f"{flags}\n{report.RESEARCH_ONLY}")


def draw(
    title: str,
    ranking: Ranking,
    *,
    references: Mapping[str, float] | None = None,
    score_name: str = "score",
) -> Figure:
    """Two hyper-parameters on a grid as a map of mean scores; else a panel each, a dot a point."""
    names = list(ranking.points)
    axes_values = [np.unique(column) for column in ranking.points.values()]
    if len(names) == 2 and axes_values[0].size * axes_values[1].size == len(ranking.mean):
        return _draw_map(title, ranking, axes_values, references or {}, score_name)
    return _draw_panels(title, ranking, references or {}, score_name)


def _draw_map(
    title: str,
    ranking: Ranking,
    values: list[NDArray[np.float32]],
    references: Mapping[str, float],
    score_name: str,
) -> Figure:
    """Rows and columns are the values of the first and second name, ascending."""
    names, columns = list(ranking.points), list(ranking.points.values())
    shape = values[0].size, values[1].size
    row, column = (np.searchsorted(v, c) for v, c in zip(values, columns, strict=True))
    mean = np.full(shape, np.nan)
    mean[row, column] = ranking.mean
    width, height = 0.72 * shape[1] + 2.6, 0.42 * shape[0] + 1.7
    legend = [f"{name} {level:.4g}" for name, level in references.items()] + [f"{_BEST} best"]
    legend += [f"{_DIVERGED} diverged"] if np.isnan(mean).any() else []
    footer = f"{', '.join(legend)}. {report.RESEARCH_ONLY}"
    figure, axes = new_figure(max(width, 4.6), height, title, footer)
    image = axes.imshow(mean, cmap="cividis", aspect="auto", origin="lower")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_yticks(range(shape[0]), [f"{value:g}" for value in values[0]])
    axes.set_xticks(range(shape[1]), [f"{value:g}" for value in values[1]])
    axes.tick_params(length=0)
    axes.set_ylabel(names[0].replace("_", " ").capitalize())
    axes.set_xlabel(names[1].replace("_", " ").capitalize())
    largest = float(np.nanmax(np.abs(mean)))
    decimals = 2 if largest < 10 else 1 if largest < 1_000 else 0
    best = int(ranking.order[0])
    for index, (at, across) in enumerate(zip(row, column, strict=True)):
        number = ranking.mean[index]
        text = f"{number:.{decimals}f}" if np.isfinite(number) else _DIVERGED
        # The upper half of the colours is light.
        shade = image.norm(number) if np.isfinite(number) else 1.0
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SMALL}
        style["color"] = "white" if shade < 0.5 else "black"
        if index == best:
            text, style["fontweight"] = f"{_BEST}{text}", "bold"
        axes.text(across, at, text, **style)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=14, pad=0.02)
    bar.set_label(f"{score_name}, mean over {ranking.score.shape[1]} seeds", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL, color=GREY)
    bar.outline.set_visible(False)
    return figure


def _draw_panels(
    title: str, ranking: Ranking, references: Mapping[str, float], score_name: str
) -> Figure:
    """The score beside the values of one hyper-parameter each; the best point is a star."""
    num_panels = len(ranking.points)
    figure, *panels = new_figure(
        max(3.1 * num_panels, 5.2), 3.6, title, report.RESEARCH_ONLY, [1.0] * num_panels
    )
    for panel, (name, column) in zip(panels, ranking.points.items(), strict=True):
        _draw_dots(panel, ranking, column, joined=num_panels == 1)
        panel.set_xlabel(name.replace("_", " ").capitalize())
        for level in references.values():
            panel.axhline(level, color=INK, linewidth=1.0, linestyle=":")
        if panel is not panels[0]:
            panel.sharey(panels[0])
            panel.tick_params(labelleft=False)
    for name, level in references.items():
        style: dict[str, Any] = {"fontsize": SMALL, "color": INK, "va": "center"}
        place = {"xycoords": panels[-1].get_yaxis_transform(), "annotation_clip": False}
        panels[-1].annotate(f"{name} {level:.4g}", (1.02, level), **place, **style)
    panels[0].set_ylabel(score_name)
    return figure


def _draw_dots(panel: Axes, ranking: Ranking, column: NDArray[np.float32], joined: bool) -> None:
    order, best = np.argsort(column, kind="stable"), int(ranking.order[0])
    style: dict[str, Any] = {"color": COLORS[0], "markersize": 5, "linewidth": 1.4}
    style["linestyle"] = "-" if joined else "none"
    error = np.nan_to_num(ranking.standard_error[order])
    panel.errorbar(
        column[order], ranking.mean[order], error, marker="o", elinewidth=0.9, alpha=0.75, **style
    )
    panel.plot(column[best], ranking.mean[best], "*", color=COLORS[1], markersize=14, zorder=4)
    lost = column[~np.isfinite(ranking.mean)]
    foot: dict[str, Any] = {"transform": panel.get_xaxis_transform(), "clip_on": False}
    panel.plot(lost, np.full(lost.size, 0.03), "x", color=GREY, markersize=6, **foot)
    positive = column[column > 0]
    if positive.size and positive.max() / positive.min() >= _WIDE:
        # A value of 0, such as no bonus at all, has its place left of the smallest.
        panel.set_xscale("symlog", linthresh=float(positive.min()), linscale=0.4)


def _worst(scores: NDArray[np.float64]) -> float:
    return float(np.min(scores, initial=np.inf, where=np.isfinite(scores)))
