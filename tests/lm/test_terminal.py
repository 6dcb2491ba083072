"""`write_stream`: whole characters only, nothing that steers a terminal, one row after another."""

import io
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm.lm.generate import Config, generate, stream
from jaxrl_llm.lm.terminal import printable, write_stream
from jaxrl_llm.nn.gpt2 import GPT2
from tests.lm.generation import TINY, random_params

END = 256


class ByteTokenizer:
    """A token a byte, as a byte-level BPE falls back to; 256 is special."""

    def decode(self, token_ids, *, skip_special_tokens):
        assert skip_special_tokens
        return bytes(token for token in token_ids if token != END).decode(errors="replace")


class Recorder(io.StringIO):
    """Remembers each text written, and that it was flushed."""

    def __init__(self):
        super().__init__()
        self.pieces = []
        self.is_flushed = True

    def write(self, text):
        if text:
            self.pieces.append(text)
            self.is_flushed = False
        return super().write(text)

    def flush(self):
        self.is_flushed = True


def chunks_of(*texts, size=1) -> Any:
    """What `generate.stream` yields for rows of these texts (or bytes), each with its end token."""
    rows = [[*(text.encode() if isinstance(text, str) else text), END] for text in texts]
    width = max(map(len, rows))
    for begin in range(0, width, size):
        tokens = np.full((len(rows), min(size, width - begin)), END)
        mask = np.zeros(tokens.shape, bool)
        for row, ids in enumerate(rows):
            part = ids[begin : begin + size]
            tokens[row, : len(part)] = part
            mask[row, : len(part)] = True
        yield tokens, mask


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    "text", ["plain text\n\tindented", "naïve 心電図 👩🏽‍⚕️ ok", "", "\ufffd kept \ufffd"]
)
def test_write_stream_writes_the_text_whatever_the_chunks(text, size):
    file = Recorder()
    assert write_stream(chunks_of(text, size=size), ByteTokenizer(), file=file) == [text]
    assert file.getvalue() == text + "\n"
    assert file.is_flushed


def test_write_stream_writes_each_character_when_its_last_byte_has_come():
    file, seen = Recorder(), []

    def watched() -> Any:
        for chunk in chunks_of("aé👍b"):
            yield chunk
            seen.append(file.getvalue())

    write_stream(watched(), ByteTokenizer(), file=file)
    assert seen == ["a", "a", "aé", "aé", "aé", "aé", "aé👍", "aé👍b", "aé👍b"]


def test_write_stream_replaces_bytes_that_are_no_character_once_that_is_certain():
    file = Recorder()
    broken = b"a\xf0\x9fb\xff"
    assert write_stream(chunks_of(broken), ByteTokenizer(), file=file) == ["a\ufffdb\ufffd"]
    assert file.pieces == ["a", "\ufffdb", "\ufffd", "\n"]


def test_write_stream_writes_rows_one_after_another():
    file, seen = Recorder(), []

    def watched() -> Any:
        for chunk in chunks_of("abcd", "xy", "12345678", size=2):
            yield chunk
            seen.append(file.getvalue())

    texts = write_stream(watched(), ByteTokenizer(), file=file)
    assert texts == ["abcd", "xy", "12345678"]
    # The second row had ended, and half of the third had come, when the first ended.
    assert seen == ["ab", "abcd", "abcd\nxy\n123456", "abcd\nxy\n12345678", "abcd\nxy\n12345678"]
    assert file.getvalue() == "abcd\nxy\n12345678\n"


def test_write_stream_of_nothing_writes_nothing():
    file = Recorder()
    assert write_stream(iter(()), ByteTokenizer(), file=file) == []
    assert file.getvalue() == ""


def test_write_stream_leaves_out_what_steers_a_terminal_but_returns_it():
    file = Recorder()
    hostile = "\x1b[2J\x1b]0;title\x07safe\r\x08\x7f\x9b31m\u202edesrever"
    assert write_stream(chunks_of(hostile), ByteTokenizer(), file=file) == [hostile]
    assert file.getvalue() == "[2J]0;titlesafe31mdesrever\n"


def test_printable_keeps_every_other_character():
    text = "".join(map(chr, [*range(0xA0, 0xD800), *range(0xE000, 0x10FFFF, 97)]))
    kept = printable(text)
    assert set(text) - set(kept) == set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert printable("\x00\t\n\x1f a") == "\t\n a"


def test_write_stream_survives_a_file_of_a_narrow_encoding():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", newline="")
    write_stream(chunks_of("37 °C"), ByteTokenizer(), file=file)
    assert raw.getvalue() == b"37 ?C\n"


def test_write_stream_goes_to_standard_output_by_default(capsys):
    write_stream(chunks_of("to the screen"), ByteTokenizer())
    assert capsys.readouterr().out == "to the screen\n"


@pytest.mark.slow
def test_write_stream_shows_what_generate_returns():
    class Names:
        def decode(self, token_ids, *, skip_special_tokens):
            return " ".join(map(str, token_ids))

    model = GPT2(TINY)
    arguments = (model, random_params(model), np.array([[3, 7], [2, 9]]), None, jax.random.key(1))
    config = Config(max_new_tokens=8)
    batch = generate(*arguments, config)
    file = Recorder()
    texts = write_stream(stream(*arguments, config, chunk_tokens=3), Names(), file=file)
    for text, tokens, mask in zip(texts, batch.tokens, batch.response_mask, strict=True):
        assert text == " ".join(map(str, np.asarray(tokens)[np.asarray(mask)]))
    assert file.getvalue() == "\n".join(texts) + "\n"
