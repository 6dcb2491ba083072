"""Any POMDP as an environment: what the agent sees is an observation, not the state.

`make` hides the state of `envs.tabular`; `with_belief` carries the exact belief along and shows
that instead, which turns the problem into an MDP over beliefs that any agent can learn.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike

from jaxrl_llm import checks
from jaxrl_llm.envs import core, tabular
from jaxrl_llm.kernels import belief as belief_kernels
from jaxrl_llm.types import MDP, POMDP, Array, Box, Discrete, Environment, Key, PyTree, TimeStep


def make_pomdp(mdp: MDP, observation: ArrayLike) -> POMDP:
    """Builds and validates a POMDP, on the host.

    Args:
      mdp: the process, from `make_mdp`; `mdp.initial` is the belief before the first observation.
      observation: `[A, S, O]`, the probability of each observation on ARRIVING in a state after an
        action; `[S, O]` where the action does not matter. Terminal states need rows too.

    Raises:
      ValueError: for a shape that does not fit, an observation law that is no law, an action that
        is not allowed in every state, or what `checks.mdp` finds.
    """
    checks.mdp(mdp)
    law = np.asarray(observation, np.asarray(mdp.transition).dtype)
    rows = (mdp.num_actions, mdp.num_states)
    if law.ndim == 2:
        law = np.broadcast_to(law, (mdp.num_actions, *law.shape))
    if law.ndim != 3 or law.shape[:2] != rows or not law.shape[2]:
        wanted = f"[actions, states, observations] = [{rows[0]}, {rows[1]}, O]"
        raise ValueError(f"observation has shape {np.shape(observation)}; it must be {wanted}")
    for place in np.argwhere(~((law >= 0) & (law < np.inf)))[:1]:
        raise ValueError(
            f"observation{place.tolist()} is {law[tuple(place)]:.7g}; "
            "a probability must be finite and at least 0"
        )
    total = law.sum(axis=-1, dtype=np.float64)
    for place in np.argwhere(np.abs(total - 1) > 1e-5)[:1]:
        raise ValueError(
            f"observation{place.tolist()} sums to {total[tuple(place)]:.7g}; each row must sum to 1"
        )
    for state, action in np.argwhere(~np.asarray(mdp.action_mask))[:1]:
        raise ValueError(
            f"action_mask[{state}, {action}] is False, which a hidden state cannot tell; "
            "allow every action, and let a wrong one cost"
        )
    return POMDP(mdp=mdp, observation=jnp.asarray(law))


@struct.dataclass(kw_only=True)
class HiddenParams:
    """What `step` and `reset` read.

    Attributes:
      process: of the hidden states.
      observations: an `AliasTable` of the laws of the observations, row `action · S + state`.
    """

    process: tabular.TabularParams
    observations: tabular.AliasTable


def make(pomdp: POMDP, *, name: str = "hidden", max_steps: int | None = None) -> Environment:
    """The environment of a POMDP; the observation is its index, `[]` int32.

    The state is hidden in the environment's own. Nothing is seen before the first action: the
    observation of `reset` is `num_observations`, one more than any other. That an episode has ended
    is told by `terminated`, as everywhere.

    Args:
      pomdp: the problem, from `make_pomdp`.
      name: for messages.
      max_steps: truncate an episode after this many steps; never when None.
    """
    process = tabular.make(pomdp.mdp)
    num_states, nothing = pomdp.mdp.num_states, pomdp.num_observations
    laws = np.asarray(pomdp.observation).reshape(-1, nothing)

    def reset(key: Key, params: HiddenParams) -> tuple[Array, Array]:
        state, _ = process.reset(key, params.process)
        return state, jnp.int32(nothing)

    def step(key: Key, state: Array, action: Array, params: HiddenParams) -> tuple[Array, TimeStep]:
        process_key, observation_key = jax.random.split(key)
        following, time_step = process.step(process_key, state, action, params.process)
        row = action * num_states + following
        seen = params.observations.sample(observation_key, row)
        return following, dataclasses.replace(time_step, observation=seen, info={})

    environment = Environment(
        name=name,
        reset=reset,
        step=step,
        default_params=HiddenParams(
            process=process.default_params, observations=tabular.alias_table(laws)
        ),
        observation_space=Discrete(num=nothing + 1),
        action_space=process.action_space,
        action_mask=None,
    )
    return environment if max_steps is None else core.time_limit(environment, max_steps)


@struct.dataclass(kw_only=True)
class Believed:
    """The state of an environment that carries its belief: `state`, and `belief` `[S]`."""

    state: PyTree
    belief: Array


@struct.dataclass(kw_only=True)
class BeliefParams:
    """Parameters of the environment inside, and the POMDP that the filter believes in."""

    inner: PyTree
    pomdp: POMDP


def with_belief(environment: Environment, pomdp: POMDP) -> Environment:
    """The same environment, observed as the exact belief `[S]` float32 over the hidden state.

    Args:
      environment: from `make`.
      pomdp: what the filter believes: the same problem, or another to see what a wrong model costs.
        It is part of the parameters.
    """

    def reset(key: Key, params: BeliefParams) -> tuple[Believed, Array]:
        state, _ = environment.reset(key, params.inner)
        belief = params.pomdp.mdp.initial
        return Believed(state=state, belief=belief), belief

    def step(
        key: Key, state: Believed, action: Array, params: BeliefParams
    ) -> tuple[Believed, TimeStep]:
        inner, time_step = environment.step(key, state.state, action, params.inner)
        belief, _ = belief_kernels.belief_update(
            params.pomdp, state.belief, action, time_step.observation
        )
        time_step = dataclasses.replace(time_step, observation=belief)
        return Believed(state=inner, belief=belief), time_step

    single = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf, pomdp
    )
    return dataclasses.replace(
        environment,
        name=f"{environment.name} by belief",
        reset=reset,
        step=step,
        default_params=BeliefParams(inner=environment.default_params, pomdp=single),
        observation_space=Box(shape=(pomdp.mdp.num_states,), low=0.0, high=1.0),
    )
