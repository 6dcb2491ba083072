"""Pairs as rows, against rows written out by hand and the tokens of supervised fine-tuning."""

import re
import warnings
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm.data import preference_tokens, tokens
from jaxrl_llm.data.json_lines import Example
from jaxrl_llm.data.preferences import Judgement, Preference

END = 0


class Characters:
    """A character is its code point; `~` is the end token."""

    eos_token_id = END

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return [END if character == "~" else ord(character) for character in text]


class Pairs(Characters):
    """Merges "bc" into one token, so that a boundary between two texts shows."""

    def encode(self, text, *, add_special_tokens):
        merged = super().encode(text.replace("bc", "\x01"), add_special_tokens=add_special_tokens)
        return [1 if token == 1 else token for token in merged]


PREFERENCES = [
    Preference(prompt="ab", chosen="cde", rejected="f"),
    Preference(prompt="g", chosen="hi~", rejected="jk", tie=True),
]


def text_of(row):
    """`.` is padding, `~` an end token."""
    characters, mask = np.asarray(row[0]), np.asarray(row[1])
    return "".join(
        ("~" if token == END else chr(token)) if real else "."
        for token, real in zip(characters, mask, strict=True)
    )


def texts_of(responses):
    return [
        [text_of(row) for row in zip(*group, strict=True)]
        for group in zip(responses.tokens, responses.attention_mask, strict=True)
    ]


def test_encode_equals_rows_by_hand():
    responses = preference_tokens.encode(PREFERENCES, Characters())
    assert responses.prompt_length == 2
    assert texts_of(responses) == [["abcde~", "abf~.."], [".ghi~.", ".gjk~."]]
    prompt, response = np.split(np.array(responses.attention_mask), [2], axis=-1)
    np.testing.assert_array_equal(response, responses.response_mask)
    np.testing.assert_array_equal(responses.score, [[1, 0], [0.5, 0.5]])
    assert prompt[:, :, -1].all()
    assert responses.tokens.dtype == np.int32
    assert (responses.rating, responses.annotator, responses.margin) == (None, None, None)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(responses))


def test_encode_has_the_tokens_of_supervised_fine_tuning():
    pair = Preference(prompt="ab", chosen="cbc", rejected="bcb~")
    responses = preference_tokens.encode([pair], Pairs())
    for place, text in enumerate((pair.chosen, pair.rejected)):
        expected = tokens.encode(Example.of(pair.prompt, text), Pairs(), max_length=99)
        mask = np.array(responses.attention_mask[0, place])
        np.testing.assert_array_equal(responses.tokens[0, place][mask], expected.tokens)
        counted = np.concatenate([[False, False], responses.response_mask[0, place]])[mask]
        np.testing.assert_array_equal(counted, expected.response_mask)


def test_encode_detail_12_never_overwrites_the_last_token_of_a_cut_response():
    whole = preference_tokens.encode(PREFERENCES, Characters(), response_length=4)
    assert texts_of(whole)[0] == ["abcde~", "abf~.."]
    with pytest.warns(UserWarning, match="0 prompts lose their start and 1 responses their end"):
        cut = preference_tokens.encode(PREFERENCES, Characters(), response_length=3)
    assert texts_of(cut) == [["abcde", "abf~."], [".ghi~", ".gjk~"]]


def test_encode_keeps_the_end_of_a_prompt_that_is_cut():
    fault = "of 2 preferences 1 prompts lose their start and 0 responses their end, longer than "
    with pytest.warns(UserWarning, match=f"^{fault}prompt_length, 1, or response_length, 4; raise"):
        cut = preference_tokens.encode(PREFERENCES, Characters(), prompt_length=1)
    assert texts_of(cut) == [["bcde~", "bf~.."], ["ghi~.", "gjk~."]]


def test_encode_pads_to_the_lengths_given():
    responses = preference_tokens.encode(
        PREFERENCES, Characters(), prompt_length=4, response_length=5
    )
    assert responses.prompt_length == 4
    assert texts_of(responses) == [
        ["..abcde~.", "..abf~..."],
        ["...ghi~..", "...gjk~.."],
    ]


def known(**fields):
    return Preference(prompt="a", chosen="b", rejected="c", **fields)


