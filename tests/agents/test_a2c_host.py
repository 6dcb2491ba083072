"""A2C and REINFORCE learn from Gymnasium's environments, stepped by Python."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from jaxrl_llm.agents import a2c, reinforce
from jaxrl_llm.envs import adapters, gymnasium_rollout
from jaxrl_llm.nn import policies
from jaxrl_llm.nn.heads import ActorCritic
from tests.agents import probes

pytestmark = pytest.mark.slow


def compiled_policy(network, space, num_environments):
    """`(params, key, observation, action_mask) -> (action, extras)` in one program."""

    @jax.jit
    def act(params, key, observation, action_mask):
        noise = policies.draw_noise(space, key, (num_environments,))
        return policies.act(network, params)(noise, observation, action_mask)

    return act


def learn_by_a2c(host, config, network, num_iterations):
    """The learner after `num_iterations` rollouts of the host, and its last metrics."""
    init_key, root = jax.random.split(jax.random.key(0))
    running = gymnasium_rollout.start(host, seed=0)
    state = a2c.init(config, network, init_key, host.observation_space, running)
    act = compiled_policy(network, host.action_space, host.num_environments)
    update, metrics = jax.jit(partial(a2c.update, config, network)), {}
    for iteration in range(num_iterations):
        policy = partial(act, a2c.stale_params(config, state))
        running, steps = gymnasium_rollout.rollout(
            host,
            policy,
            jax.random.fold_in(root, iteration),
            running,
            num_steps=config.num_steps,
        )
        state, metrics = update(dataclasses.replace(state, running=running), steps)
    return state, metrics


CONFIG = a2c.Config(
    num_environments=16,
    num_steps=4,
    num_iterations=300,
    optimizer="adam",
    learning_rate=0.05,
    gamma=0.9,
    gae_lambda=0.9,
    entropy_coefficient=0.0,
)


def test_a2c_learns_a_probe_that_gymnasium_steps():
    """Two steps an episode in environments one by one, which reset in a call of their own."""
    probe = probes.ACTION_AND_OBSERVATION
    single = partial(adapters.to_gymnasium, probe.environment)
    envs: Any = SyncVectorEnv([single] * 16, autoreset_mode=AutoresetMode.NEXT_STEP)
    host = gymnasium_rollout.from_gymnasium(envs)
    network: Any = ActorCritic(action_space=host.action_space, hidden_sizes=(16,))
    state, metrics = learn_by_a2c(host, CONFIG, network, 100)
    policy, value = network.apply(state.train.params, jnp.array(probe.observation))
    earned = np.sum(jax.nn.softmax(policy.logits) * probe.q, axis=1)
    np.testing.assert_allclose(earned, probe.value, atol=0.05)
    np.testing.assert_allclose(value, probe.value, atol=0.1)
    assert metrics["episode_length"].mean == 1


def test_a2c_bootstraps_a_timeout_on_a_host():
    probe = probes.TIMEOUT
    host = gymnasium_rollout.from_gymnasium(adapters.to_gymnasium_vector(probe.environment, 16))
    network: Any = ActorCritic(action_space=host.action_space, hidden_sizes=())
    config = dataclasses.replace(CONFIG, learning_rate=0.2)
    state, _ = learn_by_a2c(host, config, network, 200)
    _, value = network.apply(state.train.params, jnp.array(probe.observation))
    np.testing.assert_allclose(value, probe.value, rtol=0.01)  # a death would be worth 1


def test_a2c_learns_hybrid_actions_on_a_host():
    probe = probes.HYBRID_OBSERVATION
    space = probe.environment.action_space
    envs = adapters.to_gymnasium_vector(probe.environment, 64)
    host = gymnasium_rollout.from_gymnasium(envs, action_space=space)
    network: Any = ActorCritic(action_space=space, hidden_sizes=(16,))
    config = dataclasses.replace(CONFIG, num_environments=64, num_iterations=500)
    state, _ = learn_by_a2c(host, config, network, 400)
    policy, _ = network.apply(state.train.params, jnp.array(probe.observation))
    np.testing.assert_allclose(probe.earned(policy.action(policy.mode())), probe.value, atol=0.05)


def test_reinforce_learns_a_probe_on_a_host():
    probe = probes.DISCOUNTING
    host = gymnasium_rollout.from_gymnasium(adapters.to_gymnasium_vector(probe.environment, 16))
    network: Any = ActorCritic(action_space=host.action_space, hidden_sizes=(16,))
    config = reinforce.Config(num_environments=16, num_steps=2, gamma=0.9, learning_rate=0.05)
    state = reinforce.init(config, network, jax.random.key(0), host.observation_space)
    act = compiled_policy(network, host.action_space, 16)
    update = jax.jit(partial(reinforce.update, config, network))
    for iteration in range(100):
        running = gymnasium_rollout.start(host, seed=iteration)  # whole episodes
        policy = partial(act, state.train.params)
        key = jax.random.fold_in(jax.random.key(1), iteration)
        _, steps = gymnasium_rollout.rollout(host, policy, key, running, num_steps=2)
        state, _ = update(state, steps)
    _, value = network.apply(state.train.params, jnp.array(probe.observation))
    np.testing.assert_allclose(value, probe.value, atol=0.05)
