"""Sequences, batches and their order, against naive loops and what is written out by hand."""

import itertools
import re
import time
from collections import Counter
from functools import partial
from typing import Any, cast

import jax
import numpy as np
import pytest

from jaxrl_llm.data import tokens
from jaxrl_llm.data.json_lines import Example, Piece

END = 0


class Characters:
    """A character is its code point; `~` is the end token."""

    eos_token_id = END

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return [END if character == "~" else ord(character) for character in text]


def codes(text):
    return Characters().encode(text, add_special_tokens=False)


def random_sequences(num, longest, *, seed=0, vocabulary=97):
    random = np.random.default_rng(seed)
    return [
        tokens.Tokens(random.integers(vocabulary, size=n).astype(np.int32), random.random(n) < 0.7)
        for n in random.integers(1, longest + 1, size=num)
    ]


# Encoding


def test_encode_equals_characters_and_masks_by_hand():
    encode = partial(tokens.encode, tokenizer=Characters(), max_length=100)
    several = Example((Piece("ab", False), Piece("c", True), Piece("d", False), Piece("ef", True)))
    for example, text, mask in (
        (Example.of("ab", "cd"), "abcd~", "00111"),
        (Example.of("", "cd"), "cd~", "111"),
        (Example.of("ab", "cd~"), "abcd~", "00111"),
        (Example((Piece("abc", True),)), "abc~", "1111"),
        (several, "abcdef~", "0010111"),
    ):
        actual = encode(example)
        assert actual.tokens.dtype == np.int32
        assert actual.tokens.tolist() == codes(text)
        assert actual.response_mask.tolist() == [bit == "1" for bit in mask]
        assert actual.num_cut == 0


@pytest.mark.parametrize("max_length", range(2, 9))
def test_encode_keeps_the_start_and_counts_what_it_cuts(max_length):
    example = Example.of("abc", "def")
    whole = tokens.encode(example, Characters(), max_length=7)
    cut = tokens.encode(example, Characters(), max_length=max_length)
    assert cut.tokens.tolist() == whole.tokens[:max_length].tolist()
    assert cut.response_mask.tolist() == whole.response_mask[:max_length].tolist()
    assert cut.num_cut == max(7 - max_length, 0)
    assert (END in cut.tokens) == (max_length >= 7)


def test_encode_prompt_is_the_start_of_the_encoded_example():
    example = Example((Piece("ab", False), Piece("c", True), Piece("d", False), Piece("ef", True)))
    prompt = tokens.encode_prompt(example, Characters())
    assert prompt.tokens.tolist() == codes("abcd")
    assert not prompt.response_mask.any()
    plain = tokens.encode_prompt("abcd", Characters())
    np.testing.assert_array_equal(plain.tokens, prompt.tokens)


def test_encode_all_counts_cut_and_dropped():
    examples = [Example.of("a", "b"), Example.of("ab", "cde"), Example.of("abcd", "e")]
    encoded = tokens.encode_all(iter(examples), Characters(), max_length=4)
    expected = [tokens.encode(example, Characters(), max_length=4) for example in examples[:2]]
    jax.tree.map(np.testing.assert_array_equal, encoded.sequences, expected)
    assert (encoded.num_cut, encoded.num_dropped) == (1, 1)


def test_encode_all_drops_what_has_only_a_first_token_to_learn():
    """A first token has nothing to be predicted from."""
    first_only = Example((Piece("a", True), Piece("bcd", False), Piece("e", True)))
    encode = partial(tokens.encode_all, [first_only, Example.of("a", "b")], Characters())
    assert encode(max_length=3).num_dropped == 1


