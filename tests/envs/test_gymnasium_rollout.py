"""Host rollouts: the transitions of `core.rollout`, whatever way Gymnasium resets."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import chex
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from jaxrl_llm.envs import adapters, core, gymnasium_rollout
from jaxrl_llm.types import Box, Discrete, Environment, Hybrid, HybridAction, TimeStep
from tests.envs.problems import make_adder, make_dosing

NUM_STEPS = 7
# Environment b starts the patient with gain b + 1, which changes its rewards and observations.
GAINS = jnp.array([1.0, 2.0, 3.0])


def policy(key, observation, action_mask):
    """Deterministic: 1, or 0 or 2 by the gain and the sum; `extras` shows what it was given."""
    total, gain = observation[:, 0], observation[:, 1]
    action = (total.astype(np.int32) + gain.astype(np.int32)) % 3
    return action, {"seen": observation.sum(axis=1)}


def synchronous(mode):
    """Gymnasium's own batch of single environments."""
    adder = make_adder(max_steps=4)
    singles = [lambda gain=gain: adapters.to_gymnasium(adder, params=gain) for gain in GAINS]
    return SyncVectorEnv(singles, autoreset_mode=mode)


HOSTS = {
    "ours": lambda: adapters.to_gymnasium_vector(
        make_adder(max_steps=4), 3, params=GAINS, params_axis=0
    ),
    "same step": lambda: synchronous(AutoresetMode.SAME_STEP),
    "next step": lambda: synchronous(AutoresetMode.NEXT_STEP),
    "disabled": lambda: synchronous(AutoresetMode.DISABLED),
}


@pytest.fixture(scope="module")
def expected():
    """Two rollouts of the pure environments, the second going on where the first stopped."""
    adder = make_adder(max_steps=4)
    running = core.start_batch(adder, jax.random.key(0), 3, GAINS, params_axis=0)
    found = []
    for _ in range(2):
        running, steps = core.rollout(
            adder,
            policy,
            jax.random.key(1),
            running,
            GAINS,
            num_steps=NUM_STEPS,
            params_axis=0,
        )
        found.append(steps)
    ends = found[0].terminated, found[0].truncated
    assert all(np.asarray(end).any() for end in ends)
    return found


@pytest.mark.parametrize("name", HOSTS)
def test_rollout_gives_the_transitions_of_the_pure_environment(name, expected):
    host = gymnasium_rollout.from_gymnasium(HOSTS[name]())
    assert (host.num_environments, host.action_space) == (3, Discrete(num=4))
    assert host.observation_space == Box(shape=(2,), low=(0.0, -5.0), high=(6.0, 5.0))
    running = gymnasium_rollout.start(host, seed=0)
    running, steps = gymnasium_rollout.rollout(
        host, policy, jax.random.key(0), running, num_steps=NUM_STEPS
    )
    chex.assert_trees_all_equal(steps, expected[0])
    chex.assert_trees_all_equal_dtypes(steps, expected[0])
    if name != "next step":  # there the columns that had to wait have gone on meanwhile
        _, steps = gymnasium_rollout.rollout(
            host, policy, jax.random.key(0), running, num_steps=NUM_STEPS
        )
        chex.assert_trees_all_equal(steps, expected[1])


def test_rollout_under_resets_in_a_call_of_their_own_goes_on_where_it_stopped():
    """Every row, of many short rollouts, is a step of the adder from the state that it shows."""
    host = gymnasium_rollout.from_gymnasium(HOSTS["next step"]())
    running, ends = gymnasium_rollout.start(host, seed=0), 0
    for _ in range(4):
        running, steps = gymnasium_rollout.rollout(
            host, policy, jax.random.key(0), running, num_steps=2
        )
        before, after = np.asarray(steps.observation), np.asarray(steps.next_observation)
        np.testing.assert_array_equal(after[..., 0], before[..., 0] + steps.action)
        np.testing.assert_array_equal(steps.terminated, after[..., 0] >= 3)
        ended = np.asarray(steps.terminated | steps.truncated)
        np.testing.assert_array_equal(before[1, :, 0], np.where(ended[0], 0, after[0, :, 0]))
        length = np.asarray(steps.extras["episode_length"])
        np.testing.assert_array_equal(length[1], np.where(ended[0], 1, length[0] + 1))
        ends += ended.sum()
    assert ends > 6


def test_rollout_of_one_environment_draws_a_key_a_step():
    seen = []

    def random_dose(key, observation, action_mask):
        seen.append(key)
        assert action_mask is None
        # Rounding beyond a bound is not the environment's fault.
        return jnp.array([[0.2, 0.7000001]]), {}

    host = gymnasium_rollout.from_gymnasium(adapters.to_gymnasium(make_dosing()))
    running = gymnasium_rollout.start(host, seed=0)
    _, steps = gymnasium_rollout.rollout(host, random_dose, jax.random.key(3), running, num_steps=3)
    assert steps.observation.shape == (3, 1, 2)
    np.testing.assert_array_equal(steps.extras["episode_length"], 1)
    assert steps.terminated.all()
    np.testing.assert_allclose(steps.next_observation, [[[0.2, 0.7]]] * 3)
    drawn = [jax.random.key_data(key).tolist() for key in seen]
    roots = [jax.random.fold_in(jax.random.key(3), step) for step in range(3)]
    assert drawn == [jax.random.key_data(key).tolist() for key in roots]


