"""Preference optimisation: losses and gradients by hand, and references near and far."""

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

from jaxrl_llm.lm import dpo
from jaxrl_llm.lm.likelihood import response_likelihood
from jaxrl_llm.lm.order import next_batch
from jaxrl_llm.nn import adapters
from jaxrl_llm.types import Responses
from tests.lm import policy_learning as tiny
from tests.nn.tiny_gpt2 import fast_key, random_params

# Whole iterations, and laws over many draws: minutes of compilation.
pytestmark = pytest.mark.slow

MODEL = tiny.POLICY.clone(value_width=None)
PARAMS = adapters.trunk(tiny.PARAMS)
REFERENCE = jax.tree.map(lambda leaf: 0.8 * leaf, PARAMS)
LORA = tiny.LORA_POLICY.clone(value_width=None)
CONFIG = dpo.Config(num_steps=40, batch_size=4, beta=0.5, chunk_size=None, optimizer=tiny.FAST)
PREFERENCE = np.array([1.0, 0.0, 0.5, 0.8])  # a tie and an uncertain label among them

likelihood = jax.jit(
    lambda params, pairs: response_likelihood(MODEL, params, pairs, chunk_size=None)[0]
)
gradient_of_mean = jax.jit(dpo.gradient_of_mean, static_argnums=(0, 1))


@pytest.fixture(scope="module")
def bare() -> Responses:
    """Four pairs without score or reference."""
    drawn = tiny.random_responses(3)
    return Responses(
        tokens=drawn.tokens,
        attention_mask=drawn.attention_mask,
        response_mask=drawn.response_mask,
    )


@pytest.fixture(scope="module")
def pairs(bare) -> Responses:
    """With the reference, and with labels of every kind."""
    score = jnp.asarray(np.stack([PREFERENCE, 1 - PREFERENCE], axis=1), jnp.float32)
    beside = likelihood(REFERENCE, bare)
    return replace(bare, score=score, reference_log_probability=beside)


def naive(pairs: Responses) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of whole responses: log-probability, that of the reference, and length, `[G, 2]`."""
    of_policy = np.asarray(likelihood(PARAMS, pairs), np.float64).sum(-1)
    beside = np.asarray(pairs.reference_log_probability, np.float64).sum(-1)
    return of_policy, beside, np.asarray(pairs.response_mask).sum(-1)


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.log1p(np.exp(-x))


def naive_loss(name: str, pairs: Responses, better: int) -> np.ndarray:
    """The loss of each pair by the paper's formula, `[G]`, where response `better` won."""
    log_pi, beside, length = naive(pairs)
    worse, beta = 1 - better, CONFIG.beta
    ratio = log_pi - beside
    average = log_pi / length
    match name:
        case "dpo":
            return -log_sigmoid(beta * (ratio[:, better] - ratio[:, worse]))
        case "ipo":
            return (ratio[:, better] - ratio[:, worse] - 1 / (2 * beta)) ** 2
        case "kto":
            kl = max(ratio.mean(), 0)
            gain = np.exp(log_sigmoid(beta * (ratio[:, better] - kl)))
            loss = np.exp(log_sigmoid(beta * (kl - ratio[:, worse])))
            return ((1 - gain) + (1 - loss)) / 2
        case "simpo":
            return -log_sigmoid(beta * (average[:, better] - average[:, worse]) - 1.5)
        case _:
            log_odds = average - np.log(1 - np.exp(average))
            odds_ratio = -log_sigmoid(log_odds[:, better] - log_odds[:, worse])
            return -average[:, better] + beta * odds_ratio


def expected_gradient(coefficient: Any, pairs: Responses) -> Any:
    """That of sum coefficient · log pi(response)."""

    def total(params: Any) -> Any:
        each = response_likelihood(MODEL, params, pairs, chunk_size=None).log_probability
        return jnp.sum(coefficient[..., None] * each)

    return jax.jit(jax.grad(total))(PARAMS)


def assert_close(tree: Any, expected: Any, atol: float) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=atol), tree, expected)


@pytest.fixture(scope="module")
def summarise() -> Any:
    return jax.jit(partial(dpo.summarise, CONFIG, MODEL))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "simpo", "orpo"])
