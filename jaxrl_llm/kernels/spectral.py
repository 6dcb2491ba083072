"""How fast a Markov chain forgets its start: eigenvalues, relaxation and mixing times.

A chain is its transition matrix `[S, S]`; `mdp.under(policy)` is the one that a policy makes. Which
eigenvalues have modulus 1, and how many, is known from the structure of the chain; no eigenvalue
is rounded to find out.

Eigenvalues of a general matrix are computed on a CPU or an NVIDIA GPU; JAX has no such program for
a TPU. There, put the matrix on the host first: `jax.device_put(matrix, jax.devices("cpu")[0])`.
The mixing time and the distances are products of matrices and run anywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.kernels.markov_chain import ChainStructure, structure
from jaxrl_llm.kernels.stationary import stationary_law
from jaxrl_llm.types import Array


class Spectrum(NamedTuple):
    """The eigenvalues of a chain and what they say of its speed.

    Attributes:
      eigenvalues: `[S]` complex, the 1 first, then by decreasing modulus; of a conjugate pair the
        one above the real axis first.
      num_unit: `[]` int32, how many have modulus 1: the first ones.
      second: `[]`, |lambda_2|. Exactly 1 where the chain does not forget its start, since it has
        several recurrent classes or a period; 0 for a single state.
      subdominant: `[]`, the largest modulus below 1, at which P^t approaches its limit, or its
        cycle. It equals `second` unless that is 1.
    """

    eigenvalues: Array
    num_unit: Array
    second: Array
    subdominant: Array

    @property
    def gap(self) -> Array:
        """1 - |lambda_2|, `[]`, the absolute spectral gap."""
        return 1 - self.second

    @property
    def relaxation_time(self) -> Array:
        """Steps in which what |lambda_2| governs shrinks by e, `[]`; infinite where it is 1."""
        return relaxation_time(self.second)


class MixingTime(NamedTuple):
    """`steps` `[]` int32, and whether they suffice; if not, they are all that were looked at."""

    steps: Array
    mixed: Array


def eigenvalues(matrix: Array) -> Array:
    """The eigenvalues `[S]`, complex, of a transition matrix `[S, S]`.

    The one nearest 1 comes first, then the others by decreasing modulus, and of a conjugate pair
    the one above the real axis first. Where many coincide they are ill-conditioned: k copies of one
    number may come out apart by the k-th root of the rounding error.

    >>> import jax.numpy as jnp
    >>> eigenvalues(jnp.array([[0.75, 0.25], [0.5, 0.5]])).real.round(4).tolist()
    [1.0, 0.25]
    """
    values = jnp.linalg.eigvals(matrix)
    distance = jnp.abs(values - 1)
    is_one = jnp.arange(len(values)) == jnp.argmin(distance)
    return values[jnp.lexsort((-values.imag, -jnp.abs(values), ~is_one))]


def spectrum(transition: Array, chain: ChainStructure | None = None) -> Spectrum:
    """Eigenvalues of a chain by modulus, and the ones that govern its convergence.

    Args:
      transition: `[S, S]`.
      chain: its `markov_chain.structure`, where it is known already.

    Source: Levin & Peres (2017), "Markov Chains and Mixing Times", section 12.1, for the absolute
      gap and the relaxation time (there 1 / gap, which -1 / ln |lambda_2| approaches as it grows).
    """
    chain = structure(transition) if chain is None else chain
    values = eigenvalues(transition)
    num_unit = chain.num_unit_eigenvalues
    modulus = jnp.minimum(jnp.abs(values), 1)
    inside = jnp.where(jnp.arange(len(values)) >= num_unit, modulus, 0)
    subdominant = jnp.max(inside)
    second = jnp.where(num_unit > 1, 1, subdominant)
    return Spectrum(values, num_unit, second, subdominant)


def relaxation_time(modulus: Array) -> Array:
    """-1 / ln |lambda|: steps in which |lambda|^t shrinks by e; 0 at 0 and infinite at 1."""
    inside = (modulus > 0) & (modulus < 1)
    steps = -1 / jnp.log(jnp.where(inside, modulus, 0.5))
    return jnp.where(inside, steps, jnp.where(modulus > 0, jnp.inf, 0))


def total_variation(first: Array, second: Array) -> Array:
    """Half the L1 distance of two laws `[..., S]`: the most their probabilities of an event differ.

    Source: Levin & Peres (2017), proposition 4.2.
    """
    return jnp.sum(jnp.abs(first - second), axis=-1) / 2


def distance_to_limit(
    transition: Array, initial: Array, num_steps: int, limit: Array | None = None
) -> Array:
    """The total-variation distance of mu P^t from its long-run law mu P*, `[num_steps + 1]`.

    Its slope on a logarithmic axis is ln |lambda_2| in the end, or ln |subdominant| with several
    recurrent classes. A periodic chain keeps a distance. What is propagated is the difference
    mu P^t - mu P* itself, so that it does not level off at the rounding error of the law.

    Args:
      transition: `[S, S]`.
      initial: mu, `[S]`.
      num_steps: T, a Python integer.
      limit: P*, `stationary_law(transition).from_state`, where it is known already.
    """
    limit = stationary_law(transition).from_state if limit is None else limit

    def step(difference: Array, _: None) -> tuple[Array, Array]:
        # What rounding puts into the directions that stay is taken out again, or it would stay.
        following = difference @ transition
        following = following - following @ limit
        return following, total_variation(following, jnp.zeros_like(following))

    law = initial @ limit
    start, first = initial - law, total_variation(initial, law)
    _, distances = jax.lax.scan(step, start, length=num_steps)
    return jnp.concatenate([first[None], distances])


def mixing_time(
    transition: Array,
    epsilon: float | Array = 0.25,
    *,
    num_doublings: int = 20,
    limit: Array | None = None,
) -> MixingTime:
    """t_mix: the first t at which d(t) = max_s TV(P^t(s, .), P*(s, .)) is at most `epsilon`.

    With one recurrent class every row of P* is the stationary law and this is the usual mixing
    time. With several, it is the time until each start is as close to the law it will end in: for
    a chain with absorbing states, until at most `epsilon` of the worst start are not absorbed yet.

    d(t) never grows, so the last t with d(t) > epsilon is found bit by bit from the powers
    P, P², P⁴, ... in 2 · `num_doublings` products of matrices.

    Args:
      transition: `[S, S]`.
      epsilon: in (0, 1); 1/4 by convention.
      num_doublings: the search ends at 2^num_doublings - 1 steps; a Python integer.
      limit: P*, `stationary_law(transition).from_state`, where it is known already.

    Source: Levin & Peres (2017), sections 4.4 and 4.5.
    """
    limit = stationary_law(transition).from_state if limit is None else limit

    def distance(difference: Array) -> Array:
        return jnp.max(total_variation(difference, jnp.zeros_like(difference)))

    def square(power: Array, _: None) -> tuple[Array, Array]:
        return power @ power, power

    # With D = P - P* and E = I - P*, P^t - P* is D^t for t > 0 and E for t = 0, and E D = D.
    _, powers = jax.lax.scan(square, transition - limit, length=num_doublings)

    def accept(carry: tuple[Array, Array], power: Array) -> tuple[tuple[Array, Array], None]:
        difference, steps = carry
        later = difference @ power
        apart = distance(later) > epsilon
        return (jnp.where(apart, later, difference), 2 * steps + apart), None

    start = jnp.eye(len(transition), dtype=transition.dtype) - limit
    (_, last), _ = jax.lax.scan(accept, (start, jnp.int32(0)), powers, reverse=True)
    at_once = distance(start) <= epsilon
    steps = jnp.where(at_once, 0, last + 1)
    return MixingTime(jnp.minimum(steps, 2**num_doublings - 1), steps < 2**num_doublings)
