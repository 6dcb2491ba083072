"""Logged episodes of unequal length as `Trajectories`: from arrays or a rollout; split by patient.

A log has one row for each decision, sorted by time within each episode. The reward of a row is what
followed its action. An episode ends in one of two ways:

- its last row has an action: nothing followed, the process itself ended (`end="terminated"`);
- its last row has none: it names the state in which the record ended. With `end="terminated"` that
  state is final (discharge, death); with `end="truncated"` the patient was lost from sight, and
  what would have followed counts as what a model says of that state.

`trajectory_csv` reads a file of such rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxrl_llm import checks
from jaxrl_llm.types import Trajectories, Transition

End = Literal["terminated", "truncated"]
COLUMNS = ("patient", "time", "state", "action", "reward")


class Row(NamedTuple):
    """One row of a log; `action` is None where the record ended in `state`."""

    place: str
    patient: object
    episode: object
    time: float
    state: int
    action: int | None
    reward: float
    extras: tuple[float, ...]


def from_arrays(
    patient: ArrayLike,
    time: ArrayLike,
    state: ArrayLike,
    action: ArrayLike,
    reward: ArrayLike,
    *,
    num_states: int | None = None,
    num_actions: int | None = None,
    end: End = "terminated",
    time_step: float | None = 1.0,
    extras: Mapping[str, ArrayLike] | None = None,
) -> Trajectories:
    """The episodes of a log in columns `[N]`, one episode a patient.

    Args:
      patient: identifiers.
      time: numbers, ascending within a patient.
      state: integers.
      action: integers; -1 in the last row of an episode that ended in its state.
      reward: numbers; 0 in that row.
      num_states: to check states against; any integer from 0 on where None.
      num_actions: likewise.
      end: what the end of a record means, see the module.
      time_step: between two rows of an episode; None where decisions are irregular.
      extras: more columns, of numbers.

    Raises:
      ValueError: at the first fault, as `row i: what; remedy`.

    >>> log = from_arrays([7, 7, 8], [0, 1, 0], [0, 1, 1], [1, 0, 0], [0.0, 1.0, 0.0])
    >>> log.mask.T.tolist()
    [[True, True], [True, False]]
    """
    checks.one_of("end", end, ("terminated", "truncated"))
    columns = {
        name: np.asarray(column)
        for name, column in zip(COLUMNS, (patient, time, state, action, reward), strict=True)
    }
    columns |= {name: np.asarray(column) for name, column in (extras or {}).items()}
    size = len(columns["patient"])
    for name, column in columns.items():
        if column.shape != (size,):
            raise ValueError(f"{name} has shape {column.shape}; it must be ({size},) as patient")
    names = tuple(extras or {})
    parse_state = index_parser("state", None, num_states)
    parse_action = index_parser("action", None, num_actions)

    def rows() -> Iterator[Row]:
        for index, cells in enumerate(zip(*(c.tolist() for c in columns.values()), strict=True)):
            who, when, where, chosen, gained, *more = cells
            place = f"row {index}"
            try:
                yield Row(
                    place=place,
                    patient=who,
                    episode="",
                    time=parse_number("time", when),
                    state=parse_state(where),
                    action=None if chosen == -1 else parse_action(chosen),
                    reward=parse_number("reward", gained),
                    extras=tuple(map(parse_number, names, more)),
                )
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None

    return group_episodes(rows(), "the log", end=end, time_step=time_step, extras=names)


def from_rollout(
    transition: Transition,
    *,
    incomplete: Literal["leave_out", "truncated"] = "leave_out",
    episodes: Literal["all", "first"] = "all",
) -> Trajectories:
    """The episodes of a rollout `[T, B]`; each environment is a patient.

    A rollout of fixed length holds more short episodes than long ones: complete episodes alone are
    a biased sample. For an unbiased one take the first of each environment, in a rollout that is
    longer than any episode.

    Args:
      transition: from `envs.core.rollout`, leaves `[T, B, ...]`.
      incomplete: leave out the episodes under way when the rollout stopped, or mark them truncated.
      episodes: of each environment, all of them or the first.

    Raises:
      ValueError: if no episode is left.
    """
    checks.one_of("incomplete", incomplete, ("leave_out", "truncated"))
    checks.one_of("episodes", episodes, ("all", "first"))
    host = jax.tree.map(np.asarray, transition)
    if incomplete == "truncated":
        truncated = host.truncated.copy()
        truncated[-1] |= ~host.terminated[-1]
        host = replace(host, truncated=truncated)
    stops = host.terminated | host.truncated
    limit = 1 if episodes == "first" else None
    spans = [
        (stream, start, stop + 1)
        for stream in range(stops.shape[1])
        for start, stop in _spans(np.flatnonzero(stops[:, stream]))[:limit]
    ]
    if not spans:
        raise ValueError(f"transition has no complete episode in {len(stops)} steps; take more")
    stream, start, stop = np.array(spans).T
    length = stop - start
    offset = np.arange(length.max())[:, None]
    mask = offset < length
    # Padding repeats the last step of its episode, and is cleared below.
    row = np.minimum(start + offset, stop - 1)

    def gather(leaf: NDArray) -> NDArray:
        kept = mask.reshape(*mask.shape, *(1,) * (leaf.ndim - 2))
        return np.where(kept, leaf[row, stream], np.zeros((), leaf.dtype))

    return Trajectories(
        steps=jax.tree.map(lambda leaf: jnp.asarray(gather(leaf)), host),
        mask=jnp.asarray(mask),
        patient=jnp.asarray(stream, jnp.int32),
    )


def _spans(stops: NDArray[np.intp]) -> list[tuple[int, int]]:
    """First and last step of each episode of a stream."""
    starts = np.append(0, stops + 1)[:-1]
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def folds(trajectories: Trajectories, num_folds: int, *, seed: int = 0) -> NDArray[np.int32]:
    """A fold in [0, `num_folds`) for each trajectory, `[B]`: all of a patient's are in one.

    Args:
      trajectories: of at least `num_folds` patients.
      num_folds: of nearly equal numbers of patients.
      seed: of the shuffle.
    """
    checks.at_least("num_folds", num_folds, 2)
    patients, patient = np.unique(np.asarray(trajectories.patient), return_inverse=True)
    if len(patients) < num_folds:
        raise ValueError(
            f"num_folds is {num_folds}; it must be at most the number of patients, {len(patients)}"
        )
    order = np.random.default_rng(seed).permutation(len(patients))
    return (order % num_folds)[patient].astype(np.int32)


def split(
    trajectories: Trajectories, fraction: float, *, seed: int = 0
) -> tuple[Trajectories, Trajectories]:
    """Two sets without a patient in common.

    Args:
      trajectories: of at least 2 patients.
      fraction: of the patients, for the first set; rounded, but neither set is empty.
      seed: of the shuffle.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; it must be between 0 and 1")
    patients, patient = np.unique(np.asarray(trajectories.patient), return_inverse=True)
    if len(patients) < 2:
        raise ValueError("trajectories has one patient; two sets need at least 2")
    size = min(max(round(fraction * len(patients)), 1), len(patients) - 1)
    is_first = (np.random.default_rng(seed).permutation(len(patients)) < size)[patient]
    return select(trajectories, is_first), select(trajectories, ~is_first)


