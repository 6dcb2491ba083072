"""The adaptors ask torch what the cases of GPT-2 compute: known answers, nothing timed."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import harness, torch_peers
from benchmarks.harness import PeerMissing
from jaxrl_llm.lm import decoding, optimizer
from jaxrl_llm.nn.gpt2 import GPT2
from tests.nn.tiny_gpt2 import TINY, TOKENS, random_params, run

PROMPT = TOKENS[:, :5]


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # models this small lose more by waiting for other threads
    return torch


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def subject(request):
    """A model without dropout, its parameters, and its logits of `TOKENS`."""
    options = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2(dataclasses.replace(TINY, tie_word_embeddings=request.param, **options))
    params = random_params(model)
    return model, params, run(model, params, TOKENS)


def log_softmax(logits):
    excess = logits - logits.max(-1, keepdims=True)
    return excess - np.log(np.exp(excess).sum(-1, keepdims=True))


def token_log_probabilities(logits):
    return np.take_along_axis(log_softmax(logits[:, :-1]), TOKENS[:, 1:, None], -1)[..., 0]


def greedy_continuation(model, params, num_new):
    length = PROMPT.shape[1]
    tokens = np.pad(PROMPT, ((0, 0), (0, num_new)))
    for place in range(length, length + num_new):  # of one shape, so that it compiles once
        tokens[:, place] = run(model, params, tokens)[:, place - 1].argmax(-1)
    return tokens


@pytest.mark.slow
def test_forward_gives_our_logits(torch, subject):
    model, params, logits = subject
    peer = torch_peers.forward(model.config, params, "float32", jnp.asarray(TOKENS))
    np.testing.assert_allclose(torch_peers.to_numpy(harness.call(peer)), logits, atol=1e-4)


def test_prefill_gives_the_last_logits_and_a_full_cache(torch, subject):
    model, params, logits = subject
    peer = torch_peers.prefill(model.config, params, "float32", jnp.asarray(TOKENS))
    last, cache = harness.call(peer)
    np.testing.assert_allclose(torch_peers.to_numpy(last), logits[:, -1], atol=1e-4)
    assert cache.get_seq_length() == TOKENS.shape[1]


def test_score_gives_the_log_probability_of_each_next_token(torch, subject):
    model, params, logits = subject
    peer = torch_peers.score(model.config, params, "float32", jnp.asarray(TOKENS))
    scores = torch_peers.to_numpy(harness.call(peer))
    np.testing.assert_allclose(scores, token_log_probabilities(logits), atol=1e-4)


def test_decode_takes_the_most_likely_token_at_temperature_0(torch, subject):
    model, params, _ = subject
    sampling = decoding.Config(max_new_tokens=4, temperature=0.0)
    peer = torch_peers.decode(model.config, params, "float32", jnp.asarray(PROMPT), sampling)
    expected = greedy_continuation(model, params, 4)
    np.testing.assert_array_equal(torch_peers.to_numpy(harness.call(peer)), expected)


def test_decode_draws_from_the_nucleus_alone(torch, subject):
    model, params, _ = subject
    # A nucleus smaller than any token is the most likely token, at whatever temperature.
    sampling = decoding.Config(max_new_tokens=4, temperature=2.0, top_p=1e-6)
    peer = torch_peers.decode(model.config, params, "float32", jnp.asarray(PROMPT), sampling)
    expected = greedy_continuation(model, params, 4)
    np.testing.assert_array_equal(torch_peers.to_numpy(harness.call(peer)), expected)


def test_decode_draws_at_random_and_never_ends_a_row(torch, subject):
    model, params, _ = subject
    sampling = decoding.Config(max_new_tokens=7, temperature=1e4)
    prompt = jnp.zeros((100, 5), jnp.int32)
    peer = torch_peers.decode(model.config, params, "float32", prompt, sampling)
    torch.manual_seed(0)
    first, second = (torch_peers.to_numpy(harness.call(peer)) for _ in range(2))
    assert first.shape == (100, 12)
    assert np.any(first != second)
    # Uniform over all 29 tokens, the end token among them: nothing is cut off.
    assert set(np.unique(first[:, 5:])) == set(range(TINY.vocab_size))


def test_train_takes_the_same_step_every_time(torch, subject):
    model, params, logits = subject
    adamw = optimizer.ADAMW
    peer = torch_peers.train(model.config, params, "float32", jnp.asarray(TOKENS), adamw)
    expected = -token_log_probabilities(logits).mean()
    results = [[float(part) for part in harness.call(peer)] for _ in range(3)]
    np.testing.assert_allclose([loss for loss, _ in results], expected, rtol=1e-5)
    norms = [norm for _, norm in results]
    assert norms[0] > 1.01 * adamw.max_gradient_norm  # not what clipping leaves of it
    np.testing.assert_allclose(norms, norms[0], rtol=1e-6)


def test_peers_leave_the_weights_that_they_copy_alone(torch):
    params = random_params(GPT2(TINY))
    before = jax.tree.map(np.copy, params)
    peer = torch_peers.train(TINY, params, "float32", jnp.asarray(TOKENS), optimizer.ADAMW)
    harness.call(peer)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_bfloat16_rounds_the_weights(torch, subject):
    model, params, logits = subject
    peer = torch_peers.forward(model.config, params, "bfloat16", jnp.asarray(TOKENS))
    result = harness.call(peer)
    assert result.dtype == torch.bfloat16
    error = np.abs(torch_peers.to_numpy(result) - logits).max() / logits.std()
    assert 1e-3 < error < 0.3


def test_peers_say_how_to_install_torch(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PeerMissing, match=r"^peer torch not installed: pip install .*peers"):
        torch_peers.forward(TINY, {}, "float32", jnp.asarray(TOKENS))


def test_peers_are_missing_where_only_jax_has_an_accelerator(torch, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PeerMissing, match="peer torch sees no GPU: install its build for CUDA"):
        torch_peers.forward(TINY, {}, "float32", jnp.asarray(TOKENS))
