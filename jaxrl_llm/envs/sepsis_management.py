"""Sepsis management: severity × trend, and how much intervention.

SYNTHETIC, a teaching example; research only, not for clinical use. Nine states (mild, severe or
septic shock × stable, declining or improving) and four levels of intervention.

Source: the sepsis example of study guides on reinforcement learning in healthcare, its arrays as
package data (`guide_mdps.npz`); its optimum is in tests/oracles.py.
"""

from __future__ import annotations

from jaxrl_llm.envs import guide, tabular
from jaxrl_llm.types import MDP, Environment

state_names = tuple(
    f"{severity}, {trend}"
    for severity in ("Mild sepsis", "Severe sepsis", "Septic shock")
    for trend in ("stable", "declining", "improving")
)
action_names = (
    "Conservative management",
    "Standard protocol",
    "Aggressive treatment",
    "Maximum intervention",
)


def mdp(*, discount: float | None = None) -> MDP:
    """The problem, 9 states × 4 actions; discount 0.9 unless another is given."""
    return guide.load("sepsis", discount)


def make(*, discount: float | None = None, max_steps: int | None = 50) -> Environment:
    """The problem as an environment, truncated after `max_steps` decisions: it has no end."""
    return tabular.make(mdp(discount=discount), name="sepsis_management", max_steps=max_steps)
