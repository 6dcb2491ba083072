"""What the spectrum of a Markov chain says, in a table and in pictures.

    analysis = analyse(transition, initial, num_steps=60)
    show_chain(directory / "patient", "Patient chain", analysis, state_names)

In the style of `plotting`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxrl_llm.kernels import absorbing_chain, low_rank, markov_chain, spectral, stationary
from jaxrl_llm.kernels.fixed_point import Problem, average
from jaxrl_llm.training import report
from jaxrl_llm.training.plotting import COLORS, GREY, INK, SMALL, new_figure, save_figure
from jaxrl_llm.types import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_ENDS = 6
_MIXING = 0.25
_FOOTER = (
    "Relaxation time: -1 / ln of the largest modulus below 1. Mixing time: until the law of the\n"
    "state is within 1/4 of its long-run law in total variation, from the worst start."
)
_LOW_RANK = "What is left out: P - P_k, in the spectral norm. The bound holds for every state."
# Below this, a distance between laws in float64 is rounding.
_FLOOR = 1e-12


class ChainAnalysis(NamedTuple):
    """All that the kernels know of a chain.

    Attributes:
      structure: its classes and periods.
      spectrum: its eigenvalues.
      law: where it is in the long run, from `initial`.
      absorption: where and when it ends.
      mixing: its mixing time, to within 1/4.
      initial: `[S]`, the law of the first state.
      distances: `[T + 1]`, of the law of the state from its long-run law after 0 .. T steps.
    """

    structure: markov_chain.ChainStructure
    spectrum: spectral.Spectrum
    law: stationary.StationaryLaw
    absorption: absorbing_chain.Absorption
    mixing: spectral.MixingTime
    initial: Array
    distances: Array

    @property
    def rate(self) -> float:
        """The factor a step at which `distances` shrink in the end; 1 for a periodic chain."""
        return float(self.spectrum.subdominant) if self.law.converges else 1.0


@partial(jax.jit, static_argnames="num_steps")
def analyse(transition: Array, initial: Array, *, num_steps: int) -> ChainAnalysis:
    """Everything about a chain `[S, S]` that starts with the law `initial` `[S]`."""
    structure = markov_chain.structure(transition)
    law = stationary.stationary_law(transition, initial, structure)
    return ChainAnalysis(
        structure=structure,
        spectrum=spectral.spectrum(transition, structure),
        law=law,
        absorption=absorbing_chain.absorption(transition, structure),
        mixing=spectral.mixing_time(transition, _MIXING, limit=law.from_state),
        initial=initial,
        distances=spectral.distance_to_limit(transition, initial, num_steps, law.from_state),
    )


def measures(analysis: ChainAnalysis, state_names: Sequence[str]) -> dict[str, float]:
    """The numbers of an analysis by name; times in steps.

    Only those that exist: no time to absorption where nothing is left for ever, no mixing time of a
    chain that does not mix. A law of many states is left out.
    """
    structure, spectrum = analysis.structure, analysis.spectrum
    recurrent, law = np.asarray(structure.recurrent), np.asarray(analysis.law.law)
    found = {
        "second eigenvalue": float(spectrum.second),
        "spectral gap": float(spectrum.gap),
        "largest modulus below 1": float(spectrum.subdominant),
        "relaxation time": float(spectral.relaxation_time(spectrum.subdominant)),
    }
    if analysis.mixing.mixed:
        found["mixing time"] = float(analysis.mixing.steps)
    if not recurrent.all():
        initial, time = np.asarray(analysis.initial), np.asarray(analysis.absorption.time)
        found["time to absorption"] = float(initial @ time)
    is_end = np.sum(structure.same_recurrent, axis=1) == 1
    likely = np.flatnonzero(law > 0)
    if likely.size <= _MAX_ENDS:
        for state in likely.tolist():
            word = "absorbed in" if is_end[state] else "long run"
            found[f"{word} {state_names[state]}"] = float(law[state])
    return found


def show_chain(
    stem: Path,
    title: str,
    analysis: ChainAnalysis,
    state_names: Sequence[str],
    oracle: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The measures of a chain in a table, and its eigenvalues in a picture.

    Args:
      stem: of the picture's path.
      title: of the chain.
      analysis: of it.
      state_names: `S` names.
      oracle: what is known of some measures from elsewhere, printed beside them.

    Returns:
      The `measures`.
    """
    found, known = measures(analysis, state_names), oracle or {}
    rows = [
        (name, _number(value), f"{known[name]:.7g}" if name in known else "")
        for name, value in found.items()
    ]
    footer = f"{_verdict(analysis)}\n{_FOOTER}\n{report.RESEARCH_ONLY}"
    report.print_table(title, ("measure", "computed", "oracle"), rows, footer=footer)
    figure = eigenvalue_plane(
        analysis.spectrum, title=f"{title}: eigenvalues", footer=report.RESEARCH_ONLY
    )
    save_figure(figure, f"{stem}_eigenvalues.png")
    return found


