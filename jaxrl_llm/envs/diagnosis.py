"""A small diagnostic problem: wait, test, or treat a disease that does not show itself at first?

SYNTHETIC, no number of it is from patients; research only, not for clinical use. A step is a month.
A healthy patient may fall ill; early disease is hidden, and may progress to advanced disease, which
is plain to see and ends the problem at a cost. Two tests differ in price and accuracy; without one,
early disease sometimes has symptoms, and so has health. Treatment usually cures early disease, and
is a burden whether it was needed or not. Rewards are in points of utility, a healthy month being 0.
"""

from __future__ import annotations

import numpy as np

from jaxrl_llm import make_mdp
from jaxrl_llm.envs import hidden
from jaxrl_llm.types import POMDP, Environment

WAIT, SCREEN, BIOPSY, TREAT = range(4)
NEGATIVE, POSITIVE = range(2)

state_names = ("Healthy", "Early disease", "Advanced disease")
action_names = ("Wait", "Screening test", "Biopsy", "Treat")
observation_names = ("Negative", "Positive")
prices = (0.0, 0.5, 2.0, 10.0)  # of each action, points

# Of early disease, what each action finds, and how often it finds nothing in the healthy. After
# waiting and treating, a positive is a complaint of symptoms.
sensitivity = (0.15, 0.75, 0.97, 0.15)
specificity = (0.95, 0.85, 0.99, 0.95)

_UNTREATED = ((0.98, 0.02, 0.00), (0.00, 0.90, 0.10), (0.00, 0.00, 1.00))
_TREATED = ((0.99, 0.01, 0.00), (0.90, 0.08, 0.02), (0.00, 0.00, 1.00))
_EARLY_DISEASE, _ADVANCED_DISEASE = -1.0, -60.0  # a month with it, and once on reaching it
_PREVALENCE = 0.1


def pomdp(*, discount: float = 0.95) -> POMDP:
    """The problem, 3 states × 4 actions × 2 observations; advanced disease is terminal.

    Args:
      discount: a month, in [0, 1].
    """
    advanced = np.array(state_names) == "Advanced disease"
    transition = np.stack([_UNTREATED, _UNTREATED, _UNTREATED, _TREATED], axis=1)
    staying = np.array([0.0, _EARLY_DISEASE, 0.0])[:, None] - np.array(prices)
    mdp = make_mdp(
        transition,
        staying[:, :, None] + np.where(advanced, _ADVANCED_DISEASE, 0.0),
        discount,
        initial=[1 - _PREVALENCE, _PREVALENCE, 0.0],
        terminal=advanced,
    )
    # Advanced disease shows: there every finding is positive.
    positive = np.stack([1 - np.array(specificity), sensitivity, np.ones(4)], axis=1)
    return hidden.make_pomdp(mdp, np.stack([1 - positive, positive], axis=-1))


def make(*, max_steps: int | None = 200) -> Environment:
    """The problem as an environment of test results, truncated after `max_steps` months."""
    return hidden.make(pomdp(), name="diagnosis", max_steps=max_steps)
