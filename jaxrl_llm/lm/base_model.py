"""The model that a run starts from: a checkpoint of the user's, or a small one of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm import checks
from jaxrl_llm.data.json_lines import Example
from jaxrl_llm.lm import hf_checkpoint, tokenizer
from jaxrl_llm.nn import adapters
from jaxrl_llm.nn.gpt2 import GPT2, GPT2Config
from jaxrl_llm.types import Key, PyTree


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of the small model, and how any model computes."""

    vocab_size: int = 1024
    """Tokens of the small model, at most; a checkpoint brings its own, and its own shape."""
    n_positions: int = 256
    """Longest context of the small model."""
    n_embd: int = 160
    """Width of the small model."""
    n_layer: int = 4
    """Blocks of the small model."""
    n_head: int = 5
    """Attention heads of the small model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters are float32."""
    remat: bool = False
    """Recompute blocks in the backward pass, for less memory."""
    lora_rank: int = 8
    """Of the updates, where LoRA is what learns."""
    adapter_width: int = 512
    """Of the residual adapter, where that is what learns."""

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless a model can be built."""
        # Room for every byte and the two special tokens.
        checks.at_least("vocab_size", self.vocab_size, tokenizer.NUM_BYTES + 2)
        for name in ("lora_rank", "adapter_width"):
            checks.at_least(name, getattr(self, name), 1)
        self.shape(self.vocab_size).validate()

    def shape(self, vocab_size: int, end: int = 0, padding: int | None = None) -> GPT2Config:
        """Of the small model. It has no dropout: it trains on text that it does not see twice.

        Args:
          vocab_size: tokens there are.
          end: the one that ends a text, and begins it.
          padding: the one that fills a row.
        """
        return GPT2Config(
            vocab_size=vocab_size,
            n_positions=self.n_positions,
            n_embd=self.n_embd,
            n_layer=self.n_layer,
            n_head=self.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=padding,
        )


SMALL = Config()


class BaseModel(NamedTuple):
    """A model, its parameters and its tokenizer."""

    model: GPT2
    params: PyTree
    tokenizer: Any


def make(
    config: Config,
    directory: Path | None,
    examples: Iterable[Example],
    key: Key,
    *,
    trainable: adapters.Trainable = "all",
) -> BaseModel:
    """The model in `directory`, or a small untrained one whose tokenizer is trained on examples.

    Args:
      config: of the small model, and of the computation.
      directory: a Hugging Face GPT-2; None for the small one.
      examples: not read where there is a directory.
      key: of the first parameters, those of adapters included.
      trainable: `lora` and `adapter` add such leaves to the model.

    Raises:
      ValueError: as `hf_checkpoint.load` and `tokenizer.load`.
    """
    if directory is None:
        texts = ("".join(piece.text for piece in example.pieces) for example in examples)
        words: Any = tokenizer.train(texts, vocab_size=config.vocab_size)
        shape = config.shape(len(words), words.eos_token_id, words.pad_token_id)
        trunk = {}
    else:
        words = tokenizer.load(directory)
        plain, trunk = hf_checkpoint.load(directory)
        shape = plain.config
    model = GPT2(shape, dtype=jnp.dtype(config.dtype), remat=config.remat)
    return extend(config, BaseModel(model, trunk, words), key, trainable=trainable)


def extend(
    config: Config,
    base: BaseModel,
    key: Key,
    *,
    trainable: adapters.Trainable = "all",
    value_width: int | None = None,
) -> BaseModel:
    """A fine-tuned model with new parts, to go on from.

    Its LoRA is merged first: what it was fine-tuned to is the reference of what comes next.

    Args:
      config: of the adapters.
      base: leaves that its parameters lack are drawn too.
      key: of what is drawn.
      trainable: `lora` and `adapter` add such leaves.
      value_width: of the value head; None adds none.

    Raises:
      ValueError: if `base` has a residual adapter, which nothing can be merged into.
    """
    if base.model.adapter_width is not None:
        raise ValueError("base has a residual adapter; fine-tune all of it or by LoRA before this")
    lora = base.model.lora
    trunk = adapters.trunk(base.params if lora is None else adapters.merge_lora(base.params, lora))
    model = base.model.clone(
        lora=adapters.LoRA(rank=config.lora_rank) if trainable == "lora" else None,
        adapter_width=config.adapter_width if trainable == "adapter" else None,
        value_width=value_width,
    )

    @jax.jit  # so that nothing is drawn for the leaves that the trunk brings
    def start(key: Key, trunk: PyTree) -> PyTree:
        return adapters.attach(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"], trunk)

    return BaseModel(model, start(key, trunk), base.tokenizer)


def export(directory: Path, base: BaseModel) -> Path | None:
    """Saves a fine-tuned model as a Hugging Face directory, its LoRA merged.

    Returns:
      `directory`, or None for a model with a residual adapter, which GPT-2 has no place for.
    """
    if base.model.adapter_width is not None:
        return None
    params = base.params
    if base.model.lora is not None:
        params = adapters.merge_lora(params, base.model.lora)
    plain = GPT2(base.model.config)
    hf_checkpoint.save(directory, plain, adapters.trunk(params), base.tokenizer)
    return directory
