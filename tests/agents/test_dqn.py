"""DQN: probes and exact optima by every variant, its targets, and what `make` promises."""

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.agents import dqn
from jaxrl_llm.envs import tabular
from jaxrl_llm.nn.critics import QNetwork
from jaxrl_llm.nn.heads import TabularEmbedding
from jaxrl_llm.types import Box, Transition
from tests import oracles
from tests.agents import probes

NUM_STATES, NUM_ACTIONS = 6, 4
SMALL = dqn.Config(
    num_environments=4,
    num_steps=6,
    train_interval=2,
    num_updates=2,
    batch_size=16,
    buffer_size=64,
    warmup_steps=8,
    learning_rate=0.05,
    gamma=0.9,
    target_interval=4,
)
VARIANTS = {
    "plain": {},
    "double": {"is_double": True, "huber_delta": 1.0, "max_gradient_norm": 10.0},
    "several steps": {"num_return_steps": 3},
    "prioritised": {"priority_exponent": 0.6, "importance_steps": 500},
    "soft": {"target_interval": 1, "tau": 0.1},
}


@jax.jit(static_argnums=(0, 1))
def train(algorithm: Any, num_iterations: int, key: Any) -> Any:
    init_key, steps_key = jax.random.split(key)

    def body(state: Any, index: Any) -> tuple[Any, None]:
        return algorithm.step(jax.random.fold_in(steps_key, index), state)[0], None

    return jax.lax.scan(body, algorithm.init(init_key), jnp.arange(num_iterations))[0]


def forward(network: Any, params: Any, observation: Any) -> Any:
    return network.apply(params, observation)


# Learning


