"""The cells of a grid problem and how one moves between them; shared by every grid and its views.

The state of cell (row, column) is row · columns + column, counted from the top left. A cell that is
never left is a state too, so that values and policies keep the shape of the grid: it is terminal,
and its value 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxrl_llm import checks
from jaxrl_llm.types import SuccessorMDP

Cell = tuple[int, int]

# Row and column change by these; +row is down.
STEPS = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything is on a grid. One that exists is consistent.

    Raises:
      ValueError: no cells, no goal, a cell outside of the grid, a cell that is two things, or
        actions that are not the four moves.
    """

    rows: int
    """At least 1."""
    columns: int
    """At least 1."""
    start: Cell
    """Where an episode begins, (row, column)."""
    goals: tuple[Cell, ...]
    """Where it ends; at least one."""
    obstacles: tuple[Cell, ...] = ()
    """Cells that nobody enters."""
    hazards: tuple[Cell, ...] = ()
    """Cells that nobody leaves on foot: holes, a cliff."""
    action_names: tuple[str, ...] = ("Up", "Down", "Left", "Right")
    """The four moves, in the order of the actions."""

    def __post_init__(self) -> None:
        checks.at_least("rows", self.rows, 1)
        checks.at_least("columns", self.columns, 1)
        if sorted(self.action_names) != sorted(STEPS):
            raise ValueError(
                f"action_names is {self.action_names}; it must be {tuple(STEPS)} in some order"
            )
        checks.not_empty("goals", self.goals)
        seen: dict[Cell, str] = {}
        for name in ("goals", "obstacles", "hazards"):
            for index, cell in enumerate(getattr(self, name)):
                self._place(f"{name}[{index}]", cell, seen)
        self._place("start", self.start, seen)

    def _place(self, name: str, cell: Cell, seen: dict[Cell, str]) -> None:
        inside = len(cell) == 2 and 0 <= cell[0] < self.rows and 0 <= cell[1] < self.columns
        if not inside:
            raise ValueError(
                f"{name} is {cell}; it must be a (row, column) of a grid of "
                f"{self.rows} x {self.columns} cells, counted from 0"
            )
        if cell in seen:
            raise ValueError(f"{name} is {cell}, and so is {seen[cell]}; a cell is one thing")
        seen[cell] = name

    @property
    def num_states(self) -> int:
        return self.rows * self.columns

    @property
    def state_names(self) -> tuple[str, ...]:
        """Such as `row 0, column 3`."""
        return tuple(
            f"row {row}, column {column}"
            for row in range(self.rows)
            for column in range(self.columns)
        )

    def state(self, cell: Cell) -> int:
        """The index of the state of `cell`."""
        return cell[0] * self.columns + cell[1]

    def at(self, *cells: Cell) -> NDArray[np.bool_]:
        """Which states are among `cells`, `[S]`."""
        mask = np.zeros(self.num_states, bool)
        mask[[self.state(cell) for cell in cells]] = True
        return mask

    @property
    def closed(self) -> NDArray[np.bool_]:
        """States that nobody walks on from: goals, hazards and obstacles, `[S]`."""
        return self.at(*self.goals, *self.hazards, *self.obstacles)

    def neighbours(self) -> NDArray[np.int64]:
        """The state that each move leads to, `[S, 4]`; itself, against a wall or an obstacle."""
        state = np.arange(self.num_states)
        row, column = np.divmod(state[:, None], self.columns)
        step = np.array([STEPS[name] for name in self.action_names])
        row, column = row + step[:, 0], column + step[:, 1]
        inside = (row >= 0) & (row < self.rows) & (column >= 0) & (column < self.columns)
        target = np.where(inside, row * self.columns + column, state[:, None])
        return np.where(self.at(*self.obstacles)[target], state[:, None], target)


def walk(
    layout: Layout,
    target: NDArray[np.int64],
    reward: NDArray[np.float64],
    *,
    slip: float,
    discount: float,
) -> SuccessorMDP:
    """The problem of walking on a grid where each move may slip to either side.

    With probability `slip` the walker goes at a right angle to where it meant to, half of the time
    to either side.

    Args:
      layout: of the grid; its closed cells are the terminal states.
      target: `[S, 4]`, the state where each move ends if it is made.
      reward: `[S, 4]`, for each move if it is made.
      slip: in [0, 1].
      discount: in [0, 1]; 1 only if a goal or a hazard can be reached from every open cell.

    Source: the moves of Russell & Norvig (2010), section 17.1, where slip is .2.
    """
    checks.between("slip", slip, 0, 1)
    step = np.array([STEPS[name] for name in layout.action_names])
    # The two moves at a right angle to each: those whose inner product with it is 0.
    sides = np.nonzero(step @ step.T == 0)[1].reshape(4, 2)
    moves = np.concatenate([np.arange(4)[:, None], sides], axis=1)
    law = np.array([1 - slip, slip / 2, slip / 2])
    if slip == 0:
        moves, law = moves[:, :1], law[:1]
    terminal = layout.closed
    stay = np.arange(layout.num_states)[:, None]
    target, reward = np.where(terminal[:, None], stay, target), reward * ~terminal[:, None]
    successor = target[:, moves].reshape(-1, len(law))
    if discount == 1:
        _require_way_out(layout, target)
    return checks.mdp(
        SuccessorMDP(
            successor=jnp.asarray(successor, jnp.int32),
            probability=jnp.asarray(np.broadcast_to(law, successor.shape), float),
            reward=jnp.asarray(reward[:, moves].reshape(successor.shape), float),
            row=jnp.arange(4 * layout.num_states, dtype=jnp.int32).reshape(-1, 4),
            discount=jnp.asarray(discount, float),
            initial=jnp.asarray(layout.at(layout.start), float),
            terminal=jnp.asarray(terminal),
            action_mask=jnp.ones((layout.num_states, 4), bool),
        )
    )


def _require_way_out(layout: Layout, target: NDArray[np.int64]) -> None:
    """Says in cells what `checks.mdp` would say in states; whatever slips, all four moves occur."""
    out, wider = np.zeros(layout.num_states, bool), layout.closed
    while (wider != out).any():
        out, wider = wider, wider | wider[target].any(axis=1)
    if not out.all():
        cell = divmod(int(out.argmin()), layout.columns)
        raise ValueError(
            f"discount is 1 and no way leads from cell {cell} to a goal; "
            "remove an obstacle or use discount < 1"
        )
