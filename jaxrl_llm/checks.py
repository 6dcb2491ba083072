"""Host-side validators for the public boundary: one line, what, where, its value and the remedy.

They read concrete values, so call them before `jit`. Each message starts with the name of the
argument or field.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, TypeVar

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxrl_llm.types import MDP, Array, SuccessorMDP

# `mdp` works on NumPy copies of fields that are declared as JAX arrays.
HostArray = Array | NDArray[Any]
AnyMDP = TypeVar("AnyMDP", MDP, SuccessorMDP)


def finite(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a finite number."""
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite")


def positive(name: str, value: float) -> None:
    """Raises ValueError unless `value` is finite and greater than 0."""
    finite(name, value)
    if value <= 0:
        raise ValueError(f"{name} is {value}; it must be greater than 0")


def at_least(name: str, value: float, low: float) -> None:
    """Raises ValueError unless `value` is finite and `low` or more."""
    finite(name, value)
    if value < low:
        raise ValueError(f"{name} is {value}; it must be at least {low}")


def not_empty(name: str, values: Collection[object]) -> None:
    """Raises ValueError unless `values` has an element."""
    if not values:
        raise ValueError(f"{name} is empty; name at least one")


def between(name: str, value: float, low: float, high: float) -> None:
    """Raises ValueError unless `value` is in [`low`, `high`]."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must be in [{low}, {high}]")


def one_of(name: str, value: object, options: Collection[object]) -> None:
    """Raises ValueError unless `value` is among `options`."""
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(f"{name} is {value!r}; it must be one of {listed}")


def divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raises ValueError unless `value` is a multiple of `divisor`, naming both."""
    if value % divisor:
        raise ValueError(f"{name} is {value}; it must be a multiple of {divisor_name}, {divisor}")


def action_probabilities(
    policy: ArrayLike, num_states: int, num_actions: int
) -> NDArray[np.float64]:
    """Either kind of policy as probabilities `[S, A]`, on the host.

    Args:
      policy: action probabilities `[S, A]`, or one action a state `[S]` (integers).
      num_states: S.
      num_actions: A.

    Raises:
      ValueError: for another shape, or an action out of range.
    """
    choice = np.asarray(policy)
    if choice.shape == (num_states, num_actions):
        return choice.astype(float)
    if choice.shape != (num_states,) or choice.dtype.kind not in "iu":
        wanted = f"probabilities [{num_states}, {num_actions}] or integers [{num_states}]"
        raise ValueError(f"policy is {choice.dtype}{list(choice.shape)}; it must be {wanted}")
    for state in np.flatnonzero((choice < 0) | (choice >= num_actions))[:1]:
        raise ValueError(
            f"policy[{state}] is {choice[state]}; it must be in [0, {num_actions - 1}]"
        )
    return np.eye(num_actions)[choice]


def mdp(mdp: AnyMDP) -> AnyMDP:
    """Returns `mdp` if it is a Markov decision process that solvers and simulators can trust.

    The rows of terminal states mean nothing, so they need not sum to 1 and may be all 0, but they
    must be finite and not negative. Every state, terminal or not, allows at least one action.
    A row may miss 1 by 1e-5 in float32 and by 1e-6 in float64.

    Args:
      mdp: one problem, not a batch.

    Returns:
      The same object.

    Raises:
      ValueError: for the first fault, in this order: a wrong shape or dtype, or an index out of
        range; a discount outside [0, 1]; a state without an allowed action; a probability that is
        negative, not finite or in a law that does not sum to 1; a reward that is not finite; a
        discount of 1 with a state that no allowed actions lead from to a terminal one.
    """
    host = jax.tree.map(np.asarray, mdp)
    if isinstance(host, MDP):
        _dense_layout(host)
    else:
        _successor_layout(host)
    if not 0 <= host.discount <= 1:
        raise ValueError(f"discount is {host.discount!s}; it must be in [0, 1]")
    allowed = host.action_mask.any(-1)
    if not allowed.all():
        raise ValueError(f"action_mask[{allowed.argmin()}] allows no action; allow at least one")
    _distributions("initial", host.initial, np.True_)
    if isinstance(host, MDP):
        _distributions("transition", host.transition, ~host.terminal[:, None])
    else:
        used = np.zeros(len(host.probability), bool)
        used[host.row[~host.terminal]] = True
        _distributions("probability", host.probability, used)
    if not np.isfinite(host.reward).all():
        place = _first(~np.isfinite(host.reward))
        raise ValueError(f"reward{_show(place)} is {host.reward[place]}; it must be finite")
    if host.discount == 1:
        _reaches_terminal(host)
    return mdp


