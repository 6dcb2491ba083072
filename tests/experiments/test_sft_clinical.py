"""Fine-tuning on clinical text as its user meets it: what a run writes, refuses and survives."""

from __future__ import annotations

import json
import os
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

from experiments import sft_clinical
from jaxrl_llm.lm import base_model, hf_checkpoint, sft
from jaxrl_llm.lm.clinical_exam import MARKS
from jaxrl_llm.training import checkpoint, cli, logging, report
from tests.lm import tiny
from tests.lm.checkpoints import assert_same

pytestmark = pytest.mark.slow

quick_compilation = pytest.fixture(scope="module", autouse=True)(tiny.quick_compilation)
ROOT = Path(__file__).parents[2]
FLAGS = (
    "--num-cases=4 --num-examples=40 --num-evaluations=10 --num-checkpoints=5 "
    "--base.vocab-size=400 --base.n-positions=384 --base.n-embd=16 --base.n-layer=1 "
    "--base.n-head=2 --sampling.max-new-tokens=4 --sft.num-steps=10 --sft.batch-size=2 "
    "--sft.row-length=320"
).split()
NUMBERS = {f"{name}_{when}" for name in ("perplexity", *MARKS) for when in ("before", "after")}


def tiny_config(output_dir: Path, **changes: Any) -> sft_clinical.Config:
    config = cli.parse(sft_clinical.Config, [*FLAGS, f"--output-dir={output_dir}"])
    short = replace(config.sft, num_steps=4)
    return replace(config, num_evaluations=2, num_checkpoints=1, sft=short, **changes)


def run_folder(output_dir: Path) -> Path:
    (folder,) = (output_dir / "sft_clinical").iterdir()
    return folder


def trained(folder: Path) -> Any:
    """The parameters of the newest checkpoint, and the last step."""
    model, params = hf_checkpoint.load(folder / "model")
    settings = logging.read_config(folder, sft_clinical.Config).sft
    target = sft.start(settings, params, jax.random.key(0))
    state, step, _ = checkpoint.restore(folder / "checkpoints", target)
    return model, state.train.params, step


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """The folder of a tiny run, and its result."""
    output_dir = tmp_path_factory.mktemp("first")
    result = sft_clinical.main(tiny_config(output_dir))
    return run_folder(output_dir), result


@pytest.mark.slow
def test_main_writes_its_folder_and_returns_measures_before_and_after(first):
    folder, result = first
    names = {"config.json", "metrics.jsonl", "result.json", "perplexity.png", "model"}
    found = {path.name for path in folder.iterdir()}
    assert names | {"checkpoints"} == {name for name in found if not name.startswith("events.")}
    assert json.loads((folder / "result.json").read_text()) == result
    assert result.keys() == NUMBERS | {"perplexity_floor"}
    assert 1 < result["perplexity_floor"] < result["perplexity_after"]
    assert result["perplexity_after"] < result["perplexity_before"]
    vocabulary = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
    np.testing.assert_allclose(result["perplexity_before"], vocabulary, rtol=0.1)
    lines = logging.read_metrics(folder)
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[-1]["perplexity"] == result["perplexity_after"]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_exported_model_is_the_trained_one(first):
    folder, _ = first
    model, params = hf_checkpoint.load(folder / "model")
    _, expected, step = trained(folder)
    assert step == 4
    assert_same(params, expected)
    assert (model.config.eos_token_id, model.config.n_positions) == (0, 384)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["lora", "adapter"])
def test_model_resumes_fine_tuning_where_the_exported_one_stopped(
    first, tmp_path, capsys, trainable
):
    folder, earlier = first
    config = tiny_config(tmp_path, model=folder / "model")
    adamw = replace(config.sft.optimizer, trainable=trainable, warmup_fraction=0.0)
    result = sft_clinical.main(replace(config, sft=replace(config.sft, optimizer=adamw)))
    # The adapted model starts as the model that it adapts: the same exam, the same mark.
    np.testing.assert_allclose(result["perplexity_before"], earlier["perplexity_after"], rtol=1e-6)
    assert result["perplexity_after"] < result["perplexity_before"]
    assert result["perplexity_floor"] == earlier["perplexity_floor"]
    new = run_folder(tmp_path)
    assert (new / "model").exists() == (trainable != "adapter")
    output = capsys.readouterr().out
    assert output.startswith(f"sft_clinical: writing {new}\n")
    for words in ("4 unseen SYNTHETIC cases", "Assessment:", "gold score", report.RESEARCH_ONLY):
        assert words in output
    assert output.endswith(f"wrote {new}\n")


