"""Control in a table as its user meets it; with its defaults, what it claims."""

import json

import numpy as np
import pytest

from experiments import tabular_control
from tests import oracles


def run(tmp_path, **options):
    config = tabular_control.Config(output_dir=tmp_path, **options)
    result = tabular_control.main(config)
    (folder,) = (tmp_path / "tabular_control").iterdir()
    assert json.loads((folder / "result.json").read_text()) == result
    for picture in ("icu_sepsis", "exploration"):
        assert (folder / f"{picture}.png").stat().st_size > 20_000
    for name, known in (("random", "random"), ("clinicians", "expert"), ("optimum", "optimal")):
        expected = oracles.ICU_SEPSIS_RETURN[known]
        np.testing.assert_allclose(result[name], expected, atol=6e-5)
    return result


@pytest.mark.slow
def test_main_with_its_defaults_shows_what_it_claims(tmp_path, capsys):
    result = run(tmp_path)
    output = capsys.readouterr().out
    for title in ("ICU-Sepsis: survival", "RiverSwim", "Sepsis management", "Cliff: medians"):
        assert title in output
    assert result["Q-learning_mean"] >= 0.870
    assert result["Q-learning_mean"] > result["no mask_mean"] + 0.005
    np.testing.assert_allclose(result["SARSA_mean"], 0.8597, atol=0.003)
    # Along the edge Q-learning is best when greedy, SARSA while it explores.
    assert result["q_learning_greedy"] == pytest.approx(-13, abs=1e-3)
    assert result["sarsa_exploring"] > result["q_learning_exploring"]


def test_config_names_what_is_wrong():
    with pytest.raises(ValueError, match="num_seeds is 0; it must be at least 1"):
        tabular_control.Config(num_seeds=0).validate()
