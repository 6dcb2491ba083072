"""What all environments share: auto-reset, time limits and vectorised rollouts.

An `Environment` (in `types`) is a pair of pure functions of ONE patient. Batching and resetting
exist here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.types import (
    Array,
    Discrete,
    Environment,
    Hybrid,
    HybridAction,
    Key,
    Mean,
    PyTree,
    Space,
    TimeStep,
    Transition,
)

# (noise, observation [B, ...], action_mask [B, A] or None) -> (action [B, ...], extras); the noise
# of one step is a key, unless the caller of `rollout` gives another.
BatchPolicy = Callable[[PyTree, PyTree, Array | None], tuple[Array, dict[str, Array]]]

# The same of a policy with a memory: (memory, noise, observation, action_mask, start [B] bool)
# -> (memory, action, extras). Where `start`, an episode begins with this observation: the policy
# forgets BEFORE it looks.
MemoryPolicy = Callable[
    [PyTree, PyTree, PyTree, Array | None, Array], tuple[PyTree, Array, dict[str, Array]]
]


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
    environment: Environment,
    key: Key,
    running: Running,
    action: Array,
    fresh: Running,
    params: PyTree,
) -> tuple[Running, TimeStep]:
    """One step of one environment, going on from `fresh` where the episode ended.

    Args:
      environment: of one patient.
      key: of the step.
      running: before the step.
      action: to take.
      fresh: the next episode, from `start` with the SAME params.
      params: of the environment.

    Returns:
      What is under way afterwards, and the time step BEFORE any reset: its observation is the
      terminal one.
    """
    state, time_step = environment.step(key, running.state, action, params)
    ended = time_step.terminated | time_step.truncated
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
    noise: PyTree | None = None,
) -> tuple[Running, Transition]:
    """Steps a batch of environments `num_steps` times under `policy`, resetting as they end.

    Args: those of `rollout_with_memory`, but `policy` is
      `(noise, observation, action_mask) -> (action, extras)`.

    Returns:
      What is under way afterwards, and the `Transition` `[T, B, ...]`.
    """

    def without_memory(
        memory: PyTree, noise: PyTree, observation: PyTree, action_mask: Array | None, start: Array
    ) -> tuple[PyTree, Array, dict[str, Array]]:
        return memory, *policy(noise, observation, action_mask)

    running, _, steps = rollout_with_memory(
        environment,
        without_memory,
        key,
        running,
        (),
        params,
        num_steps=num_steps,
        params_axis=params_axis,
        noise=noise,
    )
    return running, steps


def rollout_with_memory(
    environment: Environment,
    policy: MemoryPolicy,
    key: Key,
    running: Running,
    memory: PyTree,
    params: PyTree | None = None,
    *,
    num_steps: int,
    params_axis: int | None = None,
    noise: PyTree | None = None,
) -> tuple[Running, PyTree, Transition]:
    """`rollout` under a policy that remembers; forgetting at a new episode is up to the policy.

    Keys and the starts of possible next episodes are drawn for all steps at once, before the scan:
    a random draw inside it is a small serial operation that costs more than most steps. The starts
    take as much memory as the transitions.

    Args:
      environment: of one patient.
      policy: of the whole batch; see `MemoryPolicy`. `action_mask` is None where the environment
        has none.
      key: consumed.
      running: `[B]` environments under way, from `start_batch` or from an earlier call.
      memory: what `policy` knows before the first step; anything where an episode starts.
      params: as in `start_batch`.
      num_steps: T.
      params_axis: as in `start_batch`.
      noise: what `policy` draws from, leaves `[T, ...]`; a key a step when None.

    Returns:
      What is under way and remembered afterwards, and a `Transition` `[T, B, ...]`. Its `extras`
      are the policy's and, of the episode including this step, `episode_return` and
      `episode_length`; they are the totals where `terminated | truncated`. Where the environment
      has masks, `action_mask` too.
    """
    params = environment.default_params if params is None else params
    num_environments = running.episode_length.shape[0]
    policy_key, step_key, reset_key = jax.random.split(key, 3)
    each = partial(jax.vmap, in_axes=(0, params_axis))
    fresh = jax.vmap(each(partial(start, environment)), in_axes=(0, None))(
        jax.random.split(reset_key, (num_steps, num_environments)), params
    )
    inputs = (
        jax.random.split(policy_key, num_steps) if noise is None else noise,
        jax.random.split(step_key, (num_steps, num_environments)),
        fresh,
    )
    step = jax.vmap(partial(auto_reset_step, environment), in_axes=(0, 0, 0, 0, params_axis))

    def body(
        carry: tuple[Running, PyTree], inputs: tuple[PyTree, Key, Running]
    ) -> tuple[tuple[Running, PyTree], Transition]:
        running, memory = carry
        noise, keys, fresh = inputs
        masks = {}
        if environment.action_mask is not None:
            masks["action_mask"] = each(environment.action_mask)(running.state, params)
        memory, action, extras = policy(
            memory,
            noise,
            running.observation,
            masks.get("action_mask"),
            running.episode_length == 0,
        )
        following, time_step = step(keys, running, action, fresh, params)
        return (following, memory), Transition(
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

    (running, memory), steps = jax.lax.scan(body, (running, memory), inputs)
    return running, memory, steps


def episode_metrics(extras: dict[str, Array], ended: Array) -> dict[str, Mean]:
    """The mean return and length of the episodes that a rollout saw end.

    Args:
      extras: of the rollout's `Transition`, leaves `[T, B]`.
      ended: `[T, B]` bool, the last steps of the episodes to count.
    """
    return {name: Mean.of(extras[name], ended) for name in ("episode_return", "episode_length")}


def example(space: Space) -> Any:
    """An element of `space`, to initialise a network with."""
    if isinstance(space, Discrete):
        return jnp.int32(0)
    if isinstance(space, Hybrid):
        return HybridAction(choice=jnp.int32(0), amount=example(space.amount))
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
        time_step = dataclasses.replace(time_step, truncated=time_step.truncated | late)
        return Timed(state=inner, time=time), time_step

    mask = environment.action_mask

    return dataclasses.replace(
        environment,
        reset=reset,
        step=step,
        action_mask=None if mask is None else lambda state, params: mask(state.state, params),
    )


def scale_rewards(environment: Environment, scale: float) -> Environment:
    """The same environment with rewards times `scale`: the same optimum, in a unit that suits.

    Networks learn values near 1 sooner than values in the hundreds.
    """
    checks.positive("scale", scale)

    def step(key: Key, state: PyTree, action: Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        state, time_step = environment.step(key, state, action, params)
        return state, dataclasses.replace(time_step, reward=scale * time_step.reward)

    return dataclasses.replace(environment, step=step)
