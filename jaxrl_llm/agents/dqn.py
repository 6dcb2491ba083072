"""Deep Q-learning, with its well-known improvements as settings.

One step of the algorithm takes `num_steps` steps in each of `num_environments` environments, and
after every `train_interval` of them `num_updates` optimiser steps on transitions drawn from a
replay buffer. Read it from the top: `act`, `collect`, `loss`, `update`, `make`.

Source: Mnih et al. (2015), "Human-level control through deep reinforcement learning", algorithm 1.
  Double targets are those of van Hasselt et al. (2016), arXiv:1509.06461; priorities those of
  Schaul et al. (2016), "Prioritized experience replay", arXiv:1511.05952; targets of several steps
  as in Hessel et al. (2018), "Rainbow"; the dueling network is `nn.critics.QNetwork`'s. A timeout
  bootstraps from the state that it cut short.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.flatten_util import ravel_pytree

from jaxrl_llm import checks
from jaxrl_llm.data import replay
from jaxrl_llm.data.replay import Replay
from jaxrl_llm.envs import core
from jaxrl_llm.kernels import bellman, exploration, value_learning
from jaxrl_llm.types import (
    Algorithm,
    Array,
    Discrete,
    Environment,
    Key,
    Mean,
    PyTree,
    TrainState,
    Transition,
    hyperparameters,
)

QFunction = Callable[[PyTree, PyTree], Array]  # (parameters, observation) -> Q [..., A]

_LOSS_PARTS = ("loss", "q", "td_error")
_LEAST_PRIORITY = 1e-6


@struct.dataclass(kw_only=True)
class Hyperparameters:
    """Numbers that a sweep may vary, `[]` float32 each; the fields of `Config` say what they do."""

    learning_rate: Array
    learning_rate_steps: Array
    gamma: Array
    tau: Array
    epsilon_start: Array
    epsilon_end: Array
    epsilon_steps: Array
    importance_exponent: Array
    importance_steps: Array


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of DQN."""

    num_environments: int = 10
    """Environments stepped side by side."""
    num_steps: int = 50
    """Steps in each environment per step of the algorithm."""
    train_interval: int = 1
    """Steps in each environment between trainings."""
    num_updates: int = 1
    """Optimiser steps per training."""
    batch_size: int = 128
    """Transitions per optimiser step."""
    buffer_size: int = 10_000
    """Transitions remembered; the oldest are forgotten."""
    warmup_steps: int = 1_000
    """Steps of random actions in each environment, before anything is learned."""
    learning_rate: float = 2.5e-4
    """Of Adam, at the start."""
    learning_rate_steps: float | None = None
    """Optimiser steps in which it falls to 0, in a straight line; never when None."""
    max_gradient_norm: float | None = None
    """Gradients are scaled down to this global norm; never when None."""
    gamma: float = 0.99
    """Discount of the return."""
    is_double: bool = False
    """Whether the online network chooses the action that the target network evaluates."""
    num_return_steps: int = 1
    """Rewards in a target before it bootstraps; fewer where the episode ends."""
    huber_delta: float | None = None
    """Errors beyond this, in units of reward, count linearly; None squares them all."""
    target_interval: int = 50
    """Optimiser steps between updates of the target network."""
    tau: float = 1.0
    """The target network moves this share of the way: 1 is a copy, less with interval 1 is soft."""
    epsilon_start: float = 1.0
    """Probability of a random action, at the start."""
    epsilon_end: float = 0.05
    """Probability of a random action, at the end."""
    epsilon_steps: int = 250_000
    """Transitions from the one to the other, in a straight line; warm-up included."""
    priority_exponent: float = 0.0
    """Transitions are replayed in proportion to |TD error| to this power; 0 is uniform."""
    importance_exponent: float = 0.4
    """Of the weights that make up for priorities, at the start; 1 at the end makes up in full."""
    importance_steps: int = 50_000
    """Optimiser steps from the one to the other."""

    def hyperparameters(self) -> Hyperparameters:
        """The fields of the same names as arrays; a rate that never falls takes for ever."""
        filled = dataclasses.replace(self, learning_rate_steps=self.learning_rate_steps or jnp.inf)
        return hyperparameters(Hyperparameters, filled)

    def validate(self) -> None:
        """Raises ValueError, in one line that starts with the field's name."""
        counts = ("num_environments", "num_steps", "train_interval", "num_updates", "batch_size")
        for name in (*counts, "num_return_steps", "target_interval"):
            checks.at_least(name, getattr(self, name), 1)
        checks.divisible("num_steps", self.num_steps, "train_interval", self.train_interval)
        checks.at_least("warmup_steps", self.warmup_steps, self.num_return_steps)
        added = self.num_environments * max(self.warmup_steps, self.train_interval)
        checks.at_least("buffer_size", self.buffer_size, max(self.batch_size, added))
        for name in ("learning_rate", "learning_rate_steps", "max_gradient_norm", "huber_delta"):
            if getattr(self, name) is not None:
                checks.positive(name, getattr(self, name))
        exponents = ("priority_exponent", "importance_exponent")
        for name in ("gamma", "tau", "epsilon_start", "epsilon_end", *exponents):
            checks.between(name, getattr(self, name), 0, 1)
        for name in ("epsilon_steps", "importance_steps"):
            checks.at_least(name, getattr(self, name), 0)


