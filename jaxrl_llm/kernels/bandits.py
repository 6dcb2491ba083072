"""Multi-armed bandits: indices, posteriors and laws over `K` arms, and what they cost exactly.

What a strategy knows of its arms are two sums, `Arms`; epsilon-greedy and Boltzmann laws of their
means are in `exploration`. Rewards are in [0, 1] unless a function says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.types import Array


class Arms(NamedTuple):
    """How often each arm was pulled, and what all its pulls together gave; both `[K]` floats."""

    pulls: Array
    total: Array

    @classmethod
    def unknown(cls, num_arms: int) -> Arms:
        """No arm was pulled yet."""
        return cls(jnp.zeros(num_arms), jnp.zeros(num_arms))

    def record(self, arm: Array, reward: Array) -> Arms:
        """After one more pull of `arm` `[]` that gave `reward` `[]`."""
        return Arms(self.pulls.at[arm].add(1), self.total.at[arm].add(reward))

    @property
    def mean(self) -> Array:
        """The average reward of each arm, 0 where it was never pulled."""
        return self.total / jnp.maximum(self.pulls, 1)


def ucb1_index(arms: Arms, *, width: float | Array = 2.0) -> Array:
    """mean + sqrt(width ln t / n), infinite for an arm that was never pulled.

    Args:
      arms: `[K]` each; t is the number of pulls so far and n that of each arm.
      width: `[]`, 2 in UCB1; its regret bound needs more than 1/2.

    Returns:
      `[K]`.

    Source: Auer, Cesa-Bianchi & Fischer (2002), "Finite-time analysis of the multiarmed bandit
      problem", figure 1.
    """
    total = jnp.maximum(jnp.sum(arms.pulls), 1)
    bonus = jnp.sqrt(width * jnp.log(total) / jnp.maximum(arms.pulls, 1))
    return jnp.where(arms.pulls == 0, jnp.inf, arms.mean + bonus)


def beta_posterior(arms: Arms, *, prior: tuple[float, float] = (1.0, 1.0)) -> tuple[Array, Array]:
    """The two parameters `[K]` of each arm's Beta posterior after rewards that are 0 or 1.

    Args:
      arms: `[K]` each.
      prior: the two parameters before any reward; (1, 1) is uniform.

    Source: Gelman et al. (2013), "Bayesian Data Analysis", section 2.4.
    """
    return prior[0] + arms.total, prior[1] + arms.pulls - arms.total


def gaussian_posterior(
    arms: Arms,
    *,
    noise: float | Array = 1.0,
    prior_mean: float | Array = 0.0,
    prior_deviation: float | Array = 1.0,
) -> tuple[Array, Array]:
    """Mean and standard deviation `[K]` of each arm's normal posterior; rewards on any scale.

    Args:
      arms: `[K]` each.
      noise: `[]`, the known standard deviation of a reward.
      prior_mean: `[]`, of the mean of an arm.
      prior_deviation: `[]`, of the mean of an arm.

    Source: Gelman et al. (2013), "Bayesian Data Analysis", section 2.5.
    """
    precision = prior_deviation**-2 + arms.pulls * noise**-2
    mean = (prior_mean * prior_deviation**-2 + arms.total * noise**-2) / precision
    return mean, precision**-0.5


def thompson_law(horizon: int) -> Callable[[Arms], Array]:
    """How probably Thompson sampling pulls each of TWO Bernoulli arms, exactly.

    P(theta_0 > theta_1) under two Beta posteriors is the integral of a polynomial, which a
    Gauss-Legendre rule of enough points gives without error. All pairs of posteriors that can
    occur within the horizon are computed at once, as one matrix product.

    Args:
      horizon: T, a Python integer; the table has T^4 entries.

    Returns:
      `Arms` of 2 -> `[2]`; of no more than `horizon` pulls, all with rewards 0 or 1.

    Source: Thompson (1933), "On the likelihood that one unknown probability exceeds another".
    """
    points, weights = np.polynomial.legendre.leggauss(horizon // 2 + 2)
    x, weights = jnp.asarray((points + 1) / 2), jnp.asarray(weights / 2)
    trials, successes = jnp.meshgrid(*[jnp.arange(horizon + 2.0)] * 2, indexing="ij")
    binomial = jax.vmap(jax.scipy.stats.binom.pmf, (None, None, 0), 2)(successes, trials, x)
    # After s successes in n pulls theta is Beta(1 + s, 1 + n - s): below x is whoever has more than
    # s successes in n + 1 trials of probability x.
    density = (trials[:-1, :-1, None] + 1) * binomial[:-1, :-1]
    below = 1 - jnp.cumsum(binomial, axis=1)[1:, :-1]
    first_wins = jnp.einsum("nsx,mtx->nsmt", density * weights[None, None], below)

    def law(arms: Arms) -> Array:
        place = jnp.stack([arms.pulls, arms.total], axis=1).astype(jnp.int32).ravel()
        first = first_wins[tuple(place)]
        return jnp.stack([first, 1 - first])

    return law


def exp3_law(log_weight: Array, mixing: float | Array) -> Array:
    """(1 - mixing) w / sum w + mixing / K, `[K]`.

    Args:
      log_weight: `[K]`.
      mixing: `[]` in (0, 1], the share of uniform exploration; `exp3_mixing` is the best one known
        beforehand.

    Source: Auer et al. (2002), "The nonstochastic multiarmed bandit problem", figure 1.
    """
    return (1 - mixing) * jax.nn.softmax(log_weight) + mixing / log_weight.size


def exp3_update(
    log_weight: Array, law: Array, arm: Array, reward: Array, mixing: float | Array
) -> Array:
    """Adds mixing / K times the unbiased estimate, reward / law at `arm` and 0 elsewhere.

    Args:
      log_weight: `[K]`; only differences matter, and the result's largest is 0.
      law: `[K]`, what `arm` `[]` was drawn from.
      arm: `[]`.
      reward: `[]`, in [0, 1].
      mixing: as in `exp3_law`.

    Source: as `exp3_law`.
    """
    moved = log_weight.at[arm].add(mixing / log_weight.size * reward / law[arm])
    return moved - jnp.max(moved)


def exp3_mixing(num_arms: int, horizon: int) -> float:
    """min(1, sqrt(K ln K / ((e - 1) T))), for which the regret is below `exp3_bound`.

    Source: as `exp3_law`, corollary 3.2.
    """
    return min(1.0, math.sqrt(num_arms * math.log(num_arms) / ((math.e - 1) * horizon)))


def exp3_bound(num_arms: int, horizon: int) -> float:
    """2 sqrt((e - 1) T K ln K), the most that EXP3 can lose to the best arm, on any rewards.

    Source: as `exp3_law`, corollary 3.2.
    """
    return 2 * math.sqrt((math.e - 1) * horizon * num_arms * math.log(num_arms))


def ucb1_bound(mean: Array, horizon: int | Array) -> Array:
    """8 sum (ln T / gap) + (1 + pi^2 / 3) sum gap, over the arms that are not best; `[]`.

    Source: as `ucb1_index`, theorem 1.
    """
    gap = jnp.max(mean) - mean
    worse = gap > 0
    inverse = jnp.sum(jnp.where(worse, 1 / jnp.where(worse, gap, 1), 0))
    return 8 * jnp.log(horizon) * inverse + (1 + math.pi**2 / 3) * jnp.sum(gap)


def lai_robbins_slope(mean: Array) -> Array:
    """sum gap / KL(arm, best): no good strategy loses less than this times ln T in the long run.

    Args:
      mean: `[K]`, of Bernoulli arms, each in (0, 1).

    Returns:
      `[]`, regret per unit of ln T.

    Source: Lai & Robbins (1985), "Asymptotically efficient adaptive allocation rules", theorem 1.
    """
    best = jnp.max(mean)
    divergence = mean * jnp.log(mean / best) + (1 - mean) * jnp.log((1 - mean) / (1 - best))
    worse = mean < best
    return jnp.sum(jnp.where(worse, (best - mean) / jnp.where(worse, divergence, 1), 0))


def pseudo_regret(expected_reward: Array, arm: Array) -> Array:
    """The expected reward lost so far to the best arm of each round; no noise is in it.

    Args:
      expected_reward: `[T, K]`.
      arm: `[T]`, the arms pulled.

    Returns:
      `[T]`, cumulative.

    Source: Bubeck & Cesa-Bianchi (2012), "Regret analysis of stochastic and nonstochastic
      multi-armed bandit problems", equation 1.2, with the best arm of EACH round.
    """
    chex.assert_rank([expected_reward, arm], [2, 1])
    pulled = jnp.take_along_axis(expected_reward, arm[:, None], axis=1)[:, 0]
    return jnp.cumsum(jnp.max(expected_reward, axis=1) - pulled)


def exact_regret(law: Callable[[Arms], Array], mean: Array, horizon: int) -> Array:
    """The exact expected pseudo-regret of a strategy on TWO Bernoulli arms, after each round.

    What such a strategy can know after t rounds are three numbers: the pulls of arm 0 and the
    successes of both. Their joint law goes forward a round at a time; no run is simulated.

    Args:
      law: of the next arm, `Arms` of 2 -> `[2]` probabilities.
      mean: `[2]`, in [0, 1].
      horizon: T, a Python integer; time and memory grow as T^4 and T^3.

    Returns:
      `[T]`, cumulative.
    """
    chex.assert_shape(mean, (2,))
    states = _two_arm_states(horizon)

    def arms(time: Array, state: tuple[Array, Array, Array]) -> Arms:
        first, *successes = state
        count = jnp.stack([first, time - first])
        return Arms(count.astype(mean.dtype), jnp.stack(successes).astype(mean.dtype))

    laws = jax.vmap(jax.vmap(jax.vmap(lambda time, *state: law(arms(time, state)), (None, 0, 0, 0)),
                             (None, 0, 0, 0)), (None, 0, 0, 0))  # fmt: skip

    def body(mass: Array, time: Array) -> tuple[Array, Array]:
        pull = jnp.where(mass[..., None] > 0, laws(time, *states), 0) * mass[..., None]
        # Nothing wraps around: before the last round the last place of each axis is empty.
        first = jnp.roll(pull[..., 0], 1, axis=0)
        mass = (
            mean[0] * jnp.roll(first, 1, axis=1)
            + (1 - mean[0]) * first
            + mean[1] * jnp.roll(pull[..., 1], 1, axis=2)
            + (1 - mean[1]) * pull[..., 1]
        )
        return mass, jnp.sum(pull, axis=(0, 1, 2)) @ (jnp.max(mean) - mean)

    start = jnp.zeros((horizon + 1,) * 3, mean.dtype).at[0, 0, 0].set(1)
    return jnp.cumsum(jax.lax.scan(body, start, jnp.arange(horizon))[1])


def bayes_optimal_total(horizon: int) -> Array:
    """The most reward that any strategy expects of TWO Bernoulli arms with uniform priors, `[]`.

    By backward induction over all that can be known. Above it, a learner has seen what it must not.

    Args:
      horizon: T, a Python integer; time and memory grow as T^4 and T^3.

    Source: Bellman (1956), "A problem in the sequential design of experiments".
    """
    pulls, *successes = _two_arm_states(horizon)

    def body(value: Array, time: Array) -> tuple[Array, None]:
        count = pulls, jnp.maximum(time - pulls, 0)
        chance = [(s + 1) / (n + 2) for s, n in zip(successes, count, strict=True)]
        first = jnp.roll(value, -1, axis=0)
        after = (first, jnp.roll(first, -1, axis=1)), (value, jnp.roll(value, -1, axis=2))
        worth = [
            p * (1 + success) + (1 - p) * failure
            for p, (failure, success) in zip(chance, after, strict=True)
        ]
        return jnp.maximum(*worth), None

    end = jnp.zeros((horizon + 1,) * 3)
    return jax.lax.scan(body, end, jnp.arange(horizon), reverse=True)[0][0, 0, 0]


def _two_arm_states(horizon: int) -> tuple[Array, Array, Array]:
    """Pulls of arm 0 and successes of both arms, each `[T + 1, T + 1, T + 1]`."""
    steps = jnp.arange(horizon + 1)
    pulls, first, second = jnp.meshgrid(steps, steps, steps, indexing="ij")
    return pulls, first, second
