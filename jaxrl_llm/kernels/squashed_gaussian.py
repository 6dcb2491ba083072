"""The tanh-squashed Gaussian: bounded actions from an unbounded normal variable.

    u ~ N(mean, deviation^2),  a = low + (high - low) (tanh(u) + 1) / 2,  each dimension alone

Everything is a function of the latent u, never of the action: near a bound many u round to one
action, and `arctanh` of it is wrong or infinite. Written for ONE action, `[D]`.

Source: Haarnoja et al. (2018), "Soft Actor-Critic Algorithms and Applications", arXiv:1812.05905,
  appendix C, with a scale; the stable form of log(1 - tanh(u)^2) is that of distrax and TFP.
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.types import Array

_NUM_NODES = 32
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(_NUM_NODES)


def squash(latent: Array, low: Array, high: Array) -> Array:
    """a = low + (high - low) (tanh(u) + 1) / 2.

    Args:
      latent: u, `[D]`.
      low: `[D]`.
      high: `[D]`, above `low`.

    Returns:
      `[D]`, in [low, high].
    """
    chex.assert_equal_shape((latent, low, high))
    action = low + (high - low) * (0.5 * jnp.tanh(latent) + 0.5)
    # Rounding could put it a hair outside, where an environment would refuse it.
    return jnp.clip(action, min=low, max=high)


def log_slope(latent: Array, low: Array, high: Array) -> Array:
    """log da/du = log((high - low) / 2) + 2 (log 2 - u - softplus(-2 u)), `[D]`.

    Finite however far out u is, where 1 - tanh(u)^2 itself is 0 in floating point.

    >>> [f"{x:.4f}" for x in log_slope(jnp.array([0.0, 10.0]), -jnp.ones(2), jnp.ones(2))]
    ['0.0000', '-18.6137']
    """
    chex.assert_equal_shape((latent, low, high))
    slope = 2 * (math.log(2) - latent - jax.nn.softplus(-2 * latent))
    return jnp.log(0.5 * (high - low)) + slope


def log_probability(
    latent: Array, mean: Array, log_deviation: Array, low: Array, high: Array
) -> Array:
    """The log-density of the ACTION a(u), in nats: log N(u; mean, deviation) - log da/du, summed.

    Args:
      latent: u, `[D]`.
      mean: of u, `[D]`.
      log_deviation: logarithm of the standard deviation of u, `[D]`.
      low: of the action, `[D]`.
      high: of the action, `[D]`.

    Returns:
      `[]`. A ratio of two of them, at one u, is that of the Gaussians: the slopes cancel.
    """
    chex.assert_equal_shape((latent, mean, log_deviation))
    standardised = (latent - mean) * jnp.exp(-log_deviation)
    gaussian = -0.5 * jnp.square(standardised) - log_deviation - 0.5 * math.log(2 * math.pi)
    return jnp.sum(gaussian - log_slope(latent, low, high))


def entropy(mean: Array, log_deviation: Array, low: Array, high: Array) -> Array:
    """The differential entropy of the action, in nats: H(u) + E[log da/du], summed.

    The expectation has no closed form; it is a Gauss-Hermite quadrature of 32 nodes in each
    dimension: deterministic, differentiable, and within 1e-4 for deviations up to 2.

    Args:
      mean: of u, `[D]`.
      log_deviation: `[D]`.
      low: of the action, `[D]`.
      high: of the action, `[D]`.

    Returns:
      `[]`; at most log of the volume of [low, high], that of the uniform law.
    """
    chex.assert_equal_shape((mean, log_deviation, low, high))
    deviation = jnp.exp(log_deviation)
    weights = _WEIGHTS / _WEIGHTS.sum()
    nodes = jnp.asarray(_NODES, mean.dtype)
    slopes = jax.vmap(lambda node: log_slope(mean + deviation * node, low, high))(nodes)
    expected = jnp.asarray(weights, mean.dtype) @ slopes
    return jnp.sum(log_deviation + 0.5 * math.log(2 * math.pi * math.e) + expected)
