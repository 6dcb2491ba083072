"""The command line: what it accepts, and the one line it says about what it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from jaxrl_llm.training import cli


@dataclass(frozen=True)
class Learner:
    clip_epsilon: float = 0.2
    """Half-width of the clip range."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    normalize: bool = True

    def validate(self) -> None:
        if self.clip_epsilon <= 0:
            raise ValueError(f"clip_epsilon is {self.clip_epsilon}; it must be greater than 0")
        for index, size in enumerate(self.hidden_sizes):
            if size < 1:
                raise ValueError(f"hidden_sizes[{index}] is {size}; it must be at least 1")


@dataclass(frozen=True)
class Config:
    """Train a learner."""

    ppo: Learner = Learner()
    seed: int = 0
    """Root of every random number."""
    mode: Literal["fast", "exact"] = "fast"
    resume: Path | None = None

    def validate(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")
        if self.mode == "exact" and self.resume is not None:
            raise ValueError("exact runs cannot resume; drop one of the two")


def test_parse_reads_nested_values():
    arguments = "--ppo.clip-epsilon 0.1 --ppo.hidden_sizes 8 4 --ppo.no-normalize --seed=3"
    assert cli.parse(Config, [*arguments.split(), "--resume", "runs/a"]) == Config(
        ppo=Learner(clip_epsilon=0.1, hidden_sizes=(8, 4), normalize=False),
        seed=3,
        resume=Path("runs/a"),
    )
    assert cli.parse(Config, []) == Config()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--sed 3", "--sed is not an option; did you mean --seed?"),
        (
            "--seed 3 --ppo.clip-epsilom 1",
            "--ppo.clip-epsilom is not an option; did you mean --ppo.clip-epsilon?",
        ),
        ("--zzz 3", "--zzz is not an option; see --help for all options"),
        ("-seed 3", "-seed is not an option; did you mean --seed?"),
        ("three", "three is not an option; see --help for all options"),
        ("--seed three", "--seed is three; it must be an integer"),
        ("--seed=three", "--seed is three; it must be an integer"),
        ("--seed", "--seed has no value; it must be an integer"),
        ("--seed 1 2", "--seed is 1 2; it must be an integer"),
        ("--mode slow", "--mode is slow; it must be one of fast, exact"),
        ("--ppo.clip-epsilon -x", "-x is not an option; see --help for all options"),
        ("--ppo.clip-epsilon x", "--ppo.clip-epsilon is x; it must be a number"),
        (
            "--seed 1 --ppo.hidden-sizes 8 y",
            "--ppo.hidden-sizes is 8 y; it must be values separated by spaces, each an integer",
        ),
        (
            "--ppo.normalize 1",
            "--ppo.normalize is 1; write --ppo.normalize or --ppo.no-normalize without a value",
        ),
        (
            "--ppo.no-normalize 1",
            "--ppo.no-normalize is 1; write --ppo.normalize or --ppo.no-normalize without a value",
        ),
        ("--seed -1", "--seed is -1; it must be at least 0"),
        ("--ppo.clip-epsilon -1", "--ppo.clip-epsilon is -1.0; it must be greater than 0"),
        ("--ppo.hidden-sizes 8 0", "--ppo.hidden-sizes[1] is 0; it must be at least 1"),
        ("--mode exact --resume a", "exact runs cannot resume; drop one of the two"),
    ],
)
def test_parse_error_is_one_line_and_exit_2(capsys, arguments, line):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Config, arguments.split())
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {line}\n"
    assert captured.out == ""


def test_parse_help_shows_docstrings(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Config, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for part in ("Train a learner.", "--ppo.clip-epsilon", "Half-width", "Root of every random"):
        assert part in text


def test_validate_names_the_flag_of_a_deeply_nested_field():
    @dataclass(frozen=True)
    class Outer:
        inner_config: Config

    config = Outer(Config(ppo=Learner(clip_epsilon=0.0)))
    with pytest.raises(ValueError, match=r"^--inner-config\.ppo\.clip-epsilon is 0\.0; it must"):
        cli.validate(config)
    with pytest.raises(ValueError, match=r"^--inner-config: exact runs cannot resume"):
        cli.validate(Outer(Config(mode="exact", resume=Path("a"))))


PROGRAM = """
from dataclasses import dataclass
from jaxrl_llm.training import cli
import json

@dataclass(frozen=True)
class Config:
    fault: str = ""

def main(config):
    if config.fault == "ours":
        raise ValueError("reward[2] is nan; it must be finite")
    if config.fault == "foreign":
        json.loads("{")
    if config.fault == "lines":
        raise ValueError("two\\nlines")
    if config.fault == "interrupt":
        raise KeyboardInterrupt
    if config.fault == "missing":
        open("absent/file.json")
    if config.fault == "missing by hand":
        raise FileNotFoundError("no table in absent; download it first")

if __name__ == "__main__":
    cli.main(main, Config)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("", 0, ""),
        ("ours", 2, "error: reward[2] is nan; it must be finite\n"),
        ("missing", 2, "error: absent/file.json: no such file or directory\n"),
        ("missing by hand", 2, "error: no table in absent; download it first\n"),
        ("interrupt", 130, "interrupted; the last checkpoint written is kept: resume from it\n"),
        ("foreign", 1, None),
        ("lines", 1, None),
    ],
)
def test_main_exit_code_and_message(tmp_path, fault, code, message):
    (tmp_path / "program.py").write_text(PROGRAM)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "program", "--fault", fault],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    if message is None:
        assert "Traceback" in done.stderr
    else:
        assert done.stderr == message


def test_help_names_the_module(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "program", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("usage: python -m program ")
