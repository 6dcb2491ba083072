"""A finite MDP as flat lists, drawn from uniform numbers made beforehand: for loops over tables.

`envs.tabular` makes any MDP an `Environment`. What a table learner needs is narrower and much
hotter: many patients a step, one number or two a draw, and lists short enough for a cache. Here
every distinct law has little more slots than outcomes, one law after another: the 17,900 pairs of
ICU-Sepsis take 2.5 MB, where laws padded to the longest take 10, and each draw waits for memory.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrl_llm.envs import tabular
from jaxrl_llm.kernels import bellman
from jaxrl_llm.types import MDP, Array, Key, SuccessorMDP

_SLOTS = 8  # a law's slots are a multiple of it, so that few widths of tables have to be made


def look_up(array: Array, index: Array) -> Array:
    """`array[index]` without the check of the index, which costs as much as the look-up."""
    return array.at[index].get(mode="promise_in_bounds")


@struct.dataclass(kw_only=True)
class Move:
    """What one step leads to, any leading shape.

    Attributes:
      state: int32.
      reward: float32.
      terminated: bool.
    """

    state: Array
    reward: Array
    terminated: Array


@struct.dataclass(kw_only=True)
class Simulator:
    """Alias tables of `R` slots in all, one law after another; law 0 is that of the first state.

    Attributes:
      law: `[S · A]` int32, the number of each pair's law.
      first: `[laws]` int32, the place of its first slot.
      size: `[laws]` int32, the number of its slots.
      threshold: `[R]` float32, a slot keeps its own outcome with this probability.
      alias: `[R]` int32, the place whose outcome it gives otherwise.
      successor: `[R]` int32, states.
      reward: `[R]` float32, on the way there.
      terminal: `[S]` bool.
    """

    law: Array
    first: Array
    size: Array
    threshold: Array
    alias: Array
    successor: Array
    reward: Array
    terminal: Array

    def start(self, slot: Array, side: Array) -> Array:
        """First states, int32, from two uniform numbers in [0, 1) each."""
        return look_up(self.successor, self._draw(jnp.zeros(slot.shape, jnp.int32), slot, side))

    def step(self, slot: Array, side: Array, state: Array, action: Array) -> Move:
        """One step of every patient.

        Args:
          slot, side: uniform in [0, 1), one of each a patient.
          state: int32.
          action: int32, also one that is not allowed.
        """
        num_actions = self.law.shape[0] // self.terminal.shape[0]
        place = self._draw(look_up(self.law, state * num_actions + action), slot, side)
        following = look_up(self.successor, place)
        return Move(
            state=following,
            reward=look_up(self.reward, place),
            terminated=look_up(self.terminal, following),
        )

    def _draw(self, law: Array, slot: Array, side: Array) -> Array:
        size = look_up(self.size, law)
        # Rounding may bring a number just below 1 to `size` itself.
        offset = jnp.minimum((slot * size.astype(jnp.float32)).astype(jnp.int32), size - 1)
        place = look_up(self.first, law) + offset
        return jnp.where(side < look_up(self.threshold, place), place, look_up(self.alias, place))


@struct.dataclass(kw_only=True)
class Choices:
    """The allowed actions of each state as lists.

    Attributes:
      allowed: `[S, A]` bool.
      listed: `[S · A]` int32, in each row the allowed actions first, in order.
      number: `[S]` int32, of the allowed actions.
    """

    allowed: Array
    listed: Array
    number: Array

    @classmethod
    def among(cls, allowed: Array) -> Choices:
        listed = jnp.argsort(~allowed, axis=1, stable=True).astype(jnp.int32)
        number = jnp.sum(allowed, axis=1, dtype=jnp.int32)
        return cls(allowed=allowed, listed=listed.reshape(-1), number=number)

    def action(self, state: Array, rank: Array) -> Array:
        """The allowed action number `rank` of each state, from 0."""
        return look_up(self.listed, state * self.allowed.shape[1] + rank)


@struct.dataclass(kw_only=True)
class Patients:
    """`[P]` patients under way, each in an episode of its own.

    Attributes:
      state: int32.
      time: int32, steps of the episode so far.
      episode_return: float32, undiscounted.
    """

    state: Array
    time: Array
    episode_return: Array

    @classmethod
    def begin(cls, state: Array) -> Patients:
        return cls(
            state=state,
            time=jnp.zeros(state.shape, jnp.int32),
            episode_return=jnp.zeros(state.shape),
        )

    def after(self, move: Move, max_steps: int | None) -> tuple[Patients, Array]:
        """Each one step later, before any reset, and whose episode ended there, bool."""
        time = self.time + 1
        ended = move.terminated if max_steps is None else move.terminated | (time >= max_steps)
        return Patients(
            state=move.state, time=time, episode_return=self.episode_return + move.reward
        ), ended

    def restart(self, ended: Array, state: Array) -> Patients:
        """The same, but new episodes from `state` where the last one `ended`."""
        return Patients(
            state=jnp.where(ended, state, self.state),
            time=jnp.where(ended, 0, self.time),
            episode_return=jnp.where(ended, 0, self.episode_return),
        )


def random_words(key: Key, num_steps: int, num_draws: int, num_patients: int) -> Array:
    """Random words `[T, D, P]` uint32, for `uniform`; drawn in one go, before a loop.

    They are drawn flat: a last axis of 1 would keep the generator from using vector instructions,
    at seven times the cost.
    """
    shape = (num_steps, num_draws, num_patients)
    return jax.random.bits(key, (math.prod(shape),), jnp.uint32).reshape(shape)


def uniform(bits: Array) -> Array:
    """Numbers in [0, 1) of random words: the 24 bits that a float32 there holds."""
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def make(mdp: MDP | SuccessorMDP) -> Simulator:
    """The simulator of one problem, made on the host.

    Args:
      mdp: one problem, validated by `checks.mdp` where it was made.
    """
    sparse = mdp if isinstance(mdp, SuccessorMDP) else bellman.successor_form(mdp)
    initial = np.asarray(mdp.initial)
    laws = [(initial, np.arange(len(initial)), np.zeros(len(initial)))]
    host = (np.asarray(sparse.probability), np.asarray(sparse.successor), np.asarray(sparse.reward))
    laws += zip(*host, strict=True)
    used = np.array([max(int(np.sum(probability > 0)), 1) for probability, _, _ in laws])
    size = -(-used // _SLOTS) * _SLOTS
    first = np.cumsum(size) - size
    probability, successor, reward = np.zeros((3, np.sum(size)))
    for (mass, states, rewards), begin, width in zip(laws, first, size, strict=True):
        # Outcomes first, in order; a terminal state's row may be all 0.
        order = np.argsort(mass <= 0, kind="stable")[:width]
        place = slice(begin, begin + len(order))
        probability[place], successor[place] = mass[order], states[order]
        reward[place] = rewards[order]
    threshold, alias = np.ones(len(probability), np.float32), np.arange(len(probability))
    for width in np.unique(size):  # laws of one width are one table
        place = first[size == width][:, None] + np.arange(width)
        table = tabular.alias_table(probability[place])
        threshold[place] = table.threshold
        alias[place] = place[:, :1] + np.asarray(table.alias)
    return Simulator(
        law=jnp.asarray(np.asarray(sparse.row).ravel() + 1, jnp.int32),
        first=jnp.asarray(first, jnp.int32),
        size=jnp.asarray(size, jnp.int32),
        threshold=jnp.asarray(threshold),
        alias=jnp.asarray(alias, jnp.int32),
        successor=jnp.asarray(successor, jnp.int32),
        reward=jnp.asarray(reward, jnp.float32),
        terminal=jnp.asarray(mdp.terminal),
    )
