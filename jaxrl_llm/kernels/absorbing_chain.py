"""Where a Markov chain ends, and when: absorption probabilities and times.

The chain ends on entering a recurrent class, which it never leaves again: one absorbing state, such
as death or discharge, or several states among which it goes on. For an MDP whose episodes end in
terminal states, give `markov_chain.stop_at(mdp.under(policy), mdp.terminal)`.

Source: Kemeny & Snell (1976), "Finite Markov Chains", chapter 3.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_llm.kernels.markov_chain import ChainStructure, escape, structure
from jaxrl_llm.types import Array


class Absorption(NamedTuple):
    """Where and when each start ends; `initial @ probability` is that of a law of the start.

    Attributes:
      probability: `[S, S]`, that the column's state is the first recurrent one that the chain is
        in; for the chance of ending in a class, sum the columns of its states.
      time: `[S]`, expected steps until then; 0 from a recurrent state.
      variance: `[S]`, of the number of steps.
    """

    probability: Array
    time: Array
    variance: Array


def expected_visits(transition: Array, chain: ChainStructure | None = None) -> Array:
    """N = (I - Q)^-1, the fundamental matrix of an absorbing chain; Q are its transient states.

    Args:
      transition: `[S, S]`.
      chain: its `structure`, where it is known already.

    Returns:
      `[S, S]`, expected visits to the column's state from the row's, the start included; 0 unless
      both are transient.

    Source: Kemeny & Snell (1976), section 3.2.
    """
    transient = ~(structure(transition) if chain is None else chain).recurrent
    both = transient[:, None] & transient[None]
    identity = jnp.eye(len(transition), dtype=transition.dtype)
    system = jnp.where(both, escape(transition), identity)
    return jnp.where(both, jnp.linalg.solve(system, identity), 0)


def absorption(transition: Array, chain: ChainStructure | None = None) -> Absorption:
    """Where and when the chain ends: B = N R, t = N 1, Var = (2 N - I) t - t².

    Args:
      transition: `[S, S]`.
      chain: its `structure`, where it is known already.

    Source: Kemeny & Snell (1976), theorems 3.3.5 and 3.3.7.

    >>> import jax.numpy as jnp
    >>> ill_dead_or_well = jnp.array([[0.5, 0.125, 0.375], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> ends = absorption(ill_dead_or_well)
    >>> ends.probability[0].tolist()
    [0.0, 0.25, 0.75]
    >>> ends.time[0].item()
    2.0
    """
    chain = structure(transition) if chain is None else chain
    visits = expected_visits(transition, chain)
    entering = jnp.where(chain.recurrent[None], transition, 0)
    at_once = jnp.diag(chain.recurrent.astype(transition.dtype))
    time = jnp.sum(visits, axis=1)
    return Absorption(
        probability=at_once + visits @ entering,
        time=time,
        variance=jnp.maximum(2 * visits @ time - time - jnp.square(time), 0),
    )
