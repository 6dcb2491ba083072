"""Rewards, weights and best-of-n laws against loops and enumeration."""

import itertools
import math
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import alignment, policy_gradient

LENGTHS = (5, 3, 1, 0)
MASK = np.arange(5)[None] < np.array(LENGTHS)[:, None]
AGGREGATIONS = get_args(alignment.Aggregation)


def kl_and_score(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(seed)
    # What is masked must not count, whatever it is.
    kl = np.where(MASK, random.normal(size=MASK.shape), np.nan)
    return jnp.array(kl, jnp.float32), jnp.array(random.normal(size=len(MASK)), jnp.float32)


# Rewards


def test_token_reward_equals_a_loop_and_vmap_a_loop():
    kl, score = kl_and_score()
    rows = []
    for row, length in enumerate(LENGTHS):
        expected = np.zeros(5)
        for t in range(length):
            expected[t] = -0.3 * float(kl[row, t])
        if length:
            expected[length - 1] += float(score[row])
        actual = alignment.token_reward(score[row], kl[row], 0.3, jnp.array(MASK[row]))
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)
        rows.append(actual)
    batched = jax.jit(jax.vmap(alignment.token_reward, (0, 0, None, 0)))(
        score, kl, 0.3, jnp.array(MASK)
    )
    np.testing.assert_allclose(batched, np.stack(rows), rtol=1e-6)


def test_detail_9_score_sits_on_the_last_token_of_padded_and_full_rows():
    """Padding a full row changes none of its rewards."""
    mask = jnp.array(MASK[0])
    kl, score = kl_and_score()
    full = alignment.token_reward(score[0], kl[0], 0.3, mask)
    padded = alignment.token_reward(
        score[0], jnp.pad(kl[0], (0, 3), constant_values=7.0), 0.3, jnp.pad(mask, (0, 3))
    )
    np.testing.assert_array_equal(padded, np.pad(full, (0, 3)))
    np.testing.assert_allclose(full[-1] - score[0], -0.3 * kl[0, -1], rtol=1e-5)


def test_token_reward_leaves_gaps_inside_a_response_alone():
    mask = jnp.array([True, False, True, False])
    reward = alignment.token_reward(jnp.array(2.0), jnp.ones(4), 0.5, mask)
    np.testing.assert_array_equal(reward, [-0.5, 0, 1.5, 0])


def test_detail_10_rewards_are_floats_whatever_the_score():
    zeros = jnp.zeros(3)
    reward = alignment.token_reward(jnp.array(1), zeros + 0.25, 1.0, zeros == 0)
    assert reward.dtype == jnp.float32
    np.testing.assert_array_equal(reward, [-0.25, -0.25, 0.75])
    half = alignment.token_reward(
        jnp.array(0.7, jnp.bfloat16), zeros.astype(jnp.bfloat16), 0.1, zeros == 0
    )
    assert half.dtype == jnp.float32


def test_detail_13_rewards_add_up_to_the_penalised_score_without_gradient():
    random = np.random.default_rng(1)
    log_pi, log_ref = (jnp.array(-random.gamma(2.0, size=5), jnp.float32) for _ in range(2))
    mask, score = jnp.array(MASK[1]), jnp.array(1.5)

    def rewards(log_pi, score):
        kl = policy_gradient.kl_k1(log_pi, log_ref)
        return jnp.sum(alignment.token_reward(score, kl, 0.3, mask))

    expected = 1.5 - 0.3 * float(jnp.sum((log_pi - log_ref)[:3]))
    np.testing.assert_allclose(rewards(log_pi, score), expected, rtol=1e-5)
    gradient, of_score = jax.grad(rewards, (0, 1))(log_pi, score)
    np.testing.assert_array_equal(gradient, np.zeros(5))
    assert of_score == 0


def test_detail_11_is_unfinished_honours_any_stop_token():
    token = jnp.array([[4, 9, 2, 0], [4, 2, 9, 0], [4, 2, 9, 9], [2, 2, 2, 2]])
    mask = jnp.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    unfinished = jax.vmap(alignment.is_unfinished, (0, 0, None))
    np.testing.assert_array_equal(unfinished(token, mask, (2,)), [False, True, False, True])
    np.testing.assert_array_equal(unfinished(token, mask, (9,)), [True, False, True, True])
    np.testing.assert_array_equal(unfinished(token, mask, (2, 9)), [False, False, False, True])


