"""The model that a run starts from, and the one that it leaves: a directory, back and forth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.json_lines import Example
from jaxrl_llm.lm import base_model, hf_checkpoint, tokenizer
from jaxrl_llm.lm.base_model import SMALL, BaseModel
from jaxrl_llm.nn import adapters
from tests.lm.checkpoints import assert_same, copy_checkpoint
from tests.nn.tiny_gpt2 import fast_key

TINY = replace(SMALL, vocab_size=300, n_positions=24, n_embd=16, n_layer=1, n_head=2, lora_rank=2)
EXAMPLES = [Example.of(f"Fever, day {day}.", " Rest and drink.") for day in range(9)]
TOKENS = np.random.default_rng(0).integers(2, 200, size=(2, 9))


@pytest.fixture(scope="module")
def fresh() -> BaseModel:
    return base_model.make(TINY, None, EXAMPLES, fast_key(0))


@pytest.fixture(scope="module")
def directory(fresh, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base") / "model"
    assert base_model.export(path, fresh) == path
    return path


def noisy(params: Any) -> Any:
    """No leaf at rest, so that an adapter does something."""
    random = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + random.normal(0, 0.1, leaf.shape).astype(leaf.dtype), params
    )


def logits(model: Any, params: Any) -> Any:
    return jax.jit(model.apply)({"params": params}, TOKENS)


def test_small_model_has_the_size_that_is_promised_and_no_dropout():
    SMALL.validate()
    shape = SMALL.shape(SMALL.vocab_size)
    assert 1e6 < shape.num_parameters < 5e6
    assert shape.resid_pdrop == shape.embd_pdrop == shape.attn_pdrop == 0


def test_make_trains_a_tokenizer_and_sizes_the_model_by_it(fresh):
    config = fresh.model.config
    assert config.vocab_size == len(fresh.tokenizer) < TINY.vocab_size
    assert (config.n_positions, config.n_embd, config.n_layer, config.n_head) == (24, 16, 1, 2)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, name) == getattr(fresh.tokenizer, name)
    assert sum(leaf.size for leaf in jax.tree.leaves(fresh.params)) == config.num_parameters
    # Both halves of an example are learnt from.
    assert {"Fever", "\u0120drink"} <= fresh.tokenizer.get_vocab().keys()
    again = base_model.make(TINY, None, iter(EXAMPLES), fast_key(0))
    assert_same(again.params, fresh.params)


def test_export_is_loaded_to_the_same_bits_and_logits(fresh, directory):
    model, params = hf_checkpoint.load(directory)
    assert_same(params, fresh.params)
    np.testing.assert_array_equal(logits(model, params), logits(fresh.model, fresh.params))
    assert tokenizer.load(directory).get_vocab() == fresh.tokenizer.get_vocab()


def test_make_from_a_directory_has_its_weights_shape_and_tokenizer(fresh, directory):
    other = replace(SMALL, dtype="bfloat16", remat=True)
    base = base_model.make(other, directory, iter(()), fast_key(1))
    assert_same(base.params, fresh.params)
    assert base.model.config == fresh.model.config
    assert (base.model.dtype, base.model.remat) == (jnp.bfloat16, True)
    assert base.tokenizer.encode("Rest and drink.") == fresh.tokenizer.encode("Rest and drink.")
    found = logits(base.model, base.params)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, logits(fresh.model, fresh.params), atol=0.02)


@pytest.mark.slow
def test_make_with_lora_adds_leaves_to_a_trunk_and_export_merges_them(fresh, directory, tmp_path):
    base = base_model.make(TINY, directory, (), fast_key(1), trainable="lora")
    assert_same(adapters.trunk(base.params), fresh.params)
    c_attn = base.params["transformer"]["h"]["0"]["attn"]["c_attn"]
    assert (c_attn["lora_a"].shape, c_attn["lora_b"].shape) == ((16, 2), (2, 48))
    assert np.asarray(c_attn["lora_a"]).any()
    # It starts as the model that it adapts.
    np.testing.assert_array_equal(
        logits(base.model, base.params), logits(fresh.model, fresh.params)
    )
    learnt = base._replace(params=noisy(base.params))
    base_model.export(tmp_path / "merged", learnt)
    model, params = hf_checkpoint.load(tmp_path / "merged")
    expected = logits(learnt.model, learnt.params)
    np.testing.assert_allclose(logits(model, params), expected, rtol=1e-4, atol=1e-5)


def test_export_of_a_residual_adapter_writes_nothing(fresh, directory, tmp_path):
    config = replace(TINY, adapter_width=3)
    base = base_model.make(config, directory, (), fast_key(1), trainable="adapter")
    assert_same(adapters.trunk(base.params), fresh.params)
    assert base.params["adapter"]["down"]["kernel"].shape == (16, 3)
    assert base_model.export(tmp_path / "model", base) is None
    assert not (tmp_path / "model").exists()


def test_make_refuses_what_is_no_checkpoint(fresh, tmp_path):
    def refusal(directory: Path) -> str:
        with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
            base_model.make(TINY, directory, (), fast_key(0))
        return str(error.value).replace(str(tmp_path), "")

    assert refusal(tmp_path / "absent") == (
        "/absent is not a directory; give one that holds a tokenizer"
    )
    assert refusal(copy_checkpoint(tmp_path)) == (
        " has no tokenizer; it must hold tokenizer.json, or vocab.json and merges.txt"
    )
    fresh.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert refusal(tmp_path).startswith("/config.json cannot be read (no such file or directory)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 257}, "vocab_size is 257; it must be at least 258"),
        ({"n_head": 3}, "n_embd is 160; it must be a multiple of n_head, 3"),
        ({"n_layer": 0}, "n_layer is 0; it must be at least 1"),
        ({"lora_rank": 0}, "lora_rank is 0; it must be at least 1"),
        ({"adapter_width": -1}, "adapter_width is -1; it must be at least 1"),
    ],
)
def test_validate_names_the_field(changes, message):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        replace(SMALL, **changes).validate()
    assert str(error.value) == message


@pytest.mark.parametrize("trainable", ["all", "lora", "adapter"])
def test_extend_starts_as_the_same_policy_with_a_value_of_zero(fresh, trainable):
    learner = base_model.extend(TINY, fresh, fast_key(1), trainable=trainable, value_width=4)
    np.testing.assert_allclose(
        logits(learner.model, learner.params), logits(fresh.model, fresh.params), atol=1e-6
    )
    assert_same(adapters.trunk(learner.params), fresh.params)
    hidden = jnp.ones((1, 3, TINY.n_embd))
    value = learner.model.apply({"params": learner.params}, hidden, method="value")
    np.testing.assert_array_equal(value, 0)


def test_extend_merges_a_lora_into_the_reference_of_what_comes_next(fresh):
    tuned = base_model.extend(TINY, fresh, fast_key(1), trainable="lora")
    tuned = tuned._replace(params=noisy(tuned.params))
    learner = base_model.extend(TINY, tuned, fast_key(2))
    np.testing.assert_allclose(
        logits(learner.model, learner.params), logits(tuned.model, tuned.params), atol=1e-5
    )


def test_extend_refuses_an_adapter_that_cannot_be_merged(fresh):
    tuned = base_model.extend(TINY, fresh, fast_key(1), trainable="adapter")
    with pytest.raises(
        ValueError, match=r"^base has a residual adapter; fine-tune all of it or by"
    ):
        base_model.extend(TINY, tuned, fast_key(2))
