"""What stands on top of a torso: policies, values, and actors and critics composed of both.

Every module accepts leading batch dimensions, `[...]`, without `vmap`. A policy is one of
`nn.policies`: which one, the action space decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_llm.kernels import policy_gradient
from jaxrl_llm.nn import policies
from jaxrl_llm.nn.mlp import MLP, orthogonal_dense
from jaxrl_llm.types import Array, Box, Discrete, Space

Deviation = Literal["parameter", "network"]

# A network's log-deviation lies in this interval: below it the density overflows, above it the
# squashed law has nothing but its two ends.
LOG_DEVIATIONS = (-5.0, 2.0)


class CategoricalHead(nn.Module):
    """A linear layer to action logits, initialised so small that the policy starts near uniform.

    Attributes:
      num_actions: `A`.
      scale: of the kernel's orthogonal initialisation.
      dtype: of the computation and of the result.
    """

    num_actions: int
    scale: float = 0.01
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Array, *, mask: Array | None = None) -> Array:
        """Maps `features` `[..., F]` to logits `[..., A]`, masked where `mask` `[..., A]` is."""
        logits = orthogonal_dense(self.num_actions, self.scale, self.dtype, "logits")(features)
        return logits if mask is None else policy_gradient.masked_logits(logits, mask)


class ValueHead(nn.Module):
    """A linear layer to one number.

    Attributes:
      scale: of the kernel's orthogonal initialisation.
      dtype: of the computation and of the result.
    """

    scale: float = 1.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Maps `features` `[..., F]` to values `[...]`."""
        return orthogonal_dense(1, self.scale, self.dtype, "value")(features)[..., 0]


class TabularEmbedding(nn.Module):
    """One free row of parameters a state, starting at 0: a table read by a gather.

    With `features` = 1 it is a table of values, with `features` = A one of logits or of Q.

    Attributes:
      num_states: `S`.
      features: length of a row.
      dtype: of the table and of the result.
    """

    num_states: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, state: Array) -> Array:
        """Maps `state` `[...]`, integers in [0, S), to rows `[..., features]`.

        A state of S or more reads NaN, so that a wrong index is not a silent neighbour.
        """
        shape = (self.num_states, self.features)
        table = self.param("table", nn.initializers.zeros, shape, self.dtype)
        return jnp.take(table, state, axis=0, mode="fill")


class GaussianHead(nn.Module):
    """A linear layer to means of latent normal variables, and their log-deviations.

    Attributes:
      shape: of the variables, `[..., *shape]`.
      deviation: "parameter" is a log-deviation that no observation changes, as is usual where
        updates are on-policy; "network" a second linear layer, as in soft actor-critic, whose
        output is squashed into `LOG_DEVIATIONS`.
      initial_log_deviation: where a "parameter" starts.
      scale: of the kernels' orthogonal initialisation.
      dtype: of the computation and of the results.
    """

    shape: tuple[int, ...]
    deviation: Deviation = "parameter"
    initial_log_deviation: float = -0.5
    scale: float = 0.01
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> tuple[Array, Array]:
        """Maps `features` `[..., F]` to means and log-deviations, `[..., *shape]` each."""
        shape = (*features.shape[:-1], *self.shape)

        def linear(name: str) -> Array:
            size = math.prod(self.shape)
            return orthogonal_dense(size, self.scale, self.dtype, name)(features).reshape(shape)

        mean = linear("mean")
        if self.deviation == "network":
            low, high = LOG_DEVIATIONS
            return mean, low + (high - low) * (0.5 * jnp.tanh(linear("log_deviation")) + 0.5)
        start = nn.initializers.constant(self.initial_log_deviation)
        log_deviation = self.param("log_deviation", start, self.shape, mean.dtype)
        return mean, jnp.broadcast_to(log_deviation, shape)


