"""The grammar of responses, written once: rendered by `clinical_text`, parsed by `clinical_score`.

A response is five sections in this order, of one sentence each:

    likely pneumonia. Treatment: give doxycycline 100 mg twice daily. Warning: avoid amoxicillin
    because of penicillin allergy. Follow-up: review in 2 days. Explanation: you probably have a
    lung infection, and this drug clears the infection.

A sentence is one of the phrases of its section, its slots filled from closed lists; a warning may
be several, joined by semicolons. Flawed responses have phrases of their own, so that they parse
too, and an unlabelled sentence may give a patient's identity away or ramble.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from jaxrl_llm.data import clinical_knowledge as knowledge
from jaxrl_llm.data.clinical_cases import choose

# Section -> its label in the text; the first has none, because the prompt ends with it.
LABELS = {
    "assessment": "",
    "treatment": "Treatment: ",
    "warning": "Warning: ",
    "follow_up": "Follow-up: ",
    "explanation": "Explanation: ",
}
# Kind of sentence -> its phrasings.
PHRASES = {
    "assessment": (
        "likely {condition}",
        "probably {condition}",
        "findings suggest {condition}",
        "most consistent with {condition}",
    ),
    "certain_assessment": (
        "definitely {condition}",
        "certainly {condition}",
        "without any doubt {condition}",
    ),
    "treatment": ("give {drug} {dose}", "start {drug} {dose}", "prescribe {drug} {dose}"),
    "warning": (
        "avoid {drug} because of {reason}",
        "do not give {drug} because of {reason}",
        "withhold {drug} because of {reason}",
    ),
    "no_warning": ("no contraindication found", "no contraindication known"),
    "follow_up": ("review in {follow_up}", "recheck in {follow_up}", "see again in {follow_up}"),
    "admission": ("admit to hospital today", "hospital admission today"),
    "explanation": (
        "you probably have {lay_name}, and {purpose}",
        "this looks like {lay_name}, and {purpose}",
        "we think that you have {lay_name}, and {purpose}",
    ),
    "dismissal": (
        "it is nothing, so stop worrying",
        "you are overreacting, so go home",
        "others are really ill, so stop complaining",
    ),
    "identity": ("the patient is {name}, phone {phone}", "call {name} on {phone}"),
    "aside": (
        "as one often says, medicine is a large field",
        "there are many things that one could say here",
        "then again every case is a case of its own",
        "speaking of which, the weather plays a part too",
        "but let us come back to that at another time",
        "one could of course look at it from many sides",
    ),
}
KINDS_OF_SECTION = {
    "assessment": ("assessment", "certain_assessment"),
    "treatment": ("treatment",),
    "warning": ("warning", "no_warning"),
    "follow_up": ("follow_up", "admission"),
    "explanation": ("explanation", "dismissal"),
}
# Sentences that belong to no section.
LOOSE_KINDS = ("identity", "aside")

FOLLOW_UP = ("2 days", "1 week", "2 weeks", "4 weeks", "3 months", "admission")
# Invented: no patient stands behind a case.
NAMES = ("Maria Jones", "John Baker", "Anna Schmidt", "David Clark")
PHONES = ("555-0142", "555-0177", "555-0163")

_CONDITIONS = knowledge.CONDITIONS.values()
_DRUGS = knowledge.DRUGS
SLOTS = {
    "condition": tuple(knowledge.CONDITIONS),
    "drug": tuple(_DRUGS),
    "dose": tuple(sorted({drug.dose for drug in _DRUGS.values()})),
    "reason": (
        *knowledge.COMORBIDITIES,
        *knowledge.CURRENT_DRUGS,
        *(f"{name} allergy" for name in knowledge.ALLERGIES),
    ),
    "follow_up": FOLLOW_UP[:-1],
    "lay_name": tuple(sorted({condition.lay_name for condition in _CONDITIONS})),
    "purpose": tuple(sorted({condition.purpose for condition in _CONDITIONS})),
    "name": NAMES,
    "phone": PHONES,
}


@dataclass(frozen=True)
class Statement:
    """One parsed phrase.

    Attributes:
      kind: a key of `PHRASES`, or "unparsed".
      slots: slot -> value, in lower case.
      text: what was parsed, in lower case.
    """

    kind: str
    slots: Mapping[str, str] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True)
class Parse:
    """A parsed response.

    Attributes:
      statements: in the order of the text.
      sections: the sections that parsed, in the order of the text.
    """

    statements: tuple[Statement, ...]
    sections: tuple[str, ...]

    @property
    def grammatical(self) -> bool:
        """Five sections in order, and nothing that the grammar does not know."""
        parsed = all(statement.kind != "unparsed" for statement in self.statements)
        return parsed and self.sections == tuple(LABELS)

    def of_kind(self, *kinds: str) -> tuple[Statement, ...]:
        return tuple(statement for statement in self.statements if statement.kind in kinds)


def phrase(rng: np.random.Generator, kind: str, **slots: str) -> str:
    """A phrase of `kind`, one of its phrasings at random, without the closing full stop."""
    return choose(rng, PHRASES[kind]).format(**slots)


def join(sections: Mapping[str, str]) -> str:
    """The text of a response from the phrases of its sections, in the grammar's order."""
    return " ".join(f"{label}{sections[section]}." for section, label in LABELS.items())


def parse(text: str) -> Parse:
    """Parses any string; sentences outside the grammar become statements of kind "unparsed".

    >>> parse("Likely gout. Bananas!").statements[0].slots
    {'condition': 'gout'}
    """
    normal = normalise(text)
    statements: list[Statement] = []
    sections: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s", normal) if normal else ():
        section, found = _parse_sentence(sentence)
        statements.extend(found)
        if section:
            sections.append(section)
    return Parse(tuple(statements), tuple(sections))


def normalise(text: str) -> str:
    """Lower case, single spaces."""
    return " ".join(text.lower().split())


def _parse_sentence(sentence: str) -> tuple[str | None, list[Statement]]:
    """The section of a sentence (None for one outside the sections), and what it states."""
    unparsed = [Statement("unparsed", text=sentence)]
    if not sentence.endswith("."):
        return None, unparsed
    section, body = "assessment", sentence[:-1]
    for name, label in LABELS.items():
        if label and body.startswith(label.lower()):
            section, body = name, body[len(label) :]
    clauses = body.split("; ") if section == "warning" else [body]
    kinds = KINDS_OF_SECTION[section] if len(clauses) == 1 else ("warning",)
    statements = [statement for clause in clauses if (statement := _match(clause, kinds))]
    if len(statements) == len(clauses):
        return section, statements
    loose = _match(body, LOOSE_KINDS) if section == "assessment" else None
    return (None, [loose]) if loose else (None, unparsed)


def _match(clause: str, kinds: tuple[str, ...]) -> Statement | None:
    for kind in kinds:
        for pattern in _PATTERNS[kind]:
            match = pattern.fullmatch(clause)
            if match:
                return Statement(kind, match.groupdict(), clause)
    return None


def _pattern(phrasing: str) -> re.Pattern[str]:
    """The regular expression of the texts that a phrasing can render, one group a slot."""
    parts = re.split(r"\{(\w+)\}", phrasing)
    for place in range(1, len(parts), 2):
        slot = parts[place]
        values = "|".join(re.escape(value.lower()) for value in SLOTS[slot])
        parts[place] = f"(?P<{slot}>{values})"
    return re.compile("".join(parts))


# Phrasings hold no character that a regular expression reads differently.
_PATTERNS = {kind: tuple(map(_pattern, phrasings)) for kind, phrasings in PHRASES.items()}
