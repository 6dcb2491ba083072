"""Environments of gymnax here, with termination and time limit told apart.

gymnax is imported where it is used, so that importing this module costs nothing.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.envs import adapters
from jaxrl_llm.types import Array, Discrete, Environment, Key, PyTree, Space, TimeStep

if TYPE_CHECKING:
    import gymnax.environments.environment


def from_gymnax(
    name_or_env: str | gymnax.environments.environment.Environment,
    env_params: PyTree | None = None,
) -> Environment:
    """A gymnax environment as an `Environment`, with termination and time limit told apart.

    gymnax merges the limit, `params.max_steps_in_episode`, into `done`. Here an episode that only
    the limit ends is truncated and not terminated. Observations and actions are as gymnax has them.

    Args:
      name_or_env: a registered name, such as "CartPole-v1", or an environment.
      env_params: gymnax parameters; the environment's defaults when None.

    Returns:
      An environment whose `default_params` are `env_params` as arrays.

    Raises:
      ModuleNotFoundError: gymnax is not installed.
      ValueError: a space that is neither Discrete nor Box.
    """
    try:
        import gymnax
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("gymnax is not installed; run: pip install gymnax") from error

    env = gymnax.make(name_or_env)[0] if isinstance(name_or_env, str) else name_or_env
    chosen: Any = env.default_params if env_params is None else env_params

    def reset(key: Key, params: PyTree) -> tuple[PyTree, Array]:
        observation, state = env.reset_env(key, params)
        return _strong(state), _strong(observation)

    def step(key: Key, state: PyTree, action: Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        observation, following, reward, done, _ = env.step_env(key, state, action, params)
        # Done without a limit is done by the process itself. Not `is_terminal` of the new state:
        # some environments write the merged `done` into it. Of this second step XLA keeps only
        # what the first does not compute already.
        ended = env.step_env(jax.random.clone(key), state, action, _without_limit(params))[3]
        terminated = jnp.asarray(ended, bool)
        return _strong(following), TimeStep(
            observation=_strong(observation),
            reward=jnp.asarray(reward, jnp.float32),
            terminated=terminated,
            truncated=jnp.asarray(done, bool) & ~terminated,
            info={},
        )

    return Environment(
        name=env.name,
        reset=reset,
        step=step,
        default_params=_strong(chosen),
        observation_space=_from_gymnax_space(env.observation_space(chosen)),
        action_space=_from_gymnax_space(env.action_space(chosen)),
    )


def _strong(tree: PyTree) -> PyTree:
    """Leaves as arrays of a definite dtype: gymnax has Python numbers among them."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), tree)


def _without_limit(params: PyTree) -> PyTree:
    limit = getattr(params, "max_steps_in_episode", None)
    if limit is None:
        return params
    never = jnp.full_like(limit, np.iinfo(np.int32).max)
    return dataclasses.replace(params, max_steps_in_episode=never)


def _from_gymnax_space(space: Any) -> Space:
    from gymnax.environments import spaces

    if isinstance(space, spaces.Discrete):
        return Discrete(num=int(space.n))
    if isinstance(space, spaces.Box):
        return adapters.box(space.shape, space.low, space.high)
    raise ValueError(f"space is {type(space).__name__}; only Discrete and Box can be adapted")
