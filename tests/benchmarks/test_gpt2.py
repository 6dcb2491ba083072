"""The cases of GPT-2 on a model of a few thousand weights: same job as the peer, honest work."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpt2, harness
from benchmarks.returns import CACHED_BYTES
from jaxrl_llm.nn.gpt2 import GPT2, init_cache

pytestmark = pytest.mark.slow

MICRO = dataclasses.replace(gpt2.SIZES["tiny"], vocab_size=61, n_positions=48, n_embd=16, n_layer=2)
NUM_NEW = 6
COMPARED = (
    "decode-tiny-3",
    "prefill-tiny-2x9",
    "forward-tiny-2x9",
    "score-tiny-2x9",
    "train-tiny-2x9",
    "train-tiny-3x5",
)
NOT_COMPARED = ("decode-tiny-32-top-p",)
RAGGED = "ragged-tiny-64"


@pytest.fixture
def cases(monkeypatch):
    """The cases by name, all of one size, and that one small."""
    monkeypatch.setattr(gpt2, "SIZES", {"tiny": MICRO})
    monkeypatch.setattr(gpt2, "BATCHES", (3,))
    monkeypatch.setattr(gpt2, "ROWS", (2, 9))
    monkeypatch.setattr(gpt2, "MORE_TRAINING_ROWS", {"tiny": ((3, 5),)})
    monkeypatch.setattr(gpt2, "RAGGED_PROMPTS", 64)
    for name in ("GREEDY", "NUCLEUS", "RAGGED"):
        config = dataclasses.replace(getattr(gpt2, name), max_new_tokens=NUM_NEW)
        monkeypatch.setattr(gpt2, name, config)
    return {case.name: case for case in gpt2.cases()}


@pytest.fixture
def torch():
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # models this small lose more by waiting for other threads
    return torch


def test_cases_are_named_and_draw_no_weights(cases):
    memory = "memory-log-probability-gradient-4x1024"
    assert set(cases) == {*COMPARED, *NOT_COMPARED, RAGGED, memory}
    misses = gpt2._parameters.cache_info().misses
    names = [case.name for case in gpt2.cases()]
    assert len(names) == len(set(names))
    assert gpt2._parameters.cache_info().misses == misses


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED + NOT_COMPARED)
def test_case_agrees_with_its_peer_again_and_again(cases, torch, name):
    case = cases[name]
    peer = case.peer()
    for _ in range(2):  # the second time with new arguments for those that were donated
        case.agree(harness.call(case), harness.call(peer))


@pytest.mark.slow
def test_ragged_responses_are_the_same_in_slots_as_in_batches(cases):
    case = cases[RAGGED]
    slots, batches = harness.call(case), harness.call(case.peer())
    assert slots.shape == (64, gpt2.PROMPT + NUM_NEW)
    case.agree(slots, batches)
    with pytest.raises(AssertionError, match="of the rows differ"):
        case.agree(slots, batches + 1)


@pytest.mark.parametrize("name", COMPARED)
def test_agree_notices_other_weights(cases, torch, name):
    case = cases[name]
    arguments = jax.tree.map(
        lambda leaf: (
            leaf + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else leaf
        ),
        case.arguments(),
    )
    with pytest.raises(AssertionError):
        case.agree(case.function(*arguments), harness.call(case.peer()))


def test_decode_returns_as_many_tokens_as_it_counts(cases):
    case = cases["decode-tiny-3"]
    result = harness.call(case)
    assert result.shape == (3, gpt2.PROMPT + NUM_NEW)
    assert case.items == 3 * NUM_NEW


def test_decode_work_counts_every_pass(cases):
    params = gpt2._parameters(MICRO)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    weights -= params["transformer"]["wpe"]["weight"].nbytes
    moved, flops = weights, 0.0
    head = 2 * MICRO.n_embd * MICRO.vocab_size
    for position in range(1, gpt2.PROMPT + 1):
        flops += 3 * (MICRO.forward_flops(position) - head * (position < gpt2.PROMPT))
    for length in range(gpt2.PROMPT, gpt2.PROMPT + NUM_NEW - 1):
        cache = init_cache(MICRO, 3, length)
        moved += weights + sum(leaf.nbytes for leaf in cache.keys + cache.values)
        flops += 3 * MICRO.forward_flops(length + 1)
    work = cases["decode-tiny-3"].work(None)
    assert work["cached_bytes"] == moved
    np.testing.assert_allclose(work["float32_flops"], flops, rtol=1e-12)


def test_decode_streams_weights_that_no_cache_holds():
    config = dataclasses.replace(MICRO, vocab_size=CACHED_BYTES // (4 * MICRO.n_embd))
    assert "streamed_bytes" in gpt2.decode_work(GPT2(config), 1, NUM_NEW)


def test_work_of_whole_rows_is_the_matrix_products(cases):
    forward = sum(2 * MICRO.forward_flops(position) for position in range(1, 10))
    unscored = 2 * 8 * 2 * MICRO.n_embd * MICRO.vocab_size
    expected = {"forward": forward, "score": forward, "train": 3 * 16 * forward}
    expected["prefill"] = forward - unscored
    for name, flops in expected.items():
        work = cases[f"{name}-tiny-2x9"].work(None)
        assert set(work) == {"float32_flops"}
        np.testing.assert_allclose(work["float32_flops"], flops, rtol=1e-12)


def test_cases_of_an_accelerator_compute_in_bfloat16(cases, monkeypatch):
    monkeypatch.setattr(gpt2, "SIZES", {"small": MICRO})
    monkeypatch.setattr(gpt2, "MORE_TRAINING_ROWS", {"small": ()})
    monkeypatch.setattr(gpt2, "LARGE_BATCH", 4)
    monkeypatch.setattr(gpt2, "LARGE_CACHES", (35, 38))
    monkeypatch.setattr(gpt2, "LARGE_ROWS", (3, 11))
    with monkeypatch.context() as only_here:
        only_here.setattr(jax, "default_backend", lambda: "gpu")
        cases = {case.name: case for case in gpt2.cases()}
    decode = cases["decode-small-4-cache-38"]
    assert harness.call(decode).shape == (4, 38)
    assert decode.work is not None
    work, in_float32 = decode.work(None), gpt2.decode_work(GPT2(MICRO), 4, 6)
    assert work["cached_bytes"] == in_float32["cached_bytes"] / 2
    assert work["bfloat16_flops"] == in_float32["float32_flops"]
    _, cache = harness.call(cases["prefill-small-3x11"])
    assert {leaf.dtype for leaf in cache.keys} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(("rows", "chunk_size"), [((16, 1024), None), ((32, 1024), 1024)])
def test_logits_are_chunked_where_they_would_not_fit(monkeypatch, rows, chunk_size):
    model = GPT2(dataclasses.replace(MICRO, vocab_size=16384))
    assert gpt2._chunk_size(model, gpt2._tokens(model, *rows)) == chunk_size


def test_memory_case_says_what_both_programs_need(monkeypatch):
    monkeypatch.setattr(
        gpt2, "temporary_bytes", lambda function: 2**20 * (3 if "chunk" in function.__name__ else 8)
    )
    case = gpt2._gradient_memory()
    assert case.peer is not None
    assert case.agree is not None
    peer = case.peer()
    assert peer.name.endswith("8 MiB of temporaries against 3")
    with pytest.raises(AssertionError, match="are more than a quarter of"):
        case.agree(harness.call(case), harness.call(peer))
    case.agree(2, 8)


def test_temporary_bytes_of_all_logits_at_once(monkeypatch):
    monkeypatch.setattr(gpt2, "SIZES", {"small": MICRO})
    logits = 4 * 1024 * MICRO.vocab_size * 4
    needed = gpt2.temporary_bytes(gpt2._naive_log_probabilities)
    assert logits <= needed <= 4 * logits
