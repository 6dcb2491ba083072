"""Advantages within a group against NumPy, and their bias by enumeration."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import preferences


@pytest.mark.parametrize("size", [2, 5])
def test_group_advantages_equal_their_equations(size, x64):
    score = np.random.default_rng(size).normal(size=size)
    centred = score - score.mean()
    actual = preferences.grpo_advantage(jnp.array(score))
    np.testing.assert_allclose(actual, centred / (score.std(ddof=1) + 1e-4), rtol=1e-12)
    actual = preferences.grpo_advantage(jnp.array(score), scale=False)
    np.testing.assert_allclose(actual, centred, rtol=1e-12, atol=1e-15)
    others = [np.delete(score, i).mean() for i in range(size)]
    actual = preferences.rloo_advantage(jnp.array(score))
    np.testing.assert_allclose(actual, score - others, rtol=1e-12)


ADVANTAGES = {
    "grpo": preferences.grpo_advantage,
    "dr_grpo": partial(preferences.grpo_advantage, scale=False),
    "rloo": preferences.rloo_advantage,
}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_group_advantages_add_up_to_nothing_and_ignore_a_constant(name):
    function = ADVANTAGES[name]
    score = jnp.array([0.5, -1.0, 2.0, 0.25])
    advantage = function(score)
    np.testing.assert_allclose(jnp.sum(advantage), 0, atol=1e-5)
    np.testing.assert_allclose(function(score + 64), advantage, rtol=1e-5)
    np.testing.assert_array_equal(function(jnp.full(4, 3.0)), np.zeros(4))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_group_advantages_under_jit_and_vmap(name):
    function = ADVANTAGES[name]
    score = jnp.array(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    loop = jnp.stack([function(row) for row in score])
    np.testing.assert_allclose(jax.jit(jax.vmap(function))(score), loop, rtol=1e-5)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_group_advantages_of_extreme_and_equal_scores_stay_finite(name):
    function = ADVANTAGES[name]
    slope = jax.jit(jax.jacrev(function))
    for score in (jnp.array([-1e4, 1e4, 0.0]), jnp.zeros(3), jnp.full(3, 1e4)):
        assert np.isfinite(function(score)).all()
        assert np.isfinite(slope(score)).all()


@pytest.mark.parametrize("name", ADVANTAGES)
def test_group_advantages_refuse_a_group_of_one(name):
    with pytest.raises(ValueError, match="score has 1 response; a group needs at least 2"):
        jax.jit(ADVANTAGES[name])(jnp.ones(1))


@pytest.mark.slow
def test_rloo_advantage_has_no_bias_and_grpo_advantage_has(x64):
    """Enumerates every group of 3 draws from a softmax policy over 3 responses."""
    logits, reward = jnp.array([0.2, -0.4, 0.9]), jnp.array([1.0, 0.0, 3.0])
    log_pi = jax.nn.log_softmax(logits)
    scores = jax.jacobian(jax.nn.log_softmax)(logits)
    groups = jnp.array(list(itertools.product(range(3), repeat=3)))
    probability = jnp.exp(jnp.sum(log_pi[groups], axis=-1))

    def expected_gradient(advantage):
        per_group = jax.vmap(lambda group: advantage(reward[group]) @ scores[group] / 3)(groups)
        return probability @ per_group

    exact = jax.grad(lambda logits: jax.nn.softmax(logits) @ reward)(logits)
    np.testing.assert_allclose(expected_gradient(preferences.rloo_advantage), exact, atol=1e-14)
    unscaled = expected_gradient(partial(preferences.grpo_advantage, scale=False))
    np.testing.assert_allclose(unscaled, 2 / 3 * exact, atol=1e-14)
    scaled = expected_gradient(preferences.grpo_advantage)
    assert np.abs(scaled / exact - (scaled / exact)[0]).max() > 0.01
