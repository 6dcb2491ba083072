"""A2C: its loss in NumPy, staleness to the bit, probes with every kind of action, and promises."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.agents import a2c
from jaxrl_llm.envs import tabular
from jaxrl_llm.nn.heads import ActorCritic, TabularActorCritic
from jaxrl_llm.types import Box, Discrete, TrainState, Transition
from tests import oracles
from tests.agents import probes
from tests.agents.tables import logits, random_tables, tables

NUM_STATES, NUM_ACTIONS = 4, 3
NETWORK: Any = TabularActorCritic(NUM_STATES, NUM_ACTIONS)
CONFIG = a2c.Config(
    num_environments=3,
    num_steps=5,
    num_iterations=8,
    learning_rate=0.05,
    gamma=0.9,
    gae_lambda=0.8,
    entropy_coefficient=0.05,
)


@pytest.fixture(scope="module")
def environment():
    mdp = oracles.random_mdp(0, NUM_STATES, NUM_ACTIONS, 0.9, masked=True)
    return tabular.make(mdp, max_steps=4)


# The loss


@pytest.fixture(scope="module")
def steps():
    """Random rows; some end by a death, some by a timeout, and some actions are masked."""
    random, shape = np.random.default_rng(0), (CONFIG.num_steps, CONFIG.num_environments)
    ends = random.random(shape) < 0.4
    terminated = ends & (random.random(shape) < 0.5)
    assert terminated.any()
    assert (ends & ~terminated).any()
    action = random.integers(NUM_ACTIONS, size=shape)
    mask = random.random((*shape, NUM_ACTIONS)) < 0.6
    return Transition(
        observation=jnp.array(random.integers(NUM_STATES, size=shape)),
        action=jnp.array(action),
        reward=jnp.array(random.normal(size=shape), jnp.float32),
        terminated=jnp.array(terminated),
        truncated=jnp.array(ends & ~terminated),
        next_observation=jnp.array(random.integers(NUM_STATES, size=shape)),
        extras={
            "latent": jnp.array(action),
            "action_mask": jnp.array(mask | np.eye(NUM_ACTIONS, dtype=bool)[action]),
            "episode_return": jnp.array(random.normal(size=shape), jnp.float32),
            "episode_length": jnp.ones(shape, jnp.int32),
        },
    )


def numpy_loss(config, params, steps):
    """The total from tables, a trajectory at a time; float64."""
    table, value = np.asarray(logits(params), float), params["params"]["value"]["table"]
    value, rows = np.asarray(value, float)[:, 0], jax.tree.map(np.asarray, steps)
    policy_loss, value_loss, entropy, following = [], [], [], 0.0
    for b in range(rows.reward.shape[1]):
        for t in reversed(range(rows.reward.shape[0])):
            s, a = rows.observation[t, b], rows.action[t, b]
            discount = config.gamma * (1 - rows.terminated[t, b])
            if t == config.num_steps - 1 or rows.terminated[t, b] or rows.truncated[t, b]:
                following = 0.0
            delta = rows.reward[t, b] + discount * value[rows.next_observation[t, b]] - value[s]
            following = delta + discount * config.gae_lambda * following
            weight = np.exp(table[s]) * rows.extras["action_mask"][t, b]
            policy = weight / weight.sum()
            log_policy = np.log(np.where(policy > 0, policy, 1))
            policy_loss.append(-log_policy[a] * following)
            value_loss.append(following**2 / 2)
            entropy.append(-np.sum(policy * log_policy))
    return {
        "policy_loss": np.mean(policy_loss),
        "value_loss": np.mean(value_loss),
        "entropy": np.mean(entropy),
    }


def test_loss_matches_numpy(steps):
    params, hyperparameters = random_tables(0, NUM_STATES, NUM_ACTIONS), CONFIG.hyperparameters()
    loss = jax.jit(partial(a2c.loss, CONFIG, hyperparameters, NETWORK))
    total, metrics = loss(params, steps)
    expected = numpy_loss(CONFIG, params, steps)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name].mean, value, rtol=1e-5)
    combined = (
        expected["policy_loss"]
        + CONFIG.value_coefficient * expected["value_loss"]
        - CONFIG.entropy_coefficient * expected["entropy"]
    )
    np.testing.assert_allclose(total, combined, rtol=1e-5)
    eager, _ = a2c.loss(CONFIG, hyperparameters, NETWORK, params, steps)
    np.testing.assert_allclose(eager, total, rtol=1e-5)


# The optimiser


@pytest.mark.parametrize("name", ["rmsprop", "adam"])
def test_make_optimizer_clips_and_decays(name):
    """Three steps in NumPy, of gradients above and below the limit."""
    config = dataclasses.replace(CONFIG, optimizer=name, final_learning_rate=0.01)
    gradients, first, second = [[3.0, -4.0], [0.1, 0.0], [-5.0, 12.0]], np.zeros(2), np.zeros(2)
    opt_state = a2c.make_optimizer(config, config.hyperparameters(), jnp.int32(0)).init(jnp.ones(2))
    for step, raw in enumerate(gradients):
        gradient = np.array(raw) * min(1, 0.5 / np.linalg.norm(raw))
        rate = 0.05 + step / 8 * (0.01 - 0.05)
        if name == "adam":
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            mean, square = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            expected = -rate * mean / (np.sqrt(square) + 1e-5)
        else:
            second = 0.99 * second + 0.01 * gradient**2
            expected = -rate * gradient / np.sqrt(second + 1e-5)
        optimizer = a2c.make_optimizer(config, config.hyperparameters(), jnp.int32(step))
        updates, opt_state = optimizer.update(jnp.array(raw), opt_state, jnp.ones(2))
        chex.assert_trees_all_close(updates, jnp.array(expected), rtol=1e-4)


# Staleness


def step_key(number):
    """The same bits each time, as another key to JAX's check of reuse."""
    return jax.random.fold_in(jax.random.key(1), number)


