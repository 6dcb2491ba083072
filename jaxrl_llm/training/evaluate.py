"""How good a policy is: exactly where the problem is known, by sampling with an interval elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.envs.core import BatchPolicy
from jaxrl_llm.kernels import bellman
from jaxrl_llm.types import MDP, Array, Environment, Key, PyTree, SuccessorMDP


def exact_return(mdp: MDP | SuccessorMDP, policy: Array) -> Array:
    """E[sum_t discount^t r_t] from the law of the first state, with no sampling error.

    With `vmap` over policies and `MDP` it is the exact learning curve of every seed at once.

    Args:
      mdp: the problem; its discount is the one that counts.
      policy: action probabilities `[S, A]`, or one action a state `[S]` (integers).

    Returns:
      `[]`.
    """
    return mdp.initial @ bellman.policy_evaluation(mdp, policy).value


def exact_returns(mdp: MDP | SuccessorMDP, policies: Mapping[str, Array]) -> dict[str, Array]:
    """`exact_return` of each of several policies, by name."""
    return {name: exact_return(mdp, policy) for name, policy in policies.items()}


@struct.dataclass(kw_only=True)
class Estimate:
    """A mean over episodes with its confidence interval.

    Attributes:
      mean: `[]`.
      low: `[]`, lower end of the interval.
      high: `[]`, upper end.
      standard_error: `[]`.
      unfinished: `[]`, fraction of episodes cut at `max_steps`; what they would still have earned
        is in neither mean nor interval.
    """

    mean: Array
    low: Array
    high: Array
    standard_error: Array
    unfinished: Array


def monte_carlo_return(
    environment: Environment,
    policy: BatchPolicy,
    key: Key,
    *,
    num_episodes: int,
    max_steps: int,
    discount: float = 1.0,
    confidence: float = 0.95,
    params: PyTree | None = None,
) -> Estimate:
    """The mean return of exactly one episode in each of `num_episodes` environments.

    Environments that finish early wait: counting the episodes that fit into a fixed number of
    steps would favour short ones.

    Args:
      environment: of one patient.
      policy: as in `envs.core.rollout`.
      key: consumed.
      num_episodes: at least 2.
      max_steps: steps after which an episode is cut.
      discount: of the return.
      confidence: of the interval (normal approximation), in (0, 1).
      params: the environment's parameters; its defaults when None.

    Raises:
      ValueError: if a number is out of range.
    """
    checks.at_least("num_episodes", num_episodes, 2)
    checks.at_least("max_steps", max_steps, 1)
    checks.between("discount", discount, 0, 1)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be between 0 and 1")
    params = environment.default_params if params is None else params
    reset_key, steps_key = jax.random.split(key)
    state, observation = jax.vmap(environment.reset, in_axes=(0, None))(
        jax.random.split(reset_key, num_episodes), params
    )

    def body(carry: tuple, key: Key) -> tuple[tuple, None]:
        state, observation, total, weight, alive = carry
        policy_key, environment_key = jax.random.split(key)
        mask = None
        if environment.action_mask is not None:
            mask = jax.vmap(environment.action_mask, in_axes=(0, None))(state, params)
        action, _ = policy(policy_key, observation, mask)
        keys = jax.random.split(environment_key, num_episodes)
        state, step = jax.vmap(environment.step, in_axes=(0, 0, 0, None))(
            keys, state, action, params
        )
        total = total + jnp.where(alive, weight * step.reward, 0)
        alive = alive & ~(step.terminated | step.truncated)
        return (state, step.observation, total, weight * discount, alive), None

    start = (
        state,
        observation,
        jnp.zeros(num_episodes),
        jnp.float32(1),
        jnp.ones(num_episodes, bool),
    )
    (_, _, total, _, alive), _ = jax.lax.scan(body, start, jax.random.split(steps_key, max_steps))
    mean = jnp.mean(total)
    error = jnp.std(total, ddof=1) / math.sqrt(num_episodes)
    margin = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return Estimate(
        mean=mean,
        low=mean - margin,
        high=mean + margin,
        standard_error=error,
        unfinished=jnp.mean(alive),
    )
