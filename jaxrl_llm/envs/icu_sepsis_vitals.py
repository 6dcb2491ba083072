"""ICU-Sepsis seen through what a monitor shows: 47 noisy measurements, some of them missing.

Research only, not for clinical use. The patient moves as in `envs.icu_sepsis`; the agent sees the
centre of the patient's cluster, 47 features, each standardised over the 713 clusters, plus normal
noise. Each feature is missing with its own coin; a missing one shows 0 (the average), or the last
value seen (0 before the first), and a mask, 1 where measured, is appended. So the problem is
partially observed, the more the noisier; with neither noise nor missing values every centre is
different, the state is known, and the best value is that of ICU-Sepsis, .8751.

Death, survival and the state behind have no centre: they show zeros, masked as missing, which no
policy sees, as the episode ends there. The noise is synthetic; centres and dynamics are those of
the installed `icu-sepsis` package.

Source: Choudhary et al. (2024), arXiv:2406.05646, see `envs.icu_sepsis`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.envs import core, icu_sepsis
from jaxrl_llm.types import Array, Box, Environment, Key, PyTree, TimeStep

Fill = Literal["zero", "last"]

NUM_FEATURES = 47
action_names = icu_sepsis.action_names
# Of the latest observation; with a history the older ones follow, newest first.
observation_names = (
    *(f"feature {index}" for index in range(NUM_FEATURES)),
    *(f"feature {index} measured" for index in range(NUM_FEATURES)),
)


@struct.dataclass(kw_only=True)
class Params:
    """What `step` and `reset` read.

    Attributes:
      process: of `envs.icu_sepsis`.
      centers: `[716, 47]`, standardised; zeros in states 713 to 715.
      noise: `[]`, standard deviation of a measurement, in those of the centres.
      missing: `[]`, the probability that a feature is missing.
    """

    process: PyTree
    centers: Array
    noise: Array
    missing: Array


@struct.dataclass(kw_only=True)
class State:
    """A patient.

    Attributes:
      patient: `[]` int32, the hidden state's index.
      shown: `[history, 94]`, the last observations, newest first.
    """

    patient: Array
    shown: Array


def centers() -> Array:
    """The clusters' centres, each feature with mean 0 and deviation 1 over states 0 to 712.

    `[716, 47]`; rows 713 to 715 (death, survival, the state behind) are zeros.
    """
    raw = icu_sepsis.data().state_cluster_centers[: icu_sepsis.DEATH]
    standard = (raw - raw.mean(axis=0)) / raw.std(axis=0)
    ends = np.zeros((len(icu_sepsis.state_names) - len(raw), NUM_FEATURES))
    return jnp.asarray(np.concatenate([standard, ends]), jnp.float32)


def make(
    *,
    noise: float = 0.5,
    missing: float = 0.2,
    fill: Fill = "zero",
    history: int = 1,
    inadmissible: icu_sepsis.Inadmissible = "mean",
    max_steps: int | None = 500,
) -> Environment:
    """The environment: `Box` of `history` · 94 numbers, features / 3 then their mask, 25 actions.

    `TimeStep.info` holds what `icu_sepsis.make` gives, `action_mask` of the hidden state among it,
    and `state` `[]` int32, the hidden state's index, for evaluation.

    Args:
      noise: standard deviation of a measurement, at least 0.
      missing: the probability that a feature is missing, in [0, 1].
      fill: what a missing feature shows: `"zero"`, or the `"last"` value shown.
      history: how many of the last observations are shown, at least 1; zeros before the first.
      inadmissible: see `icu_sepsis`.
      max_steps: truncate after this many steps of 4 hours; never when None.
    """
    checks.at_least("noise", noise, 0)
    checks.between("missing", missing, 0, 1)
    checks.one_of("fill", fill, ("zero", "last"))
    checks.at_least("history", history, 1)
    process = icu_sepsis.make(inadmissible=inadmissible, max_steps=None)
    admissible = process.action_mask
    assert admissible is not None

    def show(key: Key, patient: Array, shown: Array, params: Params) -> Array:
        noise_key, missing_key = jax.random.split(key)
        drawn = jax.random.normal(noise_key, (NUM_FEATURES,))
        is_measured = jax.random.uniform(missing_key, (NUM_FEATURES,)) >= params.missing
        is_measured &= patient < icu_sepsis.DEATH
        value = (params.centers[patient] + params.noise * drawn) / 3
        other = shown[0, :NUM_FEATURES] if fill == "last" else jnp.zeros(NUM_FEATURES)
        # Nothing is carried into a state that has no measurements.
        other = jnp.where(patient < icu_sepsis.DEATH, other, 0)
        newest = jnp.concatenate([jnp.where(is_measured, value, other), is_measured])
        return jnp.concatenate([newest[None], shown[:-1]])

    def reset(key: Key, params: Params) -> tuple[State, Array]:
        process_key, show_key = jax.random.split(key)
        patient, _ = process.reset(process_key, params.process)
        nothing = jnp.zeros((history, 2 * NUM_FEATURES))
        shown = show(show_key, patient, nothing, params)
        return State(patient=patient, shown=shown), shown.ravel()

    def step(key: Key, state: State, action: Array, params: Params) -> tuple[State, TimeStep]:
        process_key, show_key = jax.random.split(key)
        patient, time_step = process.step(process_key, state.patient, action, params.process)
        shown = show(show_key, patient, state.shown, params)
        return State(patient=patient, shown=shown), dataclasses.replace(
            time_step, observation=shown.ravel(), info={**time_step.info, "state": patient}
        )

    environment = dataclasses.replace(
        process,
        name="icu_sepsis_vitals",
        reset=reset,
        step=step,
        action_mask=lambda state, params: admissible(state.patient, params.process),
        default_params=Params(
            process=process.default_params,
            centers=centers(),
            noise=jnp.float32(noise),
            missing=jnp.float32(missing),
        ),
        observation_space=Box(shape=(history * 2 * NUM_FEATURES,), low=-np.inf, high=np.inf),
    )
    return environment if max_steps is None else core.time_limit(environment, max_steps)
