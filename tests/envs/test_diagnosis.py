"""The SYNTHETIC diagnosis: its laws, and that every action is the best one for some belief."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.envs import diagnosis
from jaxrl_llm.kernels import alpha_vectors, belief


def test_pomdp_states_its_sensitivity_and_specificity():
    pomdp = diagnosis.pomdp()
    positive = np.asarray(pomdp.observation)[:, :, diagnosis.POSITIVE]
    np.testing.assert_allclose(positive[:, 1], diagnosis.sensitivity, rtol=1e-6)
    np.testing.assert_allclose(1 - positive[:, 0], diagnosis.specificity, rtol=1e-6)
    dear, cheap = diagnosis.BIOPSY, diagnosis.SCREEN
    for measure in (diagnosis.sensitivity, diagnosis.specificity, diagnosis.prices):
        assert measure[dear] > measure[cheap]


def test_pomdp_progresses_and_is_treated():
    mdp = diagnosis.pomdp().mdp
    assert mdp.terminal.tolist() == [False, False, True]
    healthy, early, advanced = np.eye(3, dtype=np.float32)
    assert early @ mdp.transition[:, diagnosis.WAIT] @ advanced > 0
    cured = [early @ mdp.transition[:, action] @ healthy for action in range(4)]
    assert np.argmax(cured) == diagnosis.TREAT
    reward = mdp.expected_reward()
    np.testing.assert_allclose(reward[0], -np.array(diagnosis.prices), rtol=1e-6)
    np.testing.assert_allclose(reward[1, diagnosis.WAIT], -1 - 0.1 * 60, rtol=1e-6)


def test_names_match_the_arrays():
    names = diagnosis.action_names, diagnosis.state_names, diagnosis.observation_names
    assert diagnosis.pomdp().observation.shape == tuple(map(len, names))
    assert diagnosis.make().name == "diagnosis"


def test_every_action_is_best_as_the_disease_becomes_likely():
    """Wait, the cheap test, the accurate one, treat: in the order of their prices."""
    ill = belief.belief_grid(2, 50)[:, :1]
    beliefs = jnp.asarray(np.hstack([1 - ill, ill, 0 * ill]), jnp.float32)
    solve = jax.jit(alpha_vectors.point_based_value_iteration)
    plans = solve(diagnosis.pomdp(), beliefs).plans
    actions = np.asarray(jax.vmap(plans.action)(beliefs))
    assert (np.diff(actions) >= 0).all()
    assert set(actions.tolist()) == {0, 1, 2, 3}
