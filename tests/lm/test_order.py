"""The order of rows: every row once an epoch, a new order each, by key and step alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm.order import next_rows

pytestmark = pytest.mark.slow


def rows_of(num_steps, batch_size, num_rows, key=0):
    rows = [next_rows(jax.random.key(key), jnp.int32(step), batch_size, num_rows)
            for step in range(num_steps)]  # fmt: skip
    return np.array(rows)


def test_next_rows_takes_every_row_once_an_epoch_in_a_new_order():
    epochs = rows_of(9, 4, 12).reshape(3, 12)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(12))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_next_rows_leaves_out_what_fills_no_batch():
    epoch = rows_of(3, 4, 14).reshape(-1)
    assert len(set(epoch.tolist())) == 12


@pytest.mark.parametrize("num_rows", [1, 3])
def test_next_rows_repeats_a_short_corpus(num_rows):
    rows = rows_of(2, 5, num_rows)
    assert rows.shape == (2, 5)
    assert set(rows.reshape(-1).tolist()) == set(range(num_rows))


def test_next_rows_depends_on_key_and_step_alone():
    np.testing.assert_array_equal(rows_of(6, 2, 10)[4:], rows_of(6, 2, 10)[4:])
    assert (rows_of(5, 2, 10) != rows_of(5, 2, 10, key=1)).any()
    jitted = jax.jit(next_rows, static_argnums=(2, 3))
    np.testing.assert_array_equal(
        jitted(jax.random.key(0), jnp.int32(3), 2, 10), rows_of(4, 2, 10)[3]
    )
