"""The tables agree with one another."""

import pytest

from jaxrl_llm.data import clinical_grammar as grammar
from jaxrl_llm.data import clinical_knowledge as knowledge


@pytest.mark.parametrize("name", knowledge.CONDITIONS)
def test_condition_uses_the_other_tables(name: str) -> None:
    condition = knowledge.CONDITIONS[name]
    assert set(condition.drugs) <= set(knowledge.DRUGS)
    assert 2 <= len(set(condition.drugs)) == len(condition.drugs) <= 4
    assert condition.follow_up in grammar.FOLLOW_UP
    assert set(condition.vitals) <= set(knowledge.NORMAL_VITALS)
    assert set(condition.alarms) <= set(knowledge.ALARMING_VITALS)
    assert set(condition.sexes) <= {"man", "woman"}
    assert 18 <= condition.ages[0] < condition.ages[1]


@pytest.mark.parametrize("name", knowledge.CONDITIONS)
def test_condition_has_calm_vitals(name: str) -> None:
    ranges = knowledge.NORMAL_VITALS | knowledge.CONDITIONS[name].vitals
    assert ranges["heart_rate"][1] < knowledge.ALARMING_VITALS["heart_rate"][0]
    assert ranges["systolic"][0] > knowledge.ALARMING_VITALS["systolic"][1]
    assert ranges["oxygen_saturation"][0] > knowledge.ALARMING_VITALS["oxygen_saturation"][1]
    assert ranges["diastolic"][1] < ranges["systolic"][0]


def test_hallmark_belongs_to_one_condition() -> None:
    """Else the right assessment would be a guess."""
    hallmarks = [
        hallmark for condition in knowledge.CONDITIONS.values() for hallmark in condition.hallmarks
    ]
    assert len(hallmarks) == len(set(hallmarks)) == 2 * len(knowledge.CONDITIONS)


def test_explanation_belongs_to_one_condition() -> None:
    lay_names = [condition.lay_name for condition in knowledge.CONDITIONS.values()]
    assert len(lay_names) == len(set(lay_names))


def test_forbidding_factors_can_be_drawn() -> None:
    factors = {
        *knowledge.COMORBIDITIES,
        *knowledge.CURRENT_DRUGS,
        *(f"{allergy} allergy" for allergy in knowledge.FAMILY_ALLERGIES),
    }
    forbidding = {factor for drug in knowledge.DRUGS.values() for factor in drug.forbidden_by}
    assert forbidding <= factors


def test_drugs_are_used_and_classes_are_known() -> None:
    used = {drug for condition in knowledge.CONDITIONS.values() for drug in condition.drugs}
    classes = {drug.drug_class for drug in knowledge.DRUGS.values()}
    assert used == set(knowledge.DRUGS)
    assert {name for group in knowledge.RELATED_CLASSES for name in group} <= classes


def test_interactions_are_symmetric() -> None:
    """A patient on B must not get A, and one on A must not get B."""
    for name, drug in knowledge.DRUGS.items():
        for other in drug.forbidden_by:
            if other in knowledge.DRUGS and name in knowledge.CURRENT_DRUGS:
                assert name in knowledge.DRUGS[other].forbidden_by, (name, other)
