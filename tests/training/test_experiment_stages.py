"""A run of several learners: each stage resumes, and draws numbers of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.training import experiment, logging
from jaxrl_llm.types import Algorithm, Mean

NUM_STEPS = 6


@dataclass(frozen=True, kw_only=True)
class Config(experiment.TrainConfig):
    num_evaluations: int = 3
    num_checkpoints: int = 3


def walk() -> Algorithm:
    def step(key, state):
        state = state + jax.random.normal(key, (2,))
        return state, {"height": Mean.of(state)}

    return Algorithm(init=lambda key: jnp.zeros(2), step=step)


def main(config: Config, stop_in: str | None = None) -> dict[str, Any]:
    """Two stages, the second from where the first ended; `stop_in` is interrupted midway."""
    run = experiment.open_run("walks", config)
    ends, state = {}, None
    for name in ("first", "second"):
        calls: list[int] = []

        def evaluate(state, name=name, calls=calls):
            calls.append(1)
            if name == stop_in and len(calls) == 2:
                raise KeyboardInterrupt
            return {}

        state = experiment.train(
            run.start_stage(name),
            walk(),
            num_steps=NUM_STEPS,
            items_per_step=1,
            evaluate=evaluate,
            state=state,
        )
        ends[name] = np.asarray(state)
    return ends


def test_stages_have_folders_logs_and_random_numbers_of_their_own(tmp_path):
    ends = main(Config(output_dir=tmp_path))
    (directory,) = (tmp_path / "walks").iterdir()
    for stage in ("first", "second"):
        assert [line["step"] for line in logging.read_metrics(directory / stage)] == [2, 4, 6]
        assert (directory / stage / "checkpoints").is_dir()
    first, second = ends["first"], ends["second"] - ends["first"]
    assert not np.isclose(first, second).any()


@pytest.mark.parametrize("stage", ["first", "second"])
def test_a_run_stopped_in_any_stage_ends_in_the_same_bits(tmp_path, stage, capsys):
    config = Config(output_dir=tmp_path)
    whole = main(replace(config, output_dir=tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        main(config, stop_in=stage)
    resumed = main(replace(config, resume=Path("latest")))
    for name, end in whole.items():
        np.testing.assert_array_equal(resumed[name], end)
    assert f"{stage}: restored step 2 of {NUM_STEPS}" in capsys.readouterr().out


def test_keys_of_a_stage_are_not_those_of_the_run_or_of_another(tmp_path):
    run = experiment.open_run("walks", Config(output_dir=tmp_path))
    runs = (run, run.start_stage("first"), run.start_stage("second"))
    keys = [jax.random.key_data(experiment.keys(each, 3)).tolist() for each in runs]
    assert len({tuple(key) for stage in keys for key in stage}) == 9
