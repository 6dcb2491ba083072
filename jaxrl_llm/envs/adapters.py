"""Our environments in Gymnasium's hands, alone or as a batch.

The other way round, see `gymnasium_rollout` and `gymnax_adapter`. Gymnasium is imported where it is
used, so that importing this module costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import numpy.typing as npt

from jaxrl_llm import checks
from jaxrl_llm.envs import core
from jaxrl_llm.types import (
    Array,
    Box,
    Discrete,
    Environment,
    Hybrid,
    HybridAction,
    Key,
    PyTree,
    Space,
    TimeStep,
)

if TYPE_CHECKING:
    import gymnasium

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
    A Hybrid action is a dict of `"choice"` and `"amount"`.

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


def box(shape: Sequence[int], low: Any, high: Any) -> Box:
    """The Box with the bounds that another library has as arrays.

    Raises:
      ValueError: for bounds that differ within an array of two dimensions or more.
    """
    shape = tuple(shape)

    def bound(value: Any) -> float | tuple[float, ...]:
        values = np.broadcast_to(np.asarray(value, float), shape)
        if (values == values.flat[0]).all():
            return float(values.flat[0])
        if values.ndim > 1:
            raise ValueError(f"space has bounds that differ and shape {shape}; flatten it first")
        return tuple(values.tolist())

    return Box(shape=shape, low=bound(low), high=bound(high))


def _gymnasium_space(space: Space, dtype: npt.DTypeLike) -> gymnasium.spaces.Space:
    """A Box has `dtype`; Gymnasium's Discrete is int64; Hybrid is a Dict of both."""
    from gymnasium import spaces

    if isinstance(space, Discrete):
        return spaces.Discrete(space.num)
    if isinstance(space, Hybrid):
        amount = _gymnasium_space(space.amount, dtype)
        return spaces.Dict({"choice": spaces.Discrete(space.num), "amount": amount})
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
) -> np.ndarray | HybridAction:
    """`action`, of one environment or of a batch, as int32 and float32, or ValueError."""
    space = environment.action_space
    check = partial(_checked_array, environment.name, num_environments)
    if not isinstance(space, Hybrid):
        return check("action", space, action)
    parts = action._asdict() if isinstance(action, HybridAction) else action
    if not isinstance(parts, Mapping) or set(parts) != {"choice", "amount"}:
        raise ValueError(
            f"action is {action!r}; it must be a dict: {environment.name} has a 'choice' of "
            f"{space.num} and an 'amount'"
        )
    return HybridAction(
        choice=check("action['choice']", Discrete(num=space.num), parts["choice"]),
        amount=check("action['amount']", space.amount, parts["amount"]),
    )


def _checked_array(
    owner: str, num_environments: int | None, name: str, space: Discrete | Box, action: Any
) -> Any:
    array = np.asarray(action)
    if isinstance(space, Discrete):
        kind, kinds, dtype, shape = "an integer", "iu", np.int32, ()
        low, high, range_ = 0, space.num - 1, f"0 to {space.num - 1}"
    else:
        kind, kinds, dtype, shape = "a number", "iuf", np.float32, space.shape
        (low, high), range_ = _bounds(space, dtype), f"{space.low} to {space.high}"
    has = f"{owner} has actions {range_}"
    if array.dtype.kind not in kinds:
        raise ValueError(f"{name} has dtype {array.dtype}; it must be {kind}: {has}")
    shape = shape if num_environments is None else (num_environments, *shape)
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; it must be {shape}: {has}")
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    # int32 could wrap into the range; the bounds of a Box are float32.
    compared = array if kinds == "iu" else converted
    outside = ~((compared >= low) & (compared <= high))
    if outside.any():
        raise ValueError(f"{name} {_first(outside, array)} is out of range; {has}")
    return converted


def _refuse_inadmissible(environment: Environment, info: Info, action: Any, state: Any) -> None:
    """Raises ValueError where `info` reports that `action`, just taken in `state`, was masked."""
    refused = np.asarray(info.get("inadmissible", False))
    if refused.any():
        choice: Any = action.choice if isinstance(action, HybridAction) else action
        raise ValueError(
            f"action {_first(refused, choice)} is inadmissible in state {_first(refused, state)} "
            f"of {environment.name}; choose one that info['action_mask'] allows"
        )


def _first(wrong: np.ndarray, array: np.ndarray) -> str:
    """The first element of `array` where `wrong`, and its place in an array of many."""
    place = np.unravel_index(wrong.argmax(), wrong.shape)
    where = ", ".join(map(str, place))
    return f"{array[place]} at [{where}]" if place else str(array[()])
