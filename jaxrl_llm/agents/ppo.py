"""Proximal policy optimisation for discrete actions.

One step of the algorithm is one iteration: collect `num_steps` steps in each of
`num_environments` environments, estimate advantages, and fit policy and value for `num_epochs`
passes over the shuffled batch. Read it from the top: `collect`, `loss`, `update`, `make`.

Source: Schulman et al. (2017), "Proximal Policy Optimization Algorithms", arXiv:1707.06347, with
  the details of Huang et al. (2022), "The 37 implementation details of PPO". Differences: a
  timeout bootstraps from the state it cut short, and values are computed once for the whole batch
  after the rollout.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.flatten_util import ravel_pytree

from jaxrl_llm import checks, numerics
from jaxrl_llm.envs import core
from jaxrl_llm.kernels import policy_gradient, returns
from jaxrl_llm.types import (
    Algorithm,
    Array,
    Discrete,
    Environment,
    Key,
    Mean,
    PyTree,
    TrainState,
)

_LOSS_PARTS = ("policy_loss", "value_loss", "entropy", "kl")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of PPO; the defaults are the published ones for control."""

    num_environments: int = 4
    """Environments stepped side by side."""
    num_steps: int = 128
    """Steps in each environment per iteration."""
    num_iterations: int = 976
    """Iterations until the learning rate reaches `final_learning_rate`."""
    num_epochs: int = 4
    """Passes over each batch."""
    num_minibatches: int = 4
    """Optimiser steps per pass."""
    learning_rate: float = 2.5e-4
    """Of Adam, at the start; it falls linearly to `final_learning_rate`."""
    final_learning_rate: float = 0.0
    """Of Adam, at the end."""
    adam_epsilon: float = 1e-5
    """Of Adam, added to the root of the second moment."""
    max_gradient_norm: float = 0.5
    """Gradients are scaled down to this global norm."""
    gamma: float = 0.99
    """Discount of the return."""
    gae_lambda: float = 0.95
    """0 trusts the value function, 1 the sampled return."""
    clip_epsilon: float = 0.2
    """The policy's probability ratio has no incentive to leave [1 - this, 1 + this]."""
    value_clip_epsilon: float | None = 0.2
    """The same for the value, in units of the reward; unclipped when None."""
    value_coefficient: float = 0.5
    """Weight of the value loss."""
    entropy_coefficient: float = 0.01
    """Weight of the entropy bonus."""
    whiten_advantages: bool = True
    """Standardise the advantages of each minibatch."""
    target_kl: float | None = None
    """Skip an iteration's updates from the first whose KL(old || new) exceeds this; None never."""

    @property
    def batch_size(self) -> int:
        """Transitions collected per iteration."""
        return self.num_environments * self.num_steps

    def validate(self) -> None:
        """Raises ValueError, in one line that starts with the field's name."""
        for name in ("num_environments", "num_steps", "num_iterations", "num_epochs"):
            checks.at_least(name, getattr(self, name), 1)
        checks.at_least("num_minibatches", self.num_minibatches, 1)
        for name in ("learning_rate", "adam_epsilon", "max_gradient_norm", "clip_epsilon"):
            checks.positive(name, getattr(self, name))
        for name in ("value_clip_epsilon", "target_kl"):
            if getattr(self, name) is not None:
                checks.positive(name, getattr(self, name))
        for name in ("final_learning_rate", "value_coefficient", "entropy_coefficient"):
            checks.at_least(name, getattr(self, name), 0)
        checks.between("gamma", self.gamma, 0, 1)
        checks.between("gae_lambda", self.gae_lambda, 0, 1)
        batch = f"num_environments × num_steps = {self.batch_size}"
        if self.batch_size % self.num_minibatches:
            raise ValueError(f"num_minibatches is {self.num_minibatches}; it must divide {batch}")


@struct.dataclass(kw_only=True)
class State:
    """A learner under way: its parameters, and the environments `[B]` it is acting in."""

    train: TrainState
    running: core.Running


@struct.dataclass(kw_only=True)
class Batch:
    """What an update reads, one row a transition, `[N, ...]`."""

    observation: Array
    action: Array
    action_mask: Array | None
    log_probability: Array
    value: Array
    advantage: Array


