"""Small chains of patients: what follows where nothing, or little, is decided.

SYNTHETIC, teaching examples; research only, not for clinical use. A reward is that of LEAVING a
state. No state ends an episode: the last one absorbs, or is only hard to leave.

- `patient`: Critical, Serious, Stable, Improving, Recovered, and no choice.
- `illness`: Ill, Recovering, Healthy, and no choice.
- `illness_treatment`: the same three states with Medication or Surgery.

Source: examples of study guides on reinforcement learning in healthcare; their values are in
tests/oracles.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxrl_llm import checks, make_mdp
from jaxrl_llm.envs import tabular
from jaxrl_llm.types import MDP, Environment


class _Chain(NamedTuple):
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    transition: tuple[tuple[tuple[float, ...], ...], ...]  # [A, S, S]
    reward: tuple[tuple[float, ...], ...]  # [A, S]


_CHAINS = {
    "patient": _Chain(
        state_names=("Critical", "Serious", "Stable", "Improving", "Recovered"),
        action_names=("Wait",),
        transition=(
            (
                (0.7, 0.2, 0.1, 0.0, 0.0),
                (0.1, 0.5, 0.3, 0.1, 0.0),
                (0.0, 0.1, 0.5, 0.3, 0.1),
                (0.0, 0.0, 0.1, 0.6, 0.3),
                (0.0, 0.0, 0.0, 0.0, 1.0),
            ),
        ),
        reward=((-10.0, -5.0, 0.0, 5.0, 10.0),),
    ),
    "illness": _Chain(
        state_names=("Ill", "Recovering", "Healthy"),
        action_names=("Wait",),
        transition=(((0.6, 0.3, 0.1), (0.1, 0.7, 0.2), (0.0, 0.1, 0.9)),),
        reward=((-5.0, 0.0, 10.0),),
    ),
    "illness_treatment": _Chain(
        state_names=("Ill", "Recovering", "Healthy"),
        action_names=("Medication", "Surgery"),
        transition=(
            ((0.5, 0.4, 0.1), (0.1, 0.6, 0.3), (0.0, 0.1, 0.9)),
            ((0.3, 0.5, 0.2), (0.2, 0.3, 0.5), (0.0, 0.1, 0.9)),
        ),
        reward=((-3.0, 0.0, 10.0), (-8.0, -2.0, 10.0)),
    ),
}


def state_names(*, name: str = "patient") -> tuple[str, ...]:
    """Of the chain `name`."""
    return _chain(name).state_names


def action_names(*, name: str = "patient") -> tuple[str, ...]:
    """Of the chain `name`."""
    return _chain(name).action_names


def mdp(*, name: str = "patient", discount: float = 0.9) -> MDP:
    """The chain `name`; the first state is uniform.

    Args:
      name: `patient` (5 states × 1 action), `illness` (3 × 1) or `illness_treatment` (3 × 2).
      discount: in [0, 1).

    >>> from jaxrl_llm.kernels import bellman
    >>> value = bellman.value_iteration(mdp(name="illness")).value
    >>> [round(number, 2) for number in value.tolist()]
    [28.07, 42.14, 72.59]
    """
    chain = _chain(name)
    transition = np.swapaxes(np.array(chain.transition), 0, 1)
    return make_mdp(transition, np.array(chain.reward).T, discount)


def make(*, name: str = "patient", max_steps: int | None = 50) -> Environment:
    """The chain `name` as an environment, truncated after `max_steps` steps; never when None."""
    return tabular.make(mdp(name=name), name=name, max_steps=max_steps)


def _chain(name: str) -> _Chain:
    checks.one_of("name", name, _CHAINS)
    return _CHAINS[name]
