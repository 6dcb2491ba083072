"""Chemotherapy: known returns of constant doses, and the equations beside an adaptive solver."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jaxrl_llm.envs import chemotherapy, core
from tests.envs import simulators

# Undiscounted returns of 600 steps of a constant dose without noise, by an adaptive solver.
RETURNS = {0.0: -164.34, 0.25: -445.55, 0.5: 65.95, 0.75: -13.01, 1.0: -134.02}
DEATH_STEP = 73  # of no drug
BEST_DOSE, BEST_RETURN = 0.467, 67.84


def constant_doses(environment, doses):
    """Returns, lengths and info `[B, 600]` of one episode of each dose; 0 after death."""
    params = environment.default_params

    @jax.jit
    @jax.vmap
    def episode(dose):
        state, _ = environment.reset(jax.random.key(0), params)

        def body(carry, key):
            state, alive = carry
            state, time_step = environment.step(key, state, dose[None], params)
            reward = jnp.where(alive, time_step.reward, 0)
            return (state, alive & ~time_step.terminated), (reward, alive, time_step.info)

        keys = jax.random.split(jax.random.key(1), 600)
        return jax.lax.scan(body, (state, jnp.bool_(True)), keys)[1]

    with jax.debug_key_reuse(False):
        reward, alive, info = jax.tree.map(np.asarray, episode(doses))
    return reward.sum(axis=1, dtype=np.float64), alive.sum(axis=1), info


def equations(_, state, dose):
    """The module's docstring in NumPy, with the constants put in."""
    n, t, i, b = state
    kill = 1 - np.exp(-b)
    return [
        n * (1 - n) - t * n - 0.1 * kill * n,
        1.5 * t * (1 - t) - 0.5 * i * t - t * n - 0.3 * kill * t,
        0.33 + 0.01 * i * t / (0.3 + t) - i * t - 0.2 * i - 0.2 * kill * i,
        dose - b,
    ]


def test_constant_doses_have_the_known_returns_and_the_best_is_known():
    grid = jnp.linspace(0, 1, 1001)
    doses = jnp.concatenate([jnp.array(list(RETURNS)), grid])
    total, length, _ = constant_doses(chemotherapy.make(), doses)
    np.testing.assert_allclose(total[:5], list(RETURNS.values()), atol=0.02)
    np.testing.assert_array_equal(length[:5], [DEATH_STEP, 600, 600, 600, 600])
    best = total[5:].argmax()
    assert abs(grid[best] - BEST_DOSE) < 0.005
    np.testing.assert_allclose(total[5:].max(), BEST_RETURN, atol=0.02)


@pytest.mark.slow
def test_environment_in_float64_follows_an_adaptive_solver(x64):
    doses = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    total, length, info = constant_doses(chemotherapy.make(num_substeps=8), jnp.asarray(doses))
    names = ("normal_cells", "tumour_cells", "immune_cells", "drug")
    for row, dose in enumerate(doses):
        steps = length[row]
        times = 0.25 * np.arange(1, steps + 1)
        expected = solve_ivp(
            equations,
            (0, times[-1]),
            [0.9, 0.2, 0.005, 0],
            t_eval=times,
            args=(dose,),
            method="DOP853",
            rtol=1e-12,
            atol=1e-14,
        ).y
        found = np.stack([info[name][row, :steps] for name in names])
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
        reward = expected[0] / 0.9 - expected[1] / 0.2 - dose
        reward[-1] = -100 if expected[0, -1] < 0.63 else reward[-1]
        np.testing.assert_allclose(total[row], reward.sum(), rtol=1e-6)
        np.testing.assert_allclose(total[row], RETURNS[float(dose)], atol=0.005)


def test_derivative_is_that_of_the_equations(x64):
    generator = np.random.default_rng(0)
    for _ in range(5):
        n, t, i, b, dose = generator.random(5)
        cells = chemotherapy.Cells(
            normal=jnp.asarray(n), tumour=jnp.asarray(t), immune=jnp.asarray(i), drug=jnp.asarray(b)
        )
        found = chemotherapy.derivative(cells, jnp.asarray(dose), chemotherapy.default_rates())
        expected = equations(0, (n, t, i, b), dose)
        np.testing.assert_allclose(
            [found.normal, found.tumour, found.immune, found.drug], expected, rtol=1e-12
        )


