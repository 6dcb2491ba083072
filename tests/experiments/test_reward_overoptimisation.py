"""Over-optimisation: every reward model, and every guard, is in the picture and in the result."""

from __future__ import annotations

import pytest

from experiments import reward_overoptimisation
from jaxrl_llm.lm.reward_probes import PROBES
from tests.experiments.alignment import is_finite, run_folder, tiny_config
from tests.lm import tiny

quick_compilation = pytest.fixture(scope="module", autouse=True)(tiny.quick_compilation)


@pytest.mark.slow
def test_main_shows_gold_and_proxy_of_every_reward_and_guard(tmp_path):
    flags = ("--num-blocks", "1", "2", "--num-members=2")
    result = reward_overoptimisation.main(
        tiny_config(reward_overoptimisation.Config, tmp_path, *flags)
    )
    assert is_finite(result)
    assert (run_folder(tmp_path) / "gold_and_proxy.png").stat().st_size > 10_000
    for name in ("1 blocks", "2 blocks", "ensemble", "2 blocks, KL penalty"):
        assert {f"{name}: gold mean", f"{name}: gold high", f"{name}: proxy"} <= result.keys()
    for name in ("1 blocks", "2 blocks", "ensemble"):
        assert {f"{name}: fooled by {probe}" for probe in PROBES} <= result.keys()
        assert -1 <= result[f"{name}: correlation with length"] <= 1
