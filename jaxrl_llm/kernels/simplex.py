"""The probability simplex: the nearest point of it, and the least value of a quadratic on it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_llm.types import Array

_ITERATIONS = 500


def projection(point: Array) -> Array:
    """The point of the simplex nearest to `point` `[J]`.

    Source: Duchi et al. (2008), "Efficient projections onto the l1-ball", figure 1.

    >>> import jax.numpy as jnp
    >>> projection(jnp.array([1.5, 1.0, -3.0])).tolist()
    [0.75, 0.25, 0.0]
    """
    ordered = jnp.sort(point)[::-1]
    place = jnp.arange(1, point.size + 1, dtype=point.dtype)
    threshold = (jnp.cumsum(ordered) - 1) / place
    active = jnp.sum(ordered > threshold) - 1
    return jnp.maximum(point - threshold[active], 0)


def quadratic_minimiser(matrix: Array) -> Array:
    """argmin x' M x over x >= 0, sum x = 1, for a positive semidefinite `matrix` `[J, J]`.

    Accelerated projected gradient, with a restart wherever the momentum points uphill.

    Source: Beck & Teboulle (2009), "A fast iterative shrinkage-thresholding algorithm", section 4;
      O'Donoghue & Candès (2015), "Adaptive restart for accelerated gradient schemes", section 3.2.
    """
    size = matrix.shape[0]
    # Of a positive semidefinite matrix the trace is at least the largest eigenvalue.
    matrix = matrix / jnp.maximum(jnp.trace(matrix), jnp.finfo(matrix.dtype).tiny)
    start = jnp.full(size, 1 / size, matrix.dtype)

    def step(_: int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        x, ahead, pace = carry
        gradient = jnp.dot(matrix, ahead, precision="highest")
        following = projection(ahead - gradient)
        uphill = jnp.dot(gradient, following - x) > 0
        pace = jnp.where(uphill, 1.0, pace)
        faster = (1 + jnp.sqrt(1 + 4 * jnp.square(pace))) / 2
        momentum = jnp.where(uphill, 0, (pace - 1) / faster)
        return following, following + momentum * (following - x), faster

    one = jnp.ones((), matrix.dtype)
    return jax.lax.fori_loop(0, _ITERATIONS, step, (start, start, one))[0]
