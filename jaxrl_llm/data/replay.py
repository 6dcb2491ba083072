"""Replay of transitions by flashbax: windows of consecutive steps, uniform or by priority.

What chance decides is drawn ahead, for as many samples as the caller likes: `draw`, then `sample`.
A uniform sample is drawn here, from integers: flashbax's own draws from a key at every sample, in
hundreds of small operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm.types import Array, Key, PyTree


@struct.dataclass(kw_only=True)
class Sample:
    """Windows drawn from a buffer.

    Attributes:
      window: leaves `[N, n, ...]`, each n consecutive steps of one environment.
      index: `[N]` int32, what `set_priorities` calls them.
      probability: `[N]`, with which each was drawn.
    """

    window: PyTree
    index: Array
    probability: Array


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A replay buffer as pure functions; its state is flashbax's.

    Attributes:
      init: `(transition) -> state`, empty, from one transition for its shapes.
      add: `(state, transitions [T, B, ...]) -> state`, which go on from those added before.
      draw: `(key, shape) -> chance`, leaves `[*shape, ...]`, one element for each sample.
      sample: `(state, chance) -> Sample`.
      set_priorities: `(state, index, priority) -> state`, both `[N]`; None where replay is uniform.
    """

    init: Callable[[PyTree], Any]
    add: Callable[[Any, PyTree], Any]
    draw: Callable[[Key, tuple[int, ...]], PyTree]
    sample: Callable[[Any, PyTree], Sample]
    set_priorities: Callable[[Any, Array, Array], Any] | None


def make(
    *,
    num_environments: int,
    length: int,
    window: int,
    batch_size: int,
    priority_exponent: float = 0.0,
) -> Replay:
    """A buffer of the last `length` steps of each environment.

    Its rows are the transitions in the order of time, those of one step side by side. flashbax
    would give each environment a row of its own, and then an addition, a scatter along the second
    axis, copies the whole buffer twice on a CPU.

    Args:
      num_environments: B.
      length: steps remembered of each.
      window: n, consecutive steps in a sample, at most `length`.
      batch_size: N.
      priority_exponent: a window is drawn in proportion to its priority to this power; 0 draws
        them alike. New ones have the highest priority ever set, at least 1 (rounded down).
    """
    import flashbax

    options = {
        "add_batch_size": 1,
        "sample_batch_size": batch_size,
        "sample_sequence_length": (window - 1) * num_environments + 1,
        "period": 1,
        "min_length_time_axis": window * num_environments,
        "max_length_time_axis": length * num_environments,
    }
    is_uniform = priority_exponent == 0
    buffer: Any = (
        flashbax.make_trajectory_buffer(**options)
        if is_uniform
        else flashbax.make_prioritised_trajectory_buffer(
            **options, priority_exponent=priority_exponent, device=jax.default_backend()
        )
    )

    def add(state: Any, transitions: PyTree) -> Any:
        rows = jax.tree.map(lambda leaf: leaf.reshape(1, -1, *leaf.shape[2:]), transitions)
        return _lenient(buffer.add)(state, rows)

    def windows(state: Any, start: Array) -> PyTree:
        """`[N, n, ...]` from the rows `[N]` of their first steps."""
        row = start[:, None] + num_environments * jnp.arange(window)[None]
        row = row % (length * num_environments)
        return jax.tree.map(lambda leaf: leaf[0, row], state.experience)

    def sample_uniform(state: Any, bits: Array) -> Sample:
        # The remainder is biased by less than the number of rows / 2^32.
        oldest = jnp.where(state.is_full, state.current_index, 0)
        num_rows = jnp.where(state.is_full, length * num_environments, state.current_index)
        num_starts = jnp.maximum(num_rows - (window - 1) * num_environments, 1)
        start = oldest + (bits % num_starts.astype(jnp.uint32)).astype(jnp.int32)
        start = start % (length * num_environments)
        probability = jnp.broadcast_to(1 / num_starts, start.shape)
        return Sample(window=windows(state, start), index=start, probability=probability)

    def sample_by_priority(state: Any, key: Key) -> Sample:
        # The rows between those of one environment, which it returns too, are never computed.
        drawn = _lenient(buffer.sample)(state, key)
        return Sample(
            window=windows(state, drawn.indices),
            index=drawn.indices,
            probability=drawn.probabilities,
        )

    if is_uniform:
        return Replay(
            init=buffer.init,
            add=add,
            draw=lambda key, shape: jax.random.bits(key, (*shape, batch_size)),
            sample=sample_uniform,
            set_priorities=None,
        )
    return Replay(
        init=buffer.init,
        add=add,
        draw=jax.random.split,
        sample=sample_by_priority,
        set_priorities=_lenient(buffer.set_priorities),
    )


def importance_weights(probability: Array, exponent: Array) -> Array:
    """w_i = (N P_i)^-beta / max_j w_j of a batch: the number N of transitions cancels.

    Args:
      probability: `[N]`, with which each was drawn; 0 is a rounding error, and weighs nothing.
      exponent: `[]`, beta: 0 leaves the bias of priorities, 1 removes it.

    Returns:
      `[N]`, in [0, 1].

    Source: Schaul et al. (2016), "Prioritized experience replay", arXiv:1511.05952, section 3.4.
    """
    possible = probability > 0
    least = jnp.min(jnp.where(possible, probability, jnp.inf))
    ratio = least / jnp.where(possible, probability, 1)
    return jnp.where(possible, ratio**exponent, 0)


def _lenient(function: Callable[..., Any]) -> Callable[..., Any]:
    """flashbax adds vectors to matrices, which a program may have forbidden."""

    def call(*arguments: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            return function(*arguments)

    return call
