"""Every format against the preference written out by hand, TRL's prompts, and every fault."""

import json
import re

import pytest

from jaxrl_llm.data.json_lines import ChatTemplate
from jaxrl_llm.data.preferences import (
    Judgement,
    Preference,
    parse_judgement,
    parse_preference,
    read_judgements,
    read_preferences,
    to_record,
    unpair,
    with_prompt,
    write_preferences,
)

USER = {"role": "user", "content": "Dose?"}
GOOD = {"role": "assistant", "content": "5 mg."}
BAD = {"role": "assistant", "content": "Lots."}
ASKED = "<|im_start|>user\nDose?<|im_end|>\n<|im_start|>assistant\n"
CHOSEN, REJECTED = "5 mg.<|im_end|>", "Lots.<|im_end|>"

TURNS = Preference(prompt=ASKED, chosen=CHOSEN, rejected=REJECTED)
RECORDS = {
    "explicit": (
        {"prompt": "Plan:", "chosen": " Rest.", "rejected": " Run.", "id": 7},
        Preference(prompt="Plan:", chosen=" Rest.", rejected=" Run."),
    ),
    "implicit": (
        {"chosen": "Plan: Rest.", "rejected": "Plan: Go."},
        Preference(prompt="Plan:", chosen=" Rest.", rejected=" Go."),
    ),
    "turns": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, TURNS),
    "implicit turns": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, TURNS),
    "several turns": (
        {"prompt": [USER, BAD, USER], "chosen": [GOOD, USER, BAD], "rejected": [BAD, USER]},
        Preference(
            prompt=f"{ASKED}{REJECTED}\n{ASKED}",
            chosen=f"{CHOSEN}\n{ASKED}{REJECTED}",
            rejected=REJECTED,
        ),
    ),
    "everything known": (
        {
            "prompt": "a",
            "chosen": "b",
            "rejected": "c",
            "margin": 2,
            "annotator": "Ann",
            "tie": True,
            "score_chosen": 8.5,
            "score_rejected": None,
            "ratings": {"safety": [1, 0.5], "clarity": [None, 0]},
        },
        Preference(
            prompt="a",
            chosen="b",
            rejected="c",
            margin=2.0,
            annotator="Ann",
            tie=True,
            ratings={"safety": (1.0, 0.5), "clarity": (None, 0.0), "overall": (8.5, None)},
        ),
    ),
    "everything null": (
        {
            "prompt": "",
            "chosen": "b",
            "rejected": "c",
            **dict.fromkeys(("margin", "annotator", "tie", "score_chosen", "ratings")),
        },
        Preference(prompt="", chosen="b", rejected="c"),
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_read_preferences_equals_preferences_by_hand(name, tmp_path):
    record, preference = RECORDS[name]
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert list(read_preferences(path)) == [preference]


def test_read_preferences_renders_turns_by_the_template_given(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(RECORDS["implicit turns"][0]))
    template = ChatTemplate(start="{role}: ", end=".", separator=" ")
    expected = Preference(prompt="user: Dose?. assistant: ", chosen="5 mg..", rejected="Lots..")
    assert list(read_preferences(path, template=template)) == [expected]


def test_write_preferences_is_read_back(tmp_path):
    path = tmp_path / "pairs.jsonl"
    written = [preference for _, preference in RECORDS.values()]
    assert write_preferences(path, iter(written)) == len(written)
    assert list(read_preferences(path)) == written
    lines = path.read_text().splitlines()
    assert all({"prompt", "chosen", "rejected"} <= set(json.loads(line)) for line in lines)


def test_write_preferences_leaves_the_old_file_at_a_fault(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("old")
    same = Preference(prompt="a", chosen="b", rejected="b")
    fault = 'records[1]: "chosen" and "rejected" are the same; leave the record out'
    with pytest.raises(ValueError, match=f"^{re.escape(fault)}$"):
        write_preferences(path, [RECORDS["explicit"][1], same])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


IMPLICIT = {
    "space goes to the responses": ("It is blue.", "It is green.", "It is"),
    "cut within a word": ("It is blue.", "It is black.", "It is bl"),
    "one space only": ("a  b", "a  c", "a "),
    "other white space stays": ("a\nb", "a\nc", "a\n"),
    "no common beginning": ("yes", "no", ""),
    "one begins with the other": ("It is", "It is blue.", "It i"),
    "one is a character": ("a", "ab", ""),
    "shorter keeps its last character": ("a b", "a bc", "a "),
    "space first": (" a", " b", ""),
}


@pytest.mark.parametrize("name", IMPLICIT)
def test_with_prompt_equals_prompt_by_hand(name):
    for chosen, rejected, prompt in (IMPLICIT[name], (*IMPLICIT[name][1::-1], IMPLICIT[name][2])):
        cut = with_prompt({"chosen": chosen, "rejected": rejected, "id": 1})
        assert cut["prompt"] == prompt
        assert cut["prompt"] + cut["chosen"] == chosen
        assert cut["prompt"] + cut["rejected"] == rejected
        assert cut["id"] == 1
        assert cut["chosen"]
        assert cut["rejected"]


def test_with_prompt_takes_no_prompt_from_the_end_of_a_text():
    cut = with_prompt({"chosen": "yes ", "rejected": "no "})
    assert cut == {"prompt": "", "chosen": "yes ", "rejected": "no "}


def test_with_prompt_leaves_each_response_a_turn():
    cut = with_prompt({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]})
    assert cut == {"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD, USER, BAD]}


@pytest.mark.slow
def test_with_prompt_equals_trl():
    trl = pytest.importorskip("trl", exc_type=ImportError)
    records = [{"chosen": chosen, "rejected": other} for chosen, other, _ in IMPLICIT.values()]
    records += [
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
        {"chosen": [USER, GOOD, USER, BAD], "rejected": [USER, GOOD, USER, GOOD]},
    ]
    for record in records:
        assert with_prompt(record) == trl.extract_prompt(record)


FAULTS = {
    '{"prompt": "a", "chosen": "b"}': (
        '"rejected" is missing; a preference has "chosen" and "rejected"'
    ),
    '{"rejected": "b"}': '"chosen" is missing; a preference has "chosen" and "rejected"',
    "[1]": "the record is a list; it must be an object",
    '{"prompt": "a", "chosen": "b", "rejected": "b"}': (
        '"chosen" and "rejected" are the same; leave the record out'
    ),
    '{"chosen": "a b", "rejected": "a b"}': (
        '"chosen" and "rejected" are the same; leave the record out'
    ),
    '{"chosen": "a", "rejected": []}': (
        '"chosen" is a string and "rejected" a list; give two strings or two lists of messages'
    ),
    '{"chosen": "a", "rejected": 3}': '"rejected" is a number; it must be a string',
    '{"chosen": "", "rejected": "a"}': ('"chosen" is empty; give it text or leave the record out'),
    '{"prompt": "a", "chosen": "b", "rejected": [1]}': (
        '"prompt" is a string and "rejected" a list; give two strings or two lists of messages'
    ),
    json.dumps({"chosen": [USER, GOOD], "rejected": [USER, {"role": "bot", "content": ""}]}): (
        "\"rejected\"[1].role is 'bot'; it must be one of system, user, assistant, tool"
    ),
    json.dumps({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]}): (
        "\"chosen\"[0].role is 'user'; a response begins with an assistant turn; "
        "move what is before it to the prompt"
    ),
    json.dumps({"prompt": [USER], "chosen": [], "rejected": [BAD]}): (
        '"chosen" has no assistant turn; give at least one'
    ),
    '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}': (
        '"margin" is a string; it must be a number or null'
    ),
    '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": true}': (
        '"margin" is a boolean; it must be a number or null'
    ),
    '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}': (
        '"margin" is nan; it must be finite, or null where it is unknown'
    ),
    '{"prompt": "a", "chosen": "b", "rejected": "c", "tie": 1}': (
        '"tie" is a number; it must be true or false'
    ),
    '{"prompt": "a", "chosen": "b", "rejected": "c", "annotator": 3}': (
        '"annotator" is a number; it must be a string'
    ),
    '{"prompt": "a", "chosen": "b", "rejected": "c", "ratings": [1, 2]}': (
        '"ratings" is a list; it must be {criterion: [of chosen, of rejected]}'
    ),
    '{"prompt": "a", "chosen": "b", "rejected": "c", "ratings": {"safety": [1]}}': (
        '"ratings".safety must be two numbers, of the chosen and of the rejected'
    ),
    '{"prompt": "a", "chosen": "b", "rejected": "c", "ratings": {"safety": [1, "2"]}}': (
        '"ratings".safety[1] is a string; it must be a number or null'
    ),
    '{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1, '
    '"ratings": {"overall": [1, 0]}}': (
        '"score_chosen" and "ratings".overall are the same; give one'
    ),
}


@pytest.mark.parametrize("line", FAULTS, ids=lambda line: line[:70])
def test_read_preferences_says_where_and_what_in_one_line(line, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(RECORDS["explicit"][0]) + "\n\n" + line + "\n")
    found = read_preferences(path)
    assert next(found) == RECORDS["explicit"][1]
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}:3: {FAULTS[line]}')}$"):
        next(found)


