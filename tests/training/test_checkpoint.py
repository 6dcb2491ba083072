"""Checkpoints come back bit by bit, or say in one line why not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_llm.training import checkpoint
from jaxrl_llm.types import TrainState


@struct.dataclass(kw_only=True)
class Hidden:
    train: TrainState
    buffer: jax.Array
    key: jax.Array
    unused: None = None
    name: str = struct.field(pytree_node=False, default="static")


def make_state(key, width=3):
    weights_key, buffer_key, state_key = jax.random.split(key, 3)
    params = {
        "a/b": {"kernel.0": jax.random.normal(weights_key, (2, width))},
        "a": (jnp.full((4,), 0.1, jnp.bfloat16), [jnp.arange(3, dtype=jnp.uint8)]),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    train = TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(7))
    special = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-40])
    buffer = jnp.concatenate([special, jax.random.normal(buffer_key, (4,))])
    return Hidden(train=train, buffer=buffer, key=jax.random.split(state_key, 2))


def raw(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert raw(a) == raw(b)


def damage(directory, step, pattern="ocdbt.process_0/d/*"):
    """Flips one bit in the middle of the largest file of a step."""
    files = [path for path in (directory / str(step) / "state").glob(pattern) if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path.relative_to(directory / str(step)).as_posix()


@pytest.fixture
def state():
    return make_state(jax.random.key(0))


@pytest.fixture
def target():
    return jax.eval_shape(make_state, jax.random.key(0))


def test_restore_is_bit_exact_for_every_kind_of_leaf(tmp_path, state, target):
    checkpoint.save(tmp_path, 5, state, {"config": {"seed": 1}, "best": 0.5})
    restored, step, meta = checkpoint.restore(tmp_path, target)
    assert (step, meta) == (5, {"config": {"seed": 1}, "best": 0.5})
    assert type(restored) is Hidden
    assert type(restored.train) is TrainState
    assert type(restored.train.opt_state[1][0]) is optax.ScaleByAdamState
    assert_same(restored, state)
    from_arrays, _, _ = checkpoint.restore(tmp_path, state)
    assert_same(from_arrays, state)


def test_restored_key_continues_the_same_random_numbers(tmp_path):
    checkpoint.save(tmp_path, 0, {"key": jax.random.key(3, impl="rbg")})
    target = {"key": jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))}
    restored, _, meta = checkpoint.restore(tmp_path, target)
    assert meta == {}
    expected = jax.random.normal(jax.random.key(3, impl="rbg"), (5,))
    np.testing.assert_array_equal(jax.random.normal(restored["key"], (5,)), expected)


def test_restore_numpy_as_numpy_without_truncation(tmp_path):
    large = {"count": np.array([2**40], np.int64)}
    checkpoint.save(tmp_path, 0, large)
    restored, _, _ = checkpoint.restore(tmp_path, large)
    assert isinstance(restored["count"], np.ndarray)
    assert_same(restored, large)


def test_restore_to_the_sharding_of_the_target(tmp_path):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    values = {"x": jax.device_put(jnp.arange(8.0), sharding)}
    checkpoint.save(tmp_path, 0, values)
    restored, _, _ = checkpoint.restore(tmp_path, values)
    assert restored["x"].sharding == sharding
    assert_same(restored, values)
    # Saved on four devices, restored on one.
    single, _, _ = checkpoint.restore(tmp_path, jax.eval_shape(lambda: {"x": jnp.arange(8.0)}))
    assert len(single["x"].devices()) == 1
    assert_same(single, values)


def test_save_keeps_the_last_three(tmp_path, state, target):
    for step in (0, 2, 7, 9, 30):
        checkpoint.save(tmp_path, step, state)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [7, 9, 30]
    assert checkpoint.restore(tmp_path, target)[1] == 30


def test_restore_skips_damage_and_says_so(tmp_path, state, target, capsys):
    for step in (8, 10, 12):
        checkpoint.save(tmp_path, step, state.replace(buffer=jnp.full((8,), float(step))))
    name = damage(tmp_path, 12)
    restored, step, _ = checkpoint.restore(tmp_path, target)
    assert step == 10
    np.testing.assert_array_equal(restored.buffer, np.full((8,), 10.0))
    assert capsys.readouterr().err == (
        f"warning: checkpoint 12 in {tmp_path} is damaged (file {name} differs from its "
        "manifest); using checkpoint 10\n"
    )


@pytest.mark.parametrize(
    ("break_it", "fault"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "never sealed"),
        (lambda folder: (folder / "manifest.json").write_text('{"a"'), "manifest.json cannot be"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json cannot be"),
        (lambda folder: shutil.rmtree(folder / "state"), "is missing"),
        (lambda folder: (folder / "state" / "more").write_text("x"), "file state/more is not in"),
        (lambda folder: shutil.rmtree(folder) or folder.mkdir(), "never sealed"),
    ],
)
def test_restore_notices(tmp_path, state, target, capsys, break_it, fault):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state)
    break_it(tmp_path / "2")
    assert checkpoint.restore(tmp_path, target)[1] == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert fault in lines[0]
    # Going on from step 1, the run comes to step 2 again.
    checkpoint.save(tmp_path, 2, state)
    assert checkpoint.restore(tmp_path, target)[1] == 2
    assert capsys.readouterr().err == ""


def test_save_before_a_damaged_step_removes_it(tmp_path, state, target):
    for step in (1, 9):
        checkpoint.save(tmp_path, step, state)
    damage(tmp_path, 9)
    checkpoint.save(tmp_path, 2, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_save_never_overwrites_a_sound_step(tmp_path, state):
    checkpoint.save(tmp_path, 9, state)
    for step in (2, 9):
        with pytest.raises(ValueError, match=f"step is {step}, but .* has checkpoint 9; resume"):
            checkpoint.save(tmp_path, step, state)


def test_restore_error_when_nothing_is_sound(tmp_path, state, target):
    with pytest.raises(ValueError, match="has no checkpoints; give the folder"):
        checkpoint.restore(tmp_path, target)
    with pytest.raises(ValueError, match="absent cannot be read: no such file"):
        checkpoint.restore(tmp_path / "absent", target)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file cannot be read: not a directory"):
        checkpoint.restore(tmp_path / "file", target)
    checkpoint.save(tmp_path, 3, state)
    damage(tmp_path, 3)
    with pytest.raises(
        ValueError, match=r"has no sound checkpoint: checkpoint 3 is damaged \(file"
    ):
        checkpoint.restore(tmp_path, target)


def test_restore_error_names_the_leaf_that_does_not_fit(tmp_path, state, target):
    checkpoint.save(tmp_path, 3, state)
    wider = jax.eval_shape(lambda key: make_state(key, width=5), jax.random.key(0))
    path = r"state\.train\.params\['a/b'\]\['kernel\.0'\]"
    with pytest.raises(ValueError, match=rf"3 in .*: {path} is float32\[2, 3\], not float32\[2, 5"):
        checkpoint.restore(tmp_path, wider)
    cast = target.replace(buffer=jax.ShapeDtypeStruct((8,), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"state\.buffer is float32\[8\], not bfloat16\[8\]"):
        checkpoint.restore(tmp_path, cast)
    other_key = target.replace(key=jax.eval_shape(lambda: jax.random.key(0, impl="rbg")))
    with pytest.raises(ValueError, match=r"state\.key is key<fry>\[2\], not key<rbg>\[\]"):
        checkpoint.restore(tmp_path, other_key)
    with pytest.raises(ValueError, match=r"has no state\['x'\]"):
        checkpoint.restore(tmp_path, {"x": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"has state\.buffer, which this run does not"):
        checkpoint.restore(tmp_path, target.replace(buffer=None))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ("text", r"state\['x'\]\[1\] is 'text', not an array"),
        (3, r"state\['x'\]\[1\] is 3, not an array"),
        (np.array(["a"]), r"state\['x'\]\[1\] has dtype <U1"),
        (np.zeros((0, 3)), r"state\['x'\]\[1\] has shape \[0, 3\], no elements"),
    ],
)
def test_save_refuses_a_leaf_and_later_saves_work(tmp_path, leaf, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path, 1, {"x": [jnp.zeros(2), leaf]})
    checkpoint.save(tmp_path, 1, {"x": jnp.zeros(2)})
    assert checkpoint.restore(tmp_path, {"x": jnp.zeros(2)})[1] == 1


def test_save_refuses_meta_that_is_not_json(tmp_path, state):
    with pytest.raises(ValueError, match="meta is not JSON"):
        checkpoint.save(tmp_path, 1, state, {"path": tmp_path})


def test_saved_state_is_safe_from_donation(tmp_path):
    values = {"x": jnp.arange(1000.0)}
    checkpoint.save(tmp_path, 1, values)
    jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)(values)
    restored, _, _ = checkpoint.restore(tmp_path, jax.eval_shape(lambda: {"x": jnp.arange(1000.0)}))
    np.testing.assert_array_equal(restored["x"], np.arange(1000.0))


SAVER = """
import sys, jax, jax.numpy as jnp
from jaxrl_llm.training import checkpoint
for step in range(1, 10_000):
    checkpoint.save(sys.argv[1], step, {"x": jnp.full((50_000,), float(step))})
    print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_save_survives_kill_at_any_moment(tmp_path, seed):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    )
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    time.sleep(random.Random(seed).uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    finished = int(([3, *map(int, process.communicate()[0].split())])[-1])
    target = {"x": jax.ShapeDtypeStruct((50_000,), jnp.float32)}
    restored, step, _ = checkpoint.restore(tmp_path, target)
    assert step in (finished, finished + 1)
    np.testing.assert_array_equal(restored["x"], np.full((50_000,), float(step)))
    checkpoint.save(tmp_path, step + 1, restored)
    assert checkpoint.restore(tmp_path, target)[1] == step + 1
