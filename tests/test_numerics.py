"""Masked moments against NumPy on the subset, and the recurrence against a loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_llm import numerics

VALUES = np.random.default_rng(0).normal(2.0, 3.0, size=(4, 5))
MASK = np.random.default_rng(1).random((4, 5)) < 0.6
MOMENTS = [numerics.masked_mean, numerics.masked_variance, numerics.masked_whiten]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_masked_moments_equal_those_of_the_subset(dtype):
    with jax.enable_x64(dtype == np.float64):
        values, mask, kept = jnp.array(VALUES, dtype), jnp.array(MASK), VALUES[MASK]
        mean = jax.jit(numerics.masked_mean)(values, mask)
        variance = jax.jit(numerics.masked_variance)(values, mask)
        white = jax.jit(numerics.masked_whiten)(values, mask)
        assert mean.dtype == variance.dtype == white.dtype == dtype
        tolerance = 1e-6 if dtype == np.float32 else 1e-14
        np.testing.assert_allclose(mean, kept.mean(), rtol=tolerance)
        np.testing.assert_allclose(variance, kept.var(), rtol=tolerance)
        expected = np.where(MASK, (VALUES - kept.mean()) / (kept.std() + 1e-8), 0)
        np.testing.assert_allclose(white, expected, rtol=10 * tolerance, atol=tolerance)


def test_masked_variance_survives_a_large_mean():
    values = jnp.array([10_000.0, 10_001, 10_002, -5])
    mask = jnp.array([True, True, True, False])
    np.testing.assert_allclose(numerics.masked_variance(values, mask), 2 / 3, rtol=1e-6)


@pytest.mark.parametrize("moment", MOMENTS)
def test_masked_moments_equal_eager_and_a_loop_under_vmap(moment):
    values, mask = jnp.array(VALUES, jnp.float32), jnp.array(MASK)
    batched = jax.jit(jax.vmap(moment))(values, mask)
    loop = jnp.stack([moment(*row) for row in zip(values, mask, strict=True)])
    np.testing.assert_allclose(batched, loop, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moment", MOMENTS)
def test_masked_moments_ignore_nan_in_masked_entries(moment):
    mask = jnp.array(MASK)
    clean = jnp.array(np.where(MASK, VALUES, 0), jnp.float32)
    poisoned = jnp.array(np.where(MASK, VALUES, np.nan), jnp.float32)

    def total(values):
        return jnp.sum(jnp.sin(moment(values, mask)))

    np.testing.assert_array_equal(moment(poisoned, mask), moment(clean, mask))
    gradient = jax.grad(total)(poisoned)
    np.testing.assert_allclose(gradient, jax.grad(total)(clean), rtol=1e-6)
    assert not gradient[~MASK].any()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("count", [0, 1, 3], ids=["empty", "one entry", "all equal"])
def test_masked_moments_and_gradients_are_finite_without_spread(moment, count):
    values, mask = jnp.full(4, 2.5), jnp.arange(4) < count

    def total(values):
        return jnp.sum(moment(values, mask))

    value, gradient = jax.value_and_grad(total)(values)
    expected = 2.5 if moment is numerics.masked_mean and count else 0.0
    assert value == expected
    assert np.isfinite(gradient).all()


def test_masked_moments_have_correct_gradients(x64):
    values, mask = jnp.array(VALUES[0]), jnp.array(MASK[0])
    for moment in MOMENTS:
        check_grads(partial(moment, mask=mask), (values,), order=1)


def test_masked_whiten_has_mean_zero_and_unit_variance(x64):
    white = numerics.masked_whiten(jnp.array(VALUES), jnp.array(MASK))
    np.testing.assert_allclose(np.asarray(white)[MASK].mean(), 0, atol=1e-12)
    np.testing.assert_allclose(np.asarray(white)[MASK].std(), 1, rtol=1e-8)


# The reverse recurrence


def pair(step):
    return step["a"], jnp.square(step["b"])


def random_steps(length, *shape):
    random = np.random.default_rng(length)
    shape = length, *shape
    return {"a": random.uniform(-1, 1, shape), "b": random.normal(size=shape)}


def recurrence(steps, initial):
    x, result = np.broadcast_to(initial, steps["a"].shape[1:]), []
    for a, b in zip(steps["a"][::-1], steps["b"][::-1], strict=True):
        x = b**2 + a * x
        result.append(x)
    return np.stack(result[::-1])


@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_reverse_recurrence_matches_a_loop(length, x64):
    steps = random_steps(length)
    actual = jax.jit(partial(numerics.reverse_recurrence, pair))(steps, initial=0.75)
    np.testing.assert_allclose(actual, recurrence(steps, 0.75), rtol=1e-12)


def test_reverse_recurrence_jit_equals_eager_and_starts_from_zero():
    steps = jax.tree.map(jnp.float32, random_steps(9))
    eager = numerics.reverse_recurrence(pair, steps)
    jitted = jax.jit(partial(numerics.reverse_recurrence, pair))(steps)
    np.testing.assert_allclose(jitted, eager, rtol=1e-6)
    np.testing.assert_allclose(eager, recurrence(random_steps(9), 0.0), rtol=1e-5)


def test_reverse_recurrence_time_major_vmap_equals_elementwise():
    steps = jax.tree.map(jnp.float32, random_steps(9, 4))
    scan = partial(numerics.reverse_recurrence, pair)
    batched = jax.jit(jax.vmap(scan, in_axes=1, out_axes=1))(steps)
    np.testing.assert_allclose(batched, recurrence(random_steps(9, 4), 0.0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(batched, jax.jit(scan)(steps), rtol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 5, 64])
def test_associative_scan_equals_scan(length):
    """Each platform runs one of the two; here both run on whichever there is."""
    steps = jax.tree.map(jnp.float32, random_steps(length, 3))
    last = jnp.array([0.0, 0.5, -2.0])
    sequential = jax.jit(partial(numerics._scan, pair))(steps, last)
    parallel = jax.jit(partial(numerics._associative_scan, pair))(steps, last)
    assert sequential.dtype == parallel.dtype == jnp.float32
    np.testing.assert_allclose(parallel, sequential, rtol=1e-5, atol=1e-5)


def test_associative_scan_has_the_gradients_of_scan(x64):
    steps, last = random_steps(6), jnp.array(0.5)

    def total(scan, steps, last):
        return jnp.sum(jnp.sin(scan(pair, steps, last)))

    expected = jax.grad(partial(total, numerics._scan), argnums=(0, 1))(steps, last)
    actual = jax.grad(partial(total, numerics._associative_scan), argnums=(0, 1))(steps, last)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), actual, expected)


def test_reverse_recurrence_has_correct_gradients(x64):
    check_grads(partial(numerics.reverse_recurrence, pair), (random_steps(5),), order=1)


# Permutations


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 100, 1000, 4096, 12345])
def test_random_permutation_is_a_bijection(n):
    permute = jax.jit(jax.vmap(partial(numerics.random_permutation, n=n)))
    first, second = permute(jax.random.split(jax.random.key(0)))
    assert first.dtype == jnp.int32
    for permutation in (first, second):
        np.testing.assert_array_equal(np.sort(permutation), np.arange(n))
    if n >= 64:
        assert (first == second).mean() < 0.1
        assert (first == np.arange(n)).mean() < 0.1


def test_random_permutation_jit_equals_eager_and_vmap_equals_a_loop():
    permute = partial(numerics.random_permutation, n=100)
    batched = jax.jit(jax.vmap(permute))(jax.random.split(jax.random.key(0), 3))
    for index, key in enumerate(jax.random.split(jax.random.key(0), 3)):
        np.testing.assert_array_equal(batched[index], permute(key))


def permutations(n, num_keys=50_000):
    keys = jax.random.split(jax.random.key(1), num_keys)
    return np.array(jax.jit(jax.vmap(partial(numerics.random_permutation, n=n)))(keys))


def chi_squared_excess(cells):
    """Standard deviations by which counts of equally likely cells miss what chance gives."""
    degrees, expected = cells.size - 1, cells.mean()
    statistic = np.sum((cells - expected) ** 2) / expected
    return (statistic - degrees) / np.sqrt(2 * degrees)


@pytest.mark.parametrize("n", [5, 8, 10, 100])
def test_random_permutation_sends_every_index_anywhere_equally_often(n):
    samples = permutations(n)
    for index in (0, 1, n // 2, n - 1):
        assert chi_squared_excess(np.bincount(samples[:, index], minlength=n)) < 6
    # A uniform permutation has 1 fixed point on average, with variance 1, whatever n.
    assert abs((samples == np.arange(n)).sum(axis=1).mean() - 1) < 4 / np.sqrt(len(samples))


@pytest.mark.parametrize("n", [5, 8, 10])
def test_random_permutation_sends_every_pair_anywhere_equally_often(n):
    samples = permutations(n)
    for one, other in ((0, 1), (0, n // 2), (1, n - 1), (n - 2, n - 1)):
        cells = np.bincount(samples[:, one] * n + samples[:, other], minlength=n * n)
        assert chi_squared_excess(cells.reshape(n, n)[~np.eye(n, dtype=bool)]) < 6
