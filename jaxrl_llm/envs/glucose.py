"""Type 1 diabetes: insulin by the pump, glucose by the sensor, through meals, for a day.

Research only, not for clinical use; the patients are SYNTHETIC. A step is 5 minutes and an episode
24 hours from midnight, then truncated. Everybody is somebody else: body, appetite and hours of
meals are drawn at reset and stay until the next one. The body is `hovorka` or `uva_padova`, the
sensor `glucose_sensor`, the food `meals`; a rule that people live by is `basal_bolus`, and
`glucose_outcome` says how well anybody did.

The action is insulin for the step, in HOURS OF THE PATIENT'S BASAL RATE (the U/h that hold glucose
without meals, at 115 mg/dL in `hovorka`), so that one action does much the same in everybody:

- `"continuous"`: a in [0, 1] is MAX_HOURS · expm1(8 a)/expm1(8) hours; .40 is the basal rate, .5
  twice it, 1 is 10 hours at once, as for a large meal. `to_action` is the inverse.
- `"discrete"`: one of `DOSES`, hours.

As pumps do, this one delivers no more than leaves `MAX_ON_BOARD` hours of insulin on board, beyond
the basal rate. Insulin and carbohydrates on board are a pump's own bookkeeping, with the absorption
times of an average patient: (1 + t/T) exp(-t/T) of a dose remains after t minutes.

Reward, of plasma glucose G (mg/dL) after the step:

- `"risk"`: -f^2/10 with f = 1.509 (ln(G)^1.084 - 5.381), from 0 at 112 to -1 at 20 and 600:
  Kovatchev et al. (2000), "Risk analysis of blood glucose data", Journal of Theoretical Medicine 3,
  1-10, there 10 f^2, in percent;
- `"magni"`: the same with f = 3.5506 (ln(G)^.8353 - 3.7932), 0 at 139, from Magni et al. (2007),
  "Model predictive control of type 1 diabetes", Journal of Diabetes Science and Technology 1,
  804-812: it weighs hyperglycaemia less and severe hypoglycaemia far more;
- `"range"`: 1 in 70 to 180, -1 below, 0 above.

Below 40 and above 600 mg/dL the episode ends, at `termination_reward` more.

Observation, `[12]` float32: the last six readings, oldest first, 40 to 400 mg/dL as -1 to 1;
insulin on board beyond basal, in 10 hours; carbohydrates of meals that begin within the next 15
minutes, in 100 g, each seen at one step alone; carbohydrates on board, in 100 g; the basal rate, in
2 U/h; sine and cosine of the time of day. Without announcement both carbohydrates are 0.
"""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.envs import core, glucose_sensor, hovorka, meals, uva_padova
from jaxrl_llm.types import Array, Box, Discrete, Environment, Key, PyTree, TimeStep

NUM_READINGS = 6
MAX_HOURS = 10.0
MAX_ON_BOARD = 20.0  # hours of basal insulin
DOSES = (0.0, 1 / 24, 1 / 12, 1 / 6, 1 / 3, 2 / 3, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0)
HYPOGLYCAEMIA, HYPERGLYCAEMIA = 70.0, 180.0  # mg/dL, the ends of the range
_LIMITS = (40.0, 600.0)  # mg/dL, where an episode ends
_STEEPNESS = 8.0
_FIRST = (90.0, 180.0)  # mg/dL at reset, uniform
# What a pump assumes of everybody, min.
_INSULIN_TIME, _MEAL_TIME = 55.0, 40.0

# A model of the body is a module: `sample_patient`, `rest`, `advance`, `plasma_glucose`,
# `interstitial_glucose`; its patients have a `basal` rate.
_MODELS = {"hovorka": hovorka, "uva_padova": uva_padova}

Model = Literal["hovorka", "uva_padova"]
Action = Literal["continuous", "discrete"]
Reward = Literal["risk", "magni", "range"]

observation_names = (
    *(f"reading {age} steps ago" for age in range(NUM_READINGS - 1, 0, -1)),
    "reading",
    "insulin on board",
    "carbohydrates announced",
    "carbohydrates on board",
    "basal rate",
    "sine of the time of day",
    "cosine of the time of day",
)
action_names = ("insulin",)


@struct.dataclass(kw_only=True)
class State:
    """A patient, the pump and the sensor.

    Attributes:
      patient: who it is.
      body: state of the differential equations.
      plan: the meals to come and past.
      noise: `[]`, of the sensor.
      readings: `[6]` mg/dL, oldest first.
      insulin: two compartments of insulin on board beyond basal, U, `[]` each.
      carbohydrates: two compartments of carbohydrates on board, g, `[]` each.
      minute: `[]` float32, since the first midnight.
    """

    patient: PyTree
    body: PyTree
    plan: meals.Plan
    noise: Array
    readings: Array
    insulin: tuple[Array, Array]
    carbohydrates: tuple[Array, Array]
    minute: Array


