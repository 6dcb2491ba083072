"""DQN's update: when and how far the target network moves, Adam's step, and new priorities."""

import dataclasses
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxrl_llm.agents import dqn
from jaxrl_llm.data import replay
from jaxrl_llm.envs import core
from jaxrl_llm.nn.heads import TabularEmbedding
from tests.agents.test_dqn import SMALL, look_up, window

pytestmark = pytest.mark.slow  # an update compiles for seconds

NUM_STATES, NUM_ACTIONS = 6, 2
SIZE = {"num_return_steps": 3, "batch_size": 8}


def table_function(flat: Any, observation: Any) -> Any:
    return look_up(flat.reshape(NUM_STATES, NUM_ACTIONS), observation)


def prepared(config: dqn.Config) -> tuple[replay.Replay, dqn.State]:
    """A buffer of one window again and again, and a learner at random parameters."""
    buffer = replay.make(
        num_environments=1,
        length=30,
        window=3,
        batch_size=config.batch_size,
        priority_exponent=config.priority_exponent,
    )
    rows = jax.tree.map(lambda leaf: jnp.tile(leaf.T, (4, 1)), window())
    empty = buffer.init(jax.tree.map(lambda leaf: leaf[0, 0], rows))
    params = jax.random.normal(jax.random.key(0), (NUM_STATES * NUM_ACTIONS,))
    hyperparameters = config.hyperparameters()
    optimizer = dqn.make_optimizer(config, hyperparameters.learning_rate)
    train = dqn.TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0))
    return buffer, dqn.State(
        train=train,
        target_params=2 * params,
        replay=buffer.add(empty, rows),
        running=cast(core.Running, None),
        num_transitions=jnp.int32(12),
        hyperparameters=hyperparameters,
    )


def updates(config: dqn.Config, count: int) -> list[tuple[dqn.State, Any]]:
    """The states after 0, 1, ... `count` updates, and the metrics of each."""
    buffer, state = prepared(config)
    update = jax.jit(partial(dqn.update, config, table_function, buffer))
    draw_key = jax.random.key(1)
    chances = buffer.draw(draw_key, (count,))
    states: list[tuple[dqn.State, Any]] = [(state, None)]
    for index in range(count):
        states.append(update(chances[index], states[-1][0]))
    return states


def test_hard_update_copies_at_the_interval_and_never_between():
    config = dataclasses.replace(SMALL, target_interval=3, tau=1.0, **SIZE)
    states = [state for state, _ in updates(config, 7)]
    for step, state in enumerate(states):
        expected = states[step // 3 * 3].train.params if step >= 3 else states[0].target_params
        np.testing.assert_array_equal(state.target_params, expected)
    assert (states[7].train.params != states[6].train.params).any()


def test_soft_update_moves_by_tau_at_every_step():
    config = dataclasses.replace(SMALL, target_interval=1, tau=0.25, **SIZE)
    states = [state for state, _ in updates(config, 3)]
    target = np.array(states[0].target_params)
    for state in states[1:]:
        target = 0.75 * target + 0.25 * np.array(state.train.params)
        np.testing.assert_allclose(state.target_params, target, rtol=1e-5)


@pytest.mark.slow
def test_update_is_a_step_of_adam_on_a_gradient_of_limited_norm():
    config = dataclasses.replace(SMALL, max_gradient_norm=0.5, **SIZE)
    (before, _), (after, _) = updates(config, 1)
    buffer, state = prepared(config)
    chance = buffer.draw(jax.random.key(1), (1,))[0]
    drawn = buffer.sample(state.replay, chance).window
    gradient, _ = jax.grad(partial(dqn.loss, config, table_function), has_aux=True)(
        before.train.params, before.target_params, jnp.float32(config.gamma), drawn, jnp.ones(8)
    )
    assert jnp.linalg.norm(gradient) > 0.5
    clipped = 0.5 * gradient / jnp.linalg.norm(gradient)
    adam = optax.adam(config.learning_rate)
    change, _ = adam.update(clipped, adam.init(clipped))
    np.testing.assert_allclose(after.train.params, before.train.params + change, rtol=1e-5)


@pytest.mark.slow
def test_update_sets_priorities_to_the_absolute_errors():
    config = dataclasses.replace(SMALL, priority_exponent=1.0, **SIZE)
    (before, _), (after, parts) = updates(config, 1)
    buffer, state = prepared(config)
    chance = buffer.draw(jax.random.key(1), (1,))[0]
    drawn = buffer.sample(state.replay, chance)
    _, (_, error) = dqn.loss(
        config, table_function, before.train.params, before.target_params,
        jnp.float32(config.gamma), drawn.window, jnp.ones(8),
    )  # fmt: skip
    first_leaf = 2**after.replay.sum_tree_state.tree_depth - 1
    leaves = after.replay.sum_tree_state.nodes[first_leaf + np.array(drawn.index)]
    np.testing.assert_allclose(leaves, np.abs(error), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(parts[2], np.abs(error).mean(), rtol=1e-4)


def test_parameters_as_a_vector_are_those_of_the_network():
    network = TabularEmbedding(NUM_STATES, NUM_ACTIONS)
    params = network.init(jax.random.key(0), jnp.int32(0))
    flat, unravel = ravel_pytree(params)
    q = dqn.q_values(network, unravel, flat + 1, jnp.arange(NUM_STATES))
    np.testing.assert_array_equal(q, np.ones((NUM_STATES, NUM_ACTIONS)))
