"""Agents of Stable-Baselines3, where it is installed, train on our environments."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import adapters, icu_sepsis, recommendation, treatment
from jaxrl_llm.kernels import bellman
from jaxrl_llm.types import Box, Environment, TimeStep
from tests.agents import probes
from tests.envs.problems import make_dosing

# They import torch, which warns for itself; ours are errors as everywhere.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    check_env = pytest.importorskip("stable_baselines3.common.env_checker").check_env
    torch = pytest.importorskip("torch")

# Networks this small only lose by sharing their work.
torch.set_num_threads(1)

pytestmark = pytest.mark.slow

LEARNER: dict[str, Any] = {"seed": 0, "device": "cpu", "verbose": 0}


@pytest.mark.parametrize(
    "make",
    [
        recommendation.make,
        treatment.make,
        lambda: icu_sepsis.make(inadmissible="mean"),
        lambda: probes.DISCOUNTING.environment,
        lambda: probes.CONTINUOUS_TARGET.environment,
        make_dosing,
    ],
    ids=["recommendation", "treatment", "icu_sepsis", "two steps", "one dose", "two doses"],
)
def test_environment_passes_the_checker_of_stable_baselines3(make):
    with warnings.catch_warnings():
        # Advice on bounds that are not [-1, 1], which a dose has for a reason.
        warnings.filterwarnings("ignore", "We recommend you to use a symmetric", UserWarning)
        check_env(adapters.to_gymnasium(make()), skip_render_check=True)


def test_ppo_of_stable_baselines3_learns_an_exported_probe():
    probe = probes.ACTION_AND_OBSERVATION
    model = stable_baselines3.PPO(
        "MlpPolicy",
        adapters.to_gymnasium(probe.environment),
        n_steps=64,
        batch_size=64,
        learning_rate=0.01,
        gamma=probe.discount,
        policy_kwargs={"net_arch": [16]},
        **LEARNER,
    )
    model.learn(1500)
    action, _ = model.predict(probe.observation, deterministic=True)
    np.testing.assert_array_equal(probe.q[np.arange(2), action], probe.value)


def by_symptoms() -> Environment:
    """The recommendation problem, observed as eight symptoms rather than a pattern's number."""
    problem, symptoms = recommendation.make(), recommendation.symptoms()

    def reset(key: Any, params: Any) -> tuple[Any, Any]:
        state, _ = problem.reset(key, params)
        return state, symptoms[state]

    def step(key: Any, state: Any, action: Any, params: Any) -> tuple[Any, TimeStep]:
        state, time_step = problem.step(key, state, action, params)
        return state, dataclasses.replace(time_step, observation=symptoms[state])

    return dataclasses.replace(
        problem,
        reset=reset,
        step=step,
        observation_space=Box(shape=symptoms.shape[1:], low=0.0, high=1.0),
    )


def test_ppo_of_stable_baselines3_learns_to_recommend():
    """Far beyond the best treatment for all, 1.0 of 1.273; all of them exact."""
    mdp, symptoms = recommendation.mdp(), np.asarray(recommendation.symptoms())[:256]
    q = np.asarray(bellman.q_values(mdp, jnp.zeros(mdp.num_states)))[:256]
    model = stable_baselines3.PPO(
        "MlpPolicy",
        adapters.to_gymnasium(by_symptoms(), seed=0),
        n_steps=512,
        batch_size=128,
        learning_rate=0.02,
        gamma=0.0,
        policy_kwargs={"net_arch": []},
        **LEARNER,
    )
    model.learn(2048)
    action, _ = model.predict(symptoms, deterministic=True)
    # Measured: 1.268; the optimum is 1.273.
    assert 1.25 < q[np.arange(256), action].mean() <= q.max(axis=1).mean() + 1e-6
