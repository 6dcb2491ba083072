"""Debugging a chatbot that answered wrongly: find the cause, mend it, test the mend, ship it.

SYNTHETIC, a teaching example: the numbers are made up, only their order is meant to be sensible.
Every action but shipping costs time, reading logs more than asking the user, and what it leads to
depends on how far the work is. Shipping ends the episode: the answer is right now (20), or the
user, answered wrongly once more, gives up (-20). So does, now and then, one who is asked too often.

A fix can be guessed before the cause is known, and shipped before it is tested. Which shortcut pays
is what a solver finds out. Actions that make no sense yet, such as testing without a fix, are not
allowed (`action_mask`).
"""

from __future__ import annotations

import numpy as np

from jaxrl_llm import make_mdp
from jaxrl_llm.envs import tabular
from jaxrl_llm.types import MDP, Environment

state_names = (
    "Wrong answer reported",
    "Question understood",
    "Cause known",
    "Guess proposed",
    "Fix proposed",
    "Fix tested",
    "Resolved",
    "User gave up",
)
action_names = ("Ask the user", "Read the logs", "Change the prompt", "Test", "Ship")

_RESOLVED, _GAVE_UP = "Resolved", "User gave up"
_ACTION_REWARD = (-1.0, -2.0, -2.0, -1.0, 0.0)
_END_REWARD = {_RESOLVED: 20.0, _GAVE_UP: -20.0}

# Where an allowed action leads from a state, and how probably.
_OUTCOMES = {
    ("Wrong answer reported", "Ask the user"): {
        "Question understood": 0.9,
        "Wrong answer reported": 0.07,
        _GAVE_UP: 0.03,
    },
    ("Wrong answer reported", "Read the logs"): {
        "Wrong answer reported": 0.65,
        "Cause known": 0.35,
    },
    ("Wrong answer reported", "Change the prompt"): {"Guess proposed": 1.0},
    ("Question understood", "Ask the user"): {
        "Question understood": 0.7,
        "Cause known": 0.1,
        _GAVE_UP: 0.2,
    },
    ("Question understood", "Read the logs"): {"Question understood": 0.25, "Cause known": 0.75},
    ("Question understood", "Change the prompt"): {"Guess proposed": 0.8, "Fix proposed": 0.2},
    ("Cause known", "Change the prompt"): {"Fix proposed": 0.9, "Guess proposed": 0.1},
    ("Guess proposed", "Test"): {"Wrong answer reported": 0.7, "Fix tested": 0.3},
    ("Guess proposed", "Ship"): {_RESOLVED: 0.3, _GAVE_UP: 0.7},
    ("Fix proposed", "Test"): {"Cause known": 0.15, "Fix tested": 0.85},
    ("Fix proposed", "Ship"): {_RESOLVED: 0.85, _GAVE_UP: 0.15},
    ("Fix tested", "Ship"): {_RESOLVED: 0.98, _GAVE_UP: 0.02},
}


def mdp(*, discount: float = 0.9) -> MDP:
    """The problem, 8 states × 5 actions, from the report of a wrong answer on.

    Args:
      discount: in [0, 1]; each action takes a step, so patience runs out by it too.
    """
    shape = len(state_names), len(action_names)
    transition = np.zeros((*shape, len(state_names)))
    mask = np.zeros(shape, bool)
    for (state, action), outcomes in _OUTCOMES.items():
        pair = state_names.index(state), action_names.index(action)
        mask[pair] = True
        for following, probability in outcomes.items():
            transition[(*pair, state_names.index(following))] = probability
    terminal = np.isin(state_names, list(_END_REWARD))
    mask[terminal] = True
    # What is not allowed changes nothing.
    transition[~mask] = np.eye(len(state_names))[np.nonzero(~mask)[0]]
    transition[terminal] = np.eye(len(state_names))[terminal][:, None]
    end = np.array([_END_REWARD.get(name, 0.0) for name in state_names])
    reward = np.array(_ACTION_REWARD)[:, None] + end
    reward = np.where(terminal[:, None, None], 0.0, np.broadcast_to(reward, transition.shape))
    return make_mdp(
        transition,
        reward,
        discount,
        initial=np.eye(len(state_names))[0],
        terminal=terminal,
        action_mask=mask,
    )


def make(*, discount: float = 0.9, max_steps: int | None = 50) -> Environment:
    """The problem as an environment, truncated after `max_steps` actions; never when None."""
    return tabular.make(mdp(discount=discount), name="chatbot_debugging", max_steps=max_steps)
