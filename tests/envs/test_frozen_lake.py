"""Frozen lake against the tables of the installed Gymnasium."""

from __future__ import annotations

from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import frozen_lake
from jaxrl_llm.kernels import bellman
from tests.envs.grids import gymnasium_tables, tables


@pytest.mark.parametrize("map_name", ["4x4", "8x8"])
@pytest.mark.parametrize("slip", [0.0, frozen_lake.SLIPPERY])
def test_mdp_has_the_tables_of_gymnasium(map_name, slip, x64):
    lake: Any = gymnasium.make("FrozenLake-v1", map_name=map_name, is_slippery=slip > 0)
    transition, reward, ends = gymnasium_tables(lake)
    mdp = frozen_lake.mdp(map_name=map_name, slip=slip)
    ours = tables(mdp)
    np.testing.assert_allclose(ours[0], transition, atol=1e-12)
    np.testing.assert_allclose(ours[1], reward, atol=1e-12)
    np.testing.assert_array_equal(mdp.terminal, ends)
    np.testing.assert_array_equal(mdp.initial, lake.unwrapped.initial_state_distrib)


def test_mdp_of_a_success_rate_has_the_tables_of_gymnasium(x64):
    transition, *_ = gymnasium_tables(gymnasium.make("FrozenLake-v1", success_rate=0.75))
    np.testing.assert_allclose(tables(frozen_lake.mdp(slip=0.25))[0], transition, atol=1e-12)


def test_mdp_crosses_the_slippery_lake_with_probability_14_17ths(x64):
    solution = jax.jit(bellman.value_iteration)(frozen_lake.mdp(discount=1.0), tolerance=1e-13)
    assert float(solution.value[0]) == pytest.approx(14 / 17, abs=1e-9)


def test_names_match_the_tables():
    for map_name, num_states in (("4x4", 16), ("8x8", 64)):
        assert len(frozen_lake.state_names(map_name=map_name)) == num_states
    assert frozen_lake.action_names == ("Left", "Down", "Right", "Up")


def test_mdp_refuses():
    with pytest.raises(ValueError, match="map_name is '5x5'; it must be one of '4x4', '8x8'"):
        frozen_lake.mdp(map_name="5x5")
    with pytest.raises(ValueError, match=r"slip is -1; it must be in \[0, 1\]"):
        frozen_lake.mdp(slip=-1)


def test_make_falls_into_a_hole():
    environment = frozen_lake.make(slip=0.0, max_steps=100)
    params = environment.default_params
    state, _ = environment.reset(jax.random.key(0), params)
    right, down = (frozen_lake.action_names.index(name) for name in ("Right", "Down"))
    state, _ = environment.step(jax.random.key(1), state, jnp.int32(right), params)
    _, step = environment.step(jax.random.key(2), state, jnp.int32(down), params)
    assert (int(step.observation), bool(step.terminated), float(step.reward)) == (5, True, 0.0)
