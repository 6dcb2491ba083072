"""How likely a language model finds the tokens of a batch: what every loss on text is made of."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_llm.data.tokens import next_token_targets
from jaxrl_llm.kernels import policy_gradient
from jaxrl_llm.nn import gpt2
from jaxrl_llm.numerics import token_log_probabilities
from jaxrl_llm.types import Array, Key, PyTree, Responses, TokenBatch


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
    hidden = _hidden_states(model, params, batch, dropout_key)
    targets, mask = next_token_targets(batch)
    results = _of_targets(params, hidden, targets, temperature, chunk_size)

    def at_its_token(values: Array, dtype: DTypeLike) -> Array:
        return jnp.pad(values[:, :-1], ((0, 0), (1, 0))).astype(dtype)

    log_probability, entropy = (
        at_its_token(jnp.where(mask, values, 0), values.dtype) for values in results
    )
    return TokenLikelihood(log_probability, entropy, at_its_token(mask, bool))


class ResponseLikelihood(NamedTuple):
    """Of the tokens of responses, `[G, K, N]`; 0 where `response_mask` is False.

    Attributes:
      log_probability: of the token given those before it, nats.
      entropy: of the law that predicts it, nats.
      value: of the state before it; None where the model, or `params`, have no value head.
    """

    log_probability: Array
    entropy: Array
    value: Array | None


def response_likelihood(
    model: gpt2.GPT2,
    params: PyTree,
    responses: Responses,
    *,
    temperature: Array | float = 1.0,
    chunk_size: int | None = 1024,
) -> ResponseLikelihood:
    """log pi(y_t | x, y_<t), the entropy of pi(· | x, y_<t) and V(x, y_<t).

    A prompt is read once for all of its responses, and no further than they attend to it. Nothing
    is dropped out: a ratio of two laws means something only where each is the same every time.

    Args:
      model: of `params`.
      params: of `model`; those of `adapters.trunk` are the reference policy.
      responses: to be scored.
      temperature: of pi, the one that the tokens were drawn at.
      chunk_size: as in `numerics.token_log_probabilities`.
    """
    before, targets = _states_before(model, params, responses), _written(responses)
    results = _of_targets(params, before, targets, temperature, chunk_size)

    def masked(values: Array) -> Array:
        mask = responses.response_mask
        return jnp.where(mask, values.reshape(mask.shape), 0)

    value = None
    if model.value_width is not None and "value_head" in params:
        value = masked(jnp.asarray(model.apply({"params": params}, before, method="value")))
    log_probability, entropy = map(masked, results)
    return ResponseLikelihood(log_probability, entropy, value)


def exact_kl(
    model: gpt2.GPT2,
    params: PyTree,
    reference: PyTree,
    responses: Responses,
    *,
    temperature: Array | float = 1.0,
) -> Array:
    """KL(pi(· | x, y_<t) || ref(· | x, y_<t)) of every state, `[G, K, N]` nats, over all tokens.

    Differentiable in `params` alone. The logits of both laws exist for a row at a time, and are
    made again in the backward pass.

    Args:
      model: of both.
      params: of pi.
      reference: of ref.
      responses: whose states count; 0 where `response_mask` is False.
      temperature: of both.
    """
    reference = jax.lax.stop_gradient(reference)
    states = [_states_before(model, each, responses) for each in (params, reference)]

    @jax.checkpoint
    def of_row(states: list[Array]) -> Array:
        pi, ref = (
            jnp.asarray(model.apply({"params": each}, state, method="logits")) / temperature
            for each, state in zip((params, reference), states, strict=True)
        )
        return jax.vmap(policy_gradient.kl_divergence)(pi, ref)

    mask = responses.response_mask
    return jnp.where(mask, jax.lax.map(of_row, states).reshape(mask.shape), 0)


def kl_to_reference(
    estimator: Literal["k2", "k3", "exact"],
    model: gpt2.GPT2,
    params: PyTree,
    reference: PyTree,
    responses: Responses,
    log_probability: Array,
    *,
    temperature: Array | float = 1.0,
) -> Array:
    """The divergence of the policy from the reference to descend at each token, `[G, K, N]` nats.

    It penalises the law of each next token, not which prefixes the policy comes to. k2 and k3 are
    right for tokens that the policy itself drew, so for the first step of an iteration, and nearly
    after it.

    Args:
      estimator: exact sums over the vocabulary, by `exact_kl`; the others are at drawn tokens.
      model: of both.
      params: of the policy.
      reference: of the reference.
      responses: with `reference_log_probability`.
      log_probability: of each token under `params`.
      temperature: of both.
    """
    if estimator == "exact":
        return exact_kl(model, params, reference, responses, temperature=temperature)
    beside = responses.reference_log_probability
    assert beside is not None
    estimate = {"k2": policy_gradient.kl_k2, "k3": policy_gradient.kl_k3}[estimator]
    return estimate(log_probability, beside)


def as_rows(responses: Responses) -> TokenBatch:
    """Prompts and responses without their groups, `[G * K, L]`."""
    size = responses.tokens.shape[-1]
    before = ((0, 0), (0, 0), (responses.prompt_length, 0))
    return TokenBatch(
        tokens=responses.tokens.reshape(-1, size),
        attention_mask=responses.attention_mask.reshape(-1, size),
        response_mask=jnp.pad(responses.response_mask, before).reshape(-1, size),
    )


def _written(responses: Responses) -> Array:
    """The tokens of the responses, without their groups, `[R, N]`."""
    written = responses.tokens[:, :, responses.prompt_length :]
    return written.reshape(-1, written.shape[-1])


def _states_before(model: gpt2.GPT2, params: PyTree, responses: Responses) -> Array:
    """What predicts each token of the responses, `[R, N, E]`.

    The last token of a prompt predicts the first of a response: those before it are shared.
    """
    states: Any = model.apply(
        {"params": params},
        responses.tokens[:, :, :-1],
        attention_mask=responses.attention_mask[:, :, :-1],
        num_shared=responses.prompt_length - 1,
        method="states_after",
    )
    return states


def _hidden_states(
    model: gpt2.GPT2, params: PyTree, batch: TokenBatch, dropout_key: Key | None
) -> Array:
    options: dict[str, Any] = {"attention_mask": batch.attention_mask, "segment": batch.segment}
    if dropout_key is not None:
        options |= {"deterministic": False, "rngs": {"dropout": dropout_key}}
    hidden: Any = model.apply({"params": params}, batch.tokens, **options, method="hidden_states")
    return hidden


def _of_targets(
    params: PyTree,
    hidden: Array,
    targets: Array,
    temperature: Array | float,
    chunk_size: int | None,
) -> tuple[Array, Array]:
    """Log-probability of `targets` `[B, T]`, and entropy, given `hidden` `[B, T, E]`."""
    # In the model's own precision, so that these are the logits it samples from.
    embedding = gpt2.output_embedding(params).astype(hidden.dtype)
    results = token_log_probabilities(
        hidden.reshape(-1, hidden.shape[-1]),
        embedding,
        targets.reshape(-1),
        temperature=temperature,
        chunk_size=chunk_size,
    )
    log_probability, entropy = (values.reshape(targets.shape) for values in results)
    return log_probability, entropy