def plain_step(environment, key, train, running, hyperparameters):
    """A2C without any notion of staleness."""
    state = a2c.State(train=train, history=None, running=running, hyperparameters=hyperparameters)
    running, steps = a2c.collect(CONFIG, environment, NETWORK, key, state)
    loss = partial(a2c.loss, CONFIG, hyperparameters, NETWORK)
    gradient, metrics = jax.grad(loss, has_aux=True)(train.params, steps)
    optimizer = a2c.make_optimizer(CONFIG, hyperparameters, train.step)
    updates, opt_state = optimizer.update(gradient, train.opt_state, train.params)
    params = optax.apply_updates(train.params, updates)
    train = TrainState(params=params, opt_state=opt_state, step=train.step + 1)
    return train, running, metrics


@pytest.mark.slow
def test_staleness_0_is_a2c_to_the_bit(environment):
    """The arithmetic of both programs is the same, operation by operation, and its results too."""
    algorithm = a2c.make(CONFIG, environment, NETWORK)
    state = jax.jit(algorithm.init)(jax.random.key(0))
    assert state.history is None
    train, running = state.train, state.running
    step, plain = jax.jit(algorithm.step), jax.jit(partial(plain_step, environment))
    for number in range(12):
        state, ours = step(step_key(number), state)
        train, running, metrics = plain(step_key(number), train, running, state.hyperparameters)
        chex.assert_trees_all_equal((state.train, state.running), (train, running))
        chex.assert_trees_all_equal({name: ours[name] for name in metrics}, metrics)
    assert (logits(train.params) != 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [1, 3])
def test_staleness_acts_and_differentiates_at_the_parameters_of_so_many_updates_ago(
    environment, staleness
):
    config = dataclasses.replace(CONFIG, staleness=staleness)
    algorithm = a2c.make(config, environment, NETWORK)
    step, state = jax.jit(algorithm.step), jax.jit(algorithm.init)(jax.random.key(0))
    collect = jax.jit(partial(a2c.collect, CONFIG, environment, NETWORK))
    gradient = jax.jit(
        jax.grad(partial(a2c.loss, CONFIG, CONFIG.hyperparameters(), NETWORK), has_aux=True)
    )
    newest = [state.train.params]
    for number in range(2 * staleness + 2):
        old = newest[max(number - staleness, 0)]
        chex.assert_trees_all_equal(a2c.stale_params(config, state), old)
        acting = dataclasses.replace(state, train=dataclasses.replace(state.train, params=old))
        running, steps = collect(step_key(number), acting)
        optimizer = a2c.make_optimizer(config, state.hyperparameters, state.train.step)
        updates, opt_state = optimizer.update(gradient(old, steps)[0], state.train.opt_state)
        params = optax.apply_updates(state.train.params, updates)
        state, _ = step(step_key(number), state)
        chex.assert_trees_all_close(
            (state.train.params, state.train.opt_state, state.running),
            (params, opt_state, running),
            rtol=1e-4,
            atol=1e-6,
        )
        newest.append(state.train.params)


# Learning


@jax.jit(static_argnums=(0, 1))
def train(algorithm, num_iterations, key):
    init_key, steps_key = jax.random.split(key)
    keys = jax.random.split(steps_key, num_iterations)
    return jax.lax.scan(lambda s, k: algorithm.step(k, s), algorithm.init(init_key), keys)[0]


def learn(probe, **options: Any):
    """Policy and value of a trained network wherever the probe's agent may be."""
    settings: dict[str, Any] = {
        "num_environments": 32,
        "num_steps": 4,
        "num_iterations": 500,
        "optimizer": "adam",
        "learning_rate": 0.02,
        "gamma": probe.discount,
        "gae_lambda": 0.9,
        "entropy_coefficient": 0.0,
        **options,
    }
    config = a2c.Config(**settings)
    network: Any = ActorCritic(action_space=probe.environment.action_space, hidden_sizes=(16,))
    algorithm = a2c.make(config, probe.environment, network)
    learned = train(algorithm, config.num_iterations, jax.random.key(0))
    return network.apply(learned.train.params, jnp.array(probe.observation))


