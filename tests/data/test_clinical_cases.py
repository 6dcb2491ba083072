"""Hand-written patients with known answers, and the law of the sampled ones."""

import hashlib
import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jaxrl_llm.data import clinical_knowledge as knowledge
from jaxrl_llm.data.clinical_cases import (
    HELD_OUT_SHARE,
    NUM_PHRASINGS,
    SPLITS,
    Case,
    Contraindication,
    Vitals,
    case,
    choose,
)

NUM_CASES = 6000
CHI_SQUARED_13 = 34.5  # the 99.9% quantile with 13 degrees of freedom
CALM = Vitals(temperature=37.0, heart_rate=80, systolic=120, diastolic=75, oxygen_saturation=97)


def patient(condition: str, **details: Any) -> Case:
    healthy = Case(condition=condition, findings=("a finding",), vitals=CALM, age=40, sex="woman")
    return replace(healthy, **details)


@pytest.fixture(scope="module")
def sampled() -> list[Case]:
    return [case(0, index) for index in range(NUM_CASES)]


@pytest.mark.parametrize(
    ("condition", "details", "treatment", "warnings"),
    [
        ("pneumonia", {}, "amoxicillin", []),
        (
            "pneumonia",
            {"allergies": ("penicillin",)},
            "doxycycline",
            [("amoxicillin", "penicillin allergy")],
        ),
        (
            "pneumonia",
            {"allergies": ("penicillin",), "comorbidities": ("pregnancy",)},
            "erythromycin",
            [("amoxicillin", "penicillin allergy"), ("doxycycline", "pregnancy")],
        ),
        ("pneumonia", {"allergies": ("latex",)}, "amoxicillin", []),
        ("pneumonia", {"allergies": ("doxycycline",)}, "amoxicillin", []),
        (
            "acute coronary syndrome",
            {"allergies": ("aspirin",)},
            "clopidogrel",
            [("aspirin", "aspirin allergy")],
        ),
        (
            "acute coronary syndrome",
            {"allergies": ("aspirin",), "current_drugs": ("omeprazole",)},
            "ticagrelor",
            [("aspirin", "aspirin allergy"), ("clopidogrel", "omeprazole")],
        ),
        (
            "atrial fibrillation",
            {"comorbidities": ("asthma",)},
            "diltiazem",
            [("bisoprolol", "asthma")],
        ),
        (
            "gout",
            {"comorbidities": ("severe kidney disease",)},
            "prednisolone",
            [("naproxen", "severe kidney disease"), ("colchicine", "severe kidney disease")],
        ),
        (
            "gout",
            {"allergies": ("aspirin",), "current_drugs": ("warfarin",)},
            "colchicine",
            [("naproxen", "aspirin allergy")],
        ),
        (
            "hypertension",
            {"comorbidities": ("pregnancy",)},
            "labetalol",
            [("ramipril", "pregnancy"), ("amlodipine", "pregnancy")],
        ),
        (
            "type 2 diabetes",
            {"comorbidities": ("severe kidney disease",)},
            "linagliptin",
            [("metformin", "severe kidney disease")],
        ),
        (
            "depression",
            {"current_drugs": ("warfarin",)},
            "mirtazapine",
            [("sertraline", "warfarin")],
        ),
    ],
)
def test_case_has_known_treatment(
    condition: str, details: dict, treatment: str, warnings: list[tuple[str, str]]
) -> None:
    written = patient(condition, **details)
    assert written.treatment == treatment
    assert written.warnings == tuple(itertools.starmap(Contraindication, warnings))


@pytest.mark.parametrize(
    ("change", "follow_up"),
    [
        ({}, "2 days"),
        ({"oxygen_saturation": 92}, "2 days"),
        ({"oxygen_saturation": 91}, "admission"),
        ({"systolic": 91}, "2 days"),
        ({"systolic": 90}, "admission"),
        ({"heart_rate": 130}, "2 days"),
        ({"heart_rate": 131}, "admission"),
    ],
)
def test_follow_up_admits_at_the_thresholds_of_news2(change: dict, follow_up: str) -> None:
    assert patient("pneumonia", vitals=replace(CALM, **change)).follow_up == follow_up


def test_treatment_refuses_a_patient_for_whom_all_is_forbidden() -> None:
    written = patient("depression", allergies=("sertraline", "mirtazapine"))
    with pytest.raises(ValueError, match="no permitted drug for depression: all of sertraline, mi"):
        _ = written.treatment
    assert not written.plausible


