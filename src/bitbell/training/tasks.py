"""What a run learns: the next token, or the class of an image. The loop knows a task by what is here.

batch(index) -> inputs, targets        a function of the index, this process's share
measure(model, limit) -> Measured      over the validation split, on all processes together
conclude(model, measured) -> numbers   and the codes of every layer, for the summary
leave(run, model)                      what else the report needs, as a file
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbell.data import ImageBatches, ImageDataset, TokenDataset, is_image_set, windows
from bitbell.evaluation import evaluate, evaluate_images
from bitbell.evaluation.classification import image_batches, score_of, sum_scores
from bitbell.evaluation.predictions import predict
from bitbell.models import ImagePreset, find_preset
from bitbell.models.images import check_image_size
from bitbell.training.config import TrainConfig
from bitbell.training.distributed import World, check_shares, measure_together, share_of_batches
from bitbell.training.run import write_json

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Measured:
    """numbers: for the journal and the summary, the loss among them. words: for people. score: the task's own."""

    numbers: dict[str, float]
    words: str
    score: Any = field(repr=False)


class Task(ABC):
    """A data set, and what a model is trained to make of it.

    facts: what a run keeps of the data, to build its model again. unit: of what is counted, and how many there are in a
    sample.
    """

    facts: dict[str, Any]
    unit: str
    units_per_sample: int

    @abstractmethod
    def batch(self, index: int) -> Batch:
        """Inputs and targets of a micro-batch, this process's share."""

    @abstractmethod
    def measure(self, model: nn.Module, limit: int, precision: torch.dtype) -> Measured:
        """Loss and more over the first `limit` samples of the validation split."""

    @abstractmethod
    def conclude(self, model: nn.Module, measured: Measured, limit: int, precision: torch.dtype) -> Any:
        """An `Evaluation` or `ImageEvaluation` with the codes of every layer, in one process."""

    @abstractmethod
    def leave(self, run: Path, model: nn.Module, limit: int, precision: torch.dtype) -> None:
        """Write into the folder of a finished run what else its report needs, in one process."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What is minimised: the mean negative log likelihood of the targets."""
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def open_data(config: TrainConfig) -> TokenDataset | ImageDataset:
    """The data set that `config` names. Raises ValueError where data and preset do not fit each other, and
    FileNotFoundError where there is none."""
    preset = find_preset(config.preset)
    is_for_images = isinstance(preset, ImagePreset)
    if is_image_set(config.data) != is_for_images and Path(config.data).exists():
        wanted, there = ("images", "text") if is_for_images else ("text", "images")
        raise ValueError(f"preset={config.preset} is a model of {wanted}, and {config.data} is a data set of {there}")
    if not isinstance(preset, ImagePreset):
        for name, absent in (("augment", "none"), ("label_smoothing", 0)):
            if getattr(config, name) != absent:
                raise ValueError(f"{name} is of images, and preset={config.preset} is a model of text: leave it out")
        return TokenDataset.open(config.data)
    dataset = ImageDataset.open(config.data)
    check_image_size(preset, dataset.size)
    return dataset


def open_task(config: TrainConfig, world: World) -> Task:
    """The task of the data that `config` names. Raises as `open_data`."""
    data = open_data(config)
    if isinstance(data, ImageDataset):
        return Classification(config, world, data)
    return LanguageModelling(config, world, data)


