"""What a classifier takes for what: its confusions, and the images that it gets most wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from bitbell.evaluation.classification import fitting, places_of
from bitbell.evaluation.loss import autocast, device_of, evaluation_mode, logits_of

if TYPE_CHECKING:
    from bitbell.data import ImageDataset

MOST_MISTAKES = 60  # that are kept


@dataclass(frozen=True)
class Mistake:
    """place: of the image in its split. label, guess: indices of its class, and of the one that the model finds
    likeliest, with its probability. loss: nats."""

    place: int
    label: int
    guess: int
    probability: float
    loss: float


@dataclass(frozen=True)
class Predictions:
    """confusion: (label, guess) -> how many of the `images` measured, of the pairs that occur, right ones among them.
    mistakes: those of the highest loss, the highest first."""

    split: str
    images: int
    confusion: dict[tuple[int, int], int]
    mistakes: tuple[Mistake, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: confusion as [label, guess, count]."""
        return {
            "split": self.split,
            "images": self.images,
            "confusion": [[label, guess, count] for (label, guess), count in sorted(self.confusion.items())],
            "mistakes": [asdict(mistake) for mistake in self.mistakes],
        }


@torch.no_grad()
def predict(
    model: nn.Module,
    dataset: ImageDataset,
    *,
    split: str = "valid",
    limit: int | None = None,
    batch_size: int = 64,
    precision: torch.dtype = torch.float32,
) -> Predictions:
    """What the model takes the images of a split for: the first `limit` in the order of `evaluate_images`. Raises
    ValueError where the model is for other classes, channels or sizes than the data's."""
    dataset = fitting(model, dataset)
    places = places_of(dataset, split, limit)
    confusion: Counter[tuple[int, int]] = Counter()
    mistakes: list[Mistake] = []
    with evaluation_mode(model), autocast(model, precision):
        for first in range(0, len(places), batch_size):
            mine = places[first : first + batch_size]
            images, labels = dataset.images(split, mine)
            logits = logits_of(model, images.to(device_of(model))).float().cpu()
            best = logits.softmax(-1).max(-1)
            losses = F.cross_entropy(logits, labels, reduction="none")
            rows = (mine.tolist(), labels.tolist(), best.indices.tolist(), best.values.tolist(), losses.tolist())
            found = [Mistake(*row) for row in zip(*rows, strict=True)]
            confusion.update((row.label, row.guess) for row in found)
            mistakes += [row for row in found if row.label != row.guess]
            mistakes = sorted(mistakes, key=lambda row: (-row.loss, row.place))[:MOST_MISTAKES]
    return Predictions(split, len(places), dict(confusion), tuple(mistakes))
