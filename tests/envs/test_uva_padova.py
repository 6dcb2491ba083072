"""The UVA/Padova equations beside the program simglucose, and without it."""

from __future__ import annotations

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import glucose_peers
from jaxrl_llm.envs import glucose, uva_padova

needs_simglucose = pytest.mark.skipif(
    find_spec("simglucose") is None or find_spec("pandas") is None,
    reason="simglucose is not installed",
)


def compare(name, num_minutes, meals):
    """Plasma and interstitial glucose of both programs, minute by minute, float64."""
    module = glucose_peers.patient_module()
    person = module.T1DPatient.withName(name)
    with jax.enable_x64(True):
        patient = jax.tree.map(lambda leaf: leaf[0], uva_padova.population((name,)))
        insulin = np.full(num_minutes, float(patient.basal) / 60)
        carbohydrates = np.zeros(num_minutes)
        for time, grams in meals.items():
            carbohydrates[time] = grams
            insulin[time : time + 5] += grams / 15 / 5

        def minute(body, doses):
            units, grams = doses
            body = uva_padova.advance(body, units, grams, 1.0, patient)
            levels = (
                uva_padova.plasma_glucose(body, patient),
                uva_padova.interstitial_glucose(body, patient),
            )
            return body, jnp.stack(levels)

        rest = uva_padova.rest(patient, patient.constants["Gb"])
        doses = jnp.asarray(insulin), jnp.asarray(carbohydrates)
        ours = np.asarray(jax.jit(lambda body: jax.lax.scan(minute, body, doses)[1])(rest))
    theirs = []
    volume = uva_padova.table()[name]["Vg"]
    for units, grams in zip(insulin, carbohydrates, strict=True):
        person.step(module.Action(CHO=grams, insulin=units))
        theirs.append((person.state[3] / volume, person.observation.Gsub))
    return ours, np.array(theirs)


@pytest.mark.slow
@needs_simglucose
def test_advance_agrees_with_simglucose_over_a_meal():
    ours, theirs = compare("adult#001", 150, {10: 45.0, 60: 12.0})
    assert np.ptp(theirs) > 20
    np.testing.assert_allclose(ours, theirs, atol=0.05)


@needs_simglucose
@pytest.mark.slow
@pytest.mark.parametrize("name", ["adult#001", "adolescent#007", "child#004"])
def test_advance_agrees_with_simglucose_over_a_day(name):
    """`child#004` falls below 5 mg/dL on such boluses: the equations hold there too."""
    ours, theirs = compare(name, 1440, {420: 45.0, 560: 12.0, 750: 70.0, 1100: 80.0})
    np.testing.assert_allclose(ours, theirs, atol=0.05)


@needs_simglucose
def test_patients_rest_at_their_basal_rate():
    population = uva_padova.population()
    assert population.initial.shape == (30, 13)
    bodies = jax.vmap(uva_padova.rest)(population, population.constants["Gb"])
    advance = jax.vmap(uva_padova.advance, in_axes=(0, 0, None, None, 0))

    def step(bodies, _):
        bodies = advance(bodies, population.basal / 12, 0.0, 5.0, population)
        return bodies, jax.vmap(uva_padova.plasma_glucose)(bodies, population)

    levels = jax.jit(lambda bodies: jax.lax.scan(step, bodies, None, length=72)[1])(bodies)
    expected = np.broadcast_to(population.constants["Gb"], (72, 30))
    np.testing.assert_allclose(levels, expected, atol=0.05)


@needs_simglucose
@pytest.mark.slow
def test_make_steps_a_uva_padova_patient():
    environment = glucose.make(
        model="uva_padova", population=uva_padova.population(("adult#003",)), noise=False
    )
    params = environment.default_params
    state, observation = environment.reset(jax.random.key(0), params)
    np.testing.assert_allclose(glucose.read(observation).basal, params.basal[0], rtol=1e-6)
    action = glucose.to_action(jnp.array([1 / 12]))
    _, step = jax.jit(environment.step)(jax.random.key(1), state, action, params)
    np.testing.assert_allclose(step.info["insulin"], params.basal[0] / 12, rtol=1e-4)
    assert 60 < step.info["glucose"] < 200


def test_table_says_how_to_install_what_is_missing(monkeypatch):
    uva_padova.table.cache_clear()
    monkeypatch.setattr(uva_padova, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="run: pip install --no-deps simglucose"):
        glucose.make(model="uva_padova")


@needs_simglucose
def test_population_refuses_strangers():
    with pytest.raises(ValueError, match=r"names\[1\] is 'adult#011'; it must be one of"):
        uva_padova.population(("adult#010", "adult#011"))
    with pytest.raises(ValueError, match="names is empty"):
        uva_padova.population(())
    with pytest.raises(ValueError, match=r"minutes is 4\.5; it must be a whole number"):
        glucose.make(model="uva_padova", minutes=4.5, hours=22.5)
