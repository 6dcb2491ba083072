"""DQN on patient monitoring: its folder, its numbers, and what it learns."""

from __future__ import annotations

import json

import jax
import pytest

from experiments import dqn_monitoring
from jaxrl_llm.training import report

pytestmark = pytest.mark.slow


def main(config):
    """`main` without the key checker, which refuses scans over keys in a vmap."""
    with jax.debug_key_reuse(False):
        return dqn_monitoring.main(config)


def test_default_settings_beats_the_threshold_rule_and_writes_its_folder(tmp_path, capsys):
    result = main(dqn_monitoring.Config(output_dir=tmp_path, num_seeds=2))
    assert result["greedy_mean"] > result["threshold"]
    assert result["optimal"] - 0.1 < result["greedy_mean"] < result["optimal"] + 0.02
    (folder,) = (tmp_path / "dqn_monitoring").iterdir()
    assert json.loads((folder / "result.json").read_text()) == result
    for name in ("learning_curve.png", "episode.png"):
        assert (folder / name).stat().st_size > 10_000
    assert result["random"] < result["threshold"] < result["optimal"]
    assert result["greedy_min"] <= result["greedy_mean"]
    output = capsys.readouterr().out
    for name in ("random", "threshold", "optimal", "DQN, greedy", report.RESEARCH_ONLY):
        assert name in output
