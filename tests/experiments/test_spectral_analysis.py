"""Spectra as their user meets them: oracles beside the results, pictures, mistakes."""

from __future__ import annotations

import json
import re
import sys
from math import sqrt

import numpy as np
import pytest
from matplotlib.image import imread

from experiments import spectral_analysis
from jaxrl_llm.training import cli, report
from tests import oracles

SMALL = ("patient", "illness", "treatment", "ward_rota")


def rows_with_an_oracle(output: str) -> list[tuple[float, float]]:
    """Computed and known, from each line of a table that ends in both."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
    rows = [cells for cells in lines if len(cells) == 3 and cells[0] != "measure"]
    return [(float(computed), float(known)) for _, computed, known in rows]


@pytest.mark.slow
def test_main_finds_the_oracles_of_small_chains_and_draws_them(tmp_path, capsys):
    result = spectral_analysis.main(spectral_analysis.Config(output_dir=tmp_path, chains=SMALL))
    second = oracles.PATIENT_CHAIN_EIGENVALUES[1]
    expected = {
        "patient_second_eigenvalue": second,
        "patient_spectral_gap": 1 - second,
        "patient_relaxation_time": oracles.PATIENT_CHAIN_MIXING_TIME,
        "patient_absorbed_in_Recovered": 1,
        "illness_second_eigenvalue": 0.6 + sqrt(0.02),
        "illness_long_run_Ill": 1 / 14,
        "illness_long_run_Healthy": 9 / 14,
        "treatment_absorbed_in_Recovered": 1,
        "ward_rota_second_eigenvalue": 1,
        "ward_rota_largest_modulus_below_1": 0.6,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, atol=1e-6, err_msg=name)
    chosen = oracles.TREATMENT_TRANSITION[np.arange(5), oracles.TREATMENT_POLICY]
    times = np.linalg.solve(np.eye(4) - chosen[:4, :4], np.ones(4))
    time = result["treatment_time_to_absorption"]
    np.testing.assert_allclose(time, times.sum() / 5, atol=1e-9)

    output = capsys.readouterr().out
    compared = np.array(rows_with_an_oracle(output))
    assert len(compared) == 7
    np.testing.assert_allclose(compared[:, 0], compared[:, 1], atol=1e-6)
    assert output.count(report.RESEARCH_ONLY) == len(SMALL)
    (folder,) = (tmp_path / "spectral_analysis").iterdir()
    assert json.loads((folder / "result.json").read_text()) == result
    for name in ("convergence", *(f"{name}_eigenvalues" for name in SMALL)):
        assert imread(folder / f"{name}.png").ndim == 3


@pytest.mark.slow
def test_main_on_icu_sepsis_finds_stay_and_survival(tmp_path):
    chains = ("random", "clinicians", "optimal")
    result = spectral_analysis.main(spectral_analysis.Config(output_dir=tmp_path, chains=chains))
    for name, oracle in zip(chains, ("random", "expert", "optimal"), strict=True):
        survival, stay = oracles.ICU_SEPSIS_RETURN[oracle], oracles.ICU_SEPSIS_LENGTH[oracle]
        np.testing.assert_allclose(result[f"{name}_absorbed_in_Survival"], survival, atol=6e-5)
        np.testing.assert_allclose(result[f"{name}_time_to_absorption"], stay, atol=6e-5)
    (folder,) = (tmp_path / "spectral_analysis").iterdir()
    assert imread(folder / "clinicians_low_rank.png").ndim == 3


def test_mistakes_of_the_user_end_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["spectral_analysis", "--chains", "patients"])
    with pytest.raises(SystemExit) as stop:
        cli.main(spectral_analysis.main, spectral_analysis.Config)
    assert stop.value.code == 2
    assert "patients" in capsys.readouterr().err
