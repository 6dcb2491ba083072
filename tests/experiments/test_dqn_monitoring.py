"""DQN on patient monitoring: its folder, its numbers, and what it learns."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import pytest

from experiments import dqn_monitoring
from jaxrl_llm.training import report

pytestmark = pytest.mark.slow


def main(config):
    """`main` without the key checker, which refuses scans over keys in a vmap."""
    with jax.debug_key_reuse(False):
        return dqn_monitoring.main(config)


def test_main_writes_its_folder_and_returns_what_is_known(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dqn_monitoring, "NUM_ITERATIONS", 4)
    settings = replace(
        dqn_monitoring.SETTINGS, num_environments=4, num_steps=8, warmup_steps=16, batch_size=16
    )
    config = dqn_monitoring.Config(
        output_dir=tmp_path,
        num_seeds=2,
        num_evaluations=2,
        num_checkpoints=1,
        dqn=settings,
    )
    result = main(config)
    (folder,) = (tmp_path / "dqn_monitoring").iterdir()
    assert json.loads((folder / "result.json").read_text()) == result
    for name in ("learning_curve.png", "episode.png"):
        assert (folder / name).stat().st_size > 10_000
    assert result["random"] < result["threshold"] < result["optimal"]
    assert result["greedy_min"] <= result["greedy_mean"] < result["optimal"]
    output = capsys.readouterr().out
    for name in ("random", "threshold", "optimal", "DQN, greedy", report.RESEARCH_ONLY):
        assert name in output


def test_default_settings_beats_the_threshold_rule(tmp_path):
    result = main(dqn_monitoring.Config(output_dir=tmp_path, num_seeds=2))
    assert result["greedy_mean"] > result["threshold"]
    assert result["optimal"] - 0.1 < result["greedy_mean"] < result["optimal"] + 0.02
