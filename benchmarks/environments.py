"""Environment steps a second under a random policy, beside each environment's own program."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import glucose_peers, peers
from benchmarks.harness import Case, Peer
from jaxrl_llm.envs import (
    chemotherapy,
    core,
    glucose,
    gymnax_adapter,
    hiv,
    icu_sepsis,
    icu_sepsis_vitals,
    monitoring,
    patient_flow,
    recommendation,
    sepsis_oberst,
    treatment,
    ventilation,
)
from jaxrl_llm.kernels import policy_gradient
from jaxrl_llm.types import (
    Array,
    Box,
    Discrete,
    Environment,
    Hybrid,
    HybridAction,
    Key,
    PyTree,
    Space,
)

NUM_STEPS = 200
MOST_STEPS = 1 << 20  # of all patients in one call: the starts of episodes are drawn beforehand
PEER_STEPS = 5000  # of an environment that steps one at a time in Python
SLOW_PEER_STEPS = 100  # of one that takes 10 ms a step
SIZES = (1, 64, 2048, 16384)

ENVIRONMENTS: dict[str, Callable[[], Environment]] = {
    "icu-sepsis": icu_sepsis.make,
    "icu-sepsis-vitals": icu_sepsis_vitals.make,
    "sepsis-oberst": sepsis_oberst.make,
    "treatment": treatment.make,
    "monitoring-guide": monitoring.make,
    "monitoring-clinical": partial(monitoring.make, variant="clinical"),
    "recommendation": recommendation.make,
    "recommendation-stream": recommendation.make_stream,
    "chemotherapy": chemotherapy.make,
    "hiv": hiv.make,
    "ventilation": ventilation.make,
    "patient-flow": patient_flow.make,
    "glucose": glucose.make,
    "glucose-uva-padova": partial(glucose.make, model="uva_padova"),
    "cartpole": partial(gymnax_adapter.from_gymnax, "CartPole-v1"),
}
# The packages that an environment cannot be made without.
REQUIRED = {"cartpole": "gymnax", "glucose-uva-padova": "simglucose"}


def cases() -> Iterable[Case]:
    """Every environment whose package is installed, at every size."""
    simglucose = partial(glucose_peers.simglucose, SLOW_PEER_STEPS)
    one_at_a_time = {
        "icu-sepsis": partial(peers.icu_sepsis, PEER_STEPS),
        "glucose": simglucose,
        "glucose-uva-padova": simglucose,
    }
    for name, make in ENVIRONMENTS.items():
        if name in REQUIRED and find_spec(REQUIRED[name]) is None:
            continue
        environment = make()
        for size in SIZES:
            if name == "cartpole":
                peer = partial(peers.gymnax_cartpole, size, steps_of(size))
                yield _case(f"{name}-{size}-gymnax", environment, size, peer)
            else:
                yield _case(f"{name}-{size}", environment, size, one_at_a_time.get(name))
        if name == "cartpole":
            peer = partial(
                peers.gymnasium_cartpole, 64, PEER_STEPS // 64, vectorization="vector_entry_point"
            )
            yield _case("cartpole-64-gymnasium-vector", environment, 64, peer)


def steps_of(size: int) -> int:
    """Steps of each of `size` patients in one call."""
    return min(NUM_STEPS, MOST_STEPS // size)


def _case(name: str, environment: Environment, size: int, peer: Callable[[], Peer] | None) -> Case:
    num_steps = steps_of(size)

    @cache
    def arguments() -> tuple:
        start = jax.jit(lambda key: core.start_batch(environment, key, size))
        return jax.random.key(1), start(jax.random.key(0))

    return Case(
        name=name,
        function=jax.jit(partial(random_rollout, environment, num_steps=num_steps)),
        arguments=arguments,
        items=size * num_steps,
        unit="steps",
        peer=peer,
        agree=_plausible,
    )


def random_rollout(
    environment: Environment, key: Key, running: core.Running, *, num_steps: int
) -> tuple[core.Running, Array]:
    """The environments after `num_steps` random allowed actions, and the rewards `[T, B]`."""
    rollout_key, action_key = jax.random.split(key)
    space = environment.action_space

    def policy(noise: PyTree, _: Any, mask: Array | None) -> tuple[PyTree, dict[str, Array]]:
        return random_action(space, noise, mask), {}

    batch = running.episode_length.shape[0]
    running, steps = core.rollout(
        environment,
        policy,
        rollout_key,
        running,
        num_steps=num_steps,
        noise=draw_noise(space, action_key, (num_steps, batch)),
    )
    return running, steps.reward


def draw_noise(space: Space, key: Key, shape: tuple[int, ...]) -> PyTree:
    """Uniform numbers in [0, 1), as many as `shape` random actions need."""
    if isinstance(space, Hybrid):
        choice_key, amount_key = jax.random.split(key)
        return (
            jax.random.uniform(choice_key, shape),
            draw_noise(space.amount, amount_key, shape),
        )
    if isinstance(space, Box):
        shape = (*shape, *space.shape)
    return jax.random.uniform(key, shape)


def random_action(space: Space, noise: PyTree, mask: Array | None) -> PyTree:
    """Actions `[B, ...]` of `noise`, uniform over `space`, or over what `mask` `[B, A]` allows."""
    if isinstance(space, Hybrid):
        choice, amount = noise
        return HybridAction(
            choice=random_action(Discrete(num=space.num), choice, mask),
            amount=random_action(space.amount, amount, None),
        )
    if isinstance(space, Box):
        low, high = (
            jnp.broadcast_to(jnp.asarray(end), noise.shape) for end in (space.low, space.high)
        )
        return low + (high - low) * noise
    if mask is None:
        return (noise * space.num).astype(jnp.int32)
    sample = jax.vmap(policy_gradient.sample_action, in_axes=(None, 0, 0))
    return sample(jnp.zeros(space.num), noise, mask)


def _plausible(ours: tuple[core.Running, Array], _: Any) -> None:
    """Programs with other random numbers agree in law only, which the tests check."""
    assert np.all(np.isfinite(ours[1]))
