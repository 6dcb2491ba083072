"""A batch in Gymnasium's hands: the law of each environment, in the layout of SyncVectorEnv."""

from __future__ import annotations

import re
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from jaxrl_llm.envs import adapters, core, icu_sepsis, treatment
from tests.envs.problems import make_adder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def icu():
    return icu_sepsis.make(inadmissible="raise")


ACTIONS = np.array(
    [[1, 0, 2], [2, 0, 0], [0, 0, 1], [1, 0, 2], [0, 1, 1], [2, 2, 0], [0, 0, 0], [1, 1, 1]]
)


def assert_same_layout(ours, theirs, path="step"):
    assert type(ours) is type(theirs), path
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), path
        for key, value in theirs.items():
            assert_same_layout(ours[key], value, f"{path}.{key}")
    elif isinstance(theirs, tuple):
        for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same_layout(a, b, f"{path}[{place}]")
    elif theirs.dtype == object:
        for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert (a is None) == (b is None), path
            if b is not None:
                assert_same_layout(a, b, f"{path}[{place}]")
    else:
        assert ours.dtype == theirs.dtype, path
        np.testing.assert_array_equal(ours, theirs, err_msg=path)


@pytest.mark.parametrize("max_steps", [None, 3])
def test_to_gymnasium_vector_is_laid_out_as_gymnasiums_own(max_steps):
    adder = make_adder(max_steps=max_steps)
    ours = adapters.to_gymnasium_vector(adder, 3)
    theirs = gymnasium.vector.SyncVectorEnv(
        [lambda: adapters.to_gymnasium(adder)] * 3,
        autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
    )
    assert ours.num_envs == theirs.num_envs
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    for name in ("single_observation_space", "single_action_space"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("observation_space", "action_space"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert_same_layout(ours.reset(seed=4), theirs.reset(seed=4), "reset")
    ends = 0
    for actions in ACTIONS:
        expected = theirs.step(actions)
        ends += int((expected[2] | expected[3]).sum())
        assert_same_layout(ours.step(actions), expected)
    assert ends >= 4


def test_to_gymnasium_vector_of_a_discrete_space_is_laid_out_as_gymnasiums_own():
    problem = treatment.make(max_steps=2)
    ours = adapters.to_gymnasium_vector(problem, 2)
    theirs = gymnasium.vector.SyncVectorEnv(
        [lambda: adapters.to_gymnasium(problem)] * 2,
        autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
    )
    assert ours.observation_space == theirs.observation_space
    assert_same_layout(ours.reset(seed=0), theirs.reset(seed=0), "reset")
    # The first episode has the same draws in both.
    assert_same_layout(ours.step(np.array([0, 1])), theirs.step(np.array([0, 1])))
    final = [envs.step(np.array([2, 2]))[4] for envs in (ours, theirs)]
    assert_same_layout(final[0]["final_obs"], final[1]["final_obs"])
    assert_same_layout(final[0]["final_info"], final[1]["final_info"])


def test_to_gymnasium_vector_seeds_each_environment(icu):
    envs: Any = adapters.to_gymnasium_vector(icu, 6)
    single = adapters.to_gymnasium(icu)
    expected = [single.reset(seed=3 + place)[0] for place in range(6)]
    np.testing.assert_array_equal(envs.reset(seed=3)[0], expected)
    np.testing.assert_array_equal(envs.reset(seed=[3, 4, 5, 6, 7, 8])[0], expected)
    np.testing.assert_array_equal(envs.reset(seed=[3, None, 5, 6, 7, 8])[0][2:], expected[2:])
    again = [(envs.reset(seed=3), envs.reset()[0])[1] for _ in range(2)]
    np.testing.assert_array_equal(*again)
    assert (again[0] != expected).any()
    seeded = [adapters.to_gymnasium_vector(icu, 6, seed=1).reset()[0] for _ in range(2)]
    np.testing.assert_array_equal(*seeded)
    with pytest.raises(ValueError, match="seed has 2 entries; give one to each of 6 environments"):
        envs.reset(seed=[1, 2])


def test_to_gymnasium_vector_follows_the_pure_environment(icu):
    envs = adapters.to_gymnasium_vector(icu, 4)
    _, info = envs.reset(seed=0)
    params = icu.default_params
    roots = [jax.random.key(place) for place in range(4)]
    running = [core.start(icu, jax.random.fold_in(root, 0), params) for root in roots]
    begin = jax.jit(lambda key: core.start(icu, key, params))
    step = jax.jit(
        lambda key, running, action, fresh: core.auto_reset_step(
            icu, key, running, action, fresh, params
        )
    )
    num_ends = 0
    for number in range(1, 30):
        actions = info["action_mask"].argmax(axis=1)
        observation, reward, terminated, _, info = envs.step(actions)
        for place, root in enumerate(roots):
            key = jax.random.fold_in(root, number)
            fresh = begin(jax.random.fold_in(root, 2**32 - number))
            running[place], outcome = step(key, running[place], int(actions[place]), fresh)
            assert observation[place] == running[place].observation
            assert reward[place] == outcome.reward
            assert terminated[place] == outcome.terminated
            mask = icu.action_mask(running[place].state, params)
            np.testing.assert_array_equal(info["action_mask"][place], mask)
            if terminated[place]:
                num_ends += 1
                assert info["final_obs"][place] == outcome.observation
    assert num_ends > 4


def test_to_gymnasium_vector_works_in_a_wrapper():
    envs = RecordEpisodeStatistics(adapters.to_gymnasium_vector(make_adder(max_steps=3), 3))
    envs.reset(seed=0)
    for actions in ACTIONS:
        envs.step(actions)
    # Twice the sums 1+2, 0+1+0, 2+0+1; 0+0+0, 0+1+2; 2+0+1, 2+1, 0+0+1 of the three columns.
    assert sorted(envs.return_queue) == [0, 2, 2, 6, 6, 6, 6, 6]
    assert sorted(envs.length_queue) == [2, 2, 3, 3, 3, 3, 3, 3]


def test_to_gymnasium_vector_keeps_the_parameters_of_each_patient():
    params = jnp.array([1.0, 2.0, 3.0])
    envs = adapters.to_gymnasium_vector(make_adder(), 3, params=params, params_axis=0)
    np.testing.assert_array_equal(envs.reset(seed=0)[0][:, 1], params)
    for actions in ACTIONS:
        observation, reward, *_ = envs.step(actions)
        np.testing.assert_array_equal(observation[:, 1], params)
        np.testing.assert_array_equal(reward, params * actions)
        assert reward.dtype == np.float64


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([0, 4, 9], "action 4 at [1] is out of range; adder has actions 0 to 3"),
        ([0, 1], "action has shape (2,); it must be (3,): adder has actions 0 to 3"),
        (0, "action has shape (); it must be (3,): adder has actions 0 to 3"),
        ([0.0] * 3, "action has dtype float64; it must be an integer: adder has actions 0 to 3"),
        ([0, 1, 3], "action 3 at [2] is inadmissible in state [0. 2.] at [2] of adder; choose"),
    ],
)
def test_to_gymnasium_vector_refuses_wrong_actions(actions, message):
    envs = adapters.to_gymnasium_vector(make_adder(), 3)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        envs.step(actions)
    np.testing.assert_array_equal(envs.step([1, 1, 1])[0][:, 0], 1)


def test_to_gymnasium_vector_asks_for_what_it_needs():
    envs = adapters.to_gymnasium_vector(make_adder(), 3)
    with pytest.raises(gymnasium.error.ResetNeeded, match="before the first step"):
        envs.step([0, 0, 0])
    with pytest.raises(ValueError, match="options has reset_mask"):
        envs.reset(options={"reset_mask": np.ones(3, bool)})
    with pytest.raises(ValueError, match="num_environments is 0; it must be at least 1"):
        adapters.to_gymnasium_vector(make_adder(), 0)
