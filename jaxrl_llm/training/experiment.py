"""What every experiment does around its one idea: open a folder, go on, log, save, finish.

class Config(experiment.RunConfig): ...

def main(config: Config) -> dict[str, float]:
    run = experiment.open_run("my_experiment", config)
    state = experiment.train(run, algorithm, ...)
    return experiment.finish(run, result)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar
from zlib import crc32

import jax
import numpy as np
from numpy.typing import NDArray

from jaxrl_llm import checks
from jaxrl_llm.training import checkpoint, logging, loop, plotting
from jaxrl_llm.training.evaluate import SOLVERS, SolverRun, run_solver
from jaxrl_llm.types import MDP, Algorithm, Key, PyTree, SuccessorMDP


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every experiment takes; its own `Config` extends this."""

    seed: int = 0
    """Root of every random number."""
    output_dir: Path = Path("runs")
    """Where runs are written, as <output-dir>/<experiment>/<time>/."""
    resume: Path | None = None
    """Folder of a run to go on with; without a value, the latest."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """What every experiment that trains takes besides."""

    num_evaluations: int = 40
    """Points of the learning curve."""
    num_checkpoints: int = 10
    """Checkpoints written on the way; each waits for the next point of the curve."""

    def validate(self) -> None:
        for name in ("num_evaluations", "num_checkpoints"):
            checks.at_least(name, getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class SeedsConfig(TrainConfig):
    """What every experiment that trains several learners takes besides."""

    num_seeds: int = 10
    """Independent learners, trained side by side in one program."""

    def validate(self) -> None:
        super().validate()
        checks.at_least("num_seeds", self.num_seeds, 1)


@dataclass(frozen=True, kw_only=True)
class IterationsConfig(SeedsConfig):
    """What an experiment takes besides whose learners repeat one step as often as asked."""

    num_iterations: int = 1000
    """Of collecting and updating."""

    def validate(self) -> None:
        super().validate()
        checks.at_least("num_iterations", self.num_iterations, 1)


ConfigT = TypeVar("ConfigT", bound=RunConfig)
ConfigT_co = TypeVar("ConfigT_co", bound=RunConfig, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Run(Generic[ConfigT_co]):
    """A run's folder, the configuration it was STARTED with, and whether it is going on.

    Attributes:
      directory: of the run, or of one of its stages.
      config: of the whole run.
      resumed: whether it goes on from where it was stopped.
      stage: which one, where a run trains several learners one after another.
    """

    directory: Path
    config: ConfigT_co
    resumed: bool
    stage: str | None = None

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def key(self) -> Key:
        """Root of every random number of the run, or of the stage."""
        root = jax.random.key(self.config.seed)
        return root if self.stage is None else jax.random.fold_in(root, crc32(self.stage.encode()))

    def start_stage(self, name: str) -> Run[ConfigT_co]:
        """The run's stage `name`: with a folder, checkpoints, a log and random numbers of its own.

        A resumed run goes through the stages again; one that had ended only restores its end.
        """
        directory = self.directory / name
        directory.mkdir(exist_ok=True)
        return dataclasses.replace(self, directory=directory, stage=name)


def open_run(name: str, config: ConfigT) -> Run[ConfigT]:
    """A new run of experiment `name`, or the one that `config.resume` names.

    Raises:
      ValueError: if there is no run to resume, or the command line asks a resumed run for
        something else than what it was started with.
    """
    if config.resume is None:
        directory = logging.run_directory(config.output_dir, name)
        logging.write_config(directory, config)
        run = Run(directory=directory, config=config, resumed=False)
    else:
        latest = str(config.resume) == "latest"
        directory = _newest_run(config.output_dir / name) if latest else config.resume
        started = logging.read_config(directory, type(config))
        _check_same(directory, config, started)
        run = Run(directory=directory, config=started, resumed=True)
    print(f"{name}: {'resuming' if run.resumed else 'writing'} {run.directory}", flush=True)
    return run


def keys(run: Run[Any], count: int) -> Key:
    """`[count]` keys of a run's own, for what is drawn outside of `train`."""
    # `loop.run` splits the same root in two.
    return jax.random.split(run.key, 2 + count)[2:]


