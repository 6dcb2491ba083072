"""What the heads of a reward model read: once and for all, where its trunk stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxrl_llm import checks
from jaxrl_llm.nn.reward_model import RewardModel
from jaxrl_llm.types import Array, Key, PyTree, Responses


def features(
    model: RewardModel, params: PyTree, responses: Responses, *, dropout_key: Key | None = None
) -> Array:
    """What the heads read of each response, `[G, K, F]`; prompts are read once a group.

    With a `dropout_key` each response is read with its own prompt, from which other units drop out.
    """
    groups = responses.tokens.shape[:2]
    # Where nothing drops out, the states of the tokens before a prompt's last have no reader.
    num_shared = 0 if dropout_key is not None else responses.prompt_length - 1
    masks = responses.attention_mask[:, :, num_shared:], responses.response_mask
    tokens, *masks = (
        leaf.reshape(-1, leaf.shape[-1]) for leaf in (responses.tokens[:, :, num_shared:], *masks)
    )
    apply = partial(model.apply, {"params": params})
    found: Any
    if dropout_key is not None:
        rngs = {"dropout": dropout_key}
        found = apply(tokens, *masks, deterministic=False, rngs=rngs, method="features")
    else:
        hidden = apply(
            responses.tokens,
            attention_mask=responses.attention_mask,
            num_shared=num_shared,
            method="states_after",
        )
        found = apply(hidden, tokens, *masks, method="pooled")
    return found.reshape(*groups, -1)


def with_features(
    model: RewardModel, params: PyTree, responses: Responses, *, batch_size: int = 64
) -> Responses:
    """`responses` with what the heads read of them, once and for all: for a trunk that stays.

    Heads alone then learn, and score, thousands of times as fast.
    """
    features = in_batches(partial(_features, model, params), responses, batch_size)
    return replace(responses, features=features)


def in_batches(function: Callable[..., Any], responses: Responses, batch_size: int) -> Any:
    """What `function` makes of `batch_size` prompts at a time, joined, as NumPy arrays."""
    checks.at_least("batch_size", batch_size, 1)
    num_prompts = responses.tokens.shape[0]
    batch_size = min(batch_size, num_prompts)
    parts: list[Any] = []
    for begin in range(0, num_prompts, batch_size):
        # The last batch is filled up with the last prompt, so that it compiles no new program.
        chosen = np.minimum(np.arange(begin, begin + batch_size), num_prompts - 1)
        rows = jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], responses)
        parts.append(jax.device_get(function(rows)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num_prompts], *parts)


_features = jax.jit(features, static_argnums=0)
