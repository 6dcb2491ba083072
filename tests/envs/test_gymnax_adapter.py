"""gymnax environments: the same dynamics, with terminations and time limits told apart."""

from __future__ import annotations

import re
import sys
from typing import Any

import gymnasium
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from gymnax.environments import spaces

from jaxrl_llm.envs import core
from jaxrl_llm.envs.gymnax_adapter import from_gymnax
from jaxrl_llm.types import Box, Discrete

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cartpole():
    return from_gymnax("CartPole-v1")


def episode(environment, policy, *, state=None, num_steps):
    """The time steps of one episode from `state`, `[T, ...]`, without any reset."""
    params = environment.default_params
    first, observation = environment.reset(jax.random.key(0), params)

    def body(carry, key):
        state, observation = carry
        state, time_step = environment.step(key, state, policy(observation), params)
        return (state, time_step.observation), time_step

    start = (first if state is None else state, observation)
    return jax.jit(lambda key: jax.lax.scan(body, start, jax.random.split(key, num_steps))[1])(
        jax.random.key(1)
    )


def balance(observation):
    """A linear feedback that keeps the pole up."""
    return (observation @ jnp.array([0.1, 0.5, 3.0, 1.0]) > 0).astype(jnp.int32)


def test_from_gymnax_truncates_a_balanced_cartpole(cartpole):
    steps = episode(cartpole, balance, num_steps=500)
    assert not steps.terminated.any()
    np.testing.assert_array_equal(np.flatnonzero(steps.truncated), [499])
    np.testing.assert_array_equal(steps.reward, np.ones(500))


def test_from_gymnax_terminates_a_falling_cartpole(cartpole):
    steps = episode(cartpole, lambda _: jnp.int32(0), num_steps=30)
    fall = int(steps.terminated.argmax())
    assert 5 <= fall < 12
    assert abs(float(steps.observation[fall, 2])) > 12 * np.pi / 180
    assert not steps.truncated.any()


def test_from_gymnax_terminates_where_the_limit_falls_together_with_the_fall():
    params: Any = gymnax.make("CartPole-v1")[1]
    unlimited = episode(from_gymnax("CartPole-v1"), lambda _: jnp.int32(0), num_steps=12)
    fall = int(unlimited.terminated.argmax())
    for limit, terminated in ((fall, False), (fall + 1, True)):
        limited = from_gymnax("CartPole-v1", params.replace(max_steps_in_episode=limit))
        steps = episode(limited, lambda _: jnp.int32(0), num_steps=limit)
        assert bool(steps.terminated[-1]) == terminated
        assert bool(steps.truncated[-1]) != terminated


def test_from_gymnax_has_the_dynamics_of_gymnasium(x64):
    cartpole = from_gymnax("CartPole-v1")
    initial = np.array([0.03, -0.02, 0.04, 0.01])
    state, _ = cartpole.reset(jax.random.key(0), cartpole.default_params)
    x, x_dot, theta, theta_dot = initial
    state = state.replace(x=x, x_dot=x_dot, theta=theta, theta_dot=theta_dot)
    env: Any = gymnasium.make("CartPole-v1").unwrapped
    env.reset(seed=0)
    env.state = initial
    step = jax.jit(cartpole.step)
    observation = initial
    for number in range(100):
        action = int(balance(observation))
        state, ours = step(jax.random.key(number), state, action, cartpole.default_params)
        observation, reward, terminated, _, _ = env.step(action)
        np.testing.assert_allclose(ours.observation, observation, rtol=0, atol=1e-5)
        assert ours.reward == reward
        assert bool(ours.terminated) == terminated


@pytest.mark.parametrize(
    "name",
    [
        "CartPole-v1",
        "Acrobot-v1",
        "Pendulum-v1",
        "MountainCarContinuous-v0",
        "UmbrellaChain-bsuite",
        "DiscountingChain-bsuite",
        "BernoulliBandit-misc",
    ],
)
def test_from_gymnax_steps_as_gymnax_does(name):
    made: tuple[Any, Any] = gymnax.make(name)
    env, params = made
    environment = from_gymnax(name)
    assert environment.name == env.name
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(environment.default_params))
    action = core.example(environment.action_space)

    @jax.jit
    def theirs(key):
        reset_key, step_key = jax.random.split(key)
        _, state = env.reset_env(reset_key, params)
        observation, _, reward, done, _ = env.step_env(step_key, state, action, params)
        return observation, reward, done

    @jax.jit
    def ours(key):
        reset_key, step_key = jax.random.split(key)
        state, _ = environment.reset(reset_key, environment.default_params)
        following, steps = environment.step(step_key, state, action, environment.default_params)
        return state, following, steps

    state, following, steps = ours(jax.random.key(0))
    observation, reward, done = theirs(jax.random.key(0))
    np.testing.assert_allclose(steps.observation, observation, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(steps.reward, reward, rtol=1e-6)
    assert bool(steps.terminated | steps.truncated) == bool(done)
    assert steps.observation.shape == core.example(environment.observation_space).shape
    assert steps.reward.dtype == jnp.float32
    # What a scan carries keeps its types.
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), following
    )


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype:UserWarning")
@pytest.mark.parametrize("name", ["Breakout-MinAtar", "SpaceInvaders-MinAtar"])
def test_from_gymnax_truncates_where_the_state_remembers_done(name):
    params: Any = gymnax.make(name)[1]
    environment = from_gymnax(name, params.replace(max_steps_in_episode=3))
    steps = episode(environment, lambda _: jnp.int32(0), num_steps=3)
    np.testing.assert_array_equal(steps.truncated, [False, False, True])
    assert not steps.terminated.any()


