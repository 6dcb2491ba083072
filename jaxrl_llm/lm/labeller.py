"""A person picks the better of two responses on a terminal, and the file of preferences grows.

    summary = label(candidates, "preferences.jsonl", annotator="me")

Every answer is on the disk before the next question is asked, so that whatever ends a session, be
it a key, the end of the input, an interrupt or a power cut, loses no answer. A later session goes
on where that one stopped. What was skipped is asked again. One session a file at a time.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from jaxrl_llm.data import json_lines, preferences
from jaxrl_llm.data.files import write_atomically
from jaxrl_llm.data.preferences import Preference
from jaxrl_llm.lm.terminal import printable

KEYS = {"a": "a", "b": "b", "t": "tie", "s": "skip", "u": "undo", "q": "quit"}
_CHOICES = "a, b, t(ie), s(kip), u(ndo), q(uit)"

Identity = tuple[str, frozenset[str]]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A question: which of two responses to a prompt is better?

    Attributes:
      prompt: what both answer.
      responses: two different ones.
      gold: their true scores, where known.
      fields: what else goes into the record of the answer.
    """

    prompt: str
    responses: tuple[str, str]
    gold: tuple[float, float] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def identity(self) -> Identity:
        """The same for the same texts, in whichever order."""
        return self.prompt, frozenset(self.responses)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a session did.

    Attributes:
      num_labelled: candidates with an answer in the file, of this session or an earlier one.
      num_candidates: different ones.
      num_agreeing: of this session's answers that have one to agree with, those that the gold
        scores agree with; ties and equal scores have none.
      num_comparable: how many have one.
    """

    num_labelled: int
    num_candidates: int
    num_agreeing: int
    num_comparable: int


def read_candidates(path: str | Path) -> list[Candidate]:
    """Candidates from JSON lines of `{"prompt": str, "responses": [str, str]}`.

    Raises:
      ValueError: at the first fault, as `path:line: what; remedy`.
    """
    return list(json_lines.read_records(path, _parse_candidate))


def label(
    candidates: Sequence[Candidate],
    path: str | Path,
    *,
    annotator: str,
    seed: int = 0,
    shows_gold: bool = False,
    source: TextIO | None = None,
    output: TextIO | None = None,
) -> Summary:
    """Asks about each candidate that the file has no answer to, and appends the answers.

    Keys, or their words in `KEYS`: a or b for the better response, t where neither is, s to skip,
    u to take back the last answer or skip of this session, q to quit. Which response is A is
    random; `shown_first` of the record says whether it was the chosen or the rejected one.

    Args:
      candidates: asked in this order; one that occurs twice is asked about once.
      path: JSON lines that `preferences.read_preferences` and TRL read; made where missing.
      annotator: the name to sign with.
      seed: of the order in which the responses of each pair are shown.
      shows_gold: says after each answer how often the gold scores have agreed.
      source: of keys, one a line; standard input by default.
      output: of questions; standard output by default.

    Raises:
      ValueError: if the file is damaged other than by a torn last line, or cannot be written.
    """
    screen = _Screen(source or sys.stdin, output or sys.stdout)
    questions = list({each.identity: each for each in candidates}.values())
    session = _Session(Path(path), questions, annotator, seed, screen)
    session.open()
    try:
        session.run(shows_gold=shows_gold)
    except KeyboardInterrupt:
        screen.say("\nInterrupted.")
    summary = session.summary()
    screen.say(f"{summary.num_labelled} of {summary.num_candidates} labelled in {path}")
    return summary


def repair(path: str | Path) -> str | None:
    """Mends the last line of a file that a crash may have torn; says what it did, if anything.

    A line without its end is completed where it holds a whole record, and removed otherwise.
    """
    path = Path(path)
    content = path.read_bytes() if path.exists() else b""
    whole, newline, last = content.rpartition(b"\n")
    if not last:
        return None
    number = content.count(b"\n") + 1
    try:
        json_lines.decode(last)
    except ValueError:
        write_atomically(path, whole + newline)
        return f"{path}:{number}: the line was torn, so its {len(last)} bytes are removed"
    write_atomically(path, content + b"\n")
    return f"{path}:{number}: the line had no end, so one is added"


class _Session:
    """One sitting: which questions there are, and what has been answered."""

    def __init__(
        self, path: Path, questions: list[Candidate], annotator: str, seed: int, screen: _Screen
    ) -> None:
        self.questions = questions
        self._path = path
        self._annotator = annotator
        self._seed = seed
        self._screen = screen
        self._labelled: set[Identity] = set()
        # What was done about which question of this session, in order: the line that answers it,
        # None where it was skipped; and whether the gold scores agree, None where they do not tell.
        self._steps: list[tuple[int, bytes | None, bool | None]] = []

    def open(self) -> None:
        """Reads what is answered already."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if message := repair(self._path):
            self._screen.say(message)
        if self._path.exists() and self._path.stat().st_size:
            for each in preferences.read_preferences(self._path):
                self._labelled.add((each.prompt, frozenset((each.chosen, each.rejected))))

    def run(self, *, shows_gold: bool) -> None:
        """Asks until nothing is left or the user quits."""
        index = 0
        while index < len(self.questions):
            if self.questions[index].identity in self._labelled:
                index += 1
                continue
            first, second = shown = self._shown(index)
            place = f"--- {index + 1} of {len(self.questions)} ---"
            self._screen.say(f"\n{place}\n{self.questions[index].prompt}\n")
            self._screen.say(f"A: {first.strip()}\n\nB: {second.strip()}\n")
            key = self._screen.ask()
            if key == "q":
                return
            if key == "u":
                index = self._undo(index)
                continue
            self._steps.append(
                (index, None, None) if key == "s" else self._answer(index, shown, key)
            )
            self._screen.say(self._progress(shows_gold))
            index += 1

    def summary(self) -> Summary:
        agreement = [agrees for _, _, agrees in self._steps if agrees is not None]
        return Summary(
            num_labelled=sum(each.identity in self._labelled for each in self.questions),
            num_candidates=len(self.questions),
            num_agreeing=sum(agreement),
            num_comparable=len(agreement),
        )

    def _shown(self, index: int) -> tuple[str, str]:
        """The responses in the order in which they are shown."""
        first, second = self.questions[index].responses
        is_swapped = np.random.default_rng((self._seed, index)).random() < 0.5
        return (second, first) if is_swapped else (first, second)

    def _answer(
        self, index: int, shown: tuple[str, str], key: str
    ) -> tuple[int, bytes, bool | None]:
        question = self.questions[index]
        chosen, rejected = shown[::-1] if key == "b" else shown
        preference = Preference(
            prompt=question.prompt,
            chosen=chosen,
            rejected=rejected,
            annotator=self._annotator,
            tie=key == "t",
        )
        shown_first = {"shown_first": "rejected" if key == "b" else "chosen"}
        record = {**preferences.to_record(preference), **shown_first, **question.fields}
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        _append(self._path, line)
        self._labelled.add(question.identity)
        agrees = None
        if question.gold is not None and key != "t":
            gold = dict(zip(question.responses, question.gold, strict=True))
            is_equal = gold[chosen] == gold[rejected]
            agrees = None if is_equal else gold[chosen] > gold[rejected]
        return index, line, agrees

    def _undo(self, index: int) -> int:
        """Takes back the last step of this session; returns the question to ask again."""
        if not self._steps:
            self._screen.say("Nothing to take back in this session.")
            return index
        last, line, _ = self._steps.pop()
        if line is not None:
            _remove_last(self._path, line)
            self._labelled.discard(self.questions[last].identity)
        self._screen.say("Taken back.")
        return last

    def _progress(self, shows_gold: bool) -> str:
        summary = self.summary()
        text = f"{summary.num_labelled} of {summary.num_candidates} labelled"
        if shows_gold:
            agreeing, comparable = summary.num_agreeing, summary.num_comparable
            text += f"; the gold scores agree with {agreeing} of {comparable} answers"
        return text


