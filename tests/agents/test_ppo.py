"""PPO against probes, exact values, and the equations written out in NumPy."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.agents import ppo
from jaxrl_llm.envs import core, tabular, treatment
from jaxrl_llm.kernels import bellman
from jaxrl_llm.nn.heads import ActorCritic, TabularActorCritic
from jaxrl_llm.types import Box, Discrete, Environment, TimeStep, TrainState
from tests import oracles
from tests.agents import probes

NUM_STATES, NUM_ACTIONS = 6, 4
CONFIG = ppo.Config(
    num_environments=8, num_steps=16, num_iterations=10, learning_rate=0.02, gamma=0.9
)


def train(algorithm, num_iterations, key):
    init_key, steps_key = jax.random.split(key)
    keys = jax.random.split(steps_key, num_iterations)
    return jax.lax.scan(lambda s, k: algorithm.step(k, s), algorithm.init(init_key), keys)[0]


def assert_trees_close(actual, expected, **tolerance):
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance), actual, expected)


@pytest.fixture(scope="module")
def masked_mdp():
    return oracles.random_mdp(0, NUM_STATES, NUM_ACTIONS, 0.9, masked=True)


@pytest.fixture(scope="module")
def environment(masked_mdp):
    return tabular.make(masked_mdp, max_steps=7)


@pytest.fixture(scope="module")
def network():
    return TabularActorCritic(NUM_STATES, NUM_ACTIONS)


def tables(policy, value):
    policy, value = jnp.array(policy, jnp.float32), jnp.array(value, jnp.float32)
    return {"params": {"policy": {"table": policy}, "value": {"table": value[:, None]}}}


def random_tables(seed):
    random = np.random.default_rng(seed)
    return tables(random.normal(size=(NUM_STATES, NUM_ACTIONS)), random.normal(size=NUM_STATES))


@pytest.fixture(scope="module")
def state(environment, network):
    """A learner at random parameters; `num_steps` is not a multiple of the episodes' length."""
    fresh = ppo.make(CONFIG, environment, network).init(jax.random.key(0))
    return fresh.replace(train=fresh.train.replace(params=random_tables(0)))


@pytest.fixture(scope="module")
def batch(environment, network, state):
    collect = jax.jit(partial(ppo.collect, CONFIG, environment, network))
    return collect(jax.random.key(1), state)[1]


# Learning


@pytest.mark.parametrize("probe", probes.PROBES, ids=lambda probe: probe.environment.name)
def test_step_learns_probe(probe):
    config = ppo.Config(
        num_environments=8,
        num_steps=16,
        num_iterations=80,
        learning_rate=0.01,
        gamma=probe.discount,
        value_clip_epsilon=None,
        entropy_coefficient=0.0,
    )
    network = ActorCritic(num_actions=probes.NUM_ACTIONS, hidden_sizes=(16,))
    algorithm = ppo.make(config, probe.environment, network)
    learned = jax.jit(partial(train, algorithm, config.num_iterations))(jax.random.key(0))
    logits, value = network.apply(learned.train.params, jnp.array(probe.observation))
    np.testing.assert_allclose(value, probe.value, atol=0.01)
    earned = np.sum(jax.nn.softmax(logits) * probe.q, axis=1)
    np.testing.assert_allclose(earned, probe.value, atol=0.02)


@pytest.mark.parametrize("probe", [probes.CONSTANT, probes.TIMEOUT], ids=["death", "timeout"])
def test_step_bootstraps_a_timeout_and_not_a_death(probe):
    config = ppo.Config(
        num_steps=16,
        num_iterations=200,
        learning_rate=0.1,
        gamma=probe.discount,
        value_clip_epsilon=None,
    )
    network = ActorCritic(num_actions=probes.NUM_ACTIONS, hidden_sizes=())
    algorithm = ppo.make(config, probe.environment, network)
    learned = jax.jit(partial(train, algorithm, config.num_iterations))(jax.random.key(0))
    _, value = network.apply(learned.train.params, jnp.array(probe.observation))
    np.testing.assert_allclose(value, probe.value, rtol=1e-3)


