"""What the tests of checkpoints share: copies to be damaged, edits and comparisons."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from jaxrl_llm.lm import hf_checkpoint
from tests.golden import gpt2 as golden

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def copy_checkpoint(target: Path) -> Path:
    """Copies the golden checkpoint that is stored in float32."""
    for name in ("config.json", WEIGHTS):
        shutil.copy(golden.load("relu").directory / name, target)
    return target


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, edit) -> None:
    """Writes the weights anew as `edit(tensors)` returns them."""
    save_file(edit(load_file(directory / WEIGHTS)), directory / WEIGHTS)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_same(params, expected) -> None:
    """Fails unless two parameter trees have the same leaves, bit for bit."""
    params, expected = flatten_dict(params, sep="."), flatten_dict(expected, sep=".")
    assert params.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(params[name], expected[name], err_msg=name)


def refuses(directory: Path) -> str:
    """The error of `load`, which is of one line and says where; paths are made relative."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        hf_checkpoint.load(directory)
    assert str(directory) in str(caught.value)
    return str(caught.value).replace(f"{directory}/", "").replace(str(directory), "DIRECTORY")
