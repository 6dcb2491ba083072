"""The policy that acted, estimated from what it did; how well it is known, and who agrees with it.

Estimate it from the very log that is evaluated, even where the true one is known: ratios of
estimated probabilities make up for actions that happened to be taken too often (Hanna, Niekum &
Stone 2019, "Importance sampling policy evaluation with an estimated behavior policy").
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxrl_llm import checks
from jaxrl_llm.types import Array, Trajectories


def action_counts(
    trajectories: Trajectories,
    *,
    num_states: int,
    num_actions: int,
    weight: Array | None = None,
) -> Array:
    """How often each action was taken in each state, `[S, A]` float32.

    Args:
      trajectories: observations are states.
      num_states: S.
      num_actions: A.
      weight: `[B]`, of each trajectory; 1 when None.
    """
    steps, count = trajectories.steps, trajectories.mask.astype(float)
    count = count if weight is None else count * weight[None]
    return jnp.zeros((num_states, num_actions)).at[steps.observation, steps.action].add(count)


def estimate_policy(
    trajectories: Trajectories,
    action_mask: Array,
    *,
    smoothing: float | Array = 0.0,
    weight: Array | None = None,
) -> Array:
    """p(a | s) = (n(s, a) + smoothing · [a admissible]) / (n(s) + smoothing · #admissible(s)).

    An action that was taken counts even where it is not admissible. A state that was never seen
    has equal probabilities for its admissible actions.

    Args:
      trajectories: observations are states.
      action_mask: `[S, A]` bool, the admissible actions.
      smoothing: pseudo-counts for each admissible action. 0 is the maximum of the likelihood, for
        the log itself; an estimate for OTHER patients needs some.
      weight: `[B]`, of each trajectory, such as 0 for a fold left out; 1 when None.

    Returns:
      `[S, A]`.
    """
    num_states, num_actions = action_mask.shape
    count = action_counts(
        trajectories, num_states=num_states, num_actions=num_actions, weight=weight
    )
    seen = jnp.any(count > 0, axis=1, keepdims=True)
    count = count + jnp.where(action_mask, jnp.where(seen, smoothing, 1.0), 0.0)
    return count / jnp.sum(count, axis=1, keepdims=True)


class Calibration(NamedTuple):
    """A reliability table, a bin of predicted probabilities a row, and its summary.

    Attributes:
      predicted: `[bins]`, mean predicted probability; 0 in an empty bin.
      observed: `[bins]`, how often the action was in fact taken.
      size: `[bins]`, predictions in the bin.
      error: the expected calibration error, the mean of |predicted - observed| over predictions.
    """

    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    size: NDArray[np.int64]
    error: float


def calibration(
    policy: ArrayLike, trajectories: Trajectories, *, num_bins: int = 10
) -> Calibration:
    """Whether actions that a policy gives probability p are taken a fraction p of the time.

    Each step is one prediction for every action of positive probability, or that was taken. Judge
    an estimate on patients that it was NOT made from: on its own log it is calibrated by
    construction.

    Args:
      policy: `[S, A]`.
      trajectories: observations are states.
      num_bins: of equal width.

    Source: Naeini, Cooper & Hauskrecht (2015), "Obtaining well calibrated probabilities using
      Bayesian binning", section 3, over all actions.
    """
    checks.at_least("num_bins", num_bins, 1)
    mask = np.asarray(trajectories.mask)
    state = np.asarray(trajectories.steps.observation)[mask]
    taken = np.asarray(trajectories.steps.action)[mask]
    predicted = np.asarray(policy, np.float64)[state]
    observed = np.arange(predicted.shape[1]) == taken[:, None]
    counted = (predicted > 0) | observed
    predicted, observed = predicted[counted], observed[counted]
    place = np.minimum((predicted * num_bins).astype(int), num_bins - 1)
    count, sum_predicted, sum_observed = (
        np.bincount(place, weights, num_bins) for weights in (None, predicted, observed)
    )
    gap = np.abs(sum_predicted - sum_observed).sum()
    filled = np.maximum(count, 1)
    return Calibration(
        predicted=sum_predicted / filled,
        observed=sum_observed / filled,
        size=count.astype(np.int64),
        error=float(gap / max(count.sum(), 1)),
    )


class Agreement(NamedTuple):
    """How often a policy would have done what was done.

    Attributes:
      visits: `[S]`, decisions logged in each state.
      rate: `[S]`, the probability that the policy takes the logged action, averaged over the
        visits; 0 where there are none.
      overall: the same over all decisions.
    """

    visits: NDArray[np.int64]
    rate: NDArray[np.float64]
    overall: float


def agreement(policy: ArrayLike, trajectories: Trajectories) -> Agreement:
    """How often a policy agrees with the clinicians of a log, state by state.

    Args:
      policy: action probabilities `[S, A]`.
      trajectories: observations are states.
    """
    policy = np.asarray(policy, np.float64)
    num_states, num_actions = policy.shape
    count = np.asarray(
        action_counts(trajectories, num_states=num_states, num_actions=num_actions), np.float64
    )
    visits, agreed = count.sum(axis=1), (count * policy).sum(axis=1)
    return Agreement(
        visits=visits.astype(np.int64),
        rate=agreed / np.maximum(visits, 1),
        overall=float(agreed.sum() / max(visits.sum(), 1)),
    )
