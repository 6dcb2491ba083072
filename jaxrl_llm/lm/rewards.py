"""What a policy may be rewarded by: a reward model, an ensemble, a function, a scorer of text.

    reward = of_text(tokenizer, lambda prompt, response: float(len(response) < 80), ("brevity",))
    scores = reward.score(None, responses)

A reward has scores by criterion, and a `Mix` that makes one number of them. Shapes use `G` prompts,
`K` responses to each and `C` criteria.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxrl_llm.lm import objective, reward, reward_ensemble
from jaxrl_llm.lm.objective import Mix
from jaxrl_llm.nn.reward_model import RewardModel
from jaxrl_llm.types import Array, PyTree, Responses


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward as a pure function, and what becomes of its scores.

    Attributes:
      criteria: names of the `C` scores, all different.
      score: `(params, Responses) -> [G, K, C]` float32; where nothing is learnt, params are None.
      mix: how they become the one number that is maximised.
    """

    criteria: tuple[str, ...]
    score: Callable[[PyTree, Responses], Array]
    mix: Mix


def of_function(
    function: Callable[[Responses], Array],
    criteria: tuple[str, ...] = ("score",),
    *,
    mix: Mix | None = None,
) -> Reward:
    """The reward that a JAX function computes from tokens.

    Args:
      function: of responses, to `[G, K, C]`, or `[G, K]` where there is one criterion.
      criteria: their names.
      mix: the sum by default.

    Raises:
      ValueError: if a name is missing or occurs twice; when scoring, if the shape is another.
    """

    def score(params: PyTree, responses: Responses) -> Array:
        del params
        scores = jnp.asarray(function(responses))
        groups = responses.tokens.shape[:2]
        wanted = (*groups, len(criteria))
        if len(criteria) == 1 and scores.shape == groups:
            scores = scores[..., None]
        if scores.shape != wanted:
            shown = list(groups if len(criteria) == 1 else wanted)
            fault = f"reward {_quoted(criteria)} returned the shape {list(scores.shape)}"
            raise ValueError(f"{fault} for {list(groups)} responses; return {shown}")
        return scores.astype(jnp.float32)

    return _reward(criteria, score, mix)


def of_text(
    tokenizer: Any,
    function: Callable[[str, str], Any],
    criteria: tuple[str, ...] = ("score",),
    *,
    stop_tokens: tuple[int, ...] | None = None,
    mix: Mix | None = None,
) -> Reward:
    """The reward that a Python function gives a text: a rule, a gold scorer, a constitution.

    It runs on the host in the middle of a compiled program, once for every response.

    Args:
      tokenizer: of the policy, as `lm.tokenizer` makes it.
      function: `(prompt, response) -> number`, or as many numbers as there are criteria. The
        response comes without its end token; an empty one is "". It must not call JAX.
      criteria: names of the numbers.
      stop_tokens: those that end a response; the tokenizer's eos_token_id by default.
      mix: the sum by default.

    Raises:
      ValueError: if a name is missing or occurs twice; when scoring, in one line, if a score is not
        finite or their number is another. JAX wraps it: the line is the last of its message.
    """
    ends = (tokenizer.eos_token_id,) if stop_tokens is None else stop_tokens

    def judge(tokens: Any, attention_mask: Any, response_mask: Any) -> NDArray[np.float32]:
        groups = np.shape(tokens)[:-1]
        pairs = texts(tokenizer, tokens, attention_mask, response_mask, ends)
        rows = [
            _checked(criteria, index, function(prompt, response))
            for index, (prompt, response) in enumerate(pairs)
        ]
        return np.stack(rows).reshape(*groups, len(criteria))

    def score(params: PyTree, responses: Responses) -> Array:
        del params
        shape = (*responses.tokens.shape[:2], len(criteria))
        return jax.pure_callback(
            judge,
            jax.ShapeDtypeStruct(shape, jnp.float32),
            responses.tokens,
            responses.attention_mask,
            responses.response_mask,
            vmap_method="broadcast_all",
        )

    return _reward(criteria, score, mix)


def of_model(
    model: RewardModel, criteria: tuple[str, ...] = ("overall",), *, mix: Mix | None = None
) -> Reward:
    """The reward that a reward model gives, whose parameters are those of the model.

    Args:
      model: a reward model.
      criteria: of `overall`, the normalised score, and the model's own criteria, in (0, 1).
      mix: the sum by default.

    Raises:
      ValueError: if the model has no such criterion, or one occurs twice.
    """
    known = ("overall", *model.criteria)
    for name in criteria:
        if name not in known:
            raise ValueError(f"criteria has {name!r}; this model has {', '.join(known)}")
    index = np.array([known.index(name) for name in criteria])

    def score(params: PyTree, responses: Responses) -> Array:
        overall, by_criterion = reward.score(model, params, responses)
        return jnp.concatenate([overall[..., None], by_criterion], axis=-1)[..., index]

    return _reward(criteria, score, mix)


