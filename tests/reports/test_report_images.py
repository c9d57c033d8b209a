"""Reports of image classifiers: accuracy, which classes are confused, the worst mistakes with their pictures."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitbell.data import ImageDataset, prepare_images
from bitbell.evaluation.predictions import predict
from bitbell.reports import write_report
from bitbell.reports.confusion import draw_confusion
from bitbell.reports.mistakes import mistakes_section
from bitbell.reports.predictions import read_predictions, top_confusions
from bitbell.reports.runs import read_run
from bitbell.training import TrainConfig, train
from bitbell.training.run import load_run

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")
VOID = {"meta", "br", "img", "link"}


class Balanced(HTMLParser):
    """Checks that every element is closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A full-precision and a 2-bit run on digits, unlike each other in nothing else."""
    folder = tmp_path_factory.mktemp("images")
    data = prepare_images("digits", folder / "digits", size=8).path
    options: dict[str, Any] = {"preset": "resnet-micro", "steps": 12, "batch_size": 16, "learning_rate": 8e-3}
    options |= {"precision": "float32", "tensorboard": False, "evaluate_every": 4, "data": str(data)}
    recipes = {"plain": "none", "bits": "bbq-vision-w2a2"}
    for name, recipe in recipes.items():
        train(TrainConfig(out=str(folder / name), recipe=recipe, **options))
    return {name: folder / name for name in recipes}


@pytest.fixture
def copied(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A run to be changed."""
    return shutil.copytree(runs["bits"], tmp_path / "copied")


def change(run: Path, file: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((run / file).read_text())
    (run / file).write_text(json.dumps(edit(values) or values))


def test_predictions_are_those_of_the_model(runs: dict[str, Path]) -> None:
    run = read_run(runs["bits"])
    found = read_predictions(run)
    assert found is not None
    model, config, _ = load_run(runs["bits"])
    dataset = ImageDataset.open(config.data)
    with torch.no_grad():
        images, labels = dataset.images("valid", slice(None))
        logits = model(images).logits
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    guesses = logits.argmax(-1)
    pairs = [(int(a), int(b)) for a, b in zip(labels, guesses, strict=True)]
    assert found.confusion == {pair: pairs.count(pair) for pair in set(pairs)}
    wrong = [place for place, (a, b) in enumerate(pairs) if a != b]
    assert len(found.mistakes) == min(60, len(wrong)) > 5
    assert [m.place for m in found.mistakes] == sorted(wrong, key=lambda place: -losses[place].item())[:60]
    worst = found.mistakes[0]
    assert worst.loss == pytest.approx(losses[worst.place].item(), rel=1e-5)
    assert worst.probability == pytest.approx(logits[worst.place].softmax(-1).max().item(), rel=1e-5)
    right = sum(count for (a, b), count in found.confusion.items() if a == b)
    assert right / found.images == pytest.approx(run.number("accuracy"))
    few = predict(model, dataset, limit=20, batch_size=7)
    assert sum(few.confusion.values()) == few.images == 20
    assert few.confusion == predict(model, dataset, limit=20).confusion


def test_the_page_shows_accuracy_confusions_and_mistakes(runs: dict[str, Path], tmp_path: Path) -> None:
    page = write_report(list(runs.values()), tmp_path / "out").read_text()
    Balanced(page)
    assert "http" not in page
    assert not re.findall(r'(?:src|href)="(?!#|data:image/png;base64,)', page)
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"accuracy", "accuracy_top5", "confusion-0-plain", "confusion-1-bits"} < set(numbers["plots"])
    assert numbers["units"]["accuracy"] == "share"
    summary = json.loads((runs["plain"] / "summary.json").read_text())
    row = next(row for row in numbers["runs"] if row["run"] == "plain")
    assert (row["accuracy"], row["accuracy_top5"]) == (summary["accuracy"], summary["accuracy_top5"])
    assert "perplexity" not in row
    assert f'<td class="accuracy">{100 * summary["accuracy"]:.2f}</td>' in page
    assert f"nats per image (accuracy {100 * summary['accuracy']:.2f} %) after 12 steps" in page
    assert "for 12 steps of 16 images (192 images)" in page
    assert "token" not in page.partition("Configuration of each run")[0]
    for title in ("Accuracy over training", "Top-5 accuracy over training", "Which classes are taken for which"):
        assert title in page


def test_the_pictures_of_mistakes_are_the_pixels_of_the_data(runs: dict[str, Path], tmp_path: Path) -> None:
    page = write_report([runs["bits"]], tmp_path / "out").read_text()
    shown = re.findall(r'<img class="sharp" src="data:image/png;base64,([^"]+)" alt="([^"]+)">', page)
    run = read_run(runs["bits"])
    found = read_predictions(run)
    assert found is not None
    assert len(shown) == min(24, len(found.mistakes))
    places = np.array([mistake.place for mistake in found.mistakes[:24]])
    pixels = ImageDataset.open(run.config["data"]).pixels("valid", places)
    for (code, alt), mistake, expected in zip(shown, found.mistakes, pixels, strict=False):
        assert alt == f"An image of {mistake.label}, taken for {mistake.guess}"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(code)))), expected[..., 0])


