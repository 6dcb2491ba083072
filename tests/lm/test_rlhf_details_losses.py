"""Details 13 to 22 of RLHF: from a score to the loss of every token.

Each test would fail under the mistake that its name rules out.

Source: Huang et al. (2024), "The N+ Implementation Details of RLHF with PPO", arXiv:2403.17031.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import policy_gradient
from jaxrl_llm.lm import grpo, optimizer, policy_step, ppo, rloo
from jaxrl_llm.lm.likelihood import response_likelihood
from jaxrl_llm.types import Responses
from tests.lm.policy_learning import NUM_NEW, POLICY, REWARD, VOCABULARY, prompts, random_responses
from tests.lm.rlhf_details import (
    BETA,
    CONFIG,
    PARAMS,
    PPO,
    REFERENCE,
    RLOO,
    TEMPERATURE,
    collect,
    learn,
    padded,
    score,
    state,
    task,
    with_stored,
)

# Whole iterations, and laws over many draws: minutes of compilation.
pytestmark = pytest.mark.slow

RESPONSES: Any = random_responses(7, num_groups=8)
MASK = np.asarray(RESPONSES.response_mask)
LENGTH = MASK.sum(-1)
LOG_RATIO = np.asarray(RESPONSES.log_probability - RESPONSES.reference_log_probability)
WHITEN_REWARDS = replace(PPO, whiten_rewards=True)
LOSS = jax.jit(partial(ppo.loss, PPO, POLICY, REFERENCE, BETA, PARAMS))


def test_detail_13_rewards_sum_to_the_score_minus_the_price_of_k1_and_have_no_gradient():
    expected = np.asarray(RESPONSES.score) - 0.3 * LOG_RATIO.sum(-1)

    def total(drawn: Any, beside: Any) -> Any:
        stored = replace(RESPONSES, log_probability=drawn, reference_log_probability=beside)
        return jnp.sum(ppo.token_rewards(PPO, stored, BETA), axis=-1)

    drawn = RESPONSES.log_probability, RESPONSES.reference_log_probability
    np.testing.assert_allclose(total(*drawn), expected, atol=1e-5)
    slopes = jax.grad(lambda *both: jnp.sum(total(*both)), argnums=(0, 1))(*drawn)
    assert all((np.asarray(slope) == 0).all() for slope in slopes)
    # RLOO has the same return: with two responses, the other's is the baseline.
    found = rloo.advantage(replace(RLOO, kl_coefficient=0.3), RESPONSES)
    np.testing.assert_allclose(found, expected - expected[:, ::-1], atol=1e-5)


def every_response() -> Responses:
    """Every response of one token to one prompt, with its probabilities under both policies."""
    one = prompts(2)
    shape = (1, VOCABULARY)

    def repeated(leaf: Any) -> Any:
        return jnp.broadcast_to(leaf[1], (*shape, leaf.shape[-1]))

    every = jnp.arange(VOCABULARY).reshape(*shape, 1)
    mask = jnp.ones((*shape, 1), bool)
    rows = Responses(
        tokens=jnp.concatenate([repeated(one.tokens), every], axis=-1),
        attention_mask=jnp.concatenate([repeated(one.attention_mask), mask], axis=-1),
        response_mask=mask,
        value=jnp.zeros(mask.shape),
    )
    drawn, beside = (
        score(POLICY, params, rows, temperature=TEMPERATURE).log_probability
        for params in (PARAMS, REFERENCE)
    )
    return replace(rows, log_probability=drawn, reference_log_probability=beside)


def test_detail_14_the_expected_gradient_of_a_kl_in_the_loss_is_that_of_a_kl():
    """k1's is 0, k2's and the exact sum's that of KL(pi || ref), and k3's that of KL(ref || pi)."""
    rows: Any = every_response()
    nothing = jnp.zeros(rows.response_mask.shape)
    batch = ppo.Batch(
        responses=rows, advantage=nothing, return_=nothing, weight=jnp.exp(rows.log_probability)
    )
    np.testing.assert_allclose(batch.weight.sum(), 1, rtol=1e-5)

    def log_pi(params: Any) -> Any:
        result = response_likelihood(POLICY, params, rows, temperature=TEMPERATURE)
        return result.log_probability

    def loss(estimator: str, params: Any) -> Any:
        setting: Any = {"kl_in": "loss", "kl_estimator": estimator, "value_coefficient": 0.0}
        return ppo.loss(replace(PPO, **setting), POLICY, REFERENCE, BETA, params, batch)[0]

    of = {name: partial(loss, name) for name in ("k2", "k3", "exact")}
    slope = jax.jit(lambda params: {name: jax.grad(each)(params) for name, each in of.items()})
    found = slope(PARAMS)
    pull = jax.jit(lambda cotangent: jax.vjp(log_pi, PARAMS)[1](cotangent)[0])
    drawn, beside = rows.log_probability, rows.reference_log_probability
    k1 = jax.grad(lambda new: jnp.sum(batch.weight * policy_gradient.kl_k1(new, beside)))(drawn)
    # The gradient of sum_y pi (log pi - log ref), where sum_y pi grad log pi = 0, and of its
    # converse.
    pi_ref = pull(BETA * jnp.exp(drawn) * (drawn - beside))
    ref_pi = pull(-BETA * jnp.exp(beside))
    for estimate, expected in (
        (pull(k1), jax.tree.map(jnp.zeros_like, pi_ref)),
        (found["k2"], pi_ref),
        (found["exact"], pi_ref),
        (found["k3"], ref_pi),
    ):
        chex.assert_trees_all_close(estimate, expected, atol=2e-6)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(pi_ref)) > 1e-3
    gap = jax.tree.map(lambda one, other: np.abs(one - other).max(), pi_ref, ref_pi)
    assert max(jax.tree.leaves(gap)) > 2e-5


def test_detail_14_estimators_that_do_nothing_or_bias_are_refused():
    nothing: dict[str, Any] = {"kl_estimator": "k1"}
    for config in (replace(PPO, kl_in="loss", **nothing), replace(grpo.Config(), **nothing)):
        with pytest.raises(ValueError, match=r"^kl_estimator is 'k1'.*expected gradient"):
            config.validate()
    for estimator in ("k2", "k3", "exact"):
        biased: Any = {"kl_in": "reward", "kl_estimator": estimator}
        with pytest.raises(ValueError, match=f"^kl_estimator is '{estimator}' and kl_in is"):
            replace(PPO, **biased).validate()


def test_detail_15_the_coefficient_follows_the_golden_sequence():
    """With n / horizon = 16 / 160 it changes by at most 2 percent an iteration."""
    config = replace(PPO, adaptive_kl_target=6.0, adaptive_kl_horizon=160)
    assert CONFIG.num_responses == 16
    coefficient = jnp.float32(0.2)
    # 12 / 6 - 1 = 1, clipped to 0.2; 6.6 / 6 - 1 = 0.1; -1, clipped to -0.2; 0; -0.5, to -0.2.
    for kl, expected in (
        (12.0, 0.2 * 1.02),
        (6.6, 0.20604),
        (0.0, 0.2019192),
        (6.0, 0.2019192),
        (-3.0, 0.197880816),
    ):
        coefficient = ppo.next_coefficient(config, coefficient, jnp.float32(kl))
        assert float(coefficient) == pytest.approx(expected, rel=1e-6)


def test_detail_15_the_kl_that_it_sees_is_summed_over_a_response():
    seen = collect(CONFIG, POLICY, REWARD, jax.random.key(0), state(), task(reference=REFERENCE))
    drawn: Any = seen.responses
    k1 = np.where(
        drawn.response_mask, drawn.log_probability - drawn.reference_log_probability, np.nan
    )
    summed = np.nansum(k1, axis=-1).mean()
    assert abs(summed) > 0.005
    assert abs(summed - np.nanmean(k1)) > 0.5 * abs(summed)
    assert float(seen.metrics["kl"].mean) == pytest.approx(summed, rel=1e-4)
    assert int(seen.metrics["kl"].weight) == CONFIG.num_responses


def test_detail_16_whitened_rewards_keep_their_mean_and_ignore_padding():
    plain = np.asarray(ppo.token_rewards(PPO, RESPONSES, BETA), np.float64)
    kept = plain[MASK]
    expected = np.zeros(MASK.shape)
    expected[MASK] = (kept - kept.mean()) / kept.std() + kept.mean()
    for right in (0, 3):
        wide = padded(RESPONSES, right=right)
        found = np.asarray(ppo.token_rewards(WHITEN_REWARDS, wide, BETA))
        np.testing.assert_allclose(found[..., :NUM_NEW], expected, atol=1e-5)
        assert (found[..., NUM_NEW:] == 0).all()
    assert abs(kept.mean()) > 0.02


def test_detail_17_advantages_are_whitened_after_the_returns_over_tokens_alone():
    raw = ppo.as_batch(replace(PPO, whiten_advantages=False), RESPONSES, BETA, None)
    kept = np.asarray(raw.advantage, np.float64)[MASK]
    expected = np.zeros(MASK.shape)
    expected[MASK] = (kept - kept.mean()) / kept.std()
    for right in (0, 3):
        found = ppo.as_batch(PPO, padded(RESPONSES, right=right), BETA, None)
        advantage, return_ = np.asarray(found.advantage), np.asarray(found.return_)
        np.testing.assert_allclose(advantage[..., :NUM_NEW], expected, atol=1e-4)
        np.testing.assert_allclose(return_[..., :NUM_NEW], raw.return_, atol=1e-6)
        assert (advantage[..., NUM_NEW:] == 0).all()
    # One token has no deviation to divide by.
    alone = jnp.zeros_like(RESPONSES.response_mask).at[3, 1, 0].set(True)
    lone = with_stored(replace(RESPONSES, response_mask=alone), value=RESPONSES.value)
    found = ppo.as_batch(WHITEN_REWARDS, lone, BETA, None)
    assert (np.asarray(found.advantage) == 0).all()
    chex.assert_tree_all_finite(found.return_)


@pytest.mark.parametrize("lambda_", [0.0, 0.7, 1.0])
def test_detail_18_the_state_after_the_last_token_is_worth_nothing(lambda_):
    """GAE as sums of sums; lambda 1 gives the returns to go minus the values."""
    config = replace(PPO, gamma=0.9, gae_lambda=lambda_)
    reward = np.asarray(ppo.token_rewards(config, RESPONSES, BETA), np.float64)
    value = np.asarray(RESPONSES.value, np.float64)
    expected, to_go = np.zeros(MASK.shape), np.zeros(MASK.shape)
    for place in np.ndindex(*LENGTH.shape):
        length = LENGTH[place]
        for t in range(length):
            for k in range(t, length):
                following = value[place][k + 1] if k + 1 < length else 0.0
                delta = reward[place][k] + 0.9 * following - value[place][k]
                expected[place][t] += (0.9 * lambda_) ** (k - t) * delta
                to_go[place][t] += 0.9 ** (k - t) * reward[place][k]
    # A value model says something of states past the end too; it must not count.
    for past in (0.0, 50.0):
        values = jnp.where(MASK, RESPONSES.value, past)
        found = ppo.advantage(config, values, jnp.asarray(reward, jnp.float32), jnp.asarray(MASK))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        if lambda_ == 1:
            np.testing.assert_allclose(found, np.where(MASK, to_go - value, 0), atol=1e-5)


def test_detail_19_returns_are_raw_advantages_plus_old_values():
    raw, whitened = (
        ppo.as_batch(replace(PPO, whiten_advantages=on), RESPONSES, BETA, None)
        for on in (False, True)
    )
    np.testing.assert_allclose(raw.return_, raw.advantage + RESPONSES.value, atol=1e-6)
    np.testing.assert_array_equal(whitened.return_, raw.return_)
    assert np.abs(whitened.advantage - raw.advantage).max() > 0.1


def test_detail_20_the_value_is_clipped_around_the_old_one():
    """Half of the greater square, whose gradient stops where the clipped one is the greater."""
    grid = np.array(list(itertools.product((-1.0, -0.1, 0.0, 0.15, 0.7), (-0.3, 0.4), (-2.0, 0.5))))
    value, old, return_ = (jnp.asarray(column, jnp.float32) for column in grid.T)
    found, slope = jax.vmap(
        jax.value_and_grad(partial(policy_gradient.clipped_value_loss, clip_epsilon=0.2))
    )(value, old, return_)
    for (v, v_old, goal), loss, gradient in zip(grid, found, slope, strict=True):
        clipped = min(max(v, v_old - 0.2), v_old + 0.2)
        free, held = (v - goal) ** 2, (clipped - goal) ** 2
        assert float(loss) == pytest.approx(max(free, held) / 2, rel=1e-5, abs=1e-6)
        if not np.isclose(free, held):
            expected = v - goal if free > held else 0.0
            assert float(gradient) == pytest.approx(expected, rel=1e-5)
    # In the loss of PPO: values 0.5 above the stored ones, and where they should be, are clipped
    # to 0.3 below it.
    now = score(POLICY, PARAMS, RESPONSES, temperature=TEMPERATURE)
    stored = with_stored(RESPONSES, value=now.value - 0.5, log_probability=now.log_probability)
    batch = replace(ppo.as_batch(PPO, stored, BETA, None), return_=now.value)
    assert float(LOSS(ppo.weigh(batch))[1]["value_loss"].mean) == pytest.approx(0.045, rel=1e-4)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_detail_21_the_policy_loss_is_the_greater_of_the_negated_terms(dual_clip):
    config = replace(PPO, clip_epsilon=0.2, clip_epsilon_high=0.28, dual_clip=dual_clip)
    ratios = (0.05, 0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 2.0, 9.0)
    grid = list(itertools.product(ratios, (-2.0, -0.5, 0.0, 0.5, 2.0)))
    ratio, advantage = (jnp.array(column) for column in zip(*grid, strict=True))
    old = jnp.full(ratio.shape, -1.3)
    found, slope = jax.vmap(jax.value_and_grad(partial(ppo.clip_loss, config)))(
        old + jnp.log(ratio), old, advantage
    )
    for (r, a), loss, gradient in zip(grid, found, slope, strict=True):
        terms = -r * a, -min(max(r, 0.8), 1.28) * a
        expected = max(terms)
        follows = terms[0] >= terms[1]
        if dual_clip is not None and a < 0 and expected > -dual_clip * a:
            expected, follows = -dual_clip * a, False
        assert float(loss) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert float(gradient) == pytest.approx(-r * a if follows else 0, rel=1e-5, abs=1e-6)


def test_detail_22_four_parts_of_a_step_descend_as_one_does():
    """Eight prompts at once, and two at a time, though their responses are of all lengths."""
    assert len(set(MASK.sum((1, 2)).tolist())) > 2
    now = score(POLICY, PARAMS, RESPONSES, temperature=TEMPERATURE)
    stored = with_stored(RESPONSES, log_probability=now.log_probability)
    batch = ppo.as_batch(PPO, stored, BETA, None)
    # With so great an epsilon, and as great a rate, Adam's first step is the gradient itself.
    plain = replace(
        optimizer.ADAM, epsilon=1e3, learning_rate=1e3, max_gradient_norm=1e9, decay="constant"
    )
    config = policy_step.Config(num_micro_batches=4, optimizer=plain)
    loss = partial(ppo.loss, PPO, POLICY, REFERENCE, BETA)
    fit = jax.jit(partial(policy_step.fit, config, 1, loss, ppo.weigh))
    moved, summed = fit(jax.random.key(0), optimizer.start(plain, 1, PARAMS), batch)
    whole, metrics = learn("ppo", POLICY, stored)
    parts = jax.tree.map(jnp.subtract, PARAMS, moved.params)
    chex.assert_trees_all_close(parts, whole, rtol=2e-3, atol=1e-5)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole)) > 0.01
    for name in ("policy_loss", "value_loss", "entropy", "policy_kl"):
        chex.assert_trees_all_close(summed[name], metrics[name], rtol=1e-4, atol=1e-5)
        assert int(summed[name].weight) == MASK.sum()
