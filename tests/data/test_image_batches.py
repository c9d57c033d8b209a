"""Image batches: functions of the step alone, whatever the ranks; augmentation moves and mirrors, nothing else."""

import pytest
import torch

from bitbell.data import ImageBatches, ImageDataset, prepare_images
from bitbell.data.image_batches import augment

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    return prepare_images("digits", tmp_path_factory.mktemp("images") / "digits", size=8)


@pytest.mark.parametrize("how", ["none", "crop", "flip", "flip+crop"])
def test_a_batch_is_a_function_of_its_step(digits: ImageDataset, how: str) -> None:
    def batches(**options: int) -> ImageBatches:
        return ImageBatches(digits, batch_size=8, augment=how, **options)

    (images, labels), (again, same) = batches().batch(5), batches().batch(5)
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    assert images.shape == (8, 1, 8, 8)
    assert not torch.equal(batches().batch(6)[0], images)
    assert not torch.equal(batches(seed=1).batch(5)[0], images)
    halves = [ImageBatches(digits, batch_size=4, augment=how, rank=rank, world_size=2).batch(5) for rank in (0, 1)]
    assert torch.equal(torch.cat([half[0] for half in halves]), images)
    assert torch.equal(torch.cat([half[1] for half in halves]), labels)


def test_an_epoch_shows_every_image_once(digits: ImageDataset) -> None:
    batches = ImageBatches(digits, batch_size=48)
    assert batches.steps_per_epoch == batches.num_images / 48
    seen = torch.cat([batches.batch(step)[0] for step in range(-(-batches.num_images // 48))])[: batches.num_images]
    images, _ = digits.images("train", slice(None))
    order = [sorted(map(tuple, x.flatten(1).tolist())) for x in (seen, images)]
    assert order[0] == order[1]
    assert not torch.equal(seen, images)


def test_augmentations_mirror_and_move() -> None:
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8) + 1
    assert torch.equal(augment(images, "none", [3, 4]), images)
    flipped = augment(images, "flip", [3, 4])
    assert torch.equal(flipped[0], images[0].flip(-1))
    assert torch.equal(flipped[1], images[1])
    bits = (2 << 8) | (0 << 32)  # one down: rows 1 to 8 of 0 to 9; one left of the middle
    moved = augment(images[:1], "crop", [bits])[0]
    assert torch.equal(moved[:, :7, 1:], images[0, :, 1:, :7])
    assert moved[:, 7].eq(0).all()
    assert moved[:, :, 0].eq(0).all()


def test_wrong_arguments_are_refused(digits: ImageDataset) -> None:
    with pytest.raises(ValueError, match=r"augment must be of none, .*, joined by \+, got augment='mixap'"):
        ImageBatches(digits, batch_size=4, augment="mixap")
    with pytest.raises(ValueError, match="got batch_size=0, rank=0, world_size=1"):
        ImageBatches(digits, batch_size=0)
    with pytest.raises(ValueError, match="got batch_size=1, rank=2, world_size=2"):
        ImageBatches(digits, batch_size=1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        ImageBatches(digits, batch_size=1).batch(-1)
