"""Coarse random numbers have the law of fine ones."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxrl_llm.envs import draws


def test_uniform_is_uniform_and_never_at_the_ends():
    numbers = np.asarray(draws.uniform(jax.random.key(0), (3, 33333)))
    assert numbers.shape == (3, 33333)
    assert 0 < numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    # 99,999 numbers: 1.95 is the 99.9% point of sqrt(n) D.
    assert np.sqrt(numbers.size) * stats.kstest(numbers.ravel(), "uniform").statistic < 1.95
    # The two halves of a word are independent.
    flat = numbers.ravel()
    assert abs(np.corrcoef(flat[:50000], flat[49999:])[0, 1]) < 0.015


def test_truncated_normal_has_its_law():
    uniform = (np.arange(10000, dtype=np.float32) + 0.5) / 10000
    numbers = np.asarray(draws.truncated_normal(jnp.asarray(uniform), -1.0, 2.0))
    expected = stats.truncnorm(-1, 2).ppf(uniform.astype(np.float64))
    np.testing.assert_allclose(numbers, expected, atol=2e-5)