def of_ensemble(
    model: RewardModel,
    how: reward_ensemble.Aggregation = "worst",
    *,
    coefficient: float = 1.0,
    quantile: float = 0.25,
    mix: Mix | None = None,
) -> Reward:
    """The reward that an ensemble gives: criteria `overall` and `disagreement`.

    Its parameters are those of the members, stacked.

    Args:
      model: of each member.
      how: to aggregate, as `coefficient` and `quantile`: see `reward_ensemble.aggregate`.
      coefficient: see there.
      quantile: see there.
      mix: the overall score alone by default; the disagreement is reported.
    """

    def score(params: PyTree, responses: Responses) -> Array:
        scores = reward_ensemble.score(model, params, responses)
        overall = reward_ensemble.aggregate(scores, how, coefficient=coefficient, quantile=quantile)
        return jnp.stack([overall, reward_ensemble.disagreement(scores)], axis=-1)

    mix = objective.weighted((1.0, 0.0)) if mix is None else mix
    return _reward(("overall", "disagreement"), score, mix)


def joined(*rewards: Reward, mix: Mix | None = None) -> Reward:
    """Several rewards as one with the criteria of all of them; its params are a tuple of theirs.

    Args:
      rewards: at least one, no two criteria of the same name.
      mix: of all criteria, which replaces those of the rewards; the sum by default.

    Raises:
      ValueError: if a criterion occurs twice, or there is none.
    """

    def score(params: PyTree, responses: Responses) -> Array:
        scores = [each.score(part, responses) for each, part in zip(rewards, params, strict=True)]
        return jnp.concatenate(scores, axis=-1)

    return _reward(tuple(name for each in rewards for name in each.criteria), score, mix)


def texts(
    tokenizer: Any,
    tokens: Any,
    attention_mask: Any,
    response_mask: Any,
    stop_tokens: tuple[int, ...],
) -> list[tuple[str, str]]:
    """The prompt and the response of every row, the response without the token that ended it.

    NumPy on the host.

    Args:
      tokenizer: of the tokens.
      tokens: `[..., L]`, as the next two in `Responses`; rows count through all axes before `L`.
      attention_mask: `[..., L]`.
      response_mask: `[..., N]`.
      stop_tokens: those that end a response.
    """
    tokens, real, written = (
        np.asarray(array).reshape(-1, np.shape(array)[-1])
        for array in (tokens, attention_mask, response_mask)
    )
    prompt_length = tokens.shape[1] - written.shape[1]
    pairs = []
    for ids, is_real, is_written in zip(tokens, real > 0, written > 0, strict=True):
        prompt = ids[:prompt_length][is_real[:prompt_length]].tolist()
        response = ids[prompt_length:][is_written].tolist()
        ended = bool(response) and response[-1] in stop_tokens
        response = response[:-1] if ended else response
        pairs.append((tokenizer.decode(prompt), tokenizer.decode(response)))
    return pairs


def _reward(
    criteria: tuple[str, ...], score: Callable[[PyTree, Responses], Array], mix: Mix | None
) -> Reward:
    if not criteria:
        raise ValueError("criteria is empty; name at least one")
    for name in criteria:
        if criteria.count(name) > 1:
            raise ValueError(f"criteria has {name!r} twice; give each score its own name")
    mix = objective.weighted((1.0,) * len(criteria)) if mix is None else mix
    return Reward(criteria=criteria, score=score, mix=mix)


def _checked(criteria: tuple[str, ...], index: int, result: object) -> NDArray[np.float32]:
    """What a function returned for the response number `index`, `[C]`."""
    count = len(criteria)
    returned = f"reward {_quoted(criteria)} returned"
    remedy = f"for response {index}; return {_numbers(count)}"
    try:
        # A number beyond float32 becomes infinite, which is refused below.
        with np.errstate(over="ignore"):
            scores = np.asarray(result, np.float64).astype(np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{returned} {result!r:.60} {remedy}") from None
    if result is None:
        raise ValueError(f"{returned} None {remedy}")
    if scores.size != count or scores.ndim > 1:
        raise ValueError(f"{returned} {_numbers(scores.size)} {remedy}")
    scores = scores.reshape(count)
    for name, value in zip(criteria, scores, strict=True):
        if not np.isfinite(value):
            fault = f'reward "{name}" of response {index} is {value}'
            raise ValueError(f"{fault}; return a finite number")
    return scores


def _numbers(count: int) -> str:
    return "1 number" if count == 1 else f"{count} numbers"


def _quoted(criteria: tuple[str, ...]) -> str:
    return ", ".join(f'"{name}"' for name in criteria)
