"""Laws against draws from them and closed forms; texts against the gold scorer. SYNTHETIC."""

import itertools
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from jaxrl_llm.data import clinical_text
from jaxrl_llm.data.clinical_preferences import (
    PANEL,
    Annotator,
    Mixture,
    ceiling,
    compare,
    demonstrations,
    exact_accuracy,
    expected_gold,
    loss_floor,
    pairs,
    preference_probability,
    utility,
)

COUNT = 1000
PLAIN = Annotator(
    temperature=0.1, length_bias=0.0, confidence_bias=0.0, position_bias=0.0, lapse=0.0
)


@pytest.fixture(scope="module")
def default_pairs():
    return list(pairs(0, 0, COUNT))


@pytest.fixture(scope="module")
def panel_pairs():
    return list(pairs(1, 0, COUNT, annotators=PANEL))


# The law


@pytest.mark.parametrize(
    ("annotator", "difference", "shown_first", "expected"),
    [
        (PLAIN, 0.0, None, 0.5),
        (PLAIN, 0.1, None, 1 / (1 + math.exp(-1))),
        (PLAIN, -0.2, True, 1 / (1 + math.exp(2))),
        (replace(PLAIN, lapse=1.0), 5.0, True, 0.5),
        (replace(PLAIN, lapse=0.2), 5.0, False, 0.9),
        (replace(PLAIN, position_bias=math.log(3)), 0.0, True, 0.75),
        (replace(PLAIN, position_bias=math.log(3)), 0.0, False, 0.25),
        (replace(PLAIN, position_bias=math.log(3)), 0.0, None, 0.5),
        # Log-odds of log 3 twice over, and of 0: (9 / 10 + 1 / 2) / 2.
        (replace(PLAIN, position_bias=math.log(3)), math.log(3) / 10, None, 0.7),
        (PLAIN, 1e4, None, 1.0),
        (PLAIN, -1e4, None, 0.0),
    ],
)
def test_preference_probability_equals_closed_form(annotator, difference, shown_first, expected):
    actual = preference_probability(annotator, difference, shown_first)
    assert actual == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shown_first", [True, False, None])
def test_preference_probability_of_both_responses_sums_to_one(shown_first):
    other = None if shown_first is None else not shown_first
    for annotator, difference in itertools.product(PANEL, (-0.3, 0.0, 0.05)):
        one = preference_probability(annotator, difference, shown_first)
        assert one + preference_probability(annotator, -difference, other) == pytest.approx(1)


def test_preference_probability_with_lapses_alone_is_that_of_an_unreliable_annotator():
    annotator = replace(PLAIN, lapse=0.3)
    truth = 1 / (1 + math.exp(-2))
    eta = annotator.reliability
    expected = eta * truth + (1 - eta) * (1 - truth)
    assert preference_probability(annotator, 0.2, True) == pytest.approx(expected)


def test_utility_adds_the_biases_to_the_gold_score():
    case = clinical_text.case(0, 0)
    rng = np.random.default_rng(0)
    biased = replace(PLAIN, length_bias=2.0, confidence_bias=0.5)
    for flaw, certain in ((None, 0.0), ("overconfident", 0.5), ("breach_of_privacy", 0.0)):
        text = clinical_text.respond(case, rng, flaw)
        score = clinical_text.score(case, text)
        assert utility(PLAIN, text, score) == score.total
        expected = score.total + 2.0 * len(text.split()) / 100 + certain
        assert utility(biased, text, score) == pytest.approx(expected)


# Pairs


@pytest.mark.slow
def test_pairs_do_not_depend_on_what_was_drawn_before(default_pairs):
    assert list(pairs(0, 7, 3)) == default_pairs[7:10]
    assert list(pairs(1, 7, 3)) != default_pairs[7:10]


def test_pairs_are_different_responses_to_a_case_of_the_split():
    for split in clinical_text.SPLITS:
        for index, pair in enumerate(pairs(3, 5, 60, split)):
            preference = pair.preference
            assert pair.case == clinical_text.case(3, 5 + index, split)
            assert preference.prompt == clinical_text.prompt(pair.case)
            assert preference.chosen != preference.rejected
            for text, gold in zip((preference.chosen, preference.rejected), pair.gold, strict=True):
                assert text.startswith(" ")
                score = clinical_text.score(pair.case, text)
                assert score.grammatical
                assert score.total == gold


def test_pairs_have_the_shares_of_the_mixture():
    mixture = Mixture(share_good=0.6, share_mismatched=0.3)
    num = 400
    found = list(pairs(0, 0, num, mixture=mixture))
    has_good = np.mean([1.0 in map(_rounded, pair.gold) for pair in found])
    wrong = "accuracy: assessment wrong"
    has_mismatched = np.mean([wrong in _reasons(pair) for pair in found])
    for share, expected in ((has_good, 0.6), (has_mismatched, 0.3)):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / num)
    assert not any(_rounded(pair.gold[0]) == _rounded(pair.gold[1]) == 1 for pair in found)


