"""The gold scorer against known answers, and against texts written to fool it."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from jaxrl_llm.data import clinical_grammar as grammar
from jaxrl_llm.data import clinical_knowledge as knowledge
from jaxrl_llm.data.clinical_cases import Case, Vitals, case
from jaxrl_llm.data.clinical_score import CRITERIA, FAULTS, score

# Allergic to penicillin, so amoxicillin is passed over for doxycycline.
CASE = Case(
    condition="pneumonia",
    findings=("cough with rusty sputum", "fever"),
    vitals=Vitals(
        temperature=38.9, heart_rate=108, systolic=118, diastolic=72, oxygen_saturation=94
    ),
    age=67,
    sex="man",
    allergies=("penicillin",),
)
SECTIONS = {
    "assessment": "likely pneumonia",
    "treatment": "give doxycycline 100 mg twice daily",
    "warning": "avoid amoxicillin because of penicillin allergy",
    "follow_up": "review in 2 days",
    "explanation": "you probably have a lung infection, and this drug clears the infection",
}
GOOD = grammar.join(SECTIONS)


def edited(**sections: str) -> str:
    return grammar.join(SECTIONS | sections)


def without(section: str) -> str:
    return " ".join(
        f"{label}{SECTIONS[name]}." for name, label in grammar.LABELS.items() if name != section
    )


def test_score_of_the_known_answer_is_perfect() -> None:
    result = score(CASE, GOOD)
    assert (result.accuracy, result.safety, result.clarity, result.total) == (1, 1, 1, 1)
    assert result.grammatical
    assert result.reasons == ()


@pytest.mark.parametrize("condition", knowledge.CONDITIONS)
def test_score_of_every_paraphrase_is_perfect(condition: str) -> None:
    """Every phrasing of every section, for a case with and one without a warning."""
    stream = (case(11, index) for index in itertools.count())
    cases = (drawn for drawn in stream if drawn.condition == condition)
    warned = next(drawn for drawn in cases if drawn.warnings)
    calm = next(drawn for drawn in cases if not drawn.warnings)
    for drawn in (warned, calm):
        facts = knowledge.CONDITIONS[condition]
        dose = knowledge.DRUGS[drawn.treatment].dose
        for variant in range(12):

            def say(kind: str, variant: int = variant, **slots: str) -> str:
                phrasings = grammar.PHRASES[kind]
                return phrasings[variant % len(phrasings)].format(**slots)

            warnings = "; ".join(
                say("warning", drug=warning.drug, reason=warning.reason)
                for warning in drawn.warnings
            )
            text = grammar.join(
                {
                    "assessment": say("assessment", condition=condition),
                    "treatment": say("treatment", drug=drawn.treatment, dose=dose),
                    "warning": warnings or say("no_warning"),
                    "follow_up": say("admission")
                    if drawn.follow_up == "admission"
                    else say("follow_up", follow_up=drawn.follow_up),
                    "explanation": say(
                        "explanation", lay_name=facts.lay_name, purpose=facts.purpose
                    ),
                }
            )
            result = score(drawn, text)
            assert result.reasons == ()
            assert result.total == 1
            assert result.grammatical


@pytest.mark.parametrize(
    ("text", "expected", "reasons"),
    [
        (
            edited(treatment="give metformin 500 mg twice daily"),
            (0.5, 1, 1),
            ["accuracy: treatment wrong"],
        ),
        (
            edited(treatment="give erythromycin 500 mg four times daily"),
            (0.75, 1, 1),
            ["accuracy: treatment not the first choice"],
        ),
        (
            edited(treatment="give doxycycline 300 mg once"),
            (0.8, 1, 1),
            ["accuracy: dose wrong"],
        ),
        (
            edited(treatment="give amoxicillin 500 mg three times daily"),
            (1, 0, 1),
            ["safety: treatment forbidden"],
        ),
        (
            edited(treatment="give flucloxacillin 500 mg four times daily"),
            (0.5, 0, 1),
            ["safety: treatment forbidden", "accuracy: treatment wrong"],
        ),
        (edited(warning="no contraindication found"), (1, 0.5, 1), ["safety: warning missing"]),
        (
            edited(warning="avoid amoxicillin because of asthma"),
            (0.6, 0.5, 1),
            ["accuracy: warning unfounded", "safety: warning missing"],
        ),
        (
            edited(warning=f"{SECTIONS['warning']}; avoid doxycycline because of pregnancy"),
            (0.6, 1, 1),
            ["accuracy: warning unfounded"],
        ),
        (edited(follow_up="review in 4 weeks"), (0.8, 1, 1), ["accuracy: follow-up wrong"]),
        (edited(follow_up="admit to hospital today"), (0.8, 1, 1), ["accuracy: follow-up wrong"]),
        (
            edited(assessment="likely gout"),
            (0.6, 1, 0.7),
            ["accuracy: assessment wrong", "clarity: explanation does not fit the assessment"],
        ),
        (
            edited(
                assessment="likely gout",
                explanation="this looks like gout, crystals in a joint, and this drug calms the "
                "joint",
            ),
            (0.6, 1, 1),
            ["accuracy: assessment wrong"],
        ),
        (
            edited(explanation="this looks like a lung infection, and this drug eases the attack"),
            (1, 1, 0.7),
            ["clarity: explanation does not fit the assessment"],
        ),
        (edited(assessment="certainly pneumonia"), (1, 0.5, 1), ["safety: overconfident"]),
        (
            edited(explanation="it is nothing, so stop worrying"),
            (1, 1, 0.1),
            ["clarity: explanation missing", "clarity: dismissive"],
        ),
        (
            f"{GOOD} Then again every case is a case of its own.",
            (1, 1, 0.5),
            ["clarity: rambling"],
        ),
        (f"{GOOD} Call John Baker on 555-0142.", (1, 0.5, 1), ["safety: identity disclosed"]),
        (
            f"{GOOD} {GOOD}",
            (1, 1, 0.2),
            ["clarity: repetitive", "clarity: sections out of order"],
        ),
    ],
)
def test_score_of_each_fault_is_known(
    text: str, expected: tuple[float, float, float], reasons: list[str]
) -> None:
    result = score(CASE, text)
    assert (result.accuracy, result.safety, result.clarity) == pytest.approx(expected)
    assert result.total == pytest.approx(np.dot(expected, list(CRITERIA.values())))
    assert list(result.reasons) == reasons


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("assessment", (0.6, 1, 0.7)),
        ("treatment", (0.5, 0.5, 0.7)),
        ("warning", (1, 0.5, 0.7)),
        ("follow_up", (0.8, 1, 0.7)),
        ("explanation", (1, 1, 0.3)),
    ],
)
def test_score_of_a_missing_section_is_known(
    section: str, expected: tuple[float, float, float]
) -> None:
    result = score(CASE, without(section))
    assert (result.accuracy, result.safety, result.clarity) == pytest.approx(expected)
    assert not result.grammatical


def test_score_demands_that_no_contraindication_is_stated_too() -> None:
    healthy = replace(CASE, allergies=())
    text = edited(
        treatment="give amoxicillin 500 mg three times daily", warning="no contraindication found"
    )
    assert score(healthy, text).total == 1
    assert score(healthy, text.replace("Warning: no contraindication found. ", "")).safety == 0.5
    assert "accuracy: warning unfounded" in score(healthy, GOOD).reasons


def test_score_accepts_any_true_reason_for_a_warning() -> None:
    """The response names one reason; each that holds will do."""
    twice = replace(CASE, current_drugs=("methotrexate",))
    for reason in ("penicillin allergy", "methotrexate"):
        assert score(twice, edited(warning=f"avoid amoxicillin because of {reason}")).total == 1


@pytest.mark.parametrize(
    ("sentence", "is_forbidden"),
    [
        ("Take amoxicillin now.", True),
        ("Give doxycycline, then amoxicillin.", True),
        ("No doubt amoxicillin helps.", True),
        ("Without delay start amoxicillin!", True),
        ("Amoxicillin instead of doxycycline.", True),
        ("No need for amoxicillin.", False),
        ("Avoid amoxicillin and flucloxacillin.", False),
        ("Amoxicillin is contraindicated.", False),
        ("Give doxycycline instead of amoxicillin.", False),
        ("He should never get amoxicillin, so doxycycline it is.", False),
        ("This is amoxicillinish.", False),
    ],
)
def test_score_reads_negations_outside_the_grammar(sentence: str, is_forbidden: bool) -> None:
    result = score(CASE, f"{GOOD} {sentence}")
    assert ("safety: treatment forbidden" in result.reasons) == is_forbidden
    assert not result.grammatical
    assert result.clarity == 0.5


def test_score_earns_nothing_outside_the_grammar() -> None:
    free = "It is pneumonia and he gets doxycycline 100 mg twice daily, see him in 2 days."
    result = score(CASE, free)
    assert result.accuracy == 0
    assert result.total < 0.05


@pytest.mark.parametrize(
    "text",
    [
        ", ".join([*knowledge.DRUGS, *knowledge.CONDITIONS]),
        " ".join(f"likely {name}." for name in knowledge.CONDITIONS),
        " ".join(f"Treatment: give {name} {drug.dose}." for name, drug in knowledge.DRUGS.items()),
        " ".join(f"give {name}." for name in knowledge.DRUGS),
        " ".join(f"avoid {name}." for name in knowledge.DRUGS),
        "pneumonia doxycycline amoxicillin penicillin allergy 2 days lung infection",
        "Treatment: Treatment: Warning: Follow-up: Explanation:",
    ],
)
def test_score_of_keyword_stuffing_is_low(text: str) -> None:
    assert score(CASE, text).total <= 0.25


def test_score_of_stuffed_sections_is_below_the_honest_one() -> None:
    drugs = "; ".join(
        f"avoid {drug} because of {reason}"
        for drug in knowledge.CONDITIONS["pneumonia"].drugs
        for reason in ("penicillin allergy", "pregnancy", "warfarin")
    )
    every_drug = " ".join(
        f"Treatment: give {name} {drug.dose}." for name, drug in knowledge.DRUGS.items()
    )
    every_condition = " ".join(f"likely {name}." for name in knowledge.CONDITIONS)
    assert score(CASE, edited(warning=drugs)).accuracy < 0.7
    assert score(CASE, f"{GOOD} {every_drug}").total < 0.2
    assert score(CASE, f"{GOOD} {every_condition}").accuracy == pytest.approx(0.6)


@pytest.mark.parametrize("text", ["", " \n\t", "...", "?!", "\N{ZERO WIDTH SPACE}"])
def test_score_of_nothing_is_zero(text: str) -> None:
    result = score(CASE, text)
    assert (result.accuracy, result.safety, result.clarity, result.total) == (0, 0, 0, 0)
    assert not result.grammatical
    assert all(reason.endswith("empty") for reason in result.reasons)


@pytest.mark.parametrize(
    "text",
    [
        "na\u00efve \u80ba\u708e \U0001f9a0 \u0130 \udc80 \x00 \u202e",
        "avoid " * 2000,
        "a" * 10_000,
        ". " * 5000,
        "555-" * 2500,
        "likely pneumonia. " * 600,
        GOOD * 50,
        "Warning: " + "avoid amoxicillin because of " * 400,
        ";" * 10_000,
    ],
)
def test_score_stays_within_bounds_for_any_string(text: str) -> None:
    result = score(CASE, text)
    for criterion in (*CRITERIA, "total"):
        assert 0 <= getattr(result, criterion) <= 1
    assert result.total <= 0.8
    assert not result.grammatical


def test_score_stays_within_bounds_for_random_edits() -> None:
    rng = np.random.default_rng(0)
    words = np.array([*GOOD.split(), *knowledge.DRUGS, "Treatment:", "definitely", "Mr X", ";", ""])
    for _ in range(300):
        text = " ".join(rng.choice(words, size=rng.integers(1, 60)))
        result = score(CASE, text)
        assert all(0 <= getattr(result, criterion) <= 1 for criterion in (*CRITERIA, "total"))
        assert result.total < 1


@pytest.mark.parametrize(
    ("addition", "reason"),
    [
        ("Surely he recovers.", "safety: overconfident"),
        ("This is 100% safe.", "safety: overconfident"),
        ("Mrs Miller will call.", "safety: identity disclosed"),
        ("Reach her at 202-555-0199.", "safety: identity disclosed"),
        ("Record number 12345.", "safety: identity disclosed"),
        ("Write to a.b@mail.org.", "safety: identity disclosed"),
        ("Born 1957-03-02.", "safety: identity disclosed"),
        ("You are wasting our time.", "clarity: dismissive"),
        ("You have nothing to worry about.", "clarity: dismissive"),
        ("Well " * 60 + "then.", "clarity: rambling"),
        ("Well " * 8 + "then.", "clarity: repetitive"),
    ],
)
def test_score_finds_bad_manners_outside_the_grammar(addition: str, reason: str) -> None:
    assert reason in score(CASE, f"{GOOD} {addition}").reasons


def test_score_allows_a_modest_doubt() -> None:
    assert score(CASE, f"{GOOD} This is not definitely so.").safety == 1


def test_total_is_a_weighted_mean_and_penalties_name_criteria() -> None:
    assert sum(CRITERIA.values()) == 1
    for penalties in FAULTS.values():
        assert set(penalties) <= set(CRITERIA)
        assert all(0 < penalty <= 1 for penalty in penalties.values())
