"""Random policies of every kind of action, and every environment of the table."""

import dataclasses
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import environments
from jaxrl_llm.envs import core
from jaxrl_llm.types import Box, Discrete, Hybrid

NUM = 4000
AMOUNT = Box(shape=(2,), low=(-1.0, 5.0), high=(1.0, 6.0))


def draw(space, mask=None):
    noise = environments.draw_noise(space, jax.random.key(0), (NUM,))
    return environments.random_action(space, noise, mask)


def test_random_action_is_uniform_over_each_kind_of_space():
    action = draw(Hybrid(num=3, amount=AMOUNT, has_amount=(False, True, True)))
    np.testing.assert_allclose(np.bincount(action.choice, minlength=3) / NUM, 1 / 3, atol=0.04)
    assert action.amount.shape == (NUM, 2)
    np.testing.assert_allclose(action.amount.min(0), [-1, 5], atol=0.01)
    np.testing.assert_allclose(action.amount.max(0), [1, 6], atol=0.01)
    np.testing.assert_allclose(action.amount.mean(0), [0, 5.5], atol=0.05)


def test_random_action_keeps_to_the_mask():
    mask = jnp.broadcast_to(jnp.array([True, False, True]), (NUM, 3))
    counts = np.bincount(draw(Discrete(num=3), mask), minlength=3) / NUM
    np.testing.assert_allclose(counts, [0.5, 0, 0.5], atol=0.04)


def test_cases_are_every_environment_at_every_size(monkeypatch):
    """Without making them: an environment here is its own name."""
    names = list(environments.ENVIRONMENTS)
    made = {name: (lambda name=name: name) for name in names}
    monkeypatch.setattr(environments, "ENVIRONMENTS", made)
    monkeypatch.setattr(environments, "find_spec", lambda package: package != "simglucose" or None)
    monkeypatch.setattr(environments, "partial", lambda *_, **__: abs)
    cases = {case.name: case for case in environments.cases()}
    assert not any("uva" in name for name in cases)
    assert len(cases) == 4 * (len(names) - 1) + 1
    assert cases["glucose-2048"].items == 2048 * 200
    assert cases["hiv-16384"].items == 1 << 20
    assert cases["hiv-1"].peer is None
    assert cases["icu-sepsis-1"].peer is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", environments.ENVIRONMENTS)
def test_every_environment_takes_random_actions(name):
    package = environments.REQUIRED.get(name)
    if package is not None and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    environment = environments.ENVIRONMENTS[name]()
    running = core.start_batch(environment, jax.random.key(0), 4)
    rollout = jax.jit(partial(environments.random_rollout, environment, num_steps=12))
    after, reward = rollout(jax.random.key(1), running)
    assert reward.shape == (12, 4)
    assert np.all(np.isfinite(reward))
    assert jax.tree.structure(after) == jax.tree.structure(running)
    layout = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(running)]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] == layout
    assert dataclasses.is_dataclass(after)
