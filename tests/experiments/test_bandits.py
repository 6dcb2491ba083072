"""The experiment as its user meets it: exact values beside simulated ones, mistakes in one line."""

import json
import sys

import pytest
from matplotlib.image import imread

from experiments import bandits
from jaxrl_llm.training import cli


def run(tmp_path, **options):
    result = bandits.main(bandits.Config(output_dir=tmp_path, **options))
    (folder,) = (tmp_path / "bandits").iterdir()
    return result, folder


@pytest.mark.slow
def test_main_finds_the_published_regret_and_the_exact_ones(tmp_path):
    """The defaults; UCB1's 63.1 is the mean of an independent program's 1000 runs."""
    result, folder = run(tmp_path)
    error = result["Three treatments/UCB1/standard_error"]
    assert abs(result["Three treatments/UCB1/mean"] - 63.1) < 3 * 2**0.5 * error
    for name in ("epsilon-greedy .1", "Boltzmann .1", "UCB1", "Thompson"):
        stem = f"{bandits.EXACT}/{name}"
        error = result[f"{stem}/standard_error"]
        assert abs(result[f"{stem}/mean"] - result[f"{stem}/exact"]) < 3 * error
    context = "Patients with features"
    assert result[f"{context}/LinUCB/mean"] < 0.1 * result[f"{context}/the best fixed arm/exact"]
    assert json.loads((folder / "result.json").read_text()) == result
    assert imread(folder / "regret.png").ndim == 3


def test_mistakes_of_the_user_end_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bandits", "--horizon", "1"])
    with pytest.raises(SystemExit, match="2"):
        cli.main(bandits.main, bandits.Config)
    assert capsys.readouterr().err == "error: --horizon is 1; it must be at least 2\n"