@pytest.mark.parametrize(
    "details",
    [
        {"comorbidities": ("pregnancy",), "sex": "man"},
        {"comorbidities": ("pregnancy",), "age": 46},
        {"current_drugs": ("sildenafil",)},
        {"current_drugs": ("ramipril",), "allergies": ("ramipril",)},
        {"current_drugs": ("methotrexate",), "comorbidities": ("severe kidney disease",)},
    ],
)
def test_plausible_refuses_contradictions(details: dict) -> None:
    assert patient("pneumonia").plausible
    assert not patient("pneumonia", **details).plausible


def test_case_depends_on_seed_and_index_alone(sampled: list[Case]) -> None:
    backwards = [case(0, index) for index in reversed(range(50))]
    assert backwards[::-1] == sampled[:50]
    assert case(1, 0) != case(0, 0) != case(0, 1)


def test_case_is_the_same_in_every_version() -> None:
    """Checkpoints and preference files refer to cases by seed and index."""
    text = repr([case(0, index, split) for split in SPLITS for index in range(20)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "3be428eb1c0ead96"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0), "seed is -1; it must be at least 0"),
        ((0, -1), "index is -1; it must be at least 0"),
        ((0, 0, "test"), "split is 'test'; it must be one of 'train', 'held_out'"),
    ],
)
def test_case_refuses_bad_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case(*arguments)


def test_case_splits_share_no_content(sampled: list[Case]) -> None:
    held_out = [case(seed, index, "held_out") for seed in (0, 5) for index in range(150)]
    content = {replace(drawn, phrasing=0) for drawn in sampled}
    assert content.isdisjoint(replace(drawn, phrasing=0) for drawn in held_out)
    assert {drawn.split for drawn in held_out} == {"held_out"}
    assert {drawn.split for drawn in sampled} == {"train"}


def test_split_ignores_the_phrasing(sampled: list[Case]) -> None:
    for drawn in sampled[:50]:
        splits = {replace(drawn, phrasing=phrasing).split for phrasing in range(NUM_PHRASINGS)}
        assert splits == {"train"}


def test_split_holds_out_its_share() -> None:
    ages, rates = np.meshgrid(np.arange(18, 68), np.arange(60, 120))
    written = [
        patient("gout", age=int(age), vitals=replace(CALM, heart_rate=int(rate)))
        for age, rate in zip(ages.ravel(), rates.ravel(), strict=True)
    ]
    share = np.mean([drawn.split == "held_out" for drawn in written])
    deviation = np.sqrt(HELD_OUT_SHARE * (1 - HELD_OUT_SHARE) / len(written))
    assert abs(share - HELD_OUT_SHARE) < 4 * deviation


def test_case_is_plausible_and_within_range(sampled: list[Case]) -> None:
    for drawn in sampled:
        condition = knowledge.CONDITIONS[drawn.condition]
        assert drawn.plausible
        assert drawn.findings[0] in condition.hallmarks
        assert 2 <= len(set(drawn.findings)) == len(drawn.findings) <= 3
        assert condition.ages[0] <= drawn.age <= condition.ages[1]
        assert drawn.sex in condition.sexes
        assert drawn.vitals.diastolic < drawn.vitals.systolic


def test_case_covers_every_condition_and_treatment(sampled: list[Case]) -> None:
    conditions = Counter(drawn.condition for drawn in sampled)
    expected = NUM_CASES / len(knowledge.CONDITIONS)
    assert set(conditions) == set(knowledge.CONDITIONS)
    assert sum((n - expected) ** 2 / expected for n in conditions.values()) < CHI_SQUARED_13
    treatments = {(drawn.condition, drawn.treatment) for drawn in sampled}
    assert treatments == {
        (name, drug) for name, condition in knowledge.CONDITIONS.items() for drug in condition.drugs
    }


def test_case_gives_each_kind_of_reason_often(sampled: list[Case]) -> None:
    reasons = Counter(
        "allergy"
        if warning.reason.endswith(" allergy")
        else "comorbidity"
        if warning.reason in drawn.comorbidities
        else "current drug"
        for drawn in sampled
        for warning in drawn.warnings
    )
    assert all(reasons[kind] > 0.08 * NUM_CASES for kind in reasons)
    assert len(reasons) == 3
    warned = np.mean([bool(drawn.warnings) for drawn in sampled])
    admitted = np.mean([drawn.follow_up == "admission" for drawn in sampled])
    assert 0.3 < warned < 0.5
    assert 0.1 < admitted < 0.35


def test_choose_is_uniform() -> None:
    counts = Counter(choose(rng, "abcd") for rng in [np.random.default_rng(0)] for _ in range(8000))
    chi_squared = sum((count - 2000) ** 2 / 2000 for count in counts.values())
    assert set(counts) == set("abcd")
    assert chi_squared < 16.3  # the 99.9% quantile with 3 degrees of freedom
