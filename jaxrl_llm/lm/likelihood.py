"""How likely a language model finds the tokens of a batch: what every loss on text is made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_llm.data.tokens import next_token_targets
from jaxrl_llm.nn import gpt2
from jaxrl_llm.numerics import token_log_probabilities
from jaxrl_llm.types import Array, Key, PyTree, TokenBatch


class TokenLikelihood(NamedTuple):
    """Of the tokens of a batch, each at its own place, `[B, L]`; 0 where `mask` is False.

    Attributes:
      log_probability: of the token given those before it, nats.
      entropy: of the law that predicts it, nats.
      mask: bool, the response tokens that have a predecessor to be predicted from.
    """

    log_probability: Array
    entropy: Array
    mask: Array


def token_likelihood(
    model: gpt2.GPT2,
    params: PyTree,
    batch: TokenBatch,
    *,
    temperature: Array | float = 1.0,
    chunk_size: int | None = 1024,
    dropout_key: Key | None = None,
) -> TokenLikelihood:
    """log pi(x_t | x_<t) and the entropy of pi(· | x_<t) for every token that `batch` counts.

    Args:
      model: of `params`.
      params: of `model`.
      batch: `[B, L]`, padded on either side or packed.
      temperature: of pi, the one that the tokens were drawn at.
      chunk_size: as in `numerics.token_log_probabilities`.
      dropout_key: drops out; None does not, as scoring must not.
    """
    options: dict[str, Any] = {"attention_mask": batch.attention_mask, "segment": batch.segment}
    if dropout_key is not None:
        options |= {"deterministic": False, "rngs": {"dropout": dropout_key}}
    hidden: Any = model.apply({"params": params}, batch.tokens, **options, method="hidden_states")
    targets, mask = next_token_targets(batch)
    # In the model's own precision, so that these are the logits it samples from.
    embedding = gpt2.output_embedding(params).astype(hidden.dtype)
    results = token_log_probabilities(
        hidden.reshape(-1, hidden.shape[-1]),
        embedding,
        targets.reshape(-1),
        temperature=temperature,
        chunk_size=chunk_size,
    )

    def at_its_token(values: Array, dtype: DTypeLike) -> Array:
        return jnp.pad(values[:, :-1], ((0, 0), (1, 0))).astype(dtype)

    log_probability, entropy = (
        at_its_token(jnp.where(mask, values.reshape(mask.shape), 0), values.dtype)
        for values in results
    )
    return TokenLikelihood(log_probability, entropy, at_its_token(mask, bool))
