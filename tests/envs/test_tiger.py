"""The tiger's arrays, and its environment."""

from __future__ import annotations

import numpy as np

from jaxrl_llm.envs import tiger
from jaxrl_llm.types import Discrete


def test_pomdp_has_the_published_arrays():
    pomdp = tiger.pomdp()
    half = np.full((2, 2), 0.5)
    heard = np.array([[0.85, 0.15], [0.15, 0.85]])
    np.testing.assert_allclose(pomdp.observation, np.stack([heard, half, half]))
    transition = np.swapaxes(np.asarray(pomdp.mdp.transition), 0, 1)
    np.testing.assert_allclose(transition, np.stack([np.eye(2), half, half]))
    np.testing.assert_allclose(pomdp.mdp.expected_reward(), [[-1, -100, 10], [-1, 10, -100]])
    np.testing.assert_allclose(pomdp.mdp.initial, [0.5, 0.5])
    np.testing.assert_allclose(tiger.pomdp(accuracy=0.6).observation[0], [[0.6, 0.4], [0.4, 0.6]])


def test_names_match_the_arrays():
    pomdp = tiger.pomdp()
    names = tiger.action_names, tiger.state_names, tiger.observation_names
    assert pomdp.observation.shape == tuple(map(len, names))
    assert tiger.action_names[tiger.OPEN_RIGHT] == "Open right"


def test_make_has_growls_and_a_time_limit():
    environment = tiger.make(max_steps=7)
    assert environment.name == "tiger"
    assert environment.observation_space == Discrete(num=3)
