"""Text comes back byte for byte; training is deterministic; faults are one clear line each."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl_llm.lm import tokenizer as tokenizers

CORPUS = (
    "Patient presents with chest pain and shortness of breath. Assessment: angina.\n",
    "Patient presents with fever and cough.  Temperature 38.5 °C; SpO₂ 91 %.\n",
    "Allergy: penicillin. It's the patient's third visit; they'll return in 2 weeks.\n",
) * 4
AWKWARD = (
    "",
    " ",
    "  leading and trailing  ",
    "\n\n\t line \r\n ends \n",
    "don't, won't, they'll . , !  ?",
    "e\u0301 and é, Å and A\u030a",
    "👩🏽‍⚕️🇨🇭 \U0001f9ec",
    "心電図 мёд ελιά שלום عربي हिन्दी",
    "\x00\x01\x7f\u00a0\u200b\u2028\ufeff\uffff\U0010ffff",
    "<|endoftext|>",
    "before<|pad|>between <|endoftext|> after",
    "▁Ġ the signs of other tokenizers Ċ",
)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(CORPUS, vocab_size=320)


@pytest.fixture(scope="module")
def gpt2_directory(tokenizer, tmp_path_factory):
    """Our vocabulary in the files of the original GPT-2, which names no special tokens."""
    directory = tmp_path_factory.mktemp("gpt2")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    return directory


def random_texts(num: int) -> list[str]:
    """Random code points of every plane, surrogates left out."""
    generator = random.Random(0)
    texts = []
    for _ in range(num):
        ceiling = generator.choice((0x80, 0x800, 0x10000, 0x110000))
        points = (generator.randrange(ceiling) for _ in range(generator.randrange(1, 60)))
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    return texts


@pytest.mark.parametrize("text", AWKWARD)
def test_train_returns_awkward_text_byte_for_byte(tokenizer, text) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_train_returns_random_text_byte_for_byte(tokenizer) -> None:
    for text in random_texts(500):
        assert tokenizer.decode(tokenizer.encode(text)).encode() == text.encode()


def test_train_merges_what_is_frequent(tokenizer) -> None:
    assert len(tokenizer) == 320
    assert len(tokenizer.encode(CORPUS[0])) < len(CORPUS[0].encode()) / 2


def test_train_first_merge_is_the_most_frequent_pair() -> None:
    # "ab" stands 6 times, "bc" 4 times, " x" and " a" twice each.
    tokenizer = tokenizers.train(["ab ab xabc xabc abc abc"], vocab_size=259)
    assert tokenizer.convert_ids_to_tokens(258) == "ab"
    assert tokenizer.encode("abab") == [258, 258]


def test_train_without_merges_spells_bytes() -> None:
    tokenizer = tokenizers.train(["aaaa"], vocab_size=258)
    assert len(tokenizer) == 258
    assert len(tokenizer.encode("é😀")) == 6


def test_train_stops_where_no_pair_is_frequent_enough() -> None:
    assert len(tokenizers.train(["ab"], vocab_size=1000)) == 258
    assert len(tokenizers.train(["ab"], vocab_size=1000, min_frequency=1)) == 259


def test_train_numbers_the_special_tokens_first(tokenizer) -> None:
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 1)
    assert tokenizer.bos_token_id == 0


def test_train_never_reads_a_special_token_from_text(tokenizer) -> None:
    tokens = tokenizer.encode("stop<|endoftext|><|pad|>")
    assert not {0, 1} & set(tokens)
    assert tokenizer.decode([*tokens, 0], skip_special_tokens=True) == "stop<|endoftext|><|pad|>"


def test_train_is_deterministic(tokenizer) -> None:
    again = tokenizers.train(iter(CORPUS), vocab_size=320)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_train_pads_on_the_left(tokenizer) -> None:
    batch = tokenizer(["a", "a b c"], padding=True)
    first = batch["input_ids"][0]
    assert first[:-1] == [1] * (len(first) - 1)
    assert batch["attention_mask"][0] == [0] * (len(first) - 1) + [1]


@pytest.mark.parametrize("vocab_size", [0, 256, 257])
def test_train_refuses_fewer_tokens_than_bytes(vocab_size) -> None:
    with pytest.raises(ValueError, match=f"^vocab_size is {vocab_size}; it must be at least 258$"):
        tokenizers.train(CORPUS, vocab_size=vocab_size)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"texts is empty; give at least one text to train on"),
        (["", ""], r"texts is empty; give at least one text to train on"),
        ("one text", r"texts is one string; give an iterable of strings, such as \[text\]"),
        (["a", b"b"], r"texts\[1\] is bytes; it must be a string"),
        (["a\ud83d"], r"texts\[0\] has half of a surrogate pair at 1; decode it as UTF-8"),
    ],
)
def test_train_refuses_what_is_no_text(texts, message) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        tokenizers.train(texts, vocab_size=300)


def test_train_passes_an_error_of_the_iterator_on() -> None:
    def broken():
        yield "text"
        raise KeyError("line 2")

    with pytest.raises(KeyError, match="line 2"):
        tokenizers.train(broken(), vocab_size=300)


def test_load_returns_the_trained_tokenizer(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = tokenizers.load(tmp_path)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert loaded.padding_side == "left"
    for text in (*AWKWARD, *random_texts(50)):
        tokens = loaded.encode(text)
        assert tokens == tokenizer.encode(text)
        assert loaded.decode(tokens, skip_special_tokens=True) == text


def test_load_is_what_transformers_loads(tokenizer, tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    ours, theirs = tokenizers.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in AWKWARD:
        assert ours.encode(text) == theirs.encode(text)


def test_load_reads_the_files_of_gpt2(tokenizer, gpt2_directory) -> None:
    loaded = tokenizers.load(gpt2_directory)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 0)
    assert loaded.padding_side == "left"
    for text in AWKWARD[:9]:
        tokens = loaded.encode(text)
        assert tokens == tokenizer.encode(text)
        assert loaded.decode(tokens) == text
    # As published, GPT-2's tokenizer reads its special token from text; it returns it, too.
    assert loaded.encode("stop<|endoftext|>")[-1] == 0
    assert loaded.decode(loaded.encode("stop<|endoftext|>")) == "stop<|endoftext|>"


def test_load_reads_a_lone_tokenizer_json(tokenizer, tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    loaded = tokenizers.load(tmp_path)
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (0, 0, 320)


@pytest.mark.slow
def test_load_connects_nowhere_runs_no_code_and_prints_nothing(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\nclass Evil: pass\n")
    script = """
