"""An environment in Gymnasium's hands keeps its law, and refuses what it should."""

from __future__ import annotations

import re
import subprocess
import sys

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.env_checker import data_equivalence as equivalent

from jaxrl_llm.envs import adapters, gymnax_adapter, icu_sepsis, treatment
from tests import oracles
from tests.envs.problems import make_adder, make_dosing


@pytest.fixture(scope="module")
def icu():
    return icu_sepsis.make(inadmissible="raise")


@pytest.mark.slow
def test_import_loads_neither_library():
    script = "import sys, jaxrl_llm.envs.adapters; print(*sys.modules)"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not set(result.stdout.split()) & {"gymnasium", "gymnax"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        treatment.make,
        lambda: icu_sepsis.make(inadmissible="mean"),
        lambda: gymnax_adapter.from_gymnax("MountainCarContinuous-v0"),
    ],
    ids=["treatment", "icu_sepsis", "MountainCarContinuous-v0"],
)
def test_to_gymnasium_passes_the_checker(make):
    # Every warning of the checker is an error here.
    check_env(adapters.to_gymnasium(make()), skip_render_check=True)


@pytest.mark.slow
def test_to_gymnasium_has_gymnasiums_spaces(icu):
    env = adapters.to_gymnasium(icu)
    assert env.observation_space == gymnasium.spaces.Discrete(716)
    assert env.action_space == gymnasium.spaces.Discrete(25)
    box = adapters.to_gymnasium(make_adder()).observation_space
    low, high = np.array([[0, -5], [6, 5]], np.float32)
    assert box == gymnasium.spaces.Box(low, high, dtype=np.float32)
    doses = adapters.to_gymnasium(make_dosing()).action_space
    low, high = np.array([[-1, -1], [2, 0.7]], np.float32)
    assert doses == gymnasium.spaces.Box(low, high, dtype=np.float32)


def test_to_gymnasium_returns_numpy():
    env = adapters.to_gymnasium(make_adder())
    observation, info = env.reset(seed=0)
    assert observation in env.observation_space
    assert type(info["action_mask"]) is np.ndarray
    np.testing.assert_array_equal(info["action_mask"], [True, True, True, False])
    observation, reward, terminated, truncated, info = env.step(2)
    assert type(observation) is np.ndarray
    assert observation.dtype == np.float32
    assert observation.flags.writeable
    assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)
    assert reward == 4
    assert {type(value) for value in info.values()} == {np.ndarray}
    assert info["action_mask"].all()
    assert info["square"] == 4


def test_to_gymnasium_of_a_discrete_space_returns_its_integers(icu):
    env = adapters.to_gymnasium(icu)
    observation, _ = env.reset(seed=0)
    assert type(observation) is np.int64
    assert observation in env.observation_space


@pytest.mark.slow
def test_to_gymnasium_follows_the_pure_environment(icu):
    env = adapters.to_gymnasium(icu)
    params, root = icu.default_params, jax.random.key(11)
    observation, info = env.reset(seed=11)
    state, expected = icu.reset(jax.random.fold_in(root, 0), params)
    assert observation == expected
    for number in range(1, 40):
        np.testing.assert_array_equal(info["action_mask"], icu.action_mask(state, params))
        action = int(np.flatnonzero(info["action_mask"])[number % info["action_mask"].sum()])
        observation, reward, terminated, truncated, info = env.step(action)
        key = jax.random.fold_in(root, number)
        state, expected = icu.step(key, state, jnp.int32(action), params)
        assert observation == expected.observation
        assert reward == expected.reward
        assert terminated == expected.terminated
        assert truncated == expected.truncated
        jax.tree.map(np.testing.assert_array_equal, info, expected.info)
        if terminated:
            break
    else:
        pytest.fail("the episode should have ended")


def test_to_gymnasium_uses_the_parameters_it_is_given():
    env = adapters.to_gymnasium(make_adder(), params=jnp.float32(-3))
    np.testing.assert_array_equal(env.reset(seed=0)[0], [0, -3])
    assert env.step(1)[1] == -3


def starts(env, first_seed, num=8):
    return [env.reset(seed=first_seed)[0]] + [env.reset()[0] for _ in range(num - 1)]


def test_to_gymnasium_is_a_function_of_its_seed(icu):
    one, other = adapters.to_gymnasium(icu), adapters.to_gymnasium(icu)
    assert starts(one, 5) == starts(other, 5)
    assert starts(one, 5) == starts(one, 5)
    assert starts(one, 5) != starts(one, 6)
    assert len(set(starts(one, 5))) > 1
    seeded = [adapters.to_gymnasium(icu, seed=3) for _ in range(2)]
    assert starts(seeded[0], None) == starts(seeded[1], None)


