"""Whole iterations of PPO on a tiny policy: what it learns, and what it leaves alone."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm import ppo, rollouts
from jaxrl_llm.lm.likelihood import exact_kl
from jaxrl_llm.nn import adapters
from tests.lm.policy_learning import (
    FAST,
    LORA_POLICY,
    PARAMS,
    POLICY,
    REWARD,
    ROLLOUT,
    UPDATE,
    prompts,
    random_responses,
    task,
)

# It compiles whole iterations.
pytestmark = pytest.mark.slow

CONFIG = ppo.Config(
    num_iterations=10,
    rollout=ROLLOUT,
    update=UPDATE,
    adaptive_kl_target=5.0,
    adaptive_kl_horizon=160,
)
ALGORITHM = ppo.make(CONFIG, POLICY, REWARD)
LORA_CONFIG = ppo.Config(
    num_iterations=3,
    rollout=ROLLOUT,
    update=replace(UPDATE, optimizer=replace(FAST, trainable="lora")),
    kl_in="loss",
    kl_estimator="exact",
    text_coefficient=0.1,
)
LORA_ALGORITHM = ppo.make(LORA_CONFIG, LORA_POLICY, REWARD)
STEP = jax.jit(ALGORITHM.step)


@pytest.fixture(scope="module")
def start() -> Any:
    return ALGORITHM.init(jax.random.key(0))


@pytest.fixture(scope="module")
def first(start):
    """What the first iteration makes of `start`, and its metrics."""
    return STEP(step_key(0), start, task(reference=start.train.params))


def step_key(iteration):
    return jax.random.fold_in(jax.random.key(7), iteration)


def test_step_learns_to_write_what_is_rewarded(start, first):
    data = task(reference=start.train.params)
    state, metrics = first
    scores = [float(metrics["score"].mean)]
    for iteration in range(1, CONFIG.num_iterations):
        state, metrics = STEP(step_key(iteration), state, data)
        scores.append(float(metrics["score"].mean))
    assert scores[0] < 0.3
    assert np.mean(scores[-3:]) > 0.9
    assert int(state.iteration) == 10
    assert int(state.train.step) == 40
    # Certain of 4 tokens of 6, it is 4 log 6 = 7.2 nats away; in the end it nearly is.
    assert 4 < float(metrics["kl"].mean) < 4 * np.log(6) + 0.5


def test_step_charges_the_kl_of_the_responses_it_drew(start, first):
    """The metric is the mean over responses of the sum of k1, and so is the coefficient's."""
    moved, _ = first
    data = task(reference=start.train.params)
    following, metrics = STEP(step_key(1), moved, data)
    collect_key = jax.random.split(step_key(1), 3)[0]
    seen = jax.jit(partial(rollouts.collect, ROLLOUT, POLICY, REWARD))(collect_key, moved, data)
    kl = np.asarray(rollouts.log_ratio_to_reference(seen.responses)).sum(-1)
    assert abs(kl.mean()) > 0.05
    assert float(metrics["kl"].mean) == pytest.approx(kl.mean(), rel=1e-4)
    assert int(metrics["kl"].weight) == ROLLOUT.num_responses
    change = 1 + np.clip(kl.mean() / 5 - 1, -0.2, 0.2) * 16 / 160
    assert float(metrics["kl_coefficient"].mean) == float(moved.controller)
    assert float(following.controller) == pytest.approx(float(moved.controller) * change, rel=1e-5)


def test_step_starts_at_the_reference(start, first):
    """No KL, a value of 0, and the coefficient falls by a fifth of 16 / 160."""
    moved, metrics = first
    assert float(metrics["kl"].mean) == pytest.approx(0, abs=1e-5)
    assert float(metrics["explained_variance"].mean) == pytest.approx(0, abs=1e-6)
    assert float(start.controller) == pytest.approx(0.05)
    assert float(moved.controller) == pytest.approx(0.05 * 0.98)


