"""Average reward: the gain that a process earns a step for ever, without any discount.

The optimality equation is g + h(s) = max_a E[r + h(s')], with one gain g for all states, so these
solvers are for unichain problems: under every policy there is one recurrent class. The discount is
not read. A terminal state absorbs at reward 0: to average over episodes, make it lead back to the
start instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.kernels.fixed_point import Model, Problem, average, greedy
from jaxrl_llm.types import Array


class AverageRewardSolution(NamedTuple):
    """What a process earns in the long run, and what each state is worth beside another."""

    gain: Array  # [], reward a step; within `residual` / 2 of the exact one
    bias: Array  # [S], relative values h, with h = 0 in state 0
    q: Array  # [S, A], E[r + h(s')]; its best is g + h(s)
    policy: Array  # [S] int32, greedy in `q` among allowed actions
    iterations: Array  # [] int32, sweeps
    residual: Array  # [], the span max - min over s of max_a q(s, a) - h(s)
    converged: Array  # [] bool, whether `residual` reached the tolerance


def relative_value_iteration(
    mdp: Problem,
    *,
    tolerance: float | Array = 1e-6,
    max_iterations: int | Array = 100_000,
    step_size: float | Array = 0.75,
) -> AverageRewardSolution:
    """The largest gain, by sweeps h <- h + step_size · (max_a E[r + h(s')] - h).

    A step size below 1 is the aperiodicity transform: the chain that stays where it is with
    probability 1 - step_size, and otherwise moves as before, has the same gain a move and no
    period, so that the sweeps converge where those of the chain itself would oscillate for ever.

    Args:
      mdp: a unichain problem. Where it is not, and gains differ among states, `converged` is
        False.
      tolerance: of the span.
      max_iterations: most sweeps.
      step_size: in (0, 1); 1 is right, and fastest, where every policy's chain is aperiodic.

    Returns:
      An `AverageRewardSolution`. The gain of its policy is within `residual` of the optimum.

    Source: Puterman (1994), section 8.5.5 (relative value iteration), section 8.5.4 (the
      aperiodicity transform) and theorem 8.5.6 (the bounds on the gain).

    >>> import jax.numpy as jnp
    >>> from jaxrl_llm import make_mdp
    >>> there_and_back = jnp.array([[[0.0, 1.0]], [[1.0, 0.0]]])  # of period 2
    >>> solution = relative_value_iteration(make_mdp(there_and_back, jnp.array([0.0, 4.0]), 0.9))
    >>> print(solution.gain.round(4), solution.bias.round(4))
    2.0 [0. 2.]
    """
    model = _undiscounted(mdp)
    return _relative_values(model, model.best, tolerance, max_iterations, step_size)


def average_reward_evaluation(
    mdp: Problem,
    policy: Array,
    *,
    tolerance: float | Array = 1e-6,
    max_iterations: int | Array = 100_000,
    step_size: float | Array = 0.75,
) -> AverageRewardSolution:
    """The gain and the relative values of `policy`, by the same sweeps.

    Args:
      mdp: the problem; the policy's chain has one recurrent class.
      policy: action probabilities `[S, A]`, or one action a state `[S]` (integers).
      tolerance, max_iterations, step_size: as in `relative_value_iteration`.

    Returns:
      An `AverageRewardSolution`: `gain` and `bias` are the policy's, and `policy` is the greedy
      improvement on them.

    Source: as `relative_value_iteration`, with one policy for the best one.
    """

    def backup(q: Array) -> Array:
        return average(q, policy)

    return _relative_values(_undiscounted(mdp), backup, tolerance, max_iterations, step_size)


def _undiscounted(mdp: Problem) -> Model:
    model = Model.of(mdp)
    return model._replace(discount=jnp.where(mdp.terminal, 0, jnp.ones_like(model.discount)))


class _Iterate(NamedTuple):
    bias: Array
    q: Array
    gains: Array  # [S], what each state earns in one step, relative values included
    iterations: Array

    @property
    def span(self) -> Array:
        return jnp.max(self.gains) - jnp.min(self.gains)


def _relative_values(
    model: Model,
    backup: Callable[[Array], Array],
    tolerance: float | Array,
    max_iterations: int | Array,
    step_size: float | Array,
) -> AverageRewardSolution:
    terminal = model.mdp.terminal[:, None]

    def look(bias: Array, iterations: Array) -> _Iterate:
        q = jnp.where(terminal, bias[:, None], model.look_ahead(bias))
        return _Iterate(bias, q, backup(q) - bias, iterations)

    def unfinished(iterate: _Iterate) -> Array:
        above = iterate.span > model.threshold(tolerance, iterate.bias)
        return above & (iterate.iterations < max_iterations)

    def body(iterate: _Iterate) -> _Iterate:
        bias = iterate.bias + step_size * iterate.gains
        return look(bias - bias[0], iterate.iterations + 1)

    first = look(jnp.zeros_like(model.discount), jnp.int32(0))
    last = jax.lax.while_loop(unfinished, body, first)
    slack = model.threshold(tolerance, last.bias)
    return AverageRewardSolution(
        gain=(jnp.max(last.gains) + jnp.min(last.gains)) / 2,
        bias=last.bias,
        q=last.q,
        policy=greedy(last.q, model.mdp.action_mask, slack=slack),
        iterations=last.iterations,
        residual=last.span,
        converged=last.span <= slack,
    )
