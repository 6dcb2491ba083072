"""Logged episodes from a CSV file, one row for each decision.

    patient,time,state,action,reward
    17,0,Serious,Surgery,-5
    17,1,Stable,Conservative,-2
    17,2,Improving,,

States and actions are integers, or names. What the end of a record means is told in `trajectories`.
A column `episode` may tell several stays of a patient apart; other columns are not read unless they
are asked for.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxrl_llm import checks
from jaxrl_llm.data.trajectories import (
    COLUMNS,
    End,
    Row,
    group_episodes,
    index_parser,
    parse_number,
)
from jaxrl_llm.types import Trajectories


def read_csv(
    path: str | Path,
    *,
    state_names: Sequence[str] | None = None,
    action_names: Sequence[str] | None = None,
    num_states: int | None = None,
    num_actions: int | None = None,
    end: End = "terminated",
    time_step: float | None = 1.0,
    extras: Sequence[str] = (),
) -> Trajectories:
    """The episodes of a CSV file with the columns patient, time, state, action and reward.

    Patients are numbered in the order in which they first appear.

    Args:
      path: of a UTF-8 file with a header.
      state_names: names of states; without them the file holds integers.
      action_names: names of actions; likewise.
      num_states: of integer states, to check them against.
      num_actions: of integer actions.
      end: what the end of a record means, see the module.
      time_step: between two rows of an episode; None where decisions are irregular.
      extras: names of more columns, of numbers, for `steps.extras`.

    Raises:
      ValueError: at the first fault, as `path:line: what; remedy`.
    """
    checks.one_of("end", end, ("terminated", "truncated"))
    state = index_parser("state", state_names, num_states)
    action = index_parser("action", action_names, num_actions)

    def rows() -> Iterator[Row]:
        for place, cells in _csv_rows(path, (*COLUMNS, *extras)):
            try:
                chosen = cells["action"].strip()
                yield Row(
                    place=place,
                    patient=cells["patient"].strip(),
                    episode=cells.get("episode", ""),
                    time=parse_number("time", cells["time"]),
                    state=state(cells["state"]),
                    action=action(chosen) if chosen else None,
                    reward=_reward(cells["reward"], required=bool(chosen)),
                    extras=tuple(parse_number(name, cells[name]) for name in extras),
                )
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None

    return group_episodes(rows(), str(path), end=end, time_step=time_step, extras=extras)


def read_named(
    path: str | Path, **options: Any
) -> tuple[Trajectories, tuple[str, ...], tuple[str, ...]]:
    """The episodes of a file, and the names of the states and actions that occur in it.

    In the order of their numbers where all are numbers, and of the alphabet where not.

    Args:
      path: of the file.
      **options: of `read_csv`.
    """
    rows = [cells for _, cells in _csv_rows(path, COLUMNS)]

    def names(column: str) -> tuple[str, ...]:
        found = {cells[column].strip() for cells in rows} - {""}
        return tuple(sorted(found, key=int if all(map(str.isdecimal, found)) else str))

    states, actions = names("state"), names("action")
    log = read_csv(path, state_names=states, action_names=actions, **options)
    return log, states, actions


def _csv_rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The place and the cells of each row that is not blank."""
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey="", restval=None, strict=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            if not header:
                raise ValueError(f"{path} is empty; write a header and a row for each decision")
            for name in columns:
                if name not in header:
                    raise ValueError(
                        f"{path}:1: column {name} is missing; the header has {', '.join(header)}"
                    )
            reader.fieldnames = header
            for cells in reader:
                place = f"{path}:{reader.line_num}"
                if "" in cells or None in cells.values():
                    wanted = f"it must have {len(header)} as the header"
                    found = sum(cell is not None for name, cell in cells.items() if name)
                    found += len(cells.get("", ()))
                    raise ValueError(f"{place}: the row has {found} cells; {wanted}")
                yield place, cells
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; save the file as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV: {error}; check its quotes") from None


def _reward(cell: str, *, required: bool) -> float:
    if cell.strip() or required:
        reward = parse_number("reward", cell)
        if not required and reward:
            raise ValueError(
                f"reward is {reward:g} without an action; write it beside the last one"
            )
        return reward
    return 0.0
