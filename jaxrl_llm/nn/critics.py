"""Critics: the values of actions, for discrete or continuous ones, alone or as twins.

Every module accepts leading batch dimensions, `[...]`, without `vmap`. Masks are no business of a
critic: who takes a maximum or an expectation over its actions applies them. The critic of a finite
problem is `heads.TabularEmbedding(num_states, num_actions)`.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_llm.nn.heads import ValueHead
from jaxrl_llm.nn.mlp import MLP
from jaxrl_llm.types import Array, PyTree


class QNetwork(nn.Module):
    """Q(o, .) of all discrete actions at once.

    Dueling, the last hidden layer exists twice: one stream ends in V(o), the other in A(o, .), and

        Q(o, a) = V(o) + A(o, a) - mean_a' A(o, a').

    Subtracting the mean makes the two parts identifiable: the mean of Q over actions is V.

    Source: Mnih et al. (2015), "Human-level control through deep reinforcement learning", for one
      output an action; Wang et al. (2016), "Dueling network architectures", equation 9.

    Attributes:
      num_actions: `A`.
      hidden_sizes: widths of the hidden layers.
      activation: elementwise, after each hidden layer.
      is_dueling: whether values and advantages have a stream each.
      dtype: of the computation and of the result.
    """

    num_actions: int
    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: Callable[[Array], Array] = nn.relu
    is_dueling: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        """Maps `observation` `[..., features]` to Q `[..., A]`."""

        def stream(sizes: tuple[int, ...], num_outputs: int | None, name: str) -> MLP:
            return MLP(sizes, self.activation, num_outputs=num_outputs, dtype=self.dtype, name=name)

        if not self.is_dueling:
            return stream(self.hidden_sizes, self.num_actions, "q")(observation)
        features = stream(self.hidden_sizes[:-1], None, "torso")(observation)
        value = stream(self.hidden_sizes[-1:], 1, "value")(features)
        advantage = stream(self.hidden_sizes[-1:], self.num_actions, "advantage")(features)
        return value + advantage - jnp.mean(advantage, axis=-1, keepdims=True)


class StateActionCritic(nn.Module):
    """Q(o, a) of one action, a vector: the two are read side by side.

    Source: Haarnoja et al. (2018), "Soft actor-critic algorithms and applications", for the sizes.

    Attributes:
      hidden_sizes: widths of the hidden layers.
      activation: elementwise, after each hidden layer.
      dtype: of the computation and of the result.
    """

    hidden_sizes: tuple[int, ...] = (256, 256)
    activation: Callable[[Array], Array] = nn.relu
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, observation: Array, action: Array) -> Array:
        """Maps `observation` `[..., features]` and `action` `[..., D]` to Q `[...]`."""
        both = jnp.concatenate([observation, action], axis=-1)
        features = MLP(self.hidden_sizes, self.activation, dtype=self.dtype, name="torso")(both)
        return ValueHead(dtype=self.dtype, name="value")(features)


class TwinQ(nn.Module):
    """Two critics of the same kind that share no parameter; the lesser of the two is not biased up.

    Twins that start equal, as tables of zeros do, stay equal on the same batches.

    Source: Fujimoto et al. (2018), "Addressing function approximation error in actor-critic
      methods", section 4.2.

    Attributes:
      critic: the pattern of both, such as `QNetwork(4)` or `StateActionCritic()`.
    """

    critic: nn.Module

    @nn.compact
    def __call__(self, *inputs: PyTree) -> Array:
        """Both critics of `inputs`, `[2, ...]`."""
        # Two modules, not a vmap of one: batched orthogonal initialisation (QR) may not end on a
        # CPU, and batched products of small matrices are slower there.
        twins = [self.critic.clone(parent=self, name=name) for name in ("first", "second")]
        return jnp.stack([twin(*inputs) for twin in twins])
