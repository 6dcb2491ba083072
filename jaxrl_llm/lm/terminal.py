"""Generated text on a terminal, or in any text file, while it is being generated.

write_stream(stream(model, params, tokens, None, key, config), tokenizer)
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable
from typing import Protocol, TextIO

import numpy as np

from jaxrl_llm.types import Array

# What the bytes of a character decode to as long as some of them are missing.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# They turn the order of what follows, so that a text reads as another one.
_BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


def write_stream(
    chunks: Iterable[tuple[Array, Array]],
    tokenizer: Tokenizer,
    *,
    file: TextIO | None = None,
) -> list[str]:
    """Writes each row as a paragraph of its own, the first as it grows, each next from where it is.

    What is written cannot steer a terminal: control characters but newline and tab are left out,
    and so are those that reverse the direction of writing. What the file's encoding lacks becomes a
    question mark.

    Args:
      chunks: tokens `[R, n]` and which of them are written, as `generate.stream` yields them.
      tokenizer: its special tokens are not shown.
      file: standard output by default.

    Returns:
      The text of every row, whole and as it was generated.
    """
    output = sys.stdout if file is None else file
    rows: list[_Row] = []
    current = 0
    for tokens, mask in chunks:
        written = np.asarray(mask)
        rows = rows or [_Row(tokenizer, output) for _ in written]
        for row, ids, real in zip(rows, np.asarray(tokens), written, strict=True):
            row.ids += ids[real].tolist()
            row.has_ended |= not real.all()
        while rows[current].has_ended and current < len(rows) - 1:
            rows[current].finish()
            current += 1
        rows[current].write_stable()
    for row in rows[current:]:
        row.finish()
    return [row.text() for row in rows]


def printable(text: str) -> str:
    """`text` without the characters that steer a terminal."""
    return "".join(
        character
        for character in text
        if character in "\n\t"
        or (unicodedata.category(character) != "Cc" and character not in _BIDIRECTIONAL)
    )


class _Row:
    """One row's tokens, and how much of their text is in the file."""

    def __init__(self, tokenizer: Tokenizer, file: TextIO) -> None:
        self.ids: list[int] = []
        self.has_ended = False
        self._num_written = 0
        self._tokenizer = tokenizer
        self._file = file

    def text(self) -> str:
        # All of it anew: a character may take several tokens, and one token several characters.
        return self._tokenizer.decode(self.ids, skip_special_tokens=True)

    def write_stable(self) -> None:
        """Writes what further tokens cannot change."""
        self._write(self.text().rstrip(_INCOMPLETE))

    def finish(self) -> None:
        self._write(self.text())
        self._file.write("\n")
        self._file.flush()

    def _write(self, text: str) -> None:
        new = printable(text[self._num_written :])
        self._num_written = max(self._num_written, len(text))
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        self._file.write(new.encode(encoding, "replace").decode(encoding))
        self._file.flush()
