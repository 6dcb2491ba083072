"""The Runge-Kutta step beside closed forms and an adaptive solver."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from jaxrl_llm.envs.ode import rk4_step

MATRIX = np.array([[-0.5, 2.0, 0.0], [-2.0, -0.5, 0.3], [0.1, 0.0, -1.0]])
START = np.array([1.0, -0.5, 2.0])


def linear(state):
    return jnp.asarray(MATRIX) @ state


def test_rk4_step_is_the_taylor_series_to_fourth_order_on_a_linear_system(x64):
    size = 0.3
    scaled = size * MATRIX
    powers = [np.linalg.matrix_power(scaled, order) for order in range(5)]
    weights = [1, 1, 1 / 2, 1 / 6, 1 / 24]
    expected = sum(w * p for w, p in zip(weights, powers, strict=True)) @ START
    np.testing.assert_allclose(rk4_step(linear, jnp.asarray(START), size), expected, rtol=1e-14)


def test_rk4_step_has_order_four(x64):
    exact = expm(2 * MATRIX) @ START
    errors = [
        np.abs(rk4_step(linear, jnp.asarray(START), 2.0, count) - exact).max()
        for count in (16, 32, 64)
    ]
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 16, rtol=0.1)


def test_rk4_step_follows_an_adaptive_solver_on_a_nonlinear_pytree(x64):
    def derivative(state):
        return {
            "prey": state["prey"] * (1 - state["predator"]),
            "predator": state["predator"] * (state["prey"] - 1),
        }

    found = rk4_step(derivative, {"prey": jnp.asarray(2.0), "predator": jnp.asarray(0.5)}, 5.0, 500)
    expected = solve_ivp(
        lambda _, y: [y[0] * (1 - y[1]), y[1] * (y[0] - 1)],
        (0, 5),
        [2, 0.5],
        rtol=1e-11,
        atol=1e-11,
    ).y[:, -1]
    np.testing.assert_allclose([found["prey"], found["predator"]], expected, rtol=1e-8)


def test_rk4_step_keeps_float32_and_differentiates():
    def end(start):
        return rk4_step(lambda y: -y, start, jnp.float32(1), 8)

    value, slope = jax.value_and_grad(end)(jnp.float32(3))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, 3 * np.exp(-1), rtol=1e-5)
    np.testing.assert_allclose(slope, np.exp(-1), rtol=1e-5)


def test_rk4_step_of_no_time_changes_nothing():
    np.testing.assert_array_equal(rk4_step(linear, jnp.asarray(START), 0.0, 3), jnp.asarray(START))


def test_rk4_step_of_many_equals_a_loop():
    starts = jnp.stack([jnp.asarray(START), 2 * jnp.asarray(START), -jnp.asarray(START)])
    durations = jnp.array([0.1, 0.5, 1.0])

    def advance(start, duration):
        return rk4_step(linear, start, duration, 4)

    batch = jax.vmap(advance)(starts, durations)
    for row, start, duration in zip(batch, starts, durations, strict=True):
        np.testing.assert_allclose(row, advance(start, duration), rtol=1e-5)
