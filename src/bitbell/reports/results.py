"""What the runs say together: the rows of the table, which runs may be compared, groups of seeds, the best.

Runs are comparable when they did the same work: the same model, data, steps and batch. A best run is only
ever named among runs of the same work and the same bit widths. Runs that differ in nothing but their seed are
a group, with mean and sample standard deviation (n - 1) over its finished members.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bitbell.reports import formats
from bitbell.reports.runs import Run, finite

WORK = ("preset", "data", "steps", "batch_size", "accumulation", "sequence_length")
# These say where a run lives or what it is called, not what it computes.
NO_SETTING = frozenset({"seed", "name", "out", "run", "resume", "stop_after"})


@dataclass(frozen=True)
class Column:
    """One column of the table: how to get its number from a run, and how to write it."""

    key: str
    title: str
    unit: str
    get: Callable[[Run], Any]
    write: Callable[[Any], str]
    is_text: bool = False
    factor: float = 1  # that `write` multiplies by


def _number(key: str) -> Callable[[Run], Any]:
    return lambda run: run.number(key)


_NAMES = (
    Column("run", "Run", "", lambda run: run.name, str, is_text=True),
    Column("method", "Method", "", lambda run: run.method, formats.method, is_text=True),
    Column("bits", "Bits", "", lambda run: run.bits, lambda bits: formats.DASH if bits == "full" else bits, True),
)
_OF_TEXT = (
    Column("perplexity", "Perplexity", "", _number("perplexity"), formats.significant(3)),
    Column("bits_per_byte", "Bits/\N{ZERO WIDTH SPACE}byte", "", _number("bits_per_byte"), formats.decimals(3)),
)
_OF_IMAGES = (
    Column("accuracy", "Accuracy", "%", _number("accuracy"), formats.percent, factor=100),
    Column("accuracy_top5", "Top-5 accuracy", "%", _number("accuracy_top5"), formats.percent, factor=100),
)
_CODES_AND_COST = (
    Column("weight_entropy", "Weight entropy", "bits", _number("weight_entropy"), formats.decimals(3)),
    Column("activation_entropy", "Activation entropy", "bits", _number("activation_entropy"), formats.decimals(3)),
    Column("parameters", "Parameters", "million", _number("parameters"), formats.millions),
    Column("bytes", "Trained", "MB", _number("bytes"), formats.megabytes),
    Column("packed_bytes", "Packed", "MB", _number("packed_bytes"), formats.megabytes),
    Column("seconds_per_step", "Time per step", "s", _number("seconds_per_step"), formats.significant(3)),
    Column("steps", "Steps", "", lambda run: run.steps, formats.count),
    Column("seed", "Seed", "", lambda run: run.config.get("seed"), formats.plain),
)
# Of the numbers that mean something over several seeds.
SPREADS = (
    *("loss", "perplexity", "bits_per_byte", "accuracy", "accuracy_top5", "weight_entropy", "activation_entropy"),
    "seconds_per_step",
)


def columns_of(runs: Sequence[Run]) -> tuple[Column, ...]:
    """The columns of a table of runs: quality as it is measured on text, on images, or on both."""
    samples = {run.sample for run in runs}
    unit = f"nats/{samples.pop()}" if len(samples) == 1 else "nats"
    loss = Column("loss", "Validation loss", unit, _number("loss"), formats.decimals(3))
    is_text, is_images = (any(run.is_of_images == kind for run in runs) for kind in (False, True))
    has_top5 = any(run.number("accuracy_top5") is not None for run in runs)
    return (*_NAMES, loss, *_OF_TEXT * is_text, *_OF_IMAGES[: (1 + has_top5) * is_images], *_CODES_AND_COST)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of one number over `count` runs; no deviation for a single run."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed (often just one run)."""

    name: str
    runs: tuple[Run, ...]

    @property
    def name_at_its_bits(self) -> str:
        """The name for a sentence that has said the bit width already."""
        return self.name.replace(f" {self.runs[0].bits}", "", 1)

    @property
    def can_be_ranked(self) -> bool:
        """Some run is finished, and no finished run diverged: a mean over survivors would flatter."""
        spread = self.spread("loss")
        return spread is not None and spread.count == len(self.finished)

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.is_finished]

    def spread(self, key: str) -> Spread | None:
        """Over the finished runs; None where none of them knows a finite `key`."""
        known = [run.number(key) for run in self.finished]
        values = [value for value in known if value is not None and finite(value)]
        if not values:
            return None
        return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def work(run: Run) -> tuple[str, ...]:
    """What a run had to do: runs are comparable when this is equal."""
    config = run.config
    if config.get("data_fingerprint") is not None:  # the same data may lie in two places, or change in one
        config = {**config, "data": config["data_fingerprint"]}
    return tuple(json.dumps(config.get(key), sort_keys=True) for key in WORK)


