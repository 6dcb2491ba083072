"""PPO as a whole: probes and exact optima, what it collects, and what `make` promises."""

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.agents import ppo
from jaxrl_llm.envs import tabular, treatment
from jaxrl_llm.kernels import bellman
from jaxrl_llm.nn.heads import ActorCritic, TabularActorCritic
from jaxrl_llm.types import Box, Discrete, Environment, TimeStep
from tests import oracles
from tests.agents import probes
from tests.agents.tables import logits, random_tables, tables

# Whole iterations, and laws over many draws: minutes of compilation.
pytestmark = pytest.mark.slow

NUM_STATES, NUM_ACTIONS = 6, 4
CONFIG = ppo.Config(
    num_environments=8, num_steps=16, num_iterations=10, learning_rate=0.02, gamma=0.9
)


@jax.jit(static_argnums=(0, 1))
def train(algorithm, num_iterations, key):
    init_key, steps_key = jax.random.split(key)
    keys = jax.random.split(steps_key, num_iterations)
    return jax.lax.scan(lambda s, k: algorithm.step(k, s), algorithm.init(init_key), keys)[0]


@pytest.fixture(scope="module")
def masked_mdp():
    return oracles.random_mdp(0, NUM_STATES, NUM_ACTIONS, 0.9, masked=True)


@pytest.fixture(scope="module")
def environment(masked_mdp):
    return tabular.make(masked_mdp, max_steps=7)


@pytest.fixture(scope="module")
def network():
    return TabularActorCritic(NUM_STATES, NUM_ACTIONS)


@pytest.fixture(scope="module")
def algorithm(environment, network):
    return ppo.make(CONFIG, environment, network)


@pytest.fixture(scope="module")
def step(algorithm):
    return jax.jit(algorithm.step)


@pytest.fixture(scope="module")
def collect(environment, network):
    return jax.jit(partial(ppo.collect, CONFIG, environment, network))


@pytest.fixture(scope="module")
def state(algorithm):
    """A learner at random parameters; its rollouts cut episodes, whose length is 7."""
    fresh = jax.jit(algorithm.init)(jax.random.key(0))
    return fresh.replace(
        train=fresh.train.replace(params=random_tables(0, NUM_STATES, NUM_ACTIONS))
    )


@pytest.fixture(scope="module")
def batch(collect, state):
    return collect(jax.random.key(1), state)[1]


def by_vmap(function, *arguments):
    # JAX's check takes the keys that a scan under `vmap` runs over for used ones.
    with jax.debug_key_reuse(False):
        return jax.jit(jax.vmap(function))(*arguments)


# Learning


def learn(probe, config, network: Any) -> Any:
    """Policy and values of a trained network wherever the probe's agent may be."""
    algorithm = ppo.make(config, probe.environment, network)
    learned = train(algorithm, config.num_iterations, jax.random.key(0))
    return network.apply(learned.train.params, jnp.array(probe.observation))


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
    network = ActorCritic(probe.environment.action_space, hidden_sizes=(16,))
    policy, value = learn(probe, config, network)
    np.testing.assert_allclose(value, probe.value, atol=0.01)
    earned = np.sum(jax.nn.softmax(policy.logits) * probe.q, axis=1)
    np.testing.assert_allclose(earned, probe.value, atol=0.02)


AMOUNT_PROBES = (*probes.CONTINUOUS_PROBES, *probes.HYBRID_PROBES)


@pytest.mark.parametrize("probe", AMOUNT_PROBES, ids=lambda probe: probe.environment.name)
def test_step_learns_probe_of_amounts(probe):
    config = ppo.Config(
        num_environments=16,
        num_steps=16,
        num_iterations=150,
        learning_rate=0.01,
        gamma=probe.discount,
        value_clip_epsilon=None,
        entropy_coefficient=0.0,
    )
    network = ActorCritic(probe.environment.action_space, hidden_sizes=(16,))
    policy, value = learn(probe, config, network)
    np.testing.assert_allclose(probe.earned(policy.action(policy.mode())), probe.value, atol=0.01)
    np.testing.assert_allclose(value, probe.value, atol=0.01)


LIMITED = {
    "death": probes.CONSTANT,
    "timeout": probes.TIMEOUT,
    "timeout, dose": probes.CONTINUOUS_TIMEOUT,
    "timeout, hybrid": probes.HYBRID_TIMEOUT,
}


