"""The sensor's error has the memory and the law that were published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import glucose_sensor

NUM = 100_000


def closed_form():
    """Mean and deviation of xi + lambda sinh(X) with X normal, by the moments of exp(X)."""
    mean = 0.5444 / 1.6898
    variance = 0.49 / 0.51 / 1.6898**2
    first = np.exp(variance / 2) * np.sinh(mean)
    second = (np.exp(2 * variance) * np.cosh(2 * mean) - 1) / 2
    return -5.47 + 15.9574 * first, 15.9574 * np.sqrt(second - first**2)


@pytest.mark.parametrize("minutes", [5.0, 15.0])
def test_noise_has_the_published_memory_and_law(minutes):
    first_key, next_key = jax.random.split(jax.random.key(0))
    before = jax.vmap(glucose_sensor.first_noise)(jax.random.split(first_key, NUM))
    keys = jax.random.split(next_key, NUM)
    step = jax.vmap(glucose_sensor.next_noise, in_axes=(0, 0, None))
    after = step(keys, before, minutes)
    # Standard errors at 1e5 samples: .002 of a deviation, .003 of a correlation.
    deviation = 0.7 / np.sqrt(1 - 0.49)
    np.testing.assert_allclose([before.std(), after.std()], deviation, rtol=0.01)
    correlation = np.corrcoef(before, after)[0, 1]
    np.testing.assert_allclose(correlation, 0.7 ** (minutes / 15), atol=0.01)


def test_error_has_the_mean_and_deviation_of_its_law():
    noise = jax.vmap(glucose_sensor.first_noise)(jax.random.split(jax.random.key(1), NUM))
    error = np.asarray(glucose_sensor.error(noise))
    mean, deviation = closed_form()
    np.testing.assert_allclose(error.mean(), mean, atol=5 * deviation / np.sqrt(NUM))
    np.testing.assert_allclose(error.std(), deviation, rtol=0.02)
    # The paper measured .76 and 11 mg/dL.
    np.testing.assert_allclose([mean, deviation], [0.76, 11], rtol=0.08)


def test_reading_stays_on_the_display():
    readings = glucose_sensor.reading(jnp.array([0.0, 112.0, 900.0]), jnp.array([0.0, -9.0, 9.0]))
    np.testing.assert_array_equal(readings, [40, 40, 400])
