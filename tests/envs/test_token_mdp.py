"""The exact answers of token MDPs against brute force, autodiff and one another."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import token_mdp
from tests.lm import tiny

SIZES = [(2, 1, None), (2, 3, 0), (3, 2, None), (4, 4, 1)]

quick_compilation = pytest.fixture(scope="module", autouse=True)(tiny.quick_compilation)

# Each is one program rather than a dozen.
tabular_log_probability = jax.jit(token_mdp.tabular_log_probability)
conditional_log_probability = jax.jit(token_mdp.conditional_log_probability)
exact_objective = jax.jit(token_mdp.exact_objective)
exact_optimum = jax.jit(token_mdp.exact_optimum)


def brute_force_responses(vocab_size, length, end_token):
    """Every row of tokens up to the length, kept where it is complete, in lexicographic order."""
    rows = itertools.chain.from_iterable(
        itertools.product(range(vocab_size), repeat=n) for n in range(1, length + 1)
    )
    return sorted(
        row
        for row in rows
        if end_token not in row[:-1] and (len(row) == length or row[-1] == end_token)
    )


def make_random(
    vocab_size: int = 3,
    length: int = 3,
    end_token: int | None = 2,
    num_prompts: int = 2,
    kl_coefficient: float = 0.3,
    seed: int = 0,
) -> token_mdp.TokenMDP:
    sizes = vocab_size, length, end_token, num_prompts
    mdp = _make_random(sizes, seed, jnp.result_type(float))
    return dataclasses.replace(mdp, kl_coefficient=jnp.asarray(kl_coefficient, float))


@cache
def _make_random(sizes, seed, dtype):
    vocab_size, length, end_token, num_prompts = sizes
    generator = np.random.default_rng(seed + 100)
    num_continuing = vocab_size - (end_token is not None)
    num_prefixes = sum(num_continuing**n for n in range(length))
    return token_mdp.make(
        vocab_size=vocab_size,
        length=length,
        end_token=end_token,
        num_prompts=num_prompts,
        kl_coefficient=1.0,
        prompt_probability=generator.dirichlet(np.ones(num_prompts)),
        reference_logits=generator.normal(size=(num_prompts, num_prefixes, vocab_size)),
        seed=seed,
    )


def random_logits(mdp, seed=0, scale=1.0):
    shape = (mdp.num_prompts, mdp.num_prefixes, mdp.vocab_size)
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), float)


def random_policy(mdp, seed=0):
    return jax.nn.log_softmax(
        jnp.asarray(2 * np.random.default_rng(seed).normal(size=mdp.reward.shape), float)
    )


def host(mdp):
    """What the formulas read, as float64 on the host."""
    fields = mdp.prompt_probability, mdp.reward, mdp.reference_log_probability, mdp.kl_coefficient
    return [np.asarray(field, np.float64) for field in fields]


# The list of responses


@pytest.mark.parametrize(("vocab_size", "length", "end_token"), SIZES)
def test_make_lists_every_complete_response(vocab_size, length, end_token):
    mdp = token_mdp.make(
        vocab_size=vocab_size, length=length, end_token=end_token, kl_coefficient=0.1
    )
    listed = [
        tuple(row[kept].tolist())
        for row, kept in zip(np.asarray(mdp.responses), np.asarray(mdp.mask), strict=True)
    ]
    assert listed == brute_force_responses(vocab_size, length, end_token)
    assert not np.asarray(mdp.responses)[~np.asarray(mdp.mask)].any()
    np.testing.assert_array_equal(mdp.mask, np.sort(mdp.mask, axis=1)[:, ::-1])
    assert mdp.responses.dtype == jnp.int32
    assert mdp.num_prefixes == len({row[:n] for row in listed for n in range(len(row))})


def test_make_takes_a_reward_as_array_row_or_function():
    def function(prompt, response):
        return prompt + len(response) / 4

    options: Any = {"vocab_size": 3, "length": 2, "end_token": 0, "kl_coefficient": 0.0}
    by_function = token_mdp.make(function, **options, num_prompts=2)
    expected = [[k + len(row) / 4 for row in brute_force_responses(3, 2, 0)] for k in range(2)]
    np.testing.assert_array_equal(by_function.reward, expected)
    by_array = token_mdp.make(expected, **options, num_prompts=2)
    by_row = token_mdp.make(expected[0], **options, num_prompts=2)
    np.testing.assert_array_equal(by_array.reward, expected)
    np.testing.assert_array_equal(by_row.reward, [expected[0], expected[0]])


def test_make_draws_a_reward_from_the_seed():
    rewards = [
        token_mdp.make(vocab_size=2, length=2, kl_coefficient=0.1, seed=seed).reward
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(rewards[0], rewards[1])
    assert (rewards[0] != rewards[2]).all()


def test_make_makes_a_uniform_reference_by_default():
    mdp = token_mdp.make(vocab_size=3, length=3, end_token=1, kl_coefficient=0.1)
    lengths = np.asarray(mdp.mask).sum(axis=1)
    np.testing.assert_allclose(
        mdp.reference_log_probability[0], -lengths * np.log(3), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 5}, "vocab_size is 5 and length 3, which makes 125 responses; use at most"),
        ({"vocab_size": 5, "end_token": 0}, "5 and length 3, which makes 85 responses"),
        ({"length": 5}, "vocab_size is 3 and length 5, which makes 243 responses"),
        ({"vocab_size": 50257, "length": 1000}, "which makes inf responses"),
        ({"vocab_size": 1}, "vocab_size is 1; it must be at least 2"),
        ({"length": 0}, "length is 0; it must be at least 1"),
        ({"end_token": 3}, r"end_token is 3; it must be in \[0, 2\]"),
        ({"num_prompts": 4}, r"num_prompts is 4; it must be in \[1, 3\]"),
        ({"num_prompts": 0}, r"num_prompts is 0; it must be in \[1, 3\]"),
        ({"kl_coefficient": -0.1}, "kl_coefficient is -0.1; it must be at least 0"),
        ({"kl_coefficient": math.nan}, "kl_coefficient is nan; it must be finite"),
        ({"reward": np.ones(26)}, r"reward has shape \(26,\); it must broadcast to \(1, 27\)"),
        ({"reward": np.ones((2, 27))}, r"reward has shape \(2, 27\); it must"),
        ({"reward": lambda _, row: math.nan if row[0] else 1.0}, r"reward\[0, 9\] is nan; it must"),
        ({"reference_logits": np.ones((1, 12, 3))}, r"reference_logits has shape \(1, 12, 3\)"),
        ({"reference_logits": [0, -np.inf, 0]}, r"reference_logits\[0, 0, 1\] is -inf; it must be"),
        ({"prompt_probability": [0.5]}, "prompt_probability is .0.5.; it must be a law, with sum"),
    ],
)
def test_make_refuses(change, message):
    options: Any = {"vocab_size": 3, "length": 3, "kl_coefficient": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        token_mdp.make(**options)


# The objective


def test_exact_objective_equals_the_sum_over_responses(x64):
    mdp = make_random()
    law = random_policy(mdp)
    prompt_law, reward, reference, beta = host(mdp)
    expected_reward = expected_kl = 0.0
    for k, y in np.ndindex(*reward.shape):
        weight = prompt_law[k] * math.exp(law[k, y])
        expected_reward += weight * reward[k, y]
        expected_kl += weight * (float(law[k, y]) - reference[k, y])
    np.testing.assert_allclose(token_mdp.exact_reward(mdp, law), expected_reward, rtol=1e-12)
    np.testing.assert_allclose(token_mdp.exact_kl(mdp, law), expected_kl, rtol=1e-12)
    np.testing.assert_allclose(
        exact_objective(mdp, law), expected_reward - beta * expected_kl, rtol=1e-12
    )


def test_exact_objective_of_the_reference_is_its_reward():
    mdp = make_random()
    reference = mdp.reference_log_probability
    assert float(token_mdp.exact_kl(mdp, reference)) == 0
    assert exact_objective(mdp, reference) == token_mdp.exact_reward(mdp, reference)


def test_exact_objective_is_finite_where_the_policy_is_0():
    mdp = make_random()
    only = jnp.where(jnp.arange(mdp.reward.shape[1]) == 4, 0.0, -jnp.inf)
    law = jnp.broadcast_to(only[None], mdp.reward.shape)
    prompt_law, reward, reference, beta = host(mdp)
    expected = prompt_law @ (reward[:, 4] + beta * reference[:, 4])
    value, gradient = jax.value_and_grad(token_mdp.exact_objective, argnums=1)(mdp, law)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_exact_objective_under_jit_and_vmap_equals_eager():
    mdp = make_random()
    laws = jnp.stack([random_policy(mdp, seed) for seed in range(3)])
    loop = [token_mdp.exact_objective(mdp, law) for law in laws]
    batch = jax.jit(jax.vmap(token_mdp.exact_objective, in_axes=(None, 0)))(mdp, laws)
    np.testing.assert_allclose(batch, loop, rtol=1e-5)


# The optimum


@pytest.mark.parametrize("kl_coefficient", [1e-3, 0.3, 10.0])
def test_exact_optimum_is_the_tilted_reference(kl_coefficient, x64):
    mdp = make_random(kl_coefficient=kl_coefficient)
    prompt_law, reward, reference, beta = host(mdp)
    exponent = reference + reward / beta
    shift = exponent.max(axis=1, keepdims=True)
    log_z = (shift + np.log(np.exp(exponent - shift).sum(axis=1, keepdims=True)))[:, 0]
    optimum = exact_optimum(mdp)
    np.testing.assert_allclose(optimum.log_normaliser, log_z, rtol=1e-12)
    np.testing.assert_allclose(
        optimum.log_probability, exponent - log_z[:, None], rtol=1e-12, atol=1e-10
    )
    np.testing.assert_allclose(optimum.objective, prompt_law @ (beta * log_z), rtol=1e-12)
    attained = exact_objective(mdp, optimum.log_probability)
    np.testing.assert_allclose(attained, optimum.objective, rtol=1e-10)


@pytest.mark.parametrize("kl_coefficient", [0.01, 0.3, 10.0])
@pytest.mark.parametrize("seed", range(4))
def test_gap_is_the_divergence_from_the_optimum(seed, kl_coefficient, x64):
    """beta E log Z - J(pi) = beta KL(pi || pi*), for every pi."""
    mdp = make_random(seed=seed, kl_coefficient=kl_coefficient)
    optimum, law = exact_optimum(mdp), random_policy(mdp, seed)
    divergence = token_mdp.kl_divergence(mdp, law, optimum.log_probability)
    best = mdp.kl_coefficient * (mdp.prompt_probability @ optimum.log_normaliser)
    left = best - exact_objective(mdp, law)
    np.testing.assert_allclose(left, kl_coefficient * divergence, rtol=0, atol=1e-6)
    np.testing.assert_allclose(token_mdp.gap(mdp, law), left, rtol=0, atol=1e-12)
    assert float(left) > 0
    implicit = kl_coefficient * (optimum.log_probability - mdp.reference_log_probability)
    shifted = mdp.reward - kl_coefficient * optimum.log_normaliser[:, None]
    np.testing.assert_allclose(implicit, shifted, rtol=0, atol=1e-10)


def test_exact_optimum_without_penalty_keeps_the_reference_among_the_best(x64):
    reward = [[1.0, 3.0, 3.0, 0.0], [2.0, -1.0, 0.0, 1.0]]
    logits = np.random.default_rng(0).normal(size=(2, 3, 2))
    options: Any = {"vocab_size": 2, "length": 2, "num_prompts": 2, "reference_logits": logits}
    mdp = token_mdp.make(reward, kl_coefficient=0.0, **options)
    optimum = exact_optimum(mdp)
    reference = np.exp(mdp.reference_log_probability)
    ties = reference[0] * [0, 1, 1, 0]
    expected = [ties / ties.sum(), [1, 0, 0, 0]]
    np.testing.assert_allclose(np.exp(optimum.log_probability), expected, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(optimum.log_normaliser, [3, 2])
    assert float(optimum.objective) == 2.5
    assert abs(float(token_mdp.gap(mdp, optimum.log_probability))) < 1e-12
    near = token_mdp.make(reward, kl_coefficient=1e-3, **options)
    limit = exact_optimum(near)
    np.testing.assert_allclose(np.exp(limit.log_probability), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(1e-3 * limit.log_normaliser, [3, 2], rtol=0, atol=5e-3)


@pytest.mark.parametrize("kl_coefficient", [0.0, 1e-6])
def test_exact_optimum_is_accurate_in_float32(kl_coefficient):
    mdp = make_random(kl_coefficient=kl_coefficient)
    optimum = exact_optimum(mdp)
    best = mdp.prompt_probability @ jnp.max(mdp.reward, axis=1)
    np.testing.assert_allclose(optimum.objective, best, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.exp(optimum.log_probability).sum(axis=1), 1, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(
        jnp.argmax(optimum.log_probability, axis=1), jnp.argmax(mdp.reward, axis=1)
    )


def test_exact_optimum_over_a_batch_of_coefficients_equals_a_loop():
    mdp = make_random()

    def optimum(beta):
        return exact_optimum(dataclasses.replace(mdp, kl_coefficient=beta))

    coefficients = jnp.array([0.0, 0.1, 1.0])
    batch = jax.jit(jax.vmap(optimum))(coefficients)
    for place, beta in enumerate(coefficients):
        one = optimum(beta)
        jax.tree.map(
            lambda many, single, place=place: np.testing.assert_allclose(
                many[place], single, rtol=1e-4, atol=1e-6
            ),
            batch,
            one,
        )


def test_relative_gap_is_a_share_of_the_start():
    mdp = make_random()
    start = mdp.reference_log_probability
    optimum = exact_optimum(mdp).log_probability
    law = random_policy(mdp)
    expected = token_mdp.gap(mdp, law) / token_mdp.gap(mdp, start)
    np.testing.assert_allclose(token_mdp.relative_gap(mdp, law, start), expected, rtol=1e-6)
    assert float(token_mdp.relative_gap(mdp, start, start)) == 1
    assert abs(float(token_mdp.relative_gap(mdp, optimum, start))) < 1e-5


# The gradient


def compare_gradients(mdp, tolerance):
    other = random_logits(mdp, 7)

    def policy(params):
        mixed = params["logits"] + jnp.tanh(params["scale"]) * other
        return tabular_log_probability(mdp, mixed)

    params = {"logits": random_logits(mdp, 3), "scale": jnp.asarray(0.5, float)}
    exact = jax.jit(lambda p: token_mdp.exact_gradient(mdp, policy, p))(params)
    automatic = jax.jit(jax.grad(lambda p: token_mdp.exact_objective(mdp, policy(p))))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), exact, automatic
    )
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(exact)) > 1e-2


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.3, 5.0])
def test_exact_gradient_equals_autodiff_in_float64(kl_coefficient, x64):
    compare_gradients(make_random(kl_coefficient=kl_coefficient), 1e-10)


@pytest.mark.parametrize(("vocab_size", "length", "end_token"), SIZES)
def test_exact_gradient_equals_autodiff_in_float32(vocab_size, length, end_token):
    compare_gradients(make_random(vocab_size, length, end_token), 1e-6)


def test_exact_gradient_is_0_at_the_optimum(x64):
    mdp = make_random()
    logits = conditional_log_probability(mdp, exact_optimum(mdp).log_probability)
    policy = partial(tabular_log_probability, mdp)
    np.testing.assert_allclose(token_mdp.exact_gradient(mdp, policy, logits), 0, atol=1e-12)


def test_exact_gradient_is_finite_where_the_policy_is_0():
    mdp = make_random()
    forbidden = random_logits(mdp).at[:, 0, 1].set(-jnp.inf)
    policy = partial(tabular_log_probability, mdp)
    gradient = token_mdp.exact_gradient(mdp, policy, forbidden)
    automatic = jax.grad(lambda p: exact_objective(mdp, policy(p)))(forbidden)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient, automatic, rtol=0, atol=1e-5)


def test_exact_gradient_is_the_mean_of_single_responses(x64):
    """E[(r - beta log ratio - b) d log pi], one response after the other, whatever the b."""
    mdp = make_random(vocab_size=2, length=2, end_token=None, num_prompts=1)
    logits = random_logits(mdp)
    policy = partial(tabular_log_probability, mdp)
    total = np.zeros(logits.shape)
    law = policy(logits)
    slopes = jax.jit(jax.jacrev(policy))(logits)[0]
    for y, slope in enumerate(slopes):
        ratio = law[0, y] - mdp.reference_log_probability[0, y]
        worth = mdp.reward[0, y] - mdp.kl_coefficient * ratio - 17.0
        total += np.exp(law[0, y]) * worth * np.asarray(slope)
    np.testing.assert_allclose(token_mdp.exact_gradient(mdp, policy, logits), total, atol=1e-12)
