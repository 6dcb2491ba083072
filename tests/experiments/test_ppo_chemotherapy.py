"""PPO on chemotherapy: its folder and numbers, what it learns, and the constant doses beside it."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from experiments import ppo_chemotherapy
from jaxrl_llm.training import logging, report

pytestmark = pytest.mark.slow


def main(config):
    """`main` without the key checker, which refuses scans over keys in a vmap."""
    with jax.debug_key_reuse(False):
        return ppo_chemotherapy.main(config)


def test_default_settings_beats_the_best_constant_dose_and_writes_its_folder(tmp_path, capsys):
    config = ppo_chemotherapy.Config(
        output_dir=tmp_path, num_seeds=2, num_evaluations=2, num_checkpoints=1
    )
    result = main(config)
    assert result["mode_min"] > 350
    assert result["stochastic_min"] > 350
    assert 67.8 < result["best_constant"] < 67.9  # at 0.467
    (folder,) = (tmp_path / "ppo_chemotherapy").iterdir()
    assert json.loads((folder / "result.json").read_text()) == result
    for name in ("learning_curve.png", "episode.png"):
        assert (folder / name).stat().st_size > 10_000
    lines = logging.read_metrics(folder)
    assert [line["step"] for line in lines] == [75, 150]
    np.testing.assert_allclose(result["mode_mean"], np.mean(lines[-1]["mode"]), rtol=1e-3)
    output = capsys.readouterr().out
    for name in ("constant 0.500", "constant 0.467", "PPO, mode", report.RESEARCH_ONLY):
        assert name in output
