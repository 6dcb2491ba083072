"""Direct preference optimisation: a policy learnt from pairs of responses, without a reward model.

    algorithm = make(config, model)
    pairs = with_reference(config, model, reference, pairs)
    state = start(config, params, order_key)
    state, metrics = algorithm.step(step_key, state, pairs)

Pairs are `Responses` with K = 2, all of them on the device. `score[:, 0]` is how probably the first
is the better one: 1, 0, or 0.5 in a tie; where there is no score the first was chosen. The loss of
a pair is its expectation over who was the better one. Both responses go through the model in one
batch. The reference's log-probabilities are computed once by `with_reference`; pairs without them
are compared with the trunk of the policy itself, where only adapters learn.

Source: Rafailov et al. (2023), "Direct Preference Optimization: Your language model is secretly a
  reward model", arXiv:2305.18290; of the other losses see `kernels.preferences`. IPO is of sums
  over tokens, as its paper has it. Difference from KTO's paper: the point of reference is the mean
  log ratio of the responses of the step themselves, 0 where it is negative, without a gradient,
  rather than that of responses paired with the prompts of others, which would take another pass
  through both models.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.kernels import preferences
from jaxrl_llm.lm import optimizer
from jaxrl_llm.lm.accumulation import gradient_of_sum
from jaxrl_llm.lm.likelihood import response_likelihood
from jaxrl_llm.lm.order import State, next_batch
from jaxrl_llm.nn import adapters
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.types import Algorithm, Array, Key, Mean, PyTree, Responses

Loss = Literal["dpo", "ipo", "kto", "simpo", "orpo"]

_REFERENCE_FREE: tuple[Loss, ...] = ("simpo", "orpo")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the policy learns by, how long and on how much."""

    num_steps: int = 500
    """Optimiser steps."""
    batch_size: int = 16
    """Pairs a step."""
    num_micro_batches: int = 1
    """Parts that a step's pairs go through the model in, one after another: the same gradient."""
    loss: Loss = "dpo"
    """Of a pair. SimPO and ORPO have no reference, and KTO would not need pairs."""
    beta: float = 0.1
    """The coefficient of the KL divergence in dpo, ipo (its tau) and kto; the scale of averages in
    simpo, 2 to 2.5 in its paper; the weight of the odds ratio in orpo (its lambda)."""
    label_smoothing: float = 0.0
    """How often a preference is taken to be wrong, in [0, 0.5)."""
    simpo_margin: float = 1.0
    """By how much the scaled averages of simpo should differ (its gamma)."""
    chunk_size: int | None = 1024
    """Tokens whose logits exist at a time; None for all of a part, faster where they fit."""
    optimizer: optimizer.Config = field(
        default_factory=lambda: replace(optimizer.ADAM, learning_rate=1e-4)
    )

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless steps can be taken."""
        for name in ("num_steps", "batch_size", "num_micro_batches"):
            checks.at_least(name, getattr(self, name), 1)
        checks.divisible("batch_size", self.batch_size, "num_micro_batches", self.num_micro_batches)
        checks.one_of("loss", self.loss, get_args(Loss))
        checks.positive("beta", self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            remedy = "it must be at least 0 and less than 0.5"
            raise ValueError(f"label_smoothing is {self.label_smoothing}; {remedy}")
        checks.at_least("simpo_margin", self.simpo_margin, 0)
        if self.chunk_size is not None:
            checks.at_least("chunk_size", self.chunk_size, 1)
        self.optimizer.validate()
        if self.optimizer.trainable == "heads":
            remedy = "preferences have no values to learn from: train all, adapter or lora"
            raise ValueError(f"optimizer.trainable is heads; {remedy}")


@struct.dataclass(kw_only=True)
class Pairs:
    """What a loss reads of pairs, `[G, 2]` each but the last.

    Attributes:
      log_probability: of whole responses, the sum over their tokens, nats.
      reference_log_probability: the same under the reference; 0 where the loss has none.
      length: tokens of the response, at least 1.
      kl: `[]`, KTO's point of reference, nats.
    """

    log_probability: Array
    reference_log_probability: Array
    length: Array
    kl: Array

    @property
    def swapped(self) -> Pairs:
        """The second first."""
        return replace(
            self,
            log_probability=jnp.flip(self.log_probability, axis=1),
            reference_log_probability=jnp.flip(self.reference_log_probability, axis=1),
            length=jnp.flip(self.length, axis=1),
        )


def with_reference(
    config: Config, model: GPT2, reference: PyTree, pairs: Responses, *, batch_size: int = 64
) -> Responses:
    """`pairs` with the log-probabilities of the reference policy, computed once and for all.

    Args:
      config: of the run.
      model: of `reference`.
      reference: parameters of the policy to stay near, used as they are, adapters included.
      pairs: `[G, 2, ...]`.
      batch_size: pairs that go through the model at a time.
    """
    checks.at_least("batch_size", batch_size, 1)
    log_probability = _in_batches(config.chunk_size, model, reference, pairs, batch_size)
    return replace(pairs, reference_log_probability=log_probability)


def make(config: Config, model: GPT2) -> Algorithm:
    """Preference optimisation of `model`; `init` draws its parameters, `step` takes the pairs too.

    Raises:
      ValueError: for a setting out of range; at the first step, for pairs without log-probabilities
        of the reference where the policy's trunk is none, as it learns.
    """
    config.validate()
    model = model.clone(value_width=None)

    def init(key: Key) -> State:
        params_key, order_key = jax.random.split(key)
        params = model.init(params_key, jnp.zeros((1, 1), jnp.int32))["params"]
        return start(config, params, order_key)

    def step(key: Key, state: State, pairs: Responses) -> tuple[State, dict[str, Mean]]:
        del key  # nothing is drawn
        return update(config, model, state, next_batch(state, config.batch_size, pairs))

    return Algorithm(init=init, step=step)


def start(config: Config, params: PyTree, key: Key) -> State:
    """A policy that has `params`, before its first step; `key` orders the pairs."""
    return State(train=optimizer.start(config.optimizer, config.num_steps, params), order_key=key)


def update(
    config: Config, model: GPT2, state: State, batch: Responses
) -> tuple[State, dict[str, Mean]]:
    """One optimiser step on `batch`."""
    gradient, metrics = gradient_of_mean(config, model, state.train.params, batch)
    train, norm = optimizer.descend(config.optimizer, config.num_steps, state.train, gradient)
    return replace(state, train=train), {**metrics, "gradient_norm": norm}


def gradient_of_mean(
    config: Config, model: GPT2, params: PyTree, batch: Responses
) -> tuple[PyTree, dict[str, Mean]]:
    """The gradient of the mean loss of the pairs of `batch`, and what to report."""
    num_pairs, num_responses = batch.tokens.shape[:2]
    if num_responses != 2:
        raise ValueError(f"pairs have {num_responses} responses to a prompt; give 2")
    batch = _compared_with_trunk(config, model, params, batch)
    kl = mean_log_ratio(config, model, params, batch) if config.loss == "kto" else jnp.zeros(())

    def total(params: PyTree, part: Responses) -> tuple[Array, dict[str, Mean]]:
        params = optimizer.freeze(params, config.optimizer.trainable)
        pairs = summarise(config, model, params, part, kl)
        preferred = preference(part)
        losses = expected_loss(config, pairs, preferred)
        return jnp.sum(losses) / num_pairs, {
            "loss": Mean.of(losses),
            **_report(config, pairs, preferred),
        }

    return gradient_of_sum(total, params, batch, config.num_micro_batches)


def preference(pairs: Responses) -> Array:
    """How probably the first of each pair is the better one, `[G]`."""
    return jnp.ones(pairs.tokens.shape[0]) if pairs.score is None else pairs.score[:, 0]


def summarise(
    config: Config, model: GPT2, params: PyTree, responses: Responses, kl: Array
) -> Pairs:
    """What the loss reads of `responses`."""
    likelihood = response_likelihood(model, params, responses, chunk_size=config.chunk_size)
    log_probability = jnp.sum(likelihood.log_probability, axis=-1)
    reference = responses.reference_log_probability
    return Pairs(
        log_probability=log_probability,
        reference_log_probability=(
            jnp.zeros_like(log_probability) if reference is None else jnp.sum(reference, axis=-1)
        ),
        length=jnp.maximum(jnp.sum(responses.response_mask, axis=-1), 1),
        kl=kl,
    )


def expected_loss(config: Config, pairs: Pairs, preferred: Array) -> Array:
    """p loss(first, second) + (1 - p) loss(second, first), `[G]`, p smoothed."""
    p = preferred + config.label_smoothing * (1 - 2 * preferred)
    return p * loss(config, pairs) + (1 - p) * loss(config, pairs.swapped)


def loss(config: Config, pairs: Pairs) -> Array:
    """The loss of each pair whose first response is the better one, `[G]`."""
    chosen, rejected = pairs.log_probability.T
    reference_chosen, reference_rejected = pairs.reference_log_probability.T
    average_chosen, average_rejected = (pairs.log_probability / pairs.length).T
    four = chosen, rejected, reference_chosen, reference_rejected
    match config.loss:
        case "dpo":
            return preferences.dpo_loss(*four, config.beta)
        case "ipo":
            return preferences.ipo_loss(*four, config.beta)
        case "kto":
            desirable = jnp.broadcast_to(jnp.array([True, False]), pairs.log_probability.shape)
            beside = pairs.reference_log_probability
            of_each = preferences.kto_loss(
                pairs.log_probability, beside, desirable, pairs.kl, config.beta
            )
            return jnp.mean(of_each, axis=1)
        case "simpo":
            return preferences.simpo_loss(
                average_chosen, average_rejected, config.beta, margin=config.simpo_margin
            )
        case "orpo":
            return preferences.orpo_loss(average_chosen, average_rejected, config.beta)


def implicit_reward(config: Config, pairs: Pairs) -> Array:
    """The reward that the policy has made its own, `[G, 2]`.

    It is beta log(pi / ref), or beta times the mean log-probability of a token without a reference.
    """
    if config.loss in _REFERENCE_FREE:
        return config.beta * pairs.log_probability / pairs.length
    return preferences.implicit_reward(
        pairs.log_probability, pairs.reference_log_probability, config.beta
    )


def mean_log_ratio(config: Config, model: GPT2, params: PyTree, batch: Responses) -> Array:
    """The mean of log(pi / ref) over the responses of all of `batch`, `[]`, without a gradient.

    One pass through the model more, since every micro-batch needs what all of them make up.
    """
    drawn = _in_batches(
        config.chunk_size,
        model,
        jax.lax.stop_gradient(params),
        batch,
        batch.tokens.shape[0] // config.num_micro_batches,
    )
    assert batch.reference_log_probability is not None
    return jnp.mean(jnp.sum(drawn - batch.reference_log_probability, axis=-1))


def _report(config: Config, pairs: Pairs, preferred: Array) -> dict[str, Mean]:
    """How implicit rewards agree with what was preferred, ties not counted; and likelihoods."""
    reward = implicit_reward(config, pairs)
    sign = jnp.sign(2 * preferred - 1)
    margin = sign * (reward[:, 0] - reward[:, 1])
    first, second = pairs.log_probability.T
    return {
        "reward_margin": Mean.of(margin, sign != 0),
        "accuracy": Mean.of((1 + jnp.sign(margin)) / 2, sign != 0),
        "chosen_log_probability": Mean.of(preferred * first + (1 - preferred) * second),
        "rejected_log_probability": Mean.of(preferred * second + (1 - preferred) * first),
    }


def _compared_with_trunk(
    config: Config, model: GPT2, params: PyTree, batch: Responses
) -> Responses:
    """`batch` with the log-probabilities of the policy's trunk, if it needs and lacks some."""
    if config.loss in _REFERENCE_FREE or batch.reference_log_probability is not None:
        return batch
    if config.optimizer.trainable == "all":
        remedy = "add them by with_reference, or train adapter or lora, beside a trunk that stays"
        raise ValueError(f"pairs.reference_log_probability is None; {remedy}")
    part_size = batch.tokens.shape[0] // config.num_micro_batches
    trunk = jax.lax.stop_gradient(adapters.trunk(params))
    beside = _in_batches(config.chunk_size, model, trunk, batch, part_size)
    return replace(batch, reference_log_probability=beside)


def _log_probability(
    chunk_size: int | None, model: GPT2, params: PyTree, pairs: Responses, batch_size: int
) -> Array:
    """Of each token, `[G, 2, N]`, `batch_size` pairs at a time."""
    num_pairs = pairs.tokens.shape[0]
    batch_size = min(batch_size, num_pairs)
    num_batches = -(-num_pairs // batch_size)
    # The last batch is filled up with the last pair.
    rows = jnp.minimum(jnp.arange(num_batches * batch_size), num_pairs - 1)

    def of_batch(rows: Array) -> Array:
        batch = jax.tree.map(lambda leaf: leaf[rows], pairs)
        return response_likelihood(model, params, batch, chunk_size=chunk_size).log_probability

    results = jax.lax.map(of_batch, rows.reshape(num_batches, batch_size))
    return results.reshape(-1, *results.shape[2:])[:num_pairs]


_in_batches = jax.jit(_log_probability, static_argnames=("chunk_size", "model", "batch_size"))
