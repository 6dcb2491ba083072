"""What policies learn from: prompts answered by the policy, scored, beside a frozen reference.

`start` makes the state that on-policy algorithms share, `make_task` what they learn on, `collect`
one batch of experience. All of it is for use inside the one program of an iteration.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.kernels import policy_gradient
from jaxrl_llm.lm import decoding, generate
from jaxrl_llm.lm.likelihood import response_likelihood
from jaxrl_llm.lm.order import next_rows
from jaxrl_llm.lm.rewards import Reward
from jaxrl_llm.nn import adapters
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.types import Array, Key, Mean, PyTree, Responses, TokenBatch, TrainState


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a policy is asked.

    Tokens are drawn from its whole vocabulary: a law that is cut (top-k, top-p) is not the one
    whose probabilities the loss computes.
    """

    num_prompts: int = 32
    """Prompts an iteration."""
    num_samples: int = 1
    """Responses a prompt, a group."""
    max_new_tokens: int = 64
    """Tokens a response may have."""
    stop_tokens: tuple[int, ...] | None = None
    """Each ends a response, and belongs to it; the model's eos_token_id by default."""
    temperature: float = 1.0
    """Divides the logits: of the law that draws, of the one that learns and of the reference."""
    missing_end_penalty: float = 0.0
    """Taken from the score of a response that no stop token ended."""
    chunk_size: int | None = None
    """Tokens whose logits exist at a time; None for all of a part, faster where they fit."""

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless responses can be drawn."""
        for name in ("num_prompts", "num_samples", "max_new_tokens"):
            checks.at_least(name, getattr(self, name), 1)
        checks.positive("temperature", self.temperature)
        checks.at_least("missing_end_penalty", self.missing_end_penalty, 0)
        if self.chunk_size is not None:
            checks.at_least("chunk_size", self.chunk_size, 1)

    @property
    def num_responses(self) -> int:
        """Responses an iteration."""
        return self.num_prompts * self.num_samples

    @property
    def decoding(self) -> decoding.Config:
        """The same for the decoder."""
        return decoding.Config(
            max_new_tokens=self.max_new_tokens,
            num_samples=self.num_samples,
            stop_tokens=self.stop_tokens,
            temperature=self.temperature,
        )


@struct.dataclass(kw_only=True)
class Task:
    """What a policy learns on: the data of every step.

    Attributes:
      prompts: `[M, P]`, padded on the left.
      reference: parameters of the policy to stay near; None for the trunk of the one that learns,
        which is the reference where only adapters learn, and shares its arrays.
      reward: parameters of the reward.
      text: `[M', L]`, for a language-modelling term; None without one.
    """

    prompts: TokenBatch
    reference: PyTree | None
    reward: PyTree
    text: TokenBatch | None = None

    def reference_of(self, params: PyTree) -> PyTree:
        """The parameters of the reference, beside a policy that has `params`."""
        return adapters.trunk(params) if self.reference is None else self.reference


@struct.dataclass(kw_only=True)
class State:
    """A policy that learns.

    Attributes:
      train: its parameters, value head included, and their optimiser.
      order_key: of the order of the prompts.
      iteration: `[]` int32, from 0.
      mix: of the reward's `Mix`, such as a Lagrange multiplier.
      controller: what the algorithm itself adapts between iterations.
    """

    train: TrainState
    order_key: Key
    iteration: Array
    mix: PyTree
    controller: PyTree


class Experience(NamedTuple):
    """Of one iteration: scored responses, the reward's next mix, and what to report."""

    responses: Responses
    mix: PyTree
    metrics: dict[str, Mean]


def make_task(
    config: Config,
    model: GPT2,
    prompts: TokenBatch,
    *,
    reference: PyTree | None,
    reward: PyTree = None,
    text: TokenBatch | None = None,
) -> Task:
    """A checked task; arguments are the attributes of `Task`.

    Raises:
      ValueError: if a prompt is empty, not padded on the left, or leaves no room in the context for
        `config.max_new_tokens`.
    """
    tokens, mask = generate.checked_prompt(
        model, prompts.tokens, prompts.attention_mask, config.max_new_tokens
    )
    unpadded = int(mask.any(axis=0).argmax())
    tokens, mask = tokens[:, unpadded:], mask[:, unpadded:]
    none = jnp.zeros(mask.shape, bool)
    rows = TokenBatch(
        tokens=jnp.asarray(tokens), attention_mask=jnp.asarray(mask), response_mask=none
    )
    if reference is not None:
        reference = adapters.trunk(reference)
    return Task(prompts=rows, reference=reference, reward=reward, text=text)


