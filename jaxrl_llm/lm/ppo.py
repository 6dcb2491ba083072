"""Proximal policy optimisation of a language model, near a frozen reference.

    algorithm = make(config, model, reward)
    state = start(config, params, key, reward)
    state, metrics = algorithm.step(step_key, state, task)

One step is one iteration: the policy answers prompts, `token_rewards` and `advantage` say how good
every token was, and `update` fits policy and value to that.

Source: Ziegler et al. (2019), "Fine-Tuning Language Models from Human Preferences",
  arXiv:1909.08593; Ouyang et al. (2022), "Training language models to follow instructions with
  human feedback", arXiv:2203.02155; the details of Huang et al. (2024), "The N+ Implementation
  Details of RLHF with PPO", arXiv:2403.17031. Differences: deviations have the divisor n;
  advantages are whitened over the whole iteration; a mean counts the tokens of the whole step.

Shapes use `G` prompts, `K` responses to each and `N` tokens a response.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.data.tokens import next_token_targets
from jaxrl_llm.kernels import alignment, policy_gradient, returns
from jaxrl_llm.lm import optimizer, policy_step, rollouts
from jaxrl_llm.lm.likelihood import kl_to_reference, response_likelihood, token_likelihood
from jaxrl_llm.lm.rewards import Reward
from jaxrl_llm.lm.rollouts import State, Task
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.numerics import masked_mean, masked_variance, masked_whiten
from jaxrl_llm.types import Algorithm, Array, Key, Mean, PyTree, Responses, TokenBatch, TrainState

KLEstimator = Literal["k1", "k2", "k3", "exact"]
KLPlace = Literal["reward", "loss"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of PPO for language models."""

    num_iterations: int = 100
    """Iterations until the learning rate reaches its end."""
    rollout: rollouts.Config = field(default_factory=rollouts.Config)
    update: policy_step.Config = field(
        default_factory=lambda: policy_step.Config(num_epochs=4, num_minibatches=4)
    )
    kl_in: KLPlace = "reward"
    """Where the KL to the reference is charged: token by token in the reward, or in the loss."""
    kl_estimator: KLEstimator = "k1"
    """k1 in the reward; k2, k3 or exact, the sum over the vocabulary, in the loss. k3 descends
    KL(reference || policy) instead."""
    kl_coefficient: float = 0.05
    """Price of a nat of KL, in units of the score; the first one where it adapts."""
    adaptive_kl_target: float | None = None
    """Nats a response to hold the KL at, by adapting the coefficient; None keeps it fixed."""
    adaptive_kl_horizon: int = 10_000
    """Responses over which the coefficient changes by a fifth at most, roughly."""
    score_clip: float | None = None
    """Scores beyond [-this, this] count as its ends; None clips none."""
    whiten_rewards: bool = False
    """Divide the rewards of an iteration's tokens by their standard deviation, keeping the mean."""
    whiten_advantages: bool = True
    """Standardise the advantages of an iteration's tokens; values still learn the raw returns."""
    gamma: float = 1.0
    """Discount of the return, a token."""
    gae_lambda: float = 0.95
    """0 trusts the value function, 1 the sampled return."""
    clip_epsilon: float = 0.2
    """The policy's probability ratio has no incentive to leave [1 - this, 1 + this]."""
    clip_epsilon_high: float | None = None
    """Of the upper end; None is the same."""
    dual_clip: float | None = None
    """A token of negative advantage costs at most this times its size; None has no limit."""
    value_clip_epsilon: float | None = 0.2
    """The value may move this far from that at the rollout; unclipped when None."""
    value_coefficient: float = 0.1
    """Weight of the value loss."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    text_coefficient: float = 0.0
    """Weight of the likelihood of the task's text, a mean over tokens, which keeps fluency."""

    def validate(self) -> None:
        """Raises ValueError, in one line that starts with the field's name."""
        checks.at_least("num_iterations", self.num_iterations, 1)
        self.rollout.validate()
        self.update.validate()
        self.update.check_divides(self.rollout.num_prompts)
        for name in ("kl", "value", "entropy", "text"):
            checks.at_least(f"{name}_coefficient", getattr(self, f"{name}_coefficient"), 0)
        checks.positive("clip_epsilon", self.clip_epsilon)
        for name in ("clip_epsilon_high", "value_clip_epsilon", "score_clip"):
            if getattr(self, name) is not None:
                checks.positive(name, getattr(self, name))
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip is {self.dual_clip}; it must be greater than 1")
        checks.between("gamma", self.gamma, 0, 1)
        checks.between("gae_lambda", self.gae_lambda, 0, 1)
        self._check_kl()

    def _check_kl(self) -> None:
        checks.one_of("kl_estimator", self.kl_estimator, get_args(KLEstimator))
        checks.one_of("kl_in", self.kl_in, get_args(KLPlace))
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator is 'k1' and kl_in is 'loss'; the expected gradient of k1 is zero, so "
                "it would do nothing: choose k2, k3 or exact, or put it in the reward"
            )
        if self.kl_in == "reward" and self.kl_estimator != "k1":
            raise ValueError(
                f"kl_estimator is {self.kl_estimator!r} and kl_in is 'reward'; there all but k1 "
                "bias the policy's gradient: choose k1, or put it in the loss"
            )
        if self.adaptive_kl_target is None:
            return
        checks.positive("adaptive_kl_target", self.adaptive_kl_target)
        checks.positive("kl_coefficient", self.kl_coefficient)
        fewest = -(-self.rollout.num_responses // 5)
        if self.adaptive_kl_horizon < fewest:
            raise ValueError(
                f"adaptive_kl_horizon is {self.adaptive_kl_horizon}; with "
                f"{self.rollout.num_responses} responses an iteration it must be at least {fewest}"
            )


@struct.dataclass(kw_only=True)
class Batch:
    """What an update reads, a prompt a row.

    Attributes:
      responses: of the rollout, with the value and log-probability of every token at that time.
      advantage, return_: `[G, K, N]`, 0 where there is no token.
      weight: `[G, K, N]`, of a token in the loss of its minibatch.
      text: `[G, L]`, as many rows of text; None without a language-modelling term.
      text_weight: `[G]`, of each token of them.
    """

    responses: Responses
    advantage: Array
    return_: Array
    weight: Array
    text: TokenBatch | None = None
    text_weight: Array | None = None


def token_rewards(config: Config, responses: Responses, kl_coefficient: Array) -> Array:
    """The score at the last token, and minus the price of k1 at each, `[G, K, N]`.

    With the KL in the loss there is no price here. No gradient flows.
    """
    assert responses.score is not None
    score, mask = responses.score, responses.response_mask
    if config.score_clip is not None:
        score = jnp.clip(score, min=-config.score_clip, max=config.score_clip)
    price = kl_coefficient if config.kl_in == "reward" else 0.0
    axes = (0, 0, None, 0)
    place = jax.vmap(jax.vmap(alignment.token_reward, in_axes=axes), in_axes=axes)
    reward = place(score, rollouts.log_ratio_to_reference(responses), price, mask)
    if config.whiten_rewards:
        reward = jnp.where(mask, masked_whiten(reward, mask) + masked_mean(reward, mask), 0)
    return reward


def advantage(config: Config, value: Array, reward: Array, mask: Array) -> Array:
    """Generalised advantage estimation over the tokens of each response, whose end is worth 0.

    All arrays are `[G, K, N]`: `value` that of the state before each token at the rollout, `mask`
    True for the tokens of the response. The result is 0 elsewhere; with the values added it is the
    return for them to learn.
    """

    def of_response(reward: Array, value: Array, mask: Array) -> Array:
        # False at the last token: it is terminal, so nothing after it counts.
        goes_on = jnp.append(mask[1:], jnp.zeros(1, bool))
        next_value = jnp.append(value[1:], jnp.zeros(1))
        discount = config.gamma * goes_on
        return returns.gae(reward, discount, value, next_value, ~goes_on, lambda_=config.gae_lambda)

    return jnp.where(mask, jax.vmap(jax.vmap(of_response))(reward, value, mask), 0)


def as_batch(
    config: Config, responses: Responses, kl_coefficient: Array, text: TokenBatch | None
) -> Batch:
    """Responses with their advantages, whitened if so configured, and raw returns."""
    value, mask = responses.value, responses.response_mask
    assert value is not None
    reward = token_rewards(config, responses, kl_coefficient)
    raw = advantage(config, value, reward, mask)
    whitened = masked_whiten(raw, mask) if config.whiten_advantages else raw
    return Batch(
        responses=responses, advantage=whitened, return_=raw + value, weight=mask, text=text
    )


def loss(
    config: Config,
    model: GPT2,
    reference: PyTree,
    kl_coefficient: Array,
    params: PyTree,
    batch: Batch,
) -> tuple[Array, dict[str, Mean]]:
    """The weighted sum of the losses of the tokens of some rows `batch`, and means of its parts.

    `reference` are parameters, and `kl_coefficient` `[]` is the price of a KL in the loss. Of the
    metrics, `policy_kl` is k3 of the law that drew the tokens to `params`, which is never negative,
    and `clip_fraction` the share of tokens whose ratio is outside the clip.
    """
    responses = batch.responses
    mask, old = responses.response_mask, responses.log_probability
    old_value = responses.value
    assert old is not None
    assert old_value is not None
    new = response_likelihood(
        model,
        params,
        responses,
        temperature=config.rollout.temperature,
        chunk_size=config.rollout.chunk_size,
    )
    assert new.value is not None
    value_clip = jnp.inf if config.value_clip_epsilon is None else config.value_clip_epsilon
    policy_loss = clip_loss(config, new.log_probability, old, batch.advantage)
    value_loss = policy_gradient.clipped_value_loss(new.value, old_value, batch.return_, value_clip)
    each = (
        policy_loss
        + config.value_coefficient * value_loss
        - config.entropy_coefficient * new.entropy
    )
    if config.kl_in == "loss":
        assert config.kl_estimator != "k1"  # refused by `validate`
        kl = kl_to_reference(
            config.kl_estimator,
            model,
            params,
            reference,
            responses,
            new.log_probability,
            temperature=config.rollout.temperature,
        )
        each = each + kl_coefficient * kl
    ratio = policy_gradient.importance_ratio(new.log_probability, old)
    high = config.clip_epsilon if config.clip_epsilon_high is None else config.clip_epsilon_high
    parts = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": new.entropy,
        "policy_kl": policy_gradient.kl_k3(old, new.log_probability),
        "clip_fraction": (ratio < 1 - config.clip_epsilon) | (ratio > 1 + high),
    }
    metrics = {name: Mean.of(part, mask) for name, part in parts.items()}
    total = jnp.sum(batch.weight * each)
    if batch.text is not None:
        assert batch.text_weight is not None
        text = token_likelihood(model, params, batch.text, chunk_size=config.rollout.chunk_size)
        text_loss = -jnp.sum(batch.text_weight[:, None] * text.log_probability)
        total = total + config.text_coefficient * text_loss
        metrics["text_loss"] = Mean.of(-text.log_probability, text.mask)
    return total, metrics


