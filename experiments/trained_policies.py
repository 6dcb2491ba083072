"""What trained policies do, feed-forward and recurrent alike: their returns, and one episode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxrl_llm.agents import recurrent_ppo
from jaxrl_llm.envs import core
from jaxrl_llm.nn import policies
from jaxrl_llm.nn.recurrent import RecurrentActorCritic
from jaxrl_llm.training import experiment, report
from jaxrl_llm.types import Array, Environment, Key, PyTree, Transition


def mean_returns(
    environment: Environment,
    network: nn.Module,
    params: PyTree,
    key: Key,
    max_steps: int,
    num_episodes: int,
    *,
    is_greedy: bool = True,
) -> Array:
    """The mean undiscounted return of the mode of each seed's policy, or of itself: `[seeds]`.

    Args:
      environment: whose episodes end within `max_steps`.
      network: of `agents.ppo`, or of `agents.recurrent_ppo`.
      params: of the network, leaves `[seeds, ...]`.
      key: consumed; every seed treats patients of its own.
      max_steps: of an episode.
      num_episodes: a seed.
      is_greedy: the mode rather than a draw.
    """

    def mean_return(params: PyTree, key: Key) -> Array:
        start_key, noise_key, rollout_key = jax.random.split(key, 3)
        noise = policies.draw_noise(environment.action_space, noise_key, (max_steps, num_episodes))
        _, _, steps = core.rollout_with_memory(
            environment,
            actor(network, params, is_greedy=is_greedy),
            rollout_key,
            core.start_batch(environment, start_key, num_episodes),
            _memory(network, num_episodes),
            num_steps=max_steps,
            noise=noise,
        )
        return jnp.mean(first_returns(steps))

    num_seeds = len(jax.tree.leaves(params)[0])
    return jax.vmap(mean_return)(params, jax.random.split(key, num_seeds))


def actor(network: nn.Module, params: PyTree, *, is_greedy: bool) -> core.MemoryPolicy:
    """The network's policy, or its mode, as rollouts take it; its noise is of `nn.policies`."""

    def act(
        memory: PyTree, noise: PyTree, observation: Array, action_mask: Array | None, start: Array
    ) -> tuple[PyTree, PyTree, dict[str, Array]]:
        if isinstance(network, RecurrentActorCritic):
            memory, policy, _ = recurrent_ppo.forward_step(
                network, params, memory, observation, start, action_mask
            )
        else:
            policy, _ = policies.forward(network, params, observation, action_mask)
        latent = policy.mode() if is_greedy else policy.sample(noise)
        return memory, policy.action(latent), {}

    return act


def first_returns(steps: Transition) -> Array:
    """The return `[B]` of the first episode of each environment of a rollout `[T, B]`."""
    first = jnp.argmax(steps.terminated | steps.truncated, axis=0)
    return jnp.take_along_axis(steps.extras["episode_return"], first[None], axis=0)[0]


def constant_returns(environment: Environment, doses: Array, key: Key, max_steps: int) -> Array:
    """The undiscounted return `[N]` of an episode of each constant dose of `doses` `[N]`."""
    start_key, rollout_key = jax.random.split(key)
    start = core.start_batch(environment, start_key, len(doses))
    _, steps = core.rollout(
        environment, lambda *_: (doses[:, None], {}), rollout_key, start, num_steps=max_steps
    )
    return first_returns(steps)


def episode(
    environment: Environment,
    network: nn.Module,
    params: PyTree,
    key: Key,
    max_steps: int,
    *,
    seed: int,
) -> dict[str, NDArray[Any]]:
    """`TimeStep.info` `[T, ...]` of an episode under the mode of one seed's policy, to its end."""
    params = jax.tree.map(lambda leaf: leaf[seed], params)
    reset_key, noise_key, step_key = jax.random.split(key, 3)
    noise = policies.draw_noise(environment.action_space, noise_key, (max_steps, 1))
    act = actor(network, params, is_greedy=True)

    def body(carry: tuple, inputs: tuple) -> tuple[tuple, Any]:
        state, observation, memory = carry
        time, noise = inputs
        memory, action, _ = act(memory, noise, observation[None], None, (time == 0)[None])
        action = jax.tree.map(lambda leaf: leaf[0], action)
        state, step = environment.step(
            jax.random.fold_in(step_key, time), state, action, environment.default_params
        )
        return (state, step.observation, memory), (step.info, step.terminated | step.truncated)

    begin = (*environment.reset(reset_key, environment.default_params), _memory(network, 1))
    inputs = (jnp.arange(max_steps), noise)
    info, ended = jax.device_get(jax.jit(lambda: jax.lax.scan(body, begin, inputs)[1])())
    length = int(np.argmax(ended)) + 1
    return {name: values[:length] for name, values in info.items()}


def show(
    run: experiment.Run[Any],
    title: str,
    known: Mapping[str, Any],
    found: Mapping[str, Array],
    items_per_step: int,
) -> dict[str, float]:
    """A table and a learning curve of what was found beside what is known; and it in numbers.

    Args:
      run: that logged a metric of the first name of `found`.
      title: of both.
      known: values to compare with, by name.
      found: the final value of each seed `[seeds]`, by name.
      items_per_step: environment steps of one seed in a step of the algorithm.
    """
    first = next(iter(found))
    steps, values = experiment.curve(run, first)
    learned = {f"PPO, {name}": np.asarray(numbers) for name, numbers in found.items()}
    path, curve = run.directory / "learning_curve.png", (steps * items_per_step, values)
    report.show_learning(path, title, known, learned, curve, value_name="Return of an episode")
    measures = {"mean": np.mean, "std": np.std, "min": np.min}
    return {
        f"{name}_{measure}": float(function(np.asarray(numbers)))
        for name, numbers in found.items()
        for measure, function in measures.items()
    }


def _memory(network: nn.Module, num_environments: int) -> PyTree:
    """What a network knows before the first step; nothing where it has no memory."""
    is_recurrent = isinstance(network, RecurrentActorCritic)
    return network.empty_memory((num_environments,)) if is_recurrent else ()