def forward(
    network: nn.Module, params: PyTree, observation: PyTree, action_mask: Array | None
) -> tuple[Array, Array]:
    """Masked logits `[..., A]` and value `[...]`."""
    outputs: Any = network.apply(params, observation, action_mask=action_mask)
    return outputs


def collect(
    config: Config, environment: Environment, network: nn.Module, key: Key, state: State
) -> tuple[core.Running, Batch, dict[str, Mean]]:
    """Acts for `num_steps` steps and estimates advantages.

    Returns:
      The environments afterwards, the batch of `batch_size` rows, and the mean return and length
      of the episodes that ended.
    """
    params = state.train.params

    rollout_key, action_key = jax.random.split(key)

    def policy(
        uniform: Array, observation: Array, action_mask: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        logits, _ = forward(network, params, observation, action_mask)
        return jax.vmap(policy_gradient.sample_action)(logits, uniform), {"logits": logits}

    running, steps = core.rollout(
        environment,
        policy,
        rollout_key,
        state.running,
        num_steps=config.num_steps,
        noise=jax.random.uniform(action_key, (config.num_steps, config.num_environments)),
    )
    action_mask = steps.extras.get("action_mask")
    _, value = forward(network, params, steps.observation, None)
    _, next_value = forward(network, params, steps.next_observation, None)
    estimate = jax.vmap(partial(returns.gae, lambda_=config.gae_lambda), in_axes=1, out_axes=1)
    ended = steps.terminated | steps.truncated
    advantage = estimate(
        steps.reward, config.gamma * (1 - steps.terminated), value, next_value, ended
    )
    by_step = jax.vmap(jax.vmap(policy_gradient.log_probability))
    batch = Batch(
        observation=steps.observation,
        action=steps.action,
        action_mask=action_mask,
        log_probability=by_step(steps.extras["logits"], steps.action),
        value=value,
        advantage=advantage,
    )
    metrics = {
        name: Mean.of(steps.extras[name].astype(jnp.float32), ended)
        for name in ("episode_return", "episode_length")
    }
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)
    return running, rows, metrics


def loss(
    config: Config, network: nn.Module, params: PyTree, batch: Batch
) -> tuple[Array, dict[str, Mean]]:
    """The mean loss of a minibatch, and its parts."""
    logits, value = forward(network, params, batch.observation, batch.action_mask)
    log_policy = jax.vmap(policy_gradient.log_policy)(logits)
    log_probability = jax.vmap(policy_gradient.log_probability)(log_policy, batch.action)
    advantage = batch.advantage
    if config.whiten_advantages:
        advantage = numerics.masked_whiten(advantage, jnp.ones_like(advantage, bool))
    policy_loss = policy_gradient.ppo_clip_loss(
        log_probability, batch.log_probability, advantage, config.clip_epsilon
    )
    value_loss = policy_gradient.clipped_value_loss(
        value,
        batch.value,
        batch.advantage + batch.value,
        jnp.inf if config.value_clip_epsilon is None else config.value_clip_epsilon,
    )
    parts = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": jax.vmap(policy_gradient.entropy)(log_policy),
        "kl": policy_gradient.kl_k3(batch.log_probability, log_probability),
    }
    metrics = {name: Mean.of(parts[name]) for name in _LOSS_PARTS}
    total = (
        metrics["policy_loss"].mean
        + config.value_coefficient * metrics["value_loss"].mean
        - config.entropy_coefficient * metrics["entropy"].mean
    )
    return total, metrics


