"""Any finite MDP as an environment: its exact values are the oracle of every learner.

The successor of a state-action pair is drawn in O(1), whatever the number of states, from an alias
table (Walker 1977; Vose 1991): one slot is chosen uniformly, and the slot holds two outcomes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrl_llm.envs import core
from jaxrl_llm.kernels import bellman
from jaxrl_llm.types import MDP, Array, Discrete, Environment, Key, SuccessorMDP, TimeStep


@struct.dataclass(kw_only=True)
class AliasTable:
    """`N` laws over `K` outcomes: slot k gives k with probability `threshold`, else `alias`.

    Attributes:
      threshold: `[N, K]` float32.
      alias: `[N, K]` int32.
    """

    threshold: Array
    alias: Array

    def sample(self, key: Key, law: Array) -> Array:
        """Draws one outcome, `[]` int32, of law number `law` `[]`."""
        choice, side = jax.random.uniform(key, (2,))
        num_slots = self.threshold.shape[1]
        slot = jnp.minimum((choice * num_slots).astype(jnp.int32), num_slots - 1)
        return jnp.where(side < self.threshold[law, slot], slot, self.alias[law, slot])


@struct.dataclass(kw_only=True)
class TabularParams:
    """What `step` and `reset` read.

    Attributes:
      row: `[S, A]` int32, the law of each state-action pair.
      successors: an `AliasTable` of positions in `successor`'s rows.
      successor: `[N, K]` int32, next states.
      reward: `[N, K]` float32.
      initial: an `AliasTable` of the one law of the first state.
      terminal: `[S]` bool.
      action_mask: `[S, A]` bool.
    """

    row: Array
    successors: AliasTable
    successor: Array
    reward: Array
    initial: AliasTable
    terminal: Array
    action_mask: Array


def make(
    mdp: MDP | SuccessorMDP,
    *,
    name: str = "tabular",
    max_steps: int | None = None,
    report_inadmissible: bool = False,
    info: Callable[[Array], dict[str, Array]] = lambda _: {},
) -> Environment:
    """The environment whose exact values `kernels.bellman` gives.

    The state and the observation are the state's index, `[]` int32. `TimeStep.info` holds
    `action_mask` `[A]` of the new state.

    Args:
      mdp: one problem, validated by `checks.mdp` where it was made.
      name: for messages.
      max_steps: truncate an episode after this many steps; never when None.
      report_inadmissible: add `TimeStep.info["inadmissible"]` `[]` bool, whether the action just
        taken was masked.
      info: new state `[]` -> more entries for `TimeStep.info`.
    """
    sparse = mdp if isinstance(mdp, SuccessorMDP) else bellman.successor_form(mdp)
    params = TabularParams(
        row=sparse.row,
        successors=alias_table(np.asarray(sparse.probability)),
        successor=sparse.successor,
        reward=sparse.reward.astype(jnp.float32),
        initial=alias_table(np.asarray(sparse.initial)[None]),
        terminal=sparse.terminal,
        action_mask=sparse.action_mask,
    )

    def reset(key: Key, params: TabularParams) -> tuple[Array, Array]:
        state = params.initial.sample(key, jnp.int32(0))
        return state, state

    def step(
        key: Key, state: Array, action: Array, params: TabularParams
    ) -> tuple[Array, TimeStep]:
        row = params.row[state, action]
        position = params.successors.sample(key, row)
        following = params.successor[row, position]
        told = {"action_mask": params.action_mask[following], **info(following)}
        if report_inadmissible:
            told["inadmissible"] = ~params.action_mask[state, action]
        return following, TimeStep(
            observation=following,
            reward=params.reward[row, position],
            terminated=params.terminal[following],
            truncated=jnp.bool_(False),
            info=told,
        )

    def action_mask(state: Array, params: TabularParams) -> Array:
        return params.action_mask[state]

    environment = Environment(
        name=name,
        reset=reset,
        step=step,
        default_params=params,
        observation_space=Discrete(num=mdp.num_states),
        action_space=Discrete(num=mdp.num_actions),
        action_mask=action_mask,
    )
    return environment if max_steps is None else core.time_limit(environment, max_steps)


def alias_table(probability: np.ndarray) -> AliasTable:
    """Alias tables of many laws at once, on the host.

    Each of K rounds settles one slot of every law: the least probable outcome left fills what it
    can of its slot, and the most probable one fills the rest.

    Args:
      probability: `[N, K]`; rows of zeros (terminal states) give outcome 0.

    Source: Walker (1977), "An efficient method for generating discrete random variables".
    """
    num_laws, num_slots = probability.shape
    total = probability.sum(axis=1, keepdims=True, dtype=np.float64)
    law = np.where(total > 0, probability, np.arange(num_slots) == 0)
    mass = law * num_slots / np.where(total > 0, total, 1)
    laws = np.arange(num_laws)
    threshold = np.ones_like(mass)
    alias = np.tile(np.arange(num_slots), (num_laws, 1))
    settled = np.zeros(mass.shape, bool)
    for _ in range(num_slots):
        small = np.argmin(np.where(settled, np.inf, mass), axis=1)
        large = np.argmax(np.where(settled, -np.inf, mass), axis=1)
        share = np.minimum(mass[laws, small], 1)
        threshold[laws, small] = np.where(small == large, 1, share)
        alias[laws, small] = large
        mass[laws, large] -= 1 - share
        settled[laws, small] = True
    return AliasTable(
        threshold=jnp.asarray(threshold, jnp.float32),
        alias=jnp.asarray(alias, jnp.int32),
    )
