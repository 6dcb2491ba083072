"""Planning over beliefs as its user meets it: oracle values, pictures, mistakes."""

from __future__ import annotations

import json
import sys

import pytest
from matplotlib.image import imread

from experiments import pomdp_tiger
from jaxrl_llm.training import cli, report


@pytest.mark.slow
def test_main_encloses_the_tigers_value_and_samples_it(tmp_path, capsys):
    config = pomdp_tiger.Config(
        output_dir=tmp_path, problems=("tiger",), num_beliefs=41, num_episodes=4000
    )
    result = pomdp_tiger.main(config)
    assert abs(result["tiger_value"] - 19.371368) < 1e-6
    assert result["tiger_missing"] < 1e-6
    assert abs(result["tiger_QMDP"] - 189) < 1e-6
    assert abs(result["tiger_plans_return"] - 19.371368) < 2
    (folder,) = (tmp_path / "pomdp_tiger").iterdir()
    assert json.loads((folder / "result.json").read_text()) == result
    assert imread(folder / "tiger.png").ndim == 3
    output = capsys.readouterr().out
    assert "19.371368" in output
    assert output.count(report.RESEARCH_ONLY) == 2


@pytest.mark.slow
def test_main_treats_above_a_threshold_and_tests_before(tmp_path, capsys):
    config = pomdp_tiger.Config(
        output_dir=tmp_path, problems=("diagnosis",), num_beliefs=41, num_episodes=4000
    )
    result = pomdp_tiger.main(config)
    order = ("blind_policies", "value", "sawtooth", "fast_informed_bound", "QMDP")
    values = [result[f"diagnosis_{name}"] for name in order]
    assert values == sorted(values)
    # QMDP never pays to know, and loses by it.
    assert result["diagnosis_plans_return"] > result["diagnosis_QMDP_return"] + 0.5
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    named = ("Wait", "Screening", "Biopsy", "Treat")
    assert [line[0] for line in lines if line and line[0] in named] == list(named)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--problems", "--problems is empty; name at least one"),
        ("--num-beliefs 1", "--num-beliefs is 1; it must be at least 2"),
        ("--num-episodes 0", "--num-episodes is 0; it must be at least 2"),
    ],
)
def test_mistakes_of_the_user_end_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pomdp_tiger", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main(pomdp_tiger.main, pomdp_tiger.Config)
    assert (stop.value.code, capsys.readouterr().err) == (2, f"error: {message}\n")