@struct.dataclass(kw_only=True)
class Readable:
    """An observation in its units, any leading shape.

    Attributes:
      readings: `[..., 6]` mg/dL, oldest first.
      insulin_on_board: beyond basal, U.
      announced: carbohydrates of a meal about to begin, g.
      carbohydrates_on_board: g.
      basal: U/h.
    """

    readings: Array
    insulin_on_board: Array
    announced: Array
    carbohydrates_on_board: Array
    basal: Array


def to_dose(action: Array) -> Array:
    """Hours of basal insulin of a continuous action, any shape."""
    return MAX_HOURS * jnp.expm1(_STEEPNESS * action) / jnp.expm1(_STEEPNESS)


def to_action(hours: Array | float) -> Array:
    """The continuous action that gives `hours` of basal insulin, as near as [0, 1] comes to it.

    >>> round(float(to_action(1 / 12)), 2)  # the basal rate, in a step of 5 minutes
    0.41
    """
    share = jnp.clip(hours / MAX_HOURS, 0, 1)
    return jnp.log1p(share * jnp.expm1(_STEEPNESS)) / _STEEPNESS


def read(observation: Array) -> Readable:
    """The observation `[..., 12]` in its units."""
    basal = 2 * observation[..., NUM_READINGS + 3]
    low, high = glucose_sensor.LOWEST, glucose_sensor.HIGHEST
    return Readable(
        readings=low + (high - low) * (observation[..., :NUM_READINGS] + 1) / 2,
        insulin_on_board=MAX_HOURS * basal * observation[..., NUM_READINGS],
        announced=100 * observation[..., NUM_READINGS + 1],
        carbohydrates_on_board=100 * observation[..., NUM_READINGS + 2],
        basal=basal,
    )


def risk(glucose: Array, *, kind: Literal["risk", "magni"] = "risk") -> Array:
    """f^2/10 of the module, of `glucose` in mg/dL, any shape; it is fitted from 20 to 600.

    >>> round(float(risk(112.5)), 3), round(float(risk(40.0)), 3)
    (0.0, 0.364)
    """
    logarithm = jnp.log(jnp.clip(glucose, 20.0, 600.0))
    if kind == "risk":
        return jnp.square(1.509 * (logarithm**1.084 - 5.381)) / 10
    return jnp.square(3.5506 * (logarithm**0.8353 - 3.7932)) / 10


