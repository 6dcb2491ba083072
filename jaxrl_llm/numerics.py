"""Numerical building blocks: masked moments and the reverse linear recurrence."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxrl_llm.types import Array

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

    def scan(inputs: Inputs, last: Array) -> Array:
        def body(following: Array, inputs_t: Inputs) -> tuple[Array, Array]:
            a, b = coefficients(inputs_t)
            x = b + a * following
            return x, x

        return jax.lax.scan(body, last, inputs, reverse=True)[1]

    def associative_scan(inputs: Inputs, last: Array) -> Array:
        def compose(late: tuple[Array, Array], early: tuple[Array, Array]) -> tuple[Array, Array]:
            return early[0] * late[0], early[1] + early[0] * late[1]

        maps = jax.vmap(coefficients)(inputs)
        a, b = jax.lax.associative_scan(compose, maps, reverse=True)
        return a * jnp.broadcast_to(last, b.shape) + b

    return jax.lax.platform_dependent(inputs, last, cpu=scan, default=associative_scan)
