"""GRPO and its variants: the formulas in NumPy, the KL's gradients by enumeration, and a step."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm import grpo, policy_step, rollouts
from jaxrl_llm.lm.accumulation import gradient_of_sum
from jaxrl_llm.lm.likelihood import response_likelihood
from jaxrl_llm.nn import adapters
from jaxrl_llm.types import Mean, Responses
from tests.lm import policy_learning as tiny
from tests.lm.tiny import END
from tests.nn.tiny_gpt2 import fast_key

# Whole iterations, and laws over many draws: minutes of compilation.
pytestmark = pytest.mark.slow

MODEL = tiny.POLICY.clone(value_width=None)
REFERENCE = jax.tree.map(lambda leaf: 0.8 * leaf, adapters.trunk(tiny.PARAMS))
# Longer than any response, as the denominator of Dr. GRPO.
LIMIT = tiny.NUM_NEW + 3
ROLLOUT = replace(tiny.ROLLOUT, max_new_tokens=LIMIT)
CONFIG = grpo.Config(rollout=ROLLOUT, kl_coefficient=0.3, clip_epsilon_high=0.4)
LOSS_TYPES: tuple[grpo.LossType, ...] = ("grpo", "dr_grpo", "dapo")


@partial(jax.jit, static_argnums=(0, 1))
def sum_and_gradient(config: grpo.Config, num_parts: int, params: Any, batch: grpo.Batch) -> Any:
    """The loss reads nothing of how tokens are weighed: one program serves all loss types."""

    def total(params: Any, part: grpo.Batch) -> Any:
        value, metrics = grpo.loss(config, MODEL, REFERENCE, params, part)
        return value, {"sum": Mean.of(value), **metrics}

    return gradient_of_sum(total, params, batch, num_parts)


advantage = jax.jit(grpo.advantage, static_argnums=0)
own_log_probability = jax.jit(
    lambda responses: response_likelihood(MODEL, tiny.PARAMS, responses, chunk_size=None)[0]
)


def batch_of(config: grpo.Config, responses: Responses) -> grpo.Batch:
    return grpo.weigh(config, grpo.as_batch(config, MODEL, responses))


def near_policy(responses: Responses) -> Responses:
    """As if drawn by a policy near by, so that ratios fall on both sides of both ends."""
    mask = np.asarray(responses.response_mask)
    shift = np.random.default_rng(0).normal(0, 0.4, mask.shape)
    old = np.where(mask, np.asarray(own_log_probability(responses)) + shift, 0)
    return replace(responses, log_probability=jnp.asarray(old, jnp.float32))


@pytest.fixture(scope="module")
def responses() -> Responses:
    """Three to a prompt, some of which the end token ended."""
    responses = near_policy(tiny.random_responses(1, num_samples=3))
    mask = np.asarray(responses.response_mask)
    last = mask & ~np.pad(mask, ((0, 0), (0, 0), (0, 1)))[..., 1:]
    ended = np.random.default_rng(1).random(mask.shape[:2]) < 0.6
    assert 0 < ended.sum() < ended.size
    tokens = np.asarray(responses.tokens).copy()
    tokens[..., -mask.shape[-1] :][last & ended[..., None]] = END
    return near_policy(replace(responses, tokens=jnp.asarray(tokens)))


def naive_advantage(score: np.ndarray, scale: bool) -> np.ndarray:
    centred = score - score.mean(axis=1, keepdims=True)
    return centred / (score.std(axis=1, ddof=1, keepdims=True) + 1e-4) if scale else centred


def naive_losses(responses: Responses, scale: bool) -> tuple[np.ndarray, np.ndarray]:
    """The clipped loss and k3 of every token, `[G, K, N]`."""
    new, old, beside = (
        np.asarray(leaf, np.float64)
        for leaf in (
            own_log_probability(responses),
            responses.log_probability,
            responses.reference_log_probability,
        )
    )
    better = naive_advantage(np.asarray(responses.score, np.float64), scale)[..., None]
    ratio = np.exp(new - old)
    policy_loss = -np.minimum(ratio * better, np.clip(ratio, 0.8, 1.4) * better)
    return policy_loss, np.exp(beside - new) - (beside - new) - 1


def naive_objective(each: np.ndarray, counted: np.ndarray, loss_type: str) -> float:
    """Row by row, without a weight."""
    width = counted.shape[-1]
    pairs = zip(each.reshape(-1, width), counted.reshape(-1, width), strict=True)
    rows = [row[mask] for row, mask in pairs]
    match loss_type:
        case "grpo":
            return float(np.mean([row.mean() if row.size else 0.0 for row in rows]))
        case "dr_grpo":
            return float(np.sum([row.sum() for row in rows]) / (LIMIT * len(rows)))
        case _:
            return float(np.concatenate(rows).mean())


def assert_close(tree: Any, expected: Any, atol: float) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=atol), tree, expected)


@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_adds_up_the_losses_of_ragged_responses_as_its_type_says(
    responses, loss_type, mask_truncated
):
    config = replace(CONFIG, loss_type=loss_type, mask_truncated=mask_truncated)
    mask = np.asarray(responses.response_mask)
    assert len(set(mask.sum(-1).flatten().tolist())) > 2
    counted = mask
    if mask_truncated:
        written = np.asarray(responses.tokens)[..., -mask.shape[-1] :]
        counted = mask & ((written == END) & mask).any(-1)[..., None]
        assert 0 < counted.any(-1).sum() < counted.any(-1).size
    policy_loss, k3 = naive_losses(responses, scale=loss_type != "dr_grpo")
    expected = naive_objective(policy_loss + 0.3 * k3, counted, loss_type)
    _, metrics = sum_and_gradient(CONFIG, 1, tiny.PARAMS, batch_of(config, responses))
    np.testing.assert_allclose(metrics["sum"].mean, expected, rtol=2e-4)
    if loss_type == "dapo":
        mean = policy_loss[counted].mean()
        np.testing.assert_allclose(metrics["policy_loss"].mean, mean, rtol=2e-4)
        np.testing.assert_allclose(metrics["reference_kl"].mean, k3[counted].mean(), rtol=2e-4)


def test_loss_clips_the_two_ends_apart(responses):
    ratio = np.exp(np.asarray(own_log_probability(responses) - responses.log_probability))
    mask = np.asarray(responses.response_mask)
    outside = ((ratio < 0.8) | (ratio > 1.4)) & mask
    assert (ratio[mask] < 0.8).any()
    assert (ratio[mask] > 1.4).any()
    assert ((ratio[mask] > 1.2) & (ratio[mask] < 1.4)).any()
    _, metrics = sum_and_gradient(CONFIG, 1, tiny.PARAMS, batch_of(CONFIG, responses))
    np.testing.assert_allclose(metrics["clip_fraction"].mean, outside.sum() / mask.sum())


@pytest.mark.parametrize(
    ("loss_type", "override", "scaled"),
    [("grpo", None, True), ("dr_grpo", None, False), ("dapo", None, True),
     ("grpo", False, False), ("dr_grpo", True, True)],
)  # fmt: skip
def test_advantage_is_scaled_as_its_type_or_the_override_says(
    responses, loss_type, override, scaled
):
    config = replace(CONFIG, loss_type=loss_type, scale_advantages=override)
    expected = naive_advantage(np.asarray(responses.score, np.float64), scaled)
    np.testing.assert_allclose(advantage(config, responses), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k2", "k3", "exact"])
def test_expected_gradient_of_the_kl_is_that_of_the_divergence_that_it_descends(estimator):
    """Over all responses of one token, each with its probability; nothing is scored."""
    config = replace(CONFIG, kl_coefficient=1.0, kl_estimator=estimator)
    tokens = np.stack([np.full(tiny.VOCABULARY, 2), np.arange(tiny.VOCABULARY)], axis=-1)[None]

    @jax.jit
    def both(params: Any) -> Any:
        def law(params: Any) -> Any:
            logits: Any = MODEL.apply({"params": params}, np.array([[2]]))
            return jax.nn.log_softmax(logits[0, 0])

        beside = law(REFERENCE)

        def divergence(params: Any) -> Any:
            log_pi = law(params)
            if estimator == "k3":
                return jnp.exp(beside) @ (beside - log_pi)
            return jnp.exp(log_pi) @ (log_pi - beside)

        log_pi = law(params)
        shape = (1, tiny.VOCABULARY, 1)
        batch = grpo.Batch(
            responses=Responses(
                tokens=jnp.asarray(tokens, jnp.int32),
                attention_mask=jnp.ones(tokens.shape, bool),
                response_mask=jnp.ones(shape, bool),
                log_probability=log_pi.reshape(shape),
                reference_log_probability=beside.reshape(shape),
            ),
            advantage=jnp.zeros(shape[:2]),
            counted=jnp.ones(shape, bool),
            weight=jnp.exp(log_pi).reshape(shape),
        )
        estimate = jax.grad(lambda params: grpo.loss(config, MODEL, REFERENCE, params, batch)[0])(
            params
        )
        return jax.grad(divergence)(params), estimate

    exact, estimate = both(adapters.trunk(tiny.PARAMS))
    assert jax.tree.reduce(lambda size, leaf: size + jnp.abs(leaf).sum(), exact, 0.0) > 0.1
    assert_close(estimate, exact, atol=2e-6)


def test_equal_scores_give_no_advantage_and_no_gradient(responses):
    config = replace(CONFIG, kl_coefficient=0.0)
    batch = batch_of(config, replace(responses, score=jnp.full((4, 3), 0.75)))
    np.testing.assert_array_equal(batch.advantage, 0)
    gradient, metrics = sum_and_gradient(config, 1, tiny.PARAMS, batch)
    assert "reference_kl" not in metrics
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), gradient)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient_does_not_depend_on_the_micro_batches(responses, loss_type):
    batch = batch_of(replace(CONFIG, loss_type=loss_type), responses)
    assert len(set(np.asarray(batch.counted).sum((1, 2)).tolist())) > 1
    whole, metrics = sum_and_gradient(CONFIG, 1, tiny.PARAMS, batch)
    gradient, same = sum_and_gradient(CONFIG, 4, tiny.PARAMS, batch)
    assert_close(gradient, whole, atol=1e-5)
    np.testing.assert_allclose(same["sum"].total, metrics["sum"].total, rtol=1e-5, atol=1e-7)
    for name in ("policy_loss", "policy_kl", "reference_kl", "entropy", "clip_fraction"):
        np.testing.assert_allclose(same[name].mean, metrics[name].mean, rtol=1e-5, atol=1e-7)


def test_tokens_after_the_end_change_no_bit(responses):
    tail = ~np.asarray(responses.attention_mask)
    assert tail.any()
    noise = np.random.default_rng(0).integers(0, tiny.VOCABULARY, tail.shape)
    scrambled = replace(responses, tokens=jnp.where(tail, noise, responses.tokens))
    config = replace(CONFIG, mask_truncated=True)
    results = [
        sum_and_gradient(CONFIG, 1, tiny.PARAMS, batch_of(config, each))
        for each in (responses, scrambled)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_step_learns_the_reward_and_reports_groups_that_teach_nothing():
    update = policy_step.Config(optimizer=tiny.FAST)
    config = grpo.Config(num_iterations=40, rollout=tiny.ROLLOUT, update=update, kl_estimator="k2")
    algorithm = grpo.make(config, tiny.POLICY, tiny.REWARD)
    state = grpo.start(config, tiny.PARAMS, fast_key(0), tiny.REWARD)
    step = jax.jit(algorithm.step)
    scores = []
    for seed in range(40):
        state, metrics = step(fast_key(seed), state, tiny.task())
        scores.append(float(metrics["score"].mean))
        # One step an iteration: the policy that learns is the one that drew.
        assert abs(float(metrics["policy_kl"].mean)) < 1e-6
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.25
    assert int(state.iteration) == int(state.train.step) == 40
    _, metrics = step(fast_key(0), state, tiny.task(scale=0.0))
    assert float(metrics["equal_scores"].mean) == 1


HEADS = replace(tiny.UPDATE, optimizer=replace(tiny.FAST, trainable="heads"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_iterations": 0}, "num_iterations is 0; it must be at least 1"),
        ({"loss_type": "ppo"}, "loss_type is 'ppo'; it must be one of 'grpo', 'dr_grpo', 'dapo'"),
        (
            {"kl_estimator": "k1"},
            "kl_estimator is 'k1'; as a loss its expected gradient is 0: use k2, k3 or exact",
        ),
        ({"kl_estimator": "k4"}, "kl_estimator is 'k4'; it must be one of 'k2', 'k3', 'exact'"),
        ({"kl_coefficient": -1.0}, "kl_coefficient is -1.0; it must be at least 0"),
        ({"advantage_epsilon": 0.0}, "advantage_epsilon is 0.0; it must be greater than 0"),
        ({"clip_epsilon": 0.0}, "clip_epsilon is 0.0; it must be greater than 0"),
        ({"clip_epsilon_high": -0.1}, "clip_epsilon_high is -0.1; it must be greater than 0"),
        (
            {"rollout": rollouts.Config(num_samples=1)},
            "rollout.num_samples is 1; a group needs at least 2 responses to compare",
        ),
        (
            {"update": HEADS},
            (
                "update.optimizer.trainable is heads; GRPO has no values to learn: train all, "
                "adapter or lora"
            ),
        ),
    ],
)
def test_make_names_the_setting_that_is_out_of_range(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        grpo.make(replace(CONFIG, **changes), tiny.POLICY, tiny.REWARD)
