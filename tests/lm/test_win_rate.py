"""Comparisons of two models on the same prompts: by hand, and by how often they cover the truth."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from jaxrl_llm.lm import scores

NUM_SIMULATIONS = 400
DEVIATION = math.sqrt(0.95 * 0.05 / NUM_SIMULATIONS)


def coverage(simulate, truth):
    """How often the interval that `simulate(random)` returns holds the truth."""
    random = np.random.default_rng(0)
    intervals = [simulate(random) for _ in range(NUM_SIMULATIONS)]
    return np.mean([interval.low <= truth <= interval.high for interval in intervals])


def test_win_rate_counts_ties_as_half():
    result = scores.win_rate([1.0, 0.5, 0.2, 0.9, 0.4], [0.0, 0.5, 0.3, 0.8, 0.1])
    assert (result.wins, result.losses) == pytest.approx((0.6, 0.2))
    assert result.ties == pytest.approx(0.2)
    assert result.mean == pytest.approx(0.7)
    assert 0 < result.low < 0.7 < result.high < 1
    assert all(type(number) is float for number in result)


def test_win_rate_meets_every_sample_of_the_opponent():
    random = np.random.default_rng(1)
    first, second = random.integers(4, size=(6, 3)), random.integers(4, size=(6, 5))
    counts = {1: 0, 0: 0, -1: 0}
    for ours, theirs in zip(first.tolist(), second.tolist(), strict=True):
        for one in ours:
            for other in theirs:
                counts[(one > other) - (one < other)] += 1
    result = scores.win_rate(first, second)
    shares = np.array([counts[1], counts[0], counts[-1]]) / 90
    np.testing.assert_allclose(result[3:], shares, atol=1e-12)
    assert result.mean == pytest.approx(shares[0] + shares[1] / 2)


def test_win_rate_of_single_untied_comparisons_is_wilson():
    for num_wins in (0, 1, 13, 20):
        won = np.arange(20) < num_wins
        expected = scores.wilson_interval(num_wins, 20, confidence=0.9)
        actual = scores.win_rate(won, 0.5 * np.ones(20), confidence=0.9)
        np.testing.assert_allclose(actual[1:3], expected, atol=1e-12)
        assert (actual.low > 0, actual.high < 1) == (num_wins > 0, num_wins < 20)


def test_win_rate_is_mirrored_by_its_opponent():
    random = np.random.default_rng(2)
    first, second = random.integers(3, size=(2, 30, 2))
    ours, theirs = scores.win_rate(first, second), scores.win_rate(second, first)
    assert ours.mean + theirs.mean == pytest.approx(1)
    assert (ours.low, ours.wins) == pytest.approx((1 - theirs.high, theirs.losses))


def test_win_rate_of_ties_alone_has_a_width():
    """Of n ties the rule of three does not rule out 3 / n wins, whose rate is 1 / 2 + 1.5 / n."""
    result = scores.win_rate(np.ones(50), np.ones(50))
    assert (result.mean, result.ties) == (0.5, 1.0)
    assert result.high - 0.5 == pytest.approx(1.5 / 50, rel=0.15)


def test_win_rate_ties_what_is_within_the_tolerance():
    assert scores.win_rate([0.3], [0.1 + 0.2]).ties == 1
    assert scores.win_rate([0.3], [0.1 + 0.2], tie_tolerance=0).losses == 1
    assert scores.win_rate([0.3, 0.9], [0.4, 0.4], tie_tolerance=0.2).wins == 0.5


@pytest.mark.parametrize(
    ("wins", "ties", "num_prompts"),
    [(0.65, 0.0, 60), (0.5, 0.3, 60), (0.3, 0.6, 200), (0.97, 0.0, 60)],
)
def test_win_rate_interval_covers_the_rate_with_ties(wins, ties, num_prompts):
    def simulate(random):
        drawn = random.random(num_prompts)
        return scores.win_rate((drawn < wins) * 1.0 - (drawn > wins + ties), np.zeros(num_prompts))

    assert coverage(simulate, wins + ties / 2) == pytest.approx(0.95, abs=4 * DEVIATION)


def test_win_rate_interval_covers_the_rate_with_samples_that_are_alike():
    """What is easy at one prompt is so for all its samples; pooled, they cover in 85% of cases."""
    effect, mean = 1.5, 0.4
    # The gap of two draws is normal with variance 2 at a prompt and effect^2 between them.
    truth = (1 + math.erf(mean / math.sqrt(2 * (2 + effect**2)))) / 2

    def simulate(random, *, pooled=False):
        shift = mean + effect * random.normal(size=(60, 1))
        ours, theirs = shift + random.normal(size=(60, 4)), random.normal(size=(60, 4))
        return scores.win_rate(*((each.ravel() if pooled else each) for each in (ours, theirs)))

    assert coverage(simulate, truth) == pytest.approx(0.95, abs=4 * DEVIATION)
    assert coverage(partial(simulate, pooled=True), truth) < 0.9


def test_mean_difference_is_that_of_the_paired_means():
    random = np.random.default_rng(3)
    before, after = random.random((2, 30))
    result = scores.mean_difference(after, before, num_resamples=300)
    assert result == scores.mean_with_interval(after - before, num_resamples=300)
    assert result.mean == pytest.approx(after.mean() - before.mean())
    # Pairs that differ alike have an interval as narrow, however different the prompts.
    shifted = scores.mean_difference(before + 0.25, before)
    assert tuple(shifted) == pytest.approx((0.25, 0.25, 0.25))


def test_mean_difference_covers_the_gain_with_samples_that_are_alike():
    """Prompts differ in how much is gained; pooled, samples would cover too rarely."""

    def simulate(random, *, pooled=False):
        difficulty, gain = random.normal(size=(2, 80, 1))
        after = difficulty + 0.3 + gain + random.normal(size=(80, 4))
        before = difficulty + random.normal(size=(80, 3))
        if pooled:
            after, before = after[:, :3].ravel(), before.ravel()
        return scores.mean_difference(after, before, num_resamples=300)

    assert coverage(simulate, 0.3) == pytest.approx(0.95, abs=4 * DEVIATION)
    assert coverage(partial(simulate, pooled=True), 0.3) < 0.9


def test_mean_with_interval_averages_the_samples_of_a_prompt():
    values = np.random.default_rng(4).random((20, 3))
    expected = scores.mean_with_interval(values.mean(-1), num_resamples=200)
    assert scores.mean_with_interval(values, num_resamples=200) == expected
    assert expected.mean == pytest.approx(values.mean())


def test_ratio_with_interval_is_one_number_a_unit():
    """Equal denominators make a mean; a numerator in proportion leaves no width."""
    random = np.random.default_rng(5)
    above, below = random.random(30), random.integers(1, 9, size=30)
    ratio = partial(scores.ratio_with_interval, num_resamples=300)
    assert ratio(above, below).mean == pytest.approx(above.sum() / below.sum())
    expected = scores.mean_with_interval(above / 4, num_resamples=300)
    np.testing.assert_allclose(ratio(above, np.full(30, 4)), expected, rtol=1e-12)
    np.testing.assert_allclose(ratio(0.3 * below, below), [0.3] * 3, rtol=1e-12)


def test_ratio_with_interval_covers_the_ratio_of_the_means():
    def simulate(random):
        length = 1 + random.poisson(9, size=(80, 2))
        nats = random.gamma(2 * length, 1.0)
        return scores.ratio_with_interval(nats, length, num_resamples=300)

    assert coverage(simulate, 2.0) == pytest.approx(0.95, abs=4 * DEVIATION)


@pytest.mark.parametrize("compare", [scores.win_rate, scores.mean_difference])
def test_comparisons_refuse_what_cannot_be_paired(compare):
    name, other = (
        ("scores", "opponent_scores") if compare is scores.win_rate else ("after", "before")
    )
    with pytest.raises(ValueError, match=f"{name} has 3 prompts and {other} 2; give both the same"):
        compare(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match=rf"{other}\[1, 0\] is nan; it must be finite"):
        compare(np.zeros((2, 1)), np.array([[0.0], [math.nan]]))
    for wrong in (np.zeros(0), np.zeros((1, 2, 3)), np.zeros(())):
        with pytest.raises(ValueError, match=rf"{name} has shape .*; it must be \[n\] or \[prom"):
            compare(wrong, np.zeros(2))
    with pytest.raises(ValueError, match="confidence is 1; it must be between 0 and 1"):
        compare([0.0, 1.0], [1.0, 0.5], confidence=1)


def test_ratio_with_interval_refuses_what_has_no_ratio():
    with pytest.raises(ValueError, match=r"numerator has shape \(2, 1\) and denominator \(3, 1\)"):
        scores.ratio_with_interval([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"sum\(denominator\) is 0.0; it must be greater than 0"):
        scores.ratio_with_interval([1.0, 2.0], [0.0, 0.0])
