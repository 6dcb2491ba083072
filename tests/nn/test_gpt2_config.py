"""The counts of a configuration against what is stored and compiled, and its errors."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.nn import gpt2
from jaxrl_llm.nn.gpt2 import GPT2, GPT2Config
from tests.nn.tiny_gpt2 import TINY, apply, shapes


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False, "n_inner": 20}])
def test_counts_match_what_is_stored(options):
    config = dataclasses.replace(TINY, **options)
    leaves = jax.tree.leaves(shapes(GPT2(config)))
    assert config.num_parameters == sum(leaf.size for leaf in leaves)
    for dtype in (jnp.float32, jnp.bfloat16):
        cache = gpt2.init_cache(config, 3, 7, dtype)
        stored = sum(leaf.nbytes for leaf in (*cache.keys, *cache.values))
        assert config.cache_bytes(3, 7, dtype) == stored


def test_counts_of_the_published_model():
    assert GPT2Config().num_parameters == 124_439_808
    assert GPT2Config().cache_bytes(1, 1, jnp.bfloat16) == 36_864
    np.testing.assert_allclose(GPT2Config().forward_flops(1), 2 * 123.5e6, rtol=1e-3)


def test_forward_flops_match_the_compiler():
    config = dataclasses.replace(TINY, vocab_size=512, n_positions=128, n_embd=256, n_inner=768)
    model, tokens = GPT2(config), jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def loss(params: Any, tokens: Any) -> Any:
        return jnp.sum(apply(model, params, tokens))

    # The compiler multiplies what the mask hides too, so every token meets all 128.
    expected = config.forward_flops(128) * tokens.size
    for function, multiple in ((loss, 1), (jax.grad(loss), 3)):
        counted = jax.jit(function).lower(shapes(model), tokens).cost_analysis()
        assert counted is not None
        np.testing.assert_allclose(counted["flops"], multiple * expected, rtol=0.04)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size is 0; it must be at least 1"),
        ("n_positions", 0, "n_positions is 0; it must be at least 1"),
        ("n_layer", 0, "n_layer is 0; it must be at least 1"),
        ("n_inner", 0, "n_inner is 0; it must be at least 1"),
        ("n_head", 3, "n_embd is 16; it must be a multiple of n_head, 3"),
        (
            "activation_function",
            "gelu_fast",
            (
                "activation_function is 'gelu_fast'; it must be one of "
                "'gelu_new', 'gelu', 'relu', 'silu', 'tanh'"
            ),
        ),
        ("layer_norm_epsilon", 0.0, "layer_norm_epsilon is 0.0; it must be greater than 0"),
        ("attn_pdrop", 1.5, "attn_pdrop is 1.5; it must be in [0, 1]"),
        ("eos_token_id", 29, "eos_token_id is 29; it must be in [0, 28]"),
        ("pad_token_id", -1, "pad_token_id is -1; it must be in [0, 28]"),
    ],
)
def test_config_names_the_field_that_is_wrong(field, value, message):
    TINY.validate()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(TINY, **{field: value}).validate()
