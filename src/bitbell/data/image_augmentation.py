"""What is done to training images: named in one line of text, drawn from the seed and the place of every image.

    resized-crop+flip+randaugment:magnitude=5+mixup
    flip --> crop or resized-crop --> randaugment or trivialaugment --> erasing --> mixup or cutmix, of the whole batch

Crop and flip are bitbell's own; the rest is a library's (`bitbell.data.image_libraries`). The library draws from
torch's generator, which is set for every image and put back: nobody else's random numbers depend on it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitbell.data.image_input import ImageInput
from bitbell.data.image_libraries import Library, Mixing, Operation, find_library
from bitbell.data.shuffle import draw

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Option:
    """A number that a part takes, and its limits, inclusive."""

    default: float
    low: float
    high: float
    whole: bool = False

    def __str__(self) -> str:
        return f"{'a whole number' if self.whole else 'a number'} from {self.low:g} to {self.high:g}"


# In the order in which they are applied.
PARTS: dict[str, dict[str, _Option]] = {
    "flip": {},
    "crop": {},
    "resized-crop": {"scale": _Option(0.08, 0.01, 1.0)},
    "randaugment": {"operations": _Option(2, 1, 14, whole=True), "magnitude": _Option(9, 1, 29, whole=True)},
    "trivialaugment": {},
    "erasing": {"probability": _Option(0.25, 0.0, 1.0)},
    "mixup": {"alpha": _Option(0.8, 0.01, 100.0)},
    "cutmix": {"alpha": _Option(1.0, 0.01, 100.0)},
}
SHORTHANDS = {
    "none": "nothing",
    "imagenet": "resized-crop+flip",
    "deit": "resized-crop+flip+randaugment+erasing+mixup+cutmix",
}
_OWN = ("flip", "crop")
_MIXING = ("mixup", "cutmix")
_EITHER = (("crop", "resized-crop"), ("randaugment", "trivialaugment"))
_IMAGE_STREAM, _MIX_STREAM = 2, 3  # of the seed: 0 is the order's, 1 crop's and flip's


@dataclass(frozen=True)
class Augmentation:
    """Parts with their numbers, in the order of PARTS; get one from `parse`."""

    parts: dict[str, dict[str, float]]

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """From names joined by +, each perhaps with options: `name:option=number,...`. Raises ValueError naming what is
        wrong and what is allowed."""
        found: dict[str, dict[str, float]] = {}
        for item in SHORTHANDS.get(text, text).split("+") if text != "none" else ():
            name, colon, options = item.partition(":")
            if name not in PARTS:
                raise _unknown(name, text)
            if name in found:
                raise ValueError(f"augment has {name} twice, got augment={text!r}")
            found[name] = _options(name, options, text) if colon else _defaults(name)
        for one, other in _EITHER:
            if one in found and other in found:
                raise ValueError(f"augment takes {one} or {other}, not both, got augment={text!r}")
        return cls({name: found[name] for name in PARTS if name in found})

    @property
    def own(self) -> str:
        """What bitbell does itself: flip, crop, flip+crop, or none."""
        return "+".join(name for name in _OWN if name in self.parts) or "none"

    @property
    def needs_library(self) -> bool:
        return not self.parts.keys() <= set(_OWN)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, and labels become soft."""
        return not self.parts.keys().isdisjoint(_MIXING)


def library_of(how: str, library: str = "auto") -> str | None:
    """Name of the library that does the augmentation `how`, None where none is needed. Raises ValueError where it is
    not there."""
    return find_library(library).name if Augmentation.parse(how).needs_library else None


class Augmenter:
    """An augmentation of one kind of images, as a library does it: "auto", or the name of one. Raises ValueError where
    it is not there."""

    def __init__(self, how: Augmentation, of: ImageInput, *, classes: int, seed: int, library: str = "auto") -> None:
        self._seed = seed
        self.library = find_library(library)
        self._operations = list(_operations(self.library, how, of))
        self._mixings = list(_mixings(self.library, how, classes))

    def images(self, images: Tensor, places: list[int]) -> Tensor:
        """`images` (N, channels, size, size), normalised, each changed as its place says."""
        import torch

        if not self._operations:
            return images
        changed = []
        with torch.no_grad():
            for image, place in zip(images, places, strict=True):
                with _drawing_from(draw(self._seed, _IMAGE_STREAM, place)):
                    for operation in self._operations:
                        image = operation(image)
                changed.append(image)
        return torch.stack(changed).contiguous()

    def mix(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Images, and soft labels (N, classes) float32: each mixed with the one before it, in the way of the step."""
        import torch

        number = draw(self._seed, _MIX_STREAM, step)
        with torch.no_grad(), _drawing_from(number):
            return self._mixings[number % len(self._mixings)](images, labels)


def _operations(library: Library, how: Augmentation, of: ImageInput) -> Iterator[Operation]:
    for name, options in how.parts.items():
        if name == "resized-crop":
            yield library.resized_crop(of.size, options["scale"])
        elif name == "randaugment":
            yield _on_pixels(library.randaugment(int(options["operations"]), int(options["magnitude"])), of)
        elif name == "trivialaugment":
            yield _on_pixels(library.trivialaugment(), of)
        elif name == "erasing":
            yield library.erasing(options["probability"])


def _mixings(library: Library, how: Augmentation, classes: int) -> Iterator[Mixing]:
    for name, options in how.parts.items():
        if name in _MIXING:
            yield (library.mixup if name == "mixup" else library.cutmix)(options["alpha"], classes)


def _on_pixels(operation: Operation, of: ImageInput) -> Operation:
    """For operations that want 0 .. 1, where normalised images are."""
    import torch

    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (of.mean, of.std))
    return lambda image: (operation((image * std + mean).clamp(0, 1)) - mean) / std


@contextmanager
def _drawing_from(number: int) -> Iterator[None]:
    """Inside, torch's generator of the CPU starts from `number`; after, it is where it was."""
    import torch

    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(number & (2**63 - 1))
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


def _defaults(name: str) -> dict[str, float]:
    return {option: taken.default for option, taken in PARTS[name].items()}


def _options(name: str, text: str, whole: str) -> dict[str, float]:
    options: dict[str, float] = {}
    for item in text.split(","):
        option, _, value = item.partition("=")
        if option not in PARTS[name]:
            allowed = f"takes {', '.join(PARTS[name])}" if PARTS[name] else "takes no options"
            raise ValueError(f"augment: {name} {allowed}, not {option!r}, got augment={whole!r}")
        if option in options:
            raise ValueError(f"augment: {name} has {option} twice, got augment={whole!r}")
        limits = PARTS[name][option]
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not limits.low <= number <= limits.high or (limits.whole and number != int(number)):
            raise ValueError(f"augment: {option} of {name} must be {limits}, got {value!r} in augment={whole!r}")
        options[option] = number
    return _defaults(name) | options


def _unknown(name: str, text: str) -> ValueError:
    known = [*SHORTHANDS, *PARTS]
    close = difflib.get_close_matches(name, known, n=1)
    if name in SHORTHANDS:
        return ValueError(f"augment: {name} stands alone, being {SHORTHANDS[name]}, got augment={text!r}")
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"augment must be of {', '.join(known)}, joined by +, got augment={text!r}.{hint}")