def arrange(runs: Sequence[Run]) -> list[Run]:
    """Full precision first as the yardstick, then from many bits to few, best first, unfinished last."""

    def key(run: Run) -> tuple[Any, ...]:
        bits = (run.weight_bits or 0) + (run.activation_bits or 16) / 100
        loss = run.number("loss")
        return (run.is_quantized, -bits, not run.is_finished, loss if finite(loss) else math.inf, run.name)

    return sorted(runs, key=key)


def group_seeds(runs: Sequence[Run]) -> list[Group]:
    """Group runs whose configurations are equal but for the seed, in the order of their first run."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(_settings(run), []).append(run)
    members = list(found.values())
    return [Group(_group_name(runs, members), tuple(runs)) for runs in members]


def best_of_each_width(groups: Sequence[Group]) -> list[tuple[Group, list[Group]]]:
    """Of each bit width and work with at least two rivals (groups with finished runs): the one of lowest mean
    loss, and the others, from better to worse."""
    arenas: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        first = group.runs[0]
        if first.is_quantized and first.bits != "mixed" and group.can_be_ranked:
            arenas.setdefault((first.bits, work(first)), []).append(group)
    ranked = [sorted(rivals, key=_mean_loss) for rivals in arenas.values() if len(rivals) > 1]
    return [(rivals[0], rivals[1:]) for rivals in ranked]


def full_precision_like(run: Run, groups: Sequence[Group]) -> Group | None:
    """The best finished full-precision group that did the same work as `run`."""
    rivals = [
        group
        for group in groups
        if not group.runs[0].is_quantized and work(group.runs[0]) == work(run) and group.can_be_ranked
    ]
    return min(rivals, key=_mean_loss, default=None)


def as_json(runs: Sequence[Run], groups: Sequence[Group]) -> dict[str, Any]:
    """Every number of the tables as strict JSON: numbers that are not finite are null, see `not_finite`."""
    winners = {run.name for group, _ in best_of_each_width(groups) for run in group.runs}
    columns = columns_of(runs)
    return {
        "units": {column.key: column.unit for column in columns if column.unit and column.unit != "million"}
        | {"bytes": "bytes", "packed_bytes": "bytes"}
        | {column.key: "share" for column in columns if column.unit == "%"},
        "runs": [_row(run, columns) | {"best_at_its_bits": run.name in winners} for run in runs],
        "seed_groups": [_group_row(group, columns) for group in groups if len(group.runs) > 1],
    }


def _row(run: Run, columns: Sequence[Column]) -> dict[str, Any]:
    values = {column.key: column.get(run) for column in columns}
    not_finite = [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    return {
        **{key: None if key in not_finite else value for key, value in values.items()},
        "weight_bits": run.weight_bits,
        "activation_bits": run.activation_bits,
        "quantized_parameters": run.number("quantized_parameters"),
        "status": "finished" if run.is_finished else "unfinished",
        "not_finite": not_finite,
        "folder": str(run.folder),
    }


def _group_row(group: Group, columns: Sequence[Column]) -> dict[str, Any]:
    spreads = {column.key: group.spread(column.key) for column in columns if column.key in SPREADS}
    return {
        "name": group.name,
        "runs": [run.name for run in group.runs],
        "seeds": [run.config.get("seed") for run in group.runs],
        "finished": len(group.finished),
        **{
            key: None if s is None else {"mean": s.mean, "standard_deviation": s.deviation, "count": s.count}
            for key, s in spreads.items()
        },
    }


def _mean_loss(group: Group) -> float:
    spread = group.spread("loss")
    return math.inf if spread is None else spread.mean


def _settings(run: Run) -> str:
    return json.dumps({k: v for k, v in run.config.items() if k not in NO_SETTING}, sort_keys=True)


def _group_name(runs: list[Run], all_groups: list[list[Run]]) -> str:
    """Method and bits, and whatever setting tells this group from others of that name."""
    name = _short_name(runs[0])
    alike = [other[0].config for other in all_groups if _short_name(other[0]) == name]
    config = runs[0].config
    keys = [key for key in config if key not in NO_SETTING and any(other.get(key) != config[key] for other in alike)]
    return ", ".join([name, *(f"{key} {formats.plain(config[key])}" for key in keys)])


def _short_name(run: Run) -> str:
    return f"{formats.method(run.method)} {run.bits}" if run.is_quantized else "full precision"
