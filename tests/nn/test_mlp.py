"""The multilayer perceptron against NumPy."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.nn.mlp import MLP


def apply(module: nn.Module, variables: Any, *inputs: Any, **options: Any) -> Any:
    """`module.apply`, which Flax declares as possibly returning mutated variables too."""
    return module.apply(variables, *inputs, **options)


def numpy_forward(params: Any, x: np.ndarray, hidden: int) -> np.ndarray:
    for index in range(hidden):
        layer = params[f"hidden_{index}"]
        x = np.tanh(x @ np.array(layer["kernel"]) + np.array(layer["bias"]))
    if "output" in params:
        x = x @ np.array(params["output"]["kernel"]) + np.array(params["output"]["bias"])
    return x


@pytest.mark.parametrize("num_outputs", [None, 3])
@pytest.mark.parametrize("hidden_sizes", [(), (8,), (16, 8)])
def test_mlp_matches_numpy_for_any_leading_dimensions(hidden_sizes, num_outputs):
    network = MLP(hidden_sizes=hidden_sizes, num_outputs=num_outputs)
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    variables = network.init(jax.random.key(0), jnp.zeros(4))
    actual = jax.jit(partial(apply, network))(variables, x)
    expected = numpy_forward(variables.get("params", {}), x, len(hidden_sizes))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    one_by_one = jax.vmap(jax.vmap(lambda row: apply(network, variables, row)))(x)
    np.testing.assert_allclose(actual, one_by_one, rtol=1e-5, atol=1e-6)


def test_mlp_starts_orthogonal_with_zero_bias():
    network = MLP(hidden_sizes=(8, 8), num_outputs=3, output_scale=0.01)
    params = network.init(jax.random.key(1), jnp.zeros(4))["params"]
    for name, scale in (("hidden_0", np.sqrt(2)), ("hidden_1", np.sqrt(2)), ("output", 0.01)):
        kernel = np.array(params[name]["kernel"])
        short = min(kernel.shape)
        gram = kernel @ kernel.T if kernel.shape[0] == short else kernel.T @ kernel
        np.testing.assert_allclose(gram, scale**2 * np.eye(short), atol=1e-5 * scale)
        np.testing.assert_array_equal(params[name]["bias"], np.zeros(kernel.shape[1]))


def test_mlp_applies_its_activation_after_hidden_layers_only():
    network = MLP(hidden_sizes=(4,), activation=lambda x: 0 * x + 7, num_outputs=1)
    variables = network.init(jax.random.key(2), jnp.zeros(3))
    kernel = np.array(variables["params"]["output"]["kernel"])
    np.testing.assert_allclose(
        apply(network, variables, jnp.ones(3)), 7 * kernel.sum(0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_mlp_computes_in_its_dtype_and_keeps_float32_parameters(dtype):
    network = MLP(num_outputs=2, dtype=dtype)
    variables = network.init(jax.random.key(3), jnp.zeros(3))
    assert apply(network, variables, jnp.ones(3)).dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_mlp_float64_is_float64_throughout(x64):
    network = MLP(num_outputs=2, dtype=jnp.float64)
    variables = network.init(jax.random.key(3), jnp.zeros(3))
    x = np.random.default_rng(0).normal(size=3)
    expected = numpy_forward(variables["params"], x, 2)
    np.testing.assert_allclose(apply(network, variables, x), expected, rtol=1e-13)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float64)}
