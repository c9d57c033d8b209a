"""`bitbell classify`: the answers of `evaluate`, for pictures of every kind, and words for files that are none."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import bitbell
from bitbell.cli.main import main
from bitbell.data import ImageDataset, prepare_images
from bitbell.data.image_input import ImageInput
from bitbell.evaluation import classify, evaluate_images, image_input_of
from bitbell.models.presets import PRESETS, Preset
from bitbell.training import TrainConfig, train
from bitbell.training.run import load_run

Image = pytest.importorskip("PIL.Image")
COLOURS = {"blue": (20, 30, 200), "green": (30, 180, 40), "red": (210, 40, 20)}


class Made(NamedTuple):
    """A source of pictures, the image set of it, a run, and its packed model."""

    source: Path
    data: Path
    run: Path
    packed: Path


def draw(name: str, index: int) -> Any:
    """A noisy picture of a class, no two of one size or mode."""
    shape = (9 + index, 17 - index, 3)
    noise = np.random.default_rng(index).normal(0, 60, shape)
    image = Image.fromarray(np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8))
    return image.convert(("RGB", "RGBA", "P", "L")[index % 4])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("classify")
    for split, places in (("train", range(8)), ("valid", range(8, 14))):
        for name in COLOURS:
            (folder / "source" / split / name).mkdir(parents=True)
            for index in places:
                draw(name, index).save(folder / "source" / split / name / f"{index:02}.png")
    data = prepare_images(folder / "source", folder / "data", size=8)
    options: dict[str, Any] = {"preset": "resnet-micro", "recipe": "bbq-vision-w2a2", "steps": 12, "batch_size": 8}
    options |= {"precision": "float32", "tensorboard": False, "learning_rate": 1e-2}
    train(TrainConfig(data=str(data.path), out=str(folder / "run"), **options))
    bitbell.pack(load_run(folder / "run")[0]).save(folder / "packed")
    return Made(folder / "source", data.path, folder / "run", folder / "packed")


def answers(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["classify", *map(str, words), "--json"]) == status
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("which", ["run", "packed"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_its_answers_are_those_of_evaluate(
    made: Made, which: str, batch_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_run(made.run)[0] if which == "run" else bitbell.load(made.packed)
    expected = evaluate_images(model, ImageDataset.open(made.data))
    files = sorted((made.source / "valid").rglob("*.png"))
    found = answers(capsys, getattr(made, which), made.source / "valid", "--batch-size", batch_size)
    assert [answer["file"] for answer in found] == list(map(str, files))
    hits, losses = 0, []
    for file, answer in zip(files, found, strict=True):
        probabilities = {guess["label"]: guess["probability"] for guess in answer["classes"]}
        assert sorted(probabilities) == sorted(COLOURS)
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
        assert math.fsum(probabilities.values()) == pytest.approx(1, abs=1e-6)
        hits += answer["classes"][0]["label"] == file.parent.name
        losses.append(-math.log(probabilities[file.parent.name]))
    assert hits / len(files) == expected.accuracy > 0.4
    assert math.fsum(losses) / len(files) == pytest.approx(expected.loss, abs=1e-5)


def test_evaluate_says_no_top_five_of_three(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(made.run)]) == 0
    out = capsys.readouterr().out
    assert "accuracy " in out
    assert "five" not in out
    assert "accuracy_top5" not in json.loads((made.run / "summary.json").read_text())


def test_the_table_has_a_line_a_picture(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    file = made.source / "valid" / "red" / "08.png"
    assert main(["classify", str(made.packed), str(file), str(file.parent), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 6
    name, *words = lines[0].split()
    assert (name, len(words)) == (str(file), 4)
    assert 1 >= float(words[1]) >= float(words[3]) >= 0
    assert {words[0], words[2]} < set(COLOURS)


def test_a_picture_of_any_mode_and_size_has_an_answer(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = np.linspace(0, 65535, 40 * 30).reshape(40, 30)
    pictures: dict[str, Any] = {
        "grey.png": Image.new("L", (40, 3), 90),
        "grey16.png": Image.fromarray(wide.astype(np.uint16)),
        "grey8-of-the-same.png": Image.fromarray(np.rint(wide / 65535 * 255).astype(np.uint8)),
        "clear.png": Image.new("RGBA", (1, 1), (0, 0, 0, 0)),
        "white.bmp": Image.new("RGB", (2000, 11), (255, 255, 255)),
        "print.jpg": Image.new("CMYK", (64, 64), (0, 255, 255, 0)),
        "dots.png": Image.new("1", (9, 9), 1),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    found = {Path(a["file"]).name: a["classes"] for a in answers(capsys, made.packed, tmp_path)}
    assert sorted(found) == sorted(pictures)
    assert found["clear.png"] == found["white.bmp"] == found["dots.png"]  # transparent pixels lie on white
    assert found["grey16.png"] == found["grey8-of-the-same.png"]


def test_what_cannot_be_read_is_named_and_the_others_have_their_answers(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (made.source / "valid" / "red" / "08.png").read_bytes()
    for name, content in {
        "a-good.png": good,
        "b-half.png": good[: len(good) // 2],
        "c-text.jpg": b"no image",
        "d-empty.png": b"",
        "f-good.png": good,
    }.items():
        (tmp_path / name).write_bytes(content)
    Image.fromarray(np.ones((9, 9), dtype=np.float32)).save(tmp_path / "e-floats.tiff")
    found = answers(capsys, made.packed, tmp_path, tmp_path / "nowhere.png", "--batch-size", 4, status=1)
    assert [("classes" in answer, answer["file"][len(str(tmp_path)) + 1 :]) for answer in found] == [
        *((True, "a-good.png"), (False, "b-half.png"), (False, "c-text.jpg"), (False, "d-empty.png")),
        *((False, "e-floats.tiff"), (True, "f-good.png"), (False, "nowhere.png")),
    ]
    assert found[0]["classes"] == found[5]["classes"]
    assert main(["classify", str(made.packed), str(tmp_path), str(tmp_path / "nowhere.png")]) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert "c-text.jpg: it cannot be read as an image (UnidentifiedImageError" in captured.err
    assert "e-floats.tiff: it cannot be read as an image (ValueError: its pixels are floats" in captured.err
    assert "nowhere.png: there is no such file" in captured.err
    assert "5 of 7 pictures could not be read" in captured.err


def test_wrong_words_are_answered(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    cases: list[tuple[list[object], str]] = [
        ([made.packed], "give at least one image, or a folder of images"),
        ([made.packed, tmp_path / "empty"], "empty has no image in it (.bmp, "),
        ([made.packed, made.source, "--top", 0], "top must be at least 1, got batch_size=1, top=0"),
        ([made.packed, made.source, "--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ([tmp_path, made.source], "is neither a run nor a packed model"),
    ]
    for words, message in cases:
        assert main(["classify", *map(str, words)]) == 1
        assert message in capsys.readouterr().err


def test_a_language_model_is_no_classifier(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    micro = Preset(layers=1, width=32, heads=2, feed_forward=64, learning_rate=4e-3, tokens=1e4, vocabulary=300)
    monkeypatch.setitem(PRESETS, "micro", micro)
    model = bitbell.quantize(bitbell.build_model("micro", vocab_size=300), "bbq-w2a2")
    bitbell.calibrate(model, torch.randint(0, 300, (2, 8)))
    bitbell.pack(model.eval()).save(tmp_path / "text")
    assert main(["classify", str(tmp_path / "text"), str(made.source)]) == 1
    assert "text: the model is no image classifier but a LlamaForCausalLM" in capsys.readouterr().err


def test_a_model_that_does_not_say_how_is_told_by_its_image_set(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made.packed, tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    config = json.loads(file.read_text())
    kept = config.pop("image_input")
    assert ImageInput.from_dict(kept) == ImageDataset.open(made.data).input
    file.write_text(json.dumps(config))
    picture = made.source / "valid" / "red" / "08.png"
    assert main(["classify", str(tmp_path / "old"), str(picture)]) == 1
    assert "take it from the image set that it was trained on (--data)" in capsys.readouterr().err
    assert answers(capsys, tmp_path / "old", picture, "--data", made.data) == answers(capsys, made.packed, picture)
    other = prepare_images(made.source, tmp_path / "grey", size=8, channels=1)
    assert main(["classify", str(tmp_path / "old"), str(picture), "--data", str(other.path)]) == 1
    assert "the data's images have 1 channels, the model takes 3" in capsys.readouterr().err
    changes: list[dict[str, Any]] = [{"std": [0, 1, 1]}, {"mean": [0.5]}, {"size": 0}, {"channels": 2}]
    wrongs: list[Any] = [7, {}, *(kept | change for change in changes)]
    for wrong in wrongs:
        file.write_text(json.dumps(config | {"image_input": wrong}))
        assert main(["classify", str(tmp_path / "old"), str(picture)]) == 1
        assert "image_input of the model's configuration is wrong" in capsys.readouterr().err


def test_in_python(made: Made) -> None:
    model = bitbell.load(made.packed)
    how = image_input_of(model)
    picture = Image.open(made.source / "valid" / "red" / "08.png")
    ((best, second),) = classify(model, how.read(picture), top=2)
    assert best.probability >= second.probability
    assert model.config.id2label[best.index] == best.label
    with pytest.raises(ValueError, match="top must be at least 1, got top=0"):
        classify(model, how.read(picture), top=0)
