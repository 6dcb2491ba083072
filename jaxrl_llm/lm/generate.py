"""Text from a language model.

    batch = generate(model, params, tokens, attention_mask, jax.random.key(0), Config(top_p=0.9))

`generate` is for the host: it checks, and rounds the prompts' length up so that few programs are
compiled. `decoding.rollout` is the pure function below it. `stream` is `generate` a few tokens at a
time. Shapes are those of `decoding`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from jaxrl_llm import checks
from jaxrl_llm.data.tokens import encode_prompt, pad
from jaxrl_llm.lm import decoding
from jaxrl_llm.lm.decoding import Config
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.types import Array, Key, PyTree, TokenBatch

SHORTEST_BUCKET = 16

HostPrompt = tuple[NDArray[np.int32], NDArray[np.bool_]]


def generate(
    model: GPT2,
    params: PyTree,
    tokens: ArrayLike,
    attention_mask: ArrayLike | None,
    key: Key,
    config: Config,
) -> TokenBatch:
    """Prompts and their responses.

    A row depends on its prompt, its key and `config` alone, never on the other rows, the padding or
    `max_new_tokens`, up to the rounding of matrix products of another size.

    Args:
      model: of `params`.
      params: of `model`.
      tokens: `[B, P]` integers, padded on the left.
      attention_mask: `[B, P]`, True (or 1) on real tokens; None where all are.
      key: `[]`, from which the key of prompt i is `fold_in(key, i)`; or `[B]`, one a prompt.
      config: how to draw.

    Returns:
      `[R, P + N]`: each prompt, followed by its response and padding. `response_mask` holds the
      response and the stop token that ended it. `log_probability` is of the law that a token was
      drawn from, cut and tempered, so that an importance ratio starts at 1; with temperature 0,
      where nothing is drawn, it is the model's own.

    Raises:
      ValueError: if a prompt is empty, not padded on the left, holds a token outside of the
        vocabulary, or leaves no room in the context for `max_new_tokens`.
    """
    prompt, mask = checked_arguments(model, tokens, attention_mask, key, config)
    static, law = decoding.split(config)
    batch = _rollout(model, params, prompt, mask, key, static, law)
    extra = prompt.shape[1] - np.shape(tokens)[1]
    return jax.tree.map(lambda leaf: leaf[:, extra:], batch)


def stream(
    model: GPT2,
    params: PyTree,
    tokens: ArrayLike,
    attention_mask: ArrayLike | None,
    key: Key,
    config: Config,
    *,
    chunk_tokens: int = 1,
) -> Iterator[tuple[Array, Array]]:
    """The responses of `generate` as they grow, `chunk_tokens` at a time.

    Yields:
      New tokens `[R, chunk_tokens]` (fewer the last time) and which of them are written, bool.
    """
    checks.at_least("chunk_tokens", chunk_tokens, 1)
    prompt, mask = checked_arguments(model, tokens, attention_mask, key, config)
    static, law = decoding.split(config)
    params = decoding.cast(params, model.dtype)
    state = _prefill(model, params, prompt, mask, key, static, law)
    for begin in range(0, config.max_new_tokens, chunk_tokens):
        end = min(begin + chunk_tokens, config.max_new_tokens)
        state = _decode(model, params, state, static, law, jnp.int32(end))
        yield state.tokens[:, begin:end], state.mask[:, begin:end]
        if bool(jnp.all(state.ended)):
            return


def bucket(length: int) -> int:
    """The least power of two, or one and a half times one, that holds `length`; at least 16."""
    power = max(SHORTEST_BUCKET, 1 << (length - 1).bit_length())
    middle = 3 * power // 4
    return middle if power > SHORTEST_BUCKET and length <= middle else power


_rollout = jax.jit(decoding.rollout, static_argnames=("model", "config"))
_prefill = jax.jit(decoding.prefill, static_argnames=("model", "config"))
_decode = jax.jit(decoding.decode, static_argnames=("model", "config"), donate_argnames=("state",))


def checked_prompt(
    model: GPT2, tokens: ArrayLike, attention_mask: ArrayLike | None, max_new_tokens: int
) -> HostPrompt:
    """The prompts and their mask as a compiled program wants them, of the width of a bucket.

    Raises:
      ValueError: as `generate`.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[1] == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens are {tokens.dtype}{list(tokens.shape)}; they must be integers [B, P], P >= 1"
        )
    mask = np.ones(tokens.shape, bool) if attention_mask is None else np.asarray(attention_mask) > 0
    if mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask is {list(mask.shape)}; it must be {list(tokens.shape)}, like tokens"
        )
    vocabulary, context = model.config.vocab_size, model.config.n_positions
    for row, (ids, real) in enumerate(zip(tokens, mask, strict=True)):
        length = int(real.sum())
        if not real[ids.size - length :].all() or length == 0:
            raise ValueError(
                f"attention_mask[{row}] has {length} real tokens, which are not the last of its "
                "row; pad prompts on the left, and begin an empty one with the end token"
            )
        if length + max_new_tokens > context:
            raise ValueError(
                f"tokens[{row}] has {length} tokens; with max_new_tokens {max_new_tokens} that is "
                f"more than the context of {context}; shorten either"
            )
        wrong = np.flatnonzero(real & ((ids < 0) | (ids >= vocabulary)))
        if wrong.size:
            place = int(wrong[0])
            raise ValueError(
                f"tokens[{row}, {place}] is {ids[place]}; it must be in [0, {vocabulary}), the "
                "vocabulary of the model"
            )
    extra = bucket(tokens.shape[1]) - tokens.shape[1]
    left = ((0, 0), (extra, 0))
    return np.pad(tokens.astype(np.int32), left), np.pad(mask, left)