def _dense_layout(mdp: MDP) -> None:
    shape = mdp.transition.shape
    if len(shape) != 3 or shape[0] != shape[2] or 0 in shape:
        raise ValueError(f"transition has shape {shape}; it must be [states, actions, states]")
    _floating("transition", mdp.transition, shape)
    per_action = (*shape[:2], 1)
    _floating("reward", mdp.reward, per_action if mdp.reward.shape == per_action else shape)
    _common_layout(mdp, shape[:2])


def _successor_layout(mdp: SuccessorMDP) -> None:
    shape, rows = mdp.row.shape, mdp.successor.shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"row has shape {shape}; it must be [states, actions]")
    if len(rows) != 2 or 0 in rows:
        raise ValueError(f"successor has shape {rows}; it must be [rows, successors]")
    _indices("row", mdp.row, rows[0])
    _indices("successor", mdp.successor, shape[0])
    _floating("probability", mdp.probability, rows)
    _floating("reward", mdp.reward, rows)
    _common_layout(mdp, shape)


def _common_layout(mdp: MDP | SuccessorMDP, shape: tuple[int, ...]) -> None:
    _floating("discount", mdp.discount, ())
    _floating("initial", mdp.initial, shape[:1])
    _layout("terminal", mdp.terminal, shape[:1], ("bool",))
    _layout("action_mask", mdp.action_mask, shape, ("bool",))


def _floating(name: str, array: HostArray, shape: tuple[int, ...]) -> None:
    _layout(name, array, shape, ("float32", "float64"))


def _layout(name: str, array: HostArray, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; it must be {shape}")
    if array.dtype.name not in dtypes:
        raise ValueError(f"{name} is {array.dtype}; it must be {' or '.join(dtypes)}")


def _indices(name: str, array: HostArray, size: int) -> None:
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} is {array.dtype}; it must be int32")
    wrong = (array < 0) | (array >= size)
    if wrong.any():
        place = _first(wrong)
        raise ValueError(f"{name}{_show(place)} is {array[place]}; it must be in [0, {size})")


def _distributions(name: str, probability: HostArray, required: HostArray | np.bool_) -> None:
    """Laws `[..., K]` are finite and not negative, and sum to 1 where `required` `[...]`."""
    # The two extremes need no temporary array, and NaN passes through both.
    if not (probability.min() >= 0 and probability.max() < np.inf):
        place = _first(~((probability >= 0) & (probability < np.inf)))
        raise ValueError(
            f"{name}{_show(place)} is {probability[place]:.7g}; "
            "a probability must be finite and at least 0"
        )
    total = probability.sum(-1, dtype=np.float64)
    tolerance = 1e-5 if probability.dtype == np.float32 else 1e-6
    wrong = required & (np.abs(total - 1) > tolerance)
    if wrong.any():
        place = _first(wrong)
        subject = "each row" if place else "it"
        raise ValueError(
            f"{name}{_show(place)} sums to {total[place]:.7g}; {subject} must sum to 1"
        )


def _reaches_terminal(mdp: MDP | SuccessorMDP) -> None:
    """Walks back from the terminal states, visiting each state once."""
    if isinstance(mdp, MDP):
        possible = (mdp.transition > 0) & mdp.action_mask[:, :, None]
        predecessors = possible.any(1).T.copy()

        def precede(states: HostArray) -> HostArray:
            return predecessors[states].any(0)
    else:
        positive = mdp.probability > 0

        def precede(states: HostArray) -> HostArray:
            enters = (positive & states[mdp.successor]).any(-1)
            return (enters[mdp.row] & mdp.action_mask).any(-1)

    reached = new = mdp.terminal
    while new.any():
        new = precede(new) & ~reached
        reached = reached | new
    if not reached.all():
        raise ValueError(
            f"discount is 1 and state {reached.argmin()} cannot reach a terminal state; "
            "mark a terminal state or use discount < 1"
        )


def _first(wrong: HostArray) -> tuple[int, ...]:
    return tuple(int(axis) for axis in np.unravel_index(wrong.argmax(), wrong.shape))


def _show(place: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, place))}]" if place else ""
