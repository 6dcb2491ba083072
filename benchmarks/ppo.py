"""Whole trainings by PPO, beside purejaxrl at the configuration that it publishes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.harness import Case
from jaxrl_llm.agents import ppo
from jaxrl_llm.envs import gymnax_adapter, icu_sepsis
from jaxrl_llm.nn.heads import ActorCritic, TabularActorCritic
from jaxrl_llm.training import loop
from jaxrl_llm.types import Algorithm, Array, Discrete, Key

# The defaults of `ppo.Config` ARE purejaxrl's published ones: 4 environments x 128 steps, 4 epochs
# of 4 minibatches, 976 iterations, Adam at 2.5e-4 falling to 0, two towers of 2 x 64 tanh.
CARTPOLE = ppo.Config()
ICU_SEPSIS = ppo.Config(num_environments=512, num_steps=32, num_iterations=20)
SOLVED = 475.0
LAST_ITERATIONS = 20


def cases() -> Iterable[Case]:
    """CartPole, one seed beside the peer and eight at once; ICU-Sepsis, ten at once."""
    environment = gymnax_adapter.from_gymnax("CartPole-v1")
    cartpole = ppo.make(CARTPOLE, environment, ActorCritic(Discrete(num=2)))
    yield _case("cartpole-1-seed", cartpole, CARTPOLE, 1, peer=peers.purejaxrl_ppo, agree=_solved)
    yield _case("cartpole-8-seeds", cartpole, CARTPOLE, 8)
    icu = ppo.make(ICU_SEPSIS, icu_sepsis.make(), TabularActorCritic(716, 25))
    yield _case("icu-sepsis-10-seeds", icu, ICU_SEPSIS, 10)


def _case(
    name: str, algorithm: Algorithm, config: ppo.Config, num_seeds: int, **comparison: Any
) -> Case:
    return Case(
        name=name,
        function=jax.jit(partial(final_return, algorithm, config, num_seeds)),
        arguments=(jax.random.key(0),),
        items=num_seeds * config.num_iterations * config.batch_size,
        unit="steps",
        **comparison,
    )


def final_return(algorithm: Algorithm, config: ppo.Config, num_seeds: int, key: Key) -> Array:
    """The mean return `[seeds]` of the episodes that ended in the last iterations of a training."""
    # One seed needs no axis of seeds, and matrix products with one are slower.
    learners = algorithm if num_seeds == 1 else loop.over_seeds(algorithm, num_seeds)
    init_key, step_key = jax.random.split(key)

    def body(state: Any, step: Array) -> tuple[Any, Any]:
        state, metrics = learners.step(jax.random.fold_in(step_key, step), state)
        return state, metrics["episode_return"]

    steps = jnp.arange(config.num_iterations)
    _, episodes = jax.lax.scan(body, learners.init(init_key), steps)
    last = jax.tree.map(lambda leaf: jnp.sum(leaf[-LAST_ITERATIONS:], axis=0), episodes)
    return last.mean


def _solved(ours: Array, theirs: Any) -> None:
    returns = np.asarray(theirs["metrics"]["returned_episode_returns"])
    peer = returns.reshape(CARTPOLE.num_iterations, -1)[-LAST_ITERATIONS:].mean()
    assert np.mean(ours) >= SOLVED, f"our final return is {np.mean(ours):.1f}"
    assert peer >= SOLVED, f"the peer's final return is {peer:.1f}"
