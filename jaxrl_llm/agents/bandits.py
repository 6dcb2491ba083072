"""Strategies for multi-armed and contextual bandits, and their play against known arms.

A strategy is three pure functions; `play` is one run of it and `play_many` is a `vmap` over keys.
What is reported is the exact expected reward that was given up, not the noisy one.

    strategy = ucb1()
    problem = envs.bandits.bernoulli((0.9, 0.8, 0.5), horizon=2000)
    runs = play_many(strategy, key, problem, num_runs=1000)
    runs.regret.mean(axis=0)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.envs.bandits import Bandit
from jaxrl_llm.kernels import bandits, contextual_bandits, exploration, policy_gradient
from jaxrl_llm.kernels.bandits import Arms
from jaxrl_llm.kernels.contextual_bandits import LinearArms
from jaxrl_llm.types import Array, Key, PyTree


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How to pull arms, as pure functions of one run.

    Attributes:
      init: `(num_arms, num_features) -> state`.
      law: `(key, state, context [d]) -> [K]`, the probability of each arm; of a strategy that
        draws from a posterior, given that draw.
      update: `(state, context, law, arm, reward) -> state`.
    """

    init: Callable[[int, int], PyTree]
    law: Callable[[Key, PyTree, Array], Array]
    update: Callable[[PyTree, Array, Array, Array, Array], PyTree]


@struct.dataclass(kw_only=True)
class Play:
    """One run of T rounds.

    Attributes:
      arm: `[T]` int32, pulled.
      reward: `[T]`, received.
      regret: `[T]`, cumulative pseudo-regret.
    """

    arm: Array
    reward: Array
    regret: Array


def epsilon_greedy(epsilon: float = 0.1) -> Strategy:
    """The best arm so far, ties at random, but any arm with probability `epsilon`."""
    checks.between("epsilon", epsilon, 0, 1)
    return by_arms(lambda arms: exploration.epsilon_greedy(arms.mean, epsilon))


def boltzmann(temperature: float = 0.1) -> Strategy:
    """softmax(mean / temperature)."""
    checks.positive("temperature", temperature)
    return by_arms(lambda arms: exploration.boltzmann(arms.mean, temperature))


def ucb1(width: float = 2.0) -> Strategy:
    """The arm of the highest upper confidence bound, ties to the lowest index."""
    checks.positive("width", width)
    return by_arms(lambda arms: _certain(bandits.ucb1_index(arms, width=width)))


def thompson_bernoulli(prior: tuple[float, float] = (1.0, 1.0)) -> Strategy:
    """The best arm of one draw from Beta posteriors; rewards are 0 or 1."""
    for index, parameter in enumerate(prior):
        checks.positive(f"prior[{index}]", parameter)

    def law(key: Key, arms: Arms, _: Array) -> Array:
        return _certain(jax.random.beta(key, *bandits.beta_posterior(arms, prior=prior)))

    return Strategy(init=_unknown, law=law, update=_record)


def thompson_gaussian(
    *, noise: float = 1.0, prior_mean: float = 0.0, prior_deviation: float = 1.0
) -> Strategy:
    """The best arm of one draw from normal posteriors; see `bandits.gaussian_posterior`."""
    checks.positive("noise", noise)
    checks.positive("prior_deviation", prior_deviation)

    def law(key: Key, arms: Arms, _: Array) -> Array:
        mean, deviation = bandits.gaussian_posterior(
            arms, noise=noise, prior_mean=prior_mean, prior_deviation=prior_deviation
        )
        return _certain(mean + deviation * jax.random.normal(key, mean.shape))

    return Strategy(init=_unknown, law=law, update=_record)


def exp3(mixing: float) -> Strategy:
    """Exponential weights on estimated rewards, which nobody's choice of rewards can fool."""
    if not 0 < mixing <= 1:
        raise ValueError(f"mixing is {mixing}; it must be in (0, 1]")

    def update(weight: Array, _: Array, law: Array, arm: Array, reward: Array) -> Array:
        return bandits.exp3_update(weight, law, arm, reward, mixing)

    return Strategy(
        init=lambda num_arms, _: jnp.zeros(num_arms),
        law=lambda _key, weight, _context: bandits.exp3_law(weight, mixing),
        update=update,
    )