def test_expected_loss_is_that_of_the_paper_averaged_over_who_won(
    pairs, summarise, name, label_smoothing
):
    config = replace(CONFIG, loss=name, label_smoothing=label_smoothing, simpo_margin=1.5)
    kl = jnp.zeros(())
    if name == "kto":
        kl = dpo.mean_log_ratio(config, MODEL, PARAMS, pairs)
        of_policy, beside, _ = naive(pairs)
        np.testing.assert_allclose(kl, (of_policy - beside).mean(), rtol=1e-4)
    found = dpo.expected_loss(config, summarise(PARAMS, pairs, kl), dpo.preference(pairs))
    p = PREFERENCE * (1 - label_smoothing) + (1 - PREFERENCE) * label_smoothing
    expected = p * naive_loss(name, pairs, 0) + (1 - p) * naive_loss(name, pairs, 1)
    np.testing.assert_allclose(found, expected, rtol=2e-4)


@pytest.fixture(scope="module")
def unlikely(pairs) -> Responses:
    """Less so under the reference, so that the mean log ratio is positive, and KTO subtracts it."""
    mask = pairs.response_mask
    lower = jnp.where(mask, pairs.reference_log_probability - 2, 0)
    result = replace(pairs, reference_log_probability=lower)
    of_policy, beside, _ = naive(result)
    assert (of_policy - beside).mean() > 0.5
    return result


def test_gradient_of_dpo_is_that_of_its_paper(pairs):
    """-beta (p - sigma(r_1 - r_2)) (grad log pi(y_1) - grad log pi(y_2)), a mean over pairs."""
    gradient, metrics = gradient_of_mean(CONFIG, MODEL, PARAMS, pairs)
    of_policy, beside, _ = naive(pairs)
    reward = CONFIG.beta * (of_policy - beside)
    difference = reward[:, 0] - reward[:, 1]
    share = -CONFIG.beta * (PREFERENCE - 1 / (1 + np.exp(-difference))) / len(PREFERENCE)
    coefficient = jnp.asarray(np.stack([share, -share], axis=1), jnp.float32)
    assert_close(gradient, expected_gradient(coefficient, pairs), atol=1e-5)
    sign = np.sign(2 * PREFERENCE - 1)
    decided = sign != 0
    margin = (sign * difference)[decided]
    np.testing.assert_allclose(metrics["reward_margin"].mean, margin.mean(), rtol=1e-3)
    np.testing.assert_allclose(metrics["accuracy"].mean, (margin > 0).mean())
    p = np.stack([PREFERENCE, 1 - PREFERENCE], axis=1)
    for name, weight in (("chosen", p), ("rejected", 1 - p)):
        expected = (weight * of_policy).sum(1).mean()
        np.testing.assert_allclose(metrics[f"{name}_log_probability"].mean, expected, rtol=1e-4)


def test_the_same_response_twice_costs_log_2_and_moves_nothing(pairs):
    same = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf[:, :1], leaf.shape), replace(pairs, score=None)
    )
    gradient, metrics = gradient_of_mean(CONFIG, MODEL, PARAMS, replace(same, score=pairs.score))
    np.testing.assert_allclose(metrics["loss"].mean, math.log(2), rtol=1e-6)
    jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, 0, atol=1e-6), gradient)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_gradient_does_not_depend_on_the_micro_batches(unlikely, name):
    config = replace(CONFIG, loss=name)
    whole, metrics = gradient_of_mean(config, MODEL, PARAMS, unlikely)
    first, second = naive_loss(name, unlikely, 0), naive_loss(name, unlikely, 1)
    expected = (PREFERENCE * first + (1 - PREFERENCE) * second).mean()
    np.testing.assert_allclose(metrics["loss"].mean, expected, rtol=2e-4)
    in_parts = replace(config, num_micro_batches=4)
    gradient, same = gradient_of_mean(in_parts, MODEL, PARAMS, unlikely)
    assert_close(gradient, whole, atol=1e-6)
    for key, mean in metrics.items():
        np.testing.assert_allclose(same[key].mean, mean.mean, rtol=1e-4, err_msg=key)


