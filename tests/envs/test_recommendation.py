"""Recommendation: every pattern of symptoms enumerated by hand."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import recommendation
from jaxrl_llm.kernels import bellman


@pytest.fixture(scope="module")
def enumerated():
    """The reward of each treatment for each of the 256 patterns, by adding up effects."""
    effect = np.asarray(recommendation.effect(), np.float64).round(6)
    rows = {}
    for pattern in itertools.product((0, 1), repeat=8):
        state = sum(bit << index for index, bit in enumerate(pattern))
        rows[state] = [
            sum(effect[symptom, treatment] for symptom in range(8) if pattern[symptom])
            for treatment in range(5)
        ]
    return np.array([rows[state] for state in range(256)])


def test_mdp_has_the_exact_mean_rewards(enumerated, x64):
    mdp = recommendation.mdp()
    q = bellman.q_values(mdp, jnp.zeros(mdp.num_states))
    np.testing.assert_allclose(q[:256], enumerated, atol=1e-6)
    # Half of the patients have each symptom, so a fixed treatment earns half of its column.
    fixed = np.asarray(recommendation.effect()).sum(axis=0) / 2
    np.testing.assert_allclose(mdp.initial @ q, fixed, atol=1e-6)
    # The numbers of this matrix: the best for each patient, the best for all, and at random.
    assert float(mdp.initial @ q.max(axis=1)) == pytest.approx(1.2734375, abs=1e-9)
    assert (fixed.argmax(), fixed.max()) == (3, pytest.approx(1.0))
    assert float(mdp.initial @ q.mean(axis=1)) == pytest.approx(0.78, abs=1e-9)
    assert enumerated.max(axis=1).mean() == pytest.approx(1.2734375)


def test_every_treatment_is_best_for_someone(enumerated):
    assert set(enumerated.argmax(axis=1)) == set(range(5))


def test_mdp_ends_after_one_decision():
    mdp = recommendation.mdp()
    assert np.flatnonzero(mdp.terminal).tolist() == [256]
    np.testing.assert_array_equal(mdp.transition[:, :, 256], 1)
    np.testing.assert_allclose(mdp.initial, np.append(np.full(256, 1 / 256), 0), rtol=1e-6)


def test_symptoms_are_the_bits_of_the_state():
    context = np.asarray(recommendation.symptoms())
    np.testing.assert_array_equal(context[:256] @ 2 ** np.arange(8), np.arange(256))
    assert recommendation.state_names[0] == "none"
    assert recommendation.state_names[5] == "fever, breathlessness"
    assert not context[256].any()


def test_names_match_the_tables():
    assert recommendation.mdp().action_mask.shape == (
        len(recommendation.state_names),
        len(recommendation.action_names),
    )
    assert recommendation.effect().shape == (8, 5)
    assert len(recommendation.symptom_names) == 8


def test_make_pays_what_the_symptoms_say(enumerated):
    environment = recommendation.make()
    params = environment.default_params
    states = jnp.array([0, 5, 255])
    actions = jnp.array([1, 2, 4])
    keys = jax.random.split(jax.random.key(0), 3)
    _, step = jax.jit(jax.vmap(environment.step, in_axes=(0, 0, 0, None)))(
        keys, states, actions, params
    )
    np.testing.assert_allclose(step.reward, enumerated[[0, 5, 255], [1, 2, 4]], atol=1e-6)
    assert step.terminated.all()
    np.testing.assert_array_equal(step.observation, 256)
