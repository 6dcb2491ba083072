"""Proximal policy optimisation, for discrete, continuous and hybrid actions.

One step of the algorithm is one iteration: collect `num_steps` steps in each of
`num_environments` environments, estimate advantages, and fit policy and value for `num_epochs`
passes over the shuffled batch. Read it from the top: `collect`, `loss`, `update`, `make`.

With `curiosity_coefficient` above 0, novelty is rewarded too (`nn.random_network_distillation`).

Source: Schulman et al. (2017), "Proximal Policy Optimization Algorithms", arXiv:1707.06347, with
  the details of Huang et al. (2022), "The 37 implementation details of PPO". Differences: a
  timeout bootstraps from the state it cut short, and values are computed once for the whole batch
  after the rollout. Curiosity is that of Burda et al. (2018), "Exploration by Random Network
  Distillation", arXiv:1810.12894, but one value function learns the sum of both rewards.
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
from jax.flatten_util import ravel_pytree

from jaxrl_llm import checks, numerics
from jaxrl_llm.envs import core
from jaxrl_llm.kernels import policy_gradient, returns
from jaxrl_llm.nn import policies, random_network_distillation
from jaxrl_llm.nn.random_network_distillation import Novelty
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

_LOSS_PARTS = ("policy_loss", "value_loss", "entropy", "kl")


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
    value_clip_epsilon: Array
    value_coefficient: Array
    entropy_coefficient: Array
    curiosity_coefficient: Array


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
    curiosity_coefficient: float = 0.0
    """Weight of the reward for novelty, about 1 a step at first; 0 compiles none of it."""

    @property
    def batch_size(self) -> int:
        """Transitions collected per iteration."""
        return self.num_environments * self.num_steps

    def hyperparameters(self) -> Hyperparameters:
        """The fields of the same names as arrays; an unclipped value is clipped at infinity."""
        clip = jnp.inf if self.value_clip_epsilon is None else self.value_clip_epsilon
        return hyperparameters(Hyperparameters, dataclasses.replace(self, value_clip_epsilon=clip))

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
        checks.at_least("curiosity_coefficient", self.curiosity_coefficient, 0)
        checks.between("gamma", self.gamma, 0, 1)
        checks.between("gae_lambda", self.gae_lambda, 0, 1)
        batch = f"num_environments × num_steps = {self.batch_size}"
        if self.batch_size % self.num_minibatches:
            raise ValueError(f"num_minibatches is {self.num_minibatches}; it must divide {batch}")


@struct.dataclass(kw_only=True)
class State:
    """A learner under way: its parameters, and the environments `[B]` it is acting in.

    With curiosity, `train.params` has a collection "curiosity" beside the network's own.
    """

    hyperparameters: Hyperparameters
    train: TrainState
    running: core.Running
    novelty: Novelty | None


@struct.dataclass(kw_only=True)
class Batch:
    """What an update reads, one row a transition, `[N, ...]`.

    `latent` is the action before it was squashed into its bounds, as `nn.policies` says; `arrival`
    the normalised features of the next observation, with curiosity.
    """

    observation: PyTree
    latent: PyTree
    action_mask: Array | None
    log_probability: Array
    value: Array
    advantage: Array
    arrival: Array | None = None


def collect(
    config: Config, environment: Environment, network: nn.Module, key: Key, state: State
) -> tuple[State, Batch, dict[str, Mean]]:
    """Acts for `num_steps` steps and estimates advantages.

    Returns:
      The state with its environments as they are afterwards, the batch of `batch_size` rows, and
      the mean return and length of the episodes that ended.
    """
    params, hyperparameters = state.train.params, state.hyperparameters
    rollout_key, noise_key = jax.random.split(key)

    def act(
        noise: PyTree, observation: PyTree, action_mask: Array | None
    ) -> tuple[PyTree, dict[str, PyTree]]:
        policy, _ = policies.forward(network, params, observation, action_mask)
        latent = policy.sample(noise)
        return policy.action(latent), {"policy": policy, "latent": latent}

    shape = (config.num_steps, config.num_environments)
    running, steps = core.rollout(
        environment,
        act,
        rollout_key,
        state.running,
        num_steps=config.num_steps,
        noise=policies.draw_noise(environment.action_space, noise_key, shape),
    )
    reward, novelty, arrival = steps.reward, state.novelty, None
    if novelty is not None:
        space, arrived = environment.observation_space, steps.next_observation
        novelty, arrival, bonus = novelty.reward(
            params["curiosity"], space, arrived, hyperparameters.gamma
        )
        reward = reward + hyperparameters.curiosity_coefficient * bonus
    latent, policy = steps.extras["latent"], cast(Any, steps.extras["policy"])
    _, value = policies.forward(network, params, steps.observation, None)
    _, next_value = policies.forward(network, params, steps.next_observation, None)
    ended = steps.terminated | steps.truncated
    estimate = partial(returns.gae, lambda_=hyperparameters.gae_lambda)
    advantage = jax.vmap(estimate, in_axes=1, out_axes=1)(
        reward, hyperparameters.gamma * (1 - steps.terminated), value, next_value, ended
    )
    batch = Batch(
        observation=steps.observation,
        latent=latent,
        action_mask=steps.extras.get("action_mask"),
        log_probability=policy.log_probability(latent),
        value=value,
        advantage=advantage,
        arrival=arrival,
    )
    metrics = core.episode_metrics(steps.extras, ended)
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)
    return dataclasses.replace(state, running=running, novelty=novelty), rows, metrics


def loss(
    config: Config,
    hyperparameters: Hyperparameters,
    network: nn.Module,
    params: PyTree,
    batch: Batch,
) -> tuple[Array, dict[str, Mean]]:
    """The mean loss of a minibatch, and its parts."""
    policy, value = policies.forward(network, params, batch.observation, batch.action_mask)
    log_probability = policy.log_probability(batch.latent)
    advantage = batch.advantage
    if config.whiten_advantages:
        advantage = numerics.masked_whiten(advantage, jnp.ones_like(advantage, bool))
    parts = {
        "policy_loss": policy_gradient.ppo_clip_loss(
            log_probability, batch.log_probability, advantage, hyperparameters.clip_epsilon
        ),
        "value_loss": policy_gradient.clipped_value_loss(
            value,
            batch.value,
            batch.advantage + batch.value,
            hyperparameters.value_clip_epsilon,
        ),
        "entropy": policy.entropy(),
        "kl": policy_gradient.kl_k3(batch.log_probability, log_probability),
    }
    if batch.arrival is not None:
        parts["distillation_loss"] = random_network_distillation.prediction_error(
            params["curiosity"], batch.arrival
        )
    metrics = {name: Mean.of(part) for name, part in parts.items()}
    total = (
        metrics["policy_loss"].mean
        + hyperparameters.value_coefficient * metrics["value_loss"].mean
        - hyperparameters.entropy_coefficient * metrics["entropy"].mean
    )
    if batch.arrival is not None:
        total = total + metrics["distillation_loss"].mean
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
    """`num_epochs` passes over the batch, in minibatches shuffled anew for each pass.

    Inside the passes the parameters are one flat vector and the metrics one array: XLA's CPU
    runtime hands small independent operations to another thread, which costs more than most of
    them take, and a fifth of the whole for networks of this size.
    """
    flat, unravel = ravel_pytree(train.params)
    names = _LOSS_PARTS if batch.arrival is None else (*_LOSS_PARTS, "distillation_loss")

    def minibatch_step(train: TrainState, rows: Array) -> tuple[TrainState, Array]:
        minibatch = jax.tree.map(lambda leaf: leaf[rows], batch)
        gradient, metrics = jax.grad(
            lambda flat: loss(config, hyperparameters, network, unravel(flat), minibatch),
            has_aux=True,
        )(train.params)
        updates, opt_state = optimizer.update(gradient, train.opt_state, train.params)
        params = optax.apply_updates(train.params, updates)
        totals = jnp.stack([metrics[name].total for name in names])
        return TrainState(params=params, opt_state=opt_state, step=train.step + 1), totals

    def guarded_step(
        carry: tuple[TrainState, Array], rows: Array
    ) -> tuple[tuple[TrainState, Array], Array]:
        train, stopped = carry
        updated, totals = minibatch_step(train, rows)
        kl = totals[names.index("kl")] / rows.size
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
    sums = zip(names, jnp.sum(totals, axis=0), strict=True)
    return train, {name: Mean(total=total, weight=weight) for name, total in sums}


def make(config: Config, environment: Environment, network: nn.Module) -> Algorithm:
    """PPO on `environment` with `network`.

    Args:
      config: validated here.
      environment: with any action space that `nn.policies` has a policy for; its `action_mask`,
        where it has one, is always obeyed.
      network: a Flax module `(observation, *, action_mask) -> (policy, value [...])`, the policy
        masked and one of `nn.policies`, such as `nn.heads.ActorCritic`.

    Returns:
      An `Algorithm` whose state is a `State` and whose step is one iteration.

    Raises:
      ValueError: for a setting out of range, or an action space that no policy covers.
    """
    config.validate()
    policies.check_action_space("environment.action_space", environment.action_space)
    observation = core.example(environment.observation_space)

    def init(key: Key) -> State:
        network_key, environment_key, curiosity_key = jax.random.split(key, 3)
        params, novelty = network.init(network_key, observation), None
        if config.curiosity_coefficient:
            curiosity, novelty = random_network_distillation.init(
                curiosity_key, environment.observation_space, observation, config.num_environments
            )
            params = {**params, "curiosity": curiosity}
        hyperparameters = config.hyperparameters()
        optimizer = make_optimizer(hyperparameters, hyperparameters.learning_rate)
        train = TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0))
        running = core.start_batch(environment, environment_key, config.num_environments)
        return State(hyperparameters=hyperparameters, train=train, running=running, novelty=novelty)

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
    """Adam after clipping by the global norm, its moments one flat vector."""
    return optax.flatten(
        optax.chain(
            optax.clip_by_global_norm(hyperparameters.max_gradient_norm),
            optax.adam(learning_rate, eps=hyperparameters.adam_epsilon),
        )
    )


def learning_rate(config: Config, hyperparameters: Hyperparameters, step: Array) -> Array:
    """The rate `[]` of the iteration to which optimiser step `step` `[]` belongs.

    It is constant within an iteration and falls linearly from one to the next.
    """
    iteration = step // (config.num_epochs * config.num_minibatches)
    progress = jnp.minimum(iteration / config.num_iterations, 1)
    first, last = hyperparameters.learning_rate, hyperparameters.final_learning_rate
    return first + progress * (last - first)
