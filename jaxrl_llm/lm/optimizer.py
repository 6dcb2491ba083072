"""The optimiser of language models: AdamW on the parts that learn, warm-up, then a decay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from jaxrl_llm import checks
from jaxrl_llm.nn import adapters
from jaxrl_llm.types import Mean, PyTree, TrainState

Decay = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """AdamW and its schedule."""

    learning_rate: float = 1e-3
    """The highest, at the end of the warm-up."""
    warmup_fraction: float = 0.03
    """Of the steps, over which the learning rate rises from 0."""
    decay: Decay = "cosine"
    """How the learning rate falls after the warm-up."""
    final_fraction: float = 0.1
    """Of the learning rate, left at the end; unless it is constant."""
    weight_decay: float = 0.1
    """Of matrices; biases and layer normalisation have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    max_gradient_norm: float = 1.0
    """Longer gradients, over all that learns, are scaled down to it."""
    trainable: adapters.Trainable = "all"
    """What learns; a value head always does."""

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless steps can be taken."""
        for name in ("learning_rate", "epsilon", "max_gradient_norm"):
            checks.positive(name, getattr(self, name))
        for name in ("warmup_fraction", "final_fraction"):
            checks.between(name, getattr(self, name), 0, 1)
        for name in ("beta1", "beta2"):
            if not 0 <= (decay := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {decay}; it must be at least 0 and less than 1")
        checks.at_least("weight_decay", self.weight_decay, 0)
        checks.one_of("decay", self.decay, get_args(Decay))


ADAMW = Config()
# What policies learn with. Source: Huang et al. (2024), "The N+ Implementation Details of RLHF with
# PPO", for the epsilon and the linear decay.
ADAM = Config(
    warmup_fraction=0.0, decay="linear", final_fraction=0.0, weight_decay=0.0, beta1=0.9,
    beta2=0.95, epsilon=1e-5,
)  # fmt: skip


def make(config: Config, num_steps: int) -> optax.GradientTransformation:
    """The optimiser of a run of `num_steps` steps.

    Source: Loshchilov & Hutter (2019) for the decoupled weight decay; betas, clipping and the
    schedule are those of Brown et al. (2020), appendix B.
    """
    adamw = optax.adamw(
        schedule(config, num_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=partial(jax.tree.map, lambda leaf: leaf.ndim > 1),
    )
    learns = optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), adamw)
    labels = partial(adapters.labels, trainable=config.trainable)
    return optax.partition({"train": learns, "freeze": optax.set_to_zero()}, labels)


def schedule(config: Config, num_steps: int) -> optax.Schedule:
    """The learning rate by step: a line up from 0, then half a cosine or a line down."""
    # A decay needs a step, also where the warm-up would take all of them.
    warmup_steps = min(round(config.warmup_fraction * num_steps), num_steps - 1)
    rate, end = config.learning_rate, config.final_fraction * config.learning_rate
    falling = {
        "cosine": optax.cosine_decay_schedule(
            rate, num_steps - warmup_steps, config.final_fraction
        ),
        "linear": optax.linear_schedule(rate, end, num_steps - warmup_steps),
        "constant": optax.constant_schedule(rate),
    }[config.decay]
    if not warmup_steps:
        return falling
    rising = optax.linear_schedule(0.0, rate, warmup_steps)
    return optax.join_schedules([rising, falling], [warmup_steps])


def start(config: Config, num_steps: int, params: PyTree) -> TrainState:
    """`params` before the first of `num_steps` steps."""
    opt_state = make(config, num_steps).init(params)
    return TrainState(params=params, opt_state=opt_state, step=jnp.int32(0))


def descend(
    config: Config, num_steps: int, train: TrainState, gradient: PyTree
) -> tuple[TrainState, Mean]:
    """One step down `gradient`, and the length of the gradient before it was clipped."""
    updates, opt_state = make(config, num_steps).update(gradient, train.opt_state, train.params)
    params = optax.apply_updates(train.params, updates)
    moved = TrainState(params=params, opt_state=opt_state, step=train.step + 1)
    return moved, Mean.of(optax.tree.norm(gradient))


def freeze(params: PyTree, trainable: str) -> PyTree:
    """`params`, with no gradient flowing to what does not learn, so that none is computed."""
    return jax.tree.map(
        lambda leaf, label: leaf if label == "train" else jax.lax.stop_gradient(leaf),
        params,
        adapters.labels(params, trainable),
    )
