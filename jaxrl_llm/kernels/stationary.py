"""Where a Markov chain is in the long run: stationary laws, fundamental matrix, passage times.

All of it holds for every finite chain: with several recurrent classes, transient states, periods.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_llm.kernels.absorbing_chain import absorption
from jaxrl_llm.kernels.markov_chain import ChainStructure, escape, structure
from jaxrl_llm.types import Array


class StationaryLaw(NamedTuple):
    """Laws pi = pi P, and what a start has to do with them.

    Attributes:
      law: `[S]`, the share of time spent in each state in the long run from the given start.
      unique: `[]` bool, whether every start has this law: there is one recurrent class.
      converges: `[]` bool, whether P^t has a limit. Where it has none the chain is periodic, and
        `law` is an average over time only.
      of_class: `[S, S]`, row s the stationary law of the recurrent class of state s, and 0 where s
        is transient. Every stationary law is a mixture of these.
      from_state: `[S, S]`, row s the `law` of a start in s: the limiting matrix P*.
    """

    law: Array
    unique: Array
    converges: Array
    of_class: Array
    from_state: Array


def stationary_law(
    transition: Array, initial: Array | None = None, chain: ChainStructure | None = None
) -> StationaryLaw:
    """The stationary law, or one for each recurrent class and their mixture from a given start.

    One linear system serves all classes together: pi (I - P) = 0 in each, with one equation of a
    class replaced by sum(pi) = 1. A transient start mixes the classes by its absorption
    probabilities. The gradient in `transition` is that of the systems: exact along changes that
    keep rows summing to 1 and add no new transition.

    Args:
      transition: `[S, S]`.
      initial: `[S]`, the law of the first state; uniform when None. It makes no difference to
        `law` where that is `unique`.
      chain: the `structure` of the chain, where it is known already.

    Source: Puterman (1994), appendix A.4, for the limiting matrix.

    >>> import jax.numpy as jnp
    >>> clinic = stationary_law(jnp.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    >>> clinic.of_class.tolist()
    [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    >>> clinic.unique.item()
    False
    """
    size = len(transition)
    chain = structure(transition) if chain is None else chain
    same = chain.same_recurrent
    balance = jnp.where(chain.leads_class[None], 1, escape(transition))
    identity = jnp.eye(size, dtype=transition.dtype)
    system = jnp.where(same, balance, jnp.where(chain.recurrent[:, None], 0, identity))
    total = chain.leads_class.astype(transition.dtype)
    share = jnp.maximum(jnp.linalg.solve(system.T, total), 0)
    of_class = jnp.where(same, share[None], 0)
    from_state = absorption(transition, chain).probability @ of_class
    start = jnp.full(size, 1 / size, transition.dtype) if initial is None else initial
    unique = chain.num_recurrent_classes == 1
    return StationaryLaw(start @ from_state, unique, chain.aperiodic, of_class, from_state)


def fundamental_matrix(transition: Array, chain: ChainStructure | None = None) -> Array:
    """Z = (I - P + P*)^-1, `[S, S]`, with P* the limiting matrix; of every finite chain.

    Z - P* is the deviation matrix: how many more visits to a state one start has than its long-run
    share. For an ergodic chain all rows of P* are its stationary law, as Kemeny and Snell have it.

    Source: Kemeny & Snell (1976), section 4.3; Puterman (1994), appendix A.
    """
    limit = stationary_law(transition, chain=chain).from_state
    return jnp.linalg.inv(escape(transition) + limit)


def mean_first_passage_times(transition: Array, chain: ChainStructure | None = None) -> Array:
    """m(i, j) = (z_jj - z_ij) / pi_j, expected steps from state i until the chain is in state j.

    Args:
      transition: `[S, S]`.
      chain: its `structure`, where it is known already.

    Returns:
      `[S, S]`; 0 on the diagonal, infinite where j may never be reached from i.

    Source: Kemeny & Snell (1976), section 4.4.
    """
    chain = structure(transition) if chain is None else chain
    deviation = fundamental_matrix(transition, chain)
    law = jnp.diagonal(stationary_law(transition, chain=chain).of_class)
    # From i the chain ends in the class of j for certain if it can end in no other.
    ends_in = chain.reaches & chain.recurrent[None]
    strays = ends_in.astype(jnp.float32) @ (~chain.same_recurrent).astype(jnp.float32) > 0
    never = strays & ~jnp.eye(len(transition), dtype=bool)
    visits = jnp.diagonal(deviation)[None] - deviation
    return jnp.where(never, jnp.inf, visits / jnp.where(law > 0, law, 1)[None])


def kemeny_constant(transition: Array, chain: ChainStructure | None = None) -> Array:
    """K = trace(Z) - 1 = sum over j of pi_j m(i, j), the same from every i; in steps, `[]`.

    The expected time to a state drawn from the stationary law. It is also the sum of
    1 / (1 - lambda) over the other eigenvalues, and infinite where the law is not unique.

    Source: Kemeny & Snell (1976), section 4.4; Levene & Loizou (2002), "Kemeny's constant and the
      random surfer".
    """
    chain = structure(transition) if chain is None else chain
    trace = jnp.trace(fundamental_matrix(transition, chain))
    return jnp.where(chain.num_recurrent_classes == 1, trace - 1, jnp.inf)
