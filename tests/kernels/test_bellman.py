"""Bellman solvers against exact answers, NumPy policy iteration and every policy there is."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import make_mdp
from jaxrl_llm.kernels import bellman, fixed_point
from tests import oracles


def jitted(name):
    """A solver that compiles once a shape, whatever its limits."""
    solve = jax.jit(getattr(bellman, name))

    def control(mdp, *, tolerance=1e-6, max_iterations=100_000):
        return solve(mdp, tolerance=tolerance, max_iterations=max_iterations)

    return control


CONTROL = {
    name: jitted(name)
    for name in (
        "value_iteration",
        "policy_iteration",
        "modified_policy_iteration",
        "inexact_policy_iteration",
    )
}
BATCHED = {name: jax.jit(jax.vmap(solver)) for name, solver in CONTROL.items()}
EVALUATION = {
    name: jax.jit(getattr(bellman, name))
    for name in ("policy_evaluation", "iterative_policy_evaluation")
}
FORMS = {"dense": lambda mdp: mdp, "successors": bellman.successor_form}

every_control = pytest.mark.parametrize("name", CONTROL)
every_evaluation = pytest.mark.parametrize("name", EVALUATION)
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def stack(problems):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)


def arrays(mdp):
    """Transition, expected reward and discount in NumPy, with the rows of terminal states 0."""
    alive = ~np.asarray(mdp.terminal)[:, None]
    transition = np.asarray(mdp.transition, np.float64) * alive[..., None]
    reward = np.asarray(mdp.reward, np.float64)
    return transition, np.sum(transition * reward, axis=-1), float(mdp.discount)


def evaluate(mdp, policy):
    """V of action probabilities `[..., S, A]`, exactly."""
    transition, reward, discount = arrays(mdp)
    chain = np.einsum("...sa,sat->...st", policy, transition)
    matrix = np.eye(mdp.num_states) - discount * chain
    return np.linalg.solve(matrix, np.sum(policy * reward, axis=-1)[..., None])[..., 0]


def numpy_policy_iteration(mdp, policy):
    """V* from a policy that ends."""
    transition, reward, discount = arrays(mdp)
    value = evaluate(mdp, policy)
    for _ in range(100):
        q = np.where(mdp.action_mask, reward + discount * transition @ value, -np.inf)
        gain = q.max(-1) - value
        greedy = np.eye(mdp.num_actions)[q.argmax(-1)]
        policy = np.where(gain[:, None] > 1e-10, greedy, policy)
        value, last = evaluate(mdp, policy), value
        if np.abs(value - last).max() < 1e-12:
            return value
    raise AssertionError("the reference did not converge")


def best_of_every_policy(mdp):
    """The largest value of each state over all deterministic policies of allowed actions."""
    allowed = [np.flatnonzero(row) for row in np.asarray(mdp.action_mask)]
    policies = np.array(list(itertools.product(*allowed)))
    return evaluate(mdp, np.eye(mdp.num_actions)[policies]).max(0)


def assert_solved(solution, value, **tolerance):
    assert solution.converged.all()
    np.testing.assert_allclose(solution.value, value, **tolerance)


# Known answers


@every_control
@every_form
@every_dtype
def test_control_gives_the_oracle(name, form, dtype):
    with jax.enable_x64(dtype == np.float64):
        solution = CONTROL[name](form(oracles.treatment_mdp()))
        floats = {solution.value.dtype, solution.q.dtype, solution.residual.dtype}
        tolerance = {"atol": 1e-4} if dtype == np.float64 else {"rtol": 5e-4}
        assert_solved(solution, oracles.TREATMENT_VALUE, **tolerance)
        np.testing.assert_array_equal(solution.policy, oracles.TREATMENT_POLICY)
        assert floats == {np.dtype(dtype)}
        assert solution.policy.dtype == solution.iterations.dtype == jnp.int32


@every_evaluation
@every_form
@every_dtype
def test_evaluation_gives_the_oracle(name, form, dtype):
    with jax.enable_x64(dtype == np.float64):
        mdp = form(oracles.treatment_mdp())
        solution = EVALUATION[name](mdp, bellman.uniform_policy(mdp))
        tolerance = {"atol": 1e-4} if dtype == np.float64 else {"rtol": 5e-4}
        assert_solved(solution, oracles.TREATMENT_UNIFORM_VALUE, **tolerance)
        assert solution.value.dtype == dtype


@every_evaluation
def test_evaluation_of_chains_gives_the_oracle(name, x64):
    for mdp, value in (
        (oracles.patient_chain(), oracles.PATIENT_CHAIN_VALUE),
        (oracles.illness_chain(), oracles.ILLNESS_VALUE),
    ):
        solution = EVALUATION[name](mdp, jnp.zeros(mdp.num_states, int))
        assert_solved(solution, value, atol=1e-4)


def test_policy_iteration_of_two_states_gives_the_oracle(x64):
    solution = CONTROL["policy_iteration"](oracles.two_state_mdp())
    assert_solved(solution, oracles.M2_Q.max(-1), atol=1e-4)
    np.testing.assert_allclose(solution.q, oracles.M2_Q, atol=1e-4)


@every_evaluation
def test_evaluation_of_stochastic_policies_gives_the_oracle(name, x64):
    for policy, value in (
        (oracles.M2_BEHAVIOUR, oracles.M2_BEHAVIOUR_VALUE),
        (oracles.M2_EVALUATED, oracles.M2_EVALUATED_VALUE),
    ):
        solution = EVALUATION[name](oracles.two_state_mdp(), jnp.array(policy))
        assert_solved(solution, value, atol=1e-4)


def test_q_values_give_the_oracle_of_one_look_ahead(x64):
    q = bellman.q_values(oracles.illness_treatment_mdp(), jnp.array(oracles.ILLNESS_VALUE))
    np.testing.assert_allclose(q, oracles.ILLNESS_TREATMENT_Q, atol=1e-5)


def test_q_values_read_the_value_of_terminal_states_as_zero():
    mdp = oracles.corridor(3, step=-1.0, arrival=4.0)
    q = bellman.q_values(mdp, jnp.array([2.0, 3, 1000]))
    np.testing.assert_array_equal(q, [[1.0, 2, 1], [1, 3, 2], [0, 0, 0]])


# Random problems


@every_control
def test_control_finds_the_best_of_every_allowed_policy(name, x64):
    problems = [oracles.random_mdp(seed, 6, 3, 0.9, masked=True) for seed in range(10)]
    problems += [oracles.garnet_mdp(seed, 6, 3, 0.99) for seed in range(9)]
    problems += [oracles.random_mdp(9, 6, 3, 0.0, masked=True)]
    solution = BATCHED[name](stack(problems))
    assert_solved(solution, [best_of_every_policy(mdp) for mdp in problems], atol=1e-3)
    for mdp, policy in zip(problems, solution.policy, strict=True):
        assert np.asarray(mdp.action_mask)[np.arange(6), policy].all()


@pytest.mark.slow
@every_control
@every_dtype
def test_control_without_discount_matches_numpy(name, dtype):
    """Greedy policies that never end lie on the way of every solver here, but not of NumPy's."""
    with jax.enable_x64(dtype == np.float64):
        problems = [oracles.terminal_mdp(seed, 6, 3) for seed in range(18)]
        problems += [oracles.corridor(6, step=step, arrival=1.0) for step in (-0.1, 0.0)]
        solution = BATCHED[name](stack(problems))
        leave = np.eye(3)[[0] * 6]
        values = [numpy_policy_iteration(mdp, leave) for mdp in problems[:18]]
        values += [[0.5, 0.6, 0.7, 0.8, 0.9, 0], [1, 1, 1, 1, 1, 0]]
        assert_solved(solution, values, rtol=1e-3, atol=1e-4)


