"""Clinical monitoring: geometric sums in closed form, side effects, and the optimum on a grid."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import core, monitoring, monitoring_clinical
from jaxrl_llm.kernels import finite_horizon

NUM_PATIENTS = 2048
NAMES = monitoring.vital_names


@pytest.fixture(scope="module")
def course():
    """Fifteen hours of 2048 patients under one action: start, states and infos `[15, B]`."""
    environment = monitoring_clinical.make()
    params = environment.default_params

    @jax.jit
    def run(keys, action):
        start, first = jax.vmap(environment.reset, in_axes=(0, None))(keys[0], params)

        def body(state, keys):
            state, result = jax.vmap(environment.step, in_axes=(0, 0, None, None))(
                keys, state, action, params
            )
            return state, (state, result)

        return (start, first), jax.lax.scan(body, start, keys[1:])[1]

    def courses(action):
        keys = jax.random.split(jax.random.key(action), (16, NUM_PATIENTS))
        return jax.tree.map(np.asarray, run(keys, action))

    return courses


def closed_form(dose, sensitivity, susceptibility, count):
    """Mean severity gained, concentration and side effects after `count` hours of one dose.

    c_k = d (1 - p^k) with p = 1 - uptake, so that c_k^3 is a sum of four powers, and each of them
    makes h and s geometric sums.
    """
    params = monitoring_clinical.default_params()
    p, r = 1 - float(params.uptake), 1 - float(params.recovery)
    weights = [(1, 1.0), (-3, p), (3, p**2), (-1, p**3)]

    def total(q, n):
        return n if q == 1 else (1 - q**n) / (1 - q)

    drug = dose * (1 - p**count)
    scale = (1 - r) * dose**3
    side_effects = scale * sum(w * (q**count - r**count) / (q - r) for w, q in weights)
    drugs = dose * (count - total(p, count))
    side_sum = scale * sum(w * (total(q, count) - total(r, count)) / (q - r) for w, q in weights)
    gained = count * float(params.drift) - float(params.benefit) * sensitivity * drugs
    return gained + float(params.harm) * susceptibility * side_sum, drug, side_effects


@pytest.mark.parametrize("action", [0, 2, 3])
def test_step_has_the_closed_form_of_a_constant_dose(course, action):
    (start, _), (state, result) = course(action)
    for count in (1, 4, 15):
        latent = state.latent[count - 1].astype(np.float64)
        gained, drug, side = closed_form(action / 3, start.sensitivity, start.susceptibility, count)
        np.testing.assert_allclose(latent[:, 1], drug, rtol=1e-5)
        np.testing.assert_allclose(latent[:, 2], side, rtol=1e-4, atol=1e-7)
        noise = latent[:, 0] - start.latent[:, 0] - gained
        deviation = 0.03 * np.sqrt(count)
        assert abs(noise.mean()) < 4 * deviation / np.sqrt(NUM_PATIENTS)
        assert abs(noise.std() / deviation - 1) < 4 / np.sqrt(2 * NUM_PATIENTS)
    np.testing.assert_array_equal(state.sensitivity[-1], start.sensitivity)
    np.testing.assert_array_equal(state.susceptibility[-1], start.susceptibility)
    np.testing.assert_array_equal(result.info["dose"], np.float32(action / 3))


def test_vital_signs_have_the_mean_and_covariance_of_their_loadings(course):
    """Given (s, c, h) the observations are normal, and mean pressure is that of the other two."""
    _, (state, result) = course(2)
    params = monitoring_clinical.default_params()
    middle = monitoring_clinical.normal_range.mean(axis=1)
    scale = monitoring_clinical.observation_scale
    mixing = np.eye(10)
    mixing[3] = np.array([0, 1, 2, 0, 0, 0, 0, 0, 0, 0]) / 3
    vitals = middle + scale * result.observation[..., :10].astype(np.float64)
    mean = (middle + state.latent @ np.asarray(params.loadings).T) @ mixing.T
    error = (vitals - mean).reshape(-1, 10)
    spread = mixing @ np.diag(np.asarray(params.spread, np.float64) ** 2) @ mixing.T
    deviation = np.sqrt(np.diag(spread))
    np.testing.assert_array_less(np.abs(error.mean(axis=0)), 4.5 * deviation / np.sqrt(len(error)))
    bound = 5 * np.outer(deviation, deviation) * np.sqrt(2 / len(error))
    np.testing.assert_array_less(np.abs(np.cov(error.T) - spread), bound)
    pressure = vitals[..., 1:4]
    np.testing.assert_allclose(pressure @ [1 / 3, 2 / 3, -1], 0, atol=1e-3)


def test_step_pays_and_ends_as_the_equations_say(course):
    (start, _), (state, result) = course(3)
    latent = state.latent
    before = np.concatenate([start.latent[None], latent[:-1]])
    burden = 0.01 * (before[..., 0] + before[..., 2]) + 0.01
    outcome = np.where(latent[..., 0] <= 0, 1, np.where(latent[..., 0] >= 1, -1, 0))
    np.testing.assert_allclose(result.reward, outcome - burden, atol=1e-6)
    np.testing.assert_array_equal(result.terminated, outcome != 0)
    np.testing.assert_array_equal(result.info["died"], outcome == -1)
    np.testing.assert_array_equal(result.info["discharged"], outcome == 1)
    assert (outcome == 1).any()
    vitals = result.info["vitals"]
    scale, saturation = vitals[..., NAMES.index("coma scale")], vitals[..., 6]
    assert 3 <= scale.min() < scale.max() <= 15
    assert saturation.max() <= 100
    # What the agent sees, besides the vital signs.
    np.testing.assert_array_equal(result.observation[..., 10:13], latent)
    np.testing.assert_array_equal(result.observation[..., 13], state.sensitivity)
    assert np.abs(result.observation[..., :10]).max() < 2


def test_reset_draws_every_kind_of_patient(course):
    (start, first), _ = course(0)
    kinds = np.stack([start.sensitivity, start.susceptibility], axis=1)
    values, counts = np.unique(kinds, axis=0, return_counts=True)
    np.testing.assert_allclose(values, monitoring_clinical.kinds())
    assert np.abs(counts / NUM_PATIENTS - 0.25).max() < 4 * np.sqrt(0.1875 / NUM_PATIENTS)
    severity = start.latent[:, 0]
    assert 0.4 <= severity.min() < 0.42 < 0.68 < severity.max() <= 0.7
    np.testing.assert_array_equal(first[:, 11:13], 0)


def test_latent_mdp_keeps_the_mean_of_each_quantity():
    shape = (33, 9, 7)
    mdp = monitoring_clinical.latent_mdp(0.8, 1.5, num_nodes=shape)
    nodes = np.meshgrid(
        np.linspace(0, 1, 33), np.linspace(0, 1, 9), np.linspace(0, 1, 7) ** 2, indexing="ij"
    )
    latent = np.stack([axis.ravel() for axis in nodes])
    padded = np.concatenate([latent, np.zeros((3, 2))], axis=1).astype(np.float32)
    expected = np.stack([np.asarray(mdp.expect(row)) for row in padded])[:, :-2]
    params = monitoring_clinical.default_params()
    state = monitoring_clinical.State(
        latent=jnp.asarray(latent), sensitivity=jnp.asarray(0.8), susceptibility=jnp.asarray(1.5)
    )
    inside = (latent[0] > 0.3) & (latent[0] < 0.7)
    for action in range(4):
        mean = np.asarray(monitoring_clinical.latent_step(state, jnp.int32(action), params))
        np.testing.assert_allclose(expected[:, inside, action], mean[:, inside], atol=1e-5)
    np.testing.assert_allclose(
        monitoring_clinical.latent_severity(shape)[:-2], latent[0], atol=1e-6
    )
    assert float(mdp.initial @ monitoring_clinical.latent_severity(shape)) == pytest.approx(0.55)


def test_latent_mdp_refuses_a_grid_of_one():
    with pytest.raises(ValueError, match=r"num_nodes\[1\] is 1; it must be at least 2"):
        monitoring_clinical.latent_mdp(1.0, 1.0, num_nodes=(3, 1, 3))


@pytest.mark.slow
def test_latent_mdp_predicts_the_simulator():
    """The best policy on the grid, by the nearest node, earns what the grid says it does."""
    shape, num_steps = monitoring_clinical.NUM_NODES, 100
    solve = jax.jit(lambda mdp: finite_horizon.backward_induction(mdp, num_steps))
    value, policies = [], []
    for kind in monitoring_clinical.kinds():
        mdp = monitoring_clinical.latent_mdp(*kind)
        solved = solve(mdp)
        value.append(float(mdp.initial @ solved.value[0]))
        policies.append(np.asarray(solved.policy))
    tables = jnp.asarray(np.stack(policies, axis=1))  # [T, kinds, S]
    environment = monitoring.make(variant="clinical")
    sensitivity, susceptibility = jnp.asarray(monitoring_clinical.kinds()).T

    def policy(actions, observation, action_mask):
        root = jnp.stack([observation[:, 10], observation[:, 11], jnp.sqrt(observation[:, 12])])
        sizes = jnp.asarray(shape)[:, None] - 1
        place = jnp.round(jnp.clip(root, 0, 1) * sizes).astype(int)
        state = jnp.ravel_multi_index(tuple(place), shape, mode="clip")
        kind = jnp.argmin(
            jnp.abs(observation[:, 13:14] - sensitivity[None])
            + jnp.abs(observation[:, 14:15] - susceptibility[None]),
            axis=-1,
        )
        return actions[kind, state], {"kind": kind}

    running = core.start_batch(environment, jax.random.key(0), 8192)
    _, batch = core.rollout(
        environment, policy, jax.random.key(1), running, num_steps=num_steps, noise=tables
    )
    ended = batch.terminated | batch.truncated
    first = jnp.cumsum(ended, axis=0) - ended == 0
    returns = np.asarray(jnp.sum(batch.reward * first, axis=0), np.float64)
    kind = np.asarray(batch.extras["kind"][0])
    for index, predicted in enumerate(value):
        own = returns[kind == index]
        # Beside four standard errors, what halving the distances of the nodes changes.
        assert abs(own.mean() - predicted) < 4 * own.std() / np.sqrt(len(own)) + 0.02, index
