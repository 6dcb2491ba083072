"""Soft actor-critic, for discrete actions and for vectors in a box.

The reward has a bonus, temperature · entropy of the policy, so that the best policy is as random as
it can afford to be. Two critics learn its soft action values from a replay buffer, the actor climbs
the lesser of the two, and the temperature is fixed or keeps the entropy at a target.

One step of the algorithm is `num_steps` steps in each of `num_environments` environments, then
`num_updates` updates. Read it from the top: `collect`, `soft_values`, `losses`, `update`, `make`.

Source: Haarnoja et al. (2018), "Soft Actor-Critic Algorithms and Applications", arXiv:1812.05905,
  algorithm 1; Christodoulou (2019), "Soft Actor-Critic for Discrete Action Settings",
  arXiv:1910.07207. Differences: a timeout bootstraps; critics, actor and temperature step together;
  critics and entropies see actions scaled to [-1, 1], so that no setting depends on a dose's unit.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.flatten_util import ravel_pytree

from jaxrl_llm import checks
from jaxrl_llm.envs import core
from jaxrl_llm.kernels import policy_gradient, value_learning
from jaxrl_llm.nn import policies
from jaxrl_llm.types import (
    Algorithm,
    Array,
    Box,
    Discrete,
    Environment,
    Hybrid,
    Key,
    Mean,
    PyTree,
    TimeStep,
    TrainState,
    Transition,
    hyperparameters,
)

_ADAM = optax.scale_by_adam()


@struct.dataclass(kw_only=True)
class Hyperparameters:
    """Numbers that a sweep may vary, `[]` float32 each; the fields of `Config` say what they do."""

    actor_learning_rate: Array
    critic_learning_rate: Array
    temperature_learning_rate: Array
    gamma: Array
    tau: Array
    temperature: Array
    target_entropy: Array
    target_entropy_share: Array


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of SAC; the defaults are the published ones, with more environments at once."""

    num_environments: int = 16
    """Environments stepped side by side."""
    num_steps: int = 4
    """Steps in each environment before the updates of one iteration."""
    num_updates: int = 16
    """Updates after them."""
    batch_size: int = 256
    """Transitions in an update."""
    buffer_size: int = 100_000
    """Transitions remembered; the oldest are forgotten."""
    warmup_steps: int = 64
    """Steps of random actions in each environment, before anything is learned."""
    actor_learning_rate: float = 3e-4
    """Of Adam."""
    critic_learning_rate: float = 3e-4
    """Of Adam."""
    temperature_learning_rate: float = 3e-4
    """Of Adam, on the logarithm of the temperature."""
    gamma: float = 0.99
    """Discount of the return."""
    tau: float = 0.005
    """The target critics move this share of the way to the critics at each update."""
    temperature: float = 1.0
    """Reward that a nat of entropy is worth, at the start."""
    learn_temperature: bool = True
    """Whether the temperature then follows the target entropy, or stays as it is."""
    target_entropy: float = -1.0
    """Of a bounded vector: nats for each dimension."""
    target_entropy_share: float = 0.5
    """Of a discrete action: share of the log of the number of allowed ones."""

    def hyperparameters(self) -> Hyperparameters:
        """The fields of the same names as arrays."""
        return hyperparameters(Hyperparameters, self)

    def validate(self) -> None:
        """Raises ValueError, in one line that starts with the field's name."""
        for name in ("num_environments", "num_steps", "num_updates", "batch_size", "warmup_steps"):
            checks.at_least(name, getattr(self, name), 1)
        collected = self.num_environments * max(self.num_steps, self.warmup_steps)
        checks.at_least("buffer_size", self.buffer_size, max(collected, self.batch_size))
        for name in ("actor_learning_rate", "critic_learning_rate", "temperature_learning_rate"):
            checks.positive(name, getattr(self, name))
        checks.positive("temperature", self.temperature)
        checks.finite("target_entropy", self.target_entropy)
        for name in ("gamma", "tau", "target_entropy_share"):
            checks.between(name, getattr(self, name), 0, 1)


