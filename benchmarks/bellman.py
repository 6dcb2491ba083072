"""Exact solutions of Markov decision processes, beside QuantEcon and pymdptoolbox."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.harness import Case, Peer
from jaxrl_llm.envs import icu_sepsis
from jaxrl_llm.kernels import bellman
from jaxrl_llm.types import MDP, Solution, SuccessorMDP

DISCOUNT = 0.99
# QuantEcon's values are within half its epsilon. Ours are within residual / (1 - discount).
EPSILON = 1e-6
TOLERANCE = EPSILON / 2 * (1 - DISCOUNT)
NUM_PROBLEMS = 1000
NUM_SWEEPS = 20


def cases() -> Iterable[Case]:
    """ICU-Sepsis, large dense problems, and batches of small ones."""
    yield from _icu_sepsis()
    yield from _dense()
    yield from _bandwidth()
    yield from _batches()


def _icu_sepsis() -> Iterable[Case]:
    """The same sparse problem for both, with all 25 actions and with the admissible ones."""
    with jax.enable_x64(True):
        masked = bellman.successor_form(icu_sepsis.mdp(discount=DISCOUNT))
        free = dataclasses.replace(masked, action_mask=jnp.ones_like(masked.action_mask))
    for name, problem in (("all-actions", free), ("admissible", masked)):
        yield Case(
            name=f"icu-sepsis-{name}-float64",
            function=in_float64(partial(bellman.inexact_policy_iteration, tolerance=TOLERANCE)),
            arguments=(problem,),
            items=1,
            unit="solutions",
            peer=partial(_sparse_peer, problem),
            agree=_same_values,
        )


def _sparse_peer(problem: SuccessorMDP) -> Any:
    return peers.quantecon([problem], method="modified_policy_iteration", tolerance=EPSILON)


def _dense() -> Iterable[Case]:
    """1000 states x 10 actions, by sweeps that are bound by memory and by fewer of them."""
    with jax.enable_x64(True):
        problem = _random_problem(1000, 10, np.float64)
    transition_bytes = problem.transition.nbytes
    methods: list[Literal["value_iteration", "modified_policy_iteration"]]
    methods = ["value_iteration", "modified_policy_iteration"]
    for method in methods:
        yield Case(
            name=f"dense-1000x10-{method.replace('_', '-')}-float64",
            function=in_float64(partial(getattr(bellman, method), tolerance=TOLERANCE)),
            arguments=(problem,),
            items=1,
            unit="solutions",
            peer=partial(peers.quantecon, [problem], method=method, tolerance=EPSILON),
            agree=_same_values,
            work=lambda solution: {"streamed_bytes": transition_bytes * int(solution.iterations)},
        )
    yield Case(
        name="dense-1000x10-modified-policy-iteration-float64-mdptoolbox",
        function=in_float64(partial(bellman.modified_policy_iteration, tolerance=TOLERANCE)),
        arguments=(problem,),
        items=1,
        unit="solutions",
        peer=partial(
            peers.mdptoolbox, problem, solver="PolicyIterationModified", tolerance=EPSILON
        ),
        agree=lambda ours, theirs: np.testing.assert_array_equal(ours.policy, theirs.policy),
    )


def _bandwidth() -> Iterable[Case]:
    """3000 states x 8 actions, 576 MB of float64: a sweep takes what reading them takes."""
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype is np.float64):
            problem = _random_problem(3000, 8, dtype)
        solve = partial(bellman.value_iteration, tolerance=0.0, max_iterations=NUM_SWEEPS)
        transition_bytes = problem.transition.nbytes
        yield Case(
            name=f"dense-3000x8-{NUM_SWEEPS}-sweeps-{np.dtype(dtype).name}",
            function=in_float64(solve) if dtype is np.float64 else jax.jit(solve),
            arguments=(problem,),
            items=NUM_SWEEPS,
            unit="sweeps",
            peer=partial(_numpy_sweeps, problem),
            agree=lambda ours, theirs: np.testing.assert_allclose(ours.value, theirs, rtol=1e-4),
            work=lambda solution, size=transition_bytes: {
                "streamed_bytes": size * int(solution.iterations)
            },
        )


def _numpy_sweeps(problem: MDP) -> Peer:
    rows = np.asarray(problem.transition).reshape(-1, problem.num_states)
    reward, discount = np.asarray(problem.reward)[..., 0], np.asarray(problem.discount)

    def sweeps() -> np.ndarray:
        value = np.zeros(problem.num_states, rows.dtype)
        for _ in range(NUM_SWEEPS):
            value = (reward + discount * (rows @ value).reshape(reward.shape)).max(-1)
        return value

    return Peer("NumPy", sweeps)


def _batches() -> Iterable[Case]:
    """1000 problems of 50 states x 5 actions in one call, against one call each."""
    for successors, kind in ((50, "random"), (5, "garnet")):
        for dtype in (np.float64, np.float32):
            with jax.enable_x64(dtype is np.float64):
                problems = _random_problems(NUM_PROBLEMS, 50, 5, dtype, successors)
            tolerance = TOLERANCE if dtype is np.float64 else 1e-6
            solve = jax.vmap(partial(bellman.modified_policy_iteration, tolerance=tolerance))
            yield Case(
                name=f"batch-{NUM_PROBLEMS}-{kind}-50x5-{np.dtype(dtype).name}",
                function=in_float64(solve) if dtype is np.float64 else jax.jit(solve),
                arguments=(problems,),
                items=NUM_PROBLEMS,
                unit="solutions",
                peer=partial(_batch_peer, problems),
                agree=_same_values,
            )


def _batch_peer(problems: MDP) -> Any:
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], problems) for i in range(NUM_PROBLEMS)]
    return peers.quantecon(each, method="policy_iteration", tolerance=EPSILON)


def in_float64(solve: Callable[..., Solution]) -> Callable[..., Solution]:
    """`solve`, jitted, with 64-bit types enabled around the call and not inside the program."""
    jitted = jax.jit(solve)

    def call(*arguments: Any) -> Solution:
        with jax.enable_x64(True):
            return jitted(*arguments)

    return call


def _same_values(ours: Solution, theirs: list[Any]) -> None:
    value = np.reshape(ours.value, (len(theirs), -1))
    tolerance = EPSILON if value.dtype == np.float64 else 5e-4 * np.abs(value).max()
    expected = np.stack([result.v for result in theirs])
    np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance)


def _random_problem(num_states: int, num_actions: int, dtype: Any) -> MDP:
    return jax.tree.map(lambda leaf: leaf[0], _random_problems(1, num_states, num_actions, dtype))


def _random_problems(
    num_problems: int, num_states: int, num_actions: int, dtype: Any, successors: int | None = None
) -> MDP:
    """Uniform random laws over `successors` states a row (all of them by default), `[N, ...]`."""
    random = np.random.default_rng(0)
    shape = (num_problems, num_states, num_actions)
    weight = random.random((*shape, num_states))
    if successors is not None and successors < num_states:
        rank = np.argsort(np.argsort(random.random(weight.shape), axis=-1), axis=-1)
        weight = np.where(rank < successors, weight, 0)
    transition = weight / weight.sum(-1, keepdims=True)
    return MDP(
        transition=jnp.asarray(transition, dtype),
        reward=jnp.asarray(random.random((*shape, 1)), dtype),
        discount=jnp.full(num_problems, DISCOUNT, dtype),
        initial=jnp.full(shape[:2], 1 / num_states, dtype),
        terminal=jnp.zeros(shape[:2], bool),
        action_mask=jnp.ones(shape, bool),
    )
