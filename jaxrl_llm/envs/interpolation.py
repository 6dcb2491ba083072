"""Continuous laws as weights on a grid, so that a continuous problem is solved as a finite MDP.

A value function known at the nodes is read between them by linear interpolation. Its expectation
is then a weighted sum of the nodes' values, with weights that are exact for the interpolant and
keep the law's mean; the error is of second order in the distance of the nodes.

Source: Kushner & Dupuis (2001), "Numerical methods for stochastic control problems in continuous
  time", for chains on a grid that keep the mean of what they approximate.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Table = NDArray[np.float64]


def grid_law(nodes: Table, mass_below: Table, moment_below: Table) -> Table:
    """Weights w with sum_k w_k v(node_k) = E[v(X); X on the grid], for v linear between nodes.

    What is beyond the ends gets no weight, so that the caller may send it elsewhere.

    Args:
      nodes: `[K]`, increasing.
      mass_below: `[..., K]`, P(X <= node).
      moment_below: `[..., K]`, E[X; X <= node].

    Returns:
      `[..., K]`; each sums to the probability of the grid's range.
    """
    mass = np.diff(mass_below)
    upper = (np.diff(moment_below) - nodes[:-1] * mass) / np.diff(nodes)
    weights = np.zeros_like(mass_below)
    weights[..., 1:] += upper
    weights[..., :-1] += mass - upper
    return np.maximum(weights, 0)  # rounding


def normal_law(nodes: Table, mean: Table, deviation: float) -> Table:
    """`grid_law` of normal variables of `mean` `[...]`: `[..., K]`."""
    place = (nodes - mean[..., None]) / deviation
    mass = ndtr(place)
    density = np.exp(-(place**2) / 2) / np.sqrt(2 * np.pi)
    return grid_law(nodes, mass, mean[..., None] * mass - deviation * density)


def uniform_law(nodes: Table, low: float, high: float) -> Table:
    """`grid_law` of a uniform variable on [low, high]: `[K]`."""
    reached = np.clip(nodes, low, high)
    return grid_law(nodes, (reached - low) / (high - low), (reached**2 - low**2) / 2 / (high - low))


def point_law(nodes: Table, place: Table) -> tuple[NDArray[np.int64], Table]:
    """The two nodes around each `place` `[...]`, and their weights: each `[..., 2]`.

    Places beyond the ends are read at the ends.
    """
    lower = np.clip(np.searchsorted(nodes, place, side="right") - 1, 0, len(nodes) - 2)
    share = np.clip((place - nodes[lower]) / (nodes[lower + 1] - nodes[lower]), 0, 1)
    return np.stack([lower, lower + 1], axis=-1), np.stack([1 - share, share], axis=-1)


def normal_tails(nodes: Table, mean: Table, deviation: float) -> Table:
    """P(X <= first node) and P(X > last node) of normal variables of `mean` `[...]`: `[..., 2]`."""
    below = ndtr((nodes[0] - mean) / deviation)
    return np.stack([below, ndtr((mean - nodes[-1]) / deviation)], axis=-1)
