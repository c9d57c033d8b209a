"""One process's work on a sweep: claim the next run, train it, note how it ended, write the tables, and again."""

from __future__ import annotations

import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from bitbell.comparison.claims import Claim, take
from bitbell.comparison.folder import SweepFolder
from bitbell.comparison.outcomes import drop_checkpoints, read_outcome, write_outcome
from bitbell.comparison.plan import count, known_trials, pending
from bitbell.comparison.signals import StopSignals
from bitbell.comparison.sweep import Sweep, Trial
from bitbell.training.journal import Progress

End = Literal["done", "budget", "interrupted"]
LOOK_AGAIN = 30.0  # seconds until a run is tried again that another process turned out to be training
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


@dataclass
class Worker:
    """This process's part in a sweep. `write_tables` is called after every run, `say` tells what happens."""

    folder: SweepFolder
    budget: Budget
    keep_checkpoints: bool
    write_tables: Callable[[Sweep], None]
    say: Callable[[str], None]
    is_waiting: bool = False
    elsewhere: dict[str, float] = field(default_factory=dict)  # runs that others train without a claim: when to look

    def work_on(self, sweep: Sweep) -> End:
        """Do runs of the sweep until nothing is left, the budget is spent, or a signal comes."""
        with StopSignals() as signals:
            while not signals.received:
                sweep = self.folder.newest(sweep)
                todo = pending(sweep, self.folder.look)
                if not todo:
                    return "done"
                if not self.budget.allows(expected_seconds(sweep, self.folder)):
                    return "budget"
                claimed = self._claim_next(todo)
                if claimed is None:
                    self._wait(len(todo))
                elif self._do(sweep, *claimed) == "stopped":
                    break
        return "interrupted"

    def _claim_next(self, todo: list[Trial]) -> tuple[Trial, Claim] | None:
        """The first run that is free."""
        for trial in todo:
            if self.elsewhere.get(trial.name, 0.0) > time.monotonic():
                continue
            claim = take(self.folder.claims, trial.name)
            if claim is None:
                continue
            if not read_outcome(self.folder.run(trial)).is_done:  # its last owner may have finished it since we looked
                return trial, claim
            claim.release()
        return None

    def _wait(self, count: int) -> None:
        if not self.is_waiting:
            self.say(f"waiting for {count} run{'s' * (count != 1)} of other processes")
        self.is_waiting = True
        time.sleep(POLL)

    def _do(self, sweep: Sweep, trial: Trial, claim: Claim) -> str:
        """One claimed run, and the tables with it; returns its status."""
        self.is_waiting = False
        with claim:
            status = run_trial(self.folder, sweep, trial, claim, self.keep_checkpoints)
        if status == "elsewhere":
            self.say(f"{trial.name}: another process is training it")
            self.elsewhere[trial.name] = time.monotonic() + LOOK_AGAIN
        elif status != "stopped":
            self.say(line_of(self.folder, sweep, trial))
            try:
                self.write_tables(sweep)
            except Exception as error:  # no table is worth a sweep of days; at its end the error shows
                self.say(f"the tables could not be written, the sweep goes on: {type(error).__name__}: {error}")
        return status


def expected_seconds(sweep: Sweep, folder: SweepFolder) -> float:
    """The median time of the sweep's finished runs; 0 while there is none."""
    outcomes = [folder.look(trial) for trial in known_trials(sweep, folder.look)]
    times = [o.seconds for o in outcomes if o.status == "finished" and o.seconds is not None]
    return statistics.median(times) if times else 0.0


def run_trial(folder: SweepFolder, sweep: Sweep, trial: Trial, claim: Claim, keep_checkpoints: bool) -> str:
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


def line_of(folder: SweepFolder, sweep: Sweep, trial: Trial) -> str:
    """How a run ended, and how many of the sweep are done."""
    outcome = folder.look(trial)
    done = sum(folder.look(other).is_done for other in known_trials(sweep, folder.look))
    what = f"loss {outcome.loss:.4f}" if outcome.status == "finished" else f"{outcome.status}: {outcome.message}"
    if outcome.status == "finished" and "accuracy" in outcome.summary:
        what += f"  accuracy {outcome.summary['accuracy']:.4f}"
    return f"[{done}/{count(sweep, folder.look)}] {trial.name}  {what}  {outcome.seconds or 0:.1f} s"
