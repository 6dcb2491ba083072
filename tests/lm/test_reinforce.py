"""REINFORCE: returns-to-go, baselines and loss beside their formulas, and what it learns."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm import policy_step, reinforce
from jaxrl_llm.lm.accumulation import gradient_of_sum
from jaxrl_llm.lm.likelihood import response_likelihood
from jaxrl_llm.nn import adapters
from jaxrl_llm.types import Mean
from tests.lm.policy_learning import (
    FAST,
    PARAMS,
    POLICY,
    REWARD,
    ROLLOUT,
    UPDATE,
    random_responses,
    task,
)

# It compiles whole iterations.
pytestmark = pytest.mark.slow

BETA = 0.02
CONFIG = reinforce.Config(
    num_iterations=12,
    rollout=ROLLOUT,
    update=policy_step.Config(optimizer=FAST),
    kl_coefficient=BETA,
    baseline_decay=0.5,
)
ALGORITHM = reinforce.make(CONFIG, POLICY, REWARD)
STEP = jax.jit(ALGORITHM.step)
RESPONSES: Any = random_responses()
MASK = np.asarray(RESPONSES.response_mask)


def average(total: float, weight: float) -> Mean:
    return Mean(total=jnp.float32(total), weight=jnp.float32(weight))


def test_returns_to_go_equal_the_naive_sums():
    result = np.asarray(reinforce.returns_to_go(CONFIG, RESPONSES))
    kl = np.asarray(RESPONSES.log_probability - RESPONSES.reference_log_probability)
    for row in np.ndindex(MASK.shape[:2]):
        for t in range(MASK.shape[-1]):
            rest = sum(kl[*row, s] for s in range(t, MASK.shape[-1]) if MASK[*row, s])
            expected = RESPONSES.score[row] - BETA * rest if MASK[*row, t] else 0
            assert result[*row, t] == pytest.approx(float(expected), abs=1e-5)


def test_baseline_is_what_the_configuration_says():
    def of(name, **options):
        config = replace(CONFIG, baseline=name, **options)
        return np.asarray(reinforce.baseline(config, RESPONSES, average(6, 4)))

    assert (of("none") == 0).all()
    assert (of("constant", constant_baseline=0.7) == np.float32(0.7)).all()
    assert (of("moving_average") == 1.5).all()
    np.testing.assert_array_equal(of("value"), RESPONSES.value)
    assert of("moving_average").shape == MASK.shape


def test_next_average_forgets_by_the_decay():
    """Of whole responses, (0.5 * 6 + their sum) / (0.5 * 4 + 8)."""
    return_ = reinforce.returns_to_go(CONFIG, RESPONSES)
    result = reinforce.next_average(CONFIG, average(6, 4), return_)
    whole = np.asarray(return_)[..., 0]
    assert float(result.mean) == pytest.approx((3 + whole.sum()) / (2 + 8), rel=1e-5)


@pytest.mark.parametrize("baseline", ["moving_average", "value"])
def test_loss_sums_over_a_response_and_is_the_mean_over_responses(baseline):
    config = replace(CONFIG, baseline=baseline, entropy_coefficient=0.2)
    return_ = reinforce.returns_to_go(config, RESPONSES)
    compared = reinforce.baseline(config, RESPONSES, average(6, 4))
    batch = reinforce.Batch(
        responses=RESPONSES, return_=return_, baseline=compared, weight=RESPONSES.response_mask
    )
    total, metrics = reinforce.loss(config, POLICY, PARAMS, reinforce.weigh(batch))
    now = response_likelihood(POLICY, PARAMS, RESPONSES)
    new, entropy, value = (np.asarray(leaf, np.float64) for leaf in now)
    each = -(np.asarray(return_) - np.asarray(compared)) * new - 0.2 * entropy
    if baseline == "value":
        each = each + 0.1 * (value - np.asarray(return_)) ** 2 / 2
    num_responses = MASK.shape[0] * MASK.shape[1]
    assert float(total) == pytest.approx((each * MASK).sum() / num_responses, rel=1e-5)
    assert ("value_loss" in metrics) == (baseline == "value")
    assert int(metrics["policy_loss"].weight) == MASK.sum()


def test_loss_has_the_gradient_of_the_score_function():
    """-(1 / R) sum (G - b) grad log pi, in one part or in four."""
    return_ = reinforce.returns_to_go(CONFIG, RESPONSES)
    compared = reinforce.baseline(CONFIG, RESPONSES, average(6, 4))
    batch = reinforce.Batch(
        responses=RESPONSES, return_=return_, baseline=compared, weight=RESPONSES.response_mask
    )

    def surrogate(params):
        new = response_likelihood(POLICY, params, RESPONSES).log_probability
        return -jnp.sum(jnp.where(MASK, (return_ - compared) * new, 0)) / 8

    @jax.jit
    def both(params):
        loss = partial(reinforce.loss, CONFIG, POLICY)
        parts, _ = gradient_of_sum(loss, params, reinforce.weigh(batch), 4)
        return parts, jax.grad(surrogate)(params)

    chex.assert_trees_all_close(*both(PARAMS), rtol=1e-4, atol=1e-6)


# Whole iterations


@pytest.fixture(scope="module")
def run():
    """The states and the metrics of all iterations."""
    state = ALGORITHM.init(jax.random.key(0))
    data = task(reference=state.train.params)
    states, metrics = [state], []
    for iteration in range(CONFIG.num_iterations):
        state, seen = STEP(jax.random.fold_in(jax.random.key(1), iteration), state, data)
        states.append(state)
        metrics.append(seen)
    return states, metrics


def test_step_learns_to_write_what_is_rewarded(run):
    _, metrics = run
    scores = [float(each["score"].mean) for each in metrics]
    assert scores[0] < 0.3
    assert np.mean(scores[-3:]) > 0.9


def test_step_compares_with_earlier_iterations_alone(run):
    """The first return is compared with 0, and every later one with those before it."""
    _, metrics = run
    total = weight = expected = 0.0
    for each in metrics[:4]:
        expected = total / weight if weight else 0.0
        assert float(each["baseline"].mean) == pytest.approx(expected, abs=1e-4)
        objective = float(each["score"].mean) - BETA * float(each["kl"].mean)
        total, weight = 0.5 * total + 16 * objective, 0.5 * weight + 16
    assert abs(expected) > 0.1


def test_step_learns_from_the_policy_that_drew(run):
    _, metrics = run
    for each in metrics:
        assert float(each["policy_kl"].mean) == pytest.approx(0, abs=1e-6)


def test_step_repeats_itself_with_the_same_key(run):
    states, metrics = run
    data = task(reference=states[0].train.params)
    again = STEP(jax.random.fold_in(jax.random.key(1), 0), states[0], data)
    chex.assert_trees_all_equal(again, (states[1], metrics[0]))


# Refusals


def refused(pattern, function, *arguments):
    with pytest.raises(ValueError, match=re.escape(pattern)):
        function(*arguments)


def test_validate_refuses_steps_on_another_policy():
    CONFIG.validate()
    message = (
        "update takes 4 steps an iteration; the gradient is that of the policy that drew the "
        "responses, so take one: num_epochs 1 and num_minibatches 1, or use ppo"
    )
    refused(message, replace(CONFIG, update=UPDATE).validate)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_iterations", 0),
        ("kl_coefficient", -1.0),
        ("value_coefficient", -1.0),
        ("entropy_coefficient", -1.0),
        ("baseline", "mean"),
        ("constant_baseline", np.inf),
        ("baseline_decay", 1.5),
    ],
)
def test_validate_names_the_field(field, value):
    refused(f"{field} is {value!r}; it must be", replace(CONFIG, **{field: value}).validate)


def test_a_value_baseline_needs_a_value_head():
    config = replace(CONFIG, baseline="value")
    trunk = adapters.trunk(PARAMS)
    refused(
        "baseline is 'value' and model.value_width is None; give the model a value head",
        reinforce.make, config, POLICY.clone(value_width=None), REWARD,
    )  # fmt: skip
    key = jax.random.key(0)
    refused("params have no value_head;", reinforce.start, config, trunk, key, REWARD)
    reinforce.start(CONFIG, trunk, key, REWARD)
