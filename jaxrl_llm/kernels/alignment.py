"""From scores of responses to rewards and losses of tokens, and what best-of-n sampling does.

A response is a row `[N]` of tokens, with `mask` True on those that the policy chose: its end token
is included, and nothing after it. Tokens in between that it did not choose may be masked too.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp

from jaxrl_llm import checks
from jaxrl_llm.types import Array

Aggregation = Literal["token", "sequence", "constant", "sum"]


# Rewards


def token_reward(score: Array, kl: Array, kl_coefficient: Array | float, mask: Array) -> Array:
    """-beta kl_t at each token, plus the score at the last one: the reward that PPO maximises.

    With kl_t = k1 (`policy_gradient.kl_k1`) the rewards of a response add up to
    score - beta (log pi(y | x) - log ref(y | x)). Nothing here receives a gradient.

    Args:
      score: `[]`, of the whole response; an integer one does not make the rewards integers.
      kl: `[N]`, nats; anything where `mask` is False.
      kl_coefficient: beta >= 0, `[]`.
      mask: `[N]` bool.

    Returns:
      `[N]`, float32 at least, 0 where `mask` is False. An empty response has no token to hold its
      score, and gets zeros.

    Source: Ziegler et al. (2019), "Fine-tuning language models from human preferences",
    arXiv:1909.08593, equation 2; by token as in Stiennon et al. (2020), arXiv:2009.01325.

    >>> import jax.numpy as jnp
    >>> mask = jnp.array([True, True, False])
    >>> token_reward(jnp.array(1), jnp.array([0.5, 1.0, 9.0]), 0.5, mask).tolist()
    [-0.25, 0.5, 0.0]
    """
    chex.assert_rank(score, 0)
    chex.assert_rank([kl, mask], 1)
    chex.assert_equal_shape((kl, mask))
    dtype = jnp.promote_types(jnp.result_type(score, kl), jnp.float32)
    at_score = jnp.where(_is_last(mask), score.astype(dtype), 0)
    penalty = jnp.where(mask, kl_coefficient * kl.astype(dtype), 0)
    return jax.lax.stop_gradient(at_score - penalty).astype(dtype)


def is_unfinished(token: Array, mask: Array, end_tokens: tuple[int, ...]) -> Array:
    """Whether a response was cut off: its last token is none of those that end a text.

    Args:
      token: `[N]` integer.
      mask: `[N]` bool.
      end_tokens: whichever the sampler stops at, not the tokenizer's own end alone.

    Returns:
      `[]` bool, True for an empty response. Subtract its penalty from the score.
    """
    chex.assert_rank([token, mask], 1)
    chex.assert_equal_shape((token, mask))
    ends = jnp.isin(token, jnp.array(end_tokens, token.dtype))
    return ~jnp.any(_is_last(mask) & ends)


def _is_last(mask: Array) -> Array:
    """True at the last True entry of `[N]`, if there is one."""
    following = jnp.cumsum(mask[::-1].astype(jnp.int32))[::-1]
    return mask & (following == 1)


def adaptive_kl_coefficient(
    coefficient: Array,
    kl: Array,
    *,
    target: Array | float,
    horizon: Array | float,
    num_samples: Array | int,
) -> Array:
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon): beta rises while the KL is too high.

    Args:
      coefficient: beta > 0, `[]`.
      kl: `[]`, nats a response: SUMMED over its tokens, then averaged over responses.
      target: > 0, in the same unit.
      horizon: responses in which beta changes by about a fifth at most.
      num_samples: n, responses since the last call; from 5 `horizon` on, beta could turn negative.

    Returns:
      The next beta, `[]`.

    Source: Ziegler et al. (2019), arXiv:1909.08593, section 2.2, whose gain K is n / horizon.
    """
    error = jnp.clip(kl / target - 1, min=-0.2, max=0.2)
    return coefficient * (1 + error * num_samples / horizon)


# Losses