@struct.dataclass(kw_only=True)
class Parameters:
    """What is learned; the temperature is `hyperparameters.temperature` · exp(log_temperature)."""

    actor: PyTree
    critic: PyTree
    log_temperature: Array


@struct.dataclass(kw_only=True)
class State:
    """A learner under way, its buffer of transitions, and the environments `[B]` it is acting in.

    `train.params` are `Parameters`, and `target` follows them; only its critics are used.
    """

    train: TrainState
    target: Parameters
    replay: PyTree
    running: core.Running
    hyperparameters: Hyperparameters


@struct.dataclass(kw_only=True)
class Seen:
    """An observation and the `action_mask` `[..., A]` there, None where all actions are allowed.

    A mask that travels with its observation is that of the next state BEFORE any reset, too.
    """

    observation: PyTree
    action_mask: Array | None


class Learner(NamedTuple):
    """What does not change while it learns: settings, kind of action, networks."""

    config: Config
    action_space: Discrete | Box
    actor: nn.Module
    critic: nn.Module

    def policy(self, params: PyTree, seen: Seen) -> Any:
        """Categorical, or squashed into [-1, 1]."""
        policy = self.actor.apply(params, seen.observation, action_mask=seen.action_mask)
        if isinstance(policy, policies.Categorical):
            return policy
        return cast(Any, policy).replace(low=-1.0, high=1.0)

    def q(self, params: PyTree, seen: Seen, *action: Array) -> Any:
        """Both critics, `[2, N, A]`; of bounded vectors `action` `[N, D]`, `[2, N]`."""
        return self.critic.apply(params, seen.observation, *action)


def collect(
    environment: Environment, act: core.BatchPolicy, noise: Array, key: Key, running: core.Running
) -> tuple[core.Running, Transition, dict[str, Mean]]:
    """Acts for as many steps as there is `noise`, `[T, B, ...]`, for `act` to draw from.

    Returns the environments afterwards, transitions `[T, B, ...]`, and sums over ended episodes.
    """
    running, steps = core.rollout(environment, act, key, running, num_steps=len(noise), noise=noise)
    ended = steps.terminated | steps.truncated
    metrics = core.episode_metrics(steps.extras, ended)
    return running, dataclasses.replace(steps, extras={}), metrics


def soft_values(
    learner: Learner, actor: PyTree, critic: PyTree, seen: Seen, noise: Array, temperature: Array
) -> tuple[Array, Array]:
    """V = E_a[min_i Q_i(s, a) - temperature log pi(a | s)] and the entropy of pi, `[N]` each.

    The expectation is exact over discrete actions, and one reparametrised sample of others. It is
    what the critics' targets are made of, with target parameters for `critic`, and what the actor
    climbs.
    """
    policy = learner.policy(actor, seen)
    if isinstance(policy, policies.Categorical):
        q = jnp.min(learner.q(critic, seen), axis=0)
        loss = jax.vmap(value_learning.sac_discrete_actor_loss, in_axes=(0, 0, None))
        return -loss(policy.logits, q, temperature), policy.entropy()
    latent = policy.sample(noise)
    log_probability = policy.log_probability(latent)
    q = jnp.min(learner.q(critic, seen, policy.action(latent)), axis=0)
    return -value_learning.sac_actor_loss(log_probability, q, temperature), -log_probability


