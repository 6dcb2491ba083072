"""What a run leaves on disk: its folder, configuration, metrics and result.

    <output_dir>/<name>/<time>/config.json     the configuration, for resuming
                               metrics.jsonl   one JSON object a line: step, seconds, metrics
                               result.json     what `main` returned
                               events.out...   the metrics again, for TensorBoard

JSON has no infinities: a metric or result that is not finite is written as null.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
import types
import typing
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import numpy as np

from jaxrl_llm.data.files import write_atomically

ConfigT = TypeVar("ConfigT")


def run_directory(output_dir: str | Path, name: str) -> Path:
    """Creates `<output_dir>/<name>/<YYYYmmdd-HHMMSS>/`, with `-2`, `-3`... where that is taken."""
    parent = Path(output_dir) / name
    parent.mkdir(parents=True, exist_ok=True)
    started = datetime.now().strftime("%Y%m%d-%H%M%S")
    number = 1
    while True:
        directory = parent / (started if number == 1 else f"{started}-{number}")
        try:
            # The creation itself is the test: two runs of one second cannot both succeed.
            directory.mkdir()
        except FileExistsError:
            number += 1
        else:
            return directory


class RunLog:
    """Metrics of one run, to `metrics.jsonl` and TensorBoard; a context manager.

    Each line is flushed, so a killed run loses at most the line it was writing.

        with RunLog(directory, resume_step=step) as log:
            loop.run(..., report=lambda step, metrics, state: log.write(step, metrics))
    """

    def __init__(self, directory: str | Path, *, resume_step: int | None = None):
        """Opens the log of `directory`.

        Args:
          directory: of the run; it exists.
          resume_step: the step of the restored checkpoint. Lines after it are dropped, since the
            run writes them again, and so is a half-written one; the clock goes on from the last
            line kept. None starts a new log.
        """
        from tensorboardX import SummaryWriter

        path = Path(directory) / "metrics.jsonl"
        kept: list[dict[str, Any]] = []
        if resume_step is not None and path.exists():
            kept = [line for line in read_metrics(directory) if line["step"] <= resume_step]
        write_atomically(path, "".join(_line(line) for line in kept).encode())
        self._started = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(
            str(directory), purge_step=None if resume_step is None else resume_step + 1
        )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line.

        Args:
          step: of the run, increasing.
          metrics: numbers or arrays (an element a seed). TensorBoard shows the median of an array.

        Raises:
          ValueError: if a metric is named `step` or `seconds`.
        """
        for reserved in ("step", "seconds"):
            if reserved in metrics:
                raise ValueError(f"metrics[{reserved!r}] is a reserved name; rename the metric")
        values = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
        seconds = round(time.monotonic() - self._started, 3)
        lists = {name: value.tolist() for name, value in values.items()}
        self._file.write(_line({"step": int(step), "seconds": seconds, **lists}))
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, float(np.median(value)), int(step))
        self._tensorboard.flush()

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without any that a kill left half-written."""
    lines = []
    for text in (Path(directory) / "metrics.jsonl").read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and {"step", "seconds"} <= line.keys():
            lines.append(line)
    return lines


def write_result(directory: str | Path, result: Mapping[str, float]) -> Path:
    """Writes `result.json`, whole or not at all."""
    values = {name: np.asarray(value, np.float64).tolist() for name, value in result.items()}
    path = Path(directory) / "result.json"
    write_atomically(path, (json.dumps(_finite(values), indent=2) + "\n").encode())
    return path


def write_config(directory: str | Path, config: Any) -> Path:
    """Writes a configuration to `config.json`, whole or not at all."""
    path = Path(directory) / "config.json"
    text = json.dumps(_to_json(config), indent=2, allow_nan=False) + "\n"
    write_atomically(path, text.encode())
    return path


def read_config(directory: str | Path, config_class: type[ConfigT]) -> ConfigT:
    """The configuration that `write_config` wrote, nested dataclasses included.

    Raises:
      ValueError: naming the file and the field, if it is absent, damaged or of another experiment.
    """
    path = Path(directory) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path} cannot be read; resume from the folder of a run") from None
    except ValueError:
        raise ValueError(f"{path} is not valid JSON; start a new run") from None
    try:
        return _from_json(config_class, content, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; resume with the experiment that wrote it") from None


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(_finite(content), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """`value` with None in place of what JSON cannot write."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _to_json(getattr(value, name)) for name in names}
    if isinstance(value, (tuple, list)):
        return [_to_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # read back by float(); null would lose which one it was
    return value


def _from_json(hint: Any, value: Any, path: str) -> Any:
    """`value`, read from JSON, as the type `hint`; `path` is where it stands."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass_from_json(hint, value, path)
    if origin in (Union, types.UnionType):
        for argument in arguments:
            with contextlib.suppress(ValueError):
                return _from_json(argument, value, path)
    elif origin is tuple and isinstance(value, list):
        items = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(items) == len(value):
            pairs = enumerate(zip(items, value, strict=True))
            return tuple(_from_json(item, v, f"{path}[{i}]") for i, (item, v) in pairs)
    elif origin is Literal and value in arguments:
        return value
    elif hint is float and (type(value) in (int, float) or value in ("inf", "-inf", "nan")):
        return float(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif type(value) is hint:
        return value
    raise ValueError(f"{path} is {value!r}, not {getattr(hint, '__name__', hint)}")


def _dataclass_from_json(hint: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{path or 'the content'} is {value!r}, not an object")
    prefix = f"{path}." if path else ""
    names = [field.name for field in dataclasses.fields(hint)]
    for name in dict.fromkeys([*names, *value]):
        if name not in value:
            raise ValueError(f"{prefix}{name} is missing")
        if name not in names:
            raise ValueError(f"{prefix}{name} is not a known field")
    hints = typing.get_type_hints(hint)
    return hint(**{n: _from_json(hints[n], value[n], prefix + n) for n in names})
