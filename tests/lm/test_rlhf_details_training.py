"""Details 23 to 29 of RLHF: what is random, how heads start, Adam steps and metrics count.

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

from jaxrl_llm.data.tokens import next_token_targets
from jaxrl_llm.lm import best_of_n, optimizer, policy_step, ppo, reward, rloo
from jaxrl_llm.lm.likelihood import token_likelihood
from jaxrl_llm.lm.rewards import of_function, of_model
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.nn.reward_model import RewardModel, from_language_model
from jaxrl_llm.training import loop
from jaxrl_llm.types import TokenBatch
from tests.lm import preference_pairs
from tests.lm.policy_learning import POLICY, POLICY_SHAPE, REWARD, TARGET, VOCABULARY, prompts
from tests.lm.rlhf_details import (
    ALGORITHMS,
    BETA,
    CONFIG,
    PARAMS,
    PPO,
    REFERENCE,
    RLOO,
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
from tests.lm.tiny import CONTEXT, END, PADDING
from tests.nn.tiny_gpt2 import random_params

# Whole iterations, and laws over many draws: minutes of compilation.
pytestmark = pytest.mark.slow

DROPPING = GPT2(
    replace(POLICY_SHAPE, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), value_width=8
)
LOSS = partial(ppo.loss, PPO, POLICY, REFERENCE, BETA)


def fingerprint(responses: Any) -> Any:
    """A number that no other response has, `[G, K]`."""
    written = responses.tokens[..., responses.prompt_length :]
    digits = jnp.where(responses.response_mask, written + 1, 0)
    return digits @ (VOCABULARY + 1) ** jnp.arange(digits.shape[-1])


FINGERPRINT = of_function(lambda responses: -fingerprint(responses))


@pytest.fixture(scope="module")
def responses() -> Any:
    drawn = collect(CONFIG, POLICY, REWARD, jax.random.key(0), state(), task(reference=REFERENCE))
    assert drawn.responses.response_mask.mean() < 0.85
    return drawn.responses


def test_detail_23_nothing_drops_out_of_rollout_scoring_and_update(responses):
    dropped = collect(
        CONFIG, DROPPING, REWARD, jax.random.key(0), state(), task(reference=REFERENCE)
    )
    np.testing.assert_array_equal(dropped.responses.tokens, responses.tokens)
    # Another program rounds otherwise; what dropped out would differ in the first digit.
    chex.assert_trees_all_close(dropped.responses, responses, atol=1e-5)
    # Another key draws other tokens, by the same law.
    other = collect(
        CONFIG, DROPPING, REWARD, jax.random.key(4), state(), task(reference=REFERENCE)
    ).responses
    assert (other.tokens != responses.tokens).any()
    scored = score(POLICY, PARAMS, other, temperature=TEMPERATURE).log_probability
    np.testing.assert_allclose(other.log_probability, scored, atol=2e-5)
    chex.assert_trees_all_close(
        learn("ppo", DROPPING, responses), learn("ppo", POLICY, responses), atol=1e-5, rtol=1e-4
    )
    # The same model does drop out where it is told to.
    rows = TokenBatch(
        tokens=responses.tokens[:, 0],
        attention_mask=responses.attention_mask[:, 0],
        response_mask=responses.attention_mask[:, 0],
    )
    told = jax.jit(lambda key: token_likelihood(DROPPING, PARAMS, rows, dropout_key=key))
    first, second = (told(jax.random.key(seed)).log_probability for seed in (6, 7))
    assert np.abs(first - second).max() > 0.1


def test_detail_24_every_iteration_and_every_sample_draws_anew():
    """A policy that hardly learns answers one prompt, through the loop that trains."""
    one = jax.tree.map(lambda leaf: jnp.repeat(leaf[2:3], CONFIG.num_prompts, axis=0), prompts())
    slow = replace(optimizer.ADAM, learning_rate=1e-12)
    config = replace(RLOO, num_iterations=2, update=replace(RLOO.update, optimizer=slow))
    algorithm = rloo.make(config, POLICY, FINGERPRINT)
    seen: list[Any] = []
    loop.run(
        algorithm,
        jax.random.key(8),
        num_steps=2,
        chunk_steps=1,
        state=rloo.start(config, PARAMS, jax.random.key(5), FINGERPRINT),
        data=replace(task(), prompts=one),
        report=lambda step, metrics, state: seen.append(metrics["score"]),
    )
    first, second = seen
    assert first != second
    drawn = draw(CONFIG, POLICY, jax.random.key(9), PARAMS, one)
    assert len(np.unique(fingerprint(drawn))) > CONFIG.num_prompts // 2


def test_detail_25_the_heads_of_a_reward_model_start_with_deviation_one_over_root_d_plus_one():
    """So narrow a model tells 1 / sqrt(d + 1) from 1 / sqrt(d), and both from 0.02."""
    shape = replace(POLICY_SHAPE, n_embd=4)
    language, model = GPT2(shape), RewardModel(shape)
    params = random_params(language)
    keys = jax.random.split(jax.random.key(0), 1000)
    drawn = jax.vmap(partial(from_language_model, model, params))(keys)
    for head in ("overall", "by_criterion"):
        kernel = np.asarray(drawn[head]["kernel"])
        assert kernel.std() == pytest.approx(1 / np.sqrt(5), rel=0.04)
        assert abs(kernel.mean()) < 0.03
        assert (np.asarray(drawn[head]["bias"]) == 0).all()
    assert (np.asarray(drawn["gain"]) == 1).all()
    assert (np.asarray(drawn["bias"]) == 0).all()


def test_detail_25_every_value_starts_at_zero(responses):
    start: Any = jax.jit(ppo.make(PPO, POLICY, REWARD).init)(jax.random.key(1))
    head = start.train.params["value_head"]
    assert all((np.asarray(leaf) == 0).all() for leaf in head["value"].values())
    assert (np.asarray(head["hidden"]["kernel"]) != 0).any()
    seen = score(POLICY, start.train.params, responses, temperature=TEMPERATURE)
    assert (np.asarray(seen.value) == 0).all()
    # The head of other params does say something.
    seen = score(POLICY, PARAMS, responses, temperature=TEMPERATURE)
    assert np.abs(seen.value).max() > 0.01


def test_detail_26_gain_and_bias_give_reference_samples_mean_zero_and_deviation_one():
    model, samples = preference_pairs.MODEL, preference_pairs.PAIRS
    params = random_params(model)
    params = {**params, "gain": np.float32(3), "bias": np.float32(-7)}
    before = reward.score_all(model, params, samples)
    scaled = reward.normalise(params, before.overall)
    # What the policy is rewarded by, not only what evaluation prints.
    after = jax.jit(of_model(model, ("overall", "safety")).score)(scaled, samples)
    overall = np.asarray(after[..., 0], np.float64)
    assert abs(before.overall.mean()) > 1
    assert overall.mean() == pytest.approx(0, abs=1e-5)
    assert overall.std() == pytest.approx(1, rel=1e-5)
    correlation = np.corrcoef(overall.ravel(), before.overall.ravel())[0, 1]
    assert correlation == pytest.approx(1, abs=1e-5)
    # Criteria are probabilities, and stay as they are.
    np.testing.assert_allclose(after[..., 1], before.criteria[..., 0], atol=1e-6)


def test_detail_27_adam_has_epsilon_1e_5_and_a_rate_that_falls_to_zero():
    """Three steps and then none, by the formulas; the first gradient is 3 epsilon."""
    config = replace(optimizer.ADAM, learning_rate=0.3)
    gradients = np.array([[3e-5, 0.6], [1e-5, -0.8], [-2e-5, 0.1], [1e-5, 0.3]])
    train = optimizer.start(config, 3, {"trunk": {"weight": jnp.array([[1.0, -1.0]])}})
    step = jax.jit(partial(optimizer.descend, config, 3))
    expected = np.array([1.0, -1.0])
    first = second = np.zeros(2)
    for t, g in enumerate(gradients):
        train, norm = step(train, {"trunk": {"weight": jnp.asarray(g[None], jnp.float32)}})
        first, second = 0.9 * first + 0.1 * g, 0.95 * second + 0.05 * g**2
        m, v = first / (1 - 0.9 ** (t + 1)), second / (1 - 0.95 ** (t + 1))
        rate = 0.3 * max(1 - t / 3, 0)
        expected = expected - rate * m / (np.sqrt(v) + 1e-5)
        found = np.asarray(train.params["trunk"]["weight"])[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert float(norm.mean) == pytest.approx(np.hypot(*g), rel=1e-5)
        if t == 0:
            # 3e-5 / (3e-5 + 1e-5) is 0.75 of the rate; with an epsilon of 1e-8 it is all of it.
            assert found[0] == pytest.approx(1 - 0.75 * 0.3, rel=1e-5)
    assert int(train.step) == 4


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_detail_28_no_metric_and_no_gradient_depends_on_padding(algorithm, responses):
    wide = padded(responses, left=2, right=3, token=PADDING)
    assert wide.tokens.shape[-1] == CONTEXT
    tight, found = (learn(algorithm, POLICY, each) for each in (responses, wide))
    assert tight[1].keys() > {"loss"}
    # The greatest element is what the rounding of the others is to be measured by.
    greatest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tight[0]))
    chex.assert_trees_all_close(found, tight, rtol=1e-4, atol=1e-5 * max(greatest, 1))


def test_detail_28_the_early_stop_sees_the_kl_of_tokens_alone(responses):
    """With padding counted in, the mean would be below the target, and the steps be taken."""
    now = score(POLICY, PARAMS, responses, temperature=TEMPERATURE)
    stored = with_stored(responses, log_probability=now.log_probability + 0.1)
    kl = np.exp(-0.1) - 0.9
    config = policy_step.Config(num_minibatches=2, target_kl=0.9 * kl)
    fit = jax.jit(partial(policy_step.fit, config, 1, LOSS, ppo.weigh))
    tight, wide = (ppo.as_batch(PPO, padded(stored, right=right), BETA, None) for right in (0, 3))
    after, metrics = fit(jax.random.key(2), optimizer.start(config.optimizer, 2, PARAMS), wide)
    assert float(metrics["policy_kl"].mean) == pytest.approx(kl, rel=1e-3)
    assert float(metrics["stopped"].mean) == 1
    chex.assert_trees_all_equal(after.params, PARAMS)
    variances = [float(ppo.explained_variance(each)) for each in (tight, wide)]
    assert variances[0] == pytest.approx(variances[1], rel=1e-4)


def test_detail_29_rejection_sampling_trains_on_the_truncated_text_that_it_scored():
    config = replace(CONFIG, num_samples=4)
    candidates = jax.jit(best_of_n.draw, static_argnums=(0, 1, 2))(
        config, POLICY, FINGERPRINT, jax.random.key(10), PARAMS, task()
    )
    assert candidates.score is not None
    corpus = best_of_n.as_corpus(candidates)
    targets, counted = next_token_targets(corpus)
    best = np.asarray(candidates.score).max(axis=1)
    lengths = set()
    for row, kept in enumerate(best):
        learnt = np.asarray(targets)[row][np.asarray(counted)[row]]
        lengths.add(len(learnt))
        assert ((learnt + 1) * (VOCABULARY + 1) ** np.arange(len(learnt))).sum() == -kept
        assert END not in learnt[:-1].tolist()
    assert len(lengths) > 1
    # What stands after the end is neither scored nor learnt.
    mask = np.asarray(candidates.response_mask)
    tail = np.where(mask, candidates.tokens[..., candidates.prompt_length :], TARGET)
    scrambled = replace(
        candidates, tokens=candidates.tokens.at[..., candidates.prompt_length :].set(tail)
    )
    np.testing.assert_array_equal(-fingerprint(scrambled), candidates.score)
    again, counted_again = next_token_targets(best_of_n.as_corpus(scrambled))
    np.testing.assert_array_equal(counted_again, counted)
    np.testing.assert_array_equal(np.where(counted, again, 0), np.where(counted, targets, 0))
