"""Proximal policy optimisation with a memory, for what one observation does not tell.

As `agents.ppo`, with three differences. The policy carries a memory along each episode, emptied
before the step that begins one. A minibatch is a set of environments with their whole sequences,
unrolled from the memory with which the rollout began, so that gradients flow through time. And
the value that a timeout bootstraps from is that of the observation it cut short, read with the
memory of that episode. Read it from the top: `collect`, `loss`, `update`, `make`.

Source: Schulman et al. (2017), "Proximal Policy Optimization Algorithms", arXiv:1707.06347, with
  the recurrent details of Huang et al. (2022), "The 37 implementation details of PPO".
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxrl_llm import checks, numerics
from jaxrl_llm.envs import core
from jaxrl_llm.kernels import policy_gradient, returns
from jaxrl_llm.nn import policies
from jaxrl_llm.nn.recurrent import RecurrentActorCritic
from jaxrl_llm.types import (
    Algorithm,
    Array,
    Environment,
    Key,
    Mean,
    PyTree,
    TrainState,
    hyperparameters,
)


@struct.dataclass(kw_only=True)
class Hyperparameters:
    """Numbers that a sweep may vary, `[]` float32 each; the fields of `Config` say what they do."""

    learning_rate: Array
    final_learning_rate: Array
    adam_epsilon: Array
    max_gradient_norm: Array
    gamma: Array
    gae_lambda: Array
    clip_epsilon: Array
    value_coefficient: Array
    entropy_coefficient: Array


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of recurrent PPO."""

    num_environments: int = 16
    """Environments stepped side by side."""
    num_steps: int = 128
    """Steps in each environment per iteration; gradients reach no further back."""
    num_iterations: int = 244
    """Iterations until the learning rate reaches `final_learning_rate`."""
    num_epochs: int = 4
    """Passes over each batch."""
    num_minibatches: int = 4
    """Optimiser steps per pass, each on some of the environments."""
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
    value_coefficient: float = 0.5
    """Weight of the value loss."""
    entropy_coefficient: float = 0.01
    """Weight of the entropy bonus."""

    @property
    def batch_size(self) -> int:
        """Transitions collected per iteration."""
        return self.num_environments * self.num_steps

    def hyperparameters(self) -> Hyperparameters:
        """The fields of the same names as arrays."""
        return hyperparameters(Hyperparameters, self)

    def validate(self) -> None:
        """Raises ValueError, in one line that starts with the field's name."""
        counts = ("num_environments", "num_steps", "num_iterations", "num_epochs")
        for name in (*counts, "num_minibatches"):
            checks.at_least(name, getattr(self, name), 1)
        for name in ("learning_rate", "adam_epsilon", "max_gradient_norm", "clip_epsilon"):
            checks.positive(name, getattr(self, name))
        for name in ("final_learning_rate", "value_coefficient", "entropy_coefficient"):
            checks.at_least(name, getattr(self, name), 0)
        checks.between("gamma", self.gamma, 0, 1)
        checks.between("gae_lambda", self.gae_lambda, 0, 1)
        if self.num_environments % self.num_minibatches:
            raise ValueError(
                f"num_minibatches is {self.num_minibatches}; it must divide "
                f"num_environments = {self.num_environments}"
            )


@struct.dataclass(kw_only=True)
class State:
    """A learner under way, the environments `[B]` it is acting in, and what it remembers of each.

    `memory` belongs to the episode before where one has just ended: the network forgets it as it
    begins the next.
    """

    hyperparameters: Hyperparameters
    train: TrainState
    running: core.Running
    memory: PyTree


@struct.dataclass(kw_only=True)
class Sequences:
    """What an update reads of each environment's steps, `[T, B, ...]`."""

    observation: Array
    start: Array
    latent: PyTree
    action_mask: Array | None
    log_probability: Array
    value: Array
    advantage: Array


@struct.dataclass(kw_only=True)
class Batch:
    """The steps of a rollout, and the `memory` with which it began, leaves `[B, ...]`."""

    sequences: Sequences
    memory: PyTree

    def of_environments(self, places: Array) -> Batch:
        """That of the environments `places`, `[b]` integers, alone."""
        return Batch(
            sequences=jax.tree.map(lambda leaf: leaf[:, places], self.sequences),
            memory=jax.tree.map(lambda leaf: leaf[places], self.memory),
        )


