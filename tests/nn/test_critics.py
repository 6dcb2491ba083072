"""Critics: shapes, NumPy references, the dueling identity and the independence of twins."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.nn.critics import QNetwork, StateActionCritic, TwinQ
from jaxrl_llm.nn.heads import TabularEmbedding

NUM_ACTIONS, FEATURES = 3, 4
OBSERVATION = np.random.default_rng(0).normal(size=(2, 5, FEATURES)).astype(np.float32)
ACTION = np.random.default_rng(1).normal(size=(2, 5, 2)).astype(np.float32)
STATE = np.random.default_rng(2).integers(0, 6, size=(2, 5))


def apply(module: nn.Module, variables: Any, *inputs: Any) -> Any:
    """`module.apply`, which Flax declares as possibly returning mutated variables too."""
    return module.apply(variables, *inputs)


def random_like(variables: Any, seed: int) -> Any:
    """Standard normal variables, biases too."""
    leaves, structure = jax.tree.flatten(variables)
    rng = np.random.default_rng(seed)
    leaves = [jnp.array(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(structure, leaves)


def dense(layer: Any, x: np.ndarray) -> np.ndarray:
    return x @ np.array(layer["kernel"]) + np.array(layer["bias"])


def relu_mlp(layers: Any, x: np.ndarray) -> np.ndarray:
    """An MLP in NumPy, whatever its number of layers."""
    for index in range(sum(name.startswith("hidden") for name in layers)):
        x = np.maximum(dense(layers[f"hidden_{index}"], x), 0)
    return dense(layers["output"], x) if "output" in layers else x


CRITICS = [
    pytest.param(QNetwork(NUM_ACTIONS, (8, 6)), (OBSERVATION,), (NUM_ACTIONS,), id="q"),
    pytest.param(
        QNetwork(NUM_ACTIONS, (8, 6), is_dueling=True), (OBSERVATION,), (NUM_ACTIONS,), id="dueling"
    ),
    pytest.param(StateActionCritic((8, 6)), (OBSERVATION, ACTION), (), id="state-action"),
    pytest.param(TabularEmbedding(6, NUM_ACTIONS), (STATE,), (NUM_ACTIONS,), id="table"),
]


def test_q_network_matches_numpy():
    network = QNetwork(NUM_ACTIONS, (8, 6))
    shapes = jax.eval_shape(network.init, jax.random.key(0), OBSERVATION[0, 0])
    variables = random_like(shapes, 1)
    expected = relu_mlp(variables["params"]["q"], OBSERVATION)
    np.testing.assert_allclose(
        apply(network, variables, OBSERVATION), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("hidden_sizes", [(), (6,), (8, 6)])
def test_dueling_q_network_matches_equation_9_and_its_mean_is_the_value(hidden_sizes):
    network = QNetwork(NUM_ACTIONS, hidden_sizes, is_dueling=True)
    shapes = jax.eval_shape(network.init, jax.random.key(0), OBSERVATION[0, 0])
    variables = random_like(shapes, 1)
    parts: Any = {"torso": {}, **variables["params"]}
    features = relu_mlp(parts["torso"], OBSERVATION)
    value = relu_mlp(parts["value"], features)
    advantage = relu_mlp(parts["advantage"], features)
    expected = value + advantage - advantage.mean(axis=-1, keepdims=True)
    q = apply(network, variables, OBSERVATION)
    np.testing.assert_allclose(q, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(q.mean(axis=-1), value[..., 0], rtol=1e-4, atol=1e-4)
    # What all advantages gain is no part of Q.
    raised = jax.tree.map(lambda leaf: leaf, variables)
    raised["params"]["advantage"]["output"]["bias"] += 5.0
    np.testing.assert_allclose(apply(network, raised, OBSERVATION), q, rtol=1e-4, atol=1e-4)


def test_state_action_critic_matches_numpy():
    critic = StateActionCritic((8, 6))
    shapes = jax.eval_shape(critic.init, jax.random.key(0), OBSERVATION[0, 0], ACTION[0, 0])
    variables = random_like(shapes, 1)
    both = np.concatenate([OBSERVATION, ACTION], axis=-1)
    features = relu_mlp(variables["params"]["torso"], both)
    expected = dense(variables["params"]["value"]["value"], features)[..., 0]
    actual = apply(critic, variables, OBSERVATION, ACTION)
    assert actual.shape == (2, 5)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("critic", "inputs", "shape"), CRITICS)
def test_twin_q_is_two_critics_that_share_nothing(critic, inputs, shape):
    twins = TwinQ(critic)
    one = tuple(leaf[0, 0] for leaf in inputs)
    variables = random_like(jax.eval_shape(twins.init, jax.random.key(0), *one), 1)
    assert set(variables["params"]) == {"first", "second"}
    q = jax.jit(partial(apply, twins))(variables, *inputs)
    assert q.shape == (2, 2, 5, *shape)
    for index, name in enumerate(("first", "second")):
        alone = apply(critic, {"params": variables["params"][name]}, *inputs)
        np.testing.assert_allclose(q[index], alone, rtol=1e-4, atol=1e-4)

    def first(variables: Any) -> Any:
        return jnp.sum(apply(twins, variables, *inputs)[0] ** 2)

    gradient = jax.jit(jax.grad(first))(variables)["params"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient["first"]))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["second"]))


def test_twin_q_starts_from_different_parameters():
    variables = TwinQ(QNetwork(NUM_ACTIONS, (8,))).init(jax.random.key(0), OBSERVATION[0, 0])
    twins: Any = variables["params"]
    first, second = (twins[name]["q"]["hidden_0"]["kernel"] for name in ("first", "second"))
    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize(("critic", "inputs", "shape"), CRITICS)
def test_critics_of_a_batch_equal_one_by_one(critic, inputs, shape):
    one = tuple(leaf[0, 0] for leaf in inputs)
    variables = random_like(jax.eval_shape(critic.init, jax.random.key(0), *one), 1)
    q = apply(critic, variables, *inputs)
    assert q.shape == (2, 5, *shape)
    one_by_one = jax.vmap(jax.vmap(partial(apply, critic, variables)))(*map(jnp.array, inputs))
    np.testing.assert_allclose(q, one_by_one, rtol=1e-4, atol=1e-4)


def test_dueling_gradient_of_one_action_moves_the_value_and_sums_to_zero_over_advantages():
    network = QNetwork(NUM_ACTIONS, (6,), is_dueling=True)
    variables = random_like(jax.eval_shape(network.init, jax.random.key(0), OBSERVATION[0, 0]), 1)
    gradient = jax.jit(jax.grad(lambda v: apply(network, v, OBSERVATION[0, 0])[1]))(variables)
    advantage = gradient["params"]["advantage"]["output"]["bias"]
    np.testing.assert_allclose(advantage, [-1 / 3, 2 / 3, -1 / 3], rtol=1e-5)
    np.testing.assert_allclose(gradient["params"]["value"]["output"]["bias"], [1.0])
