"""Which of two responses is better, as JSON lines, in the formats that users of TRL have.

| record | prompt |
|---|---|
| `{"prompt": str, "chosen": str, "rejected": str}` | given |
| `{"chosen": str, "rejected": str}` | what both texts begin with |
| `{"prompt": [message], "chosen": [message], "rejected": [message]}` | given |
| `{"chosen": [message], "rejected": [message]}` | the turns that both begin with |
| `{"prompt": ..., "completion": ..., "label": bool}` | given; one response, good or not |

A preference may also have `"margin": number`, `"annotator": str`, `"tie": bool`, ratings of whole
responses as `"score_chosen": number, "score_rejected": number`, and ratings by criterion as
`"ratings": {criterion: [of chosen, of rejected]}`. What is null is missing, and other fields are
ignored. A response begins with an assistant turn, and everything after the start of that turn is
the response, further turns too, as in TRL.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jaxrl_llm.data import json_lines
from jaxrl_llm.data.json_lines import CHATML, Template, json_type

# What `score_chosen` and `score_rejected` rate.
OVERALL = "overall"

Rating = tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Two responses to a prompt, and which one somebody prefers.

    Attributes:
      prompt, chosen, rejected: texts.
      margin: by how much the chosen one should win, in the reward's unit; None where unknown.
      annotator: who compared them.
      tie: neither is better, and "chosen" only names the first.
      ratings: criterion -> ratings of the chosen and of the rejected one, None where unknown.
    """

    prompt: str
    chosen: str
    rejected: str
    margin: float | None = None
    annotator: str | None = None
    tie: bool = False
    ratings: Mapping[str, Rating] = field(default_factory=dict[str, Rating], hash=False)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One response to a prompt, and whether it is a good one: what KTO learns from."""

    prompt: str
    completion: str
    desirable: bool


def read_preferences(path: str | Path, *, template: Template = CHATML) -> Iterator[Preference]:
    """The preferences of a file; arguments and errors as `json_lines.read_json_lines`."""
    return json_lines.read_records(path, partial(parse_preference, template=template))


def read_judgements(path: str | Path, *, template: Template = CHATML) -> Iterator[Judgement]:
    """The judgements of a file; arguments and errors as `json_lines.read_json_lines`."""
    return json_lines.read_records(path, partial(parse_judgement, template=template))


def write_preferences(path: str | Path, preferences: Iterable[Preference]) -> int:
    """Writes preferences that `read_preferences` and TRL read; see `json_lines.write_records`."""
    return json_lines.write_records(path, map(to_record, preferences), parse_preference)


def unpair(preference: Preference) -> tuple[Judgement, Judgement]:
    """The chosen response as a desirable one, the rejected as an undesirable one.

    Raises:
      ValueError: of a tie, whose responses are neither.
    """
    if preference.tie:
        raise ValueError("preference is a tie, so neither response is desirable; leave it out")
    return (
        Judgement(prompt=preference.prompt, completion=preference.chosen, desirable=True),
        Judgement(prompt=preference.prompt, completion=preference.rejected, desirable=False),
    )


def to_record(preference: Preference) -> dict[str, Any]:
    """A preference between texts as a JSON-lines record; what is unknown is left out."""
    record: dict[str, Any] = {
        "prompt": preference.prompt,
        "chosen": preference.chosen,
        "rejected": preference.rejected,
    }
    if preference.margin is not None:
        record["margin"] = preference.margin
    if preference.annotator is not None:
        record["annotator"] = preference.annotator
    if preference.tie:
        record["tie"] = True
    if preference.ratings:
        record["ratings"] = {name: list(pair) for name, pair in preference.ratings.items()}
    return record


def parse_preference(record: object, *, template: Template = CHATML) -> Preference:
    """One record in any of the formats above but the last.

    Raises:
      ValueError: naming the field.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"the record is {json_type(record)}; it must be an object")
    for name in ("chosen", "rejected"):
        if name not in record:
            raise ValueError(f'"{name}" is missing; a preference has "chosen" and "rejected"')
    explicit = record if "prompt" in record else with_prompt(record)
    prompt, chosen = _response(explicit, "chosen", template)
    _, rejected = _response(explicit, "rejected", template)
    if chosen == rejected:
        raise ValueError('"chosen" and "rejected" are the same; leave the record out')
    annotator, tie = record.get("annotator"), record.get("tie")
    return Preference(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=_number('"margin"', record.get("margin")),
        annotator=None if annotator is None else json_lines.parse_text('"annotator"', annotator),
        tie=tie is not None and _boolean('"tie"', tie),
        ratings=_ratings(record),
    )


