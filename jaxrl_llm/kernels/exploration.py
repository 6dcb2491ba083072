"""Laws of exploration over the allowed actions of ONE state, and how one uniform number draws them.

A law is `[A]` probabilities. Where actions tie for the best a law shares their part evenly, and
what returns an action takes the lowest index. Batch with `vmap`; schedules are linear here and
`optax`'s elsewhere. Optimistic initialisation is no law but a table that starts too high.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_llm.kernels import policy_gradient
from jaxrl_llm.types import Array


def epsilon_greedy(q: Array, epsilon: float | Array, mask: Array | None = None) -> Array:
    """(1 - epsilon) on the best allowed actions, ties shared evenly, and epsilon on all allowed.

    Args:
      q: `[A]`.
      epsilon: `[]`, in [0, 1].
      mask: `[A]` bool, True where allowed; all are when None.

    Returns:
      `[A]`.

    Source: Sutton & Barto (2018), section 2.2.

    >>> epsilon_greedy(jnp.array([1.0, 2.0, 2.0, 0.0]), 0.5).tolist()
    [0.125, 0.375, 0.375, 0.125]
    """
    allowed = jnp.ones(q.shape, bool) if mask is None else mask
    best = allowed & (q >= jnp.max(jnp.where(allowed, q, -jnp.inf)))
    return (1 - epsilon) * best / jnp.sum(best) + epsilon * allowed / jnp.sum(allowed)


def epsilon_greedy_draw(
    uniform: Array, epsilon: float | Array, num_allowed: Array
) -> tuple[Array, Array]:
    """Whether to explore, and which of the allowed actions then, from one uniform number.

    Below epsilon the number is itself uniform on [0, epsilon), hence a second draw is not needed.
    The caller takes its greedy action where this does not explore.

    Args:
      uniform: `[]`, in [0, 1).
      epsilon: `[]`, in [0, 1].
      num_allowed: `[]` integer, at least 1.

    Returns:
      `[]` bool, and the rank of the action among the allowed ones, `[]` int32 in
      [0, num_allowed).
    """
    scaled = uniform / jnp.maximum(epsilon, jnp.finfo(jnp.float32).tiny)
    rank = jnp.minimum(scaled, 1.0) * num_allowed.astype(jnp.float32)
    return uniform < epsilon, jnp.minimum(rank.astype(jnp.int32), num_allowed - 1)


def boltzmann(q: Array, temperature: float | Array, mask: Array | None = None) -> Array:
    """softmax(q / temperature) over the allowed actions.

    Args:
      q: `[A]`.
      temperature: `[]`, positive, in units of `q`.
      mask: `[A]` bool, True where allowed; all are when None.

    Returns:
      `[A]`, exactly 0 where not allowed.

    Source: Sutton & Barto (2018), equation 2.11, with q / temperature for the preferences.

    >>> print(boltzmann(jnp.array([1.0, 0.5, 0.0]), 0.5).round(5))
    [0.66524 0.24473 0.09003]
    """
    return jnp.exp(policy_gradient.log_policy(q / temperature, mask))


def upper_confidence_bound(
    q: Array, visits: Array, coefficient: float | Array, mask: Array | None = None
) -> Array:
    """q(a) + coefficient · sqrt(log N / N(a)), with N the visits of the state; its best is taken.

    An action never tried has the bound +inf, one that is not allowed -inf.

    Args:
      q: `[A]`.
      visits: `[A]`, how often each action was taken in the state.
      coefficient: `[]`, in units of `q`.
      mask: `[A]` bool, True where allowed; all are when None.

    Returns:
      `[A]`.

    Source: Sutton & Barto (2018), equation 2.10, with the state's visits for the time.
    """
    allowed = jnp.ones(q.shape, bool) if mask is None else mask
    total = jnp.sum(jnp.where(allowed, visits, 0))
    width = jnp.sqrt(jnp.log(jnp.maximum(total, 1)) / jnp.maximum(visits, 1))
    bound = jnp.where(visits > 0, q + coefficient * width, jnp.inf)
    return jnp.where(allowed, bound, -jnp.inf)


def linear_schedule(
    time: Array, start: float | Array, end: float | Array, duration: float | Array
) -> Array:
    """From `start` to `end` over `duration`, and `end` ever after; `end` at once for duration 0."""
    fraction = jnp.where(duration > 0, time / jnp.maximum(duration, 1e-9), 1.0)
    return start + (end - start) * jnp.minimum(fraction, 1.0)
