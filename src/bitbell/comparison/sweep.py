"""What is compared: the sweep file, checked as a whole before any work, and the settings and trials it asks for."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from bitbell.training.config import TrainConfig, read_values

# What the sweep itself sets in every run, and what would keep its runs from ever finishing.
OWN_FIELDS = ("recipe", "rules", "seed", "learning_rate", "out", "stop_after")
# What makes the runs of a sweep comparable: no single method may have another.
WORK_FIELDS = (
    *("data", "preset", "steps", "batch_size", "sequence_length", "accumulation", "augment"),
    *("augment_library", "final_windows", "precision"),
)
TRAIN_DEFAULTS: dict[str, Any] = {"tensorboard": False, "keep_checkpoints": 1}
FULL_PRECISION = ("none", "full-precision")
Item = TypeVar("Item")
LONGEST_NAME = 200  # of a run folder; file systems take 255 bytes


@dataclass(frozen=True)
class Setting:
    """A method at a width: a row of the table. `bits` is like "w2a2"; None is full precision."""

    label: str
    recipe: str
    bits: str | None

    @property
    def name(self) -> str:
        return slug(self.label) + (f"-{self.bits}" if self.bits else "")


@dataclass(frozen=True)
class Gap:
    """A width of the sweep that a method does not have, and why."""

    label: str
    bits: str
    reason: str


@dataclass(frozen=True)
class Trial:
    """One run of the sweep."""

    setting: Setting
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        """Its run folder."""
        return f"{self.setting.name}-lr{self.learning_rate:g}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Methods x bits x seeds x learning rates, and what all runs have in common."""

    methods: dict[str, str]
    """Label -> recipe without bits; "none" is full precision."""
    bits: tuple[str, ...]
    """Widths such as "w2a2"."""
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    """In rising order."""
    tune_seeds: int = 1
    """The first so many seeds try every learning rate."""
    train: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainConfig for every run."""
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Label -> fields of TrainConfig for this method only."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "sweep") -> Sweep:
        """A sweep from plain values. Raises ValueError, naming the source and the key, for whatever is wrong."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"{source}: unknown key {key!r}; there are {', '.join(known)}.{_hint(key, known)}")
        for key in ("methods", "seeds", "learning_rates", "train"):
            if key not in values:
                raise ValueError(f"{source}: {key} is missing")
        methods = _methods(values["methods"], source)
        seeds = _items(values, "seeds", source, _seed)
        sweep = cls(
            methods=methods,
            bits=_bits(values, methods, source),
            seeds=seeds,
            learning_rates=tuple(sorted(_items(values, "learning_rates", source, _rate))),
            tune_seeds=_tune_seeds(values.get("tune_seeds", 1), seeds, source),
            train=_train(values["train"], source),
            overrides=_overrides(values.get("overrides", {}), methods, source),
        )
        sweep._check(source)
        return sweep

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON of every key."""
        return dataclasses.asdict(self)

    def config(self, trial: Trial, runs: Path) -> TrainConfig:
        """The configuration of a trial's run. Raises ValueError for a wrong field or value."""
        own = {"recipe": trial.setting.recipe, "seed": trial.seed, "learning_rate": trial.learning_rate}
        fields = TRAIN_DEFAULTS | self.train | self.overrides.get(trial.setting.label, {}) | own
        return TrainConfig.from_dict(fields | {"out": str(runs / trial.name)})

    @cached_property
    def settings(self) -> list[Setting]:
        """Every method at every width it has, in the order of the sweep."""
        return [found for found in self._expanded if isinstance(found, Setting)]

    @cached_property
    def gaps(self) -> list[Gap]:
        """The widths that some method does not have."""
        return [found for found in self._expanded if isinstance(found, Gap)]

    @cached_property
    def _expanded(self) -> list[Setting | Gap]:
        found: list[Setting | Gap] = []
        for label, recipe in self.methods.items():
            full = recipe in FULL_PRECISION
            found += [Setting(label, "none", None)] if full else [expand(label, recipe, width) for width in self.bits]
        return found

    def _check(self, source: str) -> None:
        """Raise ValueError for what only shows when the sweep is expanded."""
        having = {setting.label for setting in self.settings}
        for label in self.methods:
            if label not in having:
                reasons = dict.fromkeys(gap.reason for gap in self.gaps if gap.label == label)
                raise ValueError(f"{source}: methods: {label!r} fits none of the widths in bits: {'; '.join(reasons)}")
        missing = [bits for bits in self.bits if all(setting.bits != bits for setting in self.settings)]
        if missing and any(setting.bits is not None for setting in self.settings):
            raise ValueError(f"{source}: bits: no method of the sweep has {', '.join(missing)}")
        trials = [Trial(s, seed, rate) for s in self.settings for seed in self.seeds for rate in self.learning_rates]
        counts = Counter(trial.name.lower() for trial in trials)
        for trial in trials:
            if counts[trial.name.lower()] > 1:
                raise ValueError(
                    f"{source}: methods: {trial.setting.label!r} and another method, or two learning rates, give "
                    f'one run folder, {trial.name!r}. Give the method a label: [methods] label = "recipe"'
                )
            if len(trial.name.encode()) > LONGEST_NAME:
                raise ValueError(
                    f"{source}: methods: {trial.setting.label!r} is too long for the name of a folder. Give it a "
                    'shorter label: [methods] label = "recipe"'
                )
        for setting in self.settings:
            try:
                self.config(Trial(setting, self.seeds[0], self.learning_rates[0]), Path())
            except ValueError as error:
                raise ValueError(f"{source}: train or overrides.{setting.label}: {error}") from None


