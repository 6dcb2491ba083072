"""The diabetes problem against its exact solution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.envs import diabetes
from jaxrl_llm.kernels import bellman
from jaxrl_llm.types import Discrete
from tests import oracles

solve = jax.jit(bellman.policy_iteration)


def test_mdp_has_the_published_optimum(x64):
    solution = solve(diabetes.mdp(), tolerance=1e-10)
    assert solution.value.dtype == jnp.float64
    assert bool(solution.converged)
    np.testing.assert_allclose(solution.value, oracles.DIABETES_VALUE, rtol=0, atol=5.1e-4)
    np.testing.assert_array_equal(solution.policy, oracles.DIABETES_POLICY)


def test_mdp_has_the_published_optimum_in_float32():
    solution = solve(diabetes.mdp())
    assert solution.value.dtype == jnp.float32
    np.testing.assert_allclose(solution.value, oracles.DIABETES_VALUE, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(solution.policy, oracles.DIABETES_POLICY)


def test_mdp_never_changes_the_condition():
    transition = np.asarray(diabetes.mdp().transition)
    condition = np.arange(9) % 3
    changes = condition[:, None] != condition
    assert transition.transpose(1, 0, 2)[:, changes].max() == 0


def test_mdp_has_its_own_discount_unless_told():
    assert float(diabetes.mdp().discount) == np.float32(oracles.DIABETES_DISCOUNT)
    assert float(diabetes.mdp(discount=0.5).discount) == 0.5


def test_make_is_the_problem_without_an_end():
    environment = diabetes.make()
    assert environment.name == "diabetes"
    assert environment.observation_space == Discrete(num=9)
    assert environment.action_space == Discrete(num=4)
    assert (len(diabetes.state_names), len(diabetes.action_names)) == (9, 4)
    assert not environment.default_params.terminal.any()
    assert environment.default_params.action_mask.all()
