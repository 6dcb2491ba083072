"""What a run found, beside what is true: tables on the terminal, and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxrl_llm.training import plotting
from jaxrl_llm.training.evaluate import NUM_RESIDUALS, SolverRun
from jaxrl_llm.types import MDP, Array, Solution, SuccessorMDP

_ITERATIONS = "Iterations are sweeps or improvements, 0 if the first policy is already optimal."
_PLAN = "Value: expected discounted reward from here on. Gap: what the second-best action loses."
_MAX_ROWS = 50
_UNLIMITED = 10_000  # characters
RESEARCH_ONLY = "Research only, not for clinical use."


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, footer: str = ""
) -> None:
    """Prints a table to stdout; columns of numbers are aligned to the right.

    On a pipe it is as wide as it needs to be, so that nothing is cut off in a log.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = [list(map(str, row)) for row in rows]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        is_numeric = all(_is_number(row[index]) for row in rows)
        table.add_column(column, justify="right" if is_numeric else "left")
    for row in rows:
        table.add_row(*row)
    width = None if Console().is_terminal else _UNLIMITED
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    console.print()
    if title:
        console.print(title, style="bold")
    console.print(table)
    if footer:
        console.print(f"\n{footer}", style="dim")


def show_solvers(
    stem: Path, title: str, mdp: MDP | SuccessorMDP, runs: Mapping[str, SolverRun]
) -> None:
    """What each solver found and what that took, in a table and a picture.

    Args:
      stem: of the picture's path.
      title: of the problem.
      mdp: the problem.
      runs: of its solvers, by name.
    """
    columns = ("solver", "value", "iterations", "residual", "converged", "solve\nms", "compile\ns")
    formats = ("{:.4f}", "{}", "{:.1e}", "{}", "{:.2f}", "{:.2f}")
    rows = []
    for solver, run in runs.items():
        metrics = run.metrics() | {"converged": "yes" if run.solution.converged else "NO"}
        cells = zip(formats, metrics.values(), strict=True)
        rows.append((_words(solver), *(text.format(value) for text, value in cells)))
    footer = f"{agreement(runs)}\n{_ITERATIONS}\n{RESEARCH_ONLY}"
    print_table(f"{title}: what each solver found", columns, rows, footer=footer)
    figure = plotting.convergence(
        {_words(solver): run.history() for solver, run in runs.items()},
        rate=float(mdp.discount) if mdp.discount < 1 else None,
        title=f"{title}: how fast each solver converges",
        xlabel=f"Iteration, the first {NUM_RESIDUALS}",
        footer=RESEARCH_ONLY,
    )
    plotting.save_figure(figure, f"{stem}_convergence.png")


def agreement(runs: Mapping[str, SolverRun]) -> str:
    """One sentence: do all solvers choose the same actions, and how far apart are their values?"""
    policies = np.stack([run.solution.policy for run in runs.values()])
    values = np.stack([run.solution.value for run in runs.values()])
    distance = f"values differ by at most {np.ptp(values, axis=0).max():.1e}"
    num_different = int(np.any(policies != policies[0], axis=0).sum())
    if not num_different:
        return f"All {len(runs)} solvers choose the same action in every state; {distance}."
    q = np.asarray(min(runs.values(), key=lambda run: run.solution.residual).solution.q)
    worth = np.ptp(np.take_along_axis(q, policies.T, axis=1), axis=1).max()
    return (
        f"The solvers choose DIFFERENT actions in {num_different} of {values.shape[1]} states, "
        f"which differ by at most {worth:.1e} in value; {distance}."
    )


def gap_to_second_best(
    q: NDArray[np.floating], action_mask: NDArray[np.bool_]
) -> NDArray[np.floating]:
    """What the second-best allowed action loses `[S]`; infinite where only one is allowed.

    Args:
      q: `[S, A]`.
      action_mask: `[S, A]`.
    """
    allowed = np.where(action_mask, q, -np.inf)
    ordered = np.sort(np.pad(allowed, ((0, 0), (1, 0)), constant_values=-np.inf), axis=1)
    return ordered[:, -1] - ordered[:, -2]


