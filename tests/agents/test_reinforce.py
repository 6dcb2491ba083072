"""REINFORCE: the exact policy gradient, what baselines do to its variance, probes, and cuts."""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxrl_llm.agents import reinforce
from jaxrl_llm.envs import tabular
from jaxrl_llm.nn.heads import ActorCritic, TabularActorCritic
from jaxrl_llm.types import Box, Discrete, Mean, Transition
from tests import oracles
from tests.agents import probes
from tests.agents.tables import logits, random_tables, tables

NETWORK: Any = TabularActorCritic(2, 2)


# The policy gradient

# M2, uniform policy, start in state 0: V solves its linear system, and dJ/dlogits(s, a) is
# d(s) pi(a | s) (Q(s, a) - V(s)) with the discounted occupancy d (Sutton et al. 2000, theorem 1).
UNIFORM_VALUE = np.linalg.solve(
    np.eye(2) - oracles.M2_DISCOUNT * oracles.M2_TRANSITION.mean(axis=1),
    oracles.M2_REWARD.mean(axis=1),
)
M2_POLICY_GRADIENT = np.array([-1.783607, 1.783607, 1.986325, -1.986325])
# gamma^120 = 3e-6: what the cut leaves out is below 1e-4 of the gradient.
M2_CONFIG = reinforce.Config(
    num_environments=4096, num_steps=120, gamma=oracles.M2_DISCOUNT, baseline_value=6.0
)


def test_policy_gradient_of_m2_is_the_theorems():
    gamma, transition = oracles.M2_DISCOUNT, oracles.M2_TRANSITION
    q = oracles.M2_REWARD + gamma * transition @ UNIFORM_VALUE
    start = np.array([1.0, 0])
    occupancy = np.linalg.solve(np.eye(2) - gamma * transition.mean(axis=1).T, start)
    gradient = occupancy[:, None] * (q - UNIFORM_VALUE[:, None]) / 2
    np.testing.assert_allclose(gradient.ravel(), M2_POLICY_GRADIENT, atol=1e-6)


@pytest.fixture(scope="module")
def m2_steps():
    """4096 episodes of the uniform policy on M2, from state 0."""
    environment = tabular.make(oracles.two_state_mdp())
    state = m2_state("none")
    collect = jax.jit(partial(reinforce.collect, M2_CONFIG, environment, NETWORK))
    return collect(jax.random.key(0), state)


def m2_state(baseline):
    """A learner with the uniform policy, its exact value, and their mean as moving average."""
    config = dataclasses.replace(M2_CONFIG, baseline=baseline)
    state = reinforce.init(config, NETWORK, jax.random.key(0), Discrete(num=2))
    params = tables(np.zeros((2, 2)), UNIFORM_VALUE)
    average = Mean(total=jnp.float32(UNIFORM_VALUE.mean() / 2), weight=jnp.float32(0.5))
    train = dataclasses.replace(state.train, params=params)
    return dataclasses.replace(state, train=train, average=average)


@pytest.fixture(scope="module")
def m2_gradients(m2_steps):
    """What each episode says of dJ/dlogits, `[4096, 4]`, by baseline."""
    found = {}
    for baseline in reinforce.BASELINES:
        config = dataclasses.replace(M2_CONFIG, baseline=baseline)
        gradients = jax.jit(partial(reinforce.policy_gradients, config, NETWORK))
        found[baseline] = np.asarray(gradients(m2_state(baseline), m2_steps), np.float64)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("baseline", reinforce.BASELINES)
def test_policy_gradients_average_to_the_exact_gradient(m2_gradients, baseline):
    of_logits, of_value = np.split(m2_gradients[baseline], [4], axis=1)
    error = of_logits.std(axis=0, ddof=1) / np.sqrt(len(of_logits))
    assert (np.abs(of_logits.mean(axis=0) - M2_POLICY_GRADIENT) < 3 * error).all()
    assert (error < 0.1).all()
    np.testing.assert_array_equal(of_value, 0)


