"""Attention against a loop over queries, and its masks and positions against their definitions."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.nn import attention, gpt2

ROWS, QUERIES, KEYS, HEADS, WIDTH = 2, 4, 6, 3, 8
SCALE = 0.3
RANDOM = np.random.default_rng(0)
REAL: Any = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0]], bool)
SEGMENT: Any = np.array([[0, 0, 1, 1, 2, 2], [1, 1, 1, 2, 0, 3], [0, 0, 0, 0, 0, 0]])


def draw(*shape: int) -> Any:
    return RANDOM.normal(size=shape).astype(np.float32)


QUERY = draw(ROWS, HEADS, QUERIES, WIDTH)
KEY, VALUE = draw(ROWS, HEADS, KEYS, WIDTH), draw(ROWS, HEADS, KEYS, WIDTH)
MASK: Any = RANDOM.random((ROWS, 1, QUERIES, KEYS)) < 0.6
MASK[0, 0, 1] = False  # a query that may attend to nothing
MASK[1, 0, 2] = np.arange(KEYS) == 4  # and one that may attend to one key


def naive_attention(query, key, value, mask) -> tuple[Any, Any]:
    """One softmax at a time in float64: weights `[B, H, T, S]` and what they sum to."""
    shape = (*query.shape[:3], key.shape[2])
    weights, attended = np.zeros(shape), np.zeros(query.shape)
    for b, h, t in np.ndindex(*shape[:3]):
        score = SCALE * key[b, h].astype(np.float64) @ query[b, h, t]
        weight = np.where(mask[b, 0, t], np.exp(score - score.max()), 0)
        if not mask[b, 0, t].any():
            weight = np.ones_like(score)
        weights[b, h, t] = weight / weight.sum()
        attended[b, h, t] = weights[b, h, t] @ value[b, h]
    return weights, attended


@pytest.mark.parametrize("wrap", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_attend_and_weights_match_a_softmax_of_each_query(wrap):
    weights, attended = naive_attention(QUERY, KEY, VALUE, MASK)
    actual = wrap(partial(attention.attend, scale=SCALE))(QUERY, KEY, VALUE, MASK)
    np.testing.assert_allclose(actual, attended, atol=1e-6)
    actual = wrap(partial(attention.weights, scale=SCALE))(QUERY, KEY, MASK)
    np.testing.assert_allclose(actual, weights, atol=1e-6)
    np.testing.assert_allclose(attention.weighted_sum(actual, VALUE), attended, atol=1e-6)


def test_attend_without_a_mask_is_causal():
    query = KEY[:, :, ::-1]
    causal = np.tril(np.ones((ROWS, 1, KEYS, KEYS), bool))
    weights, attended = naive_attention(query, KEY, VALUE, causal)
    actual = attention.attend(query, KEY, VALUE, None, scale=SCALE)
    np.testing.assert_allclose(actual, attended, atol=1e-6)
    actual = attention.weights(query, KEY, None, scale=SCALE)
    np.testing.assert_allclose(actual, weights, atol=1e-6)
    assert np.all(np.array(actual)[~np.broadcast_to(causal, actual.shape)] == 0)


def test_attend_gives_a_masked_key_exactly_nothing():
    hidden = ~MASK.any(axis=2)[..., None]
    mask = MASK & (np.arange(KEYS) != 2)
    hidden |= np.arange(KEYS)[:, None] == 2
    mask[0, 0, 1, 0] = True  # a query without keys would weigh all of them alike
    attended = attention.attend(QUERY, KEY, VALUE, mask, scale=SCALE)
    for fill in (1e6, -1e6):
        key, value = jnp.where(hidden, fill, KEY), jnp.where(hidden, 7, VALUE)
        other = attention.attend(QUERY, key, value, mask, scale=SCALE)
        np.testing.assert_array_equal(other, attended)
    # Even where every score that counts is far below 0.
    weights = attention.weights(abs(QUERY), -1e4 * abs(KEY), mask, scale=SCALE)
    hidden = np.broadcast_to(~mask & mask.any(-1, keepdims=True), weights.shape)
    assert not np.array(weights)[hidden].any()


def test_attend_has_finite_gradients_where_a_query_attends_to_nothing():
    def total(query, key, value):
        attended = attention.attend(query, key, value, MASK, scale=SCALE)
        weights = attention.weights(query, key, MASK, scale=SCALE)
        return jnp.sum(jnp.sin(attended)) + jnp.sum(jnp.square(weights))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(QUERY, KEY, VALUE)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    np.testing.assert_array_equal(gradients[0][0, :, 1], np.zeros((HEADS, WIDTH)))


def test_attend_in_half_precision_takes_its_softmax_in_float32():
    # 256 + small scores: in bfloat16 neighbouring scores would differ by 2.
    query = np.ones((1, 1, 1, WIDTH), np.float32)
    key = np.full((1, 1, 5, WIDTH), 32, np.float32)
    key[0, 0, :, 0] += [0, 0.25, 0.5, 0.75, 1]
    value = np.arange(5, dtype=np.float32)[None, None, :, None].repeat(WIDTH, -1)
    weight = np.exp([0, 0.25, 0.5, 0.75, 1.0])
    query, key, value = (jnp.asarray(array, jnp.bfloat16) for array in (query, key, value))
    actual = attention.attend(query, key, value, jnp.ones((1, 1, 1, 5), bool), scale=1.0)
    assert actual.dtype == jnp.bfloat16
    expected = weight @ np.arange(5) / weight.sum()
    np.testing.assert_allclose(np.array(actual, np.float32), expected, rtol=2**-8)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN's kernel needs a GPU")
@pytest.mark.parametrize("mask", [MASK, None], ids=["mask", "causal"])
def test_attend_fused_matches_a_softmax_of_each_query(mask):
    query = QUERY if mask is not None else KEY[:, :, ::-1]
    allowed: Any = np.tril(np.ones((ROWS, 1, KEYS, KEYS), bool)) if mask is None else mask
    half = [jnp.asarray(array, jnp.bfloat16) for array in (query, KEY, VALUE)]
    _, attended = naive_attention(*(np.float32(array) for array in half), mask=allowed)
    actual = np.array(jax.jit(partial(attention.attend, scale=SCALE))(*half, mask), np.float32)
    # What a query that attends to nothing gives is its own affair, but must be finite.
    assert np.isfinite(actual).all()
    anything = np.broadcast_to(np.any(allowed, axis=-1), actual.shape[:3])
    np.testing.assert_allclose(actual[anything], attended[anything], atol=0.03)


@pytest.mark.parametrize("segment", [None, SEGMENT], ids=["rows", "segments"])
def test_causal_mask_matches_its_definition(segment):
    mask = jax.device_get(jax.jit(attention.causal_mask)(REAL, segment, None))
    assert mask.shape == (3, 1, 6, 6)
    for b, t, s in np.ndindex(3, 6, 6):
        same = segment is None or segment[b, t] == segment[b, s]
        assert mask[b, 0, t, s] == (s <= t and REAL[b, s] and same)


@pytest.mark.parametrize("num_queries", [1, 2])
def test_causal_mask_over_a_cache_reaches_what_was_read_before(num_queries):
    config = gpt2.GPT2Config(n_layer=1, n_head=1, n_embd=1)
    slots = np.array([[1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0]], bool)
    slots[:, 3 + num_queries :] = False
    cache = gpt2.init_cache(config, 2, 7)
    cache = dataclasses.replace(cache, mask=jnp.asarray(slots), length=jnp.int32(3))
    mask = jax.device_get(
        jax.jit(attention.causal_mask)(slots[:, 3 : 3 + num_queries], None, cache)
    )
    assert mask.shape == (2, 1, num_queries, 7)
    for b, t, s in np.ndindex(2, num_queries, 7):
        assert mask[b, 0, t, s] == (slots[b, s] and s <= 3 + t)


@pytest.mark.parametrize("segment", [None, SEGMENT], ids=["rows", "segments"])
def test_positions_count_the_real_tokens_before(segment):
    position = jax.device_get(jax.jit(attention.positions)(REAL, segment))
    assert position.dtype == jnp.int32
    for b, t in np.argwhere(REAL):
        before = [
            s
            for s in range(t)
            if REAL[b, s] and (segment is None or segment[b, s] == segment[b, t])
        ]
        assert position[b, t] == len(before)