def forward(
    network: nn.Module,
    params: PyTree,
    memory: PyTree,
    observation: Array,
    start: Array,
    action_mask: Array | None,
) -> tuple[PyTree, Any, Array]:
    """Memory after the last step, the policy, masked, and values `[T, B]` of a sequence."""
    outputs: Any = network.apply(params, memory, observation, start, action_mask=action_mask)
    return outputs


def forward_step(
    network: nn.Module,
    params: PyTree,
    memory: PyTree,
    observation: Array,
    start: Array,
    action_mask: Array | None,
) -> tuple[PyTree, Any, Array]:
    """`forward` of one step, without the axis of time: values `[...]`."""
    inputs = jax.tree.map(lambda leaf: leaf[None], (observation, start, action_mask))
    memory, *outputs = forward(network, params, memory, *inputs)
    policy, value = jax.tree.map(lambda leaf: leaf[0], outputs)
    return memory, policy, value


def collect(
    config: Config, environment: Environment, network: nn.Module, key: Key, state: State
) -> tuple[State, Batch, dict[str, Mean]]:
    """Acts for `num_steps` steps and estimates advantages.

    Returns:
      The state with its environments and memory as they are afterwards, the batch, and the mean
      return and length of the episodes that ended.
    """
    params, hyperparameters = state.train.params, state.hyperparameters
    rollout_key, noise_key = jax.random.split(key)

    def act(
        memory: PyTree, noise: PyTree, observation: Array, action_mask: Array | None, start: Array
    ) -> tuple[PyTree, PyTree, dict[str, PyTree]]:
        memory, policy, value = forward_step(
            network, params, memory, observation, start, action_mask
        )
        latent = policy.sample(noise)
        told = {"policy": policy, "latent": latent, "value": value, "start": start}
        return memory, policy.action(latent), {**told, "memory": memory}

    shape = (config.num_steps, config.num_environments)
    running, memory, steps = core.rollout_with_memory(
        environment,
        act,
        rollout_key,
        state.running,
        state.memory,
        num_steps=config.num_steps,
        noise=policies.draw_noise(environment.action_space, noise_key, shape),
    )
    extras = steps.extras
    # Every next observation belongs to the episode of its step, whose memory is not emptied.
    _, _, next_value = forward_step(
        network, params, extras["memory"], steps.next_observation, jnp.zeros(shape, bool), None
    )
    ended = steps.terminated | steps.truncated
    estimate = partial(returns.gae, lambda_=hyperparameters.gae_lambda)
    advantage = jax.vmap(estimate, in_axes=1, out_axes=1)(
        steps.reward,
        hyperparameters.gamma * (1 - steps.terminated),
        extras["value"],
        next_value,
        ended,
    )
    sequences = Sequences(
        observation=steps.observation,
        start=extras["start"],
        latent=extras["latent"],
        action_mask=extras.get("action_mask"),
        log_probability=cast(Any, extras["policy"]).log_probability(extras["latent"]),
        value=extras["value"],
        advantage=advantage,
    )
    metrics = core.episode_metrics(extras, ended)
    batch = Batch(sequences=sequences, memory=state.memory)
    return dataclasses.replace(state, running=running, memory=memory), batch, metrics


def loss(
    hyperparameters: Hyperparameters, network: nn.Module, params: PyTree, batch: Batch
) -> tuple[Array, dict[str, Mean]]:
    """The mean loss over all steps of a minibatch, and its parts."""
    steps = batch.sequences
    _, policy, value = forward(
        network, params, batch.memory, steps.observation, steps.start, steps.action_mask
    )
    log_probability = policy.log_probability(steps.latent)
    whole = jnp.ones_like(steps.advantage, bool)
    parts = {
        "policy_loss": policy_gradient.ppo_clip_loss(
            log_probability,
            steps.log_probability,
            numerics.masked_whiten(steps.advantage, whole),
            hyperparameters.clip_epsilon,
        ),
        "value_loss": 0.5 * jnp.square(value - (steps.advantage + steps.value)),
        "entropy": policy.entropy(),
        "kl": policy_gradient.kl_k3(steps.log_probability, log_probability),
    }
    metrics = {name: Mean.of(part) for name, part in parts.items()}
    total = (
        metrics["policy_loss"].mean
        + hyperparameters.value_coefficient * metrics["value_loss"].mean
        - hyperparameters.entropy_coefficient * metrics["entropy"].mean
    )
    return total, metrics