@pytest.mark.slow
def test_policy_gradients_vary_less_with_a_better_baseline(m2_gradients):
    variance = {name: gradients.var(axis=0).sum() for name, gradients in m2_gradients.items()}
    assert variance["value"] < variance["moving_average"] < variance["constant"]
    # Measured 145, 11.7, 8.9 and 8.6.
    assert variance["none"] > 10 * variance["constant"]
    assert variance["none"] > 15 * variance["value"]


# The loss


def random_steps(seed, num_states, num_actions, shape):
    """Steps in random states, of episodes that start together and end at random."""
    random = np.random.default_rng(seed)
    ends = random.random(shape) < 0.3
    terminated = ends & (random.random(shape) < 0.5)
    length = np.zeros(shape, np.int32)
    for time in range(shape[0]):
        length[time] = 1 if time == 0 else np.where(ends[time - 1], 1, length[time - 1] + 1)
    state, following, action = (
        jnp.array(random.integers(num, size=shape)) for num in (num_states, num_states, num_actions)
    )
    return Transition(
        observation=state,
        action=action,
        reward=jnp.array(random.normal(size=shape), jnp.float32),
        terminated=jnp.array(terminated),
        truncated=jnp.array(ends & ~terminated),
        next_observation=following,
        extras={
            "latent": action,
            "episode_length": jnp.array(length),
            "episode_return": jnp.array(random.normal(size=shape), jnp.float32),
        },
    )


def numpy_loss(config, average, params, steps):
    """The loss from tables, column by column and step by step, and the mean return-to-go."""
    table, value = (
        np.asarray(leaf, np.float64)
        for leaf in (logits(params), params["params"]["value"]["table"])
    )
    log_policy = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    value, gamma = value[:, 0], config.gamma
    num_steps, num_episodes = steps.reward.shape
    total, errors, weighted = 0.0, [], []
    for b in range(num_episodes):
        ended = np.asarray(steps.terminated | steps.truncated)[:, b]
        length = int(np.argmax(ended)) + 1 if ended.any() else num_steps
        following = 0.0
        if config.baseline == "value" and not steps.terminated[length - 1, b]:
            following = value[steps.next_observation[length - 1, b]]
        for t in reversed(range(length)):
            following = float(steps.reward[t, b]) + gamma * following
            s, a = int(steps.observation[t, b]), int(steps.action[t, b])
            baseline = {
                "none": 0.0,
                "constant": config.baseline_value,
                "moving_average": average,
                "value": value[s],
            }[config.baseline]
            total -= gamma**t * (following - baseline) * log_policy[s, a]
            entropy = -np.sum(np.exp(log_policy[s]) * log_policy[s])
            total -= config.entropy_coefficient * entropy
            errors.append((value[s] - following) ** 2 / 2)
            weighted.append((gamma**t, following))
    total /= num_episodes
    if config.baseline == "value":
        total += config.value_coefficient * np.mean(errors)
    weight, return_ = np.array(weighted).T
    return total, np.average(return_, weights=weight)


@pytest.fixture(scope="module")
def steps():
    """Some of its episodes terminate, some are truncated, some are cut by the last row."""
    steps = random_steps(1, 3, 2, (6, 12))
    first = reinforce.first_episode(steps)
    assert (first & steps.terminated).any()
    assert (first & steps.truncated).any()
    assert (first & ~steps.terminated & ~steps.truncated)[-1].any()
    return steps


CONFIG = reinforce.Config(
    num_environments=12,
    num_steps=6,
    gamma=0.8,
    baseline_value=0.3,
    entropy_coefficient=0.1,
    value_coefficient=0.7,
    learning_rate=0.1,
)
TABLES: Any = TabularActorCritic(3, 2)


def learner(config, average=0.25):
    """At random parameters, with a moving average."""
    state = reinforce.init(config, TABLES, jax.random.key(0), Discrete(num=3))
    train = dataclasses.replace(state.train, params=random_tables(0, 3, 2))
    weight = jnp.float32(0.5)
    average = Mean(total=average * weight, weight=weight)
    return dataclasses.replace(state, train=train, average=average)


@cache
def compiled_gradient(baseline):
    """`(state, params, steps) -> ((loss, metrics), gradient)` of CONFIG with another baseline."""
    config = dataclasses.replace(CONFIG, baseline=baseline)
    loss = partial(reinforce.loss, config, TABLES)
    return jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True))