@every_control
def test_control_reports_the_residual_of_its_value(name, x64):
    mdp = oracles.random_mdp(0, 6, 3, 0.9, masked=True)
    transition, reward, discount = arrays(mdp)
    for iterations in (1, 3, 1000):
        solution = CONTROL[name](mdp, max_iterations=iterations, tolerance=1e-9)
        q = reward + discount * transition @ np.asarray(solution.value)
        np.testing.assert_allclose(solution.q, q, atol=1e-12)
        residual = np.abs(np.where(mdp.action_mask, q, -np.inf).max(-1) - solution.value).max()
        np.testing.assert_allclose(solution.residual, residual, atol=1e-12)
        assert bool(solution.converged) is bool(residual <= 1e-9)
        assert solution.iterations <= iterations


@every_control
def test_control_stopped_early_says_so(name, x64):
    mdp = oracles.garnet_mdp(0, 6, 3, 0.99)
    # Policy iteration evaluates its first policy before it counts.
    limit = 0 if name == "policy_iteration" else 1
    solution = CONTROL[name](mdp, max_iterations=limit)
    assert not solution.converged
    assert solution.iterations == limit


@every_control
def test_control_without_a_future_takes_the_best_reward(name, x64):
    mdp = oracles.random_mdp(0, 6, 3, 0.0, masked=True)
    _, reward, _ = arrays(mdp)
    expected = np.where(mdp.action_mask, reward, -np.inf)
    solution = CONTROL[name](mdp)
    assert_solved(solution, expected.max(-1), rtol=1e-5)
    np.testing.assert_array_equal(solution.policy, expected.argmax(-1))


