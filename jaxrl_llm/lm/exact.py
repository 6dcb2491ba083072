"""A language model on a token MDP, where its policy, objective and optimum are known exactly.

    mdp = with_reference(model, reference, mdp)
    algorithm = rloo.make(config, model, reward(mdp))
    state, metrics = algorithm.step(key, state, task(config.rollout, model, mdp, reference))
    gap(model, state.train.params, mdp)

The model's vocabulary is that of the token MDP, and prompt k is the single token k. Shapes are
those of `envs.token_mdp`: `K` prompts, `Y` complete responses of at most `T` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import checks
from jaxrl_llm.envs import token_mdp
from jaxrl_llm.envs.token_mdp import TokenMDP
from jaxrl_llm.lm import (
    dpo,
    grpo,
    optimizer,
    policy_step,
    ppo,
    reinforce,
    rewards,
    rloo,
    rollouts,
)
from jaxrl_llm.lm.likelihood import response_likelihood
from jaxrl_llm.nn import adapters
from jaxrl_llm.nn.gpt2 import GPT2, GPT2Config
from jaxrl_llm.types import Algorithm, Array, Key, PyTree, Responses, TokenBatch


def shape(mdp: TokenMDP, *, width: int = 16, num_layers: int = 1) -> GPT2Config:
    """A tiny GPT-2 of the vocabulary of `mdp`, with room for a prompt and a response.

    It starts far from uniform, so that its first policy is a reference worth staying near.
    """
    return GPT2Config(
        vocab_size=mdp.vocab_size,
        n_positions=1 + mdp.length,
        n_embd=width,
        n_layer=num_layers,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=mdp.end_token,
        pad_token_id=token_mdp.PAD,
    )


def tiny_model(mdp: TokenMDP, key: Key, **options: Any) -> tuple[GPT2, PyTree]:
    """A GPT-2 with a value head, and its first parameters; `options` as in `shape`."""
    model = GPT2(shape(mdp, **options), value_width=16)
    return model, model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def log_probabilities(
    model: GPT2, params: PyTree, mdp: TokenMDP, *, temperature: Array | float = 1.0
) -> Array:
    """log pi(y | prompt) of every complete response, `[K, Y]`, nats: the model's whole policy."""
    responses = token_mdp.all_responses(mdp)
    likelihood = response_likelihood(
        model, params, responses, temperature=temperature, chunk_size=None
    )
    return jnp.sum(likelihood.log_probability, axis=-1)


def with_reference(
    model: GPT2, reference: PyTree, mdp: TokenMDP, *, temperature: Array | float = 1.0
) -> TokenMDP:
    """`mdp` with the policy of `reference`, parameters of `model`, as the one to stay near."""
    policy = log_probabilities(model, reference, mdp, temperature=temperature)
    return replace(mdp, reference_log_probability=policy)


def gap(model: GPT2, params: PyTree, mdp: TokenMDP, *, temperature: Array | float = 1.0) -> Array:
    """By how much the model's policy falls short of the optimum, J(pi*) - J(pi), `[]`."""
    return token_mdp.gap(mdp, log_probabilities(model, params, mdp, temperature=temperature))


def reward(mdp: TokenMDP, *, kl_coefficient: float = 0.0) -> rewards.Reward:
    """The reward of the token MDP, for any learner; NaN for a response that is not complete.

    Args:
      mdp: whose rewards these are.
      kl_coefficient: price of log(pi / ref) of a whole response, as it was drawn, for an algorithm
        that has no place for it; 0 leaves it out.
    """

    def score(responses: Responses) -> Array:
        prompt, response = jnp.split(responses.tokens, [responses.prompt_length], axis=-1)
        value = token_mdp.response_reward(mdp, prompt[..., -1], response, responses.response_mask)
        if not kl_coefficient:
            return value
        log_ratio = jnp.sum(rollouts.log_ratio_to_reference(responses), axis=-1)
        return value - kl_coefficient * log_ratio

    return rewards.of_function(score)


def rollout(
    mdp: TokenMDP, *, num_prompts: int, num_samples: int, temperature: float = 1.0
) -> rollouts.Config:
    """Settings by which a response is complete when it is one of `mdp`."""
    return rollouts.Config(
        num_prompts=num_prompts,
        num_samples=num_samples,
        max_new_tokens=mdp.length,
        stop_tokens=() if mdp.end_token is None else (mdp.end_token,),
        temperature=temperature,
    )


def task(
    config: rollouts.Config, model: GPT2, mdp: TokenMDP, reference: PyTree | None
) -> rollouts.Task:
    """All prompts, and `reference`, parameters of `model`, to stay near.

    Raises:
      ValueError: if prompts are not equally likely, or do not fit the model.
    """
    law = np.asarray(mdp.prompt_probability)
    if not np.allclose(law, law[0], atol=1e-5):
        raise ValueError(
            f"mdp.prompt_probability is {law.tolist()}; a learner asks all prompts equally often, "
            "so make them equally likely"
        )
    real = jnp.ones(mdp.prompts.shape, bool)
    prompts = TokenBatch(tokens=mdp.prompts, attention_mask=real, response_mask=~real)
    return rollouts.make_task(config, model, prompts, reference=reference)