@struct.dataclass(kw_only=True)
class State:
    """A learner under way.

    Attributes:
      train: its parameters; the optimiser's state is that of the same parameters as one vector.
      target_params: of the target network.
      replay: flashbax's state of the buffer, one `Transition` a row.
      running: the environments `[B]` it is acting in.
      num_transitions: `[]` int32, collected so far, warm-up included.
      hyperparameters: read at every step.
    """

    train: TrainState
    target_params: PyTree
    replay: Any
    running: core.Running
    num_transitions: Array
    hyperparameters: Hyperparameters


def draw(config: Config, environment: Environment, key: Key, num_steps: int) -> Any:
    """What chance decides in `T` steps, `[T, B, ...]`, drawn at once: a scan draws slowly.

    That is uniform numbers to act by, keys of the environments, and episodes to go on with.
    """
    shape = (num_steps, config.num_environments)
    uniform_key, step_key, reset_key = jax.random.split(key, 3)
    start = jax.vmap(jax.vmap(partial(core.start, environment), (0, None)), (0, None))
    fresh = start(jax.random.split(reset_key, shape), environment.default_params)
    return jax.random.uniform(uniform_key, shape), jax.random.split(step_key, shape), fresh


def q_values(
    network: nn.Module, unravel: Callable[[PyTree], PyTree], params: PyTree, observation: PyTree
) -> Array:
    """Q `[..., A]`; `unravel` makes the network's parameters of `params`, which may be a vector."""
    q: Any = network.apply(unravel(params), observation)
    return q


def act(q: Array, epsilon: Array, uniform: Array, action_mask: Array | None) -> Array:
    """The best allowed action by `q` `[A]`, or with probability epsilon any; `uniform` decides."""
    allowed = jnp.ones(q.shape, bool) if action_mask is None else action_mask
    explores, rank = exploration.epsilon_greedy_draw(uniform, epsilon, jnp.sum(allowed))
    ranked = jnp.argmax(jnp.cumsum(allowed) > rank)
    greedy = bellman.greedy(jnp.where(allowed, q, -jnp.inf))
    return jnp.where(explores, ranked, greedy).astype(jnp.int32)


def epsilon(state: State) -> Array:
    """The probability of a random action now, `[]`."""
    h = state.hyperparameters
    return exploration.linear_schedule(
        state.num_transitions, h.epsilon_start, h.epsilon_end, h.epsilon_steps
    )


def collect(
    environment: Environment,
    q_function: QFunction,
    params: PyTree,
    epsilon: Array,
    draws: Any,
    running: core.Running,
) -> tuple[core.Running, Transition, dict[str, Mean]]:
    """Acts for the `T` steps of `draws`.

    Returns the environments afterwards, transitions `[T, B, ...]`, whose extras hold the mask, if
    any, of the observation BEFORE any reset, and metrics of the episodes that ended.
    """
    shared = environment.default_params
    advance = jax.vmap(partial(core.auto_reset_step, environment), in_axes=(0, 0, 0, 0, None))

    def body(running: core.Running, draws: Any) -> Any:
        uniform, keys, fresh = draws
        mask = None
        if environment.action_mask is not None:
            mask = jax.vmap(environment.action_mask, in_axes=(0, None))(running.state, shared)
        q = q_function(params, running.observation)
        action = jax.vmap(act, in_axes=(0, None, 0, 0))(q, epsilon, uniform, mask)
        following, step = advance(keys, running, action, fresh, shared)
        transition = Transition(
            observation=running.observation,
            action=action,
            reward=step.reward,
            terminated=step.terminated,
            truncated=step.truncated,
            next_observation=step.observation,
            extras={} if mask is None else {"next_action_mask": step.info["action_mask"]},
        )
        ended = step.terminated | step.truncated
        episodes = {
            "episode_return": Mean.of(running.episode_return + step.reward, ended),
            "episode_length": Mean.of(running.episode_length + 1, ended),
        }
        return following, (transition, episodes)

    running, (steps, episodes) = jax.lax.scan(body, running, draws)
    return running, steps, jax.tree.map(jnp.sum, episodes)