def linucb(*, width: float = 1.0, penalty: float = 1.0) -> Strategy:
    """The arm of the highest upper confidence bound of a ridge regression on the context."""
    checks.at_least("width", width, 0)
    checks.positive("penalty", penalty)

    def init(num_arms: int, num_features: int) -> LinearArms:
        return LinearArms.unknown(num_arms, num_features, penalty=penalty)

    def law(_: Key, arms: LinearArms, context: Array) -> Array:
        return _certain(contextual_bandits.linucb_index(arms, context, width=width))

    def update(arms: LinearArms, context: Array, _: Array, arm: Array, reward: Array) -> LinearArms:
        return arms.record(context, arm, reward)

    return Strategy(init=init, law=law, update=update)


def by_arms(law: Callable[[Arms], Array]) -> Strategy:
    """The strategy whose law depends on what `Arms` says and on no draw of its own."""
    return Strategy(init=_unknown, law=lambda _key, arms, _context: law(arms), update=_record)


def play(strategy: Strategy, key: Key, problem: Bandit) -> Play:
    """One run of `strategy` on a problem whose expected rewards are known to us, not to it."""
    law_key, arm_key, reward_key = jax.random.split(key, 3)
    is_bernoulli = problem.noise == "bernoulli"
    draw = jax.random.uniform if is_bernoulli else jax.random.normal
    inputs = (
        jnp.arange(problem.horizon),
        jax.random.uniform(arm_key, (problem.horizon,)),
        draw(reward_key, (problem.horizon,)),
        problem.context,
        problem.expected_reward,
    )
    spread = problem.deviation

    def body(state: PyTree, inputs: tuple) -> tuple[PyTree, tuple[Array, Array]]:
        time, side, luck, context, expected = inputs
        law = strategy.law(jax.random.fold_in(law_key, time), state, context)
        arm = policy_gradient.sample_action(jnp.log(law), side)
        mean = expected[arm]
        reward = (luck < mean).astype(mean.dtype) if is_bernoulli else mean + spread * luck
        return strategy.update(state, context, law, arm, reward), (arm, reward)

    start = strategy.init(problem.num_arms, problem.context.shape[1])
    _, (arm, reward) = jax.lax.scan(body, start, inputs)
    return Play(arm=arm, reward=reward, regret=bandits.pseudo_regret(problem.expected_reward, arm))


@partial(jax.jit, static_argnames=("strategy", "num_runs"))
def play_many(strategy: Strategy, key: Key, problem: Bandit, num_runs: int) -> Play:
    """Independent runs side by side, leaves `[num_runs, T]`."""
    keys = jax.random.split(key, num_runs)
    return jax.vmap(lambda key: play(strategy, key, problem))(keys)


@partial(jax.jit, static_argnames=("strategy", "horizon"))
def expected_regret(strategy: Strategy, mean: Array, horizon: int) -> Array:
    """What `strategy` loses in expectation on TWO Bernoulli arms, exactly, `[T]`.

    Args:
      strategy: made by `by_arms`, as all but EXP3, LinUCB and the two of Thompson are; for Thompson
        sampling use `by_arms(kernels.bandits.thompson_law(horizon))`.
      mean: `[2]`.
      horizon: T.
    """
    nothing = jax.random.key(0), jnp.ones(1)
    return bandits.exact_regret(
        lambda arms: strategy.law(nothing[0], arms, nothing[1]), mean, horizon
    )


def _certain(index: Array) -> Array:
    return jax.nn.one_hot(jnp.argmax(index), index.size)


def _unknown(num_arms: int, _: int) -> Arms:
    return Arms.unknown(num_arms)


def _record(arms: Arms, _context: Array, _law: Array, arm: Array, reward: Array) -> Arms:
    return arms.record(arm, reward)
