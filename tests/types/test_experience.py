"""What trajectories know of themselves."""

import jax.numpy as jnp

from jaxrl_llm.types import Trajectories, Transition


def test_trajectories_are_columns():
    step = jnp.zeros((5, 3))
    steps = Transition(
        observation=step,
        action=step,
        reward=step,
        terminated=step,
        truncated=step,
        next_observation=step,
        extras={},
    )
    logged = Trajectories(steps=steps, mask=step == 0, patient=jnp.arange(3))
    assert logged.num_trajectories == 3
