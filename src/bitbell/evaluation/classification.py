"""Loss and accuracy of an image classifier, and what it says of single pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbell.data.image_input import ImageInput
from bitbell.evaluation.codes import LayerCodes, layer_codes
from bitbell.evaluation.loss import autocast, device_of, evaluation_mode, logits_of

if TYPE_CHECKING:
    from bitbell.data import ImageDataset

LabelledImages = tuple[Tensor, Tensor]  # (N, channels, H, W) float32 and (N,) int64


@dataclass(frozen=True)
class ClassificationScore:
    """loss: mean negative log likelihood of an image's class, nats. accuracy, accuracy_top5: share of the images whose
    class is the likeliest, or among the five likeliest."""

    loss: float
    accuracy: float
    accuracy_top5: float
    images: int


@dataclass(frozen=True)
class ImageEvaluation:
    """A score, and how codes are used: entropies in bits, unweighted means over layers, None in full precision."""

    loss: float
    accuracy: float
    accuracy_top5: float
    images: int
    weight_entropy: float | None
    activation_entropy: float | None
    layers: tuple[LayerCodes, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON of every field."""
        return dataclasses.asdict(self)


@torch.no_grad()
def sum_scores(model: nn.Module, batches: Iterable[LabelledImages], precision: torch.dtype) -> list[float]:
    """Sums over images: of losses, of hits, of hits among five; and how many images. The model is put in evaluation
    mode for the while."""
    losses, hits, hits5, images = 0.0, 0, 0, 0
    with evaluation_mode(model), autocast(model, precision):
        for x, labels in batches:
            labels = labels.to(device_of(model))
            logits = logits_of(model, x.to(device_of(model))).float()
            losses += math.fsum(F.cross_entropy(logits, labels, reduction="none").double().tolist())
            likeliest = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]
            hits, hits5 = hits + int(likeliest[:, 0].sum()), hits5 + int(likeliest.sum())
            images += len(labels)
    return [losses, float(hits), float(hits5), float(images)]


def score_of(sums: list[float]) -> ClassificationScore:
    """The score of `sum_scores`, perhaps of several processes. Raises ValueError for no images."""
    losses, hits, hits5, images = sums
    if not images:
        raise ValueError("there are no images to measure on")
    return ClassificationScore(losses / images, hits / images, hits5 / images, int(images))


def image_batches(
    dataset: ImageDataset, split: str, batch_size: int, limit: int | None = None, start: int = 0
) -> Iterable[LabelledImages]:
    """Batches of a split in the order of `places_of`: images `start` up to `limit` of it."""
    places = places_of(dataset, split, limit)
    for first in range(start, len(places), batch_size):
        yield dataset.images(split, places[first : first + batch_size])


def places_of(dataset: ImageDataset, split: str, limit: int | None = None) -> np.ndarray:
    """Places in a split, (images,) int64: the first `limit` of a fixed order that mixes the classes."""
    from bitbell.data.shuffle import Permutation

    total = dataset.num_images(split)
    return Permutation(total, 0)(np.arange(min(total, limit or total)))


def evaluate_images(
    model: nn.Module,
    dataset: ImageDataset,
    *,
    split: str = "valid",
    limit: int | None = None,
    batch_size: int = 64,
    precision: torch.dtype = torch.float32,
    score: ClassificationScore | None = None,
    code_images: int | None = None,
) -> ImageEvaluation:
    """Evaluate a full-precision, quantized or packed classifier on a split of an image set.

    limit: images at most (None: all). score: where it is known already. Activation entropies come from the first
    `code_images`, by default those of four batches. Pixels are normalised as the model was trained, where its
    configuration says how. Raises ValueError where the model is for other classes, channels or sizes than the data's.
    """
    dataset = fitting(model, dataset)
    score = score or score_of(sum_scores(model, image_batches(dataset, split, batch_size, limit), precision))
    few = code_images or 4 * batch_size
    few = min(limit or few, few)
    layers = layer_codes(model, [x for x, _ in image_batches(dataset, split, batch_size, few)])
    used = [row.activation_entropy for row in layers if row.activation_entropy is not None]
    weights = [row.weight_entropy for row in layers]
    weight_entropy, activation_entropy = (sum(found) / len(found) if found else None for found in (weights, used))
    numbers = score.loss, score.accuracy, score.accuracy_top5, score.images
    return ImageEvaluation(*numbers, weight_entropy, activation_entropy, tuple(layers))