def test_step_learns_the_optimal_treatment_whatever_the_seed():
    config = ppo.Config(
        num_environments=64,
        num_steps=16,
        num_iterations=100,
        learning_rate=0.1,
        max_gradient_norm=1e3,  # values reach 180
        gamma=oracles.TREATMENT_DISCOUNT,
        value_clip_epsilon=None,
        entropy_coefficient=0.0,
    )
    network = TabularActorCritic(num_states=5, num_actions=3)
    algorithm = ppo.make(config, treatment.make(max_steps=20), network)
    seeds = jax.vmap(partial(train, algorithm, config.num_iterations))
    learned = jax.jit(seeds)(jax.random.split(jax.random.key(0), 4))
    logits = learned.train.params["params"]["policy"]["table"]
    evaluate = jax.vmap(partial(bellman.policy_evaluation, oracles.treatment_mdp()))
    greedy, stochastic = evaluate(jnp.argmax(logits, axis=-1)), evaluate(jax.nn.softmax(logits))
    optimum = np.broadcast_to(oracles.TREATMENT_VALUE, (4, 5))
    np.testing.assert_allclose(greedy.value, optimum, atol=1e-3)
    np.testing.assert_allclose(stochastic.value, optimum, atol=3.0)  # uniform is 63 below


# Collection


def golden_environment(cut: str) -> Environment:
    """0, 1, end in 5; then 2, 3, 4. Every reward is 1."""
    successor = jnp.array([1, 5, 3, 4, 4, 5])

    def step(key, state, action, params):
        ended = state == 1
        return successor[state], TimeStep(
            observation=successor[state],
            reward=jnp.float32(1),
            terminated=ended & (cut == "terminated"),
            truncated=ended & (cut == "truncated"),
            info={},
        )

    return Environment(
        name="golden",
        reset=lambda key, params: (jnp.int32(2), jnp.int32(2)),
        step=step,
        default_params=None,
        observation_space=Discrete(num=6),
        action_space=Discrete(num=2),
    )


@pytest.mark.parametrize(
    ("cut", "advantage"),
    [("truncated", [2.624, 2.2, 1.7472, 1.01]), ("terminated", [1.328, 0.4, 1.7472, 1.01])],
)
def test_collect_gives_the_golden_advantages(cut, advantage):
    """The observation before the reset is worth 2, the one after it .7."""
    config = ppo.Config(num_environments=1, num_steps=4, gamma=0.9, gae_lambda=0.8)
    environment, network = golden_environment(cut), TabularActorCritic(6, 2)
    fresh = ppo.make(config, environment, network).init(jax.random.key(0))
    params = tables(np.zeros((6, 2)), [0.5, 0.6, 0.7, 0.8, 0.9, 2.0])
    first = jnp.zeros(1, jnp.int32)
    running = fresh.running.replace(state=first, observation=first)
    state = fresh.replace(train=fresh.train.replace(params=params), running=running)
    after, batch, metrics = ppo.collect(config, environment, network, jax.random.key(1), state)
    np.testing.assert_array_equal(batch.observation, [0, 1, 2, 3])
    np.testing.assert_allclose(batch.value, [0.5, 0.6, 0.7, 0.8])
    np.testing.assert_allclose(batch.advantage, advantage, rtol=1e-5)
    np.testing.assert_array_equal(after.observation, [4])
    for name in ("episode_return", "episode_length"):
        assert (metrics[name].total, metrics[name].weight) == (2, 1)


def test_collect_keeps_the_columns_of_a_row_together(batch, state, masked_mdp):
    observation, action = np.array(batch.observation), np.array(batch.action)
    leaves = state.train.params["params"]
    mask = np.array(masked_mdp.action_mask)[observation]
    weight = np.where(mask, np.exp(np.array(leaves["policy"]["table"])[observation]), 0)
    policy = weight / weight.sum(axis=1, keepdims=True)
    rows = np.arange(CONFIG.batch_size)
    np.testing.assert_array_equal(batch.action_mask, mask)
    np.testing.assert_allclose(batch.log_probability, np.log(policy[rows, action]), rtol=1e-5)
    np.testing.assert_array_equal(batch.value, leaves["value"]["table"][observation, 0])


