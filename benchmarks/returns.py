"""Generalised advantages of batches of trajectories, time-major, beside rlax."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.harness import Case
from jaxrl_llm.kernels import returns
from jaxrl_llm.types import Array

SIZES = ((128, 2048), (2048, 64), (1024, 4096))  # [T, B]
LAMBDA = 0.95
CACHED_BYTES = 32 * 2**20


def cases() -> Iterable[Case]:
    """GAE at the three sizes of `SIZES`."""
    advantages = jax.jit(
        jax.vmap(partial(returns.gae, lambda_=LAMBDA), in_axes=1, out_axes=1),
    )
    for num_steps, batch in SIZES:
        reward, discount, values, reset = _trajectories(num_steps, batch)
        arguments = (reward, discount, values[:-1], values[1:], reset)
        # What a call must move: its inputs read once and its result written once.
        moved = sum(argument.nbytes for argument in arguments) + reward.nbytes
        limit = "cached_bytes" if moved < CACHED_BYTES else "streamed_bytes"
        yield Case(
            name=f"gae-{num_steps}x{batch}",
            function=advantages,
            arguments=arguments,
            items=num_steps * batch,
            unit="transitions",
            peer=partial(peers.rlax_gae, reward, discount, values, LAMBDA),
            agree=partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
            work=lambda _, limit=limit, moved=moved: {limit: moved},
        )


def _trajectories(num_steps: int, batch: int) -> tuple[Array, Array, Array, Array]:
    """Reward, discount and reset `[T, B]` and values `[T + 1, B]`; 1 step in 20 ends an episode."""
    keys = jax.random.split(jax.random.key(0), 3)
    reset = jax.random.bernoulli(keys[0], 0.05, (num_steps, batch))
    reward = jax.random.normal(keys[1], (num_steps, batch))
    values = jax.random.normal(keys[2], (num_steps + 1, batch))
    return reward, jnp.where(reset, 0.0, 0.99), values, reset
