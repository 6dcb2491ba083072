"""Times a case beside its peer: compilation apart, interleaved, and away from disturbance."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from benchmarks import machine

MINIMUM_REPETITIONS = 5
MAXIMUM_REPETITIONS = 1000
# The kernel's processor accounts move in ticks of 10 ms: a shorter round would read as noise.
ROUND_SECONDS = 0.2
DISTURBED_SHARE = 0.1  # of the whole machine, busy for others, that spoils a round
# A call this short is made once more before it is timed, so that it finds its own data in the
# caches, whichever program went before it: what a loop of calls would see.
SHORT_SECONDS = 0.01
PATIENCE = 3  # times the asked seconds are spent before disturbed rounds are accepted

Arguments = tuple | Callable[[], tuple]


class PeerMissing(Exception):
    """A peer is not on this machine; the message says how to get it."""


@dataclass(frozen=True)
class Peer:
    """Another program that does the same job as a case.

    Attributes:
      name: for the table.
      function: as in `Case`.
      arguments: as in `Case`.
      items: that one call processes; None where it is as many as the case's.
    """

    name: str
    function: Callable[..., Any]
    arguments: Arguments = ()
    items: int | None = None


@dataclass(frozen=True)
class Case:
    """One call to be timed.

    Attributes:
      name: unique within its module, such as `gae-2048x64`.
      function: called as `function(*arguments)`; a jitted function or any host callable. What it
        returns is waited for.
      arguments: a tuple, or, where the function donates or mutates its inputs, a callable that
        makes fresh ones before every call, outside the timed region.
      items: that one call processes, such as environment steps.
      peer: makes the `Peer`, called when the case runs; `PeerMissing` leaves the case alone.
      unit: of the items, in the plural.
      agree: `(result, peer_result) -> None`, raises AssertionError unless both did the same job.
      work: `result -> {limit: amount}`, what a call must at least move and compute, by the names
        of `machine.Limits`: `lambda solution: {"cached_bytes": matrix.nbytes * sweeps}`.
    """

    name: str
    function: Callable[..., Any]
    arguments: Arguments
    items: int
    peer: Callable[[], Peer] | None = None
    unit: str = "items"
    agree: Callable[[Any, Any], None] | None = None
    work: Callable[[Any], Mapping[str, float]] | None = None


@dataclass(frozen=True)
class Start:
    """Seconds until a program first answered.

    Attributes:
      lower: to trace and lower it; None for a function that is not jitted.
      compile: to compile it; None likewise.
      call: of the first call, which compiles whatever the two above did not.
    """

    lower: float | None
    compile: float | None
    call: float


@dataclass(frozen=True)
class Sample:
    """Interleaved repetitions.

    Attributes:
      seconds: `[repetitions, programs]`.
      disturbed: `[repetitions]` bool, taken while others used the machine; None if unknowable.
    """

    seconds: np.ndarray
    disturbed: np.ndarray | None

    @property
    def undisturbed_only(self) -> bool | None:
        """Whether enough repetitions were left in peace that the figures rest on those alone."""
        if self.disturbed is None:
            return None
        return int(np.sum(~self.disturbed)) >= MINIMUM_REPETITIONS

    @property
    def kept(self) -> np.ndarray:
        """`[kept, programs]`: the undisturbed repetitions, or all where those are too few."""
        if self.disturbed is None or not self.undisturbed_only:
            return self.seconds
        return self.seconds[~self.disturbed]


def run(
    case: Case,
    *,
    seconds: float,
    limits: machine.Limits,
    clock: Callable[[], float] = time.perf_counter,
    others: Callable[[], float | None] = machine.seconds_of_others,
) -> dict:
    """Times one case and its peer.

    Args:
      case: what to time.
      seconds: undisturbed time to spend on repetitions of the two together.
      limits: of this machine.
      clock: seconds, monotonic.
      others: as `machine.seconds_of_others`.

    Returns:
      A record of plain values, ready for JSON. `error` says why the case or its peer failed, or
      why they disagree, and is None otherwise; a peer that is merely missing is not an error.
    """
    record = {
        "case": case.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "error": None,
    }
    try:
        return record | _measured(case, seconds=seconds, limits=limits, clock=clock, others=others)
    except Exception as error:
        return record | {"error": _one_line(error)}


def _measured(
    case: Case, *, seconds: float, limits: machine.Limits, clock: Callable, others: Callable
) -> dict:
    jax.clear_caches()  # a function that an earlier case compiled must be compiled again
    record: dict[str, Any] = {"unit": case.unit}
    result, start = first_call(case, clock)
    work = None if case.work is None else case.work(result)
    beside = None
    try:
        if case.peer is not None:
            peer = case.peer()
            beside = (peer, *first_call(peer, clock))
    except PeerMissing as missing:
        record["peer"] = {"missing": str(missing)}
    except Exception as error:
        record["error"] = f"peer failed: {_one_line(error)}"
    if beside is not None and case.agree is not None:
        case.agree(result, beside[1])

    programs = [case] if beside is None else [case, beside[0]]
    sample = interleave(programs, seconds=seconds, clock=clock, others=others)
    record |= {
        "repetitions": len(sample.kept),
        "disturbed": None if sample.disturbed is None else float(np.mean(sample.disturbed)),
        "undisturbed_only": sample.undisturbed_only,
    }
    record |= summary(start, sample.kept[:, 0], case.items)
    if work is not None:
        record["limit"] = share_of_limit(work, record["median_seconds"], limits)
    if beside is not None:
        peer, _, peer_start = beside
        items = case.items if peer.items is None else peer.items
        record["peer"] = {"name": peer.name} | summary(peer_start, sample.kept[:, 1], items)
        record["speedup"] = speedup(sample.kept[:, 0] / case.items, sample.kept[:, 1] / items)
    return record


def first_call(program: Case | Peer, clock: Callable[[], float]) -> tuple[Any, Start]:
    """Compiles a jitted function, measuring it, then calls it once for its result."""
    lower = compile_ = None
    stages = getattr(program.function, "lower", None)
    if stages is not None:
        inputs = _fresh(program.arguments)
        begin = clock()
        lowered = stages(*inputs)
        middle = clock()
        lowered.compile()
        lower, compile_ = middle - begin, clock() - middle
    inputs = _fresh(program.arguments)
    begin = clock()
    result = jax.block_until_ready(program.function(*inputs))
    return result, Start(lower, compile_, clock() - begin)


def interleave(
    programs: Sequence[Case | Peer],
    *,
    seconds: float,
    clock: Callable[[], float],
    others: Callable[[], float | None],
) -> Sample:
    """Calls the programs in turn, the first one alternating, until enough is left undisturbed.

    Repetitions come in rounds of at least `ROUND_SECONDS`, and a round during which others used
    more than `DISTURBED_SHARE` of the machine is repeated, until `PATIENCE * seconds` are spent.
    """
    times: list[list[float]] = []
    disturbed: list[bool | None] = []
    undisturbed_seconds, begin = 0.0, clock()
    while True:
        round_begin, busy_begin, before = clock(), others(), len(times)
        while clock() - round_begin < ROUND_SECONDS:
            times.append(_repetition(programs, times, clock))
        busy_end, now = others(), clock()
        spoilt = None
        if busy_begin is not None and busy_end is not None:
            spoilt = busy_end - busy_begin > DISTURBED_SHARE * (now - round_begin)
        disturbed += [spoilt] * (len(times) - before)
        if not spoilt:
            undisturbed_seconds += now - round_begin
        undisturbed = len(times) - sum(map(bool, disturbed))
        satisfied = undisturbed >= MINIMUM_REPETITIONS and undisturbed_seconds >= seconds
        exhausted = len(times) >= MINIMUM_REPETITIONS and now - begin >= PATIENCE * seconds
        if satisfied or exhausted or undisturbed >= MAXIMUM_REPETITIONS:
            known = None if disturbed[0] is None else np.array(disturbed)
            return Sample(np.array(times), known)


def _repetition(
    programs: Sequence[Case | Peer], earlier: Sequence[list[float]], clock: Callable[[], float]
) -> list[float]:
    """Seconds of one call of each program; every other repetition runs them backwards."""
    seconds = [0.0] * len(programs)
    order = list(range(len(programs)))
    for index in order if len(earlier) % 2 == 0 else reversed(order):
        program = programs[index]
        if earlier and earlier[-1][index] < SHORT_SECONDS:
            call(program)
        inputs = _fresh(program.arguments)
        begin = clock()
        # Bound to a name, so that freeing the result falls outside of the timed region.
        result = jax.block_until_ready(program.function(*inputs))
        seconds[index] = clock() - begin
        del result
    return seconds


def call(program: Case | Peer) -> Any:
    """The result of one call, waited for."""
    return jax.block_until_ready(program.function(*_fresh(program.arguments)))


def _fresh(arguments: Arguments) -> tuple:
    return jax.block_until_ready(arguments() if callable(arguments) else arguments)


def summary(start: Start, seconds: np.ndarray, items: int) -> dict:
    """Median, quartiles and rate of repetitions `seconds` `[n]`, beside what starting took.

    Where lowering and compiling could not be measured apart, `compile_seconds` is what the first
    call took beyond the median one.
    """
    lower_quartile, median, upper_quartile = np.percentile(seconds, [25, 50, 75]).tolist()
    compile_ = max(start.call - median, 0.0) if start.compile is None else start.compile
    return {
        "items": items,
        "median_seconds": median,
        "quartiles_seconds": [lower_quartile, upper_quartile],
        "items_per_second": items / median,
        "lower_seconds": start.lower,
        "compile_seconds": compile_,
    }


def speedup(own: np.ndarray, peer: np.ndarray, *, resamples: int = 1000) -> dict:
    """How many times as fast as the peer we are: the ratio of medians, peer over own.

    The interval is the 95% percentile bootstrap over repetitions; the two times of a repetition
    stay together, so that what slows both does not widen it.

    Args:
      own: seconds an item, `[n]`.
      peer: the same of the peer, taken in the same repetitions.
      resamples: of the bootstrap.
    """
    rows = np.random.default_rng(0).integers(len(own), size=(resamples, len(own)))
    ratios = np.median(peer[rows], axis=1) / np.median(own[rows], axis=1)
    return {
        "ratio": float(np.median(peer) / np.median(own)),
        "interval": np.percentile(ratios, [2.5, 97.5]).tolist(),
    }


def share_of_limit(work: Mapping[str, float], seconds: float, limits: machine.Limits) -> dict:
    """The least time that the machine's limits allow for `work`, over the `seconds` it took.

    Raises:
      ValueError: a name in `work` is not one of a limit that this machine has.
    """
    rates = {name: rate for name, rate in dataclasses.asdict(limits).items() if rate is not None}
    for name in work:
        if name not in rates:
            raise ValueError(
                f"work[{name!r}] is no limit of this machine; use one of {list(rates)}"
            )
    least = {name: amount / rates[name] for name, amount in work.items()}
    bound = max(least, key=least.__getitem__)
    return {"share": float(least[bound] / seconds), "bound": bound}


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:200] if message else type(error).__name__