# Judgements


def test_read_judgements_equals_judgements_by_hand(tmp_path):
    path = tmp_path / "judgements.jsonl"
    records = [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": [USER], "completion": [BAD], "label": False},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    assert list(read_judgements(path)) == [
        Judgement(prompt="a", completion="b", desirable=True),
        Judgement(prompt=ASKED, completion=REJECTED, desirable=False),
    ]


def test_parse_judgement_says_what_is_wrong():
    for record, fault in (
        ([], "the record is a list; it must be an object"),
        ({"prompt": "a"}, '"label" is missing; it says whether the completion is a good one'),
        ({"label": 1}, '"label" is a number; it must be true or false'),
        ({"label": True, "prompt": "a"}, '"completion" is missing; a record with "prompt" has'),
        ({"label": True, "prompt": [USER], "completion": [USER, GOOD]}, '"completion"[0].role is'),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(fault)}"):
            parse_judgement(record)


def test_unpair_gives_the_records_of_trl():
    preference = parse_preference({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert unpair(preference) == (
        Judgement(prompt="a", completion="b", desirable=True),
        Judgement(prompt="a", completion="c", desirable=False),
    )
    with pytest.raises(ValueError, match="preference is a tie"):
        unpair(Preference(prompt="a", chosen="b", rejected="c", tie=True))


def test_preference_is_hashable_and_its_record_holds_what_is_known():
    assert len({preference for _, preference in RECORDS.values()}) == len(RECORDS) - 1
    assert to_record(RECORDS["explicit"][1]) == {
        "prompt": "Plan:",
        "chosen": " Rest.",
        "rejected": " Run.",
    }
