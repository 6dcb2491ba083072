"""Environment steps a second against the number of patients, from measured results.

    python -m benchmarks.throughput_picture --results mine.jsonl [more.jsonl ...]

Reads the JSON lines of `python -m benchmarks --match environments`, by default the committed ones;
of a case that was measured more than once the last line counts. One picture is one machine: files
of several are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrl_llm.data import json_lines
from jaxrl_llm.training import cli, plotting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CASE = re.compile(r"environments/(?P<name>.+?)-(?P<size>\d+)(?:-[a-z-]+)?$")
_MARKERS = "osD^vPX"
_DASHES = ("-", (0, (6, 1.5)), (0, (2, 1)))
# name of an environment -> number of patients -> steps a second
Rates = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Options:
    """Draws steps a second against the number of patients."""

    results: tuple[Path, ...] = (Path(__file__).parent / "results" / "deep-cpu-2-cores.jsonl",)
    """JSON lines that the benchmarks wrote, of one machine."""
    picture: Path = Path("throughput.png")
    """Where to write it."""

    def validate(self) -> None:
        if not self.results:
            raise ValueError("results is empty; name at least one file of JSON lines")


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What the results say.

    Attributes:
      ours: rates of each environment.
      peers: rates of each peer that was measured beside one; of one patient at a time in Python, or
        of as many as ours.
      machine: a line about it.
    """

    ours: Rates
    peers: Rates
    machine: str


def read(paths: Sequence[Path]) -> Throughput:
    """The rates in files of JSON lines.

    Raises:
      ValueError: a file cannot be read or has a line that is no benchmark's; no environment was
        measured, or two machines were.
    """
    ours: Rates = {}
    peers: Rates = {}
    machines: list[str] = []
    for path in paths:
        for record in json_lines.read_records(path, _parse):
            case = _CASE.match(record["case"])
            if case is None or record["error"] is not None:
                continue
            size = int(case["size"])
            ours.setdefault(case["name"], {})[size] = record["items_per_second"]
            peer = record.get("peer") or {}
            if "items_per_second" in peer:
                peers.setdefault(peer["name"], {})[size] = peer["items_per_second"]
            machines.append(_describe(record["machine"]))
    names = ", ".join(map(str, paths))
    if not ours:
        raise ValueError(f"results {names} hold no environment; run --match environments")
    if len(found := sorted(set(machines))) > 1:
        raise ValueError(f"results {names} are of {len(found)} machines; draw one at a time")
    return Throughput(ours=ours, peers=peers, machine=machines[0])


def _parse(record: Any) -> Mapping:
    match record:
        case {"case": str(), "machine": dict(), "error": None, "items_per_second": float()}:
            return record
        # A case that failed has no rate.
        case {"case": str(), "machine": dict(), "error": str()}:
            return record
        case _:
            raise ValueError("no benchmark's record; give files that `python -m benchmarks` wrote")


def _describe(machine: Mapping) -> str:
    if machine["platform"] == "cpu":
        return f"{machine['processor']}, {machine['cores']} cores, JAX {machine['versions']['jax']}"
    return f"{machine['devices']} × {machine['device']}, JAX {machine['versions']['jax']}"


def throughput(measured: Throughput) -> Figure:
    """Steps a second against patients, both logarithmic; the fastest environment comes first."""
    figure, axes = plotting.new_figure(
        9.0, 5.6, "Environment steps a second under a random policy", measured.machine
    )
    styles = cycle(zip(plotting.COLORS, _MARKERS, strict=False))
    by_rate = sorted(measured.ours.items(), key=lambda item: -max(item[1].values()))
    for index, (name, rates) in enumerate(by_rate):
        color, marker = next(styles)
        sizes = sorted(rates)
        axes.plot(
            sizes,
            [rates[size] for size in sizes],
            color=color,
            marker=marker,
            markersize=4.5,
            linewidth=1.5,
            linestyle=_DASHES[index // len(plotting.COLORS) % len(_DASHES)],
            label=name,
        )
    for (name, rates), dashes in zip(
        sorted(measured.peers.items()), cycle([":", "-.", "--"]), strict=False
    ):
        sizes = sorted(rates)
        levels = [rates[size] for size in sizes]
        axes.plot(
            sizes,
            levels,
            color=plotting.GREY,
            # A line through a single point is invisible.
            marker="*" if len(sizes) == 1 else None,
            linestyle=dashes,
            linewidth=1.3,
            label=f"({name})",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({size for rates in measured.ours.values() for size in rates})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xlabel("Patients at once")
    axes.set_ylabel("Steps a second, all patients together")
    axes.legend(
        frameon=False,
        fontsize=plotting.SMALL,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        title="fastest first; (other programs)",
        title_fontsize=plotting.SMALL,
    )
    return figure


def main(options: Options) -> None:
    """Draws, and prints where the picture is."""
    print(plotting.save_figure(throughput(read(options.results)), options.picture))


if __name__ == "__main__":
    cli.main(main, Options)
