"""The law of the return of a policy, beyond its mean: variance, the whole law, CVaR.

What exists exactly depends on the problem:

- mean and variance of the discounted return: always, each by one linear system (`return_moments`);
- the whole law: over a finite horizon, undiscounted, where rewards lie on a lattice, as scores,
  counts of days or indicators of survival do (`return_law`). A discounted return takes a different
  value on nearly every path, so its law has no finite support to recur on;
- CVaR and quantiles: of a whole law (`conditional_value_at_risk`). No recursion over the states
  gives them otherwise, because the tail of a sum is not a sum of tails.

All are of a given policy. The policy of best CVaR depends on what was earned so far, and so is not
a policy of the states.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.kernels.finite_horizon import policy_by_time
from jaxrl_llm.kernels.fixed_point import Model, Problem, average
from jaxrl_llm.types import MDP, Array


class Moments(NamedTuple):
    """Of the return from each state; all 0 where the policy never ends."""

    mean: Array  # [S]
    variance: Array  # [S]
    converged: Array  # [] bool, False where discount 1 meets a policy that never ends


def return_moments(mdp: Problem, policy: Array) -> Moments:
    """Mean and variance of Σ_t discount^t r_t from each state, chance and policy both counted.

    The variance obeys a Bellman equation whose reward is the mean square of the temporal
    difference δ = r + discount · V(s') - V(s) and whose discount is discount²:
    Var(s) = E[δ² | s] + discount² · E[Var(s') | s].

    Args:
      mdp: the problem.
      policy: action probabilities `[S, A]`, or one action a state `[S]` (integers).

    Returns:
      `Moments`.

    Source: Sobel (1982), "The variance of discounted Markov decision processes", theorem 1.

    >>> import jax.numpy as jnp
    >>> from jaxrl_llm import make_mdp
    >>> until_heads = jnp.array([[[0.5, 0.5]], [[0.0, 0.0]]])
    >>> coin = make_mdp(until_heads, 1.0, 1.0, terminal=[False, True])
    >>> moments = return_moments(coin, jnp.array([0, 0]))
    >>> moments.mean.tolist(), moments.variance.tolist()  # of the number of tosses
    ([2.0, 0.0], [2.0, 0.0])
    """
    model = Model.of(mdp)
    evaluation = model.solve(policy)
    value = evaluation.value
    probability, reward, following = _outcomes(mdp, value)
    difference = reward + mdp.discount * following - value[:, None, None]
    square = jnp.sum(probability * jnp.square(difference), axis=-1)
    second = model._replace(
        reward=jnp.where(mdp.terminal[:, None], 0, square), discount=jnp.square(model.discount)
    )
    variance = second.solve(policy).value
    return Moments(value, variance, evaluation.ends)


def _outcomes(mdp: Problem, value: Array) -> tuple[Array, Array, Array]:
    """Probability, reward and next value of each outcome, `[S, A, K]` or what broadcasts to it."""
    if isinstance(mdp, MDP):
        return mdp.transition, mdp.reward, value[None, None]
    return mdp.probability[mdp.row], mdp.reward[mdp.row], value[mdp.successor[mdp.row]]


class ReturnLaw(NamedTuple):
    """The law of an undiscounted return over a horizon, from each state."""

    support: Array  # [N], ascending
    probability: Array  # [S, N]
    on_lattice: Array  # [] bool, False where a reward was not a multiple of the unit in bounds


def return_law(
    mdp: MDP,
    policy: Array,
    horizon: int,
    *,
    lowest: int,
    highest: int,
    unit: float | Array = 1.0,
) -> ReturnLaw:
    """The whole law of r_0 + ... + r_{T-1}, by convolving backwards in time.

    With T - t steps left, Pr(G_t = g | s) = Σ_a policy(a | s) Σ_s' P(s' | s, a)
    Pr(G_{t+1} = g - r(s, a, s') | s'). The discount is not read; a terminal state adds 0 for ever.

    Args:
      mdp: the problem, whose rewards are multiples of `unit`.
      policy: as in `finite_horizon.horizon_evaluation`.
      horizon: T, a Python integer of at least 0.
      lowest, highest: bounds of every reward in units, Python integers.
      unit: of the lattice of rewards.

    Returns:
      A `ReturnLaw` of N = T (max(highest, 0) - min(lowest, 0)) + 1 atoms. A reward that is not on
      the lattice counts as the nearest one that is, and `on_lattice` says that the law is not
      exact.

    Source: the recursion of Bellemare, Dabney & Rowland (2023), "Distributional reinforcement
      learning", chapter 2, without its projection.
    """
    low, high = min(lowest, 0), max(highest, 0)
    alive = ~mdp.terminal[:, None, None]
    units = jnp.broadcast_to(mdp.reward / unit, mdp.transition.shape)
    nearest = jnp.clip(jnp.round(units), low, high)
    probability = jnp.where(alive, mdp.transition, 0)
    exact = jnp.abs(units - nearest) <= 1e-4
    shifts = jnp.arange(low, high + 1)
    joint = jnp.where(nearest[None] == shifts[:, None, None, None], probability[None], 0)

    support = jnp.arange(horizon * low, horizon * high + 1)
    nothing = (support == 0).astype(probability.dtype)[None]

    def step(following: Array, policy: Array) -> tuple[Array, None]:
        chains = jax.vmap(lambda part: _chain(part, policy))(joint)
        moved = jax.vmap(lambda chain, shift: jnp.roll(chain @ following, shift, axis=1))
        law = jnp.sum(moved(chains, shifts), axis=0)
        return jnp.where(mdp.terminal[:, None], nothing, law), None

    last = jnp.broadcast_to(nothing, (mdp.num_states, support.size))
    law, _ = jax.lax.scan(step, last, policy_by_time(policy, horizon), reverse=True)
    return ReturnLaw(unit * support, law, jnp.all(exact | (probability == 0)))


def _chain(transition: Array, policy: Array) -> Array:
    """`[S, A, S]` -> `[S, S]`, averaged over the policy's actions."""
    return jax.vmap(average, in_axes=(2, None), out_axes=1)(transition, policy)


def conditional_value_at_risk(support: Array, probability: Array, level: float | Array) -> Array:
    """The mean of the worst `level` share of a law: what the unluckiest patients can expect.

    An atom that straddles the level counts in part, so that level 1 is the mean and a level below
    the probability of the worst atom is that atom.

    Args:
      support: `[N]`, ascending.
      probability: `[N]`.
      level: in (0, 1].

    Returns:
      `[]`.

    Source: Rockafellar & Uryasev (2002), "Conditional value-at-risk for general loss
      distributions", proposition 8, for gains in place of losses.

    >>> import jax.numpy as jnp
    >>> outcomes, chances = jnp.array([-10.0, 0.0, 5.0]), jnp.array([0.1, 0.1, 0.8])
    >>> round(conditional_value_at_risk(outcomes, chances, 0.2).item(), 4)
    -5.0
    """
    before = jnp.cumsum(probability) - probability
    taken = jnp.clip(level - before, 0, probability)
    return jnp.sum(taken * support) / level
