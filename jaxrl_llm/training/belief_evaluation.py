"""How good plans over beliefs are: bounds on the optimum, and what following them returns.

A sampled return has its exact counterpart, V* at the initial belief: `solve_beliefs` encloses it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import NDArray

from jaxrl_llm.envs import hidden
from jaxrl_llm.kernels import alpha_vectors, belief
from jaxrl_llm.training.evaluate import Estimate, monte_carlo_return
from jaxrl_llm.types import POMDP, Array, Environment, Key


@struct.dataclass(kw_only=True)
class SolvedBeliefs:
    """Plans for some beliefs, and the bounds there.

    Attributes:
      plans: the point-based solution.
      qmdp: `[S, A]`, the solution of the MDP, as a policy over beliefs too.
      bounds: values `[N]` by name: upper bounds, the plans', and the blind policies'.
      missing: `[]`, V* is nowhere higher than the plans' value by more than this.
    """

    plans: alpha_vectors.AlphaVectors
    qmdp: Array
    bounds: dict[str, Array]
    missing: Array


def solve_beliefs(
    pomdp: POMDP, beliefs: Array | NDArray[np.float64], *, tolerance: float = 1e-10
) -> SolvedBeliefs:
    """Solves a small POMDP from below and from above at `beliefs` `[N, S]`; not for use in jit.

    Returns:
      A `SolvedBeliefs` of NumPy arrays.
    """

    @jax.jit
    def solve(pomdp: POMDP, beliefs: Array) -> SolvedBeliefs:
        qmdp = belief.qmdp(pomdp).q
        informed = belief.fast_informed_bound(pomdp, tolerance=tolerance).q
        sawtooth = alpha_vectors.sawtooth_bound(pomdp, beliefs, tolerance=tolerance)
        found = alpha_vectors.point_based_value_iteration(pomdp, beliefs, tolerance=tolerance)
        bounds = {
            "QMDP": jnp.max(beliefs @ qmdp, axis=1),
            "fast informed bound": jnp.max(beliefs @ informed, axis=1),
            "sawtooth": jax.vmap(sawtooth.value)(beliefs),
            "plans": jax.vmap(found.plans.value)(beliefs),
            "blind policies": jnp.max(beliefs @ belief.blind_policies(pomdp).T, axis=1),
        }
        missing = jnp.zeros_like(pomdp.mdp.discount)
        return SolvedBeliefs(plans=found.plans, qmdp=qmdp, bounds=bounds, missing=missing)

    found = jax.device_get(solve(pomdp, jnp.asarray(beliefs)))
    excess = alpha_vectors.bellman_excess(pomdp, found.plans.vectors)
    return found.replace(missing=excess / (1 - float(pomdp.mdp.discount)))


def belief_return(
    environment: Environment,
    pomdp: POMDP,
    policy: Callable[[Array], Array],
    key: Key,
    *,
    num_episodes: int,
    max_steps: int,
) -> Estimate:
    """The mean discounted return of `policy`, belief `[S]` -> action, with the exact filter.

    Args:
      environment: from `envs.hidden.make`, or a module that does.
      pomdp: what the filter believes; its discount is the one that counts.
      policy: of one belief.
      key: consumed.
      num_episodes: at least 2.
      max_steps: steps after which an episode is cut.
    """

    def follow(key: Key, beliefs: Array, mask: Array | None) -> tuple[Array, dict[str, Array]]:
        del key, mask
        return jax.vmap(policy)(beliefs), {}

    return monte_carlo_return(
        hidden.with_belief(environment, pomdp),
        follow,
        key,
        num_episodes=num_episodes,
        max_steps=max_steps,
        discount=float(pomdp.mdp.discount),
    )
