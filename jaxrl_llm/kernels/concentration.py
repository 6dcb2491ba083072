"""How far an estimate may be off: bootstrap and empirical-Bernstein intervals, effective samples.

A resample of the bootstrap is a WEIGHT for each trajectory, how often it was drawn: every estimator
that takes weights can be resampled, and a thousand resamples of one are matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.types import Array, Key, PyTree

# Resamples computed at once: enough for a matrix product, and few enough to stay in memory.
_CHUNK = 128


class Interval(NamedTuple):
    """The two ends of a confidence interval, `[...]` each."""

    low: Array
    high: Array


class Bootstrap(NamedTuple):
    """An estimate and its resamples, as pytrees of the same structure.

    Attributes:
      estimate: leaves `[...]`, of the data.
      resampled: leaves `[R, ...]`.
    """

    estimate: PyTree
    resampled: PyTree


def effective_sample_size(log_weight: Array, count: Array | None = None) -> Array:
    """How many equally weighted samples are worth as much: (sum w)^2 / sum w^2.

    Args:
      log_weight: `[..., B]`, logarithms, so that products of many ratios do not overflow.
      count: `[B]`, how often each sample occurs; once when None.

    Returns:
      `[...]`, between 1 and B; 0 where every weight is 0.

    Source: Kish (1965), "Survey Sampling", section 11.7.

    >>> import jax.numpy as jnp
    >>> effective_sample_size(jnp.log(jnp.array([1.0, 1.0, 0.0, 0.0]))).item()
    2.0
    """
    weight = relative_weights(log_weight)
    count = jnp.ones(weight.shape[-1], weight.dtype) if count is None else count
    total = jnp.dot(weight, count, precision="highest")
    square = jnp.dot(jnp.square(weight), count, precision="highest")
    return jnp.where(total > 0, jnp.square(total) / jnp.where(total > 0, square, 1), 0)


def relative_weights(log_weight: Array) -> Array:
    """exp(log_weight) over the largest of the last axis, `[..., B]` in [0, 1].

    What is smaller than the largest by more than the dtype's range counts as 0.
    """
    largest = jnp.max(log_weight, axis=-1, keepdims=True)
    return jnp.exp(log_weight - jnp.where(jnp.isfinite(largest), largest, 0))


def bootstrap_weights(key: Key, num: int) -> Array:
    """How often each of `num` units occurs among `num` draws with replacement, `[num]` float32.

    Batch with `vmap` over keys.
    """
    drawn = jax.random.randint(key, (num,), 0, num)
    return jnp.zeros(num).at[drawn].add(1.0)


def bootstrap(
    estimator: Callable[[Array], PyTree],
    key: Key,
    unit: Array,
    *,
    num_units: int,
    num_resamples: int = 1000,
) -> Bootstrap:
    """Resamples whole units, such as patients, with all the trajectories that each of them has.

    Args:
      estimator: weight `[B]` -> estimates, a pytree; every weight is 1 for the data themselves.
      key: consumed.
      unit: `[B]` int32 in [0, `num_units`), whose trajectory it is.
      num_units: static.
      num_resamples: R, static.

    Source: Efron (1979), "Bootstrap methods: another look at the jackknife"; of whole clusters:
      Davison & Hinkley (1997), section 3.8.
    """

    def resample(key: Key) -> PyTree:
        return estimator(bootstrap_weights(key, num_units)[unit])

    keys = jax.random.split(key, num_resamples)
    return Bootstrap(
        estimate=estimator(jnp.ones(unit.shape)),
        resampled=jax.lax.map(resample, keys, batch_size=min(_CHUNK, num_resamples)),
    )


def bootstrap_interval(
    result: Bootstrap,
    *,
    confidence: float = 0.95,
    method: Literal["percentile", "basic"] = "percentile",
) -> Any:
    """The central interval of each estimate, as the pytree of estimates with `Interval` leaves.

    Args:
      result: of `bootstrap`.
      confidence: in (0, 1).
      method: "percentile" takes the quantiles of the resamples, and so never leaves the range of
        what can be estimated; "basic" mirrors them about the estimate.

    Source: Davison & Hinkley (1997), equations 5.6 (basic) and 5.18 (percentile).
    """
    tail = (1 - confidence) / 2

    def ends(estimate: Array, resampled: Array) -> Interval:
        low, high = jnp.quantile(resampled, jnp.array([tail, 1 - tail]), axis=0)
        if method == "basic":
            low, high = 2 * estimate - high, 2 * estimate - low
        return Interval(low, high)

    return jax.tree.map(ends, result.estimate, result.resampled)


@partial(jax.jit, static_argnames="confidence")
def empirical_bernstein_interval(
    sample: Array, low: float | Array, high: float | Array, *, confidence: float = 0.95
) -> Interval:
    """An interval of the mean that holds at ANY sample size, for samples known to be in a range.

    mean ± (sqrt(2 V log(2/d) / n) + 7 (high - low) log(2/d) / (3 (n - 1))), V the sample variance
    (divisor n - 1) and d = (1 - confidence) / 2 for each side; cut to the range.

    For importance sampling the range ends at the largest possible ratio times return, which makes
    it wide; for returns of the behaviour policy it is practical.

    Args:
      sample: `[n]`, independent, at least 2.
      low: the least value that a sample can have.
      high: the greatest.
      confidence: in (0, 1), static.

    Source: Maurer & Pontil (2009), arXiv:0907.3740, theorem 4, for both sides.
    """
    size = sample.shape[0]
    logarithm = jnp.log(4 / (1 - confidence))
    variance = jnp.var(sample, ddof=1)
    margin = jnp.sqrt(2 * variance * logarithm / size)
    margin = margin + 7 * (high - low) * logarithm / (3 * (size - 1))
    mean = jnp.mean(sample)
    return Interval(jnp.maximum(mean - margin, low), jnp.minimum(mean + margin, high))
