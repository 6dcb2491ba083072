"""Supervised fine-tuning: maximum likelihood of the responses in a corpus.

    algorithm = make(config, model)
    state = start(config, params, key)
    state, metrics = algorithm.step(step_key, state, corpus)

The corpus is a `TokenBatch` of all its rows, `[N, L]`, on the device; each step takes the next
`batch_size` of them in an order that is shuffled anew every epoch and depends on the key and the
step alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from jaxrl_llm import checks
from jaxrl_llm.lm import optimizer
from jaxrl_llm.lm.accumulation import gradient_of_sum
from jaxrl_llm.lm.likelihood import token_likelihood
from jaxrl_llm.lm.order import State, next_batch
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.types import Algorithm, Array, Key, Mean, PyTree, TokenBatch


@dataclass(frozen=True, kw_only=True)
class Config:
    """How long and on how much to train."""

    num_steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 16
    """Rows a step."""
    row_length: int = 256
    """Tokens of a row, shared by several sequences; at most the model's context."""
    num_micro_batches: int = 1
    """Parts that a step's rows go through the model in, one after another: less memory, and the
    same gradient, since its denominator is counted over the whole step."""
    chunk_size: int | None = 1024
    """Tokens whose logits exist at a time; None for all of a part, faster where they fit."""
    optimizer: optimizer.Config = optimizer.ADAMW

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless steps can be taken."""
        for name in ("num_steps", "batch_size", "row_length", "num_micro_batches"):
            checks.at_least(name, getattr(self, name), 1)
        if self.chunk_size is not None:
            checks.at_least("chunk_size", self.chunk_size, 1)
        checks.divisible("batch_size", self.batch_size, "num_micro_batches", self.num_micro_batches)
        if self.optimizer.trainable == "heads":
            remedy = "text has no values to learn from: train all, adapter or lora"
            raise ValueError(f"optimizer.trainable is heads; {remedy}")


def make(config: Config, model: GPT2) -> Algorithm:
    """Fine-tuning of `model`; `init` draws its parameters, `step` takes the corpus as well."""

    def init(key: Key) -> State:
        params_key, start_key = jax.random.split(key)
        params = model.init(params_key, jnp.zeros((1, 1), jnp.int32))["params"]
        return start(config, params, start_key)

    def step(key: Key, state: State, corpus: TokenBatch) -> tuple[State, dict[str, Mean]]:
        batch = next_batch(state, config.batch_size, corpus)
        return update(config, model, key, state, batch)

    return Algorithm(init=init, step=step)


def start(config: Config, params: PyTree, key: Key) -> State:
    """A learner that has `params`, before its first step."""
    return State(train=optimizer.start(config.optimizer, config.num_steps, params), order_key=key)


def update(
    config: Config, model: GPT2, key: Key, state: State, batch: TokenBatch
) -> tuple[State, dict[str, Mean]]:
    """One optimiser step on `batch`."""
    gradient, loss = gradient_of_mean(config, model, key, state.train.params, batch)
    train, norm = optimizer.descend(config.optimizer, config.num_steps, state.train, gradient)
    return replace(state, train=train), {"loss": loss, "gradient_norm": norm}


def gradient_of_mean(
    config: Config, model: GPT2, key: Key, params: PyTree, batch: TokenBatch
) -> tuple[PyTree, Mean]:
    """The gradient of the mean negative log-likelihood a token of `batch`, and that mean."""

    def total(params: PyTree, part: TokenBatch, key: Key) -> tuple[Array, Mean]:
        likelihood = token_likelihood(
            model,
            optimizer.freeze(params, config.optimizer.trainable),
            part,
            chunk_size=config.chunk_size,
            dropout_key=key,
        )
        loss = Mean.of(-likelihood.log_probability, likelihood.mask)
        return loss.total, loss

    gradient, loss = gradient_of_sum(total, params, batch, config.num_micro_batches, key)
    count = jnp.maximum(loss.weight, 1)
    return jax.tree.map(lambda leaf: leaf / count, gradient), loss