@pytest.mark.slow
def test_data_takes_the_place_of_synthetic_text(first, tmp_path):
    folder, earlier = first
    path = tmp_path / "data.jsonl"
    record = {"prompt": "Say it:", "completion": " rash rash rash"}
    path.write_text("".join(f"{json.dumps(record)}\n" for _ in range(8)))
    config = tiny_config(tmp_path, model=folder / "model", data=path)
    result = sft_clinical.main(config)
    np.testing.assert_allclose(result["perplexity_before"], earlier["perplexity_after"], rtol=1e-6)
    # Eight such records are one row, repeated to fill a batch.
    lines = logging.read_metrics(run_folder(tmp_path))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert result["perplexity_after"] != earlier["perplexity_after"]


def refusal(capsys, monkeypatch, *arguments: Any) -> str:
    """What the command line prints on stderr as it ends with exit code 2: one line."""
    monkeypatch.setattr(sys, "argv", ["sft_clinical", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(sft_clinical.main, sft_clinical.Config)
    assert stop.value.code == 2
    error, _, rest = capsys.readouterr().err.partition("\n")
    assert rest == ""
    return error


def test_no_argument_is_the_default():
    assert cli.parse(sft_clinical.Config, []) == sft_clinical.Config()


def test_flags_reach_every_part():
    flags = (
        "--sft.optimizer.trainable lora --base.dtype bfloat16 --base.remat --sampling.top-p 0.9 "
        "--model some/where --sft.chunk-size 64 --sft.num-micro-batches 4"
    )
    config = cli.parse(sft_clinical.Config, flags.split())
    assert config.sft.optimizer == replace(sft_clinical.ADAMW, trainable="lora")
    settings = replace(
        sft_clinical.SETTINGS, chunk_size=64, num_micro_batches=4, optimizer=config.sft.optimizer
    )
    assert config.sft == settings
    assert config.base == replace(base_model.SMALL, dtype="bfloat16", remat=True)
    assert config.sampling == replace(sft_clinical.SAMPLING, top_p=0.9)
    assert config.model == Path("some/where")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--base.vocab-size 100", "--base.vocab-size is 100; it must be at least 258"),
        ("--base.n-head 7", "--base.n-embd is 160; it must be a multiple of n_head, 7"),
        ("--sft.num-steps 0", "--sft.num-steps is 0; it must be at least 1"),
        ("--sft.optimizer.beta1 1", "--sft.optimizer.beta1 is 1.0; it must be at least 0 and less"),
        ("--sft.optimizer.trainable heads", "--sft.optimizer.trainable is heads; text has no val"),
        ("--sft.optimizer.trainable half", "--sft.optimizer.trainable is half; it must be one of"),
        ("--sampling.top-p 2", "--sampling.top-p is 2.0; it must be in [0, 1]"),
        ("--modle there", "--modle is not an option; did you mean --model?"),
    ],
)
def test_mistakes_on_the_command_line_end_in_one_line(capsys, monkeypatch, flags, message):
    assert refusal(capsys, monkeypatch, *flags.split()).startswith(f"error: {message}")