def test_from_gymnax_truncates_at_a_limit_in_floating_point():
    bandit = from_gymnax("BernoulliBandit-misc")
    steps = episode(bandit, lambda _: jnp.int32(0), num_steps=100)
    np.testing.assert_array_equal(np.flatnonzero(steps.truncated), [99])
    assert not steps.terminated.any()


def test_from_gymnax_terminates_what_ends_by_itself():
    catch = from_gymnax("Catch-bsuite")
    steps = episode(catch, lambda _: jnp.int32(1), num_steps=9)
    np.testing.assert_array_equal(np.flatnonzero(steps.terminated), [8])
    assert not steps.truncated.any()


def test_from_gymnax_rolls_out_with_resets(cartpole):
    def policy(key, observation, action_mask):
        return jax.random.bernoulli(key, shape=observation.shape[:1]).astype(jnp.int32), {}

    @jax.jit
    def collect(key):
        start_key, rollout_key = jax.random.split(key)
        running = core.start_batch(cartpole, start_key, 64)
        return core.rollout(cartpole, policy, rollout_key, running, num_steps=100)[1]

    batch = collect(jax.random.key(0))
    ended = np.asarray(batch.terminated)
    # A random policy lasts 22 steps on average (standard deviation about 12).
    lengths = np.asarray(batch.extras["episode_length"])[ended]
    assert 15 < lengths.mean() < 25
    starts = np.asarray(batch.observation)[1:][ended[:-1]]
    assert np.abs(starts).max() <= 0.05
    tips = np.abs(np.asarray(batch.next_observation)[ended])
    assert ((tips[:, 2] > 0.2094) | (tips[:, 0] > 2.4)).all()


def test_from_gymnax_maps_the_spaces(cartpole):
    assert cartpole.action_space == Discrete(num=2)
    assert isinstance(cartpole.observation_space, Box)
    high = np.asarray(cartpole.observation_space.high)
    assert cartpole.observation_space.shape == (4,)
    np.testing.assert_allclose(high[0], 4.8, rtol=1e-6)
    np.testing.assert_allclose(cartpole.observation_space.low, -high)
    pendulum = from_gymnax("Pendulum-v1")
    assert pendulum.action_space == Box(shape=(1,), low=-2.0, high=2.0)
    high = (1.0, 1.0, 8.0)
    assert pendulum.observation_space == Box(shape=(3,), low=tuple(-np.array(high)), high=high)
    catch = from_gymnax("Catch-bsuite")
    assert catch.observation_space == Box(shape=(10, 5), low=0.0, high=1.0)


@struct.dataclass
class Endless:
    """Parameters without a time limit."""

    length: int = 2


class Corridor:
    """The least that an environment of gymnax's kind has."""

    name = "corridor"
    default_params = Endless()
    space = spaces.Discrete(3)

    def observation_space(self, params):
        return self.space

    def action_space(self, params):
        return spaces.Discrete(2)

    def reset_env(self, key, params):
        return jnp.int32(0), {"place": 0}

    def step_env(self, key, state, action, params):
        place = state["place"] + action
        return place, {"place": place}, 1, place >= params.length, {}


def test_from_gymnax_takes_an_environment_without_a_limit():
    env: Any = Corridor()
    corridor = from_gymnax(env)
    assert corridor.observation_space == Discrete(num=3)
    steps = episode(corridor, lambda _: jnp.int32(1), num_steps=3)
    np.testing.assert_array_equal(steps.terminated, [False, True, True])
    assert not steps.truncated.any()
    assert steps.reward.dtype == jnp.float32


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Dict({}), "space is Dict; only Discrete and Box"),
        (
            spaces.Box(0, jnp.arange(1, 5).reshape(2, 2), (2, 2)),
            "space has bounds that differ and shape (2, 2); flatten it first",
        ),
    ],
)
def test_from_gymnax_refuses_other_spaces(space, message):
    env: Any = Corridor()
    env.space = space
    with pytest.raises(ValueError, match=re.escape(message)):
        from_gymnax(env)


def test_from_gymnax_says_how_to_install_gymnax(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnax", None)
    message = re.escape("gymnax is not installed; run: pip install gymnax")
    with pytest.raises(ModuleNotFoundError, match=message):
        from_gymnax("CartPole-v1")
