"""The libraries that augment images: torchvision where it loads, or kornia. Each draws from torch's global generator.

An operation takes one image (channels, H, W) float32 to another of the same shape. A mixing takes N images and labels,
mixes each with the one before it, all in the same way, and gives soft labels (N, classes).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LIBRARIES = ("torchvision", "kornia")
_KORNIA = "Install kornia with: pip install 'bitbell[vision]'"
Operation = Callable[["Tensor"], "Tensor"]
Mixing = Callable[["Tensor", "Tensor"], "tuple[Tensor, Tensor]"]


class Library(ABC):
    """What is wanted of a library. size: pixels of a side. magnitude: 1 to 29, of 30."""

    name: str
    version: str

    @abstractmethod
    def resized_crop(self, size: int, scale: float) -> Operation:
        """A part of at least the share `scale` of the area, of an aspect of 3/4 to 4/3, scaled to (size, size)."""

    @abstractmethod
    def randaugment(self, operations: int, magnitude: int) -> Operation:
        """RandAugment (arXiv 1909.13719) of values in 0 .. 1."""

    @abstractmethod
    def trivialaugment(self) -> Operation:
        """TrivialAugment (arXiv 2103.10158) of values in 0 .. 1."""

    @abstractmethod
    def erasing(self, probability: float) -> Operation:
        """A rectangle of 2 to 33 % of the area becomes 0 (arXiv 1708.04896)."""

    @abstractmethod
    def mixup(self, alpha: float, classes: int) -> Mixing:
        """A weighted sum of two images, the weight of Beta(alpha, alpha) (arXiv 1710.09412)."""

    @abstractmethod
    def cutmix(self, alpha: float, classes: int) -> Mixing:
        """A rectangle of another image, its share of the area of Beta(alpha, alpha) (arXiv 1905.04899)."""


def find_library(name: str = "auto") -> Library:
    """The library of that name; auto: the first of LIBRARIES that loads.

    Raises ValueError for a name that is not known, and for a library that is not there or does not load, saying how it
    is installed.
    """
    if name != "auto":
        return _load(name)
    for candidate in LIBRARIES:
        try:
            return _load(candidate)
        except ValueError:
            continue
    raise ValueError(
        f"augmentations beyond crop and flip are those of {' or '.join(LIBRARIES)}; neither loads. {_KORNIA}"
    )


@cache
def _load(name: str) -> Library:
    if name not in LIBRARIES:
        raise ValueError(f"augment_library must be auto, {' or '.join(LIBRARIES)}, got augment_library={name!r}")
    try:
        return _Torchvision() if name == "torchvision" else _Kornia()
    except ImportError as error:
        how = _KORNIA if name == "kornia" else "Install the build that fits your PyTorch (docs/install.md)."
        raise ValueError(f"augment_library={name}: the package cannot be imported ({error}). {how}") from None
    except (RuntimeError, OSError) as error:  # its compiled part is for another build of PyTorch
        import torch

        raise ValueError(
            f"augment_library={name}: the package does not load beside PyTorch {torch.__version__} ({error}). Install "
            "the build that fits your PyTorch (docs/install.md), or take kornia"
        ) from None


class _Torchvision(Library):
    """torchvision.transforms.v2, with its own settings where nothing else is said."""

    name = "torchvision"

    def __init__(self) -> None:
        import torchvision
        from torchvision.transforms import v2

        self._v2: Any = v2
        self.version = torchvision.__version__

    def resized_crop(self, size: int, scale: float) -> Operation:
        return self._v2.RandomResizedCrop((size, size), scale=(scale, 1.0), antialias=True)

    def randaugment(self, operations: int, magnitude: int) -> Operation:
        return self._v2.RandAugment(num_ops=operations, magnitude=magnitude)

    def trivialaugment(self) -> Operation:
        return self._v2.TrivialAugmentWide()

    def erasing(self, probability: float) -> Operation:
        return self._v2.RandomErasing(p=probability)

    def mixup(self, alpha: float, classes: int) -> Mixing:
        return self._v2.MixUp(alpha=alpha, num_classes=classes)

    def cutmix(self, alpha: float, classes: int) -> Mixing:
        return self._v2.CutMix(alpha=alpha, num_classes=classes)


# The operations of RandAugment's paper, for kornia. Its own list has others, shears by up to 54 degrees where a factor
# of 0.3 is meant (17 degrees), and posterizes to 0 bits in TrivialAugment, which is black. Its contrast multiplies
# pixels, which is the papers' brightness, not their contrast (around the mean); its brightness adds to them: half the
# range, so that something is left.
_STRENGTHS = {
    "auto_contrast": (0, 1),
    "equalize": (0, 1),
    "rotate": (-30.0, 30.0),
    "posterize": (4.0, 8.0),
    "color": (0.1, 1.9),
    "contrast": (0.1, 1.9),
    "brightness": (0.55, 1.45),
    "sharpness": (0.1, 1.9),
    "shear_x": (-0.093, 0.093),
    "shear_y": (-0.093, 0.093),
    "translate_x": (-0.45, 0.45),
    "translate_y": (-0.45, 0.45),
}


class _Kornia(Library):
    """kornia.augmentation, with its own settings where nothing else is said."""

    name = "kornia"

    def __init__(self) -> None:
        import kornia
        import kornia.augmentation
        import kornia.augmentation.auto

        self._of: Any = kornia.augmentation
        self.version = kornia.__version__

    def resized_crop(self, size: int, scale: float) -> Operation:
        return _of_batches(self._of.RandomResizedCrop((size, size), scale=(scale, 1.0)))

    def randaugment(self, operations: int, magnitude: int) -> Operation:
        threshold = 1 - magnitude / 30  # what is above is inverted: kornia would begin with the strongest
        return _in_colour(_of_batches(self._of.auto.RandAugment(operations, magnitude, _policy(threshold, threshold))))

    def trivialaugment(self) -> Operation:
        return _in_colour(_of_batches(self._of.auto.TrivialAugment(_policy(0.0, 1.0))))

    def erasing(self, probability: float) -> Operation:
        return _of_batches(self._of.RandomErasing(p=probability))

    def mixup(self, alpha: float, classes: int) -> Mixing:
        import torch

        operation = self._of.RandomMixUpV2(data_keys=["input", "class"])

        def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            share = torch.distributions.Beta(alpha, alpha).sample().expand(len(images))  # kornia's own is uniform
            random = _for_rows(operation.forward_parameters(images[:2].shape), len(images))
            random |= {"mixup_pairs": _before(len(images)), "mixup_lambdas": share}
            mixed, found = operation(images, labels, params=random)
            return mixed, _soft(found[:, 1], found[:, 0], found[:, 2], classes)

        return mix

    def cutmix(self, alpha: float, classes: int) -> Mixing:
        operation = self._of.RandomCutMixV2(
            beta=alpha, same_on_batch=True, use_correct_lambda=True, data_keys=["input", "class"]
        )

        def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            random = _for_rows(operation.forward_parameters(images[:2].shape), len(images))
            random["mix_pairs"] = _before(len(images))[None]
            random["crop_src"] = random["crop_src"][:, :1].expand(1, len(images), 4, 2)
            mixed, found = operation(images, labels, params=random)
            return mixed, _soft(found[0, :, 0], found[0, :, 1], found[0, :, 2], classes)

        return mix


def _policy(low: float, high: float) -> list[list[tuple[str, float, float]]]:
    """The list for kornia, with thresholds of solarize from `low` to `high`, and one operation that changes nothing."""
    rest = ("solarize", (low, high)), ("brightness", (1.0, 1.0))
    return [[(name, *limits)] for name, limits in (*_STRENGTHS.items(), *rest)]


def _of_batches(operation: Any) -> Operation:
    return lambda image: operation(image[None])[0]


def _in_colour(operation: Operation) -> Operation:
    """Grey images as three equal channels: some of kornia's operations take nothing else."""
    return lambda image: operation(image.expand(3, -1, -1))[: len(image)]


def _for_rows(random: dict[str, Any], rows: int) -> dict[str, Any]:
    """What was drawn for two rows, for any number: so that as much is drawn however many there are."""
    return random | {"batch_prob": random["batch_prob"][:1].expand(rows)}


def _before(rows: int) -> Tensor:
    import torch

    return torch.arange(rows).roll(1)


def _soft(labels: Tensor, others: Tensor, share: Tensor, classes: int) -> Tensor:
    """(N, classes) float32: `share` of a label, and the rest of the other."""
    import torch.nn.functional as F

    mine, theirs = (F.one_hot(found.long(), classes).float() for found in (labels, others))
    return share[:, None] * mine + (1 - share[:, None]) * theirs
