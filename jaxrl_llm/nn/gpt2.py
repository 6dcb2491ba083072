"""GPT-2: a decoder-only transformer whose parameters carry the names of its public checkpoints.

The parameter tree is the state dict of `GPT2LMHeadModel` split at its dots, so a checkpoint needs
no table of names: `params["transformer"]["h"]["0"]["attn"]["c_attn"]["weight"]`.

Source: Radford et al. (2019), "Language Models are Unsupervised Multitask Learners", for the
architecture; names, configuration and numbers are those of Hugging Face's implementation.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_llm.nn import attention, shared_prompts
from jaxrl_llm.nn.adapters import Adapter, LoRA, TokenValueHead, is_on
from jaxrl_llm.nn.gpt2_config import ACTIVATIONS, GPT2Config
from jaxrl_llm.types import Array, KVCache, PyTree


class GPT2(nn.Module):
    """GPT-2 with a language-modelling head, and a value head and adapters where asked for.

    An adapter whose leaves `params` lacks is off: the same model is the adapted policy given all of
    its parameters, and its own frozen reference given `adapters.trunk(params)`, which shares them.

    Attributes:
      config: its shape.
      dtype: of the computation; parameters stay float32, and so do logits, softmax and the
        statistics of layer normalisation.
      remat: whether the backward pass recomputes each block rather than store what is inside.
      lora: low-rank updates of the projections that it names; None has none.
      adapter_width: inside the residual adapter before the output layer; None has none.
      value_width: inside the value head; None has none.
    """

    config: GPT2Config
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    lora: LoRA | None = None
    adapter_width: int | None = None
    value_width: int | None = None

    def setup(self) -> None:
        config = self.config
        self.transformer = Transformer(config, self.dtype, self.remat, self.lora)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, config, self.dtype)
        if self.adapter_width is not None:
            self.adapter = Adapter(self.adapter_width, self.dtype)
        if self.value_width is not None:
            self.value_head = TokenValueHead(self.value_width, self.dtype)

    def __call__(self, tokens: Array, **options: Any) -> Array | tuple[Array, KVCache]:
        """Logits `[B, T, V]` float32 of the token after each; `options` as in `hidden_states`.

        With a cache, `(logits, cache)`.
        """
        hidden = self.hidden_states(tokens, **options)
        if self.is_initializing() and self.value_width is not None:
            self.value(hidden)
        if options.get("cache") is None:
            return self.logits(hidden)
        hidden, cache = hidden
        return self.logits(hidden), cache

    def hidden_states(
        self,
        tokens: Array,
        *,
        attention_mask: Array | None = None,
        segment: Array | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> Any:
        """What the heads read: the normalised residual stream after the last block, adapted.

        Args:
          tokens: `[B, T]` integers in [0, V).
          attention_mask: `[B, T]`, True (or 1) on real tokens. Padding may stand on either side:
            nothing attends to it, and a token's position counts the real tokens before it.
          segment: `[B, T]` integers, which packed sequence a token belongs to, 0 on padding.
            Tokens attend within their own, which starts at position 0. Not with a cache.
          cache: of the tokens before these, with `T` free slots; what comes back holds these too.
          deterministic: False drops out, drawing from the random stream `dropout`.

        Returns:
          `[B, T, E]`; with a cache, `(hidden, cache)`.

        Raises:
          ValueError: if both `segment` and `cache` are given.
        """
        if segment is not None and cache is not None:
            raise ValueError("segment is given with a cache; read packed rows without a cache")
        hidden, cache = self.transformer(tokens, attention_mask, segment, cache, deterministic)
        if self.adapter_width is not None and is_on(self, "adapter"):
            hidden = self.adapter(hidden)
        return hidden if cache is None else (hidden, cache)

    def states_after(self, tokens: Array, *, attention_mask: Array, num_shared: int) -> Array:
        """Hidden states after what groups of rows share; as `shared_prompts.hidden_states`."""
        cache = init_cache(self.config, tokens.shape[0], num_shared, self.dtype)
        read = self.hidden_states
        return shared_prompts.hidden_states(read, cache, tokens, attention_mask, num_shared)

    def logits(self, hidden: Array) -> Array:
        """Logits `[..., V]` float32 of hidden states `[..., E]`."""
        head = self.transformer.wte if self.config.tie_word_embeddings else self.lm_head
        return head.attend(hidden)

    def value(self, hidden: Array) -> Array:
        """State values `[...]` float32 of hidden states `[..., E]`."""
        return self.value_head(hidden)


def output_embedding(params: PyTree) -> Array:
    """The output layer's weights `[V, E]`: those of the token embedding where the two are tied."""
    return params.get("lm_head", params["transformer"]["wte"])["weight"]


