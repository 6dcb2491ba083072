"""Targets and losses that deep Q-learning and soft actor-critic regress on.

Those of ONE transition, or elementwise: `vmap` over a batch, and reduce there. One convention, that
of `kernels.returns`:

- `discount = gamma * (1 - terminated)`: nothing follows a death, and a timeout bootstraps;
- the next values are those of the observation BEFORE any reset;
- a target is a constant: no gradient passes through it.

The expectations of these targets are the Bellman equations of `kernels.bellman` and
`kernels.soft_bellman`, which say where each converges in a table.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_llm.kernels import policy_gradient, returns, temporal_difference
from jaxrl_llm.types import Array


def q_learning_target(
    reward: Array, discount: Array, next_q: Array, action_mask: Array | None = None
) -> Array:
    """r + d max_a Q(s', a) over the allowed actions: `temporal_difference`'s, held constant.

    Args:
      reward: `[]`.
      discount: `[]`, gamma (1 - terminated).
      next_q: `[A]`, of the target network at the observation before any reset.
      action_mask: `[A]` bool, True where allowed in s'; all are when None.

    Returns:
      `[]`, without gradient.

    Source: Mnih et al. (2015), "Human-level control through deep reinforcement learning",
      algorithm 1.
    """
    return double_q_learning_target(reward, discount, next_q, next_q, action_mask)


def double_q_learning_target(
    reward: Array,
    discount: Array,
    next_q: Array,
    next_target_q: Array,
    action_mask: Array | None = None,
) -> Array:
    """r + d Q'(s', argmax_a Q(s', a)): the online network chooses, the target network evaluates.

    Args:
      reward: `[]`.
      discount: `[]`, gamma (1 - terminated).
      next_q: `[A]`, of the online network at the observation before any reset.
      next_target_q: `[A]`, of the target network there.
      action_mask: `[A]` bool, True where allowed in s'; all are when None.

    Returns:
      `[]`, without gradient.

    Source: van Hasselt et al. (2016), "Deep reinforcement learning with double Q-learning",
      arXiv:1509.06461, equation 4 with the target network's parameters as the second set.

    >>> online, target = jnp.array([1.0, 2.0]), jnp.array([9.0, 3.0])
    >>> double_q_learning_target(jnp.float32(1), jnp.float32(0.5), online, target).item()
    2.5
    """
    return jax.lax.stop_gradient(
        temporal_difference.double_q_learning_target(
            reward, discount, next_q, next_target_q, action_mask
        )
    )


class NStepTargetParts(NamedTuple):
    """`return_ + discount * value` is the n-step target, with the value after step `last`.

    Attributes:
      return_: `[]`, the discounted sum of the rewards that count.
      discount: `[]`, the product of their discounts; 0 where the last of them terminated.
      last: `[]` int32, the last step that counts.
    """

    return_: Array
    discount: Array
    last: Array


def n_step_target_parts(reward: Array, discount: Array, reset: Array) -> NStepTargetParts:
    """What an n-step target needs of a window: rewards up to and with the first reset, or all n.

    The value to bootstrap from is that of the observation before any reset after step `last`;
    `q_learning_target(parts.return_, parts.discount, next_q)` is the n-step target of DQN.

    Args:
      reward: `[n]`, from the step whose target this is.
      discount: `[n]`, gamma (1 - terminated).
      reset: `[n]` bool, terminated or truncated.

    Returns:
      `NStepTargetParts`, without gradient.

    Source: Sutton & Barto (2018), equation 7.1, cut at the end of an episode.

    >>> reset = jnp.array([False, True, False])  # a timeout at the second step
    >>> parts = n_step_target_parts(jnp.ones(3), jnp.full(3, 0.5), reset)
    >>> parts.return_.item(), parts.discount.item(), parts.last.item()
    (1.5, 0.25, 1)
    """
    chex.assert_rank([reward, discount, reset], 1)
    chex.assert_equal_shape([reward, discount, reset])
    nothing, one = jnp.zeros_like(reward), jnp.ones_like(reward)
    parts = NStepTargetParts(
        return_=returns.discounted_returns(reward, discount, nothing, reset)[0],
        # Worth 1 after the window and nothing within it, so that only the discounts are left.
        discount=returns.discounted_returns(nothing, discount, one, reset)[0],
        last=jnp.where(jnp.any(reset), jnp.argmax(reset), len(reset) - 1).astype(jnp.int32),
    )
    return jax.lax.stop_gradient(parts)


def squared_loss(error: Array) -> Array:
    """error^2 / 2, of any shape: the gradient is the error itself."""
    return 0.5 * jnp.square(error)


def huber_loss(error: Array, delta: float | Array = 1.0) -> Array:
    """error^2 / 2 up to |error| = delta, and the tangent beyond: the gradient is at most delta.

    Args:
      error: any shape.
      delta: positive. With 1 the gradient is that of `squared_loss`, clipped to [-1, 1].

    Returns:
      Of that shape.

    Source: Huber (1964), "Robust estimation of a location parameter".
    """
    size = jnp.abs(error)
    inside = jnp.minimum(size, delta)
    return squared_loss(inside) + delta * (size - inside)


def soft_value(
    q: Array, logits: Array, temperature: float | Array, action_mask: Array | None = None
) -> Array:
    """V = sum_a pi(a) (Q(a) - temperature log pi(a)), of pi = softmax(logits) over allowed actions.

    At `logits = q / temperature`, its maximum over policies, it is `soft_bellman.soft_value`.

    Args:
      q: `[A]`, any number, infinite ones too, where not allowed.
      logits: `[A]`, of the policy.
      temperature: `[]`, of the entropy bonus, at least 0, in units of reward a nat.
      action_mask: `[A]` bool, True where allowed; all are when None.

    Returns:
      `[]`.

    Source: Haarnoja et al. (2018), "Soft actor-critic algorithms and applications",
      arXiv:1812.05905, equation 3; Christodoulou (2019), "Soft actor-critic for discrete action
      settings", arXiv:1910.07207, for the sum over actions.
    """
    chex.assert_equal_shape([q, logits])
    log_pi = policy_gradient.log_policy(logits, action_mask)
    probability = jnp.exp(log_pi)
    if action_mask is not None:
        # A probability of 0 times an infinite number, or a gradient of such a number, is NaN.
        q, log_pi = (jnp.where(action_mask, x, 0) for x in (q, log_pi))
    return jnp.sum(probability * (q - temperature * log_pi))


def soft_q_target(reward: Array, discount: Array, next_value: Array) -> Array:
    """r + d V(s'), with the soft value of the next state.

    That is `soft_value` for actions that can be listed, and Q(s', a') - temperature log pi(a' | s')
    of one a' ~ pi where they cannot.

    Args:
      reward: any shape.
      discount: the same, gamma (1 - terminated).
      next_value: the same, of the observation before any reset.

    Returns:
      Of that shape, without gradient.

    Source: Haarnoja et al. (2018), arXiv:1812.05905, equation 2, and the target in equation 5.
    """
    chex.assert_equal_shape([reward, discount, next_value])
    return jax.lax.stop_gradient(reward + discount * next_value)


def sac_actor_loss(log_probability: Array, q: Array, temperature: float | Array) -> Array:
    """temperature log pi(a | s) - Q(s, a) of a reparametrised action a = f(noise; parameters).

    The gradient passes through `log_probability` and through the action into `q`; the parameters
    of Q are the caller's to hold.

    Args:
      log_probability: log pi(a | s), any shape.
      q: Q(s, a), the same shape; the smaller one of two critics.
      temperature: `[]`; no gradient passes through it.

    Returns:
      Of that shape.

    Source: Haarnoja et al. (2018), arXiv:1812.05905, equation 9.
    """
    chex.assert_equal_shape([log_probability, q])
    return jax.lax.stop_gradient(temperature) * log_probability - q


def sac_discrete_actor_loss(
    logits: Array, q: Array, temperature: float | Array, action_mask: Array | None = None
) -> Array:
    """sum_a pi(a) (temperature log pi(a) - Q(a)), the negated `soft_value` of the policy.

    Up to a constant it is temperature · KL(pi || softmax(q / temperature)).

    Args:
      logits: `[A]`, the only argument that a gradient passes through.
      q: `[A]`, the smaller one of two critics, each action for itself.
      temperature: `[]`.
      action_mask: `[A]` bool, True where allowed; all are when None.

    Returns:
      `[]`.

    Source: Christodoulou (2019), arXiv:1910.07207, the policy's objective with the expectation
      over actions taken exactly.
    """
    q, temperature = jax.lax.stop_gradient((q, temperature))
    return -soft_value(q, logits, temperature, action_mask)


def temperature_loss(
    log_temperature: Array, entropy: Array, target_entropy: float | Array
) -> Array:
    """temperature · (H - target): lowers the temperature while the policy is random enough.

    Args:
      log_temperature: log of the temperature, any shape; the only one with a gradient.
      entropy: H of the policy in nats, or -log pi(a | s) of one a ~ pi, the same shape or `[]`.
      target_entropy: in nats. For D continuous actions in [-1, 1] the paper takes -D.

    Returns:
      Of the shape of `entropy`.

    Source: Haarnoja et al. (2018), arXiv:1812.05905, equation 18.
    """
    excess = jax.lax.stop_gradient(entropy - target_entropy)
    return jnp.exp(log_temperature) * excess


def quantile_huber_loss(
    quantiles: Array, targets: Array, levels: Array, delta: float | Array = 1.0
) -> Array:
    """sum_i mean_j |tau_i - [u_ij < 0]| huber(u_ij) / delta, with u_ij = target_j - quantile_i.

    An error above costs tau, one below 1 - tau, so that the minimum over samples of the target is
    its tau-quantile, smoothed over a width of delta.

    Args:
      quantiles: `[N]`, of the return of one pair.
      targets: `[M]`, r + d times the quantiles of the next; no gradient passes through them.
      levels: `[N]`, tau in (0, 1); (i + 1/2) / N for N quantiles.
      delta: positive.

    Returns:
      `[]`.

    Source: Dabney et al. (2018), "Distributional reinforcement learning with quantile regression",
      arXiv:1710.10044, equation 10 and algorithm 1. Divided by delta as in Dabney et al. (2018),
      "Implicit quantile networks", arXiv:1806.06923, so that it tends to the quantile loss as
      delta goes to 0; the same at delta = 1.
    """
    chex.assert_rank([quantiles, targets, levels], 1)
    chex.assert_equal_shape([quantiles, levels])
    error = jax.lax.stop_gradient(targets)[None, :] - quantiles[:, None]
    weight = jnp.abs(levels[:, None] - (error < 0))
    return jnp.sum(jnp.mean(weight * huber_loss(error, delta) / delta, axis=1))
