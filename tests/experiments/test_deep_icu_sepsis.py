"""Deep learners on ICU-Sepsis as their user meets them; what it claims, on the way there."""

import json

import jax
import numpy as np
import pytest

from experiments import deep_icu_sepsis
from tests import oracles

# After a tenth of the steps: .820, .847, .837 and .818 of .875, ± .002 over seeds; clinicians .782.
REACHED = {"DQN": 0.81, "A2C": 0.84, "PPO": 0.83, "SAC": 0.81}


def run(tmp_path, **options):
    config = deep_icu_sepsis.Config(output_dir=tmp_path, **options)
    config.validate()
    with jax.debug_key_reuse(False):  # it takes keys that a scan under `vmap` runs over for used
        result = deep_icu_sepsis.main(config)
    (folder,) = (tmp_path / "deep_icu_sepsis").iterdir()
    assert json.loads((folder / "result.json").read_text()) == result
    assert (folder / "learning_curves.png").stat().st_size > 20_000
    for name, known in (("random", "random"), ("clinicians", "expert"), ("optimum", "optimal")):
        expected = oracles.ICU_SEPSIS_RETURN[known]
        np.testing.assert_allclose(result[name], expected, atol=6e-5)
    return result


@pytest.mark.slow
def test_main_with_a_tenth_of_its_steps_is_on_its_way(tmp_path, capsys):
    """With all of them it takes ten minutes and reaches what the module's docstring says."""
    result = run(tmp_path, num_seeds=2, num_steps=409_600)
    output = capsys.readouterr().out
    assert "ICU-Sepsis: survival" in output
    for name, value in REACHED.items():
        assert name in output
        assert value < result[f"{name}_min"] < result["optimum"]


def test_config_names_what_is_wrong():
    with pytest.raises(ValueError, match="num_steps is 0; it must be at least 1"):
        deep_icu_sepsis.Config(num_steps=0).validate()
