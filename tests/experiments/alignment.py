"""What the tests of the alignment experiments share: flags of a run so small that it only runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from jaxrl_llm.training import cli

ConfigT = TypeVar("ConfigT")
FLAGS = (
    "--num-evaluations=2 --num-checkpoints=2 --num-demonstrations=40 --num-pairs=8 "
    "--num-held-out=8 --num-prompts=12 --num-cases=5 --base.vocab-size=400 "
    "--base.n-positions=384 --base.n-embd=16 --base.n-layer=2 --base.n-head=2 --sft.num-steps=4 "
    "--sft.batch-size=2 --sft.row-length=320 --reward.num-steps=4 --reward.batch-size=4 "
    "--num-own-pairs=4 --heads.num-steps=4"
).split()
PPO_FLAGS = "--ppo.num-iterations=4 --ppo.rollout.num-prompts=4 --ppo.rollout.max-new-tokens=6"


def tiny_config(
    config_class: type[ConfigT], output_dir: Path, *flags: str, methods: str = PPO_FLAGS
) -> ConfigT:
    """The configuration that a user gets by these flags."""
    every = [*FLAGS, *methods.split(), *flags, f"--output-dir={output_dir}"]
    return cli.parse(config_class, every)


def run_folder(output_dir: Path) -> Path:
    """Of the only run there is."""
    ((folder,),) = (list(experiment.iterdir()) for experiment in output_dir.iterdir())
    return folder


def is_finite(result: dict[str, Any]) -> bool:
    return all(abs(value) < float("inf") for value in result.values())