def show_convergence(path: Path, analyses: Mapping[str, ChainAnalysis]) -> None:
    """Draws the distances of several chains from their long-run laws, by title."""
    figure = convergence_rate(
        {name: analysis.distances for name, analysis in analyses.items()},
        {name: analysis.rate for name, analysis in analyses.items()},
        title="Distance from the long run, and the rate that the spectrum predicts",
        footer=report.RESEARCH_ONLY,
    )
    save_figure(figure, path)


def show_low_rank(
    stem: Path, title: str, mdp: Problem, policy: Array, discount: float, ranks: Sequence[int]
) -> dict[int, float]:
    """What the value of a policy loses at each rank of its chain, in a table and a picture.

    Args:
      stem: of the picture's path.
      title: of the chain.
      mdp: the problem.
      policy: action probabilities `[S, A]`, or one action a state `[S]`.
      discount: of the value, below 1, in place of the problem's own.
      ranks: to try, each in [0, S].

    Returns:
      The largest error of the value by rank.
    """
    reward = jnp.where(mdp.terminal, 0, average(mdp.expected_reward(), policy))
    transition = jnp.where(mdp.terminal[:, None], 0, mdp.under(policy))
    identity = jnp.eye(len(transition), dtype=transition.dtype)
    value = jnp.linalg.solve(identity - discount * transition, reward)
    full, rows, errors = low_rank.low_rank(transition, len(transition)), [], {}
    for rank in ranks:
        part = full.truncate(rank)
        near = jnp.linalg.solve(identity - discount * part.matrix, reward)
        bound = low_rank.value_error_bound(part.matrix - transition, near, discount)
        errors[rank] = float(jnp.max(jnp.abs(near - value)))
        rows.append((rank, f"{part.spectral_error:.2e}", f"{errors[rank]:.2e}", f"{bound:.2e}"))
    columns = ("rank", "norm of what\nis left out", "worst error\nof a value", "its bound")
    footer = f"{_LOW_RANK}\n{report.RESEARCH_ONLY}"
    report.print_table(f"{title}: low rank", columns, rows, footer=footer)
    figure = low_rank_error(
        full.scale, errors, title=f"{title}: low rank", footer=report.RESEARCH_ONLY
    )
    save_figure(figure, f"{stem}_low_rank.png")
    return errors


def eigenvalue_plane(spectrum: spectral.Spectrum, *, title: str = "", footer: str = "") -> Figure:
    """The eigenvalues in the complex plane, in the unit circle that no chain's can leave.

    Those of modulus 1 are squares; a dashed circle passes through the largest ones inside, a
    diamond each: its radius is the rate at which the chain forgets its start.

    Args:
      spectrum: of one chain.
      title: of the picture.
      footer: a line below.
    """
    from matplotlib.patches import Circle

    values, num_unit = np.asarray(spectrum.eigenvalues, complex), int(spectrum.num_unit)
    radius = float(spectrum.subdominant)
    on_circle, inside = values[:num_unit], values[num_unit:]
    is_largest = np.isclose(np.abs(inside), radius, rtol=1e-6, atol=0)
    figure, axes = new_figure(5.2, 5.6, title, footer)
    axes.add_patch(Circle((0, 0), 1, fill=False, edgecolor=INK, linewidth=1.2))
    if radius > 0:
        style = {"edgecolor": COLORS[1], "linestyle": "--", "linewidth": 1.2}
        axes.add_patch(Circle((0, 0), radius, fill=False, **style))
    groups = (
        (inside[~is_largest], "o", COLORS[0], 26 if values.size < 50 else 9, "other eigenvalues"),
        (inside[is_largest], "D", COLORS[1], 38, f"largest below 1: modulus {radius:.4f}"),
        (on_circle, "s", INK, 42, f"{num_unit} of modulus 1"),
    )
    for points, mark, color, size, label in groups:
        if points.size:
            style = {"marker": mark, "linewidths": 0, "label": label, "zorder": 3}
            axes.scatter(np.real(points), np.imag(points), size, color, **style)
    axes.set_aspect("equal")
    axes.set_xlim(-1.12, 1.12)
    axes.set_ylim(-1.12, 1.12)
    axes.set_xlabel("Real part")
    axes.set_ylabel("Imaginary part")
    handles, labels = axes.get_legend_handles_labels()
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": 1}
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=SMALL, **place)
    return figure


