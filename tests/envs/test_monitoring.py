"""The front door of patient monitoring: options, names and reference values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import core, monitoring
from jaxrl_llm.types import Box, Discrete


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"variant": "guide"}, 10),
        ({"variant": "clinical"}, 15),
        ({"variant": "clinical", "is_hidden": True}, 10),
    ],
)
def test_make_has_the_shapes_it_says(options, size):
    environment = monitoring.make(**options, max_steps=None)
    state, observation = environment.reset(jax.random.key(0), environment.default_params)
    assert environment.observation_space == Box(shape=(size,), low=-np.inf, high=np.inf)
    assert observation.shape == (size,)
    assert observation.dtype == np.float32
    assert environment.action_space == Discrete(num=len(monitoring.action_names))
    _, result = jax.eval_shape(
        environment.step, jax.random.key(1), state, 1, environment.default_params
    )
    assert result.observation.shape == (size,)
    assert result.reward.dtype == np.float32
    assert {"vitals", "severity", "dose"} <= set(result.info)
    assert core.example(environment.observation_space).shape == (size,)


def test_names_are_of_the_ten_vital_signs_first():
    assert monitoring.observation_names[:10] == monitoring.vital_names
    assert len(monitoring.observation_names) == 15


def test_make_truncates_after_the_limit():
    environment = monitoring.make(max_steps=2)
    running = core.start_batch(environment, jax.random.key(0), 8)
    _, batch = core.rollout(
        environment,
        lambda noise, observation, mask: (jnp.full(8, 2), {}),
        jax.random.key(1),
        running,
        num_steps=4,
    )
    np.testing.assert_array_equal(batch.truncated[:, 0], [False, True, False, True])
    assert not batch.terminated.any()


def test_make_refuses_what_it_does_not_know():
    other: Any = "sick"
    with pytest.raises(ValueError, match="variant is 'sick'; it must be one of 'guide', 'clin"):
        monitoring.make(variant=other)
    with pytest.raises(ValueError, match="is_hidden is True; the guide's variant hides nothing"):
        monitoring.make(is_hidden=True)
    with pytest.raises(ValueError, match=r"discount is 1\.5; it must be in \[0, 1\]"):
        monitoring.reference_values(discount=1.5)
    with pytest.raises(ValueError, match="max_steps is 0; it must be at least 1"):
        monitoring.reference_values(max_steps=0)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["guide", "clinical"])
def test_reference_values_reward_deciding_by_the_state(variant):
    """The best single action is clearly worse than the optimum; a rule of thumb is in between."""
    values = monitoring.reference_values(variant=variant)
    fixed = max(values[name] for name in monitoring.action_names)
    assert values["optimal"] > values["threshold"] >= fixed
    assert values["optimal"] > values["random"]
    assert values["optimal"] - fixed > {"guide": 15, "clinical": 0.25}[variant]
    expected = {"guide": (78.41, 62.79), "clinical": (0.319, 0.002)}[variant]
    np.testing.assert_allclose((values["optimal"], fixed), expected, atol=0.01)
