"""Environments whose whole course is known, shared by the tests of this folder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.envs import core
from jaxrl_llm.types import Box, Discrete, Environment, TimeStep


def counter_mask(state, params):
    return jnp.array([True, False]) ^ (state % 2 == 1)


def make_counter(*, with_mask=False):
    """Counts its steps; pays `gain` a step, ends after `length`; both belong to the patient."""

    def observe(state, params):
        return jnp.stack([state.astype(jnp.float32), params["gain"]])

    def reset(key, params):
        del key
        return jnp.int32(0), observe(jnp.int32(0), params)

    def step(key, state, action, params):
        del key
        state = state + 1
        return state, TimeStep(
            observation=observe(state, params),
            reward=params["gain"] * (1 + action),
            terminated=state >= params["length"],
            truncated=jnp.bool_(False),
            info={},
        )

    return Environment(
        name="counter",
        reset=reset,
        step=step,
        default_params={"gain": jnp.float32(2), "length": jnp.int32(3)},
        observation_space=Box(shape=(2,), low=0.0, high=np.inf),
        action_space=Discrete(num=2),
        action_mask=counter_mask if with_mask else None,
    )


def make_walk():
    """A random walk from a random place, to see which keys are used where."""

    def reset(key, params):
        place = jax.random.normal(key)
        return place, place

    def step(key, state, action, params):
        state = state + action + params * jax.random.normal(key)
        ended = jnp.abs(state) > 2
        return state, TimeStep(
            observation=state, reward=state, terminated=ended, truncated=~ended & ended, info={}
        )

    return Environment(
        name="walk",
        reset=reset,
        step=step,
        default_params=jnp.float32(1),
        observation_space=Box(shape=(), low=-np.inf, high=np.inf),
        action_space=Box(shape=(), low=-1.0, high=1.0),
    )


def make_adder(*, max_steps=None):
    """Adds its actions up to 3, where it ends; nothing is random, so libraries can be compared."""

    def observe(state, params):
        return jnp.stack([state.astype(jnp.float32), params])

    def reset(key, params):
        return jnp.int32(0), observe(jnp.int32(0), params)

    def step(key, state, action, params):
        mask = action_mask(state, params)
        state = state + action
        return state, TimeStep(
            observation=observe(state, params),
            reward=params * action,
            terminated=state >= 3,
            truncated=jnp.bool_(False),
            info={
                "action_mask": action_mask(state, params),
                "inadmissible": ~mask[action],
                "square": state**2,
            },
        )

    def action_mask(state, params):
        return jnp.array([True, True, True, False]) | (state >= 2)

    environment = Environment(
        name="adder",
        reset=reset,
        step=step,
        default_params=jnp.float32(2),
        observation_space=Box(shape=(2,), low=(0.0, -5.0), high=(6.0, 5.0)),
        action_space=Discrete(num=4),
        action_mask=action_mask,
    )
    return environment if max_steps is None else core.time_limit(environment, max_steps)


def make_dosing():
    """One continuous dose, in [-1, 2] and [-1, 0.7]; it ends on a positive sum."""

    def reset(key, params):
        return jnp.zeros(2), jnp.zeros(2)

    def step(key, state, action, params):
        return action, TimeStep(
            observation=action,
            reward=jnp.sum(action),
            terminated=jnp.sum(action) > 0,
            truncated=jnp.bool_(False),
            info={},
        )

    return Environment(
        name="dosing",
        reset=reset,
        step=step,
        default_params=(),
        observation_space=Box(shape=(2,), low=-9.0, high=9.0),
        action_space=Box(shape=(2,), low=-1.0, high=(2.0, 0.7)),
    )
