"""Read run folders.

A run folder holds `config.json` (a flat object), `metrics.jsonl` (one event a line) and, once the run is
finished, `summary.json`. A run without a summary is unfinished: what is known about it comes from its
metrics. A killed run may leave its last metrics line torn, which is skipped and remembered; any other broken
line is an error.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Event = dict[str, Any]

EXPECTED = "a run folder holds config.json and metrics.jsonl, and summary.json once the run is finished"
NUMBERS = {
    "train": ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "images_per_second", "seconds"),
    "valid": ("loss", "perplexity", "bits_per_byte", "accuracy", "accuracy_top5"),
}
SUMMARY_NUMBERS = (
    *("weight_bits", "activation_bits", "steps", "loss", "perplexity", "bits_per_byte", "seconds_per_step"),
    *("accuracy", "accuracy_top5"),
    *("weight_entropy", "activation_entropy", "parameters", "quantized_parameters", "bytes", "packed_bytes"),
)
RECIPE = re.compile(r"(?P<method>[A-Za-z][\w-]*?)-w(?P<weights>\d+)a(?P<activations>\d+)")


@dataclass(frozen=True)
class Run:
    """One run: its configuration, its events sorted by step, and its summary (None while unfinished)."""

    folder: Path
    name: str
    config: dict[str, Any]
    train: list[Event] = field(default_factory=list)
    valid: list[Event] = field(default_factory=list)
    quantizers: list[Event] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    is_torn: bool = False

    @property
    def is_finished(self) -> bool:
        return self.summary is not None

    @property
    def method(self) -> str | None:
        """Name of the quantization method, or None for full precision."""
        if self.summary is not None and "method" in self.summary:
            return self.summary["method"]
        recipe = _planned_recipe(self.config)
        match = _match_recipe(recipe)
        return match["method"] if match else "mixed" if recipe else None

    @property
    def weight_bits(self) -> float | None:
        return self._bits("weight_bits", "weights")

    @property
    def activation_bits(self) -> float | None:
        return self._bits("activation_bits", "activations")

    @property
    def bits(self) -> str:
        """ "W2A2" and the like, "mixed" where a quantized run does not say, "full" for full precision."""
        if self.method is None:
            return "full"
        if self.weight_bits is None:
            return "mixed"
        # Activations without a bit width are left alone, which the field writes A16.
        return f"W{self.weight_bits:g}A{16 if self.activation_bits is None else self.activation_bits:g}"

    @property
    def is_quantized(self) -> bool:
        return self.method is not None

    @property
    def is_of_images(self) -> bool:
        """Whether it trains an image classifier, not a language model."""
        return "images" in self.config

    @property
    def sample(self) -> str:
        """What its loss is a mean over."""
        return "image" if self.is_of_images else "token"

    @property
    def steps(self) -> int | None:
        """Steps done: what the summary says, else the last step that any event mentions."""
        if self.summary is not None and self.summary.get("steps") is not None:
            return int(self.summary["steps"])
        done = [events[-1]["step"] for events in (self.train, self.valid, self.quantizers) if events]
        return max(done, default=None)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Per-layer entries of the summary; empty while unfinished."""
        return list((self.summary or {}).get("layers") or [])

    @property
    def samples(self) -> list[dict[str, Any]]:
        return list((self.summary or {}).get("samples") or [])

    def number(self, key: str) -> float | None:
        """`key` from the summary, else from the metrics; None if neither knows. May be NaN or infinite."""
        if self.summary is not None and self.summary.get(key) is not None:
            return self.summary[key]
        return _from_metrics(self, key)

    def _bits(self, key: str, part: str) -> float | None:
        if self.summary is not None and key in self.summary:
            return self.summary[key]
        match = _match_recipe(_planned_recipe(self.config))
        return int(match[part]) if match else None


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read several run folders; equal names are told apart by their folders.

    Raises ValueError if there is none, one is given twice, or one is no run folder.
    """
    if isinstance(folders, str | Path):
        raise ValueError(f"runs={str(folders)!r} is one path. Give a list of run folders, e.g. [{str(folders)!r}].")
    if not folders:
        raise ValueError("no run folder given. Give at least one; " + EXPECTED + ".")
    counts = Counter(Path(folder).resolve() for folder in folders)
    for folder, count in counts.items():
        if count > 1:
            raise ValueError(f"run folder {str(folder)!r} is given {count} times. Give each run once.")
    return _tell_apart([read_run(folder) for folder in folders])


def read_run(folder: str | Path) -> Run:
    """Read one run folder.

    Raises ValueError, naming the folder or the file and the line, if it is no run folder or a file is broken.
    """
    folder = Path(folder)
    _expect_run_folder(folder)
    config = _read_object(folder / "config.json")
    summary_file = folder / "summary.json"
    summary = _read_object(summary_file) if summary_file.is_file() else None
    if summary is not None:
        _check_summary(summary, summary_file)
    events, is_torn = _read_events(folder / "metrics.jsonl")
    name = (summary or {}).get("name") or config.get("name") or folder.resolve().name
    return Run(folder, str(name), config, **events, summary=summary, is_torn=is_torn)


def finite(value: Any) -> bool:
    """Whether `value` is a number that can be drawn and averaged."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _expect_run_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise ValueError(f"{str(folder)!r} is no run folder: it is {what}. Give a folder; {EXPECTED}.")
    missing = [name for name in ("config.json", "metrics.jsonl") if not (folder / name).is_file()]
    if not missing:
        return
    inside = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
    hint = f" Its subfolders {', '.join(inside[:8])} look like runs: give those." if inside else ""
    raise ValueError(f"{str(folder)!r} is no run folder: {' and '.join(missing)} missing; {EXPECTED}.{hint}")


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}. Write it again, or leave this run out.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}, but a run needs an object {{...}} there.")
    return value


