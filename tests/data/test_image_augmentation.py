"""Augmentations by name: what may be asked for, that every image and batch has random numbers of its own, and that
images and soft labels fit each other, with each library that loads."""

import hashlib
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbell.data import ImageBatches, ImageDataset, image_libraries, prepare_images
from bitbell.data.image_augmentation import PARTS, Augmentation, Augmenter, library_of
from bitbell.data.image_batches import augment
from bitbell.data.image_input import ImageInput
from bitbell.data.image_libraries import LIBRARIES, Library, find_library
from bitbell.data.shuffle import draw


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    try:
        return find_library(request.param).name
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    pytest.importorskip("sklearn")
    return prepare_images("digits", tmp_path_factory.mktemp("images") / "digits", size=8)


def augmenter(how: str, library: str, size: int = 16, channels: int = 3, classes: int = 10) -> Augmenter:
    of = ImageInput(size, channels, (0.5,) * channels, (0.25,) * channels)
    return Augmenter(Augmentation.parse(how), of, classes=classes, seed=0, library=library)


# Names ---------------------------------------------------------------------------------------------------------------


def test_parts_are_applied_in_one_order_with_their_numbers() -> None:
    how = Augmentation.parse("cutmix+erasing:probability=0.5+flip+randaugment:magnitude=5,operations=1+crop")
    assert list(how.parts) == ["flip", "crop", "randaugment", "erasing", "cutmix"]
    assert how.parts["randaugment"] == {"operations": 1, "magnitude": 5}
    assert how.parts["erasing"] == {"probability": 0.5}
    assert (how.own, how.needs_library, how.mixes) == ("flip+crop", True, True)
    assert Augmentation.parse("none").parts == {}
    assert Augmentation.parse("crop+flip") == Augmentation.parse("flip+crop")
    assert not Augmentation.parse("flip+crop").needs_library
    assert Augmentation.parse("imagenet") == Augmentation.parse("resized-crop+flip")
    assert {"randaugment", "erasing", "mixup", "cutmix"} < Augmentation.parse("deit").parts.keys()
    assert library_of("flip+crop", "no library is looked for") is None


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("mixip", r"augment must be of none, imagenet, deit, flip, .*cutmix, joined by \+.* Did you mean 'mixup'\?"),
        ("", "augment must be of none"),
        ("flip+", "augment must be of none"),
        ("flip+none", "none stands alone"),
        ("deit+crop", r"deit stands alone, being resized-crop\+flip\+randaugment"),
        ("flip+flip", "augment has flip twice"),
        ("crop+resized-crop", "takes crop or resized-crop, not both"),
        ("trivialaugment+randaugment", "takes randaugment or trivialaugment, not both"),
        ("flip:share=1", "flip takes no options, not 'share'"),
        ("mixup:beta=1", "mixup takes alpha, not 'beta'"),
        ("mixup:", "mixup takes alpha, not ''"),
        ("mixup:alpha=1,alpha=1", "mixup has alpha twice"),
        ("mixup:alpha=0", "alpha of mixup must be a number from 0.01 to 100, got '0'"),
        ("mixup:alpha=nan", "alpha of mixup must be a number"),
        ("cutmix:alpha", "alpha of cutmix must be a number from 0.01 to 100, got ''"),
        ("randaugment:magnitude=9.5", "magnitude of randaugment must be a whole number from 1 to 29, got '9.5'"),
        ("erasing:probability=2", "probability of erasing must be a number from 0 to 1"),
    ],
)
def test_what_cannot_be_asked_for(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong) as caught:
        Augmentation.parse(text)
    assert f"augment={text!r}" in str(caught.value)


