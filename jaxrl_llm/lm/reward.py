"""A reward model learnt from comparisons of two responses, and from ratings by criterion.

    algorithm = make(config, model)
    state = start(config, from_language_model(model, params, head_key), order_key)
    state, metrics = algorithm.step(step_key, state, pairs)
    params = state.train.params
    params = normalise(params, score(model, params, reference_responses).overall)

Pairs are `Responses` with K = 2, all of them on the device. `score[:, 0]` is how probably the first
is the better one: 1, 0, or 0.5 in a tie; where there is no score the first was chosen. Each step
takes the next `batch_size` pairs, in an order shuffled anew every epoch.

Source: Stiennon et al. (2020), "Learning to summarize from human feedback", section 3.4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxrl_llm import checks
from jaxrl_llm.kernels import preferences
from jaxrl_llm.lm import optimizer
from jaxrl_llm.lm.accumulation import gradient_of_sum
from jaxrl_llm.lm.order import State, next_batch
from jaxrl_llm.lm.reward_features import features, in_batches
from jaxrl_llm.nn.reward_model import RewardModel, Scores
from jaxrl_llm.types import Algorithm, Array, Key, Mean, PyTree, Responses

ADAMW = optimizer.Config(learning_rate=3e-4)

# Of these few numbers each is learnt from many pairs: see `Config.choice_rate` and `head_rate`.
CHOICE_LEAVES = ("annotator_logit", "tie_logit")
HEADS = ("overall", "by_criterion")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the reward model learns from, how long and on how much."""

    num_steps: int = 500
    """Optimiser steps."""
    batch_size: int = 16
    """Pairs a step."""
    num_micro_batches: int = 1
    """Parts that a step's pairs go through the model in, one after another: the same gradient."""
    label_smoothing: float = 0.0
    """How often a comparison is taken to be wrong, in [0, 0.5)."""
    centring_coefficient: float = 0.01
    """Of (s_1 + s_2)^2, which holds scores near 0: comparisons leave their mean undetermined."""
    rating_coefficient: float = 1.0
    """Of the mean squared error of the criteria, over all ratings that are given."""
    num_annotators: int = 0
    """How many compared the pairs, to learn how reliable each is; 0 takes all to be alike."""
    first_reliability: float = 0.9
    """How often an annotator is taken to report what the scores say, before anything is learnt."""
    learn_ties: bool = False
    """Learn how close a call is a tie (Rao & Kupper); False counts a tie as half a win of each."""
    choice_rate: float = 30.0
    """Learning rate of reliabilities and ties, in multiples of the model's: they have far to go."""
    head_rate: float = 10.0
    """Of the heads, likewise: responses differ little in what a trunk says of them."""
    optimizer: optimizer.Config = ADAMW

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless steps can be taken."""
        for name in ("num_steps", "batch_size", "num_micro_batches"):
            checks.at_least(name, getattr(self, name), 1)
        checks.divisible("batch_size", self.batch_size, "num_micro_batches", self.num_micro_batches)
        if not 0 <= self.label_smoothing < 0.5:
            remedy = "it must be at least 0 and less than 0.5"
            raise ValueError(f"label_smoothing is {self.label_smoothing}; {remedy}")
        if not 0.5 < self.first_reliability < 1:
            remedy = "it must be between 0.5 and 1"
            raise ValueError(f"first_reliability is {self.first_reliability}; {remedy}")
        for name in ("centring_coefficient", "rating_coefficient", "num_annotators"):
            checks.at_least(name, getattr(self, name), 0)
        for name in ("choice_rate", "head_rate"):
            checks.positive(name, getattr(self, name))
        if self.learn_ties and (self.num_annotators or self.label_smoothing):
            remedy = "set num_annotators and label_smoothing to 0"
            raise ValueError(f"learn_ties is True, which is a law of the choice itself; {remedy}")
        if self.optimizer.trainable not in ("all", "heads"):
            remedy = "a reward model has no adapters: train all or heads"
            raise ValueError(f"optimizer.trainable is {self.optimizer.trainable}; {remedy}")


def make(config: Config, model: RewardModel) -> Algorithm:
    """Training of `model`; `init` draws its parameters, `step` takes the pairs as well."""

    def init(key: Key) -> State:
        params_key, order_key = jax.random.split(key)
        params = model.init(params_key, jnp.zeros((1, 1), jnp.int32))["params"]
        return start(config, params, order_key)

    def step(key: Key, state: State, pairs: Responses) -> tuple[State, dict[str, Mean]]:
        return update(config, model, key, state, next_batch(state, config.batch_size, pairs))

    return Algorithm(init=init, step=step)


def checked_pairs(config: Config, model: RewardModel, pairs: Responses) -> Responses:
    """`pairs` on the device, if `model` can learn from them as `config` says.

    Raises:
      ValueError: naming the first field with a fault, its place, the value and the remedy.
    """
    preference(pairs)
    if config.num_annotators:
        annotator, count = _annotator(pairs), config.num_annotators
        _check(
            "annotator", annotator, lambda x: (x >= 0) & (x < count), f"it must be in [0, {count})"
        )
    if pairs.score is not None:
        total = np.sum(pairs.score, axis=1)
        _check("score", pairs.score, lambda x: (x >= 0) & (x <= 1), "it must be in [0, 1]")
        _check("score.sum", total, lambda x: np.isclose(x, 1), "the two must sum to 1")
    if pairs.rating is not None:
        _check_criteria(pairs.rating.shape[-1], len(model.criteria))
        remedy = "it must be in [0, 1], or NaN where there is none"
        _check("rating", pairs.rating, lambda x: np.isnan(x) | ((x >= 0) & (x <= 1)), remedy)
    if pairs.margin is not None:
        _check("margin", pairs.margin, np.isfinite, "it must be finite, 0 where it is unknown")
    length = np.sum(pairs.attention_mask, axis=-1)
    _check("attention_mask.sum", length, lambda x: x > 0, "a text needs a token")
    return jax.tree.map(jnp.asarray, pairs)


def start(config: Config, params: PyTree, key: Key) -> State:
    """A learner that has `params`, before its first step, and what it learns of the annotators."""
    params = with_choices(config, params)
    train = optimizer.start(config.optimizer, config.num_steps, params)
    return State(train=train, order_key=key)


def with_choices(config: Config, params: PyTree) -> PyTree:
    """`params` with those of the choice itself: reliabilities of annotators, the width of ties."""
    params = dict(params)
    if config.num_annotators:
        logit = np.log(config.first_reliability / (1 - config.first_reliability))
        params["annotator_logit"] = jnp.full(config.num_annotators, logit, jnp.float32)
    if config.learn_ties:
        params["tie_logit"] = jnp.zeros((), jnp.float32)
    return params


def update(
    config: Config, model: RewardModel, key: Key, state: State, batch: Responses
) -> tuple[State, dict[str, Mean]]:
    """One optimiser step on `batch`."""
    before = state.train.params
    gradient, metrics = gradient_of_loss(config, model, key, before, batch)
    train, norm = optimizer.descend(config.optimizer, config.num_steps, state.train, gradient)
    params = dict(train.params)
    rates = dict.fromkeys(CHOICE_LEAVES, config.choice_rate)
    rates |= dict.fromkeys(HEADS, config.head_rate)
    for name in rates.keys() & params.keys():
        further = partial(_further, rates[name])
        params[name] = jax.tree.map(further, before[name], params[name])
    state = replace(state, train=replace(train, params=params))
    return state, {**metrics, "gradient_norm": norm}


def _further(factor: float, before: Array, after: Array) -> Array:
    return before + factor * (after - before)


def gradient_of_loss(
    config: Config, model: RewardModel, key: Key, params: PyTree, batch: Responses
) -> tuple[PyTree, dict[str, Mean]]:
    """The gradient of the loss of all of `batch`, and what to report.

    Where the pairs have `features` nothing else is read, which is right for heads alone.

    The loss is the mean over pairs of the preference loss and of the centring penalty (Eisenstein
    et al. 2023, "Helping or herding?"), plus the mean squared error over the ratings that are
    given: a Brier score, least where a criterion's head is the expected rating. What is missing
    has no gradient at all.
    """
    if batch.features is not None and config.optimizer.trainable == "all":
        remedy = "read the pairs anew, features=None, or train heads"
        raise ValueError(f"pairs.features are given, and the trunk learns; {remedy}")
    counts = counted(batch)

    def share(params: PyTree, part: Responses, key: Key) -> tuple[Array, dict[str, Mean]]:
        params = optimizer.freeze(params, config.optimizer.trainable)
        loss, metrics = loss_of_part(config, model, params, part, counts, dropout_key=key)
        return loss, {"loss": Mean(total=loss, weight=jnp.zeros(())), **metrics}

    gradient, metrics = gradient_of_sum(share, params, batch, config.num_micro_batches, key)
    return gradient, {**metrics, "loss": Mean.of(metrics["loss"].total)}


def counted(batch: Responses) -> tuple[int, Array | int]:
    """Pairs and ratings of `batch`, that its loss is a mean over."""
    rating = batch.rating
    num_ratings = 1 if rating is None else jnp.maximum(jnp.sum(~jnp.isnan(rating)), 1)
    return batch.tokens.shape[0], num_ratings


def loss_of_part(
    config: Config,
    model: RewardModel,
    params: PyTree,
    part: Responses,
    counts: tuple[int, Array | int],
    *,
    dropout_key: Key | None = None,
) -> tuple[Array, dict[str, Mean]]:
    """What some pairs add to the loss of as many pairs and ratings as `counts` says."""
    num_pairs, num_ratings = counts
    overall, criteria = _raw(model, params, part, dropout_key=dropout_key)
    metrics = {
        "preference_loss": Mean.of(preference_loss(config, params, overall, part)),
        "centring_loss": Mean.of(jnp.square(jnp.sum(overall, axis=1))),
    }
    loss = metrics["preference_loss"].total
    loss += config.centring_coefficient * metrics["centring_loss"].total
    loss /= num_pairs
    if part.rating is not None:
        error = rating_error(criteria, part.rating)
        metrics["rating_loss"] = Mean.of(error, ~jnp.isnan(part.rating))
        loss += config.rating_coefficient * metrics["rating_loss"].total / num_ratings
    return loss, metrics | agreement(overall, preference(part))


def preference_loss(config: Config, params: PyTree, overall: Array, pairs: Responses) -> Array:
    """-log P(what the annotator reported), `[G]` nats, of raw scores `[G, 2]`.

    By Bradley-Terry, Crowd-BT where reliabilities are learnt, or Rao-Kupper where ties are. The
    margin is what the better one must win by.
    """
    reported = preference(pairs)
    first, second = overall[:, 0], overall[:, 1]
    if pairs.margin is not None:
        first = first - (2 * reported - 1) * pairs.margin
    if config.learn_ties:
        width = jax.nn.softplus(params["tie_logit"])
        return preferences.rao_kupper_loss(first, second, reported, width)
    smoothed = reported + config.label_smoothing * (1 - 2 * reported)
    if not config.num_annotators:
        return preferences.soft_bradley_terry_loss(first, second, smoothed)
    logit = params["annotator_logit"][_annotator(pairs)]
    return preferences.crowd_bradley_terry_loss(first, second, smoothed, logit)


def rating_error(criteria: Array, rating: Array) -> Array:
    """The squared error of each criterion, `[G, K, C]`; 0, and without gradient, where NaN."""
    _check_criteria(rating.shape[-1], criteria.shape[-1])
    given = ~jnp.isnan(rating)
    return jnp.square(jnp.where(given, criteria - jnp.where(given, rating, 0), 0))


def agreement(overall: Array, reported: Array) -> dict[str, Mean]:
    """How scores `[G, 2]` agree with the preferences reported, `[G]`; ties are not counted."""
    sign = jnp.sign(2 * reported - 1)
    margin = sign * (overall[:, 0] - overall[:, 1])
    return {
        "accuracy": Mean.of((1 + jnp.sign(margin)) / 2, sign != 0),
        "score_margin": Mean.of(margin, sign != 0),
        "score": Mean.of(overall),
    }


def preference(pairs: Responses) -> Array:
    """How probably the first of each pair is the better one, `[G]`."""
    if pairs.tokens.shape[1] != 2:
        raise ValueError(f"pairs have {pairs.tokens.shape[1]} responses to a prompt; give 2")
    return jnp.ones(pairs.tokens.shape[0]) if pairs.score is None else pairs.score[:, 0]


def score(model: RewardModel, params: PyTree, responses: Responses) -> Scores:
    """Overall scores `[G, K]`, normalised as `params` are, and criteria `[G, K, C]`.

    Of their `features`, where they have some.
    """
    raw = _raw(model, params, responses)
    scores: Any = model.apply({"params": params}, raw, method="normalised")
    return scores


def score_all(
    model: RewardModel, params: PyTree, responses: Responses, *, batch_size: int = 64
) -> Scores:
    """`score` for the host, as NumPy arrays; `batch_size` prompts go through the model at once."""
    return in_batches(partial(_score, model, params), responses, batch_size)


def normalise(params: PyTree, scores: ArrayLike) -> PyTree:
    """`params` whose overall scores of the same texts have mean 0 and standard deviation 1.

    For the host. The deviation is that of these scores, with divisor n.

    Args:
      params: of a reward model, or of several, stacked on a leading axis `M`.
      scores: `[...]`, what it makes of reference responses now, gain and bias included; of several
        `[M, ...]`.

    Raises:
      ValueError: if the scores of a model are not finite, or all the same.
    """
    gain, bias = np.asarray(params["gain"]), np.asarray(params["bias"])
    flat = np.asarray(scores, np.float64).reshape(*gain.shape, -1)
    if not np.isfinite(flat).all():
        raise ValueError("scores are not all finite; look for a reward model that has diverged")
    mean, deviation = flat.mean(axis=-1), flat.std(axis=-1)
    is_constant = np.ptp(flat, axis=-1) == 0
    if is_constant.any():
        value = mean[is_constant].flat[0] if mean.ndim else mean
        raise ValueError(f"scores are all {value:g}; give responses that the model tells apart")
    return {
        **params,
        "gain": jnp.asarray(gain / deviation, jnp.float32),
        "bias": jnp.asarray((bias - mean) / deviation, jnp.float32),
    }


_score = jax.jit(score, static_argnums=0)


def _raw(
    model: RewardModel,
    params: PyTree,
    responses: Responses,
    *,
    dropout_key: Key | None = None,
) -> Scores:
    """Raw scores `[G, K]` and criteria `[G, K, C]`."""
    read = responses.features
    if read is None:
        read = features(model, params, responses, dropout_key=dropout_key)
    rows = read.reshape(-1, read.shape[-1])
    scores: Any = model.apply({"params": params}, rows, method="raw")
    return jax.tree.map(lambda leaf: leaf.reshape(*read.shape[:2], *leaf.shape[1:]), scores)


def _annotator(pairs: Responses) -> Array:
    if pairs.annotator is None:
        raise ValueError("pairs.annotator is None; give who compared each, or num_annotators = 0")
    return pairs.annotator


def _check(name: str, values: Any, is_right: Callable[[Any], Any], remedy: str) -> None:
    values = np.asarray(values)
    for place in np.argwhere(~is_right(values)):
        shown = ", ".join(map(str, place))
        raise ValueError(f"pairs.{name}[{shown}] is {values[tuple(place)]}; {remedy}")


def _check_criteria(num_rated: int, num_criteria: int) -> None:
    if num_rated != num_criteria:
        fault = f"pairs.rating has {num_rated} criteria"
        raise ValueError(f"{fault}; the model's criteria are {num_criteria}")
