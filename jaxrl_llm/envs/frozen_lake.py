"""Frozen lake: cross the ice to the goal without falling into a hole.

Reaching the goal pays 1, and nothing else pays anything; holes and the goal end the episode. On the
slippery lake a move goes where it was meant to only a third of the time, and as often to either
side. The state of cell (row, column) is row · columns + column and the actions are ordered as in
Gymnasium's FrozenLake-v1, whose tables these are.

Source: Gymnasium's FrozenLake-v1 (Farama Foundation), its two maps.
"""

from __future__ import annotations

import numpy as np

from jaxrl_llm import checks
from jaxrl_llm.envs import tabular
from jaxrl_llm.envs.grid_layout import Cell, Layout, walk
from jaxrl_llm.types import Environment, SuccessorMDP

SLIPPERY = 2 / 3

action_names = ("Left", "Down", "Right", "Up")

# S start, F frozen, H hole, G goal.
_MAPS = {
    "4x4": "SFFF FHFH FFFH HFFG",
    "8x8": "SFFFFFFF FFFFFFFF FFFHFFFF FFFFFHFF FFFHFFFF FHHFFFHF FHFFHFHF FFFHFFFG",
}


def layout(*, map_name: str = "4x4") -> Layout:
    """Where everything is; holes are the hazards."""
    checks.one_of("map_name", map_name, _MAPS)
    lines = _MAPS[map_name].split()

    def cells(mark: str) -> tuple[Cell, ...]:
        return tuple(
            (row, column)
            for row, line in enumerate(lines)
            for column, found in enumerate(line)
            if found == mark
        )

    (start,) = cells("S")
    return Layout(
        rows=len(lines),
        columns=len(lines[0]),
        start=start,
        goals=cells("G"),
        hazards=cells("H"),
        action_names=action_names,
    )


def state_names(*, map_name: str = "4x4") -> tuple[str, ...]:
    """Such as `row 0, column 3`."""
    return layout(map_name=map_name).state_names


def mdp(*, map_name: str = "4x4", slip: float = SLIPPERY, discount: float = 0.99) -> SuccessorMDP:
    """The problem, 16 or 64 states × 4 moves.

    Args:
      map_name: `4x4` or `8x8`.
      slip: the probability of going at a right angle to the move, in [0, 1]; `SLIPPERY` is the
        lake that is, 0 the one that is not.
      discount: in [0, 1]; with 1 a value is a probability of reaching the goal.
    """
    lake = layout(map_name=map_name)
    target = lake.neighbours()
    reward = np.where(lake.at(*lake.goals), 1.0, 0.0)[target]
    return walk(lake, target, reward, slip=slip, discount=discount)


def make(
    *, map_name: str = "4x4", slip: float = SLIPPERY, max_steps: int | None = 100
) -> Environment:
    """The problem as an environment, truncated after `max_steps` moves (Gymnasium: 100 and 200)."""
    problem = mdp(map_name=map_name, slip=slip)
    return tabular.make(problem, name="frozen_lake", max_steps=max_steps)