def loss(
    config: Config,
    q_function: QFunction,
    params: PyTree,
    target_params: PyTree,
    gamma: Array,
    window: Transition,
    weight: Array,
) -> tuple[Array, tuple[Array, Array]]:
    """The mean loss of the first step of each window `[N, n, ...]`, by its weight `[N]`.

    A target sums the rewards of the window up to the end of an episode, then bootstraps. Returns
    also Q of the actions taken and their TD errors, `[N]` each.
    """
    parts = jax.vmap(value_learning.n_step_target_parts)(
        window.reward, gamma * (1 - window.terminated), window.terminated | window.truncated
    )
    last = jax.vmap(lambda window, last: jax.tree.map(lambda leaf: leaf[last], window))(
        window, parts.last
    )
    next_q = q_function(target_params, last.next_observation)
    chooser = q_function(params, last.next_observation) if config.is_double else next_q
    target = jax.vmap(value_learning.double_q_learning_target)(
        parts.return_, parts.discount, chooser, next_q, last.extras.get("next_action_mask")
    )
    q = q_function(params, jax.tree.map(lambda leaf: leaf[:, 0], window.observation))
    # A sum rather than a look-up, whose gradient would be a scatter, row by row on a CPU.
    is_taken = window.action[:, :1] == jnp.arange(q.shape[-1])[None]
    q = jnp.sum(jnp.where(is_taken, q, 0), axis=-1)
    error = target - q
    delta, squared = config.huber_delta, value_learning.squared_loss
    losses = squared(error) if delta is None else value_learning.huber_loss(error, delta)
    return jnp.mean(weight * losses), (q, error)


def update(
    config: Config, q_function: QFunction, buffer: Replay, chance: PyTree, state: State
) -> tuple[State, Array]:
    """One optimiser step, and perhaps one of the target network; means of `_LOSS_PARTS`, `[3]`."""
    h, train = state.hyperparameters, state.train
    sample = buffer.sample(state.replay, chance)
    weight = jnp.ones(config.batch_size)
    if config.priority_exponent > 0:
        beta = exploration.linear_schedule(
            train.step, h.importance_exponent, jnp.float32(1), h.importance_steps
        )
        weight = replay.importance_weights(sample.probability, beta)
    objective = jax.value_and_grad(partial(loss, config, q_function), has_aux=True)
    (total, (q, error)), gradient = objective(
        train.params, state.target_params, h.gamma, sample.window, weight
    )
    rate = h.learning_rate * jnp.maximum(1 - train.step / h.learning_rate_steps, 0)
    updates, opt_state = make_optimizer(config, rate).update(gradient, train.opt_state)
    params: Any = optax.apply_updates(train.params, updates)
    train = TrainState(params=params, opt_state=opt_state, step=train.step + 1)
    share = jnp.where(train.step % config.target_interval == 0, h.tau, 0)
    target_params = optax.incremental_update(params, state.target_params, share)
    state = dataclasses.replace(state, train=train, target_params=target_params)
    if buffer.set_priorities is not None:
        priority = jnp.abs(error) + _LEAST_PRIORITY
        remembered = buffer.set_priorities(state.replay, sample.index, priority)
        state = dataclasses.replace(state, replay=remembered)
    return state, jnp.stack([total, jnp.mean(q), jnp.mean(jnp.abs(error))])


