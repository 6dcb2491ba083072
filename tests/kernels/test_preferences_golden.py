"""Losses and advantages equal to those of TRL and verl, to 1e-5: committed numbers, and live."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import numerics
from jaxrl_llm.kernels import alignment, policy_gradient, preferences, returns
from jaxrl_llm.types import Array
from tests.golden import preferences as golden

Inputs = dict[str, Array]


def pair_sums(inputs: Inputs) -> tuple[Array, Array, Array, Array]:
    log_pi, log_ref = (jnp.sum(inputs[name], -1) for name in ("pair_log_pi", "pair_log_ref"))
    return log_pi[0], log_pi[1], log_ref[0], log_ref[1]


def pair_averages(inputs: Inputs) -> tuple[Array, Array, Array, Array]:
    lengths = jnp.sum(inputs["pair_mask"], -1)
    chosen, rejected, *references = pair_sums(inputs)
    means = chosen / lengths[0], rejected / lengths[1]
    return *means, references[0] / lengths[0], references[1] / lengths[1]


# Losses of pairs


def dpo_sigmoid(inputs: Inputs) -> Array:
    return preferences.dpo_loss(*pair_sums(inputs), golden.BETA)


def dpo_robust(inputs: Inputs) -> Array:
    """TRL's `robust`, of two losses: the labels as they are and all of them flipped."""
    chosen, rejected, ref_chosen, ref_rejected = pair_sums(inputs)
    as_labelled = preferences.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, golden.BETA)
    flipped = preferences.dpo_loss(rejected, chosen, ref_rejected, ref_chosen, golden.BETA)
    error = golden.LABEL_SMOOTHING
    return ((1 - error) * as_labelled - error * flipped) / (1 - 2 * error)


def ipo(inputs: Inputs) -> Array:
    return preferences.ipo_loss(*pair_averages(inputs), golden.BETA)


def kto(inputs: Inputs) -> Array:
    chosen, _, ref_chosen, _ = pair_sums(inputs)
    return preferences.kto_loss(
        chosen,
        ref_chosen,
        inputs["desirable"],
        inputs["kl"],
        golden.BETA,
        desirable_weight=golden.DESIRABLE_WEIGHT,
        undesirable_weight=golden.UNDESIRABLE_WEIGHT,
    )


def bradley_terry(inputs: Inputs) -> Array:
    return preferences.bradley_terry_loss(*inputs["pair_score"], margin=inputs["margin"])


def simpo(inputs: Inputs) -> Array:
    return preferences.simpo_loss(
        *pair_averages(inputs)[:2],
        golden.BETA,
        margin=golden.MARGIN,
        label_smoothing=golden.LABEL_SMOOTHING,
    )


def odds_ratio(inputs: Inputs) -> Array:
    """What TRL subtracts from the likelihood's loss."""
    chosen, rejected = pair_averages(inputs)[:2]
    return -chosen - preferences.orpo_loss(chosen, rejected, golden.BETA)


# Losses of tokens


def grpo(aggregation: alignment.Aggregation, inputs: Inputs) -> tuple[Array, Array]:
    def objective(log_pi: Array) -> Array:
        advantage = jnp.broadcast_to(inputs["advantage"][:, None], log_pi.shape)
        loss = policy_gradient.ppo_clip_loss(
            log_pi, inputs["log_old"], advantage, golden.CLIP_LOW, golden.CLIP_HIGH
        )
        loss += golden.KL_COEFFICIENT * policy_gradient.kl_k3(log_pi, inputs["log_ref"])
        weights = alignment.loss_weights(inputs["mask"], aggregation, max_length=golden.MAX_LENGTH)
        return jnp.sum(weights * loss)

    return jax.value_and_grad(objective)(inputs["log_pi"])


def dual_clip(inputs: Inputs) -> tuple[Array, Array]:
    def objective(log_pi: Array) -> Array:
        advantage = jnp.broadcast_to(inputs["advantage"][:-1, None], log_pi.shape)
        loss = policy_gradient.ppo_dual_clip_loss(
            log_pi,
            inputs["log_old"][:-1],
            advantage,
            golden.CLIP_LOW,
            golden.DUAL_CLIP,
            golden.CLIP_HIGH,
        )
        return jnp.sum(alignment.loss_weights(inputs["mask"][:-1], "token") * loss)

    return jax.value_and_grad(objective)(inputs["log_pi"][:-1])


