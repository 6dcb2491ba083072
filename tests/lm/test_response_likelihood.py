"""Likelihood, value and exact KL of responses, beside the whole law of a naive forward pass."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm.likelihood import as_rows, exact_kl, response_likelihood, token_likelihood
from jaxrl_llm.nn import adapters
from jaxrl_llm.types import Responses
from tests.lm import tiny

pytestmark = pytest.mark.slow

P, N = 4, 5
MODEL = tiny.MODEL.clone(value_width=8)


@pytest.fixture(scope="module")
def params():
    drawn = MODEL.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    # A value head starts at 0; this one has something to show.
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape),
                        drawn)  # fmt: skip


@pytest.fixture(scope="module")
def responses() -> Responses:
    random = np.random.default_rng(0)
    tokens = random.integers(2, tiny.VOCABULARY, (2, 3, P + N))
    tokens[..., :P] = tokens[:, :1, :P]
    prompt = np.broadcast_to(np.arange(P) >= np.array([0, 3])[:, None, None], (2, 3, P))
    response = np.arange(N) < np.array([[5, 1, 3], [2, 4, 0]])[..., None]
    return Responses(
        tokens=jnp.asarray(tokens, jnp.int32),
        attention_mask=jnp.asarray(np.concatenate([prompt, response], -1)),
        response_mask=jnp.asarray(response),
    )


def naive(params, responses, temperature=1.0):
    """log pi `[G, K, N, V]` and values `[G, K, N]`, each row read alone without padding."""
    log_pi = np.zeros((2, 3, N, tiny.VOCABULARY))
    value = np.zeros((2, 3, N))
    for group, sample in np.ndindex(2, 3):
        real = np.asarray(responses.attention_mask[group, sample])
        row = np.zeros((1, tiny.CONTEXT), np.int32)
        row[0, : real.sum()] = np.asarray(responses.tokens[group, sample])[real]
        first = int(real[:P].sum())
        logits = np.asarray(_logits(params, row))[0]
        law = tiny.log_softmax(logits / temperature)
        values = np.asarray(_values(params, row))[0]
        for t in range(int(real[P:].sum())):
            log_pi[group, sample, t] = law[first + t - 1]
            value[group, sample, t] = values[first + t - 1]
    return log_pi, value


@jax.jit
def _logits(params, tokens):
    return MODEL.apply({"params": params}, tokens)


@jax.jit
def _values(params, tokens):
    hidden = MODEL.apply({"params": params}, tokens, method="hidden_states")
    return MODEL.apply({"params": params}, hidden, method="value")


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_response_likelihood_equals_each_row_read_alone(params, responses, chunk_size):
    score = jax.jit(partial(response_likelihood, MODEL, temperature=0.7, chunk_size=chunk_size))
    result = score(params, responses)
    log_pi, value = naive(params, responses, 0.7)
    written = np.asarray(responses.tokens)[..., P:, None]
    chosen = np.take_along_axis(log_pi, written, -1)[..., 0]
    mask = np.asarray(responses.response_mask)
    np.testing.assert_allclose(result.log_probability, np.where(mask, chosen, 0), atol=2e-5)
    entropy = np.where(mask, -(np.exp(log_pi) * log_pi).sum(-1), 0)
    np.testing.assert_allclose(result.entropy, entropy, atol=2e-5)
    np.testing.assert_allclose(result.value, value, atol=2e-5)


def test_response_likelihood_agrees_with_token_likelihood(params, responses):
    whole = token_likelihood(MODEL, params, as_rows(responses))
    result = response_likelihood(MODEL, params, responses)
    np.testing.assert_allclose(
        whole.log_probability[:, P:], result.log_probability.reshape(-1, N), atol=1e-5
    )


def test_response_likelihood_of_the_trunk_has_no_value(params, responses):
    assert response_likelihood(MODEL, adapters.trunk(params), responses).value is None


def test_exact_kl_equals_the_sum_over_the_vocabulary(params, responses):
    other = jax.tree.map(lambda leaf: leaf * 0.9, adapters.trunk(params))
    kl = jax.jit(partial(exact_kl, MODEL, temperature=1.3))(params, other, responses)
    log_pi, _ = naive(params, responses, 1.3)
    log_ref, _ = naive(adapters.attach(params, other), responses, 1.3)
    expected = (np.exp(log_pi) * (log_pi - log_ref)).sum(-1)
    np.testing.assert_allclose(kl, np.where(responses.response_mask, expected, 0), atol=2e-5)


def test_exact_kl_moves_the_policy_alone(params, responses):
    other = jax.tree.map(lambda leaf: leaf * 0.9, adapters.trunk(params))

    def total(params, reference):
        return jnp.sum(exact_kl(MODEL, params, reference, responses))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(params, other)
    moved, still = (jax.tree.reduce(lambda a, b: a + jnp.abs(b).sum(), g, 0.0) for g in gradients)
    assert float(moved) > 0
    assert float(still) == 0
    assert np.isfinite(moved)
