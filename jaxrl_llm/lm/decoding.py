"""The loop that writes text: prompts are read once, then one token a turn. Pure functions.

Shapes use `B` prompts of `P` tokens, `R` = `B` · `num_samples` rows, and `N` new tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from jaxrl_llm import checks
from jaxrl_llm.kernels import alignment, policy_gradient, sampling
from jaxrl_llm.nn.gpt2 import GPT2, GPT2Config, init_cache
from jaxrl_llm.nn.shared_prompts import widened
from jaxrl_llm.types import Array, Key, KVCache, PyTree, Responses, TokenBatch


@dataclass(frozen=True, kw_only=True)
class Config:
    """How text is drawn. What is None is off; the order is that of the fields.

    The numbers of the law (temperature to typical_p) are arguments of the compiled program: another
    temperature compiles nothing.
    """

    max_new_tokens: int = 64
    """Tokens a row may grow by."""
    min_new_tokens: int = 0
    """Until then no stop token is drawn."""
    num_samples: int = 1
    """Rows a prompt, side by side in the result; the prompt is read once."""
    stop_tokens: tuple[int, ...] | None = None
    """Each ends a row, and belongs to it; the model's eos_token_id by default, () for none."""
    forced_tokens: tuple[int, ...] = ()
    """What every response begins with."""
    banned_tokens: tuple[int, ...] = ()
    """Never drawn."""
    repetition_penalty: float | None = None
    """Makes every token of the row so far less likely, where above 1."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int | None = None
    """Draws from the k most likely tokens."""
    top_p: float | None = None
    """Draws from the fewest tokens that together have this probability."""
    min_p: float | None = None
    """Draws from the tokens this many times as likely as the most likely one."""
    typical_p: float | None = None
    """Draws from the tokens of the most typical surprise that together have this probability."""

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless tokens can be drawn."""
        checks.at_least("max_new_tokens", self.max_new_tokens, 1)
        checks.between("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)
        checks.at_least("num_samples", self.num_samples, 1)
        checks.at_least("temperature", self.temperature, 0)
        if self.repetition_penalty is not None:
            checks.positive("repetition_penalty", self.repetition_penalty)
        if self.top_k is not None:
            checks.at_least("top_k", self.top_k, 1)
        for name in ("top_p", "min_p", "typical_p"):
            if getattr(self, name) is not None:
                checks.between(name, getattr(self, name), 0, 1)
        if len(self.forced_tokens) > self.max_new_tokens:
            raise ValueError(
                f"forced_tokens are {len(self.forced_tokens)}; max_new_tokens leaves room for "
                f"{self.max_new_tokens}"
            )
        if both := set(self.forced_tokens) & set(self.banned_tokens):
            raise ValueError(f"forced_tokens and banned_tokens share {min(both)}; drop it from one")


Law = dict[str, Any]
_LAW = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p")
_CUTS = {
    "top_k": sampling.top_k,
    "top_p": sampling.top_p,
    "min_p": sampling.min_p,
    "typical_p": sampling.typical,
}


@struct.dataclass(kw_only=True)
class State:
    """Rows that are being written.

    Attributes:
      cache: of every token but the newest.
      newest: `[R]` int32, written and not yet read.
      ended: `[R]` bool, whether the row has met a stop token.
      tokens: `[R, N]` int32, the pad token where nothing is written.
      mask: `[R, N]` bool, what is written.
      log_probability: `[R, N]` float32.
      uniform: `[R, N]` float32, the random number that draws each token.
      seen: `[R, V]` bool, tokens of the row so far; None without a repetition penalty.
      step: `[]` int32, tokens written.
    """

    cache: KVCache
    newest: Array
    ended: Array
    tokens: Array
    mask: Array
    log_probability: Array
    uniform: Array
    seen: Array | None
    step: Array


def rollout(
    model: GPT2,
    params: PyTree,
    tokens: Array,
    attention_mask: Array,
    key: Key,
    config: Config,
    law: Law | None = None,
) -> TokenBatch:
    """Prompts and their responses, for use inside a larger `jit`, where `config` is static.

    Arguments and result are those of `generate.generate`, which also checks them. With `law`, the
    numbers of the law are those of it rather than of `config`, and may be traced.
    """
    if law is None:
        config, law = split(config)
    params = cast(params, model.dtype)
    state = prefill(model, params, tokens, attention_mask, key, config, law)
    state = decode(model, params, state, config, law, jnp.int32(config.max_new_tokens))
    written = state.tokens, state.mask, state.log_probability
    return as_batch(config, tokens, attention_mask, *written)


def as_batch(
    config: Config,
    tokens: Array,
    attention_mask: Array,
    response: Array,
    mask: Array,
    log_probability: Array,
) -> TokenBatch:
    """The prompts, each as often as it has rows, joined with what was written."""
    prompt = jnp.repeat(tokens, config.num_samples, axis=0)
    real = jnp.repeat(attention_mask > 0, config.num_samples, axis=0)
    nothing = jnp.zeros(prompt.shape)

    def joined(left: Array, right: Array) -> Array:
        return jnp.concatenate([left.astype(right.dtype), right], axis=1)

    return TokenBatch(
        tokens=joined(prompt, response),
        attention_mask=joined(real, mask),
        response_mask=joined(nothing, mask),
        log_probability=joined(nothing, log_probability),
    )


def prefill(
    model: GPT2,
    params: PyTree,
    tokens: Array,
    attention_mask: Array,
    key: Key,
    config: Config,
    law: Law,
) -> State:
    """Reads the prompts and draws the first token of every row."""
    num_prompts, num_tokens = tokens.shape
    num_samples, num_new = config.num_samples, config.max_new_tokens
    real = attention_mask > 0
    # Slots for the response come after, so that the prompt does not attend to them, masked or not.
    cache = init_cache(model.config, num_prompts, num_tokens, model.dtype)
    logits, cache = read(model, params, tokens, real, cache)
    cache = widened(cache, num_samples, num_new - 1)
    seen = tokens_seen(tokens, real, model.config.vocab_size) if has_penalty(law) else None
    repeat = partial(jnp.repeat, repeats=num_samples, axis=0)
    logits, seen = jax.tree.map(repeat, (logits, seen))
    num_rows = num_prompts * num_samples
    state = State(
        cache=cache,
        newest=jnp.zeros(num_rows, jnp.int32),
        ended=jnp.zeros(num_rows, bool),
        tokens=jnp.full((num_rows, num_new), pad_token(model.config), jnp.int32),
        mask=jnp.zeros((num_rows, num_new), bool),
        log_probability=jnp.zeros((num_rows, num_new)),
        uniform=uniform_numbers(key, num_prompts, num_samples, num_new),
        seen=seen,
        step=jnp.int32(0),
    )
    return _draw(state, logits, config, law, end_tokens(model, config.stop_tokens))


def decode(
    model: GPT2, params: PyTree, state: State, config: Config, law: Law, end: Array
) -> State:
    """Goes on until `end` tokens are written or every row has ended."""
    stop_tokens = end_tokens(model, config.stop_tokens)

    def goes_on(state: State) -> Array:
        return (state.step < end) & ~jnp.all(state.ended)

    def write(state: State) -> State:
        newest, runs = state.newest[:, None], ~state.ended[:, None]
        logits, cache = read(model, params, newest, runs, state.cache)
        state = dataclasses.replace(state, cache=cache)
        return _draw(state, logits, config, law, stop_tokens)

    return jax.lax.while_loop(goes_on, write, state)


def _draw(
    state: State, logits: Array, config: Config, law: Law, stop_tokens: tuple[int, ...]
) -> State:
    """Draws and records one token a row from the logits `[R, V]` that follow what is written."""
    step = state.step
    uniform = jax.lax.dynamic_index_in_dim(state.uniform, step, axis=1, keepdims=False)
    draw_each = jax.vmap(partial(draw, config, law, stop_tokens), in_axes=(0, 0, 0, None))
    token, log_probability = draw_each(logits, state.seen, uniform, step)

    runs = ~state.ended

    def put(column: Array, new: Array) -> Array:
        old = jax.lax.dynamic_index_in_dim(column, step, axis=1, keepdims=False)
        new = jnp.where(runs, new, old)
        return jax.lax.dynamic_update_index_in_dim(column, new, step, axis=1)

    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].max(runs)
    return dataclasses.replace(
        state,
        newest=token,
        ended=state.ended | among(stop_tokens, token),
        tokens=put(state.tokens, token),
        mask=put(state.mask, runs),
        log_probability=put(state.log_probability, log_probability),
        seen=seen,
        step=step + 1,
    )