def test_detail_15_adaptive_kl_coefficient_follows_the_controller_of_the_paper():
    """Against a controller in NumPy, whose numbers are beside it."""
    coefficient = jnp.array(0.2)
    expected = [0.20512, 0.199869, 0.197311, 0.202362]
    for kl, value in zip([20.0, 1.0, 5.4, 60.0], expected, strict=True):
        host = float(coefficient)
        coefficient = alignment.adaptive_kl_coefficient(
            coefficient, jnp.array(kl), target=6.0, horizon=10_000, num_samples=1280
        )
        host *= 1 + min(max(kl / 6 - 1, -0.2), 0.2) * 1280 / 10_000
        np.testing.assert_allclose(coefficient, host, rtol=1e-6)
        np.testing.assert_allclose(coefficient, value, rtol=1e-5)


def test_adaptive_kl_coefficient_rests_at_its_target():
    step = partial(alignment.adaptive_kl_coefficient, target=6.0, horizon=100, num_samples=10)
    step = jax.jit(step)
    coefficient = jnp.array(0.2)
    assert step(coefficient, jnp.array(6.0)) == coefficient
    assert step(coefficient, jnp.array(5.9)) < coefficient < step(coefficient, jnp.array(6.1))
    assert step(coefficient, jnp.array(7.2)) == step(coefficient, jnp.array(1e6))


# Losses


def naive_objective(loss: np.ndarray, mask: np.ndarray, aggregation: str):
    rows = [row[kept] for row, kept in zip(loss, mask, strict=True)]
    match aggregation:
        case "token":
            return np.concatenate(rows).mean()
        case "sequence":
            return np.mean([row.mean() if len(row) else 0 for row in rows])
        case "constant":
            return np.mean([row.sum() / mask.shape[1] for row in rows])
        case _:
            return np.mean([row.sum() for row in rows])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_weights_give_the_objective(aggregation):
    loss = np.random.default_rng(0).normal(size=MASK.shape)
    weights = alignment.loss_weights(jnp.array(MASK), aggregation)
    assert weights.dtype == jnp.float32
    assert not weights[~MASK].any()
    expected = naive_objective(loss, MASK, aggregation)
    np.testing.assert_allclose(np.sum(weights * loss), expected, rtol=1e-6)
    groups = jnp.array(MASK.reshape(2, 2, 5))
    jitted = jax.jit(alignment.loss_weights, static_argnums=1)(groups, aggregation)
    np.testing.assert_allclose(jitted.reshape(MASK.shape), weights, rtol=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_detail_22_accumulation_is_exact_with_ragged_lengths(aggregation):
    """One pass over all rows, or one row at a time: the same objective and gradient."""
    features = jnp.array(np.random.default_rng(0).normal(size=MASK.shape), jnp.float32)
    mask = jnp.array(MASK)
    weights = alignment.loss_weights(mask, aggregation)

    def objective(parameter, features, weights):
        return jnp.sum(weights * jnp.square(features - parameter))

    whole = jax.value_and_grad(objective)(jnp.array(0.3), features, weights)
    parts = [
        jax.value_and_grad(objective)(jnp.array(0.3), features[part], weights[part])
        for part in (slice(0, 1), slice(1, 4))
    ]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-5)


def test_loss_weights_count_an_empty_row_among_the_rows():
    full = alignment.loss_weights(jnp.ones((2, 3), bool), "sequence")
    half = alignment.loss_weights(jnp.array([[True] * 3, [False] * 3]), "sequence")
    np.testing.assert_allclose(jnp.sum(full), 1, rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(half), 0.5, rtol=1e-6)


