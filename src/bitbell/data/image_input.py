"""How a picture becomes a model's input: the same for training, validation and pictures from anywhere.

picture --turn, scale, cut out (`to_pixels`)--> uint8 --of mean 0 and deviation 1--> float32
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bitbell.data.image_sources import to_pixels

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_SIZE = 2048


@dataclass(frozen=True)
class ImageInput:
    """size: pixels of a side. channels: 1 (grey) or 3 (colour). mean, std: of each channel of the training split, in
    0 .. 1. Raises ValueError for what no image set has."""

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        size, channels = self.size, self.channels
        if type(size) is not int or not 1 <= size <= LARGEST_SIZE or channels not in (1, 3):
            raise ValueError(f"size must be 1 to {LARGEST_SIZE} and channels 1 or 3, got {size!r} and {channels!r}")
        if len(self.mean) != channels or len(self.std) != channels or not all(s > 0 for s in self.std):
            raise ValueError(f"mean and std must have {channels} numbers, and those of std be positive")
        if not all(map(math.isfinite, self.mean + self.std)):
            raise ValueError(f"mean and std must be finite, got {self.mean} and {self.std}")

    @classmethod
    def from_dict(cls, fields: Any) -> ImageInput:
        """From plain JSON. Raises ValueError for anything but the fields of `to_dict`, as they must be."""
        try:
            mean, std = (tuple(float(value) for value in fields[name]) for name in ("mean", "std"))
            return cls(fields["size"], fields["channels"], mean, std)
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"size, channels, mean and std are wanted, got {fields!r:.80} ({error!r})") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON of every field."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def read(self, image: Any) -> Tensor:
        """(1, channels, size, size) float32 of a Pillow image or a uint8 array (H, W) or (H, W, channels). Raises
        ValueError, or what Pillow raises, for what cannot be read."""
        return self.normalise(to_pixels(image, self.size, self.channels)[None])

    def normalise(self, pixels: np.ndarray) -> Tensor:
        """(N, channels, size, size) float32 of uint8 pixels (N, size, size, channels)."""
        import torch

        x = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float().div_(255)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return x.sub_(mean).div_(std).contiguous()
