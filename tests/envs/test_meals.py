"""Meals come in their windows, as often and as large as was said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import meals

WINDOWS = np.array([[5, 9], [9, 10], [10, 14], [14, 16], [16, 20], [20, 23]]) * 60


@pytest.mark.slow
def test_draw_has_its_law_on_each_day():
    plan = jax.vmap(lambda key: meals.draw(key, 2))(jax.random.split(jax.random.key(0), 4000))
    time, grams = np.asarray(plan.time), np.asarray(plan.carbohydrates)
    assert time.shape == grams.shape == (4000, 12)
    windows = np.concatenate([WINDOWS, WINDOWS + 1440])
    assert np.all((windows[:, 0] <= time) & (time <= windows[:, 1]))
    # Windows are symmetric about 7:00, 9:30 ... so that the means are in the middle.
    np.testing.assert_allclose(time.mean(0), windows.mean(1), atol=4)
    taken = grams > 0
    # A normal size is 0 or less with probability .023 for the snacks, none for the meals.
    expected = np.tile([0.95, 0.3 * 0.97725], 6)
    np.testing.assert_allclose(taken.mean(0), expected, atol=0.03)
    means = [grams[:, place][taken[:, place]].mean() for place in (0, 2, 4)]
    np.testing.assert_allclose(means, [45, 70, 80], atol=0.7)
    assert abs(np.corrcoef(time[:, 0], time[:, 6])[0, 1]) < 0.06


def test_between_counts_each_meal_once():
    plan = meals.Plan(time=jnp.array([10.0, 12.0, 20.0]), carbohydrates=jnp.array([5.0, 7.0, 11.0]))
    parts = [float(meals.between(plan, start, start + 5)) for start in range(0, 30, 5)]
    assert parts == [0, 0, 12, 0, 11, 0]
