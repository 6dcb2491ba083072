"""The loop of a run: compiled chunks on the device, and the host between them.

    state = loop.run(algorithm, key, num_steps=1_000, chunk_steps=50, report=report)

Random numbers depend on the key and the step index alone, and chunks of every length are the same
compiled program, whose bounds are arguments. So a run that is logged more often, or was resumed
from a checkpoint, ends in the same bits.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.types import Algorithm, Array, Key, Mean, PyTree

Metrics = dict[str, Any]

# Operations one after another, each on all cores; XLA would run independent ones side by side.
SEQUENTIAL = {"xla_cpu_enable_concurrency_optimized_scheduler": False}

_SECONDS_BETWEEN_LINES = 2.0


def run(
    algorithm: Algorithm,
    key: Key,
    *,
    num_steps: int,
    chunk_steps: int,
    items_per_step: int = 1,
    report: Callable[[int, Metrics, PyTree], None] | None = None,
    save: Callable[[int, PyTree], None] | None = None,
    save_steps: int | None = None,
    state: PyTree | None = None,
    start: int = 0,
    data: PyTree | None = None,
    sequential: bool = False,
    label: str = "training",
    unit: str = "steps",
) -> PyTree:
    """Runs `algorithm` from step `start` to step `num_steps`.

    Args:
      algorithm: `init` makes the first state, `step` is given the key of its step index.
      key: root of every random number of the run; a resumed run needs the same one.
      num_steps: calls of `algorithm.step` in the whole run, those before `start` included.
      chunk_steps: the host is called at every multiple of it, and at the end.
      items_per_step: what one step works through, such as environment steps; for the progress.
      report: `(step, metrics, state)` after each chunk. A metric is its mean over the chunk, a
        float, or an array where `Mean` has leading axes (seeds). `state` is valid until it returns.
      save: `(step, state)` likewise, after `report`.
      save_steps: `save` is called at the first chunk end at or after each multiple of it, and at
        the end; after every chunk by default.
      state: to start from; DONATED: its buffers are reused and the caller's arrays deleted.
      start: the step index of `state`.
      data: the third argument of every `algorithm.step`; None for one that takes two.
      sequential: compile with `SEQUENTIAL` on a CPU. Operations that are large enough to keep all
        cores busy, as a language model's, then take 0.6 times as long; those of two small networks
        side by side, as PPO's, 1.5 times.
      label: of the run, in its progress on stderr.
      unit: of the items, in the plural.

    Returns:
      The state after step `num_steps`.

    Raises:
      ValueError: if a count is out of range, or one of `state` and `start` lacks the other; what a
        host callback of the algorithm raised; or, before anything of the chunk is reported or
        saved, if a metric is not a finite number.
    """
    _check_counts(num_steps, chunk_steps, items_per_step, save_steps, start)
    if state is None and start > 0:
        raise ValueError(f"start is {start}, but there is no state; restore it from a checkpoint")
    init_key, step_key = jax.random.split(key)
    if start == num_steps and state is not None:
        return state
    corpus = () if data is None else (jax.device_put(data),)
    with _progress(label, unit, start * items_per_step, num_steps * items_per_step) as progress:
        if state is None:
            state = jax.jit(algorithm.init)(init_key)
        state = _without_aliases(state)
        options = SEQUENTIAL if sequential and jax.default_backend() == "cpu" else {}
        chunk = _compile(algorithm, options, state, step_key, *corpus)
        progress.compiled()
        step = start
        while step < num_steps:
            previous, step = step, min(num_steps, (step // chunk_steps + 1) * chunk_steps)
            with _callback_faults():
                state, sums = chunk(state, step_key, jnp.int32(previous), jnp.int32(step), *corpus)
                metrics = means(sums)
            _check_finite(metrics, previous, step)
            progress.advance(step * items_per_step, metrics)
            if report is not None:
                report(step, metrics, state)
            is_due = save_steps is None or step // save_steps > previous // save_steps
            if save is not None and (is_due or step == num_steps):
                save(step, state)
            progress.resume_clock()
    return state


def over_seeds(algorithm: Algorithm, num_seeds: int) -> Algorithm:
    """`num_seeds` independent runs at once: every leaf of state and metrics gains a leading axis.

    Seed i draws from `fold_in(key, i)`, so it is the same run however many there are. On an
    accelerator seeds are a `vmap`. On a CPU each call takes one after another: each stays in cache,
    its matrix products are not batched ones, which are slower there, and its initialisation cannot
    meet the deadlock that batched orthogonal initialisation (QR) runs into with jaxlib 0.10.2.
    """
    if num_seeds < 1:
        raise ValueError(f"num_seeds is {num_seeds}; it must be at least 1")

    def seed_keys(key: Key) -> Key:
        return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(num_seeds))

    def each(function: Callable[..., Any], *arguments: Any) -> Any:
        return jax.lax.platform_dependent(
            *arguments,
            cpu=lambda *rows: jax.lax.map(lambda row: function(*row), rows),
            default=jax.vmap(function),
        )

    return Algorithm(
        init=lambda key: each(algorithm.init, seed_keys(key)),
        step=lambda key, state, *data: each(
            lambda key, state: algorithm.step(key, state, *data), seed_keys(key), state
        ),
    )


def means(sums: dict[str, Mean]) -> Metrics:
    """Host values of `Mean` metrics: floats, or NumPy arrays where they have axes."""
    values = jax.device_get({name: total.mean for name, total in sums.items()})
    return {name: float(value) if np.ndim(value) == 0 else value for name, value in values.items()}


def _check_finite(metrics: Metrics, previous: int, step: int) -> None:
    for name, value in metrics.items():
        if not np.all(np.isfinite(value)):
            raise ValueError(
                f"{name} is {np.ravel(value)[~np.isfinite(np.ravel(value))][0]} in steps "
                f"{previous + 1} to {step}, of which nothing is saved; mend the cause, then resume "
                "from the last checkpoint"
            )


@contextlib.contextmanager
def _callback_faults() -> Iterator[None]:
    """Raises the ValueError of a host callback, which XLA reports inside an error of its own."""
    logger = logging.getLogger("jax._src.callback")
    level = logger.level
    # It would print the whole stack of the callback, to say the same.
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        fault = re.search(r"^ValueError: (.*)$", str(error), re.MULTILINE)
        if fault is None:
            raise
        raise ValueError(fault.group(1)) from None
    finally:
        logger.setLevel(level)


def _compile(
    algorithm: Algorithm, options: dict[str, Any], state: PyTree, step_key: Key, *data: PyTree
) -> Callable[..., Any]:
    """`(state, step_key, start, stop, *data) -> (state, summed metrics)`, compiled.

    Bounds are arguments, not shapes: a scan of another length would be another program, which may
    round differently (a loop of one turn is unrolled and fused), and would compile again.
    """

    def chunk(
        state: PyTree, key: Key, start: Array, stop: Array, *data: PyTree
    ) -> tuple[PyTree, PyTree]:
        def body(step: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            state, sums = carry
            state, metrics = algorithm.step(jax.random.fold_in(key, step), state, *data)
            return state, jax.tree.map(jnp.add, sums, metrics)

        _, metrics = jax.eval_shape(algorithm.step, key, state, *data)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), metrics)
        return jax.lax.fori_loop(start, stop, body, (state, zeros))

    def sharding(leaf: Array) -> jax.sharding.Sharding | None:
        return leaf.sharding if leaf.committed else None

    # The state must come out laid out as it went in, or the compiled program refuses it.
    out_shardings = (jax.tree.map(sharding, state), None)
    jitted = jax.jit(chunk, donate_argnums=0, out_shardings=out_shardings)
    lowered = jitted.lower(state, step_key, jnp.int32(0), jnp.int32(0), *data)
    return lowered.compile(compiler_options=options)


def _without_aliases(state: PyTree) -> PyTree:
    """Copies each array that occurs a second time, since a buffer can be donated only once."""
    seen: set[int] = set()

    def distinct(leaf: Any) -> Array:
        array = jnp.asarray(leaf)
        if id(leaf) in seen:
            return jnp.copy(array)
        seen.add(id(leaf))
        return array

    return jax.tree.map(distinct, state)


def _check_counts(
    num_steps: int, chunk_steps: int, items_per_step: int, save_steps: int | None, start: int
) -> None:
    counts = {
        "num_steps": num_steps,
        "chunk_steps": chunk_steps,
        "items_per_step": items_per_step,
        "save_steps": 1 if save_steps is None else save_steps,
    }
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1")
    if not 0 <= start <= num_steps:
        raise ValueError(f"start is {start}; it must be in [0, num_steps = {num_steps}]")


class _Progress(Protocol):
    """What the loop tells whoever watches."""

    def compiled(self) -> None: ...
    def advance(self, items: int, metrics: Metrics) -> None: ...
    def resume_clock(self) -> None: ...


class _Clock:
    """Items a second of computing, without compiling or what the host does between chunks."""

    def __init__(self, unit: str, first: int, last: int):
        self._unit, self._first, self._last = unit, first, last
        self._seconds = 0.0
        self._resumed = time.perf_counter()

    def resume(self) -> None:
        self._resumed = time.perf_counter()

    def pause(self) -> float:
        """Seconds since it was resumed."""
        elapsed = time.perf_counter() - self._resumed
        self._seconds += elapsed
        return elapsed

    def restart(self) -> float:
        """Forgets what was counted, and returns the seconds since it was resumed."""
        elapsed = self.pause()
        self._seconds = 0.0
        self.resume()
        return elapsed

    def speed(self, items: int) -> str:
        rate = (items - self._first) / max(self._seconds, 1e-9)
        return f"{rate:,.0f} {self._unit}/s, {_duration((self._last - items) / rate)} left"


class _Lines:
    """Progress as plain lines, for a file or a pipe."""

    def __init__(self, label: str, unit: str, first: int, last: int):
        self._label, self._unit, self._last = label, unit, last
        self._clock = _Clock(unit, first, last)
        self._printed = float("-inf")
        self._print("compiling")

    def compiled(self) -> None:
        self._print(f"compiled in {self._clock.restart():.1f} s")

    def advance(self, items: int, metrics: Metrics) -> None:
        self._clock.pause()
        now = time.perf_counter()
        if now - self._printed >= _SECONDS_BETWEEN_LINES or items == self._last:
            self._printed = now
            done = f"{items:,} of {self._last:,} {self._unit} ({items / self._last:.0%})"
            self._print(", ".join([done, self._clock.speed(items), *_shown(metrics)]))

    def resume_clock(self) -> None:
        self._clock.resume()

    def _print(self, message: str) -> None:
        print(f"{self._label}: {message}", file=sys.stderr, flush=True)


class _Bar:
    """Progress as a bar that is redrawn, for a terminal."""

    def __init__(self, label: str, unit: str, first: int, last: int, progress: Any):
        self._label, self._progress = label, progress
        self._clock = _Clock(unit, first, last)
        self._task = progress.add_task(
            label, total=last, completed=first, speed="compiling", metrics=""
        )

    def compiled(self) -> None:
        message = f"{self._label}: compiled in {self._clock.restart():.1f} s"
        self._progress.console.print(message, highlight=False, markup=False)
        self._progress.update(self._task, speed="")

    def advance(self, items: int, metrics: Metrics) -> None:
        self._clock.pause()
        self._progress.update(
            self._task,
            completed=items,
            speed=self._clock.speed(items),
            metrics=", ".join(_shown(metrics)),
        )

    def resume_clock(self) -> None:
        self._clock.resume()


class _Silence:
    """No progress: another process shows it."""

    def compiled(self) -> None: ...
    def advance(self, items: int, metrics: Metrics) -> None: ...
    def resume_clock(self) -> None: ...


@contextlib.contextmanager
def _progress(label: str, unit: str, first: int, last: int) -> Iterator[_Progress]:
    if jax.process_index() != 0:
        yield _Silence()
        return
    if not sys.stderr.isatty():
        yield _Lines(label, unit, first, last)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[speed]}", markup=False),
        TextColumn(
            "{task.fields[metrics]}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
    ]
    with Progress(*columns, console=Console(stderr=True), expand=True) as progress:
        yield _Bar(label, unit, first, last, progress)


def _shown(metrics: Metrics) -> list[str]:
    """`name value` of each metric; of an array, the median."""
    return [f"{name} {float(np.median(value)):.4g}" for name, value in metrics.items()]


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