def read(
    model: GPT2, params: PyTree, tokens: Array, real: Array, cache: KVCache
) -> tuple[Array, KVCache]:
    """Logits `[R, V]` of the token after `tokens` `[R, T]`, and the cache that holds these too."""
    bound: Any = model.bind({"params": params})
    hidden, cache = bound.hidden_states(tokens, attention_mask=real, cache=cache)
    return bound.logits(hidden[:, -1]), cache


def draw(
    config: Config,
    law: Law,
    stop_tokens: tuple[int, ...],
    logits: Array,
    seen: Array | None,
    uniform: Array,
    step: Array,
) -> tuple[Array, Array]:
    """Token number `step` of ONE row's response, and its log-probability.

    Args:
      config: which tokens may be drawn; the numbers of the law are those of `law`.
      law: by `split`.
      stop_tokens: by `end_tokens`.
      logits: `[V]`, of the model.
      seen: `[V]` bool, tokens of the row so far; None without a repetition penalty.
      uniform: `[]`, in [0, 1); decides.
      step: `[]` int32, from 0.
    """
    logits = _permitted(config, logits, step, stop_tokens)
    if seen is not None:
        logits = sampling.repetition_penalty(logits, seen, law["repetition_penalty"])
    if "temperature" in law:
        logits = logits / law["temperature"]
        for name, cut in _CUTS.items():
            if name in law:
                logits = cut(logits, law[name])
        token = sampling.sample(uniform, logits)
    else:
        token = sampling.greedy(logits)
    return token, policy_gradient.log_probability(logits, token)


