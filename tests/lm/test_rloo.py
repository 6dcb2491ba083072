"""RLOO: the formulas in NumPy, an unbiased gradient by enumeration, and a reward that is learnt."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm import policy_step, rloo, rollouts
from jaxrl_llm.lm.accumulation import gradient_of_sum
from jaxrl_llm.lm.likelihood import response_likelihood
from jaxrl_llm.types import Mean, Responses
from tests.lm import policy_learning as tiny
from tests.nn.tiny_gpt2 import fast_key

# Whole iterations, and laws over many draws: minutes of compilation.
pytestmark = pytest.mark.slow

MODEL = tiny.POLICY.clone(value_width=None)
# Ratios of whole responses are far from 1 here: some are clipped at either end.
CONFIG = rloo.Config(rollout=tiny.ROLLOUT, kl_coefficient=0.3, clip_epsilon_high=0.4)


@partial(jax.jit, static_argnums=(0, 1))
def sum_and_gradient(config: rloo.Config, num_parts: int, params: Any, batch: rloo.Batch) -> Any:
    def total(params: Any, part: rloo.Batch) -> Any:
        value, metrics = rloo.loss(config, MODEL, params, part)
        return value, {"sum": Mean.of(value), **metrics}

    return gradient_of_sum(total, params, batch, num_parts)


advantage = jax.jit(rloo.advantage, static_argnums=0)


@pytest.fixture(scope="module")
def own_log_probability() -> Any:
    return jax.jit(lambda responses: _likelihood(tiny.PARAMS, responses))


def _likelihood(params: Any, responses: Responses) -> Any:
    return response_likelihood(MODEL, params, responses, chunk_size=None).log_probability


def batch_of(config: rloo.Config, responses: Responses) -> rloo.Batch:
    of_each = advantage(config, responses)
    return rloo.weigh(
        rloo.Batch(responses=responses, advantage=of_each, weight=jnp.zeros_like(of_each))
    )


def naive_advantage(responses: Responses, kl_coefficient: float) -> np.ndarray:
    """Response by response."""
    score, drawn, reference = (
        np.asarray(leaf, np.float64)
        for leaf in (
            responses.score,
            responses.log_probability,
            responses.reference_log_probability,
        )
    )
    return_ = score - kl_coefficient * (drawn - reference).sum(-1)
    result = np.zeros_like(return_)
    for group, sample in np.ndindex(*return_.shape):
        others = [x for index, x in enumerate(return_[group]) if index != sample]
        result[group, sample] = return_[group, sample] - np.mean(others)
    return result


def assert_close(tree: Any, expected: Any, atol: float) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=atol), tree, expected)


@pytest.mark.parametrize("num_samples", [2, 3])
def test_advantage_is_the_return_less_the_mean_of_the_others(num_samples):
    responses = tiny.random_responses(num_samples=num_samples)
    expected = naive_advantage(responses, 0.3)
    np.testing.assert_allclose(advantage(CONFIG, responses), expected, atol=2e-6)


def test_advantage_is_whitened_over_the_iteration_where_asked_to():
    responses = tiny.random_responses(num_samples=3)
    expected = naive_advantage(responses, 0.3)
    whitened = advantage(replace(CONFIG, whiten_advantages=True), responses)
    np.testing.assert_allclose(whitened, expected / expected.std(), atol=1e-5)


def test_loss_equals_the_clipped_loss_of_whole_responses(own_log_probability):
    responses = tiny.random_responses(1, num_samples=3)
    new = np.asarray(own_log_probability(responses), np.float64).sum(-1)
    # Near the policy's own, so that ratios fall on both sides of both ends.
    shift = np.random.default_rng(0).normal(0, 0.4, new.shape)
    mask = np.asarray(responses.response_mask)
    old = np.asarray(own_log_probability(responses)) + shift[..., None] / mask.sum(-1)[..., None]
    responses = replace(responses, log_probability=jnp.where(mask, old, 0))
    better = naive_advantage(responses, 0.3)
    ratio = np.exp(-shift)
    clipped = np.clip(ratio, 0.8, 1.4)
    expected = -np.minimum(ratio * better, clipped * better)
    outside = (ratio < 0.8) | (ratio > 1.4)
    assert 0 < outside.sum() < outside.size
    assert not np.allclose(expected, -ratio * better)
    _, metrics = sum_and_gradient(CONFIG, 1, tiny.PARAMS, batch_of(CONFIG, responses))
    np.testing.assert_allclose(metrics["sum"].mean, expected.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["policy_loss"].mean, expected.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["clip_fraction"].mean, outside.mean())
    k3 = np.where(mask, old - np.asarray(own_log_probability(responses)), 0)
    k3 = np.exp(-k3) - 1 + k3
    np.testing.assert_allclose(metrics["policy_kl"].mean, k3.sum() / mask.sum(), rtol=1e-3)


def test_expected_gradient_is_that_of_the_score_less_the_kl_exactly():
    """Over all pairs of responses of one token, each with its probability."""
    beta, prompt = 0.3, 2
    score = jnp.asarray(np.random.default_rng(0).normal(size=tiny.VOCABULARY), jnp.float32)
    reference = jax.nn.log_softmax(score[::-1] * 0.7)
    pairs = np.array(list(product(range(tiny.VOCABULARY), repeat=2)), np.int32)
    tokens = np.stack([np.full_like(pairs, prompt), pairs], axis=-1)
    ones = np.ones((*pairs.shape, 1), bool)

    @jax.jit
    def both(params: Any) -> Any:
        def law(params: Any) -> Any:
            logits: Any = MODEL.apply({"params": params}, np.array([[prompt]]))
            return jax.nn.log_softmax(logits[0, 0])

        def objective(params: Any) -> Any:
            log_pi = law(params)
            return jnp.exp(log_pi) @ (score - beta * (log_pi - reference))

        log_pi = law(params)
        responses = Responses(
            tokens=jnp.asarray(tokens),
            attention_mask=jnp.ones(tokens.shape, bool),
            response_mask=jnp.asarray(ones),
            score=score[pairs],
            log_probability=log_pi[pairs][..., None],
            reference_log_probability=reference[pairs][..., None],
        )
        probability = jnp.exp(log_pi[pairs].sum(axis=1, keepdims=True))
        batch = replace(
            batch_of(CONFIG, responses), weight=jnp.broadcast_to(probability / 2, pairs.shape)
        )
        estimate = jax.grad(lambda params: rloo.loss(CONFIG, MODEL, params, batch)[0])(params)
        return jax.grad(objective)(params), jax.tree.map(jnp.negative, estimate)

    exact, estimate = both(tiny.PARAMS)
    assert jax.tree.reduce(lambda size, leaf: size + jnp.abs(leaf).sum(), exact, 0.0) > 0.1
    assert_close(estimate, exact, atol=1e-6)


def test_equal_scores_give_no_advantage_and_no_gradient():
    responses = tiny.random_responses(num_samples=3)
    responses = replace(responses, score=jnp.full((4, 3), 0.75))
    config = replace(CONFIG, kl_coefficient=0.0)
    batch = batch_of(config, responses)
    np.testing.assert_array_equal(batch.advantage, 0)
    # The gradient does not read the coefficient: the program is that of the other tests.
    gradient, _ = sum_and_gradient(CONFIG, 1, tiny.PARAMS, batch)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), gradient)


def test_gradient_does_not_depend_on_the_micro_batches():
    batch = batch_of(CONFIG, tiny.random_responses(num_groups=4, num_samples=3))
    whole, metrics = sum_and_gradient(CONFIG, 1, tiny.PARAMS, batch)
    gradient, same = sum_and_gradient(CONFIG, 4, tiny.PARAMS, batch)
    assert_close(gradient, whole, atol=1e-5)
    np.testing.assert_allclose(same["sum"].total, metrics["sum"].total, rtol=1e-5)
    np.testing.assert_allclose(same["entropy"].mean, metrics["entropy"].mean, rtol=1e-5)


def test_tokens_after_the_end_change_no_bit():
    responses = tiny.random_responses(num_samples=3)
    tail = ~np.asarray(responses.attention_mask)
    assert tail.any()
    noise = np.random.default_rng(0).integers(2, tiny.VOCABULARY, tail.shape)
    scrambled = replace(responses, tokens=jnp.where(tail, noise, responses.tokens))
    results = [
        sum_and_gradient(CONFIG, 1, tiny.PARAMS, batch_of(CONFIG, each))
        for each in (responses, scrambled)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_step_learns_the_reward_and_starts_from_a_ratio_of_one():
    rollout = replace(tiny.ROLLOUT, num_samples=4)
    update = policy_step.Config(optimizer=tiny.FAST)
    config = rloo.Config(num_iterations=40, rollout=rollout, update=update, kl_coefficient=0.0)
    algorithm = rloo.make(config, tiny.POLICY, tiny.REWARD)
    state = rloo.start(config, tiny.PARAMS, fast_key(0), tiny.REWARD)
    step = jax.jit(algorithm.step)
    scores = []
    for seed in range(40):
        state, metrics = step(fast_key(seed), state, tiny.task())
        scores.append(float(metrics["score"].mean))
        # One step an iteration: the policy that learns is the one that drew.
        assert abs(float(metrics["policy_kl"].mean)) < 1e-6
        assert float(metrics["clip_fraction"].mean) == 0
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.25
    assert int(state.iteration) == int(state.train.step) == 40


def test_step_refuses_a_reference_that_would_learn():
    algorithm = rloo.make(CONFIG, tiny.POLICY, tiny.REWARD)
    state = rloo.start(CONFIG, tiny.PARAMS, fast_key(0), tiny.REWARD)
    with pytest.raises(ValueError, match=r"^task.reference is None and trainable is 'all'"):
        algorithm.step(fast_key(0), state, tiny.task(reference=None))


HEADS = replace(tiny.UPDATE, optimizer=replace(tiny.FAST, trainable="heads"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_iterations": 0}, "num_iterations is 0; it must be at least 1"),
        ({"kl_coefficient": -1.0}, "kl_coefficient is -1.0; it must be at least 0"),
        ({"clip_epsilon": 0.0}, "clip_epsilon is 0.0; it must be greater than 0"),
        ({"clip_epsilon_high": 0.0}, "clip_epsilon_high is 0.0; it must be greater than 0"),
        (
            {"rollout": rollouts.Config(num_samples=1)},
            (
                "rollout.num_samples is 1; a response needs at least one other as its baseline: "
                "draw 2 or more"
            ),
        ),
        (
            {"update": replace(tiny.UPDATE, num_minibatches=3)},
            "num_prompts is 8; it must be a multiple of num_minibatches × num_micro_batches = 3",
        ),
        (
            {"update": HEADS},
            (
                "update.optimizer.trainable is heads; RLOO has no values to learn: train all, "
                "adapter or lora"
            ),
        ),
    ],
)
def test_make_names_the_setting_that_is_out_of_range(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rloo.make(replace(CONFIG, **changes), tiny.POLICY, tiny.REWARD)
