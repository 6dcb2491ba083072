"""The recurrent torso against its equations, and a memory that is emptied at the right step."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.nn.recurrent import RecurrentActorCritic, RecurrentTorso, forget
from jaxrl_llm.types import Discrete

LENGTH, BATCH, WIDTH = 6, 3, 4
NETWORK: Any = RecurrentActorCritic(Discrete(num=2), hidden_sizes=(5,), num_features=WIDTH)
CELLS = ("lstm", "gru")


def draw(seed, *shape):
    return jnp.array(np.random.default_rng(seed).normal(size=shape), jnp.float32)


OBSERVATION = draw(0, LENGTH, BATCH, 2)
MEMORY = (draw(1, BATCH, WIDTH), draw(2, BATCH, WIDTH))
NEVER = jnp.zeros((LENGTH, BATCH), bool)
PARAMS = jax.jit(NETWORK.init)(jax.random.key(0), MEMORY, OBSERVATION, NEVER)


@jax.jit
def unroll(memory, observation, start):
    """Memory afterwards, and logits and values `[T, B, 3]`."""
    memory, policy, value = NETWORK.apply(PARAMS, memory, observation, start)
    return memory, jnp.concatenate([policy.logits, value[..., None]], axis=-1)


@jax.jit
def one_step(memory, observation, start):
    memory, policy, value = NETWORK.apply(PARAMS, memory, observation[None], start[None])
    return memory, jnp.concatenate([policy.logits[0], value[0][:, None]], axis=-1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_lstm(params, memory, x):
    """f, i, o, g as in Hochreiter & Schmidhuber (1997) with a forget gate; memory is (c, h)."""
    c, h = memory
    gates = {
        gate: x @ params[f"i{gate}"]["kernel"]
        + h @ params[f"h{gate}"]["kernel"]
        + params[f"h{gate}"]["bias"]
        for gate in "ifgo"
    }
    c = sigmoid(gates["f"]) * c + sigmoid(gates["i"]) * np.tanh(gates["g"])
    h = sigmoid(gates["o"]) * np.tanh(c)
    return (c, h), h


def numpy_gru(params, memory, x):
    def inner(name, inputs):
        layer = params[name]
        return inputs @ layer["kernel"] + layer.get("bias", 0)

    r = sigmoid(inner("ir", x) + inner("hr", memory))
    z = sigmoid(inner("iz", x) + inner("hz", memory))
    candidate = np.tanh(inner("in", x) + r * inner("hn", memory))
    memory = (1 - z) * candidate + z * memory
    return memory, memory


@pytest.mark.parametrize(("cell", "step"), [("lstm", numpy_lstm), ("gru", numpy_gru)])
def test_torso_follows_its_equations_and_empties_its_memory_before_a_start(cell, step):
    torso: Any = RecurrentTorso(WIDTH, cell)
    memory = MEMORY if cell == "lstm" else MEMORY[0]
    start = np.random.default_rng(3).random((LENGTH, BATCH)) < 0.3
    params = torso.init(jax.random.key(0), memory, OBSERVATION, jnp.array(start))
    after, features = torso.apply(params, memory, OBSERVATION, jnp.array(start))
    weights, past = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, memory))
    for time in range(LENGTH):
        kept = ~start[time][:, None]
        past = tuple(leaf * kept for leaf in past) if cell == "lstm" else past * kept
        past, expected = step(weights["params"]["cell"], past, np.asarray(OBSERVATION[time]))
        np.testing.assert_allclose(features[time], expected, atol=1e-6)
    for leaf, expected in zip(jax.tree.leaves(after), jax.tree.leaves(past), strict=True):
        np.testing.assert_allclose(leaf, expected, atol=1e-6)


def test_steps_one_by_one_equal_the_unrolled_sequence():
    start = NEVER.at[2, 0].set(True).at[4].set(True)
    after, expected = unroll(MEMORY, OBSERVATION, start)
    memory = MEMORY
    for time in range(LENGTH):
        memory, outputs = one_step(memory, OBSERVATION[time], start[time])
        np.testing.assert_allclose(outputs, expected[time], atol=1e-6)
    for leaf, other in zip(memory, after, strict=True):
        np.testing.assert_allclose(leaf, other, atol=1e-6)


def test_from_a_start_on_nothing_of_the_past_is_left():
    """The same program, to the last bit: other memory and observations before step 2."""
    start = NEVER.at[2].set(True)
    _, outputs = unroll(MEMORY, OBSERVATION, start)
    others = OBSERVATION.at[:2].set(draw(4, 2, BATCH, 2))
    _, fresh = unroll(NETWORK.empty_memory((BATCH,)), others, start)
    np.testing.assert_array_equal(outputs[2:], fresh[2:])
    assert (outputs[:2] != fresh[:2]).any()
    # And it is what an episode says that begins there.
    _, begun = unroll(NETWORK.empty_memory((BATCH,)), jnp.roll(OBSERVATION, -2, axis=0), NEVER)
    np.testing.assert_allclose(outputs[2:], begun[: LENGTH - 2], atol=1e-6)
    # A reset one step late, or none, is not.
    for wrong in (NEVER, NEVER.at[3].set(True)):
        _, late = unroll(MEMORY, OBSERVATION, wrong)
        assert np.abs(late[2] - begun[0]).max() > 1e-3


def test_memory_of_one_environment_never_reaches_another():
    start = NEVER.at[3, 0].set(True)
    after, expected = unroll(MEMORY, OBSERVATION, start)
    other = tuple(leaf.at[0].set(7.0) for leaf in MEMORY)
    changed = unroll(other, OBSERVATION.at[:, 0].add(1.0), start.at[1, 0].set(True))
    np.testing.assert_array_equal(changed[1][:, 1:], expected[:, 1:])
    for leaf, before in zip(changed[0], after, strict=True):
        np.testing.assert_array_equal(leaf[1:], before[1:])
    assert (changed[1][:, 0] != expected[:, 0]).any()


def test_gradients_flow_through_time_and_stop_at_a_start():
    @jax.jit
    @partial(jax.grad, argnums=1)
    def slope(memory, observation, start):
        return jnp.sum(unroll(memory, observation, start)[1][-1])

    through = slope(MEMORY, OBSERVATION, NEVER)
    assert np.isfinite(through).all()
    assert (np.abs(through).max(axis=(1, 2)) > 0).all()
    cut = slope(MEMORY, OBSERVATION, NEVER.at[3].set(True))
    assert not cut[:3].any()
    assert (np.abs(cut[3:]).max(axis=(1, 2)) > 0).all()


def test_masked_actions_have_no_probability():
    mask = jnp.broadcast_to(jnp.array([True, False]), (LENGTH, BATCH, 2))
    _, policy, _ = NETWORK.apply(PARAMS, MEMORY, OBSERVATION, NEVER, action_mask=mask)
    np.testing.assert_array_equal(jax.nn.softmax(policy.logits)[..., 1], 0)


@pytest.mark.parametrize("cell", CELLS)
def test_empty_memory_is_what_is_left_after_forgetting(cell):
    empty = RecurrentTorso(WIDTH, cell).empty_memory((BATCH,))
    full = jax.tree.map(jnp.ones_like, empty)
    forgotten = forget(full, jnp.ones(BATCH, bool))
    assert jax.tree.structure(empty) == jax.tree.structure(forgotten)
    for leaf, other in zip(jax.tree.leaves(forgotten), jax.tree.leaves(empty), strict=True):
        np.testing.assert_array_equal(leaf, other)
    partly = forget(full, jnp.array([True, False, True]))
    for leaf in jax.tree.leaves(partly):
        np.testing.assert_array_equal(leaf.sum(axis=1), [0, WIDTH, 0])
