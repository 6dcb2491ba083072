"""How good a policy or a solver is.

A policy's return is exact where the problem is known, and sampled with an interval elsewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import NDArray

from jaxrl_llm import checks
from jaxrl_llm.envs.core import BatchPolicy
from jaxrl_llm.kernels import bellman
from jaxrl_llm.types import MDP, Array, Environment, Key, PyTree, Solution, SuccessorMDP

SOLVERS: dict[str, Callable[..., Solution]] = {
    "value_iteration": bellman.value_iteration,
    "policy_iteration": bellman.policy_iteration,
    "modified_policy_iteration": bellman.modified_policy_iteration,
    "inexact_policy_iteration": bellman.inexact_policy_iteration,
}
NUM_RESIDUALS = 50
_MAX_ITERATIONS = 100_000
_NUM_REPETITIONS = 3


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
    # Not one program for all: a dict that leaves `jit` is in alphabetical order.
    compiled = jax.jit(exact_return)
    return {name: compiled(mdp, policy) for name, policy in policies.items()}


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


@struct.dataclass(kw_only=True)
class SolverRun:
    """What a solver found and what that took, as NumPy arrays.

    Attributes:
      solution: of the problem.
      start_value: `[]`, the value of the law of the first state.
      residuals: `[K]`, after 1, 2, ... K iterations; NaN after the last one.
      milliseconds: `[]`, of the compiled solver, the median of a few solves.
      compile_seconds: `[]`.
    """

    solution: Solution
    start_value: NDArray[np.float64]
    residuals: NDArray[np.float64]
    milliseconds: NDArray[np.float64]
    compile_seconds: NDArray[np.float64]

    @classmethod
    def empty(cls, mdp: MDP | SuccessorMDP) -> SolverRun:
        """Zeros, with the shapes and dtypes of every run on `mdp`."""
        shapes = jax.eval_shape(bellman.value_iteration, mdp)
        return cls(
            solution=jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes),
            start_value=np.zeros(()),
            residuals=np.zeros(NUM_RESIDUALS),
            milliseconds=np.zeros(()),
            compile_seconds=np.zeros(()),
        )

    def history(self) -> NDArray[np.float64]:
        """The residuals, without the places left empty after the last iteration."""
        return self.residuals[np.isfinite(self.residuals)]

    def metrics(self) -> dict[str, Any]:
        """The numbers that fit in a line of a log or a table."""
        return {
            "value": self.start_value,
            "iterations": self.solution.iterations,
            "residual": self.solution.residual,
            "converged": self.solution.converged,
            "milliseconds": self.milliseconds,
            "compile_seconds": self.compile_seconds,
        }


def run_solver(
    solver: Callable[..., Solution], mdp: MDP | SuccessorMDP, tolerance: float
) -> SolverRun:
    """Solves a problem to the end, and again with at most 1, 2, 3, ... iterations.

    One program serves it all, since the number of iterations is an argument. Not for use in jit.

    Args:
      solver: one of `SOLVERS`.
      mdp: the problem.
      tolerance: of the Bellman residual.
    """

    def solve(mdp: MDP | SuccessorMDP, max_iterations: Array) -> Solution:
        return solver(mdp, tolerance=tolerance, max_iterations=max_iterations)

    started = time.perf_counter()
    program = jax.jit(solve).lower(mdp, jnp.int32(0)).compile()
    compile_seconds = time.perf_counter() - started

    solution, seconds = program(mdp, jnp.int32(_MAX_ITERATIONS)), []
    for _ in range(_NUM_REPETITIONS):
        started = time.perf_counter()
        jax.block_until_ready(program(mdp, jnp.int32(_MAX_ITERATIONS)))
        seconds.append(time.perf_counter() - started)

    residuals = np.full(NUM_RESIDUALS, np.nan)
    for index in range(min(max(int(solution.iterations), 1), NUM_RESIDUALS)):
        residuals[index] = program(mdp, jnp.int32(index + 1)).residual
    return SolverRun(
        solution=jax.device_get(solution),
        start_value=np.array(mdp.initial @ solution.value, np.float64),
        residuals=residuals,
        milliseconds=np.array(1e3 * np.median(seconds)),
        compile_seconds=np.array(compile_seconds),
    )
