"""SAC on glucose as its user meets it, and the rule that it adjusts."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import glucose_control, sac_glucose
from jaxrl_llm.envs import basal_bolus, glucose
from jaxrl_llm.training import logging, report

# Programs of a day's differential equations compile for many seconds.
pytestmark = pytest.mark.slow

TINY = replace(
    sac_glucose.SETTINGS, num_environments=4, num_updates=2, warmup_steps=8, buffer_size=64,
    batch_size=16,
)  # fmt: skip


def main(config: sac_glucose.Config) -> dict[str, float]:
    """`main` without the key checker: it refuses any scan over keys in a vmap."""
    with jax.debug_key_reuse(False):
        return sac_glucose.main(config)


def run_folder(output_dir: Path) -> Path:
    (folder,) = (output_dir / "sac_glucose").iterdir()
    return folder


def test_adjusted_rule_without_adjustment_is_the_published_one_step_by_step():
    """Half an hour of it is six steps of the environment under the rule, and more if asked."""
    environment = glucose_control.adjusted_rule()
    inner, params = glucose.make(reward="range", terminate=False), environment.default_params
    key = jax.random.key(1)
    state, _ = environment.reset(jax.random.key(0), params)
    step, inner_step = jax.jit(environment.step), jax.jit(inner.step)
    _, found = step(key, state, jnp.zeros(2), params)
    (body, observation), reward = state, 0.0
    for index in range(6):
        dose = basal_bolus.action(observation, basal_bolus.rule())
        body, expected = inner_step(jax.random.fold_in(key, index), body, dose, params)
        observation, reward = expected.observation, reward + (expected.reward - 1) / 6
        np.testing.assert_allclose(
            found.info["insulin"][index], expected.info["insulin"], rtol=1e-4
        )
    readings = np.array(glucose.read(observation).readings)
    last, first = readings[-2:].mean(), readings[:2].mean()
    np.testing.assert_allclose(found.observation[0], (last - 125) / 50, atol=1e-3)
    np.testing.assert_allclose(found.observation[1], (last - first) / 25, atol=1e-3)
    np.testing.assert_allclose(found.observation[2:], observation[6:], atol=1e-4)
    np.testing.assert_allclose(found.reward, reward, rtol=1e-3, atol=1e-6)
    for adjustment, factor in ((1.0, 3.0), (-1.0, 1 / 3)):
        _, other = step(key, state, jnp.array([adjustment, 0.0]), params)
        more = other.info["insulin"][0] - found.info["insulin"][0]
        usual = found.info["basal"][0] / 12
        np.testing.assert_allclose(more, (factor - 1) * usual, rtol=0.01)


def test_main_writes_its_folder_and_compares_on_the_same_patients(tmp_path, capsys):
    config = sac_glucose.Config(
        output_dir=tmp_path,
        num_seeds=2,
        num_iterations=2,
        num_patients=8,
        num_evaluations=2,
        num_checkpoints=1,
        sac=TINY,
    )
    result = main(config)
    folder = run_folder(tmp_path)
    names = {"config.json", "metrics.jsonl", "result.json", "learning_curve.png", "episode.png"}
    found = {path.name for path in folder.iterdir() if not path.name.startswith("events.")}
    assert found == names | {"checkpoints"}
    assert json.loads((folder / "result.json").read_text()) == result
    assert logging.read_config(folder, sac_glucose.Config) == config
    for who in ("rule", "sac"):
        shares = [result[f"{who}_{name}"] for name in glucose_control.MEASURES[:3]]
        np.testing.assert_allclose(sum(shares), 1, atol=1e-5)
    np.testing.assert_allclose(
        result["gain"], result["sac_in_range"] - result["rule_in_range"], atol=1e-6
    )
    assert result["gain_low"] < result["gain"] < result["gain_high"]
    assert result["worst_seed_gain"] <= result["gain"]
    output = capsys.readouterr().out
    for text in ("published rule", "SAC", "8 patients' days", report.RESEARCH_ONLY, "SYNTHETIC"):
        assert text in output
    assert np.array([line["in_range"] for line in logging.read_metrics(folder)]).shape == (2, 2)


@pytest.mark.parametrize("name", ["num_patients", "num_iterations", "num_seeds"])
def test_config_names_what_is_wrong(name):
    with pytest.raises(ValueError, match=f"^{name} is 0; it must be at least 1$"):
        replace(sac_glucose.Config(), **{name: 0}).validate()
