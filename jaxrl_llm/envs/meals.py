"""A day's meals: three main ones and three snacks, at times and of sizes drawn at random.

SYNTHETIC; research only, not for clinical use. Each is eaten with some probability, at a time from
a normal law cut to its window and of a size from a normal law cut at 0.

Source: the random scenario of the program simglucose (MIT), github.com/jxx123/simglucose.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrl_llm.envs import draws
from jaxrl_llm.types import Array, Key

names = ("breakfast", "morning snack", "lunch", "afternoon snack", "dinner", "evening snack")
MINUTES_PER_DAY = 1440
_PROBABILITY = np.array([0.95, 0.3] * 3)
_TIME = np.array([7, 9.5, 12, 15, 18, 21.5]) * 60  # min
_TIME_DEVIATION = np.array([60, 30] * 3)
_WINDOW = np.array([[5, 9], [9, 10], [10, 14], [14, 16], [16, 20], [20, 23]]) * 60
_SIZE = np.array([45, 10, 70, 10, 80, 10])  # g
_SIZE_DEVIATION = np.array([10, 5] * 3)


@struct.dataclass(kw_only=True)
class Plan:
    """What somebody will eat.

    Attributes:
      time: `[6 · days]` float32, minutes since the first midnight.
      carbohydrates: `[6 · days]` float32, g; 0 for a meal that is left out.
    """

    time: Array
    carbohydrates: Array


def draw(key: Key, num_days: int) -> Plan:
    """The meals of `num_days` days, each day drawn alone."""
    taken, time, size = draws.uniform(key, (3, num_days, len(names)))
    low, high = ((_WINDOW.T - _TIME) / _TIME_DEVIATION)[:, None]
    deviation = draws.truncated_normal(time, low, high)
    # A normal number beyond 4 deviations is as rare as a step of the uniform ones.
    grams = _SIZE[None] + _SIZE_DEVIATION[None] * draws.truncated_normal(size, -4.0, 4.0)
    is_taken = taken < _PROBABILITY[None]
    midnight = MINUTES_PER_DAY * jnp.arange(num_days)[:, None]
    return Plan(
        time=(midnight + _TIME[None] + _TIME_DEVIATION[None] * deviation).reshape(-1),
        carbohydrates=jnp.where(is_taken, jnp.maximum(grams, 0), 0).reshape(-1),
    )


def between(plan: Plan, start: Array | float, stop: Array | float) -> Array:
    """Carbohydrates of the meals that begin in [`start`, `stop`), minutes, in g, `[]`."""
    begun = (start <= plan.time) & (plan.time < stop)
    return jnp.sum(jnp.where(begun, plan.carbohydrates, 0))
