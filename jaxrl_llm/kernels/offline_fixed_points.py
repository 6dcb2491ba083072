"""What offline learners converge to when the data are infinite: exact answers on a known MDP.

Each is the fixed point of a published objective with the sums over a data set replaced by their
expectations under the behaviour policy β(a | s) and the transition law. Every function minimises
state by state, so how often the data visit a state does not matter, as long as they do.

Conservative objectives use HALF the mean squared Bellman error, as their papers write it.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxrl_llm.kernels.fixed_point import (
    Iterate,
    Model,
    Problem,
    average,
    greedy,
    solution,
    successive_approximation,
)
from jaxrl_llm.types import Array, Solution

# The halvings of an interval of floats and the steps of Newton's method, each enough for float64.
_HALVINGS, _NEWTON_STEPS = 60, 7


def conservative_evaluation(
    mdp: Problem,
    policy: Array,
    behaviour: Array,
    *,
    penalty_coefficient: float | Array,
    tolerance: float | Array = 1e-6,
) -> Solution:
    """Conservative policy evaluation: values pushed down where the policy leaves the data.

    The minimiser over Q of α (E_{policy}[Q] - E_β[Q]) + ½ E_β[(Q - T_policy Q')²] is
    T_policy Q' - α (policy / β - 1), so V is the policy's for a reward with that penalty.

    Args:
      mdp: the problem.
      policy: evaluated, probabilities `[S, A]`, 0 wherever `behaviour` is.
      behaviour: β, probabilities `[S, A]`.
      penalty_coefficient: α.
      tolerance: of the residual.

    Returns:
      A `Solution`: `q` has the penalty in it, and `policy` is greedy in it among actions with
      β > 0. `converged` is False where discount 1 meets a policy that never ends.

    Source: Kumar et al. (2020), "Conservative Q-learning for offline reinforcement learning",
      arXiv:2006.04779, equation 2.
    """
    model = _supported(mdp, behaviour)
    ratio = policy / jnp.where(behaviour > 0, behaviour, 1)
    decides = (behaviour > 0) & ~mdp.terminal[:, None]
    penalty = jnp.where(decides, penalty_coefficient * (ratio - 1), 0)
    model = model._replace(reward=model.reward - penalty)
    value = model.solve(policy).value
    q = model.look_ahead(value)
    residual = jnp.max(jnp.abs(average(q, policy) - value))
    return solution(
        model, Iterate(value, q, residual, jnp.int32(1), jnp.bool_(True), ()), tolerance
    )


def conservative_control(
    mdp: Problem,
    behaviour: Array,
    *,
    penalty_coefficient: float | Array,
    tolerance: float | Array = 1e-6,
    max_iterations: int | Array = 100_000,
) -> Solution:
    """CQL(H): control with a soft maximum pushed down and the data's actions pushed up.

    Each sweep minimises α (log Σ_a exp Q(a) - E_β[Q]) + ½ E_β[(Q - y)²] at
    y = r + discount · E[max_a' Q'(s', a')], where Q = y - α (softmax(Q) / β - 1).

    Args:
      mdp: the problem.
      behaviour: β, probabilities `[S, A]`.
      penalty_coefficient: α, greater than 0.
      tolerance: of the residual.
      max_iterations: most sweeps.

    Returns:
      A `Solution` whose `q` is the conservative one. An action with β = 0 is pushed down without
      limit: its `q` is -inf.

    Source: Kumar et al. (2020), arXiv:2006.04779, equation 4, with the Bellman optimality target.
    """
    model = _supported(mdp, behaviour)

    def conservative(target: Array) -> Array:
        q = conservative_q(target, behaviour, penalty_coefficient)
        return jnp.where(mdp.terminal[:, None], target, q)

    def backup(q: Array) -> Array:
        return model.best(conservative(q))

    found = successive_approximation(model, backup, tolerance, max_iterations)
    q = conservative(found.q)
    slack = model.threshold(tolerance, found.value)
    return replace(found, q=q, policy=greedy(q, model.mdp.action_mask, slack=slack))


def conservative_q(target: Array, behaviour: Array, penalty_coefficient: float | Array) -> Array:
    """The Q with Q = target - α (softmax(Q) / β - 1), in closed form up to one number a state.

    With L = log Σ_a exp Q(a) given, w = α softmax(Q) / β solves w + log w = target + α - L +
    log(α / β), which is Newton's method on a concave function; L is where the probabilities sum
    to 1, found by halving: it lies between the extremes of target - log β.

    Args:
      target: `[..., A]`.
      behaviour: β, `[..., A]`.
      penalty_coefficient: α, greater than 0.

    Returns:
      Q, `[..., A]`; -inf where β is 0.
    """
    supported = behaviour > 0
    data = jnp.where(supported, behaviour, 1)
    offset = target + penalty_coefficient + jnp.log(penalty_coefficient / data)

    def weights(normaliser: Array) -> Array:
        return _omega(offset - normaliser)

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low + high) / 2
        mass = jnp.where(supported, data / penalty_coefficient * weights(middle), 0)
        above = jnp.sum(mass, axis=-1, keepdims=True) > 1
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    centred = target - jnp.log(data)
    low = jnp.min(centred, axis=-1, keepdims=True, where=supported, initial=jnp.inf)
    high = jnp.max(centred, axis=-1, keepdims=True, where=supported, initial=-jnp.inf)
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))
    q = target + penalty_coefficient - weights((low + high) / 2)
    return jnp.where(supported, q, -jnp.inf)


def _omega(z: Array) -> Array:
    """The solution w > 0 of w + log w = z, elementwise (Wright's omega function).

    Newton's method rises to it from below, because w + log w is concave and each start lies below.
    """
    start = jnp.where(z > 1, z - jnp.log(jnp.maximum(z, 1)), jnp.exp(jnp.minimum(z, 1) - 1))
    tiny = jnp.finfo(z.dtype).tiny

    def newton(_: int, w: Array) -> Array:
        return jnp.maximum(w * (1 + z - jnp.log(w)) / (1 + w), tiny)

    return jax.lax.fori_loop(0, _NEWTON_STEPS, newton, jnp.maximum(start, tiny))


def expectile(values: Array, weights: Array, level: float | Array) -> Array:
    """The v that minimises Σ weights |level - 1(values < v)| (values - v)², exactly.

    v is a mean in which the values above it count `level` and those below it 1 - `level`. Of all
    ways to cut the sorted values in two, the right cut gives the largest such mean (the smallest
    where `level` is below one half).

    Args:
      values: `[..., A]`.
      weights: `[..., A]`, at least 0, not all 0; what has weight 0 is not read.
      level: in (0, 1); one half gives the mean.

    Returns:
      `[...]`.

    Source: Newey & Powell (1987), "Asymmetric least squares estimation and testing".

    >>> import jax.numpy as jnp
    >>> expectile(jnp.array([0.0, 1.0]), jnp.array([0.5, 0.5]), 0.75).item()
    0.75
    """
    order = jnp.argsort(-values, axis=-1)
    weights = jnp.take_along_axis(weights, order, axis=-1)
    moments = jnp.where(weights > 0, weights * jnp.take_along_axis(values, order, axis=-1), 0)
    mass, moment = jnp.cumsum(weights, axis=-1), jnp.cumsum(moments, axis=-1)
    total_mass, total_moment = mass[..., -1:], moment[..., -1:]
    numerator = level * moment + (1 - level) * (total_moment - moment)
    denominator = level * mass + (1 - level) * (total_mass - mass)
    means = numerator / jnp.where(denominator > 0, denominator, 1)
    counted = mass > 0
    largest = jnp.max(means, axis=-1, where=counted, initial=-jnp.inf)
    smallest = jnp.min(means, axis=-1, where=counted, initial=jnp.inf)
    return jnp.where(jnp.asarray(level) >= 0.5, largest, smallest)


def implicit_values(
    mdp: Problem,
    behaviour: Array,
    *,
    expectile_level: float | Array,
    tolerance: float | Array = 1e-6,
    max_iterations: int | Array = 100_000,
) -> Solution:
    """Implicit Q-learning: V(s) an expectile of Q(s, a) over β, Q = r + discount · E[V(s')].

    Level one half evaluates β; towards 1 it becomes the best policy that the data support, without
    ever asking for the value of an action that they do not hold.

    Args:
      mdp: the problem.
      behaviour: β, probabilities `[S, A]`.
      expectile_level: τ, in (0, 1).
      tolerance: of the residual.
      max_iterations: most sweeps.

    Returns:
      A `Solution`; `policy` is greedy among actions with β > 0.

    Source: Kostrikov, Nair & Levine (2021), "Offline reinforcement learning with implicit
      Q-learning", arXiv:2110.06169, equations 5 and 6.
    """
    model = _supported(mdp, behaviour)

    def backup(q: Array) -> Array:
        return jnp.where(mdp.terminal, 0, expectile(q, behaviour, expectile_level))

    return successive_approximation(model, backup, tolerance, max_iterations)


def advantage_weighted_policy(
    q: Array,
    value: Array,
    behaviour: Array,
    *,
    inverse_temperature: float | Array,
    max_weight: float | Array = 100.0,
) -> Array:
    """π(a | s) ∝ β(a | s) · min(exp(inverse_temperature · (Q(s, a) - V(s))), max_weight).

    Args:
      q: `[S, A]`.
      value: `[S]`.
      behaviour: β, probabilities `[S, A]`, not all 0 in any state.
      inverse_temperature: 0 clones the behaviour; the larger, the greedier.
      max_weight: of one action.

    Returns:
      Probabilities `[S, A]`, the maximiser of the weighted likelihood of the data.

    Source: Kostrikov et al. (2021), arXiv:2110.06169, equation 7; the clip is their code's.
    """
    exponent = inverse_temperature * (q - value[:, None])
    weight = behaviour * jnp.exp(jnp.minimum(exponent, jnp.log(max_weight)))
    return weight / jnp.sum(weight, axis=-1, keepdims=True)


def _supported(mdp: Problem, behaviour: Array) -> Model:
    """The problem with the actions that the behaviour takes; a terminal state keeps all."""
    mask = mdp.action_mask & ((behaviour > 0) | mdp.terminal[:, None])
    return Model.of(replace(mdp, action_mask=mask))
