"""Strategies beside exact regrets, published ones, and the laws that they claim to follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.agents import bandits
from jaxrl_llm.envs import bandits as problems
from jaxrl_llm.kernels.bandits import Arms, exp3_bound, exp3_mixing, thompson_law

ROUNDS, MEANS, NUM_RUNS = 20, (0.7, 0.4), 2000
EXACT = {
    "epsilon-greedy": (bandits.epsilon_greedy(0.2), None),
    "boltzmann": (bandits.boltzmann(0.3), None),
    "ucb1": (bandits.ucb1(), None),
    "thompson": (bandits.thompson_bernoulli(), bandits.by_arms(thompson_law(ROUNDS))),
}

# Three Bernoulli arms of success .9, .8 and .5, 2000 rounds: the mean regret of 1000 runs of an
# independent NumPy program, with the standard error of such a mean.
THREE = (0.9, 0.8, 0.5)
PUBLISHED = {
    "ucb1": (bandits.ucb1(), 63.1, 0.3),
    "epsilon-greedy": (bandits.epsilon_greedy(0.1), 43.4, 0.6),
    "boltzmann": (bandits.boltzmann(0.1), 91.9, 2.9),
}


def final_regret(strategy, problem, num_runs, seed=0):
    """Mean and standard error of the regret of all rounds."""
    regret = bandits.play_many(strategy, jax.random.key(seed), problem, num_runs).regret[:, -1]
    return float(regret.mean()), float(regret.std(ddof=1)) / num_runs**0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_play_loses_what_the_exact_computation_says(name):
    strategy, certain = EXACT[name]
    mean, error = final_regret(strategy, problems.bernoulli(MEANS, ROUNDS), NUM_RUNS)
    exact = bandits.expected_regret(certain or strategy, jnp.array(MEANS), ROUNDS)[-1]
    assert abs(mean - exact) < 3 * error


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_play_loses_what_an_independent_program_lost(name):
    strategy, regret, regret_error = PUBLISHED[name]
    mean, error = final_regret(strategy, problems.bernoulli(THREE, 2000), 1000)
    assert abs(mean - regret) < 3 * (error**2 + regret_error**2) ** 0.5


def test_exp3_keeps_its_promise_where_others_are_fooled():
    problem = problems.swapping((0.9, 0.1), 400)
    mixing = exp3_mixing(2, 400)
    # What it promises is against the best FIXED arm.
    mean, error = final_regret(bandits.exp3(mixing), problem, 200)
    assert mean - problem.fixed_regret < exp3_bound(2, 400) - 3 * error
    greedy, _ = final_regret(bandits.epsilon_greedy(0.0), problem, 200)
    assert greedy > problem.fixed_regret * 0.99


@pytest.mark.slow
def test_linucb_learns_what_arms_without_context_cannot():
    problem = problems.linear(jax.random.key(1), 300, deviation=0.1)
    informed, _ = final_regret(bandits.linucb(width=0.5), problem, 20)
    blind, _ = final_regret(bandits.thompson_gaussian(noise=0.1), problem, 20)
    assert informed < 0.3 * blind
    assert abs(blind - problem.fixed_regret) < 0.3 * problem.fixed_regret


@pytest.mark.parametrize(
    ("strategy", "probability"),
    [
        (bandits.thompson_bernoulli(), 22 / 35),
        (bandits.thompson_gaussian(prior_deviation=9.0), None),
    ],
)
def test_thompson_pulls_an_arm_as_often_as_it_is_best(strategy, probability):
    """P(Beta(3, 2) > Beta(2, 2)) = 22/35; of two normals, Phi of the difference."""
    arms = Arms(jnp.array([3.0, 2.0]), jnp.array([2.0, 1.0]))
    if probability is None:
        deviation = np.sqrt(1 / (1 / 81 + 3) + 1 / (1 / 81 + 2))
        gap = 2 / (1 / 81 + 3) - 1 / (1 / 81 + 2)
        probability = float(jax.scipy.stats.norm.cdf(gap / deviation))
    keys = jax.random.split(jax.random.key(0), 20_000)
    law = jax.jit(jax.vmap(lambda key: strategy.law(key, arms, jnp.ones(1))))(keys)
    error = (probability * (1 - probability) / len(keys)) ** 0.5
    assert abs(float(law[:, 0].mean()) - probability) < 3 * error


def test_play_reports_what_it_did():
    problem = problems.bernoulli((1.0, 0.0), 30)
    run = bandits.play(bandits.epsilon_greedy(1.0), jax.random.key(2), problem)
    arm = np.asarray(run.arm)
    assert set(arm) == {0, 1}
    np.testing.assert_array_equal(run.reward, 1 - arm)
    np.testing.assert_allclose(run.regret, np.cumsum(arm), rtol=1e-6)


@pytest.mark.slow
def test_play_many_is_each_run_alone():
    problem = problems.linear(jax.random.key(0), 12)
    many = bandits.play_many(bandits.linucb(), jax.random.key(3), problem, 3)
    for index, key in enumerate(jax.random.split(jax.random.key(3), 3)):
        alone = bandits.play(bandits.linucb(), key, problem)
        np.testing.assert_array_equal(many.arm[index], alone.arm)
        np.testing.assert_allclose(many.reward[index], alone.reward, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bandits.epsilon_greedy(1.1), r"epsilon is 1.1; it must be in \[0, 1\]"),
        (lambda: bandits.boltzmann(0.0), "temperature is 0.0; it must be greater than 0"),
        (lambda: bandits.ucb1(-1.0), "width is -1.0"),
        (lambda: bandits.thompson_bernoulli((1.0, 0.0)), r"prior\[1\] is 0.0"),
        (lambda: bandits.thompson_gaussian(noise=0.0), "noise is 0.0"),
        (lambda: bandits.exp3(0.0), r"mixing is 0.0; it must be in \(0, 1\]"),
        (lambda: bandits.linucb(penalty=0.0), "penalty is 0.0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
