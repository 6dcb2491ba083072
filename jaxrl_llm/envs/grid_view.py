"""A policy or the values of a grid problem as plain text."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxrl_llm import checks
from jaxrl_llm.envs.grid_layout import Layout

_ARROWS = {"Up": "^", "Down": "v", "Left": "<", "Right": ">"}
_LEGEND = {"S": "start", "G": "goal", "#": "obstacle", "X": "hazard"}


def ascii_policy(policy: ArrayLike, layout: Layout) -> str:
    """An arrow a cell, and below it what the signs mean.

    Args:
      policy: one action a state `[S]` (integers), or action probabilities `[S, A]`, of which the
        most probable is shown.
      layout: of the problem; it knows the order of the actions.

    Raises:
      ValueError: if the policy is not of that grid.

    >>> from jaxrl_llm.envs import grid_world
    >>> from jaxrl_llm.kernels import bellman
    >>> obstacles = ((0, 2), (2, 1))
    >>> solution = bellman.value_iteration(grid_world.mdp(size=4, obstacles=obstacles))
    >>> print(ascii_policy(solution.policy, grid_world.layout(size=4, obstacles=obstacles)))
    Sv v # v
     v > v v
     v # v v
     > > > G
    <BLANKLINE>
    ^ v < > move   S start   G goal   # obstacle
    """
    law = checks.action_probabilities(policy, layout.num_states, len(layout.action_names))
    arrows = np.array([_ARROWS[name] for name in layout.action_names])[law.argmax(axis=1)]
    return _table(arrows, layout, f"{' '.join(_ARROWS.values())} move")


def ascii_values(value: ArrayLike, layout: Layout, *, decimals: int = 1) -> str:
    """A number a cell, and below it what the signs mean.

    Args:
      value: `[S]`.
      layout: of the problem.
      decimals: of the numbers.

    Raises:
      ValueError: if the values are not of that grid.

    >>> from jaxrl_llm.envs import cliff_walking
    >>> from jaxrl_llm.kernels import bellman
    >>> value = bellman.value_iteration(cliff_walking.mdp()).value
    >>> print(ascii_values(value, cliff_walking.LAYOUT, decimals=0))
     -14 -13 -12 -11 -10  -9  -8  -7  -6  -5  -4  -3
     -13 -12 -11 -10  -9  -8  -7  -6  -5  -4  -3  -2
     -12 -11 -10  -9  -8  -7  -6  -5  -4  -3  -2  -1
    S-13   X   X   X   X   X   X   X   X   X   X   G
    <BLANKLINE>
    S start   G goal   X hazard
    """
    numbers = np.asarray(value, float)
    if numbers.shape != (layout.num_states,):
        raise ValueError(f"value has shape {numbers.shape}; it must be ({layout.num_states},)")
    # Adding 0 turns a negative zero into a positive one.
    texts = [f"{round(number, decimals) + 0.0:.{decimals}f}" for number in numbers.tolist()]
    return _table(np.array(texts), layout, "")


def _table(texts: NDArray[np.str_], layout: Layout, meaning: str) -> str:
    marks = {"G": layout.goals, "#": layout.obstacles, "X": layout.hazards}
    cells = texts.astype(object)
    for mark, places in marks.items():
        cells[layout.at(*places)] = mark
    width = max(map(len, cells)) + 1
    cells = np.array([cell.rjust(width) for cell in cells], object)
    start = layout.state(layout.start)
    cells[start] = "S" + cells[start][1:]
    shown = ["S", *(mark for mark, places in marks.items() if places)]
    legend = [f"{mark} {name}" for mark, name in _LEGEND.items() if mark in shown]
    lines = ["".join(row).rstrip() for row in cells.reshape(layout.rows, layout.columns)]
    return "\n".join([*lines, "", "   ".join([meaning, *legend]).strip()])
