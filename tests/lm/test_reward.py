"""Reward models: the loss by its formula, nothing from what is missing, and a preference learnt."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm import optimizer, reward, reward_quality
from jaxrl_llm.lm.order import next_batch
from jaxrl_llm.types import Responses
from tests.lm.preference_pairs import MODEL, PAIRS, PROMPT, RESPONSE, random_pairs
from tests.lm.tiny import SHAPE, VOCABULARY
from tests.nn.tiny_gpt2 import fast_key, random_params

pytestmark = pytest.mark.slow

ADAMW = optimizer.Config(learning_rate=0.01, warmup_fraction=0.0, weight_decay=0.0)
CONFIG = reward.Config(
    num_steps=4, batch_size=8, label_smoothing=0.1, centring_coefficient=0.3, rating_coefficient=0.7
)
gradient_of_loss = jax.jit(reward.gradient_of_loss, static_argnums=(0, 1))


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL)


def log_sigmoid(x: Any) -> Any:
    return -np.log1p(np.exp(-np.asarray(x, np.float64)))


def naive_choice(difference: Any, share: Any) -> Any:
    return -share * log_sigmoid(difference) - (1 - share) * log_sigmoid(-difference)


def test_loss_is_the_naive_one_of_every_pair_and_every_rating(params):
    overall, criteria = reward.score_all(MODEL, {**params, "gain": 1.0, "bias": 0.0}, PAIRS)
    expected: dict[str, Any] = {"preference_loss": 0.0, "centring_loss": 0.0, "rating_loss": 0.0}
    errors = [
        (criteria[place] - rating) ** 2
        for place, rating in np.ndenumerate(PAIRS.rating)
        if not np.isnan(rating)
    ]
    correct, decided = 0, 0
    for g in range(8):
        share, first, second = PAIRS.score[g, 0], overall[g, 0], overall[g, 1]
        difference = first - second - (2 * share - 1) * PAIRS.margin[g]
        smoothed = 0.9 * share + 0.1 * (1 - share)
        expected["preference_loss"] += naive_choice(difference, smoothed) / 8
        expected["centring_loss"] += (first + second) ** 2 / 8
        if share != 0.5:
            decided += 1
            correct += (first > second) == (share > 0.5)
    expected["rating_loss"] = np.mean(errors)
    expected["loss"] = (
        expected["preference_loss"]
        + 0.3 * expected["centring_loss"]
        + 0.7 * expected["rating_loss"]
    )
    expected |= {"accuracy": correct / decided, "score": overall.mean()}
    _, metrics = gradient_of_loss(CONFIG, MODEL, fast_key(0), params, PAIRS)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name].mean, value, rtol=1e-5, err_msg=name)
    assert int(metrics["accuracy"].weight) == decided < 8
    assert int(metrics["rating_loss"].weight) == len(errors) < 32


def test_gradient_is_that_of_the_loss_and_leaves_gain_and_bias_alone(params):
    gradient, _ = gradient_of_loss(CONFIG, MODEL, fast_key(0), params, PAIRS)
    assert (gradient["gain"], gradient["bias"]) == (0, 0)
    scaled = {**params, "gain": jnp.float32(9), "bias": jnp.float32(-2)}
    same, _ = gradient_of_loss(CONFIG, MODEL, fast_key(0), scaled, PAIRS)
    jax.tree.map(np.testing.assert_array_equal, same, gradient)

    def loss(bias: float) -> float:
        head = {**params["overall"], "bias": params["overall"]["bias"] + np.float32(bias)}
        moved = {**params, "overall": head}
        metrics = gradient_of_loss(CONFIG, MODEL, fast_key(0), moved, PAIRS)[1]
        return float(metrics["loss"].mean)

    # Comparisons do not feel a constant; the centring does, as a quadratic.
    slope = (loss(0.5) - loss(-0.5)) / 1.0
    np.testing.assert_allclose(gradient["overall"]["bias"], [slope], rtol=1e-3)
    assert abs(slope) > 0.01


def test_detail_22_gradient_does_not_depend_on_the_micro_batches(params):
    given = (~np.isnan(PAIRS.rating)).reshape(4, -1).sum(axis=1)
    assert len(set(given.tolist())) > 1
    whole, metrics = gradient_of_loss(CONFIG, MODEL, fast_key(0), params, PAIRS)
    in_parts = replace(CONFIG, num_micro_batches=4)
    parts, same = gradient_of_loss(in_parts, MODEL, fast_key(0), params, PAIRS)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, parts, whole)
    jax.tree.map(close, same, metrics)


def test_missing_ratings_give_exactly_no_gradient(params):
    missing = np.array(PAIRS.rating)
    missing[..., 1] = np.nan
    gradient, metrics = gradient_of_loss(
        CONFIG, MODEL, fast_key(0), params, replace(PAIRS, rating=missing)
    )
    head = gradient["by_criterion"]
    assert np.abs(head["kernel"][:, 0]).max() > 1e-4
    assert not head["kernel"][:, 1].any()
    assert not head["bias"][1].any()
    assert np.isfinite(metrics["loss"].mean)
    missing[:] = np.nan
    gradient, _ = gradient_of_loss(
        CONFIG, MODEL, fast_key(0), params, replace(PAIRS, rating=missing)
    )
    without, metrics = gradient_of_loss(
        CONFIG, MODEL, fast_key(0), params, replace(PAIRS, rating=None)
    )
    assert "rating_loss" not in metrics
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient["by_criterion"]))
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, gradient, without)


def test_preference_loss_of_annotators_mixes_right_and_wrong_reports():
    config = reward.Config(num_annotators=3)
    overall = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)
    logit = np.array([-1.0, 0.5, 3.0], np.float32)
    pairs = replace(PAIRS, margin=None)
    loss = reward.preference_loss(config, {"annotator_logit": logit}, jnp.asarray(overall), pairs)
    right = 1 / (1 + np.exp(-logit.astype(np.float64)))[PAIRS.annotator]
    first = 1 / (1 + np.exp(overall[:, 1] - overall[:, 0]))
    reported = right * first + (1 - right) * (1 - first)
    share = PAIRS.score[:, 0]
    expected = -share * np.log(reported) - (1 - share) * np.log(1 - reported)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_preference_loss_of_ties_has_probabilities_that_sum_to_1():
    config = reward.Config(learn_ties=True)
    params = reward.start(config, {"overall": jnp.zeros((2, 2))}, fast_key(0)).train.params
    overall = jnp.array([[0.3, -0.4]] * 3)
    share = np.array([1.0, 0.5, 0.0], np.float32)
    pairs = jax.tree.map(lambda leaf: leaf[:3], replace(PAIRS, margin=None, rating=None))
    pairs = replace(pairs, score=np.stack([share, 1 - share], axis=1))
    probability = np.exp(-reward.preference_loss(config, params, overall, pairs))
    np.testing.assert_allclose(probability.sum(), 1, rtol=1e-5)
    width = math.log(2)  # the softplus of 0
    np.testing.assert_allclose(probability[0], np.exp(log_sigmoid(0.7 - width)), rtol=1e-5)


def test_where_there_is_no_score_the_first_was_chosen():
    chosen = np.ones(8, np.float32)
    scored = replace(PAIRS, score=np.stack([chosen, 1 - chosen], axis=1))
    for pairs in (scored, replace(PAIRS, score=None)):
        np.testing.assert_array_equal(reward.preference(pairs), chosen)


def separable_pairs(num_pairs: int, seed: int) -> tuple[Any, Any]:
    """Pairs of which the one with the larger tokens is better, as annotator 0 always reports.

    Annotator 1 reports the contrary in 4 of 10 cases. Also: which reports are right.
    """
    random = np.random.default_rng(seed)
    pairs = random_pairs(num_pairs, seed)
    middle = (2 + VOCABULARY) // 2
    first_is_larger = random.random(num_pairs) < 0.5
    is_larger = np.stack([first_is_larger, ~first_is_larger], axis=1)[..., None]
    shape = (num_pairs, 2, RESPONSE)
    small, large = random.integers(2, middle, shape), random.integers(middle, VOCABULARY, shape)
    tokens = np.array(pairs.tokens)
    tokens[..., PROMPT:] = np.where(is_larger, large, small)
    mask = np.ones(shape, bool)
    annotator = random.integers(2, size=num_pairs).astype(np.int32)
    is_right = (annotator == 0) | (random.random(num_pairs) < 0.6)
    first = (first_is_larger == is_right).astype(np.float32)
    pairs = replace(
        pairs,
        tokens=tokens,
        attention_mask=np.concatenate([pairs.attention_mask[..., :PROMPT], mask], axis=-1),
        response_mask=mask,
        score=np.stack([first, 1 - first], axis=1),
        annotator=annotator,
    )
    return replace(pairs, rating=None, margin=None), is_right


@pytest.mark.slow
def test_training_learns_a_separable_preference_and_how_reliable_each_annotator_is():
    config = reward.Config(
        num_steps=100, batch_size=32, num_annotators=2, choice_rate=5.0, optimizer=ADAMW
    )
    pairs, is_right = separable_pairs(1024, 0)
    pairs = reward.checked_pairs(config, MODEL, pairs)
    algorithm = reward.make(config, MODEL)

    @jax.jit
    def train(key: Any) -> Any:
        init_key, step_key = jax.random.split(key)
        step_keys = jax.random.split(step_key, config.num_steps)
        state = algorithm.init(init_key)
        after, metrics = jax.lax.scan(
            lambda state, key: algorithm.step(key, state, pairs), state, step_keys
        )
        return state.train.params, after.train.params, metrics

    untrained, params, metrics = train(fast_key(0))
    held_out, is_right_there = separable_pairs(200, 1)
    held_out = jax.tree.map(lambda leaf: leaf[is_right_there], held_out)
    assert reward_quality.accuracy(MODEL, untrained, held_out).low < 0.7
    assert reward_quality.accuracy(MODEL, params, held_out).low > 0.95
    assert metrics["accuracy"].mean[-10:].mean() < 0.9  # of reports, of which many are wrong
    reliability = 1 / (1 + np.exp(-np.asarray(params["annotator_logit"])))
    share = [is_right[np.asarray(pairs.annotator) == who].mean() for who in range(2)]
    np.testing.assert_allclose(reliability, share, atol=0.08)
    # Nothing but the user sets these.
    assert (params["gain"], params["bias"]) == (1, 0)
    # The same key, the same bits.
    jax.tree.map(np.testing.assert_array_equal, train(fast_key(0))[1], params)


def test_next_batch_takes_every_pair_once_an_epoch_and_all_that_is_known_of_it(params):
    config = reward.Config(batch_size=4)
    state = reward.start(config, params, fast_key(0))
    seen = []
    for step in range(2):
        state = replace(state, train=replace(state.train, step=jnp.int32(step)))
        batch = next_batch(state, config.batch_size, PAIRS)
        rows = [np.flatnonzero(PAIRS.margin == each)[0] for each in np.asarray(batch.margin)]
        expected = jax.tree.map(lambda leaf, rows=rows: leaf[rows], PAIRS)
        jax.tree.map(np.testing.assert_array_equal, batch, expected)
        seen += rows
    assert sorted(seen) == list(range(8))


def test_update_moves_reliabilities_and_heads_at_rates_of_their_own(params):
    config = replace(CONFIG, num_annotators=3, choice_rate=20.0, head_rate=3.0, optimizer=ADAMW)
    pairs = replace(PAIRS, annotator=np.array([0, 0, 2, 2] * 2, np.int32))
    state = reward.start(config, params, fast_key(0))
    after, _ = jax.jit(reward.update, static_argnums=(0, 1))(
        config, MODEL, fast_key(1), state, pairs
    )
    before, after = state.train.params, after.train.params
    np.testing.assert_allclose(before["annotator_logit"], math.log(9), rtol=1e-6)
    # The first step of Adam is the learning rate, whatever the gradient; annotator 1 is not there.
    move = np.abs(after["annotator_logit"] - before["annotator_logit"])
    np.testing.assert_allclose(move, [0.2, 0, 0.2], rtol=1e-3)
    head = np.abs(after["overall"]["kernel"] - before["overall"]["kernel"])
    np.testing.assert_allclose(head, 0.03, rtol=1e-3)
    embedding = [each["transformer"]["wpe"]["weight"][0] for each in (before, after)]
    np.testing.assert_allclose(np.abs(np.subtract(*embedding)), 0.01, rtol=1e-2)


def test_heads_alone_learn_where_the_trunk_is_frozen(params):
    config = replace(CONFIG, optimizer=replace(ADAMW, trainable="heads"))
    state = reward.start(config, params, fast_key(0))
    after, _ = jax.jit(reward.update, static_argnums=(0, 1))(
        config, MODEL, fast_key(1), state, PAIRS
    )
    before, after = state.train.params, after.train.params
    jax.tree.map(np.testing.assert_array_equal, before["transformer"], after["transformer"])
    for head in ("overall", "by_criterion"):
        assert np.abs(after[head]["kernel"] - before[head]["kernel"]).min() > 0


@pytest.mark.slow
def test_dropout_is_on_in_training_and_off_in_scoring():
    model = MODEL.clone(config=replace(SHAPE, resid_pdrop=0.3))
    params = random_params(model)
    losses = [
        gradient_of_loss(CONFIG, model, fast_key(seed), params, PAIRS)[1]["loss"].mean
        for seed in range(2)
    ]
    assert not np.isclose(*losses)
    jax.tree.map(
        np.testing.assert_array_equal,
        reward.score_all(model, params, PAIRS),
        reward.score_all(MODEL, params, PAIRS),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; it must be at least 1"),
        ({"num_micro_batches": 3}, "batch_size is 16; it must be a multiple of num_micro_batches"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5; it must be at least 0 and less than"),
        ({"first_reliability": 0.5}, "first_reliability is 0.5; it must be between 0.5 and 1"),
        ({"centring_coefficient": -1}, "centring_coefficient is -1; it must be at least 0"),
        ({"learn_ties": True, "num_annotators": 2}, "learn_ties is True, .*; set num_annotators"),
        (
            {"optimizer": optimizer.Config(trainable="lora")},
            "optimizer.trainable is lora; a reward model has no adapters: train all or heads",
        ),
    ],
)
def test_validate_names_the_field(changes, message):
    reward.Config().validate()
    with pytest.raises(ValueError, match=message):
        reward.Config(**changes).validate()


def changed(name: str, place: Any, value: float) -> Any:
    array = np.array(getattr(PAIRS, name))
    array[place] = value
    return replace(PAIRS, **{name: array})


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (changed("score", (2, 0), 1.5), "pairs.score[2, 0] is 1.5; it must be in [0, 1]"),
        (changed("score", slice(3, 4), 1.0), "pairs.score.sum[3] is 2.0; the two must sum to 1"),
        (changed("rating", (1, 0, 1), -3), "pairs.rating[1, 0, 1] is -3.0; it must be in [0, 1]"),
        (changed("margin", 4, np.nan), "pairs.margin[4] is nan; it must be finite"),
        (changed("annotator", 5, 3), "pairs.annotator[5] is 3; it must be in [0, 3)"),
        (
            changed("attention_mask", (6, 1), False),
            "pairs.attention_mask.sum[6, 1] is 0; a text needs a token",
        ),
        (replace(PAIRS, annotator=None), "pairs.annotator is None; give who compared each"),
        (
            replace(PAIRS, rating=np.ones((8, 2, 3), np.float32)),
            "pairs.rating has 3 criteria; the model's criteria are 2",
        ),
        (
            jax.tree.map(lambda leaf: leaf[:, :1], Responses(
                tokens=PAIRS.tokens, attention_mask=PAIRS.attention_mask,
                response_mask=PAIRS.response_mask,
            )),
            "pairs have 1 responses to a prompt; give 2",
        ),
    ],
)  # fmt: skip
def test_checked_pairs_names_field_and_place(pairs, message):
    config = reward.Config(num_annotators=3)
    reward.checked_pairs(config, MODEL, PAIRS)
    with pytest.raises(ValueError, match=re.escape(message)):
        reward.checked_pairs(config, MODEL, pairs)