@pytest.mark.parametrize("probe", LIMITED.values(), ids=LIMITED.keys())
def test_step_bootstraps_a_timeout_and_not_a_death(probe):
    config = ppo.Config(
        num_steps=16,
        num_iterations=200,
        learning_rate=0.1,
        gamma=probe.discount,
        value_clip_epsilon=None,
    )
    network = ActorCritic(probe.environment.action_space, hidden_sizes=())
    _, value = learn(probe, config, network)
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
    seeds = jax.random.split(jax.random.key(0), 4)
    learned = by_vmap(partial(train, algorithm, config.num_iterations), seeds)
    table = logits(learned.train.params)
    evaluate = jax.jit(jax.vmap(partial(bellman.policy_evaluation, oracles.treatment_mdp())))
    greedy, stochastic = evaluate(jnp.argmax(table, axis=-1)), evaluate(jax.nn.softmax(table))
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
    fresh = jax.jit(ppo.make(config, environment, network).init)(jax.random.key(0))
    params = tables(np.zeros((6, 2)), [0.5, 0.6, 0.7, 0.8, 0.9, 2.0])
    first = jnp.zeros(1, jnp.int32)
    running = fresh.running.replace(state=first, observation=first)
    state = fresh.replace(train=fresh.train.replace(params=params), running=running)
    collect = jax.jit(partial(ppo.collect, config, environment, network))
    after, batch, metrics = collect(jax.random.key(1), state)
    np.testing.assert_array_equal(batch.observation, [0, 1, 2, 3])
    np.testing.assert_allclose(batch.value, [0.5, 0.6, 0.7, 0.8])
    np.testing.assert_allclose(batch.advantage, advantage, rtol=1e-5)
    np.testing.assert_array_equal(after.running.observation, [4])
    for name in ("episode_return", "episode_length"):
        assert (metrics[name].total, metrics[name].weight) == (2, 1)


def test_collect_keeps_the_columns_of_a_row_together(batch, state, masked_mdp):
    observation, action = np.array(batch.observation), np.array(batch.latent)
    params = state.train.params
    mask = np.array(masked_mdp.action_mask)[observation]
    weight = np.where(mask, np.exp(np.array(logits(params))[observation]), 0)
    policy = weight / weight.sum(axis=1, keepdims=True)
    rows = np.arange(CONFIG.batch_size)
    np.testing.assert_array_equal(batch.action_mask, mask)
    np.testing.assert_allclose(batch.log_probability, np.log(policy[rows, action]), rtol=1e-5)
    np.testing.assert_array_equal(batch.value, params["params"]["value"]["table"][observation, 0])


@pytest.fixture(scope="module")
def one_step_episodes():
    """Parameters of an MLP and a batch that they collected, one step an episode."""
    probe, network = (
        probes.ACTION_AND_OBSERVATION,
        ActorCritic(probes.ACTION.environment.action_space),
    )
    config = ppo.Config(num_environments=5, num_steps=8)
    state = jax.jit(ppo.make(config, probe.environment, network).init)(jax.random.key(0))
    collect = jax.jit(partial(ppo.collect, config, probe.environment, network))
    return network, state.train.params, collect(jax.random.key(1), state)[1]


def test_collect_pairs_the_advantage_with_its_action(one_step_episodes):
    """Where an episode is one step, the advantage is r(o, a) - V(o)."""
    _, _, batch = one_step_episodes
    index = (np.array(batch.observation)[:, 0] > 0).astype(int)
    q = probes.ACTION_AND_OBSERVATION.q[index, np.array(batch.latent)]
    expected = q - np.array(batch.value)
    np.testing.assert_allclose(batch.advantage, expected, rtol=1e-5, atol=1e-6)
    assert len(set(zip(index.tolist(), batch.latent.tolist(), strict=True))) == 4


def test_collect_scores_as_the_first_minibatch_does(one_step_episodes):
    """The first ratio is 1, although a minibatch multiplies other matrices than a rollout."""
    network, params, batch = one_step_episodes
    rows = np.random.default_rng(0).permutation(40)[:10]
    policy, value = jax.jit(partial(network.apply, action_mask=None))(
        params, batch.observation[rows]
    )
    scored = policy.log_probability(batch.latent[rows])
    np.testing.assert_allclose(jnp.exp(scored - batch.log_probability[rows]), 1, atol=1e-5)
    np.testing.assert_allclose(value, batch.value[rows], atol=1e-5)