import os, sys
sys.addaudithook(lambda event, _: event in ("socket.connect", "socket.getaddrinfo") and os._exit(9))
from jaxrl_llm.lm import tokenizer
print(tokenizer.load(sys.argv[1]).encode("text"))
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        # Neither told to keep offline nor to be quiet.
        env={name: value for name, value in os.environ.items() if not re.match("HF|TRANSF", name)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{tokenizer.encode('text')}\n"


def test_load_refuses_a_place_without_tokenizer(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"none is not a directory; give one that holds a token"):
        tokenizers.load(tmp_path / "none")
    needed = "tokenizer.json, or vocab.json and merges.txt"
    with pytest.raises(ValueError, match=f"has no tokenizer; it must hold {needed}$"):
        tokenizers.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=f"has no tokenizer; it must hold {needed}$"):
        tokenizers.load(tmp_path)


def test_load_never_asks_the_hub_for_a_name() -> None:
    with pytest.raises(ValueError, match=r"^openai-community/gpt2 is not a directory"):
        tokenizers.load("openai-community/gpt2")


def test_load_refuses_a_damaged_file(tokenizer, tmp_path) -> None:
    text = tokenizer.backend_tokenizer.to_str()
    (tmp_path / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"^[^\n]* cannot be read \([^\n]*\); copy it again$"):
        tokenizers.load(tmp_path)


def test_load_refuses_a_tokenizer_that_never_ends(tokenizer, tmp_path) -> None:
    text = tokenizer.backend_tokenizer.to_str().replace("<|endoftext|>", "<|start|>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"without an end token; name one as eos_token in"):
        tokenizers.load(tmp_path)
