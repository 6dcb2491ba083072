"""PPO's loss and updates on a fixed batch, against the equations written out in NumPy."""

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.agents import ppo
from jaxrl_llm.nn.heads import TabularActorCritic
from jaxrl_llm.types import TrainState
from tests.agents.tables import logits, random_tables, tables

NUM_STATES, NUM_ACTIONS, NUM_ROWS = 6, 4, 128
CONFIG = ppo.Config(num_environments=8, num_steps=16, num_iterations=10, learning_rate=0.02)
NETWORK: Any = TabularActorCritic(NUM_STATES, NUM_ACTIONS)
OLD, NEW = (random_tables(seed, NUM_STATES, NUM_ACTIONS) for seed in range(2))


def loss_of(config):
    """`(params, batch) -> (loss, parts)`."""
    return partial(ppo.loss, config, config.hyperparameters(), NETWORK)


def update_of(config, optimizer):
    """`(key, train, batch) -> (train, parts)`."""
    return partial(ppo.update, config, config.hyperparameters(), NETWORK, optimizer)


def drawn_by(params, batch):
    """The batch as if its actions had been drawn by the policy of `params`."""
    policy, value = NETWORK.apply(params, batch.observation, action_mask=batch.action_mask)
    log_policy = jax.nn.log_softmax(policy.logits)
    log_probability = jnp.take_along_axis(log_policy, batch.latent[:, None], axis=1)[:, 0]
    return batch.replace(log_probability=log_probability, value=value)


@pytest.fixture(scope="module")
def batch():
    """Random rows of the policy OLD; about half of the actions are forbidden."""
    random = np.random.default_rng(0)
    allowed = random.random((NUM_STATES, NUM_ACTIONS)) < 0.5
    allowed[:, 1] = True
    observation = random.integers(NUM_STATES, size=NUM_ROWS)
    action = np.argmax(allowed[observation] * random.random((NUM_ROWS, NUM_ACTIONS)), axis=1)
    unscored = ppo.Batch(
        observation=jnp.array(observation),
        latent=jnp.array(action),
        action_mask=jnp.array(allowed[observation]),
        log_probability=jnp.zeros(NUM_ROWS),
        value=jnp.zeros(NUM_ROWS),
        advantage=jnp.array(random.normal(0.5, 2.0, NUM_ROWS), jnp.float32),
    )
    return drawn_by(OLD, unscored)


def start(optimizer, params):
    return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0))


# The loss


def as_numpy(batch):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), batch)


def numpy_loss(config, params, batch):
    """The parts of the loss, row by row, from tables; float64."""
    rows, leaves = as_numpy(batch), as_numpy(params)["params"]
    states, actions = rows.observation.astype(int), rows.latent.astype(int)
    weight = np.exp(leaves["actor"]["policy"]["table"])[states] * rows.action_mask
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
        "kl": ratio - 1 - np.log(ratio),  # k3 of KL(old || new), for actions of the old
    }


@pytest.mark.parametrize("whiten", [True, False], ids=["whitened", "raw"])
@pytest.mark.parametrize("value_clip", [0.2, None], ids=["clipped value", "free value"])
def test_loss_matches_numpy_away_from_the_old_policy(batch, whiten, value_clip):
    config = dataclasses.replace(CONFIG, whiten_advantages=whiten, value_clip_epsilon=value_clip)
    loss = loss_of(config)
    total, metrics = jax.jit(loss)(NEW, batch)
    parts = numpy_loss(config, NEW, batch)
    expected = {name: part.mean() for name, part in parts.items()}
    assert expected["kl"] > 0.1  # far enough for every clip to act
    for name, mean in expected.items():
        np.testing.assert_allclose(metrics[name].mean, mean, rtol=2e-5)
        assert metrics[name].weight == NUM_ROWS
    weights = {
        "policy_loss": 1,
        "value_loss": config.value_coefficient,
        "entropy": -config.entropy_coefficient,
    }
    combined = sum(weight * expected[name] for name, weight in weights.items())
    np.testing.assert_allclose(total, combined, rtol=2e-5)
    np.testing.assert_allclose(loss(NEW, batch)[0], total, rtol=1e-6)


