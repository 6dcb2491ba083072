"""What the machine is, what it can do at most, and how busy the rest of it is."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "quantecon",
    "pymdptoolbox",
    "rlax",
    "gymnax",
    "gymnasium",
    "icu-sepsis",
    "torch",
    "transformers",
)

CACHED_SIDE = 2048  # a float32 square of 16 MiB
STREAMED_SIDE = 11584  # 512 MiB, beyond the last-level cache of any processor or accelerator
WRITTEN_ELEMENTS = 2**26  # 256 MiB
CPU_GEMM_SIDE = 1024
ACCELERATOR_GEMM_SIDE = 4096  # large enough that launching the kernel does not show
SAMPLE_SECONDS = 0.1  # spent on each limit, besides compilation

STAT = Path("/proc/stat")
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The best that JAX reaches on the default device, each a rate per second.

    Attributes:
      cached_bytes: read by a matrix-vector product over 16 MiB.
      streamed_bytes: the same over 512 MiB.
      written_bytes: written to a freshly allocated output of 256 MiB.
      float32_flops: of a matrix product at JAX's default precision.
      float64_flops: the same in float64; None where the device has none.
      bfloat16_flops: the same in bfloat16; None on a CPU, where nothing here computes in it.
    """

    cached_bytes: float
    streamed_bytes: float
    written_bytes: float
    float32_flops: float
    float64_flops: float | None
    bfloat16_flops: float | None = None


@functools.cache
def limits() -> Limits:
    """The limits of JAX's default device, measured once a process in a second or two."""
    platform_name = jax.default_backend()
    side = CPU_GEMM_SIDE if platform_name == "cpu" else ACCELERATOR_GEMM_SIDE
    float64_flops = None
    if platform_name != "tpu":
        with jax.enable_x64(True):
            float64_flops = _product_rate(side, jnp.float64)
    return Limits(
        cached_bytes=_read_rate(CACHED_SIDE, passes=16),
        streamed_bytes=_read_rate(STREAMED_SIDE, passes=1),
        written_bytes=_write_rate(),
        float32_flops=_product_rate(side, jnp.float32),
        float64_flops=float64_flops,
        bfloat16_flops=None if platform_name == "cpu" else _product_rate(side, jnp.bfloat16),
    )


def _read_rate(side: int, passes: int) -> float:
    """Bytes a second of a chain of matrix-vector products; each pass reads the whole matrix."""

    @jax.jit
    def read(matrix: jax.Array, vector: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, passes, lambda _, current: matrix @ current, vector)

    matrix = jnp.full((side, side), 1 / side, jnp.float32)
    return passes * matrix.nbytes / _best_seconds(read, matrix, jnp.ones(side, jnp.float32))


def _write_rate() -> float:
    write = jax.jit(lambda value: jnp.full(WRITTEN_ELEMENTS, value, jnp.float32))
    return 4 * WRITTEN_ELEMENTS / _best_seconds(write, jnp.float32(1))


def _product_rate(side: int, dtype: jnp.dtype) -> float:
    matrix = jnp.full((side, side), 1 / side, dtype)
    return 2 * side**3 / _best_seconds(jax.jit(jnp.matmul), matrix, matrix)


def _best_seconds(function: Callable, *arguments: jax.Array) -> float:
    jax.block_until_ready(function(*arguments))
    best, spent = float("inf"), 0.0
    while spent < SAMPLE_SECONDS:
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        elapsed = time.perf_counter() - start
        best, spent = min(best, elapsed), spent + elapsed
    return best


def description() -> dict:
    """The device, its limits, the processor, and the versions that a figure rests on."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "limits": dataclasses.asdict(limits()),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | _versions(),
    }


def _processor() -> str:
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def seconds_of_others() -> float | None:
    """How long, since boot, the whole machine has worked for anything but this process.

    One second is one second of all processors; time that a hypervisor gave to other machines
    counts. Two readings differ by at least the interval between them times the share of the
    machine that was not ours; ticks of 10 ms make intervals under 0.1 s meaningless.

    Returns:
      Seconds, or None where the system has no `/proc/stat`.
    """
    if not STAT.exists():
        return None
    return others_from(STAT.read_text(), os.sysconf("SC_CLK_TCK"), time.process_time())


def others_from(stat: str, ticks_per_second: int, own_seconds: float) -> float:
    """Seconds of the whole machine, from the text of `/proc/stat`, less this process's own."""
    lines = stat.splitlines()
    user, nice, system, _, _, interrupt, soft_interrupt, steal = map(int, lines[0].split()[1:9])
    busy = (user + nice + system + interrupt + soft_interrupt + steal) / ticks_per_second
    processors = sum(line.startswith("cpu") for line in lines[1:])
    return (busy - own_seconds) / processors
