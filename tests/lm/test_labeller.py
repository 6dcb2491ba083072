"""Sessions with piped keys: the file after each, what a crash leaves, and what is never lost."""

import io
import json
import os
import re
from typing import Any

import pytest

from jaxrl_llm.data.preferences import read_preferences
from jaxrl_llm.lm import labeller
from jaxrl_llm.lm.labeller import Candidate, label, read_candidates, repair

CANDIDATES = [
    Candidate(prompt=f"case {i}", responses=(f" good {i}", f" bad {i}"), gold=(1.0, 0.5))
    for i in range(6)
]


class Keys:
    """Standard input; an exception among the keys is raised where it is read."""

    def __init__(self, keys):
        self.keys = iter(keys)

    def readline(self):
        key = next(self.keys, "")
        if isinstance(key, str):
            return key + "\n" if key else ""
        raise key


def sit(path, keys, candidates=CANDIDATES, **options):
    """A session: its summary, and what it wrote to the screen."""
    output = io.StringIO()
    source: Any = Keys(keys)
    summary = label(candidates, path, annotator="me", source=source, output=output, **options)
    return summary, output.getvalue()


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def shown_as(screen):
    """Question -> the response shown as A, in the order asked."""
    pattern = r"case (\d).*?A: (\w+) \d\n\nB: (\w+) \d"
    return [(int(i), first) for i, first, _ in re.findall(pattern, screen, re.DOTALL)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labels.jsonl"


def test_label_writes_what_was_chosen_and_which_was_shown_first(path):
    summary, screen = sit(path, ["a", "B", " tie ", "b", "a", "b"])
    first = dict(shown_as(screen))
    found = records(path)
    for i, (key, record) in enumerate(zip("abtbab", found, strict=True)):
        second = "bad" if first[i] == "good" else "good"
        chosen, rejected = (second, first[i]) if key == "b" else (first[i], second)
        expected = {
            "prompt": f"case {i}",
            "chosen": f" {chosen} {i}",
            "rejected": f" {rejected} {i}",
            "annotator": "me",
            "shown_first": "rejected" if key == "b" else "chosen",
        }
        assert record == ({**expected, "tie": True} if key == "t" else expected)
    assert [each.tie for each in read_preferences(path)] == [key == "t" for key in "abtbab"]
    agreeing = sum("good" in each["chosen"] and "tie" not in each for each in found)
    assert (summary.num_labelled, summary.num_candidates) == (6, 6)
    assert (summary.num_agreeing, summary.num_comparable) == (agreeing, 5)


def test_label_shows_either_response_first_and_the_same_again(path):
    many = [
        Candidate(prompt=f"case {i % 10}", responses=(f" good {i % 10}", f" bad {i % 10}"))
        for i in range(10)
    ]
    order = shown_as(sit(path, ["s"] * 10, many)[1])
    assert {first for _, first in order} == {"good", "bad"}
    assert shown_as(sit(path, ["s"] * 10, many)[1]) == order
    assert shown_as(sit(path, ["s"] * 10, many, seed=1)[1]) != order


def test_label_goes_on_where_it_stopped_and_asks_no_pair_twice(path):
    swapped = [
        Candidate(prompt=each.prompt, responses=(second, first))
        for each in CANDIDATES
        for first, second in [each.responses]
    ]
    asked = [
        [i for i, _ in shown_as(sit(path, keys, questions)[1])]
        for keys, questions in (
            (["a", "s", "b", "q"], CANDIDATES),
            (["a", ""], swapped),
            (["a"] * 9, CANDIDATES + swapped),
            (["a"], CANDIDATES),
        )
    ]
    # The one skipped comes again.
    assert asked == [[0, 1, 2, 3], [1, 3], [3, 4, 5], []]
    assert sorted(record["prompt"] for record in records(path)) == [f"case {i}" for i in range(6)]


def test_label_takes_back_answers_and_skips_of_the_session_one_by_one(path):
    sit(path, ["a", "q"])
    before = path.read_bytes()
    summary, screen = sit(path, ["a", "s", "t", "u", "u", "u", "u", "q"])
    assert [i for i, _ in shown_as(screen)] == [1, 2, 3, 4, 3, 2, 1, 1]
    assert path.read_bytes() == before
    assert screen.count("Taken back.") == 3
    assert screen.count("Nothing to take back in this session.") == 1
    assert (summary.num_labelled, summary.num_comparable) == (1, 0)
    sit(path, ["a", "u", "t", "q"])
    assert records(path)[1]["tie"]
    assert len(records(path)) == 2


@pytest.mark.parametrize("end", ["q", "", KeyboardInterrupt()], ids=["key", "end", "interrupt"])
def test_label_loses_nothing_however_a_session_ends(end, path):
    summary, screen = sit(path, ["a", "b", end])
    assert len(records(path)) == summary.num_labelled == 2
    assert screen.endswith(f"2 of 6 labelled in {path}\n")
    assert list(path.parent.iterdir()) == [path]


def test_label_has_each_answer_on_the_disk_before_the_next_question(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))

    class Watched(Keys):
        def readline(self):
            size = path.stat().st_size if path.exists() else 0
            assert size == (synced[-1] if synced else 0)
            return super().readline()

    source: Any = Watched("abt")
    label(CANDIDATES, path, annotator="me", source=source, output=io.StringIO())
    assert len(synced) == len(records(path)) == 3


