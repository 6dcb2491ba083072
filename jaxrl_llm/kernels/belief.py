"""Beliefs over a hidden state: the exact filter, bounds on the optimal value, sets of beliefs.

A belief `[S]` is the probability of each hidden state given all that was done and seen. The optimal
value V* is a convex function of it, which `alpha_vectors` approaches from below; here are the
bounds that cost no more than solving an MDP:

    blind policies <= V* <= fast informed bound <= QMDP

A Q-function `[S, A]` bounds V* at a belief by `q_bound`. Everything takes one belief: batch it with
`vmap`. Nothing is lost or won where the end of an episode is not among the observations: a terminal
state is worth 0, whatever is done there. Bounds without a horizon want a discount below 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxrl_llm.kernels import bellman
from jaxrl_llm.kernels.fixed_point import Model, greedy
from jaxrl_llm.types import POMDP, Array, PyTree, Solution


def belief_update(
    pomdp: POMDP, belief: Array, action: Array | int, observation: Array | int
) -> tuple[Array, Array]:
    """b'(s') = O(o | a, s') sum_s P(s' | s, a) b(s) / P(o | b, a), Bayes' rule for one step.

    Whoever acts knows that the episode goes on, so what the belief holds in terminal states is left
    out first.

    Args:
      pomdp: the problem.
      belief: `[S]`, before the action.
      action: `[]` integer.
      observation: `[]` integer, seen on arrival.

    Returns:
      The belief `[S]` after it, and the probability `[]` of the observation. An observation that
      cannot be has probability 0 and teaches nothing: the belief is then the one after the action
      alone. A belief wholly in terminal states stays, with probability 0.

    Source: Kaelbling, Littman & Cassandra (1998), "Planning and acting in partially observable
      stochastic domains", section 3.3.

    >>> from jaxrl_llm.envs import tiger
    >>> problem = tiger.pomdp()
    >>> belief, _ = belief_update(problem, problem.mdp.initial, tiger.LISTEN, tiger.GROWL_LEFT)
    >>> belief, probability = belief_update(problem, belief, tiger.LISTEN, tiger.GROWL_LEFT)
    >>> [round(p, 4) for p in belief.tolist()], round(probability.item(), 3)
    ([0.9698, 0.0302], 0.745)
    """
    alive = jnp.where(pomdp.mdp.terminal, 0, belief)
    predicted = alive @ pomdp.mdp.transition[:, action]
    joint = predicted * pomdp.observation[action, :, observation]
    before, total = jnp.sum(predicted), jnp.sum(joint)
    probability = total / jnp.where(before > 0, before, 1)
    unseen = jnp.where(before > 0, predicted / jnp.where(before > 0, before, 1), belief)
    return jnp.where(total > 0, joint / jnp.where(total > 0, total, 1), unseen), probability


def filter_history(
    pomdp: POMDP, belief: Array, actions: Array, observations: Array
) -> tuple[Array, Array]:
    """`belief_update` along a history.

    Args:
      pomdp: the problem.
      belief: `[S]`, before the first action.
      actions: `[T]` integers.
      observations: `[T]` integers, seen after each.

    Returns:
      The belief after each observation, `[T, S]`, and the probability of each given the past,
      `[T]`: their product is the likelihood of the history.
    """

    def step(belief: Array, pair: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        belief, probability = belief_update(pomdp, belief, *pair)
        return belief, (belief, probability)

    return jax.lax.scan(step, belief, (actions, observations))[1]


def successors(pomdp: POMDP, belief: Array) -> Array:
    """P(s', o | b, a), all that may follow a belief `[S]`, as `[A, O, S]`.

    Each row is the next belief times the probability of its observation. What is in terminal states
    before the action leads nowhere.
    """
    alive = jnp.where(pomdp.mdp.terminal, 0, belief)
    predicted = jnp.einsum("s,sat->at", alive, pomdp.mdp.transition)
    return jnp.einsum("at,ato->aot", predicted, pomdp.observation)


def expected_reward(pomdp: POMDP, belief: Array) -> Array:
    """r(b, a) = sum_s b(s) r(s, a) of each action, `[A]`; terminal states pay nothing."""
    return belief @ Model.of(pomdp.mdp).reward


# Bounds


def q_bound(q: Array, belief: Array) -> Array:
    """max_a sum_s b(s) Q(s, a), `[]`: the bound on V*(b) that a Q-function `[S, A]` gives."""
    return jnp.max(belief @ q)


def q_action(q: Array, belief: Array) -> Array:
    """argmax_a sum_s b(s) Q(s, a), `[]` int32: a Q-function `[S, A]` as a policy over beliefs."""
    return greedy(belief @ q)


def qmdp(pomdp: POMDP, *, tolerance: float | Array = 1e-6) -> Solution:
    """The solution of the MDP: V* if the state were seen from the next step on.

    Its `q` is an upper bound (`q_bound`). As a policy (`q_action`) it never pays for
    information, which it believes to be free after one step.

    Source: Littman, Cassandra & Kaelbling (1995), "Learning policies for partially observable
      environments: scaling up".
    """
    return bellman.policy_iteration(pomdp.mdp, tolerance=tolerance)


def fast_informed_bound(
    pomdp: POMDP, *, tolerance: float | Array = 1e-6, max_iterations: int | Array = 10_000
) -> Solution:
    """Q(s, a) = r(s, a) + discount sum_o max_a' sum_s' P(s' | s, a) O(o | a, s') Q(s', a').

    The state is known when an action is chosen, but the next action must suit all states that the
    next observation leaves possible. Sweeps go down from QMDP, so that it is an upper bound
    (`q_bound`) wherever they stop.

    Args:
      pomdp: the problem, of discount below 1.
      tolerance: of the residual, max |Q - sweep(Q)|, or the rounding error if that is larger.
      max_iterations: most sweeps.

    Returns:
      A `Solution`; `residual` is that of `q`, and `value` and `policy` are greedy in it.

    Source: Hauskrecht (2000), "Value-function approximations for partially observable Markov
      decision processes", the fast informed bound.
    """
    model = Model.of(pomdp.mdp)

    def sweep(q: Array) -> Array:
        weight = pomdp.mdp.transition[..., None] * pomdp.observation[None]
        following = jnp.einsum("sato,tb->saob", weight, q)
        return model.reward + model.discount[:, None] * jnp.sum(jnp.max(following, -1), -1)

    def lower(q: Array) -> tuple[Array, Array]:
        following = jnp.minimum(q, sweep(q))
        return following, jnp.max(q - following)

    first = qmdp(pomdp, tolerance=tolerance).q
    found = settle(lower, first, lambda q: model.threshold(tolerance, q), max_iterations)
    return Solution(
        value=jnp.max(found.state, axis=-1),
        q=found.state,
        policy=greedy(found.state),
        iterations=found.iterations,
        residual=found.residual,
        converged=found.converged,
    )


def blind_policies(pomdp: POMDP) -> Array:
    """The value of doing the same for ever whatever is seen, `[A, S]`, one row an action.

    Each row is linear in the belief, and their maximum is a lower bound on V*.

    Source: Hauskrecht (1997), "Incremental methods for computing bounds in partially observable
      Markov decision processes".
    """
    model = Model.of(pomdp.mdp)
    shape = pomdp.mdp.num_actions, pomdp.mdp.num_states
    same = jnp.broadcast_to(jnp.arange(shape[0])[:, None], shape)
    return jax.vmap(lambda policy: model.solve(policy).value)(same)


class Settled(NamedTuple):
    """Where an iteration stopped: `residual` is what one more sweep would change in `state`."""

    state: PyTree
    iterations: Array
    residual: Array
    converged: Array


def settle(
    sweep: Callable[[PyTree], tuple[PyTree, Array]],
    first: PyTree,
    threshold: Callable[[PyTree], Array],
    max_iterations: int | Array,
) -> Settled:
    """Repeats `sweep`, state -> (next state, change `[]`), until it changes little.

    Args:
      sweep: one sweep over all beliefs.
      first: state to start from.
      threshold: state -> the change `[]` that is little.
      max_iterations: most sweeps, the last of which only measures the residual.
    """

    def unfinished(carry: tuple[PyTree, PyTree, Array, Array]) -> Array:
        state, _, change, iterations = carry
        return (change > threshold(state)) & (iterations < max_iterations)

    def body(carry: tuple[PyTree, PyTree, Array, Array]) -> tuple[PyTree, PyTree, Array, Array]:
        _, state, _, iterations = carry
        following, change = sweep(state)
        return state, following, change, iterations + 1

    unknown = jnp.full_like(threshold(first), jnp.inf)
    start = first, first, unknown, jnp.int32(0)
    state, _, residual, iterations = jax.lax.while_loop(unfinished, body, start)
    return Settled(state, iterations, residual, residual <= threshold(state))


# Sets of beliefs, on the host


def belief_grid(num_states: int, resolution: int) -> NDArray[np.float64]:
    """All beliefs whose probabilities are multiples of 1 / `resolution`, `[N, S]`.

    N = (resolution + S - 1) choose (S - 1): for 2 states resolution + 1, from certainty of the last
    state to certainty of the first.

    Source: Lovejoy (1991), "Computationally feasible bounds for partially observed Markov decision
      processes".

    >>> belief_grid(2, 2).tolist()
    [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    """
    # Bars among stars: the gaps between S - 1 bars are the S counts.
    places = resolution + num_states - 1
    size = math.comb(places, num_states - 1), num_states - 1
    bars = np.array(list(combinations(range(places), size[1])), int).reshape(size)
    ends = np.full((len(bars), 1), -1), np.full((len(bars), 1), places)
    return (np.diff(np.hstack([ends[0], bars, ends[1]]), axis=1) - 1) / resolution


def reachable_beliefs(
    pomdp: POMDP, depth: int, *, max_beliefs: int = 500, separation: float = 1e-6
) -> NDArray[np.float64]:
    """The beliefs that `depth` steps or fewer lead to from the initial one, `[N, S]`, in order.

    Args:
      pomdp: the problem.
      depth: most steps.
      max_beliefs: where to stop.
      separation: a belief nearer than this (in the largest difference of a probability) to one
        already there is left out, and what follows it with it.
    """
    expand = jax.jit(jax.vmap(lambda belief: successors(pomdp, belief)))
    alive = ~np.asarray(pomdp.mdp.terminal)
    found = np.asarray(pomdp.mdp.initial, np.float64)[None]
    new = found
    for _ in range(depth):
        following = np.asarray(expand(new), np.float64).reshape(-1, found.shape[1]) * alive
        total = following.sum(axis=1, keepdims=True)
        following = following[total[:, 0] > 1e-12] / total[total[:, 0] > 1e-12]
        before = len(found)
        for belief in following:
            if np.abs(found - belief).max(axis=1).min() > separation:
                found = np.vstack([found, belief])
                if len(found) == max_beliefs:
                    return found
        new = found[before:]
        if not len(new):
            break
    return found
