"""What a trained reward model says: scores in batches, normalised, accurate, calibrated."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm import reward
from tests.lm.preference_pairs import MODEL, PAIRS
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
