"""Policy gradients over discrete actions: log-probabilities, divergences and losses.

What takes logits is written for ONE state, `[A]`: batch it with `jax.vmap`. What takes
log-probabilities is elementwise, so it serves one action, `[T, B]` actions or `[B, L]` tokens.
A loss is per example and is minimised; whoever calls it takes the mean, over the mask it knows.

`log_policy` is idempotent: where several of these functions share a policy, compute it once and
hand it to them as the logits. XLA merges the repeated normalisation either way.
"""

from __future__ import annotations

import functools
import itertools
import operator

import chex
import jax
import jax.numpy as jnp

from jaxrl_llm.types import Array


def masked_logits(logits: Array, mask: Array) -> Array:
    """`logits` where `mask` is True, elsewhere a finite number whose softmax is exactly 0.

    The number is half the lowest of the dtype: subtracting a maximum cannot turn it into -inf,
    hence 0 * -inf = NaN appears neither in an entropy nor in its gradient. The gradient is 0
    at masked entries, even where the logit itself is NaN. A row without any True entry becomes
    uniform rather than NaN.

    >>> import jax
    >>> jax.nn.softmax(masked_logits(jnp.zeros(3), jnp.array([True, False, True]))).tolist()
    [0.5, 0.0, 0.5]

    Args:
      logits: any shape, floating; the result has its shape and dtype.
      mask: the same shape, bool, True = keep.
    """
    chex.assert_equal_shape((logits, mask))
    return jnp.where(mask, logits, jnp.finfo(logits.dtype).min / 2)


def log_policy(logits: Array, mask: Array | None = None) -> Array:
    """The logarithm of the policy, log pi(. | s), in nats.

    Args:
      logits: `[A]`.
      mask: `[A]` bool, True where the action is allowed; None allows all.

    Returns:
      `[A]`, finite; about the lowest number of the dtype where the action is not allowed.
    """
    chex.assert_rank(logits, 1)
    return jax.nn.log_softmax(logits if mask is None else masked_logits(logits, mask))


def log_probability(logits: Array, action: Array, mask: Array | None = None) -> Array:
    """The log-probability of an action, log pi(a | s), in nats.

    Args:
      logits: `[A]`.
      action: `[]` integer in [0, A).
      mask: `[A]` bool, True where the action is allowed; None allows all.

    Returns:
      `[]`.
    """
    return log_policy(logits, mask)[action]


def sample_action(logits: Array, uniform: Array, mask: Array | None = None) -> Array:
    """The action that a uniform number draws by inversion: the first whose cumulative mass tops it.

    One random number an action, where the Gumbel trick takes one for each of its `A` logits. For
    tens of actions: the program grows with `A`, so a vocabulary wants another sampler.

    Args:
      logits: `[A]`.
      uniform: `[]`, in [0, 1).
      mask: `[A]` bool, True where the action is allowed, and no other is drawn; None allows all.

    Returns:
      `[]` int32.
    """
    chex.assert_rank(logits, 1)
    logits = logits if mask is None else masked_logits(logits, mask)
    # A cumulative sum in half precision would lose unlikely actions, or run past the last one.
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    mass = jnp.exp(logits - jnp.max(logits))
    # Unrolled over the actions, so that a batch is one fused loop; `jnp.cumsum` would be several.
    cumulative = list(itertools.accumulate(mass))
    threshold = uniform * cumulative[-1]
    passed = [(total <= threshold).astype(jnp.int32) for total in cumulative]
    return functools.reduce(operator.add, passed)


def entropy(logits: Array, mask: Array | None = None) -> Array:
    """H(pi) = -sum_a pi(a) log pi(a) in nats, over allowed actions.

    Args:
      logits: `[A]`.
      mask: `[A]` bool, True where the action is allowed; None allows all.

    Returns:
      `[]`, from 0 to log of the number of allowed actions.
    """
    log_pi = log_policy(logits, mask)
    probability = jnp.exp(log_pi)
    # Where it is 0 the logarithm is near the lowest number: twice as much of it is infinite, and
    # 0 * infinity would be the gradient of an entropy that counts that much.
    return -jnp.sum(probability * jnp.where(probability > 0, log_pi, 0))