def aggregated(aggregation: alignment.Aggregation, inputs: Inputs) -> Array:
    weights = alignment.loss_weights(inputs["mask"][:-1], aggregation, max_length=golden.MAX_LENGTH)
    return jnp.sum(weights * inputs["value"][:-1])


def value_loss(inputs: Inputs) -> Array:
    value, old_value, return_ = (inputs[name][:-1] for name in ("value", "old_value", "return"))
    loss = policy_gradient.clipped_value_loss(value, old_value, return_, golden.VALUE_CLIP)
    return jnp.sum(alignment.loss_weights(inputs["mask"][:-1], "token") * loss)


def kl(estimator: Callable[[Array, Array], Array], inputs: Inputs) -> Array:
    return estimator(inputs["log_pi"][:-1], inputs["log_ref"][:-1])


# Rewards and advantages


def grpo_advantage(inputs: Inputs, *, scale: bool = True) -> Array:
    return jax.vmap(partial(preferences.grpo_advantage, scale=scale))(inputs["score"])


def rloo_advantage(inputs: Inputs) -> Array:
    return jax.vmap(preferences.rloo_advantage)(inputs["score"])


def rloo_advantage_with_kl(inputs: Inputs) -> Array:
    """TRL's reward has the whole divergence in it: that is what the tokens' rewards add up to."""
    kl = policy_gradient.kl_k1(inputs["log_old"], inputs["log_ref"])
    reward = jax.vmap(alignment.token_reward, (0, 0, None, 0))(
        jnp.zeros(len(kl)), kl, golden.KL_COEFFICIENT, inputs["mask"]
    )
    # TRL scores an empty response too, which has no token to hold a reward.
    total = inputs["score"] + jnp.sum(reward, -1).reshape(inputs["score"].shape)
    return jax.vmap(preferences.rloo_advantage)(total)


def rewards_at_first_token(inputs: Inputs) -> Array:
    """verl's test case scores the first token, to be seen apart from the divergence."""
    kl = policy_gradient.kl_k1(inputs["log_old"], inputs["log_ref"])
    reward = jax.vmap(alignment.token_reward, (0, 0, None, 0))(
        jnp.zeros(len(kl)), kl, golden.KL_COEFFICIENT, inputs["mask"]
    )
    score = jnp.where(inputs["mask"][:, 0], inputs["score"].reshape(-1), 0)
    return reward.at[:, 0].add(score)


def gae(inputs: Inputs) -> tuple[Array, Array]:
    """What verl returns: the whitened advantage, and the return with the raw one in it."""
    mask = inputs["mask"]
    value = jnp.where(mask, inputs["value"], 0)
    next_value = jnp.pad(value[:, 1:], ((0, 0), (0, 1)))
    is_last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    discount = jnp.where(is_last, 0.0, golden.GAMMA)
    advantage = jax.vmap(partial(returns.gae, lambda_=golden.LAMBDA))(
        rewards_at_first_token(inputs), discount, value, next_value, is_last
    )
    advantage = jnp.where(mask, advantage, 0)
    # verl divides by the standard deviation with the divisor n - 1.
    count = jnp.sum(mask)
    whitened = numerics.masked_whiten(advantage, mask) * jnp.sqrt((count - 1) / count)
    return whitened, advantage + value


def kl_coefficients(inputs: Inputs) -> Array:
    def step(coefficient: Array, kl: Array) -> tuple[Array, Array]:
        coefficient = alignment.adaptive_kl_coefficient(
            coefficient,
            kl,
            target=golden.KL_TARGET,
            horizon=golden.HORIZON,
            num_samples=golden.NUM_SAMPLES,
        )
        return coefficient, coefficient

    return jax.lax.scan(step, jnp.array(golden.BETA), inputs["controller_kl"])[1]