def _read_events(file: Path) -> tuple[dict[str, list[Event]], bool]:
    """Events by kind, sorted by step, and whether the last line was torn."""
    lines = file.read_bytes().split(b"\n")
    numbered = [(i, line) for i, line in enumerate(lines, start=1) if line.strip()]
    by_step: dict[str, dict[int, Event]] = {"train": {}, "valid": {}, "quantizers": {}}
    is_torn = False
    for i, line in numbered:
        event = _parse(line)
        if event is None:
            if i == numbered[-1][0]:
                is_torn = True
                break
            raise ValueError(
                f"{file}, line {i}: not a JSON object: {line[:60].decode(errors='replace')!r}. "
                "Only the last line may be torn (by a killed run). Repair or remove the line."
            )
        if event.get("event") in by_step:  # other events are other rooms' business
            _check_event(event, f"{file}, line {i}")
            # A resumed run repeats the steps after its checkpoint: the later line is what counts.
            by_step[event["event"]][event["step"]] = event
    return {kind: [found[step] for step in sorted(found)] for kind, found in by_step.items()}, is_torn


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _check_event(event: Event, where: str) -> None:
    step = event.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"{where}: step={step!r}, but it must be an integer of at least 0.")
    if event["event"] != "quantizers":
        _check_numbers(event, NUMBERS[event["event"]], where)
        return
    layers = event.get("layers", {})
    if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
        raise ValueError(f"{where}: layers must be an object of objects, one a layer, got {layers!r:.60}.")
    for name, layer in layers.items():
        _check_numbers(layer, ("weight_entropy", "weight_scale", "activation_scale"), f"{where}, layer {name}")


def _check_summary(summary: dict[str, Any], file: Path) -> None:
    _check_numbers(summary, SUMMARY_NUMBERS, str(file))
    if not isinstance(summary.get("method"), str | None):
        raise ValueError(f"{file}: method={summary['method']!r}, but it must be a string, or null for full precision.")
    if summary.get("steps") is not None and not finite(summary["steps"]):
        raise ValueError(f"{file}: steps={summary['steps']!r}, but it must be finite.")
    for key in ("layers", "samples"):
        entries = summary.get(key) or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{file}: {key} must be a list of objects, got {entries!r:.60}.")
    for i, layer in enumerate(summary.get("layers") or []):
        _check_layer(layer, f"{file}, layers[{i}]")


def _check_layer(layer: dict[str, Any], where: str) -> None:
    keys = ("weight_bits", "activation_bits", "weight_entropy", "activation_entropy", "bytes", "packed_bytes")
    _check_numbers(layer, keys, where)
    for key in ("weight_histogram", "activation_histogram"):
        counts = layer.get(key)
        if counts is None:
            continue
        if not isinstance(counts, list) or not all(finite(count) and count >= 0 for count in counts):
            raise ValueError(f"{where}: {key} must be a list of counts of at least 0, got {counts!r:.60}.")


def _check_numbers(values: dict[str, Any], keys: Sequence[str], where: str) -> None:
    for key in keys:
        value = values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{where}: {key}={value!r:.60}, but it must be a number or null.")


def _planned_recipe(config: dict[str, Any]) -> Any:
    """What the configuration quantizes with: its rules if it has any, else its recipe; None for nothing."""
    recipe = config.get("rules") or config.get("recipe")
    return None if recipe in ("none", "full-precision") else recipe


def _match_recipe(recipe: Any) -> re.Match[str] | None:
    return RECIPE.fullmatch(recipe) if isinstance(recipe, str) else None


def _from_metrics(run: Run, key: str) -> float | None:
    if key in NUMBERS["valid"]:
        return run.valid[-1].get(key) if run.valid else None
    if key == "weight_entropy" and run.quantizers:
        found = [layer.get(key) for layer in run.quantizers[-1].get("layers", {}).values()]
        known = [value for value in found if finite(value)]
        return statistics.fmean(known) if known else None
    if key == "seconds_per_step":
        return _seconds_per_step(run.train)
    return None


def _seconds_per_step(train: list[Event]) -> float | None:
    timed = [(event["step"], event["seconds"]) for event in train if finite(event.get("seconds"))]
    pairs = itertools.pairwise(timed)
    paces = [(after - before) / (step - start) for (start, before), (step, after) in pairs]
    return statistics.median(paces) if paces else None


def _tell_apart(runs: list[Run]) -> list[Run]:
    """Give runs of one name the name of their folder too; its whole path where that is not enough."""
    details: list[Callable[[Run], str]] = [lambda run: run.folder.resolve().name, lambda run: str(run.folder)]
    names = [run.name for run in runs]
    for detail in details:
        counts = Counter(names)
        names = [
            f"{run.name} ({detail(run)})" if counts[name] > 1 else name for run, name in zip(runs, names, strict=True)
        ]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