def kl_divergence(logits: Array, reference_logits: Array, mask: Array | None = None) -> Array:
    """KL(pi || ref) = sum_a pi(a) (log pi(a) - log ref(a)) in nats, exactly.

    Args:
      logits: `[A]`, of pi.
      reference_logits: `[A]`, of ref.
      mask: `[A]` bool, True where the action is allowed, under both; None allows all.

    Returns:
      `[]`.
    """
    log_pi = log_policy(logits, mask)
    return jnp.sum(jnp.exp(log_pi) * (log_pi - log_policy(reference_logits, mask)))


def kl_k1(log_probability: Array, reference_log_probability: Array) -> Array:
    """k1 = log pi(a) - log ref(a): unbiased for KL(pi || ref) when a ~ pi, of either sign.

    It belongs inside a reward, under stop-gradient. As a loss it does nothing: E[grad k1] = 0.

    Args:
      log_probability: of the sampled actions under pi, any shape.
      reference_log_probability: the same under ref.

    Returns:
      Of that shape, in nats.

    Source: Schulman (2020), "Approximating KL Divergence", joschu.net/blog/kl-approx.html; its
    ratio r is ref / pi, so this is -log r.
    """
    chex.assert_equal_shape((log_probability, reference_log_probability))
    return log_probability - reference_log_probability


def kl_k2(log_probability: Array, reference_log_probability: Array) -> Array:
    """k2 = (log pi(a) - log ref(a))^2 / 2: never negative, biased as a value.

    As a loss on actions drawn from pi it is right: E[grad k2] = grad KL(pi || ref).

    Args:
      log_probability: of the sampled actions under pi, any shape.
      reference_log_probability: the same under ref.

    Returns:
      Of that shape, in nats.

    Source: Schulman (2020), "Approximating KL Divergence".
    """
    return 0.5 * jnp.square(kl_k1(log_probability, reference_log_probability))


def kl_k3(log_probability: Array, reference_log_probability: Array) -> Array:
    """k3 = exp(-k1) - 1 + k1: unbiased for KL(pi || ref) when a ~ pi, never negative.

    As a loss on actions drawn from pi it descends the OTHER divergence:
    E[grad k3] = grad KL(ref || pi). It is not clamped.

    Args:
      log_probability: of the sampled actions under pi, any shape.
      reference_log_probability: the same under ref.

    Returns:
      Of that shape, in nats.

    Source: Schulman (2020), "Approximating KL Divergence".
    """
    k1 = kl_k1(log_probability, reference_log_probability)
    return jnp.expm1(-k1) + k1


def reinforce_loss(log_probability: Array, return_: Array, baseline: Array) -> Array:
    """-(G - b) log pi(a | s); neither the return nor the baseline receives a gradient.

    With `baseline = V(s)` this is the actor's loss of advantage actor-critic.

    Args:
      log_probability: log pi(a | s), any shape.
      return_: G, the same shape.
      baseline: b, the same shape, or a scalar; it may depend on the state, not on the action.

    Returns:
      Of that shape.

    Source: Williams (1992), section 4 (theorem 1), episodic as in section 5 (theorem 2).
    """
    chex.assert_equal_shape((log_probability, return_))
    return -log_probability * jax.lax.stop_gradient(return_ - baseline)


def importance_ratio(log_probability: Array, old_log_probability: Array) -> Array:
    """pi(a | s) / pi_old(a | s); pi_old receives no gradient.

    Args:
      log_probability: log pi(a | s), any shape.
      old_log_probability: log pi_old(a | s) as it was when a was sampled, the same shape.

    Returns:
      Of that shape.
    """
    chex.assert_equal_shape((log_probability, old_log_probability))
    return jnp.exp(log_probability - jax.lax.stop_gradient(old_log_probability))


