"""Structured synthetic cases: what a patient has, and by rule what is right for that patient.

SYNTHETIC; research only, not for clinical use. Case `index` of `seed` is the same whatever is
drawn before it, in whichever batch or process. The splits are disjoint by construction: the
content of a case, whatever its phrasing, decides by a hash which split it belongs to, and a draw
that belongs elsewhere is drawn again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from jaxrl_llm import checks
from jaxrl_llm.data import clinical_knowledge as knowledge

Split = Literal["train", "held_out"]
Option = TypeVar("Option")

SPLITS: tuple[Split, ...] = ("train", "held_out")
HELD_OUT_SHARE = 0.1  # of all contents
NUM_PHRASINGS = 4  # of a prompt, in `clinical_text`
_ALLERGY_SUFFIX = " allergy"


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """Vital signs on arrival.

    Attributes:
      temperature: C.
      heart_rate: beats a minute.
      systolic, diastolic: blood pressure, mmHg.
      oxygen_saturation: % on room air.
    """

    temperature: float
    heart_rate: int
    systolic: int
    diastolic: int
    oxygen_saturation: int

    @property
    def alarming(self) -> bool:
        """One vital sign alone scores 3 in NEWS2."""
        limit = knowledge.ALARMING_VITALS
        return (
            self.heart_rate >= limit["heart_rate"][0]
            or self.systolic <= limit["systolic"][1]
            or self.oxygen_saturation <= limit["oxygen_saturation"][1]
        )


@dataclass(frozen=True)
class Contraindication:
    """A drug that this patient must not get, and the first reason why."""

    drug: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Case:
    """One synthetic patient; everything that a response must say is derived.

    Attributes:
      condition: a key of `clinical_knowledge.CONDITIONS`; the correct assessment.
      findings: complaints and signs, a hallmark first.
      vitals: see `Vitals`.
      age: years.
      sex: "man" or "woman".
      comorbidities, allergies, current_drugs: as words; sampled cases have at most one of each.
      phrasing: which wording the prompt uses, below `NUM_PHRASINGS`.
    """

    condition: str
    findings: tuple[str, ...]
    vitals: Vitals
    age: int
    sex: str
    comorbidities: tuple[str, ...] = ()
    allergies: tuple[str, ...] = ()
    current_drugs: tuple[str, ...] = ()
    phrasing: int = 0

    def reasons_against(self, drug: str) -> tuple[str, ...]:
        """Why this patient must not get `drug`: allergies first; empty where nothing forbids it."""
        allergies = tuple(allergy + _ALLERGY_SUFFIX for allergy in self.allergies)
        listed = knowledge.DRUGS[drug].forbidden_by
        return tuple(
            reason
            for reason in allergies + self.comorbidities + self.current_drugs
            if reason in listed or reason == drug + _ALLERGY_SUFFIX
        )

    @property
    def options(self) -> tuple[str, ...]:
        """The drugs for this condition that nothing forbids, the preferred one first."""
        drugs = knowledge.CONDITIONS[self.condition].drugs
        return tuple(drug for drug in drugs if not self.reasons_against(drug))

    @property
    def treatment(self) -> str:
        """The right drug; its class and dose are in `clinical_knowledge.DRUGS`.

        Raises:
          ValueError: everything is forbidden, which no sampled case is.
        """
        if not self.options:
            raise ValueError(
                f"case has no permitted drug for {self.condition}: all of "
                f"{', '.join(knowledge.CONDITIONS[self.condition].drugs)} are forbidden; "
                "remove an allergy, comorbidity or current drug"
            )
        return self.options[0]

    @property
    def warnings(self) -> tuple[Contraindication, ...]:
        """The drugs preferred to `treatment` that had to be passed over."""
        drugs = knowledge.CONDITIONS[self.condition].drugs
        passed_over = drugs[: drugs.index(self.treatment)]
        return tuple(Contraindication(drug, self.reasons_against(drug)[0]) for drug in passed_over)

    @property
    def follow_up(self) -> str:
        """A key of `clinical_grammar.FOLLOW_UP`: an alarming vital sign means admission."""
        if self.vitals.alarming:
            return "admission"
        return knowledge.CONDITIONS[self.condition].follow_up

    @property
    def plausible(self) -> bool:
        """Such a patient can exist, and one of the listed drugs can be given."""
        circumstances = (*self.comorbidities, self.condition)
        if "pregnancy" in self.comorbidities and not (self.sex == "woman" and self.age <= 45):
            return False
        if "sildenafil" in self.current_drugs and self.sex != "man":
            return False
        clashes = (
            drug in knowledge.CONDITIONS[self.condition].drugs
            or any(
                drug in knowledge.IMPLAUSIBLE.get(circumstance, ())
                for circumstance in circumstances
            )
            or (drug in knowledge.DRUGS and self.reasons_against(drug))
            for drug in self.current_drugs
        )
        return not any(clashes) and bool(self.options)

    @property
    def split(self) -> Split:
        """The split to which the content belongs, whatever the phrasing."""
        return split_of(repr(replace(self, phrasing=0)))


def split_of(content: str) -> Split:
    """The split to which some content belongs, by a hash of it."""
    digest = hashlib.blake2b(content.encode(), digest_size=4).digest()
    share = int.from_bytes(digest, "big") / 2**32
    return "held_out" if share < HELD_OUT_SHARE else "train"


def case(seed: int, index: int, split: Split = "train") -> Case:
    """The synthetic case number `index` of the stream `seed`.

    >>> case(0, 7) == case(0, 7)
    True
    >>> case(0, 7, "held_out").split
    'held_out'

    Args:
      seed: 0 or more.
      index: 0 or more; there is no last one.
      split: "train" or "held_out"; no content occurs in both, whatever the seeds.

    Raises:
      ValueError: a negative seed or index, or an unknown split.
    """
    checks.at_least("seed", seed, 0)
    checks.at_least("index", index, 0)
    checks.one_of("split", split, SPLITS)
    rng = np.random.default_rng((seed, index))
    name = choose(rng, _NAMES)  # once, so that conditions are equally likely
    while True:
        drawn = _draw(rng, name)
        if drawn.plausible and drawn.split == split:
            return drawn


def choose(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    """One of `options`, uniformly; several times as fast as `rng.choice`."""
    return options[int(rng.random() * len(options))]


def _draw(rng: np.random.Generator, name: str) -> Case:
    """A case of a condition; it may be implausible, or of the other split."""
    condition = knowledge.CONDITIONS[name]
    first, second = rng.random(2)
    others = list(condition.findings)
    findings = [choose(rng, condition.hallmarks), others.pop(int(first * len(others)))]
    if second < 0.5:
        findings.append(choose(rng, others))
    return Case(
        condition=name,
        findings=tuple(findings),
        vitals=_draw_vitals(rng, condition),
        age=_integer(rng, condition.ages),
        sex=choose(rng, condition.sexes),
        comorbidities=_draw_factor(rng, _RELEVANT_COMORBIDITIES[name], knowledge.COMORBIDITIES),
        allergies=_draw_factor(rng, _RELEVANT_ALLERGIES[name], knowledge.ALLERGIES),
        current_drugs=_draw_factor(rng, _RELEVANT_DRUGS[name], knowledge.CURRENT_DRUGS),
        phrasing=int(rng.random() * NUM_PHRASINGS),
    )


def _draw_vitals(rng: np.random.Generator, condition: knowledge.Condition) -> Vitals:
    ranges = knowledge.NORMAL_VITALS | condition.vitals
    if condition.alarms and rng.random() < 0.25:
        alarm = choose(rng, condition.alarms)
        ranges[alarm] = knowledge.ALARMING_VITALS[alarm]
        if alarm == "systolic":
            ranges["diastolic"] = (44, 58)
    low, high = ranges["temperature"]
    return Vitals(
        temperature=round(low + rng.random() * (high - low), 1),
        heart_rate=_integer(rng, ranges["heart_rate"]),
        systolic=_integer(rng, ranges["systolic"]),
        diastolic=_integer(rng, ranges["diastolic"]),
        oxygen_saturation=_integer(rng, ranges["oxygen_saturation"]),
    )


def _draw_factor(
    rng: np.random.Generator, relevant: tuple[str, ...], every: tuple[str, ...]
) -> tuple[str, ...]:
    """Nothing half of the time; else a factor that matters to the condition, or any at all."""
    draw = rng.random()
    if draw < 0.5:
        return ()
    return (choose(rng, relevant if relevant and draw < 0.85 else every),)


def _integer(rng: np.random.Generator, ends: tuple[float, float]) -> int:
    """A whole number between two ends, both included."""
    low, high = ends
    return int(low + rng.random() * (high - low + 1))


def _relevant(name: str, every: Sequence[str], suffix: str = "") -> tuple[str, ...]:
    """Which of `every` forbids one of the condition's drugs."""
    drugs = knowledge.CONDITIONS[name].drugs
    forbidding = {reason for drug in drugs for reason in knowledge.DRUGS[drug].forbidden_by}
    return tuple(factor for factor in every if factor + suffix in forbidding)


_NAMES = tuple(knowledge.CONDITIONS)
_RELEVANT_COMORBIDITIES = {name: _relevant(name, knowledge.COMORBIDITIES) for name in _NAMES}
_RELEVANT_DRUGS = {name: _relevant(name, knowledge.CURRENT_DRUGS) for name in _NAMES}
# Nobody can be told apart by an allergy to the drug of last resort: it is never passed over.
_RELEVANT_ALLERGIES = {
    name: _relevant(name, knowledge.FAMILY_ALLERGIES, _ALLERGY_SUFFIX)
    + knowledge.CONDITIONS[name].drugs[:-1]
    for name in _NAMES
}
