"""Replay: what is remembered, windows of one environment, the law of samples and their weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxrl_llm.data import replay

NUM_ENVIRONMENTS, LENGTH, WINDOW, BATCH_SIZE = 3, 5, 2, 12


def make(priority_exponent: float = 0.0, batch_size: int = BATCH_SIZE) -> replay.Replay:
    return replay.make(
        num_environments=NUM_ENVIRONMENTS,
        length=LENGTH,
        window=WINDOW,
        batch_size=batch_size,
        priority_exponent=priority_exponent,
    )


def steps(first: int, count: int) -> dict[str, jax.Array]:
    """Steps `[count, 3]` that say which environment they are of, and when."""
    time, environment = np.meshgrid(
        np.arange(first, first + count), np.arange(NUM_ENVIRONMENTS), indexing="ij"
    )
    return {"environment": jnp.array(environment), "time": jnp.array(time, jnp.float32)}


def filled(buffer: replay.Replay, counts: tuple[int, ...]) -> tuple:
    """The state after adding as many steps, one block after another, and how many there were."""
    state = buffer.init(jax.tree.map(lambda leaf: leaf[0, 0], steps(0, 1)))
    first = 0
    for count in counts:
        state = buffer.add(state, steps(first, count))
        first += count
    return state, first


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(3,), (4, 4, 1)], ids=["not full", "full and round"])
@pytest.mark.parametrize("priority_exponent", [0.0, 0.6], ids=["uniform", "prioritised"])
def test_sample_is_consecutive_steps_of_one_environment_all_as_likely(counts, priority_exponent):
    buffer = make(priority_exponent)
    state, num_steps = filled(buffer, counts)
    chances = buffer.draw(jax.random.key(0), (100,))
    drawn = jax.jit(jax.vmap(buffer.sample, in_axes=(None, 0)))(state, chances)
    environment, time = (np.array(drawn.window[name]) for name in ("environment", "time"))
    assert time.shape == (100, BATCH_SIZE, WINDOW)
    np.testing.assert_array_equal(environment[..., 0], environment[..., 1])
    np.testing.assert_array_equal(time[..., 0] + 1, time[..., 1])
    oldest = max(num_steps - LENGTH, 0)
    num_starts = (num_steps - oldest - WINDOW + 1) * NUM_ENVIRONMENTS
    places = ((time[..., 0] - oldest) * NUM_ENVIRONMENTS + environment[..., 0]).astype(int)
    count = np.bincount(places.ravel(), minlength=num_starts)
    assert len(count) == num_starts
    np.testing.assert_allclose(drawn.probability, 1 / num_starts, rtol=1e-5)
    assert stats.chisquare(count).pvalue > 1e-3


@pytest.mark.slow
def test_sample_follows_the_priorities_that_were_set():
    """Schaul et al. (2016), equation 1: P(i) = p_i^alpha / sum_k p_k^alpha."""
    buffer = make(priority_exponent=0.5, batch_size=64)
    state, _ = filled(buffer, (3,))
    index, priority = jnp.arange(6), jnp.array([1.0, 4.0, 9.0, 16.0, 25.0, 0.25])
    assert buffer.set_priorities is not None
    state = buffer.set_priorities(state, index, priority)
    chances = buffer.draw(jax.random.key(1), (150,))
    drawn = jax.jit(jax.vmap(buffer.sample, in_axes=(None, 0)))(state, chances)
    law = np.sqrt(np.array(priority, float))
    law /= law.sum()
    np.testing.assert_allclose(drawn.probability, law[np.array(drawn.index)], rtol=1e-5)
    count = np.bincount(np.array(drawn.index).ravel(), minlength=6)
    # Stratified samples vary less than independent ones, hence only the upper tail.
    assert stats.chisquare(count, law * count.sum()).pvalue > 1e-3
    place = np.array(drawn.window["time"])[..., 0] * NUM_ENVIRONMENTS
    np.testing.assert_array_equal(
        place + np.array(drawn.window["environment"])[..., 0], np.array(drawn.index)
    )


def test_importance_weights_match_schaul():
    probability = np.array([0.1, 0.4, 0.05, 0.45])
    for exponent in (0.0, 0.4, 1.0):
        expected = (4 * probability) ** -exponent
        expected /= expected.max()
        weight = replay.importance_weights(jnp.array(probability), jnp.float32(exponent))
        np.testing.assert_allclose(weight, expected, rtol=1e-5)


def test_importance_weights_of_an_impossible_draw_are_zero():
    weight = replay.importance_weights(jnp.array([0.0, 0.5, 0.25]), jnp.float32(1.0))
    np.testing.assert_allclose(weight, [0, 0.5, 1])
