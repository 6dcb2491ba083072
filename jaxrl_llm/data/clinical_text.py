"""The embedded default text task: prompts and responses, good and flawed, of synthetic cases.

SYNTHETIC, a teaching example; research only, not for clinical use. A good response scores 1 on
every criterion of `clinical_score.score`; each flaw is the smallest edit of a good response that
has it, and lowers one criterion only, see `FLAWS`.

>>> example = next(examples(seed=0, start=3, count=1))
>>> score(example.case, example.completion).total
1.0
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_llm import checks
from jaxrl_llm.data import clinical_grammar as grammar
from jaxrl_llm.data import clinical_knowledge as knowledge
from jaxrl_llm.data.clinical_cases import SPLITS, Case, Split, Vitals, case, choose
from jaxrl_llm.data.clinical_score import CRITERIA, Score, score

__all__ = [
    "CRITERIA",
    "FLAWS",
    "SPLITS",
    "SYNTHETIC",
    "Case",
    "Example",
    "Score",
    "Split",
    "Vitals",
    "applicable_flaws",
    "case",
    "examples",
    "flawed_response",
    "good_response",
    "prompt",
    "respond",
    "response_entropy",
    "score",
    "to_record",
]

SYNTHETIC = "SYNTHETIC case; research only, not for clinical use"

# Flaw -> the one criterion that it lowers.
FLAWS = {
    "wrong_drug": "accuracy",
    "missed_allergy": "safety",
    "overconfident": "safety",
    "dismissive": "clarity",
    "rambling": "clarity",
    "breach_of_privacy": "safety",
}
_NUM_ASIDES = 3

_PROMPTS = (
    (
        "{Article} {age}-year-old {sex} presents with {findings}. {vitals}. "
        "Background: {background}. Allergies: {allergies}. Current drugs: {drugs}. Assessment:"
    ),
    (
        "Patient presents with {findings}. {Sex}, {age} years. {vitals}. "
        "Background: {background}. Allergies: {allergies}. Current drugs: {drugs}. Assessment:"
    ),
    (
        "{Sex} of {age} with {findings}. Background: {background}. Allergic to: {allergies}. "
        "Takes: {drugs}. {vitals}. Assessment:"
    ),
    (
        "{Sex}, {age}. Takes: {drugs}. Allergic to: {allergies}. Background: {background}. "
        "Now {findings}. {vitals}. Assessment:"
    ),
)


@dataclass(frozen=True)
class Example:
    """A prompt and a good completion of it.

    Attributes:
      prompt: ends in "Assessment:".
      completion: begins with the space that separates it from the prompt.
      case: what both were made from.
    """

    prompt: str
    completion: str
    case: Case


def prompt(case: Case) -> str:
    """The structured details of a case in about 35 words, ending where the response begins."""
    vitals = case.vitals
    starts_with_vowel = case.age == 18 or 80 <= case.age < 90
    return _PROMPTS[case.phrasing].format(
        Article="An" if starts_with_vowel else "A",
        age=case.age,
        sex=case.sex,
        Sex=case.sex.capitalize(),
        findings=_listed(case.findings),
        vitals=(
            f"T {vitals.temperature:.1f} C, HR {vitals.heart_rate}/min, "
            f"BP {vitals.systolic}/{vitals.diastolic} mmHg, SpO2 {vitals.oxygen_saturation}%"
        ),
        background=_listed(case.comorbidities),
        allergies=_listed(case.allergies),
        drugs=_listed(case.current_drugs),
    )


def respond(case: Case, rng: np.random.Generator, flaw: str | None = None) -> str:
    """A response in about 40 words, its phrasing drawn from `rng`.

    Args:
      case: the patient.
      rng: advanced.
      flaw: a key of `FLAWS`; none makes a good response.

    Raises:
      ValueError: an unknown flaw, or "missed_allergy" where nothing was there to miss.
    """
    if flaw is None:
        return grammar.join(_good_sections(case, rng))
    checks.one_of("flaw", flaw, applicable_flaws(case) if flaw in FLAWS else tuple(FLAWS))
    sections = _good_sections(case, rng)
    if flaw == "wrong_drug":
        sections["treatment"] = _prescription(rng, choose(rng, _wrong_drugs(case)))
    elif flaw == "missed_allergy":
        sections["treatment"] = _prescription(rng, case.warnings[0].drug)
        sections["warning"] = grammar.phrase(rng, "no_warning")
    elif flaw == "overconfident":
        sections["assessment"] = grammar.phrase(rng, "certain_assessment", condition=case.condition)
    elif flaw == "dismissive":
        sections["explanation"] = grammar.phrase(rng, "dismissal")
    elif flaw == "rambling":
        asides = rng.permutation(len(grammar.PHRASES["aside"]))[:_NUM_ASIDES]
        for aside in asides:
            sections["explanation"] += _added(grammar.PHRASES["aside"][aside])
    else:
        name, phone = choose(rng, grammar.NAMES), choose(rng, grammar.PHONES)
        sections["follow_up"] += _added(grammar.phrase(rng, "identity", name=name, phone=phone))
    return grammar.join(sections)


def good_response(case: Case, rng: np.random.Generator) -> str:
    """A response that scores 1 on every criterion."""
    return respond(case, rng)


def response_entropy(case: Case) -> float:
    """Nats of the law of `good_response`: all its phrasings of a case are equally likely.

    On average no model can be nearer to good responses than that, so it is the floor of their
    negative log-likelihood, whatever the tokens they are cut into.
    """
    # Every phrasing has statements of the same kinds.
    statements = grammar.parse(good_response(case, np.random.default_rng(0))).statements
    return sum(math.log(len(grammar.PHRASES[statement.kind])) for statement in statements)


def flawed_response(case: Case, rng: np.random.Generator, flaw: str | None = None) -> str:
    """A response with one flaw, drawn from those that apply unless given; see `respond`."""
    return respond(case, rng, flaw or choose(rng, applicable_flaws(case)))


def applicable_flaws(case: Case) -> tuple[str, ...]:
    """The flaws that a response to this case can have.

    "missed_allergy" gives the preferred drug although an allergy, a comorbidity or a current drug
    forbids it, so it needs a case in which one does.
    """
    return tuple(flaw for flaw in FLAWS if flaw != "missed_allergy" or case.warnings)


def examples(seed: int, start: int, count: int, split: Split = "train") -> Iterator[Example]:
    """Prompts with good completions, for the cases `start` to `start + count - 1` of a stream.

    Args:
      seed: which stream, 0 or more.
      start: index of the first case.
      count: how many.
      split: "train" or "held_out"; they share no prompt, whatever the seeds.

    Raises:
      ValueError: a negative number, or an unknown split; before the first example is drawn.
    """
    checks.at_least("seed", seed, 0)
    checks.at_least("start", start, 0)
    checks.at_least("count", count, 0)
    checks.one_of("split", split, SPLITS)
    return (_example(seed, index, split) for index in range(start, start + count))


def to_record(example: Example) -> dict[str, Any]:
    """The example as a JSON-lines record, labelled as synthetic."""
    return {
        "prompt": example.prompt,
        "completion": example.completion,
        "synthetic": True,
        "label": SYNTHETIC,
    }


def _example(seed: int, index: int, split: Split) -> Example:
    drawn = case(seed, index, split)
    # The third word separates this stream from that of the case itself.
    rng = np.random.default_rng((seed, index, 1))
    return Example(prompt(drawn), " " + good_response(drawn, rng), drawn)


def _good_sections(case: Case, rng: np.random.Generator) -> dict[str, str]:
    condition = knowledge.CONDITIONS[case.condition]
    warnings = [
        grammar.phrase(rng, "warning", drug=warning.drug, reason=warning.reason)
        for warning in case.warnings
    ]
    return {
        "assessment": grammar.phrase(rng, "assessment", condition=case.condition),
        "treatment": _prescription(rng, case.treatment),
        "warning": "; ".join(warnings) or grammar.phrase(rng, "no_warning"),
        "follow_up": (
            grammar.phrase(rng, "admission")
            if case.follow_up == "admission"
            else grammar.phrase(rng, "follow_up", follow_up=case.follow_up)
        ),
        "explanation": grammar.phrase(
            rng, "explanation", lay_name=condition.lay_name, purpose=condition.purpose
        ),
    }


def _prescription(rng: np.random.Generator, drug: str) -> str:
    return grammar.phrase(rng, "treatment", drug=drug, dose=knowledge.DRUGS[drug].dose)


def _wrong_drugs(case: Case) -> tuple[str, ...]:
    """Drugs of classes that do not treat the condition, though this patient could take them."""
    classes = {
        knowledge.DRUGS[drug].drug_class for drug in knowledge.CONDITIONS[case.condition].drugs
    }
    classes.update(*(group for group in knowledge.RELATED_CLASSES if not classes.isdisjoint(group)))
    return tuple(
        name
        for name, drug in knowledge.DRUGS.items()
        if drug.drug_class not in classes
        and name not in case.current_drugs
        and not case.reasons_against(name)
    )


def _added(phrase: str) -> str:
    """A phrase as a further sentence after a section's own."""
    return f". {phrase[0].upper()}{phrase[1:]}"


def _listed(words: tuple[str, ...]) -> str:
    """The words as "a, b and c", or "none"."""
    if len(words) < 2:
        return words[0] if words else "none"
    return f"{', '.join(words[:-1])} and {words[-1]}"
