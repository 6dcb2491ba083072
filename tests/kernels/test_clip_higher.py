"""The clip range with two ends of DAPO."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import policy_gradient

CLIPPED = {
    "clip": policy_gradient.ppo_clip_loss,
    "dual_clip": partial(policy_gradient.ppo_dual_clip_loss, dual_clip=3.0),
}
RATIO, ADVANTAGE = (
    jnp.asarray(x.ravel(), jnp.float32)
    for x in np.meshgrid([0.1, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 5.0], [-2.0, 0.0, 1.5])
)


def loss_of(name: str, **options: float):
    old = jnp.full(RATIO.shape, -3.0)
    return lambda log_probability: CLIPPED[name](
        log_probability, old, ADVANTAGE, clip_epsilon=0.2, **options
    )


LOG_PROBABILITY = jnp.log(RATIO) - 3


@pytest.mark.parametrize("name", CLIPPED)
def test_clip_epsilon_high_moves_the_upper_end_alone(name):
    actual = loss_of(name, clip_epsilon_high=0.28)(LOG_PROBABILITY)
    ratio, advantage = np.asarray(RATIO), np.asarray(ADVANTAGE)
    gain = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.28) * advantage)
    if name == "dual_clip":
        gain = np.where(advantage < 0, np.maximum(gain, 3 * advantage), gain)
    np.testing.assert_allclose(actual, -gain, rtol=1e-5, atol=1e-6)
    assert (np.asarray(loss_of(name)(LOG_PROBABILITY)) != np.asarray(actual)).any()


@pytest.mark.parametrize("name", CLIPPED)
def test_clip_epsilon_high_is_clip_epsilon_where_it_is_none(name):
    for high in (None, 0.2):
        options = {} if high is None else {"clip_epsilon_high": high}
        actual = loss_of(name, **options)(LOG_PROBABILITY)
        np.testing.assert_array_equal(actual, loss_of(name)(LOG_PROBABILITY))


@pytest.mark.parametrize("name", CLIPPED)
def test_clip_epsilon_high_lets_a_gain_go_on_up_to_it(name):
    loss = loss_of(name, clip_epsilon_high=0.28)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(loss(x))))(LOG_PROBABILITY)
    gaining = (ADVANTAGE > 0) & (RATIO < 1.28)
    expected = jnp.where(ADVANTAGE > 0, jnp.where(gaining, -RATIO * ADVANTAGE, 0), gradient)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    assert gradient[(RATIO > 1.2) & (RATIO < 1.28) & (ADVANTAGE > 0)].all()


def test_clip_epsilon_high_under_jit_and_vmap():
    loss = partial(policy_gradient.ppo_clip_loss, clip_epsilon=0.2, clip_epsilon_high=0.28)
    inputs = LOG_PROBABILITY, jnp.full(RATIO.shape, -3.0), ADVANTAGE
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(*inputs), loss(*inputs), rtol=1e-6)
