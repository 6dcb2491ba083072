"""Every pytree and protocol shared by two or more parts of the library.

Shapes use `S` states, `A` actions, `T` time steps, `B` trajectories, `N` distinct state-action
rows and `K` successors. Control is time-major, `[T, B, ...]`; tokens are batch-major, `[B, L]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

if TYPE_CHECKING:
    import distrax

Array = jax.Array
Key = jax.Array
PyTree = Any


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
        return jnp.einsum("nk,nk->n", self.probability, value[self.successor])[self.row]

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


@struct.dataclass(kw_only=True)
class TimeStep:
    """What an environment returns from `step`, before any reset.

    Attributes:
      observation: of the state that the action led to, even when that state ended the episode.
      reward: `[]` float32.
      terminated: `[]` bool, the process itself ended (death, discharge): nothing to bootstrap.
      truncated: `[]` bool, a time limit cut the episode: bootstrap from `observation`.
      info: a dict of arrays; `action_mask` `[A]` bool, where given, masks the NEXT action.
    """

    observation: PyTree
    reward: Array
    terminated: Array
    truncated: Array
    info: dict[str, Array]


@struct.dataclass(kw_only=True)
class Transition:
    """One step of experience, leaves `[T, B, ...]` when stacked by a rollout.

    Attributes:
      observation: before the action.
      action: taken.
      reward: received.
      terminated: bool, `next_observation` is a terminal state.
      truncated: bool, a time limit cut the episode after this step.
      next_observation: after the action and BEFORE any reset, so that a timeout bootstraps.
      extras: what the policy wants to remember, such as `log_probability` or `value`.
    """

    observation: PyTree
    action: Array
    reward: Array
    terminated: Array
    truncated: Array
    next_observation: PyTree
    extras: dict[str, Array]


@struct.dataclass(kw_only=True)
class TokenBatch:
    """Rows of tokens, batch-major, with what is real and what counts. Masks are True = keep.

    Attributes:
      tokens: `[B, L]` int32.
      attention_mask: `[B, L]` bool, False on padding.
      response_mask: `[B, L]` bool, the tokens that a loss counts: those of the response, its end
        token included and nothing after it.
      segment: `[B, L]` int32, which sequence of a packed row a token belongs to, counted from 1,
        and 0 on padding. None where a row is one sequence.
      log_probability: `[B, L]` float32, of each response token under the law that drew it, and 0
        elsewhere. None where the tokens were not drawn.
    """

    tokens: Array
    attention_mask: Array
    response_mask: Array
    segment: Array | None = None
    log_probability: Array | None = None


@struct.dataclass(kw_only=True)
class Responses:
    """Responses to prompts, and what is known of them: what every alignment algorithm learns from.

    There are `G` prompts with `K` responses each, a group: samples of a policy, or a preference
    pair with the chosen one first. A row is the prompt of `P` tokens, padded on the left, and one
    response of `N` tokens, padded on the right; `L` = `P` + `N`. What is not known is None.

    Attributes:
      tokens, attention_mask: `[G, K, L]` int32 and bool, False on padding.
      response_mask: `[G, K, N]` bool, the tokens of the response, its end token included.
      score: `[G, K]` float32, of whole responses; of a pair, how probably each is the better one.
      log_probability: `[G, K, N]` float32, of each token under the law that drew it.
      reference_log_probability: the same under the reference policy.
      value: `[G, K, N]` float32, of the state before each token, as it was at the rollout.
      rating: `[G, K, C]` float32, by criterion; NaN where there is none.
      features: `[G, K, F]` float32, what the heads of one reward model read.
      annotator, margin: `[G]`, who compared the pair, and by how much the chosen one should win.
    """

    tokens: Array
    attention_mask: Array
    response_mask: Array
    score: Array | None = None
    log_probability: Array | None = None
    reference_log_probability: Array | None = None
    value: Array | None = None
    rating: Array | None = None
    features: Array | None = None
    annotator: Array | None = None
    margin: Array | None = None

    @property
    def prompt_length(self) -> int:
        return self.tokens.shape[-1] - self.response_mask.shape[-1]


@struct.dataclass(kw_only=True)
class KVCache:
    """The keys and values of the tokens that a decoder has read, in `S` slots a row.

    All rows write the same slot at once, so rows of unequal length are padded on the left.

    Attributes:
      keys, values: one `[B, head, S, dim]` a layer. Not one array for all layers, whose parts
        would be copied out of it at every token, and heads before slots, so that what one head
        reads is contiguous: with slots first, a CPU transposed the whole cache at every token.
      mask: `[B, S]` bool.
      length: `[]` int32, slots written.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    mask: Array
    length: Array


