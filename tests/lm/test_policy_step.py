"""Epochs of minibatches of a toy loss, beside one gradient step after another."""

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

from jaxrl_llm.lm import optimizer, policy_step
from jaxrl_llm.numerics import random_permutation
from jaxrl_llm.types import Mean

pytestmark = pytest.mark.slow

NUM_GROUPS, NUM_TOKENS, NUM_ITERATIONS = 8, 3, 5
CONFIG = policy_step.Config(
    num_epochs=2, num_minibatches=2, optimizer=replace(optimizer.ADAM, learning_rate=0.1)
)


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    """Regression on ragged rows: `x` and `y`, which tokens there are, and their weights."""
    random = np.random.default_rng(0)
    mask = np.arange(NUM_TOKENS) < random.integers(1, NUM_TOKENS + 1, (NUM_GROUPS, 1))
    x, y = random.normal(size=(2, NUM_GROUPS, NUM_TOKENS))
    rows = {"x": x, "y": y, "weight": np.zeros_like(x), "row": np.arange(NUM_GROUPS, dtype=float)}
    return {"mask": jnp.asarray(mask), **jax.tree.map(partial(jnp.asarray, dtype="f"), rows)}


def loss(params, rows):
    error = jnp.square(params["slope"] * rows["x"] + params["offset"] - rows["y"])
    metrics = {
        "error": Mean.of(error, rows["mask"]),
        "policy_kl": Mean.of(jnp.full(error.shape, jnp.square(params["slope"])), rows["mask"]),
        # Which rows a step saw: digits of a number in base 2.
        "rows": Mean(total=jnp.sum(2.0 ** rows["row"]), weight=jnp.float32(1)),
    }
    return jnp.sum(rows["weight"] * error), metrics


def weigh(rows):
    return {**rows, "weight": rows["mask"] / jnp.sum(rows["mask"])}


def start(config=CONFIG):
    params = {"slope": jnp.float32(0.0), "offset": jnp.float32(0.5)}
    return optimizer.start(config.optimizer, NUM_ITERATIONS * config.steps_per_iteration, params)


@partial(jax.jit, static_argnums=0)
def fit(config, key, train, batch):
    return policy_step.fit(config, NUM_ITERATIONS, loss, weigh, key, train, batch)


def by_hand(config, train, batch, minibatches):
    """Steps on the means over given minibatches, each a list of rows."""
    num_steps = NUM_ITERATIONS * config.steps_per_iteration
    norms = []
    for rows in minibatches:
        part = jax.tree.map(lambda leaf, rows=rows: leaf[jnp.asarray(rows)], batch)

        def mean(params, part=part):
            error = jnp.square(params["slope"] * part["x"] + params["offset"] - part["y"])
            return jnp.sum(jnp.where(part["mask"], error, 0)) / jnp.sum(part["mask"])

        train, norm = optimizer.descend(
            config.optimizer, num_steps, train, jax.grad(mean)(train.params)
        )
        norms.append(float(norm.total))
    return train, norms


def minibatches(config, key):
    """The rows of every step, `config.num_minibatches` shuffled parts a pass."""
    keys = jax.random.split(key, config.num_epochs)
    order = jax.vmap(partial(random_permutation, n=NUM_GROUPS))(keys)
    return np.asarray(order).reshape(config.steps_per_iteration, -1)


def test_fit_of_one_step_descends_the_mean_over_all_tokens(batch):
    config = replace(CONFIG, num_epochs=1, num_minibatches=1)
    train, metrics = fit(config, jax.random.key(0), start(config), batch)
    expected, norms = by_hand(config, start(config), batch, [np.arange(NUM_GROUPS)])
    chex.assert_trees_all_close(train, expected, rtol=1e-5)
    assert float(metrics["gradient_norm"].mean) == pytest.approx(norms[0], rel=1e-5)
    assert int(metrics["error"].weight) == int(batch["mask"].sum())


@pytest.mark.slow
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_fit_equals_one_step_after_another(batch, num_micro_batches):
    """Each on the mean over its own minibatch, whatever the parts that goes through in."""
    config = replace(CONFIG, num_micro_batches=num_micro_batches)
    train, metrics = fit(config, jax.random.key(1), start(config), batch)
    rows = minibatches(config, jax.random.key(1))
    expected, norms = by_hand(config, start(config), batch, rows)
    chex.assert_trees_all_close(train, expected, rtol=1e-4)
    assert float(metrics["gradient_norm"].mean) == pytest.approx(np.mean(norms), rel=1e-4)
    assert int(train.step) == 4
    # Every row once a pass: the digits of 255 twice.
    assert float(metrics["rows"].total) == 2 * 255
    assert int(metrics["error"].weight) == 2 * int(batch["mask"].sum())


def test_fit_shuffles_anew_for_every_pass_and_key(batch):
    config = replace(CONFIG, num_epochs=3)
    orders = {
        tuple(part)
        for key in (2, 3)
        for part in minibatches(config, jax.random.key(key)).reshape(3, -1).tolist()
    }
    assert len(orders) == 6
    results = [
        fit(CONFIG, jax.random.key(key), start(), batch)[0].params["slope"] for key in (2, 2, 3)
    ]
    assert results[0] == results[1] != results[2]


def test_fit_skips_every_step_from_the_first_beyond_the_target(batch):
    """The toy's KL is slope², 0 at the first step and 0.01 at the next, by Adam at rate 0.1."""
    config = replace(CONFIG, num_epochs=4, target_kl=1e-3)
    train, metrics = fit(config, jax.random.key(4), start(config), batch)
    rows = minibatches(config, jax.random.key(4))
    expected, _ = by_hand(config, start(config), batch, rows[:1])
    chex.assert_trees_all_close(train, expected, rtol=1e-5)  # optimiser and step number frozen too
    assert int(train.step) == 1
    assert float(metrics["stopped"].total) == 7
    generous = replace(config, target_kl=1e3)
    train, metrics = fit(generous, jax.random.key(4), start(config), batch)
    free, _ = fit(replace(config, target_kl=None), jax.random.key(4), start(config), batch)
    chex.assert_trees_all_close(train, free, rtol=1e-6)  # two programs round differently
    assert float(metrics["stopped"].total) == 0


def test_config_refuses_portions_that_do_not_divide():
    config = replace(CONFIG, num_minibatches=2, num_micro_batches=3)
    config.check_divides(12)
    expected = "num_prompts is 8; it must be a multiple of num_minibatches × num_micro_batches = 6"
    with pytest.raises(ValueError, match=re.escape(expected)):
        config.check_divides(8)


def test_config_refuses_a_reference_that_learns():
    params = {"slope": jnp.zeros(1)}
    CONFIG.check_reference(params)
    replace(CONFIG, optimizer=replace(optimizer.ADAM, trainable="lora")).check_reference(None)
    expected = (
        "task.reference is None and trainable is 'all', so the reference would learn too; give "
        "make_task the reference's params, or train adapter or lora"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        CONFIG.check_reference(None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_epochs", 0), ("num_minibatches", 0), ("num_micro_batches", 0), ("target_kl", 0.0)],
)
def test_validate_names_the_field(field, value):
    CONFIG.validate()
    with pytest.raises(ValueError, match=f"^{field} is {value}; it must be"):
        replace(CONFIG, **{field: value}).validate()
    with pytest.raises(ValueError, match=r"^learning_rate is -1; it must be"):
        replace(CONFIG, optimizer=replace(optimizer.ADAM, learning_rate=-1)).validate()
