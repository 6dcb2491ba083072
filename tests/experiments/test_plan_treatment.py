"""Exact planning as its user meets it: oracle values, the same bits when resumed, mistakes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from experiments import plan_treatment
from jaxrl_llm.training import cli, evaluate, experiment, logging, report
from tests import oracles

SMALL = {
    "treatment": (oracles.TREATMENT_VALUE, 1e-5),
    "diabetes": (oracles.DIABETES_VALUE, 1e-3),
    "sepsis_management": (oracles.SEPSIS_MANAGEMENT_VALUE, 1e-3),
}


def run_folder(output_dir: Path) -> Path:
    (folder,) = (output_dir / "plan_treatment").iterdir()
    return folder


def tables(output: str) -> list[str]:
    """What is printed after the progress, without the folder."""
    lines = [line.rstrip() for line in output.splitlines()]
    return lines[lines.index("") : -1]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[plan_treatment.Config, dict[str, float]]:
    config = plan_treatment.Config(
        output_dir=tmp_path_factory.mktemp("small"),
        problems=("treatment", "diabetes", "sepsis_management"),
    )
    return config, plan_treatment.main(config)


@pytest.mark.slow
def test_main_finds_the_oracles_values(small):
    config, result = small
    assert list(result) == [f"{name}_{key}" for name in SMALL for key in ("value", "residual")]
    for name, (value, tolerance) in SMALL.items():
        np.testing.assert_allclose(result[f"{name}_value"], value.mean(), atol=tolerance)
        assert 0 < result[f"{name}_residual"] <= config.tolerance


@pytest.mark.slow
def test_main_leaves_result_metrics_and_pictures(small):
    config, result = small
    folder = run_folder(config.output_dir)
    assert json.loads((folder / "result.json").read_text()) == result
    assert logging.read_config(folder, plan_treatment.Config) == config
    lines = logging.read_metrics(folder)
    pairs = [(name, solver) for name in SMALL for solver in evaluate.SOLVERS]
    assert [line["step"] for line in lines] == [*range(1, 13)]
    for line, (name, solver) in zip(lines, pairs, strict=True):
        assert line[f"{name}/{solver}/converged"] == 1
        value, tolerance = SMALL[name]
        np.testing.assert_allclose(line[f"{name}/{solver}/value"], value.mean(), atol=tolerance)
    for name in SMALL:
        for kind in ("policy", "convergence"):
            assert imread(folder / f"{name}_{kind}.png").ndim == 3


@pytest.mark.slow
def test_main_resumed_prints_the_same_and_solves_nothing(small, monkeypatch, capsys):
    config, result = small
    folder = run_folder(config.output_dir)
    monkeypatch.setattr(experiment, "run_solver", None)
    latest = plan_treatment.Config(output_dir=config.output_dir, resume=Path("latest"))
    assert plan_treatment.main(latest) == result
    output = capsys.readouterr().out
    first, second, *_ = output.splitlines()
    assert first == f"plan_treatment: resuming {folder}"
    assert second == "restored step 12 of 12"
    assert plan_treatment.main(latest) == result
    assert capsys.readouterr().out == output
    assert output.count("All 4 solvers choose the same action in every state") == 3
    assert output.count(report.RESEARCH_ONLY) == 6
    # The rows of the plan of treatment: state, action, value and margin, from the oracle.
    mdp = oracles.treatment_mdp()
    q = mdp.expected_reward() + mdp.discount * mdp.expect(
        jnp.asarray(oracles.TREATMENT_VALUE, jnp.float32)
    )
    ordered = np.sort(q, axis=1)
    rows = [line.split() for line in tables(output) if line.startswith(("Critical", "Recovered"))]
    for row, state, action in zip(rows, (0, 4), ("Surgery", "Conservative"), strict=True):
        assert row[1] == action
        expected = oracles.TREATMENT_VALUE[state], ordered[state, -1] - ordered[state, -2]
        np.testing.assert_allclose(np.array(row[2:], float), expected, atol=1e-3)


@pytest.mark.slow
def test_main_in_float32_says_so_in_its_residuals(tmp_path, capsys):
    config = plan_treatment.Config(
        output_dir=tmp_path, problems=("treatment",), precision="float32"
    )
    result = plan_treatment.main(config)
    expected = oracles.TREATMENT_VALUE.mean()
    np.testing.assert_allclose(result["treatment_value"], expected, atol=1e-3)
    assert config.tolerance < result["treatment_residual"] < 1e-3
    assert "All 4 solvers choose the same action in every state" in capsys.readouterr().out


@pytest.mark.slow
def test_main_on_icu_sepsis_finds_the_optimum_beside_random_and_clinicians(tmp_path, capsys):
    problems = ("treatment", "icu_sepsis")
    config = plan_treatment.Config(output_dir=tmp_path, problems=problems)
    result = plan_treatment.main(config)
    known = {"random": "random", "clinicians": "expert", "optimum": "optimal"}
    for name, oracle in known.items():
        expected = oracles.ICU_SEPSIS_RETURN[oracle]
        np.testing.assert_allclose(result[f"icu_sepsis_{name}"], expected, atol=6e-5)
    np.testing.assert_allclose(result["icu_sepsis_value"], result["icu_sepsis_optimum"], atol=1e-9)
    assert result["icu_sepsis_residual"] <= config.tolerance
    lines = logging.read_metrics(run_folder(tmp_path))[4:]
    for line, solver in zip(lines, evaluate.SOLVERS, strict=True):
        value = line[f"icu_sepsis/{solver}/value"]
        np.testing.assert_allclose(value, result["icu_sepsis_optimum"], atol=1e-7)
    assert capsys.readouterr().out.count("All 4 solvers choose the same action") == 2
    resumed = replace(config, resume=run_folder(tmp_path))
    assert plan_treatment.main(resumed) == result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--problems", "--problems is empty; name at least one"),
        ("--tolerance -1", "--tolerance is -1.0; it must be at least 0"),
        ("--precision float16", "--precision is float16; it must be one of float64, float32"),
        ("--problem treatment", "--problem is not an option; did you mean --problems?"),
    ],
)
def test_mistakes_of_the_user_end_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan_treatment", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main(plan_treatment.main, plan_treatment.Config)
    assert (stop.value.code, capsys.readouterr().err) == (2, f"error: {message}\n")


@pytest.mark.slow
def test_resume_refuses_another_tolerance(small, monkeypatch, capsys):
    folder = run_folder(small[0].output_dir)
    arguments = ["plan_treatment", "--resume", str(folder), "--tolerance", "0.1"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main(plan_treatment.main, plan_treatment.Config)
    message = f"--tolerance is 0.1, but {folder} was started with 1e-09; leave it out, or start a"
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {message} new run\n"
