"""Chemotherapy of a tumour, with the patient's normal and immune cells as collateral: AhnChemo.

Research only, not for clinical use. Cells are fractions of the carrying capacity of their tissue,
time is in days, a step is a quarter of a day (6 hours), and 600 steps are 150 days:

    N' = r2 N (1 - b2 N) - c4 T N - a3 (1 - exp(-B)) N                    normal cells
    T' = r1 T (1 - b1 T) - c2 I T - c3 T N - a2 (1 - exp(-B)) T           tumour cells
    I' = s + rho I T / (alpha + T) - c1 I T - d1 I - a1 (1 - exp(-B)) I   immune cells
    B' = -d2 B + u                                                        drug in the blood

The action is u in [0, 1], the rate of the infusion, constant during a step. The reward after a step
is N / N0 - T / T0 - u, with the cells AFTER the step and N0, T0 those at the start of the episode;
the patient dies when N falls below 0.63, and then the reward is -100 instead.

Without noise the undiscounted return of 600 steps of a constant dose is -164.34 at u = 0 (death at
step 73), -445.55 at .25, 65.95 at .5, -13.01 at .75 and -134.02 at 1. The best constant dose is
0.467, with 67.84. A policy can do much better: a tumour that is nearly gone stays away untreated.

Source: de Pillis & Radunskaya (2003), "The dynamics of an optimally controlled tumor model: a case
  study" (the model); Ahn & Park (2011), "Drug scheduling of cancer chemotherapy based on natural
  actor-critic approach" (the constants, the start and the control problem).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.envs import core
from jaxrl_llm.envs.ode import rk4_step
from jaxrl_llm.envs.patient_variation import constants, log_normal_patient
from jaxrl_llm.types import Array, Box, Discrete, Environment, Key, TimeStep

STEP = 0.25
"""Days."""

observation_names = ("normal cells", "tumour cells", "immune cells", "drug")
action_names = ("infusion rate",)

# Each observation is divided by this, so that it stays near [0, 1]; immune cells reach s / d1.
_SCALE = (1.0, 1.0, 2.0, 1.0)
_OBSERVATION_HIGH = 2.0


@struct.dataclass(kw_only=True)
class Cells:
    """What the equations move, `[]` each, fractions of a carrying capacity (the drug: units).

    Attributes:
      normal: N.
      tumour: T.
      immune: I.
      drug: B.
    """

    normal: Array
    tumour: Array
    immune: Array
    drug: Array


@struct.dataclass(kw_only=True)
class Rates:
    """Constants of a patient, `[]` each, per day unless said.

    Attributes:
      tumour_growth: r1.
      tumour_crowding: b1, 1 / carrying capacity.
      normal_growth: r2.
      normal_crowding: b2, 1 / carrying capacity.
      immune_source: s.
      immune_response: rho.
      immune_threshold: alpha, tumour at which the response is half of the most (no unit of time).
      immune_loss: d1.
      drug_clearance: d2.
      immune_loss_to_tumour: c1.
      tumour_loss_to_immune: c2.
      tumour_loss_to_normal: c3.
      normal_loss_to_tumour: c4.
      immune_kill: a1, of the drug.
      tumour_kill: a2.
      normal_kill: a3.
    """

    tumour_growth: Array
    tumour_crowding: Array
    normal_growth: Array
    normal_crowding: Array
    immune_source: Array
    immune_response: Array
    immune_threshold: Array
    immune_loss: Array
    drug_clearance: Array
    immune_loss_to_tumour: Array
    tumour_loss_to_immune: Array
    tumour_loss_to_normal: Array
    normal_loss_to_tumour: Array
    immune_kill: Array
    tumour_kill: Array
    normal_kill: Array


@struct.dataclass(kw_only=True)
class Params:
    """What `reset` and `step` read, `[]` each.

    Attributes:
      rates: of the typical patient.
      start: cells at the beginning.
      lethal: the patient dies with fewer normal cells.
      death_reward: instead of the reward of that step.
    """

    rates: Rates
    start: Cells
    lethal: Array
    death_reward: Array


@struct.dataclass(kw_only=True)
class State:
    """One patient: `cells`, and the `rates` drawn at the start of the episode."""

    cells: Cells
    rates: Rates


def default_rates() -> Rates:
    """Of Ahn & Park (2011)."""
    return Rates(
        **constants(
            tumour_growth=1.5,
            tumour_crowding=1.0,
            normal_growth=1.0,
            normal_crowding=1.0,
            immune_source=0.33,
            immune_response=0.01,
            immune_threshold=0.3,
            immune_loss=0.2,
            drug_clearance=1.0,
            immune_loss_to_tumour=1.0,
            tumour_loss_to_immune=0.5,
            tumour_loss_to_normal=1.0,
            normal_loss_to_tumour=1.0,
            immune_kill=0.2,
            tumour_kill=0.3,
            normal_kill=0.1,
        )
    )


def default_start() -> Cells:
    """(N, T, I, B) = (.9, .2, .005, 0), case 2 of Ahn & Park (2011)."""
    return Cells(**constants(normal=0.9, tumour=0.2, immune=0.005, drug=0.0))


def derivative(cells: Cells, dose: Array, rates: Rates) -> Cells:
    """The four equations of the module, per day.

    Args:
      cells: now.
      dose: u, `[]`.
      rates: of the patient.
    """
    normal, tumour, immune = cells.normal, cells.tumour, cells.immune
    effect = -jnp.expm1(-cells.drug)
    growth_of_normal = rates.normal_growth * (1 - rates.normal_crowding * normal)
    growth_of_tumour = rates.tumour_growth * (1 - rates.tumour_crowding * tumour)
    response = rates.immune_response * tumour / (rates.immune_threshold + tumour)
    return Cells(
        normal=normal
        * (growth_of_normal - rates.normal_loss_to_tumour * tumour - rates.normal_kill * effect),
        tumour=tumour
        * (
            growth_of_tumour
            - rates.tumour_loss_to_immune * immune
            - rates.tumour_loss_to_normal * normal
            - rates.tumour_kill * effect
        ),
        immune=rates.immune_source
        + immune
        * (
            response
            - rates.immune_loss_to_tumour * tumour
            - rates.immune_loss
            - rates.immune_kill * effect
        ),
        drug=dose - rates.drug_clearance * cells.drug,
    )


def make(
    *,
    action: Literal["continuous", "discrete"] = "continuous",
    num_doses: int = 5,
    max_steps: int = 600,
    patient_variation: float = 0.0,
    process_noise: float = 0.0,
    observation_noise: float = 0.0,
    num_substeps: int = 2,
) -> Environment:
    """The problem as an environment; the observation is `[4]`, see `observation_names`.

    Observations are cells and drug as fractions of (1, 1, 2, 1), clipped to [0, 2].
    `TimeStep.info` holds `normal_cells`, `tumour_cells`, `immune_cells`, `drug` and `dose`, `[]`
    each, without measurement noise.

    Args:
      action: "continuous" for `Box((1,), 0, 1)`, or "discrete" for `Discrete(num_doses)`, the
        doses 0, 1 / (num_doses - 1), ..., 1.
      num_doses: 2 or more; of the discrete variant.
      max_steps: truncate after this many steps of 6 hours.
      patient_variation: standard deviation of the logarithm of each rate: 0 for the published
        patient, .1 for rates that differ by about 10%.
      process_noise: standard deviation of the logarithm of each cell count after a day; the drug
        has none.
      observation_noise: standard deviation of the logarithm of each measurement.
      num_substeps: of the integrator a step; 2 keep the error of a return of 600 steps below 2e-4,
        8 below 1e-6 (in float64; rounding in float32 adds up to .02).

    Raises:
      ValueError: for an option out of range.
    """
    checks.one_of("action", action, ("continuous", "discrete"))
    checks.at_least("num_doses", num_doses, 2)
    checks.at_least("num_substeps", num_substeps, 1)
    checks.between("patient_variation", patient_variation, 0, 1)
    checks.between("process_noise", process_noise, 0, 1)
    checks.between("observation_noise", observation_noise, 0, 1)
    is_discrete = action == "discrete"

    is_noisy = bool(process_noise or observation_noise)

    def observe(cells: Cells, noise: Array | float) -> Array:
        values = jnp.stack([cells.normal, cells.tumour, cells.immune, cells.drug])
        seen = values * jnp.exp(observation_noise * noise) if is_noisy else values
        return jnp.clip(seen / jnp.array(_SCALE, values.dtype), 0, _OBSERVATION_HIGH)

    def reset(key: Key, params: Params) -> tuple[State, Array]:
        patient_key, noise_key = jax.random.split(key)
        rates, noise = params.rates, 0.0
        if patient_variation:
            rates = log_normal_patient(patient_key, rates, patient_variation)
        if is_noisy:
            noise = jax.random.normal(noise_key, (4,), rates.tumour_growth.dtype)
        return State(cells=params.start, rates=rates), observe(params.start, noise)

    def step(key: Key, state: State, action: Array, params: Params) -> tuple[State, TimeStep]:
        dose = action / (num_doses - 1) if is_discrete else jnp.clip(action[0], 0, 1)
        cells = rk4_step(
            lambda cells: derivative(cells, dose, state.rates), state.cells, STEP, num_substeps
        )
        noise = 0.0
        # Random numbers cost more than the cells: none are drawn where none are needed.
        if is_noisy:
            deviates = jax.random.normal(key, (7,), cells.normal.dtype)
            factor, noise = jnp.exp(process_noise * STEP**0.5 * deviates[:3]), deviates[3:]
            cells = dataclasses.replace(
                cells,
                normal=cells.normal * factor[0],
                tumour=cells.tumour * factor[1],
                immune=cells.immune * factor[2],
            )
        died = cells.normal < params.lethal
        reward = cells.normal / params.start.normal - cells.tumour / params.start.tumour - dose
        return dataclasses.replace(state, cells=cells), TimeStep(
            observation=observe(cells, noise),
            reward=jnp.where(died, params.death_reward, reward),
            terminated=died,
            truncated=jnp.zeros_like(died),
            info={
                "normal_cells": cells.normal,
                "tumour_cells": cells.tumour,
                "immune_cells": cells.immune,
                "drug": cells.drug,
                "dose": dose,
            },
        )

    environment = Environment(
        name="chemotherapy",
        reset=reset,
        step=step,
        default_params=Params(
            rates=default_rates(),
            start=default_start(),
            **constants(lethal=0.63, death_reward=-100.0),
        ),
        observation_space=Box(shape=(4,), low=0.0, high=_OBSERVATION_HIGH),
        action_space=Discrete(num=num_doses) if is_discrete else Box(shape=(1,), low=0.0, high=1.0),
    )
    return core.time_limit(environment, max_steps)
