"""Patient flow: from the queue to the ward, the ICU and home, with a limit on beds.

SYNTHETIC; research only, not for clinical use. A patient is stable or critical, and waits, lies in
the ward or in the ICU: a state is six counts. Each hour one decision moves at most one patient, see
`action_names`; then each patient, independently, changes (stable to critical or back), leaves (a
discharge, or a death) or stays, with probabilities of the place and severity; then new patients
arrive, Poisson truncated at `max_arrivals`, each critical with a probability. They queue; who finds
the queue full is turned away. Beds are never exceeded: a decision that would is not allowed
(`action_mask`) and, if taken, moves no one.

The reward is 1 for a discharge, less the costs of deaths, of patients turned away, of each one who
waits, and of sending a patient home early. There is no end; an episode is cut after `max_steps`.
`mdp` is the same problem as exact probabilities, for hospitals small enough to list their states.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import NDArray
from scipy.stats import binom, poisson

from jaxrl_llm import checks, make_mdp
from jaxrl_llm.envs import core
from jaxrl_llm.types import MDP, Array, Box, Discrete, Environment, Key, TimeStep

Table = NDArray[np.float64]

_PLACES = ("queue", "ward", "ICU")
group_names = tuple(f"{place}, {kind}" for place in _PLACES for kind in ("stable", "critical"))
observation_names = group_names
_QUEUE_STABLE, _QUEUE_CRITICAL, _WARD_STABLE, _WARD_CRITICAL, _ICU_STABLE, _ICU_CRITICAL = range(6)
_OUT = 3  # the place of those who left, which has room for all

# Name: the group that a patient is moved from, and the place moved to.
_MOVES = {
    "hold": None,
    "admit a stable patient to the ward": (_QUEUE_STABLE, 1),
    "admit a critical patient to the ward": (_QUEUE_CRITICAL, 1),
    "admit a critical patient to the ICU": (_QUEUE_CRITICAL, 2),
    "transfer a critical patient up to the ICU": (_WARD_CRITICAL, 2),
    "transfer a stable patient down to the ward": (_ICU_STABLE, 1),
    "discharge a stable patient early": (_WARD_STABLE, _OUT),
}
action_names = tuple(_MOVES)
_EARLY = len(_MOVES) - 1
# What each action adds to the six counts, `[7, 6]`.
_CHANGE = np.zeros((len(_MOVES), 6), int)
for _action, _move in enumerate(_MOVES.values()):
    if _move is not None:
        _CHANGE[_action, _move[0]] -= 1
        if _move[1] != _OUT:
            _CHANGE[_action, 2 * _move[1] + _move[0] % 2] += 1

_MAX_STATES = 1500


@struct.dataclass(kw_only=True)
class Params:
    """What `step` reads; groups are in the order of `group_names`, probabilities per hour.

    Attributes:
      room: `[3]` int32, places in the queue, beds in the ward and in the ICU.
      arrivals: `[max_arrivals + 1]`, probability of each number of new patients.
      critical: `[]`, the probability that a new patient is critical.
      change: `[6]`, probability of turning from stable to critical, or back.
      leave: `[6]`, probability of leaving.
      dies: `[6]` bool, whether leaving is a death rather than a discharge.
      waiting_cost: `[2]`, of a stable and of a critical patient in the queue, an hour.
      death_cost: `[]`.
      turned_away_cost: `[]`.
      early_cost: `[]`, of an early discharge, which earns no reward.
    """

    room: Array
    arrivals: Array
    critical: Array
    change: Array
    leave: Array
    dies: Array
    waiting_cost: Array
    death_cost: Array
    turned_away_cost: Array
    early_cost: Array


@struct.dataclass(kw_only=True)
class State:
    """A hospital.

    Attributes:
      counts: `[6]` int32, patients in each group.
      totals: `[4]` int32 since the start: arrived, discharged, died, turned away.
    """

    counts: Array
    totals: Array


def make_params(
    *,
    num_ward_beds: int,
    num_icu_beds: int,
    max_queue: int,
    arrival_rate: float,
    max_arrivals: int,
) -> Params:
    """The numbers of the module, made up, for a hospital of some size."""
    for name, value in (
        ("num_ward_beds", num_ward_beds),
        ("num_icu_beds", num_icu_beds),
        ("max_queue", max_queue),
        ("max_arrivals", max_arrivals),
    ):
        checks.at_least(name, value, 1)
    checks.positive("arrival_rate", arrival_rate)
    law = poisson.pmf(np.arange(max_arrivals + 1), arrival_rate)
    return Params(
        room=jnp.array([max_queue, num_ward_beds, num_icu_beds], jnp.int32),
        arrivals=jnp.asarray(law / law.sum(), jnp.float32),
        critical=jnp.float32(0.25),
        change=jnp.array([0.05, 0.0, 0.03, 0.05, 0.02, 0.2]),
        leave=jnp.array([0.0, 0.15, 0.15, 0.1, 0.0, 0.03]),
        dies=jnp.array([False, True, False, True, False, True]),
        waiting_cost=jnp.array([0.05, 0.2]),
        death_cost=jnp.float32(10.0),
        turned_away_cost=jnp.float32(2.0),
        early_cost=jnp.float32(1.0),
    )


def allowed(counts: Array, room: Array) -> Array:
    """Which actions move a patient who exists to a place with room (or hold), `[7]` bool."""
    after = counts[None] + jnp.asarray(_CHANGE)
    occupied = jnp.sum(after.reshape(-1, 3, 2), axis=-1)
    return jnp.all(after >= 0, axis=-1) & jnp.all(occupied <= room[None], axis=-1)


def make(
    *,
    num_ward_beds: int = 8,
    num_icu_beds: int = 3,
    max_queue: int = 8,
    arrival_rate: float = 0.5,
    max_arrivals: int = 4,
    max_steps: int | None = 168,
) -> Environment:
    """The environment: counts as shares of their place's room, `[6]`, and 7 actions.

    The hospital is empty at first. `TimeStep.info` holds `counts` `[6]`, what happened this hour,
    `arrived`, `discharged`, `died`, `turned_away` `[]` int32, the same as `totals` `[4]` since the
    start, and `action_mask` `[7]`. At every time arrived = in the queue + in beds + discharged +
    died + turned away.

    Args:
      num_ward_beds: at least 1.
      num_icu_beds: at least 1.
      max_queue: places to wait, at least 1.
      arrival_rate: new patients an hour, greater than 0, before the truncation.
      max_arrivals: most new patients in an hour, at least 1.
      max_steps: truncate after this many hours; never when None.
    """
    params = make_params(
        num_ward_beds=num_ward_beds,
        num_icu_beds=num_icu_beds,
        max_queue=max_queue,
        arrival_rate=arrival_rate,
        max_arrivals=max_arrivals,
    )
    num_slots = max(num_ward_beds, num_icu_beds, max_queue)

    def observe(counts: Array, params: Params) -> Array:
        return counts / jnp.repeat(params.room, 2)

    def reset(key: Key, params: Params) -> tuple[State, Array]:
        counts = jnp.zeros(6, jnp.int32)
        return State(counts=counts, totals=jnp.zeros(4, jnp.int32)), observe(counts, params)

    def step(key: Key, state: State, action: Array, params: Params) -> tuple[State, TimeStep]:
        draws = jax.random.uniform(key, (6 * num_slots + max_arrivals + 1,))
        each = draws[: 6 * num_slots].reshape(6, num_slots)
        moved = allowed(state.counts, params.room)[action]
        counts = state.counts + jnp.where(moved, jnp.asarray(_CHANGE)[action], 0)
        early = (moved & (action == _EARLY)).astype(jnp.int32)
        waiting = counts[:2]

        present = jnp.arange(num_slots)[None] < counts[:, None]
        left = jnp.sum(present & (each < params.leave[:, None]), axis=-1)
        gone = (params.leave + params.change)[:, None]
        turned = jnp.sum(present & (each < gone), axis=-1) - left
        counts = counts - left - turned + turned.reshape(3, 2)[:, ::-1].ravel()
        died = jnp.sum(left * params.dies)
        discharged = jnp.sum(left) - died

        arrived = jnp.sum(draws[-1] >= jnp.cumsum(params.arrivals)[:-1])
        admitted = jnp.minimum(arrived, params.room[0] - jnp.sum(counts[:2]))
        is_critical = draws[6 * num_slots : -1] < params.critical
        critical = jnp.sum(is_critical & (jnp.arange(max_arrivals) < admitted))
        counts = counts.at[:2].add(jnp.stack([admitted - critical, critical]))
        turned_away = arrived - admitted

        happened = jnp.stack([arrived, discharged + early, died, turned_away]).astype(jnp.int32)
        following = State(counts=counts.astype(jnp.int32), totals=state.totals + happened)
        reward = (
            discharged
            - params.death_cost * died
            - params.turned_away_cost * turned_away
            - params.waiting_cost @ waiting.astype(jnp.float32)
            - params.early_cost * early
        )
        return following, TimeStep(
            observation=observe(following.counts, params),
            reward=reward,
            terminated=jnp.bool_(False),
            truncated=jnp.bool_(False),
            info={
                "counts": following.counts,
                "arrived": happened[0],
                "discharged": happened[1],
                "died": happened[2],
                "turned_away": happened[3],
                "totals": following.totals,
                "action_mask": allowed(following.counts, params.room),
            },
        )

    environment = Environment(
        name="patient_flow",
        reset=reset,
        step=step,
        action_mask=lambda state, params: allowed(state.counts, params.room),
        default_params=params,
        observation_space=Box(shape=(6,), low=0.0, high=1.0),
        action_space=Discrete(num=len(_MOVES)),
    )
    return environment if max_steps is None else core.time_limit(environment, max_steps)


def state_counts(
    *, num_ward_beds: int = 2, num_icu_beds: int = 1, max_queue: int = 2
) -> NDArray[np.int64]:
    """The six counts of each state of `mdp`, `[S, 6]`."""
    places = (_place_counts(room) for room in (max_queue, num_ward_beds, num_icu_beds))
    return np.array([np.concatenate(parts) for parts in itertools.product(*places)])


def _place_counts(room: int) -> list[NDArray[np.int64]]:
    return [np.array([a, b]) for a in range(room + 1) for b in range(room + 1 - a)]


def mdp(
    *,
    num_ward_beds: int = 2,
    num_icu_beds: int = 1,
    max_queue: int = 2,
    arrival_rate: float = 0.5,
    max_arrivals: int = 4,
    discount: float = 0.95,
) -> MDP:
    """The problem as exact probabilities, states as in `state_counts`, × 7 actions.

    Args:
      num_ward_beds: as in `make`, as are the next four.
      num_icu_beds: see there.
      max_queue: see there.
      arrival_rate: see there.
      max_arrivals: see there.
      discount: in [0, 1).

    Raises:
      ValueError: for a hospital of more than 1500 states.
    """
    rooms = (max_queue, num_ward_beds, num_icu_beds)
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf, float),
        make_params(
            num_ward_beds=num_ward_beds,
            num_icu_beds=num_icu_beds,
            max_queue=max_queue,
            arrival_rate=arrival_rate,
            max_arrivals=max_arrivals,
        ),
    )
    num_states = int(np.prod([(room + 1) * (room + 2) // 2 for room in rooms]))
    if num_states > _MAX_STATES:
        raise ValueError(f"the hospital has {num_states} states; at most {_MAX_STATES}, drop beds")
    counts = state_counts(
        num_ward_beds=num_ward_beds, num_icu_beds=num_icu_beds, max_queue=max_queue
    )
    mask = np.asarray(jax.vmap(allowed, in_axes=(0, None))(jnp.asarray(counts), jnp.asarray(rooms)))
    after = counts[:, None] + np.where(mask[:, :, None], _CHANGE, 0)
    index = {tuple(row): state for state, row in enumerate(counts.tolist())}
    moved = np.array([[index[tuple(row)] for row in rows] for rows in after.tolist()])

    queue, *beds = (
        _stays(room, params.change[2 * place :][:2], params.leave[2 * place :][:2])
        for place, room in enumerate(rooms)
    )
    queue, turned_away = _arrive(queue, max_queue, params.arrivals, float(params.critical))
    law = np.kron(queue, np.kron(*beds))
    num_beds = len(counts) // len(queue)
    leaving = params.leave * np.where(params.dies, -params.death_cost, 1)
    expected = (
        counts @ leaving
        - counts[:, :2] @ params.waiting_cost
        - params.turned_away_cost * np.repeat(turned_away, num_beds)
    )
    early = mask & (np.arange(len(_MOVES)) == _EARLY)
    return make_mdp(
        law[moved],
        expected[moved] - params.early_cost * early,
        discount,
        initial=np.arange(num_states) == 0,
        action_mask=mask,
    )


def _stays(room: int, change: Table, leave: Table) -> Table:
    """The law of the next counts of one place, patient after patient: `[C, C]`."""
    places = _place_counts(room)
    law = np.zeros((len(places), room + 2, room + 2))
    for row, (stable, critical) in zip(law, places, strict=True):
        row[0, 0] = 1
        for kind in [0] * stable + [1] * critical:
            here, other = (np.roll(row, 1, axis=axis) for axis in (kind, 1 - kind))
            row[:] = (
                (1 - change[kind] - leave[kind]) * here + change[kind] * other + leave[kind] * row
            )
    return np.stack([law[:, stable, critical] for stable, critical in places], axis=-1)


def _arrive(queue: Table, room: int, arrivals: Table, critical: float) -> tuple[Table, Table]:
    """The queue's law `[C, C]` after arrivals, and how many are turned away on average `[C]`."""
    places = _place_counts(room)
    index = {tuple(place.tolist()): state for state, place in enumerate(places)}
    joining = np.zeros((len(places), len(places)))
    excess = np.zeros(len(places))
    for state, place in enumerate(places):
        free = room - int(place.sum())
        for arrived, probability in enumerate(arrivals):
            admitted = min(arrived, free)
            excess[state] += probability * (arrived - admitted)
            for sick in range(admitted + 1):
                following = index[int(place[0]) + admitted - sick, int(place[1]) + sick]
                joining[state, following] += probability * binom.pmf(sick, admitted, critical)
    return queue @ joining, queue @ excess
