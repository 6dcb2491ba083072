"""Curiosity: what normalises its reward, and that the reward falls where observations repeat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.nn import random_network_distillation as distillation
from jaxrl_llm.types import Box, Discrete, Hybrid

SPACE = Box(shape=(2, 3), low=-1.0, high=1.0)
NUM_ENVIRONMENTS = 4


@pytest.fixture(scope="module")
def params():
    observation = jnp.zeros(SPACE.shape)
    return distillation.init(jax.random.key(0), SPACE, observation, NUM_ENVIRONMENTS)[0]


@pytest.fixture(scope="module")
def novelty():
    observation = jnp.zeros(SPACE.shape)
    return distillation.init(jax.random.key(0), SPACE, observation, NUM_ENVIRONMENTS)[1]


def draw(seed, num_steps):
    random = np.random.default_rng(seed)
    return jnp.array(random.normal(3, 2, (num_steps, NUM_ENVIRONMENTS, 2, 3)), jnp.float32)


def test_features_are_one_hot_or_flat():
    index = distillation.features(Discrete(num=3), jnp.array([[2, 0]]))
    np.testing.assert_array_equal(index, [[[0, 0, 1], [1, 0, 0]]])
    flat = distillation.features(SPACE, jnp.arange(12.0).reshape(2, 2, 3))
    np.testing.assert_array_equal(flat, np.arange(12.0).reshape(2, 6))
    single = distillation.features(Box(shape=(), low=0.0, high=1.0), jnp.ones(4))
    assert single.shape == (4, 1)
    hybrid = Hybrid(num=2, amount=SPACE, has_amount=(True, True))
    with pytest.raises(ValueError, match=r"\Aspace is Hybrid; [^\n]+\Z"):
        distillation.features(hybrid, jnp.zeros(3))


@pytest.mark.slow
def test_reward_is_the_error_in_deviations_of_its_discounted_sums(novelty, params):
    """Two rollouts of 5 and 3 steps, with all that was seen kept in NumPy."""
    gamma, reward_of = 0.9, jax.jit(distillation.Novelty.reward, static_argnums=2)
    seen, sums, total = [], [], np.zeros(NUM_ENVIRONMENTS)
    for seed, num_steps in enumerate((5, 3)):
        observation = draw(seed, num_steps)
        novelty, arrival, reward = reward_of(novelty, params, SPACE, observation, gamma)
        rows = np.asarray(observation, np.float64).reshape(num_steps, NUM_ENVIRONMENTS, 6)
        seen.append(rows.reshape(-1, 6))
        every = np.concatenate(seen)
        expected = np.clip((rows - every.mean(axis=0)) / every.std(axis=0), -5, 5)
        np.testing.assert_allclose(arrival, expected, atol=1e-5)
        error = np.asarray(distillation.prediction_error(params, arrival), np.float64)
        for row in error:
            total = gamma * total + row
            sums.append(total)
        np.testing.assert_allclose(reward, error / np.std(sums), rtol=1e-4)
        np.testing.assert_allclose(novelty.discounted_sum, total, rtol=1e-5)


@pytest.mark.slow
def test_arrivals_are_clipped_at_five_deviations(novelty, params):
    outlier = draw(0, 40).at[7, 2, 1, 1].set(1e4)
    _, arrival, _ = novelty.reward(params, SPACE, outlier, jnp.float32(0.9))
    assert arrival.max() == distillation.MAX_DEVIATIONS


def test_predictor_learns_what_repeats_and_the_target_never_moves(params):
    known, unknown = (jnp.array(np.random.default_rng(s).normal(size=6)) for s in (0, 1))

    @jax.jit
    def learn(params):
        def body(params, _):
            slope = jax.grad(distillation.prediction_error)(params, known.astype(jnp.float32))
            return jax.tree.map(lambda leaf, change: leaf - 0.1 * change, params, slope), None

        return jax.lax.scan(body, params, length=200)[0]

    learned = learn(params)
    before, after = (
        [float(distillation.prediction_error(variables, x)) for x in (known, unknown)]
        for variables in (params, learned)
    )
    assert after[0] < 0.05 * before[0]
    assert after[1] > 0.2 * before[1]
    for leaf, before in zip(
        jax.tree.leaves(learned["target"]), jax.tree.leaves(params["target"]), strict=True
    ):
        np.testing.assert_array_equal(leaf, before)
