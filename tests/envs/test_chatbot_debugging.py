"""The chatbot example: every policy of it, and the returns of its conversations."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import chatbot_debugging
from jaxrl_llm.kernels import bellman, returns

solve = jax.jit(bellman.policy_iteration)


def best_of_every_policy(mdp):
    """V* over all deterministic policies of allowed actions, by solving each one's system."""
    transition, reward = np.asarray(mdp.transition), np.asarray(mdp.expected_reward())
    alive = ~np.asarray(mdp.terminal)
    choices = [
        np.flatnonzero(mask) if state else np.array([0])
        for state, mask in zip(alive, np.asarray(mdp.action_mask), strict=True)
    ]
    states, values = np.arange(mdp.num_states), []
    for policy in itertools.product(*choices):
        chain = transition[states, policy] * alive[:, None]
        system = np.eye(mdp.num_states) - float(mdp.discount) * chain
        values.append(np.linalg.solve(system, reward[states, policy] * alive))
    return np.max(values, axis=0)


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.9, 1.0])
def test_mdp_has_the_value_of_the_best_of_every_policy(discount, x64):
    mdp = chatbot_debugging.mdp(discount=discount)
    solution = solve(mdp, tolerance=1e-10)
    assert solution.converged
    np.testing.assert_allclose(solution.value, best_of_every_policy(mdp), atol=1e-9)


def test_mdp_has_the_value_that_arithmetic_gives(x64):
    value = solve(chatbot_debugging.mdp(discount=0.9), tolerance=1e-10).value
    tested = 0.98 * 20 - 0.02 * 20
    assert float(value[5]) == pytest.approx(tested)
    # Fix proposed and cause known lead to each other: two equations with two unknowns.
    guess = float(value[3])
    system = np.array([[1, -0.9 * 0.15], [-0.9 * 0.9, 1]])
    fixed, known = np.linalg.solve(system, [-1 + 0.9 * 0.85 * tested, -2 + 0.9 * 0.1 * guess])
    np.testing.assert_allclose(value[jnp.array([4, 2])], [fixed, known], atol=1e-9)


@pytest.mark.parametrize(
    ("discount", "actions"),
    [
        (0.9, ["Ask the user", "Read the logs", "Change the prompt", "Test", "Test", "Ship"]),
        (0.5, ["Change the prompt", *["Change the prompt"] * 2, "Test", "Ship", "Ship"]),
    ],
)
def test_mdp_takes_shortcuts_only_if_impatient(discount, actions, x64):
    policy = solve(chatbot_debugging.mdp(discount=discount)).policy[:6]
    assert [chatbot_debugging.action_names[action] for action in policy] == actions


def test_mdp_allows_what_makes_sense():
    mdp = chatbot_debugging.mdp()
    allowed = dict(zip(chatbot_debugging.state_names, np.asarray(mdp.action_mask), strict=True))
    ship, test = (chatbot_debugging.action_names.index(name) for name in ("Ship", "Test"))
    assert not allowed["Wrong answer reported"][[ship, test]].any()
    assert allowed["Fix proposed"][[ship, test]].all()
    assert np.flatnonzero(mdp.terminal).tolist() == [6, 7]
    np.testing.assert_array_equal(mdp.initial, np.eye(8)[0])
    assert mdp.action_mask.shape == (
        len(chatbot_debugging.state_names),
        len(chatbot_debugging.action_names),
    )


def test_mdp_refuses_a_discount_outside_its_range():
    with pytest.raises(ValueError, match=r"discount is 1.1; it must be in \[0, 1\]"):
        chatbot_debugging.mdp(discount=1.1)


def test_make_resolves_or_gives_up():
    environment = chatbot_debugging.make()
    params = environment.default_params
    keys = jax.random.split(jax.random.key(0), 500)
    start = environment.reset(jax.random.key(1), params)[0].replace(state=jnp.int32(5))
    step = jax.jit(jax.vmap(environment.step, in_axes=(0, None, None, None)))
    _, time_step = step(keys, start, jnp.int32(4), params)
    assert time_step.terminated.all()
    resolved = np.asarray(time_step.observation) == 6
    np.testing.assert_array_equal(time_step.reward, np.where(resolved, 20, -20))
    assert 0.94 < resolved.mean() < 1


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([1.3, 1.2, 1.7, 1.5, 1.8], 6.03148), ([1.7, 1.5, 1.8, 1.7, 1.6], 6.79706)],
)
def test_discounted_returns_of_two_conversations_are_the_published_ones(rewards, expected, x64):
    ended = jnp.arange(5) == 4
    discount = jnp.where(ended, 0.0, 0.9)
    value = returns.discounted_returns(jnp.array(rewards), discount, jnp.zeros(5), ended)
    assert float(value[0]) == pytest.approx(expected, abs=1e-8)
    assert float(value[0]) == pytest.approx(np.polyval(rewards[::-1], 0.9), abs=1e-12)