@pytest.mark.parametrize(
    "baseline",
    [
        pytest.param("none", marks=pytest.mark.slow),
        pytest.param("constant", marks=pytest.mark.slow),
        "moving_average",
        "value",
    ],
)
def test_loss_matches_numpy(steps, baseline):
    config = dataclasses.replace(CONFIG, baseline=baseline)
    state = learner(config)
    (total, metrics), _ = compiled_gradient(baseline)(state, state.train.params, steps)
    expected, return_to_go = numpy_loss(config, 0.25, state.train.params, steps)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["return_to_go"].mean, return_to_go, rtol=1e-5)


def test_loss_ignores_what_follows_the_first_episode(steps):
    state = learner(CONFIG)
    reward = np.asarray(steps.reward) + np.where(reinforce.first_episode(steps), 0.0, 9.0)
    other = dataclasses.replace(steps, reward=jnp.asarray(reward))
    gradient = compiled_gradient("value")
    chex.assert_trees_all_equal(
        gradient(state, state.train.params, steps), gradient(state, state.train.params, other)
    )


@pytest.mark.slow
def test_policy_gradients_average_to_the_gradient_of_the_loss(steps):
    state = learner(CONFIG)
    nothing = jnp.float32(0)
    plain = dataclasses.replace(
        state.hyperparameters, entropy_coefficient=nothing, value_coefficient=nothing
    )
    whole = compiled_gradient("value")(
        dataclasses.replace(state, hyperparameters=plain), state.train.params, steps
    )[1]
    each = jax.jit(partial(reinforce.policy_gradients, CONFIG, TABLES))(state, steps)
    assert each.shape == (12, 9)
    np.testing.assert_allclose(-each.mean(axis=0), ravel_pytree(whole)[0], rtol=1e-4, atol=1e-6)


def test_update_keeps_a_debiased_average_of_earlier_returns(steps):
    """The first average is the first mean, and a baseline never knows the batch it is used on."""
    config = dataclasses.replace(CONFIG, baseline="moving_average", baseline_decay=0.75)
    state = reinforce.init(config, TABLES, jax.random.key(0), Discrete(num=3))
    assert state.average.mean == 0
    update = jax.jit(partial(reinforce.update, config, TABLES))
    state, metrics = update(state, steps)
    first = metrics["return_to_go"].mean
    np.testing.assert_allclose(state.average.mean, first, rtol=1e-6)
    doubled = dataclasses.replace(steps, reward=2 * steps.reward)
    state, _ = update(state, doubled)
    np.testing.assert_allclose(state.average.mean, first * (0.75 + 2) / 1.75, rtol=1e-5)
    assert state.train.step == 2
    is_last = reinforce.first_episode(steps) & (steps.terminated | steps.truncated).at[-1].set(True)
    assert metrics["episode_return"].weight == 12
    np.testing.assert_allclose(
        metrics["episode_return"].mean, np.asarray(steps.extras["episode_return"])[is_last].mean(),
        rtol=1e-5,
    )  # fmt: skip


# Learning


@jax.jit(static_argnums=(0, 1))
def train(algorithm, num_iterations, key):
    init_key, steps_key = jax.random.split(key)
    keys = jax.random.split(steps_key, num_iterations)
    return jax.lax.scan(lambda s, k: algorithm.step(k, s), algorithm.init(init_key), keys)[0]


def learn(probe, **options):
    """Policy and value of a trained network wherever the probe's agent may be."""
    settings: dict[str, Any] = {"gamma": probe.discount, "learning_rate": 0.02, **options}
    config = reinforce.Config(**settings)
    network: Any = ActorCritic(action_space=probe.environment.action_space, hidden_sizes=(16,))
    algorithm = reinforce.make(config, probe.environment, network)
    learned = train(algorithm, 300, jax.random.key(0))
    return network.apply(learned.train.params, jnp.array(probe.observation))


@pytest.mark.slow
@pytest.mark.parametrize("probe", probes.PROBES, ids=lambda probe: probe.environment.name)
def test_step_learns_probe(probe):
    policy, value = learn(probe, num_environments=64, num_steps=2)
    np.testing.assert_allclose(value, probe.value, atol=0.02)
    earned = np.sum(jax.nn.softmax(policy.logits) * probe.q, axis=1)
    np.testing.assert_allclose(earned, probe.value, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["none", "constant", "moving_average"])