def test_mistakes_in_files_end_in_one_line(capsys, monkeypatch, first, tmp_path):
    def refuses(*arguments: Any) -> str:
        flags = [*FLAGS, f"--output-dir={tmp_path / 'runs'}", *arguments]
        return refusal(capsys, monkeypatch, *flags).replace(str(tmp_path), "")

    empty = tmp_path / "empty"
    empty.mkdir()
    assert refuses("--model", empty) == (
        "error: /empty has no tokenizer; it must hold tokenizer.json, or vocab.json and merges.txt"
    )
    model = tmp_path / "model"
    hf_checkpoint.save(model, *hf_checkpoint.load(first[0] / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((first[0] / "model" / name).read_bytes())
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").unlink()
    assert refuses("--model", model).startswith("error: /model/config.json cannot be read (no such")
    (model / "config.json").write_text(json.dumps({**content, "vocab_size": 300}))
    error = refuses("--model", model)
    assert error.startswith("error: /model does not fit its config.json: ")
    assert "vocab_size is 300, must be above the tokenizer's last token, " in error
    (model / "config.json").write_text(json.dumps(content))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refuses("--model", model).startswith("error: /model/model.safetensors is truncated or")
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    assert refuses("--data", path) == (
        'error: /data.jsonl:2: "completion" is missing; a record with "prompt" has both'
    )
    assert refuses("--data", tmp_path / "absent").startswith("error: /absent cannot be read: No su")


@pytest.mark.filterwarnings("ignore:of 40 examples, 40 are cut short")
def test_what_does_not_fit_ends_in_one_line(capsys, monkeypatch, tmp_path):
    def refuses(*arguments: Any) -> str:
        flags = [*FLAGS, f"--output-dir={tmp_path}", *arguments]
        return refusal(capsys, monkeypatch, *flags)

    assert refuses("--sft.row-length=8").startswith(
        "error: none of 40 examples has a response within max_length, 8"
    )
    assert refuses("--base.n-positions=150") == (
        "error: 4 of 4 cases have more tokens than the model's context, 150; take a model with a "
        "longer one"
    )
    assert "that is more than the context of 384; shorten either" in refuses(
        "--sampling.max-new-tokens=300"
    )
    assert refuses("--num-cases=1") == "error: num_cases is 1; it must be at least 2"


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """`python -m experiments.sft_clinical` in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"] or "",
    }
    command = [sys.executable, "-m", "experiments.sft_clinical", *arguments]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(arguments: Sequence[str]) -> str:
    process = start(arguments)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def steps(folder: Path) -> list[int]:
    """The sealed checkpoints, oldest first."""
    return sorted(int(path.parent.name) for path in folder.glob("checkpoints/*/manifest.json"))


@pytest.mark.slow
@pytest.mark.alone
def test_killed_run_resumes_to_the_same_bits(tmp_path):
    finish([*FLAGS, f"--output-dir={tmp_path / 'whole'}"])
    whole = run_folder(tmp_path / "whole")
    process = start([*FLAGS, f"--output-dir={tmp_path / 'killed'}"])
    while process.poll() is None:
        for folder in tmp_path.glob("killed/sft_clinical/*"):
            if steps(folder):
                process.kill()
        time.sleep(0.002)
    process.communicate()
    folder = run_folder(tmp_path / "killed")
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "result.json").exists()
    newest = steps(folder)[-1]
    assert newest < 10
    output = finish(["--resume", str(folder)])
    assert f"restored step {newest} of 10\n" in output
    (model, params, step), (_, expected, expected_step) = trained(folder), trained(whole)
    assert step == expected_step == 10
    assert_same(params, expected)
    assert_same(hf_checkpoint.load(folder / "model")[1], expected)
    lines, expected_lines = (
        [{**line, "seconds": 0} for line in logging.read_metrics(path)] for path in (folder, whole)
    )
    assert lines == expected_lines
    assert (folder / "result.json").read_bytes() == (whole / "result.json").read_bytes()
    assert model.config.n_embd == 16


@pytest.mark.slow
def test_default_configuration_learns_to_assess_patients(tmp_path):
    finish([f"--output-dir={tmp_path}"])
    result = json.loads((run_folder(tmp_path) / "result.json").read_text())
    assert result["perplexity_before"] / result["perplexity_after"] >= 5
    # No model is below the floor, but for the luck of 200 responses.
    assert result["perplexity_after"] >= result["perplexity_floor"] - 0.02
    assert result["perplexity_after"] < 1.2
    assert result["grammatical_after"] >= 0.9
    assert result["gold_score_after"] > 0.85
    assert result["gold_score_before"] < 0.1
