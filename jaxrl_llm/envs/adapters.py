"""Environments of other libraries here, and ours there: Gymnasium (export) and gymnax (import).

Both libraries are imported where they are used, so that importing this module costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxrl_llm import checks
from jaxrl_llm.envs import core
from jaxrl_llm.types import Array, Box, Discrete, Environment, Key, PyTree, Space, TimeStep

if TYPE_CHECKING:
    import gymnasium
    import gymnax.environments.environment

Info = dict[str, Any]
Seeds = int | Sequence[int | None] | None


def to_gymnasium(
    environment: Environment,
    *,
    params: PyTree | None = None,
    seed: int | None = None,
    render_mode: str | None = None,
) -> gymnasium.Env:
    """`environment` as a `gymnasium.Env` with NumPy observations and info.

    `reset(seed=s)` makes the episode a function of s alone: the reset draws from
    `fold_in(key(s), 0)` and step number i, from 1, draws from `fold_in(key(s), i)`. A reset without
    a seed draws its s from `np_random`. Where the environment has masks, `info["action_mask"]`,
    after `reset` too, says which actions come next; `action_space.sample` wants it as `np.int8`.

    Args:
      environment: of one patient.
      params: the environment's parameters; its defaults when None.
      seed: of `np_random`, for resets without a seed.
      render_mode: None, or "ansi" for a line of text.

    Returns:
      An environment whose `step` raises ValueError for an action outside the space, or one that
      `TimeStep.info["inadmissible"]` reports, and then leaves the episode as it was; and
      `gymnasium.error.ResetNeeded` before the first `reset` and after the end of an episode.
    """
    import gymnasium

    checks.one_of("render_mode", render_mode, (None, "ansi"))
    params = environment.default_params if params is None else params

    class Patient(gymnasium.Env):
        def __init__(self) -> None:
            super().reset(seed=seed)
            first = jax.eval_shape(environment.reset, jax.random.key(0), params)[1]
            self.observation_space = _gymnasium_space(environment.observation_space, first.dtype)
            self.action_space = _gymnasium_space(environment.action_space, np.float32)
            self.metadata = {"render_modes": ["ansi"]}
            self.render_mode = render_mode
            self._needs_reset = "call reset() before the first step()"
            self._num_steps, self._observation = 0, None

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Info]:
            super().reset(seed=seed, options=options)
            seed = int(self.np_random.integers(2**32)) if seed is None else seed
            self._root, self._num_steps = _keys(seed), 0
            self._state, observation = _draw(environment.reset, self._root, 0, params)
            self._observation = _observation(self.observation_space, observation)
            self._needs_reset = ""
            return self._observation, _numpy(_next_mask(environment, self._state, params))

        def step(self, action: Any) -> tuple[Any, float, bool, bool, Info]:
            if self._needs_reset:
                raise gymnasium.error.ResetNeeded(self._needs_reset)
            action = _checked_action(environment, action)
            count = self._num_steps + 1
            state, outcome = _draw(environment.step, self._root, count, self._state, action, params)
            outcome = _numpy(outcome)
            _refuse_inadmissible(environment, outcome.info, action, self._observation)
            self._state, self._num_steps = state, count
            self._observation = _observation(self.observation_space, outcome.observation)
            ended = bool(outcome.terminated), bool(outcome.truncated)
            if any(ended):
                self._needs_reset = "the episode has ended; call reset() before the next step()"
            return self._observation, float(outcome.reward), *ended, outcome.info

        def render(self) -> str | None:
            line = f"{environment.name}, step {self._num_steps}: {self._observation}"
            return line if self.render_mode else None

    return Patient()


def to_gymnasium_vector(
    environment: Environment,
    num_environments: int,
    *,
    params: PyTree | None = None,
    params_axis: int | None = None,
    seed: int | None = None,
) -> gymnasium.vector.VectorEnv:
    """A batch of `environment` as a `gymnasium.vector.VectorEnv`, one compiled step for all.

    It resets in the step that ends an episode (`AutoresetMode.SAME_STEP`), laid out as by
    Gymnasium's own `SyncVectorEnv`: the observation is that of the new episode, `final_obs` and
    `final_info` keep the terminal ones, and every key of info has its mask `_key` `[B]`.
    `reset(seed=s)` seeds environment b with s + b, `reset(seed=[...])` each with its own, None
    from `np_random`. Draws are as in `to_gymnasium`, a reset after step i from `2**32 - i`.

    Args:
      environment, params, seed: as in `to_gymnasium`.
      num_environments: B, at least 1.
      params_axis: None when all environments share `params`, 0 when its leaves are `[B, ...]`.

    Returns:
      An environment whose `step` raises ValueError as that of `to_gymnasium` does.
    """
    import gymnasium
    from gymnasium.vector.utils import batch_space

    checks.at_least("num_environments", num_environments, 1)
    params = environment.default_params if params is None else params

    @jax.jit
    @partial(jax.vmap, in_axes=(0, params_axis))
    def start(root: Key, params: PyTree) -> tuple[core.Running, Info]:
        running = core.start(environment, jax.random.fold_in(root, 0), params)
        return running, _next_mask(environment, running.state, params)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None, 0, 0, params_axis))
    def advance(
        root: Key, count: Array, running: core.Running, action: Array, params: PyTree
    ) -> tuple[core.Running, TimeStep, Info]:
        key, reset_key = jax.random.fold_in(root, count), jax.random.fold_in(root, -count)
        fresh = core.start(environment, reset_key, params)
        running, outcome = core.auto_reset_step(environment, key, running, action, fresh, params)
        return running, outcome, _next_mask(environment, running.state, params)

    class Patients(gymnasium.vector.VectorEnv):
        def __init__(self) -> None:
            super().reset(seed=seed)
            self.num_envs = num_environments
            first, _ = jax.eval_shape(start, _keys(range(num_environments)), params)
            space, dtype = environment.observation_space, first.observation.dtype
            self.single_observation_space = _gymnasium_space(space, dtype)
            self.single_action_space = _gymnasium_space(environment.action_space, np.float32)
            self.observation_space = batch_space(self.single_observation_space, num_environments)
            self.action_space = batch_space(self.single_action_space, num_environments)
            self.metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
            self._running: core.Running | None = None

        def reset(self, *, seed: Seeds = None, options: Any = None) -> tuple[Any, Info]:
            if options and "reset_mask" in options:
                raise ValueError("options has reset_mask; episodes reset themselves, leave it out")
            seeds = _seeds(seed, self.num_envs)
            super().reset(seed=seeds[0])
            drawn = self.np_random.integers(2**32, size=self.num_envs)
            self._roots = _keys([a if b is None else b for a, b in zip(drawn, seeds, strict=True)])
            running, masks = start(self._roots, params)
            self._running, self._num_calls = running, 0
            self._observation = _observation(self.single_observation_space, running.observation)
            return self._observation, _masked_info(masks, np.ones(self.num_envs, bool))

        def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, Info]:
            if self._running is None:
                raise gymnasium.error.ResetNeeded("call reset() before the first step()")
            actions = _checked_action(environment, actions, self.num_envs)
            count = self._num_calls + 1
            running, outcome, masks = advance(self._roots, count, self._running, actions, params)
            outcome = _numpy(outcome)
            _refuse_inadmissible(environment, outcome.info, actions, self._observation)
            self._running, self._num_calls = running, count
            space = self.single_observation_space
            self._observation = _observation(space, running.observation)
            ended = outcome.terminated | outcome.truncated
            info = _masked_info(outcome.info, ~ended)
            info |= _masked_info(masks, np.ones(self.num_envs, bool))
            info |= _final(space, outcome, ended)
            reward = outcome.reward.astype(np.float64)
            return self._observation, reward, outcome.terminated, outcome.truncated, info

    return Patients()


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
        shape = tuple(space.shape)
        return Box(shape=shape, low=_bound(space.low, shape), high=_bound(space.high, shape))
    raise ValueError(f"space is {type(space).__name__}; only Discrete and Box can be adapted")


def _bound(bound: Any, shape: tuple[int, ...]) -> float | tuple[float, ...]:
    values = np.broadcast_to(np.asarray(bound, float), shape)
    if (values == values.flat[0]).all():
        return float(values.flat[0])
    if values.ndim > 1:
        raise ValueError(f"space has bounds that differ and shape {shape}; flatten it first")
    return tuple(values.tolist())


def _gymnasium_space(space: Space, dtype: npt.DTypeLike) -> gymnasium.spaces.Space:
    """A Box has `dtype`; Gymnasium's Discrete is int64."""
    from gymnasium import spaces

    if isinstance(space, Discrete):
        return spaces.Discrete(space.num)
    return spaces.Box(*_bounds(space, dtype), dtype=np.dtype(dtype).type)


