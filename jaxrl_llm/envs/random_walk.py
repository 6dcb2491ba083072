"""The random walk: a row of states between two ends, and nothing to decide.

State 0 is the left end and state n + 1 the right one, both terminal; a walk begins in the middle of
the n states between them and steps left or right with probability 1/2. Only an end pays. With 0 at
the left and 1 at the right, the value of state i is i / (n + 1), its chance to end at the right.

Source: Sutton & Barto (2018), example 6.2 (5 states, rewards 0 and 1) and example 7.1 (19 states,
  rewards -1 and 1: `mdp(num_states=19, left_reward=-1.0)`).
"""

from __future__ import annotations

import numpy as np

from jaxrl_llm import checks, make_mdp
from jaxrl_llm.envs import tabular
from jaxrl_llm.types import MDP, Environment

action_names = ("Step",)


def state_names(*, num_states: int = 5) -> tuple[str, ...]:
    """The ends, and between them letters, or numbers where letters do not suffice."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    numbers = [str(index + 1) for index in range(num_states)]
    between = letters[:num_states] if num_states <= len(letters) else numbers
    return ("Left end", *between, "Right end")


def mdp(
    *,
    num_states: int = 5,
    left_reward: float = 0.0,
    right_reward: float = 1.0,
    discount: float = 1.0,
) -> MDP:
    """The problem, num_states + 2 states × 1 action.

    Args:
      num_states: between the ends; odd, so that there is a middle to begin in.
      left_reward: for reaching the left end.
      right_reward: for reaching the right end.
      discount: in [0, 1].

    >>> from jaxrl_llm.kernels import bellman
    >>> value = bellman.value_iteration(mdp()).value
    >>> [round(number, 3) for number in value.tolist()]  # i / 6
    [0.0, 0.167, 0.333, 0.5, 0.667, 0.833, 0.0]
    """
    checks.at_least("num_states", num_states, 1)
    if num_states % 2 == 0:
        raise ValueError(f"num_states is {num_states}; it must be odd, a walk begins in the middle")
    states = np.arange(num_states + 2)
    terminal = (states == 0) | (states == num_states + 1)
    size = len(states)
    transition = 0.5 * (np.eye(size, k=-1) + np.eye(size, k=1))
    transition[terminal] = np.eye(size)[terminal]
    reward = np.zeros((size, 1, size))
    reward[1:-1, :, 0], reward[1:-1, :, -1] = left_reward, right_reward
    return make_mdp(
        transition[:, None],
        reward,
        discount,
        initial=states == (num_states + 1) // 2,
        terminal=terminal,
    )


def make(
    *, num_states: int = 5, left_reward: float = 0.0, right_reward: float = 1.0
) -> Environment:
    """The problem as an environment; every walk ends."""
    problem = mdp(num_states=num_states, left_reward=left_reward, right_reward=right_reward)
    return tabular.make(problem, name="random_walk")
