"""Prompts that are read once are as good as those read with every response."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.nn import gpt2, shared_prompts
from tests.lm import tiny
from tests.nn.tiny_gpt2 import random_params

MODEL: Any = tiny.MODEL
GROUPS, COPIES, LENGTH = 2, 3, 7


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL)


@pytest.mark.parametrize("num_shared", [0, 1, 4])
def test_states_are_those_of_rows_read_alone(params, num_shared):
    random = np.random.default_rng(0)
    tokens = random.integers(2, tiny.VOCABULARY, (GROUPS, COPIES, LENGTH))
    tokens[..., :num_shared] = tokens[:, :1, :num_shared]
    real = np.ones((GROUPS, COPIES, LENGTH), bool)
    real[1, :, : min(num_shared, 2)] = False  # padded on the left
    real[0, 1, -1] = False
    tokens, real = jnp.asarray(tokens), jnp.asarray(real)
    apply = partial(MODEL.apply, {"params": params})
    read = partial(apply, method="hidden_states")
    options = {"attention_mask": real, "num_shared": num_shared, "method": "states_after"}
    together = jax.jit(lambda: apply(tokens, **options))()
    rows = tokens.reshape(-1, LENGTH), real.reshape(-1, LENGTH)
    alone = jax.jit(lambda: read(rows[0], attention_mask=rows[1]))()[:, num_shared:]
    seen = np.asarray(rows[1])[:, num_shared:]
    assert together.shape == (GROUPS * COPIES, LENGTH - num_shared, MODEL.config.n_embd)
    np.testing.assert_allclose(together[seen], alone[seen], atol=2e-5)


def test_widened_copies_rows_side_by_side_and_adds_empty_slots():
    cache = gpt2.init_cache(MODEL.config, 2, 3)
    filled = jax.tree.map(
        lambda leaf: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), cache.keys
    )
    cache = replace(cache, keys=filled, mask=jnp.ones((2, 3), bool), length=jnp.int32(3))
    wide = shared_prompts.widened(cache, 2, 4)
    assert int(wide.length) == 3
    for before, after in zip(cache.keys, wide.keys, strict=True):
        for row in range(4):
            np.testing.assert_array_equal(after[row, :, :3], before[row // 2])
        assert after.shape[2] == 7
    np.testing.assert_array_equal(wide.mask[:, :3], True)
    np.testing.assert_array_equal(wide.mask[:, 3:], False)
