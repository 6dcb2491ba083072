"""Reinforcement learning for healthcare and language models, in functional JAX.

Start from a problem:

>>> import jaxrl_llm
>>> chain = jaxrl_llm.make_mdp(
...     transition=[[[0.9, 0.1]], [[0.0, 0.0]]],  # sick stays sick, or recovers
...     reward=-1.0,  # a day of illness
...     discount=0.95,
...     terminal=[False, True],
... )
>>> chain.num_states, chain.num_actions
(2, 1)

The rest is in `kernels` (pure equations), `nn` (modules), `envs` (simulators), `data`, `agents`
(one file an algorithm), `lm` (language models) and `training`; import what you need from there.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxrl_llm import checks
from jaxrl_llm.types import MDP

try:
    __version__ = version("jaxrl-llm")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["MDP", "__version__", "make_mdp"]


def make_mdp(
    transition: ArrayLike,
    reward: ArrayLike,
    discount: float,
    *,
    initial: ArrayLike | None = None,
    terminal: ArrayLike | None = None,
    action_mask: ArrayLike | None = None,
) -> MDP:
    """Builds and validates a finite Markov decision process, on the host.

    Args:
      transition: `[S, A, S]`, the probability of each next state. Rows of terminal states are not
        read and may be all 0.
      reward: `[S, A, S]` for reaching each next state; `[S, A]` for taking an action in a state;
        `[S]` for LEAVING a state; or `[]`, the same at every step. Its rank says which. Stored as
        `[S, A, 1]` where it does not depend on the next state.
      discount: in [0, 1]; 1 only where every state can reach a terminal one.
      initial: `[S]`, the law of the first state; uniform over non-terminal states by default.
      terminal: `[S]` bool, the states that end an episode on arrival; none by default.
      action_mask: `[S, A]` bool, True where the action is allowed; all by default. A terminal
        state must allow one too.

    Returns:
      An `MDP` in float32; with `jax_enable_x64`, in the widest dtype of `transition` and `reward`.

    Raises:
      ValueError: naming the first offending index, see `checks.mdp`.
    """
    transition, reward = np.asarray(transition), np.asarray(reward)
    dtype = np.result_type(transition, reward, np.float32)
    if reward.ndim < transition.ndim and reward.shape == transition.shape[: reward.ndim]:
        rows = transition.shape[:-1]
        reward = reward.reshape(reward.shape + (1,) * (len(rows) - reward.ndim))
        reward = np.broadcast_to(reward, rows)[..., None]
    if terminal is None:
        terminal = np.zeros(transition.shape[:1], bool)
    if action_mask is None:
        action_mask = np.ones(transition.shape[:2], bool)
    if initial is None:
        alive = ~np.asarray(terminal, bool)
        initial = np.asarray(alive / max(alive.sum(), 1))

    def floating(array: ArrayLike) -> jax.Array:
        return jnp.asarray(np.asarray(array, dtype))

    return checks.mdp(
        MDP(
            transition=floating(transition),
            reward=floating(reward),
            discount=floating(discount),
            initial=floating(initial),
            terminal=jnp.asarray(np.asarray(terminal, bool)),
            action_mask=jnp.asarray(np.asarray(action_mask, bool)),
        )
    )