def start(train: TrainState, key: Key, reward: Reward, controller: PyTree = ()) -> State:
    """A policy before its first iteration; `key` is that of the order of its prompts."""
    return State(
        train=train,
        order_key=key,
        iteration=jnp.int32(0),
        mix=reward.mix.init(),
        controller=controller,
    )


def collect(
    config: Config,
    model: GPT2,
    reward: Reward,
    key: Key,
    state: State,
    task: Task,
) -> Experience:
    """Asks the policy `config.num_prompts` prompts, scores its responses, and the reference's view.

    The responses hold `log_probability` as it was when each token was drawn,
    `reference_log_probability`, `value` where the policy has a value head, and `score`.
    """
    params = state.train.params
    responses = draw(config, model, key, params, next_prompts(config, state, task))
    options: Any = {"temperature": config.temperature, "chunk_size": config.chunk_size}
    beside = response_likelihood(model, task.reference_of(params), responses, **options)
    responses = replace(responses, reference_log_probability=beside.log_probability)
    if model.value_width is not None:
        value = response_likelihood(model, params, responses, **options).value
        responses = replace(responses, value=value)
    responses, mix, metrics = scored(config, model, reward, state.mix, task.reward, responses)
    kl = jnp.sum(log_ratio_to_reference(responses), axis=-1)
    length = jnp.sum(responses.response_mask, axis=-1)
    return Experience(
        responses, mix, {"kl": Mean.of(kl), "response_length": Mean.of(length), **metrics}
    )


def scored(
    config: Config, model: GPT2, reward: Reward, mix: PyTree, params: PyTree, responses: Responses
) -> Experience:
    """`responses` with the score that a policy is to maximise.

    Args:
      config: with the penalty for a response that did not end.
      model: that wrote them.
      reward: scores them.
      mix: state of its `Mix`.
      params: of the reward.
      responses: to be scored.
    """
    scores = reward.score(params, responses)
    total, mix, mixing = reward.mix.combine(mix, scores)
    ended = decoding.has_ended(responses, decoding.end_tokens(model, config.stop_tokens))
    total = total - config.missing_end_penalty * ~ended
    metrics = {"score": Mean.of(total), "ended": Mean.of(ended), **mixing}
    if len(reward.criteria) > 1:
        metrics |= {
            f"score_{name}": Mean.of(scores[..., index])
            for index, name in enumerate(reward.criteria)
        }
    return Experience(replace(responses, score=total), mix, metrics)


def next_prompts(config: Config, state: State, task: Task) -> TokenBatch:
    """The prompts of the iteration that `state` is at, `[num_prompts, P]`."""
    num_rows = task.prompts.tokens.shape[0]
    rows = next_rows(state.order_key, state.iteration, config.num_prompts, num_rows)
    return jax.tree.map(lambda leaf: leaf[rows], task.prompts)


def draw(config: Config, model: GPT2, key: Key, params: PyTree, prompts: TokenBatch) -> Responses:
    """`config.num_samples` responses to each of `prompts` `[G, P]`."""
    tokens, attention_mask = prompts.tokens, prompts.attention_mask
    batch = decoding.rollout(model, params, tokens, attention_mask, key, config.decoding)
    groups = (tokens.shape[0], config.num_samples, -1)
    response = slice(tokens.shape[1], None)
    log_probability = batch.log_probability
    assert log_probability is not None  # the tokens were drawn
    return Responses(
        tokens=batch.tokens.reshape(groups),
        attention_mask=batch.attention_mask.reshape(groups),
        response_mask=batch.response_mask[:, response].reshape(groups),
        log_probability=log_probability[:, response].reshape(groups),
    )


def log_ratio_to_reference(responses: Responses) -> Array:
    """k1 = log pi - log ref of every drawn token, `[G, K, N]`; it sums to that of the response."""
    drawn, reference = responses.log_probability, responses.reference_log_probability
    assert drawn is not None
    assert reference is not None
    return policy_gradient.kl_k1(drawn, reference)