@every_control
def test_control_of_a_single_state(name):
    assert_solved(CONTROL[name](make_mdp(np.ones((1, 1, 1)), 2.0, 0.5)), [4.0], rtol=1e-6)
    ended = make_mdp(np.ones((1, 1, 1)), 2.0, 1.0, terminal=[True], initial=[1.0])
    assert_solved(CONTROL[name](ended), [0.0])


# Policies


def test_uniform_policy_shares_among_allowed_actions():
    mdp = oracles.random_mdp(1, 6, 3, 0.9, masked=True)
    mask = np.asarray(mdp.action_mask)
    np.testing.assert_allclose(bellman.uniform_policy(mdp), mask / mask.sum(1, keepdims=True))


@pytest.mark.slow
@every_evaluation
def test_evaluation_of_integers_equals_one_hot(name, x64):
    mdp = oracles.garnet_mdp(0, 6, 3, 0.9)
    policy = jnp.array([0, 2, 1, 1, 0, 2])
    integers, one_hot = EVALUATION[name](mdp, policy), EVALUATION[name](mdp, jnp.eye(3)[policy])
    np.testing.assert_allclose(integers.value, one_hot.value, atol=1e-12)
    np.testing.assert_array_equal(integers.policy, one_hot.policy)


@every_dtype
def test_policy_evaluation_of_a_policy_that_never_ends_is_finite_and_not_converged(dtype):
    """In float32 most of these systems are regular by rounding, with values of 1e7 to 1e9."""
    with jax.enable_x64(dtype == np.float64):
        for seed in range(6):
            transition = np.zeros((6, 2, 6))
            transition[:, 0, :5] = np.random.default_rng(seed).dirichlet(np.ones(5), size=6)
            transition[:, 1, 5] = 1
            mdp = make_mdp(transition, -1.0, 1.0, terminal=np.arange(6) == 5)
            solution = EVALUATION["policy_evaluation"](mdp, jnp.zeros(6, int))
            np.testing.assert_array_equal(solution.value, np.zeros(6))
            assert not solution.converged


@pytest.mark.slow
@every_dtype
def test_policy_iteration_without_discount_ends_although_all_states_tie(dtype):
    with jax.enable_x64(dtype == np.float64):
        mdp = oracles.corridor(30, step=0.0, arrival=1.0)
        solution = CONTROL["policy_iteration"](mdp)
        assert_solved(solution, 1.0 - np.asarray(mdp.terminal), rtol=1e-4)
        np.testing.assert_array_equal(solution.policy[:-1], np.ones(29))


@pytest.mark.slow
@every_dtype
def test_policy_iteration_ends_where_rounding_flips_ties(dtype):
    """Three copies of each action, alike but for the last digits."""
    with jax.enable_x64(dtype == np.float64):
        random, mdp = np.random.default_rng(0), oracles.random_mdp(3, 30, 3, 0.999)
        copies = np.tile(np.asarray(mdp.transition, dtype), (1, 3, 1))
        noise = 1 + 4 * np.finfo(dtype).eps * random.uniform(-1, 1, copies.shape)
        reward = np.tile(np.asarray(mdp.reward, dtype), (1, 3, 1))
        noisy = make_mdp((copies * noise).astype(dtype), reward, dtype(0.999))
        solution = CONTROL["policy_iteration"](noisy)
        assert solution.iterations <= 6
        assert_solved(solution, numpy_policy_iteration(mdp, np.full((30, 3), 1 / 3)), rtol=1e-3)


@pytest.mark.parametrize("discount", [0.9, 0.999])
def test_modified_policy_iteration_needs_few_sweeps_whatever_the_discount(discount):
    mdp = oracles.random_mdp(0, 100, 4, discount)
    solution = CONTROL["modified_policy_iteration"](mdp)
    assert solution.converged
    assert solution.iterations < 15


# Transformations


@pytest.mark.slow
@pytest.mark.parametrize("name", ["value_iteration", "policy_iteration"])
def test_control_jit_equals_eager(name):
    mdp = oracles.treatment_mdp()
    eager, jitted = getattr(bellman, name)(mdp), CONTROL[name](mdp)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), eager, jitted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["policy_iteration", "modified_policy_iteration"])