class Endless(Characters):
    eos_token_id = None


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (
            lambda: tokens.encode(Example.of("a", "b"), Characters(), max_length=1),
            "max_length is 1; it must be at least 2",
        ),
        (
            lambda: tokens.encode(Example.of("a", "b"), Endless(), max_length=9),
            "tokenizer.eos_token_id is None; set the token that ends a text",
        ),
        (
            lambda: tokens.encode_all([Example.of("abcd", "e")] * 3, Characters(), max_length=4),
            "none of 3 examples has a response within max_length, 4; raise it or give more",
        ),
        (
            lambda: tokens.pad(random_sequences(2, 3), 4, side=cast(Any, "top")),
            "side is 'top'; it must be one of 'left', 'right'",
        ),
        (lambda: tokens.pad([], 4), "sequences is empty; give at least one"),
        (
            lambda: tokens.pack([tokens.encode_prompt(text, Characters()) for text in "a,"], 0),
            "sequences[0] has 1 tokens; it must have 1 to 0, the length of a row",
        ),
        (
            lambda: tokens.pack([tokens.encode_prompt(t, Characters()) for t in ("a", "bcd")], 2),
            "sequences[1] has 3 tokens; it must have 1 to 2, the length of a row",
        ),
        (
            lambda: tokens.pad([tokens.encode_prompt("", Characters())], 4),
            "sequences[0] has 0 tokens; it must have 1 to 4, the length of a row",
        ),
        (
            lambda: next(tokens.shuffled([1], buffer_size=0, seed=0)),
            "buffer_size is 0; it must be at least 1",
        ),
        (
            lambda: next(tokens.batches(tokens.pad(random_sequences(2, 3), 4), batch_size=0)),
            "batch_size is 0; it must be at least 1",
        ),
    ],
)
def test_faults_are_told_in_one_line(call, fault):
    with pytest.raises(ValueError, match=f"^{re.escape(fault)}$"):
        call()


# Padding and packing


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad_matches_a_loop(side):
    sequences = random_sequences(7, 9)
    batch = tokens.pad(sequences, 9, side=side, pad_token=3)
    assert batch.segment is None
    assert batch.log_probability is None
    assert batch.tokens.dtype == np.int32
    for row, sequence in enumerate(sequences):
        n = len(sequence.tokens)
        before, after = (9 - n, 0) if side == "left" else (0, 9 - n)
        ids = [3] * before + sequence.tokens.tolist() + [3] * after
        real = [False] * before + [True] * n + [False] * after
        counted = [False] * before + sequence.response_mask.tolist() + [False] * after
        assert batch.tokens[row].tolist() == ids
        assert batch.attention_mask[row].tolist() == real
        assert batch.response_mask[row].tolist() == counted


def segments(batch):
    """Every (tokens, response mask) of a packed batch, with the checks that a row is in order."""
    for row in range(len(batch.tokens)):
        ids = batch.segment[row]
        assert ids.tolist() == sorted(ids[ids > 0]) + [0] * (ids == 0).sum()
        assert sorted(set(ids[ids > 0])) == list(range(1, ids.max() + 1))
        np.testing.assert_array_equal(batch.attention_mask[row], ids > 0)
        assert not batch.response_mask[row][ids == 0].any()
        assert (batch.tokens[row][ids == 0] == 3).all()
        for segment in range(1, ids.max() + 1):
            inside = ids == segment
            yield tuple(batch.tokens[row][inside]), tuple(batch.response_mask[row][inside])


@pytest.mark.parametrize(("num", "longest"), [(1, 1), (1, 8), (3, 8), (40, 16), (200, 5)])
def test_pack_holds_every_sequence_whole_and_once(num, longest):
    for seed in range(5):
        sequences = random_sequences(num, longest, seed=seed)
        batch = tokens.pack(sequences, 16, pad_token=3)
        expected = Counter((tuple(s.tokens), tuple(s.response_mask)) for s in sequences)
        assert Counter(segments(batch)) == expected
        total = sum(len(sequence.tokens) for sequence in sequences)
        assert batch.attention_mask.sum() == total
        assert tokens.fill(batch) == pytest.approx(total / batch.tokens.size)


