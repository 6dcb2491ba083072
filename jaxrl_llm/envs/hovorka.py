"""Glucose and insulin of a person with type 1 diabetes, as Hovorka's differential equations.

Research only, not for clinical use. Amounts are per kilogram of body weight, time is in minutes:

    S1' = u - S1/tI                        insulin under the skin, mU/kg
    S2' = (S1 - S2)/tI
    I'  = S2/(tI VI) - ke I                plasma insulin, mU/L
    x1' = ka1 (ST I - x1)                  its effect on glucose transport, 1/min
    x2' = ka2 (SD I - x2)                  on glucose disposal, 1/min
    x3' = ka3 (SE I - x3)                  on endogenous production, 1
    D1' = AG d - D1/tG                     glucose in the gut, mmol/kg
    D2' = (D1 - D2)/tG
    Q1' = -F01c - FR - x1 Q1 + k12 Q2 + D2/tG + EGP0 max(1 - x3, 0)    glucose in plasma, mmol/kg
    Q2' = x1 Q1 - (k12 + x2) Q2                                        and in tissue
    C'  = (G - C)/5,  G = Q1/VG            under the skin, where a sensor is, mmol/L

u is insulin in mU/kg/min and d carbohydrate in mmol/kg/min. Uptake that needs no insulin is
F01c = F01 min(G/4.5, 1); the kidneys excrete FR = .003 max(G - 9, 0) VG.

Source: Hovorka et al. (2004), "Nonlinear model predictive control of glucose concentration in
  subjects with type 1 diabetes", Physiological Measurement 25, 905-920: equations and mean values.
  Two deviations: production cannot be negative, and the sensor's lag of 5 minutes is that of Breton
  & Kovatchev (2008), "Analysis, modeling, and simulation of the accuracy of continuous glucose
  sensors", Journal of Diabetes Science and Technology 2, 853-862.
  Who differs from whom is as in Resalat et al. (2019), "A statistical virtual patient population
  for the glucoregulatory system in type 1 diabetes with integrated exercise model", PLOS ONE 14,
  e0217301: weight, and three sensitivities that vary together around .4 of Hovorka's, which is what
  an average daily need of 42.3 U takes. How much the two absorption times vary is SYNTHETIC.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.envs import draws
from jaxrl_llm.envs.ode import rk4_step
from jaxrl_llm.types import Array, Key

MG_PER_DL = 18.0156  # in a mmol/L of glucose
_GRAMS_PER_MMOL = 0.180156

_INSULIN_VOLUME = 0.12  # VI, L/kg
_GLUCOSE_VOLUME = 0.16  # VG, L/kg
_INSULIN_ELIMINATION = 0.138  # ke, 1/min
_TRANSFER = 0.066  # k12, 1/min
_TRANSPORT_RATE, _DISPOSAL_RATE, _PRODUCTION_RATE = 0.006, 0.06, 0.03  # ka1, ka2, ka3, 1/min
_BIOAVAILABILITY = 0.8  # AG
_SENSOR_LAG = 5.0  # min
_SUBSTEP = 2.5  # min, at most
# Deviations of a normal law are cut there: no sensitivity is 0, and no patient a case of its own.
_CUT = 2.0


@struct.dataclass(kw_only=True)
class Population:
    """What patients are drawn from, `[]` float32 each.

    Attributes:
      weight: mean, kg.
      weight_deviation: kg.
      production: EGP0, endogenous glucose production without insulin, mmol/kg/min.
      uptake: F01, glucose uptake without insulin, mmol/kg/min.
      transport_sensitivity: mean of ST, 1/min per mU/L.
      disposal_sensitivity: mean of SD, 1/min per mU/L.
      production_sensitivity: mean of SE, per mU/L.
      sensitivity: factor of the three and of their deviations.
      variation: factor of the three deviations, which are .28, .39 and .26 of the means; 0 makes
        everybody equally sensitive.
      insulin_time: median of tI, min.
      meal_time: median of tG, min.
      insulin_time_variation, meal_time_variation: standard deviations of the logarithms.
      target: glucose that the basal rate holds, mg/dL.
    """

    weight: Array
    weight_deviation: Array
    production: Array
    uptake: Array
    transport_sensitivity: Array
    disposal_sensitivity: Array
    production_sensitivity: Array
    sensitivity: Array
    variation: Array
    insulin_time: Array
    meal_time: Array
    insulin_time_variation: Array
    meal_time_variation: Array
    target: Array


def population(
    *,
    weight: float = 76.3,
    weight_deviation: float = 15.9,
    production: float = 0.0161,
    uptake: float = 0.0097,
    transport_sensitivity: float = 51.2e-4,
    disposal_sensitivity: float = 8.2e-4,
    production_sensitivity: float = 520e-4,
    sensitivity: float = 0.4,
    variation: float = 1.0,
    insulin_time: float = 55.0,
    meal_time: float = 40.0,
    insulin_time_variation: float = 0.15,
    meal_time_variation: float = 0.25,
    target: float = 115.0,
) -> Population:
    """The published population; `variation=0` and the like make it narrower.

    Raises:
      ValueError: nobody would need insulin, or a number is negative.
    """
    values = dict(locals())
    for name, value in values.items():
        checks.at_least(name, value, 0)
    if production <= uptake:
        raise ValueError(f"production is {production}; it must be more than uptake, {uptake}")
    return Population(**{name: jnp.float32(value) for name, value in values.items()})


@struct.dataclass(kw_only=True)
class Patient:
    """One person, `[]` float32 each, in the units of `Population`.

    Attributes:
      basal: insulin that holds the target, U/h.
    """

    weight: Array
    production: Array
    uptake: Array
    transport_sensitivity: Array
    disposal_sensitivity: Array
    production_sensitivity: Array
    insulin_time: Array
    meal_time: Array
    basal: Array


@struct.dataclass(kw_only=True)
class Body:
    """The state of the differential equations, `[]` float32 each, named as in the module.

    Attributes:
      skin: S1, S2, mU/kg.
      plasma_insulin: I, mU/L.
      transport, disposal, suppression: x1, x2 (1/min) and x3.
      gut: D1, D2, mmol/kg.
      plasma, tissue: Q1, Q2, mmol/kg.
      interstitial: C, mmol/L.
    """

    skin: tuple[Array, Array]
    plasma_insulin: Array
    transport: Array
    disposal: Array
    suppression: Array
    gut: tuple[Array, Array]
    plasma: Array
    tissue: Array
    interstitial: Array


def sample_patient(key: Key, population: Population) -> Patient:
    """A person drawn from `population`.

    SD deviates by one standard normal number z; ST by z + u/4 and SE by z + 3u/4 of theirs, with u
    uniform in [-1, 1]: correlated, the first two closely (Resalat et al. 2019).
    """
    drawn = draws.uniform(key, (6,))
    z = draws.truncated_normal(drawn[:4], -_CUT, _CUT)
    transport, production = 2 * drawn[4] - 1, 2 * drawn[5] - 1

    def deviate(mean: Array, share: float, by: Array) -> Array:
        return population.sensitivity * mean * (1 + population.variation * share * by)

    return with_basal(
        Patient(
            weight=population.weight + population.weight_deviation * z[0],
            production=population.production,
            uptake=population.uptake,
            transport_sensitivity=deviate(
                population.transport_sensitivity, 14.4 / 51.2, z[1] + transport / 4
            ),
            disposal_sensitivity=deviate(population.disposal_sensitivity, 3.2 / 8.2, z[1]),
            production_sensitivity=deviate(
                population.production_sensitivity, 137.5 / 520, z[1] + 3 * production / 4
            ),
            insulin_time=population.insulin_time
            * jnp.exp(population.insulin_time_variation * z[2]),
            meal_time=population.meal_time * jnp.exp(population.meal_time_variation * z[3]),
            basal=jnp.float32(0),
        ),
        population.target,
    )


def with_basal(patient: Patient, target: Array) -> Patient:
    """The same person with the basal rate that holds `target`, mg/dL."""
    insulin = _balancing_insulin(patient, target / MG_PER_DL)  # mU/L
    rate = insulin * _INSULIN_ELIMINATION * _INSULIN_VOLUME * patient.weight  # mU/min
    return dataclasses.replace(patient, basal=rate * 60 / 1000)


def _balancing_insulin(patient: Patient, glucose: Array) -> Array:
    """Plasma insulin, mU/L, at which `glucose`, mmol/L, neither rises nor falls.

    At rest x1 = ST I, x2 = SD I, x3 = SE I and Q2 = x1 Q1/(k12 + x2), so that what is produced
    beyond F = F01c + FR must equal what disposal takes, x1 x2 Q1/(k12 + x2). That is a quadratic in
    I, SD (EGP0 SE + ST Q1) I^2 + (EGP0 SE k12 - E SD) I - E k12 = 0 with E = EGP0 - F. It has one
    positive root where E > 0; where it is not, no insulin is too much already.
    """
    plasma = glucose * _GLUCOSE_VOLUME
    used = _uptake(glucose, patient) + _excretion(glucose)
    excess = jnp.maximum(patient.production - used, 0)
    suppressed = patient.production * patient.production_sensitivity
    a = patient.disposal_sensitivity * (suppressed + patient.transport_sensitivity * plasma)
    b = suppressed * _TRANSFER - excess * patient.disposal_sensitivity
    c = excess * _TRANSFER
    # The root without the difference of two numbers that may be nearly equal.
    root = jnp.sqrt(jnp.square(b) + 4 * a * c)
    return jnp.where(b > 0, 2 * c / (b + root), (root - b) / (2 * a))


def rest(patient: Patient, glucose: Array) -> Body:
    """The body after a long time of basal insulin and no meal, but with `glucose`, mg/dL.

    It stays as it is only where `glucose` is the target of the basal rate.
    """
    rate = patient.basal * 1000 / 60 / patient.weight  # mU/kg/min
    depot = rate * patient.insulin_time
    insulin = rate / (_INSULIN_ELIMINATION * _INSULIN_VOLUME)
    transport = patient.transport_sensitivity * insulin
    disposal = patient.disposal_sensitivity * insulin
    concentration = glucose / MG_PER_DL
    plasma = concentration * _GLUCOSE_VOLUME
    nothing = jnp.zeros_like(depot)
    return Body(
        skin=(depot, depot),
        plasma_insulin=insulin,
        transport=transport,
        disposal=disposal,
        suppression=patient.production_sensitivity * insulin,
        gut=(nothing, nothing),
        plasma=plasma,
        tissue=transport * plasma / (_TRANSFER + disposal),
        interstitial=concentration,
    )


def derivative(body: Body, insulin: Array | float, meal: Array | float, patient: Patient) -> Body:
    """The right-hand sides of the module's equations.

    Args:
      body: now.
      insulin: u, mU/kg/min.
      meal: d, mmol/kg/min.
      patient: whose body it is.

    Returns:
      Changes a minute.
    """
    glucose = body.plasma / _GLUCOSE_VOLUME
    absorbed = body.skin[1] / patient.insulin_time
    appearing = body.gut[1] / patient.meal_time
    moved = body.transport * body.plasma
    returned = _TRANSFER * body.tissue
    produced = patient.production * jnp.maximum(1 - body.suppression, 0)
    used = _uptake(glucose, patient) + _excretion(glucose)
    level = body.plasma_insulin
    return Body(
        skin=(
            insulin - body.skin[0] / patient.insulin_time,
            body.skin[0] / patient.insulin_time - absorbed,
        ),
        plasma_insulin=absorbed / _INSULIN_VOLUME - _INSULIN_ELIMINATION * level,
        transport=_TRANSPORT_RATE * (patient.transport_sensitivity * level - body.transport),
        disposal=_DISPOSAL_RATE * (patient.disposal_sensitivity * level - body.disposal),
        suppression=_PRODUCTION_RATE * (patient.production_sensitivity * level - body.suppression),
        gut=(
            _BIOAVAILABILITY * meal - body.gut[0] / patient.meal_time,
            body.gut[0] / patient.meal_time - appearing,
        ),
        plasma=produced + appearing + returned - used - moved,
        tissue=moved - returned - body.disposal * body.tissue,
        interstitial=(glucose - body.interstitial) / _SENSOR_LAG,
    )


def advance(
    body: Body,
    insulin: Array | float,
    carbohydrates: Array | float,
    minutes: float,
    patient: Patient,
) -> Body:
    """The body `minutes` later.

    Args:
      body: now.
      insulin: `[]`, U, given evenly over that time.
      carbohydrates: `[]`, g, eaten evenly over it.
      minutes: to pass.
      patient: whose body it is.
    """
    rate = insulin * 1000 / (patient.weight * minutes)
    meal = carbohydrates / (_GRAMS_PER_MMOL * patient.weight * minutes)
    after = rk4_step(
        lambda body: derivative(body, rate, meal, patient),
        body,
        minutes,
        -int(-minutes // _SUBSTEP),
    )
    # What rounds below 0 would otherwise come back as a source.
    return jax.tree.map(lambda amount: jnp.maximum(amount, 0), after)


def plasma_glucose(body: Body, patient: Patient) -> Array:
    """In mg/dL."""
    del patient
    return body.plasma / _GLUCOSE_VOLUME * MG_PER_DL


def interstitial_glucose(body: Body, patient: Patient) -> Array:
    """In mg/dL, where a sensor is."""
    del patient
    return body.interstitial * MG_PER_DL


def _uptake(glucose: Array, patient: Patient) -> Array:
    """F01c, mmol/kg/min."""
    return patient.uptake * jnp.minimum(glucose / 4.5, 1)


def _excretion(glucose: Array) -> Array:
    """FR, mmol/kg/min."""
    return 0.003 * jnp.maximum(glucose - 9, 0) * _GLUCOSE_VOLUME
