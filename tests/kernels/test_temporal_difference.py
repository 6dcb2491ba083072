"""Targets and traces against hand-worked numbers, forward views and naive NumPy algorithms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import returns
from jaxrl_llm.kernels import temporal_difference as td
from tests import oracles

GAMMA, LAMBDA, ALPHA = 0.9, 0.8, 0.3
TRACES = {"accumulating": td.accumulating_trace, "replacing": td.replacing_trace}


def stream(seed=0, length=40, num_states=4):
    """States, next states, rewards, discounts, resets of episodes that end in both ways."""
    random = np.random.default_rng(seed)
    state = random.integers(num_states, size=length)
    terminated = random.random(length) < 0.1
    truncated = ~terminated & (random.random(length) < 0.1)
    reset = terminated | truncated
    following = np.where(reset, random.integers(num_states, size=length), np.roll(state, -1))
    discount = GAMMA * (1 - terminated)
    return state, following, random.normal(size=length), discount, reset


def test_targets_are_worked_by_hand():
    q, mask = jnp.array([1.0, 4.0, 2.0]), jnp.array([True, False, True])
    reward, discount = jnp.float32(1), jnp.float32(0.5)
    assert td.sarsa_target(reward, discount, q, jnp.int32(2)) == 2
    assert td.expected_sarsa_target(reward, discount, q, jnp.array([0.5, 0, 0.5])) == 1.75
    assert td.q_learning_target(reward, discount, q) == 3
    assert td.q_learning_target(reward, discount, q, mask) == 2
    other = jnp.array([5.0, 6.0, 7.0])
    assert td.double_q_learning_target(reward, discount, q, other) == 4
    assert td.double_q_learning_target(reward, discount, q, other, mask) == 4.5
    assert td.td_error(reward, discount, jnp.float32(3), jnp.float32(8)) == 2


@pytest.mark.parametrize("target", [td.q_learning_target, td.expected_sarsa_target])
def test_target_of_a_death_is_the_reward(target):
    """Even where the next state has no allowed action at all but one."""
    q, law = jnp.array([-jnp.inf, 1e9]), jnp.array([0.0, 1.0])
    extra = (law,) if target is td.expected_sarsa_target else ()
    assert target(jnp.float32(2), jnp.float32(0), q, *extra) == 2


def test_expected_target_ignores_what_has_no_probability():
    target = td.expected_sarsa_target(
        jnp.float32(0), jnp.float32(1), jnp.array([-jnp.inf, 3.0]), jnp.array([0.0, 1.0])
    )
    assert target == 3


def test_double_q_learning_is_unbiased_where_q_learning_is_not(x64):
    """Ten actions worth 0, each estimated from noise: E[max] is 1.5388 sd, E[double] is 0."""
    random = np.random.default_rng(0)
    first, second = jnp.array(random.normal(size=(2, 20_000, 10)))
    zero, one = jnp.zeros(len(first)), jnp.ones(len(first))
    single = jax.vmap(td.q_learning_target)(zero, one, first)
    double = jax.vmap(td.double_q_learning_target)(zero, one, first, second)
    np.testing.assert_allclose(single.mean(), 1.5388, atol=0.02)
    np.testing.assert_allclose(double.mean(), 0, atol=4 / np.sqrt(len(first)))


def test_tree_backup_returns_are_the_naive_recursion(x64):
    random = np.random.default_rng(1)
    _, _, reward, discount, reset = stream(1, length=12)
    expected, probability, next_q = random.random((3, 12))
    got = td.tree_backup_returns(
        *map(jnp.array, (reward, discount, expected, probability, next_q, reset))
    )
    following = 0.0
    for t in reversed(range(12)):
        whole = t == 11 or reset[t]
        rest = expected[t] + (0 if whole else probability[t] * (following - next_q[t]))
        following = reward[t] + discount[t] * rest
        np.testing.assert_allclose(got[t], following, atol=1e-12)


@pytest.mark.slow
def test_window_of_certain_actions_gives_n_step_returns(x64):
    state, _, reward, discount, reset = stream(2, length=20)
    value = np.random.default_rng(3).normal(size=20)
    n = 3
    expected = returns.n_step_returns(*map(jnp.array, (reward, discount, value, reset)), n=n)
    window = td.Window.empty(n)
    for t in range(20):
        row = (state[t], reward[t], discount[t], value[t], 1.0, value[t], reset[t], 1.0)
        window = window.push(td.Window(*map(jnp.asarray, row)))
        if t >= n - 1:
            assert window.pair[0] == state[t - n + 1]
            np.testing.assert_allclose(window.target(), expected[t - n + 1], atol=1e-12)
        assert float(window.known[0]) == (t >= n - 1)


def test_shared_step_size_is_the_mean_over_orders(x64):
    """c updates in a row, averaged over every order, move as far as c shared ones at once."""
    alpha, q, targets = 0.4, 2.0, np.array([1.0, -3.0, 7.0])
    ends = []
    for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        moved = q
        for index in order:
            moved += alpha * (targets[index] - moved)
        ends.append(moved)
    shared = td.shared_step_size(jnp.array(alpha), jnp.array(3.0))
    np.testing.assert_allclose(q + shared * np.sum(targets - q), np.mean(ends), atol=1e-12)
    assert td.shared_step_size(jnp.array(1.0), jnp.array(4.0)) == 0.25
    np.testing.assert_allclose(td.shared_step_size(jnp.array(alpha), jnp.array(0.0)), alpha)


@pytest.mark.parametrize("kind", TRACES)
def test_offline_td_lambda_is_its_forward_view(kind, x64):
    """Summed over an episode, backward updates equal lambda-returns minus values.

    For every visit with accumulating traces; for replacing ones where no state is met twice within
    an episode, which is where the theorem holds for both.
    """
    state, following, reward, discount, reset = stream(4)
    num_states = 4
    if kind == "replacing":
        state = np.arange(len(state))
        following = np.where(reset, following, np.roll(state, -1))
        num_states = len(state)
    value = np.random.default_rng(5).normal(size=num_states)
    target = returns.lambda_returns(
        *map(jnp.array, (reward, discount, value[following], reset)), lambda_=LAMBDA
    )
    forward = np.zeros(num_states)
    np.add.at(forward, state, ALPHA * (np.asarray(target) - value[state]))

    def body(carry, step):
        trace, decay, total = carry
        at, error, following_decay = step
        trace = TRACES[kind](trace, at, decay)
        return (trace, following_decay, total + ALPHA * error * trace), None

    error = reward + discount * value[following] - value[state]
    decay = np.where(reset, 0, discount * LAMBDA)
    zeros = jnp.zeros(num_states)
    steps = tuple(map(jnp.array, (state, error, decay)))
    (_, _, backward), _ = jax.lax.scan(body, (zeros, jnp.array(0.0), zeros), steps)
    np.testing.assert_allclose(backward, forward, atol=1e-10)


def test_traces_of_a_revisited_state_differ_as_defined(x64):
    trace, index, decay = jnp.array([2.0, 1.0]), jnp.int32(0), jnp.array(0.5)
    np.testing.assert_allclose(td.accumulating_trace(trace, index, decay), [2, 0.5])
    np.testing.assert_allclose(td.replacing_trace(trace, index, decay), [1, 0.5])
    np.testing.assert_allclose(td.dutch_trace(trace, index, decay, jnp.array(0.25)), [1.75, 0.5])
    for step_size, kind in ((0.0, "accumulating"), (1.0, "replacing")):
        dutch = td.dutch_trace(trace, index, decay, jnp.array(step_size))
        np.testing.assert_allclose(dutch, TRACES[kind](trace, index, decay))


def online_lambda_return(state, following, reward, discount, start):
    """S&B section 12.4, naively: after each step, redo the episode with its interim targets."""
    value = start.copy()
    for horizon in range(1, len(state) + 1):
        value = start.copy()
        for t in range(horizon):
            target, weight, total, product = 0.0, 1.0, 0.0, 1.0
            for k in range(t, horizon):
                total += product * reward[k]
                product *= discount[k]
                # The table that was current when the k-th next state was reached.
                n_step = total + product * history[k][following[k]]
                share = weight if k == horizon - 1 else weight * (1 - LAMBDA)
                target += share * n_step
                weight *= LAMBDA
            value[state[t]] += ALPHA * (target - value[state[t]])
        history.append(value.copy())
    return value


history: list = []


def test_true_online_is_the_online_lambda_return_algorithm(x64):
    random = np.random.default_rng(6)
    state = random.integers(3, size=15)
    following = np.append(state[1:], 1)
    reward, discount = random.normal(size=15), np.full(15, GAMMA)
    discount[-1] = 0
    start = random.normal(size=3)
    history[:] = [start.copy()]
    expected = online_lambda_return(state, following, reward, discount, start)

    def body(carry, step):
        learner, decay = carry
        at, to, reward, discount = step
        learner = td.true_online_step(learner, at, to, reward, discount, decay, jnp.array(ALPHA))
        return (learner, discount * LAMBDA), None

    zero = jnp.array(0.0)
    first = td.TrueOnline(jnp.array(start), jnp.zeros(3), zero)
    steps = tuple(map(jnp.array, (state, following, reward, discount)))
    (learner, _), _ = jax.lax.scan(body, (first, zero), steps)
    np.testing.assert_allclose(learner.value, expected, atol=1e-10)


def test_watkins_decay_is_cut_by_an_exploring_action():
    q, decay = jnp.array([1.0, 3.0, 3.0]), jnp.float32(0.7)
    cut = [float(td.watkins_decay(decay, q, jnp.int32(action))) for action in range(3)]
    np.testing.assert_allclose(cut, [0, 0.7, 0.7], rtol=1e-6)


def test_expected_updates_vanish_at_the_oracles(x64):
    """E[target] = Q at the fixed point: Q* of two states for Q-learning, .1 for expected SARSA."""
    mdp = oracles.two_state_mdp()
    fixed = {
        "q_learning": oracles.M2_Q,
        "expected_sarsa": np.array([[12.8488, 14.2797], [14.9719, 13.3720]]),
    }
    for name, table in fixed.items():
        q = jnp.array(table)
        law = 0.05 + 0.9 * jax.nn.one_hot(jnp.argmax(q, -1), 2)
        for (state, action), expected in np.ndenumerate(table):
            reward = jnp.asarray(oracles.M2_REWARD[state, action])
            targets = [
                td.q_learning_target(reward, mdp.discount, q[to])
                if name == "q_learning"
                else td.expected_sarsa_target(reward, mdp.discount, q[to], law[to])
                for to in range(2)
            ]
            mean = oracles.M2_TRANSITION[state, action] @ np.array(targets)
            np.testing.assert_allclose(mean, expected, atol=2e-4)


def test_kernels_are_the_same_jitted_and_batched(x64):
    random = np.random.default_rng(7)
    q, law = jnp.array(random.random((2, 5, 3)))
    reward, discount = jnp.array(random.random((2, 5)))
    batched = jax.jit(jax.vmap(td.expected_sarsa_target))(reward, discount, q, law)
    alone = [td.expected_sarsa_target(*row) for row in zip(reward, discount, q, law, strict=True)]
    np.testing.assert_allclose(batched, alone, rtol=1e-12)
    gradient = jax.grad(lambda q: td.expected_sarsa_target(reward[0], discount[0], q, law[0]))
    np.testing.assert_allclose(gradient(q[0]), discount[0] * law[0], rtol=1e-12)
