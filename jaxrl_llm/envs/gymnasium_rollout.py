"""Environments that exist only in Gymnasium, under our policies: rollouts on the HOST.

    host = gymnasium_rollout.from_gymnasium(gymnasium.make_vec("CartPole-v1", 8))
    running = gymnasium_rollout.start(host, seed=0)
    running, steps = gymnasium_rollout.rollout(host, policy, key, running, num_steps=128)

This is SLOW: each step leaves the compiled program, runs Python in every environment and comes
back, hundreds of microseconds at best, where `core.rollout` of a pure environment takes a few. No
seeds by `vmap` and no accelerator help that. But what comes out is what `core.rollout` gives, a
`core.Running` and a `Transition` `[T, B, ...]`, so that the `update` of an agent such as
`agents.a2c` learns from it as it is.

Gymnasium is imported where it is used, so that importing this module costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import checks
from jaxrl_llm.envs import adapters, core
from jaxrl_llm.types import (
    Array,
    Box,
    Discrete,
    Hybrid,
    HybridAction,
    Key,
    PyTree,
    Space,
    Transition,
)

if TYPE_CHECKING:
    import gymnasium

# (key, observation [B, ...], action_mask [B, A] or None) -> (action [B, ...], extras)
HostPolicy = Callable[[Key, Array, Array | None], tuple[PyTree, dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class HostEnvironment:
    """A batch of Gymnasium's environments, with their spaces in our terms.

    Attributes:
      envs: stateful.
      num_environments: B.
      observation_space: of one environment.
      action_space: of one environment.
      autoreset: "SameStep", "NextStep" or "Disabled", Gymnasium's names.
    """

    envs: gymnasium.vector.VectorEnv
    num_environments: int
    observation_space: Space
    action_space: Space
    autoreset: str


def from_gymnasium(
    env: gymnasium.Env | gymnasium.vector.VectorEnv, *, action_space: Space | None = None
) -> HostEnvironment:
    """Gymnasium's environment, one or a batch, to be stepped by `rollout`.

    Args:
      env: with observations that are a Box or Discrete. Its actions may also be a Dict of a
        Discrete `"choice"` and a Box `"amount"`, which becomes a Hybrid.
      action_space: in place of what `env` says, such as a Hybrid of whose choices some have no
        amount, which Gymnasium cannot say.

    Raises:
      ValueError: for another space, or a batch that does not say how it resets.
    """
    import gymnasium

    vector = gymnasium.vector
    if isinstance(env, gymnasium.Env):
        same_step = vector.AutoresetMode.SAME_STEP
        envs: Any = vector.SyncVectorEnv([lambda: env], autoreset_mode=same_step)
    else:
        envs = env
    mode = envs.metadata.get("autoreset_mode")
    checks.one_of("env.metadata['autoreset_mode']", mode, list(vector.AutoresetMode))
    spaces = envs.single_observation_space, envs.single_action_space
    return HostEnvironment(
        envs=envs,
        num_environments=envs.num_envs,
        observation_space=_space("observation_space", spaces[0]),
        action_space=_space("action_space", spaces[1]) if action_space is None else action_space,
        autoreset=mode.value,
    )


def start(host: HostEnvironment, seed: int | None = None) -> core.Running:
    """All environments at the beginning of an episode; `seed` is Gymnasium's."""
    observation, info = host.envs.reset(seed=seed)
    zeros: Any = np.zeros(host.num_environments, np.float32)
    return core.Running(
        state={"is_over": zeros.astype(bool), "action_mask": _action_mask(info)},
        observation=_copy(observation),
        episode_return=zeros,
        episode_length=zeros.astype(np.int32),
    )


def rollout(
    host: HostEnvironment,
    policy: HostPolicy,
    key: Key,
    running: core.Running,
    *,
    num_steps: int,
) -> tuple[core.Running, Transition]:
    """Steps the environments `num_steps` times under `policy`, resetting as they end.

    All of Gymnasium's modes of resetting give the same transitions: `next_observation` is the one
    before the reset. An environment that resets in a call of its own (NEXT_STEP) makes no
    transition in that call. So more calls are made, until every environment has made `num_steps`
    transitions; what some of them made beyond that is dropped.

    Args:
      host: from `from_gymnasium`.
      policy: `(key, observation, action_mask) -> (action, extras)` of the whole batch, compiled by
        the caller; `action_mask` is None where `info` has none.
      key: step i draws from `fold_in(key, i)`.
      running: from `start` or from an earlier call, which was the last to step `host`.
      num_steps: T, at least 1.

    Returns:
      As `core.rollout`.
    """
    checks.at_least("num_steps", num_steps, 1)
    made: list[np.ndarray] = []
    transitions: list[Transition] = []
    while len(made) < num_steps or np.sum(made, axis=0).min() < num_steps:
        step_key = jax.random.fold_in(key, len(made))
        made.append(~running.state["is_over"])
        running, transition = _step(host, policy, step_key, running)
        transitions.append(transition)
    # For each environment the calls that made its first `num_steps` transitions, in their order.
    chosen = np.argsort(~np.array(made), axis=0, kind="stable")[:num_steps]
    columns = np.arange(host.num_environments)
    steps = jax.tree.map(lambda *rows: jnp.asarray(np.stack(rows)[chosen, columns]), *transitions)
    return running, steps


