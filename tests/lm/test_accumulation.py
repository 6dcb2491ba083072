"""Parts of a sum add up to its gradient, whatever the parts."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm.accumulation import gradient_of_sum
from jaxrl_llm.types import Mean


@pytest.fixture
def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"weight": jax.random.normal(keys[0], (3,)), "bias": jnp.float32(0.3)}
    rows = {"x": jax.random.normal(keys[1], (8, 3)), "weight": jax.random.uniform(keys[2], (8,))}
    return params, rows


def loss(params, rows):
    error = jnp.square(rows["x"] @ params["weight"] + params["bias"])
    return jnp.sum(rows["weight"] * error), {"error": Mean.of(error)}


@pytest.mark.parametrize("num_parts", [1, 2, 4, 8])
def test_gradient_of_sum_does_not_depend_on_the_parts(problem, num_parts):
    params, rows = problem
    gradient, metrics = gradient_of_sum(loss, params, rows, num_parts)
    residual = rows["x"] @ params["weight"] + params["bias"]
    np.testing.assert_allclose(
        gradient["weight"], 2 * (rows["weight"] * residual) @ rows["x"], rtol=1e-5
    )
    np.testing.assert_allclose(gradient["bias"], 2 * jnp.sum(rows["weight"] * residual), rtol=1e-5)
    np.testing.assert_allclose(metrics["error"].mean, jnp.mean(residual**2), rtol=1e-6)
    assert float(metrics["error"].weight) == 8


def test_gradient_of_sum_under_jit_equals_eager(problem):
    params, rows = problem
    each = partial(gradient_of_sum, loss, num_parts=4)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-6), jax.jit(each)(params, rows), each(*problem)
    )


def test_gradient_of_sum_gives_every_part_a_key_of_its_own(problem):
    def noisy(params, rows, key):
        draw = jax.random.normal(key)
        return params["bias"] * draw, {"draws": draw[None], "squares": draw[None] ** 2}

    params, rows = problem
    gradient, more = gradient_of_sum(noisy, params, rows, 4, jax.random.key(1))
    draws = jax.vmap(jax.random.normal)(jax.random.split(jax.random.key(1), 4))
    np.testing.assert_allclose(gradient["bias"], draws.sum(), rtol=1e-6)
    np.testing.assert_allclose(more["squares"], jnp.sum(draws**2)[None], rtol=1e-6)
