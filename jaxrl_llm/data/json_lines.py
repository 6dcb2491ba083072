"""Training text as JSON lines, one record a line, in the formats that users of TRL have.

| record | what a loss counts |
|---|---|
| `{"prompt": str, "completion": str}` | the completion |
| `{"prompt": [message], "completion": [message]}` | the assistant turns of the completion |
| `{"messages": [message]}` | every assistant turn |
| `{"text": str}` | all of it |

A message is `{"role": str, "content": str}`. Other fields are ignored, and a record with several
of these formats is read as the first of `messages`, `prompt` and `completion`, `text`. A `Template`
turns messages into text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from jaxrl_llm.data.files import replacing

Parsed = TypeVar("Parsed")

ROLES = ("system", "user", "assistant", "tool")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Piece(NamedTuple):
    """A stretch of text, and whether a loss counts it."""

    text: str
    is_completion: bool


class Message(NamedTuple):
    """One turn of a conversation, and whether a loss counts it."""

    role: str
    content: str
    is_completion: bool


@dataclass(frozen=True)
class Example:
    """One training text in pieces, the last of which is a completion.

    >>> example = Example.of("Fever, stiff neck. Assessment:", " Meningitis.")
    >>> example.completion
    ' Meningitis.'
    """

    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, prompt: str, completion: str) -> Example:
        """A prompt, which a loss does not count, and its completion."""
        return cls((Piece(prompt, False), Piece(completion, True)))

    @property
    def prompt(self) -> str:
        """The text before the last completion, of earlier turns too."""
        return "".join(piece.text for piece in self.pieces[:-1])

    @property
    def completion(self) -> str:
        """The last completion."""
        return self.pieces[-1].text


Template = Callable[[Sequence[Message]], Sequence[Piece]]


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    r"""Writes each turn as `start`, content, `end`, with `separator` between two turns.

    The default is ChatML in ordinary text: any tokenizer spells its markers out, and needs no
    token of its own for them. The loss counts the content and `end` of a turn, so that the model
    learns to finish it, and never the `start`, which a prompt for generation ends with. Markers
    are not escaped: a content that holds one reads as another turn.

    >>> turns = [Message("user", "Dose?", False), Message("assistant", "5 mg.", True)]
    >>> [piece.text for piece in ChatTemplate()(turns)]
    ['<|im_start|>user\nDose?<|im_end|>\n<|im_start|>assistant\n', '5 mg.<|im_end|>']

    Attributes:
      start: before a turn; `{role}` stands for its role.
      end: after a turn.
      separator: between two turns.
    """

    start: str = "<|im_start|>{role}\n"
    end: str = "<|im_end|>"
    separator: str = "\n"

    def __call__(self, messages: Sequence[Message]) -> list[Piece]:
        """The conversation up to its last completion; nothing after that is ever counted."""
        pieces: list[Piece] = []
        context = ""
        for index, message in enumerate(messages):
            context += self.separator if index else ""
            context += self.start.replace("{role}", message.role)
            turn = message.content + self.end
            if message.is_completion:
                pieces += [Piece(context, False), Piece(turn, True)]
                context = ""
            else:
                context += turn
        return pieces


CHATML = ChatTemplate()


class Render(Protocol):
    """A conversation of `{"role", "content"}` as one text, as a tokenizer's own template does."""

    # What a tokenizer returns is declared as text or tokens, by an argument of its own.
    def __call__(
        self, messages: list[dict[str, str]], /, *, add_generation_prompt: bool
    ) -> Any: ...


def rendered_by(render: Render) -> Template:
    """The template of a tokenizer: `rendered_by(partial(t.apply_chat_template, tokenize=False))`.

    A counted turn is what the text of the conversation up to it adds to the prompt for generation
    of the conversation before it, so the template must only ever append. White space at its end
    separates it from the next turn: it is not counted, and after the last turn it is left out.
    """

    def template(messages: Sequence[Message]) -> list[Piece]:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        pieces: list[Piece] = []
        done = ""
        for index, message in enumerate(messages):
            if not message.is_completion:
                continue
            prompt = render(turns[:index], add_generation_prompt=True)
            text = render(turns[: index + 1], add_generation_prompt=False)
            if not (prompt.startswith(done) and text.startswith(prompt)):
                raise ValueError(
                    f"the chat template changes the text before turn {index} once that is added; "
                    "use a template that only appends"
                )
            turn = text[len(prompt) :].rstrip()
            pieces += [Piece(prompt[len(done) :], False), Piece(turn, True)]
            done = prompt + turn
        return pieces

    return template


def read_json_lines(path: str | Path, *, template: Template = CHATML) -> Iterator[Example]:
    """The records of a file as examples, as `read_records` reads them.

    Args:
      path: of a UTF-8 file with one record a line, in any of the formats above.
      template: turns messages into text.
    """
    return read_records(path, partial(parse_record, template=template))


def read_records(path: str | Path, parse: Callable[[object], Parsed]) -> Iterator[Parsed]:
    """The records of a file, read one line at a time.

    Blank lines and a byte order mark are passed over.

    Args:
      path: of a UTF-8 file with one record a line.
      parse: what a record stands for; raises ValueError as `what; remedy`.

    Raises:
      ValueError: at the first fault, as `path:line: what; remedy`; if the file cannot be read or
        holds no record.
    """
    num_records = 0
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
                if not content.strip():
                    continue
                num_records += 1
                try:
                    parsed = parse(decode(content.rstrip(b"\r\n")))
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: {error}") from None
                yield parsed
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; check the path") from None
    if not num_records:
        raise ValueError(f"{path} holds no record; write one JSON object a line")


