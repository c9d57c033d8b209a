"""The image set directory: pixels and labels of two splits, and `dataset.json`, which says what is there.

DIR/dataset.json     written last: without it the directory counts as unfinished
DIR/train.pixels     uint8, images one after the other, each (size, size, channels)
DIR/train.labels     uint16, little-endian
DIR/valid.pixels     and valid.labels
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitbell.data.directory import DESCRIPTION, SPLITS, Kind, read_as
from bitbell.data.image_input import ImageInput

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "bitbell-images"
VERSION = 1
_AGAIN = "Make it again with `bitbell images ... --overwrite`, or copy it again."


@dataclass(frozen=True)
class ImageSplit:
    """How many images, and the SHA-256 of their pixels and labels."""

    images: int
    pixels_sha256: str
    labels_sha256: str


@dataclass(frozen=True)
class ImageDescription:
    """The content of dataset.json. input: what was made of every image, with the statistics of the training split.
    skipped: names of what could not be read, with the reason; made_from: the record of the source and settings."""

    classes: tuple[str, ...]
    input: ImageInput
    splits: dict[str, ImageSplit]
    skipped: tuple[tuple[str, str], ...]
    made_from: dict[str, Any]


def is_image_set(folder: str | Path) -> bool:
    """Whether the directory's dataset.json describes images."""
    try:
        fields = json.loads((Path(folder) / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and fields.get("format") == FORMAT


def read_image_description(folder: Path) -> ImageDescription:
    """Read and check dataset.json. Raises FileNotFoundError if it is missing, ValueError if it is wrong."""
    return read_as(Kind("an image set", FORMAT, VERSION, "bitbell images SOURCE", _AGAIN), folder, _parse)


def _parse(fields: dict[str, Any]) -> ImageDescription:
    classes = tuple(map(str, fields["classes"]))
    if not 2 <= len(classes) < 2**16:
        raise ValueError(f"classes must be 2 to {2**16 - 1}, got {len(classes)}")
    splits = {name: _parse_split(fields["splits"][name]) for name in SPLITS}
    skipped = tuple((str(name), str(reason)) for name, reason in fields["skipped"])
    return ImageDescription(classes, ImageInput.from_dict(fields), splits, skipped, dict(fields["made_from"]))


def _parse_split(fields: dict[str, Any]) -> ImageSplit:
    if type(fields["images"]) is not int or fields["images"] < 1:
        raise ValueError(f"images must be an integer of at least 1, got {fields['images']!r}")
    return ImageSplit(fields["images"], str(fields["pixels_sha256"]), str(fields["labels_sha256"]))


class ImageDataset:
    """A prepared image set with the splits "train" and "valid"; get one from `ImageDataset.open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.description = read_image_description(path)
        shape = (self.size, self.size, self.channels)
        self._pixels, self._labels = {}, {}
        for name, split in self.description.splits.items():
            self._pixels[name] = _map(path / f"{name}.pixels", np.dtype(np.uint8), (split.images, *shape))
            self._labels[name] = _map(path / f"{name}.labels", np.dtype("<u2"), (split.images,))

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> ImageDataset:
        """Open a directory made by `prepare_images`; sizes are checked, and with `verify` every byte.

        Raises FileNotFoundError if a file is missing, ValueError, naming file and problem, if one is wrong.
        """
        dataset = cls(Path(path))
        if verify:
            dataset.verify()
        return dataset

    @property
    def classes(self) -> tuple[str, ...]:
        return self.description.classes

    @property
    def size(self) -> int:
        """Pixels of a side; images are square."""
        return self.input.size

    @property
    def channels(self) -> int:
        return self.input.channels

    @property
    def input(self) -> ImageInput:
        """How an image of it becomes a model's input."""
        return self.description.input

    def num_images(self, split: str = "train") -> int:
        """How many images a split has."""
        return self.description.splits[_known(split)].images

    def images(self, split: str, places: np.ndarray | slice) -> tuple[Tensor, Tensor]:
        """Images (n, channels, size, size) float32, of mean 0 and deviation 1 over the training split, and labels (n,)
        int64, at these places of a split. Raises ValueError for a label that no class has."""
        import torch

        pixels = self.pixels(split, places)
        labels = np.asarray(self._labels[split][places]).astype(np.int64)
        if labels.size and int(labels.max()) >= len(self.classes):
            raise ValueError(f"{self.path}: split {split!r} holds label {labels.max()}, of {len(self.classes)} classes")
        return self.input.normalise(pixels), torch.from_numpy(labels)

    def pixels(self, split: str, places: np.ndarray | slice) -> np.ndarray:
        """The same images as they are stored: uint8 (n, size, size, channels)."""
        return np.asarray(self._pixels[_known(split)][places])

    def as_inputs(self, how: ImageInput) -> ImageDataset:
        """The same images, normalised by other means and deviations. Raises ValueError for another size or number of
        channels."""
        if (how.size, how.channels) != (self.size, self.channels):
            raise ValueError(f"images of {self.size} pixels and {self.channels} channels cannot become {how}")
        twin = copy.copy(self)
        twin.description = replace(self.description, input=how)
        return twin

    def verify(self) -> None:
        """Read everything. Raises ValueError if a checksum or a label is not right."""
        for name, split in self.description.splits.items():
            for kind, wanted in (("pixels", split.pixels_sha256), ("labels", split.labels_sha256)):
                with (self.path / f"{name}.{kind}").open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
                        raise ValueError(f"{self.path / f'{name}.{kind}'} is not what was written. {_AGAIN}")
            if int(self._labels[name].max()) >= len(self.classes):
                raise ValueError(f"{self.path}: split {name!r} holds labels that no class has. {_AGAIN}")

    def __repr__(self) -> str:
        counts = ", ".join(f"{split}={self.num_images(split):,} images" for split in SPLITS)
        shape = f"{self.size} x {self.size} x {self.channels}"
        return f"ImageDataset({str(self.path)!r}, {len(self.classes)} classes, {shape}, {counts})"


def _map(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing, but {DESCRIPTION} lists it. {_AGAIN}")
    wanted = int(np.prod(shape)) * dtype.itemsize
    if (found := file.stat().st_size) != wanted:
        raise ValueError(f"{file} has {found} bytes, but {DESCRIPTION} lists {wanted}. {_AGAIN}")
    return np.memmap(file, dtype=dtype, mode="r", shape=shape)


def _known(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}. A data set has {' and '.join(map(repr, SPLITS))}.")
    return split
