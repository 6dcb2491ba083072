"""Text to tokens and back: byte-level BPE, read from a directory or trained on texts.

    tokenizer = train(texts, vocab_size=512)
    tokenizer.decode(tokenizer.encode(text)) == text        # any text that UTF-8 can hold

Each of the 256 bytes has a token, so nothing is unknown and nothing is lost. A tokenizer trained
here takes text for text: `<|endoftext|>` typed by a patient or a model is spelled in bytes, and
only the id `eos_token_id` ends a sequence. A directory from elsewhere decides that by its own
`tokenizer_config.json`; GPT-2's reads such text as the special token.

Nothing here touches the network, nor runs code that a directory brings.

Source: Sennrich et al. (2016), "Neural Machine Translation of Rare Words with Subword Units", for
the merges; Radford et al. (2019), section 2.2, for bytes as the alphabet.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrl_llm import checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
NUM_BYTES = 256


def load(directory: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face directory, padding on the left.

    Args:
      directory: with `tokenizer.json`, or with GPT-2's `vocab.json` and `merges.txt`. Its special
        tokens, chat template and treatment of special tokens in text are kept.

    Returns:
      The tokenizer. Where the directory names no end token, `<|endoftext|>` is one; where it names
      no padding token, the end token is, and the vocabulary does not grow.

    Raises:
      ValueError: if the directory or its files are missing or damaged, or nothing ends a text.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give one that holds a tokenizer")
    if not is_in(directory):
        needed = "tokenizer.json, or vocab.json and merges.txt"
        raise ValueError(f"{directory} has no tokenizer; it must hold {needed}")
    _silence_notice()
    from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

    is_whole = (directory / "tokenizer.json").is_file()
    try:
        # By class: `AutoTokenizer` may ask the hub what a directory does not say.
        tokenizer = (PreTrainedTokenizerFast if is_whole else GPT2Tokenizer).from_pretrained(
            directory,
            local_files_only=True,
            padding_side="left",
            clean_up_tokenization_spaces=False,
        )
    except Exception as error:
        fault = (str(error).splitlines() or [type(error).__name__])[0]
        message = f"{directory} has a tokenizer that cannot be read ({fault}); copy it again"
        raise ValueError(message) from error
    if tokenizer.eos_token is None:
        if END_OF_TEXT not in tokenizer.get_vocab():
            remedy = "name one as eos_token in tokenizer_config.json"
            raise ValueError(f"{directory} has a tokenizer without an end token; {remedy}")
        tokenizer.eos_token = END_OF_TEXT
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def is_in(directory: str | Path) -> bool:
    """Whether `directory` holds the files of a tokenizer that `load` reads."""
    alternatives = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    return any(all((Path(directory) / name).is_file() for name in names) for names in alternatives)


def train(
    texts: Iterable[str], *, vocab_size: int, min_frequency: int = 2
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `texts`: the same texts in the same order give the same tokenizer.

    Args:
      texts: read once, so that a generator will do.
      vocab_size: at least 258: 256 bytes, `<|endoftext|>` (id 0) and `<|pad|>` (id 1).
      min_frequency: how often a pair must occur to be merged, at least 1.

    Returns:
      The tokenizer, padding on the left. It has fewer than `vocab_size` tokens where no pair is
      frequent enough: size an embedding by `len(tokenizer)`.

    Raises:
      ValueError: if `vocab_size` or `min_frequency` is too small, an element of `texts` is not
        text that UTF-8 can hold, or they are all empty.
    """
    checks.at_least("vocab_size", vocab_size, NUM_BYTES + len((END_OF_TEXT, PADDING)))
    checks.at_least("min_frequency", min_frequency, 1)
    _silence_notice()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_checked(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _checked(texts: Iterable[object]) -> Iterator[str]:
    if isinstance(texts, str):
        raise ValueError("texts is one string; give an iterable of strings, such as [text]")
    is_empty = True
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{index}] is {type(text).__name__}; it must be a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            fault = f"has half of a surrogate pair at {error.start}"
            raise ValueError(f"texts[{index}] {fault}; decode it as UTF-8") from None
        is_empty = is_empty and not text
        yield text
    if is_empty:
        raise ValueError("texts is empty; give at least one text to train on")


def _silence_notice() -> None:
    """Keeps `transformers` from printing, once imported, that it works better with torch."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
