"""Curiosity by random network distillation: what a network cannot predict yet is new.

A predictor learns the outputs of another network that keeps its random initial weights. Its error
falls where observations repeat, so the error is a reward for novelty.

    params, novelty = init(key, space, observation, num_environments)
    novelty, arrival, reward = novelty.reward(params, space, next_observation, gamma)
    loss = jnp.mean(prediction_error(params, arrival))   # of the predictor

Source: Burda et al. (2018), "Exploration by Random Network Distillation", arXiv:1810.12894,
  sections 2.2 to 2.4 and algorithm 1. Difference: fully connected networks, for vectors.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm.kernels.objectives import RunningMoments
from jaxrl_llm.nn.mlp import MLP
from jaxrl_llm.types import Array, Discrete, Hybrid, Key, PyTree, Space

# The clip of section 2.4, in standard deviations.
MAX_DEVIATIONS = 5.0


def features(space: Space, observation: Array) -> Array:
    """An observation as a vector `[..., F]`: one-hot where it is an index, flat otherwise."""
    if isinstance(space, Discrete):
        return jax.nn.one_hot(observation, space.num)
    if isinstance(space, Hybrid):
        raise ValueError("space is Hybrid; observations are of a Box or Discrete")
    leading = observation.shape[: observation.ndim - len(space.shape)]
    return observation.reshape(*leading, -1)


class RandomNetworkDistillation(nn.Module):
    """The error with which a predictor repeats a random network.

    The target's parameters lie beside the predictor's, and receive no gradient.

    Attributes:
      hidden_sizes: widths of the target's hidden layers; the predictor has one more.
      num_outputs: of either network.
    """

    hidden_sizes: tuple[int, ...] = (64,)
    num_outputs: int = 32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Maps features `[..., F]`, about standard normal, to mean squared errors `[...]`."""
        deeper = (*self.hidden_sizes, self.hidden_sizes[-1])
        target = MLP(self.hidden_sizes, nn.relu, num_outputs=self.num_outputs, name="target")
        predictor = MLP(deeper, nn.relu, num_outputs=self.num_outputs, name="predictor")
        error = predictor(features) - jax.lax.stop_gradient(target(features))
        return jnp.mean(jnp.square(error), axis=-1)


_NETWORK = RandomNetworkDistillation()


@struct.dataclass(kw_only=True)
class Novelty:
    """What normalises the inputs and the rewards of curiosity, over all that was seen.

    Attributes:
      features: moments of each feature, `[F]`.
      returns: moments of the discounted sums of errors, `[]`.
      discounted_sum: `[B]`, of the errors so far in each environment. No episode ends it.
    """

    features: RunningMoments
    returns: RunningMoments
    discounted_sum: Array

    def reward(
        self, params: PyTree, space: Space, observation: Array, gamma: Array
    ) -> tuple[Novelty, Array, Array]:
        """The reward for arriving at each of the observations of a rollout.

        Args:
          params: of the network.
          space: of one observation.
          observation: `[T, B, ...]`, in the order in which they were met.
          gamma: `[]`, discount of the sums that scale the reward.

        Returns:
          The moments afterwards, what the predictor learns from `[T, B, F]`, and the reward
          `[T, B]`, in deviations of its discounted sums.
        """
        seen = features(space, observation)
        moments = self.features.update(seen.reshape(-1, seen.shape[-1]))
        arrival = jnp.clip(moments.standardise(seen), -MAX_DEVIATIONS, MAX_DEVIATIONS)

        def accumulate(total: Array, error: Array) -> tuple[Array, Array]:
            total = gamma * total + error
            return total, total

        error = prediction_error(params, arrival)
        discounted_sum, sums = jax.lax.scan(accumulate, self.discounted_sum, error)
        returns = self.returns.update(sums.reshape(-1))
        novelty = Novelty(features=moments, returns=returns, discounted_sum=discounted_sum)
        return novelty, arrival, returns.scale(error)


def init(
    key: Key, space: Space, observation: Array, num_environments: int
) -> tuple[PyTree, Novelty]:
    """The network's parameters, and the moments before anything but `observation` was seen."""
    example = features(space, observation)
    params = _NETWORK.init(key, example)["params"]
    novelty = Novelty(
        features=RunningMoments.empty(example.shape),
        returns=RunningMoments.empty(),
        discounted_sum=jnp.zeros(num_environments),
    )
    return params, novelty


def prediction_error(params: PyTree, arrival: Array) -> Array:
    """How new each row of `arrival` `[..., F]` is, `[...]`: reward, and loss of the predictor."""
    error: Any = _NETWORK.apply({"params": params}, arrival)
    return error
