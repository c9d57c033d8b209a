"""The folder of a sweep: opening it, and that what it holds belongs together.

OUT/sweep.json      the sweep, the fingerprint of its data and the precision it computes in
OUT/runs/NAME/      a run each        OUT/claims/      see `bitbell.comparison.claims`
OUT/earlier.jsonl   runs of an earlier sweep that count as done, by their lines of its results.jsonl
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitbell.comparison.outcomes import Outcome, read_outcome
from bitbell.comparison.sweep import Sweep, Trial
from bitbell.training.config import TrainConfig
from bitbell.training.run import write_at_once, write_json

FORMAT_VERSION = 1


@dataclass(frozen=True)
class SweepFolder:
    """An opened sweep folder."""

    path: Path
    known: dict[str, Outcome] = dataclasses.field(default_factory=dict)
    earlier: dict[str, Outcome] = dataclasses.field(default_factory=dict)

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    @property
    def claims(self) -> Path:
        return self.path / "claims"

    def run(self, trial: Trial) -> Path:
        """The run folder of a trial."""
        return self.runs / trial.name

    def look(self, trial: Trial) -> Outcome:
        """How a trial stands. Finished and diverged ones are read once: they do not change."""
        if trial.name not in self.known:
            outcome = self.earlier.get(trial.name) or read_outcome(self.run(trial))
            if outcome.status not in ("finished", "diverged"):
                return outcome
            self.known[trial.name] = outcome
        return self.known[trial.name]

    def newest(self, mine: Sweep) -> Sweep:
        """The sweep as the folder has it now, which another process may have extended, with this process's options of
        training."""
        return replace(read_sweep(self.path)[0], train=mine.train)


def open_folder(
    out: str | Path, values: Mapping[str, Any] | None, source: str = "sweep", earlier: str | Path | None = None
) -> tuple[SweepFolder, Sweep]:
    """Make the folder of a sweep, or open it to continue; `values` None takes the sweep that it holds.

    The runs that `earlier`, another sweep's folder or a copy of its sweep.json and results.jsonl, lists as finished or
    diverged count as done here from now on. Raises ValueError for a wrong sweep, data that is not there, and a folder
    that holds something else or runs that would not be comparable, naming the fields.
    """
    out = Path(out)
    if (out / "sweep.json").exists():
        old, facts = read_sweep(out)
        sweep = Sweep.from_dict(old.to_dict() if values is None else values, source)
        _check_comparable(out, old, facts, sweep)
        stored = replace(sweep, train=old.train)  # what may differ (threads, where the data lies) is this process's own
    else:
        if values is None:
            raise ValueError(f"{out} holds no sweep (no sweep.json in it). Give a sweep file, or --methods etc.")
        sweep = Sweep.from_dict(values, source)
        if out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())):
            raise ValueError(f"{out} exists and is not a sweep's folder (no sweep.json in it). Choose another --out")
        stored = replace(sweep, train=sweep.train | {"data": str(Path(sweep.train["data"]).resolve())})
    lines = read_earlier(out / "earlier.jsonl") if (out / "earlier.jsonl").exists() else {}
    if earlier is not None:
        _check_comparable(Path(earlier), *read_sweep(Path(earlier)), sweep)
        lines |= read_earlier(Path(earlier) / "results.jsonl")
    values = stored.to_dict() | _facts(sweep)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "sweep.json", values)
    if earlier is not None:
        write_at_once(out / "earlier.jsonl", "".join(json.dumps(line) + "\n" for line in lines.values()))
    return SweepFolder(out, earlier={name: _outcome(line) for name, line in lines.items()}), sweep


def read_earlier(file: Path) -> dict[str, dict[str, Any]]:
    """The finished and diverged runs of a results.jsonl, by name. Raises ValueError if it cannot be read as one."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return {line["run"]: line for line in lines if line["status"] in ("finished", "diverged")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not the results.jsonl of a sweep: {error!r}") from None


def _outcome(line: dict[str, Any]) -> Outcome:
    return Outcome(line["status"], line.get("message", ""), line.get("seconds"), line)


def read_sweep(out: Path) -> tuple[Sweep, dict[str, Any]]:
    """The sweep of a folder, and the facts recorded with it. Raises ValueError if sweep.json is damaged."""
    file = out / "sweep.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{file} is not a sweep that this bitbell reads (format_version {FORMAT_VERSION})")
    names = {f.name for f in dataclasses.fields(Sweep)}
    facts = {key: value for key, value in values.items() if key not in names}
    return Sweep.from_dict({key: value for key, value in values.items() if key in names}, str(file)), facts


def _facts(sweep: Sweep) -> dict[str, Any]:
    """What the numbers depend on beside the sweep. Raises ValueError for a data set that is missing or not for the
    preset, and for an unknown preset."""
    from bitbell.data.image_augmentation import library_of
    from bitbell.training.loop import dtype_name, pick_device, pick_precision
    from bitbell.training.run import data_fingerprint
    from bitbell.training.tasks import open_data

    config = base_config(sweep)
    open_data(config)
    precision = pick_precision(config.precision, pick_device(config.device))
    return {
        "format_version": FORMAT_VERSION,
        "data_fingerprint": data_fingerprint(Path(config.data)),
        "computed_in": dtype_name(precision),
        "augmented_by": library_of(config.augment, config.augment_library),
    }


def base_config(sweep: Sweep) -> TrainConfig:
    """What all runs have in common, with the defaults of what is not given."""
    return TrainConfig.from_dict(sweep.train | {"out": "runs"})


def _check_comparable(out: Path, old: Sweep, facts: dict[str, Any], new: Sweep) -> None:
    """Raise ValueError, naming the fields, if runs of the new sweep could not stand in one table with the old."""
    before, after = base_config(old), base_config(new)
    differ = before.differences(after)
    if before.final_windows != after.final_windows:  # free within a run, but it decides what the table compares
        differ["final_windows"] = (before.final_windows, after.final_windows)
    now = _facts(new)
    if facts.get("data_fingerprint") != now["data_fingerprint"]:
        differ["data"] = (before.data, after.data)
    if facts.get("computed_in") != now["computed_in"]:
        differ["precision"] = (facts.get("computed_in"), now["computed_in"])
    if facts.get("augmented_by") != now["augmented_by"]:
        differ["augment_library"] = (facts.get("augmented_by"), now["augmented_by"])
    for label in sorted(old.methods.keys() & new.methods.keys()):
        if old.methods[label] != new.methods[label]:
            differ[f"methods.{label}"] = (old.methods[label], new.methods[label])
        if old.overrides.get(label) != new.overrides.get(label):
            differ[f"overrides.{label}"] = (old.overrides.get(label), new.overrides.get(label))
    if differ:
        listed = "; ".join(f"{name} was {mine!r}, is {theirs!r}" for name, (mine, theirs) in differ.items())
        raise ValueError(
            f"{out} holds a sweep whose runs would not be comparable ({listed}). "
            "Undo what changed, or choose another --out"
        )
