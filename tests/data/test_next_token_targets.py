"""The shift by one against a loop, and packed rows against the same sequences one a row."""

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import tokens
from jaxrl_llm.nn import gpt2
from jaxrl_llm.types import Mean


def random_sequences(num, longest, *, seed=0, vocabulary=97):
    random = np.random.default_rng(seed)
    return [
        tokens.Tokens(random.integers(vocabulary, size=n).astype(np.int32), random.random(n) < 0.7)
        for n in random.integers(1, longest + 1, size=num)
    ]


def targets_by_loop(batch):
    """Every counted (row, position, target)."""
    found = set()
    for row, column in np.ndindex(*batch.tokens.shape):
        if column == 0 or not batch.response_mask[row, column]:
            continue
        if not (batch.attention_mask[row, column - 1] and batch.attention_mask[row, column]):
            continue
        if batch.segment is not None and (
            batch.segment[row, column - 1] != batch.segment[row, column]
        ):
            continue
        found.add((row, column - 1, int(batch.tokens[row, column])))
    return found


def layouts(sequences, length):
    return {
        "right": tokens.pad(sequences, length),
        "left": tokens.pad(sequences, length, side="left"),
        "packed": tokens.pack(sequences, length),
    }


@pytest.mark.parametrize("layout", ["left", "right", "packed"])
@pytest.mark.parametrize("length", [6, 7])
def test_next_token_targets_matches_a_loop(layout, length):
    batch = layouts(random_sequences(20, 6), length)[layout]
    eager = tokens.next_token_targets(batch)
    jitted = jax.jit(tokens.next_token_targets)(batch)
    jax.tree.map(np.testing.assert_array_equal, jitted, eager)
    targets, mask = (np.asarray(leaf) for leaf in jitted)
    assert targets.shape == mask.shape == batch.tokens.shape
    assert (targets.dtype, mask.dtype) == (np.int32, np.bool_)
    places = zip(*np.nonzero(mask), targets[mask], strict=True)
    assert {tuple(map(int, place)) for place in places} == targets_by_loop(batch)
    for row in range(3):
        one = tokens.next_token_targets(jax.tree.map(lambda leaf, row=row: leaf[row], batch))
        np.testing.assert_array_equal(one, (targets[row], mask[row]))


def test_next_token_targets_of_one_column_are_none():
    batch = tokens.pad([tokens.Tokens(np.array([5], np.int32), np.array([True]))], 1)
    targets, mask = tokens.next_token_targets(batch)
    assert targets.tolist() == [[5]]
    assert mask.tolist() == [[False]]


def predictions(batch):
    """The multiset of what is to be predicted: (sequence so far, position, target)."""
    targets, mask = (np.asarray(leaf) for leaf in tokens.next_token_targets(batch))
    segment = batch.attention_mask if batch.segment is None else batch.segment
    found = Counter()
    for row, column in zip(*np.nonzero(mask), strict=True):
        inside = (segment[row] == segment[row, column]) & (np.arange(mask.shape[1]) <= column)
        before = tuple(batch.tokens[row][inside].tolist())
        found[before, len(before) - 1, int(targets[row, column])] += 1
    return found


def test_pack_predicts_the_same_tokens_from_the_same_texts():
    sequences = random_sequences(40, 12, seed=2)
    expected = Counter(
        (tuple(s.tokens[:t].tolist()), t - 1, int(s.tokens[t]))
        for s in sequences
        for t in range(1, len(s.tokens))
        if s.response_mask[t]
    )
    for batch in layouts(sequences, 16).values():
        assert predictions(batch) == expected


CONFIG = gpt2.GPT2Config(
    vocab_size=97, n_positions=16, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
)


def loss(params, batch):
    """The mean of -log p over what counts."""
    logits: Any = gpt2.GPT2(CONFIG).apply(
        {"params": params},
        batch.tokens,
        attention_mask=batch.attention_mask,
        segment=batch.segment,
    )
    targets, mask = tokens.next_token_targets(batch)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return Mean.of(-chosen, mask).mean


@pytest.fixture(scope="module")
def loss_and_gradients():
    init = partial(gpt2.GPT2(CONFIG).init, jax.random.key(0))
    shapes = jax.eval_shape(init, jnp.zeros((1, 4), jnp.int32))["params"]
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0, 0.2, leaf.shape), shapes)
    return partial(jax.jit(jax.value_and_grad(loss)), jax.tree.map(jnp.float32, params))


def packed_and_filled_up(sequences):
    packed = tokens.pack(sequences, 16)
    assert len(packed.tokens) < len(sequences)
    [batch] = tokens.batches(packed, batch_size=len(packed.tokens) + 2, seed=0)
    return batch


@pytest.mark.slow
def test_pack_gives_the_loss_and_gradients_of_unpacked_rows(loss_and_gradients):
    """Also on the left, and with rows that are padding throughout."""
    sequences = random_sequences(12, 9, seed=4)
    expected, expected_gradients = loss_and_gradients(tokens.pad(sequences, 16))
    assert expected > 1
    for batch in (packed_and_filled_up(sequences), tokens.pad(sequences, 16, side="left")):
        actual, gradients = loss_and_gradients(batch)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            gradients,
            expected_gradients,
        )


@pytest.mark.slow
def test_first_token_of_a_segment_is_no_target(loss_and_gradients):
    """Whether it is of the response changes neither loss nor gradients, to the bit."""
    packed = packed_and_filled_up(random_sequences(12, 9, seed=4))
    segment = np.asarray(packed.segment)
    first = (np.diff(segment, axis=1, prepend=0) != 0) & (segment > 0)
    assert first.sum() == 12
    counted, uncounted = (
        replace(packed, response_mask=mask)
        for mask in (packed.response_mask | first, packed.response_mask & ~first)
    )
    jax.tree.map(
        np.testing.assert_array_equal, loss_and_gradients(counted), loss_and_gradients(uncounted)
    )
