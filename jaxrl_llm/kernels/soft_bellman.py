"""Entropy-regularised Bellman equations: reward plus temperature · entropy of the policy (nats).

The optimum is a softmax policy, unique and never quite greedy; as the temperature goes to 0 it
becomes the optimum of `bellman`. It is what soft actor-critic learns.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.kernels import exploration
from jaxrl_llm.kernels.fixed_point import Model, Problem, average, successive_approximation
from jaxrl_llm.types import Array


class SoftSolution(NamedTuple):
    """As `Solution`, with a policy of probabilities."""

    value: Array  # [S], entropy included
    q: Array  # [S, A], without the entropy of the action itself
    policy: Array  # [S, A], softmax(q / temperature) over allowed actions
    iterations: Array  # [] int32
    residual: Array  # [], sup-norm of the soft Bellman equation at `value`
    converged: Array  # [] bool


def soft_value(q: Array, temperature: float | Array, action_mask: Array | None = None) -> Array:
    """temperature · log Σ_a exp(q(a) / temperature) over allowed actions, `[..., A]` -> `[...]`."""
    return temperature * jax.nn.logsumexp(q / temperature, axis=-1, where=action_mask)


def soft_value_iteration(
    mdp: Problem,
    *,
    temperature: float | Array,
    tolerance: float | Array = 1e-6,
    max_iterations: int | Array = 100_000,
) -> SoftSolution:
    """The fixed point of V = temperature · log Σ_a exp(Q(V) / temperature), by sweeps from 0.

    Args:
      mdp: the problem. The value of a terminal state is 0: nothing is chosen there.
      temperature: of the entropy bonus, greater than 0, in units of reward a nat.
      tolerance: of the residual.
      max_iterations: most sweeps.

    Returns:
      A `SoftSolution`; `iterations` counts sweeps.

    Source: Haarnoja et al. (2017), "Reinforcement learning with deep energy-based policies",
      arXiv:1702.08165, soft Q-iteration of section 3 with a temperature.
    """
    model = Model.of(mdp)

    def backup(q: Array) -> Array:
        return jnp.where(mdp.terminal, 0, soft_value(q, temperature, mdp.action_mask))

    solution = successive_approximation(model, backup, tolerance, max_iterations)
    return SoftSolution(
        value=solution.value,
        q=solution.q,
        policy=_softmax(mdp, solution.q, temperature),
        iterations=solution.iterations,
        residual=solution.residual,
        converged=solution.converged,
    )


def soft_policy_evaluation(
    mdp: Problem,
    policy: Array,
    *,
    temperature: float | Array,
    tolerance: float | Array = 1e-6,
) -> SoftSolution:
    """V = E_{a ~ policy}[Q(a) - temperature · log policy(a)], by solving the linear system.

    Args:
      mdp: the problem.
      policy: probabilities `[S, A]`.
      temperature: as in `soft_value_iteration`; 0 gives `bellman.policy_evaluation`'s value, but
        no softmax policy.
      tolerance: of the residual.

    Returns:
      A `SoftSolution`: `value` is the policy's, `policy` the soft improvement on it. `converged`
      is False, and `value` 0, where discount 1 meets a policy that never ends.

    Source: Haarnoja et al. (2018), "Soft actor-critic", arXiv:1801.01290, equations 2 and 3.
    """
    model = Model.of(mdp)
    entropy = jnp.where(mdp.terminal, 0, jnp.sum(jax.scipy.special.entr(policy), axis=-1))
    bonus = temperature * entropy
    value = model._replace(reward=model.reward + bonus[:, None]).solve(policy).value
    q = model.look_ahead(value)
    residual = jnp.max(jnp.abs(average(q, policy) + bonus - value))
    return SoftSolution(
        value=value,
        q=q,
        policy=_softmax(mdp, q, temperature),
        iterations=jnp.int32(1),
        residual=residual,
        converged=residual <= model.threshold(tolerance, value),
    )


def _softmax(mdp: Problem, q: Array, temperature: float | Array) -> Array:
    law = jax.vmap(exploration.boltzmann, in_axes=(0, None, 0))
    return law(q, temperature, mdp.action_mask)