def test_step_repeats_itself_with_the_same_key_alone(start, first):
    data = task(reference=start.train.params)
    chex.assert_trees_all_equal(STEP(step_key(0), start, data), first)
    other, _ = STEP(step_key(1), start, data)
    tables = [state.train.params["transformer"]["wte"]["weight"] for state in (first[0], other)]
    assert (tables[0] != tables[1]).any()


def test_step_reports_a_reward_that_is_not_a_number(start):
    """The loop refuses it by this metric."""
    _, metrics = STEP(step_key(0), start, task(reference=start.train.params, scale=jnp.nan))
    assert np.isnan(metrics["score"].mean)
    assert np.isfinite(metrics["kl"].mean)


def test_step_tells_each_metric_of_an_iteration(first):
    _, metrics = first
    assert metrics.keys() == {
        "score", "kl", "response_length", "ended", "policy_loss", "value_loss", "entropy",
        "policy_kl", "clip_fraction", "gradient_norm", "kl_coefficient", "explained_variance",
    }  # fmt: skip
    chex.assert_tree_all_finite(metrics)
    num_tokens = float(metrics["response_length"].total)
    # Each of 2 epochs counts every token once.
    for name in ("policy_loss", "value_loss", "entropy", "policy_kl", "clip_fraction"):
        assert float(metrics[name].weight) == 2 * num_tokens


@pytest.mark.slow
def test_step_of_several_seeds_equals_each_alone():
    data = task(reference=PARAMS)

    def states():
        return jax.vmap(ALGORITHM.init)(jax.random.split(jax.random.key(0), 2))

    def keys():
        return jax.random.split(jax.random.key(1), 2)

    step = jax.jit(jax.vmap(ALGORITHM.step, in_axes=(0, 0, None)))
    together, metrics = step(keys(), states(), data)
    for seed in range(2):
        key, state = jax.tree.map(lambda leaf, seed=seed: leaf[seed], (keys(), states()))
        alone, seen = STEP(key, state, data)
        mine = jax.tree.map(lambda leaf, seed=seed: leaf[seed], (together.train.params, metrics))
        chex.assert_trees_all_close(mine, (alone.train.params, seen), rtol=1e-3, atol=1e-4)


# The price of the KL


def test_next_coefficient_follows_the_golden_sequence():
    """Five iterations of 100 responses at a target of 6 nats and a horizon of 1000."""
    config = replace(
        CONFIG,
        rollout=replace(ROLLOUT, num_prompts=50),
        adaptive_kl_target=6.0,
        adaptive_kl_horizon=1000,
    )
    coefficient, seen = jnp.float32(0.2), []
    for kl in (0.0, 5.4, 6.0, 6.6, 60.0):
        coefficient = ppo.next_coefficient(config, coefficient, jnp.float32(kl))
        seen.append(float(coefficient))
    golden = [0.196, 0.19404, 0.19404, 0.1959804, 0.199900008]
    np.testing.assert_allclose(seen, golden, rtol=1e-6)
    fixed = replace(config, adaptive_kl_target=None)
    assert float(ppo.next_coefficient(fixed, jnp.float32(0.2), jnp.float32(60))) == pytest.approx(
        0.2
    )


# Adapters


@pytest.fixture(scope="module")
def lora_run():
    """A start, what three iterations make of it, and the metrics of each."""
    fresh = LORA_POLICY.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = adapters.attach(fresh, adapters.trunk(PARAMS))
    start = ppo.start(LORA_CONFIG, params, jax.random.key(1), REWARD)
    real = prompts()
    text: Any = replace(real, response_mask=real.attention_mask)
    data = task(LORA_POLICY, reference=None, text=text)
    step = jax.jit(LORA_ALGORITHM.step)
    state, metrics = start, []
    for iteration in range(3):
        state, seen = step(step_key(iteration), state, data)
        metrics.append(seen)
    return start, state, metrics


def test_step_of_lora_leaves_the_trunk_alone(lora_run):
    start, end, _ = lora_run
    before, after = start.train.params, end.train.params
    chex.assert_trees_all_equal(adapters.trunk(after), adapters.trunk(before))
    labels = adapters.labels(before, "lora")
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert jax.tree.leaves(changed) == [label == "train" for label in jax.tree.leaves(labels)]


