"""Ordinary differential equations of patients: a Runge-Kutta step of fixed size, on any pytree.

A fixed number of substeps is the same program for every patient, so thousands of them integrate at
once; how many are needed is measured beside an adaptive solver, in the tests of each environment.
Keep every leaf of the state near its own scale: each is rounded relative to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax

from jaxrl_llm.types import Array

State = TypeVar("State")


def rk4_step(
    derivative: Callable[[State], State],
    state: State,
    duration: Array | float,
    num_substeps: int = 1,
) -> State:
    """The state after `duration`, by equal steps of the classical Runge-Kutta method.

    k1 = f(y), k2 = f(y + h/2 k1), k3 = f(y + h/2 k2), k4 = f(y + h k3) and
    y(t + h) = y + h/6 (k1 + 2 k2 + 2 k3 + k4). The error falls as h^4. It is stable only while
    h times the fastest rate of decay is less than 2.785.

    Args:
      derivative: dy/dt of a state, a pytree of the same shape; what does not change with the state,
        such as a dose or a patient's parameters, is closed over.
      state: y(t), a pytree of floating-point arrays.
      duration: `[]`, in the units of time of `derivative`.
      num_substeps: 1 or more, the same for everybody.

    Returns:
      y(t + duration), like `state`.

    Source: Hairer, Norsett & Wanner (1993), "Solving Ordinary Differential Equations I", section
      II.1, Table 1.2, on the left.

    >>> import jax.numpy as jnp
    >>> decayed = rk4_step(lambda y: -y, jnp.float32(1), 1.0, num_substeps=10)
    >>> round(float(decayed), 5)  # exp(-1) = 0.36788
    0.36788
    """
    size = duration / num_substeps

    def add(state: State, weight: Array | float, slope: State) -> State:
        return jax.tree.map(lambda y, k: y + weight * k, state, slope)

    def substep(_: Array, state: State) -> State:
        first = derivative(state)
        second = derivative(add(state, size / 2, first))
        third = derivative(add(state, size / 2, second))
        fourth = derivative(add(state, size, third))
        return jax.tree.map(
            lambda y, a, b, c, d: y + size / 6 * (a + 2 * (b + c) + d),
            state,
            first,
            second,
            third,
            fourth,
        )

    # A loop, not written out: across substeps a compiler fuses by computing the same stages again.
    return jax.lax.fori_loop(0, num_substeps, substep, state)
