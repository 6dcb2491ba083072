"""A patient's day: what the pump, the sensor and the clock do."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import core, glucose, meals
from jaxrl_llm.types import Discrete

NUM = 32


@pytest.fixture(scope="module")
def environment():
    return glucose.make(noise=False, hours=6)


@pytest.fixture(scope="module")
def follow(environment):
    """`(key, actions [T, B, 1]) -> (states before, time steps [T, B])`, without resets."""

    @jax.jit
    def run(key, actions):
        running = core.start_batch(environment, key, actions.shape[1])
        step = jax.vmap(environment.step, in_axes=(0, 0, 0, None))

        def body(state, inputs):
            time, action = inputs
            keys = jax.random.split(jax.random.fold_in(jax.random.key(7), time), len(action))
            after, time_step = step(keys, state, action, environment.default_params)
            return after, (state, time_step)

        inputs = jnp.arange(len(actions)), actions
        _, outputs = jax.lax.scan(body, running.state, inputs)
        return outputs

    return run


BASAL = float(glucose.to_action(1 / 12))


def test_to_action_is_the_inverse_of_to_dose():
    hours = jnp.array([0.0, 0.01, 1 / 12, 1.0, 10.0])
    np.testing.assert_allclose(glucose.to_dose(glucose.to_action(hours)), hours, rtol=2e-5)
    np.testing.assert_allclose(glucose.to_action(jnp.array([-1.0, 99.0])), [0, 1])


@pytest.mark.slow
def test_step_delivers_the_dose_and_keeps_the_patient(follow):
    actions = jnp.full((72, NUM, 1), BASAL).at[3].set(0.8).at[4].set(0.0)
    states, steps = follow(jax.random.key(0), actions)
    basal = np.asarray(states.state.patient.basal)
    jax.tree.map(
        lambda leaf: np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape)),
        (states.state.patient, states.state.plan),
    )
    hours = np.full((72, NUM), 1 / 12)
    hours[3], hours[4] = 10 * np.expm1(6.4) / np.expm1(8), 0
    np.testing.assert_allclose(steps.info["insulin"], hours * basal, rtol=1e-5)
    # (1 + t/55) exp(-t/55) of what each step gave beyond the basal rate is still on board.
    age = 5.0 * (np.arange(72)[:, None] - np.arange(72)[None] + 1)
    left = np.where(age > 0, (1 + age / 55) * np.exp(-age / 55), 0)
    expected = left @ (hours - 1 / 12) * basal
    np.testing.assert_allclose(steps.info["insulin_on_board"], expected, atol=1e-3)
    assert np.array_equal(steps.truncated[-1], np.ones(NUM, bool))
    assert not steps.truncated[:-1].any()


@pytest.mark.slow
def test_observation_shows_what_info_says(follow):
    actions = jnp.full((72, NUM, 1), BASAL)
    _, steps = follow(jax.random.key(1), actions)
    assert steps.observation.shape[-1] == len(glucose.observation_names) == 12
    seen = glucose.read(steps.observation)
    np.testing.assert_allclose(seen.readings[..., -1], steps.info["reading"], rtol=1e-5)
    np.testing.assert_allclose(seen.readings[5:, :, 0], steps.info["reading"][:-5], rtol=1e-5)
    np.testing.assert_allclose(seen.basal, steps.info["basal"], rtol=1e-6)
    np.testing.assert_allclose(seen.insulin_on_board, steps.info["insulin_on_board"], atol=1e-5)
    # A meal is announced at one step, 15 minutes before the step in which it is eaten.
    eaten = np.asarray(steps.info["carbohydrates"])
    assert (eaten > 0).sum() > 0
    np.testing.assert_allclose(seen.announced[:-4], eaten[4:], rtol=1e-5)
    angle = 2 * np.pi * 5 * np.arange(1, 73) / 1440
    np.testing.assert_allclose(steps.observation[:, 0, 10], np.sin(angle), atol=1e-6)
    np.testing.assert_allclose(steps.observation[:, 0, 11], np.cos(angle), atol=1e-6)
    parts = [steps.info[name] for name in ("in_range", "hypoglycaemia", "hyperglycaemia")]
    np.testing.assert_array_equal(sum(parts), np.ones((72, NUM)))
    np.testing.assert_allclose(steps.reward, -glucose.risk(steps.info["glucose"]), rtol=1e-5)
    assert np.max(np.abs(steps.observation)) <= 4


@pytest.mark.parametrize("action", [1.0, 0.0, 1e9, -1e9, np.nan, np.inf])
def test_extreme_actions_leave_everything_finite(follow, action):
    _, steps = follow(jax.random.key(3), jnp.full((72, NUM, 1), action))
    for leaf in jax.tree.leaves(steps):
        assert np.all(np.isfinite(leaf))
    on_board = steps.info["insulin_on_board"] / steps.info["basal"]
    assert np.max(on_board) <= glucose.MAX_ON_BOARD + 1e-3
    ended = steps.terminated
    extreme = (steps.info["glucose"] < 40) | (steps.info["glucose"] > 600)
    np.testing.assert_array_equal(ended, extreme)
    np.testing.assert_array_less(steps.reward[np.asarray(ended)], -100 + 1e-3)
    if action in (1.0, 1e9):
        assert ended[-1].all()


@pytest.mark.slow
def test_patients_differ_after_a_reset_and_not_before():
    environment = glucose.make(hours=0.5, announcement=None)
    key, start_key = jax.random.split(jax.random.key(4))
    running = core.start_batch(environment, start_key, 8)

    def policy(key, observation, mask):
        del key, mask
        np.testing.assert_equal(observation.shape, (8, 12))
        return jnp.full((8, 1), BASAL), {}

    _, steps = jax.jit(partial(core.rollout, environment, policy, num_steps=18))(key, running)
    basal = np.asarray(steps.observation[..., 9])
    for episode in range(3):
        rows = basal[6 * episode : 6 * episode + 6]
        np.testing.assert_array_equal(rows, np.broadcast_to(rows[:1], rows.shape))
    assert len(np.unique(basal)) == 24
    assert np.array_equal(np.flatnonzero(steps.truncated[:, 0]), [5, 11, 17])
    np.testing.assert_array_equal(steps.observation[..., 7:9], 0)


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["magni", "range"])
def test_discrete_doses_and_other_rewards(reward):
    environment = glucose.make(action="discrete", reward=reward, minutes=3, noise=False)
    state, _ = environment.reset(jax.random.key(0), environment.default_params)
    assert environment.action_space == Discrete(num=len(glucose.DOSES))
    eager = environment.step(jax.random.key(1), state, jnp.int32(6), environment.default_params)
    jitted = jax.jit(environment.step)(
        jax.random.key(1), state, jnp.int32(6), environment.default_params
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5), eager, jitted)
    info = jitted[1].info
    np.testing.assert_allclose(info["insulin"], glucose.DOSES[6] * info["basal"], rtol=1e-5)
    level = np.asarray(info["glucose"], np.float64)
    expected = {
        "magni": -((3.5506 * (np.log(level) ** 0.8353 - 3.7932)) ** 2) / 10,
        "range": 1.0 if 70 <= level <= 180 else 0.0,
    }
    np.testing.assert_allclose(jitted[1].reward, expected[reward], rtol=1e-3, atol=1e-5)


def test_risk_is_zero_in_the_middle_and_one_at_both_ends():
    np.testing.assert_allclose(glucose.risk(jnp.array([20.0, 112.5, 600.0])), [1, 0, 1], atol=0.01)
    lowest = jnp.argmin(glucose.risk(jnp.arange(600.0), kind="magni"))
    assert 135 < int(lowest) < 142


@pytest.mark.slow
def test_two_days_have_two_days_of_meals():
    environment = glucose.make(hours=48)
    state, _ = environment.reset(jax.random.key(0), environment.default_params)
    assert state.state.plan.time.shape == (2 * len(meals.names),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "hybrid"}, "action is 'hybrid'; it must be one of"),
        ({"reward": "score"}, "reward is 'score'; it must be one of"),
        ({"model": "bergman"}, "model is 'bergman'; it must be one of"),
        ({"minutes": 1}, "minutes is 1; it must be in [3, 15]"),
        ({"hours": 0}, "hours is 0; it must be at least"),
        ({"hours": 0.9}, "hours is 0.9; it must be a multiple of 5 minutes"),
        ({"announcement": -5}, "announcement is -5; it must be in [0, 60]"),
        ({"termination_reward": float("nan")}, "termination_reward is nan; it must be finite"),
    ],
)
def test_make_refuses(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        glucose.make(**options)
