"""The filter against Bayes' rule over whole histories; the bounds against each other and V*."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import make_mdp
from jaxrl_llm.envs import hidden, tiger
from jaxrl_llm.kernels import alpha_vectors, bellman
from jaxrl_llm.kernels import belief as kernel

update = jax.jit(kernel.belief_update)
filter_history = jax.jit(kernel.filter_history)
qmdp = jax.jit(kernel.qmdp)
informed = jax.jit(kernel.fast_informed_bound)
blind_policies = jax.jit(kernel.blind_policies)
every_history = jax.jit(jax.vmap(kernel.filter_history, in_axes=(None, None, 0, 0)))


def random_pomdp(seed=0, num_states=3, num_actions=2, num_observations=2, *, terminal=False):
    """Every law uniform on the simplex; the last state may be terminal, with rows of zeros."""
    random = np.random.default_rng(seed)
    transition = random.dirichlet(np.ones(num_states), (num_states, num_actions))
    observation = random.dirichlet(np.ones(num_observations), (num_actions, num_states))
    ends = terminal & (np.arange(num_states) == num_states - 1)
    transition[ends] = 0
    initial = random.dirichlet(np.ones(num_states)) * ~ends
    mdp = make_mdp(
        transition,
        random.normal(size=transition.shape),
        0.9,
        initial=initial / initial.sum(),
        terminal=ends,
    )
    return hidden.make_pomdp(mdp, observation)


def posterior(pomdp, actions, observations):
    """P(last state, observations | actions, not ended before), by the sum over all state paths."""
    mdp = jax.tree.map(np.asarray, pomdp.mdp)
    law = np.asarray(pomdp.observation)
    joint = np.zeros(mdp.num_states)
    for path in itertools.product(range(mdp.num_states), repeat=len(actions) + 1):
        weight = mdp.initial[path[0]]
        for (before, after), action, seen in zip(
            itertools.pairwise(path), actions, observations, strict=True
        ):
            alive = not mdp.terminal[before]
            weight *= alive * mdp.transition[before, action, after] * law[action, after, seen]
        joint[path[-1]] += weight
    return joint


@pytest.mark.parametrize("terminal", [False, True])
def test_filter_history_is_bayes_rule_over_all_histories(terminal, x64):
    pomdp = random_pomdp(terminal=terminal)
    choices = list(itertools.product(range(2), repeat=3))
    actions = np.repeat(choices, len(choices), axis=0)
    seen = np.tile(choices, (len(choices), 1))
    beliefs, probability = every_history(pomdp, pomdp.mdp.initial, actions, seen)
    joint = np.array([posterior(pomdp, *pair) for pair in zip(actions, seen, strict=True)])
    np.testing.assert_allclose(beliefs[:, -1], joint / joint.sum(axis=1, keepdims=True), atol=1e-13)
    likelihood = np.prod(probability, axis=1)
    # The likelihoods of all observations sum to 1 for each of the 8 sequences of actions.
    np.testing.assert_allclose(likelihood.sum(), 8, atol=1e-12)
    if not terminal:
        np.testing.assert_allclose(likelihood, joint.sum(axis=1), atol=1e-13)


def test_belief_update_of_two_growls_is_the_published_belief():
    pomdp = tiger.pomdp()
    growls = jnp.full(2, tiger.GROWL_LEFT)
    listening = jnp.full(2, tiger.LISTEN)
    beliefs, probability = filter_history(pomdp, pomdp.mdp.initial, listening, growls)
    expected = 0.85**2 / (0.85**2 + 0.15**2)
    assert round(expected, 4) == 0.9698
    np.testing.assert_allclose(beliefs[:, 0], [0.85, expected], rtol=1e-6)
    np.testing.assert_allclose(probability, [0.5, 0.85**2 + 0.15**2], rtol=1e-6)


def test_belief_update_of_the_impossible_is_the_belief_after_the_action_alone():
    mdp = make_mdp(np.array([[[0.3, 0.7]], [[0.0, 1.0]]]), 0.0, 0.9, initial=[1.0, 0.0])
    pomdp = hidden.make_pomdp(mdp, np.array([[1.0, 0.0], [1.0, 0.0]]))
    belief, probability = update(pomdp, mdp.initial, 0, 1)
    np.testing.assert_allclose(belief, [0.3, 0.7], rtol=1e-6)
    assert probability == 0
    gradient = jax.grad(lambda b: kernel.belief_update(pomdp, b, 0, 1)[0][0])(mdp.initial)
    assert np.isfinite(gradient).all()


def test_belief_update_from_a_terminal_state_stays():
    pomdp = random_pomdp(terminal=True)
    ended = jnp.array([0.0, 0.0, 1.0])
    belief, probability = update(pomdp, ended, 0, 1)
    np.testing.assert_array_equal(belief, ended)
    assert probability == 0


@pytest.mark.slow
def test_belief_update_is_the_same_eager_and_batched():
    pomdp = random_pomdp()
    beliefs = jnp.asarray(kernel.belief_grid(3, 4), jnp.float32)
    actions, seen = jnp.arange(15) % 2, jnp.arange(15) // 2 % 2
    batched, probability = jax.vmap(kernel.belief_update, (None, 0, 0, 0))(
        pomdp, beliefs, actions, seen
    )
    for index in range(0, 15, 5):
        for one in (update, kernel.belief_update):
            belief, likely = one(pomdp, beliefs[index], actions[index], seen[index])
            np.testing.assert_allclose(belief, batched[index], atol=1e-6)
            np.testing.assert_allclose(likely, probability[index], atol=1e-6)


def test_successors_are_all_updates_with_their_probabilities():
    pomdp = random_pomdp()
    joint = np.asarray(kernel.successors(pomdp, pomdp.mdp.initial))
    assert joint.shape == (2, 2, 3)
    for action, seen in itertools.product(range(2), range(2)):
        belief, probability = update(pomdp, pomdp.mdp.initial, action, seen)
        np.testing.assert_allclose(joint[action, seen], belief * probability, atol=1e-6)


def test_expected_reward_averages_over_live_states():
    pomdp = random_pomdp(terminal=True)
    reward = np.sum(np.asarray(pomdp.mdp.transition) * np.asarray(pomdp.mdp.reward), axis=-1)
    belief = jnp.array([0.2, 0.3, 0.5])
    found = kernel.expected_reward(pomdp, belief)
    np.testing.assert_allclose(found, np.array([0.2, 0.3]) @ reward[:2], atol=1e-6)


@pytest.mark.slow
def test_qmdp_bound_of_the_tiger_is_189(x64):
    """The next step reveals the tiger: listening, -1, and then 10 at every step: -1 + .95 · 200."""
    pomdp = tiger.pomdp()
    q = qmdp(pomdp).q
    np.testing.assert_allclose(kernel.q_bound(q, pomdp.mdp.initial), 189, atol=1e-9)
    assert kernel.q_action(q, pomdp.mdp.initial) == tiger.LISTEN
    # Opening at once is worth (10 - 100) / 2 + 190 = 145, and the MDP itself 10 / (1 - .95).
    np.testing.assert_allclose(pomdp.mdp.initial @ q, [189, 145, 145], atol=1e-9)
    np.testing.assert_allclose(q.max(axis=1), 200, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 3])
def test_bounds_are_ordered_at_every_belief(seed, x64):
    """QMDP >= FIB >= three exact backups of the blind policies >= the blind policies."""
    pomdp = random_pomdp(seed, terminal=bool(seed))
    beliefs = kernel.belief_grid(3, 6)
    seen = np.max(beliefs @ np.asarray(qmdp(pomdp, tolerance=1e-12).q), axis=1)
    found = informed(pomdp, tolerance=1e-12)
    assert found.converged
    fib = np.max(beliefs @ np.asarray(found.q), axis=1)
    blind_vectors = np.asarray(blind_policies(pomdp))
    blind = np.max(beliefs @ blind_vectors.T, axis=1)
    lower = blind_vectors
    for _ in range(3):
        lower = np.asarray(alpha_vectors.exact_backup(pomdp, lower).vectors)
    below = np.max(beliefs @ lower.T, axis=1)
    assert (seen >= fib - 1e-10).all()
    assert (fib >= below - 1e-10).all()
    assert (below >= blind - 1e-10).all()
    assert (seen - fib).max() > 1e-3
    assert (below - blind).max() > 1e-3


def test_fast_informed_bound_is_its_fixed_point(x64):
    pomdp = random_pomdp(3)
    q = np.asarray(informed(pomdp, tolerance=1e-12).q)
    transition, law = np.asarray(pomdp.mdp.transition), np.asarray(pomdp.observation)
    reward = np.sum(transition * np.asarray(pomdp.mdp.reward), axis=-1)
    for state, action in itertools.product(range(3), range(2)):
        following = sum(
            max(
                sum(transition[state, action, t] * law[action, t, o] * q[t, b] for t in range(3))
                for b in range(2)
            )
            for o in range(2)
        )
        expected = reward[state, action] + 0.9 * following
        np.testing.assert_allclose(q[state, action], expected, atol=1e-10)


@pytest.mark.slow
def test_fast_informed_bound_of_a_seen_state_is_the_mdp(x64):
    pomdp = hidden.make_pomdp(random_pomdp(1).mdp, np.eye(3))
    expected = bellman.policy_iteration(pomdp.mdp, tolerance=1e-12).q
    found = informed(pomdp, tolerance=1e-12).q
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_blind_policies_of_the_tiger_are_their_closed_form(x64):
    found = blind_policies(tiger.pomdp())
    # Opening: the first try, and then the mean of 10 and -100 for ever.
    later = 0.95 * -45 / 0.05
    expected = [[-20, -20], [later - 100, later + 10], [later + 10, later - 100]]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_belief_grid_is_all_multiples():
    grid = kernel.belief_grid(3, 5)
    counts = {tuple(row) for row in np.rint(grid * 5).astype(int)}
    assert counts == {c for c in itertools.product(range(6), repeat=3) if sum(c) == 5}
    assert len(grid) == 21
    np.testing.assert_array_equal(kernel.belief_grid(1, 4), [[1.0]])


def test_reachable_beliefs_of_the_tiger_are_the_odds_of_growls(x64):
    beliefs = kernel.reachable_beliefs(tiger.pomdp(), 4)
    net = np.arange(-4, 5)
    expected = 1 / (1 + (0.15 / 0.85) ** net)
    np.testing.assert_allclose(np.sort(beliefs[:, 0]), expected, atol=1e-12)
    np.testing.assert_allclose(beliefs.sum(axis=1), 1, atol=1e-12)
    assert len(kernel.reachable_beliefs(tiger.pomdp(), 4, max_beliefs=3)) == 3
