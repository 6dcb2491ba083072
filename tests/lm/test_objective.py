"""Objectives of several criteria: a sum, an order of priorities, a constraint met exactly."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm import objective

RANDOM = np.random.default_rng(0)
SCORES = jnp.asarray(RANDOM.normal(size=(3, 4, 2)), jnp.float32)
# A bandit: a useful and dangerous answer, and a safe one. Criteria are reward and safety.
OUTCOMES = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])


def test_weighted_is_the_sum_of_weighted_scores():
    mix = objective.weighted((0.5, -2.0))
    total, state, metrics = jax.jit(mix.combine)(mix.init(), SCORES)
    np.testing.assert_allclose(total, 0.5 * SCORES[..., 0] - 2 * SCORES[..., 1], rtol=1e-5)
    assert jax.tree.leaves(state) == []
    assert metrics == {}


def test_lexicographic_ranks_by_the_first_shortfall_then_by_its_size():
    thresholds = (0.5, -1.0)
    levels = (-1e6, -3.0, -1.0, 0.0, 0.5, 2.0, 1e6)
    scores = np.array(list(itertools.product(levels, repeat=3)), np.float32)
    mix = objective.lexicographic(thresholds)
    total = np.asarray(jax.jit(mix.combine)(mix.init(), scores[None])[0])[0]

    def rank(row: Any) -> tuple[float, ...]:
        """What counts, in the order in which it counts; tuples compare lexicographically."""
        for index, threshold in enumerate(thresholds):
            if row[index] < threshold:
                return (index, row[index])
        return (len(thresholds), row[-1])

    order = sorted(range(len(scores)), key=lambda index: rank(scores[index]))
    for worse, better in itertools.pairwise(order):
        if rank(scores[worse]) == rank(scores[better]):
            assert total[worse] == total[better]
        else:
            assert total[worse] < total[better], (scores[worse], scores[better])


def test_lexicographic_of_one_criterion_keeps_its_order():
    scores = np.sort(RANDOM.normal(0, 10, 20)).astype(np.float32)
    mix = objective.lexicographic(())
    total = np.asarray(mix.combine((), jnp.asarray(scores)[None, :, None])[0])[0]
    assert (np.diff(total) > 0).all()
    assert total.min() >= 0
    assert total.max() <= 1


@pytest.mark.parametrize("keep_scale", [True, False])
def test_constrained_total_and_multiplier_follow_their_equations(keep_scale):
    mix = objective.constrained(
        (1.0, 0.5), 1, at_least=0.3, rate=0.2, initial=2.0, keep_scale=keep_scale
    )
    total, multiplier, metrics = jax.jit(mix.combine)(mix.init(), SCORES)
    reward, safety = np.moveaxis(np.asarray(SCORES), -1, 0)
    expected = reward + 0.5 * safety + 2 * (safety - 0.3)
    np.testing.assert_allclose(total, expected / (3 if keep_scale else 1), rtol=1e-5)
    np.testing.assert_allclose(multiplier, 2 + 0.2 * (0.3 - safety.mean()), rtol=1e-5)
    means = {name: float(metric.mean) for name, metric in metrics.items()}
    held = float(safety.mean())
    expected_means = {"multiplier": 2, "constraint": held, "violation": max(0.3 - held, 0)}
    assert means == pytest.approx(expected_means, rel=1e-5)


def test_constrained_multiplier_stays_between_0_and_the_maximum():
    mix = objective.constrained((1.0, 0.0), 1, at_least=0.5, rate=1e3, maximum=7.0)
    _, low, _ = mix.combine(mix.init(), jnp.ones((1, 1, 2)))
    _, high, _ = mix.combine(low, jnp.zeros((1, 1, 2)))
    assert (low, high) == (0, 7)


@pytest.mark.parametrize("share", [0.7, 0.95])
@pytest.mark.parametrize("keep_scale", [True, False])
def test_constrained_finds_the_multiplier_and_the_optimum_of_a_softmax_bandit(share, keep_scale):
    # max_pi E_pi[total] + t H(pi) is pi = softmax(total / t), here P(safe) = sigma(gap / t), with
    # the gap (lambda - 1), divided by (lambda + 1) where the scale is kept. It is `share` at:
    t = 0.2
    logit = t * math.log(share / (1 - share))
    expected = (1 + logit) / (1 - logit) if keep_scale else 1 + logit
    mix = objective.constrained(
        (1.0, 0.0), 1, at_least=share, rate=0.5, keep_scale=keep_scale, maximum=1e3
    )

    def iterate(multiplier: Any, _: Any) -> tuple[Any, Any]:
        total = mix.combine(multiplier, OUTCOMES)[0]
        safe = jax.nn.softmax(total[0] / t)[1]
        # The scores of a population of answers are exactly their expectation.
        expectation = jnp.stack([1 - safe, safe]).reshape(1, 1, 2)
        return mix.combine(multiplier, expectation)[1], safe

    multiplier, safe = jax.jit(lambda: jax.lax.scan(iterate, mix.init(), None, 5000))()
    assert safe[0] < 0.01
    np.testing.assert_allclose(multiplier, expected, rtol=1e-3)
    np.testing.assert_allclose(safe[-1], share, atol=1e-4)


def test_constrained_leaves_a_constraint_that_is_slack_alone():
    mix = objective.constrained((1.0, 0.0), 1, at_least=0.2, initial=0.5)
    state, total = mix.init(), jnp.nan
    for _ in range(20):
        total, state, _ = mix.combine(state, jnp.full((1, 1, 2), 0.8))
    assert state == 0
    np.testing.assert_allclose(total, 0.8, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objective.weighted(()), "weights is empty; give one a criterion"),
        (lambda: objective.weighted((1, math.nan)), r"weights\[1\] is nan; it must be finite"),
        (
            lambda: objective.lexicographic((math.inf,)),
            r"thresholds\[0\] is inf; it must be finite",
        ),
        (
            lambda: objective.constrained((1.0,), 1, at_least=0.0),
            r"criterion is 1; it must be in \[0, 0\]",
        ),
        (
            lambda: objective.constrained((1.0,), 0, at_least=0.0, rate=0),
            "rate is 0; it must be greater than 0",
        ),
        (
            lambda: objective.weighted((1.0,)).combine((), SCORES),
            "weights has 1 numbers; these criteria need 2",
        ),
        (
            lambda: objective.lexicographic((1.0, 2.0)).combine((), SCORES),
            "thresholds has 2 numbers; these criteria need 1",
        ),
    ],
)
def test_mixes_refuse_what_they_cannot_mean(make, message):
    with pytest.raises(ValueError, match=message):
        make()
