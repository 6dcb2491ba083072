"""Bellman equations of a finite MDP: exact evaluation and control.

Every solver takes an `MDP` or a `SuccessorMDP`, is jit- and vmap-able, works in the dtype of its
problem (float64 under `jax.enable_x64(True)`) and returns a `Solution` whose `residual` is measured
on the value it returns. A terminal state has value 0; with discount 1 every state must be able to
reach one (`checks.mdp` says so).

All of them stop when the sup-norm Bellman residual max_s |(T V)(s) - V(s)| is at most `tolerance`,
or at the rounding error of the dtype if that is larger; V is then within
`residual / (1 - discount)` of the fixed point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import bicgstab

from jaxrl_llm.kernels import exploration
from jaxrl_llm.kernels.fixed_point import (
    Iterate,
    Model,
    Problem,
    average,
    batchable,
    fixed_point,
    greedy,
    rounding_error,
    solution,
    successive_approximation,
)
from jaxrl_llm.types import MDP, Array, Solution, SuccessorMDP

# Forcing terms of inexact policy iteration: each Krylov solve shrinks the residual by this factor.
# With discount 1 a loose value may invite the next policy to circle for ever.
_FORCING, _FORCING_UNDISCOUNTED = 0.03, 0.001


def uniform_policy(mdp: Problem) -> Array:
    """Equal probability for every allowed action, `[S, A]`."""
    weight = mdp.action_mask.astype(mdp.discount.dtype)
    return weight / jnp.sum(weight, axis=-1, keepdims=True)


def q_values(mdp: Problem, value: Array) -> Array:
    """Q(s, a) = E[r + discount · V(s')], one look-ahead on `value`.

    Args:
      mdp: the problem.
      value: `[S]`; the entries of terminal states are read as 0.

    Returns:
      Q, `[S, A]`, also for actions that are not allowed; 0 in terminal states.

    Source: Sutton & Barto (2018), equation 4.6.
    """
    return Model.of(mdp).look_ahead(jnp.where(mdp.terminal, 0, value))


def policy_evaluation(mdp: Problem, policy: Array, *, tolerance: float | Array = 1e-6) -> Solution:
    """V of `policy`, by solving (I - discount · P_policy) V = r_policy directly.

    Args:
      mdp: the problem; where its matrix `[S, S]` does not fit, see `krylov_policy_evaluation`.
      policy: action probabilities `[S, A]`, or one action a state `[S]` (integers).
      tolerance: of the residual of the linear system.

    Returns:
      A `Solution`: `value` is the policy's, `policy` the greedy improvement on it. `converged` is
      False, and `value` 0, where discount 1 meets a policy that never ends.

    Source: Sutton & Barto (2018), equation 4.4.
    """
    model = Model.of(mdp)
    value = model.solve(policy).value
    q = model.look_ahead(value)
    residual = jnp.max(jnp.abs(average(q, policy) - value))
    iterate = Iterate(value, q, residual, jnp.int32(1), jnp.bool_(True), ())
    return solution(model, iterate, tolerance)


def krylov_policy_evaluation(
    mdp: Problem,
    policy: Array,
    *,
    tolerance: float | Array = 1e-6,
    max_iterations: int | Array = 1000,
) -> Solution:
    """V of `policy`, by BiCGStab: the direct solve where the matrix `[S, S]` would not fit.

    Args:
      mdp: the problem; no matrix `[S, S]` is formed.
      policy: as in `policy_evaluation`.
      tolerance: of the sup-norm residual, which is measured anew after every solve.
      max_iterations: most solves.

    Returns:
      A `Solution` as `policy_evaluation` gives; `iterations` counts solves.

    Source: van der Vorst (1992), "Bi-CGSTAB", restarted.
    """
    model = Model.of(mdp)
    chain = model.chain(policy)

    def backup(q: Array) -> Array:
        return average(q, policy)

    def update(iterate: Iterate) -> tuple[Array, tuple[()]]:
        return iterate.value + _correction(model, chain, backup(iterate.q) - iterate.value), ()

    return fixed_point(model, backup, update, tolerance, max_iterations)


def iterative_policy_evaluation(
    mdp: Problem,
    policy: Array,
    *,
    tolerance: float | Array = 1e-6,
    max_iterations: int | Array = 100_000,
) -> Solution:
    """V of `policy`, by sweeps V <- r_policy + discount · P_policy V from 0.

    Args:
      mdp: the problem.
      policy: as in `policy_evaluation`.
      tolerance: of the residual.
      max_iterations: most sweeps.

    Returns:
      A `Solution` as `policy_evaluation` gives; `iterations` counts sweeps.

    Source: Sutton & Barto (2018), section 4.1.
    """

    def backup(q: Array) -> Array:
        return average(q, policy)

    return successive_approximation(Model.of(mdp), backup, tolerance, max_iterations)


def expected_sarsa(
    mdp: Problem,
    *,
    epsilon: float | Array,
    tolerance: float | Array = 1e-6,
    max_iterations: int | Array = 100_000,
) -> Solution:
    """What expected SARSA learns: Q = E[r + discount · Q(s', a')], a' epsilon-greedy in Q itself.

    Args:
      mdp: the problem.
      epsilon: in [0, 1]; 0 is `value_iteration`, 1 evaluates the uniform policy.
      tolerance: of the residual.
      max_iterations: most sweeps.

    Returns:
      A `Solution`: `value` is that of the epsilon-greedy policy, the best that explores so much;
      `policy` is greedy. `iterations` counts sweeps.

    Source: Sutton & Barto (2018), equation 6.9.
    """

    def backup(q: Array) -> Array:
        law = jax.vmap(exploration.epsilon_greedy, in_axes=(0, None, 0))
        return average(q, law(q, epsilon, mdp.action_mask))

    return successive_approximation(Model.of(mdp), backup, tolerance, max_iterations)


def value_iteration(
    mdp: Problem, *, tolerance: float | Array = 1e-6, max_iterations: int | Array = 100_000
) -> Solution:
    """V*, by sweeps V <- max_a Q(V) from 0.

    Args:
      mdp: the problem.
      tolerance: of the Bellman residual.
      max_iterations: most sweeps.

    Returns:
      A `Solution`; `iterations` counts sweeps.

    Source: Sutton & Barto (2018), equation 4.10.

    >>> import jax.numpy as jnp
    >>> from jaxrl_llm import make_mdp
    >>> stay_or_leave = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    >>> mdp = make_mdp(stay_or_leave, jnp.array([[1.0, 5.0], [0.0, 0.0]]), 0.9)
    >>> solution = value_iteration(mdp)
    >>> solution.value.round(3).tolist(), solution.policy.tolist()
    ([10.0, 0.0], [0, 0])
    """

    def solve(mdp: Problem, tolerance: Array, max_iterations: Array) -> Solution:
        model = Model.of(mdp)

        return successive_approximation(model, model.best, tolerance, max_iterations)

    return batchable(solve, mdp, tolerance, max_iterations)


def policy_iteration(
    mdp: Problem, *, tolerance: float | Array = 1e-6, max_iterations: int | Array = 1000
) -> Solution:
    """V*, by evaluating directly and improving in turn, from the uniform policy.

    An action is replaced only where the gain exceeds the tolerance, so that ties of rounding,
    which flip for ever elsewhere, end it here, and so that with discount 1 a policy that reaches
    a terminal state stays one that does.

    Args:
      mdp: the problem; its matrix `[S, S]` under a policy is formed and factorised.
      tolerance: of the Bellman residual.
      max_iterations: most improvements.

    Returns:
      A `Solution`; `iterations` counts improvements and `policy` is the last one evaluated.

    Source: Puterman (1994), section 6.4; the rule for ties is its equation 6.4.2 with a margin.
    """

    def solve(mdp: Problem, tolerance: Array, max_iterations: Array) -> Solution:
        model = Model.of(mdp)
        start = model.solve(uniform_policy(mdp))
        q = model.look_ahead(start.value)
        # Among actions that tie for the best, the one that leads out soonest: without it the first
        # policy could circle for ever among states of equal value, where discount 1 has no V.
        # There the error of a backup also counts once for every step to the end.
        steps = jnp.where(mdp.discount < 1, 1, jnp.max(start.duration))
        slack = steps * model.threshold(tolerance, start.value)
        tied = mdp.action_mask & (q >= (model.best(q) - slack)[:, None])
        first = greedy(-mdp.expect(start.duration), tied)

        def update(iterate: Iterate) -> tuple[Array, Array]:
            gain = model.best(iterate.q) - average(iterate.q, iterate.memory)
            better = gain > model.threshold(tolerance, iterate.value)
            policy = jnp.where(better, greedy(iterate.q, mdp.action_mask), iterate.memory)
            new = model.solve(policy)
            # Where rounding made circling for ever look like a gain, the old policy stands.
            return (
                jnp.where(new.ends, new.value, iterate.value),
                jnp.where(new.ends, policy, iterate.memory),
            )

        value = model.solve(first).value
        return fixed_point(model, model.best, update, tolerance, max_iterations, value, first)

    return batchable(solve, mdp, tolerance, max_iterations)


def modified_policy_iteration(
    mdp: Problem,
    *,
    tolerance: float | Array = 1e-6,
    max_iterations: int | Array = 10_000,
    num_evaluations: int = 5,
) -> Solution:
    """V*, by improvements each followed by a partial evaluation of the greedy policy.

    The partial evaluation is `num_evaluations` sweeps under the policy and then one step of
    aggregation: the constant c that zeroes the total residual when c is added to every state that
    is not terminal. Where a chain mixes fast that constant is nearly all of the error, so random
    problems take a handful of sweeps whatever their discount. With discount 1, where a policy may
    never end and no constant helps, that step is left out.

    Args:
      mdp: the problem; no matrix of a policy is formed.
      tolerance: of the Bellman residual.
      max_iterations: most improvements.
      num_evaluations: sweeps under each policy, a Python integer; 0 is value iteration with
        aggregation, and the more, the nearer to policy iteration.

    Returns:
      A `Solution`; `iterations` counts improvements.

    Source: Puterman (1994), section 6.5, and for the aggregation step with one aggregate state
      Bertsekas & Castanon (1989), "Adaptive aggregation methods", which for a discounted problem
      without terminal states is the extrapolation of MacQueen (1966).
    """

    def solve(mdp: Problem, tolerance: Array, max_iterations: Array) -> Solution:
        model = Model.of(mdp)
        alive = (~mdp.terminal).astype(model.discount.dtype)
        staying = model.discount[:, None] * jax.lax.cond(
            jnp.any(mdp.terminal), mdp.expect, lambda _: jnp.ones_like(model.reward), alive
        )

        def update(iterate: Iterate) -> tuple[Array, tuple[()]]:
            policy = greedy(iterate.q, mdp.action_mask)
            stays = average(staying, policy)
            sweep = model.sweep(policy)
            value, following = jax.lax.fori_loop(
                0,
                num_evaluations,
                lambda _, pair: (pair[1], sweep(pair[1])),
                (iterate.value, model.best(iterate.q)),
            )
            constant = jnp.sum(following - value) / jnp.sum(alive - stays)
            return following + jnp.where(mdp.discount < 1, constant * stays, 0), ()

        return fixed_point(model, model.best, update, tolerance, max_iterations)

    return batchable(solve, mdp, tolerance, max_iterations)


def inexact_policy_iteration(
    mdp: Problem, *, tolerance: float | Array = 1e-6, max_iterations: int | Array = 1000
) -> Solution:
    """V*, by improvements each followed by a loose Krylov solve for the greedy policy's value.

    Each evaluation is a BiCGStab solve of (I - discount · P_policy) d = T V - V that stops once
    the residual has shrunk by the forcing term, as in an inexact Newton method. The best choice
    for one sparse problem of hundreds to millions of states.

    Args:
      mdp: the problem; no matrix of a policy is formed.
      tolerance: of the Bellman residual.
      max_iterations: most improvements.

    Returns:
      A `Solution`; `iterations` counts improvements.

    Source: Gargiani et al. (2024), "Inexact policy iteration methods for large-scale Markov
      decision processes", arXiv:2404.06136, algorithm 1.
    """

    def solve(mdp: Problem, tolerance: Array, max_iterations: Array) -> Solution:
        model = Model.of(mdp)

        def update(iterate: Iterate) -> tuple[Array, tuple[()]]:
            chain = model.chain(greedy(iterate.q, mdp.action_mask))
            gap = model.best(iterate.q) - iterate.value

            return iterate.value + _correction(model, chain, gap), ()

        return fixed_point(model, model.best, update, tolerance, max_iterations)

    return batchable(solve, mdp, tolerance, max_iterations)


def _correction(model: Model, chain: Callable[[Array], Array], gap: Array) -> Array:
    """A loose solution d of (I - discount · P) d = `gap`; `gap` itself where none was found."""
    # Declared a float by `bicgstab`, which only multiplies with it.
    forcing: Any = jnp.where(model.mdp.discount < 1, _FORCING, _FORCING_UNDISCOUNTED)

    def system(change: Array) -> Array:
        return change - model.discount * chain(change)

    correction, _ = bicgstab(system, gap, tol=forcing, maxiter=100)
    # The system of a policy that never ends is singular: then a sweep takes its place.
    error = jnp.linalg.norm(system(correction) - gap)
    error = error + rounding_error(jnp.linalg.norm(correction))
    return jnp.where(error < jnp.linalg.norm(gap), correction, gap)


def successor_form(mdp: MDP) -> SuccessorMDP:
    """The same problem by padded lists of successors, each distinct row stored once.

    Runs on the host. It pays where a row has few successors or many pairs share a row: the 17,900
    rows of ICU-Sepsis are 2,918 distinct ones of at most 213 successors, a 1/20 of the memory.

    Args:
      mdp: one problem, not a batch.

    Returns:
      A `SuccessorMDP` with the same solution.
    """
    transition = np.asarray(mdp.transition).reshape(-1, mdp.num_states)
    reward = np.asarray(jnp.broadcast_to(mdp.reward, mdp.transition.shape)).reshape(
        transition.shape
    )
    reward = np.where(transition > 0, reward, 0)
    both = np.concatenate([transition, reward], axis=1)
    keys = np.ascontiguousarray(both).view(np.dtype((np.void, both.itemsize * both.shape[1])))
    _, first, row = np.unique(keys.ravel(), return_index=True, return_inverse=True)
    transition, reward = transition[first], reward[first]
    # A stable sort by "is not a successor" lists each row's successors first, in order.
    width = max(int(np.max(np.sum(transition > 0, axis=1))), 1)
    successor = np.argsort(transition <= 0, axis=1, kind="stable")[:, :width]
    return SuccessorMDP(
        successor=jnp.asarray(successor, jnp.int32),
        probability=jnp.asarray(np.take_along_axis(transition, successor, axis=1)),
        reward=jnp.asarray(np.take_along_axis(reward, successor, axis=1)),
        row=jnp.asarray(row.reshape(mdp.action_mask.shape), jnp.int32),
        discount=mdp.discount,
        initial=mdp.initial,
        terminal=mdp.terminal,
        action_mask=mdp.action_mask,
    )
