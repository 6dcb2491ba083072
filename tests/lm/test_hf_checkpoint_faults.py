"""Damaged, mistaken and malicious checkpoints are refused, in one line that names every fault."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxrl_llm.lm import hf_checkpoint, tokenizer
from tests.lm.checkpoints import (
    INDEX,
    WEIGHTS,
    copy_checkpoint,
    edit_config,
    edit_weights,
    refuses,
)

COLUMN = "transformer.h.0.attn.c_attn.weight"


@pytest.fixture
def directory(tmp_path) -> Path:
    return copy_checkpoint(tmp_path)


def test_load_lists_every_difference_in_one_error(directory) -> None:
    def edit(tensors):
        del tensors["transformer.ln_f.bias"]
        tensors["transformer.h.1.ln_1.weight"] = tensors["transformer.h.1.ln_1.weight"].astype(int)
        tensors[COLUMN] = tensors[COLUMN].T.copy()
        return tensors | {"v_head.weight": np.zeros((1, 16), np.float32)}

    edit_weights(directory, edit)
    edit_config(directory, vocab_size=54)
    tokenizer.train(["a text"], vocab_size=258).save_pretrained(directory)
    assert refuses(directory) == (
        "DIRECTORY does not fit its config.json: "
        "transformer.h.1.ln_1.weight is int64, must be floating point; "
        "transformer.ln_f.bias is missing; "
        "transformer.v_head.weight has no place in it; "
        f"{COLUMN} has shape (48, 16), must be (16, 48); "
        "transformer.wte.weight has shape (53, 16), must be (54, 16); "
        "vocab_size is 54, must be above the tokenizer's last token, 257; "
        "take all files from one checkpoint"
    )


def test_load_refuses_a_name_that_is_there_twice(directory) -> None:
    edit_weights(directory, lambda t: t | {"wte.weight": t["transformer.wte.weight"] + 1})
    fault = "transformer.wte.weight is there twice, with and without `transformer.`"
    assert fault in refuses(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; it must be 'gpt2'"),
        ({"add_cross_attention": True}, "add_cross_attention is true; it must be false"),
        ({"n_layer": "3"}, "n_layer is '3'; it must be int"),
        ({"n_head": True}, "n_head is True; it must be int"),
        ({"n_layer": 0}, "n_layer is 0; it must be at least 1"),
        ({"n_inner": 1.5}, "n_inner is 1.5; it must be int or null"),
        ({"eos_token_id": [0, 1]}, "eos_token_id is [0, 1]; it must be int or null"),
        ({"n_head": 3}, "n_embd is 16; it must be a multiple of n_head, 3"),
        ({"activation_function": "mish"}, "activation_function is 'mish'; it must be one of "),
    ],
)
def test_load_refuses_a_configuration_it_cannot_build(directory, changes, message) -> None:
    edit_config(directory, **changes)
    assert refuses(directory).startswith(f"config.json: {message}")


def test_load_names_every_field_that_is_missing(directory) -> None:
    (directory / "config.json").write_text('{"model_type": "gpt2", "n_embd": 16, "n_head": 2}')
    message = "config.json lacks vocab_size, n_positions, n_layer; copy the checkpoint's own"
    assert refuses(directory).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.json cannot be read (no such file or directory); give a directory that"),
        ("{", "config.json is not JSON (Expecting property name"),
        ("\udcff", "config.json is not JSON ('utf-8' codec"),
        ("[1]", "config.json holds no JSON object"),
    ],
)
def test_load_refuses_a_directory_without_configuration(directory, text, message) -> None:
    (directory / "config.json").unlink()
    if text is not None:
        (directory / "config.json").write_text(text, errors="surrogateescape")
    assert refuses(directory).startswith(message)


def test_load_refuses_what_is_no_directory(directory) -> None:
    for path in (directory / "none", directory / "config.json"):
        message = refuses(path)
        assert message == "DIRECTORY is not a directory; give one that holds config.json"


def test_load_refuses_a_directory_without_weights(directory) -> None:
    (directory / WEIGHTS).unlink()
    message = "DIRECTORY has no weights; it must hold model.safetensors or model.safetensors.index"
    assert refuses(directory).startswith(message)


@pytest.mark.parametrize("size", [0, 7, 100, 4000, -1])
def test_load_refuses_truncated_weights(directory, size) -> None:
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    message = refuses(directory)
    assert message.startswith("model.safetensors is truncated or damaged (")
    assert message.endswith("; copy it again")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("F8_E4M3", "model.safetensors stores a type that NumPy lacks ("),
        ("NONE", "model.safetensors is truncated or damaged ("),
    ],
)
def test_load_refuses_a_type_that_it_does_not_know(directory, kind, message) -> None:
    header = json.dumps({"x": {"dtype": kind, "shape": [1], "data_offsets": [0, 1]}}).encode()
    (directory / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    assert refuses(directory).startswith(message)


def test_load_refuses_a_pointer_in_place_of_weights(directory) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (directory / WEIGHTS).write_text(pointer)
    assert refuses(directory).startswith("model.safetensors is truncated or damaged (")


def test_load_refuses_a_missing_or_wrong_shard(directory) -> None:
    hf_checkpoint.save(directory, *hf_checkpoint.load(directory), max_shard_bytes=20_000)
    first, second, *_ = sorted(directory.glob("model-*"))
    index = json.loads((directory / INDEX).read_text())
    moved = next(name for name, file in index["weight_map"].items() if file == first.name)
    index["weight_map"][moved] = second.name
    (directory / INDEX).write_text(json.dumps(index))
    message = f"{INDEX} and {first.name} disagree about {moved}; copy both again"
    assert refuses(directory) == message
    first.unlink()
    assert refuses(directory) == f"{first.name} is missing; copy it again"


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "sub/model.safetensors",
        "/model.safetensors",
        "..",
        "..\\model.safetensors",
        "model.bin",
        "model.safetensors\n",
        None,
    ],
)
def test_load_refuses_an_index_that_leaves_the_directory(directory, file) -> None:
    (directory / WEIGHTS).rename(directory.parent / WEIGHTS)
    (directory / INDEX).write_text(json.dumps({"weight_map": {COLUMN: file}}))
    assert refuses(directory) == (
        f"{INDEX}: weight_map[{COLUMN!r}] is {file!r}; "
        "it must be the name of a .safetensors file beside it"
    )


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_load_refuses_an_index_without_map(directory, content) -> None:
    (directory / WEIGHTS).unlink()
    (directory / INDEX).write_text(json.dumps(content))
    assert refuses(directory).startswith(f"{INDEX} has no weight_map")


class Payload:
    """Unpickled carelessly, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_load_reads_no_pickle_without_torch(directory, monkeypatch) -> None:
    (directory / WEIGHTS).unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(directory / "ran")))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert refuses(directory) == (
        "pytorch_model.bin is read only where torch is; "
        "install torch, or convert it to model.safetensors"
    )
    assert not (directory / "ran").exists()


def test_load_refuses_a_tied_head_that_differs(directory) -> None:
    edit_weights(directory, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1})
    assert refuses(directory) == (
        "DIRECTORY does not fit its config.json: lm_head.weight differs from "
        "transformer.wte.weight, which it is tied to (set tie_word_embeddings to false); "
        "take all files from one checkpoint"
    )


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2, 4])
def test_load_runs_no_pickled_code(directory, protocol) -> None:
    pytest.importorskip("torch")
    (directory / WEIGHTS).unlink()
    payload = pickle.dumps(Payload(directory / "ran"), protocol=protocol)
    (directory / "pytorch_model.bin").write_bytes(payload)
    assert refuses(directory).startswith("pytorch_model.bin is truncated or damaged (")
    assert not (directory / "ran").exists()
