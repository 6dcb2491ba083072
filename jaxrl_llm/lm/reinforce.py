"""REINFORCE for a language model, near a frozen reference.

    algorithm = make(config, model, reward)
    state = start(config, params, key, reward)
    state, metrics = algorithm.step(step_key, state, task)

The action is a token, not the response: each is credited with its return-to-go, what it and those
after it earn. With the token rewards of PPO and no discount that is

    G_t = score - beta sum_{s >= t} (log pi(y_s) - log ref(y_s)),

and the mean over responses of sum_t -(G_t - b) log pi(y_t) has, in expectation, minus the gradient
of E[score] - beta KL(pi || ref), whatever the baseline b that does not know the token.

Source: Williams (1992), "Simple statistical gradient-following algorithms for connectionist
  reinforcement learning", section 5; Ziegler et al. (2019), arXiv:1909.08593, for the reward.

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
from jaxrl_llm.kernels import alignment, policy_gradient, returns
from jaxrl_llm.lm import optimizer, policy_step, rollouts
from jaxrl_llm.lm.likelihood import response_likelihood
from jaxrl_llm.lm.rewards import Reward
from jaxrl_llm.lm.rollouts import State, Task
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.types import Algorithm, Array, Key, Mean, PyTree, Responses

Baseline = Literal["none", "constant", "moving_average", "value"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of REINFORCE for language models."""

    num_iterations: int = 100
    """Iterations until the learning rate reaches its end."""
    rollout: rollouts.Config = field(default_factory=rollouts.Config)
    update: policy_step.Config = field(default_factory=policy_step.Config)
    kl_coefficient: float = 0.05
    """Price of a nat of KL to the reference, in units of the score."""
    baseline: Baseline = "moving_average"
    """What is taken from each return: nothing, `constant_baseline`, the mean return of whole
    responses in the iterations before, or the value of the state before the token."""
    constant_baseline: float = 0.0
    """The return that the constant baseline expects."""
    baseline_decay: float = 0.9
    """How much of its weight an iteration keeps in the moving average, from one to the next."""
    value_coefficient: float = 0.1
    """Weight of the value loss, where the value is the baseline."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""

    def validate(self) -> None:
        """Raises ValueError, in one line that starts with the field's name."""
        checks.at_least("num_iterations", self.num_iterations, 1)
        self.rollout.validate()
        self.update.validate()
        self.update.check_divides(self.rollout.num_prompts)
        if (steps := self.update.steps_per_iteration) > 1:
            raise ValueError(
                f"update takes {steps} steps an iteration; the gradient is that of the policy that "
                "drew the responses, so take one: num_epochs 1 and num_minibatches 1, or use ppo"
            )
        for name in ("kl_coefficient", "value_coefficient", "entropy_coefficient"):
            checks.at_least(name, getattr(self, name), 0)
        checks.one_of("baseline", self.baseline, get_args(Baseline))
        checks.finite("constant_baseline", self.constant_baseline)
        checks.between("baseline_decay", self.baseline_decay, 0, 1)


@struct.dataclass(kw_only=True)
class Batch:
    """What an update reads, a prompt a row.

    Attributes:
      responses: of the rollout.
      return_, baseline: `[G, K, N]`.
      weight: `[G, K, N]`, of a token in the loss.
    """

    responses: Responses
    return_: Array
    baseline: Array
    weight: Array


def returns_to_go(config: Config, responses: Responses) -> Array:
    """The score minus the price of the KL of a token and all after it, `[G, K, N]`; 0 past the end.

    At the first token it is the whole response's objective. No gradient flows.
    """
    assert responses.score is not None

    def of_response(score: Array, kl: Array, mask: Array) -> Array:
        reward = alignment.token_reward(score, kl, config.kl_coefficient, mask)
        # Nothing is earned after the end, so a row is one episode, cut where it is full.
        discount, nothing = jnp.ones_like(reward), jnp.zeros_like(reward)
        return returns.discounted_returns(reward, discount, nothing, jnp.zeros_like(mask))

    k1 = rollouts.log_ratio_to_reference(responses)
    each = jax.vmap(jax.vmap(of_response))(responses.score, k1, responses.response_mask)
    return jnp.where(responses.response_mask, each, 0)


def baseline(config: Config, responses: Responses, average: Mean) -> Array:
    """What a return is compared with, `[G, K, N]`; `average` is that of earlier iterations."""
    shape = responses.response_mask.shape
    match config.baseline:
        case "none":
            return jnp.zeros(shape)
        case "constant":
            return jnp.full(shape, config.constant_baseline)
        case "moving_average":
            return jnp.broadcast_to(average.mean, shape)
        case "value":
            assert responses.value is not None
            return responses.value