def test_encode_ratings_are_nan_where_missing():
    given = [
        known(ratings={"safety": (1.0, 0.5)}),
        known(ratings={"clarity": (None, 0.25), "safety": (0.0, None)}),
        known(),
    ]
    assert preference_tokens.criteria_of(given) == ("safety", "clarity")
    nan = np.nan
    expected = [
        [[1, nan], [0.5, nan]],
        [[0, nan], [nan, 0.25]],
        [[nan, nan], [nan, nan]],
    ]
    responses = preference_tokens.encode(given, Characters())
    np.testing.assert_array_equal(responses.rating, expected)
    chosen = preference_tokens.encode(given, Characters(), criteria=("clarity", "humour"))
    assert chosen.rating is not None
    np.testing.assert_array_equal(chosen.rating[..., 0], np.array(expected)[..., 1])
    assert np.isnan(chosen.rating[..., 1]).all()


def test_encode_annotators_are_places_in_their_table():
    given = [known(annotator="Bo"), known(annotator="Al"), known(annotator="Bo")]
    assert preference_tokens.annotators_of(given) == ("Bo", "Al")
    for names, ids in ((None, [0, 1, 0]), (("Al", "Cy", "Bo"), [2, 0, 2])):
        found = preference_tokens.encode(given, Characters(), annotators=names).annotator
        assert found is not None
        assert found.dtype == np.int32
        assert found.tolist() == ids


def test_encode_margins_are_zero_where_missing():
    margin = preference_tokens.encode([known(margin=0.5), known()], Characters()).margin
    np.testing.assert_array_equal(margin, np.array([0.5, 0], np.float32))


def test_encode_says_what_is_wrong():
    empty = Preference(prompt="", chosen="b", rejected="c")
    faults: tuple[tuple[list[Preference], dict[str, Any], str], ...] = (
        ([], {}, "preferences is empty; give at least one"),
        ([known(), empty], {}, "preferences[1].prompt has no tokens; a response needs a token"),
        ([known()], {"prompt_length": 0}, "prompt_length is 0; it must be at least 1"),
        ([known()], {"response_length": 0}, "response_length is 0; it must be at least 1"),
        (
            [known(annotator="Bo"), known()],
            {},
            "preferences[1].annotator is None; it must be one of 'Bo', in all of them or in none",
        ),
        ([known(annotator="Bo")], {"annotators": ("Al",)}, "preferences[0].annotator is 'Bo'; it"),
    )
    for given, options, fault in faults:
        with pytest.raises(ValueError, match=f"^{re.escape(fault)}"):
            preference_tokens.encode(given, Characters(), **options)


def test_encode_an_empty_response_is_its_end_token():
    pair = Preference(prompt="a", chosen="b", rejected="")
    assert texts_of(preference_tokens.encode([pair], Characters())) == [["ab~", "a~."]]


def test_encode_groups_are_indexed_alike():
    given = [known(margin=float(i), annotator=str(i), ratings={"x": (i, i)}) for i in range(4)]
    responses = preference_tokens.encode(given, Characters())
    some = jax.tree.map(lambda leaf: leaf[np.array([2, 0])], responses)
    alone = preference_tokens.encode([given[2], given[0]], Characters(), annotators=list("0123"))
    jax.tree.map(np.testing.assert_array_equal, some, alone)


def test_encode_judgements_equals_rows_by_hand():
    given = [
        Judgement(prompt="ab", completion="c", desirable=False),
        Judgement(prompt="d", completion="ef", desirable=True),
    ]
    responses = preference_tokens.encode_judgements(given, Characters())
    assert texts_of(responses) == [["abc~."], [".def~"]]
    np.testing.assert_array_equal(responses.score, [[0], [1]])
    np.testing.assert_array_equal(responses.response_mask[:, 0].sum(-1), [2, 3])


def test_prompts_are_padded_on_the_left_and_count_nothing():
    given = ["abc", Example.of("d", "e"), "fg"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = preference_tokens.prompts(given, Characters(), 4)
    rows = [text_of(row) for row in zip(batch.tokens, batch.attention_mask, strict=True)]
    assert rows == [".abc", "...d", "..fg"]
    assert not batch.response_mask.any()
    assert preference_tokens.prompts(given, Characters()).tokens.shape == (3, 3)
    padded = np.array(batch.attention_mask).T
    assert all((before <= after).all() for before, after in pairwise(padded))


def test_prompts_says_what_is_wrong():
    for texts, length, fault in (
        ([], None, "texts is empty; give at least one"),
        (["a", "bcd"], 2, "texts[1] has 3 tokens; it must have 1 to 2"),
        (["a", ""], None, "texts[1] has 0 tokens; it must have 1 to 1"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(fault)}$"):
            preference_tokens.prompts(texts, Characters(), length)
