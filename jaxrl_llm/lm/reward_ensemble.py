"""Several reward models of one trunk, whose disagreement tells where none of them knows.

    algorithm = make(reward.make(config, model), num_members)
    state = start(partial(reward.start, config), model, params, key, num_members)
    state, metrics = algorithm.step(step_key, state, pairs)
    aggregate(score(model, state.train.params, responses), "worst")

Members differ by their heads' first weights and by the order in which they see the pairs; those of
`reward_heads` by which pairs they see. Their parameters are stacked on a leading axis `M`.

Source: Coste et al. (2024), "Reward model ensembles help mitigate overoptimization".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxrl_llm import checks
from jaxrl_llm.lm import reward
from jaxrl_llm.nn.reward_model import RewardModel, from_language_model
from jaxrl_llm.types import Algorithm, Array, Key, Mean, PyTree, Responses

Aggregation = Literal["mean", "worst", "uncertainty", "quantile"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)


def make(member: Algorithm, num_members: int) -> Algorithm:
    """Training of `num_members` at once; each is the run that `member` does alone.

    State and metrics have a leading axis `M`. Member i draws from `fold_in(key, i)`.
    """
    checks.at_least("num_members", num_members, 1)

    def init(key: Key) -> reward.State:
        return each_member(member.init, _member_keys(key, num_members))

    def step(
        key: Key, state: reward.State, pairs: Responses
    ) -> tuple[reward.State, dict[str, Mean]]:
        def one(key: Key, state: reward.State) -> tuple[reward.State, dict[str, Mean]]:
            return member.step(key, state, pairs)

        return each_member(one, _member_keys(key, num_members), state)

    return Algorithm(init=init, step=step)


def start(
    start_member: Callable[[PyTree, Key], reward.State],
    model: RewardModel,
    params: PyTree,
    key: Key,
    num_members: int,
) -> reward.State:
    """Members before their first step.

    Args:
      start_member: `(params, order_key) -> state`, of one.
      model: of each.
      params: of a language model, whose trunk all have.
      key: of the heads and the orders.
      num_members: how many.
    """
    checks.at_least("num_members", num_members, 1)

    def one(key: Key) -> reward.State:
        head_key, order_key = jax.random.split(key)
        return start_member(from_language_model(model, params, head_key), order_key)

    return each_member(one, _member_keys(key, num_members))


def score(model: RewardModel, params: PyTree, responses: Responses) -> Array:
    """Overall scores `[M, G, K]`, of members whose `params` have a leading axis `M`."""
    return each_member(lambda member: reward.score(model, member, responses).overall, params)


def aggregate(
    scores: Array, how: Aggregation, *, coefficient: float = 1.0, quantile: float = 0.25
) -> Array:
    """One score of the members', to be maximised instead of any of them.

    `mean`: the mean. `worst`: the minimum (WCO). `uncertainty`: mean - coefficient ·
    variance, with divisor `M` (UWO). `quantile`: that quantile, between the `worst` at
    0 and the median at 0.5, by linear interpolation.

    Args:
      scores: `[M, ...]`, on one scale: normalise the members first.
      how: one of `AGGREGATIONS`.
      coefficient: of the variance, at least 0.
      quantile: in [0, 1].

    Returns:
      `[...]`.

    Raises:
      ValueError: naming the argument that is out of range.
    """
    checks.one_of("how", how, AGGREGATIONS)
    checks.at_least("coefficient", coefficient, 0)
    checks.between("quantile", quantile, 0, 1)
    match how:
        case "mean":
            return jnp.mean(scores, axis=0)
        case "worst":
            return jnp.min(scores, axis=0)
        case "uncertainty":
            return jnp.mean(scores, axis=0) - coefficient * jnp.var(scores, axis=0)
        case "quantile":
            return jnp.quantile(scores, quantile, axis=0)


def disagreement(scores: Array) -> Array:
    """The standard deviation, with divisor `M`, over the members of `scores` `[M, ...]`."""
    return jnp.std(scores, axis=0)


def each_member(function: Callable[..., Any], *members: Any) -> Any:
    """`function` of each member, given leaves with a leading axis `M`, results stacked likewise.

    On an accelerator members are a `vmap`. A CPU takes one after another: each stays in cache, and
    its matrix products are not batched ones, which are slower there.
    """
    return jax.lax.platform_dependent(
        *members,
        cpu=lambda *rows: jax.lax.map(lambda row: function(*row), rows),
        default=jax.vmap(function),
    )


def _member_keys(key: Key, num_members: int) -> Key:
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(num_members))
