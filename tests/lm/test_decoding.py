"""The laws of `decoding`, against the exact ones that `generation.law` enumerates."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxrl_llm.lm import decoding
from jaxrl_llm.lm.decoding import Config
from jaxrl_llm.nn import adapters
from jaxrl_llm.nn.gpt2 import GPT2
from tests.lm.generation import END, PADDING, TINY, VOCABULARY, law, next_logits, random_params

pytestmark = pytest.mark.slow

MODEL: Any = GPT2(TINY)
PARAMS = random_params(MODEL)
PROMPT = np.array([[3, 7, 2, 9]])
# Prompts of 4, 2 and 1 tokens; padding holds what a tokenizer might put there.
RAGGED: Any = np.array([[3, 7, 2, 9], [PADDING, PADDING, 5, 4], [-1, 99, 99, 8]])
RAGGED_MASK: Any = np.array([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]], bool)
PLAIN = {"temperature": 1.0}
# What changes no law, so that one compiled program serves every sampler.
NEUTRAL = {
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": VOCABULARY,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
}
LAWS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.6},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "all": {
        "repetition_penalty": 1.3,
        "temperature": 1.4,
        "top_k": 8,
        "top_p": 0.95,
        "min_p": 0.05,
        "typical_p": 0.9,
    },
}

# Most of the time here is compilation, which this halves.
compiled = partial(
    jax.jit,
    static_argnames=("model", "config"),
    compiler_options={"xla_backend_optimization_level": 0},
)
rollout = compiled(decoding.rollout)


def exact_log_probabilities(batch, prompt_length, *, params=PARAMS, forbid=None, **cut):
    """Naively, token by token, of every response token of `batch`; 0 elsewhere."""
    tokens, real = np.asarray(batch.tokens), np.asarray(batch.attention_mask)
    logits = np.asarray(next_logits(MODEL, params, batch.tokens, batch.attention_mask))
    expected = np.zeros(tokens.shape)
    for row, place in np.argwhere(np.asarray(batch.response_mask)):
        seen = set(tokens[row, :place][real[row, :place]])
        forbidden = () if forbid is None else forbid(place - prompt_length)
        pi = law(logits[row, place - 1], seen=seen, forbidden=forbidden, **cut)
        expected[row, place] = np.log(pi[tokens[row, place]])
    return expected


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
def test_rollout_draws_the_first_two_tokens_from_the_exact_law(name):
    num_samples = 8192
    config = Config(max_new_tokens=2, num_samples=num_samples, stop_tokens=())
    batch = rollout(
        MODEL, PARAMS, PROMPT, PROMPT > 0, jax.random.key(1), config, NEUTRAL | LAWS[name]
    )
    first, second = np.asarray(batch.tokens)[:, 4:].T

    after = np.concatenate([np.repeat(PROMPT, VOCABULARY, 0), np.arange(VOCABULARY)[:, None]], 1)
    logits = np.asarray(next_logits(MODEL, PARAMS, after))
    seen = set(PROMPT[0])
    pi = law(logits[0, 3], seen=seen, **LAWS[name])
    pi_after = np.array([law(logits[t, 4], seen=seen | {t}, **LAWS[name]) for t in range(len(pi))])
    joint = pi[:, None] * pi_after

    observed = np.zeros(joint.shape)
    np.add.at(observed, (first, second), 1)
    assert not observed[joint == 0].any(), "a token was drawn that the law excludes"
    assert pvalue(observed.sum(1), pi * num_samples) > 1e-3
    assert pvalue(observed, joint * num_samples) > 1e-3
    log_probability = np.log([pi[first], pi_after[first, second]]).T
    np.testing.assert_allclose(batch.log_probability[:, 4:], log_probability, atol=2e-5)


def pvalue(observed, expected):
    """Of Pearson's statistic; cells that expect fewer than 5 are counted as one."""
    observed, expected = observed.ravel(), expected.ravel()
    frequent = expected >= 5
    observed = np.append(observed[frequent], observed[~frequent].sum())
    expected = np.append(expected[frequent], expected[~frequent].sum())
    some = expected > 0
    statistic = np.sum((observed[some] - expected[some]) ** 2 / expected[some])
    return stats.chi2.sf(statistic, some.sum() - 1)


