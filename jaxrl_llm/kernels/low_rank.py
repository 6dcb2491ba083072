"""Transition matrices of low rank: the best approximation, and what it costs in value.

Where few directions carry most of a matrix, few features carry most of what the next state depends
on. The rows may be those of a chain `[S, S]` or of every state and action `[S * A, S]`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_llm.types import Array


class LowRank(NamedTuple):
    """The best approximation of rank k of a matrix `[N, S]`, in factors.

    Attributes:
      left: `[N, k]`, orthonormal columns.
      scale: `[k]`, the largest singular values, decreasing.
      right: `[k, S]`, orthonormal rows.
      spectral_error: `[]`, ||P - P_k||_2 = sigma_{k+1}.
      frobenius_error: `[]`, ||P - P_k||_F, the root of the sum of the squares left out.
    """

    left: Array
    scale: Array
    right: Array
    spectral_error: Array
    frobenius_error: Array

    @property
    def matrix(self) -> Array:
        """P_k `[N, S]`. Its rows need neither be positive nor sum to 1."""
        return (self.left * self.scale[..., None, :]) @ self.right

    def truncate(self, rank: int) -> LowRank:
        """The best approximation of a lower `rank`, a Python integer in [0, k].

        Raises:
          ValueError: if the rank is out of range.
        """
        largest = self.scale.shape[-1]
        if not 0 <= rank <= largest:
            raise ValueError(f"rank is {rank}; it must be in [0, {largest}]")
        dropped = jnp.sum(jnp.square(self.scale[..., rank:]), axis=-1)
        error = self.scale[..., rank] if rank < largest else self.spectral_error
        return LowRank(
            left=self.left[..., :rank],
            scale=self.scale[..., :rank],
            right=self.right[..., :rank, :],
            spectral_error=error,
            frobenius_error=jnp.sqrt(jnp.square(self.frobenius_error) + dropped),
        )


def low_rank(matrix: Array, rank: int) -> LowRank:
    """The truncated singular value decomposition: nothing of rank k is nearer in either norm.

    For several ranks, `truncate` the result of the largest.

    Args:
      matrix: `[N, S]`.
      rank: k, a Python integer in [0, min(N, S)].

    Raises:
      ValueError: if the rank is out of range.

    Source: Eckart & Young (1936), "The approximation of one matrix by another of lower rank", for
      the Frobenius norm; Mirsky (1960) for the spectral norm.

    >>> import jax.numpy as jnp
    >>> same_rows = low_rank(jnp.array([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]), rank=1)
    >>> same_rows.matrix.round(3).tolist()
    [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    """
    left, scale, right = jnp.linalg.svd(matrix, full_matrices=False)
    none = jnp.zeros((), scale.dtype)
    return LowRank(left, scale, right, none, none).truncate(rank)


def value_error_bound(perturbation: Array, value: Array, discount: float | Array) -> Array:
    """|V - V'| <= gamma ||(P' - P) V'|| / (1 - gamma) in every state, in the sup norm, `[]`.

    V solves the Bellman equation with the transition matrix P, and V' with its approximation P' and
    the same rewards, be it the equation of a policy or of the optimum. Only P need be stochastic:
    V - V' = (I - gamma P)^-1 gamma (P - P') V', so P' may be of low rank, with negative entries,
    provided that V' exists. The bound is at most gamma ||P' - P|| ||V'|| / (1 - gamma), where the
    norm of the matrix is its largest sum of absolute values of a row.

    Args:
      perturbation: P' - P, `[S, S]` or `[S * A, S]`.
      value: V', `[S]`.
      discount: gamma, in [0, 1).
    """
    return discount * jnp.max(jnp.abs(perturbation @ value)) / (1 - discount)
