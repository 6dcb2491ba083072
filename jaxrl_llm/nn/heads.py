"""What stands on top of a torso: action logits, values, and actor-critics composed of both.

Every module accepts leading batch dimensions, `[...]`, without `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_llm.kernels import policy_gradient
from jaxrl_llm.nn.mlp import MLP, orthogonal_dense
from jaxrl_llm.types import Array

if TYPE_CHECKING:
    import distrax


def categorical(logits: Array, mask: Array | None = None) -> distrax.Categorical:
    """The distribution over actions that `logits` `[..., A]` describe.

    Args:
      logits: `[..., A]`; those of `CategoricalHead` called with a mask carry it already.
      mask: `[..., A]` bool, True where the action is allowed; None leaves `logits` as they are.
    """
    import distrax

    if mask is not None:
        logits = policy_gradient.masked_logits(logits, mask)
    return distrax.Categorical(logits=logits)


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


class ActorCritic(nn.Module):
    """Two separate towers, one to action logits and one to a value, for vector observations.

    Source: Schulman et al. (2017), section 6.1 (2 x 64 tanh, nothing shared); the scales of the
    initialisation (sqrt(2), .01 and 1) are those of OpenAI Baselines.

    Attributes:
      num_actions: `A`.
      hidden_sizes: widths of each tower's hidden layers.
      activation: elementwise, after each hidden layer.
      dtype: of the computation and of the results.
    """

    num_actions: int
    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: Callable[[Array], Array] = nn.tanh
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, observation: Array, *, action_mask: Array | None = None
    ) -> tuple[Array, Array]:
        """Logits and value of an observation.

        Args:
          observation: `[..., features]`.
          action_mask: `[..., A]` bool, True where the action is allowed; None allows all.

        Returns:
          Logits `[..., A]`, already masked, and value `[...]`.
        """

        def tower(name: str) -> MLP:
            return MLP(self.hidden_sizes, self.activation, dtype=self.dtype, name=name)

        policy_head = CategoricalHead(self.num_actions, dtype=self.dtype, name="policy_head")
        value_head = ValueHead(dtype=self.dtype, name="value_head")
        logits = policy_head(tower("policy_tower")(observation), mask=action_mask)
        return logits, value_head(tower("value_tower")(observation))


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
    ) -> tuple[Array, Array]:
        """Logits and value of a state.

        Args:
          observation: `[...]`, integers in [0, S).
          action_mask: `[..., A]` bool, True where the action is allowed; None allows all.

        Returns:
          Logits `[..., A]`, already masked, and value `[...]`.
        """

        def table(features: int, name: str) -> Array:
            embedding = TabularEmbedding(self.num_states, features, self.dtype, name=name)
            return embedding(observation)

        logits = table(self.num_actions, "policy")
        if action_mask is not None:
            logits = policy_gradient.masked_logits(logits, action_mask)
        return logits, table(1, "value")[..., 0]
