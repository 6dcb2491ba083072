"""Checkpoints that transformers wrote are read, and ours are read by it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_llm.lm import hf_checkpoint, tokenizer
from jaxrl_llm.nn.gpt2 import GPT2
from tests.golden import gpt2 as golden
from tests.lm.checkpoints import (
    INDEX,
    WEIGHTS,
    assert_same,
    contents,
    copy_checkpoint,
    edit_weights,
)

NAMES = sorted(golden.CASES)


@pytest.fixture(scope="module")
def relu():
    """The model and parameters of the golden checkpoint that is stored in float32."""
    return hf_checkpoint.load(golden.load("relu").directory)


@pytest.fixture(scope="module")
def spoken(relu):
    """A model, its parameters and a tokenizer that fits it."""
    model, params = relu
    text = tokenizer.train(["a text"], vocab_size=258)
    params = {"transformer": params["transformer"] | {"wte": {"weight": jnp.ones((258, 16))}}}
    return GPT2(replace(model.config, vocab_size=258)), params, text


@pytest.fixture
def directory(tmp_path) -> Path:
    return copy_checkpoint(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_load_reads_what_transformers_wrote(name) -> None:
    numbers = golden.load(name)
    model, params = hf_checkpoint.load(numbers.directory)
    real = numbers.attention_mask
    logits = jax.jit(model.apply)({"params": params}, numbers.tokens, attention_mask=real)
    np.testing.assert_allclose(logits[real], numbers.logits[real], rtol=0, atol=1e-4)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    for field, value in golden.CASES[name].config.items():
        assert getattr(model.config, field) == value


def test_load_computes_in_the_given_type(relu) -> None:
    model, params = hf_checkpoint.load(golden.load("relu").directory, dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16
    assert_same(params, relu[1])


def test_load_accepts_names_without_prefix_and_causal_masks(directory, relu) -> None:
    def edit(tensors):
        short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        for layer in range(3):
            short[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 74, 74), np.uint8))
            short[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
        return short

    edit_weights(directory, edit)
    assert_same(hf_checkpoint.load(directory)[1], relu[1])


def test_load_accepts_a_tied_head_that_equals_the_embedding(directory, relu) -> None:
    edit_weights(directory, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].copy()})
    assert_same(hf_checkpoint.load(directory)[1], relu[1])


def test_load_takes_defaults_for_what_an_old_config_omits(directory) -> None:
    config = json.loads((directory / "config.json").read_text())
    kept = ("model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    (directory / "config.json").write_text(json.dumps({name: config[name] for name in kept} | ids))
    model, _ = hf_checkpoint.load(directory)
    assert model.config.activation_function == "gelu_new"
    assert model.config.layer_norm_epsilon == 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_save_then_load_is_exact_and_byte_equal(name, tmp_path) -> None:
    model, params = hf_checkpoint.load(golden.load(name).directory)
    hf_checkpoint.save(tmp_path / "a", model, params)
    again, read = hf_checkpoint.load(tmp_path / "a")
    assert again == model
    assert_same(read, params)
    hf_checkpoint.save(tmp_path / "b", again, read)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a").keys() == {"config.json", WEIGHTS}


def test_save_writes_the_bytes_of_transformers(relu, tmp_path) -> None:
    hf_checkpoint.save(tmp_path, *relu)
    theirs = golden.load("relu").directory
    assert (tmp_path / WEIGHTS).read_bytes() == (theirs / WEIGHTS).read_bytes()
    ours = json.loads((tmp_path / "config.json").read_text())
    assert ours.items() <= json.loads((theirs / "config.json").read_text()).items()


def test_save_shards_what_is_large(relu, tmp_path) -> None:
    model, params = relu
    hf_checkpoint.save(tmp_path, model, params, max_shard_bytes=20_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    num = len(shards)
    assert num > 2
    assert shards == [f"model-{i:05d}-of-{num:05d}.safetensors" for i in range(1, num + 1)]
    sizes = [sum(t.nbytes for t in load_file(tmp_path / shard).values()) for shard in shards]
    assert max(sizes) <= 20_000
    assert json.loads((tmp_path / INDEX).read_text())["metadata"] == {"total_size": sum(sizes)}
    assert_same(hf_checkpoint.load(tmp_path)[1], params)


def test_save_gives_a_tensor_larger_than_a_shard_its_own(relu, tmp_path) -> None:
    model, params = relu
    hf_checkpoint.save(tmp_path, model, params, max_shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(jax.tree.leaves(params))
    assert_same(hf_checkpoint.load(tmp_path)[1], params)


def test_save_replaces_a_checkpoint_as_a_whole(relu, spoken, tmp_path) -> None:
    hf_checkpoint.save(tmp_path / "x", *spoken, max_shard_bytes=20_000)
    hf_checkpoint.save(tmp_path / "x", *relu)
    assert contents(tmp_path / "x").keys() == {"config.json", WEIGHTS}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_save_keeps_the_tokenizer_with_the_weights(spoken, tmp_path) -> None:
    path = tmp_path / "new" / "x"
    hf_checkpoint.save(path, *spoken)
    assert tokenizer.load(path).get_vocab() == spoken[2].get_vocab()
    assert_same(hf_checkpoint.load(path)[1], spoken[1])
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


def test_save_leaves_what_was_there_if_it_fails(relu, tmp_path, monkeypatch) -> None:
    hf_checkpoint.save(tmp_path / "x", *relu)
    before = contents(tmp_path / "x")

    def full_disk(*_args, **_options):
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.numpy.save_file", full_disk)
    for name in ("x", "y"):
        with pytest.raises(OSError, match="no space left"):
            hf_checkpoint.save(tmp_path / name, *relu)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert contents(tmp_path / "x") == before


def test_save_puts_the_old_back_if_the_new_cannot_take_its_place(
    relu, tmp_path, monkeypatch
) -> None:
    hf_checkpoint.save(tmp_path / "x", *relu)
    before = contents(tmp_path / "x")
    rename = Path.rename

    def refuse_partial(path, target):
        if path.name.endswith(".partial"):
            raise OSError("busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_partial)
    with pytest.raises(OSError, match="busy"):
        hf_checkpoint.save(tmp_path / "x", *relu)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert contents(tmp_path / "x") == before


@pytest.mark.parametrize("name", ["notes.txt", "pytorch_model.bin"])
def test_save_refuses_to_delete_what_is_no_checkpoint(relu, tmp_path, name) -> None:
    (tmp_path / name).write_text("mine")
    message = f"holds {re.escape(name)}, which is no checkpoint's; give a new directory"
    with pytest.raises(ValueError, match=message):
        hf_checkpoint.save(tmp_path, *relu)
    assert contents(tmp_path) == {name: b"mine"}
    with pytest.raises(ValueError, match=r"is a file; give a directory$"):
        hf_checkpoint.save(tmp_path / name, *relu)


def test_save_lists_every_leaf_that_is_not_the_trunks(relu, tmp_path) -> None:
    model, params = relu
    params = jax.tree.map(lambda leaf: leaf, params)
    params["transformer"]["h"]["0"]["attn"]["c_attn"]["lora_a"] = jnp.zeros((16, 2))
    params["value_head"] = {"hidden": {"kernel": jnp.zeros((16, 1))}}
    params["transformer"]["wpe"]["weight"] = jnp.zeros((3, 16))
    del params["transformer"]["ln_f"]["bias"]
    with pytest.raises(ValueError, match=r"^params is not what a checkpoint stores") as caught:
        hf_checkpoint.save(tmp_path / "x", model, params)
    for fault in (
        "transformer.ln_f.bias is missing",
        "transformer.h.0.attn.c_attn.lora_a has no place in it",
        "value_head.hidden.kernel has no place in it",
        "transformer.wpe.weight has shape (3, 16), must be (74, 16)",
        "merge LoRA into its weights",
    ):
        assert fault in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_save_refuses_a_tokenizer_without_embeddings(relu, spoken, tmp_path) -> None:
    model, params = relu
    message = "^vocab_size is 53, must be above the tokenizer's last token, 257$"
    with pytest.raises(ValueError, match=message):
        hf_checkpoint.save(tmp_path / "x", model, params, spoken[2])


def test_load_reads_torch_weights(directory, relu) -> None:
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(t) for name, t in load_file(directory / WEIGHTS).items()}
    torch.save(state, directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()
    assert_same(hf_checkpoint.load(directory)[1], relu[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "max_shard_bytes"),
    [("defaults", 10**9), ("relu", 20_000), ("untied", 10**9), ("untied", 20_000)],
)
def test_transformers_computes_our_logits_and_keeps_our_bytes(
    name, max_shard_bytes, tmp_path
) -> None:
    torch = pytest.importorskip("torch")
    from transformers import GPT2LMHeadModel

    numbers = golden.load(name)
    model, params = hf_checkpoint.load(numbers.directory)
    hf_checkpoint.save(tmp_path / "a", model, params, max_shard_bytes=max_shard_bytes)
    loaded: Any = GPT2LMHeadModel.from_pretrained(tmp_path / "a", output_loading_info=True)
    theirs, report = loaded
    assert not any(report.values())
    assert theirs.dtype == torch.float32
    live = golden.compute(theirs, numbers.directory, golden.CASES[name].seed)
    np.testing.assert_array_equal(live.tokens, numbers.tokens)
    np.testing.assert_array_equal(live.generated, numbers.generated)
    np.testing.assert_allclose(live.logits, numbers.logits, rtol=0, atol=1e-4)
    theirs.save_pretrained(tmp_path / "b")
    hf_checkpoint.save(
        tmp_path / "c", *hf_checkpoint.load(tmp_path / "b"), max_shard_bytes=max_shard_bytes
    )
    assert contents(tmp_path / "c") == contents(tmp_path / "a")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_golden_numbers_are_those_of_their_script(name) -> None:
    pytest.importorskip("torch")
    numbers = golden.load(name)
    live = golden.compute(golden.make(name), numbers.directory, golden.CASES[name].seed)
    np.testing.assert_allclose(live.logits, numbers.logits, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(live.generated, numbers.generated)