def assert_right(probe, policy, value):
    np.testing.assert_allclose(value, probe.value, atol=0.02)
    earned = np.sum(jax.nn.softmax(policy.logits) * probe.q, axis=1)
    np.testing.assert_allclose(earned, probe.value, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("probe", probes.PROBES, ids=lambda probe: probe.environment.name)
def test_step_learns_probe(probe):
    assert_right(probe, *learn(probe))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"optimizer": "rmsprop"}, {"staleness": 4}, {"whiten_advantages": True}], ids=str
)
def test_step_learns_probe_with_every_option(options):
    assert_right(probes.ACTION_AND_OBSERVATION, *learn(probes.ACTION_AND_OBSERVATION, **options))


@pytest.mark.slow
@pytest.mark.parametrize(
    "probe",
    [probes.CONTINUOUS_OBSERVATION, probes.CONTINUOUS_DELAY, probes.HYBRID_OBSERVATION],
    ids=lambda probe: probe.environment.name,
)
def test_step_learns_probe_of_doses(probe):
    policy, _ = learn(probe, num_environments=128)
    np.testing.assert_allclose(probe.earned(policy.action(policy.mode())), probe.value, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "probe",
    [probes.TIMEOUT, probes.CONTINUOUS_TIMEOUT, probes.HYBRID_TIMEOUT],
    ids=["discrete", "dose", "hybrid"],
)
def test_step_bootstraps_a_timeout(probe):
    _, value = learn(probe, learning_rate=0.1, num_iterations=300)
    np.testing.assert_allclose(value, probe.value, rtol=2e-3)


# Promises


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_environments", 0),
        ("num_steps", 0),
        ("num_iterations", 0),
        ("optimizer", "sgd"),
        ("optimizer_epsilon", 0.0),
        ("learning_rate", 0.0),
        ("max_gradient_norm", 0.0),
        ("final_learning_rate", -1.0),
        ("value_coefficient", -1.0),
        ("entropy_coefficient", -1.0),
        ("rmsprop_decay", 1.5),
        ("gamma", 1.5),
        ("gae_lambda", -0.5),
        ("staleness", -1),
    ],
)
def test_make_refuses_a_setting_in_one_line_that_starts_with_its_name(field, value, environment):
    config = dataclasses.replace(CONFIG, **{field: value})
    with pytest.raises(ValueError, match=rf"\A{field} is {value!r}; it must [^\n]+\Z"):
        a2c.make(config, environment, NETWORK)


def test_make_refuses_an_unbounded_action_space(environment):
    unbounded = dataclasses.replace(
        environment, action_space=Box(shape=(1,), low=-1.0, high=np.inf)
    )
    with pytest.raises(ValueError, match=r"\Aenvironment\.action_space is \[-1\.0, inf\]"):
        a2c.make(CONFIG, unbounded, NETWORK)


@pytest.mark.slow
def test_update_counts_the_episodes_that_ended(steps):
    state = a2c.init(CONFIG, NETWORK, jax.random.key(0), Discrete(num=NUM_STATES), steps)
    _, metrics = jax.jit(partial(a2c.update, CONFIG, NETWORK))(state, steps)
    ended = np.asarray(steps.terminated | steps.truncated)
    assert metrics["episode_length"].weight == ended.sum()
    total = np.asarray(steps.extras["episode_return"])[ended].sum()
    np.testing.assert_allclose(metrics["episode_return"].total, total, rtol=1e-5)


@pytest.mark.slow
def test_step_obeys_masks_and_maps_over_seeds_and_hyperparameters(environment):
    config = dataclasses.replace(CONFIG, staleness=2)
    algorithm = a2c.make(config, environment, NETWORK)
    step, state = jax.jit(algorithm.step), jax.jit(algorithm.init)(jax.random.key(0))
    allowed = np.asarray(environment.default_params.action_mask)
    # The network itself would always take the forbidden ones.
    wish = tables(np.where(allowed, 0.0, 9.0), np.zeros(NUM_STATES))
    wish_state = dataclasses.replace(
        state,
        train=dataclasses.replace(state.train, params=wish),
        history=jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), wish),
    )
    _, taken = a2c.collect(config, environment, NETWORK, jax.random.key(1), wish_state)
    assert allowed[np.asarray(taken.observation), np.asarray(taken.action)].all()
    after, _ = step(jax.random.key(1), wish_state)
    np.testing.assert_array_equal(logits(after.train.params)[~allowed], 9)
    chex.assert_trees_all_equal(after, step(jax.random.key(1), wish_state)[0])
    # A sweep: the same state with other discounts, mapped.
    gammas, keys = jnp.array([0.1, 0.9]), jax.random.split(jax.random.key(2), 2)
    swept = with_gamma(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state), gammas)
    with jax.debug_key_reuse(False):
        together, _ = jax.jit(jax.vmap(algorithm.step))(keys, swept)
    for place, gamma in enumerate(gammas):
        ours = jax.tree.map(lambda leaf, place=place: leaf[place], together)
        alone, _ = step(keys[place], with_gamma(state, gamma))
        chex.assert_trees_all_close(ours, alone, rtol=1e-4, atol=1e-6)


def with_gamma(state, gamma):
    hyperparameters = dataclasses.replace(state.hyperparameters, gamma=gamma)
    return dataclasses.replace(state, hyperparameters=hyperparameters)
