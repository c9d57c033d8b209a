"""One process's work on a sweep: claim the next run, train it, note how it ended, write the tables, and again."""

from __future__ import annotations

import contextlib
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

from bitbell.comparison.claims import Claim, take
from bitbell.comparison.folder import SweepFolder
from bitbell.comparison.outcomes import drop_checkpoints, read_outcome, write_outcome
from bitbell.comparison.plan import count, known_trials, pending
from bitbell.comparison.sweep import Sweep, Trial
from bitbell.training.journal import Progress

End = Literal["done", "budget", "interrupted"]
POLL = 2.0  # seconds between looks at a sweep whose remaining runs all belong to others


class ClaimLost(RuntimeError):
    """Another process has taken over the run that this one is training."""


@dataclass
class Budget:
    """Seconds that may still be spent; None: as long as it takes."""

    seconds: float | None
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float | None:
        """Seconds left, never below 0."""
        return None if self.seconds is None else max(0.0, self.seconds - (time.monotonic() - self.started))

    def allows(self, expected: float) -> bool:
        """Whether a run of that many seconds would end in time."""
        left = self.left()
        return left is None or (left > 0 and expected <= left)


class QuietProgress(Progress):
    """Training's progress inside a sweep: one live line on a terminal, and the check that the claim is still ours."""

    def __init__(self, steps: int, name: str, claim: Claim) -> None:
        super().__init__(steps)
        self.name, self.claim = name, claim
        self.live = self.live and sys.stdout.isatty()

    def show(self, step: int, loss: float, learning_rate: float, tokens_per_second: float, seconds_left: float) -> None:
        if self.claim.is_lost:
            raise ClaimLost(f"another process has taken over {self.name}")
        if self.live:
            super().show(step, loss, learning_rate, tokens_per_second, seconds_left)

    def say(self, text: str) -> None:
        """Nothing: the sweep says a line for each run itself."""


class StopSignals:
    """Inside a `with`, `received` tells whether Ctrl-C or SIGTERM came, even while training had handlers of its own; a
    second Ctrl-C interrupts at once."""

    def __enter__(self) -> StopSignals:
        self._seen, self._handled = False, False
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            # Python writes the number of every signal here, whichever handler is installed.
            self._numbers, self._writer = socket.socketpair()
            self._numbers.setblocking(False)
            self._writer.setblocking(False)
            self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._stop)
        return self

    @property
    def received(self) -> bool:
        """Whether one came since the `with` began."""
        if self._previous and not self._seen:
            with contextlib.suppress(BlockingIOError):
                self._seen = any(number in self._previous for number in self._numbers.recv(1024))
        return self._seen

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._handled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._handled = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous:
            signal.set_wakeup_fd(self._previous_fd)
            self._seen = self.received
            self._numbers.close()
            self._writer.close()
        self._previous = {}


def work_on(
    folder: SweepFolder,
    sweep: Sweep,
    budget: Budget,
    keep_checkpoints: bool,
    write_tables: Callable[[Sweep], None],
    say: Callable[[str], None],
) -> End:
    """Do runs of the sweep until nothing is left, the budget is spent, or a signal comes.

    `write_tables` is called after every run.
    """
    is_waiting = False
    with StopSignals() as signals:
        while not signals.received:
            sweep = folder.newest(sweep)
            todo = pending(sweep, folder.look)
            if not todo:
                return "done"
            if not budget.allows(expected_seconds(sweep, folder)):
                return "budget"
            claimed = _claim_next(folder, todo)
            if claimed is None:
                if not is_waiting:
                    say(f"waiting for {len(todo)} run{'s' * (len(todo) != 1)} of other processes")
                is_waiting = True
                time.sleep(POLL)
                continue
            is_waiting = False
            trial, claim = claimed
            with claim:
                ended = _run(folder, sweep, trial, claim, keep_checkpoints)
            if ended == "stopped":
                return "interrupted"
            if ended == "elsewhere":
                say(f"{trial.name}: another process is training it")
                time.sleep(POLL)
                continue
            say(_line(folder, sweep, trial))
            _write(write_tables, sweep, say)
    return "interrupted"


def _write(write_tables: Callable[[Sweep], None], sweep: Sweep, say: Callable[[str], None]) -> None:
    try:
        write_tables(sweep)
    except Exception as error:  # no table is worth a sweep of days; at its end the error shows
        say(f"the tables could not be written, the sweep goes on: {type(error).__name__}: {error}")


def expected_seconds(sweep: Sweep, folder: SweepFolder) -> float:
    """The median time of the sweep's finished runs; 0 while there is none."""
    outcomes = [folder.look(trial) for trial in known_trials(sweep, folder.look)]
    times = [o.seconds for o in outcomes if o.status == "finished" and o.seconds is not None]
    return statistics.median(times) if times else 0.0


def _claim_next(folder: SweepFolder, todo: list[Trial]) -> tuple[Trial, Claim] | None:
    """The first run that is free."""
    for trial in todo:
        claim = take(folder.claims, trial.name)
        if claim is None:
            continue
        if not read_outcome(folder.run(trial)).is_done:  # its last owner may have finished it since we looked
            return trial, claim
        claim.release()
    return None


def _run(folder: SweepFolder, sweep: Sweep, trial: Trial, claim: Claim, keep_checkpoints: bool) -> str:
    """Train one run and note its end; returns its status, or "elsewhere" if it turned out to belong to another."""
    from bitbell.training import TrainingDiverged, train
    from bitbell.training.run import RunLocked

    run, started = folder.run(trial), time.monotonic()
    before = read_outcome(run).seconds or 0.0
    message, details = "", {}
    try:
        config = sweep.config(trial, folder.runs)
        status: str = train(config, QuietProgress(config.steps, trial.name, claim)).status
    except (RunLocked, ClaimLost):
        return "elsewhere"
    except TrainingDiverged as error:
        status, message = "diverged", str(error)
    except Exception as error:  # whatever it is, the other runs of the sweep do not depend on it
        status, message = "failed", f"{type(error).__name__}: {error}"
        details = {"traceback": traceback.format_exc()}
    write_outcome(run, status, before + time.monotonic() - started, message, **details)
    if status in ("finished", "diverged") and not keep_checkpoints:
        drop_checkpoints(run)
    return status


def _line(folder: SweepFolder, sweep: Sweep, trial: Trial) -> str:
    outcome = folder.look(trial)
    done = sum(folder.look(other).is_done for other in known_trials(sweep, folder.look))
    what = f"loss {outcome.loss:.4f}" if outcome.status == "finished" else f"{outcome.status}: {outcome.message}"
    return f"[{done}/{count(sweep, folder.look)}] {trial.name}  {what}  {outcome.seconds or 0:.1f} s"