def test_tokens_after_the_end_change_no_bit(pairs):
    tail = ~np.asarray(pairs.attention_mask)
    assert tail.any()
    noise = np.random.default_rng(0).integers(0, tiny.VOCABULARY, tail.shape)
    scrambled = replace(pairs, tokens=jnp.where(tail, noise, pairs.tokens))
    results = [gradient_of_mean(CONFIG, MODEL, PARAMS, each) for each in (pairs, scrambled)]
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_with_reference_is_the_likelihood_whatever_the_batch(bare, batch_size):
    found = dpo.with_reference(CONFIG, MODEL, REFERENCE, bare, batch_size=batch_size)
    assert found.reference_log_probability is not None
    expected = likelihood(REFERENCE, bare)
    np.testing.assert_allclose(found.reference_log_probability, expected, atol=1e-5)
    assert found.tokens is bare.tokens


def test_the_trunk_that_lora_shares_is_the_reference_that_was_computed_before(bare):
    params = random_params(LORA)
    lora = replace(CONFIG, optimizer=replace(tiny.FAST, trainable="lora"))
    beside = dpo.with_reference(CONFIG, LORA, adapters.trunk(params), bare)
    shared = gradient_of_mean(lora, LORA, params, bare)
    computed = gradient_of_mean(lora, LORA, params, beside)
    assert_close(shared, computed, atol=1e-6)
    # The policy is not its trunk: there is something to compare.
    assert abs(float(computed[1]["reward_margin"].mean)) > 1e-3


def test_step_widens_the_margin_of_what_was_chosen(pairs):
    chosen_first = replace(pairs, score=None)
    algorithm = dpo.make(CONFIG, MODEL)
    state = dpo.start(CONFIG, PARAMS, fast_key(0))
    step = jax.jit(algorithm.step)
    history = []
    for seed in range(12):
        state, metrics = step(fast_key(seed), state, chosen_first)
        history.append({name: float(mean.mean) for name, mean in metrics.items()})
    first, last = history[0], history[-1]
    assert last["reward_margin"] > first["reward_margin"] + 1
    assert last["accuracy"] == 1
    assert last["loss"] < first["loss"]
    assert int(state.train.step) == 12


def test_next_batch_takes_every_pair_once_an_epoch(pairs):
    config = replace(CONFIG, batch_size=2)
    state = dpo.start(config, {"transformer": {"weight": jnp.zeros(2)}}, fast_key(0))
    numbered = replace(pairs, margin=jnp.arange(4.0))
    seen = []
    for step in range(2):
        now = replace(state, train=replace(state.train, step=jnp.int32(step)))
        seen += np.asarray(next_batch(now, config.batch_size, numbered).margin).tolist()
    assert sorted(seen) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; it must be at least 1"),
        (
            {"num_micro_batches": 3},
            "batch_size is 4; it must be a multiple of num_micro_batches, 3",
        ),
        (
            {"loss": "rlhf"},
            "loss is 'rlhf'; it must be one of 'dpo', 'ipo', 'kto', 'simpo', 'orpo'",
        ),
        ({"beta": 0.0}, "beta is 0.0; it must be greater than 0"),
        (
            {"label_smoothing": 0.5},
            "label_smoothing is 0.5; it must be at least 0 and less than 0.5",
        ),
        ({"simpo_margin": -1.0}, "simpo_margin is -1.0; it must be at least 0"),
        ({"chunk_size": 0}, "chunk_size is 0; it must be at least 1"),
        (
            {"optimizer": replace(tiny.FAST, trainable="heads")},
            (
                "optimizer.trainable is heads; preferences have no values to learn from: "
                "train all, adapter or lora"
            ),
        ),
    ],
)
def test_make_names_the_setting_that_is_out_of_range(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dpo.make(replace(CONFIG, **changes), MODEL)


def test_pairs_without_a_reference_are_refused_where_the_trunk_learns(bare):
    message = (
        "pairs.reference_log_probability is None; add them by with_reference, or train adapter or "
        "lora, beside a trunk that stays"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dpo.gradient_of_mean(CONFIG, MODEL, PARAMS, bare)


def test_groups_that_are_no_pairs_are_refused():
    three = tiny.random_responses(num_samples=3)
    message = "pairs have 3 responses to a prompt; give 2"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dpo.gradient_of_mean(CONFIG, MODEL, PARAMS, three)
