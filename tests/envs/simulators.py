"""What every simulator of patients promises, checked by the tests of each."""

from __future__ import annotations

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.envs import core
from jaxrl_llm.types import Discrete


def varied_actions(space, num_steps, num_patients):
    """`[T, B, ...]`: at random, at random among the extremes, and constant at each extreme."""
    generator = np.random.default_rng(0)
    if isinstance(space, Discrete):
        actions = generator.integers(space.num, size=(num_steps, num_patients))
        constant = np.arange(num_patients // 2) % space.num
        actions[:, : num_patients // 2] = constant
        return jnp.asarray(actions, jnp.int32)
    low, high = (np.broadcast_to(bound, space.shape) for bound in (space.low, space.high))
    share = generator.random((num_steps, num_patients, *space.shape))
    share[:, : num_patients // 2] = share[:, : num_patients // 2].round()
    share[:, : num_patients // 4] = share[0, : num_patients // 4]
    share[:, 0], share[:, 1] = 0, 1
    return jnp.asarray(low + (high - low) * share, jnp.float32)


def assert_sound(environment, *, max_steps, num_patients=64):
    """Two episodes and a bit of every kind of action; returns the `Transition`."""
    num_steps = 2 * max_steps + 3
    actions = varied_actions(environment.action_space, num_steps, num_patients)

    @jax.jit
    def collect(running):
        return core.rollout(
            environment,
            lambda noise, observation, mask: (noise, {}),
            jax.random.key(1),
            running,
            num_steps=num_steps,
            noise=actions,
        )

    start = core.start_batch(environment, jax.random.key(0), num_patients)
    running, batch = jax.tree.map(np.asarray, collect(start))
    space = environment.observation_space
    for observation in (batch.observation, batch.next_observation, running.observation):
        assert observation.shape[-1:] == space.shape
        assert observation.dtype == np.float32
        assert np.isfinite(observation).all()
        assert (observation >= space.low).all()
        assert (observation <= space.high).all()
    assert batch.reward.dtype == np.float32
    assert np.isfinite(batch.reward).all()
    # A time limit truncates, at the limit and nowhere else; death is not a timeout.
    length = batch.extras["episode_length"]
    np.testing.assert_array_equal(batch.truncated, (length == max_steps) & ~batch.terminated)
    assert batch.truncated.any()
    # An episode goes on until it ends, and another begins.
    ended = batch.terminated | batch.truncated
    np.testing.assert_array_equal(length[1:], np.where(ended[:-1], 1, length[:-1] + 1))
    continued = batch.next_observation[:-1][~ended[:-1]]
    np.testing.assert_array_equal(continued, batch.observation[1:][~ended[:-1]])
    return batch


def assert_jit_equals_eager(environment, action, *, tolerance=2e-5):
    """One step of one patient; what was drawn at reset stays; returns the states."""
    params = environment.default_params
    state, _ = environment.reset(jax.random.key(0), params)
    step = partial(environment.step, params=params)
    after, jitted = jax.jit(step)(jax.random.key(1), state, action)
    _, eager = step(jax.random.key(1), state, action)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        eager,
        jitted,
    )
    return state.state, after.state


def assert_passes_gymnasiums_checker(environment):
    """Every warning of the checker is an error here, but for its advice on symmetric actions."""
    from gymnasium.utils.env_checker import check_env

    from jaxrl_llm.envs import adapters

    with warnings.catch_warnings():
        # A dose, a pressure or a rate keeps its own units, and none of them is negative.
        warnings.filterwarnings("ignore", ".*we recommend using a symmetric", UserWarning)
        check_env(adapters.to_gymnasium(environment), skip_render_check=True)
