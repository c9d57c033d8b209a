"""What the parts of this folder share: the clock, rows of results with what was checked, and the machine."""

from __future__ import annotations

import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "torchao")
Calls = Sequence[Callable[[], object]]


class OneByOne(list[Callable[[], object]]):
    """Calls that are not recorded as a graph, such as backward passes, which run where their forward pass ran."""


@dataclass
class Row:
    """One line of a table. ratio: how much better than `base` (above 1 is better; for a share, near 1), or None.

    floor, aim: the ratio that was hoped for, at least and at best; None where nothing was. check: what was compared
    before timing, or the error that kept the row from being timed.
    """

    case: str
    milliseconds: float | None = None
    rate: str = ""
    base: str = ""
    ratio: float | None = None
    floor: float | None = None
    aim: float | None = None
    check: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def cells(self) -> list[str]:
        hoped = "" if self.floor is None else f"{self.floor:g} / {self.aim:g}"
        time_ = "-" if self.milliseconds is None else f"{self.milliseconds:.4g}"
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}"
        return [self.case, time_, self.rate or "-", self.base or "-", ratio, hoped, self.check or "-"]


HEADER = ["case", "ms", "rate", "against", "ratio", "floor / aim", "checked"]


class Report:
    """The rows of one part, written to a file after each, so that a part that dies leaves what it had."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.rows = path, list[Row]()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print("| " + " | ".join(row.cells()) + " |", flush=True)
        if self.path is not None:
            self.path.write_text(json.dumps([asdict(row) for row in self.rows], indent=1))

    @contextmanager
    def guarded(self, case: str) -> Iterator[None]:
        """Inside, an error becomes a row that says so, and the part goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(Row(case, check=f"FAILED: {type(error).__name__}: {first_line(error)}"))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, short enough for a table."""
    return (str(error).strip().splitlines() or [""])[0][:160].replace("|", "/")


@dataclass(frozen=True)
class Machine:
    """Where things run: the device, and whether sizes are cut down to see only whether everything works."""

    device: torch.device
    quick: bool = False

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def describe(self) -> dict[str, Any]:
        """What a reader of the numbers wants to know."""
        found: dict[str, Any] = {"device": str(self.device), "python": platform.python_version(), "quick": self.quick}
        if self.is_gpu:
            about = torch.cuda.get_device_properties(self.device)
            found |= {"gpu": about.name, "memory_gb": about.total_memory / 1e9, "cuda": torch.version.cuda}
            found["processors"] = about.multi_processor_count
        for package in PACKAGES:
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                found[package] = "not installed"
        return found


def compare(candidates: dict[str, Calls], machine: Machine, rounds: int = 9) -> dict[str, list[float]]:
    """Seconds a call of every candidate, by rounds in which all take turns, so that a drifting clock hits all alike.

    A candidate is several calls with data of their own, so that no cache holds what the next call reads. On a GPU they
    are recorded as one graph, without Python's time between kernels; what cannot be recorded is called one by one.
    """
    runs = {name: _recorded(calls, machine) for name, calls in candidates.items()}
    rounds = 2 if machine.quick else rounds
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    repeats = {name: _repeats(run, machine) for name, run in runs.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(_timed(run, repeats[name], machine) / len(candidates[name]))
    return seconds


def _recorded(calls: Calls, machine: Machine) -> Callable[[], object]:
    def one_by_one() -> None:
        for call in calls:
            call()

    for _ in range(1 if machine.quick else 3):  # compiles, and warms up
        one_by_one()
    if not machine.is_gpu or isinstance(calls, OneByOne):
        return one_by_one
    machine.wait()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            one_by_one()
    except Exception as error:  # a wait for the GPU inside, for one
        torch.cuda.synchronize()
        print(f"  not recorded as a graph ({first_line(error)}): called one by one", flush=True)
        return one_by_one
    return graph.replay


def _repeats(run: Callable[[], object], machine: Machine, at_least: float = 0.01) -> int:
    """How many runs last long enough to be timed."""
    once = _timed(run, 1, machine)
    return 1 if machine.quick else max(1, min(1000, round(at_least / max(once, 1e-7))))


def _timed(run: Callable[[], object], repeats: int, machine: Machine) -> float:
    if machine.is_gpu:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(repeats):
            run()
        ended.record()
        torch.cuda.synchronize()
        return begun.elapsed_time(ended) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratio(base: Sequence[float], ours: Sequence[float]) -> float:
    """Median of base / ours, each pair measured in one round."""
    return statistics.median(a / b for a, b in zip(base, ours, strict=True))


def copies_for(bytes_each: int, machine: Machine, total: int = 256 << 20) -> int:
    """How many copies of something lie beyond every cache together."""
    return 1 if machine.quick else max(1, min(64, -(-total // max(bytes_each, 1))))
