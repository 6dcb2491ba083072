"""PPO's rewards, advantages and losses on ragged responses, beside the formulas in NumPy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import policy_gradient
from jaxrl_llm.lm import ppo, rollouts
from jaxrl_llm.lm.accumulation import gradient_of_sum
from jaxrl_llm.lm.likelihood import exact_kl, response_likelihood, token_likelihood
from jaxrl_llm.types import TokenBatch
from tests.lm.policy_learning import PARAMS, POLICY, ROLLOUT, VOCABULARY, random_responses

# Whole iterations, and laws over many draws: minutes of compilation.
pytestmark = pytest.mark.slow

CONFIG = ppo.Config(rollout=replace(ROLLOUT, temperature=0.7), kl_coefficient=0.3)
BETA = jnp.float32(0.3)
REFERENCE = jax.tree.map(lambda leaf: 0.9 * leaf, PARAMS)


def with_empty_row(responses: Any) -> Any:
    """The same, but the last response of the first group has no token."""
    mask = np.array(responses.response_mask)
    mask[0, -1] = False
    kept = jnp.asarray(mask)
    prompt = responses.prompt_length
    return responses.replace(
        response_mask=kept,
        attention_mask=responses.attention_mask.at[..., prompt:].set(kept),
        log_probability=responses.log_probability * kept,
        reference_log_probability=responses.reference_log_probability * kept,
        value=responses.value * kept,
    )


RESPONSES: Any = with_empty_row(random_responses())
MASK = np.asarray(RESPONSES.response_mask)
LENGTH = MASK.sum(axis=-1)


@pytest.fixture(scope="module")
def batch() -> Any:
    """Drawn by a policy a little away from PARAMS, so that some ratios are clipped."""
    random = np.random.default_rng(1)
    now = response_likelihood(POLICY, PARAMS, RESPONSES, temperature=0.7)
    old = now.log_probability + jnp.asarray(MASK * random.normal(0, 0.4, MASK.shape), jnp.float32)
    assert now.value is not None
    beside = response_likelihood(POLICY, REFERENCE, RESPONSES, temperature=0.7)
    value = now.value + jnp.asarray(MASK * random.normal(0, 0.4, MASK.shape), jnp.float32)
    responses = RESPONSES.replace(
        log_probability=old, reference_log_probability=beside.log_probability, value=value
    )
    return ppo.as_batch(CONFIG, responses, BETA, None)


@pytest.fixture(scope="module")
def gradient():
    """`(batch) -> (gradient, metrics)` of a whole minibatch at PARAMS."""
    return jax.jit(partial(gradient_at, CONFIG))


def gradient_at(config, batch, num_parts=1):
    loss = partial(ppo.loss, config, POLICY, REFERENCE, BETA)
    return gradient_of_sum(loss, PARAMS, ppo.weigh(batch), num_parts)


# Rewards


def test_token_rewards_add_up_to_the_score_minus_the_price_of_the_kl():
    reward = np.asarray(ppo.token_rewards(CONFIG, RESPONSES, BETA))
    kl = np.where(MASK, rollouts.log_ratio_to_reference(RESPONSES), 0)
    last = np.arange(MASK.shape[-1]) == LENGTH[..., None] - 1
    expected = np.where(last, np.asarray(RESPONSES.score)[..., None], 0) - 0.3 * kl
    np.testing.assert_allclose(reward, expected, atol=1e-6)
    assert (reward[~MASK] == 0).all()


def test_token_rewards_without_the_kl_where_the_loss_has_it():
    config = replace(CONFIG, kl_in="loss", kl_estimator="k2", score_clip=0.5)
    reward = np.asarray(ppo.token_rewards(config, RESPONSES, BETA))
    assert np.abs(RESPONSES.score).max() > 0.5
    clipped = np.clip(RESPONSES.score, -0.5, 0.5) * (LENGTH > 0)
    np.testing.assert_allclose(reward.sum(-1), clipped, atol=1e-6)
    assert np.count_nonzero(reward) == np.count_nonzero(clipped)


def test_token_rewards_whitened_keep_their_mean_and_leave_padding_alone():
    plain = np.asarray(ppo.token_rewards(CONFIG, RESPONSES, BETA))
    whitened = np.asarray(ppo.token_rewards(replace(CONFIG, whiten_rewards=True), RESPONSES, BETA))
    centred = plain[MASK] - plain[MASK].mean()
    expected = centred / plain[MASK].std() + plain[MASK].mean()
    np.testing.assert_allclose(whitened[MASK], expected, rtol=1e-5)
    assert (whitened[~MASK] == 0).all()


# Advantages


def naive_advantage(gamma, lambda_, reward, value, mask):
    """sum_k (gamma lambda)^k delta_{t+k}, every sum anew, the value after the last token 0."""
    result = np.zeros(mask.shape)
    for row in np.ndindex(mask.shape[:-1]):
        length = int(mask[row].sum())
        values = np.append(np.asarray(value[row], np.float64)[:length], 0)
        delta = np.asarray(reward[row], np.float64)[:length] + gamma * values[1:] - values[:-1]
        for t in range(length):
            decay = (gamma * lambda_) ** np.arange(length - t)
            result[*row, t] = (decay * delta[t:]).sum()
    return result


@pytest.mark.parametrize(
    ("gamma", "lambda_"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)]
)
def test_advantage_equals_the_naive_sums(gamma, lambda_):
    config = replace(CONFIG, gamma=gamma, gae_lambda=lambda_)
    reward = ppo.token_rewards(config, RESPONSES, BETA)
    each = partial(ppo.advantage, config)
    result = jax.jit(each)(RESPONSES.value, reward, RESPONSES.response_mask)
    expected = naive_advantage(gamma, lambda_, reward, RESPONSES.value, MASK)
    np.testing.assert_allclose(result, expected, atol=1e-5)
    np.testing.assert_allclose(
        each(RESPONSES.value, reward, RESPONSES.response_mask), result, atol=1e-6
    )
    if gamma == lambda_ == 1:
        to_go = np.cumsum(np.asarray(reward)[..., ::-1], axis=-1)[..., ::-1]
        np.testing.assert_allclose(result, MASK * (to_go - RESPONSES.value), atol=1e-5)


def test_advantage_ignores_values_past_the_end():
    """The value of the state after the last token is 0, whatever a model would say of it."""
    reward = ppo.token_rewards(CONFIG, RESPONSES, BETA)
    scrambled = jnp.where(RESPONSES.response_mask, RESPONSES.value, 99.0)
    results = [
        ppo.advantage(CONFIG, value, reward, RESPONSES.response_mask)
        for value in (RESPONSES.value, scrambled)
    ]
    chex.assert_trees_all_equal(*results)


def test_as_batch_whitens_advantages_and_not_returns():
    raw = ppo.as_batch(replace(CONFIG, whiten_advantages=False), RESPONSES, BETA, None)
    whitened = ppo.as_batch(CONFIG, RESPONSES, BETA, None)
    np.testing.assert_array_equal(whitened.return_, raw.return_)
    np.testing.assert_allclose(raw.return_, raw.advantage + RESPONSES.value, atol=1e-6)
    kept = np.asarray(raw.advantage)[MASK]
    expected = (kept - kept.mean()) / kept.std()
    np.testing.assert_allclose(np.asarray(whitened.advantage)[MASK], expected, rtol=1e-4)
    assert (np.asarray(whitened.advantage)[~MASK] == 0).all()
    assert (np.asarray(whitened.return_)[~MASK] == 0).all()


def test_as_batch_of_a_single_token_is_finite():
    one = jax.tree.map(lambda leaf: leaf[:1, :1], random_responses())
    mask = jnp.zeros_like(one.response_mask).at[0, 0, 0].set(True)
    lone = one.replace(response_mask=mask, value=one.value * mask)
    config = replace(CONFIG, whiten_rewards=True)
    result = ppo.as_batch(config, lone, BETA, None)
    assert (np.asarray(result.advantage) == 0).all()
    chex.assert_tree_all_finite(result.return_)


# The loss


@pytest.mark.parametrize(
    ("options"),
    [
        {},
        {"clip_epsilon_high": 0.4, "value_clip_epsilon": None, "entropy_coefficient": 0.2},
        {"dual_clip": 1.1, "clip_epsilon": 0.1},
        {"kl_in": "loss", "kl_estimator": "k2"},
        {"kl_in": "loss", "kl_estimator": "k3"},
        {"kl_in": "loss", "kl_estimator": "exact"},
    ],
    ids=["plain", "clip-higher", "dual clip", "k2", "k3", "exact"],
)
def test_loss_equals_its_formula(batch, options):
    config = replace(CONFIG, **options)
    total, metrics = ppo.loss(config, POLICY, REFERENCE, BETA, PARAMS, ppo.weigh(batch))
    now = response_likelihood(POLICY, PARAMS, batch.responses, temperature=0.7)
    new, entropy, value = (np.asarray(leaf, np.float64)[MASK] for leaf in now)
    old, beside, old_value = (
        np.asarray(leaf, np.float64)[MASK]
        for leaf in (
            batch.responses.log_probability,
            batch.responses.reference_log_probability,
            batch.responses.value,
        )
    )
    advantage, return_ = np.asarray(batch.advantage)[MASK], np.asarray(batch.return_)[MASK]
    ratio, high = np.exp(new - old), config.clip_epsilon_high or config.clip_epsilon
    clipped = np.clip(ratio, 1 - config.clip_epsilon, 1 + high)
    policy = -np.minimum(ratio * advantage, clipped * advantage)
    if config.dual_clip:
        policy = np.where(advantage < 0, np.minimum(policy, -1.1 * advantage), policy)
    error = (value - return_) ** 2
    if epsilon := config.value_clip_epsilon:
        moved = old_value + np.clip(value - old_value, -epsilon, epsilon)
        error = np.maximum(error, (moved - return_) ** 2)
    kl = {
        "k1": np.zeros_like(new),
        "k2": (new - beside) ** 2 / 2,
        "k3": np.exp(beside - new) - 1 + new - beside,
        "exact": np.asarray(exact_kl(POLICY, PARAMS, REFERENCE, batch.responses, temperature=0.7))[
            MASK
        ],
    }[config.kl_estimator]
    expected = policy + 0.1 * error / 2 - config.entropy_coefficient * entropy + 0.3 * kl
    np.testing.assert_allclose(total, expected.mean(), rtol=2e-5)
    outside = (ratio < 1 - config.clip_epsilon) | (ratio > 1 + high)
    assert 0 < outside.mean() < 1
    reported = {
        "policy_loss": policy,
        "value_loss": error / 2,
        "entropy": entropy,
        "policy_kl": ratio - 1 - np.log(ratio),
        "clip_fraction": outside,
    }
    for name, values in reported.items():
        np.testing.assert_allclose(metrics[name].mean, values.mean(), rtol=1e-4, err_msg=name)
        assert int(metrics[name].weight) == MASK.sum()


def test_loss_at_the_policy_that_drew_has_the_gradient_of_reinforce(batch, gradient):
    now = response_likelihood(POLICY, PARAMS, batch.responses, temperature=0.7)
    drawn = batch.replace(
        responses=batch.responses.replace(log_probability=now.log_probability, value=now.value),
        return_=now.value,  # the value has nothing to learn
    )
    result, metrics = gradient(drawn)
    assert float(metrics["clip_fraction"].total) == 0
    assert float(metrics["policy_kl"].total) == pytest.approx(0, abs=1e-6)

    def reinforce(params):
        new = response_likelihood(POLICY, params, drawn.responses, temperature=0.7)
        losses = policy_gradient.reinforce_loss(new.log_probability, drawn.advantage, jnp.zeros(()))
        return jnp.sum(losses) / MASK.sum()

    chex.assert_trees_all_close(result, jax.jit(jax.grad(reinforce))(PARAMS), atol=2e-6, rtol=1e-4)


def test_loss_counts_its_mean_over_the_whole_step(batch, gradient):
    """However the rows are portioned out, though their lengths differ."""
    whole, metrics = gradient(batch)
    parts, summed = jax.jit(partial(gradient_at, CONFIG, num_parts=4))(batch)
    chex.assert_trees_all_close(parts, whole, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(summed, metrics, rtol=1e-5, atol=1e-6)

    def half(rows):
        mask = jnp.zeros_like(batch.responses.response_mask).at[rows].set(True)
        kept = batch.responses.replace(response_mask=batch.responses.response_mask & mask)
        return gradient(batch.replace(responses=kept))[0]

    halves = half(slice(2)), half(slice(2, 4))
    mean_of_means = jax.tree.map(lambda first, second: (first + second) / 2, *halves)
    difference = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), mean_of_means, whole)
    assert max(jax.tree.leaves(difference)) > 1e-3


def test_loss_ignores_what_stands_after_the_end(batch, gradient):
    prompt, random = batch.responses.prompt_length, np.random.default_rng(2)
    tail = jnp.asarray(random.integers(0, VOCABULARY, MASK.shape), jnp.int32)
    written = batch.responses.tokens[..., prompt:]
    scrambled = batch.responses.replace(
        tokens=batch.responses.tokens.at[..., prompt:].set(jnp.where(MASK, written, tail))
    )
    assert (scrambled.tokens != batch.responses.tokens).any()
    chex.assert_trees_all_equal(gradient(batch.replace(responses=scrambled)), gradient(batch))


def test_loss_and_metrics_do_not_depend_on_padding(batch):
    """Two columns more after every response, and one before every prompt."""

    def wider(leaf, left=0):
        padding = [(0, 0)] * (leaf.ndim - 1) + [(left, 2)]
        return jnp.pad(leaf, padding)

    responses = batch.responses
    rows = {name: wider(getattr(responses, name), 1) for name in ("tokens", "attention_mask")}
    columns = {
        name: wider(getattr(responses, name))
        for name in ("response_mask", "log_probability", "reference_log_probability", "value")
    }
    padded = responses.replace(**rows, **columns)
    results = [
        ppo.loss(CONFIG, POLICY, REFERENCE, BETA, PARAMS, ppo.weigh(each))
        for each in (batch, ppo.as_batch(CONFIG, padded, BETA, None))
    ]
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-6)


# The language-modelling term


@pytest.fixture(scope="module")
def text() -> TokenBatch:
    random = np.random.default_rng(3)
    length = np.array([[7], [3], [1], [5]])
    real = np.arange(7)[None] < length
    return TokenBatch(
        tokens=jnp.asarray(random.integers(2, VOCABULARY, (4, 7)), jnp.int32),
        attention_mask=jnp.asarray(real),
        response_mask=jnp.asarray(real),
    )


def test_loss_adds_the_gradient_of_the_mean_likelihood_of_text(batch, gradient, text):
    """The mean over all text of the step, though it goes through the model in two parts."""
    config = replace(CONFIG, text_coefficient=0.4)
    more, metrics = jax.jit(partial(gradient_at, config, num_parts=2))(batch.replace(text=text))

    def surprise(params):
        result = token_likelihood(POLICY, params, text)
        return -jnp.sum(result.log_probability) / jnp.sum(result.mask)

    value, slope = jax.jit(jax.value_and_grad(surprise))(PARAMS)
    expected = jax.tree.map(lambda without, added: without + 0.4 * added, gradient(batch)[0], slope)
    chex.assert_trees_all_close(more, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["text_loss"].mean, value, rtol=1e-5)
    assert int(metrics["text_loss"].weight) == 6 + 2 + 0 + 4


def test_draw_text_takes_as_many_rows_as_prompts(text):
    config = replace(CONFIG, text_coefficient=0.4)
    task: Any = rollouts.Task(prompts=text, reference=PARAMS, reward=None, text=text)
    drawn = ppo.draw_text(config, jax.random.key(0), task)
    assert drawn is not None
    assert drawn.tokens.shape == (config.rollout.num_prompts, 7)
    known = {tuple(row) for row in np.asarray(text.tokens).tolist()}
    assert {tuple(row) for row in np.asarray(drawn.tokens).tolist()} <= known
    assert ppo.draw_text(CONFIG, jax.random.key(1), task) is None
    expected = (
        "text_coefficient is 0.4 and the task has no text; give make_task some, or set it to 0"
    )
    with pytest.raises(ValueError) as error:  # noqa: PT011
        ppo.draw_text(config, jax.random.key(2), task.replace(text=None))
    assert str(error.value) == expected


# What is reported


def test_explained_variance_is_of_the_tokens(batch):
    value, return_ = (np.asarray(leaf)[MASK] for leaf in (batch.responses.value, batch.return_))
    expected = 1 - np.var(return_ - value) / np.var(return_)
    assert float(ppo.explained_variance(batch)) == pytest.approx(expected, rel=1e-4)
    constant = batch.replace(return_=jnp.ones_like(batch.return_))
    assert float(ppo.explained_variance(constant)) == 0