def expand(label: str, recipe: str, width: str) -> Setting | Gap:
    """A method at a width, or the reason why there is none."""
    from bitbell.layers import Recipe

    variant, colon, options = recipe.partition(":")
    full = f"{variant}-{width}{colon}{options}"
    try:
        Recipe.parse(full)
    except ValueError as error:
        return Gap(label, width, str(error))
    return Setting(label, full, width)


def read_sweep_file(path: str | Path) -> dict[str, Any]:
    """The plain values of a .toml or .json sweep file. Raises ValueError naming the file if it cannot be read."""
    return read_values(path, "sweep")


def parse_width(value: Any) -> str:
    """ "w2a2" for 2, "2" or "w2a2". Raises ValueError for anything else."""
    text = str(value).lower()
    if not isinstance(value, bool):
        if re.fullmatch(r"\d+", text):
            return f"w{int(text)}a{int(text)}"
        if re.fullmatch(r"w\d+a\d+", text):
            return text
    raise ValueError(f"a width is a number of bits, or like 'w2a4' or 'w4a16', got {value!r}")


def slug(label: str) -> str:
    """The label as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._=+-]", "_", label)


def _methods(value: Any, source: str) -> dict[str, str]:
    if isinstance(value, list | tuple):
        if double := [label for label, count in Counter(map(str, value)).items() if count > 1]:
            raise ValueError(f"{source}: methods has {double[0]!r} more than once")
        value = {str(recipe): recipe for recipe in value}
    if not isinstance(value, dict) or not value:
        raise ValueError(
            f"{source}: methods must be a list of recipes or a table label = recipe, not empty, got {value!r}"
        )
    for label, recipe in value.items():
        if not isinstance(recipe, str) or not recipe or not label:
            raise ValueError(f"{source}: methods: {label!r} must name a recipe such as 'bbq', got {recipe!r}")
        if re.search(r"-w\d+a\d+$", recipe.partition(":")[0]):
            raise ValueError(
                f"{source}: methods: {recipe!r} has bits in its name; give the method, and its widths in bits"
            )
    return {label: "none" if recipe.lower() in FULL_PRECISION else recipe for label, recipe in value.items()}


def _bits(values: Mapping[str, Any], methods: dict[str, str], source: str) -> tuple[str, ...]:
    if all(recipe in FULL_PRECISION for recipe in methods.values()) and not values.get("bits"):
        return ()
    if "bits" not in values:
        raise ValueError(f"{source}: bits is missing")
    return _items(values, "bits", source, parse_width)


def _items(values: Mapping[str, Any], key: str, source: str, read: Callable[[Any], Item]) -> tuple[Item, ...]:
    """A list that is neither empty nor has anything twice."""
    given = values[key]
    if not isinstance(given, list | tuple) or not given:
        raise ValueError(f"{source}: {key} must be a list that is not empty, got {given!r}")
    try:
        items = tuple(read(item) for item in given)
    except ValueError as error:
        raise ValueError(f"{source}: {key}: {error}") from None
    for item, count in Counter(items).items():
        if count > 1:
            raise ValueError(f"{source}: {key} has {item!r} more than once")
    return items


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"a seed is a whole number of at least 0, got {value!r}")
    return value


def _rate(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"a learning rate is a positive number, got {value!r}")
    return float(value)


def _tune_seeds(value: Any, seeds: tuple[int, ...], source: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= len(seeds):
        raise ValueError(f"{source}: tune_seeds must be from 1 to the number of seeds ({len(seeds)}), got {value!r}")
    return value


def _train(value: Any, source: str) -> dict[str, Any]:
    fields = _fields(value, f"{source}: train", OWN_FIELDS, "the sweep sets it itself")
    if "data" not in fields:
        raise ValueError(f"{source}: train needs data, a directory made by `bitbell tokenize` or `bitbell images`")
    return fields


def _overrides(value: Any, methods: Iterable[str], source: str) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise ValueError(f"{source}: overrides must be tables [overrides.LABEL], got {value!r}")
    found = {}
    for label, fields in value.items():
        where = f"{source}: overrides.{label}"
        if label not in methods:
            raise ValueError(f"{where}: there is no method {label!r}.{_hint(label, list(methods))}")
        _fields(fields, where, OWN_FIELDS, "the sweep sets it itself")
        found[label] = _fields(fields, where, WORK_FIELDS, "it must be the same for every method")
    return found


def _fields(value: Any, where: str, forbidden: Iterable[str], reason: str) -> dict[str, Any]:
    from bitbell.training.config import check_fields

    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a table of options, got {value!r}")
    fields = {name.replace("-", "_"): given for name, given in value.items()}
    for name in forbidden:
        if name in fields:
            raise ValueError(f"{where} may not hold {name}: {reason}")
    return check_fields(fields, where)


def _hint(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
