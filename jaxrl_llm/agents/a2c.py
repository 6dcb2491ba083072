"""Advantage actor-critic, synchronous (A2C), and the staleness of its asynchronous form (A3C).

One step of the algorithm is one iteration: collect `num_steps` steps in each of
`num_environments` environments, and take ONE gradient step on all of them. Read it from the top:
`collect`, `loss`, `update`, `make`. Actions are discrete, continuous or hybrid: the network's
policy decides.

In A3C a worker copies the parameters, acts with its copy, and differentiates at its copy; when its
gradient reaches the shared parameters, other workers have updated them meanwhile. `staleness` = k
simulates that in one reproducible program: the iteration that makes update n acts and
differentiates at the parameters after update n - k (before update k, at the first ones). It is what
k + 1 workers of equal speed do that take turns, but for one thing: here all environments step in
every iteration. With k = 0 there is no copy, and the program is that of A2C: the same bits.

Source: Mnih et al. (2016), "Asynchronous Methods for Deep Reinforcement Learning",
  arXiv:1602.01783, section 4 and algorithm S3. Differences: generalised advantages, of which
  `gae_lambda` = 1 is the paper's longest possible n-step return; a timeout bootstraps from the
  state it cut short; gradients are clipped by their global norm.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxrl_llm import checks, numerics
from jaxrl_llm.envs import core
from jaxrl_llm.kernels import policy_gradient, returns, value_learning
from jaxrl_llm.nn import policies
from jaxrl_llm.types import (
    Algorithm,
    Array,
    Environment,
    Key,
    Mean,
    PyTree,
    Space,
    TrainState,
    Transition,
    hyperparameters,
)


@struct.dataclass(kw_only=True)
class Hyperparameters:
    """Numbers that a sweep may vary, `[]` float32 each; `Config` says what they are."""

    learning_rate: Array
    final_learning_rate: Array
    max_gradient_norm: Array
    gamma: Array
    gae_lambda: Array
    value_coefficient: Array
    entropy_coefficient: Array


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of A2C."""

    num_environments: int = 16
    """Environments stepped side by side."""
    num_steps: int = 5
    """Steps in each environment per iteration."""
    num_iterations: int = 10_000
    """Iterations until the learning rate reaches `final_learning_rate`."""
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    """The paper's, without momentum, or Adam."""
    optimizer_epsilon: float = 1e-5
    """Of the optimiser, added to the second moment under its root, or by Adam to the root."""
    rmsprop_decay: float = 0.99
    """Of RMSProp's second moment."""
    learning_rate: float = 7e-4
    """At the start; it falls linearly to `final_learning_rate`."""
    final_learning_rate: float = 0.0
    """At the end."""
    max_gradient_norm: float = 0.5
    """Gradients are scaled down to this global norm."""
    gamma: float = 0.99
    """Discount of the return."""
    gae_lambda: float = 1.0
    """0 trusts the value function, 1 the sampled return of up to `num_steps` steps."""
    value_coefficient: float = 0.5
    """Weight of the value loss."""
    entropy_coefficient: float = 0.01
    """Weight of the entropy bonus."""
    whiten_advantages: bool = False
    """Standardise the advantages of each iteration."""
    staleness: int = 0
    """How many updates old the parameters are that act and are differentiated at."""

    @property
    def batch_size(self) -> int:
        """Transitions collected per iteration."""
        return self.num_environments * self.num_steps

    def validate(self) -> None:
        """Raises ValueError, in one line that starts with the field's name."""
        for name in ("num_environments", "num_steps", "num_iterations"):
            checks.at_least(name, getattr(self, name), 1)
        checks.one_of("optimizer", self.optimizer, ("rmsprop", "adam"))
        for name in ("optimizer_epsilon", "learning_rate", "max_gradient_norm"):
            checks.positive(name, getattr(self, name))
        for name in ("final_learning_rate", "value_coefficient", "entropy_coefficient"):
            checks.at_least(name, getattr(self, name), 0)
        for name in ("rmsprop_decay", "gamma", "gae_lambda"):
            checks.between(name, getattr(self, name), 0, 1)
        checks.at_least("staleness", self.staleness, 0)

    def hyperparameters(self) -> Hyperparameters:
        """The fields of the same names as arrays."""
        return hyperparameters(Hyperparameters, self)


@struct.dataclass(kw_only=True)
class State:
    """A learner under way.

    Attributes:
      train: parameters and optimiser; `train.step` counts the updates.
      history: the parameters before each of the last updates, leaves `[staleness, ...]`, a ring:
        those after n updates are in slot n mod staleness. None where staleness is 0.
      running: the environments `[B]` that it is acting in.
      hyperparameters: what `collect`, `loss` and `update` read.
    """

    train: TrainState
    history: PyTree | None
    running: core.Running
    hyperparameters: Hyperparameters


def init(
    config: Config, network: nn.Module, key: Key, observation_space: Space, running: core.Running
) -> State:
    """A learner at the start, in environments that `running` describes."""
    params = network.init(key, core.example(observation_space))
    hyperparameters = config.hyperparameters()
    opt_state = make_optimizer(config, hyperparameters, jnp.int32(0)).init(params)
    history = None
    if config.staleness:
        history = jax.tree.map(
            lambda leaf: jnp.repeat(leaf[None], config.staleness, axis=0), params
        )
    return State(
        train=TrainState(params=params, opt_state=opt_state, step=jnp.int32(0)),
        history=history,
        running=running,
        hyperparameters=hyperparameters,
    )


