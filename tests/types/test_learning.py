"""`Mean` adds exactly over minibatches; hyper-parameters are arrays."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxrl_llm.types import Array, Mean, hyperparameters


def test_mean_of_unequal_minibatches_is_the_mean_of_all():
    values = np.random.default_rng(0).integers(-50, 50, size=12).astype(np.float32)
    parts = [Mean.of(jnp.array(part)) for part in np.split(values, [1, 4, 4])]
    assert (parts[0] + parts[1] + parts[2] + parts[3]).mean == np.float32(values.mean())


def test_mean_of_masked_minibatches_is_the_mean_of_what_was_kept():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    mask = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    rows = jax.vmap(Mean.of)(jnp.array(values), jnp.array(mask))
    total = jax.tree.map(jnp.sum, rows)
    assert total.mean == values[mask].mean()
    np.testing.assert_array_equal(rows.mean, [0.0, 5.5, 0.0])
    average_of_averages = float(rows.mean.mean())
    assert average_of_averages != float(total.mean)


def test_mean_ignores_nan_where_masked():
    part = Mean.of(jnp.array([1.0, jnp.nan]), jnp.array([True, False]))
    assert part.mean == 1.0


def test_mean_of_nothing_is_zero_with_finite_gradients():
    def mean(values):
        return Mean.of(values, jnp.zeros(3, bool)).mean

    value, gradient = jax.value_and_grad(mean)(jnp.ones(3))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros(3))


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.int32, jnp.bfloat16])
def test_mean_counts_in_float32_at_least(dtype):
    """A bool cannot count to 2, and bfloat16 not beyond 256."""
    values = jnp.concatenate([jnp.ones(300), jnp.zeros(301)]).astype(dtype)
    for part in (Mean.of(values), Mean.of(values, jnp.ones(601, bool))):
        assert part.total.dtype == part.weight.dtype == jnp.float32
        assert (float(part.total), float(part.weight)) == (300.0, 601.0)


def test_mean_keeps_float64(x64):
    assert Mean.of(jnp.array([0.1])).mean == 0.1


def test_mean_is_a_pytree_that_scans():
    def body(total, value):
        return total + Mean.of(value), None

    zero = Mean(total=jnp.zeros(()), weight=jnp.zeros(()))
    total, _ = jax.lax.scan(body, zero, jnp.arange(6.0).reshape(3, 2))
    assert total.mean == 2.5


def test_hyperparameters_are_scalars_of_the_fields_of_that_name():
    @struct.dataclass(kw_only=True)
    class Numbers:
        gamma: Array

    @dataclass(frozen=True)
    class Config:
        gamma: float = 0.5
        num_steps: int = 3

    numbers = hyperparameters(Numbers, Config())
    assert numbers.gamma.dtype == jnp.float32
    assert numbers.gamma == 0.5