class PolicyHead(nn.Module):
    """From features to a policy over `action_space`, near uniform or centred at first.

    Attributes:
      action_space: Discrete, a Box of one dimension, or Hybrid.
      deviation: as in `GaussianHead`, where there are amounts.
      dtype: of the computation and of the result.
    """

    action_space: Space
    deviation: Deviation = "parameter"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Array, *, mask: Array | None = None) -> policies.ActionPolicy:
        """Maps `features` `[..., F]` to a policy; `mask` `[..., A]` is of the discrete part.

        Raises:
          ValueError: the space is not one that a policy can cover.
        """
        space = self.action_space
        policies.check_action_space("action_space", space)

        def logits(num: int) -> Array:
            return CategoricalHead(num, dtype=self.dtype, name="categorical")(features, mask=mask)

        def gaussian(*shape: int) -> tuple[Array, Array]:
            head = GaussianHead(shape, self.deviation, dtype=self.dtype, name="gaussian")
            return head(features)

        if isinstance(space, Discrete):
            return policies.Categorical(logits=logits(space.num))
        if isinstance(space, Box):
            mean, log_deviation = gaussian(*space.shape)
            return policies.SquashedGaussian(
                mean=mean, log_deviation=log_deviation, low=space.low, high=space.high
            )
        mean, log_deviation = gaussian(space.num, *space.amount.shape)
        return policies.HybridPolicy(
            logits=logits(space.num),
            mean=mean,
            log_deviation=log_deviation,
            low=space.amount.low,
            high=space.amount.high,
            has_amount=space.has_amount,
        )


class Actor(nn.Module):
    """A tower and a policy head, for vector observations.

    Attributes:
      action_space: as in `PolicyHead`.
      hidden_sizes: widths of the tower's hidden layers.
      activation: elementwise, after each hidden layer.
      deviation: as in `GaussianHead`.
      dtype: of the computation and of the result.
    """

    action_space: Space
    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: Callable[[Array], Array] = nn.tanh
    deviation: Deviation = "parameter"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, observation: Array, *, action_mask: Array | None = None
    ) -> policies.ActionPolicy:
        """The policy at `observation` `[..., features]`; `action_mask` as in `ActorCritic`."""
        tower = MLP(self.hidden_sizes, self.activation, dtype=self.dtype, name="policy_tower")
        head = PolicyHead(self.action_space, self.deviation, self.dtype, name="policy_head")
        return head(tower(observation), mask=action_mask)


class ActorCritic(nn.Module):
    """Two separate towers, one to a policy and one to a value, for vector observations.

    Source: Schulman et al. (2017), section 6.1 (2 x 64 tanh, nothing shared); the scales of the
    initialisation (sqrt(2), .01 and 1) are those of OpenAI Baselines.

    Attributes: those of `Actor`.
    """

    action_space: Space
    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: Callable[[Array], Array] = nn.tanh
    deviation: Deviation = "parameter"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, observation: Array, *, action_mask: Array | None = None
    ) -> tuple[policies.ActionPolicy, Array]:
        """Policy and value of an observation.

        Args:
          observation: `[..., features]`.
          action_mask: `[..., A]` bool, True where the action is allowed; None allows all.

        Returns:
          The policy, which never takes a masked action, and the value `[...]`.
        """
        actor = Actor(
            self.action_space,
            self.hidden_sizes,
            self.activation,
            self.deviation,
            self.dtype,
            name="actor",
        )
        tower = MLP(self.hidden_sizes, self.activation, dtype=self.dtype, name="value_tower")
        value_head = ValueHead(dtype=self.dtype, name="value_head")
        policy = actor(observation, action_mask=action_mask)
        return policy, value_head(tower(observation))


class TabularActor(nn.Module):
    """A table of logits: it can represent every policy of a finite MDP, and starts uniform.

    Attributes:
      num_states: `S`.
      num_actions: `A`.
      dtype: of the table and of the result.
    """

    num_states: int
    num_actions: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, observation: Array, *, action_mask: Array | None = None
    ) -> policies.Categorical:
        """The policy in `observation` `[...]`, integers in [0, S); `action_mask` `[..., A]`."""
        table = TabularEmbedding(self.num_states, self.num_actions, self.dtype, name="policy")
        logits = table(observation)
        if action_mask is not None:
            logits = policy_gradient.masked_logits(logits, action_mask)
        return policies.Categorical(logits=logits)


class TabularActorCritic(nn.Module):
    """A table of logits and a table of values: it can represent every policy of a finite MDP.

    Both start at 0, so the first policy is uniform over the allowed actions.

    Attributes:
      num_states: `S`.
      num_actions: `A`.
      dtype: of the tables and of the results.
    """

    num_states: int
    num_actions: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, observation: Array, *, action_mask: Array | None = None
    ) -> tuple[policies.Categorical, Array]:
        """Policy and value of a state.

        Args:
          observation: `[...]`, integers in [0, S).
          action_mask: `[..., A]` bool, True where the action is allowed; None allows all.

        Returns:
          The policy, which never takes a masked action, and the value `[...]`.
        """
        actor = TabularActor(self.num_states, self.num_actions, self.dtype, name="actor")
        value = TabularEmbedding(self.num_states, 1, self.dtype, name="value")
        return actor(observation, action_mask=action_mask), value(observation)[..., 0]
