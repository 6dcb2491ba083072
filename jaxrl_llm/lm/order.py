"""A learner that goes through data: every row once an epoch, in an order shuffled anew for each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm.numerics import random_permutation
from jaxrl_llm.types import Array, Key, PyTree, TrainState


@struct.dataclass(kw_only=True)
class State:
    """A learner: what it has learnt, and the root of the order in which it sees its data."""

    train: TrainState
    order_key: Key


def next_batch(state: State, batch_size: int, data: PyTree) -> PyTree:
    """The rows of `data`, along the first axis of its leaves, of the step that `state` is at."""
    num_rows = jax.tree.leaves(data)[0].shape[0]
    rows = next_rows(state.order_key, state.train.step, batch_size, num_rows)
    return jax.tree.map(lambda leaf: leaf[rows], data)


def next_rows(key: Key, step: Array, batch_size: int, num_rows: int) -> Array:
    """The rows of step number `step`, `[batch_size]` integers in [0, `num_rows`).

    An epoch leaves out the last rows that fill no batch; fewer rows than a batch are repeated.

    Args:
      key: of the order, the same at every step; a run that resumes finds its place by `step` alone.
      step: `[]` integer, from 0.
      batch_size: rows a step.
      num_rows: there are.
    """
    steps_per_epoch = max(num_rows // batch_size, 1)
    epoch, place = jnp.divmod(step, steps_per_epoch)
    order = random_permutation(jax.random.fold_in(key, epoch), num_rows)
    order = jnp.resize(order, (max(num_rows, batch_size),))
    return jax.lax.dynamic_slice_in_dim(order, place * batch_size, batch_size)
