"""Mechanical ventilation of an injured lung, a day at a time.

SYNTHETIC: the law of the patients is made up; research only, not for clinical use. A step is 10
minutes and 144 steps are a day. Volumes are in ml, pressures in cmH2O, partial pressures in mmHg.

The lung opens, stiffens and exchanges gases by the equations of `envs.lung`. A step uses one
periodic breath (breaths settle within seconds, the lung opens within hours) and integrates the
arterial carbon dioxide, the saturation and the open part of the lung.

The reward is the mean of five scores, 1 where the target is met and falling linearly to 0 at a
margin: SpO2 in [.88, .95] (.08), pH in [7.30, 7.45] (.15), plateau pressure at most 30 (10), tidal
volume at most 8 ml per kg of predicted body weight (4) and FiO2 at most .6 (.4). The patient dies
with SpO2 below .5 or pH outside [6.8, 7.8], and the reward is then -20.

Source: ARDS Network (2000), "Ventilation with lower tidal volumes as compared with traditional
  tidal volumes", NEJM 342 (targets; the scores are ours).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.envs import core
from jaxrl_llm.envs.lung import (
    Breath,
    Gases,
    Lung,
    Settings,
    acidity,
    derivative,
    open_part,
    pressure_breath,
    volume_breath,
)
from jaxrl_llm.envs.ode import rk4_step
from jaxrl_llm.envs.patient_variation import constants, log_normal_patient
from jaxrl_llm.types import Array, Box, Environment, Key, TimeStep

STEP = 10.0
"""Minutes."""

observation_names = (
    "SpO2",
    "PaCO2",
    "pH",
    "plateau pressure",
    "tidal volume per kg",
    "intrinsic PEEP",
    "minute ventilation",
    "inspiration",
    "rate",
    "PEEP",
    "FiO2",
)
action_names = ("inspiration", "rate", "PEEP", "FiO2")

# Of the settings in the order of `action_names`: driving pressure in cmH2O or volume in ml/kg.
_LOW = (4.0, 6.0, 0.0, 0.21)
_HIGH = {"pressure": (30.0, 35.0, 20.0, 1.0), "volume": (12.0, 35.0, 20.0, 1.0)}
_START = {"pressure": (14.0, 16.0, 5.0, 0.5), "volume": (7.0, 16.0, 5.0, 0.5)}

# What an observation of 0 and of 1 stand for, of the first seven in `observation_names`.
_OBSERVED_LOW = (0.5, 10.0, 6.8, 0.0, 0.0, 0.0, 0.0)
_OBSERVED_HIGH = (1.0, 110.0, 7.8, 50.0, 16.0, 20.0, 25.0)


@struct.dataclass(kw_only=True)
class State:
    """One patient: `gases`, and the `lung` drawn at the start of the episode."""

    gases: Gases
    lung: Lung


@struct.dataclass(kw_only=True)
class Params:
    """What `reset` and `step` read.

    Attributes:
      lung: the typical patient.
      spread: like `lung`, the standard deviation of the logarithm of each constant among patients.
      start: gases of the typical patient at the beginning.
      death_reward: instead of the reward of that step, `[]`.
    """

    lung: Lung
    spread: Lung
    start: Gases
    death_reward: Array


def make(
    *,
    mode: Literal["pressure", "volume"] = "pressure",
    max_steps: int = 144,
    patient_variation: float = 1.0,
    num_substeps: int = 10,
) -> Environment:
    """The problem as an environment; the observation is `[11]`, see `observation_names`.

    Observations are scaled to [0, 1] and clipped there. The action is `Box((4,))`, see
    `action_names`: what the ventilator does during inspiration, the rate, PEEP and FiO2, all in
    their own units. `TimeStep.info` holds the same numbers in theirs, named as in `Gases`,
    `Breath` and `Settings`, and `acidity`.

    Args:
      mode: "pressure" for a driving pressure of 4 to 30 cmH2O, "volume" for a tidal volume of 4 to
        12 ml per kg.
      max_steps: truncate after this many steps of 10 minutes.
      patient_variation: multiplies the spread of the patients; 0 for the typical one.
      num_substeps: of the integrator a step.

    Raises:
      ValueError: for an option out of range.
    """
    checks.one_of("mode", mode, ("pressure", "volume"))
    checks.between("patient_variation", patient_variation, 0, 2)
    checks.at_least("num_substeps", num_substeps, 5)
    space = Box(shape=(4,), low=_LOW, high=_HIGH[mode])
    breathe = pressure_breath if mode == "pressure" else volume_breath

    def observe(gases: Gases, breath: Breath, settings: Settings, lung: Lung) -> Array:
        measured = (
            gases.saturation,
            gases.carbon_dioxide,
            acidity(gases.carbon_dioxide, lung),
            breath.plateau_pressure,
            breath.tidal_volume / lung.weight,
            breath.trapped_volume / open_part(gases, lung).compliance,
            breath.tidal_volume * settings.rate / 1000,
        )
        values = jnp.stack([*measured, *settings])
        low = jnp.asarray((*_OBSERVED_LOW, *_LOW), values.dtype)
        high = jnp.asarray((*_OBSERVED_HIGH, *_HIGH[mode]), values.dtype)
        return jnp.clip((values - low) / (high - low), 0, 1)

    def reset(key: Key, params: Params) -> tuple[State, Array]:
        lung = params.lung
        if patient_variation:
            spread = jax.tree.map(lambda leaf: patient_variation * leaf, params.spread)
            lung = log_normal_patient(key, lung, spread)
        settings = Settings(*jnp.asarray(_START[mode], lung.weight.dtype))
        breath = breathe(settings, open_part(params.start, lung))
        return State(gases=params.start, lung=lung), observe(params.start, breath, settings, lung)

    def step(key: Key, state: State, action: Array, params: Params) -> tuple[State, TimeStep]:
        del key
        lung = state.lung
        bounds = (jnp.asarray(bound, lung.weight.dtype) for bound in (_LOW, _HIGH[mode]))
        settings = Settings(*jnp.clip(action, *bounds))
        # The lung opens in the course of hours: within a step its compliance is constant.
        breath = breathe(settings, open_part(state.gases, lung))
        gases = rk4_step(
            lambda gases: derivative(gases, breath, settings, lung),
            state.gases,
            STEP,
            num_substeps,
        )
        ph = acidity(gases.carbon_dioxide, lung)
        died = (gases.saturation < 0.5) | (ph < 6.8) | (ph > 7.8)
        return dataclasses.replace(state, gases=gases), TimeStep(
            observation=observe(gases, breath, settings, lung),
            reward=jnp.where(died, params.death_reward, score(gases, breath, settings, lung)),
            terminated=died,
            truncated=jnp.zeros_like(died),
            info={
                "carbon_dioxide": gases.carbon_dioxide,
                "saturation": gases.saturation,
                "opened": gases.opened,
                "acidity": ph,
                **breath._asdict(),
                **settings._asdict(),
            },
        )

    environment = Environment(
        name="ventilation",
        reset=reset,
        step=step,
        default_params=default_params(),
        observation_space=Box(shape=(len(observation_names),), low=0.0, high=1.0),
        action_space=space,
    )
    return core.time_limit(environment, max_steps)


def score(gases: Gases, breath: Breath, settings: Settings, lung: Lung) -> Array:
    """The reward of a patient alive, in [0, 1], see the module."""

    def within(value: Array, low: float, high: float, margin: float) -> Array:
        distance = jnp.maximum(jnp.maximum(low - value, value - high), 0)
        return jnp.clip(1 - distance / margin, 0, 1)

    scores = (
        within(gases.saturation, 0.88, 0.95, 0.08),
        within(acidity(gases.carbon_dioxide, lung), 7.30, 7.45, 0.15),
        within(breath.plateau_pressure, -jnp.inf, 30.0, 10.0),
        within(breath.tidal_volume / lung.weight, -jnp.inf, 8.0, 4.0),
        within(settings.oxygen, -jnp.inf, 0.6, 0.4),
    )
    return sum(scores[1:], scores[0]) / len(scores)


def default_params() -> Params:
    """A typical patient with a moderately injured lung, and how patients differ: made up."""
    lung = Lung(
        **constants(
            compliance=40.0,
            resistance=0.012,
            half_pressure=9.0,
            open_shunt=0.05,
            closed_shunt=0.45,
            dead_space=2.5,
            carbon_dioxide_production=3.2,
            cardiac_output=5.5,
            haemoglobin=11.0,
            bicarbonate=24.0,
            weight=65.0,
            carbon_dioxide_store=60.0,
            oxygen_time=1.0,
            opening_time=60.0,
        )
    )
    spread = Lung(
        **constants(
            compliance=0.25,
            resistance=0.25,
            half_pressure=0.2,
            open_shunt=0.2,
            closed_shunt=0.2,
            dead_space=0.1,
            carbon_dioxide_production=0.15,
            cardiac_output=0.15,
            haemoglobin=0.1,
            bicarbonate=0.1,
            weight=0.12,
            carbon_dioxide_store=0.1,
            oxygen_time=0.1,
            opening_time=0.2,
        )
    )
    return Params(
        lung=lung,
        spread=spread,
        start=Gases(**constants(carbon_dioxide=48.0, saturation=0.88, opened=0.5)),
        **constants(death_reward=-20.0),
    )
