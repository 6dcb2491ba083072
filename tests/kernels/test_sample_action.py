"""`policy_gradient.sample_action` against the softmax, on a grid, at random and on its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import ArrayLike

from jaxrl_llm.kernels import policy_gradient

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))
draw = jax.jit(jax.vmap(policy_gradient.sample_action, in_axes=(None, 0)))
draw_masked = jax.jit(jax.vmap(policy_gradient.sample_action, in_axes=(None, 0, None)))
draw_each = jax.jit(jax.vmap(policy_gradient.sample_action))


def random_logits(*shape):
    return np.random.default_rng(len(shape)).normal(scale=2.0, size=shape).astype(np.float32)


def probability(logits, mask: ArrayLike = True):
    weight = np.where(mask, np.exp(np.float64(logits) - np.max(logits)), 0)
    return weight / weight.sum(axis=-1, keepdims=True)


def frequency(actions, num_actions):
    return np.bincount(np.asarray(actions), minlength=num_actions) / len(actions)


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("num_actions", [1, 2, 5, 25])
def test_sample_action_of_a_grid_has_the_frequencies_of_the_softmax(num_actions, masked):
    logits = random_logits(num_actions)
    mask = np.arange(num_actions) % 3 != 1 if masked else np.ones(num_actions, bool)
    grid = (jnp.arange(100_000) + 0.5) / 100_000
    actual = frequency(draw_masked(jnp.array(logits), grid, jnp.array(mask)), num_actions)
    np.testing.assert_allclose(actual, probability(logits, mask), atol=1.5e-5)
    assert not actual[~mask].any()


def test_sample_action_of_random_numbers_passes_a_chi_squared_test():
    logits, num_draws = random_logits(8), 200_000
    actions = draw(jnp.array(logits), jax.random.uniform(jax.random.key(0), (num_draws,)))
    expected = num_draws * probability(logits)
    statistic = np.sum((num_draws * frequency(actions, 8) - expected) ** 2 / expected)
    assert statistic < 24.3  # 7 degrees of freedom: exceeded by chance once in a thousand


def test_sample_action_takes_the_first_action_whose_mass_tops_the_number():
    uniform = np.array([0, 0.25, 0.5, 0.75], np.float32)
    below = np.nextafter(np.append(uniform[1:], np.float32(1)), np.float32(0))
    for numbers in (uniform, below):
        np.testing.assert_array_equal(draw(jnp.zeros(4), jnp.array(numbers)), [0, 1, 2, 3])


@pytest.mark.parametrize("num_actions", [2, 3, 25, 40])
def test_sample_action_never_draws_a_masked_action_at_any_edge(num_actions):
    """The numbers within two units in the last place of every step of the cumulative mass."""
    random = np.random.default_rng(0)
    logits = random_logits(32, num_actions)
    mask = random.random(logits.shape) < 0.5
    mask[np.arange(32), random.integers(num_actions, size=32)] = True
    steps = np.cumsum(probability(logits, mask), axis=-1).astype(np.float32)
    edges = [np.zeros_like(steps), np.full_like(steps, BELOW_ONE), steps]
    for direction in (0, 1):
        for _ in range(2):
            edges.append(np.nextafter(edges[-1], np.float32(direction)))
        edges.append(steps)
    uniform = np.clip(np.concatenate(edges, axis=-1), 0, BELOW_ONE)
    batch = jax.vmap(policy_gradient.sample_action, in_axes=(None, 0, None))
    actions = jax.jit(jax.vmap(batch))(jnp.array(logits), jnp.array(uniform), jnp.array(mask))
    assert np.take_along_axis(mask, np.array(actions), axis=-1).all()


def test_sample_action_with_a_mask_equals_that_of_the_subset():
    logits, mask = random_logits(9), np.arange(9) % 2 == 1
    uniform = jax.random.uniform(jax.random.key(0), (1000,))
    subset = draw(jnp.array(logits[mask]), uniform)
    actual = draw_masked(jnp.array(logits), uniform, jnp.array(mask))
    np.testing.assert_array_equal(actual, np.flatnonzero(mask)[np.array(subset)])


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([0.0, 1e4, -1e4], [1, 1, 1]),
        ([1e38, -3e38, -3e38], [0, 0, 0]),
        ([-3e38, -3e38, 3e38], [2, 2, 2]),
        ([-3e38, -3e38, -3e38], [0, 1, 2]),
        ([3e38, 3e38, 3e38], [0, 1, 2]),
        ([-np.inf, 0.0, -np.inf], [1, 1, 1]),
    ],
)
def test_sample_action_of_extreme_logits(logits, expected):
    actions = draw(jnp.array(logits), jnp.array([0.0, 0.5, BELOW_ONE]))
    np.testing.assert_array_equal(actions, expected)


def test_sample_action_of_bfloat16_logits_is_as_exact_as_of_float32():
    """A running sum in bfloat16 would lose unlikely actions, and even return 25."""
    logits = jnp.array(random_logits(25), jnp.bfloat16)
    grid = jnp.append((jnp.arange(100_000) + 0.5) / 100_000, BELOW_ONE)
    np.testing.assert_array_equal(draw(logits, grid), draw(logits.astype(jnp.float32), grid))


def test_sample_action_ignores_nan_where_masked():
    logits, mask = jnp.array([jnp.nan, 0.0, jnp.nan]), jnp.array([False, True, False])
    assert policy_gradient.sample_action(logits, jnp.float32(0.7), mask) == 1


def test_sample_action_batched_equals_one_by_one():
    logits = jnp.array(random_logits(6, 5))
    mask = jnp.array(np.random.default_rng(1).random((6, 5)) < 0.6).at[:, 2].set(True)
    uniform = jax.random.uniform(jax.random.key(0), (6,))
    batched = draw_each(logits, uniform, mask)
    assert batched.dtype == jnp.int32
    for index in range(6):
        one = policy_gradient.sample_action(logits[index], uniform[index], mask[index])
        assert one.shape == ()
        assert one == batched[index]


def test_sample_action_refuses_a_batch():
    with pytest.raises(AssertionError):
        policy_gradient.sample_action(jnp.zeros((3, 5)), jnp.zeros(3))
