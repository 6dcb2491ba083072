"""PPO on ICU-Sepsis as its user meets it: what a run writes, refuses, survives and learns."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import ppo_icu_sepsis
from jaxrl_llm.agents import ppo
from jaxrl_llm.envs import icu_sepsis
from jaxrl_llm.nn.heads import TabularActorCritic
from jaxrl_llm.training import checkpoint, logging, loop, report
from tests import oracles

ROOT = Path(__file__).parents[2]
TINY = replace(ppo_icu_sepsis.SETTINGS, num_environments=8, num_steps=8, num_iterations=40)
FLAGS = (
    "--num-seeds=2 --num-evaluations=40 --num-checkpoints=8 --ppo.num-environments=8 "
    "--ppo.num-steps=8 --ppo.num-iterations=40"
).split()


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """`python -m experiments.ppo_icu_sepsis` in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"] or "",
    }
    command = [sys.executable, "-m", "experiments.ppo_icu_sepsis", *arguments]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(arguments: Sequence[str]) -> tuple[str, str]:
    process = start(arguments)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output, errors


def main(config: ppo_icu_sepsis.Config) -> dict[str, float]:
    """`main` in this process, without the key checker: it refuses any scan over keys in a vmap."""
    with jax.debug_key_reuse(False):
        return ppo_icu_sepsis.main(config)


def run_folder(output_dir: Path) -> Path:
    (folder,) = (output_dir / "ppo_icu_sepsis").iterdir()
    return folder


def final_state(folder: Path):
    """The state of the newest checkpoint, and its step."""
    network: Any = TabularActorCritic(716, 25)
    algorithm = loop.over_seeds(ppo.make(TINY, icu_sepsis.make(), network), 2)
    target = jax.eval_shape(algorithm.init, jax.random.key(0))
    state, step, _ = checkpoint.restore(folder / "checkpoints", target)
    return state, step


def assert_same_end(folder: Path, expected: Path) -> None:
    """Both runs ended in the same state, metrics and result, to the last bit."""
    state, step = final_state(folder)
    expected_state, expected_step = final_state(expected)
    assert step == expected_step == TINY.num_iterations
    for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_array_equal(leaf, other)
    lines, expected_lines = (
        [{**line, "seconds": 0} for line in logging.read_metrics(path)]
        for path in (folder, expected)
    )
    assert lines == expected_lines
    assert (folder / "result.json").read_bytes() == (expected / "result.json").read_bytes()


def steps(folder: Path) -> list[int]:
    """The sealed checkpoints, oldest first."""
    return sorted(int(path.parent.name) for path in folder.glob("checkpoints/*/manifest.json"))


@pytest.mark.slow
def test_main_writes_its_folder_and_returns_survival_beside_what_is_known(tmp_path, capsys):
    settings = replace(TINY, num_iterations=4)
    config = ppo_icu_sepsis.Config(
        output_dir=tmp_path, num_seeds=2, num_evaluations=2, num_checkpoints=1, ppo=settings
    )
    result = main(config)
    known = {"random": "random", "clinicians": "expert", "optimum": "optimal"}
    for name, oracle in known.items():
        np.testing.assert_allclose(result[name], oracles.ICU_SEPSIS_RETURN[oracle], atol=6e-5)
    # Four tiny iterations learn next to nothing.
    for mean in (result["greedy_mean"], result["stochastic_mean"]):
        assert abs(mean - result["random"]) < 0.03
    folder = run_folder(tmp_path)
    names = {"config.json", "metrics.jsonl", "result.json", "learning_curve.png", "policy.png"}
    found = {path.name for path in folder.iterdir()}
    assert names | {"checkpoints"} == {name for name in found if not name.startswith("events.")}
    assert json.loads((folder / "result.json").read_text()) == result
    assert logging.read_config(folder, ppo_icu_sepsis.Config) == config
    lines = logging.read_metrics(folder)
    assert [line["step"] for line in lines] == [2, 4]
    greedy, stochastic = np.array([lines[-1]["greedy"], lines[-1]["stochastic"]])
    expected = {"greedy_mean": greedy.mean(), "greedy_std": greedy.std()}
    expected |= {"greedy_min": greedy.min(), "stochastic_mean": stochastic.mean()}
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, atol=1e-6)
    assert steps(folder) == [4]
    output = capsys.readouterr().out
    assert output.startswith(f"ppo_icu_sepsis: writing {folder}\n")
    for name in (*known, "PPO, greedy", "PPO, stochastic", report.RESEARCH_ONLY):
        assert name in output
    assert output.endswith(f"wrote {folder}\n")


