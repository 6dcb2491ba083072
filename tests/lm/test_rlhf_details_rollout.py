"""Details 1 to 12 of RLHF: how responses are drawn, masked, scored and stored.

Each test would fail under the mistake that its name rules out.

Source: Huang et al. (2024), "The N+ Implementation Details of RLHF with PPO", arXiv:2403.17031.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from jaxrl_llm.data import preference_tokens
from jaxrl_llm.data.preferences import Preference
from jaxrl_llm.kernels import alignment
from jaxrl_llm.lm import decoding, grpo, ppo, reward, rollouts
from jaxrl_llm.lm.rewards import of_function
from jaxrl_llm.nn.gpt2 import GPT2
from tests.lm import preference_pairs
from tests.lm.policy_learning import (
    NUM_NEW,
    POLICY,
    POLICY_SHAPE,
    REWARD,
    TARGET,
    VOCABULARY,
    prompts,
    random_responses,
)
from tests.lm.rlhf_details import (
    ALGORITHMS,
    BETA,
    CONFIG,
    PARAMS,
    PPO,
    REFERENCE,
    TEMPERATURE,
    collect,
    draw,
    learn,
    padded,
    score,
    state,
    task,
    with_stored,
)
from tests.lm.tiny import CONTEXT, END, PADDING, log_softmax
from tests.nn.tiny_gpt2 import random_params, run, shapes

# Whole iterations, and laws over many draws: minutes of compilation.
pytestmark = pytest.mark.slow

STOP = 2  # a custom end of a response
OUTSIDE = 10**6  # no token of the vocabulary
CUSTOM = replace(CONFIG, stop_tokens=(STOP,), missing_end_penalty=0.25)
LENGTH = of_function(lambda responses: jnp.sum(responses.response_mask, axis=-1))


@pytest.fixture(scope="module")
def experience() -> Any:
    """Drawn by PARAMS, which are the reference too."""
    return collect(CONFIG, POLICY, REWARD, jax.random.key(0), state(), task())


@pytest.fixture(scope="module")
def responses(experience) -> Any:
    mask = np.asarray(experience.responses.response_mask)
    assert {1, NUM_NEW} < set(mask.sum(-1).ravel().tolist())  # ragged
    assert 0 < float(experience.metrics["ended"].mean) < 1
    return experience.responses


@pytest.fixture(scope="module")
def custom() -> Any:
    """Drawn until STOP, scored by an integer, the length; and which of them have ended."""
    seen = collect(CUSTOM, POLICY, LENGTH, jax.random.key(1), state(), task()).responses
    mask, written = np.asarray(seen.response_mask), written_of(seen)
    ended = ((written == STOP) & mask).any(-1)
    assert 0 < ended.mean() < 1
    return seen, ended


def written_of(responses: Any) -> Any:
    return np.asarray(responses.tokens)[..., responses.prompt_length :]


def drawn_alone(responses: Any) -> Any:
    """log pi of each drawn token, where every row is read alone from the start, without padding."""
    groups, first = responses.tokens.shape[:2], responses.prompt_length
    real = np.asarray(responses.attention_mask)
    rows = np.zeros((*groups, CONTEXT), int)
    for place in np.ndindex(*groups):
        rows[place][: real[place].sum()] = np.asarray(responses.tokens)[place][real[place]]
    logits = run(POLICY, PARAMS, rows.reshape(-1, CONTEXT)).reshape(*rows.shape, VOCABULARY)
    law, result = log_softmax(logits / TEMPERATURE), np.zeros(responses.response_mask.shape)
    for place in np.ndindex(*groups):
        begin, length = real[place][:first].sum(), real[place].sum()
        for t in range(begin, length):
            result[place][t - begin] = law[place][t - 1, rows[place][t]]
    return result


def test_detail_01_padding_on_the_left_changes_neither_a_score_nor_a_draw():
    """Not by how much there is, nor by its id, in scoring and in decoding from a cache."""
    asked, left = prompts(), 7
    wide = replace(
        asked,
        tokens=jnp.pad(asked.tokens, ((0, 0), (left, 0)), constant_values=OUTSIDE),
        attention_mask=jnp.pad(asked.attention_mask, ((0, 0), (left, 0))),
    )
    drawn = draw(CONFIG, POLICY, jax.random.key(2), PARAMS, asked)
    again = draw(CONFIG, POLICY, jax.random.key(2), PARAMS, wide)
    expected = drawn_alone(drawn)
    np.testing.assert_array_equal(written_of(again), written_of(drawn))
    for each in (drawn, again):
        np.testing.assert_allclose(each.log_probability, expected, atol=2e-5)
    # More slots than the context has positions, so the number of a slot would be none.
    more = padded(drawn, left=left, right=2, token=OUTSIDE)
    assert more.tokens.shape[-1] > CONTEXT
    for each in (drawn, more):
        scored = np.asarray(score(POLICY, PARAMS, each, temperature=TEMPERATURE).log_probability)
        np.testing.assert_allclose(scored[..., :NUM_NEW], expected, atol=2e-5)
        assert (scored[..., NUM_NEW:] == 0).all()


def test_detail_02_padding_that_is_the_end_token_gives_the_same_loss(experience):
    model = GPT2(replace(POLICY_SHAPE, pad_token_id=None), value_width=8)
    other = collect(CONFIG, model, REWARD, jax.random.key(0), state(), task())
    mask = np.asarray(experience.responses.response_mask)
    assert set(written_of(experience.responses)[~mask].tolist()) == {PADDING}
    assert set(written_of(other.responses)[~mask].tolist()) == {END}
    # The end token itself counts.
    assert ((written_of(other.responses) == END) & mask).any()
    chex.assert_trees_all_equal(
        experience.responses.replace(tokens=other.responses.tokens), other.responses
    )
    chex.assert_trees_all_equal(experience.metrics, other.metrics)
    chex.assert_trees_all_equal(
        *(learn("ppo", POLICY, each.responses) for each in (experience, other))
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_detail_03_what_follows_the_end_changes_neither_loss_nor_gradient(algorithm, responses):
    mask, written = np.asarray(responses.response_mask), written_of(responses)
    tail = np.random.default_rng(0).integers(0, VOCABULARY, mask.shape)
    assert (np.where(mask, written, tail) != written).any()

    def learnt(written: Any) -> Any:
        tokens = responses.tokens.at[..., responses.prompt_length :].set(written)
        return learn(algorithm, POLICY, responses.replace(tokens=tokens))

    chex.assert_trees_all_equal(learnt(np.where(mask, written, tail)), learnt(written))
    # The end token itself is learnt.
    _, others = learnt(np.where(mask & (written == END), TARGET, written))
    assert abs(float(others["loss"]) - float(learnt(written)[1]["loss"])) > 1e-4


def test_detail_04_the_reference_is_no_divergence_away_from_itself_at_any_temperature(
    experience, responses
):
    np.testing.assert_allclose(rollouts.log_ratio_to_reference(responses), 0, atol=2e-5)
    assert float(experience.metrics["kl"].mean) == pytest.approx(0, abs=2e-5)
    # At another temperature it would be.
    at_one = score(POLICY, PARAMS, responses, temperature=1.0).log_probability
    assert np.abs(responses.log_probability - at_one).max() > 0.05


def test_detail_05_training_refuses_a_law_that_is_cut(capsys):
    for name in ("top_k", "top_p", "min_p", "typical_p", "repetition_penalty"):
        assert hasattr(decoding.Config(), name)
        setting: Any = {name: 1}
        with pytest.raises(TypeError, match=name):
            rollouts.Config(**setting)
    assert decoding.split(CONFIG.decoding)[1] == {"temperature": TEMPERATURE}
    with pytest.raises(SystemExit):
        tyro.cli(ppo.Config, args=["--rollout.top-k", "5"])
    assert "top-k" in capsys.readouterr().err


def test_detail_05_the_mean_importance_ratio_of_what_is_drawn_is_one():
    """Whatever the policy: E[pi(y) / mu(y)] = 1 for y drawn from mu, unless mu lacks a token."""
    count = 4000
    config = replace(CONFIG, num_samples=count, max_new_tokens=1)
    one: Any = jax.tree.map(lambda leaf: leaf[2:3], prompts())
    drawn = draw(config, POLICY, jax.random.key(3), PARAMS, one)
    other = score(POLICY, REFERENCE, drawn, temperature=TEMPERATURE)
    ratio = np.exp(other.log_probability - drawn.log_probability).ravel()
    assert ratio.std() > 0.02
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(count)
    # Of a law cut to its 2 likeliest tokens the ratio is but their probability.
    cut = replace(config.decoding, top_k=2)
    rows = jax.jit(decoding.rollout, static_argnums=(0, 5))(
        POLICY, PARAMS, one.tokens, one.attention_mask, jax.random.key(3), cut
    )
    kept = drawn.replace(
        tokens=rows.tokens[None], log_probability=rows.log_probability[None, :, -1:]
    )
    full = score(POLICY, PARAMS, kept, temperature=TEMPERATURE).log_probability
    ratio = np.exp(full - kept.log_probability).ravel()
    assert ratio.mean() < 0.9


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_detail_06_the_ratio_is_to_the_probabilities_stored_at_the_rollout(algorithm, responses):
    new = score(POLICY, PARAMS, responses, temperature=TEMPERATURE).log_probability
    ratio = np.exp(np.asarray(new - responses.log_probability))
    np.testing.assert_allclose(ratio, 1, atol=1e-4)
    _, metrics = learn(algorithm, POLICY, responses)
    assert float(metrics["policy_kl"].mean) == pytest.approx(0, abs=1e-6)
    assert float(metrics["clip_fraction"].total) == 0
    # Were they computed anew, nobody would see that the stored ones are others: k3 of a ratio
    # exp(-0.1) is exp(-0.1) - 1 + 0.1.
    other = with_stored(responses, log_probability=responses.log_probability + 0.1)
    _, metrics = learn(algorithm, POLICY, other)
    assert float(metrics["policy_kl"].mean) == pytest.approx(np.exp(-0.1) - 0.9, rel=1e-3)


def test_detail_07_values_and_logits_stand_at_the_state_before_each_token():
    """Of a model whose value is how many tokens it has read, and which writes that number next."""
    model = POLICY.clone(config=replace(POLICY_SHAPE, tie_word_embeddings=False))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes(model))
    width = POLICY_SHAPE.n_embd
    params["transformer"]["ln_f"]["weight"][:] = 1
    params["transformer"]["wpe"]["weight"][:] = np.eye(CONTEXT, width)
    # Normalised, a unit vector has `peak` at its place and -1 / peak elsewhere.
    peak = np.sqrt(width - 1)
    slope, count = np.arange(width) / (peak + 1 / peak), np.arange(1, CONTEXT + 1)
    params["value_head"]["hidden"]["kernel"][:, 0] = slope
    params["value_head"]["hidden"]["bias"][0] = 1 + slope.sum() / peak
    params["value_head"]["value"]["kernel"][0] = 1
    params["lm_head"]["weight"][count % VOCABULARY, count - 1] = 10

    asked: Any = random_responses(3)
    length = np.asarray(asked.attention_mask)[..., : asked.prompt_length].sum(-1, keepdims=True)
    num_read = length + np.arange(NUM_NEW)
    tokens = asked.tokens.at[..., asked.prompt_length :].set(num_read % VOCABULARY)
    mask = np.asarray(asked.response_mask)
    for each in (asked.replace(tokens=tokens), padded(asked.replace(tokens=tokens), left=2)):
        seen = score(model, params, each, temperature=1.0)
        np.testing.assert_allclose(seen.value, np.where(mask, num_read, 0), atol=0.01)
        np.testing.assert_allclose(seen.log_probability, 0, atol=1e-3)
        np.testing.assert_allclose(seen.entropy, 0, atol=1e-2)


def test_detail_08_the_reward_model_reads_the_last_real_token():
    model, pairs = preference_pairs.MODEL, preference_pairs.PAIRS
    params = random_params(model)
    read = jax.jit(partial(reward.score, model))
    scores = read(params, pairs)
    for token in (END, OUTSIDE):
        wider = padded(pairs, left=2, right=3, token=token)
        chex.assert_trees_all_close(read(params, wider), scores, atol=1e-5)
    # The same tokens without any padding score the same; without the last one, they do not.
    real = np.asarray(pairs.attention_mask)
    place = next(place for place in np.ndindex(8, 2) if 1 < real[place].sum() < real.shape[-1])
    alone = np.asarray(pairs.tokens)[place][real[place]][None]
    whole, shorter = (run(model, params, row).overall for row in (alone, alone[:, :-1]))
    np.testing.assert_allclose(scores.overall[place], whole[0], atol=1e-5)
    assert abs(whole[0] - shorter[0]) > 0.01


def test_detail_09_the_score_sits_on_the_last_token_of_ended_and_of_full_rows():
    config = replace(PPO, gae_lambda=0.5, gamma=0.9)
    rows = random_responses(4)
    mask = np.asarray(rows.response_mask)
    last = np.arange(NUM_NEW) == mask.sum(-1, keepdims=True) - 1
    assert 0 < last[..., -1].mean() < 1
    free = ppo.token_rewards(config, rows, jnp.float32(0))
    np.testing.assert_array_equal(free, np.where(last, np.asarray(rows.score)[..., None], 0))
    tight = ppo.as_batch(config, rows, BETA, None)
    wide = ppo.as_batch(config, padded(rows, right=3), BETA, None)
    for name in ("advantage", "return_"):
        found = np.asarray(getattr(wide, name))
        np.testing.assert_allclose(found[..., :NUM_NEW], getattr(tight, name), atol=1e-6)
        assert (found[..., NUM_NEW:] == 0).all()


def test_detail_10_a_fraction_of_a_score_survives_a_reward_of_integers(custom):
    seen, ended = custom
    length = np.asarray(seen.response_mask).sum(-1)
    assert seen.score.dtype == jnp.float32
    np.testing.assert_array_equal(seen.score, length - 0.25 * ~ended)
    reward = ppo.token_rewards(PPO, seen, jnp.float32(0))
    np.testing.assert_array_equal(reward.sum(-1), seen.score)
    mask = jnp.array([True, True, False])
    charged = alignment.token_reward(jnp.int32(1), jnp.array([1, 1, 0]), 0.25, mask)
    np.testing.assert_array_equal(charged, [-0.25, 0.75, 0])


def test_detail_11_the_penalty_of_a_missing_end_knows_custom_stop_tokens(custom):
    seen, ended = custom
    written, mask = written_of(seen), np.asarray(seen.response_mask)
    penalty = mask.sum(-1) - np.asarray(seen.score)
    np.testing.assert_array_equal(penalty, np.where(ended, 0, 0.25))
    # The model's own end token neither stops such a response nor spares it the penalty.
    assert (((written == END) & mask).any(-1) & ~ended).any()
    assert not ended[written[..., -1] == END].all()
    cut_off = jax.vmap(jax.vmap(partial(alignment.is_unfinished, end_tokens=(STOP,))))
    np.testing.assert_array_equal(cut_off(jnp.asarray(written), seen.response_mask), ~ended)
    masking = grpo.Config(rollout=CUSTOM, mask_truncated=True)
    counted = np.asarray(grpo.as_batch(masking, POLICY, seen).counted)
    np.testing.assert_array_equal(counted, mask & ended[..., None])


def test_detail_12_the_last_token_of_a_truncated_response_is_the_one_that_was_drawn():
    """A response with the same random numbers and more room goes on after the same tokens."""
    long, short = (
        draw(replace(CONFIG, max_new_tokens=size), POLICY, jax.random.key(2), PARAMS, prompts())
        for size in (NUM_NEW, 2)
    )
    np.testing.assert_array_equal(written_of(short), written_of(long)[..., :2])
    truncated = np.asarray(long.response_mask)[..., 2]
    assert truncated.any()
    assert (written_of(short)[truncated][:, -1] != END).all()


def test_detail_12_a_text_that_is_cut_has_no_end_token():
    class Characters:
        eos_token_id = END

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            del add_special_tokens
            return [ord(each) for each in text]

    pair = Preference(prompt="p", chosen="abc", rejected="d")
    with pytest.warns(UserWarning, match="1 responses their end"):
        cut = preference_tokens.encode([pair], Characters(), response_length=3)
    assert written_of(cut)[0, 0].tolist() == [ord(each) for each in "abc"]
    assert written_of(cut)[0, 1][:2].tolist() == [ord("d"), END]
    # Padding is the end token here, and the one that ends the text still counts.
    np.testing.assert_array_equal(cut.response_mask[0], [[1, 1, 1], [1, 1, 0]])
