"""Heads on features read once say and learn what they do on the texts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm.lm import reward, reward_features
from tests.lm.preference_pairs import MODEL, PAIRS
from tests.nn.tiny_gpt2 import random_params

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL)


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
