"""The loop: same bits however it is cut, exact means, and what the user sees."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_llm.training import loop
from jaxrl_llm.types import Algorithm, Mean


@struct.dataclass
class State:
    weights: jax.Array
    count: jax.Array
    key: jax.Array


def init(key):
    weights_key, state_key = jax.random.split(key)
    return State(jax.random.normal(weights_key, (3, 4)), jnp.int32(0), state_key)


def step(key, state):
    noise_key, next_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (4, 3))
    weights = 0.9 * state.weights + 0.1 * jnp.tanh(state.weights @ noise @ state.weights)
    metrics = {
        "norm": Mean.of(weights**2),
        # The mean over a chunk is exact only if totals and weights are summed apart.
        "index": Mean(total=state.count * (state.count + 1.0), weight=state.count + 1.0),
    }
    return State(weights, state.count + 1, next_key), metrics


ALGORITHM = Algorithm(init=init, step=step)


def assert_same(actual, expected):
    np.testing.assert_array_equal(actual.weights, expected.weights)
    np.testing.assert_array_equal(actual.count, expected.count)
    np.testing.assert_array_equal(
        jax.random.key_data(actual.key), jax.random.key_data(expected.key)
    )


@pytest.mark.slow
def test_run_equals_a_python_loop_over_fold_in():
    actual = loop.run(ALGORITHM, jax.random.key(5), num_steps=7, chunk_steps=3)
    init_key, step_key = jax.random.split(jax.random.key(5))
    expected = init(init_key)
    for index in range(7):
        expected, _ = step(jax.random.fold_in(step_key, index), expected)
    np.testing.assert_allclose(actual.weights, expected.weights, rtol=1e-5, atol=1e-6)
    assert int(actual.count) == 7
    np.testing.assert_array_equal(
        jax.random.key_data(actual.key), jax.random.key_data(expected.key)
    )


def test_init_key_is_no_step_key():
    drawn = Algorithm(
        init=lambda key: jnp.zeros((20,), jnp.uint32).at[0].set(jax.random.bits(key)),
        step=lambda key, bits: (jnp.roll(bits, 1).at[0].set(jax.random.bits(key)), {}),
    )
    bits = loop.run(drawn, jax.random.key(0), num_steps=19, chunk_steps=4)
    assert len(set(np.asarray(bits).tolist())) == 20


@pytest.mark.parametrize("chunk_steps", [1, 2, 7, 10, 100])
def test_run_is_bit_identical_for_any_chunk(chunk_steps):
    expected = loop.run(ALGORITHM, jax.random.key(1), num_steps=20, chunk_steps=20)
    actual = loop.run(ALGORITHM, jax.random.key(1), num_steps=20, chunk_steps=chunk_steps)
    assert_same(actual, expected)


@pytest.mark.parametrize("stop", [1, 5, 13])
def test_run_resumed_is_bit_identical(stop):
    expected = loop.run(ALGORITHM, jax.random.key(1), num_steps=20, chunk_steps=4)
    half = loop.run(ALGORITHM, jax.random.key(1), num_steps=stop, chunk_steps=4)
    actual = loop.run(
        ALGORITHM, jax.random.key(1), num_steps=20, chunk_steps=4, state=half, start=stop
    )
    assert_same(actual, expected)


def test_report_gets_the_mean_over_the_chunk():
    seen = []

    def report(step, metrics, state):
        assert int(state.count) == step
        seen.append((step, metrics["index"]))
        assert isinstance(metrics["norm"], float)

    loop.run(ALGORITHM, jax.random.key(1), num_steps=7, chunk_steps=3, report=report)
    # Item i is counted i + 1 times: the mean of 0 1 1 2 2 2, of 3x4 4x5 5x6, of 6x7.
    expected = [(3, 8 / 6), (6, (12 + 20 + 30) / 15), (7, 6.0)]
    np.testing.assert_allclose(seen, expected, rtol=1e-6)


def test_report_after_an_unaligned_resume_keeps_the_grid():
    seen = []
    state = loop.run(ALGORITHM, jax.random.key(1), num_steps=4, chunk_steps=4)
    loop.run(
        ALGORITHM,
        jax.random.key(1),
        num_steps=10,
        chunk_steps=3,
        state=state,
        start=4,
        report=lambda step, metrics, state: seen.append(step),
    )
    assert seen == [6, 9, 10]


@pytest.mark.parametrize(
    ("save_steps", "expected"),
    [(None, [3, 6, 9, 11]), (6, [6, 11]), (4, [6, 9, 11]), (100, [11])],
)
def test_save_is_called_at_its_interval_and_at_the_end(save_steps, expected):
    saved = []

    def save(step, state):
        assert int(state.count) == step
        saved.append(step)

    loop.run(
        ALGORITHM,
        jax.random.key(1),
        num_steps=11,
        chunk_steps=3,
        save=save,
        save_steps=save_steps,
    )
    assert saved == expected


def test_run_traces_as_often_with_a_partial_chunk_as_without():
    def traces(num_steps):
        traced = []

        def counted(key, state):
            traced.append(1)
            return step(key, state)

        algorithm = Algorithm(init=init, step=counted)
        loop.run(algorithm, jax.random.key(0), num_steps=num_steps, chunk_steps=2)
        return len(traced)

    assert traces(11) == traces(2) <= 2


def test_run_donates_the_state():
    state = init(jax.random.key(0))
    result = loop.run(
        ALGORITHM, jax.random.key(1), num_steps=5, chunk_steps=2, state=state, start=3
    )
    assert state.weights.is_deleted()
    assert not result.weights.is_deleted()


def test_run_accepts_a_state_that_shares_buffers():
    algorithm = Algorithm(
        init=lambda key: {"params": (x := jax.random.normal(key, (3,))), "target": x},
        step=lambda key, s: ({**s, "params": s["params"] + jax.random.normal(key, (3,))}, {}),
    )
    first = loop.run(algorithm, jax.random.key(0), num_steps=2, chunk_steps=1)
    shared = jnp.ones(3)
    state = {"params": shared, "target": shared}
    result = loop.run(algorithm, jax.random.key(0), num_steps=2, chunk_steps=1, state=state)
    np.testing.assert_array_equal(result["target"], np.ones(3))
    difference = first["params"] - first["target"]
    np.testing.assert_allclose(result["params"] - 1, difference, rtol=1e-5, atol=1e-6)


def test_run_leaves_constants_of_the_algorithm_alive():
    constant = jnp.arange(3.0)
    algorithm = Algorithm(
        init=lambda key: (constant, jax.random.normal(key)),
        step=lambda key, state: ((state[0] + 1, jax.random.normal(key)), {}),
    )
    loop.run(algorithm, jax.random.key(0), num_steps=3, chunk_steps=2)
    np.testing.assert_array_equal(constant, [0, 1, 2])


def test_run_keeps_the_sharding_of_the_state():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = NamedSharding(mesh, PartitionSpec("data"))

    def sharded_step(key, state):
        noise = jax.random.normal(key, (8,))
        x = state["x"] * 0.5 + noise + state["bias"]
        return {"x": x, "bias": state["bias"] + jnp.mean(x)}, {"x": Mean.of(x)}

    algorithm = Algorithm(init=lambda key: {}, step=sharded_step)
    plain = {"x": jnp.arange(8.0), "bias": jnp.float32(0)}
    state = {"x": jax.device_put(plain["x"], sharded), "bias": jnp.float32(0)}
    result = loop.run(algorithm, jax.random.key(0), num_steps=5, chunk_steps=2, state=state)
    expected = loop.run(algorithm, jax.random.key(0), num_steps=5, chunk_steps=2, state=plain)
    assert result["x"].sharding == sharded
    np.testing.assert_allclose(result["x"], expected["x"], rtol=1e-5)


def test_run_from_the_end_returns_the_state():
    state = init(jax.random.key(0))
    assert (
        loop.run(ALGORITHM, jax.random.key(1), num_steps=5, chunk_steps=2, state=state, start=5)
        is state
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; it must be at least 1"),
        ({"chunk_steps": -1}, "chunk_steps is -1; it must be at least 1"),
        ({"items_per_step": 0}, "items_per_step is 0; it must be at least 1"),
        ({"save_steps": 0}, "save_steps is 0; it must be at least 1"),
        ({"start": 11}, r"start is 11; it must be in \[0, num_steps = 10\]"),
        ({"start": 3}, "start is 3, but there is no state; restore it"),
    ],
)
def test_run_refuses(changes, message):
    counts: dict[str, Any] = {"num_steps": 10, "chunk_steps": 5, **changes}
    with pytest.raises(ValueError, match=message):
        loop.run(ALGORITHM, jax.random.key(0), **counts)


def learn_from_data(key, state, data):
    """One that reads its data, by step and by noise."""
    noise = jax.random.normal(key, (3,))
    row = data["rows"][state["step"] % len(data["rows"])]
    total = state["total"] + row * data["scale"] + noise
    return {"total": total, "step": state["step"] + 1}, {"total": Mean.of(total)}


DATA = {"rows": np.arange(12, dtype=np.float32).reshape(4, 3), "scale": np.float32(2)}
READER = Algorithm(
    init=lambda key: {"total": jax.random.normal(key, (3,)), "step": jnp.int32(0)},
    step=learn_from_data,
)


def test_run_gives_its_data_to_every_step_and_keeps_them():
    closed = Algorithm(
        init=READER.init, step=lambda key, state: learn_from_data(key, state, on_device)
    )
    on_device = jax.tree.map(jnp.asarray, DATA)
    expected = loop.run(closed, jax.random.key(3), num_steps=7, chunk_steps=7)
    counts: dict[str, Any] = {"num_steps": 7, "chunk_steps": 2}
    for data in (DATA, on_device):
        actual = loop.run(READER, jax.random.key(3), **counts, data=data)
        np.testing.assert_allclose(actual["total"], expected["total"], rtol=1e-6)
    # The state is donated, the data are not.
    assert not on_device["rows"].is_deleted()


@pytest.mark.slow
def test_over_seeds_gives_every_seed_all_of_the_data():
    many = loop.over_seeds(READER, 2)
    together = loop.run(many, jax.random.key(9), num_steps=5, chunk_steps=5, data=DATA)
    for seed in range(2):
        only = Algorithm(
            init=lambda key, seed=seed: READER.init(jax.random.fold_in(key, seed)),
            step=lambda key, *rest, seed=seed: READER.step(jax.random.fold_in(key, seed), *rest),
        )
        alone = loop.run(only, jax.random.key(9), num_steps=5, chunk_steps=5, data=DATA)
        np.testing.assert_allclose(together["total"][seed], alone["total"], rtol=1e-5)


@pytest.mark.slow
def test_over_seeds_equals_separate_runs():
    seen = []
    together = loop.run(
        loop.over_seeds(ALGORITHM, 3),
        jax.random.key(9),
        num_steps=6,
        chunk_steps=6,
        report=lambda step, metrics, state: seen.append(metrics),
    )
    assert seen[0]["norm"].shape == (3,)
    for seed in range(3):
        only = Algorithm(
            init=lambda key, seed=seed: init(jax.random.fold_in(key, seed)),
            step=lambda key, state, seed=seed: step(jax.random.fold_in(key, seed), state),
        )
        alone = loop.run(
            only,
            jax.random.key(9),
            num_steps=6,
            chunk_steps=6,
            report=lambda step, metrics, state: seen.append(metrics),
        )
        np.testing.assert_allclose(together.weights[seed], alone.weights, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(seen[0]["norm"][seed], seen[-1]["norm"], rtol=1e-5)
        assert int(together.count[seed]) == 6


def test_over_seeds_does_not_depend_on_their_number():
    few = loop.run(loop.over_seeds(ALGORITHM, 2), jax.random.key(9), num_steps=6, chunk_steps=6)
    many = loop.run(loop.over_seeds(ALGORITHM, 5), jax.random.key(9), num_steps=6, chunk_steps=6)
    np.testing.assert_allclose(few.weights, many.weights[:2], rtol=1e-5, atol=1e-6)
    assert not np.allclose(many.weights[0], many.weights[1])
    with pytest.raises(ValueError, match="num_seeds is 0"):
        loop.over_seeds(ALGORITHM, 0)


def test_progress_without_a_terminal_is_plain_lines(capsys):
    loop.run(
        ALGORITHM, jax.random.key(0), num_steps=10, chunk_steps=2, items_per_step=32, label="ppo"
    )
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "ppo: compiling"
    assert lines[1].startswith("ppo: compiled in ")
    assert lines[-1].startswith("ppo: 320 of 320 steps (100%), ")
    assert " steps/s, 0:00 left, " in lines[-1]
    assert "index 8.526" in lines[-1]  # (72 + 90) / 19, weighted towards the later step
    assert len(lines) <= 4


def test_progress_counts_in_the_unit_that_it_is_given(capsys):
    counts: dict[str, Any] = {"num_steps": 4, "chunk_steps": 2, "items_per_step": 1000}
    loop.run(ALGORITHM, jax.random.key(0), **counts, unit="tokens")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("training: 4,000 of 4,000 tokens (100%), ")
    assert " tokens/s, 0:00 left, " in last


PROGRAM = """
import jax, jax.numpy as jnp
from jaxrl_llm.training import loop
from jaxrl_llm.types import Algorithm, Mean
algorithm = Algorithm(
    init=lambda key: jax.random.normal(key),
    step=lambda key, x: (x + jax.random.normal(key), {"loss": Mean.of(jnp.float32(0.25))}),
)
loop.run(algorithm, jax.random.key(0), num_steps=40, chunk_steps=4, label="ppo [x]")
"""


def test_progress_on_a_terminal_is_a_bar():
    controller, terminal = pty.openpty()
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "TERM": "xterm",
        "COLUMNS": "120",
    }
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=terminal, env=environment)
    os.close(terminal)
    received = bytearray()

    def read():
        try:
            while data := os.read(controller, 1024):
                received.extend(data)
        except OSError:  # how Linux ends a pseudo-terminal
            pass

    reader = threading.Thread(target=read)
    reader.start()
    assert process.wait() == 0
    reader.join()
    os.close(controller)
    text = received.decode()
    for part in ("ppo [x]", "compiled in", "100%", "steps/s", "left", "loss 0.25", "━"):
        assert part in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (59.6, "1:00"), (61, "1:01"), (3_725, "1:02:05")]
)
def test_duration_reads_as_a_clock(seconds, text):
    assert loop._duration(seconds) == text


def test_import_is_light():
    names = ["checkpoint", "cli", "logging", "loop", "plotting"]
    imports = "; ".join(f"import jaxrl_llm.training.{name}" for name in names)
    heavy = "{'transformers', 'distrax', 'matplotlib', 'tensorboardX', 'orbax', 'tyro'}"
    program = f"import sys; {imports}; print(sorted({heavy} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
