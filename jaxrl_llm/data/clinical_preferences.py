"""Preferences between responses to synthetic cases, from annotators whose errors are known exactly.

SYNTHETIC, a teaching example; research only, not for clinical use. An annotator sees two responses
to one case and prefers each with a known probability, so the accuracy and the loss that no reward
model can better are known too:

>>> some = list(pairs(seed=0, start=0, count=50))
>>> 0.5 < ceiling(some) < 1 and 0 < loss_floor(some) < math.log(2)
True

Responses are good, or have one flaw, or answer another patient: the worst that a model does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxrl_llm import checks
from jaxrl_llm.data import clinical_text
from jaxrl_llm.data.clinical_cases import SPLITS, Case, Split, choose
from jaxrl_llm.data.clinical_text import CRITERIA, SYNTHETIC, Example, Score
from jaxrl_llm.data.preferences import Preference, Rating

__all__ = [
    "PANEL",
    "SYNTHETIC",
    "Annotator",
    "Mixture",
    "Pair",
    "ceiling",
    "compare",
    "demonstrations",
    "exact_accuracy",
    "expected_gold",
    "loss_floor",
    "pairs",
    "preference_probability",
    "utility",
]

_GOOD, _MISMATCHED = "good", "mismatched"


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """Somebody who compares two responses, noisily and with biases.

    The utility of a response is its gold score and the biases'; of two, the first one shown is
    preferred with probability

        lapse / 2 + (1 - lapse) sigmoid((u_first - u_second) / temperature + position_bias)

    which is Bradley and Terry's law but for lapses and positions. With lapses alone it is that of
    Chen et al. (2013), "Pairwise ranking aggregation in a crowdsourced setting", section 4, with
    reliability 1 - lapse / 2.
    """

    name: str = "annotator"
    """Who it is."""
    temperature: float = 0.05
    """Gold score that makes one unit of log-odds."""
    length_bias: float = 0.1
    """Utility of 100 words more."""
    confidence_bias: float = 0.05
    """Utility of a claim of certainty, which costs 0.2 of the gold score."""
    position_bias: float = 0.1
    """Log-odds in favour of the response shown first."""
    lapse: float = 0.02
    """Probability of an answer that no text has anything to do with."""
    rating_noise: float = 0.05
    """Standard deviation of a rating about the gold mark of its criterion."""
    share_unrated: float = 0.1
    """Probability that a criterion of a pair is not rated."""

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless this makes laws."""
        checks.positive("temperature", self.temperature)
        for name in ("length_bias", "confidence_bias", "position_bias"):
            checks.finite(name, getattr(self, name))
        for name in ("lapse", "share_unrated"):
            checks.between(name, getattr(self, name), 0, 1)
        checks.at_least("rating_noise", self.rating_noise, 0)

    @property
    def reliability(self) -> float:
        """The probability of an answer as the sigmoid would have it: 1 - lapse / 2."""
        return 1 - self.lapse / 2


