"""The multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_llm.types import Array


def orthogonal_dense(features: int, scale: float, dtype: DTypeLike, name: str) -> nn.Dense:
    """A dense layer whose kernel starts orthogonal times `scale`, its bias at 0.

    Parameters are float32, or float64 where `dtype` is; `dtype` is that of the computation.
    """
    return nn.Dense(
        features,
        dtype=dtype,
        param_dtype=jnp.promote_types(dtype, jnp.float32),
        kernel_init=nn.initializers.orthogonal(scale),
        name=name,
    )


class MLP(nn.Module):
    """Dense layers, each followed by `activation`, and a linear output where asked for.

    Source: the initialisation is that of Saxe et al. (2014); sqrt(2) on the hidden layers and the
    default sizes are those of OpenAI Baselines' PPO for control.

    Attributes:
      hidden_sizes: widths of the hidden layers; () leaves only the output layer.
      activation: elementwise, after each hidden layer.
      hidden_scale: of the hidden kernels' orthogonal initialisation.
      num_outputs: width of the output layer; None ends after the last activation.
      output_scale: of the output kernel's orthogonal initialisation.
      dtype: of the computation and of the result.
    """

    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: Callable[[Array], Array] = nn.tanh
    hidden_scale: float = math.sqrt(2)
    num_outputs: int | None = None
    output_scale: float = 1.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `x` `[..., features]` to `[..., num_outputs]`, or `[..., hidden_sizes[-1]]`."""
        for index, size in enumerate(self.hidden_sizes):
            layer = orthogonal_dense(size, self.hidden_scale, self.dtype, f"hidden_{index}")
            x = self.activation(layer(x))
        if self.num_outputs is None:
            return x
        return orthogonal_dense(self.num_outputs, self.output_scale, self.dtype, "output")(x)
