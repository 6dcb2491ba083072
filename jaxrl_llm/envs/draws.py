"""Random numbers for resets: coarse and cheap.

A rollout draws the start of a possible next episode at every step, so a reset that needs dozens of
random numbers can cost more than the step itself. Sixteen random bits a number, drawn all at once,
halve what the generator takes; their steps of 1.5e-5 are finer than anything a patient's weight or
mealtime is known to.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri
from numpy.typing import ArrayLike, NDArray

from jaxrl_llm.types import Array, Key


def uniform(key: Key, shape: tuple[int, ...]) -> Array:
    """Float32 numbers at the middles of 65536 equal parts of (0, 1): never 0 and never 1."""
    size = math.prod(shape)
    # Without the barrier the compiler hashes a word again for each number that it holds.
    words = jax.lax.optimization_barrier(jax.random.bits(key, (-(-size // 2),)))
    bits = jnp.concatenate([words >> 16, words & 0xFFFF])[:size]
    return ((bits.astype(jnp.float32) + 0.5) / 65536).reshape(shape)


def truncated_normal(uniform: Array, low: ArrayLike, high: ArrayLike) -> Array:
    """Standard normal numbers cut to [`low`, `high`], by inverting their distribution function.

    Args:
      uniform: `[...]` in (0, 1).
      low, high: `[...]`, concrete numbers of the same shape or scalars.

    >>> import jax.numpy as jnp
    >>> truncated_normal(jnp.array([0.5]), -2.0, 2.0).round(3)
    Array([0.], dtype=float32)
    """
    below, above = _distribution(low), _distribution(high)
    return ndtri(below + uniform * (above - below))


def _distribution(bound: ArrayLike) -> NDArray[np.float32]:
    """Of the standard normal law."""
    return np.vectorize(NormalDist().cdf, otypes=[np.float32])(bound)