def long_rollout(cut=None, **options):
    """16 samples of 12 tokens of each ragged prompt."""
    config = Config(max_new_tokens=12, num_samples=16, **options)
    key = jax.random.key(2)
    return rollout(MODEL, PARAMS, RAGGED, RAGGED_MASK, key, config, cut or PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
def test_log_probability_is_of_the_law_drawn_from_so_that_importance_ratios_are_one(name):
    batch = long_rollout(NEUTRAL | LAWS[name])
    expected = exact_log_probabilities(batch, 4, **LAWS[name])
    ratio = np.exp(np.asarray(batch.log_probability) - expected)
    np.testing.assert_allclose(ratio, 1, atol=1e-4)
    assert batch.log_probability.dtype == jnp.float32


@pytest.mark.parametrize(
    ("pad", "stop_tokens"),
    [(PADDING, None), (END, None), (None, (4, 6)), (PADDING, ())],
    ids=["pad", "pad_is_eos", "no_pad_and_custom_stops", "no_stop"],
)
def test_response_mask_ends_with_the_first_stop_token(pad, stop_tokens):
    model = GPT2(dataclasses.replace(TINY, pad_token_id=pad))
    config = Config(max_new_tokens=12, num_samples=16, stop_tokens=stop_tokens)
    batch = rollout(model, PARAMS, RAGGED, RAGGED_MASK, jax.random.key(2), config, PLAIN)
    stops = (END,) if stop_tokens is None else stop_tokens
    response = np.asarray(batch.tokens)[:, 4:]
    is_stop = np.isin(response, stops) & np.asarray(batch.response_mask)[:, 4:]
    length = np.where(is_stop.any(1), is_stop.argmax(1) + 1, 12)
    written = np.arange(12) < length[:, None]

    np.testing.assert_array_equal(batch.response_mask[:, 4:], written)
    np.testing.assert_array_equal(batch.attention_mask[:, 4:], written)
    assert not np.asarray(batch.response_mask)[:, :4].any()
    np.testing.assert_array_equal(batch.attention_mask[:, :4], np.repeat(RAGGED_MASK, 16, 0))
    np.testing.assert_array_equal(batch.tokens[:, :4], np.repeat(RAGGED, 16, 0))
    assert (response[~written] == (END if pad is None else pad)).all()
    assert (np.asarray(batch.log_probability)[:, 4:][~written] == 0).all()
    # Both kinds of rows occur, so the test tests: ended ones, and truncated ones.
    assert (length == 12).any()
    assert (length < 12).any() == bool(stops)


@pytest.mark.slow
def test_a_truncated_row_is_the_beginning_of_a_longer_one():
    short = rollout(
        MODEL,
        PARAMS,
        RAGGED,
        RAGGED_MASK,
        jax.random.key(2),
        Config(max_new_tokens=5, num_samples=16),
        PLAIN,
    )
    long = long_rollout()
    np.testing.assert_array_equal(short.tokens, long.tokens[:, :9])
    np.testing.assert_array_equal(short.response_mask, long.response_mask[:, :9])
    np.testing.assert_allclose(short.log_probability, long.log_probability[:, :9], atol=1e-5)
    truncated = np.asarray(short.response_mask).all(1, where=np.arange(9) >= 4)
    assert (np.asarray(short.tokens)[truncated, 8] != END).any()


def test_stop_tokens_before_min_new_tokens_and_banned_tokens_have_no_probability():
    batch = long_rollout(min_new_tokens=6, banned_tokens=(3, 8))
    response = np.asarray(batch.tokens)[:, 4:]
    assert not np.isin(response, (3, 8)).any()
    assert (response[:, :6] != END).all()
    assert (response[:, 6:] == END).any()
    expected = exact_log_probabilities(
        batch, 4, forbid=lambda step: (3, 8, END) if step < 6 else (3, 8)
    )
    np.testing.assert_allclose(batch.log_probability, expected, atol=1e-4)


def test_forced_tokens_begin_every_response_and_are_certain():
    batch = long_rollout(forced_tokens=(5, 5, 2), min_new_tokens=5, banned_tokens=(3,))
    response = np.asarray(batch.tokens)[:, 4:]
    np.testing.assert_array_equal(response[:, :3], np.broadcast_to([5, 5, 2], (48, 3)))

    def forbid(step):
        if step < 3:
            return set(range(VOCABULARY)) - {(5, 5, 2)[step]}
        return {3, END} if step < 5 else {3}

    expected = exact_log_probabilities(batch, 4, forbid=forbid)
    assert (expected[:, 4:7] == 0).all()
    np.testing.assert_allclose(batch.log_probability, expected, atol=1e-4)


def test_a_forced_stop_token_ends_the_row():
    config = Config(max_new_tokens=9, temperature=0, forced_tokens=(5, END), min_new_tokens=4)
    batch = rollout(MODEL, PARAMS, RAGGED, RAGGED_MASK, jax.random.key(2), config)
    np.testing.assert_array_equal(batch.response_mask[:, 4:], np.arange(9) < np.full((3, 1), 2))


def test_samples_of_a_prompt_differ_and_are_reproducible_whatever_their_number():
    batch = long_rollout()
    np.testing.assert_array_equal(batch.tokens, long_rollout().tokens)
    samples = np.asarray(batch.tokens).reshape(3, 16, -1)
    for rows in samples:
        assert len(np.unique(rows, axis=0)) >= 12
    fewer = rollout(
        MODEL,
        PARAMS,
        RAGGED,
        RAGGED_MASK,
        jax.random.key(2),
        Config(max_new_tokens=12, num_samples=3),
        PLAIN,
    )
    np.testing.assert_array_equal(fewer.tokens.reshape(3, 3, -1), samples[:, :3])


@pytest.mark.parametrize("stop_tokens", [(4, 6, 0, 2, 10), ()])
def test_decode_stops_when_every_row_has_ended(stop_tokens):
    config, cut = decoding.split(Config(max_new_tokens=30, stop_tokens=stop_tokens))
    prefill, decode = compiled(decoding.prefill), compiled(decoding.decode)
    state = prefill(MODEL, PARAMS, RAGGED, RAGGED_MASK, jax.random.key(5), config, cut)
    state = decode(MODEL, PARAMS, state, config, cut, jnp.int32(30))
    longest = int(state.mask.sum(1).max())
    assert int(state.step) == longest
    # The newest token is written, not read.
    assert int(state.cache.length) == 4 + longest - 1
    assert bool(state.ended.all()) == bool(stop_tokens)
    assert (longest == 30) == (not stop_tokens)


@pytest.mark.slow
def test_rollout_inside_a_larger_program_equals_rollout():
    config = Config(max_new_tokens=6, temperature=0.9, top_k=5)

    @jax.jit
    def two_rollouts(params, key):
        def collect(_, step):
            batch = decoding.rollout(
                MODEL, params, RAGGED, RAGGED_MASK, jax.random.fold_in(key, step), config
            )
            return None, batch

        return jax.lax.scan(collect, None, jnp.arange(2))[1]

    key = jax.random.key(3)
    both = two_rollouts(PARAMS, key)
    assert (np.asarray(both.tokens[0]) != np.asarray(both.tokens[1])).any()
    for step in range(2):
        alone = rollout(MODEL, PARAMS, RAGGED, RAGGED_MASK, jax.random.fold_in(key, step), config)
        np.testing.assert_array_equal(both.tokens[step], alone.tokens)
        np.testing.assert_allclose(both.log_probability[step], alone.log_probability, atol=1e-5)


@pytest.mark.slow
def test_rollout_over_many_keys_is_a_vmap():
    config = Config(max_new_tokens=6, temperature=0.9, top_k=5)
    run = partial(decoding.rollout, MODEL, PARAMS, RAGGED, RAGGED_MASK, config=config)
    many = jax.jit(jax.vmap(lambda key: run(key=key)))(jax.random.split(jax.random.key(4), 2))
    for index, key in enumerate(jax.random.split(jax.random.key(4), 2)):
        alone = rollout(MODEL, PARAMS, RAGGED, RAGGED_MASK, key, config)
        np.testing.assert_array_equal(many.tokens[index], alone.tokens)


def test_greedy_takes_the_most_likely_token_and_keeps_the_models_own_log_probability():
    config = Config(max_new_tokens=8, temperature=0, top_k=3, stop_tokens=())
    batch = rollout(MODEL, PARAMS, RAGGED, RAGGED_MASK, jax.random.key(0), config)
    logits = np.asarray(next_logits(MODEL, PARAMS, batch.tokens, batch.attention_mask))
    np.testing.assert_array_equal(batch.tokens[:, 4:], logits[:, 3:-1].argmax(-1))
    expected = exact_log_probabilities(batch, 4)
    np.testing.assert_allclose(batch.log_probability, expected, atol=1e-4)


@pytest.mark.slow
def test_without_the_leaves_of_its_adapters_a_policy_writes_as_its_reference():
    lora = adapters.LoRA(rank=2, targets=("attn.c_attn", "mlp.c_proj"))
    policy = GPT2(TINY, lora=lora, adapter_width=8)
    params = random_params(policy)
    config, key = Config(max_new_tokens=12, num_samples=8), jax.random.key(6)
    trunk = adapters.trunk(params)
    reference = rollout(policy, trunk, RAGGED, RAGGED_MASK, key, config)
    plain = rollout(MODEL, trunk, RAGGED, RAGGED_MASK, key, config)
    adapted = rollout(policy, params, RAGGED, RAGGED_MASK, key, config)
    jax.tree.map(np.testing.assert_array_equal, reference, plain)
    assert (np.asarray(adapted.tokens) != np.asarray(plain.tokens)).mean() > 0.1


@pytest.mark.slow
def test_a_response_may_fill_the_context():
    config = Config(max_new_tokens=TINY.n_positions - 4, stop_tokens=())
    batch = rollout(MODEL, PARAMS, RAGGED, RAGGED_MASK, jax.random.key(7), config)
    expected = exact_log_probabilities(batch, 4)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(batch.log_probability, expected, atol=1e-4)


@pytest.mark.slow
def test_bfloat16_draws_from_its_own_logits():
    model: Any = GPT2(TINY, dtype=jnp.bfloat16)
    config = Config(max_new_tokens=12, num_samples=64, stop_tokens=())
    batch = rollout(model, PARAMS, RAGGED, RAGGED_MASK, jax.random.key(8), config)
    assert batch.log_probability.dtype == jnp.float32
    exact = exact_log_probabilities(batch, 4)[:, 4:]
    stored = np.asarray(batch.log_probability)[:, 4:]
    # Nothing above rounding of 8 bits, and no bias: the mean ratio to float32 is 1.
    np.testing.assert_allclose(stored, exact, atol=0.3)
    ratio = np.exp(exact - stored)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(ratio.size) + 1e-3
    logits = next_logits(model, PARAMS, batch.tokens, batch.attention_mask)
    own = jax.nn.log_softmax(logits[:, 3:-1])
    own = np.take_along_axis(np.asarray(own), np.asarray(batch.tokens)[:, 4:, None], -1)[..., 0]
    np.testing.assert_allclose(stored, own, atol=0.1)