def _rounded(gold):
    return round(gold, 9)


def _reasons(pair):
    texts = (pair.preference.chosen, pair.preference.rejected)
    return [reason for text in texts for reason in clinical_text.score(pair.case, text).reasons]


def test_compare_prefers_any_text_with_the_probability_of_its_utility():
    """A good answer beside no answer at all, which no grammar would write."""
    case = clinical_text.case(0, 0)
    good = clinical_text.respond(case, np.random.default_rng(0), None)
    texts = (good, "No idea, no idea.")
    first, second = (utility(PLAIN, text, clinical_text.score(case, text)) for text in texts)
    mild = replace(PLAIN, temperature=first - second)  # so that the log-odds are 1
    compared = [compare(case, texts, (mild,), np.random.default_rng(seed)) for seed in range(2000)]
    expected = 1 / (1 + math.exp(-1))
    chosen = np.array([pair.preference.chosen == " " + good for pair in compared])
    assert chosen.mean() == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 2000))
    for pair, is_good in zip(compared[:50], chosen, strict=False):
        assert pair.probability == pytest.approx(expected if is_good else 1 - expected)
        assert {pair.preference.chosen, pair.preference.rejected} == {" " + text for text in texts}


def test_pairs_show_either_response_first(default_pairs):
    is_first_better = [
        (pair.gold[0] > pair.gold[1]) == pair.chosen_is_first for pair in default_pairs
    ]
    assert abs(np.mean(is_first_better) - 0.5) < 4 * 0.5 / math.sqrt(COUNT)


@pytest.mark.parametrize("known", ["probability", "probability_informed"])
@pytest.mark.parametrize("some", ["default_pairs", "panel_pairs"])
def test_pairs_are_chosen_with_their_probability(known, some, request):
    """Calibration: of pairs whose better one has probability p, a share p is chosen so."""
    probability = np.array([getattr(pair, known) for pair in request.getfixturevalue(some)])
    confidence = np.maximum(probability, 1 - probability)
    is_likelier = probability > 0.5
    for low, high in itertools.pairwise((0.5, 0.7, 0.85, 0.95, 1.0)):
        within = (confidence >= low) & (confidence < high)
        if within.sum() > 20:
            error = np.mean(is_likelier[within] - confidence[within])
            variance = np.mean(confidence[within] * (1 - confidence[within])) / within.sum()
            assert abs(error) < 4 * math.sqrt(variance)


def test_pairs_probability_is_the_average_over_annotators_and_orders():
    panel = (PLAIN, replace(PLAIN, position_bias=1.0, lapse=0.4, length_bias=1.0))
    for pair in pairs(0, 0, 20, annotators=panel):
        texts = (pair.preference.chosen, pair.preference.rejected)
        scores = [clinical_text.score(pair.case, text) for text in texts]
        expected = []
        for annotator, first in itertools.product(panel, (True, False)):
            chosen, rejected = (
                utility(annotator, text, score) for text, score in zip(texts, scores, strict=True)
            )
            expected.append(preference_probability(annotator, chosen - rejected, first))
        assert pair.probability == pytest.approx(np.mean(expected))


def test_pairs_ratings_are_gold_marks_with_the_noise_asked_for():
    exact = replace(PLAIN, rating_noise=0.0, share_unrated=0.0)
    noisy = replace(PLAIN, rating_noise=0.2, share_unrated=0.25)
    errors, num_rated = [], 0
    both = zip(
        pairs(0, 0, 300, annotators=[exact]), pairs(0, 0, 300, annotators=[noisy]), strict=True
    )
    for truth, rated in both:
        preference = truth.preference
        assert set(preference.ratings) == set(clinical_text.CRITERIA)
        for place, text in enumerate((preference.chosen, preference.rejected)):
            score = clinical_text.score(truth.case, text)
            for criterion, marks in preference.ratings.items():
                assert marks[place] == getattr(score, criterion)
        assert rated.preference.chosen == preference.chosen
        num_rated += len(rated.preference.ratings)
        for criterion, marks in rated.preference.ratings.items():
            truths = np.array(preference.ratings[criterion], float)
            errors += (np.array(marks, float) - truths).tolist()
    assert abs(num_rated / 900 - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 900)
    assert abs(np.mean(errors)) < 4 * 0.2 / math.sqrt(len(errors))
    assert np.std(errors) == pytest.approx(0.2, rel=0.1)


def test_pairs_are_compared_by_each_annotator_alike(panel_pairs):
    counts = Counter(pair.preference.annotator for pair in panel_pairs)
    assert set(counts) == {annotator.name for annotator in PANEL}
    for count in counts.values():
        assert abs(count / COUNT - 0.25) < 4 * math.sqrt(0.25 * 0.75 / COUNT)


# What no predictor betters