def clip_loss(config: Config, new: Array, old: Array, advantage: Array) -> Array:
    """The clipped loss of tokens whose log-probabilities were `old` and are `new`."""
    low, high = config.clip_epsilon, config.clip_epsilon_high
    if config.dual_clip is None:
        return policy_gradient.ppo_clip_loss(new, old, advantage, low, high)
    return policy_gradient.ppo_dual_clip_loss(new, old, advantage, low, config.dual_clip, high)


def weigh(batch: Batch) -> Batch:
    """A minibatch whose tokens all count the same, and add up to means over it."""
    weight = alignment.loss_weights(batch.responses.response_mask, "token")
    if batch.text is None:
        return replace(batch, weight=weight)
    count = jnp.sum(next_token_targets(batch.text)[1])
    text_weight = jnp.full(batch.text.tokens.shape[:1], 1 / jnp.maximum(count, 1))
    return replace(batch, weight=weight, text_weight=text_weight)


def update(
    config: Config, model: GPT2, key: Key, state: State, task: Task, batch: Batch
) -> tuple[TrainState, dict[str, Mean]]:
    """Epochs of minibatches on `batch`."""
    train = state.train
    reference = task.reference_of(train.params)
    each = partial(loss, config, model, reference, state.controller)
    return policy_step.fit(config.update, config.num_iterations, each, weigh, key, train, batch)


