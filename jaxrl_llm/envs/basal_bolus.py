"""Basal-bolus therapy: the rule that a person who counts carbohydrates follows with a pump.

Research only, not for clinical use. The basal rate runs all the time. A meal gets

    carbohydrates/CR + (G - target)/CF - insulin on board

and, between meals, the last two terms alone correct a high reading. Insulin on board lowers a
correction, never what a meal needs, and no bolus is negative. The carbohydrate ratio CR (g/U) and
the correction factor CF (mg/dL per U) come from the total daily dose: CR = 500/TDD, CF = 1800/TDD.

Source: Walsh & Roberts (2006), "Pumping insulin", 4th edition: the 500 and 1800 rules, and
  insulin on board. The daily dose is 1.78 times the basal one, the clinical average in Resalat et
  al. (2019), PLOS ONE 14, e0217301.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from jaxrl_llm.envs import glucose
from jaxrl_llm.types import Array

_DAILY_PER_BASAL = 1.78 * 24  # total daily dose, U, over the basal rate, U/h


@struct.dataclass(kw_only=True)
class Rule:
    """How somebody doses, `[]` float32 each.

    Attributes:
      target: mg/dL that corrections aim at.
      threshold: mg/dL, readings above it are corrected.
      carbohydrate_rule: the 500 of the 500 rule, g; a smaller number is more insulin.
      correction_rule: the 1800 of the 1800 rule, mg/dL.
      suspend_below: mg/dL, readings below it stop the basal rate; 0 for never.
    """

    target: Array
    threshold: Array
    carbohydrate_rule: Array
    correction_rule: Array
    suspend_below: Array


def rule(
    *,
    target: float = 115.0,
    threshold: float = 150.0,
    carbohydrate_rule: float = 500.0,
    correction_rule: float = 1800.0,
    suspend_below: float = 0.0,
) -> Rule:
    """The published rule; its correction above 150 mg/dL is that of the program simglucose."""
    return Rule(**{name: jnp.float32(value) for name, value in locals().items()})


def hours_of_insulin(seen: glucose.Readable, rule: Rule, *, minutes: float = 5.0) -> Array:
    """The dose for a step of `minutes`, in hours of the patient's basal rate, any leading shape.

    >>> import jax.numpy as jnp
    >>> calm = glucose.read(jnp.zeros(12).at[:6].set(-0.6).at[9].set(0.5))  # 112 mg/dL, 1 U/h
    >>> round(float(hours_of_insulin(calm, rule())), 4)  # 5 minutes of the basal rate
    0.0833
    """
    daily = _DAILY_PER_BASAL * seen.basal
    reading = seen.readings[..., -1]
    meal = seen.announced * daily / rule.carbohydrate_rule
    excess = (reading - rule.target) * daily / rule.correction_rule
    is_high = reading > rule.threshold
    correction = jnp.where(is_high, jnp.maximum(excess - seen.insulin_on_board, 0), 0)
    # A reading below the target makes a meal's bolus smaller.
    reduction = jnp.where(is_high, 0, jnp.minimum(excess, 0))
    bolus = jnp.maximum(meal + reduction, 0) + correction
    basal = jnp.where(reading < rule.suspend_below, 0, minutes / 60)
    return basal + bolus / seen.basal


def action(observation: Array, rule: Rule, *, minutes: float = 5.0) -> Array:
    """The continuous action `[..., 1]` of `glucose` for observations `[..., 12]`."""
    hours = hours_of_insulin(glucose.read(observation), rule, minutes=minutes)
    return glucose.to_action(hours)[..., None]
