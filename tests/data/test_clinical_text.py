"""Prompts, good and flawed responses, and the records of the embedded text task."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from jaxrl_llm.data import clinical_cases, clinical_text
from jaxrl_llm.data.clinical_text import (
    CRITERIA,
    FLAWS,
    SYNTHETIC,
    Case,
    Example,
    Vitals,
    applicable_flaws,
    case,
    examples,
    flawed_response,
    good_response,
    prompt,
    respond,
    response_entropy,
    score,
    to_record,
)

NUM_EXAMPLES = 1500
WRITTEN = Case(
    condition="pneumonia",
    findings=("cough with rusty sputum", "fever", "shivering"),
    vitals=Vitals(
        temperature=38.9, heart_rate=108, systolic=118, diastolic=72, oxygen_saturation=94
    ),
    age=80,
    sex="woman",
    comorbidities=("asthma",),
    allergies=("penicillin",),
)


@pytest.fixture(scope="module")
def drawn() -> list[Example]:
    return list(examples(0, 0, NUM_EXAMPLES))


def test_prompt_states_the_details() -> None:
    assert prompt(WRITTEN) == (
        "An 80-year-old woman presents with cough with rusty sputum, fever and shivering. "
        "T 38.9 C, HR 108/min, BP 118/72 mmHg, SpO2 94%. Background: asthma. "
        "Allergies: penicillin. Current drugs: none. Assessment:"
    )
    assert prompt(replace(WRITTEN, age=79)).startswith("A 79-year-old")


def test_prompt_has_the_details_in_every_phrasing() -> None:
    prompts = [
        prompt(replace(WRITTEN, phrasing=phrasing))
        for phrasing in range(clinical_cases.NUM_PHRASINGS)
    ]
    assert len(set(prompts)) == len(clinical_text._PROMPTS)
    for text in prompts:
        assert text.endswith("Assessment:")
        for detail in ("80", "asthma", "penicillin", "none", "38.9 C", "94%", "rusty sputum"):
            assert detail in text
        assert re.search("woman", text, re.IGNORECASE)


def test_prompt_and_response_are_short(drawn: list[Example]) -> None:
    prompts = [len(example.prompt.split()) for example in drawn]
    responses = [len(example.completion.split()) for example in drawn]
    assert min(prompts) >= 25
    assert max(prompts) <= 45
    assert min(responses) >= 25
    assert max(responses) <= 60
    assert 30 < np.mean(prompts) < 36
    assert 34 < np.mean(responses) < 41


def test_vocabulary_is_closed_and_small(drawn: list[Example]) -> None:
    words = {
        word
        for example in drawn
        for word in re.findall(r"[A-Za-z][\w-]*", "".join(vars_of(example)))
    }
    assert len(words) < 350


def vars_of(example: Example) -> tuple[str, str]:
    return example.prompt, example.completion


def test_good_response_is_perfect(drawn: list[Example]) -> None:
    for example in drawn:
        result = score(example.case, example.completion)
        assert result == score(example.case, example.completion.strip())
        assert [result.accuracy, result.safety, result.clarity, result.total] == [1.0] * 4
        assert result.grammatical
        assert result.reasons == ()


def test_good_response_says_the_known_answer() -> None:
    rng = np.random.default_rng(0)
    responses = {good_response(WRITTEN, rng) for _ in range(100)}
    assert len(responses) > 80
    for text in responses:
        assert "doxycycline 100 mg twice daily. Warning: " in text
        assert " amoxicillin because of penicillin allergy. Follow-up: " in text
        assert " 2 days. Explanation: " in text


@pytest.mark.parametrize("flaw", FLAWS)
def test_flaw_lowers_its_criterion_only(flaw: str, drawn: list[Example]) -> None:
    rng = np.random.default_rng(1)
    flawed = [example.case for example in drawn if flaw in applicable_flaws(example.case)]
    assert len(flawed) > 0.3 * NUM_EXAMPLES
    for flawed_case in flawed:
        result = score(flawed_case, respond(flawed_case, rng, flaw))
        assert result.grammatical
        for criterion in CRITERIA:
            assert (getattr(result, criterion) < 1) == (criterion == FLAWS[flaw])
            assert getattr(result, criterion) in {1.0, 0.5, 0.0} or flaw == "dismissive"


@pytest.mark.parametrize("flaw", FLAWS)
def test_flaw_is_a_small_edit_of_the_good_response(flaw: str) -> None:
    """From the same generator, sections that the flaw is not about stay as they were."""
    good = good_response(WRITTEN, np.random.default_rng(2))
    flawed = respond(WRITTEN, np.random.default_rng(2), flaw)
    kept = set(re.split(r"\. ", good)) & set(re.split(r"\. ", flawed))
    assert good != flawed
    assert len(kept) >= (3 if flaw == "missed_allergy" else 4)


def test_missed_allergy_gives_what_is_forbidden() -> None:
    text = respond(WRITTEN, np.random.default_rng(0), "missed_allergy")
    assert "amoxicillin 500 mg three times daily. Warning: no contraindication" in text
    assert score(WRITTEN, text).safety == 0


def test_wrong_drug_is_harmless_for_the_patient_and_for_another_condition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        result = score(WRITTEN, respond(WRITTEN, rng, "wrong_drug"))
        assert result.reasons == ("accuracy: treatment wrong",)


def test_respond_depends_on_the_generator_alone() -> None:
    for flaw in (None, *FLAWS):
        first, second = (respond(WRITTEN, np.random.default_rng(3), flaw) for _ in range(2))
        assert first == second


def test_flawed_response_draws_every_applicable_flaw() -> None:
    rng = np.random.default_rng(0)
    reasons = {score(WRITTEN, flawed_response(WRITTEN, rng)).reasons for _ in range(100)}
    assert len(reasons) == len(FLAWS)
    assert () not in reasons


def test_respond_refuses_unknown_and_impossible_flaws() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="flaw is 'rude'; it must be one of 'wrong_drug', 'missed"):
        respond(WRITTEN, rng, "rude")
    healthy = replace(WRITTEN, allergies=())
    with pytest.raises(ValueError, match="flaw is 'missed_allergy'; it must be one of 'wrong_dr"):
        respond(healthy, rng, "missed_allergy")
    assert "missed_allergy" not in applicable_flaws(healthy)


def test_examples_do_not_depend_on_the_batch(drawn: list[Example]) -> None:
    assert list(examples(0, 7, 3)) == drawn[7:10]
    assert list(examples(0, 7, 0)) == []
    assert drawn[7].case == case(0, 7)
    assert drawn[7].prompt == prompt(drawn[7].case)


def test_examples_of_the_splits_share_no_prompt(drawn: list[Example]) -> None:
    held_out = {example.prompt for example in examples(0, 0, 200, "held_out")}
    assert len(held_out) == 200
    assert held_out.isdisjoint(example.prompt for example in drawn)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 1), "seed is -1"),
        ((0, -1, 1), "start is -1"),
        ((0, 0, -1), "count is -1"),
        ((0, 0, 1, "all"), "split is 'all'; it must be one of"),
    ],
)
def test_examples_refuse_bad_arguments_at_once(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        examples(*arguments)


def test_to_record_is_labelled_synthetic(drawn: list[Example]) -> None:
    record = json.loads(json.dumps(to_record(drawn[0])))
    assert record == {
        "prompt": drawn[0].prompt,
        "completion": drawn[0].completion,
        "synthetic": True,
        "label": SYNTHETIC,
    }
    assert SYNTHETIC.startswith("SYNTHETIC")
    assert record["completion"].startswith(" ")


@pytest.mark.parametrize("num_warnings", [0, 1])
def test_response_entropy_is_the_log_of_the_number_of_responses(num_warnings):
    patients = (case(0, index) for index in range(100))
    patient = next(patient for patient in patients if len(patient.warnings) == num_warnings)
    seen = {good_response(patient, np.random.default_rng(seed)) for seed in range(6000)}
    assert response_entropy(patient) == pytest.approx(math.log(len(seen)), rel=1e-12)
