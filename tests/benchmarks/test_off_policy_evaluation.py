"""The benchmark of off-policy evaluation does one job on both sides."""

import jax
import numpy as np
import pytest

from benchmarks import harness
from benchmarks import off_policy_evaluation as benchmark


@pytest.mark.slow
def test_cases_agree_with_their_peer(monkeypatch):
    monkeypatch.setattr(benchmark, "NUM_EPISODES", 400)
    monkeypatch.setattr(benchmark, "NUM_RESAMPLES", 500)
    whole, bootstrap = benchmark.cases()
    found = harness.call(whole)["9/10 optimal"]
    own = harness.call(bootstrap)
    assert own.shape == (500,)
    assert bootstrap.agree is not None
    assert bootstrap.peer is not None
    bootstrap.agree(own, harness.call(bootstrap.peer()))
    low, high = np.quantile(own, [0.025, 0.975])
    np.testing.assert_allclose(found.estimates["WDR"][1:], (low, high), atol=0.2 * (high - low))
    assert isinstance(own, jax.Array)
