"""TRL takes the steps that the cases of `rlhf` take: known answers, nothing timed."""

import dataclasses
import importlib.util
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import harness, trl_peers
from benchmarks.harness import PeerMissing
from jaxrl_llm.lm import optimizer
from jaxrl_llm.nn.gpt2 import GPT2
from tests.nn.tiny_gpt2 import TINY, random_params, run

MODEL = GPT2(dataclasses.replace(TINY, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
NUM_PROMPTS, PROMPT, NUM_SAMPLES, NUM_NEW = 2, 3, 4, 5
BETA = 0.3
RANDOM = np.random.default_rng(0)
PROMPTS = RANDOM.integers(1, TINY.vocab_size, size=(NUM_PROMPTS, PROMPT))


def pairs():
    rows = RANDOM.integers(1, TINY.vocab_size, size=(2, NUM_PROMPTS, NUM_NEW))
    rows[..., -1] = 0
    return rows


CHOSEN, REJECTED = pairs()


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("trl")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # models this small lose more by waiting for other threads
    return torch


@pytest.fixture
def setting():
    """A policy, and a reference that is another model."""
    params = random_params(MODEL)
    reference = jax.tree.map(lambda leaf: leaf * 0.9, params)
    adamw = dataclasses.replace(optimizer.ADAMW, max_gradient_norm=1e-3)
    return trl_peers.Setting(
        config=MODEL.config, params=params, reference=reference, adamw=adamw, beta=BETA
    )


def online(algorithm, setting, reward):
    return trl_peers.online(
        algorithm, setting, PROMPTS, reward, num_samples=NUM_SAMPLES, max_new_tokens=NUM_NEW
    )


def last_token(responses):
    return [float(response[-1]) for response in responses]


def response_log_probability(params, responses):
    tokens = np.concatenate([PROMPTS, responses], axis=1)
    log_pi = np.asarray(jax.nn.log_softmax(run(MODEL, params, tokens))[:, PROMPT - 1 : -1])
    return np.take_along_axis(log_pi, responses[..., None], axis=-1).sum((1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_online_scores_whole_responses_drawn_anew_in_every_step(torch, setting, algorithm):
    seen = []

    def reward(responses):
        seen.append([list(response) for response in responses])
        return last_token(responses)

    peer = online(algorithm, setting, reward)
    steps = [harness.call(peer) for _ in range(3)]
    assert peer.items == NUM_PROMPTS * NUM_SAMPLES * NUM_NEW
    drawn = np.array(seen)  # of one shape: no response ends early
    assert drawn.shape == (3, NUM_PROMPTS * NUM_SAMPLES, NUM_NEW)
    assert 0 <= drawn.min() <= drawn.max() < TINY.vocab_size
    assert np.any(drawn[0] != drawn[1])
    for step in steps:
        assert step.gradient_norm > 10 * setting.adamw.max_gradient_norm  # not what clipping leaves


def test_online_draws_from_the_policy(torch, setting):
    # So certain of itself that it always writes its most likely token.
    scale = setting.params["transformer"]["ln_f"]
    scale["weight"], scale["bias"] = scale["weight"] * 1e4, scale["bias"] * 1e4
    seen = []
    harness.call(online("GRPO", setting, lambda rows: seen.extend(rows) or last_token(rows)))
    tokens = np.pad(PROMPTS, ((0, 0), (0, NUM_NEW)))
    for place in range(PROMPT, PROMPT + NUM_NEW):
        tokens[:, place] = run(MODEL, setting.params, tokens)[:, place - 1].argmax(-1)
    expected = np.repeat(tokens[:, PROMPT:], NUM_SAMPLES, axis=0)
    np.testing.assert_array_equal(np.array(seen), expected)


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_online_asks_the_reference_in_every_step(torch, setting, algorithm):
    def gradient_norm(setting):
        peer = online(algorithm, setting, lambda responses: [1.0] * len(responses))
        return [harness.call(peer).gradient_norm for _ in range(2)]

    # With equal scores there is nothing to learn but to stay near the reference.
    assert min(gradient_norm(setting)) > 1e-2
    same = dataclasses.replace(setting, reference=setting.params)
    assert max(gradient_norm(same)) < 1e-4


@pytest.mark.parametrize("is_precomputed", [False, True])
def test_dpo_has_the_loss_of_its_equation_every_time(torch, setting, is_precomputed):
    peer = trl_peers.dpo(setting, PROMPTS, CHOSEN, REJECTED, is_precomputed=is_precomputed)
    steps = [harness.call(peer) for _ in range(3)]
    ratio = [
        response_log_probability(setting.params, responses)
        - response_log_probability(setting.reference, responses)
        for responses in (CHOSEN, REJECTED)
    ]
    expected = np.mean(np.logaddexp(0, -BETA * (ratio[0] - ratio[1])))
    np.testing.assert_allclose([step.loss for step in steps], expected, rtol=1e-4)
    norms = [step.gradient_norm for step in steps]
    assert norms[0] > 10 * setting.adamw.max_gradient_norm  # not what clipping leaves of it
    np.testing.assert_allclose(norms, norms[0], rtol=1e-5)
    assert peer.items == 2 * NUM_PROMPTS * NUM_NEW


def test_trainers_ask_nothing_of_the_network_and_say_nothing(torch, setting, monkeypatch, capfd):
    def refuse(*_):
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    harness.call(online("GRPO", setting, last_token))
    harness.call(trl_peers.dpo(setting, PROMPTS, CHOSEN, REJECTED))
    assert capfd.readouterr() == ("", "")


def test_peers_leave_the_weights_that_they_copy_alone(torch, setting):
    before = jax.tree.map(np.copy, (setting.params, setting.reference))
    harness.call(online("RLOO", setting, last_token))
    jax.tree.map(np.testing.assert_array_equal, (setting.params, setting.reference), before)


def test_peers_say_how_to_install_trl(setting, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PeerMissing, match=r"^peer \w+ not installed: pip install .*peers"):
        trl_peers.dpo(setting, PROMPTS, CHOSEN, REJECTED)


def test_peers_are_missing_where_only_jax_has_an_accelerator(torch, setting, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PeerMissing, match="peer torch sees no GPU: install its build for CUDA"):
        trl_peers.dpo(setting, jnp.asarray(PROMPTS), CHOSEN, REJECTED)