def make(config: Config, environment: Environment, network: nn.Module) -> Algorithm:
    """DQN on `environment` with `network`.

    Args:
      config: validated here.
      environment: with Discrete actions; its `action_mask`, where it has one, is always obeyed,
        and says what the best action of the next state may be.
      network: a Flax module `observation -> Q [..., A]`, such as `nn.critics.QNetwork`, or
        `nn.heads.TabularEmbedding(num_states, num_actions)`.

    Returns:
      An `Algorithm` whose state is a `State`; `init` also fills the buffer with `warmup_steps`
      steps of random actions in each environment.

    Raises:
      ValueError: for a setting out of range, or an action space that is not discrete.
    """
    config.validate()
    if not isinstance(environment.action_space, Discrete):
        space = type(environment.action_space).__name__
        raise ValueError(f"environment.action_space is a {space}; dqn takes Discrete actions")
    buffer = replay.make(
        num_environments=config.num_environments,
        length=config.buffer_size // config.num_environments,
        window=config.num_return_steps,
        batch_size=config.batch_size,
        priority_exponent=config.priority_exponent,
    )

    def init(key: Key) -> State:
        network_key, start_key, warmup_key = jax.random.split(key, 3)
        params = network.init(network_key, core.example(environment.observation_space))
        opt_state = make_optimizer(config, config.learning_rate).init(ravel_pytree(params)[0])
        running = core.start_batch(environment, start_key, config.num_environments)
        draws = draw(config, environment, warmup_key, config.warmup_steps)
        always, q_function = jnp.float32(1), partial(q_values, network, lambda params: params)
        running, steps, _ = collect(environment, q_function, params, always, draws, running)
        empty = buffer.init(jax.tree.map(lambda leaf: leaf[0, 0], steps))
        return State(
            train=TrainState(params=params, opt_state=opt_state, step=jnp.int32(0)),
            target_params=params,
            replay=buffer.add(empty, steps),
            running=running,
            num_transitions=jnp.int32(config.warmup_steps * config.num_environments),
            hyperparameters=config.hyperparameters(),
        )

    def one_round(q_function: QFunction, state: State, inputs: tuple[Any, PyTree]) -> Any:
        draws, chances = inputs
        running, steps, episodes = collect(
            environment, q_function, state.train.params, epsilon(state), draws, state.running
        )
        state = dataclasses.replace(
            state,
            replay=buffer.add(state.replay, steps),
            running=running,
            num_transitions=state.num_transitions + steps.reward.size,
        )
        one_update = partial(update, config, q_function, buffer)
        state, parts = jax.lax.scan(lambda s, chance: one_update(chance, s), state, chances)
        return state, (episodes, parts)

    def step(key: Key, state: State) -> tuple[State, dict[str, Mean]]:
        draw_key, replay_key = jax.random.split(key)
        num_rounds = config.num_steps // config.train_interval
        draws = jax.tree.map(
            lambda leaf: leaf.reshape(num_rounds, config.train_interval, *leaf.shape[1:]),
            draw(config, environment, draw_key, config.num_steps),
        )
        chances = buffer.draw(replay_key, (num_rounds, config.num_updates))
        unravel = ravel_pytree(state.train.params)[1]
        flat = _with_params(state, lambda params: ravel_pytree(params)[0])
        one = partial(one_round, partial(q_values, network, unravel))
        flat, (episodes, parts) = jax.lax.scan(one, flat, (draws, chances))
        columns = zip(_LOSS_PARTS, parts.reshape(-1, len(_LOSS_PARTS)).T, strict=True)
        metrics = {name: Mean.of(column) for name, column in columns}
        metrics |= {"epsilon": Mean.of(epsilon(state)), **jax.tree.map(jnp.sum, episodes)}
        return _with_params(flat, unravel), metrics

    return Algorithm(init=init, step=step)


def make_optimizer(config: Config, learning_rate: float | Array) -> optax.GradientTransformation:
    """Adam, after clipping by the global norm where that is asked for."""
    most = config.max_gradient_norm
    clip = optax.identity() if most is None else optax.clip_by_global_norm(most)
    return optax.chain(clip, optax.adam(learning_rate))


def _with_params(state: State, change: Callable[[PyTree], PyTree]) -> State:
    """Both networks' parameters as vectors, which an optimiser moves in few operations, or back."""
    train = dataclasses.replace(state.train, params=change(state.train.params))
    return dataclasses.replace(state, train=train, target_params=change(state.target_params))
