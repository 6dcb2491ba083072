"""Learners in a table against exact fixed points, a sequential NumPy loop, and known answers."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import make_mdp
from jaxrl_llm.agents import tabular
from jaxrl_llm.envs import simulation
from tests import oracles

EXPECTED_SARSA = np.array([[12.8488, 14.2797], [14.9719, 13.3720]])
RANDOM = partial(tabular.Config, epsilon=1.0)


def train(config, mdp, *, num_calls, num_learners=1, seed=0):
    """`num_calls` steps of many learners, in one program."""
    algorithm = tabular.make(config, mdp)

    @jax.jit
    def run(first, rest):
        def body(state, keys):
            return jax.vmap(algorithm.step)(keys, state)

        return jax.lax.scan(body, jax.vmap(algorithm.init)(first), rest)

    first, rest = jax.random.split(jax.random.key(seed))
    return run(
        jax.random.split(first, num_learners), jax.random.split(rest, (num_calls, num_learners))
    )


def q_of(state):
    return np.asarray(jax.vmap(tabular.q_values)(state))


def sequential(config, mdp, words, state, action):
    """Q-learning or SARSA of one patient as the book writes it, from the same random words."""
    simulator = jax.tree.map(np.asarray, simulation.make(mdp))
    uniform = np.asarray(simulation.uniform(words))[:, :, 0]
    num_actions = mdp.num_actions
    q = np.full((mdp.num_states, num_actions), np.float32(0))
    visits = np.zeros_like(q)

    def pick(state, number):
        if number < np.float32(config.epsilon):
            return min(int(number / np.float32(config.epsilon) * num_actions), num_actions - 1)
        return int(q[state].argmax())

    def draw(law, slot, side):
        size = simulator.size[law]
        place = simulator.first[law] + min(int(slot * size), size - 1)
        return place if side < simulator.threshold[place] else simulator.alias[place]

    for u in uniform:
        if config.method == "q_learning":
            action = pick(state, u[0])
        place = draw(simulator.law[state * num_actions + action], u[1], u[2])
        to, reward = simulator.successor[place], simulator.reward[place]
        ended = simulator.terminal[to]
        following = pick(to, u[0])
        value = q[to].max() if config.method == "q_learning" else q[to, following]
        visits[state, action] += 1
        alpha = config.step_size * visits[state, action] ** -config.step_size_decay
        target = reward + (0 if ended else float(mdp.discount) * value)
        q[state, action] += alpha * (target - q[state, action])
        state = simulator.successor[draw(0, u[3], u[4])] if ended else to
        action = pick(state, u[5]) if ended else following
    return q


@pytest.mark.slow
@pytest.mark.parametrize("method", ["q_learning", "sarsa"])
def test_one_patient_is_the_sequential_algorithm(method):
    config = tabular.Config(
        method=method, epsilon=0.3, step_size=0.5, step_size_decay=0.3, num_steps=300
    )
    mdp = oracles.terminal_mdp(0, 6, 3, 0.9)
    algorithm = tabular.make(config, mdp)
    first, second = jax.random.split(jax.random.key(1))
    state = algorithm.init(first)
    start, action = int(state.patients.state[0]), int(state.action[0])
    learned, metrics = jax.jit(algorithm.step)(second, state)
    words = simulation.random_words(jax.random.clone(second), 300, 6, 1)
    expected = sequential(config, mdp, words, start, action)
    np.testing.assert_allclose(tabular.q_values(learned), expected, rtol=1e-4, atol=1e-5)
    assert int(learned.visits.sum()) == int(learned.num_steps) == 300
    assert int(learned.num_episodes) == int(metrics["episode_return"].weight) > 10


@pytest.mark.slow
def test_patients_who_never_meet_are_each_a_sequential_update():
    """64 patients in 64 absorbing states of their own."""
    mdp = make_mdp(np.eye(64)[:, None], np.arange(64.0)[:, None], 0.5)
    config = tabular.Config(num_environments=64, num_steps=1, step_size=0.25)
    algorithm = tabular.make(config, mdp)
    first, second = jax.random.split(jax.random.key(0))
    state = algorithm.init(first)
    places = replace(state.patients, state=jnp.arange(64, dtype=jnp.int32))
    after, _ = algorithm.step(second, replace(state, patients=places))
    np.testing.assert_allclose(after.q[:, 0], 0.25 * np.arange(64.0), rtol=1e-6)


@pytest.mark.slow
def test_patients_who_meet_move_the_pair_once_towards_the_mean():
    mdp = make_mdp(np.ones((1, 1, 1)), np.ones((1, 1)), 0.0)
    for decay, expected in ((0.0, 1 - 0.75**8), (1.0, 1.0)):
        config = tabular.Config(
            num_environments=8, num_steps=1, step_size_decay=decay,
            step_size=1.0 if decay else 0.25,
        )  # fmt: skip
        state, _ = train(config, mdp, num_calls=1)
        np.testing.assert_allclose(q_of(state), expected, rtol=1e-5)
        assert state.visits.sum() == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected", "tolerance"),
    [
        ({"method": "q_learning"}, oracles.M2_Q, 0.35),
        ({"method": "double_q_learning"}, oracles.M2_Q, 0.5),
        ({"method": "watkins_q_lambda", "lambda_": 0.5}, oracles.M2_Q, 0.5),
        ({"method": "expected_sarsa", "epsilon": 0.1}, EXPECTED_SARSA, 0.35),
        ({"method": "sarsa", "epsilon": 0.1}, EXPECTED_SARSA, 0.35),
        ({"method": "n_step_sarsa", "epsilon": 0.1, "n": 3}, EXPECTED_SARSA, 0.5),
        ({"method": "tree_backup", "epsilon": 0.1, "n": 3}, EXPECTED_SARSA, 0.5),
        ({"method": "sarsa_lambda", "epsilon": 0.1, "lambda_": 0.5}, EXPECTED_SARSA, 0.5),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_learners_reach_their_fixed_point(options, expected, tolerance):
    """The mean over 100 learners, whose noise alone would be far smaller than the tolerance."""
    config = RANDOM(
        step_size=1.0, step_size_decay=0.5, num_steps=4000, **({"epsilon": 1.0} | options)
    )
    state, _ = train(config, oracles.two_state_mdp(), num_calls=5, num_learners=100)
    np.testing.assert_allclose(q_of(state).mean(0), expected, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["q_learning", "sarsa", "n_step_sarsa", "watkins_q_lambda"])
def test_a_timeout_bootstraps_and_a_death_does_not(method):
    mdp = make_mdp(np.ones((1, 1, 1)), np.ones((1, 1)), 0.9)
    config = tabular.Config(method=method, max_episode_steps=1, step_size=0.5, num_steps=400)
    state, metrics = train(config, mdp, num_calls=1)
    np.testing.assert_allclose(q_of(state), 10, rtol=1e-3)
    assert metrics["episode_length"].mean == 1
    dying = make_mdp(
        np.tile(np.eye(2)[1], (2, 1, 1)), np.ones((2, 1)), 0.9,
        initial=np.eye(2)[0], terminal=np.array([False, True]),
    )  # fmt: skip
    state, _ = train(replace(config, max_episode_steps=None), dying, num_calls=1)
    np.testing.assert_allclose(q_of(state)[0, 0], 1, rtol=1e-3)


@pytest.mark.slow
def test_a_mask_is_never_left_and_can_be_ignored():
    mdp = oracles.random_mdp(0, 5, 6, 0.9, masked=True)
    state, _ = train(RANDOM(num_steps=500), mdp, num_calls=1)
    visits = np.asarray(state.visits).reshape(5, 6)
    np.testing.assert_array_equal(visits > 0, mdp.action_mask)
    np.testing.assert_array_equal(np.isfinite(q_of(state)[0]), mdp.action_mask)
    free, _ = train(RANDOM(num_steps=500, use_action_mask=False), mdp, num_calls=1)
    assert (np.asarray(free.visits) > 0).all()
    assert np.isfinite(q_of(free)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"exploration": "boltzmann", "temperature": 1.0},
        {"exploration": "ucb", "ucb_coefficient": 2.0},
        {"epsilon": 0.0, "initial_value": 20.0},
    ],
)
def test_each_exploration_finds_the_best_action(options):
    config = tabular.Config(num_steps=2000, step_size=0.05, **options)
    state, _ = train(config, oracles.two_state_mdp(), num_calls=1, num_learners=20)
    np.testing.assert_array_equal(np.median(q_of(state).argmax(-1), axis=0), [1, 0])


@pytest.mark.slow
def test_vmap_is_a_loop_and_runs_repeat():
    algorithm = tabular.make(tabular.Config(num_steps=50), oracles.two_state_mdp())

    def keys():
        return jax.random.split(jax.random.key(3), 2), jax.random.split(jax.random.key(4), 2)

    first, second = keys()
    run = jax.jit(jax.vmap(algorithm.step))
    both, again = (run(keys()[1], jax.vmap(algorithm.init)(keys()[0]))[0] for _ in range(2))
    np.testing.assert_array_equal(both.q, again.q)
    step = jax.jit(algorithm.step)
    for index, (one, two) in enumerate(zip(first, second, strict=True)):
        alone, _ = step(two, algorithm.init(one))
        np.testing.assert_allclose(both.q[index], alone.q, rtol=1e-5)
        np.testing.assert_array_equal(both.patients.state[index], alone.patients.state)


@pytest.mark.slow
def test_learning_stops_after_its_episodes_and_epsilon_falls_on_the_way():
    config = RANDOM(num_steps=10, max_episode_steps=5, num_episodes=6)
    state, metrics = train(config, oracles.two_state_mdp(), num_calls=10)
    assert state.num_episodes[0] == 6
    assert state.num_steps[0] == 30
    np.testing.assert_array_equal(metrics["episode_length"].weight[:, 0], [2, 2, 2] + [0] * 7)
    falling = replace(config, num_episodes=None, final_exploration=0.0, schedule_length=2)
    state, _ = train(falling, oracles.two_state_mdp(), num_calls=10)
    visits = np.asarray(state.visits[0]).reshape(2, 2)
    assert visits.min(axis=1).max() <= 10, "explored after the schedule had ended"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dqn"}, "method is 'dqn'; it must be one of"),
        ({"epsilon": 1.5}, r"epsilon is 1.5; it must be in \[0, 1\]"),
        ({"step_size": 0.0}, "step_size is 0.0; it must be greater than 0"),
        ({"num_environments": 2, "method": "sarsa_lambda"}, "num_environments is 2; sarsa_lambda"),
        ({"exploration": "ucb", "method": "tree_backup"}, "exploration is 'ucb'; tree_backup"),
        ({"final_exploration": -1.0}, "final_exploration is -1.0"),
        ({"schedule_length": 0}, "schedule_length is 0; it must be at least 1"),
    ],
)  # fmt: skip
def test_make_names_the_setting_that_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        tabular.make(tabular.Config(**options), oracles.two_state_mdp())
