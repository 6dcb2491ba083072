"""HIV: published equilibria, the equations in NumPy, and schedules beside an adaptive solver."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jaxrl_llm.envs import hiv
from tests.envs import simulators

PUBLISHED = {
    "unhealthy": (163573, 11945, 5, 46, 63919, 24),
    "healthy": (967839, 76, 621, 6, 415, 353108),
}
NAMES = tuple(field.name for field in dataclasses.fields(hiv.Cells))
EFFICACY = ((0, 0), (0.7, 0), (0, 0.3), (0.7, 0.3))

# Errors of base-10 logarithms over 200 steps in float32, of all but T2, and of T2.
TOLERANCE, MACROPHAGE_TOLERANCE = 2e-4, 4e-3


def equations(_, state, rti, pi):
    """The module's docstring in NumPy, with the constants put in."""
    t1, t1s, t2, t2s, v, e = state
    infected = t1s + t2s
    one = (1 - rti) * 8e-7 * v * t1
    two = (1 - 0.34 * rti) * 1e-4 * v * t2
    return np.array(
        [
            1e4 - 0.01 * t1 - one,
            one - 0.7 * t1s - 1e-5 * e * t1s,
            31.98 - 0.01 * t2 - two,
            two - 0.7 * t2s - 1e-5 * e * t2s,
            (1 - pi) * 100 * 0.7 * infected - 13 * v - one - two,
            1
            + 0.3 * infected / (infected + 100) * e
            - 0.25 * infected / (infected + 500) * e
            - 0.1 * e,
        ]
    )


def cells_of(values):
    return hiv.Cells(**dict(zip(NAMES, jnp.asarray(values, float), strict=True)))


def array_of(cells):
    return jnp.stack([getattr(cells, name) for name in NAMES])


def untreated(values):
    nothing = jnp.zeros(())
    return array_of(hiv.derivative(cells_of(values), nothing, nothing, hiv.default_rates()))


@pytest.mark.parametrize("which", list(PUBLISHED))
def test_published_equilibria_are_stable_fixed_points(which, x64):
    start = jnp.asarray(PUBLISHED[which], float)
    scale = jnp.diag(start)
    jacobian = jax.jit(jax.jacfwd(untreated))
    exact = start
    for _ in range(10):
        # Newton's method in relative coordinates: the cells differ by five orders of magnitude.
        slope = jacobian(exact) @ scale
        exact = exact - scale @ jnp.linalg.solve(slope, untreated(exact))
    np.testing.assert_allclose(untreated(exact) / exact, 0, atol=1e-12)
    np.testing.assert_array_equal(np.round(exact), PUBLISHED[which])
    np.testing.assert_allclose(array_of(hiv.equilibrium(which)), exact, rtol=1e-7)
    assert (np.linalg.eigvals(jacobian(exact)).real < 0).all()


def test_derivative_is_that_of_the_equations(x64):
    generator = np.random.default_rng(0)
    for _ in range(5):
        values = 10 ** generator.uniform((4, 0, -1, -1, 0, 1), (6, 5, 3, 2, 6, 5))
        rti, pi = generator.random(2)
        expected = equations(0, values, rti, pi)
        given = cells_of(values), jnp.asarray(rti), jnp.asarray(pi), hiv.default_rates()
        np.testing.assert_allclose(array_of(hiv.derivative(*given)), expected, rtol=1e-10)
        # A limit that nothing reaches changes nothing.
        limited = hiv.derivative(*given, fastest_infection=1e6)
        np.testing.assert_allclose(array_of(limited), expected, rtol=1e-10)


