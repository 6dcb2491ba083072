"""simglucose is imported alone, steps as asked, and leaves no trace."""

import importlib.util
import sys

import numpy as np
import pytest

from benchmarks import glucose_peers, harness
from benchmarks.harness import PeerMissing


@pytest.mark.skipif(
    importlib.util.find_spec("simglucose") is None or importlib.util.find_spec("pandas") is None,
    reason="simglucose is not installed",
)
def test_simglucose_steps_a_patient_from_rest_and_leaves_no_trace():
    before = {name for name in sys.modules if name.startswith(("simglucose", "pkg_resources"))}
    peer = glucose_peers.simglucose(4)
    results = [harness.call(peer) for _ in range(2)]
    assert peer.items == 4
    # `adult#001` rests at 138.56 mg/dL, and insulin takes half an hour to show.
    np.testing.assert_allclose(results[0], 138.56, atol=2)
    assert results[0].shape == results[1].shape == (4,)
    after = {name for name in sys.modules if name.startswith(("simglucose", "pkg_resources"))}
    assert after == before


def test_patient_module_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PeerMissing, match="peer simglucose not installed: pip install pandas"):
        glucose_peers.patient_module()
