"""The oracle of alignment as its user meets it: tables, numbers by name, a picture, mistakes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from matplotlib.image import imread

from experiments import token_mdp_oracle
from jaxrl_llm.lm import estimator_bias, estimators, exact
from jaxrl_llm.training import cli, logging

# It compiles whole iterations.
pytestmark = pytest.mark.slow

LEARNERS = ["ppo", "reinforce", "rloo", "grpo", "grpo_kl_in_reward", "dpo"]
BIAS = estimator_bias.Bias(predicted=-0.25, measured=-0.2, standard_error=0.05, largest_z=2.0)


def run_folder(output_dir: Path) -> Path:
    (folder,) = (output_dir / "token_mdp_oracle").iterdir()
    return folder


def main(config: token_mdp_oracle.Config) -> dict[str, float]:
    """`main` in this process, without the key checker, which refuses the scans of a rollout."""
    with jax.debug_key_reuse(False):
        return token_mdp_oracle.main(config)


@pytest.fixture
def quick(monkeypatch):
    """Biases that need no sampling, and the learner that compiles fastest."""
    learners = exact.learners

    def few_biases(mdp, logits, key, num_minibatches, names):
        assert num_minibatches == 500
        assert names == (None if mdp.end_token is None else estimators.OF_TOKENS)
        return {"rloo": BIAS}

    def few_learners(*arguments):
        found = learners(*arguments)
        assert list(found) == LEARNERS
        return {"dpo": found["dpo"]}

    monkeypatch.setattr(estimators, "biases", few_biases)
    monkeypatch.setattr(exact, "learners", few_learners)


def test_main_prints_two_kinds_of_tables_and_leaves_numbers_and_a_picture(quick, tmp_path, capsys):
    settings = exact.LearnersConfig(num_iterations=40, num_samples=8)
    config = token_mdp_oracle.Config(
        output_dir=tmp_path, num_minibatches=500, num_evaluations=4, learners=settings
    )
    result = main(config)
    output, folder = capsys.readouterr().out, run_folder(tmp_path)
    for lengths in ("one length", "several lengths"):
        assert f"Responses of {lengths}" in output
        for name, number in BIAS._asdict().items():
            assert result[f"{lengths}/rloo/{name}"] == number
    rows = [line.split() for line in output.splitlines() if line.startswith("rloo ")]
    assert rows == [["rloo", *BIAS.cells()]] * 2
    # DPO on the whole population is on its way within a few steps.
    assert 0 <= result["dpo_gap"] < 0.8 * result["start_gap"]
    (row,) = (line.split() for line in output.splitlines() if line.startswith("dpo "))
    shown = [result["start_gap"], result["dpo_gap"]]
    assert [float(cell) for cell in row[1:3]] == pytest.approx(shown, abs=1e-5)
    assert float(row[3]) == pytest.approx(100 * shown[1] / shown[0], abs=0.01)
    assert json.loads((folder / "result.json").read_text()) == result
    assert logging.read_config(folder, token_mdp_oracle.Config) == config
    assert imread(folder / "gap.png").ndim == 3
    assert main(replace(config, resume=folder)) == result


@pytest.mark.slow
def test_main_by_default_shows_what_it_promises(tmp_path):
    result = main(token_mdp_oracle.Config(output_dir=tmp_path))
    measured = [name.removesuffix("/measured") for name in result if name.endswith("/measured")]
    assert len(measured) == 25
    for name in measured:
        difference = result[f"{name}/measured"] - result[f"{name}/predicted"]
        assert abs(difference) < 3 * result[f"{name}/standard_error"], name
    share = {name: result[f"{name}_gap"] / result["start_gap"] for name in LEARNERS}
    assert 0.3 < share.pop("grpo") < 0.5
    assert all(-1e-4 < left < 0.02 for left in share.values()), share


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-minibatches 1", "--num-minibatches is 1; it must be at least 2"),
        ("--learners.num-samples 1", "--learners.num-samples is 1; it must be at least 2"),
    ],
)
def test_mistakes_of_the_user_end_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["token_mdp_oracle", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main(token_mdp_oracle.main, token_mdp_oracle.Config)
    assert (stop.value.code, capsys.readouterr().err) == (2, f"error: {message}\n")
