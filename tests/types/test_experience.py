"""What trajectories know of themselves."""

import jax.numpy as jnp

from jaxrl_llm.types import Box, Hybrid, Trajectories, Transition


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


def test_spaces_are_hashable_so_that_a_network_may_have_one():
    dose = Box(shape=(1,), low=0.0, high=(2.0,))
    space = Hybrid(num=2, amount=dose, has_amount=(False, True))
    assert {space: 1}[Hybrid(num=2, amount=dose, has_amount=(False, True))] == 1
