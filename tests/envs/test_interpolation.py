"""Weights of a grid: exact for piecewise linear functions, by quadrature."""

from __future__ import annotations

import numpy as np
import pytest

from jaxrl_llm.envs import interpolation

NODES = np.array([0.0, 0.1, 0.3, 0.4, 0.8, 1.0])


def expectation(density, values):
    """Of the function that is linear between `values` at the nodes, by the midpoint rule."""
    count = 200_000
    places = (np.arange(count) + 0.5) / count
    return (density(places) * np.interp(places, NODES, values)).mean()


@pytest.mark.parametrize("mean", [-0.2, 0.0, 0.35, 0.9])
def test_normal_law_is_exact_for_piecewise_linear_functions(mean):
    def density(place):
        return np.exp(-(((place - mean) / 0.2) ** 2) / 2) / 0.2 / np.sqrt(2 * np.pi)

    law = interpolation.normal_law(NODES, np.array([mean]), 0.2)[0]
    for values in (np.ones(6), NODES, NODES**2, np.array([3.0, -1, 2, 5, 0, 1])):
        assert law @ values == pytest.approx(expectation(density, values), abs=1e-8)
    tails = interpolation.normal_tails(NODES, np.array(mean), 0.2)
    assert law.sum() + tails.sum() == pytest.approx(1, abs=1e-12)
    assert (law >= 0).all()


def test_uniform_law_is_exact_for_piecewise_linear_functions():
    def density(place):
        return ((place > 0.25) & (place < 0.85)) / 0.6

    law = interpolation.uniform_law(NODES, 0.25, 0.85)
    for values in (np.ones(6), NODES, np.array([3.0, -1, 2, 5, 0, 1])):
        assert law @ values == pytest.approx(expectation(density, values), abs=1e-4)


def test_point_law_keeps_the_place():
    places = np.array([[0.0, 0.05], [0.3, 0.5], [0.99, 1.0]])
    index, weight = interpolation.point_law(NODES, places)
    np.testing.assert_allclose((NODES[index] * weight).sum(-1), places, atol=1e-12)
    np.testing.assert_allclose(weight.sum(-1), 1)
    assert (np.diff(index) == 1).all()


def test_point_law_reads_places_beyond_the_grid_at_its_ends():
    index, weight = interpolation.point_law(NODES, np.array([-1.0, 2.0]))
    np.testing.assert_allclose((NODES[index] * weight).sum(-1), [0, 1])