def show_plan(
    stem: Path,
    title: str,
    mdp: MDP | SuccessorMDP,
    solution: Solution,
    state_names: Sequence[str],
    action_names: Sequence[str],
    *,
    value_name: str = "value",
) -> None:
    """What to do in each state and by what margin, in a table and a picture.

    A problem of many states has no table; a state with one allowed action has no margin.

    Args:
      stem: of the picture's path.
      title: of the problem.
      mdp: the problem.
      solution: of it, NumPy arrays.
      state_names: `S` names.
      action_names: `A` names.
      value_name: what a value is.
    """
    is_small = mdp.num_states <= _MAX_ROWS
    figure = plotting.policy_heatmap(
        solution.policy,
        state_names,
        action_names,
        value=solution.q if is_small else solution.value,
        title=f"{title}: " + (f"{value_name} of each action" if is_small else "best action"),
        value_name=value_name,
        footer=RESEARCH_ONLY,
    )
    plotting.save_figure(figure, f"{stem}_policy.png")
    if not is_small:
        return
    gaps = gap_to_second_best(np.asarray(solution.q), np.asarray(mdp.action_mask))
    rows = [
        (
            state_name,
            action_names[int(solution.policy[state])],
            f"{solution.value[state]:.3f}",
            f"{gaps[state]:.3f}" if np.isfinite(gaps[state]) else "",
        )
        for state, state_name in enumerate(state_names)
    ]
    columns = ("state", "best action", value_name, "gap to\nsecond best")
    footer = f"{_PLAN}\n{RESEARCH_ONLY}"
    print_table(f"{title}: what to do", columns, rows, footer=footer)


def show_learning(
    path: Path,
    title: str,
    references: Mapping[str, float | Array],
    learned: Mapping[str, NDArray[np.floating]],
    curve: tuple[NDArray[np.integer], NDArray[np.floating]],
    *,
    value_name: str,
) -> None:
    """What was learned beside what is known, in a table and a learning curve.

    Args:
      path: of the picture.
      title: of both.
      references: exact values to compare with, by name.
      learned: the final value of each seed `[seeds]`, by name.
      curve: environment steps `[T]` and values `[seeds, T]`.
      value_name: what a value is.
    """
    levels = {name: float(value) for name, value in references.items()}
    rows = [(name, f"{level:.4f}", "", "") for name, level in levels.items()]
    for name, values in learned.items():
        mean, deviation, worst = values.mean(), values.std(), values.min()
        rows.append((name, f"{mean:.4f}", f"{deviation:.4f}", f"{worst:.4f}"))
    num_seeds = len(next(iter(learned.values())))
    columns = ("policy", value_name, f"± over\n{num_seeds} seeds", "worst\nseed")
    print_table(title, columns, rows, footer=RESEARCH_ONLY)
    figure = plotting.learning_curve(
        *curve, references=levels, title=title, ylabel=value_name, footer=RESEARCH_ONLY
    )
    plotting.save_figure(figure, path)


def show_methods(
    title: str, measures: Mapping[str, Mapping[str, tuple[float, float, float]]], footer: str
) -> None:
    """What each method reached, one line a method: `(value, low, high)` by measure."""
    names = list(next(iter(measures.values())))
    rows = [
        (method, *(_with_interval(*found[name]) for name in names))
        for method, found in measures.items()
    ]
    print_table(title, ("method", *map(_words, names)), rows, footer=footer)


def show_change(
    title: str,
    before: Mapping[str, tuple[float, float, float]],
    after: Mapping[str, tuple[float, float, float]],
    *,
    footer: str,
) -> None:
    """What training changed, one line a measure: `(value, low, high)` of its 95 % interval.

    A measure that is known without error has itself for both ends.
    """
    rows = [
        (_words(name), _with_interval(*before[name]), _with_interval(*after[name]))
        for name in before
    ]
    print_table(title, ("measure", "before", "after"), rows, footer=footer)


def show_samples(title: str, samples: Iterable[Mapping[str, str]]) -> None:
    """Texts side by side, each wrapped under its label."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(f"\n{title}", style="bold")
    for sample in samples:
        console.print()
        for label, text in sample.items():
            console.print(Text(label, style="bold"))
            console.print(Padding(Text(text), (0, 0, 0, 2)))


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f}" if low == high else f"{value:.3f} ({low:.3f} to {high:.3f})"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _is_number(cell: str) -> bool:
    return cell[:1] in "+-.0123456789"  # an empty cell is a missing number