def next_coefficient(config: Config, coefficient: Array, kl: Array) -> Array:
    """The price of KL in the next iteration, given its mean `kl`, nats a response, in this one."""
    if config.adaptive_kl_target is None:
        return coefficient
    return alignment.adaptive_kl_coefficient(
        coefficient,
        kl,
        target=config.adaptive_kl_target,
        horizon=config.adaptive_kl_horizon,
        num_samples=config.rollout.num_responses,
    )


def draw_text(config: Config, key: Key, task: Task) -> TokenBatch | None:
    """As many rows of the task's text as there are prompts, at random; None without that term."""
    if config.text_coefficient == 0:
        return None
    if task.text is None:
        raise ValueError(
            f"text_coefficient is {config.text_coefficient} and the task has no text; "
            "give make_task some, or set it to 0"
        )
    num_rows = task.text.tokens.shape[0]
    rows = jax.random.randint(key, (config.rollout.num_prompts,), 0, num_rows)
    return jax.tree.map(lambda leaf: leaf[rows], task.text)


def make(config: Config, model: GPT2, reward: Reward) -> Algorithm:
    """PPO of `model`; `init` draws its parameters, `step` takes the task as well.

    Raises:
      ValueError: for a setting out of range, or a model without a value head.
    """
    config.validate()
    if model.value_width is None:
        raise ValueError("model.value_width is None; ppo needs a value head: give it a width")

    def init(key: Key) -> State:
        params_key, start_key = jax.random.split(key)
        params = model.init(params_key, jnp.zeros((1, 1), jnp.int32))["params"]
        return start(config, params, start_key, reward)

    def step(key: Key, state: State, task: Task) -> tuple[State, dict[str, Mean]]:
        config.update.check_reference(task.reference)
        collect_key, text_key, update_key = jax.random.split(key, 3)
        coefficient, text = state.controller, draw_text(config, text_key, task)
        experience = rollouts.collect(config.rollout, model, reward, collect_key, state, task)
        batch = as_batch(config, experience.responses, coefficient, text)
        train, losses = update(config, model, update_key, state, task, batch)
        following = State(
            train=train,
            order_key=state.order_key,
            iteration=state.iteration + 1,
            mix=experience.mix,
            controller=next_coefficient(config, coefficient, experience.metrics["kl"].mean),
        )
        metrics = {
            **experience.metrics,
            **losses,
            "kl_coefficient": Mean.of(coefficient),
            "explained_variance": Mean.of(explained_variance(batch)),
        }
        return following, metrics

    return Algorithm(init=init, step=step)


def start(config: Config, params: PyTree, key: Key, reward: Reward) -> State:
    """A policy that has `params`, before its first iteration.

    `key` is that of the order of the prompts, `reward` that of `make`.

    Raises:
      ValueError: if `params` have no value head.
    """
    if "value_head" not in params:
        raise ValueError(
            "params have no value_head; put what they have into drawn ones with adapters.attach"
        )
    num_steps = config.num_iterations * config.update.steps_per_iteration
    train = optimizer.start(config.update.optimizer, num_steps, params)
    return rollouts.start(train, key, reward, jnp.float32(config.kl_coefficient))


def explained_variance(batch: Batch) -> Array:
    """1 - Var(return - value) / Var(return) over all tokens, `[]`; 0 where returns do not vary."""
    mask, value = batch.responses.response_mask, batch.responses.value
    assert value is not None
    total = masked_variance(batch.return_, mask)
    left = masked_variance(batch.return_ - value, mask)
    return jnp.where(total > 0, 1 - left / jnp.where(total > 0, total, 1), 0)
