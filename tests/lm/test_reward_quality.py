"""Accuracy and calibration of a reward model, beside naive counts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm.lm import reward, reward_quality
from jaxrl_llm.lm.scores import wilson_interval
from tests.lm.preference_pairs import MODEL, PAIRS, random_pairs
from tests.nn.tiny_gpt2 import random_params

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL)


def test_accuracy_counts_decided_pairs_alone(params):
    overall = reward.score_all(MODEL, params, PAIRS).overall
    share = np.array([1, 0, 1, 0.5, 0.5, 1, 0, 0.6], np.float32)
    pairs = replace(PAIRS, score=np.stack([share, 1 - share], axis=1))
    is_decided = share != 0.5
    right = ((overall[:, 0] > overall[:, 1]) == (share > 0.5))[is_decided]
    estimate = reward_quality.accuracy(MODEL, params, pairs, confidence=0.9)
    low, high = wilson_interval(right.sum(), 6, confidence=0.9)
    np.testing.assert_allclose(estimate, (right.mean(), low, high), rtol=1e-6)
    ties = replace(PAIRS, score=np.full((8, 2), 0.5, np.float32))
    with pytest.raises(ValueError, match="pairs are all ties; give at least one that was decided"):
        reward_quality.accuracy(MODEL, params, ties)


def test_equal_scores_are_half_right(params):
    same = jax.tree.map(lambda leaf: np.stack([leaf[:, 0]] * 2, axis=1), replace(
        PAIRS, score=None, rating=None, annotator=None, margin=None
    ))  # fmt: skip
    assert reward_quality.accuracy(MODEL, params, same).mean == 0.5


def test_calibration_is_the_naive_one_whatever_the_normalisation(params):
    pairs = random_pairs(40, seed=3)
    scores = reward.score_all(MODEL, {**params, "gain": 1.0, "bias": 0.0}, pairs).overall
    scores = scores.astype(np.float64)
    bins: list[list[tuple[float, float]]] = [[] for _ in range(5)]
    brier = 0.0
    for (first, second), share in zip(scores, pairs.score[:, 0], strict=True):
        probability = 1 / (1 + math.exp(second - first))
        brier += (probability - share) ** 2 + (1 - probability - (1 - share)) ** 2
        confidence, outcome = max((probability, share), (1 - probability, 1 - share))
        index = min(max(math.ceil((2 * confidence - 1) * 5) - 1, 0), 4)
        bins[index].append((confidence, outcome))
    error = sum(abs(sum(c - o for c, o in each)) for each in bins) / 40
    normalised = reward.normalise(params, reward.score_all(MODEL, params, pairs).overall)
    assert abs(float(normalised["gain"]) - 1) > 0.1
    for each in (params, normalised):
        result = reward_quality.calibration(MODEL, each, pairs, num_bins=5)
        np.testing.assert_allclose(result.expected_error, error, rtol=1e-4)
        np.testing.assert_allclose(result.brier.mean, brier / 40, rtol=1e-4)
        np.testing.assert_array_equal(result.accuracy.weight, [len(each) for each in bins])
