"""Token MDPs as others see them: a table, sampled rows, a batch, an MDP, an environment."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import checks
from jaxrl_llm.agents import ppo
from jaxrl_llm.envs import token_mdp
from jaxrl_llm.kernels import bellman
from jaxrl_llm.lm.likelihood import response_likelihood
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.nn.heads import TabularActorCritic
from tests.envs.test_token_mdp import (
    SIZES,
    brute_force_responses,
    conditional_log_probability,
    make_random,
    random_logits,
    random_policy,
    tabular_log_probability,
)
from tests.lm import tiny

pytestmark = pytest.mark.slow

quick_compilation = pytest.fixture(scope="module", autouse=True)(tiny.quick_compilation)

evaluate = jax.jit(bellman.policy_evaluation)


# Policies by a table


@pytest.mark.parametrize(("vocab_size", "length", "end_token"), SIZES)
def test_tabular_log_probability_is_the_product_along_the_response(vocab_size, length, end_token):
    mdp = make_random(vocab_size, length, end_token)
    logits = random_logits(mdp)
    rows = brute_force_responses(vocab_size, length, end_token)
    prefixes = sorted({row[:n] for row in rows for n in range(len(row))}, key=lambda p: (len(p), p))
    table = np.asarray(logits, np.float64)
    table -= np.log(np.exp(table).sum(axis=-1, keepdims=True))
    expected = np.zeros((2, len(rows), length))
    for y, row in enumerate(rows):
        for t, token in enumerate(row):
            expected[:, y, t] = table[:, prefixes.index(row[:t]), token]
    by_token = token_mdp.tabular_token_log_probability(mdp, logits)
    np.testing.assert_allclose(by_token, expected, rtol=0, atol=1e-5)
    whole = tabular_log_probability(mdp, logits)
    np.testing.assert_allclose(whole, expected.sum(axis=-1), rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.exp(whole).sum(axis=-1), 1, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("vocab_size", "length", "end_token"), SIZES)
def test_conditional_log_probability_inverts_the_table(vocab_size, length, end_token, x64):
    mdp = make_random(vocab_size, length, end_token)
    logits = random_logits(mdp)
    recovered = conditional_log_probability(mdp, tabular_log_probability(mdp, logits))
    np.testing.assert_allclose(recovered, jax.nn.log_softmax(logits), rtol=0, atol=1e-12)
    # Not only of laws that a table made, but of every law.
    law = random_policy(mdp)
    again = tabular_log_probability(mdp, conditional_log_probability(mdp, law))
    np.testing.assert_allclose(again, law, rtol=0, atol=1e-12)


def test_conditional_log_probability_is_uniform_where_never_reached():
    mdp = token_mdp.make(vocab_size=2, length=2, kl_coefficient=0.1)
    law = jnp.log(jnp.array([[0.25, 0.75, 0, 0]]))
    conditional = np.exp(conditional_log_probability(mdp, law))
    np.testing.assert_allclose(conditional[0], [[1, 0], [0.25, 0.75], [0.5, 0.5]], atol=1e-6)


# Sampled rows


@pytest.mark.parametrize(("vocab_size", "length", "end_token"), SIZES)
def test_response_index_finds_every_response(vocab_size, length, end_token):
    mdp = make_random(vocab_size, length, end_token)
    number = len(mdp.responses)
    # What a generator leaves after the end is not read.
    tokens = jnp.where(mdp.mask, mdp.responses, 1)
    find = jax.jit(token_mdp.response_index)
    index = find(mdp, tokens, mdp.mask)
    np.testing.assert_array_equal(index, np.arange(number))
    assert index.dtype == jnp.int32
    order = np.random.default_rng(0).permutation(number)[: number // 2 * 2].reshape(2, -1)
    grid = find(mdp, tokens[order], mdp.mask[order])
    np.testing.assert_array_equal(grid, order)
    one = token_mdp.response_index(mdp, tokens[1], mdp.mask[1])
    assert one.shape == ()
    assert int(one) == 1


@pytest.mark.parametrize(
    ("tokens", "mask"),
    [
        ([0, 0, 0], [0, 0, 0]),  # nothing
        ([0, 0, 0], [1, 1, 0]),  # no end
        ([2, 0, 0], [1, 1, 0]),  # more after the end
        ([0, 2, 0], [0, 1, 0]),  # a hole
        ([0, 0, 3], [1, 1, 1]),  # another vocabulary
    ],
)
def test_response_reward_of_what_is_no_response_is_nan(tokens, mask):
    mdp = make_random(3, 3, 2)
    row, kept = jnp.array(tokens), jnp.array(mask, bool)
    assert int(token_mdp.response_index(mdp, row, kept)) == len(mdp.responses)
    assert np.isnan(token_mdp.response_reward(mdp, jnp.int32(0), row, kept))


def test_response_reward_looks_up_prompt_and_response():
    mdp = make_random(3, 3, 2)
    prompt = jnp.array([[0], [1]])
    shape = mdp.reward.shape
    found = jax.jit(token_mdp.response_reward)(
        mdp,
        jnp.broadcast_to(prompt, shape),
        jnp.broadcast_to(mdp.responses[None], (*shape, 3)),
        jnp.broadcast_to(mdp.mask[None], (*shape, 3)),
    )
    np.testing.assert_array_equal(found, mdp.reward)


@pytest.mark.parametrize(("vocab_size", "length", "end_token"), SIZES)
def test_prefix_index_numbers_prefixes_by_length_and_order(vocab_size, length, end_token):
    mdp = make_random(vocab_size, length, end_token)
    rows = brute_force_responses(vocab_size, length, end_token)
    prefixes = {row[:n] for row in rows for n in range(len(row))}
    order = sorted(prefixes, key=lambda prefix: (len(prefix), prefix))
    index = token_mdp.prefix_index(mdp, mdp.responses, mdp.mask)
    for row, found in zip(rows, np.asarray(index), strict=True):
        expected = [order.index(row[:n]) for n in range(len(row))]
        np.testing.assert_array_equal(found, expected + [0] * (length - len(row)))


# Other forms of the same problem


def test_all_responses_is_a_batch_of_rows():
    mdp = make_random(3, 2, 0)
    batch = token_mdp.all_responses(mdp)
    num_prompts, num_responses = mdp.reward.shape
    assert batch.prompt_length == 1
    assert batch.tokens.shape == batch.attention_mask.shape == (num_prompts, num_responses, 3)
    for prompt, response in np.ndindex(num_prompts, num_responses):
        row = batch.tokens[prompt, response]
        np.testing.assert_array_equal(row, [prompt, *mdp.responses[response]])
        kept = mdp.mask[response]
        np.testing.assert_array_equal(batch.attention_mask[prompt, response], [True, *kept])
        np.testing.assert_array_equal(batch.response_mask[prompt, response], kept)
    np.testing.assert_array_equal(batch.score, mdp.reward)


@pytest.mark.slow
def test_all_responses_make_a_policy_of_a_language_model():
    mdp = make_random(3, 2, 0)
    batch = token_mdp.all_responses(mdp)
    shape = dataclasses.replace(tiny.SHAPE, vocab_size=mdp.vocab_size, pad_token_id=token_mdp.PAD)
    model = GPT2(shape)
    params = jax.jit(model.init)(jax.random.key(0), batch.tokens[0])["params"]

    def policy(params):
        found = response_likelihood(model, params, batch)
        return jnp.sum(found.log_probability, axis=-1)

    law = jax.jit(policy)(params)
    np.testing.assert_allclose(np.exp(law).sum(axis=1), 1, rtol=0, atol=1e-6)
    gradients = jax.jit(
        lambda params: (
            token_mdp.exact_gradient(mdp, policy, params),
            jax.grad(lambda params: token_mdp.exact_objective(mdp, policy(params)))(params),
        )
    )(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), *gradients)
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradients[0])) > 1e-3


@pytest.mark.parametrize(("vocab_size", "length", "end_token"), SIZES)
def test_to_mdp_values_a_table_as_exact_reward_does(vocab_size, length, end_token, x64):
    mdp = make_random(vocab_size, length, end_token)
    problem = checks.mdp(token_mdp.to_mdp(mdp))
    assert problem.num_states == 2 * mdp.num_prefixes + 1
    logits = random_logits(mdp)
    policy = jax.nn.softmax(logits).reshape(-1, vocab_size)
    policy = jnp.concatenate([policy, jnp.full((1, vocab_size), 1 / vocab_size)])
    solution = evaluate(problem, policy)
    exact = token_mdp.exact_reward(mdp, tabular_log_probability(mdp, logits))
    assert bool(solution.converged)
    np.testing.assert_allclose(problem.initial @ solution.value, exact, rtol=0, atol=1e-10)


def test_to_mdp_has_the_best_response_as_its_optimum(x64):
    mdp = make_random(4, 3, 0, kl_coefficient=0.0)
    problem = token_mdp.to_mdp(mdp)
    solution = jax.jit(bellman.value_iteration)(problem)
    starts = solution.value[jnp.arange(2) * mdp.num_prefixes]
    np.testing.assert_allclose(starts, jnp.max(mdp.reward, axis=1), rtol=0, atol=1e-12)
    best = problem.initial @ solution.value
    np.testing.assert_allclose(best, token_mdp.exact_optimum(mdp).objective, rtol=1e-12)


def test_environment_pays_the_reward_of_the_response_it_is_told():
    mdp = make_random(3, 3, 2)
    environment = token_mdp.environment(mdp)
    step = jax.jit(environment.step)
    key = jax.random.key(0)
    for prompt, response in np.ndindex(*mdp.reward.shape):
        state = jnp.int32(prompt * mdp.num_prefixes)
        tokens = mdp.responses[response][mdp.mask[response]]
        prefix = token_mdp.prefix_index(mdp, mdp.responses[response], mdp.mask[response])
        for place, token in enumerate(tokens):
            assert int(state) == prompt * mdp.num_prefixes + int(prefix[place])
            state, time_step = step(jax.random.clone(key), state, token, environment.default_params)
            is_last = place == len(tokens) - 1
            assert bool(time_step.terminated) == is_last
            expected = mdp.reward[prompt, response] if is_last else 0
            np.testing.assert_allclose(time_step.reward, expected, rtol=1e-6)


def test_environment_draws_the_prompt():
    mdp = make_random(3, 2, None)
    environment = token_mdp.environment(mdp)
    keys = jax.random.split(jax.random.key(1), 20_000)
    states, _ = jax.vmap(environment.reset, in_axes=(0, None))(keys, environment.default_params)
    counts = np.bincount(states, minlength=2 * mdp.num_prefixes + 1)
    expected = len(keys) * np.asarray(mdp.prompt_probability)
    drawn = counts[[0, mdp.num_prefixes]]
    assert drawn.sum() == len(keys)
    assert abs(drawn[0] - expected[0]) < 4 * np.sqrt(expected[0] * expected[1] / len(keys))


@pytest.mark.slow
def test_ppo_comes_within_two_percent_of_the_best_reward():
    mdp = make_random(3, 3, 2, kl_coefficient=0.0)
    environment = token_mdp.environment(mdp)
    config = ppo.Config(
        num_environments=16,
        num_steps=32,
        num_iterations=100,
        learning_rate=0.05,
        gamma=1.0,
        entropy_coefficient=0.0,
        value_clip_epsilon=None,
    )
    network = TabularActorCritic(2 * mdp.num_prefixes + 1, mdp.vocab_size)
    algorithm = ppo.make(config, environment, network)

    @jax.jit
    def train(key):
        init_key, steps_key = jax.random.split(key)
        keys = jax.random.split(steps_key, config.num_iterations)
        return jax.lax.scan(lambda s, k: algorithm.step(k, s), algorithm.init(init_key), keys)[0]

    table = train(jax.random.key(0)).train.params["params"]["actor"]["policy"]["table"]
    logits = table[:-1].reshape(2, mdp.num_prefixes, mdp.vocab_size)
    learned = tabular_log_probability(mdp, logits)
    start = tabular_log_probability(mdp, jnp.zeros_like(logits))
    assert float(token_mdp.relative_gap(mdp, learned, start)) < 0.02
