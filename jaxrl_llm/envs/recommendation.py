"""Recommending a treatment from symptoms: one decision for each patient, who then leaves.

SYNTHETIC: the matrix of effects is made up; research only, not for clinical use. A patient has any
of n symptoms, each with a probability of its own and independently of the others: 2^n patterns. A
treatment relieves (or worsens) each symptom by its own amount; the reward is the sum over the
symptoms that the patient has. An episode is one decision: a contextual bandit, whose best policy,
and whose regret, are known exactly. By default there are 8 symptoms, all patterns as likely, and 5
treatments; `effect` puts any other matrix `[n, treatments]` in their place.

State s < 2^n is the pattern in which symptom i is present where bit i of s is set; state 2^n is a
patient who was treated, terminal. `make_stream` sees many patients in one episode instead, with
noisy rewards: the setting of a bandit that learns as it goes.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike, NDArray

from jaxrl_llm import checks, make_mdp
from jaxrl_llm.envs import core, tabular
from jaxrl_llm.types import MDP, Array, Box, Discrete, Environment, Key, TimeStep

Observation = Literal["pattern", "symptoms"]

_MAX_SYMPTOMS = 10  # a dense transition table of 1025 states

symptom_names = (
    "fever",
    "cough",
    "breathlessness",
    "fatigue",
    "headache",
    "nausea",
    "joint pain",
    "rash",
)
observation_names = symptom_names
action_names = ("antibiotic", "antiviral", "bronchodilator", "anti-inflammatory", "antihistamine")

# Relief of each symptom (row, in the order above) by each treatment (column), in points.
_EFFECT = (
    (0.6, 0.5, 0.0, 0.4, 0.0),
    (0.4, 0.3, 0.6, 0.1, 0.2),
    (0.3, 0.2, 0.9, 0.1, 0.3),
    (0.2, 0.5, 0.1, 0.2, -0.3),
    (0.0, 0.3, -0.2, 0.5, 0.1),
    (-0.4, -0.2, -0.1, -0.3, 0.2),
    (0.1, 0.2, 0.0, 0.7, 0.0),
    (0.1, 0.0, 0.0, 0.3, 0.9),
)

state_names = (
    *(
        ", ".join(name for bit, name in enumerate(symptom_names) if pattern >> bit & 1) or "none"
        for pattern in range(2 ** len(symptom_names))
    ),
    "treated",
)


def symptoms(num_symptoms: int = len(symptom_names)) -> Array:
    """Which symptoms each state has, `[2^n + 1, n]`, 0 or 1: the context of a linear bandit."""
    pattern = np.arange(2**num_symptoms)[:, None] >> np.arange(num_symptoms) & 1
    return jnp.asarray(np.append(pattern, np.zeros_like(pattern[:1]), axis=0), float)


def effect() -> Array:
    """What each symptom adds to the reward of each treatment by default, `[8, 5]`."""
    return jnp.asarray(_EFFECT, float)


def mdp(*, effect: ArrayLike | None = None, prevalence: float | ArrayLike = 0.5) -> MDP:
    """The problem, 2^n + 1 states × treatments; a value is the mean reward of one decision.

    Args:
      effect: `[n, treatments]`, what each symptom adds to the reward of each treatment, n at most
        10; the synthetic matrix when None.
      prevalence: the probability of a symptom, in [0, 1]: one for all or `[n]`.

    Raises:
      ValueError: for a matrix of another shape, or a number that is not finite or no probability.
    """
    matrix = _matrix(effect)
    chance = _probabilities(prevalence, len(matrix))
    pattern = np.asarray(symptoms(len(matrix)), float)
    num_states = len(pattern)
    terminal = np.arange(num_states) == num_states - 1
    initial = np.prod(np.where(pattern > 0, chance, 1 - chance), axis=-1) * ~terminal
    transition = np.broadcast_to(terminal, (num_states, matrix.shape[1], num_states))
    return make_mdp(
        transition.astype(float),
        pattern @ matrix,
        1.0,
        initial=initial,
        terminal=terminal,
    )


def reference_values(
    *, effect: ArrayLike | None = None, prevalence: float | ArrayLike = 0.5
) -> dict[str, float]:
    """Exact mean rewards: the `"optimal"` policy's, the `"random"` one's, the best `"fixed"` one's.

    >>> {name: round(value, 4) for name, value in reference_values().items()}
    {'optimal': 1.2734, 'random': 0.78, 'fixed': 1.0}

    Args:
      effect: as in `mdp`.
      prevalence: as in `mdp`.
    """
    problem = mdp(effect=effect, prevalence=prevalence)
    reward = np.asarray(problem.reward, float)[..., 0]
    initial = np.asarray(problem.initial, float)
    return {
        "optimal": float(initial @ reward.max(axis=1)),
        "random": float(initial @ reward.mean(axis=1)),
        "fixed": float((initial @ reward).max()),
    }


def make(
    *,
    effect: ArrayLike | None = None,
    prevalence: float | ArrayLike = 0.5,
    observation: Observation = "pattern",
) -> Environment:
    """The problem as an environment; an episode is one step.

    Args:
      effect: as in `mdp`.
      prevalence: as in `mdp`.
      observation: the `"pattern"`'s index, `[]` int32, or the `"symptoms"`, `[n]` float32 of 0
        and 1.
    """
    checks.one_of("observation", observation, ("pattern", "symptoms"))
    problem = mdp(effect=effect, prevalence=prevalence)
    environment = tabular.make(problem, name="recommendation")
    if observation == "pattern":
        return environment
    shown = symptoms(len(_matrix(effect))).astype(jnp.float32)

    def reset(key: Key, params: tabular.TabularParams) -> tuple[Array, Array]:
        state, _ = environment.reset(key, params)
        return state, shown[state]

    def step(
        key: Key, state: Array, action: Array, params: tabular.TabularParams
    ) -> tuple[Array, TimeStep]:
        following, time_step = environment.step(key, state, action, params)
        return following, dataclasses.replace(time_step, observation=shown[following])

    return dataclasses.replace(
        environment,
        reset=reset,
        step=step,
        observation_space=Box(shape=shown.shape[1:], low=0.0, high=1.0),
    )


@struct.dataclass(kw_only=True)
class StreamParams:
    """What the stream reads.

    Attributes:
      effect: `[n, treatments]`, of each symptom on the reward of each treatment.
      prevalence: `[n]`, the probability of each symptom.
      noise: `[]`, standard deviation of a reward.
    """

    effect: Array
    prevalence: Array
    noise: Array


@struct.dataclass(kw_only=True)
class StreamState:
    """The patient who waits for a decision: `symptoms` `[n]`, and the `regret` `[]` so far."""

    symptoms: Array
    regret: Array


def make_stream(
    *,
    num_patients: int = 1000,
    noise: float = 0.5,
    effect: ArrayLike | None = None,
    prevalence: float | ArrayLike = 0.5,
) -> Environment:
    """Patient after patient: an episode is `num_patients` decisions with noisy rewards.

    The observation is the symptoms of the patient at hand, `[n]` float32; what is decided for one
    does not change the next. `TimeStep.info` holds, of the patient just treated, `expected_reward`
    and `optimal_reward` `[]`, exact, `regret` `[]`, the difference, and `total_regret` `[]` since
    the episode began. A stream is cut, not over: its end is truncated.

    Args:
      num_patients: at least 1.
      noise: standard deviation of a reward, at least 0.
      effect: as in `mdp`.
      prevalence: as in `mdp`.
    """
    checks.at_least("noise", noise, 0)
    matrix = _matrix(effect)
    num_symptoms, num_treatments = matrix.shape

    def arrive(key: Key, params: StreamParams) -> Array:
        return jax.random.bernoulli(key, params.prevalence).astype(jnp.float32)

    def reset(key: Key, params: StreamParams) -> tuple[StreamState, Array]:
        patient = arrive(key, params)
        return StreamState(symptoms=patient, regret=jnp.zeros(())), patient

    def step(
        key: Key, state: StreamState, action: Array, params: StreamParams
    ) -> tuple[StreamState, TimeStep]:
        noise_key, arrival_key = jax.random.split(key)
        expected = state.symptoms @ params.effect
        regret = jnp.max(expected) - expected[action]
        following = StreamState(symptoms=arrive(arrival_key, params), regret=state.regret + regret)
        return following, TimeStep(
            observation=following.symptoms,
            reward=expected[action] + params.noise * jax.random.normal(noise_key),
            terminated=jnp.bool_(False),
            truncated=jnp.bool_(False),
            info={
                "expected_reward": expected[action],
                "optimal_reward": jnp.max(expected),
                "regret": regret,
                "total_regret": following.regret,
            },
        )

    environment = Environment(
        name="recommendation stream",
        reset=reset,
        step=step,
        default_params=StreamParams(
            effect=jnp.asarray(matrix, jnp.float32),
            prevalence=jnp.asarray(_probabilities(prevalence, num_symptoms), jnp.float32),
            noise=jnp.float32(noise),
        ),
        observation_space=Box(shape=(num_symptoms,), low=0.0, high=1.0),
        action_space=Discrete(num=num_treatments),
    )
    return core.time_limit(environment, num_patients)


def _matrix(effect: ArrayLike | None) -> NDArray[np.float64]:
    matrix = np.asarray(_EFFECT if effect is None else effect, float)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"effect has shape {matrix.shape}; it must be [symptoms, treatments]")
    checks.between("len(effect)", len(matrix), 1, _MAX_SYMPTOMS)
    for symptom, treatment in np.argwhere(~np.isfinite(matrix))[:1]:
        checks.finite(f"effect[{symptom}, {treatment}]", float(matrix[symptom, treatment]))
    return matrix


def _probabilities(prevalence: float | ArrayLike, num_symptoms: int) -> NDArray[np.float64]:
    chance = np.asarray(prevalence, float)
    if chance.shape not in ((), (num_symptoms,)):
        raise ValueError(f"prevalence has shape {chance.shape}; it must be [] or [{num_symptoms}]")
    for symptom, value in enumerate(np.atleast_1d(chance)):
        checks.between(f"prevalence[{symptom}]" if chance.ndim else "prevalence", value, 0, 1)
    return np.broadcast_to(chance, (num_symptoms,))
