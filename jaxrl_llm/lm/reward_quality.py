"""How well a reward model predicts comparisons that it has not seen: accuracy and calibration."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_llm import checks
from jaxrl_llm.lm import reward
from jaxrl_llm.lm.evaluate import Calibration
from jaxrl_llm.lm.scores import Estimate, wilson_interval
from jaxrl_llm.nn.reward_model import RewardModel
from jaxrl_llm.types import Array, Mean, PyTree, Responses


def accuracy(
    model: RewardModel,
    params: PyTree,
    pairs: Responses,
    *,
    batch_size: int = 64,
    confidence: float = 0.95,
) -> Estimate:
    """How often the model prefers what was preferred, with Wilson's interval; ties do not count.

    Equal scores count as half right.

    Raises:
      ValueError: if every pair is a tie.
    """
    overall = reward.score_all(model, params, pairs, batch_size=batch_size).overall
    agreement = reward.agreement(jnp.asarray(overall), reward.preference(pairs))
    correct = jax.device_get(agreement["accuracy"])
    if not correct.weight:
        raise ValueError("pairs are all ties; give at least one that was decided")
    interval = wilson_interval(correct.total, correct.weight, confidence=confidence)
    return Estimate(float(correct.mean), *map(float, interval))


def calibration(
    model: RewardModel,
    params: PyTree,
    pairs: Responses,
    *,
    num_bins: int = 10,
    batch_size: int = 64,
) -> Calibration:
    """Whether responses that the model prefers with probability p are preferred in a share p.

    That is sigma(s_1 - s_2) of raw scores, so it does not depend on their normalisation. A tie is
    half a win. Confidence is that in the likelier response, in [0.5, 1], by bins of equal width
    between these; the Brier score is sum_j (p_j - y_j)^2 over the two responses.

    Raises:
      ValueError: if `num_bins` is less than 1.
    """
    checks.at_least("num_bins", num_bins, 1)
    overall = reward.score_all(model, params, pairs, batch_size=batch_size).overall
    probability = jax.nn.sigmoid((overall[:, 0] - overall[:, 1]) / params["gain"])
    reported = reward.preference(pairs)
    first = probability >= 0.5
    confidence = jnp.where(first, probability, 1 - probability)
    outcome = jnp.where(first, reported, 1 - reported)
    bins = jnp.clip(jnp.ceil((2 * confidence - 1) * num_bins) - 1, min=0, max=num_bins - 1)

    def by_bin(values: Array) -> Mean:
        return jax.vmap(lambda index: Mean.of(values, bins == index))(jnp.arange(num_bins))

    brier = Mean.of(2 * jnp.square(confidence - outcome))
    return Calibration(confidence=by_bin(confidence), accuracy=by_bin(outcome), brier=brier)
