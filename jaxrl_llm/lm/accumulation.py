"""The gradient of a sum over rows that go through a model a part at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.types import Array, Key, PyTree


def gradient_of_sum(
    function: Callable[..., tuple[Array, PyTree]],
    params: PyTree,
    rows: PyTree,
    num_parts: int,
    key: Key | None = None,
) -> tuple[PyTree, PyTree]:
    """The gradient of `function` over all `rows`, and what it returned beside its value, summed.

    Parts add, and nothing here divides: whatever the loss is a mean over must be counted over all
    rows beforehand, and given to `function` as a weight. A mean of the parts' own means would weigh
    a token by how few others its part happens to hold.

    Args:
      function: `(params, part) -> (sum, more)`, or `(params, part, key)` where there is a key;
        `more` is a pytree of arrays that add, such as `Mean`.
      params: differentiated by.
      rows: a pytree of arrays with one leading axis, which `num_parts` divides.
      num_parts: gone through one after another; memory is that of one.
      key: split over the parts.

    Returns:
      The gradient, like `params`, and the sum of `more`.
    """
    differentiate = jax.grad(function, has_aux=True)
    if num_parts == 1:
        return differentiate(params, rows, *(() if key is None else (key,)))
    keys: tuple[Any, ...] = () if key is None else (jax.random.split(key, num_parts),)
    split = jax.tree.map(lambda leaf: leaf.reshape(num_parts, -1, *leaf.shape[1:]), rows)
    inputs = (split, *keys)

    def of_part(part: PyTree) -> tuple[PyTree, PyTree]:
        return differentiate(params, *part)

    part = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), inputs)
    shapes = jax.eval_shape(of_part, part)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(sums: PyTree, part: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, sums, of_part(part)), None

    return jax.lax.scan(add, zeros, inputs)[0]
