"""The error of a continuous glucose monitor: correlated in time, skewed, and published.

Research only, not for clinical use. A normal number remembers .7 of itself after 15 minutes,
e_n = .7 (e_{n-1} + v_n) with v_n standard normal, and a Johnson SU law bends it into an error in
mg/dL, xi + lambda sinh((e - gamma)/delta).

Source: Breton & Kovatchev (2008), "Analysis, modeling, and simulation of the accuracy of continuous
  glucose sensors", Journal of Diabetes Science and Technology 2, 853-862, with the constants that
  the program simglucose uses for it. Other steps than 15 minutes keep the law of e and the decay of
  its memory, .7^(minutes/15). The lag of a sensor belongs to the body.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_llm.types import Array, Key

MEMORY = 0.7  # after 15 minutes
DEVIATION = MEMORY / (1 - MEMORY**2) ** 0.5  # of e, once it has settled
_GAMMA, _DELTA, _LAMBDA, _XI = -0.5444, 1.6898, 15.9574, -5.47
LOWEST, HIGHEST = 40.0, 400.0  # mg/dL that a monitor displays


def first_noise(key: Key) -> Array:
    """e from its settled law, `[]`."""
    return DEVIATION * jax.random.normal(key)


def next_noise(key: Key, noise: Array, minutes: float) -> Array:
    """e `minutes` later, `[]`."""
    kept = MEMORY ** (minutes / 15)
    return kept * noise + DEVIATION * (1 - kept**2) ** 0.5 * jax.random.normal(key)


def error(noise: Array) -> Array:
    """The error in mg/dL that e, of any shape, stands for: mean .7, standard deviation 11.7."""
    return _XI + _LAMBDA * jnp.sinh((noise - _GAMMA) / _DELTA)


def reading(glucose: Array, noise: Array) -> Array:
    """What the monitor shows, mg/dL, of `glucose` under the skin, mg/dL."""
    return jnp.clip(glucose + error(noise), LOWEST, HIGHEST)
