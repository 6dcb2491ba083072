"""The tiger: behind one of two doors; listen again, or open?

Listening costs 1 and is right with probability .85. The door without the tiger pays 10, the other
costs 100; after either the tiger is put behind a random door and nothing is heard. With discount
.95 V* at even odds is 19.371, and 189 if the tiger is believed to show itself after one step.

Source: Kaelbling, Littman & Cassandra (1998), "Planning and acting in partially observable
  stochastic domains", section 5.
"""

from __future__ import annotations

import numpy as np

from jaxrl_llm import make_mdp
from jaxrl_llm.envs import hidden
from jaxrl_llm.types import POMDP, Environment

LISTEN, OPEN_LEFT, OPEN_RIGHT = range(3)
GROWL_LEFT, GROWL_RIGHT = range(2)

state_names = ("Tiger left", "Tiger right")
action_names = ("Listen", "Open left", "Open right")
observation_names = ("Growl left", "Growl right")

_REWARD = ((-1.0, -100.0, 10.0), (-1.0, 10.0, -100.0))


def pomdp(*, discount: float = 0.95, accuracy: float = 0.85) -> POMDP:
    """The problem, 2 states × 3 actions × 2 observations.

    Args:
      discount: in [0, 1). The process has no end; for a finite horizon without a discount replace
        that of the `mdp` by 1.
      accuracy: the probability of hearing the tiger where it is.
    """
    stay, shuffle = np.eye(2), np.full((2, 2), 0.5)
    heard = np.where(stay == 1, accuracy, 1 - accuracy)
    transition = np.stack([stay, shuffle, shuffle], axis=1)
    mdp = make_mdp(transition, np.array(_REWARD), discount)
    return hidden.make_pomdp(mdp, np.stack([heard, shuffle, shuffle]))


def make(*, accuracy: float = 0.85, max_steps: int | None = 200) -> Environment:
    """The problem as an environment of growls, truncated after `max_steps`: it has no end."""
    return hidden.make(pomdp(accuracy=accuracy), name="tiger", max_steps=max_steps)
