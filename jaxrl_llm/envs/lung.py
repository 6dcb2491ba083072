"""A single-compartment lung: the mechanics of a breath, and the gases behind it.

Research only, not for clinical use. Volumes are in ml, flows in ml/s, pressures in cmH2O, partial
pressures in mmHg. Everything is of one patient.

Mechanics: P(t) = V / C + R V' + PEEP, with V the volume above that held by the PEEP. While the
ventilator holds P = PEEP + p during inspiration, and P = PEEP during expiration, V is exponential
with time constant tau = R C: V(t) = V_inf + (V(0) - V_inf) exp(-t / tau). Breaths settle within
seconds, so one periodic breath stands for all, in closed form (`pressure_breath`, `volume_breath`).
What expiration leaves in the lung is intrinsic PEEP. The plateau pressure is PEEP + V_max / C.

Gases and recruitment, in minutes, by `ode.rk4_step`:

    S_CO2 PaCO2' = VCO2 - VA PaCO2 / .863,      VA = rate (V_T - V_D) / 1000 l/min, at least 0
    tau_O2 SaO2' = saturation at rest - SaO2
    tau_w w'     = 1 / (1 + exp(-(P_mean - P_half) / 2)) - w        the open part of the lung

C is proportional to w and the shunt s falls with it: s = s_open + s_closed (1 - w). The saturation
at rest follows from the alveolar gas equation PAO2 = 713 FiO2 - PaCO2 / .8, oxygen content
Cc = 1.34 Hb S(PAO2) + .003 PAO2 and the shunt equation Ca = Cc - s / (1 - s) VO2 / (10 Q), as
Ca / (1.34 Hb), at most 1, with VO2 = VCO2 / .8 and S that of Severinghaus. Pressure in the chest
costs cardiac output: Q = Q_0 (1 - .02 (P_mean - 5)), within [.3, 1] of Q_0. Blood is
pH = 6.1 + log10(HCO3 / (.03 PaCO2)).

Source: West & Luks, "West's Respiratory Physiology" (equation of motion, gas equations);
  Severinghaus (1979), "Simple, accurate equations for human blood O2 dissociation computations".
  How the lung opens and how pressure costs cardiac output is made up.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm.types import Array

INSPIRATORY_FRACTION = 1 / 3
"""Of a breath: an I:E ratio of 1:2."""

_WATER_FREE_PRESSURE = 713.0  # mmHg, atmospheric less that of water vapour
_RESPIRATORY_QUOTIENT = 0.8


@struct.dataclass(kw_only=True)
class Lung:
    """Constants of a patient, `[]` each.

    Attributes:
      compliance: ml/cmH2O, of the fully open lung.
      resistance: cmH2O s/ml, of the airways and the tube.
      half_pressure: cmH2O, mean airway pressure that holds half of the lung open.
      open_shunt: fraction of the cardiac output, of the fully open lung.
      closed_shunt: what closing all of the lung adds to it.
      dead_space: ml per kg.
      carbon_dioxide_production: VCO2, ml/min per kg.
      cardiac_output: Q_0, l/min.
      haemoglobin: g/dl.
      bicarbonate: HCO3, mmol/l.
      weight: predicted body weight, kg.
      carbon_dioxide_store: S_CO2, ml/mmHg.
      oxygen_time: tau_O2, minutes.
      opening_time: tau_w, minutes.
    """

    compliance: Array
    resistance: Array
    half_pressure: Array
    open_shunt: Array
    closed_shunt: Array
    dead_space: Array
    carbon_dioxide_production: Array
    cardiac_output: Array
    haemoglobin: Array
    bicarbonate: Array
    weight: Array
    carbon_dioxide_store: Array
    oxygen_time: Array
    opening_time: Array


@struct.dataclass(kw_only=True)
class Gases:
    """What the equations move, `[]` each.

    Attributes:
      carbon_dioxide: PaCO2, mmHg.
      saturation: SaO2, a fraction.
      opened: w, the open part of the lung.
    """

    carbon_dioxide: Array
    saturation: Array
    opened: Array


class Settings(NamedTuple):
    """Of the ventilator, `[]` each.

    Attributes:
      inspiration: cmH2O above PEEP, or ml per kg.
      rate: breaths a minute.
      peep: positive end-expiratory pressure, cmH2O.
      oxygen: FiO2, a fraction.
    """

    inspiration: Array
    rate: Array
    peep: Array
    oxygen: Array


class Breath(NamedTuple):
    """One of many equal breaths, `[]` each.

    Attributes:
      tidal_volume: ml.
      trapped_volume: ml above that held by the PEEP, at the end of expiration.
      plateau_pressure: cmH2O, at the end of inspiration without flow.
      mean_pressure: cmH2O, of the airway over a breath.
    """

    tidal_volume: Array
    trapped_volume: Array
    plateau_pressure: Array
    mean_pressure: Array


def volume(time: Array, start: Array, driving_pressure: Array, lung: Lung) -> Array:
    """V(t) in ml, `time` s after `start` ml, while the ventilator holds PEEP + `driving_pressure`.

    The solution of V / C + R V' = p: V = C p + (V(0) - C p) exp(-t / (R C)).
    """
    target = lung.compliance * driving_pressure
    return target + (start - target) * jnp.exp(-time / (lung.resistance * lung.compliance))


def pressure_breath(settings: Settings, lung: Lung) -> Breath:
    """The periodic breath of a constant driving pressure, which volumes follow exponentially."""
    inspired, expired = _survival(settings.rate, lung)
    target = lung.compliance * settings.inspiration
    largest = target * (1 - inspired) / (1 - inspired * expired)
    return _breath(
        largest,
        largest * expired,
        settings.inspiration * INSPIRATORY_FRACTION,
        settings.peep,
        lung,
    )


def volume_breath(settings: Settings, lung: Lung) -> Breath:
    """The periodic breath of a tidal volume (ml per kg) at constant inspiratory flow."""
    _, expired = _survival(settings.rate, lung)
    tidal = settings.inspiration * lung.weight
    largest = tidal / (1 - expired)
    # Constant flow: the elastic part rises from the trapped volume to the largest one, linearly.
    flow = tidal / (60 / settings.rate * INSPIRATORY_FRACTION)
    elastic = largest * (1 + expired) / 2 / lung.compliance
    driving = (elastic + lung.resistance * flow) * INSPIRATORY_FRACTION
    return _breath(largest, largest * expired, driving, settings.peep, lung)


def derivative(gases: Gases, breath: Breath, settings: Settings, lung: Lung) -> Gases:
    """The three equations of the module, per minute."""
    alveolar = settings.rate * (breath.tidal_volume - lung.dead_space * lung.weight) / 1000
    washed_out = jnp.maximum(alveolar, 0) * gases.carbon_dioxide / 0.863
    produced = lung.carbon_dioxide_production * lung.weight
    held_open = jax.nn.sigmoid((breath.mean_pressure - lung.half_pressure) / 2)
    resting = resting_saturation(gases, breath.mean_pressure, settings.oxygen, lung)
    return Gases(
        carbon_dioxide=(produced - washed_out) / lung.carbon_dioxide_store,
        saturation=(resting - gases.saturation) / lung.oxygen_time,
        opened=(held_open - gases.opened) / lung.opening_time,
    )


def resting_saturation(gases: Gases, mean_pressure: Array, oxygen: Array, lung: Lung) -> Array:
    """The arterial saturation that these settings lead to, in [0, 1], see the module."""
    alveolar = jnp.maximum(
        _WATER_FREE_PRESSURE * oxygen - gases.carbon_dioxide / _RESPIRATORY_QUOTIENT, 1
    )
    capacity = 1.34 * lung.haemoglobin
    content = capacity * severinghaus(alveolar) + 0.003 * alveolar
    output = lung.cardiac_output * jnp.clip(1 - 0.02 * (mean_pressure - 5), 0.3, 1)
    consumption = lung.carbon_dioxide_production * lung.weight / _RESPIRATORY_QUOTIENT
    shunt = jnp.clip(lung.open_shunt + lung.closed_shunt * (1 - gases.opened), 0, 0.8)
    arterial = content - shunt / (1 - shunt) * consumption / (10 * output)
    return jnp.clip(arterial / capacity, 0, 1)


def severinghaus(pressure: Array) -> Array:
    """Saturation of haemoglobin at an oxygen pressure in mmHg: 1 / (1 + 23400 / (P^3 + 150 P))."""
    cubic = pressure * (pressure**2 + 150)
    return cubic / (cubic + 23400)


def acidity(carbon_dioxide: Array, lung: Lung) -> Array:
    """pH of the blood, by Henderson and Hasselbalch."""
    return 6.1 + jnp.log10(lung.bicarbonate / (0.03 * carbon_dioxide))


def open_part(gases: Gases, lung: Lung) -> Lung:
    """The lung with the compliance of its open part: C w, and a tenth of C at least."""
    return dataclasses.replace(lung, compliance=lung.compliance * jnp.maximum(gases.opened, 0.1))


def _survival(rate: Array, lung: Lung) -> tuple[Array, Array]:
    """exp(-t / tau) over an inspiration and over an expiration."""
    breath_time = 60 / rate
    tau = lung.resistance * lung.compliance
    inspiration = INSPIRATORY_FRACTION * breath_time
    return jnp.exp(-inspiration / tau), jnp.exp(-(breath_time - inspiration) / tau)


def _breath(largest: Array, trapped: Array, mean_driving: Array, peep: Array, lung: Lung) -> Breath:
    return Breath(
        tidal_volume=largest - trapped,
        trapped_volume=trapped,
        plateau_pressure=peep + largest / lung.compliance,
        mean_pressure=peep + mean_driving,
    )