@pytest.mark.parametrize("length", [1, 25, -2])
def test_label_repairs_a_torn_last_line_and_asks_that_pair_again(length, path):
    sit(path, ["a", "b", "q"])
    whole = path.read_bytes()
    first, second, _ = whole.split(b"\n")
    torn = second[:length]
    path.write_bytes(first + b"\n" + torn)
    summary, screen = sit(path, ["b", "q"])
    message = f"{path}:2: the line was torn, so its {len(torn)} bytes are removed\n"
    assert screen.startswith(message)
    assert path.read_bytes() == whole
    assert summary.num_labelled == 2


def test_repair_keeps_a_whole_line_without_its_end(path):
    sit(path, ["a", "b", "q"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert repair(path) == f"{path}:2: the line had no end, so one is added"
    assert path.read_bytes() == whole
    assert repair(path) is None
    path.write_bytes(b"\0" * 50)
    assert repair(path) == f"{path}:1: the line was torn, so its 50 bytes are removed"
    assert path.read_bytes() == b""
    assert repair(path.with_name("missing.jsonl")) is None


def test_label_starts_in_a_new_folder_and_in_an_empty_file(tmp_path):
    path = tmp_path / "new" / "labels.jsonl"
    assert sit(path, ["a", "q"])[0].num_labelled == 1
    path.write_bytes(b"")
    assert sit(path, ["a", "q"])[0].num_labelled == 1


def test_label_refuses_a_file_that_is_damaged_elsewhere(path):
    path.write_text('{"chosen": \n{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    content = path.read_bytes()
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:1: invalid JSON at column 12"):
        sit(path, ["a"])
    assert path.read_bytes() == content


def test_label_leaves_no_half_of_a_line_when_the_disk_is_full(path, monkeypatch):
    sit(path, ["a", "q"])
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    fault = f"{path} cannot be written: No space left on device; make room or check its permissions"
    with pytest.raises(ValueError, match=f"^{re.escape(fault)}"):
        sit(path, ["a"])
    assert path.read_bytes() == before


def test_label_does_not_take_back_the_line_of_another_session(path):
    class Other(Keys):
        def readline(self):
            key = super().readline()
            if key == "u\n":
                with path.open("a") as file:
                    file.write('{"prompt": "x", "chosen": "y", "rejected": "z"}\n')
            return key

    source: Any = Other("au")
    with pytest.raises(ValueError, match="let one session at a time write to a file"):
        label(CANDIDATES, path, annotator="me", source=source, output=io.StringIO())
    assert len(records(path)) == 2


def test_label_asks_again_for_a_key_that_is_none(path):
    summary, screen = sit(path, ["both", " ", "c\x1b[2J", "ab", "undone", "a", "q"])
    assert screen.count("is not one of a, b, t(ie), s(kip), u(ndo), q(uit)") == 5
    assert "\x1b" not in screen
    assert summary.num_labelled == 1


def test_label_writes_nothing_that_steers_the_terminal(path):
    odd = [Candidate(prompt="p\x1b[2J\u202e", responses=(" \x1b]0;a\x07", " b\r"))]
    _, screen = sit(path, ["a"], odd)
    assert not set(screen) & set("\x1b\x07\r\u202e")
    assert next(iter(read_preferences(path))).prompt == odd[0].prompt


def test_label_writes_what_the_encoding_of_the_screen_lacks_as_a_question_mark(path):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    odd = [Candidate(prompt="心電図", responses=("é", "e"))]
    source: Any = Keys("a")
    label(odd, path, annotator="me", source=source, output=output)
    output.seek(0)
    assert "???" in output.read()
    assert records(path)[0]["prompt"] == "心電図"


def test_label_shows_agreement_only_where_asked(path):
    assert "gold" not in sit(path, ["a", "q"])[1].replace("good", "")
    equal = Candidate(prompt="case 9", responses=("x", "y"), gold=(0.5, 0.5))
    summary, screen = sit(path, ["a", "b"], [equal, CANDIDATES[1]], shows_gold=True)
    agrees = records(path)[-1]["chosen"] == " good 1"
    assert (summary.num_agreeing, summary.num_comparable) == (int(agrees), 1)
    assert f"2 of 2 labelled; the gold scores agree with {int(agrees)} of 1 answers" in screen


def test_label_keeps_the_fields_of_a_candidate(path):
    marked = [Candidate(prompt="a", responses=("b", "c"), fields={"synthetic": True})]
    sit(path, ["a"], marked)
    assert records(path)[0]["synthetic"] is True


def test_read_candidates_equals_candidates_by_hand(path):
    path.write_text('{"prompt": "a", "responses": ["b", "c"], "id": 1}\n')
    assert read_candidates(path) == [Candidate(prompt="a", responses=("b", "c"))]


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ("3", "the record is a number; it must be an object"),
        ('{"prompt": "a"}', '"responses" is missing; a record has "prompt" and "responses"'),
        ('{"responses": []}', '"prompt" is missing; a record has "prompt" and "responses"'),
        (
            '{"prompt": "a", "responses": ["b"]}',
            '"responses" is a list of 1; it must be a list of two texts',
        ),
        (
            '{"prompt": "a", "responses": "bc"}',
            '"responses" is a string; it must be a list of two texts',
        ),
        (
            '{"prompt": "a", "responses": ["b", 1]}',
            '"responses"[1] is a number; it must be a string',
        ),
        (
            '{"prompt": "a", "responses": ["b", "b"]}',
            '"responses" are the same; leave the record out',
        ),
        ('{"prompt": 1, "responses": ["b", "c"]}', '"prompt" is a number; it must be a string'),
    ],
)
def test_read_candidates_says_where_and_what_in_one_line(record, fault, path):
    path.write_text(record + "\n")
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}:1: {fault}')}$"):
        read_candidates(path)


def test_keys_are_told_apart():
    words = [word for pair in labeller.KEYS.items() for word in set(pair)]
    assert len(words) == len(set(words))