def parse_judgement(record: object, *, template: Template = CHATML) -> Judgement:
    """One record in the last of the formats above.

    Raises:
      ValueError: naming the field.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"the record is {json_type(record)}; it must be an object")
    if "label" not in record:
        raise ValueError('"label" is missing; it says whether the completion is a good one')
    desirable = _boolean('"label"', record["label"])
    prompt, completion = _response(record, "completion", template)
    return Judgement(prompt=prompt, completion=completion, desirable=desirable)


def with_prompt(record: Mapping[str, Any]) -> dict[str, Any]:
    r"""A record without a prompt, its prompt cut off from both responses.

    It is the longest common beginning, of characters or of turns, less a space at its end, which
    goes to the responses. Where one response begins with the whole of the other, the last
    character (or turn) of that stays with the responses. A text is cut between characters, so
    within a word where two words begin alike: better give the prompt.

    >>> with_prompt({"chosen": "Dose? 5 mg.", "rejected": "Dose? None."})
    {'chosen': ' 5 mg.', 'rejected': ' None.', 'prompt': 'Dose?'}

    Raises:
      ValueError: if the responses are not two strings or two lists of messages.

    Source: `trl.extract_prompt` of TRL 1.16, whose prompts these are; but where the first
      characters differ and the text chosen ends in a space, that takes the prompt from the end.
    """
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        for name in ("chosen", "rejected"):
            json_lines.parse_messages(f'"{name}"', record[name])
    elif isinstance(chosen, list) != isinstance(rejected, list):
        kinds = f'"chosen" is {json_type(chosen)} and "rejected" {json_type(rejected)}'
        raise ValueError(f"{kinds}; give two strings or two lists of messages")
    else:
        for name in ("chosen", "rejected"):
            json_lines.parse_text(f'"{name}"', record[name], required=True)
    if chosen == rejected:
        raise ValueError('"chosen" and "rejected" are the same; leave the record out')
    size = _common_size(chosen, rejected)
    return {
        **record,
        "prompt": chosen[:size],
        "chosen": chosen[size:],
        "rejected": rejected[size:],
    }


def _common_size(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    shorter = min(len(chosen), len(rejected))
    for index in range(shorter):
        if chosen[index] != rejected[index]:
            return index - (index > 0 and chosen[index - 1] == " ")
    return max(shorter - 1, 0)


def _response(record: Mapping[str, Any], name: str, template: Template) -> tuple[str, str]:
    """The prompt, and the response in the field `name`."""
    example = json_lines.parse_completion(record, name, template=template)
    turns = record[name]
    if isinstance(turns, list) and turns[0]["role"] != "assistant":
        remedy = "a response begins with an assistant turn; move what is before it to the prompt"
        raise ValueError(f'"{name}"[0].role is {turns[0]["role"]!r}; {remedy}')
    first, *rest = example.pieces
    return first.text, "".join(piece.text for piece in rest)


def _ratings(record: Mapping[str, Any]) -> dict[str, Rating]:
    by_criterion = record.get("ratings")
    ratings: dict[str, Rating] = {}
    if by_criterion is not None:
        if not isinstance(by_criterion, Mapping):
            fault = f'"ratings" is {json_type(by_criterion)}'
            raise ValueError(f"{fault}; it must be {{criterion: [of chosen, of rejected]}}")
        for name, pair in by_criterion.items():
            place = f'"ratings".{name}'
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"{place} must be two numbers, of the chosen and of the rejected")
            ratings[name] = (_number(f"{place}[0]", pair[0]), _number(f"{place}[1]", pair[1]))
    whole = ("score_chosen", "score_rejected")
    chosen, rejected = (_number(f'"{name}"', record.get(name)) for name in whole)
    if chosen is not None or rejected is not None:
        if OVERALL in ratings:
            raise ValueError(f'"score_chosen" and "ratings".{OVERALL} are the same; give one')
        ratings[OVERALL] = (chosen, rejected)
    return ratings


def _number(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {json_type(value)}; it must be a number or null")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite, or null where it is unknown")
    return float(value)


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {json_type(value)}; it must be true or false")
    return value
