"""Rollouts of a policy with a memory: what it is told, and when it must forget."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.envs import core
from tests.envs.problems import make_counter


def count(memory, noise, observation, action_mask, start):
    """A memory that counts the steps of an episode; the action is always 0."""
    memory = jnp.where(start, 0, memory) + 1
    return memory, jnp.zeros_like(memory), {"memory": memory, "start": start}


def test_rollout_with_memory_tells_where_an_episode_begins():
    counter = core.time_limit(make_counter(), 2)  # truncated, then 3 steps to a termination
    for environment, length in ((counter, 2), (make_counter(), 3)):
        running = core.start_batch(environment, jax.random.key(0), 2)
        # What was remembered before the first episode is no more.
        memory = jnp.full(2, 99)
        for _ in range(2):
            running, memory, steps = core.rollout_with_memory(
                environment, count, jax.random.key(1), running, memory, num_steps=4
            )
            np.testing.assert_array_equal(steps.extras["memory"], steps.extras["episode_length"])
            np.testing.assert_array_equal(
                steps.extras["start"], steps.extras["episode_length"] == 1
            )
            np.testing.assert_array_equal(memory, steps.extras["memory"][-1])
            assert steps.extras["memory"].max() == length


def test_rollout_equals_rollout_with_a_memory_that_is_not_used():
    environment = make_counter()
    running = core.start_batch(environment, jax.random.key(0), 2)

    def draw(key, observation, action_mask):
        return jax.random.randint(key, (2,), 0, 2), {}

    def ignore(memory, key, observation, action_mask, start):
        return memory, *draw(key, observation, action_mask)

    plain = core.rollout(environment, draw, jax.random.key(1), running, num_steps=5)
    after, memory, steps = core.rollout_with_memory(
        environment, ignore, jax.random.key(1), running, jnp.ones(2), num_steps=5
    )
    jax.tree.map(np.testing.assert_array_equal, plain, (after, steps))
    np.testing.assert_array_equal(memory, 1)