def test_step_learns_with_every_baseline(baseline):
    probe = probes.ACTION_AND_OBSERVATION
    options = {"baseline": baseline, "baseline_value": 0.5}
    policy, _ = learn(probe, num_environments=64, num_steps=1, **options)
    earned = np.sum(jax.nn.softmax(policy.logits) * probe.q, axis=1)
    np.testing.assert_allclose(earned, probe.value, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "probe",
    [probes.CONTINUOUS_TARGET, probes.CONTINUOUS_OBSERVATION, probes.HYBRID_OBSERVATION],
    ids=lambda probe: probe.environment.name,
)
def test_step_learns_probe_of_doses(probe):
    policy, _ = learn(probe, num_environments=256, num_steps=1)
    np.testing.assert_allclose(probe.earned(policy.action(policy.mode())), probe.value, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "probe", [probes.TIMEOUT, probes.CONTINUOUS_TIMEOUT], ids=["discrete", "dose"]
)
def test_step_bootstraps_a_timeout(probe):
    _, value = learn(probe, num_environments=16, num_steps=1, learning_rate=0.1)
    np.testing.assert_allclose(value, probe.value, rtol=2e-3)


# Promises


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_environments", 0),
        ("num_steps", 0),
        ("baseline", "median"),
        ("baseline_value", float("nan")),
        ("learning_rate", 0.0),
        ("baseline_decay", 1.5),
        ("gamma", -0.1),
        ("value_coefficient", -1.0),
        ("entropy_coefficient", -1.0),
    ],
)
def test_make_refuses_a_setting_in_one_line_that_starts_with_its_name(field, value):
    config = dataclasses.replace(CONFIG, **{field: value})
    with pytest.raises(ValueError, match=rf"\A{field} is {value!r}; it must [^\n]+\Z"):
        reinforce.make(config, tabular.make(oracles.two_state_mdp()), NETWORK)


def test_make_refuses_an_unbounded_action_space():
    environment = dataclasses.replace(
        tabular.make(oracles.two_state_mdp()), action_space=Box(shape=(1,), low=-1.0, high=np.inf)
    )
    with pytest.raises(ValueError, match=r"\Aenvironment\.action_space is \[-1\.0, inf\]"):
        reinforce.make(CONFIG, environment, NETWORK)


@pytest.mark.slow
def test_step_is_a_function_of_its_key_and_maps_over_seeds_and_hyperparameters():
    mdp = oracles.random_mdp(0, 6, 4, 0.9, masked=True)
    network: Any = TabularActorCritic(6, 4)
    config = dataclasses.replace(CONFIG, num_environments=8, num_steps=4)
    algorithm = reinforce.make(config, tabular.make(mdp, max_steps=4), network)
    step = jax.jit(algorithm.step)
    state = jax.jit(algorithm.init)(jax.random.key(0))
    first, metrics = step(jax.random.key(1), state)
    chex.assert_trees_all_equal(first, step(jax.random.key(1), state)[0])
    allowed = np.asarray(mdp.action_mask)
    np.testing.assert_array_equal(logits(first.train.params)[~allowed], 0)
    assert metrics["episode_length"].mean == 4
    # A sweep: the same state with other learning rates, mapped.
    rates = jnp.array([0.1, 0.3])
    swept = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    swept = dataclasses.replace(swept, hyperparameters=with_rate(swept, rates))
    keys = jax.random.split(jax.random.key(2), 2)
    with jax.debug_key_reuse(False):
        together, _ = jax.jit(jax.vmap(algorithm.step))(keys, swept)
    for place, rate in enumerate(rates):
        alone = dataclasses.replace(state, hyperparameters=with_rate(state, rate))
        ours = jax.tree.map(lambda leaf, place=place: leaf[place], together)
        chex.assert_trees_all_close(ours, step(keys[place], alone)[0], rtol=1e-4, atol=1e-6)


def with_rate(state, rate):
    return dataclasses.replace(state.hyperparameters, learning_rate=rate)
