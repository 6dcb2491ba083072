"""What the loop does when an algorithm computes no number, or its callback refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.training import loop
from jaxrl_llm.types import Algorithm, Mean


def counting(fault_at: int, fault: float = jnp.nan) -> Algorithm:
    """Counts its steps; the metric of one of them is `fault`."""

    def step(key, count):
        return count + 1, {"score": Mean.of(jnp.where(count == fault_at, fault, 1.0)[None])}

    return Algorithm(init=lambda key: jnp.int32(0), step=step)


@pytest.mark.parametrize(("fault", "name"), [(jnp.nan, "nan"), (jnp.inf, "inf")])
def test_run_refuses_a_metric_that_is_no_number_before_it_is_saved(fault, name):
    saved, reported = [], []
    message = (
        f"^score is {name} in steps 5 to 6, of which nothing is saved; mend the cause, then resume "
        "from the last checkpoint$"
    )
    with pytest.raises(ValueError, match=message):
        loop.run(
            counting(4, fault),
            jax.random.key(0),
            num_steps=10,
            chunk_steps=2,
            report=lambda step, metrics, state: reported.append(step),
            save=lambda step, state: saved.append(step),
        )
    assert saved == reported == [2, 4]


def test_run_finds_the_seed_whose_metric_is_no_number():
    def step(key, count):
        score = jnp.where(count == 1, jnp.array([1.0, -jnp.inf, 2.0]), 0.0)
        return count + 1, {"score": Mean(total=score, weight=jnp.ones(3))}

    algorithm = Algorithm(init=lambda key: jnp.int32(0), step=step)
    with pytest.raises(ValueError, match=r"^score is -inf in steps 1 to 4"):
        loop.run(algorithm, jax.random.key(0), num_steps=4, chunk_steps=4)


def test_run_raises_what_a_callback_raised_and_nothing_else(capfd):
    def refuse(count):
        if count == 2:
            raise ValueError('reward "gold" of response 3 is nan; return a finite number')
        return np.float32(1)

    def step(key, count):
        score = jax.pure_callback(refuse, jax.ShapeDtypeStruct((), jnp.float32), count)
        return count + 1, {"score": Mean.of(score[None])}

    algorithm = Algorithm(init=lambda key: jnp.int32(0), step=step)
    saved = []
    with pytest.raises(ValueError, match=r'^reward "gold" of response 3 is nan; return'):
        loop.run(
            algorithm,
            jax.random.key(0),
            num_steps=4,
            chunk_steps=1,
            save=lambda step, state: saved.append(step),
        )
    assert saved == [1, 2]
    assert "Traceback" not in capfd.readouterr().err
