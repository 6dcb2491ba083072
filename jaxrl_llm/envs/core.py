"""What all environments share: auto-reset, time limits and vectorised rollouts.

An `Environment` (in `types`) is a pair of pure functions of ONE patient. Batching and resetting
exist here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.types import Array, Discrete, Environment, Key, PyTree, Space, TimeStep, Transition

# (key, observation [B, ...], action_mask [B, A] or None) -> (action [B, ...], extras)
BatchPolicy = Callable[[Key, PyTree, Array | None], tuple[Array, dict[str, Array]]]


@struct.dataclass(kw_only=True)
class Running:
    """An environment under way; leaves have a leading `[B]` in a batch.

    Attributes:
      state: of the environment, after any reset.
      observation: of that state.
      episode_return: `[]` float32, undiscounted sum of the episode's rewards so far.
      episode_length: `[]` int32, its steps so far.
    """

    state: PyTree
    observation: PyTree
    episode_return: Array
    episode_length: Array


def start(environment: Environment, key: Key, params: PyTree) -> Running:
    """One environment at the beginning of an episode."""
    state, observation = environment.reset(key, params)
    return Running(
        state=state,
        observation=observation,
        episode_return=jnp.float32(0),
        episode_length=jnp.int32(0),
    )


def start_batch(
    environment: Environment,
    key: Key,
    num_environments: int,
    params: PyTree | None = None,
    *,
    params_axis: int | None = None,
) -> Running:
    """`num_environments` environments at the beginning of an episode, leaves `[B, ...]`.

    Args:
      environment: of one patient.
      key: consumed.
      num_environments: B, at least 1.
      params: the environment's parameters; its defaults when None.
      params_axis: None when all environments share `params`, 0 when its leaves are `[B, ...]`,
        one set of parameters a patient.
    """
    checks.at_least("num_environments", num_environments, 1)
    params = environment.default_params if params is None else params
    keys = jax.random.split(key, num_environments)
    return jax.vmap(lambda key, params: start(environment, key, params), in_axes=(0, params_axis))(
        keys, params
    )


def auto_reset_step(
    environment: Environment, key: Key, running: Running, action: Array, params: PyTree
) -> tuple[Running, TimeStep]:
    """One step of one environment, and a reset with the SAME params where the episode ended.

    The reset is computed at every step and selected where it is needed, because under `vmap` a
    branch would run both sides anyway.

    Returns:
      What is under way afterwards, and the time step BEFORE any reset: its observation is the
      terminal one.
    """
    step_key, reset_key = jax.random.split(key)
    state, time_step = environment.step(step_key, running.state, action, params)
    ended = time_step.terminated | time_step.truncated
    fresh = start(environment, reset_key, params)
    continued = Running(
        state=state,
        observation=time_step.observation,
        episode_return=running.episode_return + time_step.reward,
        episode_length=running.episode_length + 1,
    )
    return jax.tree.map(lambda a, b: jnp.where(ended, a, b), fresh, continued), time_step


def rollout(
    environment: Environment,
    policy: BatchPolicy,
    key: Key,
    running: Running,
    params: PyTree | None = None,
    *,
    num_steps: int,
    params_axis: int | None = None,
) -> tuple[Running, Transition]:
    """Steps a batch of environments `num_steps` times under `policy`, resetting as they end.

    Args:
      environment: of one patient.
      policy: `(key, observation, action_mask) -> (action, extras)` of the whole batch;
        `action_mask` is None where the environment has none.
      key: consumed.
      running: `[B]` environments under way, from `start_batch` or from an earlier call.
      params: as in `start_batch`.
      num_steps: T.
      params_axis: as in `start_batch`.

    Returns:
      What is under way afterwards, and a `Transition` `[T, B, ...]`. Its `extras` are the policy's
      and, of the episode including this step, `episode_return` and `episode_length`; they are the
      totals where `terminated | truncated`. Where the environment has masks, `action_mask` too.
    """
    params = environment.default_params if params is None else params
    num_environments = running.episode_length.shape[0]
    step = jax.vmap(
        lambda *arguments: auto_reset_step(environment, *arguments), in_axes=(0, 0, 0, params_axis)
    )

    def body(running: Running, key: Key) -> tuple[Running, Transition]:
        policy_key, environment_key = jax.random.split(key)
        masks = {}
        if environment.action_mask is not None:
            mask = jax.vmap(environment.action_mask, in_axes=(0, params_axis))
            masks["action_mask"] = mask(running.state, params)
        action, extras = policy(policy_key, running.observation, masks.get("action_mask"))
        keys = jax.random.split(environment_key, num_environments)
        following, time_step = step(keys, running, action, params)
        return following, Transition(
            observation=running.observation,
            action=action,
            reward=time_step.reward,
            terminated=time_step.terminated,
            truncated=time_step.truncated,
            next_observation=time_step.observation,
            extras={
                **extras,
                **masks,
                "episode_return": running.episode_return + time_step.reward,
                "episode_length": running.episode_length + 1,
            },
        )

    return jax.lax.scan(body, running, jax.random.split(key, num_steps))


def example(space: Space) -> Array:
    """An element of `space`, to initialise a network with."""
    if isinstance(space, Discrete):
        return jnp.int32(0)
    return jnp.broadcast_to(
        jnp.clip(0.0, min=jnp.asarray(space.low), max=jnp.asarray(space.high)), space.shape
    )


@struct.dataclass(kw_only=True)
class Timed:
    """The state of an environment with a time limit: `state` and the steps taken, `time` `[]`."""

    state: PyTree
    time: Array


def time_limit(environment: Environment, max_steps: int) -> Environment:
    """The same environment, truncated (not terminated) after `max_steps` steps."""
    checks.at_least("max_steps", max_steps, 1)

    def reset(key: Key, params: PyTree) -> tuple[Timed, PyTree]:
        state, observation = environment.reset(key, params)
        return Timed(state=state, time=jnp.int32(0)), observation

    def step(key: Key, state: Timed, action: Array, params: PyTree) -> tuple[Timed, TimeStep]:
        inner, time_step = environment.step(key, state.state, action, params)
        time = state.time + 1
        late = (time >= max_steps) & ~time_step.terminated
        time_step = time_step.replace(truncated=time_step.truncated | late)
        return Timed(state=inner, time=time), time_step

    def action_mask(state: Timed, params: PyTree) -> Array:
        return environment.action_mask(state.state, params)

    return dataclasses.replace(
        environment,
        reset=reset,
        step=step,
        action_mask=None if environment.action_mask is None else action_mask,
    )
