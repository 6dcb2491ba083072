"""The reward model: a language model's trunk, read where a text ends, and heads upon it."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.nn.adapters import LoRA
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.nn.reward_model import RewardModel, from_language_model
from tests.nn.tiny_gpt2 import TINY, TOKENS, fast_key, flat, random_params, run

CONFIG = replace(TINY, n_layer=1)
MODEL: Any = RewardModel(CONFIG)
LANGUAGE_MODEL = GPT2(CONFIG)
NUM_ROWS, LENGTH = TOKENS.shape
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL)


def naive_scores(params: Any, pooled: Any) -> Any:
    """Overall and by criterion, of hidden states `[B, E]`."""
    heads = [params[name] for name in ("overall", "by_criterion")]
    raw, logits = (pooled @ head["kernel"] + head["bias"] for head in heads)
    return params["gain"] * raw[:, 0] + params["bias"], 1 / (1 + np.exp(-logits))


def padded(lengths: Any, left: int, right: int) -> tuple[Any, Any]:
    """The first tokens of each row between `left` and `right` columns of noise, and their mask."""
    tokens = RANDOM.integers(CONFIG.vocab_size, size=(NUM_ROWS, left + LENGTH + right))
    mask = np.zeros(tokens.shape, bool)
    for row, length in enumerate(lengths):
        tokens[row, left : left + length] = TOKENS[row, :length]
        mask[row, left : left + length] = True
    return tokens, mask


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_scores_are_the_heads_of_the_hidden_states_of_the_language_model(params, pooling):
    model = MODEL.clone(pooling=pooling)
    hidden = run(LANGUAGE_MODEL, params, TOKENS, method="hidden_states")
    response = np.zeros((NUM_ROWS, 5), bool)
    for row, length in enumerate((5, 1, 3)):
        response[row, :length] = True
    mask = np.concatenate([np.ones((NUM_ROWS, 3), bool), response], axis=1)
    rows = [3 + np.flatnonzero(each) for each in response]
    pooled = np.stack(
        [
            hidden[row, at[-1]] if pooling == "last" else hidden[row, at].mean(0)
            for row, at in enumerate(rows)
        ]
    )
    overall, criteria = run(model, params, TOKENS, mask, response)
    expected, expected_criteria = naive_scores(params, pooled)
    np.testing.assert_allclose(overall, expected, rtol=1e-5)
    np.testing.assert_allclose(criteria, expected_criteria, rtol=1e-5)


def test_scores_are_float32_in_any_precision_of_the_trunk(params):
    for model in (MODEL, MODEL.clone(dtype=jnp.bfloat16, remat=True)):
        scores = run(model, params, TOKENS)
        assert [score.dtype for score in scores] == [np.float32] * 2
        assert [score.shape for score in scores] == [(NUM_ROWS,), (NUM_ROWS, 3)]


def test_detail_08_pads_on_either_side_change_nothing(params):
    lengths = (5, 8, 1)
    expected = run(MODEL, params, *padded(lengths, 0, 0))
    for left, right in ((0, 4), (4, 0), (2, 2)):
        for score, same in zip(
            run(MODEL, params, *padded(lengths, left, right)), expected, strict=True
        ):
            np.testing.assert_allclose(score, same, atol=1e-6)
    # And what is not padding does.
    longer = run(MODEL, params, *padded((6, 8, 2), 0, 0))
    assert np.abs(longer.overall - expected.overall)[[0, 2]].min() > 1e-3


def test_mean_of_an_empty_response_scores_as_the_biases(params):
    model = MODEL.clone(pooling="mean")
    overall, criteria = run(model, params, TOKENS, None, np.zeros((NUM_ROWS, 2), bool))
    expected, expected_criteria = naive_scores(params, np.zeros((NUM_ROWS, CONFIG.n_embd)))
    np.testing.assert_allclose(overall, expected, rtol=1e-6)
    np.testing.assert_allclose(criteria, expected_criteria, rtol=1e-6)


def test_a_model_without_criteria_has_the_overall_head_alone():
    model = MODEL.clone(criteria=())
    params = random_params(model)
    assert "by_criterion" not in params
    overall, criteria = run(model, params, TOKENS)
    assert overall.shape == (NUM_ROWS,)
    assert criteria.shape == (NUM_ROWS, 0)


def test_detail_25_heads_start_with_deviation_of_the_inverse_root_of_the_width():
    wide = MODEL.clone(config=replace(CONFIG, n_embd=1024), criteria=("one",) * 40)

    @jax.jit  # so that the trunk, which is not returned, is not drawn
    def start(key: Any) -> Any:
        params: Any = wide.init(key, TOKENS[:1, :1])["params"]
        return {name: params[name] for name in ("overall", "by_criterion", "gain", "bias")}

    heads = start(fast_key(0))
    kernel, sigma = np.asarray(heads["by_criterion"]["kernel"]), 1 / np.sqrt(1025)
    # The standard deviation of n draws has a relative error of 1 / sqrt(2 n).
    assert abs(kernel.std() / sigma - 1) < 4 / np.sqrt(2 * kernel.size)
    assert abs(heads["overall"]["kernel"].std() / sigma - 1) < 4 / np.sqrt(2 * 1024)
    for name in ("overall", "by_criterion"):
        assert not heads[name]["bias"].any()
    assert (heads["gain"], heads["bias"]) == (1, 0)


def test_from_language_model_takes_its_trunk_and_draws_the_heads():
    adapted = GPT2(replace(CONFIG, tie_word_embeddings=False), lora=LoRA(rank=2), value_width=4)
    language_params = random_params(adapted)
    params = from_language_model(MODEL, language_params, fast_key(0))
    other = from_language_model(MODEL, language_params, fast_key(1))
    assert flat(params).keys() == flat(random_params(MODEL)).keys()
    trunk = flat(language_params["transformer"])
    for path, leaf in flat(params["transformer"]).items():
        np.testing.assert_array_equal(leaf, trunk[path])
    assert np.abs(params["overall"]["kernel"] - other["overall"]["kernel"]).max() > 0.1


def test_gain_and_bias_get_no_gradient_from_raw_scores(params):
    def loss(params: Any) -> Any:
        features = MODEL.apply({"params": params}, TOKENS, method="features")
        scores: Any = MODEL.apply({"params": params}, features, method="raw")
        return jnp.sum(scores.overall**2)

    gradient = jax.jit(jax.grad(loss))(params)
    assert (gradient["gain"], gradient["bias"]) == (0, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.abs(gradient["overall"]["kernel"]).max() > 0.1


def test_surprisal_of_the_response_is_read_beside_the_hidden_states():
    model = MODEL.clone(pooling="mean", surprisal=True)
    params = random_params(model)
    response = np.arange(5) < np.array([5, 1, 3])[:, None]
    mask = np.concatenate([np.ones((NUM_ROWS, LENGTH - 5), bool), response], axis=1)
    hidden = np.asarray(run(LANGUAGE_MODEL, params, TOKENS, method="hidden_states"), np.float64)
    logits = hidden @ np.asarray(params["transformer"]["wte"]["weight"]).T
    log_pi = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    pooled = []
    for row in range(NUM_ROWS):
        at = LENGTH - 5 + np.flatnonzero(response[row])
        surprisal = -log_pi[row, at - 1, TOKENS[row, at]]
        three = (0.1 * surprisal.sum(), surprisal.mean(), surprisal.max())
        weighted = (surprisal[:, None] * hidden[row, at]).mean(0)
        pooled.append(np.concatenate([hidden[row, at].mean(0), weighted, three]))
    overall, criteria = run(model, params, TOKENS, mask, response)
    expected, by_criterion = naive_scores(params, np.stack(pooled))
    np.testing.assert_allclose(overall, expected, atol=1e-4)
    np.testing.assert_allclose(criteria, by_criterion, atol=1e-4)
