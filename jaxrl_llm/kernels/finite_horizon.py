"""Decisions over a known number of steps: backward induction, and evaluation of any policy.

With a horizon the best action depends on the time left, so policies and values have a time axis.
Time counts forwards: `value[t]` is what the steps t .. T - 1 are worth. A sum of T rewards is
finite at any discount, so here a discount of 1 needs no terminal state; `make_mdp` refuses such a
problem, `dataclasses.replace(mdp, discount=jnp.ones(()))` makes it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.kernels.fixed_point import Model, Problem, average, greedy
from jaxrl_llm.types import Array


class HorizonSolution(NamedTuple):
    """The optimum over T steps."""

    value: Array  # [T + 1, S], the last row is the final value
    q: Array  # [T, S, A]
    policy: Array  # [T, S] int32, greedy in `q` among allowed actions


def backward_induction(
    mdp: Problem, horizon: int, *, final_value: Array | None = None
) -> HorizonSolution:
    """V*_t = max_a E[r + discount · V*_{t+1}(s')], from V*_T = `final_value` backwards.

    Args:
      mdp: the problem.
      horizon: T, the number of decisions, a Python integer of at least 0.
      final_value: `[S]`, what the state after the last step is worth; 0 when None. Entries of
        terminal states are read as 0.

    Returns:
      A `HorizonSolution`; ties go to the lowest action.

    Source: Puterman (1994), section 4.5, the finite-horizon policy evaluation and backward
      induction algorithms.

    >>> import jax.numpy as jnp
    >>> from jaxrl_llm import make_mdp
    >>> work_or_cash_in = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    >>> mdp = make_mdp(work_or_cash_in, jnp.array([[1.0, 1.5], [0.0, 0.0]]), 0.9)
    >>> backward_induction(mdp, 3).policy[:, 0].tolist()  # cash in when one step is left
    [0, 0, 1]
    """
    model = Model.of(mdp)

    def step(following: Array, _: None) -> tuple[Array, tuple[Array, Array, Array]]:
        q = model.look_ahead(following)
        value = model.best(q)
        slack = model.threshold(0.0, value)
        return value, (value, q, greedy(q, mdp.action_mask, slack=slack))

    last = _final(model, final_value)
    _, (value, q, policy) = jax.lax.scan(step, last, length=horizon, reverse=True)
    return HorizonSolution(jnp.concatenate([value, last[None]]), q, policy)


def horizon_evaluation(
    mdp: Problem, policy: Array, horizon: int, *, final_value: Array | None = None
) -> Array:
    """V_t = E_{a ~ policy_t}[r + discount · V_{t+1}(s')], from V_T = `final_value` backwards.

    Args:
      mdp: the problem.
      policy: actions, integers `[S]`, or `[T, S]` where they depend on time; or probabilities,
        `[S, A]` or `[T, S, A]`.
      horizon: T, a Python integer of at least 0.
      final_value: as in `backward_induction`.

    Returns:
      V, `[T + 1, S]`.

    Raises:
      ValueError: for a policy of another length than `horizon`.

    Source: Puterman (1994), section 4.2.
    """
    model = Model.of(mdp)

    def step(following: Array, policy: Array) -> tuple[Array, Array]:
        value = average(model.look_ahead(following), policy)
        return value, value

    last = _final(model, final_value)
    _, value = jax.lax.scan(step, last, policy_by_time(policy, horizon), reverse=True)
    return jnp.concatenate([value, last[None]])


def policy_by_time(policy: Array, horizon: int) -> Array:
    """`[T, S]` actions or `[T, S, A]` probabilities, of a policy with a time axis or without.

    Raises:
      ValueError: for a policy of another length than `horizon`.
    """
    stationary = policy.ndim == (1 if jnp.issubdtype(policy.dtype, jnp.integer) else 2)
    if stationary:
        return jnp.broadcast_to(policy, (horizon, *policy.shape))
    if len(policy) != horizon:
        raise ValueError(f"policy has {len(policy)} steps; it must have the horizon's {horizon}")
    return policy


def _final(model: Model, value: Array | None) -> Array:
    if value is None:
        return jnp.zeros_like(model.discount)
    return jnp.where(model.mdp.terminal, 0, value.astype(model.discount.dtype))
