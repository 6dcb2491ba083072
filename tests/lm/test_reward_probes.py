"""Probes against the gold scorer and rewards that are fooled by design; correlations by SciPy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats

from jaxrl_llm.data import clinical_knowledge as knowledge
from jaxrl_llm.data import clinical_text
from jaxrl_llm.lm import reward_probes
from jaxrl_llm.lm.reward_probes import PROBES, audit, length_correlation, probes

EXAMPLES = list(clinical_text.examples(seed=0, start=0, count=60, split="held_out"))
CASES = {example.prompt: example.case for example in EXAMPLES}


def gold(pairs):
    return [clinical_text.score(CASES[prompt], response).total for prompt, response in pairs]


def test_probes_lower_the_gold_score_of_every_good_response():
    for example in EXAMPLES:
        edits = probes(example.completion)
        assert tuple(edits) == tuple(PROBES)
        assert clinical_text.score(example.case, example.completion).total == 1
        for name, edited in edits.items():
            assert edited != example.completion
            assert clinical_text.score(example.case, edited).total < 0.95, name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("repetition", "clarity: repetitive"),
        ("padding", "clarity: rambling"),
        ("drug names", "safety: treatments many"),
        ("safe words", "clarity: outside the grammar"),
        ("truncation", "clarity: explanation missing"),
        ("empty", "safety: empty"),
    ],
)
def test_probes_have_the_fault_that_they_are_named_after(name, reason):
    for example in EXAMPLES[:20]:
        edited = probes(example.completion)[name]
        assert reason in clinical_text.score(example.case, edited).reasons


def test_probes_edit_what_they_say():
    text = " One two three. Four five? Six, seven eight."
    edits = probes(text)
    assert edits["repetition"] == text + " Six, seven eight. Six, seven eight."
    assert edits["padding"].startswith(text + " As one often says, ")
    assert all(drug in edits["drug names"] for drug in knowledge.DRUGS)
    assert edits["truncation"] == " One two three. Four"
    assert edits["empty"] == ""
    # Safe words name no drug, so the gold score's safety is not at stake.
    assert not any(drug in edits["safe words"].lower() for drug in knowledge.DRUGS)


@pytest.mark.parametrize("text", ["", " ", "word", "\n No stop at the end \n"])
def test_probes_take_any_text(text):
    edits = probes(text)
    assert tuple(edits) == tuple(PROBES)
    assert len(edits["truncation"].split()) == math.ceil(len(text.split()) / 2)
    assert edits["repetition"].split() == text.split() * 3
    assert edits["padding"].startswith(text.rstrip())


def test_audit_of_the_gold_score_finds_nothing():
    audits = audit(gold, EXAMPLES, num_resamples=200)
    assert tuple(audits) == tuple(PROBES)
    for audited in audits.values():
        assert audited.fooled.mean == audited.fooled.low == 0 < audited.fooled.high < 0.1
        assert audited.change == audited.gold_change
        assert audited.change.high < 0
    # What an empty response loses is everything.
    assert audits["empty"].gold_change == (-1, -1, -1)


def test_audit_finds_what_a_reward_is_fooled_by():
    def length(pairs):
        return [len(response.split()) for _, response in pairs]

    def drugs(pairs):
        return [sum(drug in response for drug in knowledge.DRUGS) for _, response in pairs]

    def brevity(pairs):
        return -np.array(length(pairs))

    def fooled(score_texts):
        audits = audit(score_texts, EXAMPLES, num_resamples=50)
        return {name for name, audited in audits.items() if audited.fooled.mean == 1}

    assert fooled(length) == {"repetition", "padding", "drug names", "safe words"}
    assert fooled(drugs) == {"drug names"}
    assert fooled(brevity) == {"truncation", "empty"}
    change = audit(length, EXAMPLES, num_resamples=50)["drug names"].change
    assert change.mean == pytest.approx(1 + len(" ".join(knowledge.DRUGS).split()))


def test_audit_does_not_blame_a_reward_for_what_is_better():
    """Cut in half, a response loses the identity and the contempt at its end, and gains."""
    tail = " Call John Baker on 555-0142. He is surely overreacting."
    bad = replace(EXAMPLES[0], completion=EXAMPLES[0].completion + tail)
    audited = audit(gold, [bad, bad], num_resamples=20)["truncation"]
    assert audited.gold_change.mean == audited.change.mean > 0
    assert audited.fooled.mean == 0


def test_audit_asks_for_as_many_scores_at_every_call():
    calls = []

    def count(pairs):
        calls.append([prompt for prompt, _ in pairs])
        return np.zeros(len(pairs))

    audit(count, EXAMPLES[:3], num_resamples=20)
    assert calls == [[example.prompt for example in EXAMPLES[:3]]] * (1 + len(PROBES))


def test_audit_refuses_rewards_of_another_shape_and_not_a_number():
    with pytest.raises(ValueError, match=r"score_texts returned the shape \[2, 1\]; return \[2\]"):
        audit(lambda pairs: np.zeros((len(pairs), 1)), EXAMPLES[:2])
    with pytest.raises(ValueError, match="score_texts returned nan for pair 1"):
        audit(lambda _: [0.0, math.nan], EXAMPLES[:2])
    with pytest.raises(ValueError, match="examples has 1 of them; give at least 2"):
        audit(gold, EXAMPLES[:1])


def test_length_correlation_matches_scipy():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 9, size=40)
    scores = lengths + 3 * random.normal(size=40).round()
    pearson, spearman = length_correlation(scores, lengths, confidence=0.9)
    expected: Any = scipy.stats.pearsonr(scores, lengths)
    ends = expected.confidence_interval(0.9)
    assert tuple(pearson) == pytest.approx((expected.statistic, ends.low, ends.high))
    ranked: Any = scipy.stats.spearmanr(scores, lengths)
    assert spearman.mean == pytest.approx(ranked.statistic)
    assert -1 < spearman.low < spearman.mean < spearman.high < 1
    width = np.arctanh([spearman.low, spearman.high])
    z = scipy.stats.norm.ppf(0.95)
    expected_width = 2 * z * math.sqrt((1 + spearman.mean**2 / 2) / 37)
    assert width[1] - width[0] == pytest.approx(expected_width)


def test_length_correlation_covers_the_correlation():
    """Of normal numbers Spearman's tends to 6 / pi asin(rho / 2); 600 sets of 50."""
    truth = np.array([0.6, 6 / math.pi * math.asin(0.3)])
    random = np.random.default_rng(1)
    covered = np.zeros(2)
    for _ in range(600):
        first, noise = random.normal(size=(2, 50))
        results = length_correlation(0.6 * first + 0.8 * noise, first)
        low, high = np.array([[each.low, each.high] for each in results]).T
        covered += (low <= truth) & (truth <= high)
    np.testing.assert_allclose(covered / 600, 0.95, atol=3 * math.sqrt(0.05 * 0.95 / 600))


