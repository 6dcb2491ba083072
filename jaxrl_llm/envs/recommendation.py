"""Recommending a treatment from symptoms: one decision for each patient, who then leaves.

SYNTHETIC: the matrix of effects is made up; research only, not for clinical use. A patient has any
of 8 symptoms, each with probability 1/2 and independently of the others, so there are 256 patterns,
all as likely. A treatment relieves (or worsens) each symptom by its own amount; the reward is the
sum over the symptoms that the patient has. An episode is one decision: a contextual bandit, whose
best policy, and whose regret, are known exactly.

State s < 256 is the pattern in which symptom i is present where bit i of s is set; state 256 is a
patient who was treated, terminal.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxrl_llm import make_mdp
from jaxrl_llm.envs import tabular
from jaxrl_llm.types import MDP, Array, Environment

symptom_names = (
    "fever",
    "cough",
    "breathlessness",
    "fatigue",
    "headache",
    "nausea",
    "joint pain",
    "rash",
)
action_names = ("antibiotic", "antiviral", "bronchodilator", "anti-inflammatory", "antihistamine")

# Relief of each symptom (row, in the order above) by each treatment (column), in points.
_EFFECT = (
    (0.6, 0.5, 0.0, 0.4, 0.0),
    (0.4, 0.3, 0.6, 0.1, 0.2),
    (0.3, 0.2, 0.9, 0.1, 0.3),
    (0.2, 0.5, 0.1, 0.2, -0.3),
    (0.0, 0.3, -0.2, 0.5, 0.1),
    (-0.4, -0.2, -0.1, -0.3, 0.2),
    (0.1, 0.2, 0.0, 0.7, 0.0),
    (0.1, 0.0, 0.0, 0.3, 0.9),
)


def symptoms() -> Array:
    """Which symptoms each state has, `[257, 8]`, 0 or 1: the context of a linear bandit."""
    pattern = np.arange(2 ** len(symptom_names))[:, None] >> np.arange(len(symptom_names)) & 1
    return jnp.asarray(np.append(pattern, np.zeros_like(pattern[:1]), axis=0), float)


def effect() -> Array:
    """What each symptom adds to the reward of each treatment, `[8, 5]`."""
    return jnp.asarray(_EFFECT, float)


state_names = (
    *(
        ", ".join(name for bit, name in enumerate(symptom_names) if pattern >> bit & 1) or "none"
        for pattern in range(2 ** len(symptom_names))
    ),
    "treated",
)


def mdp() -> MDP:
    """The problem, 257 states × 5 treatments; a value is the mean reward of one decision."""
    num_states = len(state_names)
    terminal = np.arange(num_states) == num_states - 1
    transition = np.broadcast_to(terminal, (num_states, len(action_names), num_states))
    return make_mdp(
        transition.astype(float),
        np.asarray(symptoms(), float) @ np.array(_EFFECT),
        1.0,
        terminal=terminal,
    )


def make() -> Environment:
    """The problem as an environment; an episode is one step."""
    return tabular.make(mdp(), name="recommendation")
