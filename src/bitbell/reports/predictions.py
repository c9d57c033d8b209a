"""Read what a finished run of a classifier left about its mistakes: predictions.json, and the pixels of its images."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitbell.evaluation.predictions import Mistake, Predictions
from bitbell.reports.runs import Run, finite


@dataclass(frozen=True)
class Confusion:
    """`count` of the `images` of class `label` are taken for `guess`; names of classes."""

    label: str
    guess: str
    count: int
    images: int


def read_predictions(run: Run) -> Predictions | None:
    """The predictions of a run; None where it left none. Raises ValueError, naming the file, if it is broken."""
    file = run.folder / "predictions.json"
    if not run.is_of_images or not file.is_file():
        return None
    try:
        fields = json.loads(file.read_bytes())
        confusion = {(label, guess): count for label, guess, count in fields["confusion"]}
        mistakes = tuple(Mistake(**row) for row in fields["mistakes"])
        found = Predictions(str(fields["split"]), fields["images"], confusion, mistakes)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is broken ({error!r}). Leave this run out, or remove the file.") from None
    _check(found, len(class_names(run)), file)
    return found


def class_names(run: Run) -> list[str]:
    """The names of the classes, in the order of their labels. Raises ValueError where config.json does not say them."""
    images = run.config.get("images")
    names = images.get("classes") if isinstance(images, dict) else None
    if not isinstance(names, list) or not names:
        raise ValueError(f"{run.folder / 'config.json'}: images must hold classes, a list of names, got {images!r:.60}")
    return [str(name) for name in names]


def top_confusions(predictions: Predictions, names: list[str], most: int) -> list[Confusion]:
    """The mistakes that happen most often, the most frequent first."""
    totals: Counter[int] = Counter()
    for (label, _), count in predictions.confusion.items():
        totals[label] += count
    wrong = [(pair, count) for pair, count in predictions.confusion.items() if pair[0] != pair[1]]
    ranked = sorted(wrong, key=lambda entry: (-entry[1], entry[0]))[:most]
    return [Confusion(names[label], names[guess], count, totals[label]) for (label, guess), count in ranked]


def pixels_of(run: Run, split: str, places: list[int]) -> np.ndarray | str:
    """uint8 (N, size, size, channels) of a run's images, or why they cannot be shown."""
    from bitbell.data import ImageDataset
    from bitbell.training.run import data_fingerprint

    data = Path(str(run.config.get("data", "")))
    try:
        if data_fingerprint(data) != run.config.get("data_fingerprint"):
            return f"the image set {data} is another one now"
        return ImageDataset.open(data).pixels(split, np.array(places))
    except (OSError, ValueError, IndexError) as error:
        why = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        return f"the image set {data} {why}"


def _check(found: Predictions, classes: int, file: Path) -> None:
    def is_index(value: Any, size: int | float) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size

    rows = [*((*pair, count) for pair, count in found.confusion.items())]
    if not all(is_index(a, classes) and is_index(b, classes) and is_index(n, float("inf")) for a, b, n in rows):
        raise ValueError(f"{file}: confusion must hold [label, guess, count] of {classes} classes")
    for row in found.mistakes:
        indices = is_index(row.label, classes) and is_index(row.guess, classes) and is_index(row.place, float("inf"))
        if not indices or not finite(row.probability) or not isinstance(row.loss, int | float):
            raise ValueError(f"{file}: {row} is no mistake among {classes} classes")
    if not is_index(found.images, float("inf")) or sum(found.confusion.values()) != found.images:
        raise ValueError(
            f"{file}: confusion counts {sum(found.confusion.values())} images, and there are {found.images}"
        )
