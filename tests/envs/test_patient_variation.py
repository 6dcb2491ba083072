"""Constants of patients: their law, and that a spread of nothing changes nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.envs.patient_variation import constants, log_normal_patient

TYPICAL = constants(growth=2.0, loss=-3.0, source=0.5)


def test_constants_are_arrays_of_the_current_type(x64):
    assert {name: float(value) for name, value in constants(a=1.0, b=-2.5).items()} == {
        "a": 1.0,
        "b": -2.5,
    }
    assert constants(a=1.0)["a"].dtype == np.float64


def test_log_normal_patient_has_the_law_it_says():
    keys = jax.random.split(jax.random.key(0), 4096)
    patients = jax.vmap(lambda key: log_normal_patient(key, TYPICAL, 0.2))(keys)
    logarithms = np.stack([np.log(patients[name] / TYPICAL[name]) for name in TYPICAL])
    np.testing.assert_allclose(logarithms.mean(axis=1), 0, atol=4 * 0.2 / 64)
    np.testing.assert_allclose(logarithms.std(axis=1), 0.2, rtol=4 / np.sqrt(2 * 4096))
    # Each constant has a deviate of its own.
    correlation = np.corrcoef(logarithms)
    np.testing.assert_allclose(correlation, np.eye(3), atol=4 / 64)


def test_log_normal_patient_takes_a_spread_of_each_constant():
    spread = {"growth": jnp.float32(0), "loss": jnp.float32(0.1), "source": jnp.float32(0)}
    patient = log_normal_patient(jax.random.key(0), TYPICAL, spread)
    assert patient["growth"] == 2
    assert patient["source"] == 0.5
    assert patient["loss"] != -3


def test_log_normal_patient_without_spread_is_the_typical_one():
    patient = log_normal_patient(jax.random.key(0), TYPICAL, 0.0)
    jax.tree.map(np.testing.assert_array_equal, patient, TYPICAL)
