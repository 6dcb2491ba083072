"""What the tests of GPT-2 share: a tiny model with random weights, and one compiled `apply`."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxrl_llm.nn.gpt2 import GPT2, GPT2Config

TINY = GPT2Config(
    vocab_size=29,
    n_positions=12,
    n_embd=16,
    n_layer=2,
    n_head=2,
    bos_token_id=0,
    eos_token_id=0,
)
TOKENS = np.random.default_rng(0).integers(TINY.vocab_size, size=(3, 8))


def shapes(model: nn.Module) -> Any:
    """The parameters that `model` would draw, without drawing them."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]


def random_params(model: GPT2) -> Any:
    """Every leaf normal, biases and what starts at 0 too, so that no part is at rest."""
    random = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: random.normal(0, 0.5, leaf.shape).astype(leaf.dtype), shapes(model)
    )


def flat(params: Any) -> dict[tuple[str, ...], Any]:
    """The leaves by their paths."""
    return flatten_dict(params)


def fast_key(seed: int) -> Any:
    """A key whose generator compiles in half the time of the default one."""
    return jax.random.key(seed, impl="rbg")


def apply(model: nn.Module, params: Any, *inputs: Any, **options: Any) -> Any:
    """`model.apply`, which Flax declares as possibly returning mutated variables too."""
    return model.apply({"params": params}, *inputs, **options)


def run(model: nn.Module, params: Any, *inputs: Any, **options: Any) -> Any:
    """`model.apply`, compiled once for all tests, as NumPy arrays."""
    return jax.device_get(_run(model, params, *inputs, **options))


@partial(jax.jit, static_argnames=("model", "deterministic", "method"))
def _run(model: nn.Module, params: Any, *inputs: Any, key: Any = None, **options: Any) -> Any:
    rngs = None if key is None else {"dropout": key}
    return apply(model, params, *inputs, rngs=rngs, **options)