def test_fastest_infection_slows_macrophages_and_keeps_where_they_settle(x64):
    values = np.array([5e5, 1e5, 2.0, 30.0, 1e6, 20.0])
    given = jnp.zeros(()), jnp.zeros(()), hiv.default_rates()
    loss = 0.01 + 1e-4 * values[4]
    limit = loss / 4

    def slopes(values):
        limited = hiv.derivative(cells_of(values), *given, fastest_infection=limit)
        return np.asarray(array_of(limited)), equations(0, values, 0, 0)

    limited, exact = slopes(values)
    np.testing.assert_allclose(limited[2], exact[2] / 4, rtol=1e-10)
    # What macrophages do not lose is not infected either.
    np.testing.assert_allclose(limited[2] + limited[3], exact[2] + exact[3], rtol=1e-10)
    values[2] = 31.98 / loss
    limited, exact = slopes(values)
    np.testing.assert_allclose(limited, exact, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("start", list(PUBLISHED))
def test_an_untreated_patient_stays_at_the_equilibrium(start):
    environment = hiv.make(start=start)
    trajectory = simulate(environment, np.zeros((1, 200), int))[0]
    expected = np.asarray(array_of(hiv.equilibrium(start)))
    np.testing.assert_allclose(trajectory, np.broadcast_to(expected, (200, 6)), rtol=1e-3)


def simulate(environment, schedules):
    """Cells `[B, T, 6]` after each step of the schedules `[B, T]`."""
    params = environment.default_params

    @jax.jit
    @jax.vmap
    def course(schedule):
        state, _ = environment.reset(jax.random.key(0), params)

        def body(state, action):
            state, time_step = environment.step(jax.random.key(0), state, action, params)
            return state, jnp.stack([time_step.info[name] for name in NAMES])

        return jax.lax.scan(body, state, schedule)[1]

    with jax.debug_key_reuse(False):
        return np.asarray(course(jnp.asarray(schedules, jnp.int32)))


def reference(schedule):
    """The same in float64 by an adaptive stiff solver."""
    state, states = np.asarray(array_of(hiv.equilibrium("unhealthy")), np.float64), []
    for action in schedule:
        state = solve_ivp(
            equations,
            (0, 5),
            state,
            args=EFFICACY[action],
            method="LSODA",
            rtol=1e-9,
            atol=1e-9,
        ).y[:, -1]
        states.append(state)
    return np.array(states)


def assert_near(found, expected):
    error = np.abs(np.log10(found / expected)).reshape(-1, 6).max(axis=0)
    assert error[2] < MACROPHAGE_TOLERANCE
    assert np.delete(error, 2).max() < TOLERANCE


def test_float32_follows_an_adaptive_solver_through_a_rebound():
    # Both drugs for 50 days, then none: the virus rebounds to 30 times its equilibrium.
    schedule = np.array([3] * 10 + [0] * 15)
    expected = reference(schedule)
    assert expected[:, 4].max() > 5e5
    assert_near(simulate(hiv.make(), schedule[None])[0], expected)


@pytest.mark.slow
def test_float32_follows_an_adaptive_solver_over_whole_episodes():
    generator = np.random.default_rng(0)
    schedules = np.array(
        [
            [0] * 200,
            [1] * 200,
            [2] * 200,
            [3] * 200,
            [3] * 40 + [0] * 160,
            ([3] * 10 + [0] * 10) * 10,
            ([3] * 20 + [0] * 20) * 5,
            generator.integers(0, 4, 200),
            np.repeat(generator.integers(0, 4, 40), 5),
        ]
    )
    expected = np.stack([reference(schedule) for schedule in schedules])
    assert expected[..., 4].max() > 1e6
    found = simulate(hiv.make(), schedules)
    assert_near(found, expected)
    # Twice the substeps bring the macrophages nearer.
    finer = np.abs(np.log10(simulate(hiv.make(num_substeps=200), schedules) / expected))
    assert finer[..., 2].max() < 4e-4


def test_reward_is_the_published_one():
    environment = hiv.make(reward_scale=0.5)
    params = environment.default_params
    state, _ = environment.reset(jax.random.key(0), params)
    step = jax.jit(environment.step)
    for action, drug_cost in enumerate((0, 9800, 180, 9980)):
        _, time_step = step(jax.random.key(action), state, jnp.int32(action), params)
        info = time_step.info
        expected = -0.1 * info["virus"] - drug_cost + 1000 * info["cytotoxic"]
        np.testing.assert_allclose(time_step.reward, 0.5 * expected, rtol=1e-5)
        assert (float(info["rti"]), float(info["pi"])) == pytest.approx(EFFICACY[action])


def test_observation_is_a_scaled_logarithm():
    environment = hiv.make()
    state, observation = environment.reset(jax.random.key(0), environment.default_params)
    low, high = np.array([3.5, -3, -2, -3, -2, 0]), np.array([6.5, 6.5, 4, 4, 7, 6.5])
    logarithm = np.log10(np.asarray(array_of(state.state.cells)))
    np.testing.assert_allclose(low + (observation + 1) / 2 * (high - low), logarithm, rtol=1e-4)
    assert np.asarray(hiv.observe(cells_of(np.zeros(6)))).tolist() == [-1] * 6
    assert np.asarray(hiv.observe(cells_of(np.full(6, 1e9)))).tolist() == [1] * 6


@pytest.mark.slow
def test_episodes_are_sound_under_any_schedule():
    environment = hiv.make(max_steps=40, patient_variation=0.2, num_substeps=50)
    batch = simulators.assert_sound(environment, max_steps=40, num_patients=32)
    assert not batch.terminated.any()


def test_step_jitted_equals_eager_and_keeps_the_patient():
    environment = hiv.make(patient_variation=0.2, num_substeps=50)
    before, after = simulators.assert_jit_equals_eager(environment, jnp.int32(2), tolerance=1e-4)
    jax.tree.map(np.testing.assert_array_equal, before.rates, after.rates)
    assert before.rates.k1 != hiv.default_rates().k1


@pytest.mark.slow
def test_environment_passes_gymnasiums_checker():
    simulators.assert_passes_gymnasiums_checker(hiv.make(reward_scale=1e-6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "cured"}, "start is 'cured'; it must be one of 'unhealthy', 'healthy'"),
        ({"patient_variation": 0.6}, "patient_variation is 0.6; it must be in [0, 0.5]"),
        ({"reward_scale": 0}, "reward_scale is 0; it must be greater than 0"),
        ({"num_substeps": 49}, "num_substeps is 49; it must be at least 50"),
        ({"max_steps": 0}, "max_steps is 0; it must be at least 1"),
    ],
)
def test_make_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        hiv.make(**options)
