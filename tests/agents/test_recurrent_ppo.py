"""Recurrent PPO: what only a memory can learn, what it collects, and what `make` promises."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.agents import ppo, recurrent_ppo
from jaxrl_llm.envs import core
from jaxrl_llm.nn.heads import ActorCritic
from jaxrl_llm.nn.recurrent import RecurrentActorCritic
from jaxrl_llm.types import Box, Discrete, Environment, TimeStep, TrainState
from tests.agents import probes

# Unrolled gradients and whole trainings: minutes of compilation.
pytestmark = pytest.mark.slow

CONFIG = recurrent_ppo.Config(
    num_environments=4, num_steps=5, num_iterations=10, num_minibatches=2, learning_rate=0.01
)


def train(algorithm, num_iterations, key):
    """The final state, and the mean return of the last 20 iterations."""

    @jax.jit
    def run(key):
        init_key, step_key = jax.random.split(key)

        def body(state, step):
            state, metrics = algorithm.step(jax.random.fold_in(step_key, step), state)
            return state, metrics["episode_return"]

        steps = jnp.arange(num_iterations)
        state, returns = jax.lax.scan(body, algorithm.init(init_key), steps)
        return state, jax.tree.map(lambda leaf: jnp.sum(leaf[-20:]), returns).mean

    return run(key)


# Learning

LENGTH = 5


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_step_learns_what_only_a_memory_can(cell):
    config = recurrent_ppo.Config(
        num_environments=32,
        num_steps=2 * LENGTH,
        num_iterations=120,
        learning_rate=0.01,
        gamma=0.9,
        entropy_coefficient=0.0,
    )
    network = RecurrentActorCritic(Discrete(num=2), hidden_sizes=(16,), num_features=16, cell=cell)
    algorithm = recurrent_ppo.make(config, probes.memory(LENGTH), network)
    state, final_return = train(algorithm, config.num_iterations, jax.random.key(0))
    assert final_return > 0.98
    # The value at each step of an episode is what is left of it, whatever the cue.
    cue = jnp.array([-1.0, 1.0])
    observation = jnp.zeros((LENGTH, 2, 2)).at[0, :, 0].set(cue).at[-1, :, 1].set(1.0)
    start = jnp.zeros((LENGTH, 2), bool).at[0].set(True)
    memory = network.empty_memory((2,))
    _, policy, value = recurrent_ppo.forward(
        network, state.train.params, memory, observation, start, None
    )
    expected = np.broadcast_to(0.9 ** np.arange(LENGTH)[::-1, None], (LENGTH, 2))
    np.testing.assert_allclose(value, expected, atol=0.05)
    np.testing.assert_array_equal(policy.mode()[-1], [0, 1])


def test_step_of_ppo_without_a_memory_stays_at_chance():
    config = ppo.Config(
        num_environments=32,
        num_steps=2 * LENGTH,
        num_iterations=120,
        learning_rate=0.01,
        gamma=0.9,
        entropy_coefficient=0.0,
    )
    network = ActorCritic(Discrete(num=2), hidden_sizes=(16,))
    algorithm = ppo.make(config, probes.memory(LENGTH), network)
    _, final_return = train(algorithm, config.num_iterations, jax.random.key(0))
    assert abs(final_return) < 0.15


DOSED = dataclasses.replace(
    probes.CHANCE_TIMEOUT.environment,
    action_space=probes.CONTINUOUS_TIMEOUT.environment.action_space,
)
LIMITED = {
    "death": probes.CONSTANT,
    "timeout": probes.CHANCE_TIMEOUT,
    "timeout, dose": dataclasses.replace(probes.CHANCE_TIMEOUT, environment=DOSED),
}


@pytest.mark.parametrize("probe", LIMITED.values(), ids=LIMITED.keys())
def test_step_bootstraps_a_timeout_and_not_a_death(probe):
    config = recurrent_ppo.Config(
        num_environments=4,
        num_steps=16,
        num_iterations=150,
        learning_rate=0.05,
        gamma=probe.discount,
        max_gradient_norm=10.0,
    )
    network = RecurrentActorCritic(
        probe.environment.action_space, hidden_sizes=(), num_features=4, cell="gru"
    )
    algorithm = recurrent_ppo.make(config, probe.environment, network)
    state, _ = train(algorithm, config.num_iterations, jax.random.key(0))
    observation, start = jnp.array(probe.observation)[None], jnp.ones((1, 1), bool)
    memory = network.empty_memory((1,))
    *_, value = recurrent_ppo.forward(network, state.train.params, memory, observation, start, None)
    np.testing.assert_allclose(value[0], probe.value, rtol=0.02)


# Collection


def counting() -> Environment:
    """Counts from a random number until it is more than 2; every reward is 1."""

    def reset(key, params):
        first = jax.random.uniform(key, (1,), maxval=3.0)
        return first, first

    def step(key, state, action, params):
        return state + 1, TimeStep(
            observation=state + 1,
            reward=jnp.float32(1),
            terminated=(state[0] > 2) & (action == 0),
            truncated=(state[0] > 2) & (action == 1),
            info={},
        )

    return Environment(
        name="counting",
        reset=reset,
        step=step,
        default_params=None,
        observation_space=Box(shape=(1,), low=0.0, high=4.0),
        action_space=Discrete(num=2),
    )


NETWORK: Any = RecurrentActorCritic(Discrete(num=2), hidden_sizes=(), num_features=3)


@pytest.fixture(scope="module")
def environment():
    return counting()


@pytest.fixture(scope="module")
def algorithm(environment):
    return recurrent_ppo.make(CONFIG, environment, NETWORK)


@pytest.fixture(scope="module")
def collect(environment):
    return jax.jit(partial(recurrent_ppo.collect, CONFIG, environment, NETWORK))


@pytest.fixture(scope="module")
def state(algorithm, collect):
    """In the middle of episodes, with memories of them, of a network far from its start."""
    fresh = jax.jit(algorithm.init)(jax.random.key(0))
    leaves, structure = jax.tree.flatten(fresh.train.params)
    random = np.random.default_rng(0)
    drawn = [jnp.array(random.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    train_state = fresh.train.replace(params=jax.tree.unflatten(structure, drawn))
    return collect(jax.random.key(1), fresh.replace(train=train_state))[0]


@pytest.fixture(scope="module")
def collected(collect, state):
    return collect(jax.random.key(2), state)


def one_step(params, memory, observation, start):
    """Memory and value after one step of one environment."""
    memory = jax.tree.map(lambda leaf: leaf[None], memory)
    observation = jnp.asarray(observation, jnp.float32).reshape(1, 1, 1)
    memory, _, value = NETWORK.apply(params, memory, observation, jnp.array([[start]]))
    return jax.tree.map(lambda leaf: leaf[0], memory), float(value[0, 0])


def test_collect_bootstraps_with_the_memory_of_the_episode_that_was_cut(state, collected):
    """Environment by environment, step by step, and the recursion of GAE written out."""
    after, batch, _ = collected
    params, steps = state.train.params, batch.sequences
    gamma, lambda_ = CONFIG.gamma, CONFIG.gae_lambda
    num_truncated = 0
    for place in range(CONFIG.num_environments):
        memory = jax.tree.map(lambda leaf, place=place: leaf[place], state.memory)
        errors, continues = [], []
        for time in range(CONFIG.num_steps):
            observation, action = steps.observation[time, place, 0], steps.latent[time, place]
            memory, value = one_step(params, memory, observation, steps.start[time, place])
            np.testing.assert_allclose(steps.value[time, place], value, atol=1e-5)
            _, next_value = one_step(params, memory, observation + 1, False)
            ended = bool(observation > 2)
            num_truncated += int(ended and action == 1)
            discount = 0.0 if ended and action == 0 else gamma
            errors.append(1 + discount * next_value - value)
            continues.append(0.0 if ended else gamma * lambda_)
        advantage = 0.0
        for time in reversed(range(CONFIG.num_steps)):
            advantage = errors[time] + continues[time] * advantage
            np.testing.assert_allclose(steps.advantage[time, place], advantage, atol=1e-4)
        for leaf, expected in zip(after.memory, memory, strict=True):
            np.testing.assert_allclose(leaf[place], expected, atol=1e-5)
    assert num_truncated > 0
    assert steps.start.any()
    assert not steps.start.all(axis=1).any()


def test_loss_replays_the_rollout_from_the_memory_with_which_it_began(state, collected):
    """Nothing was learned yet, so every ratio is 1 and every value what it was."""
    loss = jax.jit(partial(recurrent_ppo.loss, state.hyperparameters, NETWORK))
    batch = collected[1]
    _, metrics = loss(state.train.params, batch)
    np.testing.assert_allclose(metrics["kl"].mean, 0, atol=1e-10)
    squares = jnp.mean(jnp.square(batch.sequences.advantage)) / 2
    np.testing.assert_allclose(metrics["value_loss"].mean, squares, rtol=1e-4)
    late = jnp.roll(batch.sequences.start, 1, axis=0)
    wrong = batch.replace(sequences=batch.sequences.replace(start=late))
    forgotten = batch.replace(memory=jax.tree.map(jnp.zeros_like, batch.memory))
    for other in (wrong, forgotten):
        assert loss(state.train.params, other)[1]["kl"].mean > 1e-6


def test_update_visits_every_step_once_a_pass(state, collected):
    optimizer, batch = optax.set_to_zero(), collected[1]
    train_state = TrainState(
        params=state.train.params,
        opt_state=optimizer.init(state.train.params),
        step=jnp.int32(0),
    )
    update = jax.jit(
        partial(recurrent_ppo.update, CONFIG, state.hyperparameters, NETWORK, optimizer)
    )
    after, metrics = update(jax.random.key(0), train_state, batch)
    assert after.step == CONFIG.num_epochs * CONFIG.num_minibatches
    squares = float(jnp.sum(jnp.square(batch.sequences.advantage))) / 2
    np.testing.assert_allclose(metrics["value_loss"].total, CONFIG.num_epochs * squares, rtol=1e-4)
    for mean in metrics.values():
        assert mean.weight == CONFIG.num_epochs * CONFIG.batch_size


def test_batch_of_environments_takes_their_sequences_and_their_memory(collected):
    part = collected[1].of_environments(jnp.array([2, 0]))
    np.testing.assert_array_equal(
        part.sequences.observation, collected[1].sequences.observation[:, [2, 0]]
    )
    for leaf, whole in zip(part.memory, collected[1].memory, strict=True):
        np.testing.assert_array_equal(leaf, whole[jnp.array([2, 0])])


def test_masked_actions_are_never_taken(environment):
    def action_mask(state, params):
        return jnp.array([False, True]) ^ (state[0] < 1)

    masked = dataclasses.replace(environment, action_mask=action_mask)
    algorithm = recurrent_ppo.make(CONFIG, masked, NETWORK)
    state = jax.jit(algorithm.init)(jax.random.key(0))
    collect = jax.jit(partial(recurrent_ppo.collect, CONFIG, masked, NETWORK))
    steps = collect(jax.random.key(1), state)[1].sequences
    np.testing.assert_array_equal(steps.latent, steps.observation[..., 0] >= 1)


# make


def test_step_is_a_function_of_its_key_and_reads_the_state_s_hyperparameters(algorithm, state):
    step = jax.jit(algorithm.step)
    first, metrics = step(jax.random.key(3), state)
    again, _ = step(jax.random.key(3), state)
    other, _ = step(jax.random.key(4), state)
    jax.tree.map(np.testing.assert_array_equal, first.train.params, again.train.params)
    kernels = [jax.tree.leaves(after.train.params)[0] for after in (first, other)]
    assert (kernels[0] != kernels[1]).any()
    assert set(metrics) == {
        *("episode_return", "episode_length"),
        *("policy_loss", "value_loss", "entropy", "kl"),
    }
    zero = jnp.float32(0)
    still = state.hyperparameters.replace(learning_rate=zero, final_learning_rate=zero)
    after, _ = step(jax.random.key(3), state.replace(hyperparameters=still))
    jax.tree.map(np.testing.assert_array_equal, after.train.params, state.train.params)


def test_learning_rate_falls_linearly_by_iteration():
    config = dataclasses.replace(CONFIG, final_learning_rate=0.005)
    step = jnp.array([0, 7, 8, 79, 80, 1000])
    rates = jax.vmap(partial(recurrent_ppo.learning_rate, config, config.hyperparameters()))(step)
    np.testing.assert_allclose(rates, [0.01, 0.01, 0.0095, 0.0055, 0.005, 0.005], rtol=1e-5)


INVALID = [
    ("num_environments", 0),
    ("num_steps", 0),
    ("num_minibatches", 3),
    ("learning_rate", 0.0),
    ("final_learning_rate", -1e-4),
    ("gamma", 1.01),
    ("gae_lambda", -0.1),
    ("clip_epsilon", 0.0),
    ("entropy_coefficient", float("nan")),
]


@pytest.mark.parametrize(("field", "value"), INVALID)
def test_make_refuses_a_setting_in_one_line_that_starts_with_its_name(field, value, environment):
    config = dataclasses.replace(CONFIG, **{field: value})
    with pytest.raises(ValueError, match=rf"\A{field} is {value}; it must [^\n]+\Z"):
        recurrent_ppo.make(config, environment, NETWORK)


def test_make_refuses_unbounded_actions(environment):
    space = Box(shape=(1,), low=-1.0, high=float("inf"))
    with pytest.raises(ValueError, match=r"\Aenvironment\.action_space is \[[^\n]+\Z"):
        recurrent_ppo.make(CONFIG, dataclasses.replace(environment, action_space=space), NETWORK)


def test_memory_probe_is_worth_nothing_without_a_memory():
    """The exact return of always acting alike is 0, and of repeating the cue 1."""
    environment = probes.memory(LENGTH)

    def act(memory, noise, observation, action_mask, start):
        memory = jnp.where(start, observation[:, 0], memory)
        return memory, (memory > 0).astype(jnp.int32), {}

    running = core.start_batch(environment, jax.random.key(0), 64)
    _, _, steps = core.rollout_with_memory(
        environment, act, jax.random.key(1), running, jnp.zeros(64), num_steps=2 * LENGTH
    )
    np.testing.assert_array_equal(steps.extras["episode_return"][LENGTH - 1 :: LENGTH], 1)
    constant = core.rollout(
        environment,
        lambda key, observation, mask: (jnp.ones(64, jnp.int32), {}),
        jax.random.key(1),
        running,
        num_steps=LENGTH,
    )[1]
    np.testing.assert_array_equal(constant.extras["episode_return"][-1], running.state[0])
