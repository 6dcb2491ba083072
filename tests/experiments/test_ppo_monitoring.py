"""PPO on patient monitoring: its folder, its numbers, and what it learns."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import pytest

from experiments import ppo_monitoring
from jaxrl_llm.training import report

pytestmark = pytest.mark.slow


def main(config):
    """`main` without the key checker, which refuses scans over keys in a vmap."""
    with jax.debug_key_reuse(False):
        return ppo_monitoring.main(config)


def check_output(tmp_path, result, output):
    (folder,) = (tmp_path / "ppo_monitoring").iterdir()
    assert json.loads((folder / "result.json").read_text()) == result
    for name in ("learning_curve.png", "episode.png"):
        assert (folder / name).stat().st_size > 10_000
    assert result["random"] < result["threshold"] < result["optimal"]
    for name in ("random", "threshold", "optimal", "PPO, mode", report.RESEARCH_ONLY):
        assert name in output


def test_a_memory_of_vital_signs_alone_writes_its_folder(tmp_path, capsys):
    size = {"num_environments": 4, "num_steps": 8, "num_iterations": 2}
    config = ppo_monitoring.Config(
        output_dir=tmp_path,
        num_seeds=2,
        num_evaluations=2,
        num_checkpoints=1,
        recurrent=True,
        vital_signs_only=True,
        recurrent_ppo=replace(ppo_monitoring.RECURRENT, **size),
    )
    result = main(config)
    check_output(tmp_path, result, capsys.readouterr().out)
    assert result["mode_mean"] < result["optimal"]


def test_default_settings_comes_close_to_the_optimum(tmp_path, capsys):
    result = main(ppo_monitoring.Config(output_dir=tmp_path, num_seeds=2))
    check_output(tmp_path, result, capsys.readouterr().out)
    assert result["mode_min"] > result["threshold"]
    assert result["optimal"] - 0.1 < result["mode_mean"] < result["optimal"] + 0.02
