"""The five-state treatment problem: how aggressively to treat, from Critical to Recovered.

SYNTHETIC, a teaching example; research only, not for clinical use. A step is one decision. Its
reward is that of the state it leads to plus the (negative) cost of the action. Recovered is
absorbing but not terminal: it keeps paying 20, less the cost of whatever is done there.

Source: the treatment example of study guides on reinforcement learning in healthcare; its
optimum is in tests/oracles.py.
"""

from __future__ import annotations

import numpy as np

from jaxrl_llm import make_mdp
from jaxrl_llm.envs import tabular
from jaxrl_llm.types import MDP, Environment

state_names = ("Critical", "Serious", "Stable", "Improving", "Recovered")
action_names = ("Conservative", "Aggressive", "Surgery")

_TRANSITION = (
    (  # Conservative
        (0.6, 0.3, 0.1, 0.0, 0.0),
        (0.1, 0.5, 0.3, 0.1, 0.0),
        (0.0, 0.1, 0.6, 0.2, 0.1),
        (0.0, 0.0, 0.1, 0.7, 0.2),
        (0.0, 0.0, 0.0, 0.0, 1.0),
    ),
    (  # Aggressive
        (0.4, 0.4, 0.2, 0.0, 0.0),
        (0.05, 0.3, 0.4, 0.2, 0.05),
        (0.0, 0.05, 0.4, 0.4, 0.15),
        (0.0, 0.0, 0.05, 0.5, 0.45),
        (0.0, 0.0, 0.0, 0.0, 1.0),
    ),
    (  # Surgery
        (0.2, 0.3, 0.3, 0.15, 0.05),
        (0.1, 0.2, 0.3, 0.3, 0.1),
        (0.05, 0.1, 0.3, 0.35, 0.2),
        (0.0, 0.05, 0.1, 0.4, 0.45),
        (0.0, 0.0, 0.0, 0.0, 1.0),
    ),
)
_STATE_REWARD = (-20.0, -10.0, 0.0, 10.0, 20.0)
_ACTION_REWARD = (-2.0, -5.0, -15.0)


def mdp(*, discount: float = 0.9) -> MDP:
    """The problem, 5 states × 3 actions; the first state is uniform over the five."""
    transition = np.swapaxes(np.array(_TRANSITION), 0, 1)
    arrival = np.array(_STATE_REWARD) + np.array(_ACTION_REWARD)[:, None]
    return make_mdp(transition, np.broadcast_to(arrival, transition.shape), discount)


def make(*, discount: float = 0.9, max_steps: int | None = 50) -> Environment:
    """The problem as an environment, truncated after `max_steps` decisions: it has no end."""
    return tabular.make(mdp(discount=discount), name="treatment", max_steps=max_steps)
