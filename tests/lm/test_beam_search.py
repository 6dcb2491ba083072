"""`beam_search` against brute force, greedy decoding and `transformers`."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm import hf_checkpoint
from jaxrl_llm.lm.beam_search import BeamConfig, beam_search, search
from jaxrl_llm.lm.generate import Config, generate
from jaxrl_llm.nn.gpt2 import GPT2, GPT2Config
from tests.golden import gpt2 as golden
from tests.lm.generation import TINY, next_logits, random_params

pytestmark = pytest.mark.slow  # the programs take long to compile
MODEL: Any = GPT2(TINY)
PARAMS = random_params(MODEL)
PROMPTS = np.array([[3, 7, 2, 9, 5], [1, 1, 1, 5, 4], [1, 8, 3, 3, 2]])
MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])


def tiny(vocab_size, n_positions=12, tie_word_embeddings=True) -> Any:
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=tie_word_embeddings,
    )
    return GPT2(config)


def brute_force(model, params, prompt, num_new, stop_tokens, length_penalty):
    """Every response that exists as (score, tokens), the best first."""
    vocab_size = model.config.vocab_size
    every = np.array(list(itertools.product(range(vocab_size), repeat=num_new)))
    rows = np.concatenate([np.tile(prompt, (len(every), 1)), every], axis=1)
    logits = next_logits(model, params, rows)[:, len(prompt) - 1 : -1]
    log_pi = np.asarray(jax.nn.log_softmax(logits), np.float64)
    log_pi = np.take_along_axis(log_pi, every[:, :, None], -1)[..., 0]
    responses = {}
    for tokens, terms in zip(every, log_pi, strict=True):
        stops = np.flatnonzero(np.isin(tokens, stop_tokens))
        length = stops[0] + 1 if stops.size else num_new
        responses[tuple(tokens[:length])] = terms[:length].sum() / length**length_penalty
    return sorted(((score, tokens) for tokens, score in responses.items()), reverse=True)


def as_lists(found, prompt=0):
    """The responses of one prompt as (score, tokens)."""
    fields = (found.tokens[prompt], found.mask[prompt], found.score[prompt])
    return [
        (float(score), tuple(np.asarray(tokens)[np.asarray(mask)].tolist()))
        for tokens, mask, score in zip(*fields, strict=True)
    ]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -0.7])
@pytest.mark.parametrize(
    ("vocab_size", "num_new", "stop_tokens"), [(5, 3, (0,)), (4, 4, (0, 2)), (5, 3, ())]
)
def test_beam_search_with_room_for_all_equals_brute_force(
    vocab_size, num_new, stop_tokens, length_penalty
):
    model = tiny(vocab_size)
    params = random_params(model, seed=vocab_size)
    config = BeamConfig(
        num_beams=vocab_size ** (num_new - 1),
        max_new_tokens=num_new,
        num_returned=12,
        stop_tokens=stop_tokens,
        length_penalty=length_penalty,
    )
    prompts = np.array([[0, 3, 1], [3, 1, 2]])
    mask = np.array([[0, 1, 1], [1, 1, 1]])
    found = beam_search(model, params, prompts, mask, config)
    for row, prompt in enumerate(prompts):
        exact = brute_force(
            model, params, prompt[mask[row] > 0], num_new, stop_tokens, length_penalty
        )
        actual = as_lists(found, row)
        assert [tokens for _, tokens in actual] == [tokens for _, tokens in exact[:12]]
        np.testing.assert_allclose(
            [score for score, _ in actual], [score for score, _ in exact[:12]], rtol=1e-5
        )
    if stop_tokens and length_penalty <= 1:
        assert len({len(tokens) for _, tokens in as_lists(found)}) > 1


def bigram(probability) -> Any:
    """A model, and its parameters, where a token depends on the last one alone."""
    size = len(probability)
    config = GPT2Config(
        vocab_size=size,
        n_positions=12,
        n_embd=size,
        n_layer=1,
        n_head=1,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = GPT2(config)
    params = jax.tree.map(jnp.zeros_like, random_params(model))
    # The last normalisation sees a unit vector, and its bias makes it one again.
    scale = np.sqrt((1 - 1 / size) / size + config.layer_norm_epsilon)
    params["transformer"]["wte"]["weight"] = jnp.eye(size)
    params["transformer"]["ln_f"] = {
        "weight": jnp.full(size, scale),
        "bias": jnp.full(size, 1 / size),
    }
    params["lm_head"]["weight"] = jnp.log(jnp.array(probability)).T
    return model, params


@pytest.mark.parametrize(
    ("length_penalty", "first", "expected", "probability"),
    [
        # Were it to end now, no beam would be better than (0,); in six tokens one is.
        (1.0, [0.55, 0.28, 0.17], (1, 1, 1, 1, 1, 1), 0.28 * 0.9**5),
        (0.0, [0.55, 0.28, 0.17], (0,), 0.55),
        # Longer is worse here, and 2 log .62 > log .3: the search goes on, for (1, 2) to be better.
        (-1.0, [0.3, 0.62, 0.08], (1, 2), 0.62 * 0.9),
        # 2 log .5 < log .37: it stops, and (1,), better than (0,) as far as it goes, has not ended.
        (-1.0, [0.37, 0.5, 0.13], (0,), 0.37),
    ],
)
def test_search_stops_when_the_best_is_certain_and_no_sooner(
    length_penalty, first, expected, probability
):
    goes_on = [0.05, 0.9, 0.05] if length_penalty >= 0 else [0.05, 0.05, 0.9]
    model, params = bigram([first, goes_on, first])
    stops = (0, 2) if length_penalty < 0 else (0,)
    config = BeamConfig(
        num_beams=3, max_new_tokens=6, length_penalty=length_penalty, stop_tokens=stops
    )
    ((score, tokens),) = as_lists(beam_search(model, params, np.array([[0]]), None, config))
    assert tokens == expected
    exact = np.log(probability) / len(expected) ** length_penalty
    np.testing.assert_allclose(score, exact, rtol=1e-5)


def test_responses_that_do_not_exist_score_minus_infinity_and_are_empty():
    model = tiny(3)
    config = BeamConfig(num_beams=16, num_returned=16, max_new_tokens=2, stop_tokens=(0, 1))
    params = random_params(model)
    found = beam_search(model, params, np.array([[2]]), None, config)
    exact = brute_force(model, params, np.array([2]), 2, (0, 1), 1.0)
    assert [tokens for _, tokens in as_lists(found)] == [tokens for _, tokens in exact] + [()] * 11
    assert np.isneginf(found.score[0, 5:]).all()


@pytest.mark.parametrize("stop_tokens", [(4, 6, 10), ()])
def test_one_beam_is_greedy_decoding(stop_tokens):
    config = BeamConfig(num_beams=1, max_new_tokens=12, stop_tokens=stop_tokens)
    found = beam_search(MODEL, PARAMS, PROMPTS, MASK, config)
    greedy = Config(max_new_tokens=12, temperature=0, stop_tokens=stop_tokens)
    batch = generate(MODEL, PARAMS, PROMPTS, MASK, jax.random.key(0), greedy)
    np.testing.assert_array_equal(found.tokens[:, 0], batch.tokens[:, 5:])
    np.testing.assert_array_equal(found.mask[:, 0], batch.response_mask[:, 5:])
    length, log_probability = found.mask[:, 0].sum(1), np.asarray(batch.log_probability)
    np.testing.assert_allclose(found.score[:, 0], log_probability.sum(1) / length, rtol=1e-5)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0])
def test_the_score_is_that_of_the_response_and_falls(length_penalty):
    config = BeamConfig(num_returned=4, max_new_tokens=12, length_penalty=length_penalty)
    found = beam_search(MODEL, PARAMS, PROMPTS, MASK, config)
    for row in range(3):
        rows = np.concatenate([np.tile(PROMPTS[row], (4, 1)), found.tokens[row]], axis=1)
        mask = np.concatenate([np.tile(MASK[row], (4, 1)), found.mask[row]], axis=1)
        logits = next_logits(MODEL, PARAMS, rows, mask)
        log_pi = np.asarray(jax.nn.log_softmax(logits))[:, 4:-1]
        log_pi = np.take_along_axis(log_pi, np.asarray(found.tokens[row])[:, :, None], -1)[..., 0]
        written = np.asarray(found.mask[row])
        expected = log_pi.sum(1, where=written) / written.sum(1) ** length_penalty
        np.testing.assert_allclose(found.score[row], expected, rtol=1e-4)
        assert (np.diff(found.score[row]) <= 0).all()
        assert len({tokens for _, tokens in as_lists(found, row)}) == 4


def test_hypotheses_depend_on_their_prompt_alone():
    config = BeamConfig(num_returned=4, max_new_tokens=12)
    batch = beam_search(MODEL, PARAMS, PROMPTS, MASK, config)
    for row in range(3):
        alone = beam_search(MODEL, PARAMS, PROMPTS[row : row + 1, -MASK[row].sum() :], None, config)
        np.testing.assert_array_equal(alone.tokens[0], batch.tokens[row])
        np.testing.assert_array_equal(alone.mask[0], batch.mask[row])
        np.testing.assert_allclose(alone.score[0], batch.score[row], atol=1e-5)


def test_search_stops_when_no_beam_can_win():
    # Beyond the context every logit is NaN, and the search would return it.
    model = tiny(5, n_positions=8, tie_word_embeddings=False)
    params = random_params(model)
    params["transformer"]["ln_f"]["bias"] = 3 * params["lm_head"]["weight"][0]
    config = BeamConfig(max_new_tokens=40, num_beams=3, num_returned=2)
    prompt = jnp.array([[3, 1], [4, 2]])
    found = jax.jit(search, static_argnames=("model", "config"))(
        model, params, prompt, prompt > 0, config, 0.5
    )
    assert np.isfinite(found.score).all()
    assert (found.tokens[:, 0, 0] == 0).all()
    assert int(found.mask.sum(-1).max()) < 7


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("name", ["defaults", "untied"])
def test_beam_search_matches_live_transformers_without_stop_tokens(name, length_penalty):
    torch = pytest.importorskip("torch")
    numbers = golden.load(name)
    model, params = hf_checkpoint.load(numbers.directory)
    with torch.no_grad():
        expected = (
            golden.make(name)
            .float()
            .eval()
            .generate(
                torch.from_numpy(numbers.tokens).long(),
                attention_mask=torch.from_numpy(numbers.attention_mask).long(),
                do_sample=False,
                num_beams=4,
                num_return_sequences=3,
                max_new_tokens=16,
                length_penalty=length_penalty,
                eos_token_id=None,
                output_scores=True,
                return_dict_in_generate=True,
            )
        )
    config = BeamConfig(
        max_new_tokens=16, num_returned=3, stop_tokens=(), length_penalty=length_penalty
    )
    found = beam_search(model, params, numbers.tokens, numbers.attention_mask, config)
    width = numbers.tokens.shape[1]
    np.testing.assert_array_equal(
        found.tokens.reshape(-1, 16), expected.sequences.numpy()[:, width:]
    )
    np.testing.assert_allclose(
        found.score.reshape(-1), expected.sequences_scores.numpy(), rtol=1e-4
    )


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0; it must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"length_penalty": float("nan")}, "length_penalty is nan; it must be finite"),
        ({"num_returned": 5}, "num_returned is 5; it must be in [1, 4]"),
        ({"stop_tokens": (3, 11)}, "stop_tokens is 11; it must be in [0, 10]"),
        (
            {"max_new_tokens": 44},
            (
                "tokens[0] has 5 tokens; with max_new_tokens 44 that is more than the context of "
                "48; shorten either"
            ),
        ),
    ],
)
def test_beam_search_refuses_what_it_cannot_search(field, message):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        beam_search(MODEL, PARAMS, PROMPTS, MASK, BeamConfig(**field))
    assert str(caught.value) == message
