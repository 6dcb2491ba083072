"""Intervals against enumeration, SciPy and their coverage; pass@k against every subset."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import scipy.stats

from jaxrl_llm.lm import scores


@pytest.mark.parametrize("law", ["exponential", "bernoulli", "gold"])
def test_bootstrap_interval_matches_scipy(law):
    """The same interval with other resamples: ends agree within 4% of the width."""
    random = np.random.default_rng(0)
    values = {
        "exponential": random.exponential(size=40),
        "bernoulli": (random.random(40) < 0.85).astype(float),
        "gold": np.minimum(random.exponential(size=40), 1.0),
    }[law]
    expected = scipy.stats.bootstrap(
        (values,), np.mean, method="BCa", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    actual = scores.bootstrap_interval(values, num_resamples=20_000)
    # Means of coin flips are multiples of 1 / 40, and so are the ends.
    tolerance = max(0.04 * (expected.high - expected.low), 0.0251 * (law == "bernoulli"))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_bootstrap_interval_matches_every_resample_of_a_few_values():
    """n = 4 has 256 resamples: BCa from their exact law, in float64."""
    values = np.array([0.0, 0.31, 0.47, 1.9])
    means = np.array([np.mean(draw) for draw in itertools.product(values, repeat=4)])
    normal = scipy.stats.norm()
    centre = values.mean()
    tie = np.isclose(means, centre)
    bias = normal.ppf(np.mean(np.where(tie, 0.5, means < centre)))
    # The acceleration as the jackknife has it.
    jackknife = np.array([np.delete(values, i).mean() for i in range(4)])
    gap = jackknife.mean() - jackknife
    acceleration = (gap**3).sum() / (6 * (gap**2).sum() ** 1.5)
    shifted = bias + normal.ppf([0.1, 0.9])
    levels = normal.cdf(bias + shifted / (1 - acceleration * shifted))
    expected = np.quantile(means, levels, method="inverted_cdf")
    actual = scores.bootstrap_interval(values, confidence=0.8, num_resamples=20_000)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    """500 data sets of 200 from a skewed law: the count is binomial, within 3 deviations."""
    data = np.random.default_rng(2).exponential(size=(500, 200))
    interval = partial(scores.bootstrap_interval, confidence=0.9, num_resamples=400)
    low, high = np.transpose([interval(row, seed=seed) for seed, row in enumerate(data)])
    covered = np.mean((low <= 1) & (high >= 1))
    assert covered == pytest.approx(0.9, abs=3 * math.sqrt(0.9 * 0.1 / 500))


def test_bootstrap_interval_follows_its_values():
    """Shifted and scaled with them, and mirrored when they are."""
    values = np.random.default_rng(3).exponential(size=25)
    interval = partial(scores.bootstrap_interval, num_resamples=500)
    low, high = interval(values)
    np.testing.assert_allclose(interval(4 * values - 2), (4 * low - 2, 4 * high - 2), rtol=1e-12)
    np.testing.assert_allclose(interval(-values), (-high, -low), rtol=1e-12)


def test_bootstrap_interval_stays_in_the_range_of_the_values():
    values = np.array([1.0] * 19 + [0.0])
    low, high = scores.bootstrap_interval(values, confidence=0.999)
    assert 0 <= low < 0.95 < high <= 1
    assert scores.bootstrap_interval(values > 0, confidence=0.999) == (low, high)
    assert scores.bootstrap_interval(np.full(9, 0.5)) == (0.5, 0.5)
    assert np.isfinite(scores.bootstrap_interval([0.1] * 30)).all()


def test_bootstrap_interval_does_not_depend_on_how_much_it_holds(monkeypatch):
    values = np.random.default_rng(8).random(11)
    whole = scores.bootstrap_interval(values, num_resamples=101)
    for size in (1, 50):
        monkeypatch.setattr(scores, "_DRAWS_AT_A_TIME", size)
        assert scores.bootstrap_interval(values, num_resamples=101) == pytest.approx(whole)


def test_bootstrap_interval_refuses_what_has_no_interval():
    for values in (np.zeros(1), np.zeros((2, 3))):
        with pytest.raises(ValueError, match=r"values has shape .*; it must be \[n\]"):
            scores.bootstrap_interval(values)
    with pytest.raises(ValueError, match=r"values\[1\] is nan; it must be finite"):
        scores.bootstrap_interval([0.5, math.nan, 1.0])
    for confidence in (0, 1, math.nan):
        with pytest.raises(ValueError, match=r"confidence is .*; it must be between 0 and 1"):
            scores.bootstrap_interval(np.zeros(3), confidence=confidence)
    with pytest.raises(ValueError, match="num_resamples is 0"):
        scores.bootstrap_interval(np.zeros(3), num_resamples=0)


def test_mean_with_interval_is_the_interval_of_its_seed():
    values = np.random.default_rng(7).random(30)
    first = scores.mean_with_interval(values, num_resamples=300, seed=1)
    assert first == scores.mean_with_interval(values.tolist(), num_resamples=300, seed=1)
    assert first != scores.mean_with_interval(values, num_resamples=300, seed=2)
    assert first.low < first.mean == values.mean() < first.high
    assert first[1:] == scores.bootstrap_interval(values, num_resamples=300, seed=1)
    assert all(type(number) is float for number in first)


def test_wilson_interval_solves_the_score_equation():
    successes, trials = np.meshgrid([0, 1, 7, 20], [20, 400])
    low, high = scores.wilson_interval(successes, trials, confidence=0.9)
    z = scipy.stats.norm.ppf(0.95)
    for end in (low, high):
        square = (successes / trials - end) ** 2
        np.testing.assert_allclose(square, z**2 * end * (1 - end) / trials, rtol=1e-9, atol=1e-16)
    assert (low[0] <= successes[0] / 20).all()
    assert (high[0] >= successes[0] / 20).all()
    assert low[0, 0] == 0 < high[0, 0]
    assert low[0, 3] < 1 == high[0, 3]


def test_wilson_interval_covers_the_proportion_by_exact_sums():
    counts = np.arange(101)
    low, high = scores.wilson_interval(counts, 100)
    shares = np.linspace(0.05, 0.95, 181)
    law = scipy.stats.binom.pmf(counts, 100, shares[:, None])
    covered = (law * ((low <= shares[:, None]) & (shares[:, None] <= high))).sum(-1)
    assert covered.mean() == pytest.approx(0.95, abs=0.005)
    assert covered.min() > 0.92


def test_wilson_interval_names_the_wrong_count():
    with pytest.raises(ValueError, match=r"num_successes\[1\] is 6; it must be in \[0, num_tri"):
        scores.wilson_interval([5, 6], 5)
    with pytest.raises(ValueError, match=r"num_trials is 0; it must be at least 1"):
        scores.wilson_interval(0, 0)


def test_exact_match_compares_what_is_normalised():
    predictions, references = [" Yes", "no\n", "4.0", ""], ["yes", "no", "4", ""]
    assert scores.exact_match(predictions, references).tolist() == [False, True, False, True]
    folded = scores.exact_match(
        predictions, references, normalise=lambda text: text.strip().casefold()
    )
    assert folded.tolist() == [True, True, False, True]
    assert scores.exact_match(["4.0"], ["4"], normalise=float).tolist() == [True]
    assert scores.exact_match([], []).shape == (0,)
    with pytest.raises(ValueError, match="predictions has 2 answers and references 1"):
        scores.exact_match(["a", "b"], ["a"])


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_pass_at_k_matches_every_subset(num_samples):
    for k in range(1, num_samples + 1):
        correct = np.arange(num_samples + 1)
        expected = [
            float(
                np.mean([min(draw) < c for draw in itertools.combinations(range(num_samples), k)])
            )
            for c in correct
        ]
        actual = scores.pass_at_k(num_samples, correct, k)
        np.testing.assert_allclose(actual, expected, atol=1e-14)
        assert actual[0] == 0
        assert actual[-1] == 1


def test_pass_at_k_is_exact_where_factorials_overflow():
    samples, correct, k = 10_000, np.array([0, 1, 3, 5_000, 9_999]), 100
    expected = [
        1 - math.comb(samples - int(c), k) / math.comb(samples, k) for c in correct.tolist()
    ]
    np.testing.assert_allclose(scores.pass_at_k(samples, correct, k), expected, atol=1e-13)
    np.testing.assert_allclose(scores.pass_at_k([3, 9], [1, 1], 1), [1 / 3, 1 / 9], rtol=1e-14)
    assert scores.pass_at_k(200, 10, 1).shape == ()


def test_pass_at_k_is_unbiased():
    """Its mean over the law of c is the chance that k independent samples are not all wrong."""
    chance, samples, k = 0.3, 9, 4
    counts = np.arange(samples + 1)
    law = scipy.stats.binom.pmf(counts, samples, chance)
    np.testing.assert_allclose(
        law @ scores.pass_at_k(samples, counts, k), 1 - (1 - chance) ** k, rtol=1e-12
    )


def test_pass_at_k_names_the_wrong_count():
    with pytest.raises(ValueError, match=r"num_samples\[1\] is 4; it must be at least 5"):
        scores.pass_at_k([5, 4], 1, 5)
    for wrong in (-1, 6):
        with pytest.raises(ValueError, match=rf"num_correct is {wrong}; it must be in \[0, num_s"):
            scores.pass_at_k(5, wrong, 2)
    with pytest.raises(ValueError, match="k is 0; it must be at least 1"):
        scores.pass_at_k(5, 1, 0)
