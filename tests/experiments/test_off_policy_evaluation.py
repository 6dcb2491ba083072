"""Off-policy evaluation as its user meets it: the published setting, a CSV file, mistakes."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from experiments import off_policy_evaluation
from jaxrl_llm.training import cli, report
from tests import oracles


@pytest.mark.slow
def test_main_covers_the_clinicians_and_warns_of_the_optimum(tmp_path, capsys):
    result = off_policy_evaluation.main(off_policy_evaluation.Config(output_dir=tmp_path))
    output = capsys.readouterr().out
    np.testing.assert_allclose(
        result["clinicians exact"], oracles.ICU_SEPSIS_RETURN["expert"], atol=1e-4
    )
    np.testing.assert_allclose(
        result["optimal exact"], oracles.ICU_SEPSIS_RETURN["optimal"], atol=1e-4
    )
    np.testing.assert_allclose(result["9/10 optimal exact"], 0.8636, atol=1e-4)
    np.testing.assert_allclose(result["clinicians DR"], 0.7818, atol=0.045)
    np.testing.assert_allclose(result["clinicians WIS"], 0.7818, atol=0.1)
    assert "count for optimal at decision" in output
    assert "count for clinicians" not in output
    assert output.count(report.RESEARCH_ONLY) == 2


@pytest.mark.slow
def test_main_reads_a_log(tmp_path, capsys):
    random = np.random.default_rng(0)
    lines = ["patient,time,state,action,reward"]
    for patient in range(60):
        for time in range(random.integers(1, 4)):
            action = ("Wait", "Treat")[random.integers(2)]
            lines.append(f"{patient},{time},{('Ill', 'Well')[random.integers(2)]},{action},1")
    path = tmp_path / "ward.csv"
    path.write_text("\n".join(lines) + "\n")
    config = off_policy_evaluation.Config(
        output_dir=tmp_path, csv=path, gamma=0.9, num_resamples=100
    )
    result = off_policy_evaluation.main(config)
    output = capsys.readouterr().out
    assert "ward: value by 30 logged trajectories" in output
    assert "EXACT" not in output
    # A reward of 1 a step, 2 steps on average.
    assert 1 < result["clinicians WIS"] < 2.8
    assert set(result) == {
        f"{target} {name}"
        for target in ("clinicians", "9/10 learned")
        for name in ("IS", "WIS", "PDIS", "WPDIS", "DR", "WDR", "MAGIC", "FQE")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-episodes 3", "--num-episodes is 3; it must be at least 10"),
        ("--gamma 1.5", "--gamma is 1.5; it must be in [0, 1]"),
        (
            "--csv nowhere.csv",
            "nowhere.csv cannot be read: No such file or directory; check the path",
        ),
    ],
)
def test_mistakes_of_the_user_end_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["off_policy_evaluation", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main(off_policy_evaluation.main, off_policy_evaluation.Config)
    assert (stop.value.code, capsys.readouterr().err) == (2, f"error: {message}\n")
