"""Learning from comparisons: models of a person's choice, direct losses and group advantages.

The losses are elementwise on numbers of whole responses, so that they take any shape, and one
example as well as a batch. A loss is per example and is minimised, in nats; whoever calls it
takes the mean.

`preference` is how probably the first of two responses is the better one: 1, 0, or 0.5 where
neither is. A log-probability of a response is the SUM over its tokens, log pi(y | x), where
nothing else is said. The reference policy never receives a gradient.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxrl_llm.types import Array

# Models of a choice


def soft_bradley_terry_loss(first_score: Array, second_score: Array, preference: Array) -> Array:
    """-p log sigma(s1 - s2) - (1 - p) log sigma(s2 - s1), with p the preference.

    Its gradient in s1 is sigma(s1 - s2) - p, so p = 0.5 pulls the scores together.

    Args:
      first_score: s1, any shape.
      second_score: s2, the same shape.
      preference: p in [0, 1], the same shape.

    Returns:
      Of that shape.

    Source: Bradley & Terry (1952), "Rank analysis of incomplete block designs", as a
    cross-entropy.
    """
    chex.assert_equal_shape((first_score, second_score, preference))
    difference = first_score - second_score
    return -(
        preference * jax.nn.log_sigmoid(difference)
        + (1 - preference) * jax.nn.log_sigmoid(-difference)
    )


def bradley_terry_loss(
    chosen_score: Array,
    rejected_score: Array,
    *,
    margin: Array | float = 0.0,
    label_smoothing: Array | float = 0.0,
) -> Array:
    """-(1 - e) log sigma(d) - e log sigma(-d), with d = chosen - rejected - margin.

    Args:
      chosen_score: any shape.
      rejected_score: the same shape.
      margin: by how much the chosen one should win at least; the same shape or `[]`.
      label_smoothing: e in [0, 0.5), how often labels are taken to be wrong; likewise.

    Returns:
      Of that shape.

    Source: Touvron et al. (2023), "Llama 2", arXiv:2307.09288, equations 1 and 2 (the margin).

    >>> import jax.numpy as jnp
    >>> round(float(bradley_terry_loss(jnp.array(2.0), jnp.array(1.0), margin=1.0)), 4)
    0.6931
    """
    chex.assert_equal_shape((chosen_score, rejected_score))
    preference = jnp.broadcast_to(1 - jnp.asarray(label_smoothing), jnp.shape(chosen_score))
    return soft_bradley_terry_loss(chosen_score - margin, rejected_score, preference)


def rao_kupper_loss(
    first_score: Array, second_score: Array, preference: Array, tie_width: Array | float
) -> Array:
    """The negative log-likelihood of a win, a tie or a loss, where close calls are ties.

    With d = s1 - s2 and width w: P(win) = sigma(d - w), P(loss) = sigma(-d - w), and
    P(tie) = (exp(2 w) - 1) sigma(d - w) sigma(-d - w), the rest.

    Args:
      first_score: s1, any shape.
      second_score: s2, the same shape.
      preference: 1 a win of the first, 0 a loss, and exactly 0.5 a tie, the same shape.
      tie_width: w >= 0, the same shape or `[]`; w = 0 is Bradley-Terry, where a tie has
        probability 0 and an infinite loss. To learn it, pass the softplus of a parameter.

    Returns:
      Of that shape.

    Source: Rao & Kupper (1967), "Ties in paired-comparison experiments: a generalization of the
    Bradley-Terry model"; their threshold is w and their theta exp(w).
    """
    chex.assert_equal_shape((first_score, second_score, preference))
    difference = first_score - second_score
    width = jnp.broadcast_to(jnp.asarray(tie_width, difference.dtype), difference.shape)
    win, loss = jax.nn.log_sigmoid(difference - width), jax.nn.log_sigmoid(-difference - width)
    is_tie = preference == 0.5
    # Only a tie asks for the logarithm of a width, which may be 0 where there is none.
    twice = 2 * jnp.where(is_tie, width, 1)
    tie = twice + jax.nn.log1mexp(twice) + win + loss
    return -jnp.where(is_tie, tie, jnp.where(preference > 0.5, win, loss))


def crowd_bradley_terry_loss(
    first_score: Array, second_score: Array, preference: Array, reliability_logit: Array
) -> Array:
    """-p log P - (1 - p) log(1 - P), P = r sigma(s1 - s2) + (1 - r) sigma(s2 - s1).

    r = sigma(reliability_logit) is how often this annotator reports what the scores say: 1 is
    Bradley-Terry, 0.5 says nothing, 0 the contrary. Both the scores and r are learned. Flipping
    all scores and all r changes nothing, so start from reliable annotators (a logit above 0).

    Args:
      first_score: s1, any shape.
      second_score: s2, the same shape.
      preference: p in [0, 1], as the annotator reported it, the same shape.
      reliability_logit: of the annotator who did, the same shape.

    Returns:
      Of that shape.

    Source: Chen, Bennett, Collins-Thompson & Horvitz (2013), "Pairwise ranking aggregation in a
    crowdsourced setting", section 4 (Crowd-BT), without its prior on the scores.
    """
    chex.assert_equal_shape((first_score, second_score, preference, reliability_logit))
    difference = first_score - second_score
    right = jax.nn.log_sigmoid(reliability_logit)
    wrong = jax.nn.log_sigmoid(-reliability_logit)
    up, down = jax.nn.log_sigmoid(difference), jax.nn.log_sigmoid(-difference)
    first = jnp.logaddexp(right + up, wrong + down)
    second = jnp.logaddexp(right + down, wrong + up)
    return -(preference * first + (1 - preference) * second)


# Direct losses on a policy


def implicit_reward(
    log_probability: Array, reference_log_probability: Array, beta: Array | float
) -> Array:
    """beta (log pi(y | x) - log ref(y | x)): the reward, up to a constant, for which pi is optimal.

    Args:
      log_probability: of responses under pi, any shape.
      reference_log_probability: the same under the reference.
      beta: > 0, the coefficient of the KL divergence.

    Returns:
      Of that shape.

    Source: Rafailov et al. (2023), "Direct Preference Optimization", arXiv:2305.18290, equation 5
    without beta log Z(x).
    """
    chex.assert_equal_shape((log_probability, reference_log_probability))
    return beta * (log_probability - jax.lax.stop_gradient(reference_log_probability))


def dpo_loss(
    chosen_log_probability: Array,
    rejected_log_probability: Array,
    reference_chosen_log_probability: Array,
    reference_rejected_log_probability: Array,
    beta: Array | float,
    *,
    label_smoothing: Array | float = 0.0,
) -> Array:
    """`bradley_terry_loss` of the implicit rewards.

    With label smoothing it is the conservative cDPO. TRL's `sigmoid` ignores its label smoothing,
    and its `robust` is another loss: (the first term - the second) / (1 - 2 e).

    Args:
      chosen_log_probability: of the better response under pi, any shape.
      rejected_log_probability: of the other, the same shape.
      reference_chosen_log_probability: of the better response under the reference, likewise.
      reference_rejected_log_probability: of the other, likewise.
      beta: > 0, the coefficient of the KL divergence.
      label_smoothing: e in [0, 0.5), how often labels are taken to be wrong.

    Returns:
      Of that shape.

    Source: Rafailov et al. (2023), arXiv:2305.18290, equation 7; Mitchell (2023), "A note on DPO
    with noisy preferences and relationship to IPO" (cDPO).
    """
    chosen = implicit_reward(chosen_log_probability, reference_chosen_log_probability, beta)
    rejected = implicit_reward(rejected_log_probability, reference_rejected_log_probability, beta)
    return bradley_terry_loss(chosen, rejected, label_smoothing=label_smoothing)


def ipo_loss(
    chosen_log_probability: Array,
    rejected_log_probability: Array,
    reference_chosen_log_probability: Array,
    reference_rejected_log_probability: Array,
    beta: Array | float,
) -> Array:
    """(h - 1 / (2 beta))^2, h the difference of the two log ratios log(pi / ref).

    Of sums over tokens, as the paper writes it and OpenRLHF does. TRL divides each log ratio by
    the length of its response: pass averages for that.

    Args: as in `dpo_loss`; beta is the tau of the paper.

    Returns:
      Of that shape.

    Source: Azar et al. (2023), "A general theoretical paradigm to understand learning from human
    preferences", arXiv:2310.12036, equation 17.
    """
    chosen = implicit_reward(chosen_log_probability, reference_chosen_log_probability, 1)
    rejected = implicit_reward(rejected_log_probability, reference_rejected_log_probability, 1)
    chex.assert_equal_shape((chosen, rejected))
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def kto_loss(
    log_probability: Array,
    reference_log_probability: Array,
    desirable: Array,
    kl: Array,
    beta: Array | float,
    *,
    desirable_weight: Array | float = 1.0,
    undesirable_weight: Array | float = 1.0,
) -> Array:
    """w (1 - sigma(+-beta (log(pi / ref) - z))), + where desirable; no pairs are needed.

    Args:
      log_probability: of responses under pi, any shape.
      reference_log_probability: the same under the reference.
      desirable: bool, the same shape.
      kl: z, an estimate of KL(pi || ref), the same shape or `[]`; 0 where it is negative. The
        paper takes the mean log ratio of responses paired with other prompts of the batch. It
        receives no gradient.
      beta: > 0.
      desirable_weight: w where desirable.
      undesirable_weight: w elsewhere.

    Returns:
      Of that shape.

    Source: Ethayarajh et al. (2024), "KTO: Model alignment as prospect theoretic optimization",
    arXiv:2402.01306, section 4.
    """
    chex.assert_equal_shape((log_probability, desirable))
    reward = implicit_reward(log_probability, reference_log_probability, beta)
    surprise = reward - beta * jax.lax.stop_gradient(jnp.maximum(kl, 0))
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    return weight * jax.nn.sigmoid(jnp.where(desirable, -surprise, surprise))


def simpo_loss(
    chosen_average: Array,
    rejected_average: Array,
    beta: Array | float,
    *,
    margin: Array | float,
    label_smoothing: Array | float = 0.0,
) -> Array:
    """-log sigma(beta (log pi(y_w | x) / |y_w| - log pi(y_l | x) / |y_l|) - gamma): no reference.

    Args:
      chosen_average: the mean log-probability of a token of the better response, any shape.
      rejected_average: of the other, the same shape.
      beta: > 0; 2 to 2.5 in the paper, as averages are small.
      margin: gamma >= 0, in the unit of beta times an average, as in the paper and TRL.
      label_smoothing: as in `bradley_terry_loss`.

    Returns:
      Of that shape.

    Source: Meng, Xia & Chen (2024), "SimPO: Simple preference optimization with a reference-free
    reward", arXiv:2405.14734, equation 6.
    """
    return bradley_terry_loss(
        beta * chosen_average,
        beta * rejected_average,
        margin=margin,
        label_smoothing=label_smoothing,
    )


def orpo_loss(chosen_average: Array, rejected_average: Array, beta: Array | float) -> Array:
    """-log p_w + beta (-log sigma(log(odds(p_w) / odds(p_l)))), odds(p) = p / (1 - p).

    Both terms are losses and are added. What TRL names the loss of the odds ratio is
    +beta log sigma(.), which it subtracts; its other term is a mean over the tokens of a batch.
    An average above -epsilon of its dtype, where 1 - p has no digit left, counts as -epsilon.

    Args:
      chosen_average: log p_w, the mean log-probability of a token of the better response, <= 0,
        any shape.
      rejected_average: log p_l, of the other, the same shape.
      beta: the weight of the odds ratio, lambda in the paper.

    Returns:
      Of that shape.

    Source: Hong, Lee & Thorne (2024), "ORPO: Monolithic preference optimization without reference
    model", arXiv:2403.07691, equations 6 and 7.
    """
    odds_ratio_loss = bradley_terry_loss(_log_odds(chosen_average), _log_odds(rejected_average))
    return -chosen_average + beta * odds_ratio_loss


def _log_odds(log_probability: Array) -> Array:
    below_one = jnp.minimum(log_probability, -jnp.finfo(log_probability.dtype).eps)
    return below_one - jax.nn.log1mexp(-below_one)


# Advantages within a group


def grpo_advantage(score: Array, *, epsilon: float = 1e-4, scale: bool = True) -> Array:
    """(r - mean(r)) / (std(r) + epsilon) over the responses to one prompt.

    The standard deviation has the divisor K - 1, as in TRL and verl. Equal scores give 0, up to
    rounding, which is what epsilon is for: 1e-4 as in TRL (verl and tunix 1e-6, OpenRLHF 1e-9).

    Args:
      score: r, `[K]`, of the responses to one prompt, K >= 2.
      epsilon: added to the standard deviation.
      scale: False leaves out the division (Dr. GRPO), which weights prompts by how unequal their
        scores are, whatever their size.

    Returns:
      `[K]`, one for all tokens of a response.

    Raises:
      ValueError: if K is 1.

    Source: Shao et al. (2024), "DeepSeekMath", arXiv:2402.03300, section 4.1.2; Liu et al. (2025),
    "Understanding R1-Zero-like training", arXiv:2503.20783 (Dr. GRPO).
    """
    num_responses = _group_size(score)
    centred = score - jnp.mean(score)
    if not scale:
        return centred
    variance = jnp.sum(jnp.square(centred)) / (num_responses - 1)
    # The gradient of the square root is never taken at 0.
    positive = variance > 0
    deviation = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)
    return centred / (deviation + epsilon)


def rloo_advantage(score: Array) -> Array:
    """r_i - the mean of the other responses' scores, a baseline that leaves no bias.

    That is K / (K - 1) times the unscaled `grpo_advantage`.

    Args:
      score: r, `[K]`, of the responses to one prompt, K >= 2. A single response has no others:
        verl gives it its raw score and TRL 0; here it is refused.

    Returns:
      `[K]`, one for all tokens of a response.

    Raises:
      ValueError: if K is 1.

    Source: Kool, van Hoof & Welling (2019), "Buy 4 REINFORCE samples, get a baseline for free!";
    Ahmadian et al. (2024), "Back to basics", arXiv:2402.14740 (RLOO).

    >>> import jax.numpy as jnp
    >>> rloo_advantage(jnp.array([1.0, 2.0, 6.0])).tolist()
    [-3.0, -1.5, 4.5]
    """
    num_responses = _group_size(score)
    return (score - jnp.mean(score)) * (num_responses / (num_responses - 1))


def _group_size(score: Array) -> int:
    chex.assert_rank(score, 1)
    if len(score) < 2:
        raise ValueError(f"score has {len(score)} response; a group needs at least 2 to compare")
    return len(score)
