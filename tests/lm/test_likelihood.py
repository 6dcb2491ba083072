"""Likelihood of tokens against a softmax of each sequence alone, in NumPy and float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.tokens import Tokens, pack, pad
from jaxrl_llm.lm.likelihood import token_likelihood
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.types import TokenBatch
from tests.lm.tiny import (
    CONTEXT,
    MODEL,
    SHAPE,
    VOCABULARY,
    naive_likelihood,
    random_sequences,
)
from tests.nn.tiny_gpt2 import fast_key, random_params

pytestmark = pytest.mark.slow

SEQUENCES = random_sequences(9, 8)
LAYOUTS: dict[str, Any] = {
    "left": partial(pad, length=CONTEXT, side="left"),
    "right": partial(pad, length=CONTEXT),
    "packed": partial(pack, length=CONTEXT),
}
likelihood = jax.jit(token_likelihood, static_argnames=("model", "chunk_size"))


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_likelihood_equals_a_naive_softmax_of_each_sequence_alone(params, layout):
    # The same layout of the tokens' own numbers says where each went.
    ends = np.cumsum([len(sequence.tokens) for sequence in SEQUENCES])
    numbers = np.split(np.arange(ends[-1], dtype=np.int32), ends[:-1])
    where = LAYOUTS[layout]([Tokens(part, part >= 0) for part in numbers])
    batch = LAYOUTS[layout](SEQUENCES)
    for temperature in (1.0, 0.7):
        found = likelihood(MODEL, params, batch, temperature=temperature)
        expected = naive_likelihood(params, SEQUENCES, temperature=temperature)
        for actual, values in zip(found, expected, strict=True):
            placed = np.where(where.attention_mask, values[where.tokens], 0)
            np.testing.assert_allclose(actual, placed, rtol=1e-5, atol=1e-5)
    assert 0 < np.asarray(found.mask).sum() < np.asarray(batch.response_mask).sum()


def test_token_likelihood_does_not_depend_on_the_chunk(params):
    batch = pack(SEQUENCES, CONTEXT)
    whole = likelihood(MODEL, params, batch, chunk_size=None)
    parts = likelihood(MODEL, params, batch, chunk_size=7)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


class Bigrams:
    """A model whose next token depends on the last one alone: log-probabilities by `[from, to]`."""

    def apply(self, variables, tokens, *, method, attention_mask, segment):
        assert method == "hidden_states"
        return jax.nn.one_hot(tokens, VOCABULARY)


def test_token_likelihood_stands_at_the_token_that_it_is_of():
    law = np.log(np.random.default_rng(0).dirichlet(np.ones(VOCABULARY), VOCABULARY))
    ids = np.random.default_rng(1).integers(VOCABULARY, size=(2, 5))
    counted = np.array([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]], bool)
    batch = TokenBatch(
        tokens=jnp.asarray(ids),
        attention_mask=jnp.ones((2, 5), bool),
        response_mask=jnp.asarray(counted),
    )
    model: Any = Bigrams()
    found = token_likelihood(model, {"transformer": {"wte": {"weight": jnp.asarray(law.T)}}}, batch)
    for row in range(2):
        assert not found.mask[row, 0]
        for t in range(1, 5):
            previous, token = ids[row, t - 1], ids[row, t]
            log_probability = law[previous, token] if counted[row, t] else 0
            entropy = -(np.exp(law[previous]) @ law[previous]) if counted[row, t] else 0
            np.testing.assert_allclose(found.log_probability[row, t], log_probability, rtol=1e-5)
            np.testing.assert_allclose(found.entropy[row, t], entropy, rtol=1e-5)
            assert found.mask[row, t] == counted[row, t]


def test_token_likelihood_drops_out_only_where_it_is_given_a_key(params):
    batch = pack(SEQUENCES, CONTEXT)
    dropping = GPT2(replace(SHAPE, resid_pdrop=0.4))
    plain = likelihood(MODEL, params, batch).log_probability
    # Scoring: the model that has dropout gives the very numbers of the one that has none.
    scored = likelihood(dropping, params, batch).log_probability
    np.testing.assert_array_equal(scored, plain)
    first, second, again = (
        likelihood(dropping, params, batch, dropout_key=fast_key(seed)).log_probability
        for seed in (0, 1, 0)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, second)
    assert not np.allclose(first, plain)


def test_token_likelihood_of_bfloat16_is_of_the_logits_that_it_samples_from(params):
    model = GPT2(SHAPE, dtype=jnp.bfloat16)
    batch = pad(SEQUENCES, CONTEXT)
    found = likelihood(model, params, batch)
    logits: Any = jax.jit(model.apply)(
        {"params": params}, batch.tokens, attention_mask=batch.attention_mask
    )
    log_pi = np.asarray(jax.nn.log_softmax(logits))
    targets = np.asarray(batch.tokens)[:, 1:, None]
    expected = np.take_along_axis(log_pi[:, :-1], targets, axis=-1)[..., 0]
    expected = np.where(found.mask[:, 1:], expected, 0)
    assert found.log_probability.dtype == found.entropy.dtype == jnp.float32
    # Compiled together, the hidden states may be rounded elsewhere: within a few bfloat16 steps.
    np.testing.assert_allclose(found.log_probability[:, 1:], expected, atol=0.05)
