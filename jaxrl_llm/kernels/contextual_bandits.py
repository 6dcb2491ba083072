"""Bandits whose reward is linear in a context: ridge regression an arm, and LinUCB's index."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax.numpy as jnp

from jaxrl_llm.types import Array


class LinearArms(NamedTuple):
    """The ridge regression of each arm's rewards on the contexts it was pulled in.

    Attributes:
      inverse: `[K, d, d]`, (penalty I + sum x x^T)^-1.
      moment: `[K, d]`, sum of reward x.
    """

    inverse: Array
    moment: Array

    @classmethod
    def unknown(cls, num_arms: int, num_features: int, *, penalty: float = 1.0) -> LinearArms:
        """No arm was pulled yet; `penalty` is the ridge."""
        identity = jnp.eye(num_features) / penalty
        return cls(jnp.tile(identity[None], (num_arms, 1, 1)), jnp.zeros((num_arms, num_features)))

    @property
    def coefficient(self) -> Array:
        """`[K, d]`, the ridge estimate of each arm."""
        return jnp.einsum("kij,kj->ki", self.inverse, self.moment)

    def record(self, context: Array, arm: Array, reward: Array) -> LinearArms:
        """After one more pull of `arm` `[]` in `context` `[d]` that gave `reward` `[]`.

        The inverse is updated in O(d^2) rather than computed again.

        Source: Sherman & Morrison (1950), "Adjustment of an inverse matrix".
        """
        chex.assert_rank([context, arm, reward], [1, 0, 0])
        direction = self.inverse[arm] @ context
        change = jnp.outer(direction, direction) / (1 + context @ direction)
        return LinearArms(
            self.inverse.at[arm].add(-change), self.moment.at[arm].add(reward * context)
        )


def linucb_index(arms: LinearArms, context: Array, *, width: float | Array = 1.0) -> Array:
    """theta_k · x + width sqrt(x^T A_k^-1 x), `[K]`.

    Args:
      arms: of K arms.
      context: x, `[d]`, shared by the arms.
      width: alpha `[]`, 1 + sqrt(ln(2 / delta) / 2) for a bound that holds with probability
        1 - delta.

    Source: Li et al. (2010), "A contextual-bandit approach to personalized news article
      recommendation", algorithm 1 (disjoint arms).
    """
    chex.assert_rank(context, 1)
    spread = jnp.einsum("i,kij,j->k", context, arms.inverse, context)
    return arms.coefficient @ context + width * jnp.sqrt(jnp.maximum(spread, 0))