def losses(
    learner: Learner,
    hyperparameters: Hyperparameters,
    params: Parameters,
    target: PyTree,
    batch: Transition,
    noise: Array,
) -> tuple[Array, dict[str, Array]]:
    """The sum of the three mean losses of a minibatch, and what is worth logging.

    Each parameter receives the gradient of its own loss alone. `noise` `[2, N, ...]` is for the
    actions here and in the next states.
    """
    constant = jax.lax.stop_gradient(params)
    temperature = hyperparameters.temperature * jnp.exp(constant.log_temperature)
    next_value, _ = soft_values(
        learner, constant.actor, target, batch.next_observation, noise[1], temperature
    )
    discount = hyperparameters.gamma * (1 - batch.terminated)
    q_target = value_learning.soft_q_target(batch.reward, discount, next_value)
    if isinstance(learner.action_space, Discrete):
        q = learner.q(params.critic, batch.observation)
        q = jnp.take_along_axis(q, batch.action[None, :, None], axis=2)[..., 0]
        num_allowed = jnp.float32(learner.action_space.num)
        if batch.observation.action_mask is not None:
            num_allowed = jnp.sum(batch.observation.action_mask, axis=1, dtype=jnp.float32)
        target_entropy = hyperparameters.target_entropy_share * jnp.log(num_allowed)
    else:
        q = learner.q(params.critic, batch.observation, batch.action)
        target_entropy = hyperparameters.target_entropy * learner.action_space.shape[0]
    critic_loss = jnp.sum(value_learning.squared_loss(q - q_target[None]), axis=0)
    value, entropy = soft_values(
        learner, params.actor, constant.critic, batch.observation, noise[0], temperature
    )
    total = jnp.mean(critic_loss) - jnp.mean(value)
    if learner.config.learn_temperature:
        loss = value_learning.temperature_loss(params.log_temperature, entropy, target_entropy)
        total += jnp.mean(loss)
    return total, {
        "critic_loss": jnp.mean(critic_loss),
        "actor_loss": -jnp.mean(value),
        "temperature": temperature,
        "entropy": jnp.mean(entropy),
    }


def update(
    learner: Learner, key: Key, state: State, batches: Transition
) -> tuple[State, dict[str, Mean]]:
    """One update for each of `batches` `[U, N, ...]`.

    Meanwhile all parameters are one flat vector: Adam and the target are then a few large
    operations instead of many small ones, which take longer than small networks themselves.
    """
    hyperparameters, shape = state.hyperparameters, batches.reward.shape
    noise = policies.draw_noise(learner.action_space, key, (shape[0], 2, shape[1]))
    params, unravel = ravel_pytree(state.train.params)
    target, _ = ravel_pytree(state.target)
    rate_of_part = Parameters(
        actor=hyperparameters.actor_learning_rate,
        critic=hyperparameters.critic_learning_rate,
        log_temperature=hyperparameters.temperature_learning_rate,
    )
    rate_of_leaf = jax.tree.broadcast(rate_of_part, state.train.params)
    rates, _ = ravel_pytree(jax.tree.map(jnp.full_like, state.train.params, rate_of_leaf))

    def one(carry: PyTree, inputs: PyTree) -> tuple[PyTree, dict[str, Array]]:
        (params, opt_state, target), (batch, noise) = carry, inputs
        critic = unravel(target).critic
        loss = partial(losses, learner, hyperparameters)
        gradient, metrics = jax.grad(
            lambda params: loss(unravel(params), critic, batch, noise), has_aux=True
        )(params)
        direction, opt_state = _ADAM.update(gradient, opt_state)
        params = params - rates * cast(Array, direction)
        target = target + hyperparameters.tau * (params - target)
        return (params, opt_state, target), metrics

    carry = params, state.train.opt_state, target
    (params, opt_state, target), metrics = jax.lax.scan(one, carry, (batches, noise))
    step = state.train.step + shape[0]
    train = TrainState(params=unravel(params), opt_state=opt_state, step=step)
    state = dataclasses.replace(state, train=train, target=unravel(target))
    return state, {name: Mean.of(values) for name, values in metrics.items()}


