"""Reads the two guide problems that are stored as arrays, `diabetes` and `sepsis_management`."""

from __future__ import annotations

from importlib import resources

import numpy as np

from jaxrl_llm import make_mdp
from jaxrl_llm.types import MDP


def load(name: str, discount: float | None) -> MDP:
    """The problem stored under `name`, with its own discount where `discount` is None."""
    with resources.files("jaxrl_llm.envs").joinpath("guide_mdps.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        transition, reward = arrays[f"{name}_transition"], arrays[f"{name}_reward"]
        stored = float(arrays[f"{name}_discount"])
    return make_mdp(transition, reward, stored if discount is None else discount)