def test_runs_on_text_and_on_images_stand_in_one_report(
    runs: dict[str, Path], make_run: Callable[..., Path], tmp_path: Path
) -> None:
    page = write_report([make_run("text"), runs["bits"]], tmp_path / "out").read_text()
    Balanced(page)
    for title in ("Perplexity", "Accuracy", "Top-5 accuracy"):
        assert f">{title}<" in page
    assert 'Validation loss<span class="unit">nats</span>' in page
    assert ">Loss (nats)</text>" in page
    assert "Only runs of equal work are ranked against each other." in page


def test_large_pictures_are_scaled_down(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(runs["bits"])
    large = np.random.default_rng(0).integers(0, 255, (60, 200, 200, 3), dtype=np.uint8)
    monkeypatch.setattr("bitbell.reports.mistakes.pixels_of", lambda run, split, places: large[: len(places)])
    section = mistakes_section([run], {run.name: _any_look()})
    code = re.search(r'<img src="data:image/jpeg;base64,([^"]+)"', section)
    assert code is not None
    assert Image.open(io.BytesIO(base64.b64decode(code[1]))).size == (96, 96)


def test_many_classes_get_a_list(copied: Path, tmp_path: Path) -> None:
    names = [f"<b>kind {i}</b>" for i in range(30)]
    change(copied, "config.json", lambda config: config["images"].update(classes=names))
    confusion = [[0, 0, 5], [0, 1, 2], [7, 29, 9], [8, 8, 1]]
    change(
        copied, "predictions.json", lambda p: {"split": "valid", "images": 17, "confusion": confusion, "mistakes": []}
    )
    page = write_report([copied], tmp_path / "out").read_text()
    Balanced(page)
    assert "<b>kind" not in page
    assert re.findall(r'<th scope="row">&lt;b&gt;(kind \d+)&lt;/b&gt;', page) == ["kind 7", "kind 0"]
    assert "<td>9 of 9</td><td>100.0</td>" in page
    assert "<td>2 of 7</td><td>28.6</td>" in page
    assert "confusion-" not in json.loads((tmp_path / "out" / "report.json").read_text())["plots"]


def test_a_map_of_twenty_long_names_says_everything_in_words(runs: dict[str, Path]) -> None:
    found = read_predictions(read_run(runs["bits"]))
    assert found is not None
    names = [f"a rather long name {i}" for i in range(20)]
    picture = draw_confusion("run", replace(found, confusion={(0, 0): 1500, (0, 19): 3, (4, 4): 2}, images=1505), names)
    assert picture is not None
    assert "Most frequent mistakes: a rather long name 0 taken for a rather long name 19, 3 of 1503." in picture.alt
    assert "1502 of the 1505 images measured (99.8 %)" in picture.caption
    written = [text.get_text() for text in picture.figure.axes[0].texts]
    assert {"1.5k", "3", "2"} < set(written)
    assert draw_confusion("run", found, [*names, "one more"]) is None
    assert top_confusions(replace(found, confusion={(0, 0): 1}), names, 5) == []


def test_data_that_are_gone_or_others_are_told(copied: Path, tmp_path: Path) -> None:
    def section() -> str:
        run = read_run(copied)
        return mistakes_section([run], {run.name: _any_look()})

    assert "<img" in section()
    change(copied, "config.json", lambda config: config.update(data_fingerprint="0"))
    assert "digits is another one now." in section()
    change(copied, "config.json", lambda config: config.update(data=str(tmp_path / "gone")))
    assert f"Not shown: the image set {tmp_path / 'gone'} is not there." in section()
    change(copied, "predictions.json", lambda p: p.update(mistakes=[], confusion=[[0, 0, p["images"]]]))
    assert "It makes no mistake on the 165 images measured." in section()
    (copied / "predictions.json").unlink()
    assert section() == ""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{", "predictions.json is broken"),
        ("[]", "predictions.json is broken"),
        ('{"split": "valid", "images": 1, "confusion": [[0, 0]], "mistakes": []}', "predictions.json is broken"),
        ('{"split": "valid", "images": 1, "confusion": [[0, 10, 1]], "mistakes": []}', "of 10 classes"),
        ('{"split": "valid", "images": 2, "confusion": [[0, 0, 1]], "mistakes": []}', "counts 1 images, .* are 2"),
        (
            '{"split": "valid", "images": 1, "confusion": [[0, 1, 1]], "mistakes": [{"place": -1, "label": 0, '
            '"guess": 1, "probability": 0.5, "loss": 1.0}]}',
            "is no mistake among 10 classes",
        ),
    ],
)
def test_broken_predictions_are_named(copied: Path, wrong: str, message: str) -> None:
    (copied / "predictions.json").write_text(wrong)
    with pytest.raises(ValueError, match=message):
        read_predictions(read_run(copied))


def _any_look() -> Any:
    from bitbell.reports.drawing import INK, Look

    return Look(INK, "solid", "o")
