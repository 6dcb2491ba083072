"""What bandit strategies lose to the best arm: a table beside what is exact, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from jaxrl_llm.envs.bandits import Bandit
from jaxrl_llm.kernels import bandits
from jaxrl_llm.training import plotting, report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_NORMAL_95 = 1.96
_COLUMNS = ("strategy", "expected reward\nlost", "standard\nerror", "exact", "z")


def show(
    title: str,
    problem: Bandit,
    regret: Mapping[str, ArrayLike],
    exact: Mapping[str, ArrayLike] | None = None,
) -> dict[str, float]:
    """Prints what each strategy lost in all rounds, beside what is known without playing.

    Args:
      title: of the problem.
      problem: what was played.
      regret: by strategy, `[runs, T]`.
      exact: by strategy, `[T]`, its expectation.

    Returns:
      The mean of each strategy, its standard error and what is exact, by name.
    """
    known = {
        "random arms": problem.uniform_regret,
        "the best fixed arm": problem.fixed_regret,
    }
    rows: list[Sequence[str]] = [
        (name, "", "", f"{float(value):.2f}", "") for name, value in known.items()
    ]
    result = {f"{title}/{name}/exact": float(value) for name, value in known.items()}
    for name, runs in regret.items():
        final = np.asarray(runs, float)[:, -1]
        mean, error = final.mean(), final.std(ddof=1) / np.sqrt(final.size)
        against = ["", ""]
        result |= {f"{title}/{name}/mean": mean, f"{title}/{name}/standard_error": error}
        if exact and name in exact:
            expected = float(np.asarray(exact[name])[-1])
            against = [f"{expected:.2f}", f"{(mean - expected) / error:+.1f}"]
            result[f"{title}/{name}/exact"] = expected
        rows.append((name, f"{mean:.2f}", f"{error:.2f}", *against))
    footer = f"{problem.horizon} rounds. {_bounds(problem)}{report.RESEARCH_ONLY}"
    num_columns = len(_COLUMNS) - (not exact)
    report.print_table(
        title, _COLUMNS[:num_columns], [row[:num_columns] for row in rows], footer=footer
    )
    return result


def _bounds(problem: Bandit) -> str:
    """What theory promises where the arms are Bernoulli and do not change."""
    means = problem.expected_reward
    if problem.noise != "bernoulli" or bool((means != means[:1]).any()):
        return ""
    horizon, num_arms = problem.horizon, problem.num_arms
    slope = float(bandits.lai_robbins_slope(means[0])) * np.log(horizon)
    return (
        f"Lai and Robbins: about {slope:.1f} for the best strategy in the long run.\n"
        f"Guaranteed: UCB1 below {float(bandits.ucb1_bound(means[0], horizon)):.0f}, "
        f"EXP3 below {bandits.exp3_bound(num_arms, horizon):.0f}. "
    )


def regret_curves(
    regret: Mapping[str, Mapping[str, ArrayLike]],
    exact: Mapping[str, Mapping[str, ArrayLike]] | None = None,
    *,
    title: str = "What strategies lose to the best arm",
    footer: str = f"Bands: 95 % interval of the mean over runs. {report.RESEARCH_ONLY}",
) -> Figure:
    """Mean cumulative pseudo-regret, a panel a problem and a line a strategy.

    Lines keep their colour and mark from panel to panel.

    Args:
      regret: by problem and strategy, `[runs, T]`; the band is the 95 % interval of the mean.
      exact: by problem and strategy, `[T]`, dotted over the simulated line.
      title: of the picture.
      footer: a line below.

    Raises:
      ValueError: if a strategy's regret is not `[runs, T]`.
    """
    names = list(dict.fromkeys(name for curves in regret.values() for name in curves))
    styles = dict(
        zip(names, zip(cycle(plotting.COLORS), cycle(_MARKS), strict=False), strict=False)
    )
    width = 3.3 * len(regret) + 1.8
    figure, *panels = plotting.new_figure(width, 3.8, title, footer, (1,) * len(regret))
    for axes, (problem, curves) in zip(panels, regret.items(), strict=True):
        for name, runs in curves.items():
            values = np.asarray(runs, float)
            if values.ndim != 2 or not values.size:
                where = f"regret[{problem!r}][{name!r}]"
                raise ValueError(f"{where} has shape {values.shape}; it must be [runs, rounds]")
            color, mark = styles[name]
            rounds = np.arange(1, values.shape[1] + 1)
            mean = values.mean(axis=0)
            margin = _NORMAL_95 * values.std(axis=0) / np.sqrt(len(values))
            axes.fill_between(
                rounds, mean - margin, mean + margin, color=color, alpha=0.2, linewidth=0
            )
            places = np.unique(np.geomspace(1, rounds.size, 8).astype(int)) - 1
            axes.plot(
                rounds, mean, color=color, linewidth=1.8, marker=mark, markersize=4.5,
                markevery=[int(place) for place in places], label=name,
            )  # fmt: skip
            line = (exact or {}).get(problem, {}).get(name)
            if line is not None:
                axes.plot(rounds, np.asarray(line), ":", color=plotting.INK, linewidth=1.4)
        axes.set_xscale("log")
        axes.set_title(problem, fontsize=plotting.SMALL + 1, loc="left")
        axes.set_xlabel("Round")
    if exact:
        panels[0].plot([], [], ":", color=plotting.INK, label="exact expectation")
    panels[0].set_ylabel("Expected reward lost so far")
    handles = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside right upper", frameon=False,
        fontsize=plotting.SMALL,
    )  # fmt: skip
    return figure