def make_hybrid() -> Environment:
    """Its observation is the last choice and amount; 2 ends it."""

    def step(key: Any, state: Any, action: Any, params: Any) -> tuple[Any, TimeStep]:
        observation = jnp.append(action.amount, action.choice.astype(jnp.float32))
        return observation, TimeStep(
            observation=observation,
            reward=jnp.sum(action.amount),
            terminated=action.choice == 2,
            truncated=jnp.bool_(False),
            info={},
        )

    amount = Box(shape=(2,), low=-1.0, high=(1.0, 2.0))
    return Environment(
        name="hybrid",
        reset=lambda key, params: (jnp.zeros(3), jnp.zeros(3)),
        step=step,
        default_params=None,
        observation_space=Box(shape=(3,), low=-1.0, high=2.0),
        action_space=Hybrid(num=3, amount=amount, has_amount=(False, True, True)),
    )


def test_rollout_passes_hybrid_actions_as_a_dict():
    environment = make_hybrid()
    envs = adapters.to_gymnasium_vector(environment, 2)
    told = gymnasium_rollout.from_gymnasium(envs, action_space=environment.action_space)
    assert told.action_space == environment.action_space
    host = gymnasium_rollout.from_gymnasium(envs)
    everywhere = dataclasses.replace(environment.action_space, has_amount=(True, True, True))
    assert host.action_space == everywhere
    action = HybridAction(
        choice=jnp.array([1, 2]), amount=jnp.array([[0.5, 2.0000002], [-1, 0.25]])
    )
    running = gymnasium_rollout.start(host, seed=0)
    _, steps = gymnasium_rollout.rollout(
        host, lambda *_: (action, {}), jax.random.key(0), running, num_steps=2
    )
    taken: Any = steps.action
    np.testing.assert_array_equal(taken.choice, [[1, 2]] * 2)
    np.testing.assert_array_equal(steps.terminated, [[False, True]] * 2)
    np.testing.assert_array_equal(steps.next_observation, [[[0.5, 2, 1], [-1, 0.25, 2]]] * 2)
    np.testing.assert_array_equal(steps.reward, [[2.5, -0.75]] * 2)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.MultiBinary(2), "action_space is MultiBinary(2); it must be Discrete or Box"),
        (spaces.Discrete(3, start=1), "action_space starts at 1; wrap it to start at 0"),
        (spaces.Dict({"choice": spaces.Discrete(2)}), "action_space is Dict('choice': Discrete(2)"),
    ],
)
def test_from_gymnasium_refuses_other_spaces(space, message):
    env = adapters.to_gymnasium(make_adder())
    env.action_space = space
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        gymnasium_rollout.from_gymnasium(env)


def test_from_gymnasium_wants_to_know_how_a_batch_resets():
    envs = adapters.to_gymnasium_vector(make_adder(), 2)
    envs.metadata = {}
    with pytest.raises(ValueError, match=r"^env\.metadata\['autoreset_mode'\] is None"):
        gymnasium_rollout.from_gymnasium(envs)


def test_rollout_refuses_no_steps():
    host = gymnasium_rollout.from_gymnasium(adapters.to_gymnasium(make_adder()))
    running = gymnasium_rollout.start(host, seed=0)
    with pytest.raises(ValueError, match="num_steps is 0; it must be at least 1"):
        gymnasium_rollout.rollout(host, policy, jax.random.key(0), running, num_steps=0)


@pytest.mark.slow
def test_rollout_of_gymnasiums_own_cartpole():
    """A batch that Gymnasium steps at once, and that resets in the next step."""
    envs = gymnasium.make_vec("CartPole-v1", 4, vectorization_mode="vector_entry_point")
    host = gymnasium_rollout.from_gymnasium(envs)
    running = gymnasium_rollout.start(host, seed=0)
    _, steps = gymnasium_rollout.rollout(
        host,
        lambda key, observation, mask: (np.ones(4, int), {}),
        jax.random.key(0),
        running,
        num_steps=30,
    )
    # Pushing one way fells the pole within 8 to 11 steps, and no reward is missing.
    length = np.asarray(steps.extras["episode_length"])[np.asarray(steps.terminated)]
    assert length.size >= 8
    assert ((length >= 8) & (length <= 11)).all()
    np.testing.assert_array_equal(steps.reward, 1)
    np.testing.assert_array_equal(
        steps.extras["episode_return"], np.asarray(steps.extras["episode_length"])
    )
    assert steps.observation.dtype == jnp.float32
