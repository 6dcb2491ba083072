"""What to maximise: several objectives at once, and rewards on another scale or shaped.

More of an objective is always better; a cost counts negatively. Each function takes ONE vector of
objectives, or one set of candidates: `vmap` over more.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_llm.kernels import temporal_difference
from jaxrl_llm.types import Array

# Several objectives


def weighted_sum(objectives: Array, weights: Array) -> Array:
    """sum_m w_m f_m: linear, so that it applies to each reward as well as to a return.

    Whatever the weights, its optima are on the convex hull of what can be reached: points of a
    concave front are never found.

    Args:
      objectives: `[M]`, f.
      weights: `[M]`, w, at least 0.

    Returns:
      `[]`.
    """
    chex.assert_equal_shape([objectives, weights])
    return jnp.sum(weights * objectives)


def chebyshev(
    objectives: Array, weights: Array, utopia: Array, augmentation: float | Array = 0.0
) -> Array:
    """-max_m w_m (z_m - f_m) - augmentation · sum_m w_m (z_m - f_m): the worst shortfall counts.

    Every point of a Pareto front, concave or not, is the optimum for some weights. It is not
    linear: it applies to returns, and a sum of it over steps is something else.

    Args:
      objectives: `[M]`, f.
      weights: `[M]`, w, at least 0.
      utopia: `[M]`, z, as good as any objective can be alone, or better.
      augmentation: small and positive to refuse points that are only weakly optimal, as good as
        another in the worst objective but worse in the rest.

    Returns:
      `[]`, at most 0 where nothing exceeds `utopia`.

    Source: Steuer & Choo (1983), "An interactive weighted Tchebycheff procedure for multiple
      objective programming", negated, with weights in the sum as well.

    >>> f, w, z = jnp.array([3.0, 1.0]), jnp.array([0.5, 0.5]), jnp.array([4.0, 4.0])
    >>> chebyshev(f, w, z).item()
    -1.5
    """
    chex.assert_equal_shape([objectives, weights, utopia])
    shortfall = weights * (utopia - objectives)
    return -jnp.max(shortfall) - augmentation * jnp.sum(shortfall)


def lexicographic_filter(
    objectives: Array, thresholds: Array, slack: Array, mask: Array | None = None
) -> Array:
    """The candidates that are best in the first objective, of those the best in the second, ...

    Beyond its threshold an objective is good enough, and within `slack` of the best it is as good
    as that: safety first, say, and comfort among what is safe.

    Args:
      objectives: `[N, M]`, of each candidate, the most important objective first.
      thresholds: `[M]`; infinity where more is always better.
      slack: `[M]`, at least 0.
      mask: `[N]` bool, True for candidates that may be chosen; all may when None.

    Returns:
      `[N]` bool, True for those left, at least one where the mask allows one.

    Source: Gabor et al. (1998), "Multi-criteria reinforcement learning", for thresholds; Wray et
      al. (2015), "Multi-objective MDPs with conditional lexicographic reward preferences", for
      slack.
    """
    chex.assert_rank([objectives, thresholds, slack], [2, 1, 1])
    enough = jnp.minimum(objectives, thresholds[None])
    left = jnp.ones(len(objectives), bool) if mask is None else mask
    for column, margin in zip(enough.T, slack, strict=True):
        left &= column >= jnp.max(column, where=left, initial=-jnp.inf) - margin
    return left


def pareto_filter(points: Array) -> Array:
    """True for every point that no other one dominates: nowhere worse and somewhere better.

    Args:
      points: `[N, M]`.

    Returns:
      `[N]` bool. Equal points do not dominate each other.

    >>> pareto_filter(jnp.array([[1.0, 3.0], [2.0, 2.0], [1.0, 2.0]])).tolist()
    [True, True, False]
    """
    chex.assert_rank(points, 2)
    rival, own = points[:, None], points[None, :]
    dominates = jnp.all(rival >= own, axis=-1) & jnp.any(rival > own, axis=-1)
    return ~jnp.any(dominates, axis=0)


def hypervolume(points: Array, reference: Array) -> Array:
    """The volume that the points dominate above the reference, exactly.

    Cut into slabs along the last objective, each the thickness times the volume that the points
    above it dominate in the others: O(N log N) for two objectives, times N for each one more.

    Args:
      points: `[N, M]`; one that is not better than the reference in every objective adds nothing.
      reference: `[M]`, such as the worst that can happen.

    Returns:
      `[]`.

    Source: While et al. (2006), "A faster algorithm for calculating hypervolume": slicing
      objectives, section II.

    >>> hypervolume(jnp.array([[2.0, 1.0], [1.0, 3.0]]), jnp.zeros(2)).item()
    4.0
    """
    chex.assert_shape(points, (None, len(reference)))
    return _volume(jnp.maximum(points - reference[None], 0))


def _volume(corners: Array) -> Array:
    """Of the union of boxes from the origin to each of `corners` `[N, M]`, not negative."""
    if corners.shape[1] == 1:
        return jnp.max(corners, initial=0)
    ranked = corners[jnp.argsort(-corners[:, -1])]
    thickness = ranked[:, -1] - jnp.append(ranked[1:, -1], 0)
    if corners.shape[1] == 2:
        return jnp.sum(thickness * jax.lax.cummax(ranked[:, 0]))
    is_above = jnp.tri(len(ranked), dtype=bool)
    slabs = jnp.where(is_above[..., None], ranked[None, :, :-1], 0)
    return jnp.sum(thickness * jax.vmap(_volume)(slabs))


# The scale of rewards


class RunningMoments(NamedTuple):
    """Mean and variance of a stream, kept so that batches of it merge exactly.

    Attributes:
      weight: `[]`, how many values were counted.
      mean: `[...]`, of one value each.
      squares: `[...]`, the sum of squared distances from the mean.

    Source: Chan et al. (1983), "Algorithms for computing the sample variance", equation 2.1; of
      batches of one it is Welford's (1962).
    """

    weight: Array
    mean: Array
    squares: Array

    @classmethod
    def empty(cls, shape: tuple[int, ...] = ()) -> RunningMoments:
        return cls(jnp.zeros(()), jnp.zeros(shape), jnp.zeros(shape))

    @property
    def deviation(self) -> Array:
        """Population standard deviation `[...]`; 1 while there is no spread to speak of."""
        variance = self.squares / jnp.maximum(self.weight, 1)
        return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 1)

    def update(self, values: Array) -> RunningMoments:
        """Counts a batch of values `[N, ...]`."""
        count = len(values)
        mean = jnp.mean(values, axis=0)
        squares = jnp.sum(jnp.square(values - mean[None]), axis=0)
        return self.merge(RunningMoments(jnp.asarray(count, self.weight.dtype), mean, squares))

    def merge(self, other: RunningMoments) -> RunningMoments:
        """The moments of both streams together."""
        weight = self.weight + other.weight
        share = other.weight / jnp.maximum(weight, 1)
        apart = other.mean - self.mean
        return RunningMoments(
            weight=weight,
            mean=self.mean + share * apart,
            squares=self.squares + other.squares + self.weight * share * jnp.square(apart),
        )

    def standardise(self, values: Array) -> Array:
        """(values - mean) / deviation, of shape `[..., *mean.shape]`."""
        return self.scale(values - jnp.broadcast_to(self.mean, values.shape))

    def scale(self, values: Array) -> Array:
        """values / deviation: positive, so that the better one of two policies stays the better.

        Subtracting the mean reward would not leave it so where episodes end: it would reward or
        punish a longer one.
        """
        return values / jnp.broadcast_to(self.deviation, values.shape)


def clip_reward(reward: Array, limit: float | Array) -> Array:
    """The reward within [-limit, limit], which changes the problem where it goes beyond.

    Source: Mnih et al. (2015), "Human-level control through deep reinforcement learning", with
      limit 1.
    """
    return jnp.clip(reward, -limit, limit)


def signed_log(values: Array) -> Array:
    """sign(x) log(1 + |x|): near x for small values, and large ones brought down.

    Source: Hafner et al. (2023), "Mastering diverse domains through world models",
      arXiv:2301.04104, where it is called symlog.
    """
    return jnp.sign(values) * jnp.log1p(jnp.abs(values))


def signed_exp(values: Array) -> Array:
    """sign(x) (exp(|x|) - 1), the inverse of `signed_log`."""
    return jnp.sign(values) * jnp.expm1(jnp.abs(values))


# Shaping


def shaping_reward(potential: Array, next_potential: Array, discount: Array) -> Array:
    """F = d Phi(s') - Phi(s), which added to the reward leaves every optimal policy optimal.

    Q* becomes Q* - Phi(s), whatever Phi is. With `discount = gamma * (1 - terminated)` the
    potential of a terminal state counts as 0, without which that would not hold.

    Args:
      potential: `[...]`, Phi(s), such as a guess of the value of s.
      next_potential: the same shape, Phi(s') of the observation before any reset.
      discount: the same shape, gamma (1 - terminated).

    Returns:
      F, of that shape.

    Source: Ng et al. (1999), "Policy invariance under reward transformations", theorem 1.
    """
    chex.assert_equal_shape([potential, next_potential, discount])
    nothing = jnp.zeros_like(potential)
    return temporal_difference.td_error(nothing, discount, potential, next_potential)
