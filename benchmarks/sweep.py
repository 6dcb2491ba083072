"""64 settings of PPO trained in one program, beside one after another.

The peer runs ONE learner's program, compiled once because its settings are arguments, 64 times.
What the sweep saves is the cost of starting small operations, each of which does the work of 64
learners, and all that is drawn from a key alone, which is drawn once. Learners whose batches are
large enough to keep a core busy by themselves have little to save; so both kinds are here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, Peer
from jaxrl_llm.agents import ppo
from jaxrl_llm.envs import gymnax_adapter, treatment
from jaxrl_llm.nn.heads import ActorCritic, TabularActorCritic
from jaxrl_llm.training import sweep
from jaxrl_llm.types import Algorithm, Array, Discrete, Key

POINTS = sweep.grid(
    learning_rate=np.geomspace(1e-4, 1e-2, 8), entropy_coefficient=np.linspace(0, 0.03, 8)
)
SMALL = ppo.Config(num_environments=4, num_steps=16, num_iterations=40)
LARGE = ppo.Config(num_environments=16, num_steps=32, num_iterations=10)
CARTPOLE = ppo.Config(num_iterations=10)


def cases() -> Iterable[Case]:
    """Tables from batches of 64 and of 512 steps; two towers of 2 x 64 units on CartPole."""
    for name, config in (("tables-64-points", SMALL), ("tables-64-points-batch-512", LARGE)):
        yield case(name, ppo.make(config, treatment.make(), TabularActorCritic(5, 3)), config)
    network = ActorCritic(Discrete(num=2))
    networks = ppo.make(CARTPOLE, gymnax_adapter.from_gymnax("CartPole-v1"), network)
    yield case("networks-64-points", networks, CARTPOLE)


def case(name: str, algorithm: Algorithm, config: ppo.Config) -> Case:
    """A whole training of all `POINTS`, one seed each."""
    num_points, key = len(POINTS["learning_rate"]), jax.random.key(0)
    learners = sweep.side_by_side(algorithm, POINTS, 1, "episode_return")
    train_one = jax.jit(partial(train_point, algorithm, config.num_iterations))

    def one_after_another() -> list[Array]:
        rows = ({name: column[i] for name, column in POINTS.items()} for i in range(num_points))
        return [train_one(key, row) for row in rows]

    return Case(
        name=name,
        function=jax.jit(partial(train, learners, config.num_iterations)),
        arguments=(key,),
        items=num_points * config.num_iterations * config.batch_size,
        unit="steps",
        peer=lambda: Peer("one after another", one_after_another),
        agree=agree,
    )


def train(learners: Algorithm, num_iterations: int, key: Key) -> Array:
    """The mean return of the episodes that ended in a training, `[seeds, P]`, or `[]` of one."""
    init_key, step_key = jax.random.split(key)
    return _train(learners, num_iterations, learners.init(init_key), step_key)


def train_point(algorithm: Algorithm, num_iterations: int, key: Key, point: Any) -> Array:
    """`train` of the one learner that seed 0 of `point` is in a sweep."""
    init_key, step_key = jax.random.split(key)
    state = algorithm.init(jax.random.fold_in(init_key, 0))
    state = replace(state, hyperparameters=replace(state.hyperparameters, **point))
    first_seed = Algorithm(
        init=algorithm.init,
        step=lambda key, state: algorithm.step(jax.random.fold_in(key, 0), state),
    )
    return _train(first_seed, num_iterations, state, step_key)


def _train(learners: Algorithm, num_iterations: int, state: Any, key: Key) -> Array:
    def body(state: Any, step: Array) -> tuple[Any, Any]:
        state, metrics = learners.step(jax.random.fold_in(key, step), state)
        return state, metrics["episode_return"]

    _, episodes = jax.lax.scan(body, state, jnp.arange(num_iterations))
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), episodes).mean


def agree(together: Any, apart: Any) -> None:
    """Rounding sets a few learners on other paths; most of them must not notice."""
    ours, theirs = np.ravel(together), np.array(apart)
    difference = np.median(np.abs(ours - theirs) / np.abs(theirs))
    assert difference < 0.02, f"the returns differ by {difference:.1%} in the median"