def test_ceiling_and_loss_floor_equal_closed_forms_of_a_coin(default_pairs):
    some = [replace(default_pairs[0], probability=p) for p in (0.5, 0.25, 1.0)]
    assert ceiling(some) == pytest.approx((0.5 + 0.75 + 1) / 3)
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert loss_floor(some) == pytest.approx((math.log(2) + entropy) / 3)
    assert loss_floor([replace(some[0], probability=p) for p in (0.0, 1.0)]) == 0


def test_ceiling_of_the_defaults_leaves_room_to_learn(default_pairs):
    assert 0.85 < ceiling(default_pairs) < 0.92
    assert 0.2 < loss_floor(default_pairs) < 0.3


@pytest.mark.parametrize("some", ["default_pairs", "panel_pairs"])
@pytest.mark.parametrize("informed", [False, True])
def test_ceiling_and_loss_floor_are_reached_by_who_knows_the_law(some, informed, request):
    found = request.getfixturevalue(some)
    known = np.array([p.probability_informed if informed else p.probability for p in found])
    confidence = np.maximum(known, 1 - known)
    error = math.sqrt(np.mean(confidence * (1 - confidence)) / len(known))
    assert abs(np.mean(known > 0.5) - ceiling(found, informed=informed)) < 4 * error
    loss = -np.log(known)
    floor = loss_floor(found, informed=informed)
    assert abs(loss.mean() - floor) < 4 * loss.std() / math.sqrt(len(known))


def test_exact_accuracy_is_the_ceiling_of_who_knows_the_law_and_what_is_left_of_who_errs(
    default_pairs,
):
    knows = [pair.probability >= 0.5 for pair in default_pairs]
    best = exact_accuracy(default_pairs, knows)
    assert best == pytest.approx(ceiling(default_pairs))
    errs = [not each for each in knows]
    assert exact_accuracy(default_pairs, errs) == pytest.approx(1 - best)


def test_ceiling_is_higher_and_loss_floor_lower_for_who_knows_more(panel_pairs):
    assert ceiling(panel_pairs, informed=True) > ceiling(panel_pairs)
    assert loss_floor(panel_pairs, informed=True) < loss_floor(panel_pairs) - 0.02


@pytest.mark.slow
def test_panel_is_ordered_by_reliability():
    ceilings = [ceiling(pairs(0, 0, 200, annotators=[annotator])) for annotator in PANEL]
    assert ceilings == sorted(ceilings, reverse=True)


# Demonstrations


@pytest.mark.slow
def test_demonstrations_score_what_is_expected_of_them():
    for share in (0.0, 0.6):
        examples = list(demonstrations(0, 0, 300, share_flawed=share))
        cases = [example.case for example in examples]
        golds = [clinical_text.score(each.case, each.completion).total for each in examples]
        error = 4 * np.std(golds) / math.sqrt(len(golds))
        assert abs(np.mean(golds) - expected_gold(cases, share)) <= error + 1e-12
        is_flawed = np.mean(np.array(golds) < 1 - 1e-9)
        assert abs(is_flawed - share) <= 4 * math.sqrt(share * (1 - share) / len(golds))


def test_expected_gold_of_a_case_does_not_depend_on_the_phrasing():
    for index in range(15):
        case = clinical_text.case(0, index)
        for flaw in clinical_text.applicable_flaws(case):
            totals = {
                clinical_text.score(
                    case, clinical_text.respond(case, np.random.default_rng(seed), flaw)
                ).total
                for seed in range(5)
            }
            assert len(totals) == 1


def test_demonstrations_do_not_depend_on_what_was_drawn_before():
    whole = list(demonstrations(0, 0, 9))
    assert list(demonstrations(0, 4, 3)) == whole[4:7]
    held_out = next(demonstrations(0, 0, 1, "held_out"))
    assert held_out.case == clinical_text.case(0, 0, "held_out")
    assert held_out.prompt == clinical_text.prompt(held_out.case)
    assert held_out.completion.startswith(" ")


def test_streams_say_what_is_wrong_before_the_first_is_drawn():
    for call, fault in (
        (lambda: pairs(-1, 0, 1), "seed is -1; it must be at least 0"),
        (lambda: pairs(0, 0, 1, annotators=()), "annotators is empty; give at least one"),
        (
            lambda: pairs(0, 0, 1, annotators=[replace(PLAIN, temperature=0.0)]),
            "temperature is 0.0; it must be greater than 0",
        ),
        (
            lambda: pairs(0, 0, 1, annotators=[replace(PLAIN, lapse=1.5)]),
            "lapse is 1.5; it must be in [0, 1]",
        ),
        (
            lambda: pairs(0, 0, 1, mixture=Mixture(share_good=-0.1)),
            "share_good is -0.1; it must be in [0, 1]",
        ),
        (lambda: demonstrations(0, -1, 1), "start is -1; it must be at least 0"),
        (
            lambda: demonstrations(0, 0, 1, share_flawed=2.0),
            "share_flawed is 2.0; it must be in [0, 1]",
        ),
        (lambda: ceiling([]), "pairs is empty; give at least one"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(fault)}$"):
            call()
