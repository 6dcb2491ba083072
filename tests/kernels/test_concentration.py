"""Intervals: what they cover, and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import concentration
from jaxrl_llm.kernels import off_policy_evaluation as ope
from tests.kernels.test_off_policy_evaluation import BEHAVIOUR, GAMMA, exact_q, simulate

SAMPLE = np.random.default_rng(0).exponential(size=40).astype(np.float32)


def mean_of(weight):
    return {"mean": jnp.dot(weight, SAMPLE) / jnp.sum(weight)}


def test_effective_sample_size_is_kishs():
    weight = np.random.default_rng(1).exponential(size=(3, 20))
    expected = weight.sum(1) ** 2 / (weight**2).sum(1)
    found = concentration.effective_sample_size(jnp.log(weight) + 500.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    count = jnp.arange(20.0)
    repeated = np.repeat(weight, np.arange(20), axis=1)
    found = concentration.effective_sample_size(jnp.log(weight), count)
    expected = repeated.sum(1) ** 2 / (repeated**2).sum(1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert concentration.effective_sample_size(jnp.full(4, -jnp.inf)) == 0


@pytest.mark.slow
def test_bootstrap_weights_are_multinomial():
    keys = jax.random.split(jax.random.key(0), 4000)
    weight = np.asarray(jax.vmap(lambda key: concentration.bootstrap_weights(key, 10))(keys))
    np.testing.assert_array_equal(weight.sum(1), 10)
    np.testing.assert_allclose(weight.mean(0), 1, atol=0.07)
    np.testing.assert_allclose(weight.var(0), 0.9, atol=0.1)
    np.testing.assert_allclose(np.cov(weight.T)[0, 1], -0.1, atol=0.07)


@pytest.mark.slow
def test_bootstrap_of_a_mean_has_its_standard_error():
    unit = jnp.arange(40)
    result = concentration.bootstrap(
        mean_of, jax.random.key(0), unit, num_units=40, num_resamples=2000
    )
    np.testing.assert_allclose(result.estimate["mean"], SAMPLE.mean(), rtol=1e-5)
    error = SAMPLE.std() / np.sqrt(40)
    np.testing.assert_allclose(result.resampled["mean"].std(), error, rtol=0.06)
    intervals = {
        method: concentration.bootstrap_interval(result, method=method)["mean"]
        for method in ("percentile", "basic")
    }
    low, high = np.quantile(result.resampled["mean"], [0.025, 0.975])
    np.testing.assert_allclose(intervals["percentile"], (low, high), rtol=1e-5)
    mirrored = 2 * SAMPLE.mean() - high, 2 * SAMPLE.mean() - low
    np.testing.assert_allclose(intervals["basic"], mirrored, rtol=1e-5)


def test_bootstrap_draws_whole_units():
    unit = jnp.array([0, 0, 1, 2, 2, 2])
    result = concentration.bootstrap(
        lambda weight: weight, jax.random.key(1), unit, num_units=3, num_resamples=50
    )
    weight = np.asarray(result.resampled)
    np.testing.assert_array_equal(weight[:, 0], weight[:, 1])
    np.testing.assert_array_equal(weight[:, 3], weight[:, 5])
    np.testing.assert_array_equal(weight[:, [0, 2, 3]].sum(1), 3)


def test_empirical_bernstein_interval_is_maurer_and_pontils():
    sample = np.random.default_rng(2).random(50).astype(np.float32) * 3 - 1
    found = concentration.empirical_bernstein_interval(sample, -1.0, 2.0)
    # Theorem 4 for [0, 1], at 2.5 % a side.
    unit, logarithm = (sample + 1) / 3, np.log(2 / 0.025)
    margin = np.sqrt(2 * unit.var(ddof=1) * logarithm / 50) + 7 * logarithm / (3 * 49)
    expected = 3 * (unit.mean() - margin) - 1, 3 * (unit.mean() + margin) - 1
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    few = concentration.empirical_bernstein_interval(sample[:3], -1.0, 2.0)
    assert tuple(map(float, few)) == (-1, 2)


def test_empirical_bernstein_interval_always_covers():
    sample = np.random.default_rng(3).random((2000, 30)) < 0.1
    low, high = jax.vmap(lambda row: concentration.empirical_bernstein_interval(row, 0.0, 1.0))(
        sample.astype(np.float32)
    )
    assert np.mean((low <= 0.1) & (high >= 0.1)) >= 0.95


@pytest.mark.slow
def test_bootstrap_intervals_of_every_estimator_cover_on_policy():
    """500 repetitions of 250 trajectories each, under the behaviour policy itself."""
    repetitions, num, num_resamples = 500, 250, 200
    behaviour, q = jnp.asarray(BEHAVIOUR), exact_q(BEHAVIOUR)
    exact = float(BEHAVIOUR[0] @ np.asarray(q)[0]) * (1 - (0.7 * GAMMA) ** 12)
    log = simulate(5, repetitions * num)
    # A model that is wrong by a quarter.
    evidence = ope.tabular_evidence(log, behaviour, behaviour, 0.75 * q, gamma=GAMMA)
    split = jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf.reshape(-1, repetitions, num), 1, 0), evidence
    )

    @jax.jit
    def intervals(evidence, key):
        result = concentration.bootstrap(
            lambda weight: ope.estimates(evidence, weight), key, jnp.arange(num),
            num_units=num, num_resamples=num_resamples,
        )  # fmt: skip
        return concentration.bootstrap_interval(result)

    keys = jax.random.split(jax.random.key(6), repetitions)
    covered = dict.fromkeys(ope.ESTIMATORS, 0)
    for row in range(repetitions):
        found = intervals(jax.tree.map(lambda leaf, row=row: leaf[row], split), keys[row])
        for name, (low, high) in found.items():
            covered[name] += bool(low <= exact <= high)
    rates = {name: count / repetitions for name, count in covered.items()}
    assert all(0.90 <= rate <= 0.98 for rate in rates.values()), rates
