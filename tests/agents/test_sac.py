"""SAC as a whole: probes, soft optima of discrete actions and doses, masks, timeouts, seeds."""

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.agents import sac
from jaxrl_llm.envs import core, tabular
from jaxrl_llm.nn.critics import QNetwork, StateActionCritic, TwinQ
from jaxrl_llm.nn.heads import Actor, TabularActor, TabularEmbedding
from jaxrl_llm.types import Box, Environment, TimeStep
from tests import oracles
from tests.agents import probes

# Whole trainings: minutes of compilation.
pytestmark = pytest.mark.slow

RATES = ("actor_learning_rate", "critic_learning_rate", "temperature_learning_rate")
SMALL = sac.Config(
    num_environments=8,
    num_steps=4,
    num_updates=8,
    batch_size=128,
    buffer_size=4_000,
    warmup_steps=32,
    tau=0.05,
    learn_temperature=False,
    temperature=0.001,
    gamma=0.9,
    **dict.fromkeys(RATES, 0.005),
)


@jax.jit(static_argnums=(0, 1))
def train(algorithm, num_iterations, key, hyperparameters=None):
    """The final state, and the metrics of each iteration."""
    init_key, steps_key = jax.random.split(key)
    state = algorithm.init(init_key)
    if hyperparameters is not None:
        state = state.replace(hyperparameters=hyperparameters)
    keys = jax.random.split(steps_key, num_iterations)
    return jax.lax.scan(lambda state, key: algorithm.step(key, state), state, keys)


def replace(config, **changes):
    return dataclasses.replace(config, **changes)


# Probes


def learn(probe: Any, num_iterations: int = 150) -> tuple[Any, Any]:
    """The trained actor's policy at the probe's observations, its critics, and its parameters."""
    space, hidden = probe.environment.action_space, (32,)
    actor = Actor(space, hidden, deviation="network")
    continuous = isinstance(space, Box)
    critic = TwinQ(
        StateActionCritic((32, 32)) if continuous else QNetwork(probes.NUM_ACTIONS, hidden)
    )
    algorithm = sac.make(SMALL, probe.environment, actor, critic)
    state, _ = train(algorithm, num_iterations, jax.random.key(0))
    params = state.train.params
    policy = actor.apply(params.actor, jnp.array(probe.observation))
    return policy, partial(critic.apply, params.critic, jnp.array(probe.observation))


@pytest.mark.parametrize(
    "probe", [*probes.PROBES, probes.TIMEOUT], ids=lambda probe: probe.environment.name
)
def test_step_learns_probe(probe):
    policy, critic = learn(probe, 600 if probe is probes.TIMEOUT else 150)
    chosen = np.array(jax.nn.softmax(policy.logits))
    np.testing.assert_allclose(np.sum(chosen * probe.q, axis=1), probe.value, atol=0.02)
    # What is never tried any more is not learned any better.
    q = np.where(chosen > 0.1, critic(), probe.q)
    np.testing.assert_allclose(q, np.broadcast_to(probe.q, q.shape), atol=0.05)


@pytest.mark.parametrize(
    "probe",
    [*probes.CONTINUOUS_PROBES, probes.CONTINUOUS_TIMEOUT],
    ids=lambda probe: probe.environment.name,
)
def test_step_learns_probe_of_doses(probe):
    policy, critic = learn(probe, 600 if probe is probes.CONTINUOUS_TIMEOUT else 200)
    action = policy.action(policy.mode())
    earned = jax.vmap(probe.q)(jnp.array(probe.observation), action)
    np.testing.assert_allclose(earned, probe.value, atol=0.03)
    space = probe.environment.action_space
    low, high = (jnp.broadcast_to(jnp.array(end), action.shape) for end in (space.low, space.high))
    q = critic(2 * (action - low) / (high - low) - 1)
    np.testing.assert_allclose(q, np.broadcast_to(probe.value, q.shape), atol=0.06)


# Soft optima


@pytest.fixture(scope="module")
def tables():
    return TabularActor(2, 2), TwinQ(TabularEmbedding(2, 2))


@pytest.fixture(scope="module")
def two_states(tables):
    config = replace(
        SMALL,
        num_environments=16,
        batch_size=512,
        buffer_size=20_000,
        warmup_steps=64,
        temperature=1.0,
        actor_learning_rate=0.01,
        critic_learning_rate=0.02,
        tau=0.02,
    )
    environment = tabular.make(oracles.two_state_mdp(), max_steps=5)
    return config, sac.make(config, environment, *tables)


