"""What learners share: metrics that add exactly, the state of training, an algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import struct

from jaxrl_llm.types.arrays import Array, Key, PyTree

NumbersT = TypeVar("NumbersT", bound=Any)


@struct.dataclass(kw_only=True)
class Mean:
    """A mean kept as total and weight, so that it adds exactly over minibatches and devices.

    >>> import jax.numpy as jnp
    >>> parts = Mean.of(jnp.array([1.0, 2.0])) + Mean.of(jnp.array([6.0]))
    >>> float(parts.mean)
    3.0
    """

    total: Array
    weight: Array

    @classmethod
    def of(cls, values: Array, mask: Array | None = None) -> Mean:
        """Of all elements of `values`, or of those where `mask` (same shape) is True.

        Counted in float32 at least: a bool could not count, and bfloat16 not beyond 256.
        """
        values = jnp.asarray(values)
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        if mask is None:
            return cls(total=jnp.sum(values), weight=jnp.asarray(values.size, values.dtype))
        mask = mask.astype(bool)
        weight = jnp.sum(mask).astype(values.dtype)
        return cls(total=jnp.sum(jnp.where(mask, values, 0)), weight=weight)

    def __add__(self, other: Mean) -> Mean:
        return Mean(total=self.total + other.total, weight=self.weight + other.weight)

    @property
    def mean(self) -> Array:
        """total / weight, and 0 where nothing was counted."""
        counted = self.weight > 0
        return jnp.where(counted, self.total / jnp.where(counted, self.weight, 1), 0)


@struct.dataclass(kw_only=True)
class TrainState:
    """Parameters, their optimiser's state and the number of optimiser steps taken `[]`."""

    params: PyTree
    opt_state: PyTree
    step: Array


def hyperparameters(kind: type[NumbersT], config: object) -> NumbersT:
    """Each field of `kind` from the field of `config` that has its name, as a `[]` float32.

    What a program is shaped by stays in a configuration. What it only computes with lives as arrays
    in the learner's state, so that one compiled program serves any of them, and a `vmap` many.

    Args:
      kind: a pytree dataclass of scalars, such as the `Hyperparameters` of an agent.
      config: has every field of it, and others.
    """
    names = [field.name for field in fields(kind)]
    return kind(**{name: jnp.float32(getattr(config, name)) for name in names})


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A learner as two pure functions; a whole training is `jit(scan(step))`, seeds a `vmap`.

    Attributes:
      init: `(key) -> state`.
      step: `(key, state) -> (state, metrics)`; metrics are a flat dict of `Mean`. One that learns
        from data, rather than from an environment, takes them as a third argument.
    """

    init: Callable[[Key], PyTree]
    step: Callable[..., tuple[PyTree, dict[str, Mean]]]
