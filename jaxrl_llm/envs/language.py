"""Writing as a Markov decision process: the state is what stands there, an action the next token.

For any vocabulary and length; where both are tiny, `token_mdp` has the exact answers. A row is laid
out as in `types.Responses`: a prompt of `P` tokens, padded on the left, then a response of at most
`N` tokens, padded on the right; `L` = `P` + `N`. The transition is certain: only the prompt, and
the policy, are random.

A response ends with the end token or with its `N`th token, and BOTH terminate. The limit is not a
timeout that cuts an episode short: the task is to write at most `N` tokens, the response is
complete and judged as it stands, and nothing could be earned after it, so there is no value to
bootstrap from. The observation shows how many places are left, so the process stays Markov.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike

from jaxrl_llm import checks
from jaxrl_llm.types import Array, Box, Discrete, Environment, Key, TimeStep

Reward = Callable[[Array, Array], Array]
Observation = Literal["one_hot", "tokens"]


@struct.dataclass(kw_only=True)
class Prompts:
    """What `reset` draws from, uniformly; `P` is the longest.

    Attributes:
      tokens: `[G, P]` int32.
      attention_mask: `[G, P]` bool, False on the padding, on the left.
    """

    tokens: Array
    attention_mask: Array


@struct.dataclass(kw_only=True)
class Writing:
    """A prompt and what has been written after it.

    Attributes:
      tokens: `[L]` int32, 0 where nothing stands.
      attention_mask: `[L]` bool, True on what stands there.
      length: `[]` int32, of the response so far.
      prompt: `[]` int32, which one.
    """

    tokens: Array
    attention_mask: Array
    length: Array
    prompt: Array


def make(
    reward: Reward,
    prompts: ArrayLike,
    *,
    vocab_size: int,
    max_new_tokens: int,
    end_token: int | None = None,
    prompt_mask: ArrayLike | None = None,
    observation: Observation = "one_hot",
    name: str = "language",
) -> Environment:
    """An environment of one writer; the reward comes with the last token and is 0 before.

    >>> import jax, jax.numpy as jnp
    >>> environment = make(lambda tokens, mask: jnp.sum(tokens * mask), [[2]],
    ...                    vocab_size=3, max_new_tokens=2)
    >>> state, seen = environment.reset(jax.random.key(0), environment.default_params)
    >>> seen.tolist()
    [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]

    Args:
      reward: `(tokens [L], attention_mask [L]) -> []`, in JAX, of a prompt with its complete
        response. It is also called, and not counted, before the response is complete.
      prompts: `[G, P]` integer, at least one; a reset takes each with the same probability.
      vocab_size: V, the number of actions.
      max_new_tokens: N.
      end_token: ends a response, and is part of it; only the limit does when None.
      prompt_mask: `[G, P]` bool, False on the padding, on the left; nothing is padded when None.
      observation: "one_hot", `[L * V]`, a block of V numbers a place, all 0 where nothing stands;
        or "tokens", `[L]`, token + 1, and 0 where nothing stands, for networks that embed.
      name: for messages.

    Returns:
      An `Environment` whose state is a `Writing` and whose parameters are `Prompts`.

    Raises:
      ValueError: for a setting out of range, a prompt that is empty, padded on the right or holds a
        token out of range, or a reward that is not one number.
    """
    checks.at_least("vocab_size", vocab_size, 2)
    checks.at_least("max_new_tokens", max_new_tokens, 1)
    checks.one_of("observation", observation, ("one_hot", "tokens"))
    if end_token is not None:
        checks.between("end_token", end_token, 0, vocab_size - 1)
    default_params = _prompts(prompts, prompt_mask, vocab_size)
    prompt_length = default_params.tokens.shape[1]
    row_length = prompt_length + max_new_tokens
    _check_reward(reward, row_length)

    def observe(state: Writing) -> Array:
        if observation == "tokens":
            return jnp.where(state.attention_mask, state.tokens + 1, 0).astype(jnp.float32)
        kept = jax.nn.one_hot(state.tokens, vocab_size) * state.attention_mask[:, None]
        return kept.reshape(-1)

    def reset(key: Key, params: Prompts) -> tuple[Writing, Array]:
        prompt = jax.random.randint(key, (), 0, params.tokens.shape[0])
        state = Writing(
            tokens=jnp.pad(params.tokens[prompt], (0, max_new_tokens)),
            attention_mask=jnp.pad(params.attention_mask[prompt], (0, max_new_tokens)),
            length=jnp.int32(0),
            prompt=prompt,
        )
        return state, observe(state)

    def step(key: Key, state: Writing, action: Array, params: Prompts) -> tuple[Writing, TimeStep]:
        place = prompt_length + state.length
        state = Writing(
            tokens=state.tokens.at[place].set(action.astype(jnp.int32)),
            attention_mask=state.attention_mask.at[place].set(True),
            length=state.length + 1,
            prompt=state.prompt,
        )
        complete = state.length >= max_new_tokens
        if end_token is not None:
            complete = complete | (action == end_token)
        earned = reward(state.tokens, state.attention_mask)
        return state, TimeStep(
            observation=observe(state),
            reward=jnp.where(complete, earned, 0).astype(jnp.float32),
            terminated=complete,
            truncated=jnp.bool_(False),
            info={},
        )

    return Environment(
        name=name,
        reset=reset,
        step=step,
        default_params=default_params,
        observation_space=Box(shape=(row_length,), low=0.0, high=float(vocab_size))
        if observation == "tokens"
        else Box(shape=(row_length * vocab_size,), low=0.0, high=1.0),
        action_space=Discrete(num=vocab_size),
    )


def _prompts(prompts: ArrayLike, prompt_mask: ArrayLike | None, vocab_size: int) -> Prompts:
    tokens = np.asarray(prompts)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"prompts has shape {tokens.shape}; it must be [prompts, tokens]")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"prompts is {tokens.dtype}; it must hold integers")
    mask = np.ones(tokens.shape, bool) if prompt_mask is None else np.asarray(prompt_mask, bool)
    if mask.shape != tokens.shape:
        raise ValueError(f"prompt_mask has shape {mask.shape}; it must be {tokens.shape}")
    padded_right = ~mask[:, -1] | (mask[:, :-1] & ~mask[:, 1:]).any(axis=1)
    if padded_right.any():
        place = int(padded_right.argmax())
        shown = mask[place].astype(int).tolist()
        raise ValueError(f"prompt_mask[{place}] is {shown}; pad on the left, and leave a token")
    wrong = mask & ((tokens < 0) | (tokens >= vocab_size))
    if wrong.any():
        row, column = (int(axis) for axis in np.argwhere(wrong)[0])
        value = tokens[row, column]
        raise ValueError(f"prompts[{row}, {column}] is {value}; it must be in [0, {vocab_size})")
    return Prompts(
        tokens=jnp.asarray(np.where(mask, tokens, 0), jnp.int32),
        attention_mask=jnp.asarray(mask),
    )


def _check_reward(reward: Reward, row_length: int) -> None:
    row = jax.ShapeDtypeStruct((row_length,), jnp.int32)
    mask = jax.ShapeDtypeStruct((row_length,), jnp.bool_)
    shape = jax.tree.map(jnp.shape, jax.eval_shape(reward, row, mask))
    if shape != ():
        raise ValueError(f"reward returns shape {shape}; it must return one number, shape ()")