def fitting(model: nn.Module, dataset: ImageDataset) -> ImageDataset:
    """The data with its pixels made into inputs as the model was trained on, where its configuration says how.

    Raises ValueError if the configuration says that the model is for other classes, channels or sizes than the data's.
    """
    check_classes(model, dataset)
    config = getattr(model, "config", None)
    if getattr(config, "image_input", None) is None:
        return dataset
    how, names = image_input_of(model), tuple(str(config.id2label[i]) for i in range(config.num_labels))  # type: ignore[union-attr]
    if names != dataset.classes:
        mine, theirs = next(pair for pair in zip(names, dataset.classes, strict=True) if pair[0] != pair[1])
        raise ValueError(f"the data has other classes than the model: {theirs!r} where the model has {mine!r}")
    if how.size != dataset.size:
        raise ValueError(
            f"the data's images are {dataset.size} x {dataset.size}, the model was trained on {how.size} x {how.size}; "
            f"make them again with --size {how.size}"
        )
    return dataset.as_inputs(how)


def check_classes(model: nn.Module, dataset: ImageDataset) -> None:
    """Raise ValueError if the model's configuration says that it is not for the classes or channels of the data."""
    config = getattr(model, "config", None)
    classes, channels = (getattr(config, name, None) for name in ("num_labels", "num_channels"))
    if classes not in (None, len(dataset.classes)):
        raise ValueError(f"the data has {len(dataset.classes)} classes, the model {classes}")
    if channels not in (None, dataset.channels):
        raise ValueError(f"the data's images have {dataset.channels} channels, the model takes {channels}")


# Single pictures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guess:
    """A class that the model gives an image, and how probable it finds it (0 .. 1)."""

    label: str
    index: int
    probability: float


@torch.no_grad()
def classify(model: nn.Module, images: Tensor, top: int = 5) -> list[list[Guess]]:
    """The `top` likeliest classes (all, where there are fewer) of each of `images` (N, channels, H, W) float32, the
    likeliest first. The images are inputs as `image_input_of(model).read(picture)` makes them. Raises ValueError for
    top < 1, and for a model that is no classifier."""
    if top < 1:
        raise ValueError(f"top must be at least 1, got top={top}")
    labels = _inner_classifier(model).config.id2label
    with evaluation_mode(model):
        probabilities = logits_of(model, images.to(device_of(model))).float().softmax(-1)
    found = probabilities.topk(min(top, probabilities.shape[-1]))
    rows = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return [[Guess(labels[i], i, p) for i, p in zip(*row, strict=True)] for row in rows]


def image_input_of(model: nn.Module) -> ImageInput:
    """How pictures become inputs of a classifier, as its training left it in the configuration. Raises ValueError for
    another model, and for one whose configuration does not say it, or wrongly."""
    fields = getattr(_inner_classifier(model).config, "image_input", None)
    if fields is None:
        raise ValueError(
            "the model's configuration does not say how its images were prepared (image_input, which `bitbell train` "
            "leaves there); take it from the image set that it was trained on (--data)"
        )
    try:
        return ImageInput.from_dict(fields)
    except ValueError as error:
        raise ValueError(f"image_input of the model's configuration is wrong: {error}") from None


def _inner_classifier(model: nn.Module) -> Any:
    """The `transformers` model, in a packed one too. Raises ValueError where it does not classify images."""
    inner = model if hasattr(type(model), "config_class") else getattr(model, "model", model)
    if not type(inner).__name__.endswith("ForImageClassification"):
        raise ValueError(f"the model is no image classifier but a {type(inner).__name__}")
    return inner
