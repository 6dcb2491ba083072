"""What policies learn from: each field beside what it should be, row by row."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm import objective, optimizer, rollouts
from jaxrl_llm.lm.likelihood import response_likelihood
from jaxrl_llm.lm.rewards import Reward, of_function
from jaxrl_llm.nn import adapters
from jaxrl_llm.types import Responses
from tests.lm.policy_learning import (
    NUM_NEW,
    PARAMS,
    POLICY,
    REWARD,
    TARGET,
    VOCABULARY,
    prompts,
    target_share,
    task,
)
from tests.lm.tiny import CONTEXT, END, PADDING

pytestmark = pytest.mark.slow

STOP = 2  # ends a response beside END
CONFIG = rollouts.Config(
    num_prompts=4,
    num_samples=3,
    max_new_tokens=NUM_NEW,
    stop_tokens=(END, STOP),
    temperature=0.7,
    missing_end_penalty=0.25,
)
REFERENCE = jax.tree.map(lambda leaf: 0.9 * leaf, PARAMS)


def shares_and_length(params: Any, responses: Responses) -> jax.Array:
    length = jnp.sum(responses.response_mask, axis=-1, keepdims=True)
    return jnp.concatenate([target_share(params, responses), length], axis=-1)


# Length has to be 3 at least; its multiplier is part of the state.
TWO = Reward(
    criteria=("target_share", "length"),
    score=shares_and_length,
    mix=objective.constrained((1.0, 0.0), 1, at_least=3.0, initial=0.5, keep_scale=False),
)
COLLECT = jax.jit(partial(rollouts.collect, CONFIG, POLICY, TWO))


def start(params: Any = PARAMS, reward: Reward = TWO) -> Any:
    train = optimizer.start(optimizer.ADAM, 10, params)
    return rollouts.start(train, jax.random.key(5), reward, controller=jnp.float32(0.3))


@pytest.fixture(scope="module")
def data() -> Any:
    return task(reference=REFERENCE)


@pytest.fixture(scope="module")
def experience(data) -> Any:
    return COLLECT(jax.random.key(0), start(), data)


def test_start_is_before_the_first_iteration():
    state = start()
    assert int(state.iteration) == 0
    assert float(state.mix) == 0.5
    assert float(state.controller) == np.float32(0.3)
    chex.assert_trees_all_equal(state.train.params, PARAMS)


# Responses


def test_collect_draws_samples_of_each_prompt(experience, data):
    responses = experience.responses
    length = responses.prompt_length
    assert responses.tokens.shape == (4, 3, length + NUM_NEW)
    asked = rollouts.next_prompts(CONFIG, start(), data)
    for sample in range(3):
        chex.assert_trees_all_equal(responses.tokens[:, sample, :length], asked.tokens)
        chex.assert_trees_all_equal(
            responses.attention_mask[:, sample, :length], asked.attention_mask
        )
    # Samples of one prompt differ.
    written = np.asarray(responses.tokens)[..., length:]
    assert any(len({tuple(row) for row in group.tolist()}) > 1 for group in written)


def test_collect_counts_the_end_token_and_nothing_after_it(experience):
    """A response that reaches the limit keeps its last token, whatever it is."""
    responses = experience.responses
    written = np.asarray(responses.tokens)[..., responses.prompt_length :].reshape(-1, NUM_NEW)
    masks = np.asarray(responses.response_mask).reshape(-1, NUM_NEW)
    lengths = set()
    for row, mask in zip(written, masks, strict=True):
        ends = np.flatnonzero(np.isin(row, (END, STOP)) & mask)
        length = ends[0] + 1 if ends.size else NUM_NEW
        lengths.add((length, bool(ends.size)))
        np.testing.assert_array_equal(mask, np.arange(NUM_NEW) < length)
        assert (row[length:] == PADDING).all()
    assert (NUM_NEW, False) in lengths
    assert len(lengths) > 2
    np.testing.assert_array_equal(
        responses.attention_mask[..., responses.prompt_length :], responses.response_mask
    )


@pytest.mark.slow
def test_collect_keeps_the_law_that_drew_and_the_references(experience):
    """At the temperature of the draw, for all of them."""
    responses = experience.responses
    for params, seen in (
        (PARAMS, responses.log_probability),
        (REFERENCE, responses.reference_log_probability),
    ):
        expected = response_likelihood(POLICY, params, responses, temperature=0.7)
        np.testing.assert_allclose(seen, expected.log_probability, atol=1e-4)
        # So the ratio of the first minibatch is 1.
        np.testing.assert_allclose(np.exp(expected.log_probability - seen), 1, atol=1e-4)
    value: Any = response_likelihood(POLICY, PARAMS, responses).value
    np.testing.assert_allclose(responses.value, value, atol=1e-5)


def test_collect_scores_and_penalises_what_has_no_end(experience):
    responses = experience.responses
    written = np.asarray(responses.tokens)[..., responses.prompt_length :]
    mask = np.asarray(responses.response_mask)
    share = ((written == TARGET) & mask).mean(-1)
    length = mask.sum(-1)
    ended = (np.isin(written, (END, STOP)) & mask).any(-1)
    assert 0 < ended.mean() < 1
    total = share + 0.5 * (length - 3.0) - 0.25 * ~ended
    np.testing.assert_allclose(responses.score, total, atol=1e-5)
    metrics = experience.metrics
    for name, values in {
        "score": total,
        "score_target_share": share,
        "score_length": length,
        "response_length": length,
        "ended": ended,
        "multiplier": np.full(1, 0.5),
    }.items():
        assert float(metrics[name].mean) == pytest.approx(values.mean(), abs=1e-5), name
        assert int(metrics[name].weight) == values.size
    assert float(experience.mix) == pytest.approx(max(0.5 + 0.1 * (3 - length.mean()), 0))


def test_collect_measures_the_kl_of_whole_responses(experience):
    responses = experience.responses
    k1 = np.asarray(responses.log_probability - responses.reference_log_probability)
    np.testing.assert_allclose(rollouts.log_ratio_to_reference(responses), k1, atol=1e-6)
    assert float(experience.metrics["kl"].mean) == pytest.approx(k1.sum(-1).mean(), abs=1e-5)


def test_collect_depends_on_the_key_and_nothing_else(experience, data):
    again = COLLECT(jax.random.key(0), start(), data)
    chex.assert_trees_all_equal(again, experience)
    other = COLLECT(jax.random.key(1), start(), data)
    assert (other.responses.tokens != experience.responses.tokens).any()


def test_collect_compares_with_the_policys_own_trunk_where_there_is_no_reference():
    seen = jax.jit(partial(rollouts.collect, CONFIG, POLICY, TWO))(
        jax.random.key(0), start(), task(reference=None)
    )
    np.testing.assert_allclose(rollouts.log_ratio_to_reference(seen.responses), 0, atol=1e-5)


def test_collect_names_no_criterion_where_there_is_one_and_no_value_without_a_head(data):
    model = POLICY.clone(value_width=None)
    run = partial(rollouts.collect, CONFIG, model, REWARD)
    state = start(adapters.trunk(PARAMS), REWARD)
    seen = jax.eval_shape(run, jax.random.key(0), state, data)
    assert seen.responses.value is None
    assert seen.metrics.keys() == {"score", "kl", "response_length", "ended"}


def test_collect_refuses_scores_of_another_shape(data):
    wrong = of_function(lambda responses: responses.response_mask)
    run = partial(rollouts.collect, CONFIG, POLICY, wrong)
    with pytest.raises(ValueError, match=r'^reward "score" returned the shape \[4, 3, 4\]'):
        jax.eval_shape(run, jax.random.key(0), start(), data)


# Prompts


def test_next_prompts_asks_each_prompt_once_an_epoch(data):
    state, seen = start(), []
    for iteration in range(4):
        at = state.replace(iteration=jnp.int32(iteration))
        tokens = np.asarray(rollouts.next_prompts(CONFIG, at, data).tokens)
        seen.append({tuple(row) for row in tokens.tolist()})
    every = {tuple(row) for row in np.asarray(data.prompts.tokens).tolist()}
    assert seen[0] | seen[1] == seen[2] | seen[3] == every
    assert not seen[0] & seen[1]
    assert seen[0] != seen[2]


def test_make_task_drops_columns_that_are_padding_in_every_row():
    rows = prompts()
    wide = {"tokens": ((0, 0), (5, 0)), "attention_mask": ((0, 0), (5, 0))}
    padded = replace(
        rows, **{name: jnp.pad(getattr(rows, name), width) for name, width in wide.items()}
    )
    made = rollouts.make_task(CONFIG, POLICY, padded, reference=PARAMS)
    chex.assert_trees_all_equal(made.prompts.attention_mask, rows.attention_mask)
    kept = np.asarray(rows.attention_mask)
    np.testing.assert_array_equal(
        np.asarray(made.prompts.tokens)[kept], np.asarray(rows.tokens)[kept]
    )
    assert "value_head" in PARAMS
    chex.assert_trees_all_equal(made.reference, adapters.trunk(PARAMS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": jnp.zeros((8, 3), bool)}, "attention_mask[0] has 0 real tokens"),
        (
            {"attention_mask": jnp.asarray([[True, False, True]] * 8)},
            "attention_mask[0] has 2 real tokens, which are not the last of its row",
        ),
        ({"tokens": jnp.full((8, 3), VOCABULARY)}, f"tokens[0, 2] is {VOCABULARY}; it must be in"),
    ],
    ids=["empty", "padded on the right", "not in the vocabulary"],
)
def test_make_task_refuses_a_prompt_that_cannot_be_answered(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        rollouts.make_task(CONFIG, POLICY, replace(prompts(), **change), reference=None)


def test_make_task_refuses_a_prompt_that_fills_the_context():
    full = replace(CONFIG, max_new_tokens=CONTEXT - 2)
    message = (
        f"tokens[2] has 3 tokens; with max_new_tokens {CONTEXT - 2} that is more than the context "
        f"of {CONTEXT}; shorten either"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rollouts.make_task(full, POLICY, prompts(), reference=None)


# Settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_prompts", 0),
        ("num_samples", 0),
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("missing_end_penalty", -1.0),
        ("chunk_size", 0),
    ],
)
def test_validate_names_the_field(field, value):
    CONFIG.validate()
    with pytest.raises(ValueError, match=f"^{field} is {value}; it must be"):
        replace(CONFIG, **{field: value}).validate()


def test_config_counts_responses_and_hands_its_settings_to_the_decoder():
    assert CONFIG.num_responses == 12
    decoder = CONFIG.decoding
    assert (decoder.max_new_tokens, decoder.num_samples, decoder.temperature) == (NUM_NEW, 3, 0.7)
    assert decoder.stop_tokens == (END, STOP)
    assert decoder.top_k is decoder.top_p is None
