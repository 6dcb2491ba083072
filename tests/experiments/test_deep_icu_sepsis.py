"""Deep learners on ICU-Sepsis as their user meets them; with the defaults, what is claimed."""

import json

import jax
import numpy as np
import pytest

from experiments import deep_icu_sepsis
from tests import oracles

LEARNERS = ("DQN", "A2C", "PPO", "SAC")


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
def test_main_with_its_settings_and_fewer_seeds_shows_what_it_claims(tmp_path, capsys):
    result = run(tmp_path, num_seeds=2)
    output = capsys.readouterr().out
    assert "ICU-Sepsis: survival" in output
    for name, target in zip(LEARNERS, (0.86, 0.86, 0.86, 0.85), strict=True):
        assert name in output
        assert target <= result[f"{name}_mean"] < result["optimum"]


def test_config_names_what_is_wrong():
    with pytest.raises(ValueError, match="num_steps is 0; it must be at least 1"):
        deep_icu_sepsis.Config(num_steps=0).validate()