def select(trajectories: Trajectories, keep: ArrayLike) -> Trajectories:
    """The trajectories where `keep` `[B]` bool, without padding that none of them needs."""
    keep = np.asarray(keep, bool)
    mask = np.asarray(trajectories.mask)[:, keep]
    length = max(int(mask.sum(axis=0).max(initial=0)), 1)
    return Trajectories(
        steps=jax.tree.map(lambda leaf: leaf[:length, keep], trajectories.steps),
        mask=jnp.asarray(mask[:length]),
        patient=trajectories.patient[keep],
    )


def group_episodes(
    rows: Iterator[Row], source: str, *, end: End, time_step: float | None, extras: Sequence[str]
) -> Trajectories:
    """Groups rows by patient and episode, and checks their times."""
    grouped: dict[tuple[object, object], list[Row]] = {}
    patients: dict[object, int] = {}
    for row in rows:
        patients.setdefault(row.patient, len(patients))
        episode = grouped.setdefault((row.patient, row.episode), [])
        if episode:
            _check_following(episode[-1], row, time_step)
        episode.append(row)
    if not grouped:
        raise ValueError(f"{source} has no row; give at least one decision")
    for episode in grouped.values():
        last = episode[-1]
        if last.action is None and len(episode) == 1:
            raise ValueError(f"{last.place}: {_whose(last)} has no action; leave the episode out")
        if last.action is not None and end == "truncated":
            raise ValueError(
                f"{last.place}: {_whose(last)} ends with an action, and the state that followed is "
                "not there; add a row of it without an action, or use end='terminated'"
            )

    num_steps = [sum(row.action is not None for row in episode) for episode in grouped.values()]
    shape = (max(num_steps), len(grouped))
    state, following, action = (np.zeros(shape, np.int32) for _ in range(3))
    reward, more = np.zeros(shape, np.float32), np.zeros((len(extras), *shape), np.float32)
    for column, (episode, length) in enumerate(zip(grouped.values(), num_steps, strict=True)):
        taken = episode[:length]
        states = [row.state for row in episode]
        state[:length, column] = states[:length]
        # A state that is not known is never read: the step that leads there terminates.
        following[:length, column] = (states[1:] + states[-1:])[:length]
        action[:length, column] = [row.action or 0 for row in taken]
        reward[:length, column] = [row.reward for row in taken]
        more[:, :length, column] = np.array([row.extras for row in taken]).T
    offset, length = np.arange(shape[0])[:, None], np.array(num_steps)
    ends = offset == length - 1
    steps = Transition(
        observation=jnp.asarray(state),
        action=jnp.asarray(action),
        reward=jnp.asarray(reward),
        terminated=jnp.asarray(ends & (end == "terminated")),
        truncated=jnp.asarray(ends & (end == "truncated")),
        next_observation=jnp.asarray(following),
        extras={name: jnp.asarray(leaf) for name, leaf in zip(extras, more, strict=True)},
    )
    return Trajectories(
        steps=steps,
        mask=jnp.asarray(offset < length),
        patient=jnp.asarray([patients[patient] for patient, _ in grouped], jnp.int32),
    )