def _bounds(space: Box, dtype: npt.DTypeLike) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest array of `space`."""
    return np.full(space.shape, space.low, dtype), np.full(space.shape, space.high, dtype)


def _seeds(seed: Seeds, num: int) -> list[int | None]:
    """One seed an environment, as Gymnasium spreads them."""
    if seed is None or isinstance(seed, int | np.integer):
        return [None if seed is None else int(seed) + place for place in range(num)]
    if len(seed) != num:
        raise ValueError(f"seed has {len(seed)} entries; give one to each of {num} environments")
    return list(seed)


def _keys(seed: Any) -> Key:
    """The key of a seed, or of each of many; Gymnasium's seeds are integers of any size."""
    seeds = np.asarray(np.asarray(seed, object) % 2**32, np.uint32)
    return jax.vmap(jax.random.key)(seeds) if seeds.ndim else jax.random.key(seeds)


@partial(jax.jit, static_argnums=0)
def _draw(function: Callable[..., Any], root: Key, count: int, *arguments: Any) -> Any:
    """`function` with the episode's key number `count`, compiled once for all that share it."""
    return function(jax.random.fold_in(root, count), *arguments)


def _next_mask(environment: Environment, state: PyTree, params: PyTree) -> dict[str, Array]:
    """What info says of the next action: the mask, where there is one."""
    mask = environment.action_mask
    return {} if mask is None else {"action_mask": jax.jit(mask)(state, params)}


