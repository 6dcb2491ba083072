"""Discounted occupancy: how often a policy visits each state and action, and what that buys.

The occupancy d(s, a) = Σ_t discount^t Pr(s_t = s, a_t = a) is the dual of the value: the return
from the initial law is Σ d · r, whatever the reward. A constraint on a second sum, a cost, is
therefore linear in d, and the constrained optimum is a mixture of two deterministic policies'
occupancies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.kernels import bellman
from jaxrl_llm.kernels.fixed_point import Model, Problem, rounding_error
from jaxrl_llm.types import MDP, Array


def discounted_occupancy(mdp: Problem, policy: Array) -> Array:
    """d = Σ_t discount^t Pr(s_t, a_t), by solving (I - discount · P_policy)^T d = initial.

    Args:
      mdp: the problem.
      policy: action probabilities `[S, A]`, or one action a state `[S]` (integers).

    Returns:
      d, `[S, A]`, not normalised: where no state is terminal it sums to 1 / (1 - discount), and
      with discount 1 it counts visits and sums to the expected length of an episode. It is 0 in
      terminal states, and everywhere where discount 1 meets a policy that never ends.

    Source: Puterman (1994), section 6.9.2.
    """
    model = Model.of(mdp)
    start = jnp.where(mdp.terminal, 0, mdp.initial)
    visits = jnp.where(mdp.terminal, 0, jnp.linalg.solve(model.system(policy).T, start))
    # The same rule as `Model.solve` has for a system that is singular to working precision.
    ends = rounding_error(jnp.sum(jnp.abs(visits))) < 1
    if policy.ndim == 1:
        policy = jax.nn.one_hot(policy, mdp.num_actions, dtype=visits.dtype)
    return jnp.where(ends, visits, 0)[:, None] * policy


def occupancy_policy(occupancy: Array, action_mask: Array) -> Array:
    """The policy that has this occupancy: d(s, a) / Σ_a d(s, a).

    Args:
      occupancy: `[S, A]`.
      action_mask: `[S, A]` bool; a state that is never visited shares among the allowed actions.

    Returns:
      Probabilities `[S, A]`.

    Source: Puterman (1994), theorem 6.9.1.
    """
    visits = jnp.sum(occupancy, axis=-1, keepdims=True)
    share = jnp.where(visits > 0, occupancy, action_mask.astype(occupancy.dtype))
    return share / jnp.sum(share, axis=-1, keepdims=True)


class ConstrainedSolution(NamedTuple):
    """The best policy within a budget; where none is, `feasible` is False and it costs least."""

    policy: Array  # [S, A], probabilities
    occupancy: Array  # [S, A], as `discounted_occupancy` gives
    reward: Array  # [], the discounted return from the initial law
    cost: Array  # [], the discounted cost from there
    multiplier: Array  # [], what one more unit of budget would earn
    feasible: Array  # [] bool


def constrained_optimum(
    mdp: MDP, cost: Array, budget: float | Array, *, max_iterations: int | Array = 100
) -> ConstrainedSolution:
    """max Σ d · r over occupancies d with Σ d · cost <= budget, exactly.

    Returns against costs, the deterministic policies span a concave frontier, and the optimum is
    where its edge crosses the budget. The edge is found by the chord between a policy on each side
    of the budget: its slope is a multiplier, the policy that is optimal for reward - multiplier ·
    cost lies above the chord and replaces one end, until no policy lies above.

    Args:
      mdp: the problem. With discount 1 every policy should end.
      cost: `[S, A]`, of each action; that of terminal states is not read.
      budget: of the discounted cost from `mdp.initial`.
      max_iterations: most policies tried; a frontier has few edges and each is met once.

    Returns:
      A `ConstrainedSolution`.

    Source: Altman (1999), "Constrained Markov decision processes", chapters 3 (occupancies) and
      4 (the Lagrangian).
    """
    sums = jnp.stack([mdp.expected_reward(), cost.astype(mdp.reward.dtype)])

    def optimum(weights: Array) -> tuple[Array, Array]:
        """The occupancy that is best for these weights of reward and cost, and its two sums."""
        weighted = jnp.tensordot(weights, sums, axes=1)
        problem = replace(mdp, reward=weighted[..., None])
        solution = bellman.policy_iteration(problem, tolerance=0.0)
        occupancy = discounted_occupancy(mdp, solution.policy)
        return occupancy, jnp.sum(sums * occupancy[None], axis=(1, 2))

    def multiplier(over: Array, within: Array) -> Array:
        rise, run = over - within
        return jnp.where(run > 0, rise / jnp.where(run > 0, run, 1), 0)

    def unfinished(ends: _Chord) -> Array:
        return ends.improved & (ends.iterations < max_iterations)

    def shorten(ends: _Chord) -> _Chord:
        weights = jnp.stack([jnp.ones_like(sums[0, 0, 0]), -multiplier(ends.over, ends.within)])
        occupancy, point = optimum(weights)
        gain = weights @ (point - ends.within)
        improved = gain > rounding_error(jnp.abs(weights) @ jnp.abs(ends.within))
        above, below = improved & (point[1] > budget), improved & (point[1] <= budget)
        return _Chord(
            jnp.where(above, occupancy, ends.over_occupancy),
            jnp.where(above, point, ends.over),
            jnp.where(below, occupancy, ends.within_occupancy),
            jnp.where(below, point, ends.within),
            improved,
            ends.iterations + 1,
        )

    richest = optimum(jnp.array([1, 0], sums.dtype))
    cheapest = optimum(jnp.array([0, -1], sums.dtype))
    binds = richest[1][1] > budget
    feasible = ~binds | (cheapest[1][1] <= budget)
    first = _Chord(*richest, *cheapest, binds & feasible, jnp.int32(0))
    last = jax.lax.while_loop(unfinished, shorten, first)

    run = last.over[1] - last.within[1]
    share = (budget - last.within[1]) / jnp.where(run > 0, run, 1)
    share = jnp.where(binds, jnp.where(feasible, share, 0), 1)
    occupancy = share * last.over_occupancy + (1 - share) * last.within_occupancy
    reward, spent = share * last.over + (1 - share) * last.within
    return ConstrainedSolution(
        policy=occupancy_policy(occupancy, mdp.action_mask),
        occupancy=occupancy,
        reward=reward,
        cost=spent,
        multiplier=jnp.where(binds & feasible, multiplier(last.over, last.within), 0),
        feasible=feasible,
    )


class _Chord(NamedTuple):
    """Two deterministic policies, by occupancy `[S, A]` and by (reward, cost) `[2]`."""

    over_occupancy: Array
    over: Array
    within_occupancy: Array
    within: Array
    improved: Array
    iterations: Array