def test_collect_pairs_the_advantage_with_its_action():
    """Where an episode is one step, the advantage is r(o, a) - V(o)."""
    probe, network = probes.ACTION_AND_OBSERVATION, ActorCritic(num_actions=probes.NUM_ACTIONS)
    config = ppo.Config(num_environments=5, num_steps=7)
    algorithm = ppo.make(config, probe.environment, network)
    state = algorithm.init(jax.random.key(0))
    _, batch, _ = ppo.collect(config, probe.environment, network, jax.random.key(1), state)
    index = (np.array(batch.observation)[:, 0] > 0).astype(int)
    expected = probe.q[index, np.array(batch.action)] - np.array(batch.value)
    np.testing.assert_allclose(batch.advantage, expected, rtol=1e-5, atol=1e-6)
    assert len(np.unique(np.stack([index, batch.action]), axis=1).T) == 4


def test_masked_actions_are_never_taken_and_their_logits_never_move(
    environment, network, state, masked_mdp
):
    allowed = np.array(masked_mdp.action_mask)
    # The network itself would always take the forbidden ones.
    wish = tables(np.where(allowed, 0.0, 9.0), np.zeros(NUM_STATES))
    state = state.replace(train=state.train.replace(params=wish))
    collect = jax.jit(partial(ppo.collect, CONFIG, environment, network))
    _, batch, _ = collect(jax.random.key(2), state)
    assert allowed[np.array(batch.observation), np.array(batch.action)].all()
    gradient = jax.grad(partial(ppo.loss, CONFIG, network), has_aux=True)(wish, batch)[0]
    table = np.array(gradient["params"]["policy"]["table"])
    assert not table[~allowed].any()
    assert table[allowed].any()
    learned, _ = jax.jit(ppo.make(CONFIG, environment, network).step)(jax.random.key(3), state)
    table = np.array(learned.train.params["params"]["policy"]["table"])
    np.testing.assert_array_equal(table[~allowed], 9)


# The loss


def as_numpy(batch):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), batch)


def numpy_loss(config, params, batch):
    """The parts of the loss, row by row, from tables; float64."""
    rows, leaves = as_numpy(batch), as_numpy(params)["params"]
    states, actions = rows.observation.astype(int), rows.action.astype(int)
    weight = np.exp(leaves["policy"]["table"])[states] * rows.action_mask
    policy = weight / weight.sum(axis=1, keepdims=True)
    log_policy = np.log(np.where(policy > 0, policy, 1))
    value = leaves["value"]["table"][states, 0]
    log_probability = log_policy[np.arange(len(states)), actions]
    ratio = np.exp(log_probability - rows.log_probability)
    clipped_ratio = np.clip(ratio, 1 - config.clip_epsilon, 1 + config.clip_epsilon)
    advantage, return_ = rows.advantage, rows.advantage + rows.value
    if config.whiten_advantages:
        advantage = (advantage - advantage.mean()) / advantage.std()
    value_loss = (value - return_) ** 2
    if config.value_clip_epsilon is not None:
        epsilon = config.value_clip_epsilon
        clipped = rows.value + np.clip(value - rows.value, -epsilon, epsilon)
        value_loss = np.maximum(value_loss, (clipped - return_) ** 2)
    return {
        "policy_loss": -np.minimum(ratio * advantage, clipped_ratio * advantage),
        "value_loss": value_loss / 2,
        "entropy": -np.sum(policy * log_policy, axis=1),
        "kl": 1 / ratio - 1 + np.log(ratio),
    }


