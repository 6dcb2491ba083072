"""The files of a run: what is in them, and what survives a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.training import logging


@dataclass(frozen=True)
class Learner:
    rate: float = 1e-3
    sizes: tuple[int, ...] = (64, 64)
    window: tuple[int, float] = (1, 0.5)


@dataclass(frozen=True)
class Config:
    ppo: Learner = Learner()
    seed: int = 0
    mode: Literal["fast", "exact"] = "fast"
    resume: Path | None = None
    limit: float | None = None
    verbose: bool = False


def test_run_directory_is_unique_within_a_second(tmp_path):
    made = [logging.run_directory(tmp_path / "runs", "ppo") for _ in range(5)]
    assert len(set(made)) == 5
    assert all(path.is_dir() and path.parent == tmp_path / "runs" / "ppo" for path in made)
    assert sorted(made, key=lambda path: path.stat().st_mtime_ns) == made


def test_run_log_writes_one_valid_object_a_line(tmp_path):
    with logging.RunLog(tmp_path) as log:
        log.write(10, {"loss": 0.5, "return": jnp.array([1.0, 3.0])})
        log.write(20, {"loss": float("nan"), "return": np.array([np.inf, 2.0])})
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first.pop("seconds") <= second.pop("seconds")
    assert first == {"step": 10, "loss": 0.5, "return": [1.0, 3.0]}
    assert second == {"step": 20, "loss": None, "return": [None, 2.0]}


def test_run_log_refuses_a_reserved_name(tmp_path):
    reserved = pytest.raises(ValueError, match=r"metrics\['step'\] is a reserved name")
    with logging.RunLog(tmp_path) as log, reserved:
        log.write(1, {"step": 2.0})


def _tensorboard(directory):
    """`(step, tag, value)` of every scalar, file after file, and the purge steps."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    scalars, purged = [], []
    for path in sorted(directory.glob("events.out.*"), key=lambda path: path.stat().st_mtime_ns):
        data, offset = path.read_bytes(), 0
        while offset < len(data):
            # A record is length (8 bytes), its checksum (4), the event, and its checksum (4).
            length = int.from_bytes(data[offset : offset + 8], "little")
            event = Event.FromString(data[offset + 12 : offset + 12 + length])
            offset += length + 16
            if event.HasField("session_log"):
                purged.append(event.step)
            scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return scalars, purged


def test_run_log_tensorboard_has_the_median_of_seeds(tmp_path):
    with logging.RunLog(tmp_path) as log:
        log.write(10, {"loss": 0.5, "return": np.array([1.0, 9.0, 3.0])})
    scalars, _ = _tensorboard(tmp_path)
    assert scalars == [(10, "loss", 0.5), (10, "return", 3.0)]


def test_run_log_resumed_drops_later_and_half_written_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 10, "seconds": 5.0, "loss": 3.0}\n'
        '{"step": 20, "seconds": 100.0, "loss": 2.0}\n'
        '{"step": 30, "seconds": 150.0, "loss": 1.0}\n'
        '{"step": 40, "seco'
    )
    with logging.RunLog(tmp_path, resume_step=20) as log:
        assert [line["step"] for line in logging.read_metrics(tmp_path)] == [10, 20]
        log.write(30, {"loss": 1.5})
    lines = logging.read_metrics(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [(10, 3.0), (20, 2.0), (30, 1.5)]
    assert 100.0 <= lines[-1]["seconds"] < 110.0
    assert _tensorboard(tmp_path)[1] == [21]


@pytest.mark.slow
def test_run_log_survives_kill(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from jaxrl_llm.training import logging\n"
        f"log = logging.RunLog({str(tmp_path)!r})\n"
        "for step in range(1, 6): log.write(step, {'loss': 0.1 * step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [line["step"] for line in logging.read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_write_result_is_valid_json_and_leaves_no_other_file(tmp_path):
    logging.write_result(tmp_path, {"return": jnp.float32(0.5), "ratio": float("inf")})
    assert json.loads((tmp_path / "result.json").read_text()) == {"return": 0.5, "ratio": None}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(ppo=Learner(rate=0.5, sizes=()), seed=3, mode="exact", resume=Path("a/b")),
        Config(ppo=Learner(rate=float("inf"), window=(2, 1.0)), limit=-float("inf"), verbose=True),
    ],
)
def test_read_config_returns_what_was_written(tmp_path, config):
    logging.write_config(tmp_path, config)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)
    restored = logging.read_config(tmp_path, Config)
    assert restored == config
    assert hash(restored) == hash(config)
    assert isinstance(restored.ppo.rate, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 1}, "sed is not a known field"),
        ({"seed": None}, "seed is None, not int"),
        ({"seed": True}, "seed is True, not int"),
        ({"mode": "slow"}, "mode is 'slow', not "),
        ({"ppo": 3}, "ppo is 3, not an object"),
        ({"ppo": {"rate": 1.0, "sizes": [1]}}, "ppo.window is missing"),
        ({"ppo": {"rate": "x", "sizes": [1], "window": [1, 1]}}, "ppo.rate is 'x', not float"),
        ({"ppo": {"rate": 1, "sizes": [1, "a"], "window": [1, 1]}}, "ppo.sizes[1] is 'a', not int"),
        ({"ppo": {"rate": 1, "sizes": [1], "window": [1]}}, "ppo.window is [1], not "),
    ],
)
def test_read_config_error_names_the_file_and_field(tmp_path, change, message):
    logging.write_config(tmp_path, Config())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")) as error:
        logging.read_config(tmp_path, Config)
    assert "\n" not in str(error.value)


def test_read_config_error_of_an_absent_or_damaged_file(tmp_path):
    with pytest.raises(ValueError, match="cannot be read; resume from the folder of a run"):
        logging.read_config(tmp_path, Config)
    (tmp_path / "config.json").write_text('{"seed"')
    with pytest.raises(ValueError, match="is not valid JSON"):
        logging.read_config(tmp_path, Config)
