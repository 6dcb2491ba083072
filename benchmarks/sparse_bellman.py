"""A million states x 4 actions x 4 successors, solved and evaluated to a residual of 1e-6.

The matrix of one policy would take 8 TB. Two kinds of problem: a garnet, whose successors lie
anywhere, so that every read of a value misses the caches but the chain mixes in a few steps; and a
random geometric one, whose successors lie near, so that values diffuse slowly over the plane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.bellman import in_float64
from benchmarks.harness import Case, Peer
from jaxrl_llm.kernels import bellman
from jaxrl_llm.types import Solution, SuccessorMDP

SIDE = 1000  # of the plane of states
NUM_ACTIONS = 4
NUM_SUCCESSORS = 4
REACH = 10  # of one step, in either direction
DISCOUNT = 0.99
TOLERANCE = 1e-6


def cases() -> Iterable[Case]:
    """The two solvers that form no matrix of a policy, and the evaluation that forms none."""
    for kind, successors in (("garnet", _anywhere), ("geometric", _nearby)):
        problem = _problem(successors)
        solvers: dict[str, Callable[..., Solution]] = {
            "inexact-policy-iteration": bellman.inexact_policy_iteration,
            "modified-policy-iteration": bellman.modified_policy_iteration,
        }
        for name, solver in solvers.items():
            yield Case(
                name=f"million-{kind}-{name}-float64",
                function=in_float64(partial(solver, tolerance=TOLERANCE)),
                arguments=(problem,),
                items=1,
                unit="solutions",
                # On the geometric problem it takes minutes.
                peer=partial(_quantecon, problem) if kind == "garnet" else None,
                agree=_within_tolerance,
            )
        uniform = np.full((SIDE * SIDE, NUM_ACTIONS), 1 / NUM_ACTIONS)
        evaluate = partial(bellman.krylov_policy_evaluation, tolerance=TOLERANCE)
        yield Case(
            name=f"million-{kind}-krylov-policy-evaluation-float64",
            function=in_float64(evaluate),
            arguments=(problem, uniform),
            items=1,
            unit="solutions",
        )


def _quantecon(problem: SuccessorMDP) -> Peer:
    # Its values are within half its epsilon, ours within residual / (1 - discount).
    epsilon = 2 * TOLERANCE / (1 - DISCOUNT)
    return peers.quantecon([problem], method="modified_policy_iteration", tolerance=epsilon)


def _within_tolerance(ours: Solution, theirs: list[Any]) -> None:
    assert ours.converged
    np.testing.assert_allclose(ours.value, theirs[0].v, rtol=0, atol=2 * TOLERANCE / (1 - DISCOUNT))


def _anywhere(random: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    return random.integers(shape[0], size=shape, dtype=np.int32)


def _nearby(random: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    row, column = np.divmod(np.arange(shape[0], dtype=np.int32)[:, None, None], SIDE)
    down, right = random.integers(-REACH, REACH + 1, size=(2, *shape), dtype=np.int32)
    return np.clip(row + down, 0, SIDE - 1) * SIDE + np.clip(column + right, 0, SIDE - 1)


def _problem(successors: Callable[..., np.ndarray]) -> SuccessorMDP:
    """Uniform random laws; one reward in a hundred is not 0, so that values must travel."""
    random = np.random.default_rng(0)
    shape = (SIDE * SIDE, NUM_ACTIONS, NUM_SUCCESSORS)
    # Sorted, so that a row reads the values in order.
    successor = np.sort(successors(random, shape), axis=-1).reshape(-1, NUM_SUCCESSORS)
    probability = random.random(successor.shape)
    probability /= probability.sum(-1, keepdims=True)
    reward = random.random(len(successor)) * (random.random(len(successor)) < 0.01)
    with jax.enable_x64(True):
        return SuccessorMDP(
            successor=jnp.asarray(successor),
            probability=jnp.asarray(probability),
            reward=jnp.asarray(np.repeat(reward[:, None], NUM_SUCCESSORS, axis=1)),
            row=jnp.arange(len(successor), dtype=jnp.int32).reshape(shape[:2]),
            discount=jnp.asarray(DISCOUNT, jnp.float64),
            initial=jnp.full(shape[:1], 1 / shape[0]),
            terminal=jnp.zeros(shape[:1], bool),
            action_mask=jnp.ones(shape[:2], bool),
        )
