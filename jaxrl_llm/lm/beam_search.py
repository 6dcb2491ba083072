"""Beam search: the most likely responses, as far as a few of them at a time can tell.

    best = beam_search(model, params, tokens, attention_mask, BeamConfig(num_beams=4))

At every token each of `K` beams grows by every token of the vocabulary, and the `K` likeliest of
all that survive. One that ends with a stop token leaves its place for the next turn and is kept
beside the beams; the search is over when no beam can still become better than those kept, however
likely its remaining tokens. With one beam this is greedy decoding; with V^(N - 1) or more it is
exact. Shapes use `B` prompts of `P` tokens, `K` beams, `H` hypotheses returned, `N` new tokens.

Source: Graves (2012), "Sequence Transduction with Recurrent Neural Networks", section 2.5, with the
normalisation by length of Wu et al. (2016), "Google's Neural Machine Translation System", equation
14, simplified to a power of the length. `transformers` differs: there the best K that did not end
go on even where ended ones rank above them, and its default, `early_stopping=False`, stops once no
beam could better those kept if it ended now.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike

from jaxrl_llm import checks
from jaxrl_llm.lm import decoding
from jaxrl_llm.lm.generate import checked_prompt
from jaxrl_llm.nn.gpt2 import GPT2, init_cache
from jaxrl_llm.types import Array, KVCache, PyTree


@dataclass(frozen=True, kw_only=True)
class BeamConfig:
    """How far and how widely to search."""

    num_beams: int = 4
    """Hypotheses that grow at a time, `K`."""
    max_new_tokens: int = 64
    """Tokens a response may have, `N`."""
    length_penalty: float = 1.0
    """A response is ranked by its log-probability over its length to this power: 0 ranks by the
    log-probability itself, 1 by its mean a token; the greater, the longer the responses."""
    num_returned: int = 1
    """The best hypotheses of each prompt to return, `H`."""
    stop_tokens: tuple[int, ...] | None = None
    """Each ends a response, and belongs to it; the model's eos_token_id by default, () for none."""

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless a search can be made."""
        checks.at_least("num_beams", self.num_beams, 1)
        checks.at_least("max_new_tokens", self.max_new_tokens, 1)
        checks.finite("length_penalty", self.length_penalty)
        checks.between("num_returned", self.num_returned, 1, self.num_beams)


@struct.dataclass(kw_only=True)
class Hypotheses:
    """Responses to each prompt, the best first.

    Attributes:
      tokens: `[B, H, N]` int32, the stop token included, then the pad token.
      mask: `[B, H, N]` bool, what is written.
      score: `[B, H]`, log-probability over length^length_penalty; -inf, and nothing written, where
        fewer than `H` responses exist.
    """

    tokens: Array
    mask: Array
    score: Array


@struct.dataclass(kw_only=True)
class State:
    """A search under way.

    Attributes:
      cache: of every token of the beams but the newest, `[B * K, ...]`.
      tokens: `[B, K, N]` int32, of the beams.
      log_probability: `[B, K]`, of the beams; -inf where there is none.
      kept: the best responses that are complete, `H` = `K`.
      step: `[]` int32, tokens written.
    """

    cache: KVCache
    tokens: Array
    log_probability: Array
    kept: Hypotheses
    step: Array


def beam_search(
    model: GPT2,
    params: PyTree,
    tokens: ArrayLike,
    attention_mask: ArrayLike | None,
    config: BeamConfig,
) -> Hypotheses:
    """The best responses that a beam search finds, for the host: it checks its arguments.

    Args:
      model: of `params`.
      params: of `model`.
      tokens: `[B, P]` integers, padded on the left.
      attention_mask: `[B, P]`, True (or 1) on real tokens; None where all are.
      config: how to search.

    Raises:
      ValueError: as `generate.generate`.
    """
    config.validate()
    for token in config.stop_tokens or ():
        checks.between("stop_tokens", token, 0, model.config.vocab_size - 1)
    prompt, mask = checked_prompt(model, tokens, attention_mask, config.max_new_tokens)
    static = dataclasses.replace(config, length_penalty=0.0)
    return _search(model, params, prompt, mask, static, float(config.length_penalty))


def search(
    model: GPT2,
    params: PyTree,
    tokens: Array,
    attention_mask: Array,
    config: BeamConfig,
    length_penalty: Array | float,
) -> Hypotheses:
    """`beam_search` for use inside `jit`: `config` is static, and its own penalty is not read."""
    params = decoding.cast(params, model.dtype)
    stop_tokens = decoding.end_tokens(model, config.stop_tokens)
    last = config.max_new_tokens

    def goes_on(state: State) -> Array:
        # A log-probability only falls: the power of the length is all that can raise a score.
        length = jnp.where(length_penalty > 0, last, state.step + 1)
        bound = _score(jnp.max(state.log_probability, axis=1), length, length_penalty)
        can_win = bound > state.kept.score[:, config.num_returned - 1]
        return (state.step < last) & jnp.any(can_win)

    def grow(state: State) -> State:
        newest = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=2, keepdims=True)
        newest = newest.reshape(-1, 1)
        logits, cache = decoding.read(
            model, params, newest, jnp.ones(newest.shape, bool), state.cache
        )
        state = dataclasses.replace(state, cache=cache)
        return _extend(state, logits, stop_tokens, length_penalty)

    state = _begin(model, params, tokens, attention_mask > 0, config, stop_tokens, length_penalty)
    state = jax.lax.while_loop(goes_on, grow, state)
    is_full = state.step == last
    log_probability = jnp.where(is_full, state.log_probability, -jnp.inf)
    kept = _keep(state.kept, state.tokens, log_probability, state.step, length_penalty)
    best = jax.tree.map(lambda leaf: leaf[:, : config.num_returned], kept)
    pad = decoding.pad_token(model.config)
    return dataclasses.replace(best, tokens=jnp.where(best.mask, best.tokens, pad))


_search = jax.jit(search, static_argnames=("model", "config"))


def _begin(
    model: GPT2,
    params: PyTree,
    tokens: Array,
    real: Array,
    config: BeamConfig,
    stop_tokens: tuple[int, ...],
    length_penalty: Array | float,
) -> State:
    """Reads the prompts once, and writes the first token of every beam."""
    (num_prompts, num_tokens), num_beams = tokens.shape, config.num_beams
    num_new = config.max_new_tokens
    cache = init_cache(model.config, num_prompts, num_tokens + num_new - 1, model.dtype)
    logits, cache = decoding.read(model, params, tokens, real, cache)

    def repeat(leaf: Array) -> Array:
        return leaf if leaf.ndim == 0 else jnp.repeat(leaf, num_beams, axis=0)

    logits, cache = jax.tree.map(repeat, (logits, cache))
    nothing = jnp.zeros((num_prompts, num_beams, num_new), jnp.int32)
    none = jnp.full((num_prompts, num_beams), -jnp.inf)
    state = State(
        cache=cache,
        tokens=nothing,
        # The beams begin equal: one stands for all, or each first token would be found K times.
        log_probability=none.at[:, 0].set(0),
        kept=Hypotheses(tokens=nothing, mask=nothing > 0, score=none),
        step=jnp.int32(0),
    )
    return _extend(state, logits, stop_tokens, length_penalty)


def _extend(
    state: State, logits: Array, stop_tokens: tuple[int, ...], length_penalty: Array | float
) -> State:
    """The likeliest beams of one token more, from the logits `[B * K, V]` that follow them."""
    num_prompts, num_beams, _ = state.tokens.shape
    log_pi = jax.nn.log_softmax(logits).reshape(num_prompts, num_beams, -1)
    candidates = state.log_probability[:, :, None] + log_pi
    log_probability, choice = jax.lax.top_k(candidates.reshape(num_prompts, -1), num_beams)
    parent, newest = jnp.divmod(choice, log_pi.shape[-1])

    tokens = jnp.take_along_axis(state.tokens, parent[:, :, None], axis=1)
    tokens = jax.lax.dynamic_update_index_in_dim(tokens, newest, state.step, axis=2)
    step = state.step + 1
    ends = decoding.among(stop_tokens, newest)
    complete = jnp.where(ends, log_probability, -jnp.inf)
    rows = (jnp.arange(num_prompts)[:, None] * num_beams + parent).reshape(-1)
    return State(
        cache=jax.tree.map(lambda leaf: leaf if leaf.ndim == 0 else leaf[rows], state.cache),
        tokens=tokens,
        log_probability=jnp.where(ends, -jnp.inf, log_probability),
        kept=_keep(state.kept, tokens, complete, step, length_penalty),
        step=step,
    )


def _keep(
    kept: Hypotheses,
    tokens: Array,
    log_probability: Array,
    length: Array,
    length_penalty: Array | float,
) -> Hypotheses:
    """The best K of those kept and of complete ones of `length` tokens, -inf where none is."""
    mask = jnp.broadcast_to(jnp.arange(tokens.shape[2]) < length, tokens.shape)
    mask &= (log_probability > -jnp.inf)[:, :, None]
    score = _score(log_probability, length, length_penalty)
    new = Hypotheses(tokens=tokens, mask=mask, score=score)
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), kept, new)
    _, best = jax.lax.top_k(both.score, kept.score.shape[1])
    choose = jax.vmap(lambda leaf, index: leaf[index])
    return jax.tree.map(lambda leaf: choose(leaf, best), both)


def _score(log_probability: Array, length: Array, length_penalty: Array | float) -> Array:
    return log_probability / length.astype(jnp.float32) ** length_penalty