def init_cache(
    config: GPT2Config, batch: int, length: int, dtype: DTypeLike = jnp.float32
) -> KVCache:
    """An empty cache of `length` slots for `batch` rows, of the model's own `dtype`."""
    shape = (batch, config.n_head, length, config.head_width)

    def empty() -> tuple[Array, ...]:
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layer))

    return KVCache(
        keys=empty(),
        values=empty(),
        mask=jnp.zeros((batch, length), bool),
        length=jnp.int32(0),
    )


class Transformer(nn.Module):
    """Embeddings, blocks and the last layer normalisation: GPT-2 without a head."""

    config: GPT2Config
    dtype: DTypeLike
    remat: bool
    lora: LoRA | None

    def setup(self) -> None:
        config = self.config
        self.wte = Embedding(config.vocab_size, config, self.dtype)
        self.wpe = Embedding(config.n_positions, config, self.dtype)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = Blocks(config, self.dtype, self.remat, self.lora)
        self.ln_f = LayerNorm(config.layer_norm_epsilon, self.dtype)

    def __call__(
        self,
        tokens: Array,
        attention_mask: Array | None,
        segment: Array | None,
        cache: KVCache | None,
        deterministic: bool,
    ) -> tuple[Array, KVCache | None]:
        real = jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask > 0
        real = real if segment is None else real & (segment > 0)
        num_before = 0
        if cache is not None:
            num_before = jnp.sum(cache.mask, axis=-1, keepdims=True, dtype=jnp.int32)
            slots = jax.lax.dynamic_update_slice(cache.mask, real, (0, cache.length))
            cache = dataclasses.replace(cache, mask=slots)
        position = num_before + attention.positions(real, segment)
        # Padding may hold any id, and stand beyond the last position: both tables would give NaN.
        x = self.wte(jnp.where(real, tokens, 0)) + self.wpe(jnp.where(real, position, 0))
        x = self.drop(x, deterministic=deterministic)
        is_plain = attention_mask is None and segment is None and cache is None
        mask = None if is_plain else attention.causal_mask(real, segment, cache)
        x, cache = self.h(x, mask, cache, deterministic)
        return self.ln_f(x), cache


class Blocks(nn.Module):
    """The blocks, named by their number."""

    config: GPT2Config
    dtype: DTypeLike
    remat: bool
    lora: LoRA | None

    @nn.compact
    def __call__(
        self, x: Array, mask: Array | None, cache: KVCache | None, deterministic: bool
    ) -> tuple[Array, KVCache | None]:
        block = nn.remat(Block, static_argnums=(4,)) if self.remat else Block
        written = []
        for layer in range(self.config.n_layer):
            part = None if cache is None else (cache.keys[layer], cache.values[layer], cache.length)
            module = block(self.config, layer, self.dtype, self.lora, name=str(layer))
            x, part = module(x, mask, part, deterministic)
            written.append(part)
        if cache is not None:
            keys, values = zip(*written, strict=True)
            length = cache.length + x.shape[1]
            cache = dataclasses.replace(cache, keys=keys, values=values, length=length)
        return x, cache


class Block(nn.Module):
    """Attention, then a perceptron, each normalised before and added to the residual stream."""

    config: GPT2Config
    layer: int
    dtype: DTypeLike
    lora: LoRA | None

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array | None,
        cache: tuple[Array, Array, Array] | None,
        deterministic: bool,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        config = self.config
        drop = nn.Dropout(config.resid_pdrop, deterministic=deterministic)
        norm = partial(LayerNorm, config.layer_norm_epsilon, self.dtype)
        attend = Attention(config, self.layer, self.dtype, self.lora, name="attn")
        attended, written = attend(norm(name="ln_1")(x), mask, cache, deterministic)
        x = x + drop(attended)
        transform = Perceptron(config, self.dtype, self.lora, name="mlp")
        return x + drop(transform(norm(name="ln_2")(x))), written