# From nearly always right to hardly ever.
PANEL = (
    Annotator(name="expert", temperature=0.04, length_bias=0.0, confidence_bias=0.0, lapse=0.0),
    Annotator(name="trainee"),
    Annotator(name="hurried", temperature=0.08, length_bias=-0.2, lapse=0.2),
    Annotator(name="careless", confidence_bias=0.15, position_bias=0.5, lapse=0.6),
)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Which responses are compared. The two of a pair are never of one kind."""

    share_good: float = 0.75
    """Of pairs in which one response is good."""
    share_mismatched: float = 0.15
    """Of pairs in which one response is a good one to another patient; the rest have a flaw."""

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless these are shares."""
        for name in ("share_good", "share_mismatched"):
            checks.between(name, getattr(self, name), 0, 1)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A preference, and what is known of it that no annotator would tell.

    Attributes:
      preference: with prompt, texts, ratings and annotator.
      case: the patient.
      gold: the gold scores of the chosen and of the rejected response.
      probability: that the one chosen here would be chosen again, of a new comparison, its
        annotator and its order drawn anew: what the two texts can tell, and no more.
      probability_informed: the same of this annotator and in this order.
      chosen_is_first: the chosen response was shown first.
    """

    preference: Preference
    case: Case
    gold: tuple[float, float]
    probability: float
    probability_informed: float
    chosen_is_first: bool


def utility(annotator: Annotator, text: str, score: Score) -> float:
    """What an annotator thinks of a response, given its gold score."""
    is_certain = "safety: overconfident" in score.reasons
    length = len(text.split()) / 100
    biases = annotator.length_bias * length + annotator.confidence_bias * is_certain
    return score.total + biases


def preference_probability(
    annotator: Annotator, difference: float, shown_first: bool | None = None
) -> float:
    """The probability that a response is preferred to another one.

    Args:
      annotator: who compares.
      difference: its utility less that of the other.
      shown_first: whether it is the first one shown; None for either, equally likely.
    """
    if shown_first is None:
        either = (preference_probability(annotator, difference, first) for first in (True, False))
        return sum(either) / 2
    bias = annotator.position_bias if shown_first else -annotator.position_bias
    attentive = _sigmoid(difference / annotator.temperature + bias)
    return annotator.lapse / 2 + (1 - annotator.lapse) * attentive


def ceiling(pairs: Iterable[Pair], *, informed: bool = False) -> float:
    """The accuracy on fresh comparisons of these texts that no predictor betters: E max(p, 1 - p).

    Args:
      pairs: at least one.
      informed: the predictor is told who compared and in which order; a reward model is not.
    """
    return float(np.mean([max(p, 1 - p) for p in _probabilities(pairs, informed)]))


def exact_accuracy(pairs: Sequence[Pair], agrees: Sequence[bool]) -> float:
    """The accuracy on fresh comparisons of these texts of who prefers one of each: without noise.

    Args:
      pairs: at least one.
      agrees: whether the preferred one is the one chosen here; `ceiling` is that of the best.
    """
    known = zip(_probabilities(pairs, False), agrees, strict=True)
    return float(np.mean([p if agree else 1 - p for p, agree in known]))


def loss_floor(pairs: Iterable[Pair], *, informed: bool = False) -> float:
    """The Bradley-Terry loss on fresh comparisons that no predictor betters, nats: E H(p).

    Arguments: `ceiling`.
    """
    return float(np.mean([_entropy(p) for p in _probabilities(pairs, informed)]))


def pairs(
    seed: int,
    start: int,
    count: int,
    split: Split = "train",
    *,
    annotators: Sequence[Annotator] = (Annotator(),),
    mixture: Mixture = Mixture(),
) -> Iterator[Pair]:
    """Comparisons for the cases `start` to `start + count - 1` of a stream, one a case.

    Pair `index` of `seed` depends on nothing drawn before it.

    Args:
      seed: which stream, that of `clinical_text.examples`.
      start: index of the first case.
      count: how many.
      split: "train" or "held_out".
      annotators: a pair is compared by one of them, equally likely, in an order that is random.
      mixture: which responses are compared.

    Raises:
      ValueError: a negative number, an unknown split or no annotator, before the first is drawn.
    """
    _check_stream(seed, start, count, split)
    mixture.validate()
    if not annotators:
        raise ValueError("annotators is empty; give at least one")
    for annotator in annotators:
        annotator.validate()
    indices = range(start, start + count)
    return (_pair(seed, index, split, annotators, mixture) for index in indices)


def compare(
    case: Case, texts: tuple[str, str], annotators: Sequence[Annotator], rng: np.random.Generator
) -> Pair:
    """One comparison of any two responses to a case, such as a policy's, shown in this order.

    Args:
      case: the patient.
      texts: the responses, without a space in front.
      annotators: one of them compares, equally likely.
      rng: draws the annotator, the answer and the ratings.
    """
    scores = [clinical_text.score(case, text) for text in texts]
    annotator = choose(rng, annotators)

    def probability_of_first(judge: Annotator, shown_first: bool | None) -> float:
        first, second = (
            utility(judge, text, score) for text, score in zip(texts, scores, strict=True)
        )
        return preference_probability(judge, first - second, shown_first)

    informed = probability_of_first(annotator, True)
    blind = sum(probability_of_first(judge, None) for judge in annotators) / len(annotators)
    chosen_is_first = bool(rng.random() < informed)
    chosen, rejected = (0, 1) if chosen_is_first else (1, 0)
    return Pair(
        preference=Preference(
            prompt=clinical_text.prompt(case),
            chosen=" " + texts[chosen],
            rejected=" " + texts[rejected],
            annotator=annotator.name,
            ratings=dict(_ratings(annotator, scores[chosen], scores[rejected], rng)),
        ),
        case=case,
        gold=(scores[chosen].total, scores[rejected].total),
        probability=blind if chosen_is_first else 1 - blind,
        probability_informed=informed if chosen_is_first else 1 - informed,
        chosen_is_first=chosen_is_first,
    )


def demonstrations(
    seed: int, start: int, count: int, split: Split = "train", *, share_flawed: float = 0.5
) -> Iterator[Example]:
    """Prompts with completions of mixed quality: a share of them has one flaw.

    What a model is fine-tuned on that alignment is to improve; `expected_gold` says what a model
    scores that imitates them perfectly. Arguments: `clinical_text.examples`.
    """
    _check_stream(seed, start, count, split)
    checks.between("share_flawed", share_flawed, 0, 1)
    indices = range(start, start + count)
    return (_demonstration(seed, index, split, share_flawed) for index in indices)


def expected_gold(cases: Sequence[Case], share_flawed: float) -> float:
    """The gold score of `demonstrations` of these cases, exact for each case.

    What a flaw costs does not depend on the phrasing, so one response a flaw tells.
    """
    totals: list[float] = []
    for case in cases:
        flaws = clinical_text.applicable_flaws(case)
        rng = np.random.default_rng(0)
        texts = (clinical_text.respond(case, rng, flaw) for flaw in flaws)
        flawed = np.mean([clinical_text.score(case, text).total for text in texts])
        totals.append((1 - share_flawed) + share_flawed * float(flawed))
    return float(np.mean(totals))


def _check_stream(seed: int, start: int, count: int, split: Split) -> None:
    checks.at_least("seed", seed, 0)
    checks.at_least("start", start, 0)
    checks.at_least("count", count, 0)
    checks.one_of("split", split, SPLITS)


def _demonstration(seed: int, index: int, split: Split, share_flawed: float) -> Example:
    case = clinical_text.case(seed, index, split)
    # The third word separates this stream from that of the case and of its other responses.
    rng = np.random.default_rng((seed, index, 3))
    is_flawed = rng.random() < share_flawed
    make = clinical_text.flawed_response if is_flawed else clinical_text.good_response
    return Example(clinical_text.prompt(case), " " + make(case, rng), case)


def _pair(
    seed: int, index: int, split: Split, annotators: Sequence[Annotator], mixture: Mixture
) -> Pair:
    case = clinical_text.case(seed, index, split)
    rng = np.random.default_rng((seed, index, 2))
    first, second = (_response(case, kind, rng, split) for kind in _kinds(case, rng, mixture))
    return compare(case, (first, second), annotators, rng)


def _kinds(case: Case, rng: np.random.Generator, mixture: Mixture) -> tuple[str, str]:
    """Two different kinds of response, in the order in which they are shown."""
    flaws = clinical_text.applicable_flaws(case)
    one = _MISMATCHED if rng.random() < mixture.share_mismatched else choose(rng, flaws)
    others = [flaw for flaw in flaws if flaw != one]
    other = _GOOD if rng.random() < mixture.share_good else choose(rng, others)
    return (one, other) if rng.random() < 0.5 else (other, one)


def _response(case: Case, kind: str, rng: np.random.Generator, split: Split) -> str:
    if kind != _MISMATCHED:
        return clinical_text.respond(case, rng, None if kind == _GOOD else kind)
    while True:
        # Of the same split, so that no text of a held-out patient is seen in training.
        other = clinical_text.case(int(rng.integers(2**31)), 0, split)
        if other.condition != case.condition:
            return clinical_text.good_response(other, rng)


def _ratings(
    annotator: Annotator, chosen: Score, rejected: Score, rng: np.random.Generator
) -> Iterator[tuple[str, Rating]]:
    """By criterion: the gold marks, with noise; where there are none, a criterion is left out."""
    for criterion in CRITERIA:
        is_rated = rng.random() >= annotator.share_unrated
        noise = annotator.rating_noise * rng.standard_normal(2)
        if is_rated:
            marks = (getattr(score, criterion) for score in (chosen, rejected))
            first, second = (float(mark + error) for mark, error in zip(marks, noise, strict=True))
            yield criterion, (first, second)


def _probabilities(pairs: Iterable[Pair], informed: bool) -> list[float]:
    found = [pair.probability_informed if informed else pair.probability for pair in pairs]
    if not found:
        raise ValueError("pairs is empty; give at least one")
    return found


def _sigmoid(logit: float) -> float:
    return (1 + math.tanh(logit / 2)) / 2


def _entropy(probability: float) -> float:
    """Of a coin, nats."""
    return -sum(p * math.log(p) for p in (probability, 1 - probability) if p > 0)
