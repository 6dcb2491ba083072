"""Laws of exploration: closed forms, masks, ties, and what one uniform number draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import exploration

Q = jnp.array([1.0, 0.5, 0.0])
MASK = jnp.array([False, True, True])


def test_boltzmann_gives_the_oracle():
    expected = [0.66524, 0.24473, 0.09003]
    np.testing.assert_allclose(exploration.boltzmann(Q, 0.5), expected, atol=5e-6)


def test_epsilon_greedy_is_worked_by_hand():
    np.testing.assert_allclose(exploration.epsilon_greedy(Q, 0.3), [0.8, 0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(exploration.epsilon_greedy(Q, 0.3, MASK), [0, 0.85, 0.15], rtol=1e-6)
    tied = jnp.array([2.0, 2.0, 0.0])
    np.testing.assert_allclose(exploration.epsilon_greedy(tied, 0.0), [0.5, 0.5, 0])
    np.testing.assert_allclose(exploration.epsilon_greedy(Q, 1.0), np.full(3, 1 / 3), rtol=1e-6)


@pytest.mark.parametrize("law", [exploration.epsilon_greedy, exploration.boltzmann])
@pytest.mark.parametrize("mask", [None, MASK])
def test_laws_sum_to_one_and_never_leave_the_mask(law, mask):
    q = jnp.array([-jnp.inf, 3.0, -1e8]) if mask is not None else Q
    chances = jax.jit(law)(q, 0.2, mask)
    np.testing.assert_allclose(chances.sum(), 1, rtol=1e-6)
    if mask is not None:
        assert chances[0] == 0
    batched = jax.vmap(law, in_axes=(0, None, None))(jnp.stack([q, q]), 0.2, mask)
    np.testing.assert_allclose(batched, jnp.stack([chances, chances]), rtol=1e-6)


def test_epsilon_greedy_draw_has_the_frequencies_of_the_law():
    uniform = (jnp.arange(100_000) + 0.5) / 100_000
    draw = jax.vmap(exploration.epsilon_greedy_draw, in_axes=(0, None, None))
    explores, rank = draw(uniform, 0.3, jnp.int32(7))
    np.testing.assert_allclose(explores.mean(), 0.3, atol=1e-4)
    frequency = np.bincount(rank[explores], minlength=7) / len(uniform)
    np.testing.assert_allclose(frequency, np.full(7, 0.3 / 7), atol=1e-4)


def test_epsilon_greedy_draw_at_the_ends():
    draw = jax.vmap(exploration.epsilon_greedy_draw, in_axes=(0, None, None))
    uniform = jnp.array([0.0, 0.5, 1 - 2.0**-24])
    assert not draw(uniform, 0.0, jnp.int32(4))[0].any()
    explores, rank = draw(uniform, 1.0, jnp.int32(4))
    assert explores.all()
    np.testing.assert_array_equal(rank, [0, 2, 3])


def test_upper_confidence_bound_is_the_formula():
    visits = jnp.array([4.0, 5.0, 0.0])
    bound = exploration.upper_confidence_bound(Q, visits, 2.0)
    expected = [1 + 2 * np.sqrt(np.log(9) / 4), 0.5 + 2 * np.sqrt(np.log(9) / 5), np.inf]
    np.testing.assert_allclose(bound, expected, rtol=1e-6)
    masked = exploration.upper_confidence_bound(Q, visits, 2.0, ~MASK)
    np.testing.assert_allclose(masked, [1 + 2 * np.sqrt(np.log(4) / 4), -np.inf, -np.inf])
    none = exploration.upper_confidence_bound(Q, jnp.zeros(3), 2.0)
    np.testing.assert_array_equal(none, np.full(3, np.inf))


def test_linear_schedule_falls_and_stays():
    values = [
        float(exploration.linear_schedule(jnp.int32(t), 1.0, 0.2, 10)) for t in (0, 5, 10, 99)
    ]
    np.testing.assert_allclose(values, [1, 0.6, 0.2, 0.2], rtol=1e-6)
    assert exploration.linear_schedule(jnp.int32(0), 1.0, 0.5, 0) == 0.5
