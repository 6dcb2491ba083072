"""How a policy learns from one batch of responses: epochs of minibatches, each a weighted sum.

A loss is a sum over tokens of weight · loss, where the weights of a minibatch add up the mean that
the algorithm wants (a token's, a response's) over the WHOLE minibatch. So the parts that a
minibatch goes through the model in add, whatever the lengths of the responses in each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxrl_llm import checks
from jaxrl_llm.lm import optimizer
from jaxrl_llm.lm.accumulation import gradient_of_sum
from jaxrl_llm.numerics import random_permutation
from jaxrl_llm.types import Array, Key, Mean, PyTree, TrainState


@dataclass(frozen=True, kw_only=True)
class Config:
    """How often, and in which portions, a batch of responses is learnt from."""

    num_epochs: int = 1
    """Passes over the batch."""
    num_minibatches: int = 1
    """Optimiser steps a pass."""
    num_micro_batches: int = 1
    """Parts that a minibatch goes through the model in, one after another: less memory, and the
    same gradient."""
    target_kl: float | None = None
    """Skip the rest of an iteration's steps from the first whose mean KL a token from the policy
    that drew the responses exceeds this; None never."""
    optimizer: optimizer.Config = optimizer.ADAM

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless steps can be taken."""
        for name in ("num_epochs", "num_minibatches", "num_micro_batches"):
            checks.at_least(name, getattr(self, name), 1)
        if self.target_kl is not None:
            checks.positive("target_kl", self.target_kl)
        self.optimizer.validate()

    def check_divides(self, num_prompts: int) -> None:
        """Raises ValueError unless `num_prompts` groups can be portioned out."""
        parts = self.num_minibatches * self.num_micro_batches
        if num_prompts % parts:
            raise ValueError(
                f"num_prompts is {num_prompts}; it must be a multiple of "
                f"num_minibatches × num_micro_batches = {parts}"
            )

    def check_reference(self, reference: PyTree | None) -> None:
        """Raises ValueError if the reference is to be the policy's own trunk, and that learns."""
        if reference is None and self.optimizer.trainable == "all":
            raise ValueError(
                "task.reference is None and trainable is 'all', so the reference would learn too; "
                "give make_task the reference's params, or train adapter or lora"
            )

    @property
    def steps_per_iteration(self) -> int:
        """Optimiser steps of one iteration."""
        return self.num_epochs * self.num_minibatches


def fit(
    config: Config,
    num_iterations: int,
    loss: Callable[[PyTree, PyTree], tuple[Array, dict[str, Mean]]],
    weigh: Callable[[PyTree], PyTree],
    key: Key,
    train: TrainState,
    batch: PyTree,
) -> tuple[TrainState, dict[str, Mean]]:
    """`config.num_epochs` passes over `batch`, in minibatches shuffled anew for each pass.

    Args:
      config: how.
      num_iterations: of the whole run, for the learning rate.
      loss: `(params, rows) -> (sum, metrics)`, the weighted sum over the tokens of some rows. Its
        metric `policy_kl`, from the law that drew the tokens, is what `config.target_kl` bounds.
      weigh: puts the weights into the rows of one minibatch.
      key: of the shuffles.
      train: to improve.
      batch: leaves `[G, ...]`, whose rows stay whole.

    Returns:
      The improved policy, and the sums of the metrics of all steps.
    """
    num_groups = jax.tree.leaves(batch)[0].shape[0]
    num_steps = num_iterations * config.steps_per_iteration

    def step(
        carry: tuple[TrainState, Array], rows: Array
    ) -> tuple[tuple[TrainState, Array], dict[str, Mean]]:
        train, stopped = carry
        minibatch = weigh(jax.tree.map(lambda leaf: leaf[rows], batch))
        frozen = partial(optimizer.freeze, trainable=config.optimizer.trainable)
        gradient, metrics = gradient_of_sum(
            lambda params, part: loss(frozen(params), part),
            train.params,
            minibatch,
            config.num_micro_batches,
        )
        moved, norm = optimizer.descend(config.optimizer, num_steps, train, gradient)
        metrics = {**metrics, "gradient_norm": norm}
        if config.target_kl is None:
            return (moved, stopped), metrics
        stopped = stopped | (metrics["policy_kl"].mean > config.target_kl)
        kept = jax.tree.map(partial(jnp.where, stopped), train, moved)
        return (kept, stopped), {**metrics, "stopped": Mean.of(stopped)}

    if config.steps_per_iteration == 1:
        (train, _), metrics = step((train, jnp.bool_(False)), jnp.arange(num_groups))
        return train, metrics
    shuffles = jax.vmap(partial(random_permutation, n=num_groups))
    rows = shuffles(jax.random.split(key, config.num_epochs))
    rows = rows.reshape(config.steps_per_iteration, -1)
    (train, _), metrics = jax.lax.scan(step, (train, jnp.bool_(False)), rows)
    return train, jax.tree.map(partial(jnp.sum, axis=0), metrics)
