"""Whole trainings by DQN, beside purejaxrl at the configuration that it publishes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.harness import Case
from jaxrl_llm.agents import dqn
from jaxrl_llm.envs import gymnax_adapter
from jaxrl_llm.nn.critics import QNetwork
from jaxrl_llm.training import loop
from jaxrl_llm.types import Algorithm, Array, Discrete, Key

# The defaults of `dqn.Config` ARE purejaxrl's published ones: 10 environments, an update of 128
# transitions after each step of all, from 10,000 remembered, once 10,000 are; a copy for a target
# after 50 updates; Adam at 2.5e-4. Its 5e5 steps are the warm-up's and those of 980 x 50.
CARTPOLE = dqn.Config()
NUM_ITERATIONS = 980
HIDDEN_SIZES = (120, 84)
SOLVED = 475.0
LAST_STEPS = 1_000  # of all environments: 20 of our iterations, and what the peer is judged by


def cases() -> Iterable[Case]:
    """CartPole, one seed beside the peer and four at once."""
    environment = gymnax_adapter.from_gymnax("CartPole-v1")
    assert isinstance(environment.action_space, Discrete)
    network = QNetwork(environment.action_space.num, HIDDEN_SIZES)
    cartpole = dqn.make(CARTPOLE, environment, network)
    yield _case("cartpole-1-seed", cartpole, 1, peer=peers.purejaxrl_dqn, agree=_solved)
    yield _case("cartpole-4-seeds", cartpole, 4)


def _case(name: str, algorithm: Algorithm, num_seeds: int, **comparison: Any) -> Case:
    steps = CARTPOLE.warmup_steps + NUM_ITERATIONS * CARTPOLE.num_steps
    return Case(
        name=name,
        function=jax.jit(partial(final_return, algorithm, num_seeds)),
        arguments=(jax.random.key(0),),
        items=num_seeds * steps * CARTPOLE.num_environments,
        unit="steps",
        **comparison,
    )


def final_return(algorithm: Algorithm, num_seeds: int, key: Key) -> Array:
    """The mean return `[seeds]` of the episodes that ended in the last steps of a training."""
    # One seed needs no axis of seeds, and matrix products with one are slower.
    learners = algorithm if num_seeds == 1 else loop.over_seeds(algorithm, num_seeds)
    init_key, step_key = jax.random.split(key)

    def body(state: Any, step: Array) -> tuple[Any, Any]:
        state, metrics = learners.step(jax.random.fold_in(step_key, step), state)
        return state, metrics["episode_return"]

    _, episodes = jax.lax.scan(body, learners.init(init_key), jnp.arange(NUM_ITERATIONS))
    last = LAST_STEPS // CARTPOLE.num_steps
    return jax.tree.map(lambda leaf: jnp.sum(leaf[-last:], axis=0), episodes).mean


def _solved(ours: Array, theirs: Any) -> None:
    peer = np.asarray(theirs["metrics"]["returns"])[-LAST_STEPS:].mean()
    assert np.mean(ours) >= SOLVED, f"our final return is {np.mean(ours):.1f}"
    assert peer >= SOLVED, f"the peer's final return is {peer:.1f}"
