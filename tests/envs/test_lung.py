"""The lung: breaths beside the equation of motion, gases beside textbook numbers and SciPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jaxrl_llm.envs import lung as lungs
from jaxrl_llm.envs import ventilation
from jaxrl_llm.envs.ode import rk4_step

# A rate so high that expiration is cut short, and air is trapped.
FAST = (14.0, 32.0, 6.0, 0.5)
DETAIL = 2000  # substeps a breath


@pytest.fixture
def lung(x64):
    return ventilation.default_params().lung


@pytest.fixture
def stiff(lung):
    """Obstructed: its time constant is 1.2 s."""
    return dataclasses.replace(lung, resistance=jnp.asarray(0.03))


def settings_of(values):
    return lungs.Settings(*(jnp.asarray(value, float) for value in values))


def test_volume_is_the_solution_of_the_equation_of_motion(stiff):
    start, pressure = jnp.asarray(120.0), jnp.asarray(15.0)

    def flow(volume):
        return (pressure - volume / stiff.compliance) / stiff.resistance

    for time in (0.0, 0.3, 1.0, 4.0):
        found = lungs.volume(jnp.asarray(time), start, pressure, stiff)
        np.testing.assert_allclose(found, rk4_step(flow, start, time, 1000), rtol=1e-10)
    # After three time constants 5% are left.
    tau = stiff.resistance * stiff.compliance
    left = 1 - lungs.volume(3 * tau, jnp.zeros(()), pressure, stiff) / (15 * stiff.compliance)
    np.testing.assert_allclose(left, np.exp(-3), rtol=1e-10)


def breathe(settings, lung, inspire):
    """8 breaths in small steps: of the last one, end volumes and mean airway pressure.

    `inspire` is (volume -> flow during inspiration); expiration is against the PEEP.
    """
    compliance, resistance = float(lung.compliance), float(lung.resistance)
    duration = 60 / settings[1]
    time = (np.arange(DETAIL) + 0.5) / DETAIL * duration
    inspiring = time < duration * lungs.INSPIRATORY_FRACTION
    size = duration / DETAIL
    volume = trapped = largest = pressure = 0.0

    def flow(volume, inspired):
        return inspire(volume) if inspired else -volume / (resistance * compliance)

    for _ in range(8):
        trapped = volume
        largest, pressure = 0.0, 0.0
        for inspired in inspiring:
            middle = volume + size / 2 * flow(volume, inspired)
            rate = flow(middle, inspired)
            pressure += (middle / compliance + resistance * rate) / DETAIL
            volume += size * rate
            largest = max(largest, volume)
    return largest, trapped, settings[2] + pressure


@pytest.mark.parametrize("mode", ["pressure", "volume"])
def test_breath_is_the_one_that_the_equation_of_motion_settles_to(mode, stiff):
    if mode == "pressure":
        found = lungs.pressure_breath(settings_of(FAST), stiff)
        compliance, resistance = float(stiff.compliance), float(stiff.resistance)
        largest, trapped, mean = breathe(
            FAST, stiff, lambda volume: (FAST[0] - volume / compliance) / resistance
        )
    else:
        given = (7.0, *FAST[1:])
        found = lungs.volume_breath(settings_of(given), stiff)
        tidal = 7 * float(stiff.weight)
        flow = tidal / (60 / FAST[1] * lungs.INSPIRATORY_FRACTION)
        largest, trapped, mean = breathe(given, stiff, lambda volume: flow)
        np.testing.assert_allclose(found.tidal_volume, tidal, rtol=1e-10)
    assert trapped > 30
    np.testing.assert_allclose(found.tidal_volume, largest - trapped, rtol=2e-3)
    np.testing.assert_allclose(found.trapped_volume, trapped, rtol=2e-3)
    plateau = 6 + largest / float(stiff.compliance)
    np.testing.assert_allclose(found.plateau_pressure, plateau, rtol=2e-3)
    np.testing.assert_allclose(found.mean_pressure, mean, rtol=2e-3)


def test_severinghaus_has_the_textbook_saturations():
    pressures = jnp.array([26.86, 40.0, 60.0, 100.0])
    np.testing.assert_allclose(lungs.severinghaus(pressures), [0.50, 0.75, 0.906, 0.977], atol=2e-3)


def test_acidity_has_the_textbook_values(lung):
    carbon_dioxide = jnp.array([40.0, 80.0])
    np.testing.assert_allclose(
        lungs.acidity(carbon_dioxide, lung), [7.401, 7.401 - np.log10(2)], atol=1e-3
    )


def gases_of(carbon_dioxide, saturation, opened):
    return lungs.Gases(
        carbon_dioxide=jnp.asarray(carbon_dioxide, float),
        saturation=jnp.asarray(saturation, float),
        opened=jnp.asarray(opened, float),
    )


def test_carbon_dioxide_rests_where_production_equals_removal(lung):
    settings = settings_of((7.0, 16.0, 5.0, 0.5))
    breath = lungs.volume_breath(settings, lung)
    alveolar = 16 * (7 - 2.5) * 65 / 1000
    resting = 0.863 * 3.2 * 65 / alveolar
    slope = lungs.derivative(gases_of(resting, 0.9, 0.5), breath, settings, lung)
    np.testing.assert_allclose(slope.carbon_dioxide, 0, atol=1e-10)
    # Breaths that do not reach beyond the dead space remove nothing: an apnoea, in effect.
    shallow = settings_of((2.0, 30.0, 5.0, 0.5))
    slope = lungs.derivative(
        gases_of(40, 0.9, 0.5), lungs.volume_breath(shallow, lung), shallow, lung
    )
    np.testing.assert_allclose(slope.carbon_dioxide, 3.2 * 65 / 60, rtol=1e-10)


def test_resting_saturation_follows_the_shunt_equation(lung):
    found = lungs.resting_saturation(
        gases_of(40, 0.9, 0.6), jnp.asarray(10.0), jnp.asarray(0.5), lung
    )
    alveolar = 713 * 0.5 - 40 / 0.8
    saturation = 1 / (1 + 23400 / (alveolar**3 + 150 * alveolar))
    end_capillary = 1.34 * 11 * saturation + 0.003 * alveolar
    shunt, output = 0.05 + 0.45 * 0.4, 5.5 * 0.9
    arterial = end_capillary - shunt / (1 - shunt) * (3.2 * 65 / 0.8) / (10 * output)
    np.testing.assert_allclose(found, arterial / (1.34 * 11), rtol=1e-10)
    # The mixture that returns to the shunt: arterial content less what the body uses.
    venous = arterial - (3.2 * 65 / 0.8) / (10 * output)
    np.testing.assert_allclose(arterial, (1 - shunt) * end_capillary + shunt * venous, rtol=1e-10)


def test_pressure_opens_the_lung_and_costs_cardiac_output(lung):
    settings = settings_of((12.0, 20.0, 5.0, 0.5))
    slopes = [
        lungs.derivative(
            gases_of(40, 0.9, 0.5),
            lungs.pressure_breath(settings._replace(peep=jnp.asarray(peep)), lung),
            settings,
            lung,
        ).opened
        for peep in (0.0, 5.0, 15.0)
    ]
    assert slopes[0] < 0 < slopes[2]
    assert slopes[0] < slopes[1] < slopes[2]
    saturations = [
        lungs.resting_saturation(
            gases_of(40, 0.9, 0.6), jnp.asarray(pressure), jnp.asarray(0.4), lung
        )
        for pressure in (5.0, 15.0, 30.0)
    ]
    assert saturations[0] > saturations[1] > saturations[2]
    assert lungs.open_part(gases_of(40, 0.9, 0.5), lung).compliance == lung.compliance / 2
    np.testing.assert_allclose(
        lungs.open_part(gases_of(40, 0.9, 0.0), lung).compliance, lung.compliance / 10
    )


def test_gases_follow_an_adaptive_solver(lung):
    settings = settings_of((14.0, 20.0, 10.0, 0.5))
    breath = lungs.pressure_breath(settings, lung)

    @jax.jit
    def derivative(gases):
        return lungs.derivative(gases, breath, settings, lung)

    def flat(_, state):
        return jnp.stack(jax.tree.leaves(derivative(gases_of(*state))))

    start = gases_of(60, 0.75, 0.3)
    found = rk4_step(derivative, start, ventilation.STEP, 10)
    names = ("carbon_dioxide", "saturation", "opened")
    assert [field.name for field in dataclasses.fields(start)] == list(names)
    expected = solve_ivp(flat, (0, 10), [60, 0.75, 0.3], rtol=1e-9, atol=1e-11).y[:, -1]
    np.testing.assert_allclose([getattr(found, name) for name in names], expected, rtol=1e-4)