def test_step_learns_the_soft_values_of_m2_through_timeouts(two_states, tables):
    """Every episode is cut after five steps, which must not change a value."""
    config, algorithm = two_states
    rates = {"critic_learning_rate": jnp.float32(0.004), "actor_learning_rate": jnp.float32(0.004)}
    first = config.hyperparameters()
    state, _ = train(algorithm, 400, jax.random.key(0), first)
    state = state.replace(hyperparameters=first.replace(**rates))
    keys = jax.random.split(jax.random.key(1), 200)
    state, _ = jax.jit(partial(jax.lax.scan, lambda state, key: algorithm.step(key, state)))(
        state, keys
    )
    actor, critic = tables
    q: Any = critic.apply(state.train.params.critic, jnp.arange(2))
    np.testing.assert_allclose(q, np.broadcast_to(oracles.M2_SOFT_Q, q.shape), atol=0.1)
    law: Any = actor.apply(state.train.params.actor, jnp.arange(2))
    policy = jax.nn.softmax(law.logits)
    greedy = policy[jnp.arange(2), jnp.array([1, 0])]
    np.testing.assert_allclose(greedy, oracles.M2_SOFT_GREEDY_PROBABILITY, atol=0.02)


def bandit() -> Environment:
    """One dose in [-1, 1], r = -4 (a - .5)^2."""

    def step(key, state, action, params):
        reward = -4 * jnp.square(action[0] - 0.5)
        return state, TimeStep(
            observation=state,
            reward=reward,
            terminated=jnp.bool_(True),
            truncated=jnp.bool_(False),
            info={},
        )

    return Environment(
        name="one dose",
        reset=lambda key, params: (jnp.zeros(1), jnp.zeros(1)),
        step=step,
        default_params=None,
        observation_space=Box(shape=(1,), low=-1.0, high=1.0),
        action_space=Box(shape=(1,), low=-1.0, high=1.0),
    )


def soft_value_of_squashed_gaussian(mean, deviation):
    """E[r - log pi] at temperature 1, by quadrature over u in NumPy; also E[a]."""
    z = np.linspace(-8, 8, 4001)
    weight = np.exp(-0.5 * z**2)
    weight /= weight.sum()
    u = mean + deviation * z
    slope = 2 * (np.log(2) - u - np.logaddexp(0, -2 * u))
    log_probability = -0.5 * z**2 - np.log(deviation) - 0.5 * np.log(2 * np.pi) - slope
    action = np.tanh(u)
    return weight @ (-4 * (action - 0.5) ** 2 - log_probability), weight @ action


def test_step_learns_the_best_squashed_gaussian_of_a_dose():
    config = replace(
        SMALL, temperature=1.0, batch_size=256, actor_learning_rate=0.003, num_updates=16
    )
    environment = bandit()
    actor = Actor(environment.action_space, (16,), deviation="network")
    critic = TwinQ(StateActionCritic((64, 64)))
    algorithm = sac.make(config, environment, actor, critic)
    state, metrics = train(algorithm, 200, jax.random.key(0))
    params = state.train.params
    law: Any = actor.apply(params.actor, jnp.zeros((1, 1)))
    learned, mean_action = soft_value_of_squashed_gaussian(
        float(law.mean[0, 0]), float(jnp.exp(law.log_deviation[0, 0]))
    )
    grid = [
        soft_value_of_squashed_gaussian(mean, deviation)
        for mean in np.linspace(0.2, 1.2, 51)
        for deviation in np.linspace(0.2, 1.4, 61)
    ]
    best, best_action = max(grid)
    # No squashed Gaussian is the soft optimum, whose value and mean action are these.
    optimum, optimal_action = -0.202709, 0.443700
    assert best < optimum
    assert best > optimum - 0.05
    assert abs(best_action - optimal_action) < 0.03
    assert best - 0.01 < learned <= best + 1e-3
    np.testing.assert_allclose(mean_action, best_action, atol=0.05)
    action = jnp.linspace(-0.4, 0.95, 28)[:, None]
    q: Any = critic.apply(params.critic, jnp.zeros((28, 1)), action)
    reward = -4 * jnp.square(action[:, 0] - 0.5)
    np.testing.assert_allclose(q, np.broadcast_to(reward, q.shape), atol=0.12)
    late = np.mean(np.array(metrics["actor_loss"].mean)[-50:])
    np.testing.assert_allclose(-late, learned, atol=0.05)


# The temperature


def test_temperature_brings_the_entropy_of_discrete_actions_to_its_target(tables):
    config = replace(
        SMALL,
        batch_size=256,
        temperature=1.0,
        learn_temperature=True,
        target_entropy_share=0.25,
        temperature_learning_rate=0.02,
        actor_learning_rate=0.02,
        critic_learning_rate=0.02,
    )
    environment = tabular.make(oracles.two_state_mdp(), max_steps=5)
    state, metrics = train(sac.make(config, environment, *tables), 500, jax.random.key(0))
    entropy = np.array(metrics["entropy"].mean)
    np.testing.assert_allclose(entropy[-50:].mean(), 0.25 * np.log(2), atol=0.02)
    assert np.array(metrics["temperature"].mean)[-1] < 0.9
    assert state.train.params.log_temperature < 0


def test_temperature_brings_the_entropy_of_doses_to_its_target():
    config = replace(
        SMALL,
        learn_temperature=True,
        temperature=0.2,
        target_entropy=-1.0,
        temperature_learning_rate=0.01,
    )
    environment = probes.CONTINUOUS_OBSERVATION.environment
    actor = Actor(environment.action_space, (32,), deviation="network")
    algorithm = sac.make(config, environment, actor, TwinQ(StateActionCritic((32, 32))))
    _, metrics = train(algorithm, 500, jax.random.key(0))
    entropy = np.array(metrics["entropy"].mean)
    np.testing.assert_allclose(entropy[-50:].mean(), -2.0, atol=0.1)  # two doses