def test_loss_at_the_old_policy_has_the_gradient_of_reinforce(batch):
    """d/dlogits(s, b) = -E[A (1[a = b] - pi(b | s))], A whitened; d/dV(s) = -c E[raw A]."""
    config = dataclasses.replace(CONFIG, entropy_coefficient=0.0)
    loss = loss_of(config)
    gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(OLD, batch)
    np.testing.assert_allclose(metrics["kl"].mean, 0, atol=1e-9)
    np.testing.assert_allclose(metrics["policy_loss"].mean, 0, atol=1e-6)  # whitened, ratio 1
    rows = as_numpy(batch)
    advantage = (rows.advantage - rows.advantage.mean()) / rows.advantage.std()
    policy = np.asarray(logits(OLD), np.float64)
    weight = np.exp(policy)[np.array(batch.observation)] * rows.action_mask
    probability = weight / weight.sum(axis=1, keepdims=True)
    score = np.eye(NUM_ACTIONS)[np.array(batch.latent)] - probability
    expected_policy, expected_value = np.zeros((NUM_STATES, NUM_ACTIONS)), np.zeros(NUM_STATES)
    states = np.array(batch.observation)
    np.add.at(expected_policy, states, -advantage[:, None] * score / NUM_ROWS)
    np.add.at(expected_value, states, -config.value_coefficient * rows.advantage / NUM_ROWS)
    chex.assert_trees_all_close(
        gradient, tables(expected_policy, expected_value), rtol=1e-5, atol=1e-6
    )
    free = dataclasses.replace(config, clip_epsilon=1e6)  # nothing is clipped at ratio 1
    unclipped, _ = jax.jit(jax.grad(loss_of(free), has_aux=True))(OLD, batch)
    chex.assert_trees_all_close(gradient, unclipped, rtol=1e-5, atol=1e-7)


def test_loss_of_a_batch_is_the_mean_over_its_minibatches(batch):
    config = dataclasses.replace(CONFIG, whiten_advantages=False)
    gradient = jax.jit(jax.value_and_grad(loss_of(config), has_aux=True))
    (total, metrics), slope = gradient(NEW, batch)
    quarters = jax.tree.map(lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:]), batch)
    (totals, parts), slopes = jax.vmap(gradient, in_axes=(None, 0))(NEW, quarters)
    np.testing.assert_allclose(totals.mean(), total, rtol=1e-5)
    mean = partial(jnp.mean, axis=0)
    chex.assert_trees_all_close(jax.tree.map(mean, slopes), slope, rtol=1e-4, atol=1e-6)
    summed = jax.tree.map(partial(jnp.sum, axis=0), parts)
    chex.assert_trees_all_close(summed, metrics, rtol=1e-5)


def test_loss_whitens_the_advantage_for_the_policy_alone(batch):
    raw = np.array(batch.advantage, np.float64)
    whitened = jnp.array((raw - raw.mean()) / raw.std(), jnp.float32)
    plain = dataclasses.replace(CONFIG, whiten_advantages=False)
    _, actual = loss_of(CONFIG)(NEW, batch)
    _, expected = loss_of(plain)(NEW, batch.replace(advantage=whitened))
    _, without = loss_of(plain)(NEW, batch)
    np.testing.assert_allclose(
        actual["policy_loss"].mean, expected["policy_loss"].mean, rtol=1e-5, atol=1e-6
    )
    assert actual["value_loss"].mean == without["value_loss"].mean


# Updates


@pytest.mark.parametrize("num_minibatches", [1, 4])
def test_update_visits_every_row_once_a_pass(batch, num_minibatches):
    config = dataclasses.replace(
        CONFIG, num_minibatches=num_minibatches, num_epochs=3, whiten_advantages=False
    )
    optimizer = optax.set_to_zero()
    train = start(optimizer, NEW)
    update = jax.jit(update_of(config, optimizer))
    after, metrics = update(jax.random.key(0), train, batch)
    assert after.step == 3 * num_minibatches
    chex.assert_trees_all_equal(after.params, train.params)
    for name, part in numpy_loss(config, train.params, batch).items():
        np.testing.assert_allclose(metrics[name].total, 3 * part.sum(), rtol=5e-5)
        assert metrics[name].weight == 3 * NUM_ROWS


def test_update_whitens_each_minibatch_by_itself(batch):
    """A minibatch of one row has nothing to compare its advantage with: it whitens to 0."""
    config = dataclasses.replace(
        CONFIG, num_minibatches=NUM_ROWS, num_epochs=1, entropy_coefficient=0.0
    )
    optimizer = optax.sgd(0.1)
    update = jax.jit(update_of(config, optimizer))
    after = update(jax.random.key(0), start(optimizer, NEW), batch)[0].params
    np.testing.assert_array_equal(logits(after), logits(NEW))
    moved = after["params"]["value"]["table"] != NEW["params"]["value"]["table"]
    assert moved.all()


