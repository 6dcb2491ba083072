"""The stored arrays of the guide problems, and that the modules name them in their order."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest

from jaxrl_llm.envs import diabetes, guide, sepsis_management


@pytest.fixture(scope="module")
def stored():
    with resources.files("jaxrl_llm.envs").joinpath("guide_mdps.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        return {name: arrays[name] for name in arrays}


@pytest.mark.parametrize("name", ["diabetes", "sepsis"])
def test_load_gives_the_stored_arrays(stored, name):
    mdp = guide.load(name, None)
    np.testing.assert_allclose(mdp.transition, stored[f"{name}_transition"], rtol=1e-6)
    np.testing.assert_allclose(mdp.reward, stored[f"{name}_reward"], rtol=1e-6)
    assert float(mdp.discount) == np.float32(stored[f"{name}_discount"])
    np.testing.assert_allclose(mdp.initial, np.full(9, 1 / 9), rtol=1e-6)


def test_load_refuses_a_discount_out_of_range():
    with pytest.raises(ValueError, match=r"discount is 1\.5; it must be in"):
        guide.load("diabetes", 1.5)


def test_load_takes_a_discount_of_0():
    assert float(guide.load("diabetes", 0.0).discount) == 0


@pytest.mark.parametrize(
    ("name", "module"), [("diabetes", diabetes), ("sepsis", sepsis_management)]
)
def test_names_are_in_the_order_of_the_arrays(stored, name, module):
    def words(label):
        return label.replace("_", " ").replace(",", "").lower().split()

    for ours, theirs in zip(module.state_names, stored[f"{name}_states"], strict=True):
        assert words(ours) == words(theirs)
    for ours, theirs in zip(module.action_names, stored[f"{name}_actions"], strict=True):
        # "Increase moderately" for "Increase_Moderate".
        assert all(a.startswith(b) for a, b in zip(words(ours), words(theirs), strict=True))
