"""The sweep of PPO as its user meets it; with its defaults, what it claims."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments import sweep
from tests import oracles

OPTIMUM, RANDOM = oracles.TREATMENT_VALUE.mean(), oracles.TREATMENT_UNIFORM_VALUE.mean()


def run(tmp_path, **options):
    """`main` without the key checker: it refuses any scan over keys in a vmap."""
    config = sweep.Config(output_dir=tmp_path, **options)
    with jax.debug_key_reuse(False):
        result = sweep.main(config)
    (folder,) = (tmp_path / "sweep").iterdir()
    assert json.loads((folder / "result.json").read_text()) == result
    assert (folder / "sweep.png").stat().st_size > 20_000
    np.testing.assert_allclose(result["optimum"], OPTIMUM, atol=1e-3)
    np.testing.assert_allclose(result["random"], RANDOM, atol=1e-3)
    return result


@pytest.mark.slow
def test_main_small_prints_the_ranking_and_draws_it(tmp_path, capsys):
    settings = replace(sweep.SETTINGS, num_environments=8, num_iterations=30)
    result = run(
        tmp_path,
        ppo=settings,
        num_seeds=2,
        num_evaluations=3,
        num_checkpoints=1,
        learning_rates=(1e-6, 0.1),
        entropy_coefficients=(0.0, 3.0),
    )
    # A rate of next to nothing leaves the uniform policy.
    np.testing.assert_allclose(result["worst"], RANDOM, atol=0.1)
    assert RANDOM + 0.5 * (OPTIMUM - RANDOM) < result["best"] < OPTIMUM
    assert result["learning_rate"] == 0.1
    assert result["entropy_coefficient"] == 0.0
    output = capsys.readouterr().out
    assert "Best: --ppo.learning-rate 0.1 --ppo.entropy-coefficient 0" in output


@pytest.mark.slow
def test_main_with_its_defaults_shows_what_it_claims(tmp_path):
    result = run(tmp_path)
    assert 137 < result["best"] < OPTIMUM
    assert result["worst"] < 100
    assert 0.03 <= result["learning_rate"] <= 1


def test_config_names_the_point_that_is_wrong():
    sweep.Config().validate()
    config = sweep.Config(learning_rates=(0.1, -1.0), entropy_coefficients=(0.0,))
    with pytest.raises(ValueError, match=r"point 1: learning_rate is -1.0; it must be greater"):
        config.validate()
    with pytest.raises(ValueError, match="learning_rate is empty"):
        sweep.Config(learning_rates=()).validate()
