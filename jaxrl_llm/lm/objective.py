"""How the scores of several criteria become the one number that a policy maximises.

    mix = constrained((1.0, 0.0), 1, at_least=0.9)
    state = mix.init()
    total, state, metrics = mix.combine(state, scores)

Shapes use `G` prompts, `K` responses to each and `C` criteria.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from jaxrl_llm import checks
from jaxrl_llm.types import Array, Mean, PyTree


@dataclass(frozen=True, kw_only=True)
class Mix:
    """An objective as two pure functions.

    Attributes:
      init: `() -> state`, what the objective adapts, a pytree of arrays.
      combine: `(state, scores [G, K, C]) -> (total [G, K], state, metrics)`, the state being that
        of the next iteration and metrics a flat dict of `Mean`.
    """

    init: Callable[[], PyTree]
    combine: Callable[[PyTree, Array], tuple[Array, PyTree, dict[str, Mean]]]


def weighted(weights: Sequence[float]) -> Mix:
    """sum_c w_c s_c.

    Args:
      weights: `[C]`, finite.

    Raises:
      ValueError: naming the weight, or their number where scores have another.

    >>> import jax.numpy as jnp
    >>> total, _, _ = weighted((1.0, 0.5)).combine((), jnp.array([[[2.0, 4.0]]]))
    >>> total.tolist()
    [[4.0]]
    """
    _check_weights(weights)

    def combine(state: PyTree, scores: Array) -> tuple[Array, PyTree, dict[str, Mean]]:
        return _weighted_sum(weights, scores), state, {}

    return Mix(init=lambda: (), combine=combine)


def lexicographic(thresholds: Sequence[float]) -> Mix:
    """The criteria in order of priority: each counts once all before it reach their threshold.

    With the shortfall d_c = max(threshold_c - s_c, 0) of each criterion but the last,

        total = sum_{c < C} r_c / (1 + d_c) + r_C (1 + s_C / (1 + |s_C|)) / 2,

    where r_c = prod_{j < c} [d_j = 0]. Every term is in [0, 1], and is 1 only where its threshold
    is reached. So a response whose first shortfall is in criterion c scores in (c - 1, c): more
    than any that falls short earlier, less than any that does later, whatever the other scores.
    Among those that fall short first in the same criterion, the smaller shortfall scores more.

    Args:
      thresholds: `[C - 1]`, finite, in the order of the criteria; the last criterion has none.

    Raises:
      ValueError: naming the threshold, or their number where scores need another.
    """
    for index, threshold in enumerate(thresholds):
        checks.finite(f"thresholds[{index}]", threshold)

    def combine(state: PyTree, scores: Array) -> tuple[Array, PyTree, dict[str, Mean]]:
        _check_count("thresholds", len(thresholds), scores.shape[-1] - 1)
        *ranked, last = jnp.moveaxis(scores, -1, 0)
        total, counts = jnp.zeros_like(last), jnp.ones(last.shape, bool)
        for score, threshold in zip(ranked, thresholds, strict=True):
            shortfall = jnp.maximum(threshold - score, 0)
            total += jnp.where(counts, 1 / (1 + shortfall), 0)
            counts &= shortfall == 0
        total += jnp.where(counts, (1 + last / (1 + jnp.abs(last))) / 2, 0)
        return total, state, {}

    return Mix(init=lambda: (), combine=combine)


def constrained(
    weights: Sequence[float],
    criterion: int,
    *,
    at_least: float,
    rate: float = 0.1,
    maximum: float = 100.0,
    initial: float = 0.0,
    keep_scale: bool = False,
) -> Mix:
    """The weighted sum, with a Lagrange multiplier that keeps the mean of one criterion up.

    The policy maximises the Lagrangian of max E[sum_c w_c s_c] subject to E[s_k] >= b,

        total = sum_c w_c s_c + lambda (s_k - b),

    and after each iteration the multiplier takes a step of dual ascent,

        lambda <- clip(lambda + rate (b - mean s_k), 0, maximum).

    Args:
      weights: `[C]`, finite.
      criterion: k, which one is constrained.
      at_least: b.
      rate: of the multiplier; the slower, the closer the policy is to its best response.
      maximum: of the multiplier, which would grow for ever where no policy meets the constraint.
      initial: the multiplier at first.
      keep_scale: whether the total is divided by 1 + lambda, so that its scale does not grow with
        the multiplier. A KL penalty, which is not divided, then weighs more as lambda grows: the
        policy nears that of the constrained score alone, and a bound beyond it is never reached.

    Returns:
      A mix whose state is the multiplier `[]`. It reports the `multiplier` as it was used, the mean
      of the criterion as `constraint`, and as `violation` by how much that is below b.

    Raises:
      ValueError: naming the argument, or the number of weights where scores have another.

    Source: Stooke et al. (2020), "Responsive safety in reinforcement learning by PID Lagrangian
      methods", the integral term alone; they rescale the objective by 1 / (1 + lambda).
    """
    _check_weights(weights)
    checks.between("criterion", criterion, 0, len(weights) - 1)
    checks.finite("at_least", at_least)
    checks.positive("rate", rate)
    checks.positive("maximum", maximum)
    checks.between("initial", initial, 0, maximum)

    def combine(multiplier: Array, scores: Array) -> tuple[Array, Array, dict[str, Mean]]:
        total = _weighted_sum(weights, scores)
        held = scores[..., criterion]
        total += multiplier * (held - at_least)
        if keep_scale:
            total /= 1 + multiplier
        shortfall = at_least - jnp.mean(held)
        following = jnp.clip(multiplier + rate * shortfall, min=0.0, max=maximum)
        metrics = {
            "multiplier": Mean.of(multiplier),
            "constraint": Mean.of(held),
            "violation": Mean.of(jnp.maximum(shortfall, 0)),
        }
        return total, following, metrics

    return Mix(init=lambda: jnp.float32(initial), combine=combine)


def _weighted_sum(weights: Sequence[float], scores: Array) -> Array:
    _check_count("weights", len(weights), scores.shape[-1])
    return jnp.einsum("gkc,c->gk", scores, jnp.asarray(weights, scores.dtype))


def _check_weights(weights: Sequence[float]) -> None:
    if not weights:
        raise ValueError("weights is empty; give one a criterion")
    for index, weight in enumerate(weights):
        checks.finite(f"weights[{index}]", weight)


def _check_count(name: str, count: int, needed: int) -> None:
    if count != needed:
        raise ValueError(f"{name} has {count} numbers; these criteria need {needed}")