def make(
    *,
    model: Model = "hovorka",
    action: Action = "continuous",
    reward: Reward = "risk",
    minutes: float = 5.0,
    hours: float = 24.0,
    announcement: float | None = 15.0,
    noise: bool = True,
    terminate: bool = True,
    termination_reward: float = -100.0,
    population: hovorka.Population | uva_padova.Patient | None = None,
) -> Environment:
    """A day of one patient, see the module.

    `TimeStep.info`, float32 `[]` each: `glucose` (plasma, mg/dL), `reading` (mg/dL), `insulin` (U,
    given in the step), `carbohydrates` (g, eaten in it), `insulin_on_board` (U beyond basal),
    `basal` (U/h), `risk`, and 0 or 1 of `in_range`, `hypoglycaemia`, `hyperglycaemia`.

    Args:
      model: of the body, "hovorka" or "uva_padova"; the latter needs simglucose installed.
      action: "continuous" or "discrete".
      reward: "risk", "magni" or "range".
      minutes: a step, 3 to 15; a whole number in "uva_padova".
      hours: an episode, a multiple of the step.
      announcement: minutes before a meal begins that it is announced; None for never.
      noise: whether the sensor errs.
      terminate: whether extreme glucose ends the episode.
      termination_reward: added where it does; -100 is what the worst glucose costs for ever, with a
        discount of .99.
      population: of the patients, from the model's `population(...)`: the default parameters.

    Raises:
      ValueError: for an option that is out of range.
      ModuleNotFoundError: simglucose is not installed, with "uva_padova".
    """
    checks.one_of("model", model, _MODELS)
    checks.one_of("action", action, ("continuous", "discrete"))
    checks.one_of("reward", reward, ("risk", "magni", "range"))
    checks.between("minutes", minutes, 3, 15)
    checks.at_least("hours", hours, minutes / 60)
    if not math.isclose(num_steps := hours * 60 / minutes, round(num_steps)):
        raise ValueError(f"hours is {hours}; it must be a multiple of {minutes:g} minutes")
    checks.finite("termination_reward", termination_reward)
    if announcement is not None:
        checks.between("announcement", announcement, 0, 60)
    if model == "uva_padova" and minutes != round(minutes):
        raise ValueError(f"minutes is {minutes}; it must be a whole number in uva_padova")
    module, doses = _MODELS[model], jnp.array(DOSES)

    def look(state: State) -> Array:
        return _observe(state, minutes, announcement)

    def reset(key: Key, params: PyTree) -> tuple[State, Array]:
        state = _begin(module, key, params, noise=noise, num_days=-int(-hours // 24))
        return state, look(state)

    def step(key: Key, state: State, action_: Array, params: PyTree) -> tuple[State, TimeStep]:
        del params
        if action == "discrete":
            dose = doses.at[action_].get(mode="promise_in_bounds")
        else:
            dose = to_dose(jnp.clip(action_.reshape(()), 0, 1))
        dose = jnp.nan_to_num(dose)
        state, info = _advance(module, key, state, dose, minutes, announcement, noise=noise)
        extreme = (info["glucose"] < _LIMITS[0]) | (info["glucose"] > _LIMITS[1])
        terminated = extreme & terminate
        return state, TimeStep(
            observation=look(state),
            reward=_reward(info, reward) + jnp.where(terminated, termination_reward, 0),
            terminated=terminated,
            truncated=jnp.bool_(False),
            info=info,
        )

    environment = Environment(
        name="glucose",
        reset=reset,
        step=step,
        default_params=module.population() if population is None else population,
        observation_space=Box(shape=(len(observation_names),), low=-4.0, high=4.0),
        action_space=(
            Box(shape=(1,), low=0.0, high=1.0)
            if action == "continuous"
            else Discrete(num=len(DOSES))
        ),
    )
    return core.time_limit(environment, round(num_steps))


def _begin(model: ModuleType, key: Key, params: PyTree, *, noise: bool, num_days: int) -> State:
    patient_key, plan_key, glucose_key, noise_key = jax.random.split(key, 4)
    patient = model.sample_patient(patient_key, params)
    glucose = jax.random.uniform(glucose_key, minval=_FIRST[0], maxval=_FIRST[1])
    first = glucose_sensor.first_noise(noise_key)
    shown = glucose_sensor.reading(glucose, first) if noise else glucose
    zero = jnp.float32(0)
    return State(
        patient=patient,
        body=model.rest(patient, glucose),
        plan=meals.draw(plan_key, num_days),
        noise=first,
        readings=jnp.broadcast_to(shown, (NUM_READINGS,)),
        insulin=(zero, zero),
        carbohydrates=(zero, zero),
        minute=zero,
    )


def _advance(
    model: ModuleType,
    key: Key,
    state: State,
    dose: Array,
    minutes: float,
    announcement: float | None,
    *,
    noise: bool,
) -> tuple[State, dict[str, Array]]:
    """One step at `dose` hours of basal insulin: the next state, and `TimeStep.info`."""
    patient = state.patient
    usual = minutes / 60
    room = MAX_ON_BOARD - (state.insulin[0] + state.insulin[1]) / patient.basal
    given = jnp.minimum(dose, usual + jnp.maximum(room, 0))
    eaten = meals.between(state.plan, state.minute, state.minute + minutes)
    known = jnp.zeros_like(eaten) if announcement is None else eaten
    insulin = given * patient.basal
    body = model.advance(state.body, insulin, eaten, minutes, patient)
    error = glucose_sensor.next_noise(key, state.noise, minutes)
    below_skin = model.interstitial_glucose(body, patient)
    shown = glucose_sensor.reading(below_skin, error) if noise else below_skin
    state = dataclasses.replace(
        state,
        body=body,
        noise=error,
        readings=jnp.append(state.readings[1:], shown),
        insulin=_absorb(state.insulin, (given - usual) * patient.basal, minutes / _INSULIN_TIME),
        carbohydrates=_absorb(state.carbohydrates, known, minutes / _MEAL_TIME),
        minute=state.minute + minutes,
    )
    glucose = model.plasma_glucose(body, patient)
    low, high = glucose < HYPOGLYCAEMIA, glucose > HYPERGLYCAEMIA
    return state, {
        "glucose": glucose,
        "reading": shown,
        "insulin": insulin,
        "carbohydrates": eaten,
        "insulin_on_board": state.insulin[0] + state.insulin[1],
        "basal": patient.basal,
        "risk": risk(glucose),
        "in_range": 1.0 - low - high,
        "hypoglycaemia": low.astype(jnp.float32),
        "hyperglycaemia": high.astype(jnp.float32),
    }


def _absorb(compartments: tuple[Array, Array], added: Array, passed: float) -> tuple[Array, Array]:
    """Two compartments in a row, `passed` time constants after `added` entered the first."""
    first, second = compartments[0] + added, compartments[1]
    kept = jnp.exp(-passed)
    return first * kept, (second + first * passed) * kept


def _reward(info: dict[str, Array], kind: Reward) -> Array:
    if kind == "range":
        return info["in_range"] - info["hypoglycaemia"]
    return -risk(info["glucose"], kind=kind)


def _observe(state: State, minutes: float, announcement: float | None) -> Array:
    low, high = glucose_sensor.LOWEST, glucose_sensor.HIGHEST
    basal = state.patient.basal
    announced = jnp.float32(0)
    if announcement is not None:
        start = state.minute + announcement
        announced = meals.between(state.plan, start, start + minutes)
    angle = 2 * jnp.pi * state.minute / meals.MINUTES_PER_DAY
    return jnp.concatenate(
        [
            jnp.clip(2 * (state.readings - low) / (high - low) - 1, -1, 1),
            jnp.stack(
                [
                    (state.insulin[0] + state.insulin[1]) / (MAX_HOURS * basal),
                    announced / 100,
                    (state.carbohydrates[0] + state.carbohydrates[1]) / 100,
                    basal / 2,
                    jnp.sin(angle),
                    jnp.cos(angle),
                ]
            ),
        ]
    )