def next_average(config: Config, average: Mean, return_: Array) -> Mean:
    """The moving average of whole responses' returns, for the next iteration.

    Only later iterations see the returns of this one: a baseline that contains the return it is
    taken from would shrink the gradient.
    """
    fresh = Mean.of(return_[..., 0])
    kept = config.baseline_decay
    return Mean(total=kept * average.total, weight=kept * average.weight) + fresh


def loss(
    config: Config, model: GPT2, params: PyTree, batch: Batch
) -> tuple[Array, dict[str, Mean]]:
    """The weighted sum of the losses of the tokens of some rows, and means of its parts.

    `policy_kl` is k3 of the law that drew the tokens to `params`: 0, as no step comes between.
    """
    responses = batch.responses
    mask, old = responses.response_mask, responses.log_probability
    assert old is not None
    new = response_likelihood(
        model,
        params,
        responses,
        temperature=config.rollout.temperature,
        chunk_size=config.rollout.chunk_size,
    )
    parts = {
        "policy_loss": policy_gradient.reinforce_loss(
            new.log_probability, batch.return_, batch.baseline
        ),
        "entropy": new.entropy,
        "policy_kl": policy_gradient.kl_k3(old, new.log_probability),
    }
    each = parts["policy_loss"] - config.entropy_coefficient * new.entropy
    if config.baseline == "value":
        assert new.value is not None
        parts["value_loss"] = policy_gradient.clipped_value_loss(
            new.value, batch.baseline, batch.return_, jnp.inf
        )
        each = each + config.value_coefficient * parts["value_loss"]
    metrics = {name: Mean.of(part, mask) for name, part in parts.items()}
    return jnp.sum(batch.weight * each), metrics


def weigh(batch: Batch) -> Batch:
    """A minibatch whose tokens add up over a response, and responses to their mean."""
    weight = alignment.loss_weights(batch.responses.response_mask, "sum")
    return replace(batch, weight=weight)


def make(config: Config, model: GPT2, reward: Reward) -> Algorithm:
    """REINFORCE of `model`; `init` draws its parameters, `step` takes the task as well.

    Raises:
      ValueError: for a setting out of range, or if the baseline is the value and the model has
        none.
    """
    config.validate()
    if config.baseline == "value" and model.value_width is None:
        raise ValueError(
            "baseline is 'value' and model.value_width is None; give the model a value head"
        )

    def init(key: Key) -> State:
        params_key, start_key = jax.random.split(key)
        params = model.init(params_key, jnp.zeros((1, 1), jnp.int32))["params"]
        return start(config, params, start_key, reward)

    def step(key: Key, state: State, task: Task) -> tuple[State, dict[str, Mean]]:
        config.update.check_reference(task.reference)
        collect_key, update_key = jax.random.split(key)
        experience = rollouts.collect(config.rollout, model, reward, collect_key, state, task)
        responses = experience.responses
        return_ = returns_to_go(config, responses)
        batch = Batch(
            responses=responses,
            return_=return_,
            baseline=baseline(config, responses, state.controller),
            weight=responses.response_mask,
        )
        train, losses = policy_step.fit(
            config.update,
            config.num_iterations,
            partial(loss, config, model),
            weigh,
            update_key,
            state.train,
            batch,
        )
        following = State(
            train=train,
            order_key=state.order_key,
            iteration=state.iteration + 1,
            mix=experience.mix,
            controller=next_average(config, state.controller, return_),
        )
        metrics = {**experience.metrics, **losses, "baseline": Mean.of(batch.baseline)}
        return following, metrics

    return Algorithm(init=init, step=step)


def start(config: Config, params: PyTree, key: Key, reward: Reward) -> State:
    """A policy that has `params`, before its first iteration.

    Args:
      config: of the run.
      params: of the model, with a value head where the baseline is the value.
      key: of the order of the prompts.
      reward: of `make`.

    Raises:
      ValueError: if the baseline is the value and `params` have no value head.
    """
    if config.baseline == "value" and "value_head" not in params:
        raise ValueError(
            "params have no value_head; put what they have into drawn ones with adapters.attach"
        )
    num_steps = config.num_iterations * config.update.steps_per_iteration
    train = optimizer.start(config.update.optimizer, num_steps, params)
    nothing = Mean(total=jnp.zeros(()), weight=jnp.zeros(()))
    return rollouts.start(train, key, reward, nothing)
