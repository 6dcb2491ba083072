"""PPO's curiosity: it finds a reward that plain PPO does not, and costs nothing when it is off."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import make_mdp
from jaxrl_llm.agents import ppo
from jaxrl_llm.envs import tabular
from jaxrl_llm.nn.heads import TabularActorCritic

# Whole trainings.
pytestmark = pytest.mark.slow

LENGTH, SEEDS = 28, 4
CONFIG = ppo.Config(
    num_environments=16,
    num_steps=64,
    num_iterations=80,
    learning_rate=0.02,
    final_learning_rate=0.02,
    value_clip_epsilon=None,
    max_gradient_norm=10.0,
    curiosity_coefficient=1.0,
)
NETWORK = TabularActorCritic(LENGTH, 2)


@pytest.fixture(scope="module")
def environment():
    """Action 1 goes one place on, action 0 back to the first; the last place alone is rewarded.

    Random actions reach it from the first with probability 2^-27: not once in the steps of CONFIG.
    """
    place = np.arange(LENGTH - 1)
    transition = np.zeros((LENGTH, 2, LENGTH))
    transition[place, 0, 0] = transition[place, 1, place + 1] = 1
    transition[-1, :, -1] = 1
    reward = np.zeros_like(transition)
    reward[-2, 1, -1] = 1
    mdp = make_mdp(
        transition,
        reward,
        discount=0.99,
        initial=np.eye(LENGTH)[0],
        terminal=np.arange(LENGTH) == LENGTH - 1,
    )
    return tabular.make(mdp, max_steps=2 * LENGTH)


def final_returns(config, environment):
    """The mean return of the last iterations, one a seed."""
    algorithm = ppo.make(config, environment, NETWORK)

    @jax.jit
    @jax.vmap
    def train(key):
        init_key, step_key = jax.random.split(key)

        def body(state, step):
            state, metrics = algorithm.step(jax.random.fold_in(step_key, step), state)
            return state, metrics["episode_return"]

        steps = jnp.arange(config.num_iterations)
        _, returns = jax.lax.scan(body, algorithm.init(init_key), steps)
        return jax.tree.map(lambda leaf: jnp.sum(leaf[-20:]), returns).mean

    # JAX's check takes the keys that a scan under `vmap` runs over for used ones.
    with jax.debug_key_reuse(False):
        return train(jax.random.split(jax.random.key(0), SEEDS))


def test_curiosity_finds_the_reward_at_the_end_of_a_chain(environment):
    assert (final_returns(CONFIG, environment) > 0.95).all()


def test_without_curiosity_the_end_of_the_chain_is_never_reached(environment):
    plain = dataclasses.replace(CONFIG, curiosity_coefficient=0.0)
    np.testing.assert_array_equal(final_returns(plain, environment), 0)


def test_curiosity_of_coefficient_0_is_not_there(environment):
    plain = dataclasses.replace(CONFIG, curiosity_coefficient=0.0)
    algorithm = ppo.make(plain, environment, NETWORK)
    state = jax.jit(algorithm.init)(jax.random.key(0))
    assert state.novelty is None
    assert set(state.train.params) == {"params"}
    shapes = jax.eval_shape(algorithm.step, jax.random.key(1), state)
    assert "distillation_loss" not in shapes[1]


def test_reward_of_the_state_weighs_the_novelty(environment):
    """Advantages are linear in the coefficient, which is read from the state."""
    algorithm = ppo.make(CONFIG, environment, NETWORK)
    state = jax.jit(algorithm.init)(jax.random.key(0))
    collect = jax.jit(partial(ppo.collect, CONFIG, environment, NETWORK))

    def advantage(coefficient):
        weighed = state.hyperparameters.replace(curiosity_coefficient=jnp.float32(coefficient))
        after, batch, _ = collect(jax.random.key(1), state.replace(hyperparameters=weighed))
        return after, np.asarray(batch.advantage)

    (_, none), (after, one), (_, two) = map(advantage, (0, 1, 2))
    np.testing.assert_array_equal(none, 0)  # nothing was ever earned, and values start at 0
    assert (one > 0).all()
    np.testing.assert_allclose(two, 2 * one, rtol=1e-5)
    assert after.novelty.features.weight == CONFIG.batch_size


def test_step_trains_the_predictor_and_leaves_its_target(environment):
    algorithm = ppo.make(CONFIG, environment, NETWORK)
    state = jax.jit(algorithm.init)(jax.random.key(0))
    step, losses = jax.jit(algorithm.step), []
    first = state.train.params["curiosity"]["target"]
    for index in range(3):
        state, metrics = step(jax.random.key(index), state)
        losses.append(float(metrics["distillation_loss"].mean))
    assert losses[2] < 0.5 * losses[0]
    target = state.train.params["curiosity"]["target"]
    jax.tree.map(np.testing.assert_array_equal, target, first)
