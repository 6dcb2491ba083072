"""Text for many prompts through few slots, each refilled when its row has ended.

    batch = generate(model, params, tokens, attention_mask, key, config, num_slots=32)

`generate.generate` waits for the longest response of its batch, most rows idle by then. Here the
next prompts take the place of the rows that have ended, in one compiled program. The text is that
of `generate.generate`: a row depends on its prompt and key alone.

The cache is a ring. A key does not depend on the slot that holds it, as positions are added to the
embeddings: so all rows write the same slot, that of the common `length`, and a new prompt is laid
into the slots just behind it. A ring with room for the longest row meets no token still needed.

Source: Yu et al. (2022), "Orca: A Distributed Serving System for Transformer-Based Generative
Models", section 4.1, for the idea.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike

from jaxrl_llm import checks
from jaxrl_llm.lm import decoding
from jaxrl_llm.lm.decoding import Config, Law
from jaxrl_llm.lm.generate import checked_arguments
from jaxrl_llm.nn.gpt2 import GPT2, init_cache
from jaxrl_llm.types import Array, Key, KVCache, PyTree, TokenBatch


@struct.dataclass(kw_only=True)
class State:
    """`R` rows to be written, some of them in the `C` slots, the first ones done.

    Attributes:
      cache: the ring, `[C, ...]`; its `length` is the place to be written next.
      row: `[C]` int32, which row a slot is writing.
      step: `[C]` int32, tokens it has written.
      newest: `[C]` int32, not yet read.
      ended: `[C]` bool, whether the slot is free.
      seen: `[C, V]` bool, tokens of the row so far; None without a repetition penalty.
      next_row: `[]` int32, the first row that no slot has taken.
      tokens: `[R, N]` int32, as in `decoding.State`.
      mask: `[R, N]` bool.
      log_probability: `[R, N]` float32.
    """

    cache: KVCache
    row: Array
    step: Array
    newest: Array
    ended: Array
    seen: Array | None
    next_row: Array
    tokens: Array
    mask: Array
    log_probability: Array


def generate(
    model: GPT2,
    params: PyTree,
    tokens: ArrayLike,
    attention_mask: ArrayLike | None,
    key: Key,
    config: Config,
    *,
    num_slots: int = 32,
    num_refilled: int | None = None,
) -> TokenBatch:
    """`generate.generate`, whose arguments, result and errors these are, through a few slots.

    Args:
      num_slots: rows written at a time, `C`.
      num_refilled: slots refilled at a time, as soon as so many are free; a quarter by default.
    """
    checks.at_least("num_slots", num_slots, 1)
    num_refilled = max(1, num_slots // 4) if num_refilled is None else num_refilled
    checks.between("num_refilled", num_refilled, 1, num_slots)
    prompt, mask = checked_arguments(model, tokens, attention_mask, key, config)
    static, law = decoding.split(config)
    batch = _rollout(model, params, prompt, mask, key, static, law, num_slots, num_refilled)
    extra = prompt.shape[1] - np.shape(tokens)[1]
    return jax.tree.map(lambda leaf: leaf[:, extra:], batch)


def rollout(
    model: GPT2,
    params: PyTree,
    tokens: Array,
    attention_mask: Array,
    key: Key,
    config: Config,
    law: Law,
    num_slots: int,
    num_refilled: int,
) -> TokenBatch:
    """`decoding.rollout` through `num_slots` slots; prompts are at least 2 wide, with padding."""
    num_prompts = len(tokens)
    num_rows = num_prompts * config.num_samples
    params = decoding.cast(params, model.dtype)
    real = attention_mask > 0
    uniform = decoding.uniform_numbers(key, num_prompts, config.num_samples, config.max_new_tokens)
    write = partial(_write, model, params, config, law, uniform)
    refill = partial(_refill, model, params, config, tokens, real, num_refilled)

    def some_wait(state: State) -> Array:
        return state.next_row < num_rows

    def runs_on(state: State) -> Array:
        too_few_free = jnp.sum(state.ended) < num_refilled
        return ~jnp.all(state.ended) & (too_few_free | ~some_wait(state))

    def turn(state: State) -> State:
        return jax.lax.while_loop(runs_on, write, refill(state))

    begin = _begin(model, config, law, num_rows, num_slots, tokens.shape[1])
    state = jax.lax.while_loop(some_wait, turn, begin)
    written = state.tokens, state.mask, state.log_probability
    return decoding.as_batch(config, tokens, attention_mask, *written)


_rollout = jax.jit(rollout, static_argnames=("model", "config", "num_slots", "num_refilled"))


def _begin(
    model: GPT2, config: Config, law: Law, num_rows: int, num_slots: int, width: int
) -> State:
    """Every slot free."""
    shape = (num_rows, config.max_new_tokens)
    zeros = jnp.zeros(num_slots, jnp.int32)
    has_penalty = decoding.has_penalty(law)
    return State(
        # Of a prompt's tokens the last is read as a response's are, when the first is drawn.
        cache=init_cache(model.config, num_slots, width - 1 + shape[1], model.dtype),
        row=zeros,
        step=zeros,
        newest=zeros,
        ended=jnp.ones(num_slots, bool),
        seen=jnp.zeros((num_slots, model.config.vocab_size), bool) if has_penalty else None,
        next_row=jnp.int32(0),
        tokens=jnp.full(shape, decoding.pad_token(model.config), jnp.int32),
        mask=jnp.zeros(shape, bool),
        log_probability=jnp.zeros(shape),
    )


def _refill(
    model: GPT2,
    params: PyTree,
    config: Config,
    tokens: Array,
    real: Array,
    num_refilled: int,
    state: State,
) -> State:
    """The next rows in free slots, their prompts but for the last token read."""
    num_slots, num_rows = len(state.ended), len(state.tokens)
    (slots,) = jnp.nonzero(state.ended, size=num_refilled, fill_value=num_slots)
    row = state.next_row + jnp.arange(num_refilled)
    # A slot out of range is written nowhere.
    slots = jnp.where(row < num_rows, slots, num_slots)
    row = jnp.minimum(row, num_rows - 1)
    prompt, is_real = tokens[row // config.num_samples], real[row // config.num_samples]

    width = prompt.shape[1] - 1
    read = init_cache(model.config, num_refilled, width, model.dtype)
    _, read = decoding.read(model, params, prompt[:, :-1], is_real[:, :-1], read)
    cache = state.cache
    size = cache.mask.shape[1]
    place = (cache.length - width + jnp.arange(width)) % size

    def lay(ring: Array, new: Array) -> Array:
        new = new.transpose(0, 2, 1, 3)
        return ring.at[slots[:, None], :, place[None, :]].set(new, mode="drop")

    def put(leaf: Array, new: Array | bool | int) -> Array:
        return leaf.at[slots].set(new, mode="drop")

    seen = state.seen
    if seen is not None:
        seen = put(seen, decoding.tokens_seen(prompt, is_real, model.config.vocab_size))
    is_held = jnp.zeros((num_refilled, size), bool).at[:, place].set(read.mask)
    return dataclasses.replace(
        state,
        cache=KVCache(
            keys=jax.tree.map(lay, cache.keys, read.keys),
            values=jax.tree.map(lay, cache.values, read.values),
            mask=put(cache.mask, is_held),
            length=cache.length,
        ),
        row=put(state.row, row),
        step=put(state.step, 0),
        newest=put(state.newest, prompt[:, -1]),
        ended=put(state.ended, False),
        seen=seen,
        next_row=state.next_row + jnp.sum(slots < num_slots),
    )


def _write(
    model: GPT2, params: PyTree, config: Config, law: Law, uniform: Array, state: State
) -> State:
    """One token more in every slot that has not ended."""
    runs = ~state.ended
    logits, cache = decoding.read(model, params, state.newest[:, None], runs[:, None], state.cache)
    cache = dataclasses.replace(cache, length=cache.length % cache.mask.shape[1])
    stop_tokens = decoding.end_tokens(model, config.stop_tokens)
    draw = jax.vmap(partial(decoding.draw, config, law, stop_tokens))
    token, log_probability = draw(logits, state.seen, uniform[state.row, state.step], state.step)

    row = jnp.where(runs, state.row, len(state.tokens))

    def put(leaf: Array, new: Array) -> Array:
        return leaf.at[row, state.step].set(new, mode="drop")

    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].max(runs)
    is_last = state.step == config.max_new_tokens - 1
    return dataclasses.replace(
        state,
        cache=cache,
        step=state.step + runs,
        newest=token,
        ended=state.ended | is_last | decoding.among(stop_tokens, token),
        seen=seen,
        tokens=put(state.tokens, token),
        mask=put(state.mask, runs),
        log_probability=put(state.log_probability, log_probability),
    )
