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
import optax
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.lm import optimizer
from jaxrl_llm.lm.likelihood import token_likelihood
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.numerics import random_permutation
from jaxrl_llm.types import Algorithm, Array, Key, Mean, PyTree, TokenBatch, TrainState


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


@struct.dataclass(kw_only=True)
class State:
    """A learner: what it has learnt, and the root of the order in which it sees its rows."""

    train: TrainState
    order_key: Key


def make(config: Config, model: GPT2) -> Algorithm:
    """Fine-tuning of `model`; `init` draws its parameters, `step` takes the corpus as well."""

    def init(key: Key) -> State:
        params_key, start_key = jax.random.split(key)
        params = model.init(params_key, jnp.zeros((1, 1), jnp.int32))["params"]
        return start(config, params, start_key)

    def step(key: Key, state: State, corpus: TokenBatch) -> tuple[State, dict[str, Mean]]:
        batch = next_batch(config, state, corpus)
        return update(config, model, key, state, batch)

    return Algorithm(init=init, step=step)


def start(config: Config, params: PyTree, key: Key) -> State:
    """A learner that has `params`, before its first step."""
    opt_state = optimizer.make(config.optimizer, config.num_steps).init(params)
    train = TrainState(params=params, opt_state=opt_state, step=jnp.int32(0))
    return State(train=train, order_key=key)


def next_batch(config: Config, state: State, corpus: TokenBatch) -> TokenBatch:
    """The rows of the step that `state` is at, `[batch_size, L]`.

    An epoch is every row once, but for the last ones that fill no batch; a corpus shorter than a
    batch is repeated.
    """
    num_rows = corpus.tokens.shape[0]
    steps_per_epoch = max(num_rows // config.batch_size, 1)
    epoch, place = jnp.divmod(state.train.step, steps_per_epoch)
    order = random_permutation(jax.random.fold_in(state.order_key, epoch), num_rows)
    order = jnp.resize(order, (max(num_rows, config.batch_size),))
    rows = jax.lax.dynamic_slice_in_dim(order, place * config.batch_size, config.batch_size)
    return jax.tree.map(lambda leaf: leaf[rows], corpus)


def update(
    config: Config, model: GPT2, key: Key, state: State, batch: TokenBatch
) -> tuple[State, dict[str, Mean]]:
    """One optimiser step on `batch`."""
    train = state.train
    gradient, loss = gradient_of_mean(config, model, key, train.params, batch)
    updates, opt_state = optimizer.make(config.optimizer, config.num_steps).update(
        gradient, train.opt_state, train.params
    )
    params = optax.apply_updates(train.params, updates)
    train = TrainState(params=params, opt_state=opt_state, step=train.step + 1)
    norm = Mean.of(optax.tree.norm(gradient))
    return replace(state, train=train), {"loss": loss, "gradient_norm": norm}


def gradient_of_mean(
    config: Config, model: GPT2, key: Key, params: PyTree, batch: TokenBatch
) -> tuple[PyTree, Mean]:
    """The gradient of the mean negative log-likelihood a token, and that mean, of all of `batch`.

    Micro-batches add totals and counts, and are divided once at the end: a mean of their means
    would weigh a token by how few others its part happens to hold.
    """
    parts = config.num_micro_batches

    def total(params: PyTree, key: Key, part: TokenBatch) -> tuple[Array, Mean]:
        likelihood = token_likelihood(
            model,
            optimizer.freeze(params, config.optimizer.trainable),
            part,
            chunk_size=config.chunk_size,
            dropout_key=key,
        )
        loss = Mean.of(-likelihood.log_probability, likelihood.mask)
        return loss.total, loss

    def of_part(key: Key, part: TokenBatch) -> tuple[PyTree, Mean]:
        return jax.grad(total, has_aux=True)(params, key, part)

    if parts == 1:
        gradient, loss = of_part(key, batch)
    else:
        split = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)
        inputs = jax.random.split(key, parts), split
        first = jax.tree.map(lambda leaf: leaf[0], inputs)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of_part, *first)
        )

        def add(sums: PyTree, each: PyTree) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, sums, of_part(*each)), None

        (gradient, loss), _ = jax.lax.scan(add, zeros, inputs)
    count = jnp.maximum(loss.weight, 1)
    return jax.tree.map(lambda leaf: leaf / count, gradient), loss