@pytest.mark.parametrize("whiten", [True, False], ids=["whitened", "raw"])
@pytest.mark.parametrize("value_clip", [0.2, None], ids=["clipped value", "free value"])
def test_loss_matches_numpy_away_from_the_old_policy(batch, network, whiten, value_clip):
    config = dataclasses.replace(CONFIG, whiten_advantages=whiten, value_clip_epsilon=value_clip)
    params = random_tables(1)
    loss = partial(ppo.loss, config, network)
    total, metrics = jax.jit(loss)(params, batch)
    parts = numpy_loss(config, params, batch)
    expected = {name: part.mean() for name, part in parts.items()}
    assert expected["kl"] > 0.1  # far enough for every clip to act
    for name, mean in expected.items():
        np.testing.assert_allclose(metrics[name].mean, mean, rtol=2e-5)
        assert metrics[name].weight == CONFIG.batch_size
    weights = {
        "policy_loss": 1,
        "value_loss": config.value_coefficient,
        "entropy": -config.entropy_coefficient,
    }
    combined = sum(weight * expected[name] for name, weight in weights.items())
    np.testing.assert_allclose(total, combined, rtol=2e-5)
    np.testing.assert_allclose(loss(params, batch)[0], total, rtol=1e-6)


def test_loss_at_the_old_policy_has_the_gradient_of_reinforce(batch, network, state):
    """d/dlogits(s, b) = -E[A (1[a = b] - pi(b | s))], A whitened; d/dV(s) = -c E[raw A]."""
    config = dataclasses.replace(CONFIG, entropy_coefficient=0.0)
    params = state.train.params
    loss = partial(ppo.loss, config, network)
    gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(params, batch)
    np.testing.assert_allclose(metrics["kl"].mean, 0, atol=1e-9)
    np.testing.assert_allclose(metrics["policy_loss"].mean, 0, atol=1e-6)  # whitened, ratio 1
    rows = as_numpy(batch)
    advantage = (rows.advantage - rows.advantage.mean()) / rows.advantage.std()
    policy = np.asarray(params["params"]["policy"]["table"], np.float64)
    weight = np.exp(policy)[np.array(batch.observation)] * rows.action_mask
    probability = weight / weight.sum(axis=1, keepdims=True)
    score = np.eye(NUM_ACTIONS)[np.array(batch.action)] - probability
    expected_policy, expected_value = np.zeros((NUM_STATES, NUM_ACTIONS)), np.zeros(NUM_STATES)
    states = np.array(batch.observation)
    np.add.at(expected_policy, states, -advantage[:, None] * score / CONFIG.batch_size)
    np.add.at(expected_value, states, -0.5 * rows.advantage / CONFIG.batch_size)
    assert_trees_close(gradient, tables(expected_policy, expected_value), rtol=1e-5, atol=1e-6)
    free = dataclasses.replace(config, clip_epsilon=1e6)  # nothing is clipped at ratio 1
    unclipped, _ = jax.jit(jax.grad(partial(ppo.loss, free, network), has_aux=True))(params, batch)
    assert_trees_close(gradient, unclipped, rtol=1e-5, atol=1e-7)


def test_loss_of_a_batch_is_the_mean_over_its_minibatches(batch, network):
    config = dataclasses.replace(CONFIG, whiten_advantages=False)
    params = random_tables(1)
    gradient = jax.jit(jax.value_and_grad(partial(ppo.loss, config, network), has_aux=True))
    (total, metrics), slope = gradient(params, batch)
    quarters = jax.tree.map(lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:]), batch)
    (totals, parts), slopes = jax.vmap(gradient, in_axes=(None, 0))(params, quarters)
    np.testing.assert_allclose(totals.mean(), total, rtol=1e-5)
    mean = partial(jnp.mean, axis=0)
    assert_trees_close(jax.tree.map(mean, slopes), slope, rtol=1e-4, atol=1e-6)
    summed = jax.tree.map(partial(jnp.sum, axis=0), parts)
    assert_trees_close(summed, metrics, rtol=1e-5)
