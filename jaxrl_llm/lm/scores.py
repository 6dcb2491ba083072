"""Scores of one number a text: their means with intervals, and answers that can be verified.

NumPy on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxrl_llm import checks

# How much of the resampled data exists at a time, in numbers.
_DRAWS_AT_A_TIME = 1 << 18


class Interval(NamedTuple):
    """The ends of a confidence interval, or of an array of them."""

    low: Any
    high: Any


class Estimate(NamedTuple):
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float


def mean_with_interval(
    values: ArrayLike, *, confidence: float = 0.95, num_resamples: int = 5000, seed: int = 0
) -> Estimate:
    """The mean of one score a text, such as the gold score, with `bootstrap_interval` around it.

    Of the differences of two models' scores on the same prompts, it is the interval of the gain.
    Arguments and errors: `bootstrap_interval`.
    """
    low, high = bootstrap_interval(
        values, confidence=confidence, num_resamples=num_resamples, seed=seed
    )
    return Estimate(float(np.asarray(values).mean()), low, high)


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, num_resamples: int = 5000, seed: int = 0
) -> Interval:
    """The bias-corrected and accelerated (BCa) bootstrap interval of a mean.

    It follows the skew of scores that crowd at 0 or 1, and does not leave their range, where a
    normal approximation does. It is short of data below a hundred values: of 60 from an exponential
    law, an interval of 90% covers the mean in 87% of cases. Equal values give one of no width.

    Args:
      values: `[n]`, independent and finite; at least 2.
      confidence: in (0, 1).
      num_resamples: of the data.
      seed: the same seed, the same interval.

    Raises:
      ValueError: naming the first value that is not finite, or what is out of range.

    Source: Efron (1987), "Better bootstrap confidence intervals", section 2; half of the resamples
      that tie with the mean count as below it.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"values has shape {values.shape}; it must be [n] with n at least 2")
    if not np.isfinite(values).all():
        index = int(np.isfinite(values).argmin())
        raise ValueError(f"values[{index}] is {values[index]}; it must be finite")
    _check_confidence(confidence)
    checks.at_least("num_resamples", num_resamples, 1)
    mean = float(values.mean())
    centred = values - mean
    square = float(np.sum(centred**2))
    if square == 0:
        return Interval(mean, mean)

    errors = _resampled_means(centred, num_resamples, seed)
    # The same mean summed in another order differs by rounding, and is still a tie.
    is_tie = np.abs(errors) <= 1e-9 * math.sqrt(square / len(values))
    below = float(np.mean(np.where(is_tie, 0.5, errors < 0)))
    normal = NormalDist()
    smallest = 0.5 / num_resamples
    bias = normal.inv_cdf(min(max(below, smallest), 1 - smallest))
    acceleration = float(np.sum(centred**3)) / (6 * square**1.5)

    def end(level: float) -> float:
        shifted = bias + normal.inv_cdf(level)
        level = normal.cdf(bias + shifted / (1 - acceleration * shifted))
        return mean + float(np.quantile(errors, level))

    return Interval(end((1 - confidence) / 2), end((1 + confidence) / 2))


def _resampled_means(values: NDArray[Any], num_resamples: int, seed: int) -> NDArray[np.float64]:
    random = np.random.default_rng(seed)
    size = len(values)
    means = np.empty(num_resamples)
    rows = max(_DRAWS_AT_A_TIME // size, 1)
    for start in range(0, num_resamples, rows):
        part = means[start : start + rows]
        part[:] = values[random.integers(size, size=(len(part), size))].mean(axis=-1)
    return means


def wilson_interval(
    num_successes: ArrayLike, num_trials: ArrayLike, *, confidence: float = 0.95
) -> Interval:
    """The proportions p that |successes / n - p| <= z sqrt(p (1 - p) / n) does not rule out.

    Unlike the interval around the observed proportion, it has a width at 0 of n and n of n.

    Args:
      num_successes: `[...]`, in [0, n].
      num_trials: `[...]`, n, at least 1.
      confidence: in (0, 1).

    Raises:
      ValueError: naming the first count that is out of range.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    successes, trials = _counts("num_successes", num_successes, "num_trials", num_trials, 1)
    _check_confidence(confidence)
    square = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    share = successes / trials
    centre = (successes + square / 2) / (trials + square)
    margin = np.sqrt(square * (share * (1 - share) * trials + square / 4)) / (trials + square)
    # Exactly, where rounding would leave the observed proportion outside.
    low = np.where(successes == 0, 0, centre - margin)
    return Interval(low, np.where(successes == trials, 1, centre + margin))


def exact_match(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    normalise: Callable[[str], Hashable] = str.strip,
) -> NDArray[np.bool_]:
    """Whether each prediction is its reference, `[n]`, after both are normalised.

    Args:
      predictions: answers, cut out of the text around them.
      references: one right answer each.
      normalise: of an answer, such as `str.casefold` or a parser of numbers.

    Raises:
      ValueError: if their numbers differ.

    >>> exact_match(["42 ", "41"], ["42", "42"]).tolist()
    [True, False]
    """
    if len(predictions) != len(references):
        counts = f"predictions has {len(predictions)} answers and references {len(references)}"
        raise ValueError(f"{counts}; give one reference a prediction")
    pairs = zip(predictions, references, strict=True)
    return np.array([normalise(one) == normalise(other) for one, other in pairs], bool)


def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> NDArray[np.float64]:
    """P(at least one of k samples is right) = 1 - C(n - c, k) / C(n, k), `[...]`, unbiased.

    As 1 - prod_{j<k} (n - c - j) / (n - j), which does not overflow. Average it over problems.

    Args:
      num_samples: `[...]`, n drawn for each problem, at least k.
      num_correct: `[...]`, c of them right, in [0, n].
      k: samples allowed, at least 1.

    Raises:
      ValueError: naming the first count that is out of range.

    Source: Chen et al. (2021), "Evaluating large language models trained on code", equation 1.
    """
    checks.at_least("k", k, 1)
    correct, samples = _counts("num_correct", num_correct, "num_samples", num_samples, k)
    drawn = np.arange(k)
    wrong_left = np.maximum((samples - correct)[..., None] - drawn, 0)
    return 1 - np.prod(wrong_left / (samples[..., None] - drawn), axis=-1)


def _counts(
    part_name: str, part: ArrayLike, whole_name: str, whole: ArrayLike, low: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both, broadcast, if low <= whole and 0 <= part <= whole."""
    part, whole = np.broadcast_arrays(part, whole)
    for name, counts, wrong, remedy in (
        (whole_name, whole, ~(whole >= low), f"it must be at least {low}"),
        (part_name, part, ~((part >= 0) & (part <= whole)), f"it must be in [0, {whole_name}]"),
    ):
        if wrong.any():
            place = tuple(int(axis) for axis in np.unravel_index(wrong.argmax(), wrong.shape))
            where = f"[{', '.join(map(str, place))}]" if place else ""
            raise ValueError(f"{name}{where} is {counts[place]}; {remedy}")
    return part, whole


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be between 0 and 1")