class _Screen:
    """Where questions are shown and keys are read."""

    def __init__(self, source: TextIO, output: TextIO) -> None:
        self._source = source
        self._output = output

    def say(self, text: str, end: str = "\n") -> None:
        encoding = getattr(self._output, "encoding", None) or "utf-8"
        self._output.write(printable(text).encode(encoding, "replace").decode(encoding) + end)
        self._output.flush()

    def ask(self) -> str:
        """The key that was pressed; at the end of the input, to quit."""
        while True:
            self.say(f"Which is better? {_CHOICES}: ", end="")
            line = self._source.readline()
            if not line:
                self.say("")
                return "q"
            word = line.strip().lower()
            if key := next((key for key, name in KEYS.items() if word in (key, name)), None):
                return key
            self.say(f"{word!r} is not one of {_CHOICES}")


def _append(path: Path, line: bytes) -> None:
    """Adds a line that stays, or nothing."""
    try:
        with path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        remedy = "make room or check its permissions; the answers before this one are kept"
        raise ValueError(f"{path} cannot be written: {error.strerror}; {remedy}") from None


def _remove_last(path: Path, line: bytes) -> None:
    """Takes the last line away, if it is `line`."""
    content = path.read_bytes()
    if not content.endswith(line):
        fault = f"{path} ends otherwise than this session left it"
        raise ValueError(f"{fault}; let one session at a time write to a file")
    write_atomically(path, content.removesuffix(line))


def _parse_candidate(record: object) -> Candidate:
    if not isinstance(record, Mapping):
        raise ValueError(f"the record is {json_lines.json_type(record)}; it must be an object")
    for name in ("prompt", "responses"):
        if name not in record:
            raise ValueError(f'"{name}" is missing; a record has "prompt" and "responses"')
    responses = record["responses"]
    if not isinstance(responses, list) or len(responses) != 2:
        size = f" of {len(responses)}" if isinstance(responses, list) else ""
        fault = f'"responses" is {json_lines.json_type(responses)}{size}'
        raise ValueError(f"{fault}; it must be a list of two texts")
    first, second = (
        json_lines.parse_text(f'"responses"[{place}]', text, required=True)
        for place, text in enumerate(responses)
    )
    if first == second:
        raise ValueError('"responses" are the same; leave the record out')
    prompt = json_lines.parse_text('"prompt"', record["prompt"])
    return Candidate(prompt=prompt, responses=(first, second))