def stale_params(config: Config, state: State) -> PyTree:
    """The parameters of `staleness` updates ago, or the first ones."""
    if config.staleness == 0:
        return state.train.params
    # The oldest are where the newest will be.
    slot = state.train.step % config.staleness
    return jax.tree.map(lambda leaf: leaf[slot], state.history)


def collect(
    config: Config, environment: Environment, network: nn.Module, key: Key, state: State
) -> tuple[core.Running, Transition]:
    """Acts for `num_steps` steps; returns the environments afterwards and what happened."""
    rollout_key, noise_key = jax.random.split(key)
    shape = (config.num_steps, config.num_environments)
    return core.rollout(
        environment,
        policies.act(network, stale_params(config, state)),
        rollout_key,
        state.running,
        num_steps=config.num_steps,
        noise=policies.draw_noise(environment.action_space, noise_key, shape),
    )


def loss(
    config: Config,
    hyperparameters: Hyperparameters,
    network: nn.Module,
    params: PyTree,
    steps: Transition,
) -> tuple[Array, dict[str, Mean]]:
    """The mean loss of what `params` collected, leaves `[T, B, ...]`, and its parts."""
    action_mask = steps.extras.get("action_mask")
    policy, value = policies.forward(network, params, steps.observation, action_mask)
    _, next_value = policies.forward(network, params, steps.next_observation, None)
    estimate = partial(returns.gae, lambda_=hyperparameters.gae_lambda)
    baseline = jax.lax.stop_gradient(value)
    advantage = jax.vmap(estimate, in_axes=1, out_axes=1)(
        steps.reward,
        hyperparameters.gamma * (1 - steps.terminated),
        baseline,
        jax.lax.stop_gradient(next_value),
        steps.terminated | steps.truncated,
    )
    return_ = advantage + baseline
    if config.whiten_advantages:
        advantage = numerics.masked_whiten(advantage, jnp.ones_like(advantage, bool))
    log_probability = policy.log_probability(steps.extras["latent"])
    metrics = {
        "policy_loss": Mean.of(
            policy_gradient.reinforce_loss(log_probability, advantage, jnp.float32(0))
        ),
        "value_loss": Mean.of(value_learning.squared_loss(value - return_)),
        "entropy": Mean.of(policy.entropy()),
    }
    total = (
        metrics["policy_loss"].mean
        + hyperparameters.value_coefficient * metrics["value_loss"].mean
        - hyperparameters.entropy_coefficient * metrics["entropy"].mean
    )
    return total, metrics


def update(
    config: Config, network: nn.Module, state: State, steps: Transition
) -> tuple[State, dict[str, Mean]]:
    """One gradient step on what `policies.act` at `stale_params` collected, here or on a host.

    Returns:
      The state afterwards, `running` untouched, and metrics.
    """
    train, hyperparameters = state.train, state.hyperparameters
    gradient, metrics = jax.grad(
        lambda params: loss(config, hyperparameters, network, params, steps), has_aux=True
    )(stale_params(config, state))
    optimizer = make_optimizer(config, hyperparameters, train.step)
    updates, opt_state = optimizer.update(gradient, train.opt_state, train.params)
    history = state.history
    if config.staleness:
        slot = train.step % config.staleness
        history = jax.tree.map(lambda old, new: old.at[slot].set(new), history, train.params)
    train = TrainState(
        params=optax.apply_updates(train.params, updates),
        opt_state=opt_state,
        step=train.step + 1,
    )
    ended = steps.terminated | steps.truncated
    episodes = core.episode_metrics(steps.extras, ended)
    return dataclasses.replace(state, train=train, history=history), {**episodes, **metrics}


def make(config: Config, environment: Environment, network: nn.Module) -> Algorithm:
    """A2C on `environment` with `network`.

    Args:
      config: validated here.
      environment: its `action_mask`, where it has one, is always obeyed.
      network: a Flax module `(observation, *, action_mask) -> (policy, value [...])`, the policy
        one of `nn.policies`, such as `nn.heads.ActorCritic` or `nn.heads.TabularActorCritic`.

    Returns:
      An `Algorithm` whose state is a `State` and whose step is one iteration.

    Raises:
      ValueError: for a setting out of range, or an action space that no policy can cover.
    """
    config.validate()
    policies.check_action_space("environment.action_space", environment.action_space)

    def start(key: Key) -> State:
        network_key, environment_key = jax.random.split(key)
        running = core.start_batch(environment, environment_key, config.num_environments)
        return init(config, network, network_key, environment.observation_space, running)

    def step(key: Key, state: State) -> tuple[State, dict[str, Mean]]:
        running, steps = collect(config, environment, network, key, state)
        state, metrics = update(config, network, state, steps)
        return dataclasses.replace(state, running=running), metrics

    return Algorithm(init=start, step=step)


def make_optimizer(
    config: Config, hyperparameters: Hyperparameters, step: Array
) -> optax.GradientTransformation:
    """The optimiser of update number `step` `[]`, its moments one flat vector."""
    progress = jnp.minimum(step / config.num_iterations, 1)
    first, last = hyperparameters.learning_rate, hyperparameters.final_learning_rate
    learning_rate = first + progress * (last - first)
    if config.optimizer == "adam":
        descend = optax.adam(learning_rate, eps=config.optimizer_epsilon)
    else:
        descend = optax.rmsprop(
            learning_rate, decay=config.rmsprop_decay, eps=config.optimizer_epsilon
        )
    clip = optax.clip_by_global_norm(hyperparameters.max_gradient_norm)
    return optax.flatten(optax.chain(clip, descend))
