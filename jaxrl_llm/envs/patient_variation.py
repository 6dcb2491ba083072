"""Patients who differ from the typical one: their constants, drawn once, when an episode begins."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxrl_llm.types import Array, Key

Constants = TypeVar("Constants")


def constants(**values: float) -> dict[str, Array]:
    """The values as arrays `[]` of JAX's floating-point type, by name."""
    return {name: jnp.asarray(value, float) for name, value in values.items()}


def log_normal_patient(
    key: Key, typical: Constants, spread: Constants | Array | float
) -> Constants:
    """One patient: each constant times exp(spread · z), with z ~ N(0, 1) of its own.

    The typical value is the median, and signs never change.

    Args:
      key: consumed.
      typical: a pytree of floating-point constants, `[]` each.
      spread: `[]`, 0 or more, the standard deviation of the logarithm; for a small one, the
        relative deviation. One number for all, or a pytree like `typical`.

    Returns:
      Constants like `typical`; the same ones where `spread` is 0.
    """
    leaves, structure = jax.tree.flatten(typical)
    spreads = jax.tree.leaves(spread)
    if len(spreads) == 1:
        spreads = spreads * len(leaves)
    # One draw for all: a draw a constant would be as many programs of the generator.
    deviates = jax.random.normal(key, (len(leaves),), jnp.result_type(*leaves))
    varied = [
        leaf * jnp.exp(wide * deviates[index])
        for index, (leaf, wide) in enumerate(zip(leaves, spreads, strict=True))
    ]
    return jax.tree.unflatten(structure, varied)
