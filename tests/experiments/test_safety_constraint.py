"""Safety as a constraint: both policies are examined, and the multiplier is on record."""

from __future__ import annotations

import pytest

from experiments import safety_constraint
from jaxrl_llm.training import cli, logging
from tests.experiments.alignment import FLAGS, is_finite, run_folder, tiny_config
from tests.lm import tiny

quick_compilation = pytest.fixture(scope="module", autouse=True)(tiny.quick_compilation)


@pytest.mark.slow
def test_main_examines_both_policies_and_records_the_multiplier(tmp_path):
    config = tiny_config(safety_constraint.Config, tmp_path, "--at-least=0.95")
    result = safety_constraint.main(config)
    assert is_finite(result)
    for name in ("sft", "weighted", "constrained"):
        low, mean, high = (result[f"{name}_safety_{end}"] for end in ("low", "mean", "high"))
        assert low <= mean <= high
    lines = logging.read_metrics(run_folder(tmp_path) / "constrained")
    # What this policy says is not safe, so the multiplier rises.
    assert lines[-1]["multiplier"] > lines[0]["multiplier"] >= 0
    assert "multiplier" not in logging.read_metrics(run_folder(tmp_path) / "weighted")[0]


def test_a_limit_that_is_no_share_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.parse(safety_constraint.Config, [*FLAGS, "--at-least=1.2"])
    assert capsys.readouterr().err == "error: --at-least is 1.2; it must be in [0, 1]\n"
