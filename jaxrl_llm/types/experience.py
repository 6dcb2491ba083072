"""Environments, and what is experienced in them.

Control is time-major: leaves are `[T, B, ...]`, of `T` time steps of `B` trajectories.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from flax import struct

from jaxrl_llm.types.arrays import Array, Key, PyTree

if TYPE_CHECKING:
    import distrax


@struct.dataclass(kw_only=True)
class TimeStep:
    """What an environment returns from `step`, before any reset.

    Attributes:
      observation: of the state that the action led to, even when that state ended the episode.
      reward: `[]` float32.
      terminated: `[]` bool, the process itself ended (death, discharge): nothing to bootstrap.
      truncated: `[]` bool, a time limit cut the episode: bootstrap from `observation`.
      info: a dict of arrays; `action_mask` `[A]` bool, where given, masks the NEXT action.
    """

    observation: PyTree
    reward: Array
    terminated: Array
    truncated: Array
    info: dict[str, Array]


@struct.dataclass(kw_only=True)
class Transition:
    """One step of experience, leaves `[T, B, ...]` when stacked by a rollout.

    Attributes:
      observation: before the action.
      action: taken.
      reward: received.
      terminated: bool, `next_observation` is a terminal state.
      truncated: bool, a time limit cut the episode after this step.
      next_observation: after the action and BEFORE any reset, so that a timeout bootstraps.
      extras: what the policy wants to remember, such as `log_probability` or `value`.
    """

    observation: PyTree
    action: Array
    reward: Array
    terminated: Array
    truncated: Array
    next_observation: PyTree
    extras: dict[str, Array]


@struct.dataclass(kw_only=True)
class Trajectories:
    """Episodes of unequal length, one a column, padded at the end.

    Attributes:
      steps: leaves `[T, B, ...]`.
      mask: `[T, B]` bool, False on padding.
      patient: `[B]` int32, whose episode it is.
    """

    steps: Transition
    mask: Array
    patient: Array

    @property
    def num_trajectories(self) -> int:
        return self.mask.shape[-1]


@dataclass(frozen=True, kw_only=True)
class Discrete:
    """The integers 0 .. `num - 1`."""

    num: int


@dataclass(frozen=True, kw_only=True)
class Box:
    """Arrays of `shape`, each element in [`low`, `high`]."""

    shape: tuple[int, ...]
    low: float | tuple[float, ...]
    high: float | tuple[float, ...]


class HybridAction(NamedTuple):
    """A choice, `[]` int32, and an amount of it, `[D]` float32."""

    choice: Array
    amount: Array


@dataclass(frozen=True, kw_only=True)
class Hybrid:
    """One of `num` choices, and how much of it: which treatment, at which dose.

    Attributes:
      num: of choices.
      amount: of every amount, `[D]`.
      has_amount: `[num]`, False for a choice that takes none, such as no treatment: the amount of
        such an action is ignored.
    """

    num: int
    amount: Box
    has_amount: tuple[bool, ...]


Space = Discrete | Box | Hybrid


@dataclass(frozen=True, kw_only=True)
class Environment:
    """An environment as pure functions of ONE patient; batch them with `vmap`.

    Attributes:
      name: for logs and error messages.
      reset: `(key, params) -> (state, observation)`.
      step: `(key, state, action, params) -> (state, TimeStep)`. It does not reset.
      action_mask: `(state, params) -> [A]` bool, actions allowed in `state`; None where all are.
        Where given, `TimeStep.info["action_mask"]` repeats it for the new state.
      default_params: a pytree of arrays, the third argument of every call.
      observation_space: of one observation.
      action_space: of one action.
    """

    name: str
    reset: Callable[[Key, PyTree], tuple[PyTree, PyTree]]
    step: Callable[[Key, PyTree, Array, PyTree], tuple[PyTree, TimeStep]]
    default_params: PyTree
    observation_space: Space
    action_space: Space
    action_mask: Callable[[PyTree, PyTree], Array] | None = None


class Policy(Protocol):
    """Anything that maps parameters and one observation to a distribution over actions."""

    def __call__(self, params: PyTree, observation: PyTree) -> distrax.Distribution: ...
