"""What an environment of a POMDP shows, and how often; its exact belief; and what is refused."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import make_mdp
from jaxrl_llm.envs import core, diagnosis, hidden, tiger
from jaxrl_llm.kernels import belief as belief_kernel
from jaxrl_llm.types import Box, Discrete


def uniform(num_actions):
    def policy(key, observation, mask):
        assert mask is None
        shape = jax.tree.leaves(observation)[0].shape[:1]
        return jax.random.randint(key, shape, 0, num_actions), {}

    return policy


def run(environment, num_actions, num_steps=40, batch=64):
    running = core.start_batch(environment, jax.random.key(0), batch)
    policy = uniform(num_actions)
    _, steps = core.rollout(environment, policy, jax.random.key(1), running, num_steps=num_steps)
    return steps


def test_make_shows_nothing_first_and_then_observations():
    environment = tiger.make(max_steps=None)
    assert environment.observation_space == Discrete(num=3)
    assert environment.action_space == Discrete(num=3)
    _, observation = environment.reset(jax.random.key(0), environment.default_params)
    assert observation == 2
    # Shown by what was done and by where it led, at the stated rates.
    step = jax.jit(jax.vmap(environment.step, in_axes=(0, 0, None, None)))
    keys = jax.random.split(jax.random.key(2), 20_000)
    state, seen = step(keys, jnp.zeros(20_000, jnp.int32), 0, environment.default_params)
    np.testing.assert_array_equal(state, 0)
    np.testing.assert_allclose(np.mean(seen.observation == 0), 0.85, atol=0.01)
    assert set(np.unique(seen.observation).tolist()) == {0, 1}


@pytest.mark.slow
def test_make_pays_and_ends_as_the_process_does():
    environment = diagnosis.make(max_steps=30)
    steps = run(environment, 4)
    ended = np.asarray(steps.terminated)
    assert ended.any()
    reward = np.asarray(steps.reward)
    assert (reward[ended] <= -60).all()
    assert (reward[~ended] > -60).all()
    # Cut after 30 steps; where advanced disease ends it there, it is not a cut.
    length = np.asarray(steps.extras["episode_length"])
    np.testing.assert_array_equal(np.asarray(steps.truncated), (length == 30) & ~ended)


def test_with_belief_is_the_filter_of_what_was_seen():
    pomdp = diagnosis.pomdp()
    plain = diagnosis.make(max_steps=None)
    environment = hidden.with_belief(plain, pomdp)
    assert environment.observation_space == Box(shape=(3,), low=0.0, high=1.0)
    state, belief = environment.reset(jax.random.key(3), environment.default_params)
    np.testing.assert_array_equal(belief, pomdp.mdp.initial)
    inner, _ = plain.reset(jax.random.key(3), plain.default_params)
    step, plain_step = jax.jit(environment.step), jax.jit(plain.step)
    for index, action in enumerate([1, 2, 0]):
        key = jax.random.key(4 + index)
        state, told = step(key, state, action, environment.default_params)
        inner, seen = plain_step(jax.random.clone(key), inner, action, plain.default_params)
        belief, _ = belief_kernel.belief_update(pomdp, belief, action, seen.observation)
        np.testing.assert_allclose(told.observation, belief, atol=1e-6)
        assert told.reward == seen.reward


@pytest.mark.slow
def test_with_belief_is_calibrated():
    """Of the steps with a belief near p that the tiger is left, it is there in a share p."""
    environment = hidden.with_belief(tiger.make(max_steps=None), tiger.pomdp())
    running = core.start_batch(environment, jax.random.key(5), 20_000)
    step = jax.jit(jax.vmap(environment.step, in_axes=(0, 0, None, None)))
    state = running.state
    for index in range(3):
        keys = jax.random.split(jax.random.key(6 + index), 20_000)
        state, _ = step(keys, state, tiger.LISTEN, environment.default_params)
    belief, left = np.asarray(state.belief)[:, 0], np.asarray(state.state) == 0
    for level in np.unique(belief.round(3)):
        group = np.abs(belief - level) < 1e-3
        error = np.sqrt(level * (1 - level) / group.sum())
        assert abs(left[group].mean() - level) < 4 * error


def test_make_pomdp_takes_one_law_for_all_actions():
    mdp = tiger.pomdp().mdp
    pomdp = hidden.make_pomdp(mdp, [[0.25, 0.75], [1.0, 0.0]])
    assert pomdp.observation.shape == (3, 2, 2)
    assert pomdp.num_observations == 2


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (np.ones(2), r"observation has shape (2,); it must be [actions, states, observations] ="),
        (np.ones((2, 2, 2)) / 2, "observation has shape (2, 2, 2); it must be [actions, states, "),
        ([[1.0, 0.0], [0.7, 0.2]], "observation[0, 1] sums to 0.9; each row must sum to 1"),
        ([[1.0, 0.0], [1.5, -0.5]], "observation[0, 1, 1] is -0.5; a probability must be finite"),
        ([[np.nan, 0.0], [1, 0]], "observation[0, 0, 0] is nan; a probability must be finite"),
    ],
)
def test_make_pomdp_refuses(observation, message):
    with pytest.raises(ValueError, match="observation") as error:
        hidden.make_pomdp(tiger.pomdp().mdp, observation)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_make_pomdp_refuses_actions_that_depend_on_the_state():
    mdp = make_mdp(np.full((2, 2, 2), 0.5), 0.0, 0.9, action_mask=[[True, True], [True, False]])
    with pytest.raises(ValueError, match=r"^action_mask\[1, 1\] is False, which a hidden state"):
        hidden.make_pomdp(mdp, np.eye(2))
    wrong = replace(tiger.pomdp().mdp, discount=jnp.float32(2))
    with pytest.raises(ValueError, match="discount"):
        hidden.make_pomdp(wrong, np.eye(2))
