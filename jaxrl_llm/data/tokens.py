"""From examples to batches of tokens: encoding, padding, packing, shuffling, and the shift by one.

Everything but `next_token_targets` is NumPy on the host, leaves of a `TokenBatch` included: they
go to a device with the call that uses them. A batch keeps one shape, so a step compiles once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxrl_llm import checks
from jaxrl_llm.data.json_lines import Example, Piece
from jaxrl_llm.types import Array, TokenBatch

Item = TypeVar("Item")


class Tokenizer(Protocol):
    """What this module asks of a tokenizer; those of `transformers` have it."""

    @property
    def eos_token_id(self) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


class Tokens(NamedTuple):
    """One sequence.

    Attributes:
      tokens: `[L]` int32.
      response_mask: `[L]` bool, the tokens that a loss counts.
      num_cut: how many tokens more the sequence had before it was cut to the longest allowed.
    """

    tokens: NDArray[np.int32]
    response_mask: NDArray[np.bool_]
    num_cut: int = 0

    @property
    def num_targets(self) -> int:
        """Counted tokens that have a token before them to be predicted from."""
        return int(self.response_mask[1:].sum())


class Encoding(NamedTuple):
    """Sequences, and what the longest length allowed has cost.

    Attributes:
      sequences: each with a token to learn.
      num_cut: how many of them lost their end.
      num_dropped: how many examples are left out, because nothing to learn was left of them.
    """

    sequences: list[Tokens]
    num_cut: int
    num_dropped: int


def encode(example: Example, tokenizer: Tokenizer, *, max_length: int) -> Tokens:
    """The tokens of an example, and which of them a loss counts.

    Pieces are encoded one by one, so that a prompt has the same tokens here as in generation,
    where nothing follows it. The end token that is appended, unless the text ends with it, is part
    of the response. What is too long keeps its start, as in TRL, and so loses its end token:
    otherwise a model would learn to stop in the middle of a sentence.

    Args:
      example: a prompt and its completion, or several.
      tokenizer: with an end token.
      max_length: of the sequence, end token included, at least 2.

    Raises:
      ValueError: if `max_length` is too small or the tokenizer has no end token.
    """
    checks.at_least("max_length", max_length, 2)
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer.eos_token_id is None; set the token that ends a text")
    tokens, response = _encode_pieces(example.pieces, tokenizer)
    if not tokens or tokens[-1] != tokenizer.eos_token_id:
        tokens.append(tokenizer.eos_token_id)
        response.append(True)
    return Tokens(
        np.array(tokens[:max_length], np.int32),
        np.array(response[:max_length], np.bool_),
        max(len(tokens) - max_length, 0),
    )


def encode_prompt(prompt: str | Example, tokenizer: Tokenizer) -> Tokens:
    """The tokens to generate from: of a text, or of an example up to its last completion.

    None of them counts, and no end token follows.
    """
    pieces = (Piece(prompt, False),) if isinstance(prompt, str) else prompt.pieces[:-1]
    tokens, _ = _encode_pieces(pieces, tokenizer)
    return Tokens(np.array(tokens, np.int32), np.zeros(len(tokens), np.bool_))


def _encode_pieces(pieces: Sequence[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    tokens: list[int] = []
    response: list[bool] = []
    for piece in pieces:
        ids = tokenizer.encode(piece.text, add_special_tokens=False)
        tokens += ids
        response += [piece.is_completion] * len(ids)
    return tokens, response


def encode_all(examples: Iterable[Example], tokenizer: Tokenizer, *, max_length: int) -> Encoding:
    """Encodes examples, leaves out those whose response was cut off entirely, and counts.

    Raises:
      ValueError: as `encode`, or if no example is left.
    """
    encoded = [encode(example, tokenizer, max_length=max_length) for example in examples]
    sequences = [sequence for sequence in encoded if sequence.num_targets]
    if not sequences:
        count = f"none of {len(encoded)} examples has a response within max_length, {max_length}"
        raise ValueError(f"{count}; raise it or give more")
    num_cut = sum(sequence.num_cut > 0 for sequence in sequences)
    return Encoding(sequences, num_cut, len(encoded) - len(sequences))


def corpus(examples: Iterable[Example], tokenizer: Tokenizer, *, length: int) -> TokenBatch:
    """Examples as training wants them: encoded, cut to `length` where longer, and packed.

    Arguments and errors: `encode_all` and `pack`.

    Warns:
      UserWarning: if examples were cut or left out, saying how many.
    """
    encoding = encode_all(examples, tokenizer, max_length=length)
    if encoding.num_cut or encoding.num_dropped:
        total = len(encoding.sequences) + encoding.num_dropped
        lost = f"{encoding.num_cut} are cut short and {encoding.num_dropped} left out"
        place = f"of {total} examples, {lost}, as they are longer than a row of {length} tokens"
        warnings.warn(f"{place}; give longer rows to keep them", stacklevel=2)
    return pack(encoding.sequences, length)


def pad(
    sequences: Sequence[Tokens],
    length: int,
    *,
    side: Literal["left", "right"] = "right",
    pad_token: int = 0,
) -> TokenBatch:
    """One sequence a row, padded to `length`.

    Args:
      sequences: `B` of them, none longer than `length`.
      length: `L`, of a row.
      side: where the padding goes: right for training, left for generation.
      pad_token: any id of the vocabulary; masks hide it, also where it is the end token.

    Returns:
      `[B, L]`, without segments.

    Raises:
      ValueError: naming a sequence that is empty or too long.
    """
    checks.one_of("side", side, ("left", "right"))
    lengths = _lengths(sequences, length)
    column = length - lengths if side == "left" else np.zeros_like(lengths)
    batch = _lay_out(sequences, lengths, np.arange(len(lengths)), column, length, pad_token)
    return replace(batch, segment=None)


def pack(sequences: Sequence[Tokens], length: int, *, pad_token: int = 0) -> TokenBatch:
    """Sequences side by side in as few rows as best fit finds, whole and each once.

    Longest first, a sequence goes to the fullest row that still has room for it. A row needs
    attention within a segment only and positions that start anew at each; then its loss and
    gradients are those of the sequences one a row.

    Args:
      sequences: none longer than `length`.
      length: `L`, of a row.
      pad_token: any id of the vocabulary; masks hide it.

    Returns:
      `[N, L]`, with `segment`; padding on the right. `fill` says how full.

    Raises:
      ValueError: naming a sequence that is empty or too long.

    Source: best-fit decreasing, Johnson et al. (1974), "Worst-case performance bounds for simple
      one-dimensional packing algorithms": at most 11/9 of the fewest rows, and 4 more.
    """
    lengths = _lengths(sequences, length)
    row, column = _best_fit(lengths, length)
    return _lay_out(sequences, lengths, row, column, length, pad_token)


def fill(batch: TokenBatch) -> float:
    """The share of a batch that is tokens and not padding."""
    return float(np.mean(np.asarray(batch.attention_mask)))


def _lengths(sequences: Sequence[Tokens], length: int) -> NDArray[np.int64]:
    if not sequences:
        raise ValueError("sequences is empty; give at least one")
    lengths = np.array([len(sequence.tokens) for sequence in sequences])
    wrong = (lengths < 1) | (lengths > length)
    if wrong.any():
        index = int(wrong.argmax())
        remedy = f"it must have 1 to {length}, the length of a row"
        raise ValueError(f"sequences[{index}] has {lengths[index]} tokens; {remedy}")
    return lengths


def _best_fit(
    lengths: NDArray[np.int64], length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The row and the first column of every sequence."""
    row, column = np.zeros_like(lengths), np.zeros_like(lengths)
    rows_with_room: list[list[int]] = [[] for _ in range(length + 1)]
    # Bit r is set where some row has room for exactly r tokens: the lowest one at or above the
    # need is the best fit, found without a walk over the rows.
    rooms = 0
    num_rows = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[index])
        enough = rooms >> need
        if enough:
            room = need + (enough & -enough).bit_length() - 1
            place = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, place = length, num_rows
            num_rows += 1
        row[index], column[index] = place, length - room
        rows_with_room[room - need].append(place)
        rooms |= 1 << (room - need)
    return row, column


