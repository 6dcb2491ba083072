"""LinUCB beside the ridge regression that it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import contextual_bandits
from jaxrl_llm.kernels.contextual_bandits import LinearArms

PENALTY = 0.5


@pytest.fixture(scope="module")
def history():
    random = np.random.default_rng(0)
    return (
        random.normal(size=(30, 3)).astype(np.float32),
        random.integers(2, size=30),  # the third arm is never pulled
        random.normal(size=30).astype(np.float32),
    )


@pytest.fixture(scope="module")
def learned(history):
    def body(arms, step):
        return arms.record(*step), None

    start = LinearArms.unknown(3, 3, penalty=PENALTY)
    return jax.jit(lambda steps: jax.lax.scan(body, start, steps)[0])(history)


def test_record_keeps_the_inverse_and_the_ridge_estimate(history, learned):
    contexts, arms, rewards = history
    for arm in range(3):
        x, r = contexts[arms == arm], rewards[arms == arm]
        gram = PENALTY * np.eye(3) + x.T @ x
        np.testing.assert_allclose(learned.inverse[arm], np.linalg.inv(gram), atol=1e-5)
        ridge = np.linalg.solve(gram, x.T @ r)
        np.testing.assert_allclose(learned.coefficient[arm], ridge, atol=1e-5)


def test_linucb_index_matches_its_equation(history, learned):
    contexts, arms, rewards = history
    context = np.array([0.3, -1.0, 2.0], np.float32)
    index = contextual_bandits.linucb_index(learned, jnp.array(context), width=1.7)
    for arm in range(3):
        x, r = contexts[arms == arm], rewards[arms == arm]
        gram = PENALTY * np.eye(3) + x.T @ x
        expected = context @ np.linalg.solve(gram, x.T @ r)
        expected += 1.7 * np.sqrt(context @ np.linalg.solve(gram, context))
        np.testing.assert_allclose(index[arm], expected, rtol=1e-4)


def test_linucb_index_of_one_feature_is_the_penalised_mean():
    arms = LinearArms.unknown(1, 1)
    for reward in (1.0, 0.0, 1.0):
        arms = arms.record(jnp.ones(1), jnp.array(0), jnp.array(reward))
    index = contextual_bandits.linucb_index(arms, jnp.ones(1), width=2.0)
    np.testing.assert_allclose(index, [2 / 4 + 2.0 * np.sqrt(1 / 4)], rtol=1e-6)


def test_linucb_index_vmaps_over_contexts(learned):
    contexts = jnp.array(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)
    batched = jax.vmap(contextual_bandits.linucb_index, in_axes=(None, 0))(learned, contexts)
    loop = [contextual_bandits.linucb_index(learned, context) for context in contexts]
    np.testing.assert_allclose(batched, jnp.stack(loop), rtol=1e-5)