def update(
    config: Config,
    hyperparameters: Hyperparameters,
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    key: Key,
    train: TrainState,
    batch: Batch,
) -> tuple[TrainState, dict[str, Mean]]:
    """`num_epochs` passes over the environments, shuffled anew for each pass."""

    def minibatch_step(train: TrainState, places: Array) -> tuple[TrainState, dict[str, Mean]]:
        gradient, metrics = jax.grad(partial(loss, hyperparameters, network), has_aux=True)(
            train.params, batch.of_environments(places)
        )
        updates, opt_state = optimizer.update(gradient, train.opt_state, train.params)
        params = optax.apply_updates(train.params, updates)
        return TrainState(params=params, opt_state=opt_state, step=train.step + 1), metrics

    def shuffled(key: Key) -> Array:
        return numerics.random_permutation(key, config.num_environments)

    places = jax.vmap(shuffled)(jax.random.split(key, config.num_epochs))
    places = places.reshape(config.num_epochs * config.num_minibatches, -1)
    train, metrics = jax.lax.scan(minibatch_step, train, places)
    return train, jax.tree.map(partial(jnp.sum, axis=0), metrics)


def make(config: Config, environment: Environment, network: RecurrentActorCritic) -> Algorithm:
    """Recurrent PPO on `environment` with `network`.

    Args:
      config: validated here.
      environment: with any action space that `nn.policies` has a policy for; its `action_mask`,
        where it has one, is always obeyed.
      network: `(memory, observation [T, B, ...], start [T, B], *, action_mask) -> (memory, policy,
        value [T, B])` with a method `empty_memory`.

    Returns:
      An `Algorithm` whose state is a `State` and whose step is one iteration.

    Raises:
      ValueError: for a setting out of range, or an action space that no policy covers.
    """
    config.validate()
    policies.check_action_space("environment.action_space", environment.action_space)

    def init(key: Key) -> State:
        network_key, environment_key = jax.random.split(key)
        running = core.start_batch(environment, environment_key, config.num_environments)
        memory = network.empty_memory((config.num_environments,))
        first = running.observation[None], jnp.ones((1, config.num_environments), bool)
        params = network.init(network_key, memory, *first)
        hyperparameters = config.hyperparameters()
        optimizer = make_optimizer(hyperparameters, hyperparameters.learning_rate)
        train = TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0))
        return State(hyperparameters=hyperparameters, train=train, running=running, memory=memory)

    def step(key: Key, state: State) -> tuple[State, dict[str, Mean]]:
        collect_key, update_key = jax.random.split(key)
        state, batch, episodes = collect(config, environment, network, collect_key, state)
        rate = learning_rate(config, state.hyperparameters, state.train.step)
        optimizer = make_optimizer(state.hyperparameters, rate)
        train, losses = update(
            config, state.hyperparameters, network, optimizer, update_key, state.train, batch
        )
        return dataclasses.replace(state, train=train), {**episodes, **losses}

    return Algorithm(init=init, step=step)


def make_optimizer(
    hyperparameters: Hyperparameters, learning_rate: Array
) -> optax.GradientTransformation:
    """Adam after clipping by the global norm."""
    return optax.chain(
        optax.clip_by_global_norm(hyperparameters.max_gradient_norm),
        optax.adam(learning_rate, eps=hyperparameters.adam_epsilon),
    )


def learning_rate(config: Config, hyperparameters: Hyperparameters, step: Array) -> Array:
    """The rate `[]` of the iteration to which optimiser step `step` `[]` belongs."""
    iteration = step // (config.num_epochs * config.num_minibatches)
    progress = jnp.minimum(iteration / config.num_iterations, 1)
    first, last = hyperparameters.learning_rate, hyperparameters.final_learning_rate
    return first + progress * (last - first)
