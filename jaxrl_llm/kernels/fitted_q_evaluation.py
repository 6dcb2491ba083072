"""Tabular fitted Q evaluation: a policy's values in the process that the log itself describes.

Regressing r + gamma E[Q(s', a')] on (s, a) again and again, with a table, converges to the exact
evaluation of the EMPIRICAL process, whose laws are the frequencies in the log: so that is what is
built and solved.

What happens where the log has no action is a guess, and an important one: on ICU-Sepsis a value
of 0 there spoils the estimate, and the mean of the state does not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl_llm.kernels import bellman
from jaxrl_llm.types import MDP, Array, Solution, Trajectories, Transition

Fallback = Literal["state_mean"] | float


def empirical_mdp(
    steps: Transition,
    count: Array,
    *,
    num_states: int,
    num_actions: int,
    gamma: float | Array,
    fallback: Fallback = "state_mean",
    pseudo_visits: float | Array = 0.1,
) -> MDP:
    """The process of observed frequencies, with one state more, S, where every record ends.

    A terminated step leads to S whatever its next observation says, so that a log need not know
    the state in which a patient died.

    Args:
      steps: leaves `[...]`, observations, actions and next observations integers.
      count: `[...]`, how often each step counts: 0 on padding.
      num_states: S.
      num_actions: A.
      gamma: discount in [0, 1].
      fallback: of pairs that were never seen: "state_mean" does there what the log did in that
        state on average, and in a state that was never left what it did anywhere; a number is
        their value, such as 0 for the worst.

    Returns:
      An `MDP` of S + 1 states, dense. The first state of the trajectories is not in it.
    """
    end = num_states
    shape = (num_states + 1, num_actions)
    count = count.astype(float)
    arrival = jnp.where(steps.terminated, end, steps.next_observation)
    place = (steps.observation, steps.action)
    moves = jnp.zeros((*shape, num_states + 1)).at[(*place, arrival)].add(count)
    rewards = jnp.zeros(shape).at[place].add(count * steps.reward)
    visits = jnp.zeros(shape).at[place].add(count)

    if fallback == "state_mean":
        guessed_move, guessed_reward = _state_mean(moves, rewards, visits)
    else:
        guessed_move = (jnp.arange(num_states + 1) == end).astype(float)[None]
        guessed_reward = jnp.full((1, 1), fallback, float)
    total = visits + pseudo_visits
    guessed_move, guessed_reward = pseudo_visits * guessed_move, pseudo_visits * guessed_reward
    terminal = jnp.arange(num_states + 1) == end
    return MDP(
        transition=(moves + guessed_move[:, None]) / total[..., None],
        reward=((rewards + guessed_reward) / total)[..., None],
        discount=jnp.asarray(gamma, float),
        initial=jnp.where(terminal, 0, 1 / num_states),
        terminal=terminal,
        action_mask=jnp.ones(shape, bool),
    )


def _state_mean(moves: Array, rewards: Array, visits: Array) -> tuple[Array, Array]:
    """Law of the next state `[S, S]` and mean reward `[S, 1]`, over a state's visits, or all."""
    moves, rewards, visits = (jnp.sum(x, axis=1) for x in (moves, rewards, visits))
    # A state that was never left behaves as the whole log; an empty log ends at once.
    seen, logged = visits > 0, jnp.sum(visits) > 0
    moves = jnp.where(seen[:, None], moves, jnp.sum(moves, axis=0, keepdims=True))
    rewards = jnp.where(seen, rewards, jnp.sum(rewards))
    visits = jnp.where(seen, visits, jnp.where(logged, jnp.sum(visits), 1))
    moves = moves.at[:, -1].add(jnp.where(logged, 0.0, 1.0))
    return moves / visits[:, None], (rewards / visits)[:, None]


def fitted_q_evaluation(
    steps: Transition,
    count: Array,
    policy: Array,
    *,
    gamma: float | Array,
    fallback: Fallback = "state_mean",
    pseudo_visits: float | Array = 0.1,
) -> Solution:
    """Q of `policy` from logged steps, solved directly.

    For a problem too large for that, `bellman.iterative_policy_evaluation` takes the same
    `empirical_mdp`.

    Args:
      steps, count, gamma, fallback: as in `empirical_mdp`.
      policy: `[S, A]`, to be evaluated.

    Returns:
      A `Solution` of the S states; `converged` is False, and the values 0, where discount 1 meets
      a policy that never ends in the log.

    Source: Le, Voloshin & Yue (2019), arXiv:1903.08738, algorithm 3 (FQE), here at its fixed point.
    """
    num_states, num_actions = policy.shape
    mdp = empirical_mdp(
        steps,
        count,
        num_states=num_states,
        num_actions=num_actions,
        gamma=gamma,
        fallback=fallback,
        pseudo_visits=pseudo_visits,
    )
    idle = jnp.full((1, num_actions), 1 / num_actions)
    solved = bellman.policy_evaluation(mdp, jnp.concatenate([policy, idle]))
    return replace(
        solved,
        value=solved.value[:num_states],
        q=solved.q[:num_states],
        policy=solved.policy[:num_states],
    )


def cross_fitted_q(
    trajectories: Trajectories,
    fold: Array,
    policy: Array,
    *,
    num_folds: int,
    gamma: float | Array,
    fallback: Fallback = "state_mean",
    pseudo_visits: float | Array = 0.1,
) -> Array:
    """Q of `policy` for each fold of trajectories, fitted to all the OTHERS, `[F, S, A]`.

    Args:
      trajectories: observations are states.
      fold: `[B]` int32 in [0, F), the same for all trajectories of a patient.
      policy: `[S, A]`.
      num_folds: F, at least 2.
      gamma: discount.
      fallback: as in `empirical_mdp`.

    Source: Chernozhukov et al. (2018), "Double/debiased machine learning", definition 3.1, for the
      idea of cross-fitting.
    """

    def without(held_out: Array) -> Array:
        count = trajectories.mask & (fold != held_out)[None]
        return fitted_q_evaluation(
            trajectories.steps,
            count,
            policy,
            gamma=gamma,
            fallback=fallback,
            pseudo_visits=pseudo_visits,
        ).q

    return jax.lax.map(without, jnp.arange(num_folds))
