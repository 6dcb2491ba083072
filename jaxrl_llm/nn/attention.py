"""Scaled dot-product attention over tokens, and the masks and positions that go with it.

Shapes use `B` rows, `T` queries, `S` keys, `H` heads and `D` dimensions of a head.

Source: Vaswani et al. (2017), equation 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_llm.types import Array, KVCache


def attend(query: Array, key: Array, value: Array, mask: Array | None, *, scale: float) -> Array:
    """softmax(scale · query · keyᵀ) · value, the softmax in float32.

    On a GPU in half precision it is cuDNN's fused kernel, which never stores the scores; a single
    query a row, as in decoding, has none worth fusing. Elsewhere it is `weighted_sum(weights)`,
    whose gradient takes a CPU half as long as that of `jax.nn.dot_product_attention`.

    Args:
      query: `[B, H, T, D]`.
      key: `[B, H, S, D]`.
      value: `[B, H, S, D]`.
      mask: bool, broadcast to `[B, H, T, S]`, True = attend; None is causal, with `T` = `S`.
      scale: of the scores.

    Returns:
      `[B, H, T, D]`.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    fits = query.shape[-2] > 1 and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    if not (half and fits and jax.default_backend() == "gpu"):
        return weighted_sum(weights(query, key, mask, scale=scale), value)
    attended = jax.nn.dot_product_attention(
        *(part.swapaxes(1, 2) for part in (query, key, value)),
        mask=mask,
        scale=scale,
        is_causal=mask is None,
        implementation="cudnn",
    )
    return attended.swapaxes(1, 2)


def weights(query: Array, key: Array, mask: Array | None, *, scale: float) -> Array:
    """softmax(scale · query · keyᵀ), `[B, H, T, S]` float32; arguments as in `attend`."""
    scores = jnp.einsum("bhtd,bhsd->bhts", query, key, preferred_element_type=jnp.float32)
    if mask is None:
        mask = jnp.tril(jnp.ones((1, 1, *scores.shape[2:]), bool))
    smallest = jnp.finfo(scores.dtype).min
    return jax.nn.softmax(jnp.where(mask, scores * scale, smallest), axis=-1)


def weighted_sum(weights: Array, value: Array) -> Array:
    """weights · value, `[B, H, T, D]`, of `[B, H, T, S]` and `[B, H, S, D]`."""
    return jnp.einsum("bhts,bhsd->bhtd", weights.astype(value.dtype), value)


def causal_mask(real: Array, segment: Array | None, cache: KVCache | None) -> Array:
    """Which keys a query may attend to: real ones, not later, of its own segment.

    Args:
      real: `[B, T]` bool, the queries that are no padding.
      segment: `[B, T]` integers, or None for one a row.
      cache: whose slots are the keys, and whose `mask` already counts these queries; None where
        the keys are the queries themselves.

    Returns:
      `[B, 1, T, S]` bool.
    """
    num_queries = real.shape[1]
    first, keys = (0, real) if cache is None else (cache.length, cache.mask)
    mask = keys[:, None, :]
    if cache is None or num_queries > 1:
        # A single query is the newest token: all that its row's slots hold came before it.
        not_later = jnp.arange(keys.shape[1])[None, :] <= first + jnp.arange(num_queries)[:, None]
        mask = not_later[None] & mask
    if segment is not None:
        mask &= segment[:, :, None] == segment[:, None, :]
    return mask[:, None]


def positions(real: Array, segment: Array | None) -> Array:
    """How many real tokens of its row, or of its segment, precede each, `[B, T]` int32.

    Args:
      real: `[B, T]` bool, False on padding.
      segment: `[B, T]` integers, each segment contiguous; None for one a row.
    """
    before = jnp.cumsum(real, axis=1, dtype=jnp.int32) - real
    if segment is None:
        return before
    starts = segment != jnp.pad(segment[:, :-1], ((0, 0), (1, 0)))
    return before - jax.lax.cummax(jnp.where(starts, before, 0), axis=1)
