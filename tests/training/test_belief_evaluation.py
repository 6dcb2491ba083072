"""Bounds and sampled returns against the tiger's value and closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import tiger
from jaxrl_llm.kernels import belief
from jaxrl_llm.training import belief_evaluation

pytestmark = pytest.mark.slow


def test_solve_beliefs_encloses_the_tigers_value(x64):
    pomdp = tiger.pomdp()
    beliefs = jnp.asarray(belief.reachable_beliefs(pomdp, 8))
    solved = belief_evaluation.solve_beliefs(pomdp, beliefs)
    at_initial = {name: float(values[0]) for name, values in solved.bounds.items()}
    assert at_initial["plans"] - 1e-9 <= 19.371368 + 5e-7
    assert at_initial["plans"] + float(solved.missing) >= 19.371368 - 5e-7
    order = ("blind policies", "plans", "sawtooth", "fast informed bound", "QMDP")
    values = np.stack([np.asarray(solved.bounds[name]) for name in order])
    assert (np.diff(values, axis=0) >= -1e-9).all()
    assert solved.qmdp.shape == (2, 3)


def test_belief_return_of_listening_is_its_closed_form():
    found = belief_evaluation.belief_return(
        tiger.make(),
        tiger.pomdp(),
        lambda belief: jnp.int32(tiger.LISTEN),
        jax.random.key(0),
        num_episodes=4,
        max_steps=10,
    )
    np.testing.assert_allclose(found.mean, -(1 - 0.95**10) / 0.05, rtol=1e-5)
    np.testing.assert_allclose(found.standard_error, 0, atol=1e-6)


def test_belief_return_acts_on_the_filtered_belief():
    """Two steps: listen, then open where it did not growl: 10 with .85, else -100."""
    found = belief_evaluation.belief_return(
        tiger.make(),
        tiger.pomdp(),
        lambda b: jnp.where(b[0] > 0.6, 2, jnp.where(b[0] < 0.4, 1, 0)),
        jax.random.key(1),
        num_episodes=20_000,
        max_steps=2,
    )
    exact = -1 + 0.95 * (0.85 * 10 - 0.15 * 100)
    assert abs(float(found.mean) - exact) < 4 * float(found.standard_error)
    assert float(found.standard_error) < 0.4
