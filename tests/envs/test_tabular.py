"""A sampled MDP follows the law of its arrays: exactly in its tables, and in what it draws."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxrl_llm import make_mdp
from jaxrl_llm.envs import core, tabular
from jaxrl_llm.kernels import bellman
from jaxrl_llm.types import Discrete


def random_mdp(seed=0):
    """5 states, of which the last is terminal, 3 actions, and every reward its own number."""
    generator = np.random.default_rng(seed)
    transition = generator.dirichlet(np.full(5, 0.7), (5, 3))
    transition[0, 0] = [0, 1, 0, 0, 0]
    transition[4] = 0
    mask = np.ones((5, 3), bool)
    mask[1, 2] = mask[2, :2] = False
    return make_mdp(
        transition,
        np.arange(75.0).reshape(5, 3, 5),
        0.9,
        initial=[0.5, 0.3, 0.2, 0, 0],
        terminal=np.arange(5) == 4,
        action_mask=mask,
    )


def laws(table):
    """The law that each row of an alias table draws from, by its definition, in float64."""
    threshold, alias = np.asarray(table.threshold, np.float64), np.asarray(table.alias)
    law = threshold.copy()
    np.add.at(law, (np.arange(len(law))[:, None], alias), 1 - threshold)
    return law / law.shape[1]


def random_laws(num_outcomes):
    generator = np.random.default_rng(num_outcomes)
    law = generator.dirichlet(np.full(num_outcomes, 0.3), 50)
    law[:, 1:][generator.random((50, num_outcomes - 1)) < 0.3] = 0
    return law / law.sum(axis=1, keepdims=True)


def chi_square(counts, law):
    """The p-value of `counts` under `law`; impossible outcomes must not occur."""
    possible = law > 0
    assert counts[~possible].sum() == 0
    return stats.chisquare(counts[possible], law[possible] * counts.sum()).pvalue


@pytest.mark.parametrize("num_outcomes", [1, 2, 3, 10, 64])
def test_alias_table_is_exact(num_outcomes):
    law = random_laws(num_outcomes)
    table = tabular.alias_table(law)
    np.testing.assert_allclose(laws(table), law, rtol=0, atol=1e-6)
    assert ((laws(table) > 0) <= (law > 0)).all()
    assert table.threshold.dtype == jnp.float32
    assert table.alias.dtype == jnp.int32


@pytest.mark.parametrize(
    "law", [np.full(7, 1 / 7), np.eye(7)[3], np.r_[0.5, 0.5, np.zeros(5)], np.arange(7) / 21]
)
def test_alias_table_is_exact_in_float32(law):
    table = tabular.alias_table(law.astype(np.float32)[None])
    np.testing.assert_allclose(laws(table)[0], law, rtol=0, atol=1e-6)


def test_alias_table_normalises_its_rows():
    table = tabular.alias_table(np.array([[2.0, 6.0], [0.1, 0.1]]))
    np.testing.assert_allclose(laws(table), [[0.25, 0.75], [0.5, 0.5]], rtol=0, atol=1e-6)


def test_alias_table_of_a_row_of_zeros_gives_outcome_0():
    np.testing.assert_array_equal(laws(tabular.alias_table(np.zeros((1, 4)))), [[1, 0, 0, 0]])


def test_sample_draws_its_law():
    law = random_laws(10)[:2]
    table = tabular.alias_table(law)
    for row in range(2):
        keys = jax.random.split(jax.random.key(row), 100_000)
        drawn = jax.jit(jax.vmap(table.sample, in_axes=(0, None)))(keys, jnp.int32(row))
        assert chi_square(np.bincount(drawn, minlength=10), law[row]) > 1e-4


def test_step_draws_the_transitions_and_their_rewards():
    mdp = random_mdp()
    environment = tabular.make(mdp)
    pairs = np.argwhere(np.ones((4, 3)))
    num_draws = 10_000

    def draw(key, state, action):
        keys = jax.random.split(key, num_draws)
        step = jax.vmap(environment.step, in_axes=(0, None, None, None))
        return step(keys, state, action, environment.default_params)[1]

    keys = jax.random.split(jax.random.key(1), len(pairs))
    drawn = jax.jit(jax.vmap(draw))(keys, pairs[:, 0], pairs[:, 1])
    p_values = []
    for place, (state, action) in enumerate(pairs):
        following = np.asarray(drawn.observation[place])
        law = np.asarray(mdp.transition[state, action], np.float64)
        counts = np.bincount(following, minlength=5)
        if np.count_nonzero(law) > 1:
            p_values.append(chi_square(counts, law / law.sum()))
        else:
            np.testing.assert_array_equal(counts, law * num_draws)
        rewards = np.asarray(mdp.reward[state, action])[following]
        np.testing.assert_array_equal(drawn.reward[place], rewards)
        np.testing.assert_array_equal(drawn.terminated[place], following == 4)
    assert min(p_values) > 1e-4


def test_step_reports_the_state_it_reached():
    mdp = random_mdp()
    environment = tabular.make(mdp, info=lambda state: {"double": 2 * state})
    keys = jax.random.split(jax.random.key(2), 64)
    state, time_step = jax.vmap(environment.step, in_axes=(0, None, None, None))(
        keys, jnp.int32(1), jnp.int32(0), environment.default_params
    )
    np.testing.assert_array_equal(time_step.observation, state)
    np.testing.assert_array_equal(time_step.info["double"], 2 * state)
    np.testing.assert_array_equal(time_step.info["action_mask"], mdp.action_mask[state])
    assert set(time_step.info) == {"action_mask", "double"}
    assert not time_step.truncated.any()
    assert state.dtype == jnp.int32
    assert time_step.reward.dtype == jnp.float32


def test_step_under_jit_equals_eager():
    environment = tabular.make(random_mdp())
    arguments = jnp.int32(3), jnp.int32(1), environment.default_params
    for seed in range(3):
        eager = environment.step(jax.random.key(seed), *arguments)
        jitted = jax.jit(environment.step)(jax.random.key(seed), *arguments)
        jax.tree.map(np.testing.assert_array_equal, jitted, eager)


def test_step_under_vmap_equals_a_loop():
    environment = tabular.make(random_mdp())
    states, actions = jnp.array([0, 1, 2, 3]), jnp.array([0, 2, 1, 1])
    keys = jax.random.split(jax.random.key(0), 4)
    batch = jax.vmap(environment.step, in_axes=(0, 0, 0, None))(
        jax.random.clone(keys), states, actions, environment.default_params
    )
    for place, key in enumerate(keys):
        one = environment.step(key, states[place], actions[place], environment.default_params)
        jax.tree.map(
            lambda many, single, place=place: np.testing.assert_array_equal(many[place], single),
            batch,
            one,
        )


def test_reset_draws_the_initial_law():
    environment = tabular.make(random_mdp())
    keys = jax.random.split(jax.random.key(4), 20_000)
    reset = jax.jit(jax.vmap(environment.reset, in_axes=(0, None)))
    state, observation = reset(keys, environment.default_params)
    np.testing.assert_array_equal(state, observation)
    law = np.array([0.5, 0.3, 0.2, 0, 0])
    assert chi_square(np.bincount(state, minlength=5), law) > 1e-4


def test_make_reports_inadmissible_actions_when_asked():
    mdp = random_mdp()
    environment = tabular.make(mdp, report_inadmissible=True)
    for state in range(4):
        for action in range(3):
            _, time_step = environment.step(
                jax.random.key(0), jnp.int32(state), jnp.int32(action), environment.default_params
            )
            allowed = bool(mdp.action_mask[state, action])
            assert bool(time_step.info["inadmissible"]) == (not allowed)


def test_make_describes_the_problem():
    environment = tabular.make(random_mdp(), name="five")
    assert environment.name == "five"
    assert environment.observation_space == Discrete(num=5)
    assert environment.action_space == Discrete(num=3)
    assert environment.action_mask is not None
    np.testing.assert_array_equal(
        environment.action_mask(jnp.int32(1), environment.default_params), [True, True, False]
    )


def test_make_of_both_forms_of_a_problem_agrees():
    mdp = random_mdp()
    dense, sparse = tabular.make(mdp), tabular.make(bellman.successor_form(mdp))
    jax.tree.map(np.testing.assert_array_equal, dense.default_params, sparse.default_params)


@pytest.mark.slow
def test_make_truncates_after_max_steps():
    mdp = dataclasses.replace(random_mdp(), terminal=jnp.zeros(5, bool))
    environment = tabular.make(mdp, max_steps=4)

    def policy(key, observation, action_mask):
        return jnp.zeros(observation.shape, jnp.int32), {}

    running = core.start_batch(environment, jax.random.key(0), 2)
    _, batch = core.rollout(environment, policy, jax.random.key(1), running, num_steps=9)
    np.testing.assert_array_equal(batch.truncated[:, 0], [0, 0, 0, 1, 0, 0, 0, 1, 0])
    assert not batch.terminated.any()


@pytest.mark.slow
def test_rollouts_average_to_the_exact_value():
    mdp = random_mdp()
    environment = tabular.make(mdp)
    policy = jnp.asarray(np.random.default_rng(3).dirichlet(np.ones(3), 5), jnp.float32)
    exact = bellman.policy_evaluation(mdp, policy)
    num_episodes, num_steps = 4000, 100

    def act(key, observation, action_mask):
        return jax.random.categorical(key, jnp.log(policy[observation])), {}

    @jax.jit
    def collect(key):
        start_key, rollout_key = jax.random.split(key)
        running = core.start_batch(environment, start_key, num_episodes)
        return core.rollout(environment, act, rollout_key, running, num_steps=num_steps)[1]

    batch = collect(jax.random.key(5))
    # Only the first episode of each environment counts, and what is left of it is discounted to 0.
    earlier = np.cumsum(np.asarray(batch.terminated), axis=0) - np.asarray(batch.terminated)
    weight = np.where(earlier == 0, 0.9 ** np.arange(num_steps)[:, None], 0)
    returns = (weight * np.asarray(batch.reward)).sum(axis=0)
    error = returns.mean() - float(mdp.initial @ exact.value)
    assert abs(error) < 4 * returns.std() / np.sqrt(num_episodes)
