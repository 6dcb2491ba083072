"""The squashed Gaussian beside numerical integration, distrax and published numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from jaxrl_llm.kernels import squashed_gaussian

LOW, HIGH = np.array([-1.0, 0.0, -2.0]), np.array([1.0, 5.0, -1.0])
MEAN, LOG_DEVIATION = np.array([0.3, -1.0, 2.0]), np.array([-0.5, 0.2, -1.0])
ONE = jnp.ones(1)


def arrays(*values):
    return [jnp.asarray(value, jnp.float32) for value in values]


def density(action: float, place: int) -> float:
    """Of the action in one dimension, by the inverse: exact away from the bounds."""
    unit = 2 * (action - LOW[place]) / (HIGH[place] - LOW[place]) - 1
    slope = 0.5 * (HIGH[place] - LOW[place]) * (1 - unit**2)
    return stats.norm.pdf(np.arctanh(unit), MEAN[place], np.exp(LOG_DEVIATION[place])) / slope


@pytest.mark.parametrize(
    ("latent", "expected"), [(0.0, -0.918939), (1.0, -0.551377), (2.0, -0.268933)]
)
def test_log_probability_of_a_standard_normal_at_known_points(latent, expected):
    found = squashed_gaussian.log_probability(latent * ONE, 0 * ONE, 0 * ONE, -ONE, ONE)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_log_slope_is_right_where_the_naive_form_is_log_of_zero():
    assert 1 - np.square(np.tanh(np.float32(10))) == 0
    found = squashed_gaussian.log_slope(10 * ONE, -ONE, ONE)
    np.testing.assert_allclose(found, -18.6137, atol=1e-4)
    gradient = jax.grad(lambda u: squashed_gaussian.log_slope(u, -ONE, ONE)[0])
    np.testing.assert_allclose(gradient(jnp.array([100.0])), [-2], rtol=1e-6)
    np.testing.assert_allclose(gradient(jnp.array([-100.0])), [2], rtol=1e-6)


def test_log_probability_is_the_density_of_the_action_that_integrates_to_one():
    latent = np.array([0.1, -0.7, 2.5])
    action = np.asarray(squashed_gaussian.squash(*arrays(latent, LOW, HIGH)), np.float64)
    expected = sum(np.log(density(action[place], place)) for place in range(3))
    found = squashed_gaussian.log_probability(*arrays(latent, MEAN, LOG_DEVIATION, LOW, HIGH))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for place in range(3):
        total, _ = integrate.quad(density, LOW[place], HIGH[place], args=(place,))
        np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize("log_deviation", [-3.0, -0.5, 0.0, 0.7])
def test_entropy_is_minus_the_expected_log_density(log_deviation):

    def integrand(u):
        slope = 2 * (np.log(2) - u - np.logaddexp(0, -2 * u)) + np.log(2.5)
        law = (u, 0.4, np.exp(log_deviation))
        return -stats.norm.pdf(*law) * (stats.norm.logpdf(*law) - slope)

    expected, _ = integrate.quad(integrand, -12, 12, points=[0.4], limit=200)
    found = squashed_gaussian.entropy(0.4 * ONE, log_deviation * ONE, 0 * ONE, 5 * ONE)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found < np.log(5)


def test_entropy_adds_over_dimensions_and_has_the_right_gradient():
    given = arrays(MEAN, LOG_DEVIATION, LOW, HIGH)
    alone = [
        squashed_gaussian.entropy(*(x[place : place + 1] for x in given)) for place in range(3)
    ]
    entropy = jax.jit(squashed_gaussian.entropy)
    np.testing.assert_allclose(entropy(*given), sum(alone), rtol=1e-5)
    # A finite difference in float32 is good to three figures.
    for argument in (0, 1):
        gradient = jax.grad(squashed_gaussian.entropy, argnums=argument)(*given)
        for place in range(3):
            shifted = [[*given], [*given]]
            for sign, changed in zip((-1, 1), shifted, strict=True):
                changed[argument] = given[argument].at[place].add(sign * 0.02)
            low, high = (float(entropy(*changed)) for changed in shifted)
            np.testing.assert_allclose(gradient[place], (high - low) / 0.04, atol=2e-3)


def test_squash_reaches_the_bounds_and_no_further():
    found = squashed_gaussian.squash(*arrays([-50, 0, 50], LOW, HIGH))
    np.testing.assert_allclose(found, [-1, 2.5, -1])
    generator = np.random.default_rng(0)
    low, width = generator.normal(size=1000), generator.exponential(size=1000)
    low, high = arrays(low, low + width)
    for latent in (-50, 50):
        found = squashed_gaussian.squash(jnp.full(1000, latent, jnp.float32), low, high)
        assert np.all((found >= low) & (found <= high))