@pytest.mark.slow
def test_update_stops_at_the_target_kl_and_freezes_everything(batch):
    config = dataclasses.replace(CONFIG, num_minibatches=1, num_epochs=6, learning_rate=0.1)
    optimizer = ppo.make_optimizer(config.hyperparameters(), jnp.float32(config.learning_rate))
    train = start(optimizer, OLD)

    @jax.jit
    def one_pass(train):
        loss = loss_of(config)
        gradient, metrics = jax.grad(loss, has_aux=True)(train.params, batch)
        updates, opt_state = optimizer.update(gradient, train.opt_state)
        params = optax.apply_updates(train.params, updates)
        after = TrainState(params=params, opt_state=opt_state, step=train.step + 1)
        return after, metrics["kl"].mean

    passes, kls = [train], []
    for _ in range(config.num_epochs):
        after, kl = one_pass(passes[-1])
        passes.append(after)
        kls.append(float(kl))
    assert kls == sorted(kls)
    target = (kls[2] + kls[3]) / 2
    for target_kl, expected in ((None, passes[6]), (1e9, passes[6]), (target, passes[3])):
        limited = dataclasses.replace(config, target_kl=target_kl)
        update = jax.jit(update_of(limited, optimizer))
        after, _ = update(jax.random.key(0), train, batch)
        assert after.step == expected.step
        chex.assert_trees_all_close(after, expected, rtol=1e-4, atol=1e-6)
    frozen, _ = update(jax.random.key(1), after, batch)
    chex.assert_trees_all_equal(frozen, after)
    resumed, _ = update(jax.random.key(2), after, drawn_by(after.params, batch))
    assert resumed.step > after.step


def test_update_stays_stopped_when_a_later_minibatch_is_below_the_target(batch):
    """Half of the one-row minibatches exceed the target, in random order."""
    kl = numpy_loss(CONFIG, NEW, batch)["kl"]
    config = dataclasses.replace(
        CONFIG, num_minibatches=NUM_ROWS, num_epochs=1, target_kl=float(np.median(kl))
    )
    optimizer = optax.set_to_zero()
    update = jax.jit(update_of(config, optimizer))
    after, _ = update(jax.random.key(0), start(optimizer, NEW), batch)
    assert after.step < 20  # 64 pass by themselves


def test_make_optimizer_clips_by_global_norm():
    """Three steps of Adam in NumPy, of gradients above and below the limit."""
    config = dataclasses.replace(CONFIG, max_gradient_norm=0.5)
    gradients = [([3.0, 0.1], [-4.0]), ([0.1, 0.2], [0.0]), ([-5.0, 0.3], [12.0])]
    optimizer = ppo.make_optimizer(config.hyperparameters(), jnp.float32(0.02))
    mean, square = np.zeros(3), np.zeros(3)
    params = (jnp.zeros(2), jnp.zeros(1))
    opt_state = optimizer.init(params)
    for step, leaves in enumerate(gradients):
        flat = np.concatenate(leaves)
        flat *= min(1, 0.5 / np.linalg.norm(flat))
        mean, square = 0.9 * mean + 0.1 * flat, 0.999 * square + 0.001 * flat**2
        unbiased = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.999 ** (step + 1))
        expected = -0.02 * unbiased[0] / (np.sqrt(unbiased[1]) + config.adam_epsilon)
        gradient = tuple(map(jnp.array, leaves))
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        np.testing.assert_allclose(np.concatenate(jax.tree.leaves(updates)), expected, rtol=1e-4)


def test_learning_rate_is_constant_within_an_iteration_and_reaches_the_final_one():
    config = dataclasses.replace(CONFIG, learning_rate=0.02, final_learning_rate=0.005)
    per_iteration = config.num_epochs * config.num_minibatches
    iteration = np.arange(config.num_iterations + 3).repeat(per_iteration)
    rate = partial(ppo.learning_rate, config, config.hyperparameters())
    rates = jax.vmap(rate)(jnp.arange(iteration.size))
    progress = np.minimum(iteration / config.num_iterations, 1)
    np.testing.assert_allclose(rates, 0.02 + progress * (0.005 - 0.02), rtol=1e-5)