@pytest.mark.slow
@pytest.mark.parametrize("action", ["continuous", pytest.param("discrete", marks=pytest.mark.slow)])
def test_episodes_are_sound_under_any_dose(action):
    environment = chemotherapy.make(
        action=action,
        max_steps=120,
        patient_variation=0.2,
        process_noise=0.2,
        observation_noise=0.1,
    )
    batch = simulators.assert_sound(environment, max_steps=120)
    assert batch.terminated.any()
    np.testing.assert_array_equal(batch.reward[batch.terminated], -100)
    assert (batch.reward[~batch.terminated] > -100).all()


def test_step_jitted_equals_eager_and_keeps_the_patient():
    environment = chemotherapy.make(patient_variation=0.2, observation_noise=0.1)
    before, after = simulators.assert_jit_equals_eager(environment, jnp.array([0.3]))
    jax.tree.map(np.testing.assert_array_equal, before.rates, after.rates)
    assert before.rates.tumour_growth != chemotherapy.default_rates().tumour_growth


def test_discrete_doses_are_equally_spaced_and_a_continuous_one_is_clipped():
    discrete = chemotherapy.make(action="discrete", num_doses=3)
    continuous = chemotherapy.make()
    key = jax.random.key(0)
    with jax.debug_key_reuse(False):
        for index, rate in enumerate((-0.3, 0.5, 1.7)):
            state, _ = discrete.reset(key, discrete.default_params)
            other, _ = continuous.reset(key, continuous.default_params)
            _, one = discrete.step(key, state, jnp.int32(index), discrete.default_params)
            _, two = continuous.step(key, other, jnp.array([rate]), continuous.default_params)
            assert one.info["dose"] == index / 2 == two.info["dose"]
            np.testing.assert_allclose(one.reward, two.reward, rtol=1e-6)


def test_noise_has_the_size_it_says():
    environment = chemotherapy.make(process_noise=0.2, observation_noise=0.1)
    plain = chemotherapy.make()
    params = environment.default_params
    state, observation = plain.reset(jax.random.key(0), params)
    action = jnp.array([0.5])
    _, exact = plain.step(jax.random.key(0), state, action, params)
    keys = jax.random.split(jax.random.key(2), 4096)
    seen = jax.jit(jax.vmap(lambda key: environment.reset(key, params)[1]))(keys)
    error = np.log(np.asarray(seen)[:, :3] / np.asarray(observation)[:3])
    np.testing.assert_allclose(error.std(axis=0), 0.1, rtol=0.06)
    keys = jax.random.split(jax.random.key(3), 4096)
    step = jax.jit(jax.vmap(lambda key: environment.step(key, state, action, params)[1].info))
    info = step(keys)
    for name in ("normal_cells", "tumour_cells", "immune_cells"):
        deviation = np.log(info[name] / exact.info[name]).std()
        np.testing.assert_allclose(deviation, 0.2 * np.sqrt(0.25), rtol=0.06)
    np.testing.assert_array_equal(info["drug"], exact.info["drug"])


@pytest.mark.slow
def test_a_patient_may_be_given_as_parameters():
    environment = chemotherapy.make(max_steps=3)
    params = environment.default_params
    frail = params.replace(lethal=jnp.float32(0.89))
    running = core.start_batch(environment, jax.random.key(0), 2, frail)
    _, batch = core.rollout(
        environment,
        lambda key, observation, mask: (jnp.ones((2, 1)), {}),
        jax.random.key(1),
        running,
        frail,
        num_steps=1,
    )
    assert batch.terminated.all()


@pytest.mark.slow
@pytest.mark.parametrize("action", ["continuous", "discrete"])
def test_environment_passes_gymnasiums_checker(action):
    simulators.assert_passes_gymnasiums_checker(
        chemotherapy.make(action=action, observation_noise=0.1)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "both"}, "action is 'both'; it must be one of 'continuous', 'discrete'"),
        ({"num_doses": 1}, "num_doses is 1; it must be at least 2"),
        ({"patient_variation": -0.1}, "patient_variation is -0.1; it must be in [0, 1]"),
        ({"process_noise": 2}, "process_noise is 2; it must be in [0, 1]"),
        ({"observation_noise": 2}, "observation_noise is 2; it must be in [0, 1]"),
        ({"num_substeps": 0}, "num_substeps is 0; it must be at least 1"),
        ({"max_steps": 0}, "max_steps is 0; it must be at least 1"),
    ],
)
def test_make_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        chemotherapy.make(**options)
