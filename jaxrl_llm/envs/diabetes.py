"""Diabetes management: glucose level × condition, and how much medication.

SYNTHETIC, a teaching example; research only, not for clinical use. Nine states (glucose low,
normal or high × condition good, fair or poor) and four adjustments of medication. The condition
never changes in this problem; its reward says what each glucose level is worth.

Source: the diabetes example of study guides on reinforcement learning in healthcare, its arrays
as package data (`guide_mdps.npz`); its optimum is in tests/oracles.py.
"""

from __future__ import annotations

from jaxrl_llm.envs import guide, tabular
from jaxrl_llm.types import MDP, Environment

state_names = tuple(
    f"{glucose} glucose, {condition} condition"
    for glucose in ("Low", "Normal", "High")
    for condition in ("good", "fair", "poor")
)
action_names = (
    "Reduce medication",
    "Maintain treatment",
    "Increase moderately",
    "Increase significantly",
)


def mdp(*, discount: float | None = None) -> MDP:
    """The problem, 9 states × 4 actions; discount 0.95 unless another is given."""
    return guide.load("diabetes", discount)


def make(*, discount: float | None = None, max_steps: int | None = 50) -> Environment:
    """The problem as an environment, truncated after `max_steps` decisions: it has no end."""
    return tabular.make(mdp(discount=discount), name="diabetes", max_steps=max_steps)
