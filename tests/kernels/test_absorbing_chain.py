"""Absorption against gambler's ruin in closed form, the Bellman equation and ICU-Sepsis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import icu_sepsis
from jaxrl_llm.kernels import absorbing_chain, bellman, markov_chain
from tests import oracles
from tests.kernels import chains

absorption = jax.jit(absorbing_chain.absorption)


@pytest.mark.parametrize("win", [0.5, 0.3, 0.55])
def test_absorption_of_gamblers_ruin_is_its_closed_form(win, x64):
    goal, start = 9, np.arange(10)
    if win == 0.5:
        wins, time = start / goal, start * (goal - start)
        variance = time * (start**2 + (goal - start) ** 2 - 2) / 3
    else:
        odds = (1 - win) / win
        wins = (1 - odds**start) / (1 - odds**goal)
        time = (start - goal * wins) / (1 - 2 * win)
        variance = None
    found = absorption(jnp.asarray(chains.gamble(goal, win)))
    np.testing.assert_allclose(found.probability[:, goal], wins, atol=1e-12)
    np.testing.assert_allclose(found.probability[:, 0], 1 - wins, atol=1e-12)
    assert not np.any(found.probability[:, 1:goal])
    np.testing.assert_allclose(found.time, time, atol=1e-11)
    if variance is not None:
        np.testing.assert_allclose(found.variance, variance, atol=1e-9)


def test_absorption_variance_is_that_of_the_law_of_the_time(x64):
    # P(T > t) is the mass that is transient after t steps.
    matrix, transient = chains.PATIENT, np.arange(5) < 4
    survival = [transient.astype(float)]
    for _ in range(600):
        survival.append(matrix @ survival[-1] * transient)
    law = -np.diff(survival, axis=0)
    times = np.arange(1, len(survival))
    mean = times @ law
    found = absorption(jnp.asarray(matrix))
    np.testing.assert_allclose(found.time, mean, atol=1e-9)
    np.testing.assert_allclose(found.variance, times**2 @ law - mean**2, atol=1e-8)
    np.testing.assert_allclose(found.probability[:, 4], 1, atol=1e-12)


@pytest.mark.slow
def test_absorption_into_classes_and_vmap_equals_loop(x64):
    matrices = jnp.asarray([chains.TWO_CLASSES, chains.rota(0.9, 0.8, 0.7), np.eye(6)])
    batched = jax.vmap(absorption)(matrices)
    singles = [absorption(matrix) for matrix in matrices]
    for alone, together in zip(zip(*singles, strict=True), batched, strict=True):
        np.testing.assert_allclose(together, np.stack(alone), atol=1e-14)
    for jitted, eager in zip(singles[0], absorbing_chain.absorption(matrices[0]), strict=True):
        np.testing.assert_allclose(jitted, eager, atol=1e-14)
    first, rota, identity = batched.probability
    # Half of each step is left: 2 steps on average, variance 2, and .4 .4 .2 where it goes.
    np.testing.assert_allclose(first[0], [0, 0.4, 0, 0.4, 0, 0.2], atol=1e-14)
    np.testing.assert_allclose((batched.time[0, 0], batched.variance[0, 0]), (2, 2), atol=1e-14)
    for matrix in (first[1:, 1:], rota, identity):
        np.testing.assert_array_equal(matrix, np.eye(len(matrix)))
    assert not np.any(batched.time[1:])


def test_expected_visits_are_the_sum_of_powers(x64):
    matrix = chains.TWO_CLASSES.copy()
    matrix[1] = [0.25, 0.5, 0, 0.25, 0, 0]
    visits = absorbing_chain.expected_visits(jnp.asarray(matrix))
    transient = np.asarray(markov_chain.structure(jnp.asarray(matrix)).recurrent) == 0
    np.testing.assert_array_equal(transient, [1, 1, 1, 0, 0, 0])
    kept = matrix * transient[:, None] * transient
    power, total = np.diag(transient).astype(float), np.zeros((6, 6))
    for _ in range(2000):
        total, power = total + power, power @ kept
    np.testing.assert_allclose(visits, total, atol=1e-10)


def test_absorption_of_a_rare_event_is_right_in_float32():
    hazard = 1e-9
    rare = np.array([[1 - hazard, hazard / 4, 3 * hazard / 4], [0, 1, 0], [0, 0, 1]], np.float32)
    found = absorption(jnp.asarray(rare))
    np.testing.assert_allclose(found.time, [1e9, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(found.probability[0], [0, 0.25, 0.75], rtol=1e-6)


def test_absorption_gradient_is_finite_and_that_of_gamblers_ruin(x64):
    def wins(win):
        up, down = jnp.asarray(chains.gamble(4, 1.0)), jnp.asarray(chains.gamble(4, 0.0))
        found = absorbing_chain.absorption(win * up + (1 - win) * down)
        return found.probability[1, 4], found.time[1]

    slope, time_slope = jax.jit(jax.jacobian(wins))(0.5)

    # wins = p^3 / (1 - 2 p q) from state 1 of 4; by central differences of the closed form.
    def closed(p):
        odds = (1 - p) / p
        chance = (1 - odds) / (1 - odds**4)
        return np.array([chance, (1 - 4 * chance) / (1 - 2 * p)])

    step = 1e-3
    expected = (closed(0.5 + step) - closed(0.5 - step)) / (2 * step)
    np.testing.assert_allclose((slope, time_slope), expected, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["random", "expert", pytest.param("optimal", marks=pytest.mark.slow)]
)
def test_absorption_of_icu_sepsis_gives_survival_and_length_of_stay(name, x64):
    mdp = icu_sepsis.mdp()
    policies = {
        "random": bellman.uniform_policy,
        "expert": lambda _: icu_sepsis.expert_policy(),
        "optimal": lambda mdp: bellman.policy_iteration(mdp).policy,
    }
    policy = policies[name](mdp)
    found = absorption(markov_chain.stop_at(mdp.under(policy), mdp.terminal))
    ends = mdp.initial @ found.probability
    survival = ends[icu_sepsis.SURVIVAL]
    np.testing.assert_allclose(survival, oracles.ICU_SEPSIS_RETURN[name], atol=6e-5)
    length = mdp.initial @ found.time
    np.testing.assert_allclose(length, oracles.ICU_SEPSIS_LENGTH[name], atol=6e-5)
    np.testing.assert_allclose(ends[icu_sepsis.DEATH] + survival, 1, atol=1e-10)
