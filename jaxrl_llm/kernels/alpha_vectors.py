"""Alpha-vectors: the optimal value of a POMDP as a maximum of linear functions of the belief.

    V(b) = max_k sum_s alpha_k(s) b(s)

An alpha-vector is the value, state by state, of a plan that begins with one action and goes on by
what is seen. A finite set of plans gives a lower bound on V* (`point_based_value_iteration`), the
set of all useful plans of a finite horizon V* itself (`finite_horizon`). From above comes the
`sawtooth_bound`, and `bellman_excess` says how far a lower bound can be from V*, at any belief.

What is iterated is jit-able, of a fixed number of vectors. What enumerates plans has no fixed size:
it runs on the host, in float64, for problems of a few states.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxrl_llm.kernels import belief as beliefs_of
from jaxrl_llm.kernels.fixed_point import Model, greedy
from jaxrl_llm.types import POMDP, Array

Vectors = NDArray[np.float64]

# Plans that are better by less than this share of the largest value, anywhere, are left out.
_NEGLIGIBLE = 1e-11


class AlphaVectors(NamedTuple):
    """Plans: the value of each and its first action.

    Attributes:
      vectors: `[K, S]`.
      actions: `[K]` int32.
    """

    vectors: Array | Vectors
    actions: Array | NDArray[np.int32]

    def value(self, belief: Array) -> Array:
        """V(b), `[]`, at a belief `[S]`."""
        return jnp.max(jnp.asarray(self.vectors) @ belief)

    def action(self, belief: Array) -> Array:
        """The first action, `[]` int32, of the plan that is best at a belief `[S]`."""
        return jnp.asarray(self.actions)[jnp.argmax(jnp.asarray(self.vectors) @ belief)]


class PointBased(NamedTuple):
    """What point-based value iteration found.

    Attributes:
      plans: one for each belief.
      iterations: `[]` int32, sweeps, the last of which measures the residual.
      residual: `[]`, the largest gain of one more backup at any of the beliefs.
      converged: `[]` bool, whether `residual` reached the tolerance.
    """

    plans: AlphaVectors
    iterations: Array
    residual: Array
    converged: Array


class Sawtooth(NamedTuple):
    """An upper bound: its value at some beliefs, certainty of each state first, and between them.

    Attributes:
      beliefs: `[S + N, S]`.
      values: `[S + N]`.
      iterations: `[]` int32, sweeps, the last of which measures the residual.
      residual: `[]`, what one more sweep would lower at any of the beliefs.
      converged: `[]` bool, whether `residual` reached the tolerance.
    """

    beliefs: Array
    values: Array
    iterations: Array
    residual: Array
    converged: Array

    def value(self, belief: Array) -> Array:
        """The bound, `[]`, at a belief `[S]`."""
        return sawtooth(self.beliefs, self.values, belief)


def point_based_backup(pomdp: POMDP, vectors: Array, belief: Array) -> tuple[Array, Array]:
    """The best plan at one belief that goes on by one of `vectors` after each observation.

    alpha_a(s) = r(s, a) + discount sum_{s', o} P(s' | s, a) O(o | a, s') alpha_{k(a, o)}(s'), where
    k(a, o) is the best of `vectors` at the belief that follows `a` and `o`.

    Args:
      pomdp: the problem.
      vectors: `[K, S]`.
      belief: `[S]`.

    Returns:
      The vector `[S]` and its action `[]` int32.

    Source: Pineau, Gordon & Thrun (2003), "Point-based value iteration: an anytime algorithm for
      POMDPs", section 3.
    """
    mdp, model = pomdp.mdp, Model.of(pomdp.mdp)
    # Not divided by its probability, a following belief already carries it.
    score = jnp.einsum("aos,ks->aok", beliefs_of.successors(pomdp, belief), vectors)
    values = belief @ model.reward + mdp.discount * jnp.sum(jnp.max(score, -1), -1)
    action = greedy(values)
    following = vectors[jnp.argmax(score[action], axis=-1)]
    onward = jnp.einsum("so,os->s", pomdp.observation[action], following)
    return (
        model.reward[:, action] + model.discount * (mdp.transition[:, action] @ onward),
        action,
    )


def point_based_value_iteration(
    pomdp: POMDP,
    beliefs: Array,
    *,
    tolerance: float | Array = 1e-6,
    max_iterations: int | Array = 10_000,
) -> PointBased:
    """A lower bound on V*, tight at the given beliefs, by backups at each of them in turn.

    It starts from the blind policies. A new plan replaces that of a belief only where it is no
    worse there, so that the value at every belief rises from sweep to sweep.

    Args:
      pomdp: the problem, of discount below 1.
      beliefs: `[K, S]`, see `belief.belief_grid` and `belief.reachable_beliefs`.
      tolerance: of the residual, or the rounding error if that is larger.
      max_iterations: most sweeps.

    Returns:
      A `PointBased` of K plans. Wherever it stops, V is the value of plans, hence at most V*.

    Source: Pineau, Gordon & Thrun (2003); that a plan is kept unless its belief gains is, for one
      belief at a time, the rule of Spaan & Vlassis (2005), "Perseus".
    """
    model = Model.of(pomdp.mdp)
    backup = jax.vmap(lambda vectors, belief: point_based_backup(pomdp, vectors, belief), (None, 0))

    def at_own(vectors: Array) -> Array:
        return jnp.einsum("ks,ks->k", vectors, beliefs)

    def sweep(plans: AlphaVectors) -> tuple[AlphaVectors, Array]:
        vectors, actions = backup(plans.vectors, beliefs)
        gain = at_own(vectors) - at_own(jnp.asarray(plans.vectors))
        kept = gain < 0
        better = AlphaVectors(
            jnp.where(kept[:, None], plans.vectors, vectors),
            jnp.where(kept, plans.actions, actions),
        )
        return better, jnp.max(jnp.abs(jnp.where(kept, 0, gain)))

    blind = beliefs_of.blind_policies(pomdp)
    first = greedy(beliefs @ blind.T)
    found = beliefs_of.settle(
        sweep,
        AlphaVectors(blind[first], first),
        lambda plans: model.threshold(tolerance, plans.vectors),
        max_iterations,
    )
    return PointBased(found.state, found.iterations, found.residual, found.converged)


def sawtooth(beliefs: Array, values: Array, belief: Array) -> Array:
    """The upper bound at `belief` that its values at other beliefs give, V* being convex.

    Between the plane through the values at certainty (the first S of `beliefs`) and one other
    belief the bound is linear; it is the lowest over those others.

    Args:
      beliefs: `[S + N, S]`, the first S the unit vectors.
      values: `[S + N]`, upper bounds there.
      belief: `[S]`, or a multiple of one, for which the bound is the same multiple.

    Returns:
      `[]`.

    Source: Hauskrecht (2000), "Value-function approximations for partially observable Markov
      decision processes", the simplified grid interpolation; Smith & Simmons (2004), "Heuristic
      search value iteration for POMDPs".
    """
    corners = values[: belief.size]
    depth = jnp.minimum(values - beliefs @ corners, 0)
    inside = beliefs > 0
    ratio = jnp.where(inside, belief[None] / jnp.where(inside, beliefs, 1), jnp.inf)
    return belief @ corners + jnp.min(jnp.min(ratio, axis=-1) * depth)


def sawtooth_bound(
    pomdp: POMDP,
    beliefs: Array,
    *,
    tolerance: float | Array = 1e-6,
    max_iterations: int | Array = 10_000,
) -> Sawtooth:
    """An upper bound on V*, by backups of `sawtooth` at the given beliefs, down from FIB.

    Args:
      pomdp: the problem, of discount below 1.
      beliefs: `[N, S]`; where the successors of a belief are among them nothing is interpolated.
      tolerance: of the residual, or the rounding error if that is larger.
      max_iterations: most sweeps.

    Returns:
      A `Sawtooth`; an upper bound wherever it stops.

    Source: as `sawtooth`.
    """
    mdp, model = pomdp.mdp, Model.of(pomdp.mdp)
    points = jnp.concatenate([jnp.eye(mdp.num_states, dtype=model.reward.dtype), beliefs])

    def backup(values: Array, belief: Array) -> Array:
        bound = jax.vmap(jax.vmap(lambda following: sawtooth(points, values, following)))
        onward = jnp.sum(bound(beliefs_of.successors(pomdp, belief)), axis=-1)
        return jnp.max(belief @ model.reward + mdp.discount * onward)

    def sweep(values: Array) -> tuple[Array, Array]:
        lower = jnp.minimum(values, jax.vmap(backup, (None, 0))(values, points))
        return lower, jnp.max(values - lower)

    q = beliefs_of.fast_informed_bound(pomdp, tolerance=tolerance).q
    found = beliefs_of.settle(
        sweep,
        jax.vmap(beliefs_of.q_bound, (None, 0))(q, points),
        lambda values: model.threshold(tolerance, values),
        max_iterations,
    )
    return Sawtooth(points, found.state, found.iterations, found.residual, found.converged)


# Enumeration, on the host


def exact_backup(pomdp: POMDP, vectors: Array | Vectors) -> AlphaVectors:
    """All useful plans that go on by one of `vectors` after each observation: V -> H V.

    For each action the sums over observations of what may follow, pruned after each observation.

    Args:
      pomdp: the problem.
      vectors: `[K, S]`.

    Returns:
      The plans, NumPy float64; the number of sums is at most A K^O before pruning.

    Source: Cassandra, Littman & Zhang (1997), "Incremental pruning: a simple, fast, exact method
      for partially observable Markov decision processes".
    """
    mdp = pomdp.mdp
    alive = ~np.asarray(mdp.terminal)[:, None]
    reward = np.asarray(mdp.expected_reward(), np.float64) * alive
    transition = np.asarray(mdp.transition, np.float64) * alive[..., None]
    observation = np.asarray(pomdp.observation, np.float64)
    discount, vectors = float(mdp.discount), np.asarray(vectors, np.float64)
    plans, actions = [], []
    for action in range(mdp.num_actions):
        sums = reward[None, :, action]
        for seen in observation[action].T:
            following = discount * (vectors * seen) @ transition[:, action].T
            following = following[prune(following)]
            sums = (sums[:, None] + following[None]).reshape(-1, len(alive))
            sums = sums[prune(sums)]
        plans.append(sums)
        actions.append(np.full(len(sums), action, np.int32))
    vectors = np.concatenate(plans)
    useful = prune(vectors)
    return AlphaVectors(vectors[useful], np.concatenate(actions)[useful])


def finite_horizon(pomdp: POMDP, horizon: int) -> list[AlphaVectors]:
    """The optimal plans with 1, 2, ... `horizon` steps to go, exactly.

    Args:
      pomdp: the problem; any discount will do, 1 too.
      horizon: at least 1.

    Returns:
      `horizon` sets of plans; the last gives the value and first action of the whole.

    Source: Smallwood & Sondik (1973), "The optimal control of partially observable Markov processes
      over a finite horizon".
    """
    found: list[AlphaVectors] = []
    vectors: Array | Vectors = np.zeros((1, pomdp.mdp.num_states))
    for _ in range(horizon):
        found.append(exact_backup(pomdp, vectors))
        vectors = found[-1].vectors
    return found


def bellman_excess(pomdp: POMDP, vectors: Array | Vectors) -> float:
    """max over ALL beliefs of (H V)(b) - V(b), at least 0, with V the maximum of `vectors`.

    If V is a lower bound on V*, then V <= V* <= V + excess / (1 - discount) everywhere: where
    the excess is 0 a point-based solution is the exact one.
    """
    vectors = np.asarray(vectors, np.float64)
    vectors = vectors[prune(vectors)]
    improved = exact_backup(pomdp, vectors).vectors
    return max(0.0, *(_margin(np.asarray(plan), vectors)[0] for plan in improved))


def prune(vectors: Vectors) -> NDArray[np.intp]:
    """The indices, ascending, of the fewest `vectors` `[K, S]` with the same maximum everywhere.

    First what another vector reaches in every state is left out, then, by one linear program a
    vector, what the others reach together. Of equal vectors the first stays.

    Source: the filter of Lark, in White (1991), "A survey of solution techniques for the partially
      observed Markov decision process".

    >>> prune(np.array([[1.0, 0.0], [0.0, 1.0], [0.4, 0.4], [0.6, 0.6], [1.0, -1.0]])).tolist()
    [0, 1, 3]
    """
    slack = _NEGLIGIBLE * max(1.0, float(np.abs(vectors).max()))
    candidates: list[int] = []
    # From the largest sum down, no vector is dominated by a later one, unless they are equal.
    for index in np.argsort(-vectors.sum(axis=1), kind="stable"):
        if not np.any(np.all(vectors[candidates] >= vectors[index] - slack, axis=1)):
            candidates.append(int(index))
    if len(candidates) <= 2:
        return np.array(sorted(candidates))
    kept = _best_at(vectors, candidates, np.eye(vectors.shape[1]))
    waiting = [index for index in candidates if index not in kept]
    while waiting:
        margin, belief = _margin(vectors[waiting[0]], vectors[sorted(kept)])
        if margin <= slack:
            waiting.pop(0)
            continue
        (best,) = _best_at(vectors, waiting, belief[None])
        kept.add(best)
        waiting.remove(best)
    return np.array(sorted(kept))


def _best_at(vectors: Vectors, among: list[int], beliefs: Iterable[Vectors]) -> set[int]:
    """Those of `among` that are best at some of `beliefs`."""
    return {among[int(np.argmax(vectors[among] @ belief))] for belief in beliefs}


def _margin(vector: Vectors, others: Vectors) -> tuple[float, Vectors]:
    """By how much `vector` beats all `others` `[K, S]` at most, over all beliefs, and where.

    max d over (b, d) such that (others_k - vector) . b + d <= 0 for all k, b a belief.
    """
    from scipy.optimize import linprog

    num_states = vector.size
    found = linprog(
        np.append(np.zeros(num_states), -1.0),
        A_ub=np.hstack([others - vector, np.ones((len(others), 1))]),
        b_ub=np.zeros(len(others)),
        A_eq=np.append(np.ones(num_states), 0.0)[None],
        b_eq=np.ones(1),
        bounds=[(0, None)] * num_states + [(None, None)],
        method="highs",
    )
    belief = found.x[:-1]
    return float(belief @ vector - (others @ belief).max()), belief
