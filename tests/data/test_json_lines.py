"""Every format against the pieces written out by hand, and every fault against its message."""

import json
import re
import tracemalloc
from itertools import islice

import pytest

from jaxrl_llm.data.json_lines import (
    ChatTemplate,
    Example,
    Message,
    Piece,
    parse_record,
    read_json_lines,
    rendered_by,
    write_json_lines,
)

USER = {"role": "user", "content": "Dose?"}
ASSISTANT = {"role": "assistant", "content": "5 mg."}
ASKED = "<|im_start|>user\nDose?<|im_end|>\n<|im_start|>assistant\n"
ANSWERED = "5 mg.<|im_end|>"

RECORDS = {
    "prompt and completion": (
        {"prompt": "Cough. Plan:", "completion": " Rest.", "id": 7},
        [("Cough. Plan:", False), (" Rest.", True)],
    ),
    "empty prompt": ({"prompt": "", "completion": "Rest."}, [("", False), ("Rest.", True)]),
    "messages": ({"messages": [USER, ASSISTANT]}, [(ASKED, False), (ANSWERED, True)]),
    "several turns": (
        {"messages": [{"role": "system", "content": ""}, USER, ASSISTANT, USER, ASSISTANT]},
        [
            ("<|im_start|>system\n<|im_end|>\n" + ASKED, False),
            (ANSWERED, True),
            ("\n" + ASKED, False),
            (ANSWERED, True),
        ],
    ),
    "a question left open": (
        {"messages": [USER, ASSISTANT, USER]},
        [(ASKED, False), (ANSWERED, True)],
    ),
    "conversational completion": (
        {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
        [(ASKED + ANSWERED + "\n" + ASKED, False), (ANSWERED, True)],
    ),
    "text": ({"text": "Aspirin."}, [("Aspirin.", True)]),
    "messages first": (
        {"text": "a", "prompt": "b", "messages": [USER, ASSISTANT]},
        [(ASKED, False), (ANSWERED, True)],
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_read_json_lines_equals_pieces_by_hand(name, tmp_path):
    record, pieces = RECORDS[name]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert list(read_json_lines(path)) == [Example(tuple(Piece(*piece) for piece in pieces))]


def test_example_prompt_and_completion_split_at_the_last_completion():
    example = parse_record({"messages": [USER, ASSISTANT, USER, ASSISTANT]})
    assert example.prompt == ASKED + ANSWERED + "\n" + ASKED
    assert example.completion == ANSWERED
    assert Example.of("a", "b") == Example((Piece("a", False), Piece("b", True)))


def test_chat_template_markers_are_configurable():
    template = ChatTemplate(start="{role}: ", end=".", separator="\n\n")
    messages = [Message("user", "{role}", False), Message("assistant", "B", True)]
    assert template(messages) == [("user: {role}.\n\nassistant: ", False), ("B.", True)]


def test_rendered_by_equals_the_template_it_renders():
    def render(messages, *, add_generation_prompt):
        turns = [f"[{turn['role']}]{turn['content']}\n" for turn in messages]
        return "".join(turns) + ("[assistant]" if add_generation_prompt else "")

    same = ChatTemplate(start="[{role}]", end="", separator="\n")
    for name in ("messages", "several turns", "a question left open", "conversational completion"):
        record = RECORDS[name][0]
        expected = parse_record(record, template=same)
        assert parse_record(record, template=rendered_by(render)) == expected


def test_rendered_by_refuses_a_template_that_rewrites_the_past():
    def forgetful(messages, *, add_generation_prompt):
        return messages[-1]["content"] if messages else ""

    fault = (
        "the chat template changes the text before turn 1 once that is added; "
        "use a template that only appends"
    )
    with pytest.raises(ValueError, match=f"^{fault}$"):
        parse_record({"messages": [USER, ASSISTANT]}, template=rendered_by(forgetful))


def test_read_json_lines_passes_over_blank_lines_mark_and_carriage_returns(tmp_path):
    path = tmp_path / "train.jsonl"
    # A line separator inside a string ends no record.
    content = '\ufeff{"text": "a\u2028b"}\r\n\n  \t\r\n{"text": "é😀"}'
    path.write_bytes(content.encode())
    assert [example.completion for example in read_json_lines(path)] == ["a\u2028b", "é😀"]


def test_read_json_lines_numbers_lines_of_the_file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n\n{"prompt": "b"}\n')
    examples = read_json_lines(path)
    assert next(examples).completion == "a"
    with pytest.raises(ValueError, match=r"train\.jsonl:4: "):
        next(examples)


def test_read_json_lines_holds_one_line_at_a_time(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text((json.dumps({"text": "a" * 1000}) + "\n") * 5000)
    tracemalloc.start()
    count = sum(1 for _ in read_json_lines(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5000
    assert peak < 200_000


FAULTS = {
    b'{"prompt": "a"}': '"completion" is missing; a record with "prompt" has both',
    b'{"completion": "a"}': '"prompt" is missing; a record with "completion" has both',
    b'{"question": "a"}': 'no known field; give "prompt" and "completion", "messages" or "text"',
    b'{"text": "a" "b"}': (
        "invalid JSON at column 14: Expecting ',' delimiter; write one JSON object a line"
    ),
    b'{"text": "a"} {"text": "b"}': (
        "invalid JSON at column 15: Extra data; write one JSON object a line"
    ),
    b'{"text": "\xe9"}': "byte 0xe9 at column 11 is not UTF-8; save the file as UTF-8",
    b"\xff\xfe{\x00": "byte 0xff at column 1 is not UTF-8; save the file as UTF-8",
    b"[" * 100_000: "a number or a nesting is too long; shorten it",
    b"1" * 5000: "a number or a nesting is too long; shorten it",
    b'"text"': "the record is a string; it must be an object",
    b"[1]": "the record is a list; it must be an object",
    b"null": "the record is null; it must be an object",
    b'{"text": 3}': '"text" is a number; it must be a string',
    b'{"text": true}': '"text" is a boolean; it must be a string',
    b'{"text": ""}': '"text" is empty; give it text or leave the record out',
    b'{"prompt": "a", "completion": " \\n"}': (
        '"completion" is empty; give it text or leave the record out'
    ),
    b'{"prompt": null, "completion": "a"}': '"prompt" is null; it must be a string',
    b'{"prompt": "a", "completion": {}}': '"completion" is an object; it must be a string',
    b'{"prompt": "a", "completion": []}': (
        '"prompt" is a string and "completion" a list; give two strings or two lists of messages'
    ),
    b'{"prompt": [], "completion": []}': '"completion" has no assistant turn; give at least one',
    b'{"text": "\\ud83d!"}': (
        "\"text\" holds half of a surrogate pair, '\\ud83d', at 0; write the whole character"
    ),
    b'{"messages": "a"}': '"messages" is a string; it must be a list of messages',
    b'{"messages": []}': '"messages" has no assistant turn; give at least one',
    b'{"messages": ["a"]}': '"messages"[0] is a string; it must be {"role", "content"}',
    b'{"messages": [{"role": "user"}]}': (
        '"messages"[0].content is missing; a message has "role" and "content"'
    ),
    b'{"messages": [{"content": "a"}]}': (
        '"messages"[0].role is missing; a message has "role" and "content"'
    ),
    b'{"messages": [{"role": "bot", "content": "a"}]}': (
        "\"messages\"[0].role is 'bot'; it must be one of system, user, assistant, tool"
    ),
    b'{"messages": [{"role": ["user"], "content": "a"}]}': (
        "\"messages\"[0].role is ['user']; it must be one of system, user, assistant, tool"
    ),
    b'{"messages": [{"role": "user", "content": null}]}': (
        '"messages"[0].content is null; it must be a string'
    ),
    b'{"messages": [{"role": "assistant", "content": ""}]}': (
        '"messages"[0].content is empty; give it text or leave the record out'
    ),
}


@pytest.mark.parametrize("line", FAULTS, ids=lambda line: line[:60].decode(errors="replace"))
def test_read_json_lines_says_where_and_what_in_one_line(line, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    examples = read_json_lines(path)
    assert next(examples).completion == "fine"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}:2: {FAULTS[line]}')}$"):
        next(examples)


def test_read_json_lines_says_that_a_file_cannot_be_read(tmp_path):
    missing, empty = tmp_path / "missing.jsonl", tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    for path, fault in (
        (missing, "cannot be read: No such file or directory; check the path"),
        (tmp_path, "cannot be read: Is a directory; check the path"),
        (empty, "holds no record; write one JSON object a line"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{path} {fault}')}$"):
            next(read_json_lines(path))


def test_write_json_lines_is_read_back(tmp_path):
    path = tmp_path / "train.jsonl"
    records = [record for record, _ in RECORDS.values()] + [{"text": 'línea\n\u2028 😀 \\ "'}]
    assert write_json_lines(path, iter(records)) == len(records)
    assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == records
    assert list(read_json_lines(path)) == [parse_record(record) for record in records]


def test_write_json_lines_leaves_the_old_file_at_a_fault(tmp_path):
    path = tmp_path / "train.jsonl"
    write_json_lines(path, [{"text": "old"}])
    for records, fault in (
        (
            [{"text": "new"}, {"prompt": "a"}],
            'records[1]: "completion" is missing; a record with "prompt" has both',
        ),
        ([], "records is empty; give at least one"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(fault)}$"):
            write_json_lines(path, records)
    assert path.read_text() == '{"text": "old"}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_write_json_lines_streams_its_records(tmp_path):
    def records():
        yield from ({"text": "a" * 1000} for _ in range(5000))

    tracemalloc.start()
    write_json_lines(tmp_path / "train.jsonl", records())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    first = list(islice(read_json_lines(tmp_path / "train.jsonl"), 2))
    assert [len(example.completion) for example in first] == [1000, 1000]
