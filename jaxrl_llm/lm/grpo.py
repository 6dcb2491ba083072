"""Group-relative policy optimisation (GRPO), Dr. GRPO and DAPO: advantages within a prompt's group.

    algorithm = make(config, model, reward)
    state = start(config, params, order_key, reward)
    state, metrics = algorithm.step(step_key, state, task)

One step is one iteration: draw K responses to each prompt, score them, and fit the policy by PPO's
clipped loss of each token, with the advantage of its response and a KL divergence from the
reference in the loss. Read it from the top: `advantage`, `weigh`, `loss`, `update`, `make`.

The three differ in how the group is scaled and in how the losses of tokens are added up:

    loss_type   advantage                     objective
    grpo        (r - mean) / (std + epsilon)  the mean over responses of the mean over their tokens
    dr_grpo     r - mean                      the sum over tokens / (responses x max_new_tokens)
    dapo        (r - mean) / (std + epsilon)  the mean over the tokens of all responses

Source: Shao et al. (2024), "DeepSeekMath", arXiv:2402.03300, section 4.1; Liu et al. (2025),
  "Understanding R1-Zero-like training", arXiv:2503.20783 (Dr. GRPO); Yu et al. (2025), "DAPO",
  arXiv:2503.14476, sections 3.1 (`clip_epsilon_high`), 3.3 and 3.4 (`mask_truncated`; its dynamic
  sampling and soft length penalty are not here). Denominators are those of a whole minibatch, never
  of its micro-batches. TRL's GRPOTrainer (1.16) has the same loss but for the KL, whose k3 it
  multiplies by the probability ratio by default: that descends KL(policy || reference), as k2 and
  exact do here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.kernels import alignment, policy_gradient, preferences
from jaxrl_llm.lm import decoding, optimizer, policy_step, rollouts
from jaxrl_llm.lm.likelihood import kl_to_reference, response_likelihood
from jaxrl_llm.lm.rewards import Reward
from jaxrl_llm.lm.rollouts import State, Task
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.types import Algorithm, Array, Key, Mean, PyTree, Responses, TrainState

LossType = Literal["grpo", "dr_grpo", "dapo"]
KLEstimator = Literal["k2", "k3", "exact"]

_AGGREGATION: dict[LossType, alignment.Aggregation] = {
    "grpo": "sequence",
    "dr_grpo": "constant",
    "dapo": "token",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of GRPO and its variants."""

    num_iterations: int = 100
    """Iterations of the whole run, for the learning rate."""
    rollout: rollouts.Config = field(
        default_factory=lambda: rollouts.Config(num_prompts=8, num_samples=4)
    )
    """How the policy is asked; `num_samples` is the size of a group."""
    update: policy_step.Config = field(default_factory=policy_step.Config)
    """How it learns from the answers."""
    loss_type: LossType = "grpo"
    """How advantages are scaled and the losses of tokens added up."""
    scale_advantages: bool | None = None
    """Divide by the standard deviation of the group; None as `loss_type` has it."""
    advantage_epsilon: float = 1e-4
    """Added to that standard deviation."""
    kl_coefficient: float = 0.04
    """Of the divergence from the reference, which is added to the loss of each token."""
    kl_estimator: KLEstimator = "k3"
    """Of that divergence, at tokens drawn. k3, the paper's, descends KL(reference || policy) and k2
    KL(policy || reference), as long as the policy has not moved; exact sums the latter over the
    vocabulary, for a second pass through both models."""
    clip_epsilon: float = 0.2
    """The probability ratio of a token has no incentive to fall below 1 - this."""
    clip_epsilon_high: float | None = None
    """Nor to rise above 1 + this; None is `clip_epsilon`, DAPO has 0.28."""
    mask_truncated: bool = False
    """Leave responses that no stop token ended out of the loss; their scores stay in the group."""

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless steps can be taken."""
        checks.at_least("num_iterations", self.num_iterations, 1)
        self.rollout.validate()
        self.update.validate()
        self.update.check_divides(self.rollout.num_prompts)
        checks.one_of("loss_type", self.loss_type, get_args(LossType))
        if self.kl_estimator == "k1":
            remedy = "as a loss its expected gradient is 0: use k2, k3 or exact"
            raise ValueError(f"kl_estimator is 'k1'; {remedy}")
        checks.one_of("kl_estimator", self.kl_estimator, get_args(KLEstimator))
        checks.at_least("kl_coefficient", self.kl_coefficient, 0)
        checks.positive("advantage_epsilon", self.advantage_epsilon)
        checks.positive("clip_epsilon", self.clip_epsilon)
        if self.clip_epsilon_high is not None:
            checks.positive("clip_epsilon_high", self.clip_epsilon_high)
        if self.rollout.num_samples < 2:
            remedy = "a group needs at least 2 responses to compare"
            raise ValueError(f"rollout.num_samples is {self.rollout.num_samples}; {remedy}")
        if self.update.optimizer.trainable == "heads":
            remedy = "GRPO has no values to learn: train all, adapter or lora"
            raise ValueError(f"update.optimizer.trainable is heads; {remedy}")

    @property
    def scales_advantages(self) -> bool:
        """Whether advantages are divided by the standard deviation of their group."""
        if self.scale_advantages is None:
            return self.loss_type != "dr_grpo"
        return self.scale_advantages


@struct.dataclass(kw_only=True)
class Batch:
    """What an update reads.

    Attributes:
      responses: `[G, K, ...]`.
      advantage: `[G, K]`.
      counted: `[G, K, N]` bool, the tokens that the loss counts.
      weight: `[G, K, N]`, of the loss of each token in the minibatch.
    """

    responses: Responses
    advantage: Array
    counted: Array
    weight: Array


def as_batch(config: Config, model: GPT2, responses: Responses) -> Batch:
    """The responses of an iteration with their advantages, not yet weighed."""
    counted = responses.response_mask
    if config.mask_truncated:
        stop_tokens = decoding.end_tokens(model, config.rollout.stop_tokens)
        counted &= decoding.has_ended(responses, stop_tokens)[..., None]
    return Batch(
        responses=responses,
        advantage=advantage(config, responses),
        counted=counted,
        weight=jnp.zeros(counted.shape),
    )


def advantage(config: Config, responses: Responses) -> Array:
    """How much better than its group each response is, `[G, K]`."""
    assert responses.score is not None
    of_group = partial(
        preferences.grpo_advantage,
        epsilon=config.advantage_epsilon,
        scale=config.scales_advantages,
    )
    return jax.vmap(of_group)(responses.score)


def weigh(config: Config, batch: Batch) -> Batch:
    """A minibatch with the weights that make the sum over its tokens the objective."""
    weight = alignment.loss_weights(
        batch.counted, _AGGREGATION[config.loss_type], max_length=config.rollout.max_new_tokens
    )
    return replace(batch, weight=weight)


def loss(
    config: Config, model: GPT2, reference: PyTree, params: PyTree, batch: Batch
) -> tuple[Array, dict[str, Mean]]:
    """The weighted sum over tokens, and its parts.

    `policy_loss` and `reference_kl` are means with the weights of the objective; `policy_kl` is k3
    of the law that drew the tokens to `params`, and `clip_fraction` the share of tokens whose ratio
    is outside the clip.
    """
    responses, weight = batch.responses, batch.weight
    old, mask = responses.log_probability, responses.response_mask
    assert old is not None
    likelihood = response_likelihood(
        model,
        params,
        responses,
        temperature=config.rollout.temperature,
        chunk_size=config.rollout.chunk_size,
    )
    log_probability = likelihood.log_probability
    policy_loss = policy_gradient.ppo_clip_loss(
        log_probability,
        old,
        jnp.broadcast_to(batch.advantage[..., None], mask.shape),
        config.clip_epsilon,
        config.clip_epsilon_high,
    )
    total = jnp.sum(weight * policy_loss)
    ratio = policy_gradient.importance_ratio(log_probability, old)
    high = config.clip_epsilon if config.clip_epsilon_high is None else config.clip_epsilon_high
    metrics = {
        "policy_loss": Mean(total=total, weight=jnp.sum(weight)),
        "policy_kl": Mean.of(policy_gradient.kl_k3(old, log_probability), mask),
        "entropy": Mean.of(likelihood.entropy, mask),
        "clip_fraction": Mean.of((ratio < 1 - config.clip_epsilon) | (ratio > 1 + high), mask),
    }
    if config.kl_coefficient:
        kl = kl_to_reference(
            config.kl_estimator,
            model,
            params,
            reference,
            responses,
            log_probability,
            temperature=config.rollout.temperature,
        )
        weighted_kl = jnp.sum(weight * kl)
        metrics["reference_kl"] = Mean(total=weighted_kl, weight=jnp.sum(weight))
        total += config.kl_coefficient * weighted_kl
    return total, metrics


def update(
    config: Config,
    model: GPT2,
    key: Key,
    train: TrainState,
    responses: Responses,
    reference: PyTree,
) -> tuple[TrainState, dict[str, Mean]]:
    """Fits the policy to the responses of one iteration; `reference` has the parameters of it."""
    return policy_step.fit(
        config.update,
        config.num_iterations,
        partial(loss, config, model, reference),
        partial(weigh, config),
        key,
        train,
        as_batch(config, model, responses),
    )


def make(config: Config, model: GPT2, reward: Reward) -> Algorithm:
    """GRPO of `model`; `init` draws its parameters, `step` takes a `rollouts.Task` as well.

    Beside what `rollouts.collect` reports, `equal_scores` is the share of prompts whose responses
    all have the same score: nothing is learnt from them.

    Raises:
      ValueError: for a setting out of range; at the first step, for a task without a reference
        where the trunk of the policy learns.
    """
    config.validate()
    model = model.clone(value_width=None)

    def init(key: Key) -> State:
        params_key, order_key = jax.random.split(key)
        params = model.init(params_key, jnp.zeros((1, 1), jnp.int32))["params"]
        return start(config, params, order_key, reward)

    def step(key: Key, state: State, task: Task) -> tuple[State, dict[str, Mean]]:
        config.update.check_reference(task.reference)
        collect_key, update_key = jax.random.split(key)
        experience = rollouts.collect(config.rollout, model, reward, collect_key, state, task)
        responses = experience.responses
        reference = task.reference_of(state.train.params)
        train, learning = update(config, model, update_key, state.train, responses, reference)
        score = responses.score
        assert score is not None
        equal = jnp.max(score, axis=-1) == jnp.min(score, axis=-1)
        metrics = {**experience.metrics, **learning, "equal_scores": Mean.of(equal)}
        state = replace(state, train=train, iteration=state.iteration + 1, mix=experience.mix)
        return state, metrics

    return Algorithm(init=init, step=step)


def start(config: Config, params: PyTree, key: Key, reward: Reward) -> State:
    """A policy that has `params`, before its first iteration; `key` orders the prompts."""
    num_steps = config.num_iterations * config.update.steps_per_iteration
    return rollouts.start(optimizer.start(config.update.optimizer, num_steps, params), key, reward)
