"""Whatever the grammar renders it parses back, and nothing else."""

import itertools

import numpy as np
import pytest

from jaxrl_llm.data import clinical_grammar as grammar

SECTIONS = {
    "assessment": "likely gout",
    "treatment": "give colchicine 500 micrograms twice daily",
    "warning": "avoid naproxen because of warfarin",
    "follow_up": "review in 1 week",
    "explanation": "this looks like gout, crystals in a joint, and this drug calms the joint",
}


def slots_of(phrasing: str) -> dict[str, str]:
    """The last value of each slot, which a too greedy alternation would miss."""
    return {slot: grammar.SLOTS[slot][-1] for slot in grammar.SLOTS if f"{{{slot}}}" in phrasing}


@pytest.mark.parametrize(
    ("section", "kind", "phrasing"),
    [
        (section, kind, phrasing)
        for section, kinds in grammar.KINDS_OF_SECTION.items()
        for kind in kinds
        for phrasing in grammar.PHRASES[kind]
    ],
)
def test_parse_inverts_every_phrasing(section: str, kind: str, phrasing: str) -> None:
    slots = slots_of(phrasing)
    text = grammar.join(SECTIONS | {section: phrasing.format(**slots)})
    parse = grammar.parse(text)
    (statement,) = parse.of_kind(kind)
    assert statement.slots == {slot: value.lower() for slot, value in slots.items()}
    assert parse.grammatical


@pytest.mark.parametrize("slot", grammar.SLOTS)
def test_parse_inverts_every_value_of_a_slot(slot: str) -> None:
    kind, phrasing = next(
        (kind, phrasing)
        for kind, phrasings in grammar.PHRASES.items()
        for phrasing in phrasings
        if f"{{{slot}}}" in phrasing
    )
    section = next(
        (name for name, kinds in grammar.KINDS_OF_SECTION.items() if kind in kinds), "assessment"
    )
    for value in grammar.SLOTS[slot]:
        text = phrasing.format(**(slots_of(phrasing) | {slot: value}))
        (statement,) = grammar.parse(f"{grammar.LABELS[section]}{text}.").of_kind(kind)
        assert statement.slots[slot] == value.lower()


@pytest.mark.parametrize("kind", grammar.LOOSE_KINDS)
def test_parse_accepts_loose_sentences_between_sections(kind: str) -> None:
    for phrasing in grammar.PHRASES[kind]:
        loose = phrasing.format(**slots_of(phrasing))
        parse = grammar.parse(
            grammar.join(SECTIONS | {"follow_up": f"{SECTIONS['follow_up']}. {loose}"})
        )
        assert parse.grammatical
        assert len(parse.of_kind(kind)) == 1


def test_parse_reads_several_warnings() -> None:
    text = "Warning: avoid naproxen because of lithium; withhold colchicine because of simvastatin."
    assert [statement.slots["drug"] for statement in grammar.parse(text).of_kind("warning")] == [
        "naproxen",
        "colchicine",
    ]


def test_parse_ignores_case_and_spaces() -> None:
    text = grammar.join(SECTIONS)
    assert grammar.parse(f"\n {text.upper()} ".replace(" ", "  ")) == grammar.parse(text)


@pytest.mark.parametrize("order", list(itertools.permutations(SECTIONS))[1::17])
def test_parse_refuses_another_order(order: tuple[str, ...]) -> None:
    text = " ".join(f"{grammar.LABELS[section]}{SECTIONS[section]}." for section in order)
    assert not grammar.parse(text).grammatical


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gout",
        "likely gout",
        "likely gout.",
        "likely bananas. " + grammar.join(SECTIONS),
        grammar.join(SECTIONS)[:-1],
        grammar.join(SECTIONS)[:-9],
        grammar.join(SECTIONS) + " Then",
        grammar.join(SECTIONS) + " " + grammar.join(SECTIONS),
        grammar.join(SECTIONS | {"treatment": SECTIONS["warning"]}),
        grammar.join(SECTIONS | {"treatment": "give colchicine"}),
        grammar.join(
            SECTIONS | {"warning": "no contraindication found; avoid naproxen because of warfarin"}
        ),
    ],
)
def test_parse_refuses_what_is_not_a_response(text: str) -> None:
    assert not grammar.parse(text).grammatical


def test_phrase_draws_every_phrasing() -> None:
    rng = np.random.default_rng(0)
    drawn = {grammar.phrase(rng, "assessment", condition="gout") for _ in range(100)}
    assert drawn == {text.format(condition="gout") for text in grammar.PHRASES["assessment"]}


def test_join_puts_sections_in_the_order_of_the_grammar() -> None:
    backwards = dict(reversed(SECTIONS.items()))
    assert grammar.join(backwards) == grammar.join(SECTIONS)