def convergence_rate(
    distances: Mapping[str, ArrayLike],
    rates: Mapping[str, float],
    *,
    title: str = "",
    footer: str = "",
) -> Figure:
    """Measured distances from the long-run law on a logarithmic axis, beside the predicted rates.

    A prediction has the slope of its rate and meets the measurement at its last step that is above
    rounding: a straight line that the curve bends into.

    Args:
      distances: `[T + 1]` by name, after 0 .. T steps.
      rates: the factor a step that the eigenvalues predict, by the same names.
      title: of the picture.
      footer: a line below.

    Raises:
      ValueError: if there is nothing to draw, or the names differ.
    """
    if not distances:
        raise ValueError("distances is empty; name at least one chain")
    if set(distances) != set(rates):
        raise ValueError(f"rates has {sorted(rates)}; it must name {sorted(distances)}")
    figure, axes = new_figure(7.2, 4.4, title, footer)
    lowest = 1.0
    for (name, curve), color, mark in zip(distances.items(), cycle(COLORS), cycle("osD^vPX")):
        distance = np.asarray(curve, float)
        steps = np.flatnonzero(distance > _FLOOR)
        if not steps.size:
            continue
        lowest = min(lowest, distance[steps].min())
        label = rf"{name}: $|\lambda|$ = {rates[name]:.4f}"
        every = max(1, steps.size // 12)
        axes.plot(
            steps, distance[steps], mark, color=color, markersize=4.5, markevery=every, label=label
        )
        last = steps[-1]
        predicted = distance[last] * rates[name] ** (steps - last) if rates[name] > 0 else np.nan
        axes.plot(
            steps, np.broadcast_to(predicted, steps.shape), color=color, linewidth=1.1, label="_"
        )
    axes.set_yscale("log")
    axes.set_ylim(lowest / 3, 3)
    axes.set_xlabel("Step")
    axes.set_ylabel("Total-variation distance\nfrom the long-run law")
    axes.legend(frameon=False, fontsize=SMALL, loc="best", title="marks measured, lines predicted")
    axes.get_legend().get_title().set(fontsize=SMALL, color=GREY)
    return figure


def low_rank_error(
    scale: ArrayLike,
    value_errors: Mapping[int, float] | None = None,
    *,
    title: str = "",
    footer: str = "",
) -> Figure:
    """What is lost at each rank: norms of the matrix left out, and the error of a value.

    Args:
      scale: `[R]`, all singular values, decreasing.
      value_errors: the largest error of a value by rank, where it was computed.
      title: of the picture.
      footer: a line below.

    Raises:
      ValueError: if `scale` is not `[R]`, decreasing.
    """
    values = np.asarray(scale, float)
    if values.ndim != 1 or np.any(np.diff(values) > 0):
        raise ValueError(f"scale has shape {values.shape}; it must be [R], decreasing")
    frobenius = np.sqrt(np.cumsum(np.square(values[::-1]))[::-1])
    ranks = np.arange(values.size)
    figure, axes = new_figure(6.8, 4.2, title, footer)
    spectral_name = r"$\|P - P_k\|_2 = \sigma_{k+1}$"
    axes.plot(ranks, values, color=COLORS[0], linewidth=1.8, label=spectral_name)
    axes.plot(ranks, frobenius, "--", color=COLORS[1], linewidth=1.8, label=r"$\|P - P_k\|_F$")
    if value_errors:
        points = np.array(sorted(value_errors.items()))
        axes.plot(*points.T, "D", color=COLORS[2], markersize=5, label="worst error of a value")
    positive = values[values > _FLOOR]
    axes.set_yscale("log")
    if positive.size:
        axes.set_ylim(positive.min() / 3, frobenius[0] * 3)
    axes.set_xlabel("Rank k")
    axes.set_ylabel("What rank k loses")
    axes.legend(frameon=False, fontsize=SMALL, loc="best")
    return figure


def _number(value: float) -> str:
    return f"{value:.6f}".removesuffix(".000000")


def _verdict(analysis: ChainAnalysis) -> str:
    """One sentence: where does the chain end from its start, and does its law settle there?"""
    entered = np.asarray(analysis.structure.leads_class) & (np.asarray(analysis.law.law) > 0)
    period = math.lcm(*np.asarray(analysis.structure.period)[entered].tolist())
    number = np.sum(entered)
    ends = "One recurrent class" if number == 1 else f"{number} recurrent classes to end in"
    settles = "converges" if period == 1 else f"goes on cycling, with period {period}"
    return f"{ends}; the law of the state {settles}."
