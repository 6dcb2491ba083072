"""Prompts that are read once and gone on from several times, by all of their responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.types import Array, KVCache


def widened(cache: KVCache, num_copies: int, num_free: int) -> KVCache:
    """Every row `num_copies` times, side by side, with `num_free` more slots at its end."""

    def wider(leaf: Array) -> Array:
        slots = ((0, 0), (0, 0), (0, num_free), (0, 0))
        return jnp.repeat(jnp.pad(leaf, slots), num_copies, axis=0)

    keys, values = jax.tree.map(wider, (cache.keys, cache.values))
    mask = jnp.repeat(jnp.pad(cache.mask, ((0, 0), (0, num_free))), num_copies, axis=0)
    return dataclasses.replace(cache, keys=keys, values=values, mask=mask)


def hidden_states(
    read: Callable[..., Any],
    cache: KVCache,
    tokens: Array,
    attention_mask: Array,
    num_shared: int,
) -> Array:
    """What a trunk makes of the tokens after the first `num_shared`, `[G * K, L - num_shared, E]`.

    The shared ones go through it once a group, and no further than the others attend to them: their
    last perceptron has no reader, so the compiler drops it.

    Args:
      read: `(tokens, attention_mask=, cache=) -> (hidden, cache)`.
      cache: empty, of `G` rows with `num_shared` slots.
      tokens: `[G, K, L]`, the first `num_shared` of them the same in all of a group.
      attention_mask: `[G, K, L]`, likewise; True on real tokens.
      num_shared: at least 0.
    """
    _, num_copies, length = tokens.shape
    if num_shared:
        shared = tokens[:, 0, :num_shared], attention_mask[:, 0, :num_shared]
        _, cache = read(shared[0], attention_mask=shared[1], cache=cache)
    cache = widened(cache, num_copies, length - num_shared)
    own, real = (
        leaf[:, :, num_shared:].reshape(-1, length - num_shared)
        for leaf in (tokens, attention_mask)
    )
    hidden, _ = read(own, attention_mask=real, cache=cache)
    return hidden