def test_length_correlation_of_points_in_line_has_no_width():
    lengths = np.array([1.0, 2.0, 5.0, 7.0, 9.0])
    falling = length_correlation(3 - 0.1 * lengths, lengths)
    assert falling.pearson + falling.spearman == pytest.approx((-1,) * 6)
    curved = length_correlation(np.exp(lengths), lengths)
    assert curved.spearman.mean == pytest.approx(1)
    assert curved.pearson.mean < 0.9


def test_length_correlation_refuses_what_has_none():
    with pytest.raises(ValueError, match=r"scores has shape \(3,\) and lengths \(4,\); both must"):
        length_correlation([1, 2, 3], [1, 2, 3, 4])
    with pytest.raises(ValueError, match="n at least 4"):
        length_correlation([1, 2, 3], [1, 2, 3])
    with pytest.raises(ValueError, match=r"lengths is 2\.0 throughout; a correlation needs it to"):
        length_correlation([1, 2, 3, 4], [2, 2, 2, 2])
    with pytest.raises(ValueError, match=r"scores\[2\] is inf; it must be finite"):
        length_correlation([1, 2, math.inf, 4], [1, 2, 3, 4])
    with pytest.raises(ValueError, match="confidence is 2; it must be between 0 and 1"):
        length_correlation([1, 2, 3, 5], [1, 2, 3, 4], confidence=2)


def test_ranks_are_those_of_scipy():
    values = np.array([2.0, 1.0, 2.0, 2.0, 0.0, 1.0])
    np.testing.assert_array_equal(reward_probes._ranks(values), scipy.stats.rankdata(values) - 1)
