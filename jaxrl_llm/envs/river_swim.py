"""RiverSwim: swim up a river for a large reward, or drift down to a small one.

States are places from downstream (0) to upstream. Swimming left, with the current, always works.
Swimming right works with probability .35, keeps one in place with .6 and loses a place with .05; in
the first state it works with .6, and in the last one it stays there with .6. Swimming left in the
first state pays .005 and swimming right in the last one 1: a greedy learner that found the small
reward has to swim against the current many times before it hears of the large one.

Source: Strehl & Littman (2008), "An analysis of model-based interval estimation for Markov decision
  processes", who made it; the numbers are those of Osband, Van Roy & Russo (2013), "(More)
  efficient reinforcement learning via posterior sampling", section 5. The first paper has .3, .6
  and .1, and rewards 5 and 10,000.
"""

from __future__ import annotations

import numpy as np

from jaxrl_llm import checks, make_mdp
from jaxrl_llm.envs import tabular
from jaxrl_llm.types import MDP, Environment

SMALL_REWARD, LARGE_REWARD = 0.005, 1.0

action_names = ("Left", "Right")


def state_names(*, num_states: int = 6) -> tuple[str, ...]:
    """Such as `Place 0`."""
    return tuple(f"Place {place}" for place in range(num_states))


def mdp(*, num_states: int = 6, discount: float = 0.99) -> MDP:
    """The problem, num_states × 2 actions; it begins in state 0 and has no end.

    Args:
      num_states: at least 2.
      discount: in [0, 1).
    """
    checks.at_least("num_states", num_states, 2)
    left = np.eye(num_states, k=-1)
    left[0, 0] = 1
    right = 0.05 * np.eye(num_states, k=-1) + 0.6 * np.eye(num_states)
    right += 0.35 * np.eye(num_states, k=1)
    right[0, :2] = [0.4, 0.6]
    right[-1, -2:] = [0.4, 0.6]
    reward = np.zeros((num_states, 2))
    reward[0, 0], reward[-1, 1] = SMALL_REWARD, LARGE_REWARD
    states = np.arange(num_states)
    return make_mdp(np.stack([left, right], axis=1), reward, discount, initial=states == 0)


def make(*, num_states: int = 6, max_steps: int | None = 20) -> Environment:
    """The problem as an environment, truncated after `max_steps` strokes; never when None."""
    return tabular.make(mdp(num_states=num_states), name="river_swim", max_steps=max_steps)