def _lay_out(
    sequences: Sequence[Tokens],
    lengths: NDArray[np.int64],
    row: NDArray[np.int64],
    column: NDArray[np.int64],
    length: int,
    pad_token: int,
) -> TokenBatch:
    """Writes sequence i to `row[i]` from `column[i]` on, numbering the segments of each row."""
    order = np.lexsort((column, row))
    row_starts = np.searchsorted(row[order], row[order])
    ordinal = np.empty_like(lengths)
    ordinal[order] = np.arange(len(order)) - row_starts + 1

    first_of_sequence = np.cumsum(lengths) - lengths
    offset = row * length + column - first_of_sequence
    slots = np.arange(lengths.sum()) + np.repeat(offset, lengths)

    def rows(values: NDArray[Any], padding: int, dtype: type) -> NDArray[Any]:
        flat = np.full((row.max() + 1) * length, padding, dtype)
        flat[slots] = values
        return flat.reshape(-1, length)

    tokens = np.concatenate([sequence.tokens for sequence in sequences])
    response = np.concatenate([sequence.response_mask for sequence in sequences])
    segment = rows(np.repeat(ordinal, lengths), 0, np.int32)
    return _token_batch(
        tokens=rows(tokens, pad_token, np.int32),
        attention_mask=segment > 0,
        response_mask=rows(response, 0, np.bool_),
        segment=segment,
    )


