"""What the benchmarks of this folder share: the clock, spreads, the machine, and the stream rate."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "onnxruntime", "openvino", "llama-cpp-python")
FROM_CACHE, FROM_MEMORY = 24, 1024  # megabytes: what a shared cache holds, and what it does not


@dataclass(frozen=True)
class Spread:
    """Median of a number over rounds, and its lowest and highest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def json(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}..{self.high:.2f}]"


def ratios(times: Sequence[float], base: Sequence[float]) -> Spread:
    """Spread of times / base, each pair measured in one round, a moment apart."""
    return Spread.of([a / b for a, b in zip(times, base, strict=True)])


def clock_for(threads: int) -> Callable[[], float]:
    """Seconds of this thread's own work with one thread, which a neighbour's time slices do not lengthen; with more,
    wall time."""
    return time.thread_time if threads == 1 else time.perf_counter


def use_threads(threads: int) -> None:
    """Let PyTorch and our kernels use that many threads. Raises ValueError for fewer than 1."""
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)
    kernels = native_kernels()
    if kernels is not None:
        kernels.set_threads(threads)


def native_kernels() -> ModuleType | None:
    """`bitbell.kernels.native` where it is built and this machine runs it; else None, and bitbell runs as plain
    PyTorch."""
    try:
        from bitbell.kernels import native
    except ImportError:
        return None
    return native if native.available() else None


def kernels_in_use() -> str:
    """Which kernels bitbell's layers run on, in words."""
    kernels = native_kernels()
    return f"native, {kernels.level()}" if kernels is not None else "none: the plain PyTorch reference"


def stream_rates(threads: int) -> dict[str, float]:
    """Bytes a second that reading a small buffer again and again ("warm") and a large one ("cold") reach now; empty
    without the native kernels."""
    kernels = native_kernels()
    if kernels is None:
        return {}
    return {
        "warm": kernels.stream_rate(FROM_CACHE, threads),
        "cold": kernels.stream_rate(FROM_MEMORY, threads),
    }


def machine(threads: int) -> dict[str, Any]:
    """What a reader of the numbers wants to know of where they come from."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "pinned_to": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": threads,
        "clock": "thread CPU time" if threads == 1 else "wall time",
        "python": platform.python_version(),
        "versions": versions,
        "kernels": kernels_in_use(),
        "load_average": os.getloadavg()[0],
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe(about: dict[str, Any]) -> str:
    """`machine`, and the stream rates if known, in lines."""
    lines = [
        f"{about['cpu']}, {about['threads']} of {about['cpus']} CPUs, {about['clock']}, "
        f"load {about['load_average']:.1f}",
        "bitbell's kernels: " + about["kernels"],
        ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
    ]
    if about.get("stream"):
        lines.append(
            "one buffer read again and again: "
            + ", ".join(f"{rate / 1e9:.1f} GB/s {name}" for name, rate in about["stream"].items())
        )
    return "\n".join(lines)
