"""Labelled images -> an image set directory: every image decoded and scaled once.

sources --decode, scale--> pixels, labels --held out by a hash of the name--> train and valid
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bitbell.data.directory import DESCRIPTION, SPLITS, OutputFolder
from bitbell.data.image_directory import FORMAT, VERSION, ImageDataset
from bitbell.data.image_input import LARGEST_SIZE
from bitbell.data.image_sources import ImageSource, LabelledImage, find_images, to_pixels

_OURS = {DESCRIPTION, *(f"{split}.{kind}" for split in SPLITS for kind in ("pixels", "labels"))}


def prepare_images(
    source: str | Path,
    out: str | Path,
    *,
    size: int,
    channels: int | None = None,
    valid_fraction: float = 0.1,
    seed: int = 0,
    on_error: str = "skip",
    overwrite: bool = False,
) -> ImageDataset:
    """Write an image set to `out` and open it.

    source: a folder with one folder a class, "digits", "mnist-5k" or "hf:NAME" (`bitbell.data.image_sources`). size:
    pixels of a side; the shorter side is scaled to it and the middle cut out. channels: 1 or 3; by default 3, or 1
    where the source is grey by nature. valid_fraction: of the images held out, where the source has no split of its
    own. on_error: "skip" leaves out what cannot be decoded, and lists it in the description; "fail" raises. Raises
    ValueError for what does not fit, naming the argument, the file or the class, and leaves nothing behind.
    """
    target = Path(out)
    _check_arguments(size, channels, valid_fraction, on_error)
    _check_may_write(target, overwrite)
    found = find_images(source)
    depth = channels or (1 if found.grey else 3)
    with OutputFolder(target) as folder:
        writers = {split: _SplitWriter(folder.partial, split, depth) for split in SPLITS}
        try:
            skipped = _write(found, writers, size, depth, valid_fraction, seed, on_error)
        finally:
            for writer in writers.values():
                writer.close()
        _check_classes(found, writers, skipped)
        mean, std = writers["train"].statistics()
        fields: dict[str, Any] = {"format": FORMAT, "version": VERSION, "classes": found.classes, "size": size}
        fields |= {"channels": depth, "mean": mean, "std": std, "skipped": skipped}
        fields["splits"] = {split: writer.describe() for split, writer in writers.items()}
        settings = {"valid_fraction": valid_fraction, "seed": seed, "on_error": on_error}
        fields["made_from"] = {"source": found.name, "images": found.count, **settings}
        folder.publish_fields(fields, older=("*.pixels", "*.labels"))
    return ImageDataset.open(target)


class _SplitWriter:
    """Pixels and labels of one split as they come, with what the description says of them."""

    def __init__(self, folder: Path, split: str, channels: int) -> None:
        self._files: dict[str, BinaryIO] = {
            kind: (folder / f"{split}.{kind}").open("wb") for kind in ("pixels", "labels")
        }
        self._hashes = {kind: hashlib.sha256() for kind in self._files}
        self.labels: Counter[int] = Counter()
        self._sums, self._squares, self._pixels = np.zeros(channels), np.zeros(channels), 0

    def add(self, pixels: np.ndarray, label: int) -> None:
        for kind, content in (("pixels", pixels.tobytes()), ("labels", np.array([label], dtype="<u2").tobytes())):
            self._files[kind].write(content)
            self._hashes[kind].update(content)
        self.labels[label] += 1
        values = pixels.reshape(-1, pixels.shape[-1]) / 255.0
        self._sums += values.sum(0)
        self._squares += np.square(values).sum(0)
        self._pixels += len(values)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel; a channel without any deviation counts as 1."""
        mean = self._sums / self._pixels
        std = np.sqrt(np.maximum(self._squares / self._pixels - mean**2, 0))
        return mean.tolist(), np.where(std > 1e-6, std, 1.0).tolist()

    def describe(self) -> dict[str, Any]:
        sums = {f"{kind}_sha256": digest.hexdigest() for kind, digest in self._hashes.items()}
        return {"images": self.labels.total(), **sums}

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _write(
    source: ImageSource,
    writers: dict[str, _SplitWriter],
    size: int,
    channels: int,
    valid_fraction: float,
    seed: int,
    on_error: str,
) -> list[tuple[str, str]]:
    """Decode and write every image; return names and reasons of those that could not be decoded."""
    skipped = []
    for image in source.images():
        try:
            pixels = to_pixels(image.open(), size, channels)
        except ImportError:
            raise
        except Exception as error:  # Pillow raises what its decoders raise: OSError, SyntaxError, struct.error ...
            reason = f"{type(error).__name__}: {error}"[:200]
            if on_error == "fail":
                raise ValueError(f"{source.name}: {image.name} cannot be decoded ({reason}).") from error
            skipped.append((image.name, reason))
            continue
        writers[image.split or _held_out(image, valid_fraction, seed)].add(pixels, image.label)
    return skipped


def _held_out(image: LabelledImage, fraction: float, seed: int) -> str:
    """A function of seed and name, so that other files neither move it nor are moved by it."""
    digest = hashlib.blake2b(f"{seed},{image.name}".encode(), digest_size=8).digest()
    return "valid" if int.from_bytes(digest, "little") < fraction * 2**64 else "train"


def _check_classes(source: ImageSource, writers: dict[str, _SplitWriter], skipped: list[tuple[str, str]]) -> None:
    lost = f" ({len(skipped)} images could not be decoded, the first: {': '.join(skipped[0])})" if skipped else ""
    empty = [name for label, name in enumerate(source.classes) if not writers["train"].labels[label]]
    if empty:
        raise ValueError(f"{source.name} leaves no image to train on in the classes {', '.join(empty[:5])}{lost}.")
    if not writers["valid"].labels:
        raise ValueError(f"{source.name} leaves no image for validation{lost}. Give a larger valid_fraction.")


def _check_arguments(size: int, channels: int | None, valid_fraction: float, on_error: str) -> None:
    if not 1 <= size <= LARGEST_SIZE:
        raise ValueError(f"size must be 1 to {LARGEST_SIZE} pixels, got size={size}.")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (colour), got channels={channels}.")
    if not 0 < valid_fraction < 1:
        raise ValueError(f"valid_fraction must lie between 0 and 1, got {valid_fraction}.")
    if on_error not in ("skip", "fail"):
        raise ValueError(f"on_error must be skip or fail, got on_error={on_error!r}.")


def _check_may_write(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file, and a data set is a folder. Choose a new or empty folder.")
    names = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
    if foreign := [name for name in names if name not in _OURS]:
        raise ValueError(f"{out} holds other files ({', '.join(foreign[:3])}). Choose a new or empty folder.")
    if DESCRIPTION in names and not overwrite:
        raise ValueError(f"{out} holds an image set already. Choose another folder, or overwrite it (--overwrite).")