def best_fit_by_search(lengths, length):
    """The number of rows of best-fit decreasing, looking at every row for every sequence."""
    room = []
    for need in sorted(lengths, reverse=True):
        fitting = [row for row, free in enumerate(room) if free >= need]
        row = min(fitting, key=room.__getitem__, default=None)
        if row is None:
            room.append(length - need)
        else:
            room[row] -= need
    return sorted(room)


@pytest.mark.parametrize("length", [16, 23, 64])
def test_pack_has_the_rows_of_a_search_for_the_best_fit(length):
    sequences = random_sequences(300, 16, seed=length)
    batch = tokens.pack(sequences, length)
    room = best_fit_by_search([len(s.tokens) for s in sequences], length)
    assert sorted((~batch.attention_mask).sum(axis=1).tolist()) == room


def test_pack_of_full_rows_is_one_a_row():
    sequences = [tokens.encode_prompt("abcd", Characters())] * 3
    batch = tokens.pack(sequences, 4)
    np.testing.assert_array_equal(batch.segment, np.ones((3, 4)))
    assert tokens.fill(batch) == 1


@pytest.mark.slow
def test_pack_places_fifty_thousand_sequences_in_two_seconds():
    random = np.random.default_rng(0)
    lengths = np.minimum(random.lognormal(5, 0.8, 50_000).astype(int) + 1, 1024)
    sequences = [tokens.Tokens(np.ones(n, np.int32), np.ones(n, np.bool_)) for n in lengths]
    start = time.process_time()
    batch = tokens.pack(sequences, 1024)
    assert time.process_time() - start < 2
    assert batch.attention_mask.sum() == lengths.sum()
    assert tokens.fill(batch) > 0.99


# The order of training


def test_shuffled_gives_every_item_once_and_the_same_order_again():
    for buffer_size, num in itertools.product((1, 2, 7, 100, 1000), (0, 1, 7, 100)):
        order = list(tokens.shuffled(range(num), buffer_size=buffer_size, seed=3))
        assert sorted(order) == list(range(num))
        assert order == list(tokens.shuffled(iter(range(num)), buffer_size=buffer_size, seed=3))
        assert all(item < place + buffer_size for place, item in enumerate(order))
    assert list(tokens.shuffled(range(9), buffer_size=1, seed=0)) == list(range(9))


def test_shuffled_seeds_and_epochs_differ():
    seeds = (1, (0, 0), (0, 1), (0, 2))
    orders = [tuple(tokens.shuffled(range(50), buffer_size=20, seed=seed)) for seed in seeds]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("buffer_size", [4, 5])
def test_shuffled_with_room_for_all_is_a_uniform_permutation(buffer_size):
    num = 4800
    counts = Counter(
        tuple(tokens.shuffled(range(4), buffer_size=buffer_size, seed=seed)) for seed in range(num)
    )
    expected = num / 24
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == 24
    assert statistic < 49.7  # the 0.999 quantile of χ² with 23 degrees of freedom


def test_shuffled_reads_no_more_than_its_buffer():
    stream = iter(range(100))
    next(tokens.shuffled(stream, buffer_size=10, seed=0))
    assert next(stream) == 10


@pytest.mark.parametrize("layout", [tokens.pad, tokens.pack])
@pytest.mark.parametrize("seed", [None, 5])
def test_batches_hold_every_row_once_in_one_shape(layout, seed):
    data = layout(random_sequences(11, 6), 6)
    found = list(tokens.batches(data, batch_size=4, seed=seed))
    num_rows = len(data.tokens)
    assert len(found) == -(-num_rows // 4)
    assert {batch.tokens.shape for batch in found} == {(4, 6)}
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
    assert not joined.attention_mask[num_rows:].any()
    assert not joined.response_mask[num_rows:].any()
    order = np.arange(num_rows)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(num_rows)
    jax.tree.map(
        lambda actual, leaf: np.testing.assert_array_equal(actual[:num_rows], leaf[order]),
        joined,
        data,
    )
