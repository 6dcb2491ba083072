"""The loop that every Bellman solver shares: look ahead, measure the residual, update the value.

`bellman` holds the solvers; each is one `update` handed to `fixed_point`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jaxrl_llm.types import MDP, Array, PyTree, Solution, SuccessorMDP

Problem = MDP | SuccessorMDP

# A batch of problems of at least this many numbers each is solved one at a time on a CPU, where
# each stays in cache and stops by itself; smaller ones, and all on an accelerator, in lockstep.
_SEQUENTIAL_SIZE = 4096

_MAX_UNROLLED = 32  # actions; the program grows with them


def greedy(
    q: Array, action_mask: Array | None = None, *, slack: float | Array | None = None
) -> Array:
    """The allowed action of highest value, ties to the lowest index.

    Args:
      q: `[..., A]`.
      action_mask: `[..., A]` bool, True where allowed; all are when None.
      slack: actions within this much of the best tie with it; only equal ones when None.

    Returns:
      Actions, `[...]` int32.

    >>> import jax.numpy as jnp
    >>> greedy(jnp.array([3.0, 2.0, 2.0]), jnp.array([False, True, True])).item()
    1
    """
    allowed = q if action_mask is None else jnp.where(action_mask, q, -jnp.inf)
    if slack is not None:
        allowed = allowed >= jnp.max(allowed, axis=-1, keepdims=True) - slack
    if q.shape[-1] > _MAX_UNROLLED:
        return jnp.argmax(allowed, axis=-1).astype(jnp.int32)
    # One fused loop over the rows; `argmax` reduces row after row, at six times the cost on a CPU.
    best, action = allowed[..., 0], jnp.zeros(q.shape[:-1], jnp.int32)
    for index in range(1, q.shape[-1]):
        better = allowed[..., index] > best
        best = jnp.where(better, allowed[..., index], best)
        action = jnp.where(better, index, action)
    return action


class Evaluation(NamedTuple):
    """What a direct solve knows of a policy; all 0 where the policy never ends."""

    value: Array  # [S]
    duration: Array  # [S], the expected (discounted) number of steps
    ends: Array  # [] bool


class Model(NamedTuple):
    """A problem with what every sweep needs of it, computed once; terminal rows are 0."""

    mdp: Problem
    reward: Array  # [S, A]
    discount: Array  # [S]
    scale: Array  # [], the largest |reward|

    @classmethod
    def of(cls, mdp: Problem) -> Model:
        reward = jnp.where(mdp.terminal[:, None], 0, mdp.expected_reward())
        discount = jnp.where(mdp.terminal, 0, mdp.discount)
        return cls(mdp, reward, discount, jnp.max(jnp.abs(reward)))

    def look_ahead(self, value: Array) -> Array:
        return self.reward + self.discount[:, None] * self.mdp.expect(value)

    def best(self, q: Array) -> Array:
        return jnp.max(jnp.where(self.mdp.action_mask, q, -jnp.inf), axis=-1)

    def chain(self, policy: Array) -> Callable[[Array], Array]:
        """value `[S]` -> E[value(s')] `[S]` under actions `[S]` or probabilities `[S, A]`."""
        if policy.ndim == 2:
            return lambda value: average(self.mdp.expect(value), policy)
        restricted = self.mdp.restrict(policy)
        return lambda value: restricted.expect(value)[:, 0]

    def sweep(self, policy: Array) -> Callable[[Array], Array]:
        chain, reward = self.chain(policy), average(self.reward, policy)
        return lambda value: reward + self.discount * chain(value)

    def system(self, policy: Array) -> Array:
        """I - discount · P_policy, `[S, S]`; a terminal state's row is that of the identity."""
        identity = jnp.eye(self.mdp.num_states, dtype=self.reward.dtype)
        return identity - self.discount[:, None] * self.mdp.under(policy)

    def solve(self, policy: Array) -> Evaluation:
        alive = jnp.where(self.mdp.terminal, 0, jnp.ones_like(self.discount))
        sides = jnp.stack([average(self.reward, policy), alive], axis=1)
        value, duration = jnp.linalg.solve(self.system(policy), sides).T
        # The longest duration is the norm of the inverse matrix: beyond 1 / rounding, the matrix
        # is singular to working precision, and its finite "solution" is noise.
        ends = rounding_error(jnp.max(jnp.abs(duration))) < 1
        return Evaluation(jnp.where(ends, value, 0), jnp.where(ends, duration, 0), ends)

    def threshold(self, tolerance: float | Array, value: Array) -> Array:
        """The tolerance, or the rounding error of a backup where that is larger."""
        rounding = rounding_error(jnp.max(jnp.abs(value)))
        # A value beside which the rewards vanish solves nothing, however small its residual seems.
        rounding = jnp.where(rounding < 0.01 * self.scale, rounding, 0)
        return jnp.maximum(jnp.asarray(tolerance, value.dtype), rounding)


class Iterate(NamedTuple):
    """Where a solver stands: `q` is one look-ahead on `value`, `residual` that of `value`."""

    value: Array
    q: Array
    residual: Array
    iterations: Array
    moved: Array  # [] bool, False where the last update changed nothing: none ever will
    memory: PyTree


def fixed_point(
    model: Model,
    backup: Callable[[Array], Array],
    update: Callable[[Iterate], tuple[Array, PyTree]],
    tolerance: float | Array,
    max_iterations: int | Array,
    value: Array | None = None,
    memory: PyTree = (),
) -> Solution:
    """Updates `value` until backup(q) equals it; every solver differs only in its `update`."""

    def look(value: Array, q: Array, iterations: Array, moved: Array, memory: PyTree) -> Iterate:
        residual = jnp.max(jnp.abs(backup(q) - value))
        return Iterate(value, q, residual, iterations, moved, memory)

    def unfinished(iterate: Iterate) -> Array:
        above = iterate.residual > model.threshold(tolerance, iterate.value)
        return above & iterate.moved & (iterate.iterations < max_iterations)

    def body(iterate: Iterate) -> Iterate:
        value, memory = update(iterate)
        moved = jnp.any(value != iterate.value)
        return look(value, model.look_ahead(value), iterate.iterations + 1, moved, memory)

    if value is None:
        value, q = jnp.zeros_like(model.discount), model.reward
    else:
        q = model.look_ahead(value)
    first = look(value, q, jnp.int32(0), jnp.bool_(True), memory)
    iterate = jax.lax.while_loop(unfinished, body, first)
    return solution(model, iterate, tolerance)


def successive_approximation(
    model: Model,
    backup: Callable[[Array], Array],
    tolerance: float | Array,
    max_iterations: int | Array,
) -> Solution:
    """The fixed point of a contraction, by sweeps V <- backup(Q(V)) from 0."""

    def update(iterate: Iterate) -> tuple[Array, tuple[()]]:
        return backup(iterate.q), ()

    return fixed_point(model, backup, update, tolerance, max_iterations)


def solution(model: Model, iterate: Iterate, tolerance: float | Array) -> Solution:
    """The `Solution` of a finished iterate; `memory`, where it is an array, is its policy."""
    slack = model.threshold(tolerance, iterate.value)
    policy = greedy(iterate.q, model.mdp.action_mask, slack=slack)
    return Solution(
        value=iterate.value,
        q=iterate.q,
        policy=policy if isinstance(iterate.memory, tuple) else iterate.memory,
        iterations=iterate.iterations,
        residual=iterate.residual,
        converged=iterate.residual <= slack,
    )


def rounding_error(magnitude: Array) -> Array:
    """What one backup of values of this magnitude may lose to rounding."""
    return 8 * jnp.finfo(magnitude.dtype).eps * magnitude


def average(q: Array, policy: Array) -> Array:
    """E[q(s, a)] `[S]` under action probabilities `[S, A]` or one action a state `[S]`."""
    if policy.ndim == 1:
        return q[jnp.arange(policy.size), policy]
    return jnp.sum(policy * q, axis=-1)


def batchable(
    solve: Callable[[Problem, Array, Array], Solution],
    mdp: Problem,
    tolerance: float | Array,
    max_iterations: int | Array,
) -> Solution:
    """Calls `solve`, with a rule for `vmap` that suits the memory of the machine."""
    solve_batchable = custom_vmap(solve)

    @solve_batchable.def_vmap
    def _(axis_size: int, in_batched: Any, *arguments: Any) -> tuple[Solution, Any]:
        leaves, treedef = jax.tree.flatten(arguments)
        batched = jax.tree.leaves(in_batched)
        rows = [leaf for leaf, is_batched in zip(leaves, batched, strict=True) if is_batched]

        def problem(row: list[Array]) -> Any:
            parts = iter(row)
            whole = [next(parts) if b else leaf for leaf, b in zip(leaves, batched, strict=True)]
            return jax.tree.unflatten(treedef, whole)

        def in_turn(rows: list[Array]) -> Solution:
            return jax.lax.map(lambda row: solve_batchable(*problem(row)), rows)

        def in_lockstep(rows: list[Array]) -> Solution:
            return jax.vmap(lambda row: solve(*problem(row)))(rows)

        if sum(row.size for row in rows) // axis_size < _SEQUENTIAL_SIZE:
            solution = in_lockstep(rows)
        else:
            solution = jax.lax.platform_dependent(rows, cpu=in_turn, default=in_lockstep)
        return solution, jax.tree.map(lambda _: True, solution)

    return solve_batchable(mdp, jnp.asarray(tolerance), jnp.asarray(max_iterations))
