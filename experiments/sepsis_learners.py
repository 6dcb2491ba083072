"""Four deep learners with tables for ICU-Sepsis, and the settings that serve each of them.

Research only, not for clinical use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxrl_llm.agents import a2c, dqn, ppo, sac
from jaxrl_llm.envs import icu_sepsis
from jaxrl_llm.kernels import bellman
from jaxrl_llm.nn import critics, heads, policies
from jaxrl_llm.types import MDP, Algorithm, Array, PyTree

DQN = dqn.Config(
    num_environments=256, num_steps=64, train_interval=4, batch_size=4096, buffer_size=262_144,
    warmup_steps=256, learning_rate=0.02, learning_rate_steps=4000, gamma=1.0, is_double=True,
    target_interval=32, epsilon_end=0.3, epsilon_steps=1_000_000,
)  # fmt: skip
A2C = a2c.Config(
    num_environments=256, num_steps=16, num_iterations=1000, optimizer="adam", learning_rate=0.1,
    gamma=1.0, gae_lambda=0.5, entropy_coefficient=0.002, max_gradient_norm=10.0,
    whiten_advantages=True,
)  # fmt: skip
PPO = ppo.Config(
    num_environments=512, num_steps=32, num_iterations=250, learning_rate=0.02, gamma=1.0,
    gae_lambda=0.5, entropy_coefficient=0.002, value_clip_epsilon=None, max_gradient_norm=10.0,
)  # fmt: skip
SAC = sac.Config(
    num_environments=512, num_steps=8, num_updates=4, batch_size=4096, buffer_size=200_000,
    warmup_steps=32, gamma=1.0, tau=0.05, learn_temperature=False, temperature=0.002,
    actor_learning_rate=0.003, critic_learning_rate=0.01,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of each kind of learner."""

    dqn: dqn.Config = DQN
    a2c: a2c.Config = A2C
    ppo: ppo.Config = PPO
    sac: sac.Config = SAC


DEFAULTS = Settings()


class Learner(NamedTuple):
    """An algorithm, the preferences `[S, A]` that its parameters hold, and its settings."""

    algorithm: Algorithm
    preferences: Callable[[PyTree], Array]
    config: dqn.Config | a2c.Config | ppo.Config | sac.Config

    @property
    def batch_steps(self) -> int:
        """Environment steps in one step of the algorithm."""
        return self.config.num_environments * self.config.num_steps

    def greedy(self, mdp: MDP, state: PyTree) -> Array:
        """The best allowed action of each state, `[S]`."""
        preferences = self.preferences(state.train.params)
        return bellman.greedy(jnp.where(mdp.action_mask, preferences, -jnp.inf))


def learners(settings: Settings, mdp: MDP) -> dict[str, Learner]:
    """Each kind of learner, all of them with tables."""
    states, environment = jnp.arange(mdp.num_states), icu_sepsis.make()
    q = heads.TabularEmbedding(mdp.num_states, mdp.num_actions)
    actor = heads.TabularActor(mdp.num_states, mdp.num_actions)
    both = heads.TabularActorCritic(mdp.num_states, mdp.num_actions)

    def values(params: PyTree) -> Any:
        return q.apply(params, states)

    def logits(params: PyTree) -> Array:
        policy, _ = policies.forward(both, params, states, None)
        return policy.logits

    def actor_logits(params: sac.Parameters) -> Array:
        policy: Any = actor.apply(params.actor, states)
        return policy.logits

    soft = sac.make(settings.sac, environment, actor, critics.TwinQ(q))
    return {
        "DQN": Learner(dqn.make(settings.dqn, environment, q), values, settings.dqn),
        "A2C": Learner(a2c.make(settings.a2c, environment, both), logits, settings.a2c),
        "PPO": Learner(ppo.make(settings.ppo, environment, both), logits, settings.ppo),
        "SAC": Learner(soft, actor_logits, settings.sac),
    }
