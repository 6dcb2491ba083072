"""A language model on a token MDP, where its policy, objective and optimum are known exactly.

    mdp = with_reference(model, reference, mdp)
    algorithm = rloo.make(config, model, reward(mdp))
    state, metrics = algorithm.step(key, state, task(config.rollout, model, mdp, reference))
    gap(model, state.train.params, mdp)

The model's vocabulary is that of the token MDP, and prompt k is the single token k. Shapes are
those of `envs.token_mdp`: `K` prompts, `Y` complete responses of at most `T` tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.envs import token_mdp
from jaxrl_llm.envs.token_mdp import TokenMDP
from jaxrl_llm.lm import rewards, rollouts
from jaxrl_llm.lm.likelihood import response_likelihood
from jaxrl_llm.nn.gpt2 import GPT2, GPT2Config
from jaxrl_llm.types import Array, PyTree, Responses, TokenBatch


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
    return dataclasses.replace(mdp, reference_log_probability=policy)


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
    return dataclasses.replace(pairs, score=jnp.stack([preference, 1 - preference], axis=-1))
