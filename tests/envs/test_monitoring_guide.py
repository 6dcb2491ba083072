"""The guide's monitoring: moments in closed form, and the optimum on a grid against simulation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import core, monitoring, monitoring_guide
from jaxrl_llm.kernels import finite_horizon

NUM_PATIENTS, NUM_STEPS = 2048, 100


@pytest.fixture(scope="module")
def problem():
    return monitoring_guide.latent_mdp()


@pytest.fixture(scope="module")
def simulate():
    """Returns of patients under a policy `[T, S]` of the states of `latent_mdp`."""
    environment = monitoring.make(variant="guide")
    last = monitoring_guide.NUM_NODES - 1

    def policy(actions, observation, action_mask):
        assert action_mask is None
        severity = jnp.sqrt(jnp.mean(observation**2, axis=-1))  # of the critical one
        return actions[jnp.round(jnp.minimum(severity, 1) * last).astype(int)], {}

    @jax.jit
    def returns(key, actions):
        start_key, step_key = jax.random.split(key)
        running = core.start_batch(environment, start_key, NUM_PATIENTS)
        _, batch = core.rollout(
            environment, policy, step_key, running, num_steps=NUM_STEPS, noise=actions
        )
        ended = batch.terminated | batch.truncated
        first = jnp.cumsum(ended, axis=0) - ended == 0
        return jnp.sum(batch.reward * first, axis=0)

    return returns


def test_step_has_the_moments_of_the_equations():
    """Mean 0 and variance g^2t s0^2 + s^2 (1 - g^2t) / (1 - g^2) of each vital sign."""
    environment = monitoring_guide.make()
    params = environment.default_params

    @jax.jit
    def vitals(action):
        def patient(key):
            state, _ = environment.reset(jax.random.fold_in(key, 0), params)

            def body(state, time):
                return environment.step(jax.random.fold_in(key, time), state, action, params)[0], ()

            return jax.lax.scan(body, state, jnp.arange(1, 9))[0]

        return jax.vmap(patient)(jax.random.split(jax.random.key(2), 4000))

    for action in range(4):
        gain, deviation = float(params.gain[action]), float(params.deviation)
        power = gain**16
        geometric = 8 if gain == 1 else (1 - power) / (1 - gain**2)
        variance = power * float(params.initial_deviation) ** 2 + deviation**2 * geometric
        x = np.asarray(vitals(action), np.float64)
        np.testing.assert_array_less(np.abs(x.mean(axis=0)), 4 * np.sqrt(variance / 4000))
        square = (x**2).mean() / variance
        assert abs(square - 1) < 4 * np.sqrt(2 / x.size)
        correlation = np.corrcoef(x.T) - np.eye(10)
        assert np.abs(correlation).max() < 4.5 / np.sqrt(4000)


def test_step_pays_and_ends_as_the_equations_say():
    environment = monitoring_guide.make()
    params = environment.default_params
    step = jax.jit(environment.step)
    for vitals, action in ((np.full(10, 2.9), 3), (np.full(10, 2.9), 0), (np.zeros(10), 1)):
        following, result = step(
            jax.random.key(0), jnp.asarray(vitals, jnp.float32), action, params
        )
        mean_square = float((np.asarray(following) ** 2).mean())
        cost = (0.0, 0.1, 0.35, 0.9)[action]
        assert float(result.reward) == pytest.approx(1 - mean_square / 9 - cost, abs=1e-5)
        assert bool(result.terminated) == (mean_square > 9)
        np.testing.assert_allclose(result.observation, following / 3, rtol=1e-6)
        np.testing.assert_allclose(result.info["severity"], np.sqrt(mean_square), rtol=1e-5)
        np.testing.assert_allclose(result.info["dose"], action / 3, rtol=1e-6)


def test_latent_mdp_keeps_the_mean_of_the_mean_square(problem):
    nodes = np.asarray(monitoring_guide.latent_severity(), np.float64)[:-1] ** 2
    inside = np.asarray(problem.transition, np.float64)[:-1, :, :-1]
    gains = np.array([1.1, 1.0, 0.85, 0.6])
    # Far from the critical end, where nothing is lost.
    np.testing.assert_allclose(
        (inside @ nodes)[:60], gains**2 * nodes[:60, None] + 0.04, rtol=1e-4, atol=1e-4
    )
    assert float(problem.transition[-2, 0, -1]) > 0.9


@pytest.mark.slow
def test_latent_mdp_predicts_the_simulator(problem, simulate):
    """The optimum, and each action alone, within four standard errors."""
    solved = finite_horizon.backward_induction(problem, NUM_STEPS)
    fixed = np.broadcast_to(np.arange(4)[:, None, None], (4, *solved.policy.shape))
    value = jax.jit(lambda actions: finite_horizon.horizon_evaluation(problem, actions, NUM_STEPS))
    for seed, actions in enumerate((np.asarray(solved.policy), *fixed)):
        predicted = float(problem.initial @ value(jnp.asarray(actions))[0])
        returns = np.asarray(simulate(jax.random.key(seed), jnp.asarray(actions)), np.float64)
        error = returns.std() / np.sqrt(NUM_PATIENTS)
        # The nearest node stands for the place between nodes: .05 of a return of 78.
        assert abs(returns.mean() - predicted) < 4 * error + 0.05, (seed, predicted)
    assert {0, 1, 2, 3} == set(np.unique(solved.policy[0, :-1]))


def test_latent_mdp_refuses_a_grid_of_one():
    with pytest.raises(ValueError, match="num_nodes is 1; it must be at least 2"):
        monitoring_guide.latent_mdp(num_nodes=1)