class Attention(nn.Module):
    """Multi-head self-attention; with a cache, over what was read before too."""

    config: GPT2Config
    layer: int
    dtype: DTypeLike
    lora: LoRA | None

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array | None,
        cache: tuple[Array, Array, Array] | None,
        deterministic: bool,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        config = self.config
        project = partial(Projection, config, self.dtype, self.lora)
        merged = project("attn.c_attn", 3 * config.n_embd, name="c_attn")(x)
        heads = (*x.shape[:2], config.n_head, config.head_width)
        query, key, value = (
            part.reshape(heads).swapaxes(1, 2) for part in jnp.split(merged, 3, axis=-1)
        )
        written = None
        if cache is not None:
            keys, values, length = cache
            key = jax.lax.dynamic_update_slice(keys, key, (0, 0, length, 0))
            value = jax.lax.dynamic_update_slice(values, value, (0, 0, length, 0))
            written = key, value
        scale = config.head_width**-0.5 if config.scale_attn_weights else 1.0
        scale = scale / (self.layer + 1) if config.scale_attn_by_inverse_layer_idx else scale
        if deterministic or config.attn_pdrop == 0:
            attended = attention.attend(query, key, value, mask, scale=scale)
        else:
            weights = attention.weights(query, key, mask, scale=scale)
            weights = nn.Dropout(config.attn_pdrop, deterministic=False)(weights)
            attended = attention.weighted_sum(weights, value)
        merged = attended.swapaxes(1, 2).reshape(x.shape)
        return project("attn.c_proj", config.n_embd, is_last=True, name="c_proj")(merged), written


class Perceptron(nn.Module):
    """Two projections with the activation between them."""

    config: GPT2Config
    dtype: DTypeLike
    lora: LoRA | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        project = partial(Projection, config, self.dtype, self.lora)
        inner = project("mlp.c_fc", config.inner_width, name="c_fc")(x)
        inner = ACTIVATIONS[config.activation_function](inner)
        return project("mlp.c_proj", config.n_embd, is_last=True, name="c_proj")(inner)


class Projection(nn.Module):
    """An affine map, and the low-rank update of it where one is asked for.

    Attributes:
      config: of the model.
      dtype: of the computation.
      lora: of the model.
      target: the projection's name inside its block, by which `lora` may name it.
      features: width of the result.
      is_last: whether it writes to the residual stream, and so starts smaller: the stream's
        variance then does not grow with depth (Radford et al. 2019, section 2.3).
    """

    config: GPT2Config
    dtype: DTypeLike
    lora: LoRA | None
    target: str
    features: int
    is_last: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        deviation = self.config.initializer_range
        deviation /= math.sqrt(2 * self.config.n_layer) if self.is_last else 1
        shape = (x.shape[-1], self.features)
        weight = self.param("weight", nn.initializers.normal(deviation), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        # One axis of rows: the weight's gradient would transpose two, and take a CPU twice as long.
        rows = x.reshape(-1, shape[0])
        y = rows @ weight.astype(self.dtype) + bias.astype(self.dtype)[None]
        if self.lora is not None and self.target in self.lora.targets and is_on(self, "lora_a"):
            down = self.param("lora_a", nn.initializers.he_uniform(), (shape[0], self.lora.rank))
            up = self.param("lora_b", nn.initializers.zeros, (self.lora.rank, shape[1]))
            update = (rows @ down.astype(self.dtype)) @ up.astype(self.dtype)
            y = y + self.lora.scale * update
        return y.reshape(*x.shape[:-1], self.features)


class Embedding(nn.Module):
    """A table of rows, read by index, or multiplied with to score every row."""

    num: int
    config: GPT2Config
    dtype: DTypeLike

    def setup(self) -> None:
        normal = nn.initializers.normal(self.config.initializer_range)
        self.weight = self.param("weight", normal, (self.num, self.config.n_embd))

    def __call__(self, index: Array) -> Array:
        """Rows `[..., E]` of integers `[...]`; NaN for one that is out of range."""
        # By default a negative index would read from the end, and one too large the last row.
        rows = (
            jnp.asarray(self.weight)
            .at[index]
            .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        )
        return rows.astype(self.dtype)

    def attend(self, hidden: Array) -> Array:
        """Scores `[..., num]` float32 of `hidden` `[..., E]`."""
        contract = (((hidden.ndim - 1,), (1,)), ((), ()))
        weight = self.weight.astype(self.dtype)
        return jax.lax.dot_general(hidden, weight, contract, preferred_element_type=jnp.float32)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) · weight + bias, the moments in float32."""

    epsilon: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + self.epsilon)
        return (normal * _along_last(weight, x) + _along_last(bias, x)).astype(self.dtype)


def _along_last(vector: Array, x: Array) -> Array:
    """`vector` `[F]` with as many axes as `x` `[..., F]`."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)
