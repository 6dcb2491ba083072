"""Parameters of `TabularActorCritic`, written as plain tables."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike


def tables(policy: ArrayLike, value: ArrayLike) -> dict[str, Any]:
    """Logits `[S, A]` and values `[S]` as the network's variables."""
    policy, value = jnp.array(policy, jnp.float32), jnp.array(value, jnp.float32)
    return {"params": {"actor": {"policy": {"table": policy}}, "value": {"table": value[:, None]}}}


def logits(variables: dict[str, Any]) -> Any:
    """The table of logits `[..., S, A]` in the network's variables, or in their gradient."""
    return variables["params"]["actor"]["policy"]["table"]


def random_tables(seed: int, num_states: int, num_actions: int) -> dict[str, Any]:
    """Standard normal logits and values."""
    random = np.random.default_rng(seed)
    return tables(random.normal(size=(num_states, num_actions)), random.normal(size=num_states))
