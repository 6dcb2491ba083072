"""Shares of time of a cohort whose glucose is known beforehand."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.envs import glucose_outcome
from jaxrl_llm.types import Box, Environment, TimeStep

LEVELS = ((100.0, 60.0, 50.0, 190.0), (100.0, 30.0, 100.0, 100.0), (650.0, 100.0, 100.0, 100.0))


def recorded():
    """Each patient follows one row; below 40 and above 600 it ends."""
    levels = jnp.array(LEVELS)

    def reset(key, params):
        del key, params
        return (jnp.int32(0), jnp.int32(-1)), jnp.zeros(1)

    def step(key, state, action, params):
        del key, params
        time, _ = state
        level = levels[action.astype(jnp.int32), time]
        return (time + 1, action.astype(jnp.int32)), TimeStep(
            observation=jnp.zeros(1),
            reward=jnp.float32(1),
            terminated=(level < 40) | (level > 600),
            truncated=jnp.bool_(False),
            info={"glucose": level, "insulin": jnp.float32(2)},
        )

    box = Box(shape=(1,), low=0.0, high=1.0)
    return Environment(
        name="recorded",
        reset=reset,
        step=step,
        default_params=None,
        observation_space=box,
        action_space=box,
    )


def test_outcome_counts_shares_and_carries_an_end_to_the_last_step():
    result = glucose_outcome.outcome(
        recorded(), lambda *_: jnp.arange(3.0), jax.random.key(0), num_patients=3, num_steps=4
    )
    # Patient 1 has one step in range and stays at 30, patient 2 stays at 650.
    expected = {
        "in_range": 2 / 12,
        "below_70": 5 / 12,
        "below_54": 4 / 12,
        "above_180": 5 / 12,
        "above_250": 4 / 12,
        "ended": 2 / 3,
        "mean_glucose": (400 + 130 + 650) / 7,
        "insulin": 2 * 7 / 3,
        "episode_return": 7 / 3,
        "in_range_error": np.std([0.25, 0.25, 0]) / np.sqrt(3),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(result, name), value, rtol=1e-5, err_msg=name)
