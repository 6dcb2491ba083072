"""Heads and actor-critics: shapes, initialisation, masks and the tables' gathers."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.nn import heads
from jaxrl_llm.types import Box, Discrete, Hybrid


def apply(module: nn.Module, variables: Any, *inputs: Any, **options: Any) -> Any:
    """`module.apply`, which Flax declares as possibly returning mutated variables too."""
    return module.apply(variables, *inputs, **options)


def test_categorical_head_is_affine_and_masked():
    head = heads.CategoricalHead(num_actions=3)
    features = jnp.array(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    variables = head.init(jax.random.key(0), features[0])
    layer = variables["params"]["logits"]
    expected = np.array(features) @ np.array(layer["kernel"])
    np.testing.assert_allclose(apply(head, variables, features), expected, rtol=1e-5, atol=1e-7)
    mask = jnp.array([[True, False, True]] * 4)
    masked = apply(head, variables, features, mask=mask)
    np.testing.assert_allclose(masked[:, [0, 2]], expected[:, [0, 2]], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(jax.nn.softmax(masked)[:, 1], np.zeros(4))
    gram = np.array(layer["kernel"]).T @ np.array(layer["kernel"])
    np.testing.assert_allclose(gram, 1e-4 * np.eye(3), atol=1e-9)


def test_value_head_drops_the_last_axis_and_starts_at_unit_norm():
    head = heads.ValueHead()
    features = jnp.array(np.random.default_rng(0).normal(size=(2, 4, 6)), jnp.float32)
    variables = head.init(jax.random.key(0), features)
    kernel = np.array(variables["params"]["value"]["kernel"])
    np.testing.assert_allclose(np.linalg.norm(kernel), 1, rtol=1e-6)
    expected = (np.array(features) @ kernel)[..., 0]
    np.testing.assert_allclose(apply(head, variables, features), expected, rtol=1e-5, atol=1e-6)


def test_tabular_embedding_reads_the_row_of_the_state():
    embedding = heads.TabularEmbedding(num_states=5, features=3)
    variables = embedding.init(jax.random.key(0), jnp.array(0))
    np.testing.assert_array_equal(variables["params"]["table"], np.zeros((5, 3)))
    table = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    variables = {"params": {"table": jnp.array(table)}}
    states = jnp.array([[0, 4], [2, 2]])
    np.testing.assert_array_equal(apply(embedding, variables, states), table[np.array(states)])
    np.testing.assert_array_equal(apply(embedding, variables, jnp.array(3)), table[3])


def test_tabular_embedding_of_an_unknown_state_is_nan():
    embedding = heads.TabularEmbedding(num_states=5, features=3)
    variables = {"params": {"table": jnp.ones((5, 3))}}
    for read in (partial(apply, embedding), jax.jit(partial(apply, embedding))):
        assert np.isnan(read(variables, jnp.array(5))).all()


def test_tabular_embedding_gradient_counts_visits():
    embedding = heads.TabularEmbedding(num_states=4, features=2)
    states = jnp.array([1, 3, 1])

    def total(table):
        return jnp.sum(apply(embedding, {"params": {"table": table}}, states))

    gradient = jax.jit(jax.grad(total))(jnp.zeros((4, 2)))
    np.testing.assert_array_equal(gradient, [[0, 0], [2, 2], [0, 0], [1, 1]])


def actor_critics() -> list:
    rng = np.random.default_rng(0)
    vectors = jnp.array(rng.normal(size=(2, 5, 4)), jnp.float32)
    states = jnp.array(rng.integers(0, 6, size=(2, 5)))
    return [
        pytest.param(heads.ActorCritic(Discrete(num=3)), vectors, id="mlp"),
        pytest.param(heads.TabularActorCritic(num_states=6, num_actions=3), states, id="tabular"),
    ]


def random_like(variables, seed: int):
    leaves, structure = jax.tree.flatten(variables)
    rng = np.random.default_rng(seed)
    leaves = [jnp.array(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(structure, leaves)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "observations"), actor_critics())
def test_actor_critic_batched_equals_one_by_one(network, observations):
    variables = random_like(network.init(jax.random.key(0), observations[0, 0]), 1)
    mask = jnp.array([True, False, True])
    masks = jnp.broadcast_to(mask, (2, 5, 3))
    policy, value = jax.jit(partial(apply, network))(variables, observations, action_mask=masks)
    assert policy.logits.shape == (2, 5, 3)
    assert value.shape == (2, 5)
    for index in np.ndindex(2, 5):
        one, one_value = apply(network, variables, observations[index], action_mask=mask)
        assert one_value.shape == ()
        np.testing.assert_allclose(policy.logits[index], one.logits, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(value[index], one_value, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "observations"), actor_critics())
def test_actor_critic_mask_gives_probability_zero_and_finite_gradients(network, observations):
    variables = random_like(network.init(jax.random.key(0), observations[0, 0]), 1)
    masks = jnp.broadcast_to(jnp.array([True, False, True]), (2, 5, 3))

    def entropy(variables):
        policy, value = apply(network, variables, observations, action_mask=masks)
        return jnp.mean(policy.entropy()) + jnp.mean(value)

    unmasked, unmasked_value = apply(network, variables, observations)
    masked, masked_value = apply(network, variables, observations, action_mask=masks)
    np.testing.assert_array_equal(masked_value, unmasked_value)
    np.testing.assert_array_equal(masked.logits[..., [0, 2]], unmasked.logits[..., [0, 2]])
    np.testing.assert_array_equal(jax.nn.softmax(masked.logits)[..., 1], np.zeros((2, 5)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(entropy)(variables)))


@pytest.mark.slow
@pytest.mark.parametrize(("network", "observations"), actor_critics())
def test_actor_critic_policy_and_value_share_no_parameter(network, observations):
    variables = random_like(network.init(jax.random.key(0), observations[0, 0]), 1)
    by_logits = jax.grad(lambda v: jnp.sum(jnp.square(apply(network, v, observations)[0].logits)))
    by_value = jax.grad(lambda v: jnp.sum(jnp.square(apply(network, v, observations)[1])))
    pairs = zip(
        jax.tree.leaves(by_logits(variables)), jax.tree.leaves(by_value(variables)), strict=True
    )
    for policy_gradient, value_gradient in pairs:
        assert bool(policy_gradient.any()) != bool(value_gradient.any())


def test_actor_critic_starts_near_uniform_with_the_published_shapes():
    network = heads.ActorCritic(Discrete(num=2))
    observation = jnp.array([1.0, -1.0, 0.5, 2.0])
    variables = network.init(jax.random.key(0), observation)
    kernels = {
        "/".join(key.key for key in path[1:-1]): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
        if path[-1].key == "kernel"
    }
    assert kernels == {
        "actor/policy_tower/hidden_0": (4, 64),
        "actor/policy_tower/hidden_1": (64, 64),
        "actor/policy_head/categorical/logits": (64, 2),
        "value_tower/hidden_0": (4, 64),
        "value_tower/hidden_1": (64, 64),
        "value_head/value": (64, 1),
    }
    policy, _ = apply(network, variables, observation)
    np.testing.assert_allclose(jax.nn.softmax(policy.logits), [0.5, 0.5], atol=0.05)


def test_tabular_actor_critic_starts_uniform_over_allowed_actions():
    network = heads.TabularActorCritic(num_states=716, num_actions=25)
    variables = network.init(jax.random.key(0), jnp.array(0))
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes == {"actor": {"policy": {"table": (716, 25)}}, "value": {"table": (716, 1)}}
    mask = jnp.arange(25) < 4
    policy, value = apply(network, variables, jnp.array(715), action_mask=mask)
    np.testing.assert_allclose(jax.nn.softmax(policy.logits), np.where(mask, 0.25, 0), rtol=1e-6)
    assert value == 0


@pytest.mark.slow
def test_policy_head_follows_the_action_space():
    dose = Box(shape=(2,), low=0.0, high=(1.0, 3.0))
    hybrid = Hybrid(num=3, amount=dose, has_amount=(False, True, True))
    features, mask = jnp.ones((5, 4)), jnp.broadcast_to(jnp.array([True, False, True]), (5, 3))
    head = heads.PolicyHead(hybrid)
    policy = apply(head, head.init(jax.random.key(0), features), features, mask=mask)
    assert policy.mean.shape == policy.log_deviation.shape == (5, 3, 2)
    np.testing.assert_array_equal(jax.nn.softmax(policy.logits)[:, 1], np.zeros(5))
    head = heads.PolicyHead(dose)
    policy = apply(head, head.init(jax.random.key(0), features), features)
    # A small initial kernel puts the median of the dose near the middle of its range.
    np.testing.assert_allclose(policy.action(policy.mode())[0], [0.5, 1.5], atol=0.05)
    with pytest.raises(ValueError, match=r"action_space has shape \(1, 2\); flatten it"):
        heads.PolicyHead(Box(shape=(1, 2), low=0.0, high=1.0)).init(jax.random.key(0), features)


def test_gaussian_head_deviation_is_a_parameter_or_bounded():
    generator = np.random.default_rng(0)
    features = jnp.asarray(1e3 * generator.normal(size=(50, 4)), jnp.float32)
    fixed = heads.GaussianHead((2,), initial_log_deviation=-1.0)
    _, log_deviation = apply(fixed, fixed.init(jax.random.key(0), features), features)
    np.testing.assert_array_equal(log_deviation, np.full((50, 2), -1.0))
    free = heads.GaussianHead((2,), deviation="network", scale=1.0)
    _, log_deviation = apply(free, free.init(jax.random.key(0), features), features)
    low, high = heads.LOG_DEVIATIONS
    assert np.all((log_deviation >= low) & (log_deviation <= high))
    np.testing.assert_allclose([log_deviation.min(), log_deviation.max()], [low, high], atol=1e-3)
