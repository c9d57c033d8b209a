"""Image classifiers through the same loop: they learn, stop and go on, pack, verify; data and preset must fit."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bitbell
from bitbell.data import ImageDataset, prepare_images
from bitbell.evaluation import evaluate_images
from bitbell.evaluation.classification import image_batches, score_of, sum_scores
from bitbell.models import build_model
from bitbell.training import TrainConfig, train
from bitbell.training.journal import read_metrics
from bitbell.training.run import load_run
from bitbell.training.tasks import open_task

pytest.importorskip("sklearn")
Make = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    return prepare_images("digits", tmp_path_factory.mktemp("images") / "digits", size=8)


@pytest.fixture
def make(digits: ImageDataset, tmp_path: Path) -> Make:
    def config(name: str = "run", **changes: Any) -> TrainConfig:
        base: dict[str, Any] = {"preset": "vit-micro", "recipe": "bbq-vision-w2a2", "steps": 6, "batch_size": 16}
        base |= {"precision": "float32", "tensorboard": False, "evaluate_every": 3, "augment": "crop"}
        return TrainConfig(data=str(digits.path), out=str(tmp_path / name), **(base | changes))

    return config


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_run(run)[0].state_dict()


@pytest.mark.parametrize("preset", ["resnet-micro", "vit-micro"])
def test_a_run_is_evaluated_packed_and_verified(make: Make, preset: str, digits: ImageDataset, tmp_path: Path) -> None:
    result = train(make(preset=preset, label_smoothing=0.1))
    assert result.status == "finished"
    summary, metrics = result.summary, read_metrics(result.run / "metrics.jsonl")
    assert summary["images_seen"] == 6 * 16
    assert summary["recipe"] == "bbq-vision-w2a2"
    assert 0 <= summary["accuracy"] <= summary["accuracy_top5"] <= 1
    assert [event["step"] for event in metrics if event["event"] == "valid"] == [3, 6]
    assert all("images_per_second" in event for event in metrics if event["event"] == "train")
    model, config, step = load_run(result.run)
    assert (config.preset, step) == (preset, 6)
    assert model.config.id2label[9] == "9"
    again = evaluate_images(model, digits, batch_size=16)
    assert again.loss == pytest.approx(summary["loss"], abs=1e-6)
    assert again.accuracy == summary["accuracy"]
    packed = bitbell.pack(model)
    assert bitbell.verify(model, packed).logit_difference < 1e-6
    loaded = bitbell.load(packed.save(tmp_path / "packed"))
    assert evaluate_images(loaded, digits, batch_size=16).loss == pytest.approx(summary["loss"], abs=1e-3)


def test_a_stopped_run_goes_on_to_the_same_numbers(make: Make) -> None:
    whole = train(make("whole", preset="resnet-micro", augment="flip+crop"))
    half = make("half", preset="resnet-micro", augment="flip+crop", stop_after=4)
    assert train(half).status == "stopped"
    continued = train(make("half", preset="resnet-micro", augment="flip+crop"))
    ours, theirs = tensors(continued.run), tensors(whole.run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert continued.summary["loss"] == whole.summary["loss"]


def test_fogzo_and_accumulation_work_on_images(make: Make) -> None:
    result = train(make(steps=3, fogzo=True, fogzo_start=0.0, accumulation=2, preset="resnet-micro", recipe="bbq-w2a2"))
    assert any("fogzo_agreement" in event for event in read_metrics(result.run / "metrics.jsonl"))


@pytest.fixture
def library() -> str:
    from bitbell.data.image_libraries import find_library

    try:
        return find_library().name
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("augment", ["deit", "trivialaugment+crop"])
def test_a_stopped_run_with_a_library_goes_on_to_the_same_numbers(make: Make, augment: str, library: str) -> None:
    options = {"preset": "resnet-micro", "augment": augment, "accumulation": 2, "label_smoothing": 0.1}
    whole = train(make("whole", **options))
    assert train(make("half", **options, stop_after=4)).status == "stopped"
    continued = train(make("half", **options))
    ours, theirs = tensors(continued.run), tensors(whole.run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    kept = json.loads((whole.run / "config.json").read_text())
    assert (kept["augment"], kept["augment_library"], kept["augmented_by"]) == (augment, "auto", library)
    assert kept["versions"][library] != "not installed"


def test_another_augmentation_or_library_is_refused_on_resume(
    make: Make, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"preset": "resnet-micro", "augment": "erasing"}
    train(make(**options, stop_after=2))
    train(make(**options, augment_library=library, stop_after=3))  # which it was anyway
    with pytest.raises(ValueError, match="augment was 'erasing', is 'erasing:probability=1'"):
        train(make(**(options | {"augment": "erasing:probability=1"})))
    with pytest.raises(ValueError, match=f"augment was 'erasing', is 'flip'; augment_library was '{library}', is None"):
        train(make(**(options | {"augment": "flip"})))
    from bitbell.data.image_libraries import find_library

    monkeypatch.setattr(type(find_library(library)), "name", "another")
    with pytest.raises(ValueError, match=rf"\(augment_library was '{library}', is 'another'\)"):
        train(make(**options))


def test_the_loss_of_mixed_labels_is_that_of_their_parts(make: Make, library: str) -> None:
    """Smoothing included: cross entropy is linear in the target."""
    world: Any = SimpleNamespace(rank=0, size=1)
    task = open_task(make(augment="mixup", label_smoothing=0.1), world)
    _, soft = task.batch(0)
    logits = torch.randn(16, 10)
    each = torch.stack([torch.stack([task.loss(x[None], torch.tensor([y])) for y in range(10)]) for x in logits])
    torch.testing.assert_close(task.loss(logits, soft), (each * soft).sum(1).mean())
    assert int((soft > 0).sum()) > 16


def test_validation_sees_images_as_they_are(make: Make, library: str) -> None:
    result = train(make(preset="resnet-micro", recipe="none", augment="deit", label_smoothing=0.1))
    model = load_run(result.run)[0]
    images, labels = ImageDataset.open(make().data).images("valid", slice(None))
    loss = torch.nn.functional.cross_entropy(model(images).logits, labels)
    assert result.summary["loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_fogzo_probes_on_mixed_images(make: Make, library: str) -> None:
    options: dict[str, Any] = {"steps": 2, "fogzo": True, "fogzo_start": 0.0, "preset": "resnet-micro"}
    result = train(make(**options, recipe="bbq-w2a2", augment="mixup+cutmix", precision="bfloat16"))
    assert any("fogzo_agreement" in event for event in read_metrics(result.run / "metrics.jsonl"))


def test_a_bad_number_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = ImageDataset.images, []

    def broken(self: ImageDataset, split: str, places: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = original(self, split, places)
        calls.append(split)
        return images * (torch.nan if len(calls) > 2 else 1.0), labels  # calibration and one step are whole

    monkeypatch.setattr(ImageDataset, "images", broken)
    with pytest.raises(
        bitbell.training.TrainingDiverged, match="the loss is nan at step 2, first in the output of vit"
    ):
        train(make())


def test_data_and_preset_must_fit_each_other(make: Make, small_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preset=tiny is a model of text, and .*digits is a data set of images"):
        train(make(preset="tiny"))
    text = TrainConfig(data=str(small_data), out=str(tmp_path / "text"), preset="resnet10")
    with pytest.raises(ValueError, match=r"preset=resnet10 is a model of images, and .* is a data set of text"):
        train(text)
    with pytest.raises(ValueError, match="image_size must be a multiple of the 16 pixels of a patch, got 8"):
        train(make(preset="vit-tiny"))
    with pytest.raises(ValueError, match=r"augment must be of none, .* Did you mean 'randaugment'"):
        make(augment="randaugmnt")
    with pytest.raises(
        ValueError, match="augment_library must be auto, torchvision or kornia, got augment_library='x'"
    ):
        make(augment_library="x")
    for name, value in (("augment", "mixup"), ("label_smoothing", 0.1)):
        text = TrainConfig(data=str(small_data), out=str(tmp_path / "text"), preset="tiny", **{name: value})
        with pytest.raises(ValueError, match=f"{name} is of images, and preset=tiny is a model of text"):
            train(text)
    with pytest.raises(ValueError, match="label_smoothing must be from 0 up to but without 1"):
        make(label_smoothing=1.0)


def test_another_image_set_is_refused_on_resume(make: Make, tmp_path: Path) -> None:
    train(make(stop_after=2))
    other = prepare_images("digits", tmp_path / "other", size=8, seed=3)
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        train(TrainConfig(**(make().to_dict() | {"data": str(other.path)})))
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    mean, std = (kept["images"].pop(name) for name in ("mean", "std"))
    assert 0 < mean[0] < 1
    assert 0 < std[0] < 1
    assert kept["images"] == {"classes": list("0123456789"), "size": 8, "channels": 1}


def test_shares_of_the_validation_add_up_to_the_whole(make: Make) -> None:
    """What each of two processes sums, before they exchange anything."""
    model = bitbell.build_model("resnet-micro", labels=10, channels=1)

    def sums(rank: int, size: int, images: int) -> torch.Tensor:
        world = SimpleNamespace(rank=rank, size=size, sum=lambda values: values)
        task: Any = open_task(make(batch_size=16), world)  # type: ignore[arg-type]
        assert torch.equal(task.batch(3)[0], open_task(make(batch_size=16), world).batch(3)[0])  # type: ignore[arg-type]
        return torch.tensor(task._sums(model, images, torch.float32), dtype=torch.float64)

    parts, whole = [sums(rank, 2, 40) for rank in (0, 1)], sums(0, 1, 40)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=1e-6)
    assert parts[0][3] == parts[1][3] == 20
    odd = [sums(rank, 2, 41) for rank in (0, 1)]  # both measure the last one
    torch.testing.assert_close(odd[0] - parts[0], sums(0, 1, 41) - whole, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(odd[1] - parts[1], odd[0] - parts[0], rtol=1e-6, atol=1e-5)
    with pytest.raises(ValueError, match="must be a multiple of their number, 3; got batch_size=16"):
        sums(0, 3, 40)


# Scores --------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_a_model_that_knows(digits: ImageDataset) -> None:
    """A model that gives the right class a logit of 3 in one half of the images, and the second place in the other."""
    batches = list(image_batches(digits, "valid", 50))
    answers = {
        tuple(x.flatten().tolist()): int(y) for images, labels in batches for x, y in zip(images, labels, strict=True)
    }

    class Oracle(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(len(images), 10)
            for row, image in zip(logits, images, strict=True):
                label = answers[tuple(image.flatten().tolist())]
                row[label], row[(label + 1) % 10] = 3.0, 4.0 if label % 2 else 0.0
            return logits

    labels = torch.cat([labels for _, labels in batches])
    score = score_of(sum_scores(Oracle(), batches, torch.float32))
    assert score.images == digits.num_images("valid") == len(labels)
    assert score.accuracy == pytest.approx(float((labels % 2 == 0).float().mean()))
    assert score.accuracy_top5 == 1
    expected = torch.nn.functional.cross_entropy(torch.cat([Oracle()(x) for x, _ in batches]), labels)
    assert score.loss == pytest.approx(float(expected), rel=1e-6)
    few = list(image_batches(digits, "valid", 7, limit=20))
    assert [len(labels) for _, labels in few] == [7, 7, 6]
    assert torch.equal(
        torch.cat([x for x, _ in few]), torch.cat([x for x, _ in image_batches(digits, "valid", 20, 20)])
    )
    with pytest.raises(ValueError, match="there are no images"):
        score_of([0.0, 0.0, 0.0, 0.0])


def test_a_model_of_other_classes_or_channels_is_refused(digits: ImageDataset) -> None:
    with pytest.raises(ValueError, match="the data has 10 classes, the model 3"):
        evaluate_images(build_model("vit-micro", labels=3, channels=1), digits)
    with pytest.raises(ValueError, match="images have 1 channels, the model takes 3"):
        evaluate_images(build_model("vit-micro", labels=10), digits)


def test_data_prepared_otherwise_are_normalised_as_in_training_or_refused(make: Make, tmp_path: Path) -> None:
    """Another image set has statistics of its own, which the model has never seen."""
    image = pytest.importorskip("PIL.Image")
    result = train(make(preset="resnet-micro"))
    model, config, _ = load_run(result.run)
    digits = ImageDataset.open(config.data)
    source, dataset = tmp_path / "source", digits.description
    for split, images in dataset.splits.items():
        pixels = digits.pixels(split, slice(None))
        labels = digits.images(split, slice(None))[1].tolist()
        for place in range(images.images if split == "valid" else 40):
            folder = source / split / digits.classes[labels[place]]
            folder.mkdir(parents=True, exist_ok=True)
            image.fromarray(pixels[place, ..., 0]).save(folder / f"{place}.png")
    other = prepare_images(source, tmp_path / "other", size=8, channels=1)
    assert other.input.mean != digits.input.mean
    expected = evaluate_images(model, digits, batch_size=16)
    assert evaluate_images(model, other, batch_size=16).loss == pytest.approx(expected.loss, rel=1e-6)
    with pytest.raises(
        ValueError, match="images are 16 x 16, the model was trained on 8 x 8; make them again with --size 8"
    ):
        evaluate_images(model, prepare_images("digits", tmp_path / "large", size=16))
    for split in ("train", "valid"):
        (source / split / "9").rename(source / split / "nine")
    with pytest.raises(ValueError, match="the data has other classes than the model: 'nine' where the model has '9'"):
        evaluate_images(model, prepare_images(source, tmp_path / "named", size=8, channels=1))