def train(
    run: Run[TrainConfig],
    algorithm: Algorithm,
    *,
    num_steps: int,
    items_per_step: int,
    evaluate: Callable[[PyTree], Mapping[str, Any]],
    state: PyTree | None = None,
    data: PyTree | None = None,
    sequential: bool = False,
    unit: str = "steps",
) -> PyTree:
    """Trains one learner, from the start or the newest sound checkpoint, logging and saving.

    Args:
      run: from `open_run`.
      algorithm: of the learner.
      num_steps: of the algorithm.
      items_per_step: what one step works through, for the progress.
      evaluate: state -> more metrics of that moment, to be logged.
      state: to start from, DONATED; by default the algorithm's own. A checkpoint takes precedence.
      data: as in `loop.run`.
      sequential: as in `loop.run`.
      unit: of the items, in the plural.

    Returns:
      The final state.
    """
    config = run.config
    key = run.key
    like = jax.eval_shape(algorithm.init, key) if state is None else state
    restored, begin = _restore(run, like, num_steps)
    with _open_log(run, begin) as log:
        return loop.run(
            algorithm,
            key,
            num_steps=num_steps,
            chunk_steps=max(num_steps // config.num_evaluations, 1),
            items_per_step=items_per_step,
            report=lambda step, metrics, state: log.write(step, {**metrics, **evaluate(state)}),
            save=lambda step, state: checkpoint.save(run.checkpoints, step, state),
            save_steps=max(num_steps // config.num_checkpoints, 1),
            state=state if restored is None else restored,
            start=begin,
            data=data,
            sequential=sequential,
            label=run.stage or "training",
            unit=unit,
        )


def train_seeds(
    run: Run[SeedsConfig], algorithm: Algorithm, *, items_per_step: int, **options: Any
) -> PyTree:
    """`train` of `config.num_seeds` learners side by side; every leaf gains a leading axis.

    Args:
      run: from `open_run`.
      algorithm: of one learner.
      items_per_step: of one learner.
      **options: as in `train`; `evaluate` returns one value a seed.
    """
    num_seeds = run.config.num_seeds
    learners = loop.over_seeds(algorithm, num_seeds)
    return train(run, learners, items_per_step=items_per_step * num_seeds, **options)


def solve(
    run: Run[Any], mdps: Mapping[str, MDP | SuccessorMDP], *, tolerance: float
) -> dict[str, dict[str, SolverRun]]:
    """Solves every problem by every solver, logging and saving each; a resumed run does the rest.

    Args:
      run: from `open_run`.
      mdps: the problems by name.
      tolerance: of the Bellman residual.

    Returns:
      What each solver found, by problem and solver.
    """
    pairs = [(name, solver) for name in mdps for solver in SOLVERS]
    solved = {name: dict.fromkeys(SOLVERS, SolverRun.empty(mdp)) for name, mdp in mdps.items()}
    restored, start = _restore(run, solved, len(pairs))
    solved = restored or solved
    with _open_log(run, start) as log:
        for step, (name, solver) in enumerate(pairs[start:], start + 1):
            solved[name][solver] = found = run_solver(SOLVERS[solver], mdps[name], tolerance)
            metrics = found.metrics().items()
            log.write(step, {f"{name}/{solver}/{metric}": value for metric, value in metrics})
            checkpoint.save(run.checkpoints, step, solved)
            print(f"solved {step} of {len(pairs)}: {name} by {solver}", flush=True)
    # A restored dict is in alphabetical order.
    return {name: {solver: solved[name][solver] for solver in SOLVERS} for name in mdps}


def _restore(run: Run[Any], target: PyTree, num_steps: int) -> tuple[PyTree | None, int]:
    """The state and step that a resumed run goes on from; `(None, 0)` where there is none yet."""
    folder = run.checkpoints
    # A run killed while it wrote its first checkpoint has a folder without steps.
    if not (run.resumed and folder.exists() and any(p.name.isdecimal() for p in folder.iterdir())):
        return None, 0
    state, step, _ = checkpoint.restore(folder, target)
    where = f"{run.stage}: " if run.stage else ""
    print(f"{where}restored step {step} of {num_steps}", flush=True)
    return state, step


def _open_log(run: Run[Any], start: int) -> logging.RunLog:
    return logging.RunLog(run.directory, resume_step=start if run.resumed else None)


def curve(run: Run[TrainConfig], name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What `train` logged of metric `name`: steps `[T]` and values `[T]`, or `[seeds, T]`."""
    lines = logging.read_metrics(run.directory)
    steps = np.array([line["step"] for line in lines])
    return steps, np.array([line[name] for line in lines], np.float64).T


def draw_curve(
    run: Run[TrainConfig], name: str, references: Mapping[str, float], *, title: str, footer: str
) -> None:
    """Draws what `train` logged of metric `name` of one learner, as `<name>.png` of the run."""
    steps, values = curve(run, name)
    figure = plotting.learning_curve(
        steps,
        values[None],
        references=references,
        title=title,
        xlabel="Optimiser steps",
        ylabel=name.replace("_", " ").capitalize(),
        footer=footer,
    )
    plotting.save_figure(figure, run.directory / f"{name}.png")


def finish(run: Run[Any], result: Mapping[str, Any]) -> dict[str, float]:
    """Writes `result.json`, says where, and returns the result as floats."""
    numbers = {name: float(value) for name, value in result.items()}
    logging.write_result(run.directory, numbers)
    print(f"wrote {run.directory}")
    return numbers


def _newest_run(folder: Path) -> Path:
    configs = sorted(folder.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not configs:
        raise ValueError(f"{folder} has no run to resume; start one without --resume")
    return configs[-1].parent


def _check_same(directory: Path, asked: RunConfig, started: RunConfig) -> None:
    """A flag given beside --resume must agree with the run; one left out takes its value."""
    default, saved = _flatten(type(asked)()), _flatten(started)
    for field, value in _flatten(asked).items():
        if field not in ("output_dir", "resume") and value not in (default[field], saved[field]):
            flag = "--" + field.replace("_", "-")
            raise ValueError(
                f"{flag} is {value}, but {directory} was started with {saved[field]}; "
                "leave it out, or start a new run"
            )


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field of nested dataclasses by its dotted path."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), prefix + field.name
        nested = dataclasses.is_dataclass(value)
        fields |= _flatten(value, path + ".") if nested else {path: value}
    return fields