@pytest.mark.parametrize(("size", "number"), [(6, 20), (48, 3)], ids=["lockstep", "in turn"])
def test_control_vmap_equals_a_loop(name, size, number, x64):
    problems = [oracles.random_mdp(seed, size, 3, 0.9, masked=True) for seed in range(number)]
    assert (problems[0].transition.size < fixed_point._SEQUENTIAL_SIZE) is (size == 6)
    batched = BATCHED[name](stack(problems))
    loop = stack([CONTROL[name](mdp) for mdp in problems])
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), batched, loop)


@pytest.mark.slow
@pytest.mark.parametrize("size", [6, 48], ids=["lockstep", "in turn"])
def test_control_vmap_shares_what_is_not_batched(size, x64):
    """One law for several rewards and several discounts, one nested in the other."""
    mdp = oracles.random_mdp(0, size, 2, 0.9)
    rewards = jnp.stack([mdp.reward, 2 * mdp.reward, -mdp.reward])
    discounts = jnp.array([0.0, 0.5, 0.9])
    assert (mdp.reward.size < fixed_point._SEQUENTIAL_SIZE) is (size == 6)

    def value(reward, discount):
        problem = replace(mdp, reward=reward, discount=discount)
        return bellman.modified_policy_iteration(problem).value

    over_rewards = jax.vmap(value, in_axes=(0, None))
    table = jax.jit(jax.vmap(over_rewards, in_axes=(None, 0)))(rewards, discounts)
    solve = CONTROL["modified_policy_iteration"]
    loop = [
        [solve(replace(mdp, reward=reward, discount=discount)).value for reward in rewards]
        for discount in discounts
    ]
    np.testing.assert_allclose(table, loop, atol=1e-5)


# Successor lists


def test_successor_form_stores_each_distinct_row_once():
    transition = np.zeros((4, 3, 4))
    transition[:, :2, 1:3] = [0.25, 0.75]  # one law for eight pairs
    transition[:, 2] = np.eye(4)  # staying
    transition[3] = 0  # terminal
    terminal = np.array([False, False, False, True])
    form = bellman.successor_form(make_mdp(transition, -1.0, 0.9, terminal=terminal))
    assert form.successor.shape == form.probability.shape == form.reward.shape == (5, 2)
    assert len(np.unique(form.row[:3, :2])) == len(np.unique(form.row[3])) == 1
    assert form.successor.dtype == form.row.dtype == jnp.int32


def test_successor_form_tells_rewards_apart():
    mdp = make_mdp(np.ones((1, 3, 1)), np.array([[1.0, 2.0, 1.0]]), 0.9)
    form = bellman.successor_form(mdp)
    assert len(form.probability) == 2
    np.testing.assert_array_equal(form.expected_reward(), [[1.0, 2.0, 1.0]])


@pytest.mark.slow
@pytest.mark.parametrize("mdp", ["garnet", "terminal", "reward of the action"])
def test_successor_form_keeps_the_problem(mdp, x64):
    dense = oracles.garnet_mdp(0, 6, 3, 0.9)
    if mdp == "terminal":
        dense = oracles.terminal_mdp(0, 6, 3)
    elif mdp == "reward of the action":
        dense = replace(dense, reward=dense.reward[..., :1])
    form = bellman.successor_form(dense)
    value = jnp.arange(6.0)
    np.testing.assert_allclose(form.expect(value), dense.expect(value), atol=1e-12)
    np.testing.assert_allclose(form.expected_reward(), dense.expected_reward(), atol=1e-12)
    expected = CONTROL["modified_policy_iteration"](dense)
    solution = CONTROL["modified_policy_iteration"](form)
    assert_solved(solution, expected.value, atol=1e-4)
    np.testing.assert_array_equal(solution.policy, expected.policy)


@pytest.mark.slow
def test_control_of_successor_lists_vmap_over_discounts_equals_a_loop(x64):
    solve = CONTROL["inexact_policy_iteration"]
    form = bellman.successor_form(oracles.terminal_mdp(1, 6, 3))
    axes = replace(jax.tree.map(lambda _: None, form), discount=0)
    discounts = jnp.array([0.5, 0.9, 1.0])
    batched = jax.jit(jax.vmap(solve, in_axes=(axes,)))(replace(form, discount=discounts))
    loop = stack([solve(replace(form, discount=discount)) for discount in discounts])
    assert batched.converged.all()
    np.testing.assert_allclose(batched.value, loop.value, atol=1e-6)
