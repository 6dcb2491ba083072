"""Exact returns against oracles, and sampled ones against exact returns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import make_mdp
from jaxrl_llm.envs import core, tabular, treatment
from jaxrl_llm.kernels import bellman
from jaxrl_llm.training import evaluate
from tests import oracles


def act(policy):
    """A batch policy of one action a state."""
    actions = jnp.asarray(policy)
    return lambda key, observation, mask: (actions[observation], {})


def act_randomly(num_actions):
    def policy(key, observation, mask):
        return jax.random.randint(key, observation.shape, 0, num_actions), {}

    return policy


def leaving(probability: float, reward: float):
    """One state, left with `probability` at each step; each step is worth `reward`."""
    law = [[[1 - probability, probability]], [[0.0, 1.0]]]
    return make_mdp(np.array(law), reward, 1.0, terminal=np.array([False, True]))


def quick_or_long():
    """Half the patients leave at once with nothing, the others stay long and gain at each step."""
    law = np.zeros((3, 1, 3))
    law[0, 0] = [0.0, 0.5, 0.5]
    law[1, 0] = [0.0, 0.95, 0.05]
    return make_mdp(
        law,
        np.array([0.0, 1.0, 0.0]),
        1.0,
        initial=np.array([1.0, 0.0, 0.0]),
        terminal=np.array([False, False, True]),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "value"),
    [
        (oracles.TREATMENT_POLICY, oracles.TREATMENT_VALUE),
        (np.full((5, 3), 1 / 3), oracles.TREATMENT_UNIFORM_VALUE),
    ],
)
def test_exact_return_is_the_mean_value_of_the_first_state(x64, policy, value):
    mdp, policy = oracles.treatment_mdp(), jnp.asarray(policy)
    expected = value.mean()  # the first state is uniform
    np.testing.assert_allclose(evaluate.exact_return(mdp, policy), expected, atol=1e-6)
    sparse = bellman.successor_form(mdp)
    np.testing.assert_allclose(evaluate.exact_return(sparse, policy), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("probability", "reward", "expected"), [(0.2, -1.0, -5.0), (1.0, 3.0, 3.0)]
)
def test_exact_return_without_discount_counts_until_the_end(probability, reward, expected):
    exact = evaluate.exact_return(leaving(probability, reward), jnp.array([0, 0]))
    np.testing.assert_allclose(exact, expected, rtol=1e-6)


@pytest.mark.slow
def test_exact_return_jit_equals_eager_and_vmap_equals_loop(x64):
    mdp = oracles.treatment_mdp()
    policies = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(3), size=(4, 5)))
    one_by_one = np.stack([evaluate.exact_return(mdp, policy) for policy in policies])
    batched = jax.vmap(lambda policy: evaluate.exact_return(mdp, policy))(policies)
    np.testing.assert_allclose(batched, one_by_one, rtol=1e-12)
    compiled = jax.jit(evaluate.exact_return)(mdp, policies[0])
    np.testing.assert_allclose(compiled, one_by_one[0], rtol=1e-12)


def test_exact_returns_are_those_of_each_policy(x64):
    policies = {"b": jnp.asarray(oracles.M2_BEHAVIOUR), "a": jnp.asarray(oracles.M2_EVALUATED)}
    returns = evaluate.exact_returns(oracles.two_state_mdp(), policies)
    assert list(returns) == ["b", "a"]  # the first state is state 0
    np.testing.assert_allclose(returns["b"], oracles.M2_BEHAVIOUR_VALUE[0], atol=1e-4)
    np.testing.assert_allclose(returns["a"], oracles.M2_EVALUATED_VALUE[0], atol=1e-4)


@pytest.mark.slow
def test_monte_carlo_return_covers_the_exact_value_of_treatment():
    # No patient ever leaves: what is cut off after 120 steps is at most 180 * 0.9^120 = 6e-4.
    estimate = evaluate.monte_carlo_return(
        treatment.make(max_steps=None),
        act(oracles.TREATMENT_POLICY),
        jax.random.key(0),
        num_episodes=4_000,
        max_steps=120,
        discount=oracles.TREATMENT_DISCOUNT,
    )
    exact = oracles.TREATMENT_VALUE.mean()
    assert estimate.low < exact < estimate.high
    assert 0 < estimate.standard_error < 1
    assert estimate.unfinished == 1


@pytest.mark.slow
def test_monte_carlo_return_stops_at_a_time_limit():
    # 10 decisions under the uniform policy, summed on the host.
    mdp = oracles.treatment_mdp()
    chain = np.asarray(mdp.transition).mean(axis=1)
    reward = np.asarray(mdp.expected_reward()).mean(axis=1)
    expected, law = 0.0, np.full(5, 0.2)
    for step in range(10):
        expected += 0.9**step * law @ reward
        law = law @ chain
    estimate = evaluate.monte_carlo_return(
        treatment.make(max_steps=10),
        act_randomly(3),
        jax.random.key(1),
        num_episodes=4_000,
        max_steps=30,
        discount=0.9,
    )
    assert estimate.low < expected < estimate.high
    assert estimate.unfinished == 0


@pytest.mark.slow
def test_monte_carlo_return_favours_neither_short_nor_long_episodes():
    mdp = quick_or_long()
    exact = float(evaluate.exact_return(mdp, jnp.zeros(3, jnp.int32)))
    np.testing.assert_allclose(exact, 10.0, rtol=1e-4)  # 0.5 of 20 steps
    environment, policy = tabular.make(mdp), act([0, 0, 0])
    estimate = evaluate.monte_carlo_return(
        environment, policy, jax.random.key(0), num_episodes=4_000, max_steps=400
    )
    assert estimate.low < exact < estimate.high
    assert estimate.unfinished == 0
    # Whatever ends within 40 steps is mostly short: the trap that one episode each avoids.
    start_key, rollout_key = jax.random.split(jax.random.key(1))
    running = core.start_batch(environment, start_key, 1_000)
    _, steps = core.rollout(environment, policy, rollout_key, running, num_steps=40)
    biased = np.asarray(steps.extras["episode_return"])[np.asarray(steps.terminated)].mean()
    assert biased < exact / 2


@pytest.mark.slow
@pytest.mark.parametrize("max_steps", [1, 3, 10])
def test_monte_carlo_return_tells_what_fraction_is_unfinished(max_steps):
    estimate = evaluate.monte_carlo_return(
        tabular.make(leaving(0.2, 1.0)),
        act([0, 0]),
        jax.random.key(max_steps),
        num_episodes=10_000,
        max_steps=max_steps,
    )
    expected = 0.8**max_steps
    deviation = np.sqrt(expected * (1 - expected) / 10_000)
    assert abs(estimate.unfinished - expected) < 4 * deviation
    # An unfinished episode counts with what it earned: the mean of min(length, max_steps).
    expected = (1 - 0.8**max_steps) / 0.2
    assert abs(estimate.mean - expected) <= 4 * estimate.standard_error + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("confidence", "z"), [(0.95, 1.959964), (0.5, 0.674490)])
def test_monte_carlo_return_interval_is_the_normal_one(confidence, z):
    # Returns are 1 or 3, so that their deviation follows from their mean.
    law = np.zeros((3, 1, 3))
    law[0, 0] = [0, 0.7, 0.3]
    reward = np.zeros((3, 1, 3))
    reward[0, 0] = [0, 1.0, 3.0]
    mdp = make_mdp(law, reward, 1.0, terminal=np.array([False, True, True]))
    estimate = evaluate.monte_carlo_return(
        tabular.make(mdp),
        act([0, 0, 0]),
        jax.random.key(0),
        num_episodes=500,
        max_steps=1,
        confidence=confidence,
    )
    fraction = (float(estimate.mean) - 1) / 2
    error = 2 * np.sqrt(fraction * (1 - fraction) / 499)
    np.testing.assert_allclose(estimate.standard_error, error, rtol=1e-4)
    np.testing.assert_allclose(estimate.high - estimate.mean, z * error, rtol=1e-4)
    np.testing.assert_allclose(estimate.mean - estimate.low, z * error, rtol=1e-4)
    assert abs(fraction - 0.3) < 0.1


@pytest.mark.slow
def test_monte_carlo_return_covers_as_often_as_it_says():
    environment = tabular.make(leaving(0.3, 1.0))

    def covers(key):
        estimate = evaluate.monte_carlo_return(
            environment, act([0, 0]), key, num_episodes=300, max_steps=60, confidence=0.8
        )
        return (estimate.low < 1 / 0.3) & (estimate.high > 1 / 0.3)

    covered = jax.lax.map(covers, jax.random.split(jax.random.key(0), 400))
    # 0.8 within four standard deviations of a mean of 400.
    assert abs(np.mean(covered) - 0.8) < 0.08


@pytest.mark.slow
def test_monte_carlo_return_hands_the_policy_mask_and_params():
    law = np.zeros((2, 3, 2))
    law[0, :, 1] = 1
    mask = np.array([[False, True, False], [True, True, True]])
    reward = np.array([[0.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
    mdp = make_mdp(law, reward, 1.0, terminal=np.array([False, True]), action_mask=mask)
    environment = tabular.make(mdp)

    def policy(key, observation, mask):
        return jnp.argmax(mask, axis=-1), {}

    arguments = {"num_episodes": 10, "max_steps": 2}
    estimate = evaluate.monte_carlo_return(environment, policy, jax.random.key(0), **arguments)
    assert (estimate.mean, estimate.standard_error) == (5, 0)
    params = environment.default_params
    doubled = params.replace(reward=2 * params.reward)
    estimate = evaluate.monte_carlo_return(
        environment, policy, jax.random.key(0), params=doubled, **arguments
    )
    assert estimate.mean == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_episodes": 1}, "num_episodes is 1; it must be at least 2"),
        ({"max_steps": 0}, "max_steps is 0; it must be at least 1"),
        ({"discount": 1.5}, r"discount is 1.5; it must be in \[0, 1\]"),
        ({"confidence": 1.0}, "confidence is 1.0; it must be between 0 and 1"),
        ({"confidence": 0.0}, "confidence is 0.0; it must be between 0 and 1"),
    ],
)
def test_monte_carlo_return_refuses(change, message):
    arguments = {"num_episodes": 10, "max_steps": 10, **change}
    with pytest.raises(ValueError, match=f"^{message}$"):
        evaluate.monte_carlo_return(treatment.make(), act([0] * 5), jax.random.key(0), **arguments)


@pytest.mark.parametrize("name", evaluate.SOLVERS)
def test_run_solver_finds_the_optimum_and_its_residuals(x64, name):
    mdp = oracles.treatment_mdp()
    found = evaluate.run_solver(evaluate.SOLVERS[name], mdp, 1e-9)
    solution = found.solution
    np.testing.assert_allclose(solution.value, oracles.TREATMENT_VALUE, atol=1e-6)
    np.testing.assert_array_equal(solution.policy, oracles.TREATMENT_POLICY)
    assert solution.converged
    np.testing.assert_allclose(found.start_value, solution.value.mean(), rtol=1e-12)
    history = found.history()
    assert history.size == np.clip(solution.iterations, 1, evaluate.NUM_RESIDUALS)
    if history.size == solution.iterations:
        np.testing.assert_array_equal(history[-1], solution.residual)
    assert 0 < found.milliseconds < 1e3 * found.compile_seconds
    assert all(isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves(found))


def test_run_solver_residuals_are_those_of_each_iteration(x64):
    mdp = oracles.treatment_mdp()
    found = evaluate.run_solver(bellman.value_iteration, mdp, 1e-9)
    transition, reward = np.asarray(mdp.transition), np.asarray(mdp.expected_reward())
    values = [np.zeros(5)]
    for _ in range(evaluate.NUM_RESIDUALS + 1):
        values.append((reward + 0.9 * transition @ values[-1]).max(axis=1))
    expected = np.abs(np.diff(values, axis=0)).max(axis=1)[1:]
    np.testing.assert_allclose(found.residuals, expected, rtol=1e-9)


@pytest.mark.slow
def test_solver_run_empty_has_the_layout_of_a_run(x64):
    mdp = bellman.successor_form(oracles.treatment_mdp())
    empty = evaluate.SolverRun.empty(mdp)
    for name, solver in evaluate.SOLVERS.items():
        found = evaluate.run_solver(solver, mdp, 1e-6)
        assert jax.tree.structure(found) == jax.tree.structure(empty), name
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(empty), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype), name


def test_solver_run_metrics_fit_in_a_line():
    found = evaluate.run_solver(bellman.value_iteration, leaving(0.2, -1.0), 1e-6)
    metrics = found.metrics()
    assert {name: np.shape(value) for name, value in metrics.items()} == dict.fromkeys(
        ("value", "iterations", "residual", "converged", "milliseconds", "compile_seconds"), ()
    )
    np.testing.assert_allclose(metrics["value"], -5, rtol=1e-5)
