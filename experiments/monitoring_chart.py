"""A patient of `envs.monitoring`, the clinical variant, as a chart."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxrl_llm.envs import monitoring, monitoring_clinical
from jaxrl_llm.training import episode_picture
from jaxrl_llm.training.episode_picture import Doses, Event, Series

CHARTED = ("heart rate", "systolic pressure", "oxygen saturation", "lactate")


def save(path: Path, title: str, info: dict[str, np.ndarray]) -> None:
    """Draws four vital signs in their normal ranges, the doses and how it ended.

    Args:
      path: of the picture.
      title: of the picture.
      info: `TimeStep.info` `[T, ...]` of one episode, to its end.
    """
    hours = 1 + np.arange(len(info["dose"]))
    charts = [
        Series(name, unit, values, tuple(normal))
        for name, unit, values, normal in zip(
            monitoring.vital_names,
            monitoring_clinical.vital_units,
            info["vitals"].T,
            monitoring_clinical.normal_range,
            strict=True,
        )
        if name in CHARTED
    ]
    ends = {"Discharge": info["discharged"][-1], "Death": info["died"][-1]}
    events = [Event(int(hours[-1]), name) for name, happened in ends.items() if happened]
    doses = [Doses("treatment", "of the largest", info["dose"])]
    episode_picture.save(path, title, hours, charts, doses, events)
