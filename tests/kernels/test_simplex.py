"""The simplex: projection against bisection, quadratic programmes against every support."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import simplex

minimise = jax.jit(simplex.quadratic_minimiser)


def best_of_every_support(matrix):
    """The least value of x' M x on the simplex; M positive definite."""
    size, best = len(matrix), np.inf
    for count in range(1, size + 1):
        for support in itertools.combinations(range(size), count):
            part = matrix[np.ix_(support, support)]
            x = np.linalg.solve(part, np.ones(count))
            x = x / x.sum()
            if x.min() >= 0:
                best = min(best, x @ part @ x)
    return best


def test_projection_is_the_nearest_point(x64):
    random = np.random.default_rng(0)
    for point in 2 * random.normal(size=(5, 6)):
        low, high = point.min() - 1, point.max()
        for _ in range(80):  # sum of max(point - threshold, 0) falls to 1
            middle = (low + high) / 2
            above = np.maximum(point - middle, 0).sum() > 1
            low, high = (middle, high) if above else (low, middle)
        expected = np.maximum(point - low, 0)
        np.testing.assert_allclose(simplex.projection(jnp.asarray(point)), expected, atol=1e-9)


@pytest.mark.parametrize("correlation", [0.0, 0.9, 0.999])
def test_quadratic_minimiser_is_the_best_of_every_support(correlation, x64):
    random = np.random.default_rng(1)
    for _ in range(4):
        scale = np.exp(random.normal(size=7))
        matrix = correlation + (1 - correlation) * np.eye(7)
        matrix = scale[:, None] * matrix * scale + 0.1 * np.outer(*2 * [random.normal(size=7)])
        x = np.asarray(minimise(jnp.asarray(matrix)))
        assert x.min() >= 0
        np.testing.assert_allclose(x.sum(), 1, rtol=1e-9)
        np.testing.assert_allclose(x @ matrix @ x, best_of_every_support(matrix), rtol=1e-5)


def test_quadratic_minimiser_of_one_element_and_of_zero():
    np.testing.assert_array_equal(minimise(jnp.zeros((1, 1))), [1])
    np.testing.assert_allclose(minimise(jnp.zeros((3, 3))), 1 / 3, rtol=1e-6)


def test_quadratic_minimiser_under_vmap_is_a_loop():
    matrices = np.random.default_rng(2).normal(size=(3, 4, 4)).astype(np.float32)
    matrices = matrices @ matrices.transpose(0, 2, 1)
    batched = jax.jit(jax.vmap(simplex.quadratic_minimiser))(matrices)
    for row in range(3):
        np.testing.assert_allclose(batched[row], minimise(matrices[row]), atol=1e-4)
