"""What a trained reward model says: scores in batches, normalised, accurate, calibrated."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm import reward, reward_features, reward_quality
from jaxrl_llm.lm.scores import wilson_interval
from tests.lm.preference_pairs import MODEL, PAIRS, random_pairs
from tests.nn.tiny_gpt2 import random_params


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL)


def test_score_all_does_not_depend_on_the_batch_size(params):
    whole = reward.score_all(MODEL, params, PAIRS)
    direct = jax.jit(reward.score, static_argnums=0)(MODEL, params, PAIRS)
    for scores in (direct, reward.score_all(MODEL, params, PAIRS, batch_size=3)):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), scores, whole)
    assert whole.overall.shape == (8, 2)
    assert whole.criteria.shape == (8, 2, 2)


def test_heads_read_the_features_as_they_read_the_texts(params):
    read = reward_features.with_features(MODEL, params, PAIRS, batch_size=3)
    scores, of_features = (reward.score_all(MODEL, params, each) for each in (PAIRS, read))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), of_features, scores)
    # Nothing else is read: other texts with these features score the same.
    other = replace(read, tokens=np.zeros_like(read.tokens))
    np.testing.assert_array_equal(
        reward.score_all(MODEL, params, other).overall, of_features.overall
    )


def test_heads_learn_the_same_from_features_as_from_texts(params):
    config = reward.Config(optimizer=replace(reward.ADAMW, trainable="heads"))
    read = reward_features.with_features(MODEL, params, PAIRS)
    key = jax.random.key(0)
    of_texts, of_features = (
        reward.gradient_of_loss(config, MODEL, key, params, pairs)[0] for pairs in (PAIRS, read)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), of_features, of_texts)
    assert np.abs(of_features["overall"]["kernel"]).max() > 1e-3


def test_features_of_a_trunk_that_learns_are_refused(params):
    read = reward_features.with_features(MODEL, params, PAIRS)
    message = "pairs.features are given, and the trunk learns; read the pairs anew, features=None"
    with pytest.raises(ValueError, match=message):
        reward.gradient_of_loss(reward.Config(), MODEL, jax.random.key(0), params, read)


def test_detail_26_normalise_gives_mean_0_and_deviation_1_again_and_again(params):
    before = reward.score_all(MODEL, params, PAIRS).overall
    assert abs(before.mean()) > 0.1
    for _ in range(2):
        params = reward.normalise(params, reward.score_all(MODEL, params, PAIRS).overall)
    after = reward.score_all(MODEL, params, PAIRS).overall
    np.testing.assert_allclose((after.mean(), after.std()), (0, 1), atol=1e-5)
    np.testing.assert_allclose(after, (before - before.mean()) / before.std(), atol=1e-5)


def test_normalise_of_several_models_is_that_of_each():
    stacked = {"gain": jnp.array([1.0, 2.0]), "bias": jnp.array([0.0, 3.0])}
    scores = np.random.default_rng(0).normal(size=(2, 3, 4))
    together = reward.normalise(stacked, scores)
    for member in range(2):
        alone = reward.normalise(
            {name: leaf[member] for name, leaf in stacked.items()}, scores[member]
        )
        for name in ("gain", "bias"):
            np.testing.assert_allclose(together[name][member], alone[name], rtol=1e-6)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.5, 0.5, 0.5], "scores are all 0.5; give responses that the model tells apart"),
        ([0.5, np.nan], "scores are not all finite; look for a reward model that has diverged"),
    ],
)
def test_normalise_refuses_scores_without_a_scale(scores, message):
    with pytest.raises(ValueError, match=message):
        reward.normalise({"gain": np.float32(1), "bias": np.float32(0)}, np.array(scores))


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
