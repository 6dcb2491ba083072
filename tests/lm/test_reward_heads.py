"""Heads that are solved for, beside SciPy's minimum of the same loss in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jaxrl_llm.lm import reward, reward_ensemble, reward_heads
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.nn.reward_model import RewardModel
from tests.lm.preference_pairs import random_pairs
from tests.lm.tiny import SHAPE
from tests.nn.tiny_gpt2 import fast_key, random_params

pytestmark = pytest.mark.slow

MODEL: Any = RewardModel(SHAPE, criteria=("safety", "clarity"))
SETTINGS = reward.Config(centring_coefficient=0.02)
CONFIG = reward_heads.Config(num_steps=60, penalty=0.01)
NUM_PAIRS = 60


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL)


@pytest.fixture(scope="module")
def pairs() -> Any:
    """Features of very unlike scales, one of them constant, whose first two tell who is better."""
    random = np.random.default_rng(0)
    features = random.standard_normal((NUM_PAIRS, 2, SHAPE.n_embd))
    better = np.sum(features[:, 0, :2] - features[:, 1, :2], axis=-1)
    first = (better + random.standard_normal(NUM_PAIRS) > 0).astype(np.float32)
    scale = np.logspace(-2, 2, SHAPE.n_embd)
    features = 3 * scale + scale * features
    features[..., -1] = 5
    drawn = random_pairs(NUM_PAIRS)
    return replace(
        drawn,
        features=features.astype(np.float32),
        score=np.stack([first, 1 - first], axis=1),
        margin=None,
    )


def solve(config: reward_heads.Config, params: Any, pairs: Any, seed: int = 0) -> Any:
    algorithm = reward_heads.make(config, SETTINGS, MODEL)
    state = reward_heads.start(SETTINGS, params, fast_key(seed))
    data = jax.tree.map(jnp.asarray, pairs)

    def step(state: Any, _: None) -> Any:
        return algorithm.step(fast_key(0), state, data)

    return jax.jit(partial(jax.lax.scan, step, length=config.num_steps))(state)


def standardised(features: Any) -> Any:
    rows = np.float64(features).reshape(-1, features.shape[-1])
    deviation = rows.std(axis=0)
    return (np.float64(features) - rows.mean(axis=0)) / np.where(deviation > 0, deviation, 1)


def test_heads_are_scipys_minimum_of_the_same_loss(params, pairs):
    """Overall by Bradley and Terry, criteria by squared error; every kernel is penalised."""
    x = standardised(pairs.features)
    rated = ~np.isnan(pairs.rating)
    width = SHAPE.n_embd

    def loss(flat: Any) -> float:
        kernel, bias = flat[: 3 * width].reshape(width, 3), flat[3 * width :]
        scores = x @ kernel + bias
        first, second = scores[:, 0, 0], scores[:, 1, 0]
        choice = np.logaddexp(0, np.where(pairs.score[:, 0] == 1, second - first, first - second))
        error = np.where(rated, 1 / (1 + np.exp(-scores[..., 1:])) - np.nan_to_num(pairs.rating), 0)
        return (
            choice.mean()
            + 0.02 * np.mean((first + second) ** 2)
            + np.sum(error**2) / rated.sum()
            + 0.005 * np.sum(kernel**2)
        )

    best = optimize.minimize(loss, np.zeros(3 * width + 3), method="BFGS")
    state, metrics = solve(CONFIG, params, pairs)
    assert metrics["loss"].mean[-1] == pytest.approx(best.fun, rel=1e-4)
    scores = x @ best.x[: 3 * width].reshape(width, 3) + best.x[3 * width :]
    found = reward.score(MODEL, {**state.train.params, "gain": 1.0, "bias": 0.0}, pairs)
    np.testing.assert_allclose(found.overall, scores[..., 0], atol=5e-3)
    np.testing.assert_allclose(found.criteria, 1 / (1 + np.exp(-scores[..., 1:])), atol=5e-3)
    assert metrics["accuracy"].mean[-1] > 0.75


def test_scales_of_the_features_do_not_matter(params, pairs):
    other = replace(pairs, features=100 * pairs.features - 7)
    states = [solve(CONFIG, params, each)[0].train.params for each in (pairs, other)]
    read = [
        reward.score(MODEL, params, each).overall
        for params, each in zip(states, (pairs, other), strict=True)
    ]
    np.testing.assert_allclose(read[0], read[1], atol=1e-2)


def test_nothing_but_the_heads_moves(params, pairs):
    after = solve(CONFIG, params, pairs)[0].train.params
    for name in params:
        same = jax.tree.map(np.array_equal, params[name], after[name])
        assert all(jax.tree.leaves(same)) == (name not in reward.HEADS)


def test_reliabilities_of_annotators_are_learnt_with_the_heads(params, pairs):
    """The second one, who compared a quarter, reports the opposite of the first."""
    annotator = (np.arange(NUM_PAIRS) % 4 == 0).astype(np.int32)
    share = np.where(annotator == 1, 1 - pairs.score[:, 0], pairs.score[:, 0])
    mixed = replace(pairs, score=np.stack([share, 1 - share], axis=1), annotator=annotator)
    settings = replace(SETTINGS, num_annotators=2)
    state = reward_heads.start(settings, params, fast_key(0))
    step = jax.jit(partial(reward_heads.update, CONFIG, settings, MODEL))
    for _ in range(30):
        state, _ = step(state, jax.tree.map(jnp.asarray, mixed))
    first, second = np.asarray(state.train.params["annotator_logit"])
    assert first > 1
    assert second < -1


def test_members_that_resample_disagree_and_others_do_not(params, pairs):
    trunk = random_params(GPT2(SHAPE))
    data = jax.tree.map(jnp.asarray, pairs)
    spread = []
    for resample in (False, True):
        config = replace(CONFIG, resample=resample)
        start = partial(reward_heads.start, SETTINGS)
        state = reward_ensemble.start(start, MODEL, trunk, fast_key(1), 3)
        algorithm = reward_ensemble.make(reward_heads.make(config, SETTINGS, MODEL), 3)
        step = jax.jit(algorithm.step)
        for _ in range(40):
            state, _ = step(fast_key(0), state, data)
        scores = reward_ensemble.score(MODEL, state.train.params, data)
        spread.append(float(reward_ensemble.disagreement(scores).mean()))
    assert spread[0] < 0.02
    assert spread[1] > 0.1


def test_pairs_without_features_are_refused(params):
    state = reward_heads.start(SETTINGS, params, fast_key(0))
    message = "pairs.features is None; read them by reward_features.with_features"
    with pytest.raises(ValueError, match=message):
        reward_heads.update(CONFIG, SETTINGS, MODEL, state, random_pairs(4))


@pytest.mark.parametrize(("field", "value"), [("num_steps", 0), ("penalty", -1.0)])
def test_validate_names_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field} is {value}"):
        replace(CONFIG, **{field: value}).validate()
