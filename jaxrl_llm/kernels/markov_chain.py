"""The structure of a finite Markov chain, exact: classes, recurrence, periods.

A chain is its transition matrix `[S, S]`, rows summing to 1; `mdp.under(policy)` is the one that a
policy makes. Which state leads to which is read off the matrix's zeros, so nothing here depends on
rounding: a probability counts as possible where it is greater than 0, however small.

What is built on it: `absorbing_chain` (where and when it ends), `stationary` (where it is in the
long run), `spectral` (how fast it gets there).
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_llm.types import Array


class ChainStructure(NamedTuple):
    """Which states lead to which, and what follows from that.

    Two states communicate if each leads to the other; a class of such states is recurrent if the
    chain cannot leave it.

    Attributes:
      reaches: `[S, S]` bool, whether the column's state can follow the row's, in 0 steps or more.
      class_of: `[S]` int32, the lowest state of the state's communicating class.
      recurrent: `[S]` bool, False where the chain leaves one day for ever (transient).
      period: `[S]` int32, the greatest common divisor of the times at which the chain can return
        to the state; 0 where it never can.
    """

    reaches: Array
    class_of: Array
    recurrent: Array
    period: Array

    @property
    def communicate(self) -> Array:
        """`[S, S]` bool, whether two states are of one class."""
        return self.class_of[..., :, None] == self.class_of[..., None, :]

    @property
    def same_recurrent(self) -> Array:
        """`[S, S]` bool, whether two states are of one recurrent class."""
        return self.communicate & self.recurrent[..., None]

    @property
    def leads_class(self) -> Array:
        """`[S]` bool, True at the lowest state of each recurrent class."""
        states = jnp.broadcast_to(jnp.arange(self.class_of.shape[-1]), self.class_of.shape)
        return self.recurrent & (self.class_of == states)

    @property
    def num_recurrent_classes(self) -> Array:
        """`[]` int32, at least 1; the stationary law is unique where it is 1."""
        return jnp.sum(self.leads_class, axis=-1, dtype=jnp.int32)

    @property
    def num_unit_eigenvalues(self) -> Array:
        """`[]` int32, how many eigenvalues have modulus 1: a class of period d has d of them."""
        return jnp.sum(jnp.where(self.leads_class, self.period, 0), axis=-1, dtype=jnp.int32)

    @property
    def aperiodic(self) -> Array:
        """`[]` bool, whether P^t has a limit: no recurrent state has a period above 1."""
        return self.num_unit_eigenvalues == self.num_recurrent_classes

    @property
    def irreducible(self) -> Array:
        """`[]` bool, whether every state leads to every other."""
        return jnp.all(self.reaches, axis=(-2, -1))


def stop_at(transition: Array, terminal: Array) -> Array:
    """The chain that stays for ever in each terminal state: `terminal` `[S]` bool.

    The rows of an MDP's terminal states mean nothing, so `mdp.under(policy)` needs this first.
    """
    return jnp.where(
        terminal[:, None], jnp.eye(len(transition), dtype=transition.dtype), transition
    )


def structure(transition: Array) -> ChainStructure:
    """Classes, recurrence and periods of a chain.

    Args:
      transition: `[S, S]`; only which entries are greater than 0 matters.

    Source: Norris (1997), "Markov Chains", sections 1.2 and 1.8; Denardo (1977), "Periods of
      connected networks and powers of nonnegative matrices", for the period from distances.

    >>> import jax.numpy as jnp
    >>> two_wards_and_home = structure(jnp.array([[0, 1, 0], [1, 0, 0], [0, 0, 1.0]]))
    >>> two_wards_and_home.class_of.tolist()
    [0, 0, 2]
    >>> two_wards_and_home.period.tolist()
    [2, 2, 1]
    """
    chex.assert_rank(transition, 2)
    size = len(transition)
    possible = transition > 0
    reaches = _reachable(possible)
    communicate = reaches & reaches.T
    class_of = jnp.argmax(communicate, axis=1).astype(jnp.int32)
    recurrent = jnp.all(communicate | ~reaches, axis=1)
    # Round a cycle the distances from one state of the class telescope: its length is the sum of
    # the excesses of its edges, and every excess is a difference of lengths of cycles.
    within = possible & communicate
    distance = _distance(within, class_of == jnp.arange(size))
    excess = jnp.where(within, jnp.abs(distance[:, None] + 1 - distance[None]), 0)
    of_row = _greatest_common_divisor(excess)
    period = _greatest_common_divisor(jnp.where(communicate, of_row[None], 0))
    return ChainStructure(reaches, class_of, recurrent, period)


def escape(transition: Array) -> Array:
    """I - P `[S, S]`, its diagonal the total probability of leaving rather than 1 - P(s, s).

    Equal where rows sum to 1, and exact to the last digit where leaving is rare: with a daily
    hazard of 1e-9 the float32 difference is 0, and its inverse infinite.

    Source: Grassmann, Taksar & Heyman (1985), "Regenerative analysis and steady state
      distributions for Markov chains", who avoid every subtraction this way.
    """
    identity = jnp.eye(len(transition), dtype=transition.dtype)
    elsewhere = transition * (1 - identity)
    return jnp.sum(elsewhere, axis=1)[:, None] * identity - elsewhere


def _reachable(possible: Array) -> Array:
    """The transitive and reflexive closure of a relation `[S, S]`, by squaring."""
    size = len(possible)

    def square(_: int, reaches: Array) -> Array:
        # Counts of positive terms: they may lose digits, but none becomes 0.
        paths = reaches.astype(jnp.float32)
        return paths @ paths > 0

    reaches = possible | jnp.eye(size, dtype=bool)
    return jax.lax.fori_loop(0, max(size - 1, 1).bit_length(), square, reaches)


def _distance(possible: Array, start: Array) -> Array:
    """Least number of steps `[S]` int32 from the nearest of the `start` states `[S]` bool."""

    def spread(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        distance, reached, front = carry
        front = jnp.any(possible & front[:, None], axis=0) & ~reached
        return jnp.where(reached, distance, distance + 1), reached | front, front

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        return jnp.any(carry[2])

    zero = jnp.zeros(len(possible), jnp.int32)
    return jax.lax.while_loop(unfinished, spread, (zero, start, start))[0]


def _greatest_common_divisor(rows: Array) -> Array:
    """Of each row of integers `[S, N]`, none negative; 0 for a row of zeros.

    Euclid's algorithm on whole rows: the least positive number stays, the others leave their
    remainders.
    """

    def remainders(rows: Array) -> Array:
        positive = jnp.where(rows > 0, rows, jnp.iinfo(rows.dtype).max)
        least = jnp.min(positive, axis=1, keepdims=True)
        stays = jnp.arange(rows.shape[1])[None] == jnp.argmin(positive, axis=1)[:, None]
        return jnp.where(stays, rows, rows % least)

    def several(rows: Array) -> Array:
        return jnp.any(jnp.sum(rows > 0, axis=1) > 1)

    return jnp.max(jax.lax.while_loop(several, remainders, rows), axis=1)
