"""Recommendation: every pattern of symptoms enumerated by hand."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import recommendation
from jaxrl_llm.kernels import bellman
from jaxrl_llm.types import Box


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


EFFECT = [[1.0, -0.5, 0.2], [0.3, 0.9, -1.0]]
PREVALENCE = [0.2, 0.7]


def test_mdp_takes_any_matrix_and_prevalence():
    """Two symptoms, three treatments: every pattern by hand."""
    patterns = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    chance = np.array([0.8 * 0.3, 0.2 * 0.3, 0.8 * 0.7, 0.2 * 0.7])
    reward = patterns @ np.array(EFFECT)
    mdp = recommendation.mdp(effect=EFFECT, prevalence=PREVALENCE)
    np.testing.assert_allclose(mdp.initial, [*chance, 0], atol=1e-6)
    np.testing.assert_allclose(mdp.reward[:4, :, 0], reward, atol=1e-6)
    values = recommendation.reference_values(effect=EFFECT, prevalence=PREVALENCE)
    assert values["optimal"] == pytest.approx(chance @ reward.max(axis=1), abs=1e-6)
    assert values["random"] == pytest.approx(chance @ reward.mean(axis=1), abs=1e-6)
    assert values["fixed"] == pytest.approx((chance @ reward).max(), abs=1e-6)


def test_reference_values_of_the_default(enumerated):
    values = recommendation.reference_values()
    assert values["optimal"] == pytest.approx(enumerated.max(axis=1).mean(), abs=1e-6)
    assert values["random"] == pytest.approx(enumerated.mean(), abs=1e-6)
    assert values["fixed"] == pytest.approx(enumerated.mean(axis=0).max(), abs=1e-6)


def test_make_shows_the_symptoms_of_the_pattern():
    environment = recommendation.make(effect=EFFECT, prevalence=PREVALENCE, observation="symptoms")
    keys = jax.random.split(jax.random.key(0), 4000)
    state, shown = jax.jit(jax.vmap(environment.reset, in_axes=(0, None)))(
        keys, environment.default_params
    )
    assert environment.observation_space == Box(shape=(2,), low=0.0, high=1.0)
    assert shown.shape == (4000, 2)
    assert shown.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(shown) @ [1, 2], state)
    error = np.sqrt(np.multiply(PREVALENCE, 1 - np.array(PREVALENCE)) / 4000)
    np.testing.assert_array_less(np.abs(np.asarray(shown).mean(axis=0) - PREVALENCE), 4 * error)
    _, step = environment.step(
        jax.random.key(1), state[0], jnp.int32(0), environment.default_params
    )
    np.testing.assert_array_equal(step.observation, [0, 0])


@pytest.mark.slow
def test_make_stream_has_the_exact_regret_of_each_patient():
    """Always treatment 1: rewards around what the symptoms say, and what the best loses to it."""
    num_patients, batch_size = 50, 64
    environment = recommendation.make_stream(num_patients=num_patients, noise=0.5)
    params = environment.default_params

    @jax.jit
    def run(keys, action):
        def body(state, keys):
            before = state.state.symptoms
            state, result = jax.vmap(environment.step, in_axes=(0, 0, None, None))(
                keys, state, action, params
            )
            return state, (before, result)

        start = jax.vmap(environment.reset, in_axes=(0, None))(keys[0], params)[0]
        return jax.lax.scan(body, start, keys[1:])[1]

    keys = jax.random.split(jax.random.key(0), (num_patients + 1, batch_size))
    before, result = run(keys, 1)
    expected = np.asarray(before) @ np.asarray(recommendation.effect())
    np.testing.assert_allclose(result.info["expected_reward"], expected[..., 1], atol=1e-5)
    np.testing.assert_allclose(result.info["optimal_reward"], expected.max(-1), atol=1e-5)
    regret = expected.max(-1) - expected[..., 1]
    np.testing.assert_allclose(result.info["regret"], regret, atol=1e-5)
    np.testing.assert_allclose(result.info["total_regret"], np.cumsum(regret, axis=0), rtol=1e-4)
    noise = np.asarray(result.reward) - expected[..., 1]
    assert abs(noise.mean()) < 4 * 0.5 / np.sqrt(noise.size)
    assert abs(noise.std() / 0.5 - 1) < 4 / np.sqrt(2 * noise.size)
    assert not result.terminated.any()
    np.testing.assert_array_equal(result.truncated.sum(axis=0), 1)
    assert result.truncated[-1].all()
    # The patient who is shown is the one who is treated next.
    np.testing.assert_array_equal(result.observation[:-1], before[1:])
    best = recommendation.reference_values()["optimal"]
    assert np.mean(result.info["optimal_reward"]) == pytest.approx(best, abs=0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"effect": [1.0, 2.0]}, r"effect has shape \(2,\); it must be \[symptoms, treatments\]"),
        ({"effect": [[1.0, float("nan")]]}, r"effect\[0, 1\] is nan; it must be finite"),
        ({"effect": [[1.0]] * 11}, r"len\(effect\) is 11; it must be in \[1, 10\]"),
        ({"prevalence": 1.5}, r"prevalence is 1.5; it must be in \[0, 1\]"),
        ({"prevalence": [0.5, 0.5]}, r"prevalence has shape \(2,\); it must be \[\] or \[8\]"),
        ({"effect": EFFECT, "prevalence": [0.5, -1]}, r"prevalence\[1\] is -1.0; it must be in"),
    ],
)
def test_mdp_refuses_what_is_no_matrix_or_probability(options, message):
    with pytest.raises(ValueError, match=message):
        recommendation.mdp(**options)
    with pytest.raises(ValueError, match=message):
        recommendation.make_stream(**options)


def test_make_refuses_other_options():
    other: Any = "image"
    with pytest.raises(ValueError, match="observation is 'image'; it must be one of 'pattern'"):
        recommendation.make(observation=other)
    with pytest.raises(ValueError, match="noise is -1; it must be at least 0"):
        recommendation.make_stream(noise=-1)
    with pytest.raises(ValueError, match="max_steps is 0; it must be at least 1"):
        recommendation.make_stream(num_patients=0)
