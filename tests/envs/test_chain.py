"""The chains of patients against their exact values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import chain
from jaxrl_llm.kernels import bellman
from tests import oracles


@pytest.mark.parametrize(
    ("name", "value"),
    [("patient", oracles.PATIENT_CHAIN_VALUE), ("illness", oracles.ILLNESS_VALUE)],
)
def test_mdp_has_the_published_value(name, value, x64):
    solution = jax.jit(bellman.value_iteration)(chain.mdp(name=name), tolerance=1e-9)
    np.testing.assert_allclose(solution.value, value, atol=1e-6)


def test_mdp_with_treatment_has_the_published_look_ahead(x64):
    q = bellman.q_values(chain.mdp(name="illness_treatment"), jnp.asarray(oracles.ILLNESS_VALUE))
    np.testing.assert_allclose(q, oracles.ILLNESS_TREATMENT_Q, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("patient", oracles.patient_chain),
        ("illness", oracles.illness_chain),
        ("illness_treatment", oracles.illness_treatment_mdp),
    ],
)
def test_mdp_has_the_published_arrays(name, expected, x64):
    jax.tree.map(np.testing.assert_array_equal, chain.mdp(name=name), expected())


def test_patient_chain_forgets_at_the_published_rate(x64):
    transition = np.asarray(chain.mdp().transition[:, 0])
    eigenvalues = np.sort(np.abs(np.linalg.eigvals(transition)))[::-1]
    np.testing.assert_allclose(eigenvalues, oracles.PATIENT_CHAIN_EIGENVALUES, atol=1e-6)


def test_names_match_the_arrays():
    for name in ("patient", "illness", "illness_treatment"):
        shape = len(chain.state_names(name=name)), len(chain.action_names(name=name))
        assert chain.mdp(name=name).action_mask.shape == shape
    assert chain.action_names(name="illness_treatment") == ("Medication", "Surgery")


def test_mdp_refuses():
    message = "name is 'flu'; it must be one of 'patient', 'illness', 'illness_treatment'"
    for function in (chain.mdp, chain.state_names, chain.action_names, chain.make):
        with pytest.raises(ValueError, match=message):
            function(name="flu")
    with pytest.raises(ValueError, match="discount is 1 and state 0 cannot reach"):
        chain.mdp(discount=1.0)


def test_make_pays_for_the_state_it_leaves():
    environment = chain.make(name="illness", max_steps=2)
    params = environment.default_params
    for state, reward in enumerate((-5, 0, 10)):
        inner, _ = environment.reset(jax.random.key(0), params)
        inner = jax.tree.map(lambda leaf: leaf, inner).replace(state=jnp.int32(state))
        step = environment.step(jax.random.key(1), inner, jnp.int32(0), params)[1]
        assert float(step.reward) == reward