def _token_batch(**leaves: NDArray[Any]) -> TokenBatch:
    """A `TokenBatch` of NumPy arrays, whose fields are declared as JAX ones."""
    return TokenBatch(**cast(dict[str, Any], leaves))


def shuffled(
    items: Iterable[Item], *, buffer_size: int, seed: int | Sequence[int]
) -> Iterator[Item]:
    """Every item once, in an order random within the reach of a bounded buffer.

    A buffer that holds all items gives a uniform permutation, and one of size 1 the order they
    came in. An item comes out at most `buffer_size - 1` places early.

    Args:
      items: a stream of any length.
      buffer_size: how many items are held at a time.
      seed: the same seed gives the same order; `(seed, epoch)` another one every epoch.
    """
    checks.at_least("buffer_size", buffer_size, 1)
    random = np.random.default_rng(seed)
    buffer: list[Item] = []
    for item in items:
        buffer.append(item)
        if len(buffer) == buffer_size:
            # The last slot goes to the one drawn, so that a draw costs the same at any size.
            index = int(random.integers(buffer_size))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            yield buffer.pop()
    for index in random.permutation(len(buffer)).tolist():
        yield buffer[index]


def batches(
    data: TokenBatch, *, batch_size: int, seed: int | Sequence[int] | None = None
) -> Iterator[TokenBatch]:
    """Every row of `data` once, `batch_size` at a time.

    The last batch is filled up with rows of padding, which no mask counts, so that all batches
    have one shape and nothing is left out.

    Args:
      data: `[N, L]`.
      batch_size: `B`.
      seed: of the order, as in `shuffled`. None keeps the rows in order.
    """
    checks.at_least("batch_size", batch_size, 1)
    num_rows = len(data.tokens)
    order = np.arange(num_rows)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(num_rows)

    for start in range(0, num_rows, batch_size):
        rows = order[start : start + batch_size]

        def take(leaf: Array, rows: NDArray[np.int64] = rows) -> NDArray[Any]:
            taken = np.zeros((batch_size, *leaf.shape[1:]), leaf.dtype)
            taken[: len(rows)] = np.asarray(leaf)[rows]
            return taken

        yield jax.tree.map(take, data)


def next_token_targets(batch: TokenBatch) -> tuple[Array, Array]:
    """What position t has to predict, token t + 1, and whether a loss counts it.

    The one place of the shift by one. A token counts if it is of the response and its predecessor
    is a token of the same sequence: the first of a row or a segment has none, and is no target.

    Args:
      batch: `[..., L]`.

    Returns:
      `(targets, mask)`, `[..., L]` int32 and bool, aligned with hidden states and logits. Where
      the mask is False, as in the last column, the target is some valid id.

    >>> import jax.numpy as jnp
    >>> batch = TokenBatch(
    ...     tokens=jnp.array([[5, 6, 7, 8]]),
    ...     attention_mask=jnp.array([[True, True, True, False]]),
    ...     response_mask=jnp.array([[False, True, True, False]]),
    ... )
    >>> targets, mask = next_token_targets(batch)
    >>> targets[mask].tolist(), mask.tolist()
    ([6, 7], [[True, True, False, False]])
    """

    def following(leaf: Array) -> Array:
        return jnp.roll(leaf, -1, axis=-1)

    attention = jnp.asarray(batch.attention_mask)
    is_last = jnp.arange(attention.shape[-1]) == attention.shape[-1] - 1
    same = attention & following(attention) & ~jnp.broadcast_to(is_last, attention.shape)
    if batch.segment is not None:
        same &= batch.segment == following(batch.segment)
    return following(batch.tokens), same & following(batch.response_mask)
