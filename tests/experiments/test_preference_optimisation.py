"""Methods side by side: every one learns from as many responses, and all are in the result."""

from __future__ import annotations

import pytest

from experiments import preference_optimisation
from jaxrl_llm.training import logging
from tests.experiments.alignment import is_finite, run_folder, tiny_config
from tests.lm import tiny

quick_compilation = pytest.fixture(scope="module", autouse=True)(tiny.quick_compilation)
METHODS = (
    "--num-responses=16 --ppo.rollout.num-prompts=4 --ppo.rollout.max-new-tokens=4 "
    "--rloo.rollout.num-prompts=4 --rloo.rollout.num-samples=2 --rloo.rollout.max-new-tokens=4 "
    "--grpo.rollout.num-prompts=4 --grpo.rollout.num-samples=2 --grpo.rollout.max-new-tokens=4 "
    "--dpo.batch-size=4"
)


@pytest.mark.slow
def test_main_gives_every_method_the_same_budget_and_reports_all(tmp_path):
    config = tiny_config(preference_optimisation.Config, tmp_path, methods=METHODS)
    result = preference_optimisation.main(config)
    assert is_finite(result)
    folder = run_folder(tmp_path)
    assert (folder / "frontier.png").stat().st_size > 10_000
    for name in ("sft", "ppo", "rloo", "grpo", "dpo"):
        assert {f"{name}_gold_score", f"{name}_kl", f"{name}_win_rate"} <= result.keys()
    assert result["sft_kl"] == pytest.approx(0, abs=1e-5)
    assert result["sft_win_rate"] == 0.5
    assert {f"best_of_{n}_gold_score" for n in (1, 2, 4, 8, 16)} <= result.keys()
    for name, steps in (("ppo", 4), ("rloo", 2), ("grpo", 2), ("dpo", 2)):
        assert logging.read_metrics(folder / name)[-1]["step"] == steps
