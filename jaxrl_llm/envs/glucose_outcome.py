"""How well a cohort's glucose was controlled: shares of time in, below and above the range.

Research only, not for clinical use.

Source: Battelino et al. (2019), "Clinical targets for continuous glucose monitoring data
  interpretation: recommendations from the international consensus on time in range", Diabetes Care
  42, 1593-1603: the ranges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm.envs import core, glucose
from jaxrl_llm.types import Array, Environment, Key


@struct.dataclass(kw_only=True)
class Outcome:
    """Shares of patients' time, and other means over a cohort, `[]` float32 each.

    Time after an episode that glucose ended counts as below 54 or above 250, whichever it was.

    Attributes:
      in_range: 70 to 180 mg/dL; the consensus asks for more than .70.
      below_70: asked for less than .04.
      below_54: asked for less than .01.
      above_180: asked for less than .25.
      above_250: asked for less than .05.
      ended: share of patients whose episode ended below 40 or above 600 mg/dL.
      mean_glucose: mg/dL, of the time before such an end.
      insulin: U a patient, until the end of the episode.
      episode_return: mean of the sums of rewards.
      in_range_error: standard error of `in_range` over patients.
    """

    in_range: Array
    below_70: Array
    below_54: Array
    above_180: Array
    above_250: Array
    ended: Array
    mean_glucose: Array
    insulin: Array
    episode_return: Array
    in_range_error: Array


def outcome(
    environment: Environment,
    policy: Callable[[Key, Array], Array],
    key: Key,
    *,
    num_patients: int = 1000,
    num_steps: int = 288,
) -> Outcome:
    """Follows `num_patients` from reset for `num_steps` steps, each to the end of its episode.

    Compile it around whatever varies, such as the parameters of `policy`.

    Args:
      environment: `glucose.make(...)`.
      policy: `(key, observations [B, 12]) -> actions [B, ...]`.
      key: consumed.
      num_patients: B.
      num_steps: no more than an episode has.
    """
    reset_key, policy_key, step_key = jax.random.split(key, 3)
    running = core.start_batch(environment, reset_key, num_patients)
    params = environment.default_params

    def body(
        carry: tuple[core.Running, Array, Array], index: Array
    ) -> tuple[tuple[core.Running, Array, Array], tuple[Array, ...]]:
        running, alive, last = carry
        action = policy(jax.random.fold_in(policy_key, index), running.observation)
        keys = jax.random.split(jax.random.fold_in(step_key, index), num_patients)
        state, time_step = jax.vmap(environment.step, in_axes=(0, 0, 0, None))(
            keys, running.state, action, params
        )
        level = jnp.where(alive, time_step.info["glucose"], last)
        reward = jnp.where(alive, time_step.reward, 0)
        insulin = time_step.info["insulin"]
        running = dataclasses.replace(running, state=state, observation=time_step.observation)
        still = alive & ~time_step.terminated
        return (running, still, level), (level, alive, reward, insulin)

    start = (running, jnp.ones(num_patients, bool), jnp.zeros(num_patients))
    (_, alive, _), (level, mask, reward, insulin) = jax.lax.scan(body, start, jnp.arange(num_steps))
    observed = jnp.sum(mask)
    in_range = (level >= glucose.HYPOGLYCAEMIA) & (level <= glucose.HYPERGLYCAEMIA)
    share = jnp.mean(in_range, axis=0)
    return Outcome(
        in_range=jnp.mean(share),
        below_70=jnp.mean(level < glucose.HYPOGLYCAEMIA),
        below_54=jnp.mean(level < 54),
        above_180=jnp.mean(level > glucose.HYPERGLYCAEMIA),
        above_250=jnp.mean(level > 250),
        ended=jnp.mean(~alive),
        mean_glucose=jnp.sum(jnp.where(mask, level, 0)) / observed,
        insulin=jnp.sum(jnp.where(mask, insulin, 0)) / num_patients,
        episode_return=jnp.mean(jnp.sum(reward, axis=0)),
        in_range_error=jnp.std(share) / num_patients**0.5,
    )
