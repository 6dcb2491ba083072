"""Cliff walking: the short way home runs along the edge of a cliff.

Four rows of twelve cells. The start is at the bottom left and the goal at the bottom right; the
cells between them are the cliff. Every move costs 1. A step into the cliff costs 100 and leads back
to the start, without ending the episode. A wall stops a move, which still costs 1.

The state of cell (row, column) is 12 · row + column and the actions are ordered as in Gymnasium's
CliffWalking. The cells of the cliff are states that nobody is ever in.

Source: Sutton & Barto (2018), example 6.6.
"""

from __future__ import annotations

import numpy as np

from jaxrl_llm.envs import tabular
from jaxrl_llm.envs.grid_layout import Layout, walk
from jaxrl_llm.types import Environment, SuccessorMDP

STEP_REWARD, FALL_REWARD = -1.0, -100.0

action_names = ("Up", "Right", "Down", "Left")

LAYOUT = Layout(
    rows=4,
    columns=12,
    start=(3, 0),
    goals=((3, 11),),
    hazards=tuple((3, column) for column in range(1, 11)),
    action_names=action_names,
)
state_names = LAYOUT.state_names


def mdp(*, slip: float = 0.0, discount: float = 1.0) -> SuccessorMDP:
    """The problem, 48 states × 4 moves; V*(start) is -13 at discount 1.

    Args:
      slip: the probability of going at a right angle to the move, in [0, 1]; 0 in the book.
      discount: in [0, 1].
    """
    target = LAYOUT.neighbours()
    falls = LAYOUT.at(*LAYOUT.hazards)[target]
    landing = np.where(falls, LAYOUT.state(LAYOUT.start), target)
    reward = np.where(falls, FALL_REWARD, STEP_REWARD)
    return walk(LAYOUT, landing, reward, slip=slip, discount=discount)


def make(*, slip: float = 0.0, max_steps: int | None = None) -> Environment:
    """The problem as an environment; truncated after `max_steps` moves where that is given."""
    return tabular.make(mdp(slip=slip), name="cliff_walking", max_steps=max_steps)
