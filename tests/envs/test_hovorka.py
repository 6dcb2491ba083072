"""Hovorka's model beside SciPy in float64, its closed-form rest, and published numbers."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jaxrl_llm.envs import hovorka

NUM = 512


@pytest.fixture(scope="module")
def patients():
    keys = jax.random.split(jax.random.key(0), NUM)
    return jax.vmap(hovorka.sample_patient, in_axes=(0, None))(keys, hovorka.population())


@pytest.fixture(scope="module")
def day():
    """`(patients, bodies, insulin [T, B] U, carbohydrates [T, B] g) -> bodies [T, B]`."""

    @jax.jit
    def run(patients, bodies, insulin, carbohydrates):
        advance = jax.vmap(hovorka.advance, in_axes=(0, 0, 0, None, 0))

        def step(bodies, doses):
            units, grams = doses
            bodies = advance(bodies, units, grams, 5.0, patients)
            return bodies, bodies

        return jax.lax.scan(step, bodies, (insulin, carbohydrates))[1]

    return run


def at_rest(patients, glucose):
    return jax.vmap(hovorka.rest, in_axes=(0, None))(patients, jnp.float32(glucose))


def reference(patient, insulin, carbohydrates):
    """Plasma and interstitial glucose after each step, mg/dL, in float64, from the paper."""
    p = {name: float(value) for name, value in vars(patient).items()}
    weight, t_insulin, t_meal = p["weight"], p["insulin_time"], p["meal_time"]
    sensitivities = [p[f"{name}_sensitivity"] for name in ("transport", "disposal", "production")]
    rates = [0.006, 0.06, 0.03]

    def slope(_, y, u, d):
        s1, s2, level, x1, x2, x3, d1, d2, q1, q2, c = y
        glucose = q1 / 0.16
        uptake = p["uptake"] if glucose >= 4.5 else p["uptake"] * glucose / 4.5
        renal = 0.003 * (glucose - 9) * 0.16 if glucose >= 9 else 0.0
        produced = p["production"] * max(1 - x3, 0)
        effects = [
            k * (s * level - x) for k, s, x in zip(rates, sensitivities, (x1, x2, x3), strict=True)
        ]
        return [
            u - s1 / t_insulin,
            (s1 - s2) / t_insulin,
            s2 / t_insulin / 0.12 - 0.138 * level,
            *effects,
            0.8 * d - d1 / t_meal,
            (d1 - d2) / t_meal,
            -uptake - renal - x1 * q1 + 0.066 * q2 + d2 / t_meal + produced,
            x1 * q1 - (0.066 + x2) * q2,
            (glucose - c) / 5,
        ]

    rate = p["basal"] * 1000 / 60 / weight
    level = rate / 0.138 / 0.12
    x1, x2, x3 = (s * level for s in sensitivities)
    q1 = 115 / 18.0156 * 0.16
    y = [rate * t_insulin] * 2 + [level, x1, x2, x3, 0, 0, q1, x1 * q1 / (0.066 + x2), q1 / 0.16]
    rows = []
    for units, grams in zip(insulin, carbohydrates, strict=True):
        doses = units * 1000 / weight / 5, grams / 0.180156 / weight / 5
        y = solve_ivp(slope, (0, 5), y, args=doses, rtol=1e-8, atol=1e-10).y[:, -1]
        rows.append([y[8] / 0.16 * 18.0156, y[10] * 18.0156])
    return np.array(rows)


@pytest.mark.slow
def test_advance_agrees_with_an_adaptive_solver_over_a_day(patients, day):
    """Meals with too much and too little insulin: below 4.5 and above 9 mmol/L, every branch."""
    chosen = jax.tree.map(lambda leaf: leaf[:2], patients)
    carbohydrates = np.zeros((288, 2), np.float32)
    insulin = np.tile(np.asarray(chosen.basal) / 12, (288, 1)).astype(np.float32)
    for step, grams, units in ((84, 45, 3), (144, 70, 16), (216, 80, 2)):
        carbohydrates[step] = grams
        insulin[step] += units
    bodies = day(chosen, at_rest(chosen, 115.0), insulin, carbohydrates)
    for place in range(2):
        body, patient = jax.tree.map(lambda leaf, place=place: leaf[..., place], (bodies, chosen))
        expected = reference(patient, insulin[:, place], carbohydrates[:, place])
        assert expected.min() < 81
        assert expected.max() > 180
        actual = [
            hovorka.plasma_glucose(body, patient),
            hovorka.interstitial_glucose(body, patient),
        ]
        np.testing.assert_allclose(np.stack(actual, axis=1), expected, atol=0.1)


def test_basal_holds_the_target_for_a_day(patients, day):
    start = at_rest(patients, 115.0)
    insulin = jnp.broadcast_to(patients.basal / 12, (288, NUM))
    bodies = day(patients, start, insulin, jnp.zeros((288, NUM)))
    glucose = hovorka.plasma_glucose(bodies, patients)
    np.testing.assert_allclose(glucose, 115.0, atol=0.01)
    nobody_still = at_rest(patients, 130.0)
    later = day(patients, nobody_still, insulin, jnp.zeros((288, NUM)))
    assert np.all(hovorka.plasma_glucose(later, patients)[-1] < 125)


@pytest.mark.parametrize("target", [80.0, 115.0, 250.0])
def test_basal_solves_the_equations_at_rest(patients, target):
    moved = jax.vmap(hovorka.with_basal, in_axes=(0, None))(patients, jnp.float32(target))
    bodies = at_rest(moved, target)
    rate = moved.basal * 1000 / 60 / moved.weight
    slopes = jax.vmap(hovorka.derivative)(bodies, rate, jnp.zeros(NUM), moved)
    scale = jax.tree.map(lambda leaf: 1e-6 * jnp.max(leaf) + 1e-9, bodies)
    jax.tree.map(
        lambda slope, top: np.testing.assert_array_less(jnp.abs(slope), top), slopes, scale
    )


@pytest.mark.slow
def test_population_needs_the_published_daily_dose():
    """Resalat et al. (2019), figure 2: of .05, .1, ... it is .4 that comes nearest to 42.3 U."""
    mean = hovorka.population(
        variation=0, weight_deviation=0, insulin_time_variation=0, meal_time_variation=0
    )
    grid = np.arange(1, 21) / 20

    def daily(sensitivity):
        population = dataclasses.replace(mean, sensitivity=sensitivity)
        return 1.78 * 24 * hovorka.sample_patient(jax.random.key(0), population).basal

    needs = np.asarray(jax.vmap(daily)(jnp.asarray(grid, jnp.float32)))
    assert np.all(np.diff(needs) < 0)
    assert grid[np.argmin(np.abs(needs - 42.3))] == 0.4


def test_sample_patient_has_its_law(patients):
    disposal = np.asarray(patients.disposal_sensitivity) / (0.4 * 8.2e-4)
    transport = np.asarray(patients.transport_sensitivity) / (0.4 * 51.2e-4)
    production = np.asarray(patients.production_sensitivity) / (0.4 * 520e-4)
    # A normal number cut at 2 deviations has a deviation of .880.
    np.testing.assert_allclose(disposal.mean(), 1, atol=0.06)
    np.testing.assert_allclose(disposal.std(), 0.88 * 3.2 / 8.2, rtol=0.08)
    np.testing.assert_allclose(np.corrcoef(disposal, transport)[0, 1], 0.987, atol=0.01)
    np.testing.assert_allclose(np.corrcoef(disposal, production)[0, 1], 0.897, atol=0.03)
    assert min(np.min(leaf) for leaf in jax.tree.leaves(patients)) > 0
    np.testing.assert_allclose(np.mean(patients.weight), 76.3, atol=2)


@pytest.mark.slow
def test_derivative_loses_no_mass(patients):
    """What leaves one compartment enters the next: only sources and sinks change the sums."""
    keys = jax.random.split(jax.random.key(1), 4)
    leaves, layout = jax.tree.flatten(at_rest(patients, 115.0))
    drawn = [
        leaf * jax.random.uniform(key, leaf.shape, maxval=3.0)
        for leaf, key in zip(leaves, jax.random.split(keys[0], len(leaves)), strict=True)
    ]
    body = jax.tree.unflatten(layout, drawn)
    body = dataclasses.replace(body, gut=tuple(jax.random.uniform(keys[1], (2, NUM), maxval=2.0)))
    insulin, meal = jax.random.uniform(keys[2], (NUM,)), jax.random.uniform(keys[3], (NUM,))
    slope = jax.vmap(hovorka.derivative)(body, insulin, meal, patients)
    np.testing.assert_allclose(
        slope.skin[0] + slope.skin[1] + 0.12 * slope.plasma_insulin,
        insulin - 0.138 * 0.12 * body.plasma_insulin,
        atol=1e-5,
    )
    appearing = body.gut[1] / patients.meal_time
    np.testing.assert_allclose(slope.gut[0] + slope.gut[1], 0.8 * meal - appearing, atol=1e-6)
    glucose = body.plasma / 0.16
    sinks = patients.uptake * np.minimum(glucose / 4.5, 1) + 0.00048 * np.maximum(glucose - 9, 0)
    sources = appearing + patients.production * np.maximum(1 - body.suppression, 0)
    np.testing.assert_allclose(
        slope.plasma + slope.tissue, sources - sinks - body.disposal * body.tissue, atol=1e-6
    )


def test_insulin_lowers_and_carbohydrates_raise_glucose(patients, day):
    start = at_rest(patients, 150.0)
    none, basal = jnp.zeros((288, NUM)), jnp.broadcast_to(patients.basal / 12, (288, NUM))

    def four_hours_later(insulin, carbohydrates):
        bodies = day(patients, start, insulin, carbohydrates)
        return np.asarray(hovorka.plasma_glucose(bodies, patients))[48]

    usual = four_hours_later(basal, none)
    more = four_hours_later(basal.at[0].add(2.0), none)
    eaten = four_hours_later(basal, none.at[0].add(30.0))
    assert np.all(more < usual - 5)
    assert np.all(eaten > usual + 5)


def test_nobody_without_a_surplus_of_glucose_gets_basal_insulin():
    wanting = dataclasses.replace(hovorka.population(), production=jnp.float32(0.009))
    patient = hovorka.sample_patient(jax.random.key(0), wanting)
    assert float(patient.basal) == 0


def test_population_refuses_people_who_need_no_insulin():
    message = re.escape("production is 0.009; it must be more than uptake, 0.0097")
    with pytest.raises(ValueError, match=message):
        hovorka.population(production=0.009)
    with pytest.raises(ValueError, match=re.escape("weight is -1; it must be at least 0")):
        hovorka.population(weight=-1)
