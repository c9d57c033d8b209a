"""Batches of images: each a pure function of the step, so that a run can stop and go on anywhere.

step, rank --> place in an endless order --> (epoch, place) --shuffle--> image --augment, by the place--> batch
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitbell.data.image_directory import ImageDataset
from bitbell.data.shuffle import Permutation, draw

if TYPE_CHECKING:
    from torch import Tensor

AUGMENTATIONS = ("none", "crop", "flip", "flip+crop")


class ImageBatches:
    """Shuffled, augmented training batches by step number, without state.

    augment: "flip" mirrors half of the images; "crop" moves each by up to an eighth of its side, filling with the mean
    colour; "flip+crop" or "none". `batch_size` is what one rank gets at a step; the batches of the ranks of a step,
    joined, are the batch that a single rank with batch_size * world_size would get.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        split: str = "train",
        *,
        batch_size: int,
        augment: str = "none",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size must be at least 1 and rank in 0 .. world_size - 1, "
                f"got batch_size={batch_size}, rank={rank}, world_size={world_size}."
            )
        check_augment(augment)
        self._dataset, self._split, self._seed, self._augment = dataset, split, seed, augment
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self.num_images = dataset.num_images(split)

    @property
    def steps_per_epoch(self) -> float:
        """Steps after which every image has been seen once; an epoch may end inside a batch."""
        return self.num_images / (self._batch_size * self._world_size)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (batch_size, channels, size, size) float32 and labels (batch_size,) int64 of a step. Raises ValueError
        for a negative step."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}.")
        places = (step * self._world_size + self._rank) * self._batch_size + np.arange(self._batch_size)
        epochs, inside = np.divmod(places, self.num_images)
        chosen = np.empty_like(inside)
        for epoch in np.unique(epochs).tolist():  # one, or more where an epoch ends inside the batch
            here = epochs == epoch
            chosen[here] = Permutation(self.num_images, self._seed, epoch)(inside[here])
        images, labels = self._dataset.images(self._split, chosen)
        return augment(images, self._augment, [draw(self._seed, 1, place) for place in places.tolist()]), labels


def augment(images: Tensor, how: str, random: list[int]) -> Tensor:
    """`images` (N, channels, H, W) of mean 0, each flipped and moved as its 64 random bits say."""
    import torch
    import torch.nn.functional as F

    check_augment(how)
    if "flip" in how:
        mirrored = torch.tensor([bits & 1 == 1 for bits in random])
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    if "crop" in how:
        height, width = images.shape[2:]
        reach = max(height // 8, 1)
        down = torch.tensor([(bits >> 8) % (2 * reach + 1) for bits in random])
        right = torch.tensor([(bits >> 32) % (2 * reach + 1) for bits in random])
        padded = F.pad(images, (reach, reach, reach, reach)).permute(0, 2, 3, 1)
        rows = (down[:, None] + torch.arange(height))[:, :, None]
        columns = (right[:, None] + torch.arange(width))[:, None, :]
        images = padded[torch.arange(len(images))[:, None, None], rows, columns].permute(0, 3, 1, 2)
    return images.contiguous()


def check_augment(how: str) -> None:
    """Raise ValueError unless `how` is an augmentation that there is."""
    if how not in AUGMENTATIONS:
        raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)}, got augment={how!r}")
