"""RiverSwim against its published tables and value."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import river_swim
from jaxrl_llm.kernels import bellman

solve = jax.jit(bellman.value_iteration)


def test_mdp_has_the_published_value(x64):
    solution = solve(river_swim.mdp(discount=0.99), tolerance=1e-8)
    assert float(solution.value[0]) == pytest.approx(37.8547, abs=5e-5)
    np.testing.assert_array_equal(solution.policy, np.ones(6))


def test_mdp_has_the_published_tables(x64):
    mdp = river_swim.mdp()
    right = np.array(
        [
            [0.40, 0.60, 0.00, 0.00, 0.00, 0.00],
            [0.05, 0.60, 0.35, 0.00, 0.00, 0.00],
            [0.00, 0.05, 0.60, 0.35, 0.00, 0.00],
            [0.00, 0.00, 0.05, 0.60, 0.35, 0.00],
            [0.00, 0.00, 0.00, 0.05, 0.60, 0.35],
            [0.00, 0.00, 0.00, 0.00, 0.40, 0.60],
        ]
    )
    np.testing.assert_allclose(mdp.transition[:, 1], right, atol=1e-12)
    np.testing.assert_array_equal(np.argmax(mdp.transition[:, 0], axis=1), [0, 0, 1, 2, 3, 4])
    reward = np.zeros((6, 2))
    reward[0, 0], reward[5, 1] = 0.005, 1
    np.testing.assert_array_equal(mdp.expected_reward(), reward)
    np.testing.assert_array_equal(mdp.initial, np.eye(6)[0])
    assert not mdp.terminal.any()


def test_mdp_of_an_impatient_swimmer_drifts(x64):
    solution = solve(river_swim.mdp(discount=0.5), tolerance=1e-8)
    assert int(solution.policy[0]) == 0
    assert float(solution.value[0]) == pytest.approx(0.005 / 0.5)


def test_mdp_of_two_places():
    assert river_swim.mdp(num_states=2).num_states == len(river_swim.state_names(num_states=2))


def test_mdp_refuses():
    with pytest.raises(ValueError, match="num_states is 1; it must be at least 2"):
        river_swim.mdp(num_states=1)
    with pytest.raises(ValueError, match="discount is 1 and state 0 cannot reach"):
        river_swim.mdp(discount=1.0)


def test_make_pays_for_drifting():
    environment = river_swim.make(max_steps=1)
    params = environment.default_params
    state, observation = environment.reset(jax.random.key(0), params)
    assert int(observation) == 0
    step = environment.step(jax.random.key(1), state, jnp.int32(0), params)[1]
    assert float(step.reward) == pytest.approx(0.005)
    assert bool(step.truncated)
    assert not step.terminated
