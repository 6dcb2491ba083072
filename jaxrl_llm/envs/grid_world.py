"""A square grid world: walk around obstacles to a goal, on ground that may be slippery.

Reaching a goal pays 10 and ends the episode; a move against a wall or an obstacle costs 1 and leads
nowhere; every other move costs .1. The state of cell (row, column) is row · size + column.

Source: the grid world of study guides on reinforcement learning; its rewards, and discount .95.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxrl_llm import checks
from jaxrl_llm.envs import tabular
from jaxrl_llm.envs.grid_layout import Cell, Layout, walk
from jaxrl_llm.types import Environment, SuccessorMDP

GOAL_REWARD, STEP_REWARD, BUMP_REWARD = 10.0, -0.1, -1.0

action_names = ("Up", "Down", "Left", "Right")


def state_names(*, size: int = 5) -> tuple[str, ...]:
    """Such as `row 0, column 3`, `size`² of them."""
    return layout(size=size).state_names


def layout(
    *,
    size: int = 5,
    start: Cell = (0, 0),
    goals: Sequence[Cell] | None = None,
    obstacles: Sequence[Cell] = (),
) -> Layout:
    """Where everything is.

    Args:
      size: rows, and columns; at least 2.
      start: (row, column), counted from 0 at the top left.
      goals: cells; the bottom right one when None.
      obstacles: cells that cannot be entered.

    Raises:
      ValueError: for a cell outside of the grid, or one that is two things.
    """
    checks.at_least("size", size, 2)
    return Layout(
        rows=size,
        columns=size,
        start=start,
        goals=((size - 1, size - 1),) if goals is None else tuple(goals),
        obstacles=tuple(obstacles),
        action_names=action_names,
    )


def mdp(
    *,
    size: int = 5,
    start: Cell = (0, 0),
    goals: Sequence[Cell] | None = None,
    obstacles: Sequence[Cell] = (),
    slip: float = 0.0,
    discount: float = 0.95,
) -> SuccessorMDP:
    """The problem, size² states × 4 moves, by lists of successors: a size of 1000 fits in memory.

    Args:
      size, start, goals, obstacles: as in `layout`.
      slip: the probability of going at a right angle to the move, in [0, 1].
      discount: in [0, 1]; 1 only where every free cell has a way to a goal.

    Raises:
      ValueError: naming the argument, its value and the remedy.

    >>> from jaxrl_llm.kernels import bellman
    >>> value = bellman.value_iteration(mdp(size=2)).value
    >>> [round(number, 3) for number in value.tolist()]  # -.1 + .95 · 10 from the start
    [9.4, 10.0, 10.0, 0.0]
    """
    grid = layout(size=size, start=start, goals=goals, obstacles=obstacles)
    target = grid.neighbours()
    stays = target == np.arange(grid.num_states)[:, None]
    arrival = np.where(grid.at(*grid.goals), GOAL_REWARD, STEP_REWARD)
    reward = np.where(stays, BUMP_REWARD, arrival[target])
    return walk(grid, target, reward, slip=slip, discount=discount)


def make(
    *,
    size: int = 5,
    start: Cell = (0, 0),
    goals: Sequence[Cell] | None = None,
    obstacles: Sequence[Cell] = (),
    slip: float = 0.0,
    max_steps: int | None = 100,
) -> Environment:
    """The problem as an environment, truncated after `max_steps` moves; never when None."""
    problem = mdp(size=size, start=start, goals=goals, obstacles=obstacles, slip=slip)
    return tabular.make(problem, name="grid_world", max_steps=max_steps)
