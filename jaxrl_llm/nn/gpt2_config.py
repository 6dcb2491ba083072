"""The shape of a GPT-2, and what follows from it: counts of parameters, operations and bytes.

Source: the names and defaults are those of Hugging Face's `config.json` of GPT-2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_llm import checks
from jaxrl_llm.types import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """The shape of a GPT-2, by the names of a checkpoint's `config.json`; by default the small one.

    Attributes:
      vocab_size: tokens, `V`.
      n_positions: the longest context.
      n_embd: width of the residual stream, `E`.
      n_layer: blocks.
      n_head: attention heads; each has `n_embd / n_head` dimensions.
      n_inner: width inside a block's perceptron; None is 4 `n_embd`.
      activation_function: one of `ACTIVATIONS`.
      layer_norm_epsilon: added to a variance.
      resid_pdrop: dropout of each block's two outputs, a probability.
      embd_pdrop: of the embeddings.
      attn_pdrop: of the attention weights.
      initializer_range: standard deviation of the first weights.
      tie_word_embeddings: whether the output layer is the token embedding.
      scale_attn_weights: whether attention scores are divided by the root of the head's dimension.
      scale_attn_by_inverse_layer_idx: whether they are also divided by the layer's number, from 1.
      bos_token_id: begins a text.
      eos_token_id: ends a text.
      pad_token_id: fills a row; None where the vocabulary has none.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    pad_token_id: int | None = None

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless a model can be built."""
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            checks.at_least(name, getattr(self, name), 1)
        checks.at_least("n_inner", self.inner_width, 1)
        checks.divisible("n_embd", self.n_embd, "n_head", self.n_head)
        checks.one_of("activation_function", self.activation_function, ACTIVATIONS)
        checks.positive("layer_norm_epsilon", self.layer_norm_epsilon)
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            checks.between(name, getattr(self, name), 0, 1)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) is not None:
                checks.between(name, getattr(self, name), 0, self.vocab_size - 1)

    @property
    def inner_width(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head

    @property
    def num_parameters(self) -> int:
        """Of the model without adapters; a tied output layer counts once."""
        width, inner = self.n_embd, self.inner_width
        block = 4 * width + (width + 1) * 3 * width + (width + 1) * width
        block += (width + 1) * inner + (inner + 1) * width
        embeddings = (self.vocab_size + self.n_positions) * width
        head = 0 if self.tie_word_embeddings else self.vocab_size * width
        return embeddings + self.n_layer * block + 2 * width + head

    def forward_flops(self, context: float) -> float:
        """Floating-point operations of one token's forward pass, matrix products only.

        A training step takes three times as many.

        Args:
          context: how many tokens it attends to, itself included; of a whole row of `L` tokens,
            the average token attends to `(L + 1) / 2`.
        """
        width = self.n_embd
        block = 4 * width * width + 2 * width * self.inner_width + 2 * width * context
        return 2 * (self.n_layer * block + width * self.vocab_size)

    def cache_bytes(self, batch: int, length: int, dtype: DTypeLike = jnp.float32) -> int:
        """Bytes of the keys and values of `batch` rows of `length` slots."""
        return 2 * self.n_layer * batch * length * self.n_embd * jnp.dtype(dtype).itemsize
