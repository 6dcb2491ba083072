"""Ventilation: sound episodes, targets, death, and that sensible settings keep patients alive."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import lung, ventilation
from tests.envs import simulators


def gases_of(carbon_dioxide, saturation):
    return lung.Gases(
        carbon_dioxide=jnp.float32(carbon_dioxide),
        saturation=jnp.float32(saturation),
        opened=jnp.float32(0.5),
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pressure", pytest.param("volume", marks=pytest.mark.slow)])
def test_episodes_are_sound_under_any_settings(mode):
    environment = ventilation.make(mode=mode, max_steps=60)
    batch = simulators.assert_sound(environment, max_steps=60)
    assert batch.terminated.any()
    np.testing.assert_array_equal(batch.reward[batch.terminated], -20)
    alive = batch.reward[~batch.terminated]
    assert ((alive >= 0) & (alive <= 1)).all()


def test_step_jitted_equals_eager_and_keeps_the_patient():
    environment = ventilation.make()
    before, after = simulators.assert_jit_equals_eager(
        environment, jnp.array([14.0, 20.0, 8.0, 0.5])
    )
    jax.tree.map(np.testing.assert_array_equal, before.lung, after.lung)
    assert before.lung.compliance != environment.default_params.lung.compliance


def test_patients_differ_as_much_as_asked():
    keys = jax.random.split(jax.random.key(0), 1024)
    typical = ventilation.default_params()
    for variation in (0.0, 0.5):
        environment = ventilation.make(patient_variation=variation)
        reset = jax.jit(jax.vmap(environment.reset, in_axes=(0, None)))
        state, _ = reset(keys, environment.default_params)
        logarithm = np.log(state.state.lung.compliance / typical.lung.compliance)
        np.testing.assert_allclose(logarithm.std(), variation * 0.25, rtol=0.1, atol=1e-6)
        np.testing.assert_allclose(state.state.lung.weight.std() > 1, variation > 0)


@pytest.mark.parametrize(
    ("change", "loss"),
    [
        ({}, 0),
        ({"saturation": 0.84}, 0.5),
        ({"saturation": 0.99}, 0.5),
        ({"carbon_dioxide": 80}, 1),  # pH 7.10
        ({"plateau": 35}, 0.5),
        ({"plateau": 60}, 1),
        ({"tidal": 10}, 0.5),
        ({"oxygen": 0.8}, 0.5),
    ],
)
def test_score_falls_by_a_fifth_of_what_each_target_is_missed_by(change, loss):
    patient = ventilation.default_params().lung
    values = {
        "saturation": 0.92,
        "carbon_dioxide": 40,
        "plateau": 25,
        "tidal": 6,
        "oxygen": 0.5,
        **change,
    }
    score = ventilation.score(
        gases_of(values["carbon_dioxide"], values["saturation"]),
        lung.Breath(
            tidal_volume=values["tidal"] * patient.weight,
            trapped_volume=jnp.float32(0),
            plateau_pressure=jnp.float32(values["plateau"]),
            mean_pressure=jnp.float32(12),
        ),
        lung.Settings(*map(jnp.float32, (12, 20, 8, values["oxygen"]))),
        patient,
    )
    np.testing.assert_allclose(score, 1 - loss / 5, atol=1e-3)


@pytest.fixture(scope="module")
def course():
    """(settings `[4]`) -> alive and reward `[144, 128]`, until death, of a day of each patient."""
    environment = ventilation.make()
    params = environment.default_params

    @jax.jit
    def simulate(settings):
        def patient(key):
            state, _ = environment.reset(key, params)

            def body(carry, _):
                state, alive = carry
                state, time_step = environment.step(jax.random.key(0), state, settings, params)
                following = alive & ~time_step.terminated
                return (state, following), (alive, time_step)

            return jax.lax.scan(body, (state, jnp.bool_(True)), length=144)[1]

        return jax.vmap(patient, out_axes=1)(jax.random.split(jax.random.key(5), 128))

    def run(settings):
        with jax.debug_key_reuse(False):
            return jax.tree.map(np.asarray, simulate(jnp.array(settings, jnp.float32)))

    return run


@pytest.mark.slow
def test_protective_settings_keep_most_patients_alive(course):
    alive, time_step = course((12, 26, 12, 0.5))
    assert alive[-1].mean() > 0.85
    assert time_step.reward[alive].mean() > 0.65
    # Ventilation far too weak, or far too strong, kills nearly everybody, of the right cause.
    alive, time_step = course((4, 6, 0, 0.21))
    assert alive[-1].mean() < 0.02
    assert np.median(time_step.info["saturation"][-1]) < 0.5
    assert np.median(time_step.info["acidity"][-1]) < 6.8
    alive, time_step = course((30, 35, 20, 1.0))
    assert alive[-1].mean() < 0.1
    assert np.median(time_step.info["acidity"][-1]) > 7.8
    assert np.median(time_step.info["plateau_pressure"][-1]) > 30


def test_more_oxygen_and_faster_breaths_do_what_they_should(course):
    alive, base = course((14, 16, 5, 0.4))
    _, richer = course((14, 16, 5, 0.7))
    _, faster = course((14, 24, 5, 0.4))
    living = alive[12]
    assert living.mean() > 0.5

    def after_two_hours(time_step, name):
        return time_step.info[name][12][living]

    assert (after_two_hours(richer, "saturation") >= after_two_hours(base, "saturation")).all()
    np.testing.assert_allclose(
        after_two_hours(richer, "carbon_dioxide"), after_two_hours(base, "carbon_dioxide")
    )
    # Where the lung empties slowly, faster breaths are smaller: they gain nothing for a few.
    gain = after_two_hours(faster, "acidity") - after_two_hours(base, "acidity")
    assert (gain > 0).mean() > 0.95
    assert gain.mean() > 0.05


def test_settings_beyond_the_ventilator_are_clipped():
    environment = ventilation.make(patient_variation=0)
    state, _ = environment.reset(jax.random.key(0), environment.default_params)
    beyond = jnp.array([99.0, -5.0, 30.0, 2.0])
    _, time_step = environment.step(jax.random.key(1), state, beyond, environment.default_params)
    given = [time_step.info[name] for name in ("inspiration", "rate", "peep", "oxygen")]
    np.testing.assert_array_equal(np.asarray(given), [30, 6, 20, 1])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pressure", "volume"])
def test_environment_passes_gymnasiums_checker(mode):
    simulators.assert_passes_gymnasiums_checker(ventilation.make(mode=mode))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "jet"}, "mode is 'jet'; it must be one of 'pressure', 'volume'"),
        ({"patient_variation": 3}, "patient_variation is 3; it must be in [0, 2]"),
        ({"num_substeps": 4}, "num_substeps is 4; it must be at least 5"),
        ({"max_steps": 0}, "max_steps is 0; it must be at least 1"),
    ],
)
def test_make_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ventilation.make(**options)