@pytest.mark.slow
@pytest.mark.parametrize("probe", probes.PROBES, ids=lambda probe: probe.environment.name)
def test_step_learns_probe(probe):
    config = dataclasses.replace(
        SMALL, num_steps=100, buffer_size=1000, learning_rate=0.01, gamma=probe.discount,
        epsilon_end=0.5, epsilon_steps=1000, target_interval=10,
    )  # fmt: skip
    network = QNetwork(probes.NUM_ACTIONS, (16,))
    learned = train(dqn.make(config, probe.environment, network), 10, jax.random.key(0))
    q = forward(network, learned.train.params, jnp.array(probe.observation))
    np.testing.assert_allclose(q, probe.q, atol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("probe", [probes.TIMEOUT, probes.DISCOUNTING], ids=["timeout", "two"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_bootstraps_a_timeout_and_discounts(variant, probe):
    settings = {"num_steps": 200, "num_updates": 4, "buffer_size": 400, "learning_rate": 0.02}
    settings |= {"gamma": probe.discount, "target_interval": 5, "epsilon_end": 1.0}
    config = dataclasses.replace(SMALL, **(settings | variant))
    network = QNetwork(probes.NUM_ACTIONS, (), is_dueling=variant.get("is_double", False))
    learned = train(dqn.make(config, probe.environment, network), 10, jax.random.key(0))
    q = forward(network, learned.train.params, jnp.array(probe.observation))
    np.testing.assert_allclose(q, probe.q, rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("is_double", [False, True], ids=["plain", "double"])
def test_step_finds_the_optimal_values_of_the_two_state_problem(is_double):
    """Within .05 of Q*, from one-hot features and random actions."""
    config = dqn.Config(
        num_environments=256, num_steps=40, batch_size=4096, buffer_size=262_144, warmup_steps=500,
        learning_rate=0.02, gamma=oracles.M2_DISCOUNT, target_interval=1, tau=0.1, epsilon_end=1.0,
        is_double=is_double,
    )  # fmt: skip
    environment = tabular.make(oracles.two_state_mdp(), max_steps=50)
    algorithm = dqn.make(config, environment, TabularEmbedding(2, 2))
    learned = train(algorithm, 60, jax.random.key(0))
    q = learned.target_params["params"]["table"]
    np.testing.assert_allclose(q, oracles.M2_Q, atol=0.05)


# The loss


def window(**changes: Any) -> Transition:
    """One window of three steps, states 0 1 2 then 3, in which nothing ends; `[1, 3, ...]`."""
    leaves = {
        "observation": [0, 1, 2],
        "action": [1, 0, 0],
        "reward": [1.0, 2.0, 4.0],
        "terminated": [False] * 3,
        "truncated": [False] * 3,
        "next_observation": [1, 2, 3],
    }
    arrays = {name: jnp.array([value]) for name, value in (leaves | changes).items()}
    return Transition(**arrays, extras={})


def look_up(params: Any, observation: Any) -> Any:
    return params[observation]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1 + 0.5 * 2 + 0.25 * 4 + 0.125 * 8),
        # A timeout at the second step: its own next state, 5, is bootstrapped from; not 2, not 3.
        ({"truncated": [False, True, False], "next_observation": [1, 5, 3]}, 2 + 0.25 * 100),
        ({"terminated": [False, True, False], "next_observation": [1, 5, 3]}, 2.0),
        ({"truncated": [True, True, False], "next_observation": [4, 5, 3]}, 1 + 0.5 * 16),
    ],
    ids=["nothing ends", "truncated", "terminated", "truncated at once"],
)
def test_loss_bootstraps_from_where_the_window_was_cut(changes, expected):
    target_params = jnp.array([[0.0, 1], [2, 1], [4, 1], [8, 1], [16, 1], [100, 1]])
    params = jnp.full((6, 2), 0.5)
    _, (q, error) = dqn.loss(
        SMALL, look_up, params, target_params, jnp.float32(0.5), window(**changes), jnp.ones(1)
    )
    np.testing.assert_allclose(q + error, [expected], rtol=1e-6)


@pytest.mark.slow
def test_loss_of_double_learning_evaluates_the_choice_of_the_online_network():
    config = dataclasses.replace(SMALL, is_double=True)
    target_params = jnp.zeros((6, 2)).at[3].set(jnp.array([8.0, 1.0]))
    params = jnp.zeros((6, 2)).at[3].set(jnp.array([0.0, 1.0]))
    _, (_, error) = dqn.loss(
        config, look_up, params, target_params, jnp.float32(1.0), window(), jnp.ones(1)
    )
    np.testing.assert_allclose(error, [7 + 1])


def test_loss_takes_the_best_allowed_action_of_the_next_state():
    target_params = jnp.zeros((6, 2)).at[3].set(jnp.array([8.0, 1.0]))
    masks = jnp.array([[[True, True], [True, True], [False, True]]])
    masked = dataclasses.replace(window(), extras={"next_action_mask": masks})
    _, (_, error) = dqn.loss(
        SMALL, look_up, jnp.zeros((6, 2)), target_params, jnp.float32(1.0), masked, jnp.ones(1)
    )
    np.testing.assert_allclose(error, [7 + 1])


@pytest.mark.parametrize("huber_delta", [None, 0.5])
def test_loss_gradient_is_the_weighted_error_of_the_action_taken(huber_delta):
    config = dataclasses.replace(SMALL, huber_delta=huber_delta, is_double=True)
    params = jnp.array(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32)
    gradient, (_, error) = jax.jit(jax.grad(partial(dqn.loss, config, look_up), has_aux=True))(
        params, 2 * params, jnp.float32(0.9), window(), jnp.array([3.0])
    )
    slope = error[0] if huber_delta is None else jnp.clip(error[0], -huber_delta, huber_delta)
    expected = np.zeros((6, 2))
    expected[0, 1] = -3 * slope
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_act_is_epsilon_greedy_over_allowed_actions(epsilon):
    q, mask = jnp.array([9.0, 1.0, 2.0, 0.0]), jnp.array([False, True, True, True])
    uniform = (jnp.arange(6000) + 0.5) / 6000
    action = jax.vmap(dqn.act, in_axes=(None, None, 0, None))(
        q, jnp.float32(epsilon), uniform, mask
    )
    law = epsilon * np.array([0, 1, 1, 1]) / 3 + (1 - epsilon) * np.array([0, 0, 1, 0])
    np.testing.assert_allclose(np.bincount(action, minlength=4) / 6000, law, atol=1e-3)


# make


INVALID = [
    ("num_environments", 0),
    ("num_steps", 5),
    ("train_interval", 0),
    ("num_updates", 0),
    ("batch_size", 0),
    ("batch_size", 65),
    ("buffer_size", 31),
    ("warmup_steps", 0),
    ("num_return_steps", 9),
    ("target_interval", 0),
    ("learning_rate", 0.0),
    ("max_gradient_norm", float("inf")),
    ("huber_delta", -1.0),
    ("gamma", 1.01),
    ("tau", float("nan")),
    ("epsilon_start", 2.0),
    ("epsilon_end", -0.1),
    ("epsilon_steps", -1),
    ("priority_exponent", 1.5),
    ("importance_exponent", -0.5),
    ("importance_steps", -1),
]


@pytest.mark.parametrize(("field", "value"), INVALID)
def test_make_refuses_a_setting_in_one_line(field, value):
    config = dataclasses.replace(SMALL, **{field: value})
    with pytest.raises(ValueError, match=r"\A\w+ is [^\n]+; it must [^\n]+\Z") as raised:
        dqn.make(config, probes.CONSTANT.environment, QNetwork(2))
    blamed = {"batch_size": "buffer_size", "num_return_steps": "warmup_steps"}
    named = str(raised.value).partition(" ")[0]
    assert named in (field, blamed.get(field))
    assert str(value) in str(raised.value)


def test_make_refuses_continuous_actions():
    space = Box(shape=(1,), low=-1.0, high=1.0)
    environment = dataclasses.replace(probes.CONSTANT.environment, action_space=space)
    with pytest.raises(ValueError, match=r"\Aenvironment\.action_space is a Box; [^\n]+\Z"):
        dqn.make(SMALL, environment, QNetwork(2))


@pytest.fixture(scope="module")
def masked_mdp():
    return oracles.random_mdp(0, NUM_STATES, NUM_ACTIONS, 0.9, masked=True)


@pytest.fixture(scope="module")
def algorithm(masked_mdp):
    environment = tabular.make(masked_mdp, max_steps=7)
    return dqn.make(SMALL, environment, TabularEmbedding(NUM_STATES, NUM_ACTIONS))


@pytest.fixture(scope="module")
def step(algorithm):
    return jax.jit(algorithm.step)


@pytest.fixture(scope="module")
def state(algorithm):
    return jax.jit(algorithm.init)(jax.random.key(0))


@pytest.mark.slow
def test_masked_actions_are_never_taken(algorithm, step, state, masked_mdp):
    allowed = np.array(masked_mdp.action_mask)
    # The network itself would always take the forbidden ones.
    wish = {"params": {"table": jnp.where(masked_mdp.action_mask, 0.0, 9.0)}}
    state = state.replace(train=state.train.replace(params=wish), target_params=wish)
    for index in range(12):
        state, _ = step(jax.random.key(index), state)
        added = slice(None) if state.replay.is_full else slice(int(state.replay.current_index))
        rows = jax.tree.map(lambda leaf, added=added: leaf[0, added], state.replay.experience)
        assert allowed[np.array(rows.observation), np.array(rows.action)].all()
        following = np.array(rows.next_observation)
        np.testing.assert_array_equal(rows.extras["next_action_mask"], allowed[following])
    assert state.replay.is_full
    table = np.array(state.train.params["params"]["table"])
    np.testing.assert_array_equal(table[~allowed], 9)
    assert np.abs(table[allowed]).max() < 9


@pytest.mark.slow
def test_init_fills_the_buffer_by_random_actions(state):
    assert state.num_transitions == SMALL.warmup_steps * SMALL.num_environments == 32
    assert (state.train.step, state.replay.current_index, state.replay.is_full) == (0, 32, False)


@pytest.mark.slow
def test_step_remembers_the_observation_before_any_reset(step, state):
    after = step(jax.random.key(1), state)[0]
    rows = jax.tree.map(lambda leaf: np.array(leaf)[0], after.replay.experience)
    following = np.roll(rows.observation, -SMALL.num_environments)
    number = int(after.replay.current_index) - SMALL.num_environments
    ended = (rows.terminated | rows.truncated)[:number]
    np.testing.assert_array_equal(
        rows.next_observation[:number][~ended], following[:number][~ended]
    )
    assert rows.truncated.any()
    assert (rows.next_observation[:number][ended] != following[:number][ended]).any()


@pytest.mark.slow
def test_step_counts_transitions_and_lowers_epsilon(step, state):
    quick = state.hyperparameters.replace(
        epsilon_start=jnp.float32(0.9), epsilon_end=jnp.float32(0.1), epsilon_steps=jnp.float32(64)
    )
    following, metrics = step(jax.random.key(2), state.replace(hyperparameters=quick))
    np.testing.assert_allclose(metrics["epsilon"].mean, 0.5)
    assert following.num_transitions == 32 + 24
    assert following.train.step == 6
    np.testing.assert_allclose(dqn.epsilon(following), 0.9 - 0.8 * 56 / 64, rtol=1e-6)
    names = {"episode_return", "episode_length", "loss", "q", "td_error", "epsilon"}
    assert set(metrics) == names
    assert metrics["loss"].weight == 6


@pytest.mark.slow
def test_step_is_a_function_of_its_key(step, state):
    first = step(jax.random.key(4), state)
    chex.assert_trees_all_equal(first, step(jax.random.key(4), state))
    other, _ = step(jax.random.key(5), state)
    tables = [one.train.params["params"]["table"] for one in (first[0], other)]
    assert (tables[0] != tables[1]).any()


@pytest.mark.slow
def test_step_of_many_seeds_by_vmap_equals_each_seed_alone(algorithm, step):
    keys, start_keys = (jax.random.split(jax.random.key(seed), 3) for seed in (6, 7))
    with jax.debug_key_reuse(False):  # it takes keys that a scan under `vmap` runs over for used
        states = jax.jit(jax.vmap(algorithm.init))(start_keys)
        together = jax.jit(jax.vmap(algorithm.step))(keys, states)
    for seed in range(3):
        state, ours = jax.tree.map(lambda leaf, seed=seed: leaf[seed], (states, together))
        chex.assert_trees_all_close(ours, step(keys[seed], state), rtol=1e-4, atol=1e-6)
