"""Networks with a memory: a torso that is carried along an episode, and an actor-critic on it.

Time leads: observations are `[T, B, ...]`, and one step is a sequence of length 1. `start` `[T, B]`
is True where an episode begins with the observation of that step; the memory is emptied BEFORE
the step, so the first action of an episode knows nothing of the one before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl_llm.nn import heads, policies
from jaxrl_llm.nn.mlp import MLP
from jaxrl_llm.types import Array, PyTree, Space

Cell = Literal["lstm", "gru"]


class RecurrentTorso(nn.Module):
    """A long short-term memory or a gated recurrent unit, unrolled over time.

    Source: Hochreiter & Schmidhuber (1997); Cho et al. (2014), arXiv:1406.1078.

    Attributes:
      num_features: of the memory and of the result, `H`.
      cell: "lstm" or "gru".
    """

    num_features: int = 64
    cell: Cell = "lstm"

    @nn.compact
    def __call__(self, memory: PyTree, inputs: Array, start: Array) -> tuple[PyTree, Array]:
        """Unrolls over time.

        Args:
          memory: before the first step, leaves `[B, H]`.
          inputs: `[T, B, F]`.
          start: `[T, B]` bool, the memory is emptied before the step.

        Returns:
          The memory after the last step, and features `[T, B, H]`.
        """
        kind = nn.OptimizedLSTMCell if self.cell == "lstm" else nn.GRUCell

        def step(cell: Any, memory: PyTree, inputs: tuple[Array, Array]) -> tuple[PyTree, Array]:
            features, start = inputs
            return cell(forget(memory, start), features)

        unroll: Any = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        return unroll(kind(self.num_features, name="cell"), memory, (inputs, start))

    @nn.nowrap
    def empty_memory(self, batch_shape: tuple[int, ...]) -> PyTree:
        """What is known at the start of an episode: zeros, leaves `[*batch_shape, H]`."""
        zeros = jnp.zeros((*batch_shape, self.num_features))
        return (zeros, zeros) if self.cell == "lstm" else zeros


class RecurrentActorCritic(nn.Module):
    """A dense layer, a recurrent torso, and on it a policy and a value, both linear.

    Attributes:
      action_space: as in `heads.PolicyHead`.
      hidden_sizes: widths of the dense layers before the torso.
      num_features: of the torso.
      cell: of the torso.
      activation: elementwise, after each dense layer.
    """

    action_space: Space
    hidden_sizes: tuple[int, ...] = (64,)
    num_features: int = 64
    cell: Cell = "lstm"
    activation: Callable[[Array], Array] = nn.tanh

    @nn.compact
    def __call__(
        self,
        memory: PyTree,
        observation: Array,
        start: Array,
        *,
        action_mask: Array | None = None,
    ) -> tuple[PyTree, policies.ActionPolicy, Array]:
        """The memory afterwards, the policy and the value of each step.

        Args:
          memory: before the first step, leaves `[B, H]`.
          observation: `[T, B, features]`.
          start: `[T, B]` bool, an episode begins with this observation.
          action_mask: `[T, B, A]` bool, True where the action is allowed; None allows all.

        Returns:
          The memory after the last step, a policy over `[T, B]` steps, and values `[T, B]`.
        """
        encoder = MLP(self.hidden_sizes, self.activation, name="encoder")
        torso = RecurrentTorso(self.num_features, self.cell, name="torso")
        memory, features = torso(memory, encoder(observation), start)
        head = heads.ActorCritic(self.action_space, hidden_sizes=(), name="heads")
        return memory, *head(features, action_mask=action_mask)

    @nn.nowrap
    def empty_memory(self, batch_shape: tuple[int, ...]) -> PyTree:
        """What is known at the start of an episode, leaves `[*batch_shape, H]`."""
        return RecurrentTorso(self.num_features, self.cell).empty_memory(batch_shape)


def forget(memory: PyTree, start: Array) -> PyTree:
    """`memory` with zeros where `start` `[B]`, leaves `[B, H]`."""
    return jax.tree.map(lambda leaf: jnp.where(start[..., None], 0, leaf), memory)
