"""Auto-reset, rollouts and time limits, on an environment whose whole course is known."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import core
from jaxrl_llm.types import Box, Discrete
from tests.envs.problems import make_counter, make_walk


def zero_policy(key, observation, action_mask):
    del key, action_mask
    return jnp.zeros(observation.shape[0], jnp.int32), {}


def normal_policy(key, observation, action_mask):
    action = 0.1 * jax.random.normal(key, observation.shape)
    return action, {"log_probability": -(action**2)}


PATIENTS = {"gain": jnp.array([1.0, 2.0, 5.0]), "length": jnp.array([2, 3, 4])}


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_start_batch_draws_each_start_alone():
    running = core.start_batch(make_walk(), jax.random.key(0), 64)
    assert len(np.unique(running.observation)) == 64
    np.testing.assert_array_equal(running.episode_return, np.zeros(64))
    np.testing.assert_array_equal(running.episode_length, np.zeros(64))
    assert running.episode_return.dtype == jnp.float32
    assert running.episode_length.dtype == jnp.int32


def test_start_batch_equals_a_loop():
    walk = make_walk()
    batch = core.start_batch(walk, jax.random.key(3), 4)
    for place, key in enumerate(jax.random.split(jax.random.key(3), 4)):
        assert_same(
            jax.tree.map(lambda leaf, place=place: leaf[place], batch),
            core.start(walk, key, walk.default_params),
        )


def test_start_batch_refuses_no_environment():
    message = re.escape("num_environments is 0; it must be at least 1")
    with pytest.raises(ValueError, match=message):
        core.start_batch(make_walk(), jax.random.key(0), 0)


def test_auto_reset_step_keeps_the_terminal_observation():
    counter = make_counter()
    fresh = running = core.start(counter, jax.random.key(0), counter.default_params)
    for count in (1, 2, 3):
        running, time_step = core.auto_reset_step(
            counter, jax.random.key(count), running, jnp.int32(1), fresh, counter.default_params
        )
        np.testing.assert_array_equal(time_step.observation, [count, 2])
        np.testing.assert_array_equal(running.observation, [count % 3, 2])
        assert bool(time_step.terminated) == (count == 3)
        assert int(running.episode_length) == count % 3
        assert float(running.episode_return) == 4 * (count % 3)


def test_auto_reset_step_resets_on_truncation():
    limited = core.time_limit(make_counter(), 2)
    fresh = running = core.start(limited, jax.random.key(0), limited.default_params)
    for count in (1, 2):
        running, time_step = core.auto_reset_step(
            limited, jax.random.key(count), running, jnp.int32(0), fresh, limited.default_params
        )
    assert bool(time_step.truncated)
    np.testing.assert_array_equal(time_step.observation, [2, 2])
    np.testing.assert_array_equal(running.observation, [0, 2])
    assert int(running.state.time) == 0


def test_rollout_keeps_the_terminal_observation_and_starts_anew():
    counter = make_counter()
    running = core.start_batch(counter, jax.random.key(0), 2)
    running, batch = core.rollout(counter, zero_policy, jax.random.key(1), running, num_steps=7)
    np.testing.assert_array_equal(batch.observation[:, 1, 0], [0, 1, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal(batch.next_observation[:, 1, 0], [1, 2, 3, 1, 2, 3, 1])
    np.testing.assert_array_equal(batch.terminated[:, 1], [0, 0, 1, 0, 0, 1, 0])
    assert not batch.truncated.any()
    assert batch.reward.shape == (7, 2)
    np.testing.assert_array_equal(running.observation[:, 0], [1, 1])


def test_rollout_counts_returns_and_lengths():
    counter = make_counter()
    running = core.start_batch(counter, jax.random.key(0), 1)
    _, batch = core.rollout(counter, zero_policy, jax.random.key(1), running, num_steps=5)
    np.testing.assert_array_equal(batch.extras["episode_return"][:, 0], [2, 4, 6, 2, 4])
    np.testing.assert_array_equal(batch.extras["episode_length"][:, 0], [1, 2, 3, 1, 2])


@pytest.mark.slow
def test_rollout_keeps_the_parameters_of_each_patient():
    counter = make_counter()
    running = core.start_batch(counter, jax.random.key(0), 3, PATIENTS, params_axis=0)
    _, batch = core.rollout(
        counter, zero_policy, jax.random.key(1), running, PATIENTS, num_steps=12, params_axis=0
    )
    gains = np.broadcast_to(PATIENTS["gain"], (12, 3))
    np.testing.assert_array_equal(batch.observation[..., 1], gains)
    np.testing.assert_array_equal(batch.next_observation[..., 1], gains)
    np.testing.assert_array_equal(batch.reward, gains)
    for patient, length in enumerate((2, 3, 4)):
        ends = np.flatnonzero(batch.terminated[:, patient]) + 1
        np.testing.assert_array_equal(ends, np.arange(length, 13, length))
        totals = batch.extras["episode_return"][ends - 1, patient]
        np.testing.assert_array_equal(totals, length * gains[0, patient])


def test_rollout_gives_the_policy_the_mask_of_its_state():
    counter = make_counter(with_mask=True)
    given = {}

    def policy(key, observation, action_mask):
        given["shape"] = action_mask.shape
        return jnp.argmax(action_mask, axis=1), {}

    running = core.start_batch(counter, jax.random.key(0), 2)
    _, batch = core.rollout(counter, policy, jax.random.key(1), running, num_steps=4)
    assert given["shape"] == (2, 2)
    np.testing.assert_array_equal(batch.action[:, 0], [0, 1, 0, 0])
    np.testing.assert_array_equal(
        batch.extras["action_mask"][:, 0],
        [[True, False], [False, True], [True, False], [True, False]],
    )


def test_rollout_gives_no_mask_where_there_is_none():
    counter, given = make_counter(), []

    def policy(key, observation, action_mask):
        given.append(action_mask)
        return zero_policy(key, observation, action_mask)

    running = core.start_batch(counter, jax.random.key(0), 2)
    _, batch = core.rollout(counter, policy, jax.random.key(1), running, num_steps=2)
    assert given == [None] * len(given)
    assert set(batch.extras) == {"episode_return", "episode_length"}


@pytest.mark.slow
def test_rollout_equals_a_loop_over_patients_and_steps():
    counter = make_counter()

    def policy(key, observation, action_mask):
        return observation[:, 0].astype(jnp.int32) % 2, {}

    start = core.start_batch(counter, jax.random.key(0), 3, PATIENTS, params_axis=0)
    _, batch = core.rollout(
        counter, policy, jax.random.key(7), start, PATIENTS, num_steps=9, params_axis=0
    )
    for patient, (gain, length) in enumerate(zip(*PATIENTS.values(), strict=True)):
        count, total = 0, 0.0
        for time in range(9):
            action = count % 2
            total += float(gain) * (1 + action)
            count += 1
            expected = {
                "observation": [count - 1, gain],
                "action": action,
                "reward": gain * (1 + action),
                "terminated": count == length,
                "truncated": False,
                "next_observation": [count, gain],
            }
            for name, value in expected.items():
                actual = getattr(batch, name)[time, patient]
                np.testing.assert_array_equal(actual, np.asarray(value), err_msg=name)
            assert float(batch.extras["episode_return"][time, patient]) == total
            assert int(batch.extras["episode_length"][time, patient]) == count
            if count == length:
                count, total = 0, 0.0


@pytest.mark.slow
def test_rollout_under_jit_equals_eager():
    walk = make_walk()
    start = core.start_batch(walk, jax.random.key(0), 2)

    def collect(key, start):
        return core.rollout(walk, normal_policy, key, start, num_steps=3)

    jitted = jax.jit(collect)(jax.random.key(2), start)
    with jax.disable_jit():
        eager = collect(jax.random.key(2), start)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), eager, jitted)
    # What the policy remembers is of the action that was taken.
    np.testing.assert_allclose(jitted[1].extras["log_probability"], -(jitted[1].action ** 2))


def test_rollout_gives_the_policy_its_noise_step_by_step():
    counter = make_counter()

    def policy(noise, observation, action_mask):
        return noise["action"], {"noise": noise["action"]}

    noise = {"action": jnp.array([[0, 1], [1, 1], [1, 0], [0, 0]])}
    running = core.start_batch(counter, jax.random.key(0), 2)
    _, batch = core.rollout(counter, policy, jax.random.key(1), running, num_steps=4, noise=noise)
    np.testing.assert_array_equal(batch.action, noise["action"])
    np.testing.assert_array_equal(batch.extras["noise"], noise["action"])
    np.testing.assert_array_equal(batch.reward, 2 * (1 + noise["action"]))


def test_rollout_of_one_step():
    counter = make_counter()
    running = core.start_batch(counter, jax.random.key(0), 2)
    running, batch = core.rollout(counter, zero_policy, jax.random.key(1), running, num_steps=1)
    assert batch.observation.shape == (1, 2, 2)
    np.testing.assert_array_equal(batch.next_observation[0], running.observation)


@pytest.mark.slow
def test_rollout_resumes_where_it_stopped():
    counter = make_counter()
    start = core.start_batch(counter, jax.random.key(0), 3, PATIENTS, params_axis=0)

    def collect(running, num_steps):
        return core.rollout(
            counter,
            zero_policy,
            jax.random.key(1),
            running,
            PATIENTS,
            num_steps=num_steps,
            params_axis=0,
        )

    whole_end, whole = collect(start, 10)
    middle, first = collect(start, 5)
    end, second = collect(middle, 5)
    assert_same(end, whole_end)
    assert_same(jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second), whole)


@pytest.mark.slow
def test_rollout_starts_every_episode_elsewhere():
    walk = make_walk()
    start = core.start_batch(walk, jax.random.key(0), 32)
    _, batch = core.rollout(walk, normal_policy, jax.random.key(1), start, num_steps=30)
    begun = np.asarray(batch.observation[1:][batch.terminated[:-1]])
    assert len(begun) > 100
    assert len(np.unique(begun)) == len(begun)
    # Starts are standard normal.
    assert abs(begun.mean()) < 4 / np.sqrt(len(begun))
    assert abs(begun.std() - 1) < 4 / np.sqrt(2 * len(begun))


def test_time_limit_truncates_and_does_not_terminate():
    limited = core.time_limit(make_counter(), 2)
    running = core.start_batch(limited, jax.random.key(0), 1)
    _, batch = core.rollout(limited, zero_policy, jax.random.key(1), running, num_steps=5)
    np.testing.assert_array_equal(batch.truncated[:, 0], [0, 1, 0, 1, 0])
    assert not batch.terminated.any()
    np.testing.assert_array_equal(batch.next_observation[:, 0, 0], [1, 2, 1, 2, 1])


def test_time_limit_yields_to_termination_at_the_same_step():
    limited = core.time_limit(make_counter(), 3)
    running = core.start_batch(limited, jax.random.key(0), 1)
    _, batch = core.rollout(limited, zero_policy, jax.random.key(1), running, num_steps=6)
    np.testing.assert_array_equal(batch.terminated[:, 0], [0, 0, 1, 0, 0, 1])
    assert not batch.truncated.any()


def test_time_limit_out_of_reach_changes_nothing():
    counter = make_counter()
    plain = core.start_batch(counter, jax.random.key(0), 2)
    _, expected = core.rollout(counter, zero_policy, jax.random.key(1), plain, num_steps=7)
    limited = core.time_limit(counter, 4)
    timed = core.start_batch(limited, jax.random.key(0), 2)
    _, actual = core.rollout(limited, zero_policy, jax.random.key(1), timed, num_steps=7)
    assert_same(actual, expected)


def test_time_limit_within_another_keeps_the_shorter():
    limited = core.time_limit(core.time_limit(make_counter(), 1), 2)
    running = core.start_batch(limited, jax.random.key(0), 1)
    _, batch = core.rollout(limited, zero_policy, jax.random.key(1), running, num_steps=3)
    assert batch.truncated.all()


def test_time_limit_keeps_masks_and_spaces():
    counter = make_counter(with_mask=True)
    limited = core.time_limit(counter, 2)
    state, _ = limited.reset(jax.random.key(0), limited.default_params)
    assert limited.action_mask is not None
    np.testing.assert_array_equal(limited.action_mask(state, limited.default_params), [True, False])
    assert core.time_limit(make_counter(), 2).action_mask is None
    for field in dataclasses.fields(counter):
        if field.name not in ("reset", "step", "action_mask"):
            assert getattr(limited, field.name) is getattr(counter, field.name)


def test_time_limit_refuses_no_steps():
    with pytest.raises(ValueError, match=re.escape("max_steps is 0; it must be at least 1")):
        core.time_limit(make_counter(), 0)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (Discrete(num=3), 0),
        (Box(shape=(2,), low=-1.0, high=1.0), [0, 0]),
        (Box(shape=(2,), low=(1.0, -3.0), high=(2.0, -2.0)), [1, -2]),
        (Box(shape=(), low=-np.inf, high=-4.0), -4),
    ],
)
def test_example_is_an_element_of_the_space(space, expected):
    element = core.example(space)
    np.testing.assert_array_equal(element, np.asarray(expected))
    assert element.shape == (() if isinstance(space, Discrete) else space.shape)


def test_scale_rewards_changes_nothing_but_rewards():
    counter = make_counter()
    scaled = core.scale_rewards(counter, 0.25)
    running = core.start_batch(counter, jax.random.key(0), 2)
    steps, expected = (
        core.rollout(environment, zero_policy, jax.random.key(1), running, num_steps=4)[1]
        for environment in (scaled, counter)
    )
    np.testing.assert_array_equal(steps.reward, 0.25 * expected.reward)
    returns = "episode_return"
    np.testing.assert_array_equal(steps.extras[returns], 0.25 * expected.extras[returns])
    same = dict.fromkeys(("reward", "extras"))
    assert_same(dataclasses.replace(steps, **same), dataclasses.replace(expected, **same))
    message = re.escape("scale is 0.0; it must be greater than 0")
    with pytest.raises(ValueError, match=message):
        core.scale_rewards(counter, 0.0)
