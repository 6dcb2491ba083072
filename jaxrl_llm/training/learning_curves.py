"""Several learners side by side: the mean over seeds with its interval, a panel a problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from jaxrl_llm.training.plotting import COLORS, INK, SMALL, new_figure, save_figure, spread
from jaxrl_llm.training.report import RESEARCH_ONLY
from jaxrl_llm.training.table_learning import Learned

_DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Panel:
    """What one problem shows.

    Attributes:
      title: of the panel.
      curves: what each kind of learner learned, by name.
      references: levels drawn across, by name.
      xlabel: what a time is.
      ylabel: what a value is.
      bottom: the least value shown; all are when None.
    """

    title: str
    curves: Mapping[str, Learned]
    references: Mapping[str, float]
    xlabel: str
    ylabel: str
    bottom: float | None = None


def save(panels: Sequence[Panel], path: Path, title: str) -> None:
    """Draws a panel a problem and a line a learner: the mean over seeds and its 95 % interval.

    Raises:
      ValueError: if there is no panel.
    """
    if not panels:
        raise ValueError("panels is empty; give at least one")
    from matplotlib.ticker import EngFormatter

    figure, *axes = new_figure(6.0 * len(panels), 4.2, title, RESEARCH_ONLY, [1.0] * len(panels))
    for place, panel in zip(axes, panels, strict=True):
        styles = zip(cycle(COLORS), cycle(_DASHES), strict=False)
        for (name, curve), (color, dashes) in zip(panel.curves.items(), styles, strict=False):
            times = curve.time
            mean = curve.value.mean(axis=0)
            margin = 1.96 * curve.value.std(axis=0) / np.sqrt(len(curve.value))
            place.fill_between(
                times, mean - margin, mean + margin, color=color, alpha=0.18, linewidth=0
            )
            place.plot(times, mean, dashes, color=color, linewidth=1.8, label=name)
        place.set_title(panel.title, fontsize=SMALL + 1.5, loc="left")
        place.set_xlabel(panel.xlabel)
        place.set_ylabel(panel.ylabel)
        place.xaxis.set_major_formatter(EngFormatter(sep=""))
        place.margins(x=0.0, y=0.1)
        for level in panel.references.values():
            place.axhline(level, color=INK, linewidth=1.0, linestyle=":")
        place.set_ylim(bottom=panel.bottom)
        bottom, top = place.get_ylim()
        levels = sorted(panel.references.items(), key=lambda item: item[1])
        heights = spread([(level - bottom) / (top - bottom) for _, level in levels], 0.05)
        for (name, level), height in zip(levels, heights, strict=True):
            where = {"xycoords": "axes fraction", "va": "center", "fontsize": SMALL, "color": INK}
            place.annotate(f"{name} {level:.4g}", (1.01, height), **where)
        place.legend(
            frameon=False, fontsize=SMALL, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4
        )
    save_figure(figure, path)
