"""`run_sweep`: open the folder, work on it in this process or in several, leave the tables."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitbell.comparison.folder import SweepFolder, open_folder
from bitbell.comparison.outcomes import forget_failure
from bitbell.comparison.plan import count, known_trials, pending
from bitbell.comparison.results import markdown, write_results
from bitbell.comparison.signals import StopSignals
from bitbell.comparison.sweep import Sweep, read_sweep_file
from bitbell.comparison.work import Budget, End, Worker

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class SweepResult:
    """How the sweep stands: how it ended ("done", "budget", "interrupted"), runs done of all, failures, the table."""

    out: Path
    ended: End
    done: int
    runs: int
    failed: tuple[str, ...]
    table: str

    @property
    def exit_status(self) -> int:
        """130 when interrupted, 1 if any run failed, else 0."""
        return 130 if self.ended == "interrupted" else int(bool(self.failed))


def run_sweep(
    spec: str | Path | Mapping[str, Any] | None,
    out: str | Path,
    *,
    budget: str | float | None = None,
    workers: int = 1,
    keep_checkpoints: bool = False,
    changes: Mapping[str, Any] | None = None,
    earlier: str | Path | None = None,
    is_worker: bool = False,
    say: Callable[[str], None] = print,
) -> SweepResult:
    """Work on a sweep, or continue it, as far as the budget goes. docs/compare.md has the rules.

    `spec` is a sweep file, its keys as a dictionary, or None for the sweep that the folder `out` holds; `changes` lies
    over it, its "train" over the other's. `earlier` is a sweep's folder whose finished runs count as done. `budget` is
    in seconds, or like "30m". A worker leaves failed runs to the command that started it. Raises ValueError, before
    any work, for a wrong sweep, a wrong argument, or a folder that holds something else.
    """
    seconds = parse_budget(budget)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers must be at least 1, got workers={workers!r}")
    values, source = _values(spec, Path(out), changes or {})
    folder, sweep = open_folder(out, values, source, earlier)
    if not is_worker:
        _retry(folder, sweep)
    if workers == 1:
        worker = Worker(folder, Budget(seconds), keep_checkpoints, lambda now: write_results(folder, now), say)
        ended = worker.work_on(sweep)
    else:
        ended = _work_in_processes(folder, sweep, Budget(seconds), keep_checkpoints, workers, say)
    return _finish(folder, sweep, ended)


def parse_budget(budget: str | float | None) -> float | None:
    """Seconds of "90", "45s", "30m", "1.5h", "1d", or of a number. Raises ValueError."""
    if budget is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([smhd]?)", budget.strip()) if isinstance(budget, str) else None
    seconds = float(found[1]) * UNITS[found[2] or "s"] if found else budget
    if isinstance(seconds, str | bool) or not 0 < seconds < math.inf:
        raise ValueError(f"budget must be a positive time like 90, 45s, 30m, 2h or 1d, got budget={budget!r}")
    return float(seconds)


def _values(spec: str | Path | Mapping[str, Any] | None, out: Path, changes: Mapping[str, Any]) -> tuple[Any, str]:
    """The plain values of the sweep (None: there are none), and what to call their source in messages."""
    if isinstance(spec, str | Path):
        values, source = read_sweep_file(spec), str(spec)
    elif spec is not None:
        values, source = dict(spec), "sweep"
    elif (out / "sweep.json").exists():
        from bitbell.comparison.folder import read_sweep

        values, source = read_sweep(out)[0].to_dict(), str(out / "sweep.json")
    elif "methods" in changes:
        values, source = {}, "the command line"
    else:
        return None, ""
    changes = dict(changes)
    train, extra = values.get("train", {}), changes.pop("train", {})
    if extra and isinstance(train, dict):
        values = {**values, "train": {**train, **extra}}
    return {**values, **changes}, source


def _retry(folder: SweepFolder, sweep: Sweep) -> None:
    """A repeated command tries failed runs again."""
    for trial in known_trials(sweep, folder.look):
        forget_failure(folder.run(trial))


def _work_in_processes(
    folder: SweepFolder, sweep: Sweep, budget: Budget, keep_checkpoints: bool, workers: int, say: Callable[[str], None]
) -> End:
    """Start `workers` processes that join the folder, pass Ctrl-C and SIGTERM on to them, and wait for their ends."""
    arguments = {
        "out": str(folder.path.resolve()),
        "budget": budget.left(),
        "keep_checkpoints": keep_checkpoints,
        "changes": {"train": sweep.train | {"threads": sweep.train.get("threads") or 1}},
    }
    code = "import sys; from bitbell.comparison.run import work_as_told; sys.exit(work_as_told(sys.argv[1]))"
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    with StopSignals() as signals:
        # In sessions of their own they get one signal each, from here, and not a second one from the terminal.
        started = [subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) for _ in range(workers)]
        statuses = wait_for(started, signals)
    crashed = [status for status in statuses if status not in (0, 1, 130)]
    if crashed:
        say(f"{len(crashed)} of {workers} workers ended with status {', '.join(map(str, crashed))}")
    if signals.received:
        return "interrupted"
    return "budget" if pending(sweep, folder.look) else "done"


def work_as_told(arguments: str) -> int:
    """One of several processes of a command: `run_sweep` with arguments as JSON; returns the exit status."""
    told = json.loads(arguments)
    return run_sweep(
        None, is_worker=True, say=lambda text: print(text, file=sys.stderr, flush=True), **told
    ).exit_status


def wait_for(started: list[subprocess.Popen[bytes]], signals: StopSignals) -> list[int]:
    """Exit statuses of the workers, once all have ended; a signal to this process is passed on to them."""
    passed_on = False
    try:
        while any(worker.poll() is None for worker in started):
            if signals.received and not passed_on:
                _tell(started, signal.SIGTERM)
                passed_on = True
            time.sleep(0.2)
    except KeyboardInterrupt:  # the second Ctrl-C
        _tell(started, signal.SIGINT)
        raise
    return [worker.wait() for worker in started]


def _tell(started: list[subprocess.Popen[bytes]], number: int) -> None:
    for worker in started:
        if worker.poll() is None:
            worker.send_signal(number)


def _finish(folder: SweepFolder, sweep: Sweep, ended: End) -> SweepResult:
    sweep = folder.newest(sweep)
    write_results(folder, sweep, at_end=True)
    trials = known_trials(sweep, folder.look)
    failed = tuple(trial.name for trial in trials if folder.look(trial).status == "failed")
    done = sum(folder.look(trial).is_done for trial in trials)
    return SweepResult(folder.path, ended, done, count(sweep, folder.look), failed, markdown(sweep, folder.look))
