"""Ensembles: each member is the run that it is alone, and aggregates are their formulas."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm import optimizer, reward, reward_ensemble
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.nn.reward_model import RewardModel
from jaxrl_llm.types import Responses
from tests.lm.tiny import SHAPE
from tests.nn.tiny_gpt2 import fast_key, random_params

pytestmark = pytest.mark.slow

MODEL: Any = RewardModel(SHAPE, criteria=())
# Where a gradient is all rounding, as that of the bias of attention's keys, so would its step be.
ADAMW = optimizer.Config(learning_rate=0.01, warmup_fraction=0.0, epsilon=1e-3)
CONFIG = reward.Config(num_steps=3, batch_size=2, optimizer=ADAMW)
NUM_MEMBERS = 3
RANDOM = np.random.default_rng(0)
PAIRS = Responses(
    tokens=jnp.asarray(RANDOM.integers(2, SHAPE.vocab_size, (6, 2, 5)), jnp.int32),
    attention_mask=jnp.ones((6, 2, 5), bool),
    response_mask=jnp.ones((6, 2, 3), bool),
)


@pytest.fixture(scope="module")
def start() -> Any:
    trunk = random_params(GPT2(SHAPE))
    key = fast_key(0)
    return jax.jit(
        partial(
            reward_ensemble.start, partial(reward.start, CONFIG), MODEL, num_members=NUM_MEMBERS
        )
    )(trunk, key)


def member_of(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def test_start_shares_the_trunk_and_differs_in_heads_and_order(start):
    params = start.train.params
    for leaf in jax.tree.leaves(params["transformer"]):
        for member in range(1, NUM_MEMBERS):
            np.testing.assert_array_equal(leaf[member], leaf[0])
    kernels = np.asarray(params["overall"]["kernel"])
    orders = np.asarray(jax.random.key_data(start.order_key))
    for leaf in (kernels, orders):
        assert len({each.tobytes() for each in leaf}) == NUM_MEMBERS


@pytest.mark.slow
def test_training_is_that_of_each_member_alone(start):
    algorithm = reward_ensemble.make(reward.make(CONFIG, MODEL), NUM_MEMBERS)
    together = jax.jit(algorithm.step)
    alone = jax.jit(reward.make(CONFIG, MODEL).step)
    state, members = start, [member_of(start, index) for index in range(NUM_MEMBERS)]
    metrics, each = {}, []
    for step in range(2):
        state, metrics = together(fast_key(step), state, PAIRS)
        keys = [jax.random.fold_in(fast_key(step), index) for index in range(NUM_MEMBERS)]
        each = [alone(key, member, PAIRS) for key, member in zip(keys, members, strict=True)]
        members = [member for member, _ in each]
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    for index, (member, member_metrics) in enumerate(each):
        jax.tree.map(close, member_of(state.train.params, index), member.train.params)
        jax.tree.map(close, member_of(metrics, index), member_metrics)
    assert metrics["loss"].total.shape == (NUM_MEMBERS,)


@pytest.mark.slow
def test_init_draws_members_that_differ():
    state = jax.jit(reward_ensemble.make(reward.make(CONFIG, MODEL), 2).init)(fast_key(0))
    embedding = state.train.params["transformer"]["wte"]["weight"]
    assert np.abs(embedding[0] - embedding[1]).max() > 0.01


def test_score_is_that_of_each_member_and_normalises_together(start):
    params = start.train.params
    score = jax.jit(partial(reward_ensemble.score, MODEL))
    scores = np.asarray(score(params, PAIRS))
    for index in range(NUM_MEMBERS):
        alone = reward.score_all(MODEL, member_of(params, index), PAIRS).overall
        np.testing.assert_allclose(scores[index], alone, rtol=1e-4, atol=1e-5)
    after = np.asarray(score(reward.normalise(params, scores), PAIRS)).reshape(NUM_MEMBERS, -1)
    np.testing.assert_allclose(after.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(after.std(axis=1), 1, atol=1e-5)


SCORES = jnp.asarray(RANDOM.normal(size=(5, 4, 3)), jnp.float32)


def naive_aggregate(members: Any, how: str) -> float:
    """Of the scores `[M]` of one response."""
    mean = sum(members) / len(members)
    if how == "mean":
        return mean
    if how == "worst":
        return min(members)
    if how == "uncertainty":
        return mean - 0.7 * sum((member - mean) ** 2 for member in members) / len(members)
    low, high = sorted(members)[1:3]  # 0.3 of the way through 5 members lies after the second
    return low + (0.3 * 4 - 1) * (high - low)


@pytest.mark.parametrize("how", reward_ensemble.AGGREGATIONS)
def test_aggregate_is_its_formula_for_every_response(how):
    options = {"coefficient": 0.7, "quantile": 0.3}
    aggregate = partial(reward_ensemble.aggregate, how=how, **options)
    expected = [
        [naive_aggregate(SCORES[:, g, k].tolist(), how) for k in range(3)] for g in range(4)
    ]
    np.testing.assert_allclose(jax.jit(aggregate)(SCORES), expected, rtol=1e-4, atol=1e-6)
    # Members that agree are each right.
    same = jnp.broadcast_to(SCORES[:1], SCORES.shape)
    np.testing.assert_allclose(aggregate(same), SCORES[0], rtol=1e-5)
    # One member alone is itself.
    np.testing.assert_allclose(aggregate(SCORES[:1]), SCORES[0], rtol=1e-6)


def test_aggregate_goes_from_the_worst_through_the_quantiles_to_the_median():
    at = partial(reward_ensemble.aggregate, SCORES, "quantile")
    np.testing.assert_allclose(at(quantile=0.0), SCORES.min(axis=0), rtol=1e-6)
    np.testing.assert_allclose(at(quantile=0.5), np.median(SCORES, axis=0), rtol=1e-6)


def test_disagreement_is_the_deviation_of_the_members():
    np.testing.assert_allclose(reward_ensemble.disagreement(SCORES), SCORES.std(axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "median"}, "how is 'median'; it must be one of 'mean', 'worst'"),
        ({"how": "uncertainty", "coefficient": -1}, "coefficient is -1; it must be at least 0"),
        ({"how": "quantile", "quantile": 1.5}, r"quantile is 1.5; it must be in \[0, 1\]"),
    ],
)
def test_aggregate_refuses_what_it_does_not_know(options, message):
    with pytest.raises(ValueError, match=message):
        reward_ensemble.aggregate(SCORES, **options)


def test_make_refuses_an_ensemble_of_none():
    with pytest.raises(ValueError, match="num_members is 0; it must be at least 1"):
        reward_ensemble.make(reward.make(CONFIG, MODEL), 0)
