"""Draws from flat tables have the laws of the problem; patients start anew where they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import simulation
from tests import oracles

GRID = (np.arange(1000) + 0.5) / 1000
SLOT, SIDE = (jnp.array(axis.ravel(), jnp.float32) for axis in np.meshgrid(GRID, GRID))


@pytest.mark.slow
def test_every_law_is_that_of_the_problem():
    """A grid over both uniform numbers integrates the law; no sampling."""
    for mdp in (oracles.treatment_mdp(), oracles.garnet_mdp(0, 12, 2, 0.9)):
        simulator, step = simulation.make(mdp), jax.jit(simulation.Simulator.step)
        for state, action in ((0, 1), (3, 0), (2, mdp.num_actions - 1)):
            shape = SLOT.shape
            moved = step(simulator, SLOT, SIDE, jnp.full(shape, state), jnp.full(shape, action))
            frequency = np.bincount(moved.state, minlength=mdp.num_states) / SLOT.size
            np.testing.assert_allclose(frequency, mdp.transition[state, action], atol=2e-3)
            reward = np.asarray(jnp.broadcast_to(mdp.reward, mdp.transition.shape))
            np.testing.assert_allclose(moved.reward, reward[state, action][moved.state], rtol=1e-6)
        start = np.bincount(simulator.start(SLOT, SIDE), minlength=mdp.num_states) / SLOT.size
        np.testing.assert_allclose(start, mdp.initial, atol=2e-3)


def test_terminal_states_are_told():
    mdp = oracles.terminal_mdp(0, 5, 2)
    moved = simulation.make(mdp).step(
        SLOT, SIDE, jnp.full(SLOT.shape, 3), jnp.zeros(SLOT.shape, jnp.int32)
    )
    np.testing.assert_array_equal(moved.terminated, np.asarray(moved.state) == 4)
    assert moved.terminated.any()


def test_patients_restart_where_they_ended():
    patients = simulation.Patients.begin(jnp.array([1, 2, 3]))
    move = simulation.Move(
        state=jnp.array([4, 0, 0]),
        reward=jnp.array([1.0, 2.0, 3.0]),
        terminated=jnp.array([True, False, False]),
    )
    after, ended = patients.after(move, None)
    np.testing.assert_array_equal(ended, [True, False, False])
    fresh = after.restart(ended, jnp.array([7, 8, 9]))
    np.testing.assert_array_equal(fresh.state, [7, 0, 0])
    np.testing.assert_array_equal(fresh.time, [0, 1, 1])
    np.testing.assert_array_equal(fresh.episode_return, [0, 2, 3])
    _, cut = patients.after(move, 1)
    assert cut.all()


def test_choices_list_the_allowed_actions():
    allowed = jnp.array([[False, True, True], [True, False, False]])
    choices = simulation.Choices.among(allowed)
    np.testing.assert_array_equal(choices.number, [2, 1])
    states, ranks = jnp.array([0, 0, 1]), jnp.array([0, 1, 0])
    np.testing.assert_array_equal(choices.action(states, ranks), [1, 2, 0])


def test_uniform_numbers_are_in_range():
    numbers = simulation.uniform(jnp.array([0, 2**32 - 1], jnp.uint32))
    assert numbers[0] == 0
    assert numbers[1] == np.float32(1 - 2.0**-24)
    words = simulation.random_words(jax.random.key(0), 20, 3, 50)
    assert words.shape == (20, 3, 50)
    np.testing.assert_allclose(simulation.uniform(words).mean(), 0.5, atol=0.03)