def _check_following(before: Row, row: Row, time_step: float | None) -> None:
    who = _whose(row)
    if before.action is None:
        raise ValueError(
            f"{before.place}: {who} has no action at time {before.time:g}, and goes on at "
            f"{row.time:g}; only the last row may lack one"
        )
    if row.time == before.time:
        raise ValueError(
            f"{row.place}: {who} has time {row.time:g} twice; keep one decision a time, or tell "
            "stays apart in a column episode"
        )
    if row.time < before.time:
        raise ValueError(
            f"{row.place}: {who} has time {row.time:g} after {before.time:g}; sort by time"
        )
    gap = row.time - before.time
    if time_step is not None and not math.isclose(gap, time_step, rel_tol=1e-6):
        raise ValueError(
            f"{row.place}: {who} goes from time {before.time:g} to {row.time:g}, not by "
            f"{time_step:g}; fill the gap, or set time_step (None where times are irregular)"
        )


def _whose(row: Row) -> str:
    return f"patient {row.patient}" + (f", episode {row.episode}" if row.episode else "")


def index_parser(
    name: str, names: Sequence[str] | None, num: int | None
) -> Callable[[str | float], int]:
    """Reads a state or an action: a name, or an integer below `num`."""
    if names is not None:
        places = {text: place for place, text in enumerate(names)}

        def named(cell: str | float) -> int:
            text = str(cell).strip()
            if text not in places:
                listed = ", ".join(list(names)[:5]) + (", ..." if len(names) > 5 else "")
                raise ValueError(f"{name} is {text!r}; it must be one of {listed}")
            return places[text]

        return named

    def integer(cell: str | float) -> int:
        try:
            number = int(cell) if isinstance(cell, str) or cell == int(cell) else None
        except ValueError:
            number = None
        if number is None:
            remedy = f"it must be an integer, or give {name}_names"
            raise ValueError(f"{name} is {cell!r}; {remedy}")
        if number < 0 or (num is not None and number >= num):
            limit = "at least 0" if num is None else f"in [0, {num})"
            raise ValueError(f"{name} is {number}; it must be {limit}")
        return number

    return integer


def parse_number(name: str, cell: str | float) -> float:
    """A finite number.

    Raises:
      ValueError: naming the column.
    """
    try:
        number = float(cell)
    except ValueError:
        raise ValueError(f"{name} is {cell!r}; it must be a number") from None
    checks.finite(name, number)
    return number
