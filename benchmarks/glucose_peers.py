"""simglucose, the UVA/Padova simulator in Python, as a peer: its patients, one minute at a time."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Peer, PeerMissing
from jaxrl_llm.envs import uva_padova

MINUTES_PER_STEP = 5


def patient_module() -> types.ModuleType:
    """simglucose's `T1DPatient` and its `Action(CHO, insulin)`, in g and U/min.

    Raises:
      PeerMissing: it is not installed.
    """
    package = importlib.util.find_spec("simglucose")
    if package is None or importlib.util.find_spec("pandas") is None:
        raise PeerMissing(
            "peer simglucose not installed: pip install pandas && pip install --no-deps simglucose"
        )
    with _stand_ins(list(package.submodule_search_locations or ())):
        return importlib.import_module("simglucose.patient.t1dpatient")


def simglucose(num_steps: int, *, name: str = "adult#001") -> Peer:
    """Steps of 5 minutes of one patient on random insulin, with a meal every sixth hour.

    Returns:
      A peer whose result is the glucose after each step, mg/dL, `[num_steps]`.
    """
    module = patient_module()
    generator = np.random.default_rng(0)
    basal = uva_padova.table()[name]["u2ss"] * uva_padova.table()[name]["BW"] / 6000  # U/min

    def fresh() -> tuple:
        return (module.T1DPatient.withName(name),)

    def rollout(person: Any) -> np.ndarray:
        glucose = []
        for step in range(num_steps):
            insulin = 2 * basal * generator.random()
            for minute in range(MINUTES_PER_STEP):
                meal = 50 if minute == 0 and step % 72 == 12 else 0
                person.step(module.Action(CHO=meal, insulin=insulin))
            glucose.append(person.observation.Gsub)
        return np.array(glucose)

    return Peer("simglucose", rollout, fresh, num_steps)


@contextlib.contextmanager
def _stand_ins(folders: list[str]) -> Generator[None]:
    """Lets simglucose's modules be imported alone.

    The package itself would register with gym, which is retired, and its modules find their tables
    by `pkg_resources`, which setuptools no longer has.
    """
    package, resources = types.ModuleType("simglucose"), types.ModuleType("pkg_resources")
    package.__path__ = folders
    vars(resources)["resource_filename"] = lambda _, name: str(Path(folders[0]) / name)
    stand_ins = {"simglucose": package, "pkg_resources": resources}
    before = {name: sys.modules[name] for name in stand_ins if name in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in stand_ins]:
            del sys.modules[name]
        sys.modules.update(before)