def update(
    config: Config,
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    key: Key,
    train: TrainState,
    batch: Batch,
) -> tuple[TrainState, dict[str, Mean]]:
    """`num_epochs` passes over the batch, in minibatches shuffled anew for each pass.

    Inside the passes the parameters are one flat vector and the metrics one array: XLA's CPU
    runtime hands small independent operations to another thread, which costs more than most of
    them take, and a fifth of the whole for networks of this size.
    """
    flat, unravel = ravel_pytree(train.params)

    def minibatch_step(train: TrainState, rows: Array) -> tuple[TrainState, Array]:
        minibatch = jax.tree.map(lambda leaf: leaf[rows], batch)
        gradient, metrics = jax.grad(
            lambda flat: loss(config, network, unravel(flat), minibatch), has_aux=True
        )(train.params)
        updates, opt_state = optimizer.update(gradient, train.opt_state, train.params)
        params = optax.apply_updates(train.params, updates)
        totals = jnp.stack([metrics[name].total for name in _LOSS_PARTS])
        return TrainState(params=params, opt_state=opt_state, step=train.step + 1), totals

    def guarded_step(
        carry: tuple[TrainState, Array], rows: Array
    ) -> tuple[tuple[TrainState, Array], Array]:
        train, stopped = carry
        updated, totals = minibatch_step(train, rows)
        kl = totals[_LOSS_PARTS.index("kl")] / rows.size
        stopped = stopped | (kl > jnp.asarray(config.target_kl))
        return (jax.tree.map(partial(jnp.where, stopped), train, updated), stopped), totals

    def shuffled(key: Key) -> Array:
        return numerics.random_permutation(key, config.batch_size)

    rows = jax.vmap(shuffled)(jax.random.split(key, config.num_epochs))
    rows = rows.reshape(config.num_epochs * config.num_minibatches, -1)
    train = dataclasses.replace(train, params=flat)
    if config.target_kl is None:
        train, totals = jax.lax.scan(minibatch_step, train, rows)
    else:
        (train, _), totals = jax.lax.scan(guarded_step, (train, jnp.bool_(False)), rows)
    train = dataclasses.replace(train, params=unravel(train.params))
    weight = jnp.float32(rows.size)
    sums = zip(_LOSS_PARTS, jnp.sum(totals, axis=0), strict=True)
    return train, {name: Mean(total=total, weight=weight) for name, total in sums}


def make(config: Config, environment: Environment, network: nn.Module) -> Algorithm:
    """PPO on `environment` with `network`.

    Args:
      config: validated here.
      environment: with discrete actions; its `action_mask`, where it has one, is always obeyed.
      network: a Flax module `(observation, *, action_mask) -> (logits [..., A], value [...])`, its
        logits masked, such as `nn.heads.ActorCritic` or `nn.heads.TabularActorCritic`.

    Returns:
      An `Algorithm` whose state is a `State` and whose step is one iteration.

    Raises:
      ValueError: for a setting out of range, or an action space that is not discrete.
    """
    config.validate()
    if not isinstance(environment.action_space, Discrete):
        space = type(environment.action_space).__name__
        raise ValueError(f"environment.action_space is a {space}; ppo takes Discrete actions")

    def init(key: Key) -> State:
        network_key, environment_key = jax.random.split(key)
        params = network.init(network_key, core.example(environment.observation_space))
        opt_state = make_optimizer(config, config.learning_rate).init(params)
        train = TrainState(params=params, opt_state=opt_state, step=jnp.int32(0))
        running = core.start_batch(environment, environment_key, config.num_environments)
        return State(train=train, running=running)

    def step(key: Key, state: State) -> tuple[State, dict[str, Mean]]:
        collect_key, update_key = jax.random.split(key)
        running, batch, episodes = collect(config, environment, network, collect_key, state)
        optimizer = make_optimizer(config, learning_rate(config, state.train.step))
        train, losses = update(config, network, optimizer, update_key, state.train, batch)
        return State(train=train, running=running), {**episodes, **losses}

    return Algorithm(init=init, step=step)


def make_optimizer(config: Config, learning_rate: float | Array) -> optax.GradientTransformation:
    """Adam after clipping by the global norm, its moments one flat vector."""
    return optax.flatten(
        optax.chain(
            optax.clip_by_global_norm(config.max_gradient_norm),
            optax.adam(learning_rate, eps=config.adam_epsilon),
        )
    )


def learning_rate(config: Config, step: Array) -> Array:
    """The rate `[]` of the iteration to which optimiser step `step` `[]` belongs.

    It is constant within an iteration and falls linearly from one to the next.
    """
    schedule = optax.linear_schedule(
        config.learning_rate, config.final_learning_rate, config.num_iterations
    )
    return jnp.asarray(schedule(step // (config.num_epochs * config.num_minibatches)))