@given(st.text(alphabet="cropflip+-:=,.019mixuerazng", max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_text_is_parsed_or_refused(text: str) -> None:
    refused, parts = "augment", {}
    try:
        parts = Augmentation.parse(text).parts
    except ValueError as error:
        refused = str(error)
    assert refused.startswith("augment")
    assert parts.keys() <= PARTS.keys()


# Random numbers ------------------------------------------------------------------------------------------------------


def test_crop_and_flip_draw_what_they_always_drew() -> None:
    """The published runs were trained with these: the digest is from before there were others."""
    images = torch.arange(6 * 3 * 16 * 16, dtype=torch.float32).view(6, 3, 16, 16)
    moved = augment(images, "flip+crop", [draw(7, 1, place) for place in range(6)])
    assert hashlib.sha256(moved.numpy().tobytes()).hexdigest()[:16] == "c7c07ad89e605cbe"


def test_crop_moves_what_flip_has_mirrored(digits: ImageDataset) -> None:
    """In the order of the parts, however they are written; the other way round they give something else."""
    numbers = [draw(0, 1, place) for place in range(40, 48)]
    plain = ImageBatches(digits, batch_size=8).batch(5)[0]
    both = ImageBatches(digits, batch_size=8, augment="crop+flip").batch(5)[0]
    assert torch.equal(both, augment(augment(plain, "flip", numbers), "crop", numbers))
    assert not torch.equal(both, augment(augment(plain, "crop", numbers), "flip", numbers))


@pytest.mark.parametrize("how", ["imagenet", "randaugment", "trivialaugment", "erasing", "mixup", "cutmix", "deit"])
def test_a_batch_is_a_function_of_its_step_whatever_the_ranks(digits: ImageDataset, how: str, library: str) -> None:
    def batch(step: int, size: int = 12, **options: int) -> tuple[torch.Tensor, torch.Tensor]:
        return ImageBatches(digits, batch_size=size, augment=how, library=library, **options).batch(step)

    before = torch.get_rng_state()
    images, labels = batch(5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)  # what others draw makes no difference
    again = batch(5)
    for size, world in ((4, 3), (1, 12)):
        shares = [batch(5, size, rank=rank, world_size=world) for rank in range(world)]
        assert torch.equal(torch.cat([share[0] for share in shares]), images)
        assert torch.equal(torch.cat([share[1] for share in shares]), labels)
    plain, classes = ImageBatches(digits, batch_size=12).batch(5)
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    assert images.shape == plain.shape
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    assert not torch.equal(images, plain)
    assert not torch.equal(batch(5, seed=1)[0], images)
    if not Augmentation.parse(how).mixes:
        assert torch.equal(labels, classes)


@pytest.mark.parametrize("how", ["resized-crop", "randaugment", "trivialaugment", "erasing:probability=1"])
def test_an_image_is_changed_by_its_place_not_by_its_neighbours(how: str, library: str) -> None:
    images, of = torch.randn(4, 3, 16, 16).clamp(-2, 2), augmenter(how, library)
    changed = of.images(images, [0, 1, 2, 3])
    assert torch.equal(of.images(images[2:], [2, 3]), changed[2:])
    many = of.images(images[:1].expand(16, -1, -1, -1), list(range(16)))
    assert len({tuple(image.flatten().tolist()) for image in many}) > 4


# What is done --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("how", ["randaugment:operations=3,magnitude=20", "trivialaugment"])
def test_changed_pixels_are_pixels(how: str, channels: int, library: str) -> None:
    images = torch.rand(40, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    changed = augmenter(how, library, channels=channels).images((images - 0.5) / 0.25, list(range(40))) * 0.25 + 0.5
    assert changed.shape == images.shape
    assert changed.min() >= -1e-5
    assert changed.max() <= 1 + 1e-5


def test_a_resized_crop_shows_a_part_of_the_image(library: str) -> None:
    """Of a horizontal ramp: what is left of it rises still, less steeply."""
    ramp = torch.linspace(-1, 1, 16).expand(8, 1, 16, 16)
    parts = augmenter("resized-crop:scale=0.1", library, channels=1).images(ramp, list(range(8)))
    assert (parts.diff(dim=-1) >= -1e-6).all()
    width = parts[..., -1].amax((1, 2)) - parts[..., 0].amin((1, 2))
    assert width.min() < 1
    whole = augmenter("resized-crop:scale=1", library, channels=1).images(ramp[:1], [0])
    torch.testing.assert_close(whole, ramp[:1], atol=0.2, rtol=0)


def test_erasing_leaves_the_mean_colour_in_a_rectangle(library: str) -> None:
    images = torch.ones(30, 3, 16, 16)
    erased = augmenter("erasing:probability=1", library).images(images, list(range(30))).eq(0)
    assert torch.equal(erased.any(1), erased.all(1))
    for image in erased.any(1):
        rows, columns = image.any(1), image.any(0)
        assert torch.equal(image, rows[:, None] & columns[None])
        assert 0 < image.sum() < 16 * 16 / 2
    left = augmenter("erasing:probability=0.25", library).images(torch.ones(200, 1, 4, 4), list(range(200)))
    assert 25 < int(left.flatten(1).eq(0).any(1).sum()) < 75


@pytest.mark.parametrize("how", ["mixup", "cutmix", "mixup+cutmix", "mixup:alpha=0.1", "cutmix:alpha=5"])
def test_labels_are_mixed_as_images_are(how: str, library: str) -> None:
    """Every image has one value, its class, so that the mean of a mixture is the mean of its soft label."""
    labels = torch.tensor([3, 0, 7, 7, 9, 1])
    images = labels.float().view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()
    of, seen = augmenter(how, library), set()
    for step in range(12):
        mixed, soft = of.mix(images, labels, step)
        assert soft.shape == (6, 10)
        assert soft.dtype == torch.float32
        torch.testing.assert_close(soft.sum(1), torch.ones(6))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(10.0), atol=1e-4, rtol=1e-4)
        others = soft.clone()
        others[torch.arange(6), labels] = 0
        assert all(others[row].nonzero().flatten().tolist() in ([], [int(labels[row - 1])]) for row in range(6))
        seen.add(round(float(soft[0, 3]), 4))
        if how == "cutmix:alpha=5":
            assert set(mixed[0].unique().tolist()) <= {3.0, 1.0}
    assert len(seen) > 4


def test_mixup_and_cutmix_take_turns(library: str) -> None:
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 16, 16).contiguous()
    of = augmenter("mixup+cutmix", library)
    pixels = [of.mix(images, torch.tensor([0, 1]), step)[0].unique().tolist() for step in range(40)]
    pasted = [set(values) <= {0.0, 1.0} for values in pixels]
    assert 8 < sum(pasted) < 32


# Libraries -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    image_libraries._load.cache_clear()
    yield monkeypatch
    image_libraries._load.cache_clear()


def missing(error: Exception) -> Callable[[], Library]:
    def load() -> Library:
        raise error

    return load


def test_a_library_that_is_missing_is_named_with_its_extra(digits: ImageDataset, without: pytest.MonkeyPatch) -> None:
    without.setattr(image_libraries, "_Kornia", missing(ImportError("No module named 'kornia'")))
    broken = RuntimeError("operator torchvision::nms does not exist")
    without.setattr(image_libraries, "_Torchvision", missing(broken))
    with pytest.raises(ValueError, match=r"neither loads. Install kornia with: pip install 'bitbell\[vision\]'"):
        ImageBatches(digits, batch_size=4, augment="imagenet")
    with pytest.raises(ValueError, match=r"augment_library=kornia: .*No module named 'kornia'.*'bitbell\[vision\]'"):
        find_library("kornia")
    with pytest.raises(ValueError, match=r"torchvision: the package does not load beside PyTorch .*nms does not exist"):
        find_library("torchvision")
    with pytest.raises(ValueError, match="must be auto, torchvision or kornia, got augment_library='timm'"):
        find_library("timm")
    assert ImageBatches(digits, batch_size=4, augment="flip+crop").library is None


def test_a_batch_of_one_has_nothing_to_mix(digits: ImageDataset) -> None:
    with pytest.raises(
        ValueError, match="augment='mixup' mixes the images of a batch, and batch_size=1 leaves nothing"
    ):
        ImageBatches(digits, batch_size=1, augment="mixup")
