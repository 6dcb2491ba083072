"""Numerical building blocks: masked moments, the reverse linear recurrence, token likelihoods."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.types import Array, Key, PyTree

Inputs = TypeVar("Inputs")


def masked_mean(values: Array, mask: Array) -> Array:
    """The mean of `values` where `mask` (bool, same shape) is True; 0 where nothing is.

    >>> import jax.numpy as jnp
    >>> float(masked_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])))
    2.0
    """
    count = jnp.sum(mask, dtype=values.dtype)
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(count, 1)


def masked_variance(values: Array, mask: Array) -> Array:
    """The population variance (divisor n) of `values` where `mask` is True; 0 where nothing is."""
    centred = jnp.where(mask, values, 0) - masked_mean(values, mask)
    return masked_mean(jnp.square(centred), mask)


def masked_whiten(values: Array, mask: Array, *, epsilon: float = 1e-8) -> Array:
    """(values - mean) / (standard deviation + epsilon) over the True entries of `mask`.

    Masked entries come back as 0. A single entry, or entries all equal, whiten to 0: the gradient
    of the square root is never taken at 0.
    """
    centred = jnp.where(mask, values - masked_mean(values, mask), 0)
    variance = masked_mean(jnp.square(centred), mask)
    positive = variance > 0
    deviation = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)
    return centred / (deviation + epsilon)


def reverse_recurrence(
    coefficients: Callable[[Inputs], tuple[Array, Array]],
    inputs: Inputs,
    *,
    initial: Array | float = 0.0,
) -> Array:
    """x_t = b_t + a_t · x_{t+1}, backwards in time, with (a_t, b_t) = coefficients(inputs_t).

    Every return of reinforcement learning is one call of this. The coefficients are computed
    inside the scan, so that a batched call reads each input once and writes only the result:
    arrays `a` and `b` made beforehand cost 1.3 to 3 times as much on a CPU. On an accelerator,
    where a scan is a launch a step, the same recurrence is an associative scan of affine maps,
    in log2(T) passes.

    Args:
      coefficients: a function of the inputs of ONE time step.
      inputs: a pytree of arrays `[T]` (`[T, ...]` elementwise).
      initial: `x_T`, the value after the last step.

    Returns:
      x, `[T]`.
    """
    step = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
    offset = jax.eval_shape(coefficients, step)[1]
    last = jnp.broadcast_to(jnp.asarray(initial, offset.dtype), offset.shape)

    return jax.lax.platform_dependent(
        inputs,
        last,
        cpu=partial(_scan, coefficients),
        default=partial(_associative_scan, coefficients),
    )


def _scan(
    coefficients: Callable[[Inputs], tuple[Array, Array]], inputs: Inputs, last: Array
) -> Array:
    def body(following: Array, inputs_t: Inputs) -> tuple[Array, Array]:
        a, b = coefficients(inputs_t)
        x = b + a * following
        return x, x

    return jax.lax.scan(body, last, inputs, reverse=True)[1]


def _associative_scan(
    coefficients: Callable[[Inputs], tuple[Array, Array]], inputs: Inputs, last: Array
) -> Array:
    def compose(late: tuple[Array, Array], early: tuple[Array, Array]) -> tuple[Array, Array]:
        return early[0] * late[0], early[1] + early[0] * late[1]

    maps = jax.vmap(coefficients)(inputs)
    a, b = jax.lax.associative_scan(compose, maps, reverse=True)
    return a * jnp.broadcast_to(last, b.shape) + b


def token_log_probabilities(
    hidden: Array,
    embedding: Array,
    targets: Array,
    *,
    temperature: Array | float = 1.0,
    chunk_size: int | None = 1024,
) -> tuple[Array, Array]:
    """log pi(target) and the entropy of pi = softmax(hidden @ embedding.T / temperature), in nats.

    The logits `[N, V]` never exist as a whole: they are made a chunk of tokens at a time, and made
    again in the backward pass, which costs one matrix product more than keeping them. Products are
    accumulated in float32 and the softmax is float32, whatever the dtype of the operands.

    Args:
      hidden: `[N, E]`, flattened from `[B, L, E]` with token t at the place that PREDICTS it.
      embedding: `[V, E]`, of the output (the input's too where they are tied).
      targets: `[N]` integer, in [0, V). A position that does not count takes any token: multiply
        its results by 0.
      temperature: `[]`, positive, the one that the tokens were sampled at; it gets no gradient.
      chunk_size: at most this many tokens at a time. None takes all at once and keeps their
        logits, 4 N V bytes, for the backward pass: one product fewer, where they fit.

    Returns:
      log-probability `[N]` and entropy `[N]`, float32, both differentiable (in reverse mode) in
      `hidden` and `embedding`.
    """
    size = len(hidden)
    if size == 0:
        return jnp.zeros(0), jnp.zeros(0)
    num_chunks = 1 if chunk_size is None else max(1, -(-size // chunk_size))
    # Chunks of nearly equal length, so that less than one row a chunk is padding.
    padding = -size % num_chunks

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1)))
        # Chunk i holds every token i modulo num_chunks: where tokens are sharded over devices,
        # each device has its share of each chunk, rather than whole chunks one after the other.
        return x.reshape(-1, num_chunks, *x.shape[1:]).swapaxes(0, 1)

    results = _token_log_probabilities(
        split(hidden),
        embedding,
        split(targets),
        jax.lax.stop_gradient(jnp.asarray(temperature, _at_least_float32(hidden))),
        chunk_size is None,
    )
    log_probability, entropy = jax.tree.map(
        lambda leaf: leaf.swapaxes(0, 1).reshape(-1)[:size], results
    )
    return log_probability, entropy


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _token_log_probabilities(
    hidden: Array, embedding: Array, targets: Array, temperature: Array, keep_logits: bool
) -> tuple[Array, Array]:
    """Of chunks of tokens: `hidden` `[chunks, C, E]`, `targets` and both results `[chunks, C]`."""
    results, _ = _token_forward(hidden, embedding, targets, temperature, keep_logits)
    return results


def _token_forward(
    hidden: Array, embedding: Array, targets: Array, temperature: Array, keep_logits: bool
) -> tuple[tuple[Array, Array], PyTree]:
    def chunk(_: None, inputs: tuple[Array, Array]) -> tuple[None, PyTree]:
        hidden, targets = inputs
        logits = _token_logits(hidden, embedding, temperature)
        normaliser, entropy = jax.lax.platform_dependent(
            logits, cpu=_normaliser_and_entropy_by_rows, default=_normaliser_and_entropy
        )
        target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        kept = logits if keep_logits else None
        return None, (target - normaliser, entropy, normaliser, kept)

    _, outputs = jax.lax.scan(chunk, None, (hidden, targets))
    log_probability, entropy, normaliser, kept = outputs
    residuals = hidden, embedding, targets, temperature, entropy, normaliser, kept
    return (log_probability, entropy), residuals


def _token_backward(
    keep_logits: bool, residuals: PyTree, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, np.ndarray, Array]:
    """d/dz_j = g [j = target] - pi_j (g + h (log pi_j + H)), where z are the logits.

    g and h are the cotangents of log pi(target) and of H. Every chunk adds to one gradient of the
    embedding, in float32.
    """
    hidden, embedding, targets, temperature, entropy, normaliser, kept = residuals

    def chunk(total: Array, inputs: PyTree) -> tuple[Array, Array]:
        hidden, targets, entropy, normaliser, logits, g, h = inputs
        if not keep_logits:
            logits = _token_logits(hidden, embedding, temperature)
        log_pi = logits - normaliser[:, None]
        is_target = jnp.arange(len(embedding))[None] == targets[:, None]
        slope = g[:, None] + h[:, None] * (log_pi + entropy[:, None])
        cotangent = jnp.where(is_target, g[:, None], 0) - jnp.exp(log_pi) * slope
        cotangent = (cotangent / temperature).astype(hidden.dtype)
        total += jnp.einsum("cv,ce->ve", cotangent, hidden, preferred_element_type=total.dtype)
        d_hidden = jnp.einsum("cv,ve->ce", cotangent, embedding, preferred_element_type=total.dtype)
        return total, d_hidden.astype(hidden.dtype)

    accumulator = jnp.zeros(embedding.shape, normaliser.dtype)
    inputs = hidden, targets, entropy, normaliser, kept, *cotangents
    d_embedding, d_hidden = jax.lax.scan(chunk, accumulator, inputs)
    no_gradient = np.zeros(targets.shape, jax.dtypes.float0)
    return d_hidden, d_embedding.astype(embedding.dtype), no_gradient, jnp.zeros_like(temperature)


_token_log_probabilities.defvjp(_token_forward, _token_backward)


def _token_logits(hidden: Array, embedding: Array, temperature: Array) -> Array:
    dtype = _at_least_float32(hidden)
    product = jnp.einsum("ce,ve->cv", hidden, embedding, preferred_element_type=dtype)
    return product / temperature


def _at_least_float32(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _normaliser_and_entropy(logits: Array) -> tuple[Array, Array]:
    """log sum exp and the entropy of each row of `[..., V]`."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    excess = logits - top
    mass = jnp.exp(excess)
    total = jnp.sum(mass, axis=-1)
    log_total = jnp.log(total)
    return top[..., 0] + log_total, log_total - jnp.sum(mass * excess, axis=-1) / total


def _normaliser_and_entropy_by_rows(logits: Array) -> tuple[Array, Array]:
    """The same of `[C, V]`, a few rows at a time: five times as fast where they stay in a cache."""
    fitting = max(8, (1 << 18) // logits.shape[-1])
    rows = math.gcd(len(logits), 1 << (fitting.bit_length() - 1))
    # Every row modulo the number of groups, for rows that are sharded over devices, as above.
    groups = logits.reshape(rows, -1, logits.shape[-1])

    def group(index: Array) -> tuple[Array, Array]:
        return _normaliser_and_entropy(jax.lax.dynamic_index_in_dim(groups, index, 1, False))

    normaliser, entropy = jax.lax.map(group, jnp.arange(groups.shape[1]))
    return normaliser.T.reshape(-1), entropy.T.reshape(-1)


def random_permutation(key: Key, n: int) -> Array:
    """A pseudo-random permutation of 0 .. n - 1, `[n]` int32, in O(n) elementwise operations.

    A Feistel network of keyed rounds is a bijection on the next power of two, whatever its round
    function; indices that leave [0, n) walk on along their cycle until they return. Sorting random
    numbers, as `jax.random.permutation` does, takes 400 times as long for the 262,144 rows of a
    PPO batch on a CPU.

    Source: Luby & Rackoff (1988), "How to construct pseudorandom permutations"; cycle walking
      from Black & Rogaway (2002), "Ciphers with arbitrary finite domains". The round function is
      a multiply-xorshift hash: statistically mixed, not cryptographic.
    """
    # Fewer bits than 8 leave the rounds too few round functions to choose from to be uniform.
    num_bits = max((n - 1).bit_length(), 8)
    right_bits = num_bits // 2
    left_bits = num_bits - right_bits
    round_keys = jax.random.bits(key, (6,), jnp.uint32)

    def encipher(index: Array) -> Array:
        left, right = index >> right_bits, index & ((1 << right_bits) - 1)
        widths = (left_bits, right_bits)
        for round_key in round_keys:
            digest = (right ^ round_key) * jnp.uint32(0x9E3779B1)
            digest = (digest ^ (digest >> 15)) * jnp.uint32(0x85EBCA77)
            digest = (digest ^ (digest >> 13)) & ((1 << widths[0]) - 1)
            left, right = right, left ^ digest
            widths = (widths[1], widths[0])
        return (left << widths[1]) | right

    index = encipher(jnp.arange(n, dtype=jnp.uint32))
    if n < 1 << num_bits:
        index = jax.lax.while_loop(
            lambda index: jnp.any(index >= n),
            lambda index: jnp.where(index >= n, encipher(index), index),
            index,
        )
    return index.astype(jnp.int32)
