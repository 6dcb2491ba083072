"""REINFORCE: the policy gradient of whole episodes, with a choice of baselines.

One step of the algorithm is one iteration: start an episode in each of `num_environments`
environments, follow each to its end or for `num_steps` steps, and take ONE gradient step. Read it
from the top: `collect`, `loss`, `update`, `make`. Actions are discrete, continuous or hybrid: the
network's policy decides.

The gradient of the discounted return J is E[sum_t gamma^t (G_t - b) grad log pi(a_t | s_t)], where
G_t is the return from step t on. Any baseline b that does not depend on a_t leaves it as it is;
a good one lowers its variance:

- `"none"`: 0.
- `"constant"`: `baseline_value`.
- `"moving_average"`: of the returns G of EARLIER iterations, with the same weights gamma^t.
- `"value"`: the network's value of s_t, which is regressed on G_t.

Exactly one episode of each environment counts. Counting as many as fit into `num_steps` would
favour short ones. So `num_steps` should be the environment's time limit, and steps after an early
end are not used.

What is cut, by the environment's time limit or by `num_steps`, did not end: its return goes on.
With the value baseline it is bootstrapped from the value of the state that it was cut in. Without
a value function nothing is known of the rest: G counts the rewards that were seen, and what is
maximised is the return up to the cut.

Source: Williams (1992), "Simple statistical gradient-following algorithms for connectionist
  reinforcement learning", sections 4 and 5; Sutton & Barto (2018), section 13.4, for returns from
  step t on, gamma^t and the value baseline. Difference: the optimiser is Adam.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.flatten_util import ravel_pytree

from jaxrl_llm import checks
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

BASELINES = ("none", "constant", "moving_average", "value")


@struct.dataclass(kw_only=True)
class Hyperparameters:
    """Numbers that a sweep may vary, `[]` float32 each; `Config` says what they are."""

    learning_rate: Array
    gamma: Array
    baseline_value: Array
    baseline_decay: Array
    value_coefficient: Array
    entropy_coefficient: Array


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of REINFORCE."""

    num_environments: int = 64
    """Episodes per iteration."""
    num_steps: int = 200
    """Steps after which an episode is cut."""
    baseline: Literal["none", "constant", "moving_average", "value"] = "value"
    """What is subtracted from the return."""
    baseline_value: float = 0.0
    """The constant baseline, in units of the return."""
    baseline_decay: float = 0.9
    """Of the moving average, per iteration."""
    learning_rate: float = 1e-3
    """Of Adam."""
    gamma: float = 0.99
    """Discount of the return."""
    value_coefficient: float = 0.5
    """Weight of the value loss."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""

    def validate(self) -> None:
        """Raises ValueError, in one line that starts with the field's name."""
        checks.at_least("num_environments", self.num_environments, 1)
        checks.at_least("num_steps", self.num_steps, 1)
        checks.one_of("baseline", self.baseline, BASELINES)
        checks.finite("baseline_value", self.baseline_value)
        checks.positive("learning_rate", self.learning_rate)
        for name in ("baseline_decay", "gamma"):
            checks.between(name, getattr(self, name), 0, 1)
        for name in ("value_coefficient", "entropy_coefficient"):
            checks.at_least(name, getattr(self, name), 0)

    def hyperparameters(self) -> Hyperparameters:
        """The fields of the same names as arrays."""
        return hyperparameters(Hyperparameters, self)


@struct.dataclass(kw_only=True)
class State:
    """A learner under way.

    Attributes:
      train: parameters, Adam and the number of updates.
      average: the moving average of returns; its weight is 0 before the first iteration.
      hyperparameters: what `loss` and `update` read.
    """

    train: TrainState
    average: Mean
    hyperparameters: Hyperparameters


def init(config: Config, network: nn.Module, key: Key, observation_space: Space) -> State:
    """A learner at the start."""
    params = network.init(key, core.example(observation_space))
    hyperparameters = config.hyperparameters()
    opt_state = make_optimizer(hyperparameters).init(params)
    return State(
        train=TrainState(params=params, opt_state=opt_state, step=jnp.int32(0)),
        average=Mean(total=jnp.float32(0), weight=jnp.float32(0)),
        hyperparameters=hyperparameters,
    )


def collect(
    config: Config, environment: Environment, network: nn.Module, key: Key, state: State
) -> Transition:
    """An episode from its start in each environment, and what came after those that ended early."""
    start_key, rollout_key, noise_key = jax.random.split(key, 3)
    shape = (config.num_steps, config.num_environments)
    return core.rollout(
        environment,
        policies.act(network, state.train.params),
        rollout_key,
        core.start_batch(environment, start_key, config.num_environments),
        num_steps=config.num_steps,
        noise=policies.draw_noise(environment.action_space, noise_key, shape),
    )[1]


def first_episode(steps: Transition) -> Array:
    """Where a step belongs to its column's first episode, `[T, B]` bool."""
    number = jnp.arange(1, len(steps.reward) + 1)[:, None]
    return steps.extras["episode_length"] == number