# Masks, and what `make` promises

NUM_STATES, NUM_ACTIONS = 6, 4


@pytest.fixture(scope="module")
def masked():
    mdp = oracles.random_mdp(0, NUM_STATES, NUM_ACTIONS, 0.9, masked=True)
    actor, critic = (
        TabularActor(NUM_STATES, NUM_ACTIONS),
        TwinQ(TabularEmbedding(NUM_STATES, NUM_ACTIONS)),
    )
    config = replace(SMALL, temperature=0.1)
    algorithm = sac.make(config, tabular.make(mdp, max_steps=7), actor, critic)
    step = jax.jit(algorithm.step)
    return mdp, algorithm, step, jax.jit(algorithm.init)(jax.random.key(0))


def test_masked_actions_are_never_taken_and_their_values_never_matter(masked):
    """The actor wishes for what is forbidden, and the critics promise a fortune for it."""
    mdp, _, step, state = masked
    allowed = np.array(mdp.action_mask)
    tempting = jnp.array(np.where(allowed, 0.0, 1e3), jnp.float32)
    params = sac.Parameters(
        actor={"params": {"policy": {"table": tempting}}},
        critic={"params": {name: {"table": tempting} for name in ("first", "second")}},
        log_temperature=jnp.float32(0),
    )
    train = state.train.replace(params=params)
    after, metrics = step(jax.random.key(1), state.replace(train=train, target=params))
    replay = jax.tree.map(np.array, after.replay)
    filled = slice(int(replay.current_index))
    rows = jax.tree.map(lambda leaf: leaf[0, filled], replay.experience)
    assert len(rows.action) == SMALL.num_environments * (SMALL.warmup_steps + SMALL.num_steps)
    assert allowed[rows.observation.observation, rows.action].all()
    assert len(np.unique(rows.action)) == NUM_ACTIONS
    for seen in (rows.observation, rows.next_observation):
        np.testing.assert_array_equal(seen.action_mask, allowed[seen.observation])
    assert rows.truncated.any()
    assert not (rows.truncated & rows.terminated).any()
    assert metrics["critic_loss"].mean < 100
    learned = np.array(after.train.params.actor["params"]["policy"]["table"])
    np.testing.assert_array_equal(learned[~allowed], 1e3)


def test_step_is_a_function_of_its_key_and_of_the_hyperparameters(masked):
    _, algorithm, step, state = masked
    first, metrics = step(jax.random.key(4), state)
    chex.assert_trees_all_equal((first, metrics), step(jax.random.key(4), state))
    assert set(metrics) == {
        *("episode_return", "episode_length"),
        *("critic_loss", "actor_loss", "temperature", "entropy"),
    }
    assert first.train.step == SMALL.num_updates
    eager, _ = algorithm.step(jax.random.key(4), state)
    chex.assert_trees_all_close(eager.train.params, first.train.params, rtol=1e-4, atol=1e-6)
    still = state.hyperparameters.replace(**dict.fromkeys(RATES, jnp.float32(0)))
    unmoved, _ = step(jax.random.key(4), state.replace(hyperparameters=still))
    chex.assert_trees_all_equal(unmoved.train.params, state.train.params)


def test_step_of_many_seeds_by_vmap_equals_each_seed_alone(masked):
    _, algorithm, step, _ = masked
    with jax.debug_key_reuse(False):  # the check takes keys of a scan under vmap for used ones
        states = jax.jit(jax.vmap(algorithm.init))(jax.random.split(jax.random.key(7), 3))
        keys = jax.random.split(jax.random.key(6), 3)
        together = jax.jit(jax.vmap(algorithm.step))(keys, states)
    for seed in range(3):
        state, ours = jax.tree.map(lambda leaf, seed=seed: leaf[seed], (states, together))
        alone = step(keys[seed], state)
        chex.assert_trees_all_close(
            (ours[0].train.params, ours[1]),
            (alone[0].train.params, alone[1]),
            rtol=1e-4,
            atol=1e-6,
        )


def test_adapt_scales_doses_and_keeps_the_observation_before_a_reset():
    environment = sac.adapt(probes.CONTINUOUS_OBSERVATION.environment)
    running = core.start_batch(environment, jax.random.key(0), 4)
    ends = jnp.array([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [0.5, -0.5]])
    keys = jax.random.split(jax.random.key(1), 4)
    _, time_step = jax.vmap(environment.step, in_axes=(0, 0, 0, None))(
        keys, running.state, ends, None
    )
    doses = np.array([[-1, 0], [2, 4], [0.5, 2], [1.25, 1]])
    observation = np.array(running.observation.observation)[:, 0]
    expected = -((doses[:, 0] - 0.5 - observation / 2) ** 2)
    expected -= ((doses[:, 1] - 2 - observation) / 2) ** 2
    np.testing.assert_allclose(time_step.reward, expected, atol=1e-5)
    assert time_step.observation.action_mask is None
