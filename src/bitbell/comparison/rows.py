"""The table: a row a setting, each at its own learning rate, and what its cells say."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitbell.comparison.plan import Choice, Look, choose, chosen_trials, tune_trials
from bitbell.comparison.sweep import Setting, Sweep, Trial

NUMBERS = (
    *("loss", "perplexity", "bits_per_byte", "weight_entropy", "activation_entropy", "packed_bytes", "bytes"),
    "seconds_per_step",
)
HEAD = (
    *(("Method", ""), ("Bits", ""), ("Learning rate", ""), ("Validation loss", "nats/token"), ("Spread", "of seeds")),
    *(("Seeds", ""), ("Perplexity", ""), ("Bits/byte", ""), ("Weight entropy", "bits")),
    *(("Activation entropy", "bits"), ("Size", "MB"), ("Time per step", "s")),
)
MARKS = {
    "^": "the best rate is the highest of the grid: a wider grid may improve it",
    "v": "the best rate is the lowest of the grid: a wider grid may improve it",
    "?": "not all rates of the grid have been tried yet",
    "!": "a seed diverged; the mean is over the others, and the row is never best",
}
DASH = "-"


@dataclass(frozen=True)
class Row:
    """What the table says of a setting. Numbers are means over the finished runs at the chosen rate."""

    setting: Setting
    choice: Choice | None
    trials: tuple[Trial, ...]
    losses: tuple[float, ...]
    statuses: tuple[str, ...]
    numbers: dict[str, float | None]

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
        """Mean final validation loss in nats per token."""
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
    return Row(
        setting,
        choice,
        tuple(trials),
        tuple(float(summary["loss"]) for summary in finished),
        tuple(outcome.status for outcome in outcomes),
        {key: _mean([summary.get(key) for summary in finished]) for key in NUMBERS},
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


def cells(row: Row) -> list[str]:
    """The row as text, one cell for each of HEAD."""
    size = row.numbers["packed_bytes"] or row.numbers["bytes"]
    rate = DASH if row.choice is None else f"{row.choice.learning_rate:g}{row.marks.replace('!', '')}"
    return [
        *(row.label, row.bits, rate),
        text(row.loss, ".4f") + ("!" if "!" in row.marks else ""),
        text(row.deviation, ".4f"),
        _seeds(row),
        text(None if row.loss is None else math.exp(min(row.loss, 700)), ".2f"),
        text(row.numbers["bits_per_byte"], ".4f"),
        text(row.numbers["weight_entropy"], ".3f"),
        text(row.numbers["activation_entropy"], ".3f"),
        text(None if size is None else size / 1e6, ".2f"),
        text(row.numbers["seconds_per_step"], ".3g"),
    ]


def bits_of(width: str) -> tuple[int, int]:
    """Bits of weights and activations: (2, 4) for "w2a4"."""
    weights, _, activations = width[1:].partition("a")
    return int(weights), int(activations)


def gap_lines(sweep: Sweep) -> list[list[str]]:
    """The same for the widths that a method does not have, a line a method."""
    widths: dict[str, list[str]] = {}
    for gap in sweep.gaps:
        widths.setdefault(gap.label, []).append(gap.bits.upper())
    return [[label, ", ".join(bits), *[DASH] * (len(HEAD) - 2)] for label, bits in widths.items()]


def legend(rows: Sequence[Row]) -> str:
    """What the marks mean, of those that occur."""
    given = {mark for row in rows for mark in row.marks}
    return " ".join(f"{mark} {meaning}." for mark, meaning in MARKS.items() if mark in given)


def problems(sweep: Sweep, look: Look, trials: Sequence[Trial]) -> list[str]:
    """Widths that a method does not have, and runs that diverged or failed, each with its reason."""
    found = [f"{gap.label} has no {gap.bits.upper()}: {gap.reason}" for gap in sweep.gaps]
    outcomes = [(trial.name, look(trial)) for trial in trials]
    return found + [f"{name} {o.status}: {o.message}" for name, o in outcomes if o.status in ("diverged", "failed")]


def text(value: float | None, how: str) -> str:
    """A number in a format; a dash for None."""
    return DASH if value is None else format(value, how)


def finite(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def _seeds(row: Row) -> str:
    """ "3", "2 of 3" while some are missing, "2 of 3, 1 diverged"; only what went wrong while there is no rate."""
    wrong = [f"{n} {word}" for word in ("diverged", "failed") if (n := row.statuses.count(word))]
    if row.choice is None:
        return ", ".join(wrong) or DASH
    count, of = len(row.losses), len(row.trials)
    return ", ".join([str(count) if count == of else f"{count} of {of}", *wrong])


def _mean(values: Sequence[Any]) -> float | None:
    known = [number for value in values if (number := finite(value)) is not None]
    return statistics.fmean(known) if known else None