def _permitted(config: Config, logits: Array, step: Array, stop_tokens: tuple[int, ...]) -> Array:
    """Logits `[V]`, -inf where the token may not be token number `step` of a response."""
    place = jnp.arange(logits.size)
    banned = among(config.banned_tokens, place)
    if config.min_new_tokens > 0:
        banned |= among(stop_tokens, place) & (step < config.min_new_tokens)
    if config.forced_tokens:
        forced = jnp.array(config.forced_tokens, jnp.int32)
        others = place != forced[jnp.minimum(step, len(forced) - 1)]
        banned = jnp.where(step < len(forced), others, banned)
    elif not config.banned_tokens and config.min_new_tokens == 0:
        return logits
    return sampling.banned(logits, banned)


def among(chosen: tuple[int, ...], tokens: Array) -> Array:
    """Which of `tokens` are `chosen`."""
    return jnp.isin(tokens, jnp.array(chosen, jnp.int32))


def has_ended(responses: Responses, stop_tokens: tuple[int, ...]) -> Array:
    """Whether a stop token, rather than the limit, ended each response, `[G, K]` bool."""
    written = responses.tokens[..., responses.prompt_length :]
    unfinished = partial(alignment.is_unfinished, end_tokens=stop_tokens)
    return ~jax.vmap(jax.vmap(unfinished))(written, responses.response_mask)


def has_penalty(law: Law) -> bool:
    """Whether the law depends on which tokens a row holds."""
    return "repetition_penalty" in law


def tokens_seen(tokens: Array, real: Array, vocab_size: int) -> Array:
    """Which tokens each row `[B, P]` holds, `[B, V]`; `real` is False on padding."""
    rows = jnp.arange(len(tokens))[:, None]
    return jnp.zeros((len(tokens), vocab_size), bool).at[rows, tokens].max(real)


def uniform_numbers(key: Key, num_prompts: int, num_samples: int, num_new: int) -> Array:
    """One number in [0, 1) a token, `[R, N]`: a function of key, prompt, sample and place alone."""

    def each(count: int, keys: Key) -> Key:
        folded = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        return jax.vmap(folded, in_axes=(0, None))(keys, jnp.arange(count)).reshape(-1)

    keys = each(num_samples, key if key.ndim else each(num_prompts, key[None]))
    draws = jax.vmap(jax.random.uniform)(each(num_new, keys))
    return draws.reshape(num_prompts * num_samples, num_new)


def split(config: Config) -> tuple[Config, Law]:
    """What a compiled program depends on, and the numbers that are its arguments."""
    law = {name: getattr(config, name) for name in _LAW if getattr(config, name) is not None}
    if config.temperature == 0:
        law = {name: law[name] for name in law if name == "repetition_penalty"}
    # As a program's argument an integer would be of another type than 0.9, and compile another.
    law = {name: value if name == "top_k" else float(value) for name, value in law.items()}
    return dataclasses.replace(config, **dict.fromkeys(_LAW)), law


def cast(params: PyTree, dtype: DTypeLike) -> PyTree:
    """Matrices in the dtype that the model casts them to anyway: once, not at every token."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, params)


def pad_token(config: GPT2Config) -> int:
    """What stands where nothing is written."""
    declared = (config.pad_token_id, config.eos_token_id, 0)
    return next(token for token in declared if token is not None)


def end_tokens(model: GPT2, stop_tokens: tuple[int, ...] | None) -> tuple[int, ...]:
    """Which tokens end a row, where `stop_tokens` are those of a configuration."""
    if stop_tokens is not None:
        return stop_tokens
    eos = model.config.eos_token_id
    return () if eos is None else (eos,)