def loss(
    config: Config, network: nn.Module, state: State, params: PyTree, steps: Transition
) -> tuple[Array, dict[str, Mean]]:
    """The mean over episodes of the sum over their steps, and its parts.

    Args:
      config: which baseline.
      network: as in `make`.
      state: for the baseline and the hyper-parameters.
      params: at which to differentiate; those that collected `steps`.
      steps: leaves `[T, B, ...]`, each column from the start of an episode.

    Returns:
      `[]` and metrics. Apart from entropy and value loss, the negative gradient is an unbiased
      estimate of the policy gradient, but for what a bootstrapped value is wrong by.
    """
    hyperparameters = state.hyperparameters
    action_mask = steps.extras.get("action_mask")
    policy, value = policies.forward(network, params, steps.observation, action_mask)
    next_value = jnp.zeros_like(value)
    if config.baseline == "value":
        _, next_value = policies.forward(network, params, steps.next_observation, None)
    ended = steps.terminated | steps.truncated
    return_ = jax.vmap(returns.discounted_returns, in_axes=1, out_axes=1)(
        steps.reward,
        hyperparameters.gamma * (1 - steps.terminated),
        jax.lax.stop_gradient(next_value),
        ended,
    )
    baseline = {
        "none": jnp.float32(0),
        "constant": hyperparameters.baseline_value,
        "moving_average": state.average.mean,
        "value": value,
    }[config.baseline]
    counted = first_episode(steps)
    weight = hyperparameters.gamma ** (steps.extras["episode_length"] - 1)
    log_probability = policy.log_probability(steps.extras["latent"])
    policy_loss = weight * policy_gradient.reinforce_loss(log_probability, return_, baseline)
    entropy = policy.entropy()
    num_episodes = counted.shape[1]
    total = (
        jnp.sum(policy_loss - hyperparameters.entropy_coefficient * entropy, where=counted)
        / num_episodes
    )
    metrics = {
        "policy_loss": Mean.of(policy_loss, counted),
        "entropy": Mean.of(entropy, counted),
        "return_to_go": Mean(
            total=jnp.sum(weight * return_, where=counted), weight=jnp.sum(weight, where=counted)
        ),
    }
    if config.baseline == "value":
        metrics["value_loss"] = Mean.of(value_learning.squared_loss(value - return_), counted)
        total += hyperparameters.value_coefficient * metrics["value_loss"].mean
    return total, metrics


def update(
    config: Config, network: nn.Module, state: State, steps: Transition
) -> tuple[State, dict[str, Mean]]:
    """One gradient step on what `policies.act` at these parameters collected, here or on a host."""
    train, average, hyperparameters = state.train, state.average, state.hyperparameters
    gradient, metrics = jax.grad(
        lambda params: loss(config, network, state, params, steps), has_aux=True
    )(train.params)
    updates, opt_state = make_optimizer(hyperparameters).update(gradient, train.opt_state)
    params = optax.apply_updates(train.params, updates)
    decay = hyperparameters.baseline_decay
    average = Mean(
        total=decay * average.total + (1 - decay) * metrics["return_to_go"].mean,
        weight=decay * average.weight + (1 - decay),
    )
    is_last = steps.terminated | steps.truncated
    is_last = first_episode(steps) & is_last.at[-1].set(True)
    episodes = core.episode_metrics(steps.extras, is_last)
    train = TrainState(params=params, opt_state=opt_state, step=train.step + 1)
    return dataclasses.replace(state, train=train, average=average), {**episodes, **metrics}


def policy_gradients(config: Config, network: nn.Module, state: State, steps: Transition) -> Array:
    """What each episode alone says of dJ/dparams, `[B, P]`, without entropy and value loss.

    Their mean estimates the policy gradient; the sum of their variances is what a baseline lowers.
    `P` runs over all parameters as `ravel_pytree` orders them.
    """
    plain = dataclasses.replace(
        state.hyperparameters, value_coefficient=jnp.float32(0), entropy_coefficient=jnp.float32(0)
    )
    state = dataclasses.replace(state, hyperparameters=plain)

    def of_one(episode: Transition) -> Array:
        column = jax.tree.map(lambda leaf: leaf[:, None], episode)
        gradient, _ = jax.grad(
            lambda params: loss(config, network, state, params, column), has_aux=True
        )(state.train.params)
        return -ravel_pytree(gradient)[0]

    return jax.vmap(of_one, in_axes=1)(steps)


def make(config: Config, environment: Environment, network: nn.Module) -> Algorithm:
    """REINFORCE on `environment` with `network`.

    Args:
      config: validated here.
      environment: its `action_mask`, where it has one, is always obeyed.
      network: a Flax module `(observation, *, action_mask) -> (policy, value [...])`, the policy
        one of `nn.policies`, such as `nn.heads.ActorCritic` or `nn.heads.TabularActorCritic`; its
        value is read by the value baseline alone.

    Returns:
      An `Algorithm` whose state is a `State` and whose step is one iteration.

    Raises:
      ValueError: for a setting out of range, or an action space that no policy can cover.
    """
    config.validate()
    policies.check_action_space("environment.action_space", environment.action_space)

    def step(key: Key, state: State) -> tuple[State, dict[str, Mean]]:
        steps = collect(config, environment, network, key, state)
        return update(config, network, state, steps)

    return Algorithm(
        init=lambda key: init(config, network, key, environment.observation_space), step=step
    )


def make_optimizer(hyperparameters: Hyperparameters) -> optax.GradientTransformation:
    """Adam, its moments one flat vector."""
    return optax.flatten(optax.adam(hyperparameters.learning_rate))
