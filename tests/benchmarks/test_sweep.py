"""The benchmark of sweeps does one job on both sides."""

import jax
import numpy as np
import pytest

from benchmarks import harness
from benchmarks import sweep as benchmark
from jaxrl_llm.agents import ppo
from jaxrl_llm.envs import treatment
from jaxrl_llm.nn.heads import TabularActorCritic
from jaxrl_llm.training import sweep


@pytest.mark.slow
def test_case_agrees_with_its_peer(monkeypatch):
    monkeypatch.setattr(benchmark, "POINTS", sweep.grid(learning_rate=[1e-3, 1e-2, 1e-1]))
    config = ppo.Config(num_environments=4, num_steps=64, num_iterations=3)
    algorithm = ppo.make(config, treatment.make(), TabularActorCritic(5, 3))
    # It takes keys that a `vmap` over seeds hands to a scan for keys used twice.
    with jax.debug_key_reuse(False):
        case = benchmark.case("tables", algorithm, config)
        assert case.peer is not None
        assert case.agree is not None
        together, apart = harness.call(case), harness.call(case.peer())
    assert case.items == 3 * 3 * 256
    np.testing.assert_allclose(together[0], apart, rtol=1e-3)
    assert len(np.unique(together)) == 3
    case.agree(together, apart)
    with pytest.raises(AssertionError, match=r"differ by 50\.0% in the median"):
        case.agree(1.5 * together, [float(value) for value in together[0]])
