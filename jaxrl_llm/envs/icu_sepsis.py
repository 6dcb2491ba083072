"""ICU-Sepsis: sepsis treatment with dynamics estimated from MIMIC-III records.

Research only, not for clinical use. 716 states: 0 to 712 are clusters of ICU patients, 713 is
death, 714 survival, and 715 the absorbing state behind both, never visited because an episode ends
at 713 or 714. 25 actions = 5 · fluid level + vasopressor level. A step is 4 hours. The reward is 1
on reaching survival, so that with discount 1 a value is a probability of survival.

Only actions that clinicians took often enough in a state are admissible there (3.1 of 25 on
average); they are the `action_mask`. An inadmissible action does one of three things:

- `"mean"` (the package's default): the mean of the state's admissible dynamics;
- `"terminate"`: death;
- `"raise"`: as `"mean"`, and `TimeStep.info["inadmissible"]` is True, which `to_gymnasium` turns
  into an error. Nothing can raise inside jit: an agent that honours the mask never gets there.

The arrays are read from the installed `icu-sepsis` package (MIT), without importing it.

Source: Choudhary et al. (2024), "ICU-Sepsis: A benchmark MDP built from real medical data",
  arXiv:2406.05646.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrl_llm import checks, make_mdp
from jaxrl_llm.envs import tabular
from jaxrl_llm.types import MDP, Array, Environment

DEATH, SURVIVAL, ABSORBING = 713, 714, 715

Inadmissible = Literal["mean", "terminate", "raise"]

state_names = (*(f"ICU state {index}" for index in range(DEATH)), "Death", "Survival", "Absorbing")
action_names = tuple(f"Fluid {action // 5}, vasopressor {action % 5}" for action in range(25))


class Data(NamedTuple):
    """What the package ships, float64 and int, on the host.

    Attributes:
      transition: `[716, 25, 716]`.
      reward: `[716, 25, 716]`.
      initial: `[716]`, the law of the first state.
      admissible: `[716, 25]` bool; every action in states 713 to 715.
      expert_policy: `[716, 25]`, the clinicians' action frequencies; uniform in states 713 to 715,
        where the package has rows of zeros.
      state_cluster_centers: `[716, 47]`, standardised features of each state.
      sofa_score: `[716]`, Sequential Organ Failure Assessment score, 0 to 24.
    """

    transition: np.ndarray
    reward: np.ndarray
    initial: np.ndarray
    admissible: np.ndarray
    expert_policy: np.ndarray
    state_cluster_centers: np.ndarray
    sofa_score: np.ndarray


@cache
def data() -> Data:
    """The arrays of the installed package, read once.

    Raises:
      ModuleNotFoundError: the package, or its data, is not installed.
    """
    spec = find_spec("icu_sepsis")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("icu_sepsis is not installed; run: pip install icu-sepsis")
    # Importing the package would bring in the retired `gym` and its farewell message.
    assets = Path(next(iter(spec.submodule_search_locations))) / "envs" / "assets"
    with np.load(assets / "dynamics.npz", allow_pickle=False) as arrays:
        expert = np.array(arrays["expert_policy"])
        expert[DEATH:] = 1 / expert.shape[1]
        return Data(
            transition=arrays["tx_mat"],
            reward=arrays["r_mat"],
            initial=arrays["d_0"],
            admissible=_admissible(assets / "admissible_actions.txt", expert.shape),
            expert_policy=expert,
            state_cluster_centers=arrays["state_cluster_centers"],
            sofa_score=arrays["sofa_scores"],
        )


def expert_policy() -> Array:
    """The clinicians' action frequencies, `[716, 25]`."""
    return jnp.asarray(data().expert_policy, float)


def mdp(*, discount: float = 1.0, inadmissible: Inadmissible = "mean") -> MDP:
    """The problem, with the admissible actions as its `action_mask`.

    Args:
      discount: in [0, 1].
      inadmissible: what an inadmissible action does, see the module; no difference to a solver
        that honours the mask.
    """
    checks.one_of("inadmissible", inadmissible, ("mean", "terminate", "raise"))
    arrays = data()
    transition, reward = arrays.transition, arrays.reward
    if inadmissible == "terminate":
        death = np.arange(transition.shape[2]) == DEATH
        transition = np.where(arrays.admissible[:, :, None], transition, death)
        reward = np.where(arrays.admissible[:, :, None], reward, 0.0)
    return make_mdp(
        transition,
        reward,
        discount,
        initial=arrays.initial,
        terminal=np.arange(transition.shape[0]) >= DEATH,
        action_mask=arrays.admissible,
    )


def make(*, inadmissible: Inadmissible = "mean", max_steps: int | None = 500) -> Environment:
    """The problem as an environment; the observation is the state's index, `[]` int32.

    `TimeStep.info` holds `action_mask` `[25]` (admissible in the new state) and `sofa_score` `[]`,
    and with `inadmissible="raise"` also `inadmissible` `[]`, of the action just taken.

    Args:
      inadmissible: what an inadmissible action does, see the module.
      max_steps: truncate after this many steps of 4 hours; never when None.
    """
    sofa_score = jnp.asarray(data().sofa_score, jnp.float32)
    return tabular.make(
        mdp(inadmissible=inadmissible),
        name="icu_sepsis",
        max_steps=max_steps,
        report_inadmissible=inadmissible == "raise",
        info=lambda state: {"sofa_score": sofa_score[state]},
    )


def _admissible(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Reads the mask: a line of counts, then a line of actions for each state."""
    lines = path.read_text().splitlines()
    mask = np.zeros(shape, bool)
    for state, line in enumerate(lines[1:]):
        mask[state, [int(action) for action in line.split()]] = True
    mask[DEATH:] = True
    return mask
