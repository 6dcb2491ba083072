"""Markov chains whose answers are known, for the tests of their structure, ends and spectra."""

import numpy as np
from numpy.typing import NDArray

from tests import oracles

Matrix = NDArray[np.float64]

PATIENT = oracles.PATIENT_CHAIN_TRANSITION
ILLNESS = oracles.ILLNESS_TRANSITION[:, 0]


def cycle(length: int) -> Matrix:
    """State i is followed by i + 1: eigenvalues are the roots of unity."""
    return np.roll(np.eye(length), 1, axis=1)


def reflecting_walk(size: int) -> Matrix:
    """Left or right with probability 1/2, staying where a wall is: eigenvalues cos(pi k / n).

    It is symmetric, so reversible and doubly stochastic, with a uniform stationary law.
    """
    steps = (np.eye(size, k=1) + np.eye(size, k=-1)) / 2
    return steps + np.diag(1 - steps.sum(1))


def birth_death(size: int, up: float, down: float) -> Matrix:
    """Up or down by one, else staying: the stationary law is geometric in up / down."""
    steps = up * np.eye(size, k=1) + down * np.eye(size, k=-1)
    return steps + np.diag(1 - steps.sum(1))


def gamble(goal: int, win: float) -> Matrix:
    """Gambler's ruin: states 0 and `goal` absorb, the others go up with probability `win`."""
    matrix = win * np.eye(goal + 1, k=1) + (1 - win) * np.eye(goal + 1, k=-1)
    matrix[[0, goal]] = np.eye(goal + 1)[[0, goal]]
    return matrix


def rota(*stays: float) -> Matrix:
    """One shift follows the other, of two teams each; `stays` is how often the same takes over.

    The eigenvalues are the n-th roots of 1 and of the product of 2 stay - 1 over the n shifts.
    """
    length = len(stays)
    matrix = np.zeros((2 * length, 2 * length))
    for shift, stay in enumerate(stays):
        following = (shift + 1) % length
        block = [[stay, 1 - stay], [1 - stay, stay]]
        matrix[2 * shift : 2 * shift + 2, 2 * following : 2 * following + 2] = block
    return matrix


# A transient state that leads to either of two classes: {1, 2}, with law (3/4, 1/4), and {3, 4, 5},
# a cycle of period 3 entered at 3 or 5.
TWO_CLASSES = np.array(
    [
        [0.5, 0.2, 0, 0.2, 0, 0.1],
        [0, 0.9, 0.1, 0, 0, 0],
        [0, 0.3, 0.7, 0, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
        [0, 0, 0, 1, 0, 0],
    ]
)


def random_chain(seed: int, size: int) -> Matrix:
    """Every row uniform on the simplex: irreducible and aperiodic."""
    return np.random.default_rng(seed).dirichlet(np.ones(size), size=size)


def sparse_chains(seed: int, count: int, size: int) -> NDArray[np.float64]:
    """`[count, size, size]`, one to two successors a state: all kinds of classes and periods."""
    random = np.random.default_rng(seed)
    matrices = np.zeros((count, size, size))
    for matrix in matrices:
        for row in matrix:
            number = random.choice([1, 2], p=[0.7, 0.3])
            row[random.choice(size, number, replace=False)] = random.dirichlet(np.ones(number))
    return matrices


def limit(matrix: Matrix) -> Matrix:
    """P*, as a high power of the lazy chain, which has the same limit and no period."""
    power = (np.eye(len(matrix)) + matrix) / 2
    for _ in range(40):
        power = power @ power
        power /= power.sum(1, keepdims=True)
    return power
