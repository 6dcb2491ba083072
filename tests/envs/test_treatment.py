"""The five-state treatment problem against its exact solution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import core, treatment
from jaxrl_llm.kernels import bellman
from tests import oracles

solve = jax.jit(bellman.policy_iteration)


def test_mdp_has_the_published_optimum(x64):
    solution = solve(treatment.mdp(), tolerance=1e-10)
    assert solution.value.dtype == jnp.float64
    assert bool(solution.converged)
    np.testing.assert_allclose(solution.value, oracles.TREATMENT_VALUE, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(solution.policy, oracles.TREATMENT_POLICY)


def test_mdp_has_the_published_optimum_in_float32():
    solution = solve(treatment.mdp())
    assert solution.value.dtype == jnp.float32
    np.testing.assert_allclose(solution.value, oracles.TREATMENT_VALUE, rtol=1e-6)
    np.testing.assert_array_equal(solution.policy, oracles.TREATMENT_POLICY)


def test_mdp_has_the_published_value_of_the_uniform_policy(x64):
    mdp = treatment.mdp()
    value = jax.jit(bellman.policy_evaluation)(mdp, bellman.uniform_policy(mdp)).value
    np.testing.assert_allclose(value, oracles.TREATMENT_UNIFORM_VALUE, rtol=0, atol=1e-6)


def test_mdp_has_the_published_arrays(x64):
    mdp, expected = treatment.mdp(), oracles.treatment_mdp()
    jax.tree.map(np.testing.assert_array_equal, mdp, expected)


def test_mdp_pays_for_where_the_action_leads():
    mdp = treatment.mdp()
    # Surgery in Critical that leads to Stable: 0 - 15.
    assert float(mdp.reward[0, 2, 2]) == -15
    assert float(mdp.reward[3, 0, 4]) == 18


def test_mdp_absorbs_in_recovered_without_ending():
    mdp = treatment.mdp()
    np.testing.assert_array_equal(mdp.transition[4], np.eye(5)[[4, 4, 4]])
    assert not mdp.terminal.any()
    np.testing.assert_allclose(mdp.initial, np.full(5, 0.2))


def test_mdp_takes_another_discount():
    mdp = treatment.mdp(discount=0.0)
    solution = solve(mdp)
    np.testing.assert_allclose(solution.value, mdp.expected_reward().max(axis=1), rtol=1e-6)
    with pytest.raises(ValueError, match="discount is 1 and state 0 cannot reach"):
        treatment.mdp(discount=1.0)


def test_names_match_the_arrays():
    assert treatment.mdp().action_mask.shape == (
        len(treatment.state_names),
        len(treatment.action_names),
    )
    assert treatment.state_names[4] == "Recovered"
    assert treatment.action_names[2] == "Surgery"


@pytest.mark.slow
def test_make_truncates_after_max_steps():
    environment = treatment.make(max_steps=3)

    def policy(key, observation, action_mask):
        return jnp.ones(observation.shape, jnp.int32), {}

    running = core.start_batch(environment, jax.random.key(0), 2)
    _, batch = core.rollout(environment, policy, jax.random.key(1), running, num_steps=6)
    np.testing.assert_array_equal(batch.truncated[:, 0], [0, 0, 1, 0, 0, 1])
    assert not batch.terminated.any()
    arrival = np.array([-20, -10, 0, 10, 20])[np.asarray(batch.next_observation)]
    np.testing.assert_array_equal(batch.reward, arrival - 5)
    assert environment.name == "treatment"
