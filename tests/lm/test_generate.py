"""`generate` and `stream`: parity with `transformers`, laws of text, few programs, clear errors."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm import generate as module
from jaxrl_llm.lm import hf_checkpoint
from jaxrl_llm.lm.generate import Config, bucket, generate, stream
from jaxrl_llm.nn.gpt2 import GPT2
from tests.golden import gpt2 as golden
from tests.lm.generation import PADDING, TINY, random_params

MODEL = GPT2(TINY)
PARAMS = random_params(MODEL)
PROMPTS = np.array([[3, 7, 2, 9, 5], [PADDING, PADDING, PADDING, 5, 4], [PADDING, 8, 3, 3, 2]])
MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
KEY = jax.random.key(0)
ROLLOUT: Any = module._rollout
CONFIG = Config(max_new_tokens=12, temperature=1.2)


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.CASES)
def test_greedy_matches_committed_transformers_over_64_tokens(name):
    numbers = golden.load(name)
    model, params = hf_checkpoint.load(numbers.directory)
    config = Config(max_new_tokens=golden.NUM_GENERATED, temperature=0, stop_tokens=())
    batch = generate(model, params, numbers.tokens, numbers.attention_mask, KEY, config)
    width = numbers.tokens.shape[1]
    np.testing.assert_array_equal(batch.tokens[:, :width], numbers.tokens)
    np.testing.assert_array_equal(batch.tokens[:, width:], numbers.generated)


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.CASES)
def test_greedy_matches_live_transformers_with_penalty_bans_and_stop_tokens(name):
    torch = pytest.importorskip("torch")
    numbers = golden.load(name)
    model, params = hf_checkpoint.load(numbers.directory)
    options: dict[str, Any] = {"repetition_penalty": 1.2, "min_new_tokens": 20}
    banned = sorted({int(token) for token in numbers.generated[:, 3]})
    stops = sorted({int(token) for token in numbers.generated[0, 40:44]})
    peer = golden.make(name).float().eval()
    with torch.no_grad():
        expected = peer.generate(
            torch.from_numpy(numbers.tokens).long(),
            attention_mask=torch.from_numpy(numbers.attention_mask).long(),
            do_sample=False,
            max_new_tokens=golden.NUM_GENERATED,
            eos_token_id=stops,
            pad_token_id=PADDING,
            suppress_tokens=banned,
            **options,
        ).numpy()
    config = Config(
        max_new_tokens=golden.NUM_GENERATED,
        temperature=0,
        stop_tokens=tuple(stops),
        banned_tokens=tuple(banned),
        **options,
    )
    batch = generate(model, params, numbers.tokens, numbers.attention_mask, KEY, config)
    np.testing.assert_array_equal(batch.tokens[:, : expected.shape[1]], expected)
    assert not np.asarray(batch.response_mask)[:, expected.shape[1] :].any()


def assert_same_responses(batch, width, expected, expected_width, rows: Any = slice(None)):
    """Fails unless the responses agree, where they are of the same length or truncated."""
    length = min(batch.tokens.shape[1] - width, expected.tokens.shape[1] - expected_width)
    for name, tolerance in (("tokens", 0), ("response_mask", 0), ("log_probability", 1e-5)):
        actual = np.asarray(getattr(batch, name))[:, width : width + length]
        desired = np.asarray(getattr(expected, name))[rows]
        desired = desired[:, expected_width : expected_width + length]
        np.testing.assert_allclose(actual, desired, atol=tolerance, err_msg=name)


@pytest.mark.slow
def test_text_depends_on_prompt_and_key_alone():
    batch = generate(MODEL, PARAMS, PROMPTS, MASK, KEY, CONFIG)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(KEY, jnp.arange(3))
    for row in range(3):
        length = MASK[row].sum()
        alone = generate(
            MODEL, PARAMS, PROMPTS[row : row + 1, -length:], None, keys[row : row + 1], CONFIG
        )
        assert_same_responses(alone, length, batch, 5, [row])
    order = np.array([2, 0, 2, 1])
    other_neighbours = generate(MODEL, PARAMS, PROMPTS[order], MASK[order], keys[order], CONFIG)
    assert_same_responses(other_neighbours, 5, batch, 5, order)
    prompts, mask = (np.pad(array, ((0, 0), (13, 0))) for array in (PROMPTS, MASK))
    other_bucket = generate(MODEL, PARAMS, prompts, mask, KEY, CONFIG)
    assert_same_responses(other_bucket, 18, batch, 5)
    longer = dataclasses.replace(CONFIG, max_new_tokens=20)
    assert_same_responses(generate(MODEL, PARAMS, PROMPTS, MASK, KEY, longer), 5, batch, 5)
    other_key = generate(MODEL, PARAMS, PROMPTS, MASK, jax.random.key(1), CONFIG)
    assert (np.asarray(other_key.tokens) != np.asarray(batch.tokens)).any()


@pytest.mark.slow
def test_tokens_and_mask_may_be_of_any_integer_and_come_back_as_given():
    expected = generate(MODEL, PARAMS, PROMPTS, MASK, KEY, CONFIG)
    for tokens, mask in [
        (PROMPTS.tolist(), MASK.tolist()),
        (PROMPTS.astype(np.uint8), MASK.astype(bool)),
        (jnp.asarray(PROMPTS), jnp.asarray(MASK, jnp.float32)),
    ]:
        batch = generate(MODEL, PARAMS, tokens, mask, KEY, CONFIG)
        jax.tree.map(np.testing.assert_array_equal, batch, expected)
    assert expected.tokens.dtype == jnp.int32
    assert expected.attention_mask.dtype == expected.response_mask.dtype == bool
    np.testing.assert_array_equal(expected.tokens[:, :5], PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_tokens", [1, 5, 100])
def test_stream_yields_what_generate_returns(chunk_tokens):
    expected = generate(MODEL, PARAMS, PROMPTS, MASK, KEY, CONFIG)
    chunks = list(stream(MODEL, PARAMS, PROMPTS, MASK, KEY, CONFIG, chunk_tokens=chunk_tokens))
    tokens, mask = (np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True))
    width = tokens.shape[1]
    np.testing.assert_array_equal(tokens, expected.tokens[:, 5 : 5 + width])
    np.testing.assert_array_equal(mask, expected.response_mask[:, 5 : 5 + width])
    assert not np.asarray(expected.response_mask)[:, 5 + width :].any()
    assert all(part.shape[1] == min(chunk_tokens, 12) for part, _ in chunks[:-1])


@pytest.mark.slow
def test_stream_ends_with_the_last_row():
    config = dataclasses.replace(CONFIG, stop_tokens=tuple(range(TINY.vocab_size)))
    chunks = list(stream(MODEL, PARAMS, PROMPTS, MASK, KEY, config, chunk_tokens=3))
    assert len(chunks) == 1
    np.testing.assert_array_equal(chunks[0][1], np.tile([True, False, False], (3, 1)))


def test_stream_donates_the_cache():
    static, law = module.decoding.split(CONFIG)
    prompt, mask = module.checked_arguments(MODEL, PROMPTS, MASK, KEY, CONFIG)
    state = module._prefill(MODEL, PARAMS, prompt, mask, KEY, static, law)
    module._decode(MODEL, PARAMS, state, static, law, jnp.int32(4))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))


def test_bucket_holds_the_length_and_wastes_at_most_half_of_it():
    lengths = range(1, 1025)
    buckets = [bucket(length) for length in lengths]
    assert buckets == sorted(buckets)
    assert sorted(set(buckets)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    for length, size in zip(lengths, buckets, strict=True):
        assert length <= size
        assert size == 16 or size < 1.5 * length
        assert bucket(size) == size


@pytest.mark.slow
def test_few_programs_are_compiled_for_many_prompt_lengths():
    # A model of its own, so that no other test has compiled for it.
    model = GPT2(dataclasses.replace(TINY, n_layer=1, n_positions=44))
    params = random_params(model)
    config = Config(max_new_tokens=3, temperature=0)
    before = ROLLOUT._cache_size()
    lengths = range(1, 41)
    for length in lengths:
        generate(model, params, np.full((1, length), 3), None, KEY, config)
    assert ROLLOUT._cache_size() - before <= len(set(map(bucket, lengths))) == 4


@pytest.mark.slow
def test_another_number_in_the_law_compiles_nothing():
    def write(**law):
        base: dict[str, Any] = {
            "repetition_penalty": 1.1,
            "temperature": 0.9,
            "top_k": 5,
            "top_p": 0.9,
        }
        base |= {"min_p": 0.02, "typical_p": 0.9}
        return generate(MODEL, PARAMS, PROMPTS, MASK, KEY, Config(max_new_tokens=4, **base | law))

    write()
    before = ROLLOUT._cache_size()
    # Integers are numbers too.
    write(temperature=2, top_k=1, top_p=1, min_p=0, typical_p=1, repetition_penalty=1)
    write(temperature=0.3, top_k=7, top_p=0.5, min_p=0.3, typical_p=0.2, repetition_penalty=3.5)
    assert ROLLOUT._cache_size() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"config": Config(max_new_tokens=44)},
            (
                "tokens[0] has 5 tokens; with max_new_tokens 44 that is more than the context of "
                "48; shorten either"
            ),
        ),
        (
            {"tokens": np.full((2, 60), 3), "attention_mask": None},
            (
                "tokens[0] has 60 tokens; with max_new_tokens 12 that is more than the context of "
                "48; shorten either"
            ),
        ),
        (
            {"attention_mask": MASK[:, ::-1]},
            (
                "attention_mask[1] has 2 real tokens, which are not the last of its row; pad "
                "prompts on the left, and begin an empty one with the end token"
            ),
        ),
        (
            {"attention_mask": 0 * MASK},
            (
                "attention_mask[0] has 0 real tokens, which are not the last of its row; pad "
                "prompts on the left, and begin an empty one with the end token"
            ),
        ),
        (
            {"attention_mask": MASK[:2]},
            "attention_mask is [2, 5]; it must be [3, 5], like tokens",
        ),
        (
            {"tokens": PROMPTS + 3},
            "tokens[0, 3] is 12; it must be in [0, 11), the vocabulary of the model",
        ),
        (
            {"tokens": PROMPTS - 3},
            "tokens[0, 2] is -1; it must be in [0, 11), the vocabulary of the model",
        ),
        (
            {"tokens": PROMPTS[0]},
            "tokens are int64[5]; they must be integers [B, P], P >= 1",
        ),
        (
            {"tokens": PROMPTS / 2},
            "tokens are float64[3, 5]; they must be integers [B, P], P >= 1",
        ),
        (
            {"tokens": np.zeros((3, 0), int)},
            "tokens are int64[3, 0]; they must be integers [B, P], P >= 1",
        ),
        (
            {"key": jax.random.split(jax.random.key(0), 2)},
            "key has shape [2]; it must be one key, or one a prompt: [3]",
        ),
        (
            {"config": Config(max_new_tokens=4, stop_tokens=(11,))},
            "stop_tokens is 11; it must be in [0, 10]",
        ),
        (
            {"config": Config(max_new_tokens=4, forced_tokens=(-1,))},
            "forced_tokens is -1; it must be in [0, 10]",
        ),
        (
            {"config": Config(max_new_tokens=4, banned_tokens=(50,))},
            "banned_tokens is 50; it must be in [0, 10]",
        ),
        (
            {"config": Config(max_new_tokens=4, banned_tokens=tuple(range(11)))},
            "banned_tokens leave nothing of the vocabulary of 11; ban fewer",
        ),
        (
            {"config": Config(max_new_tokens=4, banned_tokens=(*range(1, 11),), min_new_tokens=1)},
            (
                "banned_tokens and, before min_new_tokens, stop_tokens leave nothing of the "
                "vocabulary of 11; ban fewer"
            ),
        ),
    ],
)
def test_generate_refuses_what_it_cannot_continue(change, message):
    options = {"tokens": PROMPTS, "attention_mask": MASK, "key": KEY, "config": CONFIG}
    for function in (generate, lambda *args: next(stream(*args))):
        with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
            function(MODEL, PARAMS, *(options | change).values())
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"min_new_tokens": 65}, "min_new_tokens is 65; it must be in [0, 64]"),
        ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan; it must be finite"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be greater than 0"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be in [0, 1]"),
        ({"min_p": -0.5}, "min_p is -0.5; it must be in [0, 1]"),
        ({"typical_p": float("nan")}, "typical_p is nan; it must be in [0, 1]"),
        (
            {"forced_tokens": (1, 2, 3), "max_new_tokens": 2},
            "forced_tokens are 3; max_new_tokens leaves room for 2",
        ),
        (
            {"forced_tokens": (4, 2), "banned_tokens": (2,)},
            "forced_tokens and banned_tokens share 2; drop it from one",
        ),
    ],
)
def test_config_validate_names_the_field(field, message):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        Config(**field).validate()
    assert str(caught.value) == message