# By the name of the golden number, or the names where a function gives two.
OURS = {
    "trl_dpo_sigmoid": dpo_sigmoid,
    "trl_dpo_robust": dpo_robust,
    "trl_dpo_ipo": ipo,
    "trl_kto": kto,
    "trl_bradley_terry": bradley_terry,
    "trl_simpo": simpo,
    "trl_odds_ratio": odds_ratio,
    ("trl_grpo", "trl_grpo_gradient"): partial(grpo, "sequence"),
    ("trl_dapo", "trl_dapo_gradient"): partial(grpo, "token"),
    ("trl_dr_grpo", "trl_dr_grpo_gradient"): partial(grpo, "constant"),
    "trl_grpo_advantage": grpo_advantage,
    "trl_dr_grpo_advantage": partial(grpo_advantage, scale=False),
    "trl_rloo_advantage": rloo_advantage_with_kl,
    "verl_grpo_advantage": grpo_advantage,
    "verl_rloo_advantage": rloo_advantage,
    "verl_rewards": rewards_at_first_token,
    ("verl_gae_whitened", "verl_gae_return"): gae,
    "verl_kl_coefficient": kl_coefficients,
    "verl_kl_k1": partial(kl, policy_gradient.kl_k1),
    "verl_kl_k2": partial(kl, policy_gradient.kl_k2),
    "verl_kl_k3": partial(kl, policy_gradient.kl_k3),
    "verl_token-mean": partial(aggregated, "token"),
    "verl_seq-mean-token-sum": partial(aggregated, "sum"),
    "verl_seq-mean-token-mean": partial(aggregated, "sequence"),
    "verl_seq-mean-token-sum-norm": partial(aggregated, "constant"),
    ("verl_policy_loss", "verl_policy_loss_gradient"): dual_clip,
    "verl_value_loss": value_loss,
}


def assert_equals_ours(inputs: golden.Arrays, numbers: golden.Arrays) -> None:
    # All in one program: one compilation.
    compared = {names: ours for names, ours in OURS.items() if names_of(names) <= set(numbers)}
    arrays = {name: jnp.asarray(x) for name, x in inputs.items()}
    results = jax.jit(lambda arrays: [ours(arrays) for ours in compared.values()])(arrays)
    assert set().union(*map(names_of, compared)) == set(numbers)
    for names, result in zip(compared, results, strict=True):
        several = isinstance(names, tuple)
        for name, actual in zip(names, result, strict=True) if several else [(names, result)]:
            np.testing.assert_allclose(actual, numbers[name], rtol=1e-5, atol=1e-5, err_msg=name)


def names_of(names: str | tuple[str, ...]) -> set[str]:
    return {names} if isinstance(names, str) else set(names)


def test_losses_equal_the_golden_numbers_of_trl_and_verl():
    inputs, numbers = golden.load()
    assert {name.partition("_")[0] for name in numbers} == {"trl", "verl"}
    assert_equals_ours(inputs, numbers)


def test_golden_inputs_reach_both_ends_of_every_clip():
    inputs, _ = golden.load()
    ratio = np.exp(inputs["log_pi"] - inputs["log_old"])[:-1]
    kept, gains = inputs["mask"][:-1], inputs["advantage"][:-1, None] > 0
    assert (kept & gains & (ratio > 1 + golden.CLIP_LOW) & (ratio < 1 + golden.CLIP_HIGH)).any()
    assert (kept & gains & (ratio > 1 + golden.CLIP_HIGH)).any()
    assert (kept & ~gains & (ratio < 1 - golden.CLIP_LOW)).any()
    assert (kept & ~gains & (ratio > golden.DUAL_CLIP)).any()
    assert not inputs["mask"][-1].any()


@pytest.mark.slow
def test_losses_equal_live_trl():
    pytest.importorskip("torch")
    pytest.importorskip("trl")
    inputs = golden.random_inputs(seed=1)
    assert_equals_ours(inputs, golden.trl_numbers(inputs))


def test_losses_equal_live_verl():
    pytest.importorskip("torch")
    if golden.verl_folder() is None:
        pytest.skip("verl is not installed")
    inputs = golden.random_inputs(seed=1)
    assert_equals_ours(inputs, golden.verl_numbers(inputs))
