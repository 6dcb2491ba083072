"""RLHF on clinical text as its user meets it: what a run writes, refuses, survives and reaches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import clinical_stages, rlhf_clinical
from jaxrl_llm.lm import hf_checkpoint
from jaxrl_llm.training import cli, logging
from tests.experiments.alignment import FLAGS, is_finite, run_folder, tiny_config
from tests.lm import tiny

quick_compilation = pytest.fixture(scope="module", autouse=True)(tiny.quick_compilation)
PROMISED = {
    "gold_score_sft", "gold_score_policy", "gold_win_rate", "gold_win_rate_low", "kl",
    "reward_model_accuracy", "annotator_ceiling",
}  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """The folder of a tiny run, and its result."""
    output_dir = tmp_path_factory.mktemp("first")
    result = rlhf_clinical.main(tiny_config(rlhf_clinical.Config, output_dir))
    return run_folder(output_dir), result


@pytest.mark.slow
def test_main_writes_its_folder_and_returns_what_it_promises(first):
    folder, result = first
    assert result.keys() >= PROMISED
    assert is_finite(result)
    assert json.loads((folder / "result.json").read_text()) == result
    for stage in ("sft", "reward", "ppo"):
        assert (folder / stage / "checkpoints").is_dir()
    for picture in ("marks.png", "gold_and_proxy.png", "calibration.png"):
        assert (folder / picture).stat().st_size > 10_000
    lines = logging.read_metrics(folder / "ppo")
    assert [line["step"] for line in lines] == [2, 4]
    assert {"score", "score_gold", "kl", "policy_loss", "value_loss"} <= lines[-1].keys()
    for name in ("sft_model", "model"):
        hf_checkpoint.load(folder / name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_a_run_stopped_in_any_stage_ends_in_the_same_bits(first, tmp_path, monkeypatch, stage):
    config = tiny_config(rlhf_clinical.Config, tmp_path)
    train = clinical_stages.experiment.train

    def stopping(run: Any, *arguments: Any, **options: Any) -> Any:
        if run.stage == stage:
            done = []

            def evaluate(state: Any) -> dict[str, float]:
                done.append(state)
                if len(done) == 2:
                    raise KeyboardInterrupt
                return {}

            options["evaluate"] = evaluate
        return train(run, *arguments, **options)

    monkeypatch.setattr(clinical_stages.experiment, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        rlhf_clinical.main(config)
    monkeypatch.setattr(clinical_stages.experiment, "train", train)
    resumed = rlhf_clinical.main(replace(config, resume=Path("latest")))
    assert resumed == first[1]


@pytest.mark.slow
def test_a_reward_that_is_no_number_stops_the_run_and_keeps_its_checkpoint(tmp_path, monkeypatch):
    gold = rlhf_clinical.clinical_exam.gold

    def broken(cases: Any) -> Any:
        score, calls = gold(cases), []

        def judge(prompt: str, response: str) -> float:
            calls.append(prompt)
            return float("nan") if len(calls) > 12 else score(prompt, response)

        return judge

    monkeypatch.setattr(clinical_stages.clinical_exam, "gold", broken)
    config = tiny_config(rlhf_clinical.Config, tmp_path)
    with pytest.raises(ValueError, match=r'^reward "gold" of response 0 is nan; return a finite'):
        rlhf_clinical.main(config)
    monkeypatch.setattr(clinical_stages.clinical_exam, "gold", gold)
    assert is_finite(rlhf_clinical.main(replace(config, resume=Path("latest"))))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--share-flawed 1.5", "--share-flawed is 1.5; it must be in [0, 1]"),
        ("--num-cases 1", "--num-cases is 1; it must be at least 2"),
        ("--num-reward-models 0", "--num-reward-models is 0; it must be at least 1"),
        (
            "--ppo.kl-in loss",
            "--ppo.kl-estimator is 'k1' and kl_in is 'loss'; the expected gradient of k1 is zero",
        ),
        ("--annotator.temperature 0", "--annotator.temperature is 0.0; it must be greater than 0"),
        ("--ppo.rollout.top-k 5", "--ppo.rollout.top-k is not an option"),
    ],
)
def test_mistakes_of_the_user_end_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.parse(rlhf_clinical.Config, [*FLAGS, *flags.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


@pytest.mark.slow
def test_a_prompt_that_fills_the_context_is_named(tmp_path):
    config = tiny_config(rlhf_clinical.Config, tmp_path, "--ppo.rollout.max-new-tokens=380")
    with pytest.raises(ValueError, match=r"^tokens\[\d+\] has \d+ tokens; with max_new_tokens 380"):
        rlhf_clinical.main(config)
