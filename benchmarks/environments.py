"""Environment steps a second under a random policy, beside each environment's own program."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.harness import Case, Peer
from jaxrl_llm.envs import adapters, core, icu_sepsis
from jaxrl_llm.kernels import policy_gradient
from jaxrl_llm.types import Array, Discrete, Environment, Key

NUM_STEPS = 200
PEER_STEPS = 5000  # of an environment that steps one at a time in Python
SIZES = (1, 64, 2048, 16384)


def cases() -> Iterable[Case]:
    """ICU-Sepsis with admissible actions, and CartPole through `from_gymnax`."""
    icu = icu_sepsis.make()
    for size in SIZES:
        yield _case(f"icu-sepsis-{size}", icu, size, partial(peers.icu_sepsis, PEER_STEPS))
    cartpole = adapters.from_gymnax("CartPole-v1")
    for size in SIZES:
        peer = partial(peers.gymnax_cartpole, size, NUM_STEPS)
        yield _case(f"cartpole-{size}-gymnax", cartpole, size, peer)
    peer = partial(
        peers.gymnasium_cartpole, 64, PEER_STEPS // 64, vectorization="vector_entry_point"
    )
    yield _case("cartpole-64-gymnasium-vector", cartpole, 64, peer)


def _case(name: str, environment: Environment, size: int, peer: Callable[[], Peer]) -> Case:
    running = core.start_batch(environment, jax.random.key(0), size)
    return Case(
        name=name,
        function=jax.jit(partial(random_rollout, environment, num_steps=NUM_STEPS)),
        arguments=(jax.random.key(1), running),
        items=size * NUM_STEPS,
        unit="steps",
        peer=peer,
        agree=_plausible,
    )


def random_rollout(
    environment: Environment, key: Key, running: core.Running, *, num_steps: int
) -> tuple[core.Running, Array]:
    """The environments after `num_steps` random allowed actions, and the rewards `[T, B]`."""
    assert isinstance(environment.action_space, Discrete)
    logits = jnp.zeros(environment.action_space.num)
    rollout_key, action_key = jax.random.split(key)

    def policy(uniform: Array, _: Any, mask: Array | None) -> tuple[Array, dict[str, Array]]:
        if mask is None:
            return (uniform * logits.size).astype(jnp.int32), {}
        sample = jax.vmap(policy_gradient.sample_action, in_axes=(None, 0, 0))
        return sample(logits, uniform, mask), {}

    batch = running.episode_length.shape[0]
    noise = jax.random.uniform(action_key, (num_steps, batch))
    running, steps = core.rollout(
        environment, policy, rollout_key, running, num_steps=num_steps, noise=noise
    )
    return running, steps.reward


def _plausible(ours: tuple[core.Running, Array], _: Any) -> None:
    """Programs with other random numbers agree in law only, which the tests check."""
    assert np.all(np.isfinite(ours[1]))
