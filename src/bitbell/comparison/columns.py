"""The columns of the table, and what a row says in each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitbell.comparison.kinds import kind_of
from bitbell.comparison.rows import Row
from bitbell.comparison.sweep import Sweep

DASH = "-"
LOSS = 3  # the place of the loss among the columns, which is bold where a row is the best of its width


@dataclass(frozen=True)
class Column:
    """A title, the unit under it, and the cell of a row."""

    title: str
    unit: str
    write: Callable[[Row], str]


def columns_of(sweep: Sweep, rows: Sequence[Row]) -> tuple[Column, ...]:
    """The columns for the models of a sweep; top-5 accuracy where the runs have one, for more than five classes."""
    kind = kind_of(sweep)
    leading = (
        Column("Method", "", lambda row: row.label),
        Column("Bits", "", lambda row: row.bits),
        Column("Learning rate", "", _rate),
        Column("Validation loss", f"nats/{kind.sample}", _loss),
        Column("Spread", "of seeds", lambda row: text(row.deviation, ".4f")),
        Column("Seeds", "", _seeds),
    )
    if not kind.is_of_images:
        return leading + _OF_TEXT + _CODES_AND_COST
    has_top5 = any(row.numbers["accuracy_top5"] is not None for row in rows)
    return leading + _ACCURACY + _TOP5 * has_top5 + _CODES_AND_COST


def cells(row: Row, columns: Sequence[Column]) -> list[str]:
    """The row as text, one cell a column."""
    return [column.write(row) for column in columns]


def gap_lines(sweep: Sweep, columns: Sequence[Column]) -> list[list[str]]:
    """The same for the widths that a method does not have, a line a method."""
    widths: dict[str, list[str]] = {}
    for gap in sweep.gaps:
        widths.setdefault(gap.label, []).append(gap.bits.upper())
    return [[label, ", ".join(bits), *[DASH] * (len(columns) - 2)] for label, bits in widths.items()]


def text(value: float | None, how: str) -> str:
    """A number in a format; a dash for None."""
    return DASH if value is None else format(value, how)


def percent(value: float | None) -> str:
    """A share in per cent; a dash for None."""
    return text(None if value is None else 100 * value, ".2f")


def _number(key: str, how: str) -> Callable[[Row], str]:
    return lambda row: text(row.numbers[key], how)


def _rate(row: Row) -> str:
    return DASH if row.choice is None else f"{row.choice.learning_rate:g}{row.marks.replace('!', '')}"


def _loss(row: Row) -> str:
    return text(row.loss, ".4f") + ("!" if "!" in row.marks else "")


def _seeds(row: Row) -> str:
    """ "3", "2 of 3" while some are missing, "2 of 3, 1 diverged"; only what went wrong while there is no rate."""
    wrong = [f"{n} {word}" for word in ("diverged", "failed") if (n := row.statuses.count(word))]
    if row.choice is None:
        return ", ".join(wrong) or DASH
    count, of = len(row.losses), len(row.trials)
    return ", ".join([str(count) if count == of else f"{count} of {of}", *wrong])


def _perplexity(row: Row) -> str:
    """That of the mean loss."""
    return text(None if row.loss is None else math.exp(min(row.loss, 700)), ".2f")


def _size(row: Row) -> str:
    size = row.numbers["packed_bytes"] or row.numbers["bytes"]
    return text(None if size is None else size / 1e6, ".2f")


_OF_TEXT = (Column("Perplexity", "", _perplexity), Column("Bits/byte", "", _number("bits_per_byte", ".4f")))
_ACCURACY = (
    Column("Accuracy", "%", lambda row: percent(row.numbers["accuracy"])),
    Column("Spread of accuracy", "of seeds", lambda row: percent(row.deviations["accuracy"])),
)
_TOP5 = (Column("Top-5 accuracy", "%", lambda row: percent(row.numbers["accuracy_top5"])),)
_CODES_AND_COST = (
    Column("Weight entropy", "bits", _number("weight_entropy", ".3f")),
    Column("Activation entropy", "bits", _number("activation_entropy", ".3f")),
    Column("Size", "MB", _size),
    Column("Time per step", "s", _number("seconds_per_step", ".3g")),
)