def test_step_of_lora_starts_at_the_reference_and_leaves_it(lora_run):
    start, end, metrics = lora_run
    assert float(metrics[0]["kl"].mean) == pytest.approx(0, abs=1e-5)
    assert abs(float(metrics[-1]["kl"].mean)) > 1e-3
    trunk = adapters.trunk(start.train.params)
    kl_of = jax.jit(partial(exact_kl, LORA_POLICY))
    at_start, at_end = (
        kl_of(state.train.params, trunk, random_responses()) for state in (start, end)
    )
    assert (np.asarray(at_start) == 0).all()  # exactly: they are the same arrays
    assert float(jnp.mean(at_end)) > 1e-3


def test_step_of_lora_learns_text_too(lora_run):
    _, _, metrics = lora_run
    # 2 epochs, 8 rows at random of 1 to 3 tokens; the first of a row has none before it.
    assert 0 < float(metrics[0]["text_loss"].weight) <= 2 * 8 * 2
    chex.assert_tree_all_finite(metrics)


# Refusals


def refusal(function, *arguments):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        function(*arguments)
    return str(error.value)


def test_make_refuses_what_cannot_learn():
    assert refusal(ppo.make, CONFIG, POLICY.clone(value_width=None), REWARD) == (
        "model.value_width is None; ppo needs a value head: give it a width"
    )
    odd = replace(CONFIG, update=replace(UPDATE, num_minibatches=3))
    assert refusal(ppo.make, odd, POLICY, REWARD).startswith("num_prompts is 8; it must be a")


def test_start_refuses_params_without_a_value_head():
    arguments = CONFIG, adapters.trunk(PARAMS), jax.random.key(0), REWARD
    assert refusal(ppo.start, *arguments) == (
        "params have no value_head; put what they have into drawn ones with adapters.attach"
    )


def test_step_refuses_a_reference_that_learns(start):
    message = refusal(ALGORITHM.step, step_key(0), start, task(reference=None))
    assert message.startswith("task.reference is None and trainable is 'all'")


def test_step_refuses_a_task_without_text(lora_run):
    data = task(LORA_POLICY, reference=None)
    message = refusal(LORA_ALGORITHM.step, step_key(0), lora_run[0], data)
    assert message.startswith("text_coefficient is 0.1 and the task has no text;")


def refused(**options):
    return refusal(replace(CONFIG, **options).validate)


def test_validate_refuses_what_would_do_nothing_or_bias():
    CONFIG.validate()
    assert refused(kl_in="loss") == (
        "kl_estimator is 'k1' and kl_in is 'loss'; the expected gradient of k1 is zero, so it "
        "would do nothing: choose k2, k3 or exact, or put it in the reward"
    )
    for estimator in ("k2", "k3", "exact"):
        replace(CONFIG, kl_in="loss", kl_estimator=estimator).validate()
        assert refused(kl_estimator=estimator) == (
            f"kl_estimator is '{estimator}' and kl_in is 'reward'; there all but k1 bias the "
            "policy's gradient: choose k1, or put it in the loss"
        )
    assert refused(adaptive_kl_target=6.0, adaptive_kl_horizon=3) == (
        "adaptive_kl_horizon is 3; with 16 responses an iteration it must be at least 4"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kl_coefficient", -0.1),
        ("kl_coefficient", math.nan),
        ("value_coefficient", -1.0),
        ("text_coefficient", -1.0),
        ("entropy_coefficient", math.inf),
        ("clip_epsilon", 0.0),
        ("clip_epsilon_high", 0.0),
        ("value_clip_epsilon", -0.1),
        ("score_clip", 0.0),
        ("dual_clip", 1.0),
        ("gamma", 1.1),
        ("gae_lambda", -0.1),
        ("kl_estimator", "k4"),
        ("kl_in", "prompt"),
        ("adaptive_kl_target", 0.0),
        ("num_iterations", 0),
    ],
)
def test_validate_names_the_field_in_one_line(field, value):
    message = refused(**{field: value})
    assert message.startswith(f"{field} is {value!r};")
    assert "\n" not in message
