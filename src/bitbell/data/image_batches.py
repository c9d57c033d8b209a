"""Batches of images: each a pure function of the step, so that a run can stop and go on anywhere.

step, rank --> place in an endless order --> (epoch, place) --shuffle--> image --augment, by the place--> batch
batch --mix, by the step, where it is asked for--> batch
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitbell.data.image_augmentation import Augmentation, Augmenter
from bitbell.data.image_directory import ImageDataset
from bitbell.data.shuffle import Permutation, draw

if TYPE_CHECKING:
    from torch import Tensor


class ImageBatches:
    """Shuffled, augmented training batches by step number, without state.

    augment: "flip" mirrors half of the images; "crop" moves each by up to an eighth of its side, filling with the mean
    colour; for the rest see `bitbell.data.image_augmentation`. library: what does the rest; "auto", or the name of one.
    `batch_size` is what one rank gets at a step; the batches of the ranks of a step, joined, are the batch that a
    single rank with batch_size * world_size would get.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        split: str = "train",
        *,
        batch_size: int,
        augment: str = "none",
        library: str = "auto",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size must be at least 1 and rank in 0 .. world_size - 1, "
                f"got batch_size={batch_size}, rank={rank}, world_size={world_size}."
            )
        self._how = Augmentation.parse(augment)
        if self._how.mixes and batch_size * world_size < 2:
            raise ValueError(f"augment={augment!r} mixes the images of a batch, and batch_size=1 leaves nothing to mix")
        self._augmenter: Augmenter | None = None
        if self._how.needs_library:
            options = {"classes": len(dataset.classes), "seed": seed}
            self._augmenter = Augmenter(self._how, dataset.input, library=library, **options)
        self._dataset, self._split, self._seed = dataset, split, seed
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self.num_images = dataset.num_images(split)

    @property
    def library(self) -> str | None:
        """Name of the library that augments, if one is needed."""
        return self._augmenter.library.name if self._augmenter else None

    @property
    def steps_per_epoch(self) -> float:
        """Steps after which every image has been seen once; an epoch may end inside a batch."""
        return self.num_images / (self._batch_size * self._world_size)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (batch_size, channels, size, size) float32 and labels of a step: (batch_size,) int64, or where images
        are mixed (batch_size, classes) float32, which sum to 1. Raises ValueError for a negative step."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}.")
        rows = self._rank * self._batch_size + np.arange(self._batch_size)
        if self._augmenter is None or not self._how.mixes:
            return self._images(step, rows)
        before = np.concatenate([rows[:1] - 1, rows])  # each is mixed with the one before it, of another rank perhaps
        images, labels = self._augmenter.mix(*self._images(step, before), step)
        return images[1:].contiguous(), labels[1:].contiguous()

    def _images(self, step: int, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Augmented images and labels of these rows of the batch of all ranks; the last row also counts as row -1."""
        size = self._world_size * self._batch_size
        places = step * size + rows % size
        epochs, inside = np.divmod(places, self.num_images)
        chosen = np.empty_like(inside)
        for epoch in np.unique(epochs).tolist():  # one, or more where an epoch ends inside the batch
            here = epochs == epoch
            chosen[here] = Permutation(self.num_images, self._seed, epoch)(inside[here])
        images, labels = self._dataset.images(self._split, chosen)
        images = augment(images, self._how.own, [draw(self._seed, 1, place) for place in places.tolist()])
        return (self._augmenter.images(images, places.tolist()) if self._augmenter else images), labels


def augment(images: Tensor, how: str, random: list[int]) -> Tensor:
    """`images` (N, channels, H, W) of mean 0, each flipped and moved ("flip+crop", either, or "none") as its 64 random
    bits say."""
    import torch
    import torch.nn.functional as F

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