def population(mdp: TokenMDP) -> Responses:
    """Every pair of distinct responses to every prompt, `[K Y (Y - 1) / 2, 2, ...]`, for DPO.

    `score` is the probability of being preferred, sigma(r_a - r_b) by Bradley and Terry: the
    labels of infinitely many annotators. The loss of a pair is the same in either order, so each
    pair is here once. Whatever the weights of pairs, if all are positive, the loss is least at the
    optimum of `mdp`.
    """
    first, second = np.triu_indices(len(mdp.responses), k=1)
    pair = np.stack([first, second], axis=-1)
    pairs = jax.tree.map(
        lambda leaf: leaf[:, pair].reshape(-1, 2, *leaf.shape[2:]), token_mdp.all_responses(mdp)
    )
    preference = jax.nn.sigmoid(pairs.score[:, 0] - pairs.score[:, 1])
    return replace(pairs, score=jnp.stack([preference, 1 - preference], axis=-1))


# Learners


@dataclass(frozen=True, kw_only=True)
class LearnersConfig:
    """How long, and from how many responses, every algorithm learns."""

    num_iterations: int = 1000
    """Of each; steps of DPO on the whole population."""
    num_samples: int = 128
    """Responses a prompt and iteration."""
    learning_rate: float = 3e-3
    """At the start; it falls to 0."""

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless learners can be made."""
        checks.at_least("num_iterations", self.num_iterations, 1)
        checks.at_least("num_samples", self.num_samples, 2)
        checks.positive("learning_rate", self.learning_rate)


class Learner(NamedTuple):
    """An algorithm, its first state, and the data of its steps."""

    algorithm: Algorithm
    state: PyTree
    data: PyTree


def learners(
    config: LearnersConfig, model: GPT2, params: PyTree, mdp: TokenMDP, key: Key
) -> dict[str, Learner]:
    """Every algorithm, about to improve the same policy, whose trunk is the reference of `mdp`.

    The optimum of `mdp` is a fixed point of all but `grpo`: its KL, as published a k3 in the loss,
    is another divergence, its price is relative to scaled scores, and prefixes do not answer for
    what follows, so it may end worse than it began. `grpo_kl_in_reward` pays log(pi / ref) of the
    response out of its score instead.

    Args:
      config: of all of them.
      model: with a value head, which PPO alone uses.
      params: of `model`; each learner starts from its own copy.
      mdp: from `with_reference` of `params`.
      key: of the order of prompts and pairs.
    """
    beta, trunk = float(mdp.kl_coefficient), adapters.trunk(params)
    adam = replace(optimizer.ADAM, learning_rate=config.learning_rate)
    once, twice = (policy_step.Config(num_epochs=epochs, optimizer=adam) for epochs in (1, 2))
    asked = rollout(mdp, num_prompts=mdp.num_prompts, num_samples=config.num_samples)
    shared: dict[str, Any] = {"num_iterations": config.num_iterations, "rollout": asked}
    ppo_config = ppo.Config(
        **shared, update=twice, kl_coefficient=beta, gae_lambda=1.0, whiten_advantages=False,
        value_coefficient=0.5,
    )  # fmt: skip
    reinforce_config = reinforce.Config(**shared, update=once, kl_coefficient=beta)
    rloo_config = rloo.Config(**shared, update=once, kl_coefficient=beta)
    grpo_config = grpo.Config(**shared, update=once, kl_coefficient=beta)
    plain, priced = reward(mdp), reward(mdp, kl_coefficient=beta)
    on_policy: dict[str, tuple[Any, Any, PyTree, rewards.Reward]] = {
        "ppo": (ppo, ppo_config, params, plain),
        "reinforce": (reinforce, reinforce_config, trunk, plain),
        "rloo": (rloo, rloo_config, trunk, plain),
        "grpo": (grpo, grpo_config, trunk, plain),
        "grpo_kl_in_reward": (grpo, replace(grpo_config, kl_coefficient=0.0), trunk, priced),
    }
    data = task(asked, model, mdp, trunk)
    made = {
        name: Learner(module.make(each, model, judge), module.start(each, start, key, judge), data)
        for name, (module, each, start, judge) in on_policy.items()
    }
    pairs = population(mdp)
    dpo_config = dpo.Config(
        num_steps=config.num_iterations, batch_size=len(pairs.tokens), beta=beta, chunk_size=None,
        optimizer=adam,
    )  # fmt: skip
    beside = dpo.with_reference(dpo_config, model, trunk, pairs)
    made["dpo"] = Learner(dpo.make(dpo_config, model), dpo.start(dpo_config, trunk, key), beside)
    # A loop may destroy the state that it starts from.
    return {
        name: each._replace(state=jax.tree.map(jnp.copy, each.state)) for name, each in made.items()
    }