class LanguageModelling(Task):
    """The next token of a text."""

    unit = "tokens"

    def __init__(self, config: TrainConfig, world: World, dataset: TokenDataset) -> None:
        self.config, self.world, self.dataset = config, world, dataset
        self.facts = {"vocab_size": self.dataset.vocab_size}
        self.units_per_sample = config.sequence_length
        self._batches = share_of_batches(self.dataset, config, world)
        self._bytes_per_token = self.dataset.num_bytes("valid") / self.dataset.num_tokens("valid")
        self._windows(config.evaluate_windows)  # raises now if the split is too short

    def batch(self, index: int) -> Batch:
        tokens = self._batches.batch(index)
        return tokens[:, :-1], tokens[:, 1:]

    def _windows(self, limit: int) -> Tensor:
        return windows(self.dataset, "valid", sequence_length=self.config.sequence_length, limit=limit)

    def measure(self, model: nn.Module, limit: int, precision: torch.dtype) -> Measured:
        score = measure_together(
            model,
            self._windows(limit),
            self.world,
            bytes_per_token=self._bytes_per_token,
            batch_size=self.config.batch_size,
            precision=precision,
        )
        numbers = {"loss": score.loss, "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
        words = f"perplexity {score.perplexity:.2f}, {score.bits_per_byte:.3f} bits/byte"
        return Measured(numbers, words, score)

    def conclude(self, model: nn.Module, measured: Measured, limit: int, precision: torch.dtype) -> Any:
        return evaluate(
            model,
            self.dataset,
            sequence_length=self.config.sequence_length,
            limit=limit,
            batch_size=self.config.batch_size // self.world.size,
            precision=precision,
            measured=measured.score,
            code_windows=4 * self.config.batch_size,
        )

    def leave(self, run: Path, model: nn.Module, limit: int, precision: torch.dtype) -> None:
        """Nothing: the summary has all numbers."""


class Classification(Task):
    """The class of an image."""

    unit = "images"
    units_per_sample = 1

    def __init__(self, config: TrainConfig, world: World, dataset: ImageDataset) -> None:
        check_shares(config, world)
        self.config, self.world, self.dataset = config, world, dataset
        self._share = config.batch_size // world.size
        options: dict[str, Any] = {"batch_size": self._share, "seed": config.seed}
        options |= {"augment": config.augment, "library": config.augment_library}
        self._batches = ImageBatches(self.dataset, **options, rank=world.rank, world_size=world.size)
        self.facts = {"images": {"classes": list(self.dataset.classes), **self.dataset.input.to_dict()}}
        if self._batches.library is not None:
            self.facts["augmented_by"] = self._batches.library

    def batch(self, index: int) -> Batch:
        return self._batches.batch(index)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy with classes, or with mixed ones (N, classes); smoothing spreads a share of either evenly."""
        return F.cross_entropy(logits.float(), targets, label_smoothing=self.config.label_smoothing)

    def measure(self, model: nn.Module, limit: int, precision: torch.dtype) -> Measured:
        score = score_of(self._sums(model, min(limit, self.dataset.num_images("valid")), precision))
        numbers, words = {"loss": score.loss, "accuracy": score.accuracy}, f"accuracy {score.accuracy:.4f}"
        if len(self.dataset.classes) > 5:  # among five of five every class is
            numbers["accuracy_top5"] = score.accuracy_top5
            words += f", among the first five {score.accuracy_top5:.4f}"
        return Measured(numbers, words, score)

    def _sums(self, model: nn.Module, images: int, precision: torch.dtype) -> list[float]:
        """As many forward passes on every process: each batch is cut into shares, and what is over measured by all."""
        size, world = self.config.batch_size, self.world
        even = images - images % world.size
        mine = (
            tuple(part.chunk(world.size)[world.rank] for part in batch)
            for batch in image_batches(self.dataset, "valid", size, even)
        )
        totals = world.sum(sum_scores(model, mine, precision)) if even else [0.0] * 4  # type: ignore[arg-type]
        if even == images:
            return totals
        rest = sum_scores(model, image_batches(self.dataset, "valid", size, images, start=even), precision)
        return [total + more for total, more in zip(totals, rest, strict=True)]

    def conclude(self, model: nn.Module, measured: Measured, limit: int, precision: torch.dtype) -> Any:
        options: dict[str, Any] = {"limit": limit, "batch_size": self._share, "precision": precision}
        options["code_images"] = 4 * self.config.batch_size
        return evaluate_images(model, self.dataset, **options, score=measured.score)

    def leave(self, run: Path, model: nn.Module, limit: int, precision: torch.dtype) -> None:
        """predictions.json: which classes are taken for which, and the worst mistakes."""
        found = predict(model, self.dataset, limit=limit, batch_size=self._share, precision=precision)
        write_json(run / "predictions.json", found.to_dict())
