"""Every estimator of the library against its definition, and the biases that are known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import token_mdp
from jaxrl_llm.lm import estimator_bias, estimators

# Whole iterations, and laws over many draws: minutes of compilation.
pytestmark = pytest.mark.slow

FIXED: dict[str, Any] = {"length": 2}
RAGGED: dict[str, Any] = {"length": 3, "end_token": 0}
UNBIASED = (
    "reinforce, baseline none",
    "reinforce, baseline constant",
    "reinforce, baseline moving average",
    "rloo, K = 2",
    "rloo, K = 4",
    "ppo, lambda 1",
    "k2 of responses as a loss",
)
NAMES = tuple(estimators.make(*estimator_bias.random_problem(0, **FIXED)))


@pytest.fixture(scope="module")
def fixed():
    return estimator_bias.random_problem(0, **FIXED)


def predicted(problem, name):
    """The expectation's share along the target, minus 1, and what is across it."""
    estimator = estimators.make(*problem)[name]
    found = np.asarray(estimator_bias.expected_gradient(estimator, *problem)).ravel()
    wanted = np.asarray(estimator_bias.target_gradient(*problem, estimator.target)).ravel()
    share = found @ wanted / (wanted @ wanted)
    across = np.linalg.norm(found - share * wanted) / np.linalg.norm(wanted)
    return np.array([share - 1, across])


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_estimators_expect_the_exact_gradient(fixed, name):
    np.testing.assert_allclose(predicted(fixed, name), 0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNBIASED])
def test_known_biased_estimators_expect_another_gradient(fixed, name):
    assert np.abs(predicted(fixed, name)).max() > 0.01


def test_response_level_estimators_are_unbiased_whatever_the_lengths():
    problem = estimator_bias.random_problem(0, **RAGGED)
    for name in ("reinforce, baseline none", "rloo, K = 2", "k2 of responses as a loss"):
        np.testing.assert_allclose(predicted(problem, name), 0, atol=1e-5)
    for name in set(estimators.OF_TOKENS) - {"rloo, K = 2"}:
        assert np.abs(predicted(problem, name)).max() > 0.01


def test_k1_as_a_loss_does_nothing(fixed):
    estimator = estimators.make(*fixed)["k1 of tokens as a loss"]
    found = estimator_bias.expected_gradient(estimator, *fixed)
    np.testing.assert_allclose(found, 0, atol=1e-6)


def test_k3_of_responses_as_a_loss_descends_the_reverse_divergence(fixed):
    mdp, logits = fixed
    estimator = estimators.make(mdp, logits)["k3 of responses as a loss"]
    found = estimator_bias.expected_gradient(estimator, mdp, logits)

    def reverse(table):
        policy = token_mdp.tabular_log_probability(mdp, table)
        return -token_mdp.kl_divergence(mdp, mdp.reference_log_probability, policy)

    np.testing.assert_allclose(found, jax.grad(reverse)(logits), rtol=0, atol=1e-6)


def test_k2_of_tokens_and_exact_kl_descend_each_state_at_fixed_prefixes(fixed):
    mdp, logits = fixed
    prior = estimator_bias.reference_logits(mdp)
    reached = jnp.exp(token_mdp.tabular_log_probability(mdp, logits))
    prefix = token_mdp.prefix_index(mdp, mdp.responses, mdp.mask)

    def of_states(table):
        policy, other = jax.nn.log_softmax(table), jax.nn.log_softmax(prior)
        kl = jnp.sum(jnp.exp(policy) * (policy - other), axis=-1)[:, prefix]
        summed = jnp.sum(kl * mdp.mask[None], axis=-1)
        return -mdp.prompt_probability @ jnp.sum(reached * summed, axis=-1)

    wanted = jax.grad(of_states)(logits)
    for name in ("k2 of tokens as a loss", "exact KL of states as a loss"):
        estimator = estimators.make(mdp, logits)[name]
        found = estimator_bias.expected_gradient(estimator, mdp, logits)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_dr_grpo_has_a_share_of_the_gradient_of_the_reward(fixed):
    """(K - 1) / K of it, less beta times that of the KL of states."""
    mdp, logits = fixed
    made = estimators.make(mdp, logits)

    def reward(table):
        return token_mdp.exact_reward(mdp, token_mdp.tabular_log_probability(mdp, table))

    of_reward = jax.grad(reward)(logits)
    of_kl = estimator_bias.expected_gradient(made["k2 of tokens as a loss"], mdp, logits)
    for name, size in (("dr_grpo, k2 in", 2), ("dr_grpo, exact in", 4)):
        estimator = made[f"{name} the loss, K = {size}"]
        found = estimator_bias.expected_gradient(estimator, mdp, logits)
        wanted = (size - 1) / size * of_reward + mdp.kl_coefficient * of_kl
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_biases_takes_the_named_estimators_each_with_its_own_key(fixed):
    mdp, logits = fixed
    names = ("k1 of tokens as a loss", "k2 of tokens as a loss")
    both = estimators.biases(mdp, logits, jax.random.key(0), 100, names)
    assert tuple(both) == names
    alone = estimators.biases(mdp, logits, jax.random.key(0), 100, names[1:])
    assert alone[names[1]] == both[names[1]]


@pytest.mark.parametrize(
    "name",
    ["reinforce, baseline moving average", "ppo, whitened advantages", *estimators.OF_TOKENS[2:4]],
)
def test_biases_measured_are_those_predicted(name):
    """With responses of several lengths; 3 standard errors along the exact gradient."""
    problem = estimator_bias.random_problem(0, **RAGGED)
    found = estimators.biases(*problem, jax.random.key(0), 4000, (name,))[name]
    assert abs(found.z) < 3
    assert found.largest_z < 4.5
    assert found.standard_error < 0.1


@pytest.mark.parametrize("size", [FIXED, RAGGED], ids=["fixed", "ragged"])
@pytest.mark.parametrize("seed", [0, 1])
def test_biases_of_all_estimators_are_those_predicted(seed, size):
    """Of 20 to 40 numbers one may be beyond 3 standard errors once in ten times: these are not."""
    problem = estimator_bias.random_problem(seed, **size)
    # With 15 responses, groups of 4 are too many to list.
    names = tuple(name for name in NAMES if size is FIXED or "K = 4" not in name)
    found = estimators.biases(*problem, jax.random.key(seed), 100_000, names)
    far = {name: bias.cells() for name, bias in found.items() if abs(bias.z) > 3}
    assert not far
    assert max(bias.largest_z for bias in found.values()) < 4.5
    for name in UNBIASED:
        if name in names and (size is FIXED or "ppo" not in name):
            assert found[name].predicted == pytest.approx(0, abs=1e-5)