@struct.dataclass(kw_only=True)
class Mean:
    """A mean kept as total and weight, so that it adds exactly over minibatches and devices.

    >>> import jax.numpy as jnp
    >>> parts = Mean.of(jnp.array([1.0, 2.0])) + Mean.of(jnp.array([6.0]))
    >>> float(parts.mean)
    3.0
    """

    total: Array
    weight: Array

    @classmethod
    def of(cls, values: Array, mask: Array | None = None) -> Mean:
        """Of all elements of `values`, or of those where `mask` (same shape) is True.

        Counted in float32 at least: a bool could not count, and bfloat16 not beyond 256.
        """
        values = jnp.asarray(values)
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        if mask is None:
            return cls(total=jnp.sum(values), weight=jnp.asarray(values.size, values.dtype))
        mask = mask.astype(bool)
        weight = jnp.sum(mask).astype(values.dtype)
        return cls(total=jnp.sum(jnp.where(mask, values, 0)), weight=weight)

    def __add__(self, other: Mean) -> Mean:
        return Mean(total=self.total + other.total, weight=self.weight + other.weight)

    @property
    def mean(self) -> Array:
        """total / weight, and 0 where nothing was counted."""
        counted = self.weight > 0
        return jnp.where(counted, self.total / jnp.where(counted, self.weight, 1), 0)


@struct.dataclass(kw_only=True)
class TrainState:
    """Parameters, their optimiser's state and the number of optimiser steps taken `[]`."""

    params: PyTree
    opt_state: PyTree
    step: Array


@dataclass(frozen=True, kw_only=True)
class Discrete:
    """The integers 0 .. `num - 1`."""

    num: int


@dataclass(frozen=True, kw_only=True)
class Box:
    """Arrays of `shape`, each element in [`low`, `high`]."""

    shape: tuple[int, ...]
    low: float | tuple[float, ...]
    high: float | tuple[float, ...]


Space = Discrete | Box


@dataclass(frozen=True, kw_only=True)
class Environment:
    """An environment as pure functions of ONE patient; batch them with `vmap`.

    Attributes:
      name: for logs and error messages.
      reset: `(key, params) -> (state, observation)`.
      step: `(key, state, action, params) -> (state, TimeStep)`. It does not reset.
      action_mask: `(state, params) -> [A]` bool, actions allowed in `state`; None where all are.
        Where given, `TimeStep.info["action_mask"]` repeats it for the new state.
      default_params: a pytree of arrays, the third argument of every call.
      observation_space: of one observation.
      action_space: of one action.
    """

    name: str
    reset: Callable[[Key, PyTree], tuple[PyTree, PyTree]]
    step: Callable[[Key, PyTree, Array, PyTree], tuple[PyTree, TimeStep]]
    default_params: PyTree
    observation_space: Space
    action_space: Space
    action_mask: Callable[[PyTree, PyTree], Array] | None = None


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A learner as two pure functions; a whole training is `jit(scan(step))`, seeds a `vmap`.

    Attributes:
      init: `(key) -> state`.
      step: `(key, state) -> (state, metrics)`; metrics are a flat dict of `Mean`. One that learns
        from data, rather than from an environment, takes them as a third argument.
    """

    init: Callable[[Key], PyTree]
    step: Callable[..., tuple[PyTree, dict[str, Mean]]]


class Policy(Protocol):
    """Anything that maps parameters and one observation to a distribution over actions."""

    def __call__(self, params: PyTree, observation: PyTree) -> distrax.Distribution: ...
