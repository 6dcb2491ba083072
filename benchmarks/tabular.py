"""Learning in a table: updates a second of many learners at once, beside one loop in Numba."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import jax
import numpy as np

from benchmarks import peers
from benchmarks.harness import Case, Peer
from jaxrl_llm.agents import tabular
from jaxrl_llm.envs import icu_sepsis, simulation, treatment
from jaxrl_llm.kernels import bellman
from jaxrl_llm.types import MDP, SuccessorMDP

NUM_STEPS = 400


def cases() -> Iterable[Case]:
    """Q-learning on five states and on 716: many learners, and one of many patients."""
    small, large = treatment.mdp(), bellman.successor_form(icu_sepsis.mdp())
    for num_learners, num_patients in ((1000, 1), (1, 256)):
        yield _case("treatment", small, num_learners, num_patients)
    for num_learners, num_patients in ((1, 256), (1, 1024), (10, 64)):
        yield _case("icu-sepsis", large, num_learners, num_patients)


def _case(name: str, mdp: MDP | SuccessorMDP, num_learners: int, num_patients: int) -> Case:
    config = tabular.Config(
        num_environments=num_patients, num_steps=NUM_STEPS, max_episode_steps=50
    )
    algorithm = tabular.make(config, mdp)
    keys = jax.random.split(jax.random.key(0), num_learners)
    items = NUM_STEPS * num_learners * num_patients
    return Case(
        name=f"q-learning-{name}-{num_learners}x{num_patients}",
        function=jax.jit(jax.vmap(algorithm.step), donate_argnums=1),
        arguments=lambda: (keys, jax.vmap(algorithm.init)(keys)),
        items=items,
        unit="updates",
        peer=partial(_numba, mdp, items),
    )


def _numba(mdp: MDP | SuccessorMDP, num_updates: int) -> Peer:
    """One learner, one patient, one loop compiled by Numba over the same flat table."""
    numba = peers.require("numba")
    simulator = jax.tree.map(np.asarray, simulation.make(mdp))
    num_states, num_actions = mdp.num_states, mdp.num_actions
    gamma = float(mdp.discount)

    def loop(
        law: np.ndarray, first: np.ndarray, size: np.ndarray, threshold: np.ndarray,
        alias: np.ndarray, successor: np.ndarray, reward: np.ndarray, terminal: np.ndarray,
        random: np.random.Generator,
    ) -> np.ndarray:  # fmt: skip
        q = np.zeros((num_states, num_actions), np.float32)
        state, time = 0, 0
        for _ in range(num_updates):
            action = np.argmax(q[state])
            if random.random() < 0.1:
                action = int(random.random() * num_actions)
            number = law[state * num_actions + action]
            place = first[number] + int(random.random() * size[number])
            if random.random() >= threshold[place]:
                place = alias[place]
            following = successor[place]
            value = 0.0 if terminal[following] else np.max(q[following])
            q[state, action] += 0.1 * (reward[place] + gamma * value - q[state, action])
            state, time = following, time + 1
            if terminal[following] or time >= 50:
                state, time = successor[first[0] + int(random.random() * size[0])], 0
        return q

    compiled: Callable = numba.njit(loop)
    fields = ("law", "first", "size", "threshold", "alias", "successor", "reward", "terminal")
    arguments = tuple(getattr(simulator, field) for field in fields)
    arguments += (np.random.default_rng(0),)
    return Peer("one loop in Numba", compiled, arguments, num_updates)