def ppo_clip_loss(
    log_probability: Array,
    old_log_probability: Array,
    advantage: Array,
    clip_epsilon: float | Array,
    clip_epsilon_high: float | Array | None = None,
) -> Array:
    """max(-r A, -clip(r, 1 - epsilon, 1 + epsilon_high) A), r = pi(a | s) / pi_old(a | s).

    Args:
      log_probability: log pi(a | s), any shape.
      old_log_probability: log pi_old(a | s) as it was when a was sampled, the same shape.
      advantage: A, the same shape; it receives no gradient.
      clip_epsilon: epsilon > 0.
      clip_epsilon_high: of the upper end; None is epsilon. A larger one lets an unlikely action
        gain more in one update, which keeps the entropy up.

    Returns:
      Of that shape.

    Source: Schulman et al. (2017), eq. 7, negated; Yu et al. (2025), "DAPO", arXiv:2503.14476,
    section 3.1, for two ends ("clip-higher").
    """
    chex.assert_equal_shape((log_probability, advantage))
    advantage = jax.lax.stop_gradient(advantage)
    ratio = importance_ratio(log_probability, old_log_probability)
    high = clip_epsilon if clip_epsilon_high is None else clip_epsilon_high
    clipped = jnp.clip(ratio, min=1 - clip_epsilon, max=1 + high)
    return jnp.maximum(-ratio * advantage, -clipped * advantage)


def ppo_dual_clip_loss(
    log_probability: Array,
    old_log_probability: Array,
    advantage: Array,
    clip_epsilon: float,
    dual_clip: float,
    clip_epsilon_high: float | None = None,
) -> Array:
    """`ppo_clip_loss`, at most -c A where A < 0.

    There `ppo_clip_loss` grows with the ratio without bound, so one stale sample whose ratio
    exploded can dominate a batch; this caps its loss, and its gradient becomes 0.

    Args:
      log_probability: log pi(a | s), any shape.
      old_log_probability: log pi_old(a | s) as it was when a was sampled, the same shape.
      advantage: A, the same shape; it receives no gradient.
      clip_epsilon: epsilon > 0.
      dual_clip: c > 1; 3 in the paper.
      clip_epsilon_high: as in `ppo_clip_loss`.

    Returns:
      Of that shape.

    Source: Ye et al. (2020), "Mastering Complex Control in MOBA Games with Deep Reinforcement
    Learning", eq. 5, negated.
    """
    loss = ppo_clip_loss(
        log_probability, old_log_probability, advantage, clip_epsilon, clip_epsilon_high
    )
    advantage = jax.lax.stop_gradient(advantage)
    return jnp.where(advantage < 0, jnp.minimum(loss, -dual_clip * advantage), loss)


def ppo_kl_penalty_loss(
    log_probability: Array,
    old_log_probability: Array,
    advantage: Array,
    kl: Array,
    kl_coefficient: float,
) -> Array:
    """-r A + beta KL(pi_old || pi), r = pi(a | s) / pi_old(a | s).

    Args:
      log_probability: log pi(a | s), any shape.
      old_log_probability: log pi_old(a | s) as it was when a was sampled, the same shape.
      advantage: A, the same shape; it receives no gradient.
      kl: `kl_divergence(old_logits, logits)` at each state, the same shape.
      kl_coefficient: beta >= 0.

    Returns:
      Of that shape.

    Source: Schulman et al. (2017), eq. 8, negated.
    """
    chex.assert_equal_shape((log_probability, advantage, kl))
    ratio = importance_ratio(log_probability, old_log_probability)
    return -ratio * jax.lax.stop_gradient(advantage) + kl_coefficient * kl


def clipped_value_loss(
    value: Array, old_value: Array, return_: Array, clip_epsilon: float | Array
) -> Array:
    """max((v - G)^2, (v_old + clip(v - v_old, -epsilon, epsilon) - G)^2) / 2.

    Only `value` receives a gradient.

    Args:
      value: v, any shape.
      old_value: v_old as it was when the action was taken, the same shape.
      return_: G, the same shape.
      clip_epsilon: epsilon > 0, in the unit of the reward.

    Returns:
      Of that shape.

    Source: Engstrom et al. (2020), "Implementation Matters in Deep Policy Gradients", section 3
    (value function clipping), halved. The paper of PPO does not have it.
    """
    chex.assert_equal_shape((value, old_value, return_))
    old_value, return_ = jax.lax.stop_gradient((old_value, return_))
    clipped = old_value + jnp.clip(value - old_value, min=-clip_epsilon, max=clip_epsilon)
    return 0.5 * jnp.maximum(jnp.square(value - return_), jnp.square(clipped - return_))