def make(
    config: Config, environment: Environment, actor: nn.Module, critic: nn.Module
) -> Algorithm:
    """SAC on `environment`.

    Args:
      config: validated here.
      environment: with Discrete actions, whose `action_mask`, where it has one, is always obeyed,
        or a Box of one dimension.
      actor: a Flax module `(observation, *, action_mask) -> policy` of `nn.policies`, such as
        `nn.heads.Actor(environment.action_space, deviation="network")` or `nn.heads.TabularActor`.
      critic: a Flax module of twins `[2, ...]`, such as `nn.critics.TwinQ`: `(observation)` ->
        `[..., A]` for discrete actions, `(observation, action)` -> `[...]` for others.

    Returns:
      An `Algorithm` whose state is a `State` and whose step is one iteration. `init` also fills the
      buffer with `warmup_steps` steps of random actions in each environment.

    Raises:
      ValueError: for a setting out of range, or an action space that it cannot serve.
    """
    import flashbax

    config.validate()
    space = environment.action_space
    policies.check_action_space("environment.action_space", space)
    if isinstance(space, Hybrid):
        raise ValueError("environment.action_space is Hybrid; sac takes Discrete or Box actions")
    learner = Learner(config=config, action_space=space, actor=actor, critic=critic)
    adapted = adapt(environment)
    replay = flashbax.make_item_buffer(
        config.buffer_size, 1, config.batch_size, add_sequences=True, add_batches=True
    )

    def explore(uniform: Array, seen: Seen, _: Any) -> tuple[Array, dict[str, Array]]:
        if isinstance(space, Box):
            return 2 * uniform - 1, {}
        mask = jnp.ones((*uniform.shape, space.num), bool)
        mask = mask if seen.action_mask is None else seen.action_mask
        return jax.vmap(policy_gradient.sample_action)(jnp.where(mask, 0.0, -jnp.inf), uniform), {}

    def init(key: Key) -> State:
        actor_key, critic_key, start_key, noise_key, warmup_key = jax.random.split(key, 5)
        observation = core.example(environment.observation_space)
        action = (core.example(space),) if isinstance(space, Box) else ()
        params = Parameters(
            actor=actor.init(actor_key, observation),
            critic=critic.init(critic_key, observation, *action),
            log_temperature=jnp.float32(0),
        )
        opt_state = _ADAM.init(ravel_pytree(params)[0])
        running = core.start_batch(adapted, start_key, config.num_environments)
        shape = (config.warmup_steps, config.num_environments, *core.example(space).shape)
        noise = jax.random.uniform(noise_key, shape)
        running, steps, _ = collect(adapted, explore, noise, warmup_key, running)
        empty = replay.init(jax.tree.map(lambda leaf: leaf[0, 0], steps))
        return State(
            train=TrainState(params=params, opt_state=opt_state, step=jnp.int32(0)),
            target=params,
            replay=replay.add(empty, steps),
            running=running,
            hyperparameters=config.hyperparameters(),
        )

    def step(key: Key, state: State) -> tuple[State, dict[str, Mean]]:
        noise_key, collect_key, replay_key, update_key = jax.random.split(key, 4)

        def act(noise: Array, seen: Seen, _: Any) -> tuple[Array, dict[str, Array]]:
            policy: Any = learner.policy(state.train.params.actor, seen)
            return policy.action(policy.sample(noise)), {}

        noise = policies.draw_noise(space, noise_key, (config.num_steps, config.num_environments))
        running, steps, episodes = collect(adapted, act, noise, collect_key, state.running)
        memory = replay.add(state.replay, steps)
        keys = jax.random.split(replay_key, config.num_updates)
        with jax.numpy_rank_promotion("allow"):  # flashbax relies on it
            batches = jax.vmap(replay.sample, in_axes=(None, 0))(memory, keys).experience
        state = dataclasses.replace(state, replay=memory, running=running)
        state, metrics = update(learner, update_key, state, batches)
        return state, {**episodes, **metrics}

    return Algorithm(init=init, step=step)


def adapt(environment: Environment) -> Environment:
    """The same environment, whose observation is `Seen` and whose Box is [-1, 1]."""
    space = environment.action_space

    def see(state: PyTree, observation: PyTree, params: PyTree) -> Seen:
        mask = environment.action_mask and environment.action_mask(state, params)
        return Seen(observation=observation, action_mask=mask)

    def reset(key: Key, params: PyTree) -> tuple[PyTree, Seen]:
        state, observation = environment.reset(key, params)
        return state, see(state, observation, params)

    def step(key: Key, state: PyTree, action: Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        if isinstance(space, Box):
            low, high = jnp.asarray(space.low), jnp.asarray(space.high)
            action = low + (high - low) * (action + 1) / 2
        state, time_step = environment.step(key, state, action, params)
        following = see(state, time_step.observation, params)
        return state, dataclasses.replace(time_step, observation=following)

    return dataclasses.replace(environment, reset=reset, step=step, action_mask=None)
