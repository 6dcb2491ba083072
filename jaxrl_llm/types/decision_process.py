"""Finite decision processes, wholly or partly observed, and what a solver finds of them.

Shapes use `S` states, `A` actions, `O` observations, `N` distinct state-action rows and `K`
successors.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import replace

import jax.numpy as jnp
from flax import struct

from jaxrl_llm.types.arrays import Array

_MAX_UNROLLED = 16  # successors; the program grows with them


@struct.dataclass(kw_only=True)
class MDP:
    """A finite Markov decision process with dense transitions.

    A terminal state ends the episode on arrival: its value is 0. Solvers read an MDP only through
    `expect`, `expected_reward` and `under`, which `SuccessorMDP` shares.

    Attributes:
      transition: `[S, A, S]`, the probability of each next state.
      reward: `[S, A, S]`, on the way to each next state; `[S, A, 1]` where that does not matter.
      discount: `[]`, in [0, 1].
      initial: `[S]`, the law of the first state.
      terminal: `[S]` bool.
      action_mask: `[S, A]` bool, True where the action is allowed.
    """

    transition: Array
    reward: Array
    discount: Array
    initial: Array
    terminal: Array
    action_mask: Array

    @property
    def num_states(self) -> int:
        return self.action_mask.shape[-2]

    @property
    def num_actions(self) -> int:
        return self.action_mask.shape[-1]

    def expect(self, value: Array) -> Array:
        """E[value(s') | s, a] for `value` `[S]`, as `[S, A]`."""
        rows = self.transition.reshape(-1, self.num_states)
        return (rows @ value).reshape(self.action_mask.shape)

    def expected_reward(self) -> Array:
        """E[reward(s, a, s') | s, a], `[S, A]`."""
        if self.reward.shape[-1] == 1:
            return self.reward[..., 0]
        return jnp.sum(self.transition * self.reward, axis=-1)

    def under(self, policy: Array) -> Array:
        """The transition matrix `[S, S]` under `policy`: probabilities `[S, A]`, actions `[S]`."""
        if policy.ndim == 1:
            return self.transition[jnp.arange(self.num_states), policy]
        return jnp.einsum("sa,sat->st", policy, self.transition)

    def restrict(self, policy: Array) -> MDP:
        """The process with one action a state, that of `policy` `[S]` (integers)."""
        states = jnp.arange(self.num_states)
        return replace(
            self,
            transition=self.transition[states, policy][:, None],
            reward=self.reward[states, policy][:, None],
            action_mask=self.action_mask[states, policy][:, None],
        )


@struct.dataclass(kw_only=True)
class SuccessorMDP:
    """The same process by padded successor lists, for sparse problems.

    Many state-action pairs share one law (every inadmissible action of ICU-Sepsis), so only the
    `N` distinct rows are stored, and `row` says which a pair uses. Padding has probability 0.

    Attributes:
      successor: `[N, K]` int32, next states.
      probability: `[N, K]`, their probabilities.
      reward: `[N, K]`, received on the way to each.
      row: `[S, A]` int32, in [0, N).
      discount: `[]`.
      initial: `[S]`.
      terminal: `[S]` bool.
      action_mask: `[S, A]` bool.
    """

    successor: Array
    probability: Array
    reward: Array
    row: Array
    discount: Array
    initial: Array
    terminal: Array
    action_mask: Array

    @property
    def num_states(self) -> int:
        return self.action_mask.shape[-2]

    @property
    def num_actions(self) -> int:
        return self.action_mask.shape[-1]

    def expect(self, value: Array) -> Array:
        """E[value(s') | s, a] for `value` `[S]`, as `[S, A]`."""
        num_successors = self.successor.shape[-1]
        if num_successors > _MAX_UNROLLED:
            return jnp.einsum("nk,nk->n", self.probability, value[self.successor])[self.row]
        # Successor after successor is one fused loop; gathered all at once they are written to
        # memory and read again, which takes several times as long for millions of rows.
        columns = (
            self.probability[:, k] * value[self.successor[:, k]] for k in range(num_successors)
        )
        return functools.reduce(operator.add, columns)[self.row]

    def expected_reward(self) -> Array:
        """E[reward(s, a, s') | s, a], `[S, A]`."""
        return jnp.einsum("nk,nk->n", self.probability, self.reward)[self.row]

    def under(self, policy: Array) -> Array:
        """The transition matrix `[S, S]` of the chain that `policy` (as in `MDP.under`) induces."""
        states = jnp.arange(self.num_states)
        matrix = jnp.zeros((self.num_states, self.num_states), self.probability.dtype)
        if policy.ndim == 1:
            row = self.row[states, policy]
            return matrix.at[states[:, None], self.successor[row]].add(self.probability[row])
        weight = policy[:, :, None] * self.probability[self.row]
        return matrix.at[states[:, None, None], self.successor[self.row]].add(weight)

    def restrict(self, policy: Array) -> SuccessorMDP:
        """The process with one action a state, that of `policy` `[S]` (integers)."""
        states = jnp.arange(self.num_states)
        row = self.row[states, policy]
        return replace(
            self,
            successor=self.successor[row],
            probability=self.probability[row],
            reward=self.reward[row],
            row=states.astype(self.row.dtype)[:, None],
            action_mask=self.action_mask[states, policy][:, None],
        )


@struct.dataclass(kw_only=True)
class POMDP:
    """A decision process whose state is hidden: what is seen is one of `O` observations.

    Attributes:
      mdp: the process; `mdp.initial` is the belief before the first observation.
      observation: `[A, S, O]`, the probability of each observation on ARRIVING in a state after an
        action.
    """

    mdp: MDP
    observation: Array

    @property
    def num_observations(self) -> int:
        return self.observation.shape[-1]


@struct.dataclass(kw_only=True)
class Solution:
    """What a solver returns: never NaN, never a sentinel; `converged` says whether to trust it.

    Attributes:
      value: `[S]`.
      q: `[S, A]`, one look-ahead on `value`; actions that are not allowed have one too.
      policy: `[S]` int32, greedy in `q` among allowed actions, ties to the lowest index.
      iterations: `[]` int32, sweeps or improvements, as the solver documents.
      residual: `[]`, the sup-norm Bellman residual of `value`; the distance of `value` from the
        fixed point is at most `residual / (1 - discount)`.
      converged: `[]` bool, whether `residual` reached the tolerance.
    """

    value: Array
    q: Array
    policy: Array
    iterations: Array
    residual: Array
    converged: Array
