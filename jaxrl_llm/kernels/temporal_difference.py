"""Temporal-difference learning in a table: targets and errors of one step, traces, forward views.

One convention throughout, that of `kernels.returns`:

- `discount = gamma * (1 - terminated)`: nothing follows a death;
- a truncated step bootstraps from the observation BEFORE the reset;
- a trace ends where `terminated | truncated`: its `decay` is `discount * lambda` and 0 there.

n-step targets are `returns.n_step_returns` with the next values of the method: Q(s', a') for n-step
SARSA, E_pi Q(s', .) for n-step expected SARSA. Tables are flat, `[N]`, of states or of pairs, and
an `index` is a place in them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import chex
import jax.numpy as jnp

from jaxrl_llm import numerics
from jaxrl_llm.types import Array

TraceKind = Literal["accumulating", "replacing", "dutch"]


def td_error(reward: Array, discount: Array, value: Array, next_value: Array) -> Array:
    """delta = r + d V(s') - V(s).

    Args:
      reward: `[]`, r.
      discount: `[]`, d = gamma (1 - terminated).
      value: `[]`, V(s) or Q(s, a).
      next_value: `[]`, of the observation before any reset; for a value of a pair the one that the
        method's target has.

    Returns:
      `[]`.

    Source: Sutton & Barto (2018), equation 6.5.
    """
    return reward + discount * next_value - value


def sarsa_target(reward: Array, discount: Array, next_q: Array, next_action: Array) -> Array:
    """r + d Q(s', a'), with the action that the policy takes next.

    Args:
      reward: `[]`.
      discount: `[]`, gamma (1 - terminated).
      next_q: `[A]`, of the observation before any reset.
      next_action: `[]` int32.

    Returns:
      `[]`.

    Source: Sutton & Barto (2018), equation 6.7.
    """
    chex.assert_rank([reward, next_q, next_action], [0, 1, 0])
    return reward + discount * next_q[next_action]


def expected_sarsa_target(reward: Array, discount: Array, next_q: Array, law: Array) -> Array:
    """r + d sum_a pi(a | s') Q(s', a).

    Args:
      reward: `[]`.
      discount: `[]`, gamma (1 - terminated).
      next_q: `[A]`, of the observation before any reset; any number, infinite ones too, where the
        law has none.
      law: `[A]`, pi(. | s').

    Returns:
      `[]`.

    Source: Sutton & Barto (2018), equation 6.9.
    """
    chex.assert_equal_shape([next_q, law])
    return reward + discount * jnp.sum(jnp.where(law > 0, law * next_q, 0))


def q_learning_target(
    reward: Array, discount: Array, next_q: Array, action_mask: Array | None = None
) -> Array:
    """r + d max_a Q(s', a) over the allowed actions.

    Args:
      reward: `[]`.
      discount: `[]`, gamma (1 - terminated).
      next_q: `[A]`, of the observation before any reset.
      action_mask: `[A]` bool, True where allowed in s'; all are when None.

    Returns:
      `[]`.

    Source: Watkins & Dayan (1992), equation 1; Sutton & Barto (2018), equation 6.8.

    >>> next_q, mask = jnp.array([5.0, 1.0]), jnp.array([False, True])
    >>> q_learning_target(jnp.float32(1), jnp.float32(0.5), next_q, mask).item()
    1.5
    """
    return double_q_learning_target(reward, discount, next_q, next_q, action_mask)


def double_q_learning_target(
    reward: Array,
    discount: Array,
    next_q: Array,
    other_next_q: Array,
    action_mask: Array | None = None,
) -> Array:
    """r + d Q_2(s', argmax_a Q_1(s', a)): one table chooses, the other one says what that is worth.

    The two errors are independent, so that the largest of several noisy values is not taken for
    the value of the best.

    Args:
      reward: `[]`.
      discount: `[]`, gamma (1 - terminated).
      next_q: `[A]`, of the table that is updated, which chooses.
      other_next_q: `[A]`, of the other.
      action_mask: `[A]` bool, True where allowed in s'; all are when None.

    Returns:
      `[]`.

    Source: van Hasselt (2010), "Double Q-learning", algorithm 1; Sutton & Barto (2018), eq. 6.10.
    """
    chex.assert_equal_shape([next_q, other_next_q])
    allowed = next_q if action_mask is None else jnp.where(action_mask, next_q, -jnp.inf)
    return reward + discount * other_next_q[jnp.argmax(allowed)]


def tree_backup_returns(
    reward: Array,
    discount: Array,
    expected_q: Array,
    next_probability: Array,
    next_q: Array,
    reset: Array,
) -> Array:
    """G_t = r_t + d_t [sum_{a /= a'} pi(a) Q(s', a) + pi(a') G_{t+1}], to the end of the window.

    The action taken, a', counts with the probability that the TARGET policy gives it: off-policy
    without importance weights. The last row, and one before a reset, bootstraps wholly. With a
    greedy target this is n-step Q-learning that stops looking at the first exploring action.

    Args:
      reward, discount: `[n]`, as in `kernels.returns`.
      expected_q: `[n]`, sum_a pi(a | s') Q(s', a), of the observation before any reset.
      next_probability: `[n]`, pi(a' | s') of the action taken next.
      next_q: `[n]`, Q(s', a').
      reset: `[n]` bool, terminated or truncated.

    Returns:
      G, `[n]`; its first entry is the n-step target of the first pair.

    Source: Sutton & Barto (2018), equation 7.16.
    """
    chex.assert_equal_shape([reward, discount, expected_q, next_probability, next_q, reset])

    def coefficients(step: tuple[Array, ...]) -> tuple[Array, Array]:
        reward, discount, expected_q, probability, next_q, reset = step
        followed = jnp.where(reset, 0, probability)
        return discount * followed, reward + discount * (expected_q - followed * next_q)

    inputs = (reward, discount, expected_q, next_probability, next_q, reset)
    return numerics.reverse_recurrence(coefficients, inputs, initial=next_q[-1])


def shared_step_size(step_size: Array, count: Array) -> Array:
    """(1 - (1 - alpha)^c) / c: what each of c updates of one pair adds when all are made at once.

    The pair then moves towards the mean of their targets by what c updates, one after another, move
    it in all; with a constant step size that is their mean over every order.

    Args:
      step_size: `[]`, alpha, in [0, 1].
      count: `[]`, c; below 1 counts as 1.

    Returns:
      `[]`.

    >>> shared_step_size(jnp.array(0.5), jnp.array(2.0)).item()
    0.375
    """
    count = jnp.maximum(count, 1)
    return -jnp.expm1(count * jnp.log1p(-step_size)) / count


class Window(NamedTuple):
    """The last n steps of one learner, `[n]`, oldest first, for n-step targets.

    Attributes:
      pair: int32, place in the table.
      reward, discount: as in `kernels.returns`.
      next_value: what a step that ends the window, or an episode, bootstraps from.
      next_probability: pi(a' | s') of the action taken next; 1 for SARSA.
      next_q: Q(s', a').
      reset: bool.
      known: 1, or 0 before the first step.
    """

    pair: Array
    reward: Array
    discount: Array
    next_value: Array
    next_probability: Array
    next_q: Array
    reset: Array
    known: Array

    @classmethod
    def empty(cls, n: int) -> Window:
        number = jnp.zeros(n)
        pair, reset = jnp.zeros(n, jnp.int32), jnp.zeros(n, bool)
        return cls(pair, number, number, number, number, number, reset, number)

    def push(self, step: Window) -> Window:
        """Forgets the oldest step and takes in `step`, whose fields are `[]`."""
        return Window(*(jnp.append(old[1:], new) for old, new in zip(self, step, strict=True)))

    def target(self) -> Array:
        """The n-step target `[]` of the oldest pair, cut at the end of its episode."""
        return tree_backup_returns(*self[1:7])[0]


class Traces(NamedTuple):
    """Eligibility `[N]` of every place, and the decay `[]` of the step before."""

    trace: Array
    decay: Array

    def visit(self, kind: TraceKind, index: Array, step_size: Array) -> Array:
        """The eligibility `[N]` once place `index` `[]` is visited; `step_size` `[]` if dutch."""
        if kind == "dutch":
            return dutch_trace(self.trace, index, self.decay, step_size)
        update = accumulating_trace if kind == "accumulating" else replacing_trace
        return update(self.trace, index, self.decay)


def accumulating_trace(trace: Array, index: Array, decay: Array) -> Array:
    """e <- decay · e, and 1 more at the place visited.

    Args:
      trace: `[N]`.
      index: `[]` int32, the place visited.
      decay: `[]`, of the step that led here: discount · lambda, 0 after a reset.

    Returns:
      `[N]`.

    Source: Sutton & Barto (2018), equation 12.5, for a table.
    """
    return (decay * trace).at[index].add(1)


def replacing_trace(trace: Array, index: Array, decay: Array) -> Array:
    """e <- decay · e, and 1 at the place visited, however often it was before.

    Args, Returns: as `accumulating_trace`.

    Source: Singh & Sutton (1996), "Reinforcement learning with replacing eligibility traces".
    """
    return (decay * trace).at[index].set(1)


def dutch_trace(trace: Array, index: Array, decay: Array, step_size: Array) -> Array:
    """e <- decay · e, and 1 - step_size · decay · e(index) more at the place visited.

    Between the other two: step size 0 accumulates and 1 replaces.

    Args:
      trace, index, decay: as in `accumulating_trace`.
      step_size: `[]`.

    Returns:
      `[N]`.

    Source: Sutton & Barto (2018), equation 12.11, for a table.
    """
    faded = decay * trace
    return faded.at[index].add(1 - step_size * faded[index])


def watkins_decay(decay: Array, next_q: Array, next_action: Array) -> Array:
    """The decay of Watkins's Q(lambda): 0 where the next action is not a greedy one.

    What follows an exploring action says nothing about the greedy policy. Tied actions are all
    greedy.

    Args:
      decay: `[]`, discount · lambda, 0 at a reset.
      next_q: `[A]`, -inf where an action is not allowed.
      next_action: `[]` int32, the action about to be taken.

    Returns:
      `[]`.

    Source: Watkins (1989), "Learning from delayed rewards"; Sutton & Barto (2018), section 12.10.
    """
    return jnp.where(next_q[next_action] >= jnp.max(next_q), decay, 0)


class TrueOnline(NamedTuple):
    """What true-online TD(lambda) carries: `old_value` is V(s) as it was one step before.

    Attributes:
      value: `[N]`.
      trace: `[N]`, dutch.
      old_value: `[]`; 0 at the start of an episode.
    """

    value: Array
    trace: Array
    old_value: Array


def true_online_step(
    learner: TrueOnline,
    index: Array,
    next_index: Array,
    reward: Array,
    discount: Array,
    decay: Array,
    step_size: Array,
) -> TrueOnline:
    """One step of true-online TD(lambda): equal to the online lambda-return algorithm, at O(N).

    Args:
      learner: before the step.
      index, next_index: `[]` int32, states.
      reward: `[]`.
      discount: `[]`, gamma (1 - terminated).
      decay: `[]`, of the step that led to `index`: gamma · lambda, 0 at an episode's start.
      step_size: `[]`.

    Returns:
      The learner after it. At an episode's start the caller gives `old_value` 0 and `decay` 0.

    Source: Sutton & Barto (2018), section 12.5, the algorithm in its box, for a table;
      van Seijen et al. (2016), "True online temporal-difference learning".
    """
    value, next_value = learner.value[index], learner.value[next_index]
    next_value = jnp.where(discount > 0, next_value, 0)
    error = td_error(reward, discount, value, next_value)
    trace = dutch_trace(learner.trace, index, decay, step_size)
    moved = value - learner.old_value
    table = learner.value + step_size * (error + moved) * trace
    return TrueOnline(
        value=table.at[index].add(-step_size * moved), trace=trace, old_value=next_value
    )