def _numpy(tree: PyTree) -> Any:
    """Copies that the caller may keep and change."""
    return jax.tree.map(np.array, jax.device_get(tree))


def _observation(space: gymnasium.spaces.Space, observation: Any) -> Any:
    """As `space` has it: a NumPy integer where it is Discrete, a new array where it is a Box."""
    return np.asarray(observation).astype(space.dtype)[()]


def _masked_info(info: dict[str, Any], mask: np.ndarray) -> Info:
    """Gymnasium's layout of a batch of info: zeros outside `mask` `[B]`, and a mask a key."""
    laid_out: Info = {}
    if mask.any():
        for name, values in info.items():
            laid_out[name] = np.array(values)
            laid_out[name][~mask] = 0
            laid_out[f"_{name}"] = mask.copy()
    return laid_out


def _final(space: gymnasium.spaces.Space, outcome: TimeStep, ended: np.ndarray) -> Info:
    """Gymnasium's layout of how the episodes in `ended` `[B]` ended."""
    if not ended.any():
        return {}
    observations = np.full(ended.shape, None, object)
    for place in np.flatnonzero(ended):
        observations[place] = _observation(space, outcome.observation[place])
    final = {"final_obs": observations, "final_info": _masked_info(outcome.info, ended)}
    return {**final, "_final_obs": ended.copy(), "_final_info": ended.copy()}


def _checked_action(
    environment: Environment, action: Any, num_environments: int | None = None
) -> np.ndarray:
    """`action`, of one environment or of a batch, as int32 or float32, or ValueError."""
    space, array = environment.action_space, np.asarray(action)
    if isinstance(space, Discrete):
        kind, kinds, dtype, shape = "an integer", "iu", np.int32, ()
        low, high, range_ = 0, space.num - 1, f"0 to {space.num - 1}"
    else:
        kind, kinds, dtype, shape = "a number", "iuf", np.float32, space.shape
        (low, high), range_ = _bounds(space, dtype), f"{space.low} to {space.high}"
    has = f"{environment.name} has actions {range_}"
    if array.dtype.kind not in kinds:
        raise ValueError(f"action has dtype {array.dtype}; it must be {kind}: {has}")
    shape = shape if num_environments is None else (num_environments, *shape)
    if array.shape != shape:
        raise ValueError(f"action has shape {array.shape}; it must be {shape}: {has}")
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    # int32 could wrap into the range; the bounds of a Box are float32.
    compared = array if kinds == "iu" else converted
    outside = ~((compared >= low) & (compared <= high))
    if outside.any():
        raise ValueError(f"action {_first(outside, array)} is out of range; {has}")
    return converted


def _refuse_inadmissible(environment: Environment, info: Info, action: Any, state: Any) -> None:
    """Raises ValueError where `info` reports that `action`, just taken in `state`, was masked."""
    refused = np.asarray(info.get("inadmissible", False))
    if refused.any():
        raise ValueError(
            f"action {_first(refused, action)} is inadmissible in state {_first(refused, state)} "
            f"of {environment.name}; choose one that info['action_mask'] allows"
        )


def _first(wrong: np.ndarray, array: np.ndarray) -> str:
    """The first element of `array` where `wrong`, and its place in an array of many."""
    place = np.unravel_index(wrong.argmax(), wrong.shape)
    where = ", ".join(map(str, place))
    return f"{array[place]} at [{where}]" if place else str(array[()])
