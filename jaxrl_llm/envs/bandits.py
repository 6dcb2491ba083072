"""Bandit problems whose expected rewards are known: fixed, swapping, and linear in a context.

SYNTHETIC; research only, not for clinical use. A problem is its arrays, so that what a strategy
loses to the best arm of each round is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.types import Array, Key

Noise = Literal["bernoulli", "gaussian"]


@struct.dataclass(kw_only=True)
class Bandit:
    """T rounds of K arms.

    Attributes:
      expected_reward: `[T, K]`, of each arm in each round.
      context: `[T, d]`, what is seen before each round; a constant 1 where there is nothing to see.
      deviation: `[]`, of a Gaussian reward.
      noise: whether rewards are 0 or 1 with the expected mean, or normal around it.
    """

    expected_reward: Array
    context: Array
    deviation: Array
    noise: Noise = struct.field(pytree_node=False, default="bernoulli")

    @property
    def horizon(self) -> int:
        return self.expected_reward.shape[-2]

    @property
    def num_arms(self) -> int:
        return self.expected_reward.shape[-1]

    @property
    def uniform_regret(self) -> Array:
        """What pulling arms at random loses in expectation, `[]`."""
        best = jnp.max(self.expected_reward, axis=-1)
        return jnp.sum(best - jnp.mean(self.expected_reward, axis=-1))

    @property
    def fixed_regret(self) -> Array:
        """What the best single arm, known from the start, loses in expectation, `[]`."""
        best = jnp.max(self.expected_reward, axis=-1)
        return jnp.min(jnp.sum(best[..., None] - self.expected_reward, axis=-2), axis=-1)


def bernoulli(probability: Sequence[float], horizon: int) -> Bandit:
    """Arms that succeed with a fixed probability, in every round."""
    return _bernoulli(np.tile(_probabilities(probability), (_rounds(horizon), 1)))


def swapping(probability: Sequence[float], horizon: int) -> Bandit:
    """Bernoulli arms that trade places halfway: the best becomes the worst, and so on."""
    before = np.sort(_probabilities(probability))[::-1]
    first = np.arange(_rounds(horizon))[:, None] < horizon // 2
    return _bernoulli(np.where(first, before[None], before[None, ::-1]))


def linear(
    key: Key, horizon: int, *, num_arms: int = 5, num_features: int = 8, deviation: float = 0.25
) -> Bandit:
    """Expected rewards linear in the context, each arm with its own normal weights.

    The first feature is 1, so that some arms are better on average; the others are normal.

    Args:
      key: consumed; another key is another problem.
      horizon: T.
      num_arms: K.
      num_features: d, the constant included.
      deviation: of a reward.
    """
    checks.at_least("num_arms", num_arms, 1)
    checks.at_least("num_features", num_features, 1)
    checks.at_least("deviation", deviation, 0)
    weight_key, context_key = jax.random.split(key)
    weight = jax.random.normal(weight_key, (num_arms, num_features))
    context = jax.random.normal(context_key, (_rounds(horizon), num_features)).at[:, 0].set(1)
    weight = weight / jnp.sqrt(num_features)
    return Bandit(
        expected_reward=context @ weight.T,
        context=context,
        deviation=jnp.asarray(deviation),
        noise="gaussian",
    )


def _bernoulli(expected: np.ndarray) -> Bandit:
    return Bandit(
        expected_reward=jnp.asarray(expected, float),
        context=jnp.ones((len(expected), 1)),
        deviation=jnp.zeros(()),
    )


def _probabilities(probability: Sequence[float]) -> np.ndarray:
    checks.not_empty("probability", probability)
    for arm, value in enumerate(probability):
        checks.between(f"probability[{arm}]", value, 0, 1)
    return np.asarray(probability, float)


def _rounds(horizon: int) -> int:
    checks.at_least("horizon", horizon, 1)
    return horizon
