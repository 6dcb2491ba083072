"""Moments against NumPy, the recurrence against a loop, token likelihoods against a softmax."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from jax.typing import DTypeLike

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_associative_scan_has_the_gradients_of_scan(x64):
    steps, last = random_steps(6), jnp.array(0.5)

    def total(scan, steps, last):
        return jnp.sum(jnp.sin(scan(pair, steps, last)))

    expected = jax.grad(partial(total, numerics._scan), argnums=(0, 1))(steps, last)
    actual = jax.grad(partial(total, numerics._associative_scan), argnums=(0, 1))(steps, last)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), actual, expected)


def test_reverse_recurrence_has_correct_gradients(x64):
    check_grads(partial(numerics.reverse_recurrence, pair), (random_steps(5),), order=1)


# Token log-probabilities


def naive_token_log_probabilities(hidden, embedding, targets, temperature=1.0):
    log_pi = jax.nn.log_softmax(hidden @ embedding.T / temperature)
    log_probability = jnp.take_along_axis(log_pi, targets[:, None], axis=1)[:, 0]
    return log_probability, -jnp.sum(jnp.exp(log_pi) * log_pi, axis=1)


def random_tokens(size=13, width=5, vocabulary=11, dtype: DTypeLike = np.float64):
    random = np.random.default_rng(size)
    hidden, embedding = random.normal(size=(size, width)), random.normal(size=(vocabulary, width))
    targets = random.integers(vocabulary, size=size)
    return jnp.array(hidden, dtype), jnp.array(embedding, dtype), jnp.array(targets)


def value_and_gradients(function, hidden, embedding, targets, **options):
    """Of both results, each weighted differently at every token, and not at all at some."""
    weights = np.sin(np.arange(2 * len(targets)).reshape(2, -1)) * (np.arange(len(targets)) % 4 > 0)

    def total(hidden, embedding):
        results = function(hidden, embedding, targets, **options)
        return jnp.sum(jnp.stack(results) * jnp.array(weights, hidden.dtype)), results

    (_, results), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, embedding)
    return results, gradients


def assert_trees_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 13, 16])
@pytest.mark.parametrize("chunk_size", [4, 5, 100, None])
def test_token_log_probabilities_equal_those_of_a_whole_softmax(size, chunk_size, x64):
    tokens, options = random_tokens(size), {"temperature": 0.7}
    expected = value_and_gradients(naive_token_log_probabilities, *tokens, **options)
    chunked = partial(numerics.token_log_probabilities, chunk_size=chunk_size)
    actual = jax.jit(partial(value_and_gradients, chunked, **options))(*tokens)
    assert_trees_close(actual, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [4, None])
def test_token_log_probabilities_have_correct_gradients(chunk_size, x64):
    hidden, embedding, targets = random_tokens(6)
    function = partial(numerics.token_log_probabilities, targets=targets, chunk_size=chunk_size)
    check_grads(function, (hidden, embedding), order=1, modes=["rev"])


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [4, None])
def test_token_log_probabilities_jit_equals_eager_with_a_traced_temperature(chunk_size):
    tokens = random_tokens(dtype=np.float32)
    function = partial(numerics.token_log_probabilities, chunk_size=chunk_size)
    expected = value_and_gradients(naive_token_log_probabilities, *tokens, temperature=0.7)
    jitted = value_and_gradients(jax.jit(function), *tokens, temperature=jnp.float32(0.7))
    eager = value_and_gradients(function, *tokens, temperature=0.7)
    assert_trees_close(jitted, eager, rtol=1e-5, atol=1e-6)
    assert_trees_close(jitted, expected, rtol=1e-4, atol=1e-5)


def test_token_log_probabilities_of_bfloat16_accumulate_and_normalise_in_float32():
    hidden, embedding, targets = random_tokens(16, 64, 500, jnp.bfloat16)
    wide = hidden.astype(jnp.float32), embedding.astype(jnp.float32), targets
    (results, gradients), (expected, expected_gradients) = (
        jax.jit(partial(value_and_gradients, numerics.token_log_probabilities))(*tokens)
        for tokens in ((hidden, embedding, targets), wide)
    )
    assert {x.dtype for x in results} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in gradients} == {jnp.dtype(jnp.bfloat16)}
    assert_trees_close(results, expected, rtol=1e-5, atol=1e-5)
    scale = max(abs(x).max() for x in expected_gradients)
    gradients = [np.array(x, np.float32) for x in gradients]
    assert_trees_close(gradients, list(expected_gradients), rtol=0.02, atol=0.003 * scale)


def test_token_log_probabilities_are_finite_at_extreme_logits():
    """The entropy of a certain choice is 0, and no infinity times 0 enters a gradient."""
    hidden, embedding = jnp.array([[1e4], [-1e4], [0.0]]), jnp.array([[1.0], [0.0], [-1.0]])
    tokens = hidden, embedding, jnp.array([0, 0, 0])
    for chunk_size in (2, None):
        function = partial(numerics.token_log_probabilities, chunk_size=chunk_size)
        gradient = jax.jit(partial(value_and_gradients, function))
        (log_probability, entropy), gradients = gradient(*tokens)
        np.testing.assert_allclose(log_probability, [0, -2e4, -np.log(3)], rtol=1e-6)
        np.testing.assert_allclose(entropy, [0, 0, np.log(3)], rtol=1e-6)
        assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(7, 5), (16, 3), (1, 1)])
def test_rows_one_group_after_another_equal_all_at_once(shape):
    """Each platform runs one of the two; here both run on whichever there is."""
    logits = 5 * jax.random.normal(jax.random.key(0), shape) + 100
    actual = numerics._normaliser_and_entropy_by_rows(logits)
    expected = numerics._normaliser_and_entropy(logits)
    assert_trees_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_token_log_probabilities_of_sharded_tokens_gather_nothing():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    along, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis))
        for axis in ("data", None)
    )
    tokens = random_tokens(64, dtype=np.float32)
    gradient = jax.jit(
        partial(value_and_gradients, partial(numerics.token_log_probabilities, chunk_size=16))
    )
    sharded = [jax.device_put(x, s) for x, s in zip(tokens, (along, whole, along), strict=True)]
    assert_trees_close(gradient(*sharded), gradient(*tokens), rtol=1e-5, atol=1e-5)
    program = str(gradient.lower(*sharded).compile().as_text())
    assert "all-reduce" in program
    assert not re.search("all-gather|all-to-all|collective-permute", program)


@pytest.mark.slow
def test_token_log_probabilities_take_a_quarter_of_the_memory_of_a_whole_softmax():
    hidden = jax.ShapeDtypeStruct((4 * 1024, 64), jnp.float32)
    embedding = jax.ShapeDtypeStruct((50257, 64), jnp.float32)
    targets = jax.ShapeDtypeStruct((4 * 1024,), jnp.int32)

    def peak(function):
        def total(hidden, embedding, targets):
            return jnp.sum(function(hidden, embedding, targets)[0])

        lowered = jax.jit(jax.grad(total, (0, 1))).lower(hidden, embedding, targets)
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    chunked = peak(numerics.token_log_probabilities)
    assert chunked <= peak(naive_token_log_probabilities) / 4
    assert chunked <= peak(partial(numerics.token_log_probabilities, chunk_size=None)) / 3


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 8, 10, 100])
def test_random_permutation_sends_every_index_anywhere_equally_often(n):
    samples = permutations(n)
    for index in (0, 1, n // 2, n - 1):
        assert chi_squared_excess(np.bincount(samples[:, index], minlength=n)) < 6
    # A uniform permutation has 1 fixed point on average, with variance 1, whatever n.
    assert abs((samples == np.arange(n)).sum(axis=1).mean() - 1) < 4 / np.sqrt(len(samples))


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 8, 10])
def test_random_permutation_sends_every_pair_anywhere_equally_often(n):
    samples = permutations(n)
    for one, other in ((0, 1), (0, n // 2), (1, n - 1), (n - 2, n - 1)):
        cells = np.bincount(samples[:, one] * n + samples[:, other], minlength=n * n)
        assert chi_squared_excess(cells.reshape(n, n)[~np.eye(n, dtype=bool)]) < 6