def _step(
    host: HostEnvironment, policy: HostPolicy, key: Key, running: core.Running
) -> tuple[core.Running, Transition]:
    """One call of the environments; where `is_over` it only resets, and its row means nothing."""
    mask, was_over = running.state["action_mask"], running.state["is_over"]
    action, extras = jax.device_get(policy(key, running.observation, mask))
    outcome: Any = host.envs.step(_action(host, action))
    observation, reward, terminated, truncated, info = outcome
    observation, reward = _copy(observation), reward.astype(np.float32)
    terminated, truncated = terminated.copy(), truncated.copy()
    ended = terminated | truncated
    following, next_mask = observation, _action_mask(info)
    if host.autoreset == "SameStep" and ended.any():
        observation = _copy(observation)
        for place in np.flatnonzero(ended):
            observation[place] = info["final_obs"][place]
    elif host.autoreset == "Disabled" and ended.any():
        following, fresh = host.envs.reset(options={"reset_mask": ended})
        following, fresh_mask = _copy(following), _action_mask(fresh)
        if next_mask is not None:
            next_mask = np.where(ended[:, None], fresh_mask, next_mask)
    episode_return = running.episode_return + reward
    episode_length = running.episode_length + 1
    transition = Transition(
        observation=running.observation,
        action=action,
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        next_observation=observation,
        extras={
            **extras,
            **({} if mask is None else {"action_mask": mask}),
            "episode_return": episode_return,
            "episode_length": episode_length,
        },
    )
    is_new = was_over if host.autoreset == "NextStep" else ended
    return core.Running(
        state={"is_over": ended & (host.autoreset == "NextStep"), "action_mask": next_mask},
        observation=following,
        episode_return=episode_return * ~is_new,
        episode_length=episode_length * ~is_new,
    ), transition


def _space(name: str, space: Any) -> Space:
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        if space.start:
            raise ValueError(f"{name} starts at {space.start}; wrap it to start at 0")
        return Discrete(num=int(space.n))
    if isinstance(space, spaces.Box):
        return adapters.box(space.shape, space.low, space.high)
    if isinstance(space, spaces.Dict) and set(space) == {"choice", "amount"}:
        choice, amount = (_space(f"{name}[{part!r}]", space[part]) for part in ("choice", "amount"))
        if isinstance(choice, Discrete) and isinstance(amount, Box):
            return Hybrid(num=choice.num, amount=amount, has_amount=(True,) * choice.num)
    raise ValueError(
        f"{name} is {space}; it must be Discrete or Box, or for actions a Dict of a Discrete "
        "'choice' and a Box 'amount'"
    )


def _copy(observation: Any) -> Any:
    """In the precision that our environments have; some of Gymnasium's reuse their buffer."""
    array = np.asarray(observation)
    return array.astype(np.int32 if array.dtype.kind in "iub" else np.float32)


def _action_mask(info: dict[str, Any]) -> Any:
    """`[B, A]`, everything allowed where `info` says nothing; None where it has no masks."""
    if "action_mask" not in info:
        return None
    mask = np.asarray(info["action_mask"], bool)
    return mask | ~np.asarray(info["_action_mask"], bool)[:, None]


def _action(host: HostEnvironment, action: Any) -> Any:
    """As Gymnasium wants it; rounding may have put an action just outside its bounds."""
    if isinstance(action, HybridAction):
        space = host.action_space
        assert isinstance(space, Hybrid)
        return {"choice": np.int64(action.choice), "amount": _inside(space.amount, action.amount)}
    if isinstance(host.action_space, Box):
        return _inside(host.action_space, action)
    return np.asarray(action, np.int64)


def _inside(space: Box, amount: Any) -> np.ndarray:
    low, high = (np.asarray(bound, np.float32) for bound in (space.low, space.high))
    return np.clip(np.asarray(amount, np.float32), low, high)
