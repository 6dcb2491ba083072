"""Rewards of every kind: the same shapes, texts cut where they end, and faults in one line."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm import objective, reward, reward_ensemble, rewards, tokenizer
from jaxrl_llm.nn.reward_model import RewardModel
from jaxrl_llm.types import Responses
from tests.lm.tiny import END, PADDING, SHAPE
from tests.nn.tiny_gpt2 import random_params

MODEL: Any = RewardModel(SHAPE, criteria=("safety", "clarity"))
TOKENIZER = tokenizer.train(["give rest and fluids"] * 3, vocab_size=300)
PROMPTS = ["fever", "dry cough"]
ANSWERS = [["rest", ""], ["see a doctor", "no"]]


def encoded(prompts: list[str], answers: list[list[str]], cut: int | None = None) -> Any:
    """Rows with noise where the masks are False; the answer number `cut` has no end token."""
    prompt_ids = [TOKENIZER.encode(text) for text in prompts]
    ids = [[[*TOKENIZER.encode(text), END] for text in row] for row in answers]
    longest = max(map(len, prompt_ids)) + 1, max(len(each) for row in ids for each in row) + 1
    shape = len(ids), len(ids[0]), sum(longest)
    tokens = np.random.default_rng(0).integers(PADDING + 1, 256, shape).astype(np.int32)
    mask = np.zeros(shape, bool)
    for g, row in enumerate(ids):
        for k, answer in enumerate(row):
            written = answer[:-1] if cut == g * len(row) + k else answer
            for start, part in (
                (longest[0] - len(prompt_ids[g]), prompt_ids[g]),
                (longest[0], written),
            ):
                tokens[g, k, start : start + len(part)] = part
                mask[g, k, start : start + len(part)] = True
    return responses_of(tokens, mask, longest[0])


def responses_of(tokens: Any, mask: Any, prompt_length: int) -> Any:
    return Responses(tokens=tokens, attention_mask=mask, response_mask=mask[..., prompt_length:])


RESPONSES = encoded(PROMPTS, ANSWERS)


def random_responses(num_groups: int, num_samples: int) -> Any:
    random = np.random.default_rng(1)
    shape = num_groups, num_samples, 7
    mask = np.arange(7) < random.integers(3, 8, shape[:2])[..., None]
    return responses_of(random.integers(2, SHAPE.vocab_size, shape).astype(np.int32), mask, 2)


def scores_of(given: rewards.Reward, responses: Responses = RESPONSES, params: Any = None) -> Any:
    return np.asarray(jax.jit(given.score)(params, responses))


def test_of_function_scores_tokens_with_one_criterion_or_several():
    def length(responses: Responses) -> Any:
        return jnp.sum(responses.response_mask, axis=-1)

    one = rewards.of_function(length)
    expected = np.sum(RESPONSES.response_mask, axis=-1)
    scores = scores_of(one)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores[..., 0], expected)
    two = rewards.of_function(
        lambda responses: jnp.stack([length(responses), -length(responses)], axis=-1),
        ("long", "short"),
    )
    np.testing.assert_array_equal(scores_of(two), np.stack([expected, -expected], axis=-1))
    total, _, _ = two.mix.combine(two.mix.init(), scores_of(two))
    np.testing.assert_array_equal(total, np.zeros((2, 2)))


def test_of_function_refuses_another_shape():
    given = rewards.of_function(lambda responses: jnp.zeros(3), ("gold",))
    message = r'reward "gold" returned the shape \[3\] for \[2, 2\] responses; return \[2, 2\]'
    with pytest.raises(ValueError, match=message):
        scores_of(given)
    given = rewards.of_function(lambda responses: jnp.zeros((2, 2)), ("a", "b"))
    message = r'reward "a", "b" returned the shape \[2, 2\] .*; return \[2, 2, 2\]'
    with pytest.raises(ValueError, match=message):
        scores_of(given)


@pytest.mark.parametrize("cut", [None, 2])
def test_of_text_gives_the_function_prompt_and_response_without_end_or_padding(cut):
    read = []

    def judge(prompt: str, response: str) -> float:
        read.append((prompt, response))
        return len(prompt) + len(response) / 10

    responses = encoded(PROMPTS, ANSWERS, cut)
    scores = scores_of(rewards.of_text(TOKENIZER, judge), responses)
    pairs = [(prompt, text) for prompt, row in zip(PROMPTS, ANSWERS, strict=True) for text in row]
    assert read == pairs
    expected = np.array([len(prompt) + len(text) / 10 for prompt, text in pairs], np.float32)
    np.testing.assert_array_equal(scores.reshape(-1), expected)


def test_of_text_stops_at_the_tokens_that_it_is_told():
    stop = int(RESPONSES.tokens[0, 0][np.flatnonzero(RESPONSES.attention_mask[0, 0])[-2]])
    read = []

    def judge(_: str, response: str) -> float:
        read.append(response)
        return 0.0

    mask = np.array(RESPONSES.response_mask)
    mask[0, 0, mask[0, 0].sum() - 1] = False
    responses = replace(RESPONSES, response_mask=mask)
    scores_of(rewards.of_text(TOKENIZER, judge, stop_tokens=(stop,)), responses)
    assert "rest".startswith(read[0])
    assert len(read[0]) < len("rest")
    # The usual end token is now one of the text.
    assert read[3] == f"no{tokenizer.END_OF_TEXT}"


def test_of_text_of_several_criteria_under_vmap_is_that_of_each():
    given = rewards.of_text(
        TOKENIZER, lambda prompt, response: (len(prompt), len(response)), ("prompt", "response")
    )
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf[::-1]]), RESPONSES)
    together = jax.jit(jax.vmap(lambda responses: given.score(None, responses)))(stacked)
    alone = scores_of(given)
    assert alone.shape == (2, 2, 2)
    np.testing.assert_array_equal(together, np.stack([alone, alone[::-1]]))


@pytest.mark.parametrize(
    ("criteria", "result", "message"),
    [
        (("gold",), np.nan, 'reward "gold" of response 1 is nan; return a finite number'),
        (("gold",), 1e39, 'reward "gold" of response 1 is inf; return a finite number'),
        (("a", "b"), (0, np.nan), 'reward "b" of response 1 is nan; return a finite number'),
        (("gold",), (1, 2), 'reward "gold" returned 2 numbers for response 1; return 1 number'),
        (("a", "b"), 1.0, 'reward "a", "b" returned 1 number for response 1; return 2 numbers'),
        (("gold",), None, 'reward "gold" returned None for response 1; return 1 number'),
        (("gold",), "good", "reward \"gold\" returned 'good' for response 1; return 1 number"),
        (("gold",), (), 'reward "gold" returned 0 numbers for response 1; return 1 number'),
    ],
)
def test_of_text_names_the_response_whose_score_is_no_number(criteria, result, message):
    def judge(_: str, response: str) -> Any:
        return (0.5,) * len(criteria) if response else result

    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(message)) as caught:
        scores_of(rewards.of_text(TOKENIZER, judge, criteria))
    assert str(caught.value).strip().splitlines()[-1] == f"ValueError: {message}"


@pytest.mark.slow
def test_of_model_takes_its_criteria_by_name():
    params, responses = random_params(MODEL), random_responses(3, 2)
    overall, by_criterion = reward.score_all(MODEL, params, responses)
    assert rewards.of_model(MODEL).criteria == ("overall",)
    scores = scores_of(rewards.of_model(MODEL, ("clarity", "overall")), responses, params)
    expected = np.stack([by_criterion[..., 1], overall], axis=-1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    message = "criteria has 'accuracy'; this model has overall, safety, clarity"
    with pytest.raises(ValueError, match=message):
        rewards.of_model(MODEL, ("accuracy",))


@pytest.mark.slow
def test_of_ensemble_is_the_aggregate_and_reports_the_disagreement():
    one = random_params(MODEL)
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf, -leaf]), one)
    responses = random_responses(3, 2)
    members = np.asarray(reward_ensemble.score(MODEL, params, responses))
    given = rewards.of_ensemble(MODEL, "uncertainty", coefficient=2.0)
    scores = scores_of(given, responses, params)
    expected = members.mean(0) - 2 * members.var(0)
    np.testing.assert_allclose(scores[..., 0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores[..., 1], members.std(0), rtol=1e-4)
    total, _, _ = given.mix.combine(given.mix.init(), scores)
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-5)


def test_joined_has_the_criteria_and_the_params_of_all():
    learnt = rewards.of_model(MODEL, ("overall", "safety"))
    rule = rewards.of_function(lambda responses: responses.tokens[..., -1], ("last",))
    responses, params = random_responses(2, 3), random_params(MODEL)
    mix = objective.lexicographic((0.0, 0.5))
    given = rewards.joined(learnt, rule, mix=mix)
    assert given.criteria == ("overall", "safety", "last")
    assert given.mix is mix
    scores = scores_of(given, responses, (params, None))
    np.testing.assert_array_equal(scores[..., :2], scores_of(learnt, responses, params))
    np.testing.assert_array_equal(scores[..., 2], responses.tokens[..., -1])


def test_criteria_need_names_of_their_own():
    rule = rewards.of_function(lambda responses: responses.tokens[..., 0], ("gold",))
    with pytest.raises(ValueError, match="criteria has 'gold' twice; give each score its own name"):
        rewards.joined(rule, rule)
    with pytest.raises(ValueError, match="criteria is empty; name at least one"):
        rewards.joined()