def checked_arguments(
    model: GPT2, tokens: ArrayLike, attention_mask: ArrayLike | None, key: Key, config: Config
) -> HostPrompt:
    """`checked_prompt`, and the rest of the arguments of `generate` checked too."""
    config.validate()
    vocabulary = model.config.vocab_size
    for name in ("stop_tokens", "forced_tokens", "banned_tokens"):
        for token in getattr(config, name) or ():
            checks.between(name, token, 0, vocabulary - 1)
    barred, names = set(config.banned_tokens), "banned_tokens"
    if config.min_new_tokens > 0:
        barred |= set(decoding.end_tokens(model, config.stop_tokens))
        names += " and, before min_new_tokens, stop_tokens"
    if len(barred) == vocabulary:
        raise ValueError(f"{names} leave nothing of the vocabulary of {vocabulary}; ban fewer")
    prompt, mask = checked_prompt(model, tokens, attention_mask, config.max_new_tokens)
    if key.shape not in ((), prompt.shape[:1]):
        raise ValueError(
            f"key has shape {list(key.shape)}; it must be one key, or one a prompt: [{len(prompt)}]"
        )
    return prompt, mask


class Response(NamedTuple):
    """One response as text, and whether a stop token, rather than the limit, ended it."""

    text: str
    ended: bool


def respond(
    model: GPT2,
    params: PyTree,
    tokenizer: Any,
    prompts: Sequence[str],
    key: Key,
    config: Config,
    *,
    batch_size: int = 64,
) -> list[Response]:
    """Text in, text out: `config.num_samples` responses to every prompt, those of one together.

    Args:
      model: of `params`.
      params: of `model`.
      tokenizer: of the model, as `lm.tokenizer` makes it.
      prompts: any number; at most `batch_size` go through the model at a time.
      key: as in `generate`.
      config: how to draw.
      batch_size: prompts at a time; the responses do not depend on it.

    Raises:
      ValueError: if a prompt is empty; as `generate`, whose `tokens[i]` is the i-th prompt of a
        batch.
    """
    checks.at_least("batch_size", batch_size, 1)
    if not prompts:
        return []
    batch_size = min(batch_size, len(prompts))
    sequences = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    lengths = [len(sequence.tokens) for sequence in sequences]
    if 0 in lengths:
        raise ValueError(f"prompts[{lengths.index(0)}] is empty; give at least a word")
    rows = pad(sequences, max(lengths), side="left")
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(prompts)))
    stop_tokens = decoding.end_tokens(model, config.stop_tokens)
    responses: list[Response] = []
    for begin in range(0, len(prompts), batch_size):
        # The last batch is filled up with the last prompt, so that it compiles no new program.
        chosen = np.minimum(np.arange(begin, begin + batch_size), len(prompts) - 1)
        batch = generate(
            model, params, rows.tokens[chosen], rows.attention_mask[chosen], keys[chosen], config
        )
        written = np.asarray(batch.response_mask)
        for ids, mask in zip(np.asarray(batch.tokens), written, strict=True):
            kept = ids[mask].tolist()
            ended = bool(kept) and kept[-1] in stop_tokens
            text = tokenizer.decode(kept[:-1] if ended else kept)
            responses.append(Response(text, ended))
    return responses[: len(prompts) * config.num_samples]