def test_loss_weights_constant_takes_the_length_that_was_allowed():
    mask = jnp.array(MASK)
    long = alignment.loss_weights(mask, "constant", max_length=20)
    np.testing.assert_allclose(4 * long, alignment.loss_weights(mask, "constant"), rtol=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_weights_of_no_token_are_zeros(aggregation):
    for shape in ((4, 3), (1, 1)):
        weights = alignment.loss_weights(jnp.zeros(shape, bool), aggregation)
        np.testing.assert_array_equal(weights, np.zeros(shape))


def test_loss_weights_refuse_another_aggregation():
    with pytest.raises(ValueError, match="aggregation is 'mean'; it must be one of 'token', "):
        alignment.loss_weights(jnp.array(MASK), "mean")  # pyright: ignore[reportArgumentType]


# Best-of-n sampling


def enumerated_law(probability: np.ndarray, reward: np.ndarray, n: int) -> np.ndarray:
    """Draws every n-tuple; the first of those with the highest reward wins."""
    law = np.zeros(len(reward))
    for draws in itertools.product(range(len(reward)), repeat=n):
        winner = max(draws, key=lambda draw: reward[draw])
        law[winner] += np.prod(probability[list(draws)])
    return law


REWARDS = {
    "distinct": np.array([0.3, -1.0, 2.0, 0.5]),
    "tied": np.array([0.5, -1.0, 0.5, 0.5]),
    "two_ties": np.array([1.0, 0.0, 0.0, 1.0]),
    "equal": np.zeros(4),
}


@pytest.mark.parametrize("rewards", REWARDS)
def test_best_of_n_law_equals_enumeration(rewards, x64):
    probability = np.array([0.1, 0.4, 0.2, 0.3])
    log_probability, reward = jnp.log(jnp.array(probability)), jnp.array(REWARDS[rewards])
    law = jax.jit(alignment.best_of_n_law)
    for n in (1, 2, 3, 5):
        expected = enumerated_law(probability, REWARDS[rewards], n)
        np.testing.assert_allclose(jnp.exp(law(log_probability, reward, n)), expected, rtol=1e-10)
        kl = np.sum(expected * np.log(expected / probability))
        actual = alignment.best_of_n_kl(log_probability, reward, n)
        np.testing.assert_allclose(actual, kl, rtol=1e-9, atol=1e-14)


def test_best_of_n_law_of_batches_is_a_loop():
    random = np.random.default_rng(0)
    log_probability = jax.nn.log_softmax(jnp.array(random.normal(size=(3, 6)), jnp.float32))
    reward = jnp.array(random.normal(size=(3, 6)), jnp.float32)
    batched = jax.jit(jax.vmap(alignment.best_of_n_law, (0, 0, None)))(log_probability, reward, 4)
    law = jax.jit(alignment.best_of_n_law)
    for row in range(3):
        alone = law(log_probability[row], reward[row], 4)
        np.testing.assert_allclose(batched[row], alone, rtol=1e-5)


def test_best_of_n_law_leaves_out_the_impossible_and_keeps_the_unlikely():
    probability = jnp.array([0.5, 0.0, 0.5 - 1e-9, 1e-9])
    reward = jnp.array([0.0, 9.0, 1.0, 2.0])
    law = alignment.best_of_n_law(jnp.log(probability), reward, 8)
    np.testing.assert_allclose(jnp.exp(law), [2**-8, 0, 1 - 2**-8, 8e-9], rtol=1e-5)
    assert np.isfinite(alignment.best_of_n_kl(jnp.log(probability), reward, 8))


def test_best_of_n_law_of_very_many_draws_is_the_best_response():
    law = alignment.best_of_n_law(jnp.log(jnp.full(4, 0.25)), jnp.arange(4.0), 1_000_000)
    np.testing.assert_allclose(jnp.exp(law), [0, 0, 0, 1], atol=1e-6)


def test_best_of_n_kl_is_at_most_its_bound_and_nearly_it_for_many_responses(x64):
    random = np.random.default_rng(0)
    kl = jax.jit(alignment.best_of_n_kl)
    bounds = {n: float(alignment.best_of_n_kl_bound(n)) for n in (1, 2, 4, 16)}
    assert bounds == pytest.approx({n: math.log(n) - (n - 1) / n for n in bounds}, rel=1e-12)
    for size in (3, 1000):
        log_probability = jax.nn.log_softmax(jnp.array(random.normal(size=size)))
        reward = jnp.array(random.normal(size=size))
        gaps = [bound - kl(log_probability, reward, n) for n, bound in bounds.items()]
        assert min(gaps) > -1e-12
        assert max(gaps) < 0.02 or size == 3
        # Where all rewards are equal, choosing changes nothing.
        np.testing.assert_allclose(kl(log_probability, jnp.ones(size), 16), 0, atol=1e-10)
