"""REINFORCE with a leave-one-out baseline (RLOO): the other responses to a prompt are its baseline.

    algorithm = make(config, model, reward)
    state = start(config, params, order_key, reward)
    state, metrics = algorithm.step(step_key, state, task)

One step is one iteration: draw k responses to each prompt, score them, and fit the policy. A whole
response is one action, whose log-probability is the sum over its tokens. Read it from the top:
`advantage`, `loss`, `update`, `make`.

Source: Ahmadian et al. (2024), "Back to basics: Revisiting REINFORCE style optimization for
  learning from human feedback in LLMs", arXiv:2402.14740. As in TRL's RLOOTrainer (1.16) the KL
  penalty is in the return, by its value when drawn, and the ratio of whole responses is clipped as
  in PPO, whose gradient is that of REINFORCE until the policy has moved. Differences from TRL: the
  ratio is to the law that drew the tokens, never recomputed, at the temperature they were drawn at;
  whitening divides by the deviation with divisor n, TRL's by that with n - 1, plus 1e-4; a response
  without a score is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm import checks, numerics
from jaxrl_llm.kernels import policy_gradient, preferences
from jaxrl_llm.lm import optimizer, policy_step, rollouts
from jaxrl_llm.lm.likelihood import response_likelihood
from jaxrl_llm.lm.rewards import Reward
from jaxrl_llm.lm.rollouts import State, Task
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.types import Algorithm, Array, Key, Mean, PyTree, Responses, TrainState


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of RLOO."""

    num_iterations: int = 100
    """Iterations of the whole run, for the learning rate."""
    rollout: rollouts.Config = field(
        default_factory=lambda: rollouts.Config(num_prompts=8, num_samples=4)
    )
    """How the policy is asked; `num_samples` is k."""
    update: policy_step.Config = field(default_factory=policy_step.Config)
    """How it learns from the answers."""
    kl_coefficient: float = 0.05
    """Of the log ratio to the reference, taken from the score of a response."""
    clip_epsilon: float = 0.2
    """The probability ratio of a response has no incentive to fall below 1 - this."""
    clip_epsilon_high: float | None = None
    """Nor to rise above 1 + this; None is `clip_epsilon`."""
    whiten_advantages: bool = False
    """Standardise the advantages of each iteration."""

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless steps can be taken."""
        checks.at_least("num_iterations", self.num_iterations, 1)
        self.rollout.validate()
        self.update.validate()
        self.update.check_divides(self.rollout.num_prompts)
        checks.at_least("kl_coefficient", self.kl_coefficient, 0)
        checks.positive("clip_epsilon", self.clip_epsilon)
        if self.clip_epsilon_high is not None:
            checks.positive("clip_epsilon_high", self.clip_epsilon_high)
        if self.rollout.num_samples < 2:
            remedy = "a response needs at least one other as its baseline: draw 2 or more"
            raise ValueError(f"rollout.num_samples is {self.rollout.num_samples}; {remedy}")
        if self.update.optimizer.trainable == "heads":
            remedy = "RLOO has no values to learn: train all, adapter or lora"
            raise ValueError(f"update.optimizer.trainable is heads; {remedy}")


@struct.dataclass(kw_only=True)
class Batch:
    """What an update reads: responses, their advantages `[G, K]` and weights `[G, K]`."""

    responses: Responses
    advantage: Array
    weight: Array


def advantage(config: Config, responses: Responses) -> Array:
    """The return of each response less the mean return of the others to its prompt, `[G, K]`.

    The return is score - beta (log pi(y | x) - log ref(y | x)), with pi as it drew y.
    """
    assert responses.score is not None
    log_ratio = jnp.sum(rollouts.log_ratio_to_reference(responses), axis=-1)
    result = jax.vmap(preferences.rloo_advantage)(
        responses.score - config.kl_coefficient * log_ratio
    )
    if config.whiten_advantages:
        result = numerics.masked_whiten(result, jnp.ones_like(result, bool))
    return jax.lax.stop_gradient(result)


def weigh(batch: Batch) -> Batch:
    """A minibatch in which every response counts the same."""
    return replace(batch, weight=jnp.full(batch.advantage.shape, 1 / batch.advantage.size))


def loss(
    config: Config, model: GPT2, params: PyTree, batch: Batch
) -> tuple[Array, dict[str, Mean]]:
    """The weighted sum over responses, and its parts.

    `policy_kl` is k3 of the law that drew the tokens to `params`, by token; `clip_fraction` the
    share of responses whose ratio is outside the clip.
    """
    responses = batch.responses
    old, mask = responses.log_probability, responses.response_mask
    assert old is not None
    likelihood = response_likelihood(
        model,
        params,
        responses,
        temperature=config.rollout.temperature,
        chunk_size=config.rollout.chunk_size,
    )
    of_response = jnp.sum(likelihood.log_probability, axis=-1)
    old_of_response = jnp.sum(old, axis=-1)
    policy_loss = policy_gradient.ppo_clip_loss(
        of_response,
        old_of_response,
        batch.advantage,
        config.clip_epsilon,
        config.clip_epsilon_high,
    )
    ratio = policy_gradient.importance_ratio(of_response, old_of_response)
    high = config.clip_epsilon if config.clip_epsilon_high is None else config.clip_epsilon_high
    metrics = {
        "policy_loss": Mean.of(policy_loss),
        "policy_kl": Mean.of(policy_gradient.kl_k3(old, likelihood.log_probability), mask),
        "entropy": Mean.of(likelihood.entropy, mask),
        "clip_fraction": Mean.of((ratio < 1 - config.clip_epsilon) | (ratio > 1 + high)),
    }
    return jnp.sum(batch.weight * policy_loss), metrics


def update(
    config: Config, model: GPT2, key: Key, train: TrainState, responses: Responses
) -> tuple[TrainState, dict[str, Mean]]:
    """Fits the policy to the responses of one iteration."""
    advantages = advantage(config, responses)
    return policy_step.fit(
        config.update,
        config.num_iterations,
        partial(loss, config, model),
        weigh,
        key,
        train,
        Batch(responses=responses, advantage=advantages, weight=jnp.zeros_like(advantages)),
    )


def make(config: Config, model: GPT2, reward: Reward) -> Algorithm:
    """RLOO of `model`; `init` draws its parameters, `step` takes a `rollouts.Task` as well.

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
        train, learning = update(config, model, update_key, state.train, experience.responses)
        state = replace(state, train=train, iteration=state.iteration + 1, mix=experience.mix)
        return state, {**experience.metrics, **learning}

    return Algorithm(init=init, step=step)


def start(config: Config, params: PyTree, key: Key, reward: Reward) -> State:
    """A policy that has `params`, before its first iteration; `key` orders the prompts."""
    num_steps = config.num_iterations * config.update.steps_per_iteration
    return rollouts.start(optimizer.start(config.update.optimizer, num_steps, params), key, reward)