def loss_weights(mask: Array, aggregation: Aggregation, *, max_length: int | None = None) -> Array:
    """w such that sum(w * loss) over the rows of ONE WHOLE optimiser step is the objective.

    So the sum over minibatches or devices, each with its part of w, is the same objective, with
    the same gradient. With R rows of T tokens each, w is 0 outside `mask`, and inside:

    - "token", 1 / (sum of all T): every token counts the same (PPO, DAPO);
    - "sequence", 1 / (R T): every response counts the same (GRPO), so that a token of a long one
      counts less;
    - "constant", 1 / (R max_length): as "sum" with a smaller step (Dr. GRPO);
    - "sum", 1 / R: the log-probability of a response is the sum over its tokens (RLOO).

    An empty row adds nothing and counts among the R, as in TRL; verl's "seq-mean" modes drop it.

    Args:
      mask: `[R, N]` bool, or with any other leading axes.
      aggregation: as above.
      max_length: of "constant", the length that responses were allowed; None is N.

    Returns:
      Of the shape of `mask`, float32. Zeros, not NaN, where no token counts.

    Raises:
      ValueError: for another aggregation.

    Source: Yu et al. (2025), "DAPO", arXiv:2503.14476, section 3.3 ("token"); Shao et al. (2024),
    "DeepSeekMath", arXiv:2402.03300, equation 3 ("sequence"); Liu et al. (2025), "Understanding
    R1-Zero-like training", arXiv:2503.20783 ("constant").
    """
    checks.one_of("aggregation", aggregation, get_args(Aggregation))
    kept = mask.astype(jnp.float32)
    num_rows = math.prod(mask.shape[:-1])
    match aggregation:
        case "token":
            denominator = jnp.maximum(jnp.sum(kept), 1)
        case "sequence":
            denominator = num_rows * jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True), 1)
        case "constant":
            denominator = num_rows * (mask.shape[-1] if max_length is None else max_length)
        case "sum":
            denominator = num_rows
    return kept / denominator


# Best-of-n sampling


def best_of_n_law(log_probability: Array, reward: Array, n: Array | int) -> Array:
    """The law of the response with the highest reward among n independent draws, exactly.

    P(y) = pi(y) / pi(r = r_y) [pi(r <= r_y)^n - pi(r < r_y)^n]: a tie goes to each of the tied
    in proportion to its probability, as where the first one drawn wins.

    Args:
      log_probability: `[Y]`, log pi of every response there is; -inf where impossible.
      reward: `[Y]`.
      n: `[]`, at least 1; 1 gives pi itself.

    Returns:
      log P, `[Y]`, nats, in time and memory of Y^2.

    Source: Beirami et al. (2024), "Theoretical guarantees on the best-of-n alignment policy",
    arXiv:2401.01879, which has it without ties.
    """
    chex.assert_rank([log_probability, reward], 1)
    chex.assert_equal_shape((log_probability, reward))
    everyone = jnp.broadcast_to(log_probability[None, :], (len(reward), len(reward)))
    tied = reward[None, :] == reward[:, None]
    at_most = reward[None, :] <= reward[:, None]
    log_tied = jax.nn.logsumexp(everyone, axis=-1, where=tied)
    log_at_most = jax.nn.logsumexp(everyone, axis=-1, where=at_most)
    # log(pi(r < r_y) / pi(r <= r_y)) from the mass of the ties: a difference of the two logarithms
    # would lose an unlikely response to rounding.
    log_worse = jax.nn.log1mexp(jnp.maximum(log_at_most - log_tied, 0))
    log_best = n * log_at_most + jax.nn.log1mexp(-n * log_worse)
    possible = log_probability > -jnp.inf
    return jnp.where(possible, log_probability - log_tied + log_best, -jnp.inf)


def best_of_n_kl(log_probability: Array, reward: Array, n: Array | int) -> Array:
    """KL(P || pi) of `best_of_n_law`, exactly, `[]` in nats; arguments as there."""
    log_law = best_of_n_law(log_probability, reward, n)
    possible = log_law > -jnp.inf
    log_ratio = jnp.where(possible, log_law - log_probability, 0)
    return jnp.sum(jnp.exp(log_law) * log_ratio)


def best_of_n_kl_bound(n: Array | int) -> Array:
    """log n - (n - 1) / n, nats: `best_of_n_kl` is at most this, whatever pi and the reward.

    It is nearly reached where no response is likely and no two tie.

    Args:
      n: any shape, at least 1.

    Source: Stiennon et al. (2020), "Learning to summarize from human feedback", arXiv:2009.01325,
    appendix G.3, as an equality; Beirami et al. (2024), arXiv:2401.01879, as a bound.
    """
    return jnp.log(n) - (n - 1) / n