def test_masked_actions_are_never_taken_and_their_logits_never_move(
    collect, step, network, state, masked_mdp
):
    allowed = np.array(masked_mdp.action_mask)
    # The network itself would always take the forbidden ones.
    wish = tables(np.where(allowed, 0.0, 9.0), np.zeros(NUM_STATES))
    state = state.replace(train=state.train.replace(params=wish))
    _, batch, _ = collect(jax.random.key(2), state)
    assert allowed[np.array(batch.observation), np.array(batch.latent)].all()
    loss = partial(ppo.loss, CONFIG, state.hyperparameters, network)
    gradient = jax.jit(jax.grad(loss, has_aux=True))(wish, batch)[0]
    table = np.array(logits(gradient))
    assert not table[~allowed].any()
    assert table[allowed].any()
    learned, _ = step(jax.random.key(3), state)
    table = np.array(logits(learned.train.params))
    np.testing.assert_array_equal(table[~allowed], 9)


# make


INVALID = [
    ("num_environments", 0),
    ("num_steps", 0),
    ("num_iterations", 0),
    ("num_epochs", 0),
    ("num_minibatches", 0),
    ("num_minibatches", 3),
    ("learning_rate", 0.0),
    ("final_learning_rate", -1e-4),
    ("adam_epsilon", 0.0),
    ("max_gradient_norm", float("inf")),
    ("gamma", 1.01),
    ("gamma", float("nan")),
    ("gae_lambda", -0.1),
    ("clip_epsilon", 0.0),
    ("value_clip_epsilon", -0.2),
    ("value_coefficient", -0.5),
    ("entropy_coefficient", float("nan")),
    ("target_kl", 0.0),
    ("curiosity_coefficient", -1.0),
]


@pytest.mark.parametrize(("field", "value"), INVALID)
def test_make_refuses_a_setting_in_one_line_that_starts_with_its_name(
    field, value, environment, network
):
    config = dataclasses.replace(CONFIG, **{field: value})
    with pytest.raises(ValueError, match=rf"\A{field} is {value}; it must [^\n]+\Z"):
        ppo.make(config, environment, network)


def test_make_refuses_unbounded_actions(environment, network):
    space = Box(shape=(1,), low=-1.0, high=float("inf"))
    unbounded = dataclasses.replace(environment, action_space=space)
    with pytest.raises(ValueError, match=r"\Aenvironment\.action_space is \[[^\n]+\Z"):
        ppo.make(CONFIG, unbounded, network)


def test_hyperparameters_are_read_from_the_state_and_not_from_the_config(algorithm, step, state):
    """A learning rate of 0 in the state leaves the parameters where they are."""
    still = state.hyperparameters.replace(
        learning_rate=jnp.float32(0), final_learning_rate=jnp.float32(0)
    )
    after, _ = step(jax.random.key(4), state.replace(hyperparameters=still))
    chex.assert_trees_all_equal(after.train.params, state.train.params)
    assert {field.name for field in dataclasses.fields(still)} <= set(vars(CONFIG))


def test_init_starts_every_environment_at_step_zero(algorithm):
    state = algorithm.init(jax.random.key(0))
    assert state.train.step == 0
    np.testing.assert_array_equal(state.running.episode_length, np.zeros(8))
    chex.assert_trees_all_equal(state, algorithm.init(jax.random.key(0)))


def test_step_is_a_function_of_its_key(step, algorithm, state):
    first, first_metrics = step(jax.random.key(4), state)
    same, same_metrics = step(jax.random.key(4), state)
    chex.assert_trees_all_equal((first, first_metrics), (same, same_metrics))
    other, _ = step(jax.random.key(5), state)
    assert (logits(first.train.params) != logits(other.train.params)).any()
    eager, eager_metrics = algorithm.step(jax.random.key(4), state)
    chex.assert_trees_all_close(
        (eager, eager_metrics), (first, first_metrics), rtol=1e-4, atol=1e-6
    )
    assert set(first_metrics) == {
        *("episode_return", "episode_length"),
        *("policy_loss", "value_loss", "entropy", "kl"),
    }


def test_step_of_many_seeds_by_vmap_equals_each_seed_alone(algorithm, step):
    keys = jax.random.split(jax.random.key(6), 3)
    states = by_vmap(algorithm.init, jax.random.split(jax.random.key(7), 3))
    together = by_vmap(algorithm.step, keys, states)
    for seed in range(3):
        state, ours = jax.tree.map(lambda leaf, seed=seed: leaf[seed], (states, together))
        chex.assert_trees_all_close(ours, step(keys[seed], state), rtol=1e-4, atol=1e-6)
