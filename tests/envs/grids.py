"""Problems as NumPy tables, to compare tables with tables; shared by the tests of the grids."""

from __future__ import annotations

from typing import Any

import numpy as np


def tables(mdp):
    """P `[S, A, S]` and the expected reward `[S, A]` of a `SuccessorMDP`, in float64."""
    row = np.asarray(mdp.row)
    transition = np.zeros((*row.shape, mdp.num_states))
    state, action = np.indices(row.shape)[..., None]
    probability = np.asarray(mdp.probability, np.float64)[row]
    successor = np.asarray(mdp.successor)[row]
    np.add.at(transition, (state, action, successor), probability)
    return transition, np.sum(probability * np.asarray(mdp.reward)[row], axis=-1)


def gymnasium_tables(environment: Any):
    """The same of a tabular Gymnasium environment, and which states an episode ends in."""
    outcomes = environment.unwrapped.P
    shape = len(outcomes), len(outcomes[0])
    transition, reward = np.zeros((*shape, shape[0])), np.zeros(shape)
    ends = np.zeros(shape[0], bool)
    for state in range(shape[0]):
        for action in range(shape[1]):
            for probability, following, gain, ended in outcomes[state][action]:
                transition[state, action, following] += probability
                reward[state, action] += probability * gain
                ends[following] |= ended
    return transition, reward, ends
