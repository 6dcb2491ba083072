"""Policies over each kind of action space: one law, whichever method tells of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.nn import policies
from jaxrl_llm.types import Box, Discrete, Hybrid, HybridAction, Space

AMOUNT = Box(shape=(2,), low=0.0, high=(1.0, 4.0))
HYBRID = Hybrid(num=3, amount=AMOUNT, has_amount=(False, True, True))
SPACES = [Discrete(num=4), AMOUNT, HYBRID]
SHAPE = (5, 4)


def example(space: Space, *, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Any:
    """A policy over `space`, its arrays drawn at random."""
    generator = np.random.default_rng(seed)

    def normal(*trailing: int) -> jax.Array:
        return jnp.asarray(generator.normal(size=(*shape, *trailing)), jnp.float32)

    if isinstance(space, Discrete):
        return policies.Categorical(logits=normal(space.num))
    if isinstance(space, Box):
        (size,) = space.shape
        return policies.SquashedGaussian(
            mean=normal(size), log_deviation=0.3 * normal(size), low=space.low, high=space.high
        )
    (size,) = space.amount.shape
    return policies.HybridPolicy(
        logits=normal(space.num),
        mean=normal(space.num, size),
        log_deviation=0.3 * normal(space.num, size),
        low=space.amount.low,
        high=space.amount.high,
        has_amount=space.has_amount,
    )


def far_out(latent: Any) -> Any:
    """The same latent with its continuous part a hundred times as far from 0."""

    def scaled(leaf: jax.Array) -> jax.Array:
        return leaf * 100 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(scaled, latent)


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES)
def test_methods_over_leading_dimensions_equal_those_of_one(space):
    policy = example(space)
    latent = policy.sample(policies.draw_noise(space, jax.random.key(0), SHAPE))
    many = policy.log_probability(latent), policy.entropy(), policy.action(latent), policy.mode()
    one, of_one = jax.tree.map(lambda leaf: leaf[2, 3], (policy, latent))
    alone = one.log_probability(of_one), one.entropy(), one.action(of_one), one.mode()
    for whole, part in zip(jax.tree.leaves(many), jax.tree.leaves(alone), strict=True):
        assert whole.shape[:2] == SHAPE
        np.testing.assert_allclose(whole[2, 3], part, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES)
def test_entropy_is_minus_the_mean_log_probability_of_samples(space):
    num = 40_000
    one = example(space, shape=(), seed=1)
    many = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num, *leaf.shape)), one)
    latent = many.sample(policies.draw_noise(space, jax.random.key(1), (num,)))
    surprise = -np.asarray(many.log_probability(latent))
    standard_error = surprise.std() / num**0.5
    np.testing.assert_allclose(surprise.mean(), one.entropy(), atol=4 * standard_error)


@pytest.mark.parametrize("space", SPACES)
def test_log_probability_has_a_finite_gradient_even_far_out(space):
    policy = example(space)
    latent = far_out(policy.sample(policies.draw_noise(space, jax.random.key(0), SHAPE)))

    def total(policy):
        return jnp.sum(policy.log_probability(latent)) + jnp.sum(policy.entropy())

    gradient = jax.jit(jax.grad(total))(policy)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_log_probability_agrees_with_distrax():
    for space in SPACES[:2]:
        policy = example(space)
        latent = policy.sample(policies.draw_noise(space, jax.random.key(0), SHAPE))
        expected = policy.distribution().log_prob(policy.action(latent))
        np.testing.assert_allclose(policy.log_probability(latent), expected, rtol=1e-4, atol=1e-4)
    policy = example(HYBRID, shape=())
    choice_law, amount_law = policy.distribution()
    for choice in range(3):
        latent = HybridAction(choice=jnp.int32(choice), amount=jnp.array([0.4, -0.2]))
        amount = jnp.broadcast_to(policy.action(latent).amount, (3, 2))
        density = amount_law.log_prob(amount)[choice] if HYBRID.has_amount[choice] else 0
        expected = choice_law.log_prob(latent.choice) + density
        np.testing.assert_allclose(policy.log_probability(latent), expected, rtol=1e-5)


def test_hybrid_amount_of_a_choice_without_one_does_not_count():
    policy = example(HYBRID, shape=())
    values = [
        policy.log_probability(HybridAction(choice=jnp.int32(0), amount=jnp.full(2, amount)))
        for amount in (-3.0, 3.0)
    ]
    assert values[0] == values[1]
    gradient = jax.grad(
        lambda policy: policy.log_probability(
            HybridAction(choice=jnp.int32(1), amount=jnp.zeros(2))
        )
    )(policy)
    moved = np.abs(gradient.mean).sum(axis=1) > 0
    # Only the amount of the choice that was made learns from it.
    np.testing.assert_array_equal(moved, [False, True, False])


@pytest.mark.parametrize("space", SPACES[1:])
def test_actions_lie_within_their_bounds(space):
    policy = example(space)
    latent = far_out(policy.sample(policies.draw_noise(space, jax.random.key(2), SHAPE)))
    action = policy.action(latent)
    amount = action.amount if isinstance(action, HybridAction) else action
    np.testing.assert_array_equal(np.min(amount, axis=(0, 1)), [0, 0])
    np.testing.assert_array_equal(np.max(amount, axis=(0, 1)), [1, 4])


def test_mode_is_the_likeliest_choice_at_its_mean():
    policy = example(HYBRID)
    latent = policy.mode()
    np.testing.assert_array_equal(latent.choice, np.argmax(policy.logits, -1))
    rows = np.take_along_axis(np.array(policy.mean), np.array(latent.choice)[..., None, None], 2)
    np.testing.assert_array_equal(latent.amount, rows[..., 0, :])


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Box(shape=(2, 2), low=0.0, high=1.0), r"dose has shape \(2, 2\); flatten it"),
        (Box(shape=(2,), low=0.0, high=(1.0, np.inf)), r"dose is \[0.0, inf\] in dimension 1"),
        (Box(shape=(1,), low=1.0, high=1.0), r"dose is \[1.0, 1.0\] in dimension 0"),
        (Hybrid(num=2, amount=AMOUNT, has_amount=(True,)), "dose.has_amount has 1 entries"),
    ],
)
def test_check_action_space_names_what_is_wrong(space, message):
    with pytest.raises(ValueError, match=message):
        policies.check_action_space("dose", space)
