"""Best-of-n sampling: draw n responses to each prompt, keep the one with the highest score.

    candidates = draw(config, model, reward, key, params, task)
    best = select(candidates)
    corpus = as_corpus(candidates)

Its law and its KL divergence from the policy are known: `kernels.alignment.best_of_n_law`,
`best_of_n_kl` and `best_of_n_kl_bound`. `expected_score` tells from one set of samples what any
smaller n would have reached, and `as_corpus` is what rejection-sampling fine-tuning learns from
with `lm.sft`. The tokens that are kept are those that were scored.

Source: Stiennon et al. (2020), "Learning to summarize from human feedback", arXiv:2009.01325,
  appendix G.3; Dong et al. (2023), "RAFT: Reward ranked fine-tuning for generative foundation model
  alignment", arXiv:2304.06767, for the corpus.
"""

from __future__ import annotations

from dataclasses import replace
from math import comb
from typing import Any

import jax.numpy as jnp

from jaxrl_llm.lm import rollouts
from jaxrl_llm.lm.likelihood import as_rows
from jaxrl_llm.lm.rewards import Reward
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.types import Array, Key, PyTree, Responses, TokenBatch


def draw(
    config: rollouts.Config,
    model: GPT2,
    reward: Reward,
    key: Key,
    params: PyTree,
    task: rollouts.Task,
) -> Responses:
    """n = `config.num_samples` responses to every prompt of `task`, with their scores.

    For use inside a `jit`, where all but the last three arguments are static. `config.num_prompts`
    does not matter.
    """
    responses = rollouts.draw(config, model, key, params, task.prompts)
    mix = reward.mix.init()
    return rollouts.scored(config, model, reward, mix, task.reward, responses).responses


def select(responses: Responses) -> Responses:
    """The response to each prompt with the highest score, `[G, 1, ...]`; the first of equal ones.

    Raises:
      ValueError: if the responses have no scores.
    """
    if responses.score is None:
        raise ValueError("responses.score is None; score them first")
    best = jnp.argmax(responses.score, axis=1)
    groups = jnp.arange(len(best))
    of_response: Any = {
        name: leaf[groups, best][:, None]
        for name, leaf in vars(responses).items()
        if leaf is not None and leaf.ndim > 1
    }
    return replace(responses, **of_response)


def as_corpus(responses: Responses) -> TokenBatch:
    """The best response to each prompt, as rows `[G, L]` for supervised fine-tuning."""
    return as_rows(select(responses))


def expected_score(score: Array, n: int, *, gold: Array | None = None) -> Array:
    """The expected score of the best of n, or its expected gold score, without bias, `[...]`.

    It is the mean over all subsets of n of the K samples. Of these, C(a_i, n) hold none above
    sample i, and C(b_i, n) none that reaches it, where a_i samples score at most as much and b_i
    less; so i is a best one in C(a_i, n) - C(b_i, n) of them, or its tied ones are.

    Args:
      score: what picks, `[..., K]`, of samples drawn independently.
      n: 1 to K; 1 is the mean.
      gold: what the pick is worth, likewise; None is `score` itself.

    Raises:
      ValueError: if n is less than 1 or more than K.

    Source: Chen et al. (2021), "Evaluating large language models trained on code",
      arXiv:2107.03374, equation 1, whose pass@k is that of scores 0 and 1.

    >>> import jax.numpy as jnp
    >>> [round(float(expected_score(jnp.array([3.0, 1.0, 2.0]), n)), 4) for n in (1, 2, 3)]
    [2.0, 2.6667, 3.0]
    """
    num_samples = score.shape[-1]
    if not 1 <= n <= num_samples:
        raise ValueError(f"n is {n}; it must be in [1, {num_samples}], the number of samples")
    share = jnp.array([comb(k, n) / comb(num_samples, n) for k in range(num_samples + 1)])
    other, own = score[..., None, :], score[..., :, None]
    at_most, less = (jnp.sum(each, axis=-1) for each in (other <= own, other < own))
    weight = (share[at_most] - share[less]) / (at_most - less)
    return jnp.sum(weight * (score if gold is None else gold), axis=-1)