@pytest.mark.slow
def test_mistakes_of_the_user_end_in_one_line(tmp_path):
    (tmp_path / "unreadable").mkdir()
    logging.write_config(tmp_path / "unreadable", ppo_icu_sepsis.Config(output_dir=tmp_path))
    (tmp_path / "unreadable" / "checkpoints").write_text("not a folder")
    mistakes = {
        ("--ppo.clip-epsilon", "-1"): "--ppo.clip-epsilon is -1.0; it must be greater than 0",
        ("--ppo.clip-epsilom", "0.1"): (
            "--ppo.clip-epsilom is not an option; did you mean --ppo.clip-epsilon?"
        ),
        ("--resume", str(tmp_path / "unreadable")): (
            f"{tmp_path / 'unreadable' / 'checkpoints'}: not a directory"
        ),
    }
    processes = [start([*arguments, "--output-dir", str(tmp_path)]) for arguments in mistakes]
    for process, message in zip(processes, mistakes.values(), strict=True):
        _, errors = process.communicate()
        assert (process.returncode, errors) == (2, f"error: {message}\n")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted."""
    output_dir = tmp_path_factory.mktemp("whole")
    finish([*FLAGS, "--output-dir", str(output_dir)])
    return run_folder(output_dir)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """The folder of a run killed between a checkpoint, not its first, and the next."""
    output_dir = tmp_path_factory.mktemp("killed")
    process = start([*FLAGS, "--output-dir", str(output_dir)])
    while process.poll() is None:
        for folder in output_dir.glob("ppo_icu_sepsis/*"):
            sealed = steps(folder)
            if len(sealed) > 1 and logging.read_metrics(folder)[-1]["step"] > sealed[-1]:
                process.kill()
        time.sleep(0.005)
    process.communicate()
    folder = run_folder(output_dir)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "result.json").exists()
    return folder


@pytest.mark.slow
@pytest.mark.alone
def test_killed_run_resumes_to_the_same_bits(tmp_path, whole, killed):
    folder = shutil.copytree(killed, tmp_path / "run")
    newest = steps(folder)[-1]
    output, errors = finish(["--resume", str(folder)])
    assert output.startswith(f"ppo_icu_sepsis: resuming {folder}\nrestored step {newest} of 40\n")
    assert "warning" not in errors
    assert_same_end(folder, whole)


@pytest.mark.slow
@pytest.mark.alone
def test_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, whole, killed):
    folder = shutil.copytree(killed, tmp_path / "run")
    *_, previous, newest = steps(folder)
    file = max((folder / "checkpoints" / str(newest)).rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    output, errors = finish(["--resume", str(folder)])
    name = file.relative_to(folder / "checkpoints" / str(newest)).as_posix()
    assert errors.splitlines()[0] == (
        f"warning: checkpoint {newest} in {folder / 'checkpoints'} is damaged (file {name} differs "
        f"from its manifest); using checkpoint {previous}"
    )
    assert f"restored step {previous} of 40" in output
    assert_same_end(folder, whole)


@pytest.mark.slow
def test_three_seeds_survive_almost_as_well_as_the_optimum(tmp_path):
    result = main(ppo_icu_sepsis.Config(output_dir=tmp_path, num_seeds=3))
    assert 0.865 <= result["greedy_mean"] <= oracles.ICU_SEPSIS_RETURN["optimal"] + 1e-4
    assert result["greedy_std"] < 0.005
    assert result["stochastic_mean"] > result["clinicians"]
    curves = np.array([line["greedy"] for line in logging.read_metrics(run_folder(tmp_path))])
    assert curves.shape == (40, 3)
    assert curves[0].mean() < curves[-1].mean()
