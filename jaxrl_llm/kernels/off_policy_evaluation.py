"""Off-policy evaluation: what a target policy is worth, from what another policy did.

Trajectories are columns `[T, B]`, padded at the end. Where one has ended its ratio stays as it was,
its rewards are 0, and it goes on counting in every later normalisation (Thomas 2015): otherwise the
weights of the long episodes would be shared among those alone, which favours them.

| estimator | model | normalised over trajectories |
|---|---|---|
| `importance_sampling` (IS) | no | no |
| `per_decision_importance_sampling` (PDIS) | no | no |
| `weighted_importance_sampling` (WIS) | no | by the last ratio |
| `weighted_per_decision_importance_sampling` (WPDIS) | no | at each step |
| `doubly_robust` (DR) | yes | no |
| `weighted_doubly_robust` (WDR) | yes | at each step |
| `magic` (MAGIC) | yes | at each step, blended with the model |

The model is any estimate of the target's action values. One fitted to the SAME trajectories
cancels the corrections of DR: fit it to others (`fitted_q_evaluation.cross_fitted_q`).

Every estimator takes a `weight` `[B]` for each trajectory, as how often a bootstrap drew it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import NormalDist
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import numerics
from jaxrl_llm.kernels.concentration import effective_sample_size, relative_weights
from jaxrl_llm.kernels.simplex import quadratic_minimiser
from jaxrl_llm.types import Array, Trajectories


class Evidence(NamedTuple):
    """What is known of each logged step: `[T]` of one trajectory, `[T, B]` of many.

    Attributes:
      target: probability of the logged action under the policy to be evaluated.
      behaviour: the same under the policy that acted, positive.
      reward: r_t.
      discount: gamma (1 - terminated).
      mask: bool, False on padding.
      action_value: q(s_t, a_t) of the model; 0 without one.
      value: v(s_t) = E[q(s_t, a)] under the target.
      next_value: v(s_{t+1}), before any reset: a record that was cut short is worth what the model
        says. Without a model it counts what was seen and no more.
    """

    target: Array
    behaviour: Array
    reward: Array
    discount: Array
    mask: Array
    action_value: Array
    value: Array
    next_value: Array


def tabular_evidence(
    trajectories: Trajectories,
    target: Array,
    behaviour: Array,
    q: Array | None = None,
    *,
    gamma: float | Array,
    fold: Array | None = None,
) -> Evidence:
    """The evidence of trajectories whose observations are states, from tables.

    Args:
      trajectories: observations and actions `[T, B]` integers.
      target: `[S, A]`, the policy to be evaluated.
      behaviour: `[S, A]`, or `[F, S, A]`, one for each fold.
      q: `[S, A]` action values of the target, or `[F, S, A]`; 0 when None.
      gamma: discount in [0, 1].
      fold: `[B]` int32 in [0, F), which table of `behaviour` and of `q` a trajectory takes: the
        one made WITHOUT it.
    """
    steps, mask = trajectories.steps, trajectories.mask
    q = jnp.zeros_like(target) if q is None else q
    column = jnp.zeros(mask.shape[1], jnp.int32) if fold is None else fold
    place = jnp.broadcast_to(column, mask.shape)

    def look_up(table: Array, *index: Array) -> Array:
        return table[index] if table.ndim == len(index) else table[(place, *index)]

    value = jnp.sum(target * q if q.ndim == 2 else target[None] * q, axis=-1)
    return Evidence(
        target=target[steps.observation, steps.action],
        behaviour=look_up(behaviour, steps.observation, steps.action),
        reward=steps.reward,
        discount=jnp.where(steps.terminated, 0.0, gamma),
        mask=mask,
        action_value=look_up(q, steps.observation, steps.action),
        value=look_up(value, steps.observation),
        next_value=look_up(value, steps.next_observation),
    )


def check_evidence(evidence: Evidence) -> Evidence:
    """Returns `evidence` if every logged action was possible and every number is finite.

    On the host, before `jit`.

    Raises:
      ValueError: naming the step and the trajectory.
    """
    mask = np.asarray(evidence.mask)
    if not mask.any(axis=0).all():
        column = int(mask.any(axis=0).argmin())
        raise ValueError(f"mask[:, {column}] is False; leave out trajectories without a step")
    for name, array in zip(Evidence._fields, map(np.asarray, evidence), strict=True):
        wrong, remedy = ~np.isfinite(array), "it must be finite"
        if name == "target":
            wrong, remedy = ~((array >= 0) & (array <= 1)), "it must be in [0, 1]"
        elif name == "behaviour":
            wrong = ~((array > 0) & (array <= 1))
            remedy = "an action that was taken has a probability in (0, 1]; smooth the estimate"
        for step, column in np.argwhere(wrong & mask)[:1]:
            raise ValueError(f"{name}[{step}, {column}] is {array[step, column]:g}; {remedy}")
    return evidence


# One trajectory


def log_cumulative_ratio(target: Array, behaviour: Array, mask: Array) -> Array:
    """log rho_{0:t}, the logarithm of prod_{k<=t} target_k / behaviour_k.

    Args:
      target, behaviour: `[T]`, probabilities of the logged actions.
      mask: `[T]` bool; a padded step has ratio 1.

    Returns:
      `[T]`; -inf from the first action on that the target never takes.

    Source: Sutton & Barto (2018), equation 5.3.
    """
    chex.assert_rank([target, behaviour, mask], 1)
    ratio = jnp.where(mask, target, 1) / jnp.where(mask, behaviour, 1)
    return jnp.cumsum(jnp.log(ratio))


def cumulative_discount(discount: Array) -> Array:
    """prod_{k<t} discount_k, `[T]`: gamma^t up to the end of the episode."""
    return jnp.cumprod(jnp.concatenate([jnp.ones_like(discount[:1]), discount[:-1]]))


def observed_return(evidence: Evidence) -> Array:
    """sum_t gamma^t r_t of one trajectory, `[]`."""
    return jnp.sum(_discounted(evidence, evidence.reward))


def doubly_robust_return(evidence: Evidence) -> Array:
    """What one trajectory adds to the doubly robust estimate, `[]`.

    V_t = v(s_t) + rho_t (r_t + d_t V_{t+1} - q(s_t, a_t)), with v(s_{t+1}) for V_{t+1} where the
    trajectory ends. With a model of 0 it is per-decision importance sampling.

    Args:
      evidence: leaves `[T]`.

    Source: Jiang & Li (2016), arXiv:1511.03722, equation 10.
    """
    last = evidence.mask & ~jnp.append(evidence.mask[1:], False)

    def coefficients(step: tuple[Evidence, Array]) -> tuple[Array, Array]:
        now, last = step
        ratio = jnp.where(now.mask, now.target / jnp.where(now.mask, now.behaviour, 1), 0)
        beyond = jnp.where(last, now.discount * now.next_value, 0)
        offset = now.value + ratio * (now.reward + beyond - now.action_value)
        return jnp.where(last, 0, ratio * now.discount), jnp.where(now.mask, offset, 0)

    return numerics.reverse_recurrence(coefficients, (evidence, last))[0]


def _discounted(evidence: Evidence, term: Array) -> Array:
    """gamma^t · term_t of one trajectory, 0 on padding, `[T]`."""
    return jnp.where(evidence.mask, cumulative_discount(evidence.discount) * term, 0)


def _log_ratio(evidence: Evidence) -> Array:
    return log_cumulative_ratio(evidence.target, evidence.behaviour, evidence.mask)


_each = partial(jax.vmap, in_axes=1, out_axes=-1)


# Many trajectories


def importance_sampling(evidence: Evidence, weight: Array | None = None) -> Array:
    """IS: the mean of rho_{0:T-1} G.

    Args:
      evidence: leaves `[T, B]`.
      weight: `[B]`, of each trajectory; 1 when None.

    Returns:
      `[]`.

    Source: Precup, Sutton & Singh (2000), "Eligibility traces for off-policy policy evaluation",
      section 2.
    """
    ratio = jnp.exp(_each(_log_ratio)(evidence)[-1])
    return _mean(ratio * _each(observed_return)(evidence), weight)


def weighted_importance_sampling(evidence: Evidence, weight: Array | None = None) -> Array:
    """WIS: the mean of G weighted by rho_{0:T-1}; 0 where every ratio is 0.

    Args, Returns, Source: as `importance_sampling`.
    """
    ratio = relative_weights(_each(_log_ratio)(evidence)[-1])
    return _ratio_of_sums(ratio, _each(observed_return)(evidence), weight)


def per_decision_importance_sampling(evidence: Evidence, weight: Array | None = None) -> Array:
    """PDIS: the mean of sum_t gamma^t rho_{0:t} r_t.

    Args, Returns: as `importance_sampling`.

    Source: Precup, Sutton & Singh (2000), section 3, theorem 1.
    """
    reward = _each(lambda one: _discounted(one, one.reward))(evidence)
    ratio = jnp.exp(_each(_log_ratio)(evidence))
    return _mean(jnp.sum(ratio * reward, axis=0), weight)


def weighted_per_decision_importance_sampling(
    evidence: Evidence, weight: Array | None = None
) -> Array:
    """WPDIS, or CWPDIS: sum_t gamma^t of the mean of r_t weighted by rho_{0:t}.

    Args, Returns: as `importance_sampling`.

    Source: Thomas (2015), "Safe reinforcement learning", section 3.10.
    """
    reward = _each(lambda one: _discounted(one, one.reward))(evidence)
    ratio = relative_weights(_each(_log_ratio)(evidence))
    return jnp.sum(_ratio_of_sums(ratio, reward, weight))


def doubly_robust(evidence: Evidence, weight: Array | None = None) -> Array:
    """DR: the mean of `doubly_robust_return`.

    Args, Returns: as `importance_sampling`.

    Source: Jiang & Li (2016), arXiv:1511.03722, equation 10.
    """
    return _mean(_each(doubly_robust_return)(evidence), weight)


def weighted_doubly_robust(evidence: Evidence, weight: Array | None = None) -> Array:
    """WDR: the model's value, corrected by its errors weighted by rho_{0:t} at each step.

    E[v(s_0)] + sum_t gamma^t sum_i w_t^i (r_t^i + d_t^i v(s_{t+1}^i) - q(s_t^i, a_t^i)), where w_t
    is rho_{0:t} normalised over the trajectories.

    Args, Returns: as `importance_sampling`.

    Source: Thomas & Brunskill (2016), arXiv:1604.00923, the definition of WDR; its terms in
      v(s_{t+1}) are collected in the correction of step t.
    """
    return j_step_returns(evidence, weight)[-1]


def j_step_returns(evidence: Evidence, weight: Array | None = None) -> Array:
    """The model's value corrected up to step j, for j = -1 (not at all) to T - 1 (WDR).

    Args:
      evidence: leaves `[T, B]`.
      weight: `[B]`.

    Returns:
      `[T + 1]`.

    Source: Thomas & Brunskill (2016), arXiv:1604.00923, the off-policy j-step return.
    """
    ratio, correction = _corrections(evidence)
    start = _mean(evidence.value[0], weight)
    return start + jnp.append(0, jnp.cumsum(_ratio_of_sums(ratio, correction, weight)))


def magic(
    evidence: Evidence,
    weight: Array | None = None,
    *,
    interval: tuple[Array, Array] | None = None,
    horizons: Sequence[int] | None = None,
) -> Array:
    """MAGIC: the blend of `j_step_returns` with the least estimated squared error.

    x minimises x' (Omega + b b') x on the simplex, where Omega is the sample covariance of the
    j-step returns and b_j the distance of each from an interval of WDR.

    Args:
      evidence: leaves `[T, B]`.
      weight: `[B]`; 1 when None.
      interval: low and high end of the 50 % interval of WDR. The paper resamples; when None it is
        the normal one from Omega, so that the estimate is a function of the data.
      horizons: the j to blend, ascending from -1 to T - 1; -1, 0, 1, 3, 7, ... and T - 1 when None.

    Source: Thomas & Brunskill (2016), arXiv:1604.00923, algorithm 1.
    """
    length = evidence.mask.shape[0]
    if horizons is None:
        powers = 2 ** np.arange(length.bit_length())
        horizons = [-1, *(powers[powers < length] - 1).tolist(), length - 1]
    kept = np.asarray(horizons) + 1
    returns = j_step_returns(evidence, weight)[kept]
    covariance = _return_covariance(evidence, weight, kept)
    if interval is None:
        margin = NormalDist().inv_cdf(0.75) * jnp.sqrt(covariance[-1, -1])
        interval = (returns[-1] - margin, returns[-1] + margin)
    bias = returns - jnp.clip(returns, min=interval[0], max=interval[1])
    return jnp.dot(quadratic_minimiser(covariance + jnp.outer(bias, bias)), returns)


def step_effective_sample_size(evidence: Evidence, weight: Array | None = None) -> Array:
    """Kish's effective sample size of the ratios rho_{0:t} at each step, `[T]`.

    Of B trajectories this many count; with few of them no interval can be trusted.
    """
    return effective_sample_size(_each(_log_ratio)(evidence), weight)


ESTIMATORS: dict[str, Callable[..., Array]] = {
    "IS": importance_sampling,
    "WIS": weighted_importance_sampling,
    "PDIS": per_decision_importance_sampling,
    "WPDIS": weighted_per_decision_importance_sampling,
    "DR": doubly_robust,
    "WDR": weighted_doubly_robust,
    "MAGIC": magic,
}


def estimates(evidence: Evidence, weight: Array | None = None) -> dict[str, Array]:
    """Every estimator of the table above, `[]` each, by its short name."""
    return {name: estimator(evidence, weight) for name, estimator in ESTIMATORS.items()}


def _mean(contribution: Array, weight: Array | None) -> Array:
    if weight is None:
        return jnp.mean(contribution)
    return jnp.dot(contribution, weight, precision="highest") / jnp.sum(weight)


def _ratio_of_sums(ratio: Array, term: Array, weight: Array | None) -> Array:
    """sum_i w_i ratio_i term_i / sum_i w_i ratio_i over the last axis; 0 where nothing weighs."""
    total = _weighted_sum(ratio, weight)
    return _weighted_sum(ratio * term, weight) / jnp.where(total > 0, total, 1)


def _weighted_sum(term: Array, weight: Array | None) -> Array:
    if weight is None:
        return jnp.sum(term, axis=-1)
    return jnp.dot(term, weight, precision="highest")


def _corrections(evidence: Evidence) -> tuple[Array, Array]:
    """rho_{0:t} over the largest of its step, and gamma^t times the model's error, `[T, B]`."""
    ratio = relative_weights(_each(_log_ratio)(evidence))

    def errors(one: Evidence) -> Array:
        return _discounted(one, one.reward + one.discount * one.next_value - one.action_value)

    return ratio, _each(errors)(evidence)


def _return_covariance(evidence: Evidence, weight: Array | None, kept: np.ndarray) -> Array:
    """Sample covariance `[J, J]` of the j-step returns, sums over the trajectories' shares."""
    ratio, correction = _corrections(evidence)
    weight = jnp.ones(ratio.shape[1], ratio.dtype) if weight is None else weight
    total = _weighted_sum(ratio, weight)
    size = jnp.sum(weight)
    # Row j sums the steps before j, each over its own total.
    until = (np.arange(ratio.shape[0]) < kept[:, None]) / jnp.where(total > 0, total, 1)[None]
    share = evidence.value[:1] / size + jnp.dot(until, ratio * correction, precision="highest")
    centred = share - jnp.dot(share, weight, precision="highest")[:, None] / size
    return size / (size - 1) * jnp.dot(centred * weight[None], centred.T, precision="highest")
