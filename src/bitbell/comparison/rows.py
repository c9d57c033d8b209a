"""The rows of the table: one a setting, each at its own learning rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitbell.comparison.kinds import kind_of
from bitbell.comparison.plan import Choice, Look, choose, chosen_trials, tune_trials
from bitbell.comparison.sweep import Setting, Sweep, Trial

MARKS = {
    "^": "the best rate is the highest of the grid: a wider grid may improve it",
    "v": "the best rate is the lowest of the grid: a wider grid may improve it",
    "?": "not all rates of the grid have been tried yet",
    "!": "a seed diverged; the mean is over the others, and the row is never best",
}


@dataclass(frozen=True)
class Row:
    """What the table says of a setting. Numbers are means over the finished runs at the chosen rate."""

    setting: Setting
    choice: Choice | None
    trials: tuple[Trial, ...]
    losses: tuple[float, ...]
    statuses: tuple[str, ...]
    numbers: dict[str, float | None]
    deviations: dict[str, float | None]
    """Sample standard deviations over the seeds; None for fewer than two."""

    @property
    def name(self) -> str:
        """Method and bits, for a sentence."""
        return f"{self.label} {self.bits}" if self.setting.bits else self.label

    @property
    def label(self) -> str:
        """The method as the table calls it."""
        return "full precision" if self.setting.label in ("none", "full-precision") else self.setting.label

    @property
    def bits(self) -> str:
        """ "W2A2"; "32" for full precision."""
        return self.setting.bits.upper() if self.setting.bits else "32"

    @property
    def loss(self) -> float | None:
        """Mean final validation loss, nats."""
        return statistics.fmean(self.losses) if self.losses else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the loss over seeds; None for fewer than two."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None

    @property
    def is_open(self) -> bool:
        """Whether rates are still to be tried."""
        return not self.choice.is_settled if self.choice else not set(self.statuses) <= {"finished", "diverged"}

    @property
    def can_be_best(self) -> bool:
        """A mean over the survivors of a setting would flatter it."""
        return bool(self.losses) and "diverged" not in self.statuses

    @property
    def marks(self) -> str:
        """The keys of MARKS that the row deserves."""
        edge = {"highest": "^", "lowest": "v"}.get(self.choice.edge or "", "") if self.choice else ""
        tried = "?" if self.choice and not self.choice.is_settled else ""
        return edge + tried + ("!" if self.losses and "diverged" in self.statuses else "")


def make_rows(sweep: Sweep, look: Look) -> list[Row]:
    """Full precision first, then from many bits to few, best first."""

    def key(row: Row) -> tuple[Any, ...]:
        widths = [-number for number in bits_of(row.setting.bits)] if row.setting.bits else []
        return widths, math.inf if row.loss is None else row.loss

    return sorted((make_row(sweep, setting, look) for setting in sweep.settings), key=key)


def make_row(sweep: Sweep, setting: Setting, look: Look) -> Row:
    """The row of a setting, of whatever is known by now."""
    choice = choose(sweep, setting, look)
    trials = chosen_trials(sweep, setting, choice) if choice else tune_trials(sweep, setting)
    outcomes = [look(trial) for trial in trials]
    finished = [outcome.summary for outcome in outcomes if outcome.status == "finished"] if choice else []
    known = {key: _known([summary.get(key) for summary in finished]) for key in kind_of(sweep).numbers}
    return Row(
        setting,
        choice,
        tuple(trials),
        tuple(float(summary["loss"]) for summary in finished),
        tuple(outcome.status for outcome in outcomes),
        {key: statistics.fmean(values) if values else None for key, values in known.items()},
        {key: statistics.stdev(values) if len(values) > 1 else None for key, values in known.items()},
    )


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """The best of each width that has rivals, once the learning rates of all of them are settled."""
    found = []
    for bits in dict.fromkeys(row.setting.bits for row in rows):
        mine = [row for row in rows if row.setting.bits == bits]
        rivals = [row for row in mine if row.can_be_best]
        if len(rivals) > 1 and not any(row.is_open for row in mine):
            found.append(min(rivals, key=lambda row: row.loss or math.inf))
    return found


def bits_of(width: str) -> tuple[int, int]:
    """Bits of weights and activations: (2, 4) for "w2a4"."""
    weights, _, activations = width[1:].partition("a")
    return int(weights), int(activations)


def legend(rows: Sequence[Row]) -> str:
    """What the marks mean, of those that occur."""
    given = {mark for row in rows for mark in row.marks}
    return " ".join(f"{mark} {meaning}." for mark, meaning in MARKS.items() if mark in given)


def problems(sweep: Sweep, look: Look, trials: Sequence[Trial]) -> list[str]:
    """Widths that a method does not have, and runs that diverged or failed, each with its reason."""
    found = [f"{gap.label} has no {gap.bits.upper()}: {gap.reason}" for gap in sweep.gaps]
    outcomes = [(trial.name, look(trial)) for trial in trials]
    return found + [f"{name} {o.status}: {o.message}" for name, o in outcomes if o.status in ("diverged", "failed")]


def finite(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def _known(values: Sequence[Any]) -> list[float]:
    return [number for value in values if (number := finite(value)) is not None]
