"""Random walks against the values of the book."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import random_walk


def value(mdp):
    """By solving the linear system."""
    alive = ~np.asarray(mdp.terminal)
    chain = np.asarray(mdp.transition[:, 0]) * alive[:, None]
    reward = np.asarray(mdp.expected_reward()[:, 0]) * alive
    return np.linalg.solve(np.eye(len(alive)) - chain, reward)


def test_mdp_of_5_states_has_the_published_value(x64):
    expected = [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 0]
    np.testing.assert_allclose(value(random_walk.mdp()), expected, atol=1e-12)


def test_mdp_of_19_states_has_the_published_value(x64):
    walk = random_walk.mdp(num_states=19, left_reward=-1.0)
    np.testing.assert_allclose(value(walk)[1:-1], np.arange(-9, 10) / 10, atol=1e-12)


def test_mdp_begins_in_the_middle_and_ends_at_the_ends():
    mdp = random_walk.mdp()
    assert np.flatnonzero(mdp.initial).tolist() == [3]
    assert np.flatnonzero(mdp.terminal).tolist() == [0, 6]
    np.testing.assert_array_equal(mdp.transition[3, 0], [0, 0, 0.5, 0, 0.5, 0, 0])
    assert float(mdp.reward[5, 0, 6]) == 1
    assert not mdp.reward[jnp.array([0, 6])].any()


def test_mdp_of_one_state(x64):
    np.testing.assert_allclose(value(random_walk.mdp(num_states=1)), [0, 0.5, 0], atol=1e-12)


def test_names_match_the_tables():
    assert random_walk.state_names() == ("Left end", *"ABCDE", "Right end")
    assert random_walk.state_names(num_states=29)[1:3] == ("1", "2")
    assert len(random_walk.state_names(num_states=29)) == random_walk.mdp(num_states=29).num_states
    assert random_walk.action_names == ("Step",)


@pytest.mark.parametrize(
    ("num_states", "message"),
    [(0, "num_states is 0; it must be at least 1"), (4, "num_states is 4; it must be odd")],
)
def test_mdp_refuses(num_states, message):
    with pytest.raises(ValueError, match=message):
        random_walk.mdp(num_states=num_states)


def test_make_ends_at_either_end():
    environment = random_walk.make(num_states=1, left_reward=-1.0)
    params = environment.default_params
    step = jax.jit(jax.vmap(environment.step, in_axes=(0, None, None, None)))
    keys = jax.random.split(jax.random.key(0), 100)
    _, time_step = step(keys, jnp.int32(1), jnp.int32(0), params)
    assert time_step.terminated.all()
    assert set(np.asarray(time_step.observation).tolist()) == {0, 2}
    np.testing.assert_array_equal(time_step.reward, np.asarray(time_step.observation) - 1)
