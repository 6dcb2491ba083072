"""ICU-Sepsis through noisy centres: what is shown and hidden, and that nothing else changed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import core, icu_sepsis, icu_sepsis_vitals
from jaxrl_llm.kernels import bellman, finite_horizon
from jaxrl_llm.types import Box

NUM_PATIENTS = 4096


@pytest.fixture(scope="module")
def problem():
    return icu_sepsis.mdp()


def step_all(environment, states):
    """One step of a patient in each of `states`, with the first allowed action."""
    params = environment.default_params
    patients = jnp.asarray(states, jnp.int32)
    history = environment.observation_space.shape[0] // 94
    shown = jnp.full((len(states), history, 94), 0.25)
    state = icu_sepsis_vitals.State(patient=patients, shown=shown)
    mask = jax.vmap(environment.action_mask, in_axes=(0, None))(state, params)
    keys = jax.random.split(jax.random.key(0), len(states))
    step = jax.jit(jax.vmap(environment.step, in_axes=(0, 0, 0, None)))
    return step(keys, state, jnp.argmax(mask, axis=-1), params)[1]


def test_centers_are_standardised_and_differ_in_every_state():
    centers = np.asarray(icu_sepsis_vitals.centers(), np.float64)
    np.testing.assert_allclose(centers[:713].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(centers[:713].std(axis=0), 1, atol=1e-5)
    assert not centers[713:].any()
    assert len(np.unique(centers[:713].round(3), axis=0)) == 713
    square = (centers[:713] ** 2).sum(-1)
    distance = square[:, None] + square - 2 * centers[:713] @ centers[:713].T
    assert (distance + 1e3 * np.eye(713)).min() > 0.01


@pytest.mark.slow
def test_make_shows_the_exact_centre_without_noise():
    """The state is the nearest centre, so the best value is ICU-Sepsis's own, .8751."""
    environment = icu_sepsis_vitals.make(noise=0, missing=0, max_steps=None)
    result = step_all(environment, np.arange(713))
    state = np.asarray(result.info["state"])
    centers = np.asarray(icu_sepsis_vitals.centers())
    features, mask = np.split(np.asarray(result.observation), 2, axis=-1)
    alive = state < 713
    np.testing.assert_allclose(features[alive] * 3, centers[state[alive]], atol=1e-5)
    assert mask[alive].all()
    assert not mask[~alive].any()
    assert not features[~alive].any()
    np.testing.assert_array_equal(result.terminated, ~alive)
    np.testing.assert_array_equal(result.info["action_mask"], icu_sepsis.data().admissible[state])


@pytest.mark.slow
def test_make_has_the_values_of_icu_sepsis(problem):
    """The optimal policy, which finds the state by its centre, reaches .8751 of survival."""
    solved = jax.jit(bellman.value_iteration)(problem)
    assert float(problem.initial @ solved.value) == pytest.approx(0.8751, abs=1e-4)
    environment = icu_sepsis_vitals.make(noise=0, missing=0)
    centers = environment.default_params.centers[:713]

    def policy(noise, observation, action_mask):
        features = 3 * observation[:, :47]
        nearest = jnp.argmax(features @ centers.T - jnp.sum(centers**2, -1)[None] / 2, axis=-1)
        return solved.policy[nearest], {}

    num_steps = 60
    running = core.start_batch(environment, jax.random.key(0), NUM_PATIENTS)
    _, batch = core.rollout(environment, policy, jax.random.key(1), running, num_steps=num_steps)
    first = jnp.cumsum(batch.terminated, axis=0) - batch.terminated == 0
    survival = float(jnp.sum(batch.reward * first) / NUM_PATIENTS)
    # Within so many steps; the rest of the .8751 survives later.
    exact = finite_horizon.horizon_evaluation(problem, solved.policy, num_steps)[0]
    expected = float(problem.initial @ exact)
    assert 0.86 < expected < 0.8751
    assert abs(survival - expected) < 4 * np.sqrt(expected * (1 - expected) / NUM_PATIENTS)


@pytest.mark.slow
def test_make_draws_noise_and_missing_values_as_asked():
    environment = icu_sepsis_vitals.make(noise=0.5, missing=0.3, max_steps=None)
    result = step_all(environment, np.tile(np.arange(713), 4))
    state = np.asarray(result.info["state"])
    features, mask = np.split(np.asarray(result.observation, np.float64), 2, axis=-1)
    alive = state < 713
    share = mask[alive].mean()
    assert abs(share - 0.7) < 4 * np.sqrt(0.21 / mask[alive].size)
    assert not features[mask == 0].any()
    error = (3 * features - np.asarray(icu_sepsis_vitals.centers())[state])[mask == 1]
    assert abs(error.mean()) < 4 * 0.5 / np.sqrt(error.size)
    assert abs(error.std() / 0.5 - 1) < 4 / np.sqrt(2 * error.size)


@pytest.mark.slow
def test_make_carries_the_last_value_forward_and_keeps_a_history():
    environment = icu_sepsis_vitals.make(noise=0, missing=1, fill="last", history=3, max_steps=None)
    result = step_all(environment, np.arange(100))
    shown = np.asarray(result.observation).reshape(100, 3, 94)
    alive = ~np.asarray(result.terminated)
    np.testing.assert_array_equal(shown[alive, 0, :47], 0.25)
    assert not shown[:, 0, 47:].any()
    np.testing.assert_array_equal(shown[:, 1:], 0.25)
    _, observation = environment.reset(jax.random.key(0), environment.default_params)
    assert environment.observation_space == Box(shape=observation.shape, low=-np.inf, high=np.inf)
    assert observation.shape == (282,)
    assert not observation.any()
    assert len(icu_sepsis_vitals.observation_names) == 94


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -1}, "noise is -1; it must be at least 0"),
        ({"missing": 1.5}, r"missing is 1.5; it must be in \[0, 1\]"),
        ({"fill": "mean"}, "fill is 'mean'; it must be one of 'zero', 'last'"),
        ({"history": 0}, "history is 0; it must be at least 1"),
    ],
)
def test_make_refuses_options_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        icu_sepsis_vitals.make(**options)
