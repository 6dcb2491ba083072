"""The sepsis-management problem against its exact solution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.envs import sepsis_management
from jaxrl_llm.kernels import bellman
from jaxrl_llm.types import Discrete
from tests import oracles

solve = jax.jit(bellman.policy_iteration)


def test_mdp_has_the_published_optimum(x64):
    solution = solve(sepsis_management.mdp(), tolerance=1e-10)
    assert solution.value.dtype == jnp.float64
    assert bool(solution.converged)
    np.testing.assert_allclose(solution.value, oracles.SEPSIS_MANAGEMENT_VALUE, rtol=0, atol=5.1e-4)
    np.testing.assert_array_equal(solution.policy, oracles.SEPSIS_MANAGEMENT_POLICY)


def test_mdp_has_the_published_optimum_in_float32():
    solution = solve(sepsis_management.mdp())
    assert solution.value.dtype == jnp.float32
    np.testing.assert_allclose(solution.value, oracles.SEPSIS_MANAGEMENT_VALUE, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(solution.policy, oracles.SEPSIS_MANAGEMENT_POLICY)


def test_mdp_has_its_own_discount_unless_told():
    assert float(sepsis_management.mdp().discount) == np.float32(oracles.SEPSIS_MANAGEMENT_DISCOUNT)
    assert float(sepsis_management.mdp(discount=0.5).discount) == 0.5


def test_make_is_the_problem_without_an_end():
    environment = sepsis_management.make()
    assert environment.name == "sepsis_management"
    assert environment.observation_space == Discrete(num=9)
    assert environment.action_space == Discrete(num=4)
    assert (len(sepsis_management.state_names), len(sepsis_management.action_names)) == (9, 4)
    assert not environment.default_params.terminal.any()
    assert environment.default_params.action_mask.all()
