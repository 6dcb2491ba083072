"""Likelihood and calibration against models that are solved by hand; text metrics against loops."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import tokens
from jaxrl_llm.lm import evaluate
from jaxrl_llm.nn import gpt2

V = 13
MODEL = gpt2.GPT2(gpt2.GPT2Config(vocab_size=V, n_positions=16, n_embd=16, n_layer=1, n_head=2))


@dataclass(frozen=True)
class Markov:
    """A model whose next token depends on the last one only, by `params["lm_head"]["weight"].T`."""

    dtype: Any = jnp.float32
    traces: list = field(default_factory=list, compare=False)

    def apply(self, variables, x, *, method, **masks):
        self.traces.append(method)
        weight = variables["params"]["lm_head"]["weight"]
        if method == "hidden_states":
            return jax.nn.one_hot(x, len(weight), dtype=self.dtype)
        return x @ weight.T


MARKOV: Any = Markov()


def markov_params(probability):
    """Of `probability` `[V, V]`; a logit of -1e4 has probability 0, and times 0 is not NaN."""
    weight = jnp.log(jnp.maximum(jnp.asarray(probability, jnp.float32), 1e-30)).T
    weight = jnp.where(weight < -60, -1e4, weight)
    return {"lm_head": {"weight": weight}, "transformer": {"wte": {"weight": weight}}}


def sequence(ids, response=None):
    ids = np.array(ids, np.int32)
    mask = np.ones(len(ids), bool) if response is None else np.array(response, bool)
    return tokens.Tokens(ids, mask)


def random_sequences(num, longest, *, seed=0):
    random = np.random.default_rng(seed)
    return [
        sequence(random.integers(V, size=n), random.random(n) < 0.7)
        for n in random.integers(2, longest + 1, size=num)
    ]


LAW = np.random.default_rng(6).dirichlet(np.full(V, 0.2), V)


def markov_laws(ids):
    return LAW[ids]


@pytest.fixture(scope="module")
def params():
    init = partial(MODEL.init, jax.random.key(0))
    shapes = jax.eval_shape(init, jnp.zeros((1, 4), jnp.int32))["params"]
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.float32(random.normal(0, 0.5, leaf.shape)), shapes)


def gpt2_laws(params):
    run = partial(jax.jit(MODEL.apply), {"params": params})

    def laws(ids):
        # One length, so that one program serves all; a causal model does not see what follows.
        filled = np.zeros((1, 12), np.int32)
        filled[0, : len(ids)] = ids
        logits = np.asarray(run(filled), np.float64)[0]
        law = np.exp(logits - logits.max(-1, keepdims=True))
        return law / law.sum(-1, keepdims=True)

    return laws


def every_prediction(laws, sequences):
    """Law `[V]` in float64 and outcome of every counted token, one sequence at a time, unpadded."""
    for ids, response, _ in sequences:
        law = laws(ids)
        yield from ((law[t - 1], ids[t]) for t in range(1, len(ids)) if response[t])


def layouts(sequences):
    """The same sequences on either side, packed, and with a tail of end tokens that are read.

    All have rows of padding throughout, and the first three one shape, hence one program.
    """
    end = V - 1
    right = tokens.pad(sequences, 14, pad_token=end)
    made = {
        "right": right,
        "left": tokens.pad(sequences, 14, side="left", pad_token=end),
        "tail": replace(right, attention_mask=np.ones_like(right.tokens, bool)),
        "packed": tokens.pack(sequences, 14),
    }
    fill_up = partial(tokens.batches, batch_size=len(sequences) + 2)
    return {name: next(fill_up(batch)) for name, batch in made.items()}


def assert_surprise(actual, predictions):
    surprises = [-math.log(law[token]) for law, token in predictions]
    assert actual.weight == len(surprises) > 20
    np.testing.assert_allclose(actual.total, sum(surprises), rtol=2e-6)


@pytest.mark.slow
def test_negative_log_likelihood_of_gpt2_matches_numpy_in_any_layout(params):
    sequences = random_sequences(6, 12)
    predictions = list(every_prediction(gpt2_laws(params), sequences))
    score = partial(evaluate.negative_log_likelihood, MODEL, params, chunk_size=512)
    for batch in layouts(sequences).values():
        assert_surprise(score(batch), predictions)


@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_negative_log_likelihood_does_not_depend_on_chunks(chunk_size):
    sequences = random_sequences(6, 12)
    score = partial(evaluate.negative_log_likelihood, MARKOV, chunk_size=chunk_size)
    actual = score(markov_params(LAW), tokens.pack(sequences, 14))
    assert_surprise(actual, every_prediction(markov_laws, sequences))


def test_negative_log_likelihood_uses_the_precision_of_the_model():
    params = markov_params(LAW)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    batch = tokens.pad(random_sequences(6, 12), 12)
    half: Any = Markov(dtype=jnp.bfloat16)
    actual = evaluate.negative_log_likelihood(half, params, batch)
    expected = evaluate.negative_log_likelihood(MARKOV, rounded, batch)
    np.testing.assert_allclose(actual.total, expected.total, rtol=1e-6)


@pytest.mark.slow
def test_perplexity_of_a_uniform_model_is_the_vocabulary(params):
    blank = jax.tree.map(jnp.zeros_like, params)
    for batch in layouts(random_sequences(6, 12)).values():
        assert evaluate.perplexity(MODEL, blank, [batch]) == pytest.approx(V, rel=1e-6)


def test_perplexity_of_a_cycle_known_by_heart_is_1():
    cycle = np.roll(np.eye(4), 1, axis=1)
    batch = tokens.pad([sequence([0, 1, 2, 3, 0]), sequence([2, 3])], 5)
    assert evaluate.perplexity(MARKOV, markov_params(cycle), [batch]) == 1
    wrong = tokens.pad([sequence([0, 2])], 5)
    assert evaluate.perplexity(MARKOV, markov_params(cycle), [wrong]) == math.inf


def test_perplexity_weighs_tokens_not_batches():
    """One token of p = 1/4 in one batch, three of p = 1/2 in the other: (4 · 2^3)^(1/4)."""
    law = [[0.25, 0.25, 0.5], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]
    few = tokens.pad([sequence([0, 1])], 4)
    many = tokens.pad([sequence([1, 0, 2, 1])], 4)
    actual = evaluate.perplexity(MARKOV, markov_params(law), iter([few, many]))
    assert actual == pytest.approx(2**1.25, rel=1e-6)
    alone = [evaluate.perplexity(MARKOV, markov_params(law), [batch]) for batch in (few, many)]
    np.testing.assert_allclose(alone, [4, 2], rtol=1e-6)


def test_corpus_likelihood_adds_batches_in_any_division_and_compiles_once():
    params = markov_params(LAW)
    data = tokens.pad(random_sequences(7, 12, seed=1), 12)
    whole = evaluate.corpus_likelihood(MARKOV, params, [data])
    num_traces = len(MARKOV.traces)
    equal: Any = Markov(traces=MARKOV.traces)
    for seed in (3, 4):
        parts = tokens.batches(data, batch_size=2, seed=seed)
        divided = evaluate.corpus_likelihood(equal, params, parts)
        assert divided.num_tokens == whole.num_tokens
        assert divided.nats == pytest.approx(whole.nats, rel=1e-6)
    assert len(MARKOV.traces) == num_traces + 1


def test_corpus_likelihood_refuses_nothing_to_predict():
    first_only = tokens.pad([sequence([3, 4], [True, False])], 4)
    for batches in ([], [first_only, first_only]):
        with pytest.raises(ValueError, match=f"batches has {len(batches)} of them and not one"):
            evaluate.corpus_likelihood(MARKOV, markov_params(LAW), batches)


def test_bits_per_byte_of_uniform_bytes_is_8():
    likelihood = evaluate.Likelihood(nats=10 * math.log(256), num_tokens=10)
    assert likelihood.bits_per_byte(10) == pytest.approx(8, rel=1e-12)
    assert likelihood.perplexity == pytest.approx(256, rel=1e-12)
    with pytest.raises(ValueError, match="num_bytes is 0; it must be at least 1"):
        likelihood.bits_per_byte(0)


def calibration_by_loop(predictions, num_bins):
    """Counts, confidences and hits by bin, and the Brier score, from lists."""
    count, confidence, hits = np.zeros((3, num_bins))
    brier = 0.0
    for law, token in predictions:
        top = law.max()
        index = next(b for b in range(num_bins) if b / num_bins < top <= (b + 1) / num_bins)
        count[index] += 1
        confidence[index] += top
        hits[index] += law.argmax() == token
        brier += sum((law[j] - (j == token)) ** 2 for j in range(len(law)))
    return count, confidence, hits, brier


@pytest.mark.parametrize("chunk_size", [1, 5, 512])
def test_calibration_matches_a_loop_in_any_layout(chunk_size):
    sequences = random_sequences(6, 12, seed=2)
    predictions = every_prediction(markov_laws, sequences)
    count, confidence, hits, brier = calibration_by_loop(predictions, 7)
    assert (count > 0).sum() >= 4
    batches = layouts(sequences)
    measure = partial(evaluate.calibration, MARKOV, num_bins=7, chunk_size=chunk_size)
    for batch in batches.values() if chunk_size == 5 else [batches["packed"]]:
        actual = measure(markov_params(LAW), batch)
        np.testing.assert_array_equal(actual.confidence.weight, count)
        np.testing.assert_array_equal(actual.accuracy.weight, count)
        np.testing.assert_array_equal(actual.accuracy.total, hits)
        np.testing.assert_allclose(actual.confidence.total, confidence, rtol=1e-5)
        np.testing.assert_allclose(actual.brier.total, brier, rtol=1e-5)
        expected = np.abs(hits - confidence).sum() / count.sum()
        np.testing.assert_allclose(actual.expected_error, expected, rtol=1e-4)


def test_calibration_of_gpt2_matches_a_loop(params):
    sequences = random_sequences(6, 12, seed=2)
    predictions = every_prediction(gpt2_laws(params), sequences)
    count, confidence, hits, brier = calibration_by_loop(predictions, 15)
    actual = evaluate.calibration(MODEL, params, tokens.pad(sequences, 12, side="left"))
    np.testing.assert_array_equal(actual.accuracy.weight, count)
    np.testing.assert_array_equal(actual.accuracy.total, hits)
    np.testing.assert_allclose(actual.confidence.total, confidence, rtol=1e-5)
    np.testing.assert_allclose(actual.brier.total, brier, rtol=1e-5)


def test_calibration_of_an_overconfident_model_is_the_gap():
    """After token 0 it says 1 with p = 0.8 and is right 3 times in 5; Brier: exact arithmetic."""
    params = markov_params([[0.1, 0.8, 0.1]] * 3)
    rows = [sequence([0, token]) for token in (1, 1, 1, 0, 2)]
    actual = evaluate.calibration(MARKOV, params, tokens.pad(rows, 2), num_bins=10)
    np.testing.assert_allclose(actual.expected_error, 0.2, atol=1e-6)
    np.testing.assert_allclose(actual.accuracy.mean, 0.6 * (np.arange(10) == 7), atol=1e-6)
    np.testing.assert_allclose(actual.confidence.mean, 0.8 * (np.arange(10) == 7), atol=1e-6)
    right, wrong = 0.2**2 + 2 * 0.1**2, 0.9**2 + 0.8**2 + 0.1**2
    np.testing.assert_allclose(actual.brier.mean, (3 * right + 2 * wrong) / 5, atol=1e-6)


def test_calibration_bins_hold_their_upper_end():
    uniform = markov_params(np.full((2, 2), 0.5))
    batch = tokens.pad([sequence([0, 1]), sequence([1, 0])], 2)
    halves = evaluate.calibration(MARKOV, uniform, batch, num_bins=2)
    np.testing.assert_array_equal(halves.confidence.weight, [2, 0])
    assert halves.brier.mean == 0.5
    assert halves.expected_error == 0  # always says 0, right once in two, as sure as a coin
    certain = markov_params(np.eye(2))
    repeated = tokens.pad([sequence([1, 1])], 2)
    sure = evaluate.calibration(MARKOV, certain, repeated, num_bins=2)
    np.testing.assert_array_equal(sure.accuracy.total, [0, 1])
    assert sure.expected_error == sure.brier.mean == 0


def test_calibration_of_parts_adds_up():
    data = tokens.pad(random_sequences(6, 12, seed=3), 12)
    measure = partial(evaluate.calibration, MARKOV, markov_params(LAW))
    first, second = (measure(batch) for batch in tokens.batches(data, batch_size=3))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), first + second, measure(data))


def test_calibration_of_nothing_is_zero():
    batch = tokens.pad([sequence([1, 2, 3], [True, False, False])], 4)
    actual = evaluate.calibration(MARKOV, markov_params(LAW), batch)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(actual))
    assert actual.expected_error == actual.brier.mean == 0


def test_calibration_refuses_no_bins_and_empty_chunks():
    batch = tokens.pad([sequence([1, 2])], 2)
    for name in ("num_bins", "chunk_size"):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
            evaluate.calibration(MARKOV, markov_params(LAW), batch, **{name: 0})


def test_responses_are_what_the_mask_counts_without_rows_of_padding():
    rows = [sequence([5, 6, 7], [0, 1, 1]), sequence([8], [0]), sequence([9, 3, 2], [0, 0, 1])]
    for side in ("left", "right"):
        [batch] = tokens.batches(tokens.pad(rows, 5, side=side), batch_size=5)
        assert evaluate.responses(batch) == [[6, 7], [], [2]]
    with pytest.raises(ValueError, match=r"batch\.segment is given"):
        evaluate.responses(tokens.pack(rows, 5))


def by_loop(text: Sequence[int], n: int) -> list[str]:
    return [str(list(text[start : start + n])) for start in range(len(text) - n + 1)]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_distinct_n_and_repetition_match_a_loop(n):
    random = np.random.default_rng(4)
    texts = [random.integers(3, size=size).tolist() for size in (0, 1, 4, 9, 30)]
    grams = [gram for text in texts for gram in by_loop(text, n)]
    assert evaluate.distinct_n(texts, n) == pytest.approx(len(set(grams)) / len(grams))
    for text in texts:
        seen: set[str] = set()
        repeats = []
        for gram in by_loop(text, n):
            repeats.append(gram in seen)
            seen.add(gram)
        assert evaluate.repetition(text, n) == pytest.approx(np.mean(repeats) if repeats else 0)


def test_distinct_n_and_repetition_at_their_ends():
    assert evaluate.distinct_n([[1, 2, 3], [4, 5]], 2) == 1
    assert evaluate.distinct_n([[1, 2]] * 10, 2) == 0.1
    assert evaluate.distinct_n([[1], []], 2) == evaluate.distinct_n([], 1) == 0
    assert evaluate.repetition([7] * 101, 1) == pytest.approx(0.990099, abs=1e-6)
    assert evaluate.repetition([1, 2, 3], 1) == evaluate.repetition([], 1) == 0
    # A bigram does not reach from one text into the next.
    assert evaluate.distinct_n([[1, 2], [1, 2]], 2) == 0.5
    for function in (evaluate.distinct_n, evaluate.repetition):
        with pytest.raises(ValueError, match="n is 0; it must be at least 1"):
            function([], 0)


def test_lengths_tell_an_end_from_a_limit():
    texts = [[4, 5, 0], [4, 0, 4, 4], [1], [], [2, 2]]
    actual = evaluate.lengths(texts, stop_tokens=(0, 1))
    assert actual == evaluate.Lengths(mean=2.0, median=2.0, ended=0.4)
    with pytest.raises(ValueError, match="sequences is empty"):
        evaluate.lengths([], stop_tokens=(0,))
