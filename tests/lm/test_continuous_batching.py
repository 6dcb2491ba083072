"""`continuous_batching` writes what `generate` writes, whatever the slots."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm import continuous_batching, decoding
from jaxrl_llm.lm.decoding import Config
from jaxrl_llm.lm.generate import generate
from jaxrl_llm.nn.gpt2 import GPT2
from tests.lm.generation import END, PADDING, TINY, VOCABULARY, random_params

pytestmark = pytest.mark.slow  # the programs take long to compile
MODEL = GPT2(TINY)
PARAMS = random_params(MODEL)
KEY = jax.random.key(0)
NUM_PROMPTS = 13
LENGTHS = np.arange(NUM_PROMPTS) % 6 + 1
MASK: Any = np.arange(6) >= 6 - LENGTHS[:, None]
PROMPTS: Any = np.where(MASK, np.random.default_rng(0).integers(2, VOCABULARY, MASK.shape), PADDING)
# Most of the time here is compilation, which this halves.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
static = ("model", "config")
rollout = compiled(decoding.rollout, static_argnames=static)
through_slots = compiled(
    continuous_batching.rollout, static_argnames=(*static, "num_slots", "num_refilled")
)


def assert_same(batch, expected):
    for name in ("tokens", "attention_mask", "response_mask"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(batch.log_probability, expected.log_probability, atol=1e-5)


# The ring of 6 - 1 + 12 slots is written around, but where all 26 rows have slots of their own; the
# last rows may be fewer than are refilled at a time.
@pytest.mark.parametrize(("num_slots", "num_refilled"), [(1, 1), (4, 3), (5, 1), (6, 6), (32, 8)])
def test_text_is_that_of_decoding_whatever_the_slots(num_slots, num_refilled):
    config = Config(max_new_tokens=12, num_samples=2, stop_tokens=(END, 4))
    law = {"temperature": 1.3}
    arguments = (MODEL, PARAMS, PROMPTS, MASK, KEY, config, law)
    expected = rollout(*arguments)
    length = np.sum(expected.response_mask, axis=1)
    assert len(set(length.tolist())) > 5
    assert length.sum() > 4 * 17
    assert_same(through_slots(*arguments, num_slots, num_refilled), expected)


def test_generate_is_generate_with_every_part_of_the_law():
    config = Config(
        max_new_tokens=12,
        min_new_tokens=2,
        forced_tokens=(5,),
        banned_tokens=(3,),
        repetition_penalty=1.4,
        temperature=1.2,
        top_k=8,
        top_p=0.98,
    )
    keys = jax.random.split(KEY, NUM_PROMPTS)
    arguments = (MODEL, PARAMS, PROMPTS, MASK, keys, config)
    assert_same(continuous_batching.generate(*arguments, num_slots=4), generate(*arguments))


@pytest.mark.parametrize("stop_tokens", [tuple(range(VOCABULARY)), ()], ids=["at_once", "never"])
def test_rows_that_end_at_once_or_never(stop_tokens):
    config = Config(max_new_tokens=TINY.n_positions - 6, stop_tokens=stop_tokens)
    arguments = (MODEL, PARAMS, PROMPTS, MASK, KEY, config, {})
    batch = through_slots(*arguments, 4, 2)
    assert_same(batch, rollout(*arguments))
    assert (np.asarray(batch.response_mask).sum(1) == (1 if stop_tokens else 42)).all()


def test_a_row_draws_the_same_beside_other_rows():
    config, law = Config(max_new_tokens=12), {"temperature": 1.3}
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(KEY, jnp.arange(NUM_PROMPTS))
    batch = through_slots(MODEL, PARAMS, PROMPTS, MASK, KEY, config, law, 4, 2)
    order = np.random.default_rng(1).permutation(NUM_PROMPTS)
    shuffled = (MODEL, PARAMS, PROMPTS[order], MASK[order], keys[order])
    shuffled = through_slots(*shuffled, config, law, 4, 2)
    assert_same(shuffled, jax.tree.map(lambda leaf: leaf[order], batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 0}, "num_slots is 0; it must be at least 1"),
        ({"num_slots": 4, "num_refilled": 5}, "num_refilled is 5; it must be in [1, 4]"),
        ({"num_refilled": 0}, "num_refilled is 0; it must be in [1, 32]"),
    ],
)
def test_generate_refuses_slots_that_cannot_be_refilled(options, message):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        continuous_batching.generate(MODEL, PARAMS, PROMPTS, MASK, KEY, Config(), **options)
    assert str(caught.value) == message


def test_generate_refuses_a_prompt_longer_than_the_context():
    message = r"tokens\[0\] has 60 tokens; with max_new_tokens 4 that is more than the context"
    with pytest.raises(ValueError, match=message):
        continuous_batching.generate(
            MODEL, PARAMS, np.full((1, 60), 3), None, KEY, Config(max_new_tokens=4)
        )