def test_to_gymnasium_takes_seeds_of_any_size(icu):
    env = adapters.to_gymnasium(icu)
    for seed in (0, 2**32 - 1, 2**70):
        assert env.reset(seed=seed)[0] == env.reset(seed=seed)[0]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (25, "action 25 is out of range; icu_sepsis has actions 0 to 24"),
        (-1, "action -1 is out of range; icu_sepsis has actions 0 to 24"),
        (2**32, "action 4294967296 is out of range; icu_sepsis has actions 0 to 24"),
        ([1], "action has shape (1,); it must be (): icu_sepsis has actions 0 to 24"),
        (1.0, "action has dtype float64; it must be an integer: icu_sepsis has actions 0 to 24"),
        (True, "action has dtype bool; it must be an integer: icu_sepsis has actions 0 to 24"),
        ("1", "action has dtype <U1; it must be an integer: icu_sepsis has actions 0 to 24"),
        (None, "action has dtype object; it must be an integer: icu_sepsis has actions 0 to 24"),
    ],
)
def test_to_gymnasium_refuses_a_wrong_discrete_action(icu, action, message):
    env = adapters.to_gymnasium(icu)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        env.step(action)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ([0.0, 0.8], "action 0.8 at [1] is out of range; dosing has actions -1.0 to (2.0, 0.7)"),
        ([np.nan, 0], "action nan at [0] is out of range; dosing has actions -1.0 to (2.0, 0.7)"),
        ([1e300, 0], "action 1e+300 at [0] is out of range; dosing has actions -1.0 to (2.0, 0.7)"),
        (0.5, "action has shape (); it must be (2,): dosing has actions -1.0 to (2.0, 0.7)"),
        (["a", "b"], "action has dtype <U1; it must be a number: dosing has actions"),
    ],
)
def test_to_gymnasium_refuses_a_wrong_continuous_action(action, message):
    env = adapters.to_gymnasium(make_dosing())
    env.reset(seed=0)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        env.step(action)


@pytest.mark.parametrize(
    "action", [[2.0, 0.7], [-1, 0], np.array([2, 0.7], np.float32), jnp.ones(2) / 2]
)
def test_to_gymnasium_takes_actions_up_to_the_bounds(action):
    env = adapters.to_gymnasium(make_dosing())
    env.reset(seed=0)
    np.testing.assert_array_equal(env.step(action)[0], np.asarray(action, np.float32))


@pytest.mark.parametrize("action", [2, np.int8(2), np.array(2), jnp.int32(2)])
def test_to_gymnasium_takes_any_integer(action):
    env = adapters.to_gymnasium(make_adder())
    env.reset(seed=0)
    assert env.step(action)[1] == 4


def test_to_gymnasium_refuses_an_inadmissible_action_and_stays_where_it_was(icu):
    env, other = adapters.to_gymnasium(icu), adapters.to_gymnasium(icu)
    observation, info = env.reset(seed=0)
    other.reset(seed=0)
    refused = int(np.flatnonzero(~info["action_mask"])[0])
    allowed = int(np.flatnonzero(info["action_mask"])[0])
    message = (
        f"action {refused} is inadmissible in state {observation} of icu_sepsis; "
        "choose one that info['action_mask'] allows"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        env.step(refused)
    assert equivalent(env.step(allowed), other.step(allowed), exact=True)


def test_to_gymnasium_asks_for_a_reset():
    env = adapters.to_gymnasium(make_adder())
    with pytest.raises(gymnasium.error.ResetNeeded, match="before the first step"):
        env.step(0)
    env.reset(seed=0)
    env.step(2)
    assert env.step(1)[2]
    with pytest.raises(gymnasium.error.ResetNeeded, match="the episode has ended"):
        env.step(0)
    env.reset()
    env.step(0)


def test_to_gymnasium_truncates():
    env = adapters.to_gymnasium(make_adder(max_steps=2))
    env.reset(seed=0)
    assert env.step(0)[2:4] == (False, False)
    assert env.step(0)[2:4] == (False, True)
    with pytest.raises(gymnasium.error.ResetNeeded, match="the episode has ended"):
        env.step(0)


def test_to_gymnasium_renders_a_line():
    env = adapters.to_gymnasium(make_adder(), render_mode="ansi")
    env.reset(seed=0)
    env.step(1)
    assert env.render() == "adder, step 1: [1. 2.]"
    assert adapters.to_gymnasium(make_adder()).render() is None
    with pytest.raises(ValueError, match="render_mode is 'human'; it must be one of None, 'ansi'"):
        adapters.to_gymnasium(make_adder(), render_mode="human")


@pytest.mark.slow
def test_to_gymnasium_keeps_the_survival_of_the_random_policy(icu):
    env, generator = adapters.to_gymnasium(icu, seed=0), np.random.default_rng(0)
    num_episodes, survived = 300, 0
    for _ in range(num_episodes):
        observation, info = env.reset()
        ended = False
        while not ended:
            action = generator.choice(np.flatnonzero(info["action_mask"]))
            observation, _, terminated, truncated, info = env.step(action)
            ended = terminated or truncated
        survived += observation == icu_sepsis.SURVIVAL
    expected = oracles.ICU_SEPSIS_RETURN["random"]
    error = np.sqrt(expected * (1 - expected) / num_episodes)
    assert abs(survived / num_episodes - expected) < 4 * error
