"""Outcomes -> numbers: a row a setting, a line a run, and the files that hold them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitbell.comparison.folder import SweepFolder
from bitbell.comparison.plan import Choice, Look, choose, chosen_trials, known_trials, tune_loss, tune_trials
from bitbell.comparison.sweep import Gap, Setting, Sweep, Trial
from bitbell.training.run import write_at_once

NUMBERS = (
    *("loss", "perplexity", "bits_per_byte", "weight_entropy", "activation_entropy", "packed_bytes", "bytes"),
    "seconds_per_step",
)
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
    def loss(self) -> float | None:
        """Mean final validation loss in nats per token."""
        return statistics.fmean(self.losses) if self.losses else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the loss over seeds; None for fewer than two."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None

    @property
    def diverged(self) -> int:
        """Runs at the chosen rate, or of the tune seeds where no rate is chosen, that diverged."""
        return self.statuses.count("diverged")

    @property
    def can_be_best(self) -> bool:
        """A mean over the survivors of a setting would flatter it."""
        return bool(self.losses) and not self.diverged

    @property
    def is_open(self) -> bool:
        """Not every rate has been tried."""
        return not self.choice.is_settled if self.choice else "diverged" not in self.statuses

    def number(self, key: str) -> float | None:
        return self.numbers.get(key)


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


def make_rows(sweep: Sweep, look: Look) -> list[Row]:
    """Full precision first, then width by width in the order of the sweep, best first."""
    place = {bits: i for i, bits in enumerate((None, *sweep.bits))}
    rows = [make_row(sweep, setting, look) for setting in sweep.settings]
    return sorted(rows, key=lambda row: (place[row.setting.bits], math.inf if row.loss is None else row.loss))


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """The best of each width that has rivals, once the learning rates of all of them are settled."""
    found = []
    for bits in dict.fromkeys(row.setting.bits for row in rows):
        rivals = [row for row in rows if row.setting.bits == bits and row.can_be_best]
        if len(rivals) > 1 and not any(row.is_open for row in rows if row.setting.bits == bits):
            found.append(min(rivals, key=lambda row: row.loss or math.inf))
    return found


def write_results(folder: SweepFolder, sweep: Sweep) -> None:
    """Write results.jsonl and table.md; each file at once."""
    lines = [json.dumps(record, allow_nan=False) + "\n" for record in records(sweep, folder.look)]
    write_at_once(folder.path / "results.jsonl", "".join(lines))
    write_at_once(folder.path / "table.md", markdown(sweep, folder.look) + "\n")


def records(sweep: Sweep, look: Look) -> list[dict[str, Any]]:
    """A flat object for each run that is decided on."""
    chosen = {t.name for s in sweep.settings if (c := choose(sweep, s, look)) for t in chosen_trials(sweep, s, c)}
    found = []
    for trial in known_trials(sweep, look):
        outcome = look(trial)
        found.append(
            {
                "run": trial.name,
                "label": trial.setting.label,
                "recipe": trial.setting.recipe,
                "bits": trial.setting.bits,
                "seed": trial.seed,
                "learning_rate": trial.learning_rate,
                "is_tune": trial.seed in sweep.seeds[: sweep.tune_seeds],
                "is_chosen": trial.name in chosen,
                "status": outcome.status,
                "message": outcome.message,
                **{key: _finite(outcome.summary.get(key)) for key in NUMBERS},
                "seconds": outcome.seconds,
            }
        )
    return found


def markdown(sweep: Sweep, look: Look) -> str:
    """The table as Markdown: settings, then the losses behind the choice of each rate, then what went wrong."""
    rows = make_rows(sweep, look)
    parts = [_main_table(rows, sweep.gaps), *legend(rows, sweep)]
    if len(sweep.learning_rates) > 1:
        parts += [
            "Mean loss over the tune seeds at each learning rate; the chosen one is bold:",
            _rates(sweep, rows, look),
        ]
    found = problems(sweep, look)
    parts += ["\n".join(f"- {line}" for line in found)] if found else []
    return "\n\n".join(parts)


def legend(rows: Sequence[Row], sweep: Sweep) -> list[str]:
    """What the marks in the table mean, of those that occur."""
    words = {
        "^": "^ the best rate is the highest of the grid: a wider grid may improve it.",
        "v": "v the best rate is the lowest of the grid: a wider grid may improve it.",
        "?": "? not all rates of the grid have been tried yet.",
        "!": "! seeds diverged; the mean is over the others, and the row is never best.",
    }
    text = [words[mark] for mark in words if any(mark in rate_mark(row) + loss_mark(row) for row in rows)]
    return [" ".join(text)] if text else []


def rate_mark(row: Row) -> str:
    """^ or v where the chosen rate is at the edge of the grid, ? where others are still to be tried."""
    if row.choice is None:
        return ""
    return {"highest": "^", "lowest": "v"}.get(row.choice.edge or "", "" if row.choice.is_settled else "?")


def loss_mark(row: Row) -> str:
    """! where seeds diverged."""
    return "!" if row.diverged and row.losses else ""


def seeds_text(row: Row) -> str:
    """ "3", "2 of 3" while some are missing, "1 of 3, 2 diverged"."""
    if not row.choice:
        return ", ".join(f"{n} {word}" for word in ("diverged", "failed") if (n := row.statuses.count(word))) or DASH
    count, of = len(row.losses), len(row.trials)
    text = str(count) if count == of else f"{count} of {of}"
    return text + "".join(f", {n} {word}" for word in ("diverged", "failed") if (n := row.statuses.count(word)))


def problems(sweep: Sweep, look: Look) -> list[str]:
    """Widths that a method does not have, and runs that diverged or failed, each with its reason."""
    found = [f"{gap.label} has no {gap.bits.upper()}: {gap.reason}" for gap in sweep.gaps]
    for trial in known_trials(sweep, look):
        outcome = look(trial)
        if outcome.status in ("diverged", "failed"):
            found.append(f"{trial.name} {outcome.status}: {outcome.message}")
    return found


def name_of(setting: Setting) -> str:
    """The setting in a sentence."""
    return f"{setting.label} {setting.bits.upper()}" if setting.bits else label_of(setting)


def label_of(setting: Setting) -> str:
    """The method in a table."""
    return "full precision" if setting.label in ("none", "full-precision") else setting.label


def _main_table(rows: Sequence[Row], gaps: Sequence[Gap]) -> str:
    head = ["method", "bits", "rate", "loss", "spread", "seeds", "perplexity", "bits/byte", "weight entropy"]
    head += ["activation entropy", "packed MB", "s/step"]
    best = best_rows(rows)
    lines = [_cells(row, row in best) for row in rows]
    lines += [[gap.label, gap.bits.upper()] + [DASH] * (len(head) - 2) for gap in gaps]
    return _table(head, lines)


def _cells(row: Row, is_best: bool) -> list[str]:
    loss = _text(row.loss, ".4f")
    size = row.number("packed_bytes") or row.number("bytes")
    return [
        label_of(row.setting),
        row.setting.bits.upper() if row.setting.bits else "32",
        f"{row.choice.learning_rate:g}{rate_mark(row)}" if row.choice else DASH,
        (f"**{loss}**" if is_best else loss) + loss_mark(row),
        _text(row.deviation, ".4f"),
        seeds_text(row),
        _text(None if row.loss is None else math.exp(min(row.loss, 700)), ".2f"),
        _text(row.number("bits_per_byte"), ".4f"),
        _text(row.number("weight_entropy"), ".3f"),
        _text(row.number("activation_entropy"), ".3f"),
        _text(None if size is None else size / 1e6, ".2f"),
        _text(row.number("seconds_per_step"), ".3g"),
    ]


def _rates(sweep: Sweep, rows: Sequence[Row], look: Look) -> str:
    lines = []
    for row in rows:
        cells = [_loss(tune_loss(sweep, row.setting, rate, look)) for rate in sweep.learning_rates]
        if row.choice:
            place = sweep.learning_rates.index(row.choice.learning_rate)
            cells[place] = f"**{cells[place]}**"
        lines.append([label_of(row.setting), row.setting.bits.upper() if row.setting.bits else "32", *cells])
    return _table(["method", "bits", *(f"{rate:g}" for rate in sweep.learning_rates)], lines)


def _loss(value: float | None) -> str:
    return "diverged" if value is not None and math.isinf(value) else _text(value, ".4f")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _text(value: float | None, how: str) -> str:
    return DASH if value is None else format(value, how)


def _mean(values: Sequence[Any]) -> float | None:
    known = [value for value in map(_finite, values) if value is not None]
    return statistics.fmean(known) if known else None


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None
