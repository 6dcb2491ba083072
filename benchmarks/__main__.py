"""Runs the benchmarks: `python -m benchmarks --match ppo --seconds 10`.

Prints a line a case, writes a JSON line a case, and ends with a table. Exit code 0 where all went
well, 1 where a case or its peer failed or the two disagreed, 2 where there was nothing to run.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import harness, machine

MODULES = (
    "bellman",
    "sparse_bellman",
    "tabular",
    "off_policy_evaluation",
    "returns",
    "environments",
    "ppo",
    "dqn",
    "sweep",
    "gpt2",
    "rlhf",
)
COLUMNS = (
    "case",
    "median (quartiles)",
    "rate",
    "compile",
    "beside",
    "times as fast (95%)",
    "of the limit",
    "disturbed",
)
PLAIN_WIDTH = 160  # of the table where the output is not a terminal


@dataclass(frozen=True)
class Options:
    """Speed of the hot paths beside the programs that do the same job."""

    match: str = ""
    """Run the cases whose `module/name` contains this; a module's name runs that module."""
    list: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the names of the cases instead of running them."""
    seconds: float = 5.0
    """To spend on a case and its peer, besides compilation and what is repeated."""
    output: Path | None = None
    """JSON lines are appended here; default `runs/benchmarks/<device>-<date>.jsonl`."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks")
    if not options.seconds > 0:
        print(f"--seconds is {options.seconds}; give a positive number", file=sys.stderr)
        return 2
    records = []
    for case in select(options.match):
        if options.list:
            print(case.name)
            records.append({"error": None})
            continue
        print(f"{case.name} ... ", end="", flush=True)
        record = harness.run(case, seconds=options.seconds, limits=machine.limits())
        print(progress(record), flush=True)
        write(record, options.output)
        records.append(record)
    if not records:
        names = ", ".join(MODULES)
        print(f"no case matches {options.match!r}; --list shows them ({names})", file=sys.stderr)
        return 2
    if not options.list:
        console = Console()
        if not console.is_terminal:
            console = Console(width=PLAIN_WIDTH)
        console.print(table(records))
    return int(any(record["error"] for record in records))


def select(match: str) -> Iterator[harness.Case]:
    """The cases whose `module/name` contains `match`, under that name.

    Modules are imported, and their arrays built, one by one and only where the match allows it.
    """
    named = [name for name in MODULES if match == name or match.startswith(f"{name}/")]
    for module in named or MODULES:
        for case in importlib.import_module(f"benchmarks.{module}").cases():
            name = f"{module}/{case.name}"
            if match in name:
                yield dataclasses.replace(case, name=name)


def write(record: dict, output: Path | None) -> None:
    """Appends the record, with the machine it was measured on, as one line of JSON."""
    description = machine.description()
    if output is None:
        device = re.sub(r"\W+", "-", description["device"]).lower()
        output = Path("runs", "benchmarks", f"{device}-{datetime.date.today()}.jsonl")
    output.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record | {"machine": description}, allow_nan=False)
    with output.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def progress(record: dict) -> str:
    """What one record says, in one line."""
    if "median_seconds" not in record:
        return f"failed: {record['error']}"
    cells = zip(COLUMNS[1:], row(record)[1:], strict=True)
    return "; ".join(f"{column} {cell}" for column, cell in cells if cell)


def table(records: Sequence[dict]) -> Table:
    limits = machine.limits()
    result = Table(
        *COLUMNS,
        caption=(
            f"limits of {machine.description()['device']}: read"
            f" {limits.cached_bytes / 1e9:.0f} GB/s cached, {limits.streamed_bytes / 1e9:.0f}"
            f" streamed, fresh write {limits.written_bytes / 1e9:.0f}; float32"
            f" {limits.float32_flops / 1e9:.0f} GFLOP/s. Disturbed repetitions were repeated;"
            " ! marks figures that had to rest on them."
        ),
    )
    for record in records:
        result.add_row(*map(escape, row(record)))
    return result


def row(record: dict) -> tuple[str, ...]:
    """The cells of one record."""
    error = record["error"]
    if "median_seconds" not in record:
        return (record["case"], f"failed: {error}", *[""] * 6)
    quartiles = " to ".join(map(duration, record["quartiles_seconds"]))
    speedup, limit = "", ""
    if "speedup" in record:
        low, high = record["speedup"]["interval"]
        speedup = f"{ratio(record['speedup']['ratio'])} ({ratio(low)} to {ratio(high)})"
    if "limit" in record:
        limit = f"{record['limit']['share']:.0%} {record['limit']['bound'].replace('_', ' ')}"
    disturbed = "unknown"
    if record["disturbed"] is not None:
        disturbed = f"{record['disturbed']:.0%}{'' if record['undisturbed_only'] else ' !'}"
    return (
        record["case"],
        f"{duration(record['median_seconds'])} ({quartiles})",
        rate(record, record["unit"]),
        duration((record["lower_seconds"] or 0) + record["compile_seconds"]),
        error or against(record),
        speedup,
        limit,
        disturbed,
    )


def against(record: dict) -> str:
    peer = record.get("peer")
    if peer is None:
        return ""
    if "missing" in peer:
        return peer["missing"]
    return f"{peer['name']}: {duration(peer['median_seconds'])}, {rate(peer, record['unit'])}"


def rate(times: dict, unit: str) -> str:
    return f"{quantity(times['items_per_second'])} {unit}/s"


def ratio(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


def quantity(number: float) -> str:
    """A number by its decimal prefix."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g} {prefix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


if __name__ == "__main__":
    sys.exit(main())
