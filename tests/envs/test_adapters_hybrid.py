"""Actions that are a choice and an amount of it, in Gymnasium's hands."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from jaxrl_llm.envs import adapters
from jaxrl_llm.types import Box, Environment, Hybrid, HybridAction, TimeStep


def make_prescription() -> Environment:
    """Nothing, or an amount of one of two drugs; drug 2 may not follow drug 1."""

    def mask(state: Any, params: Any) -> Any:
        return jnp.array([True, True, True]) & ((jnp.arange(3) != 2) | (state[0] != 1))

    def step(key: Any, state: Any, action: Any, params: Any) -> tuple[Any, TimeStep]:
        amount = jnp.where(action.choice == 0, 0.0, action.amount[0])
        following = jnp.stack([action.choice.astype(jnp.float32), amount])
        return following, TimeStep(
            observation=following,
            reward=amount,
            terminated=amount > 2,
            truncated=jnp.bool_(False),
            info={
                "action_mask": mask(following, params),
                "inadmissible": ~mask(state, params)[action.choice],
            },
        )

    amount = Box(shape=(1,), low=0.0, high=3.0)
    return Environment(
        name="prescription",
        reset=lambda key, params: (jnp.zeros(2), jnp.zeros(2)),
        step=step,
        default_params=None,
        observation_space=Box(shape=(2,), low=0.0, high=3.0),
        action_space=Hybrid(num=3, amount=amount, has_amount=(False, True, True)),
        action_mask=mask,
    )


PRESCRIPTION = make_prescription()


def test_to_gymnasium_has_a_dict_of_choice_and_amount():
    env = adapters.to_gymnasium(PRESCRIPTION)
    amount = spaces.Box(0, 3, (1,), np.float32)
    assert env.action_space == spaces.Dict({"choice": spaces.Discrete(3), "amount": amount})
    _, info = env.reset(seed=0)
    mask = {"choice": info["action_mask"].astype(np.int8), "amount": None}
    assert env.action_space.sample(mask) in env.action_space


@pytest.mark.parametrize(
    "action",
    [
        {"choice": np.int64(1), "amount": np.array([1.5], np.float32)},
        {"amount": [1.5], "choice": 1},
        HybridAction(choice=jnp.int32(1), amount=jnp.array([1.5])),
    ],
    ids=["gymnasium", "python", "ours"],
)
def test_to_gymnasium_takes_a_choice_and_an_amount(action):
    env = adapters.to_gymnasium(PRESCRIPTION)
    env.reset(seed=0)
    observation, reward, terminated, _, info = env.step(action)
    np.testing.assert_array_equal(observation, [1, 1.5])
    assert (reward, terminated) == (1.5, False)
    np.testing.assert_array_equal(info["action_mask"], [True, True, False])


HAS = "prescription has actions"


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (1, "action is 1; it must be a dict: prescription has a 'choice' of 3 and an 'amount'"),
        ({"choice": 1}, "action is {'choice': 1}; it must be a dict: prescription has a 'choice'"),
        (
            {"choice": 3, "amount": [0.0]},
            f"action['choice'] 3 is out of range; {HAS} 0 to 2",
        ),
        (
            {"choice": 0, "amount": [9.0]},
            f"action['amount'] 9.0 at [0] is out of range; {HAS} 0.0 to 3.0",
        ),
        (
            {"choice": 0.0, "amount": [0.0]},
            f"action['choice'] has dtype float64; it must be an integer: {HAS} 0 to 2",
        ),
        (
            {"choice": 0, "amount": 0.0},
            f"action['amount'] has shape (); it must be (1,): {HAS} 0.0 to 3.0",
        ),
    ],
)
def test_to_gymnasium_refuses_a_wrong_hybrid_action(action, message):
    env = adapters.to_gymnasium(PRESCRIPTION)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        env.step(action)


def test_to_gymnasium_refuses_an_inadmissible_choice():
    env = adapters.to_gymnasium(PRESCRIPTION)
    env.reset(seed=0)
    env.step({"choice": 1, "amount": [1.0]})
    with pytest.raises(ValueError, match=r"^action 2 is inadmissible in state \[1\. 1\.\] of"):
        env.step({"choice": 2, "amount": [1.0]})
    assert env.step({"choice": 0, "amount": [1.0]})[1] == 0


def test_to_gymnasium_vector_steps_each_patient_by_its_own_choice():
    envs = adapters.to_gymnasium_vector(PRESCRIPTION, 3)
    assert isinstance(envs.action_space, spaces.Dict)
    assert envs.action_space["choice"] == spaces.MultiDiscrete([3, 3, 3])
    envs.reset(seed=0)
    actions = {"choice": np.array([0, 1, 2]), "amount": np.array([[1.0], [1.5], [2.5]])}
    observation, reward, terminated, _, info = envs.step(actions)
    np.testing.assert_array_equal(reward, [0, 1.5, 2.5])
    np.testing.assert_array_equal(terminated, [False, False, True])
    np.testing.assert_array_equal(observation, [[0, 0], [1, 1.5], [0, 0]])
    np.testing.assert_array_equal(info["final_obs"][2], [2, 2.5])
    with pytest.raises(ValueError, match=r"^action 2 at \[1\] is inadmissible in state"):
        envs.step(actions | {"choice": np.array([0, 2, 2])})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*we recommend using a symmetric:UserWarning")
def test_to_gymnasium_of_hybrid_actions_passes_the_checker():
    check_env(adapters.to_gymnasium(free_prescription()), skip_render_check=True)


def free_prescription() -> Environment:
    """The checker samples actions without a mask."""

    def step(key: Any, state: Any, action: Any, params: Any) -> tuple[Any, TimeStep]:
        following, time_step = PRESCRIPTION.step(key, state, action, params)
        return following, dataclasses.replace(time_step, info={})

    return dataclasses.replace(PRESCRIPTION, step=step, action_mask=None)