def write_json_lines(path: str | Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Writes records that `read_json_lines` and TRL read, all of them or nothing.

    Arguments and errors: `write_records`, of any of the formats above.
    """
    return write_records(path, records, parse_record)


def write_records(
    path: str | Path, records: Iterable[Mapping[str, Any]], parse: Callable[[object], object]
) -> int:
    """Writes one record a line, all of them or nothing.

    Args:
      path: of the file, replaced at the end in one step.
      records: streamed.
      parse: what will read a record; raises ValueError as `what; remedy`.

    Returns:
      The number of records.

    Raises:
      ValueError: as `records[index]: what; remedy`, or if there is none.
    """
    num_records = 0
    with replacing(path) as file:
        for record in records:
            try:
                parse(record)
            except ValueError as error:
                raise ValueError(f"records[{num_records}]: {error}") from None
            line = json.dumps(dict(record), ensure_ascii=False) + "\n"
            file.write(line.encode())
            num_records += 1
        if not num_records:
            raise ValueError("records is empty; give at least one")
    return num_records


def parse_record(record: object, *, template: Template = CHATML) -> Example:
    """One record in any of the formats above, as an example.

    Raises:
      ValueError: naming the field.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"the record is {json_type(record)}; it must be an object")
    if "messages" in record:
        messages = parse_messages('"messages"', record["messages"])
        return _conversation(messages, template, '"messages"')
    if "prompt" in record or "completion" in record:
        return parse_completion(record, template=template)
    if "text" in record:
        return Example((Piece(parse_text('"text"', record["text"], required=True), True),))
    raise ValueError('no known field; give "prompt" and "completion", "messages" or "text"')


def decode(line: bytes) -> object:
    """The record that a line holds.

    Raises:
      ValueError: if it is not JSON in UTF-8.
    """
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        place = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise ValueError(f"{place} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        fault = f"invalid JSON at column {error.colno}: {error.msg}"
        raise ValueError(f"{fault}; write one JSON object a line") from None
    except (ValueError, RecursionError):
        raise ValueError("a number or a nesting is too long; shorten it") from None


def parse_completion(
    record: Mapping[str, Any], name: str = "completion", *, template: Template = CHATML
) -> Example:
    """The fields "prompt" and `name` of a record, two texts or two lists of messages.

    Raises:
      ValueError: naming the field.
    """
    for field, other in (("prompt", name), (name, "prompt")):
        if field not in record:
            raise ValueError(f'"{field}" is missing; a record with "{other}" has both')
    prompt, completion = record["prompt"], record[name]
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = [turn._replace(is_completion=False) for turn in parse_messages('"prompt"', prompt)]
        answered = parse_messages(f'"{name}"', completion)
        return _conversation([*asked, *answered], template, f'"{name}"')
    if isinstance(prompt, list) != isinstance(completion, list):
        kinds = f'"prompt" is {json_type(prompt)} and "{name}" {json_type(completion)}'
        raise ValueError(f"{kinds}; give two strings or two lists of messages")
    text = parse_text('"prompt"', prompt)
    return Example.of(text, parse_text(f'"{name}"', completion, required=True))


def _conversation(messages: Sequence[Message], template: Template, name: str) -> Example:
    if not any(message.is_completion for message in messages):
        raise ValueError(f"{name} has no assistant turn; give at least one")
    return Example(tuple(template(messages)))


def parse_messages(name: str, value: object) -> list[Message]:
    """The turns of a conversation in the field `name`; assistant turns are completions."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is {json_type(value)}; it must be a list of messages")
    messages: list[Message] = []
    for index, item in enumerate(value):
        place = f"{name}[{index}]"
        if not isinstance(item, Mapping):
            raise ValueError(f'{place} is {json_type(item)}; it must be {{"role", "content"}}')
        for field in ("role", "content"):
            if field not in item:
                raise ValueError(f'{place}.{field} is missing; a message has "role" and "content"')
        role = item["role"]
        if role not in ROLES:
            raise ValueError(f"{place}.role is {role!r}; it must be one of {', '.join(ROLES)}")
        is_completion = role == "assistant"
        content = parse_text(f"{place}.content", item["content"], required=is_completion)
        messages.append(Message(role, content, is_completion))
    return messages


def parse_text(name: str, value: object, *, required: bool = False) -> str:
    """The field `name`: a string that can be tokenized, and not blank where it is `required`."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {json_type(value)}; it must be a string")
    if required and not value.strip():
        raise ValueError(f"{name} is empty; give it text or leave the record out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        fault = f"half of a surrogate pair, {value[error.start]!a}, at {error.start}"
        raise ValueError(f"{name} holds {fault}; write the whole character") from None
    return value


def json_type(value: object) -> str:
    """What JSON calls the type of `value`."""
    names = {"str": "a string", "list": "a list", "dict": "an object", "bool": "a boolean"}
    return "null" if value is None else names.get(type(value).__name__, "a number")
