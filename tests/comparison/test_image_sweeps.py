"""Sweeps of image classifiers: accuracy beside the loss, which alone chooses; sweeps of text as they were."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitbell.comparison import run_sweep
from bitbell.comparison.folder import SweepFolder, open_folder, read_earlier, read_sweep
from bitbell.comparison.kinds import IMAGES, TEXT, kind_of
from bitbell.comparison.page import make_page
from bitbell.comparison.pictures import draw_all
from bitbell.comparison.plan import pending
from bitbell.comparison.results import markdown, records
from bitbell.comparison.rows import make_rows
from bitbell.comparison.sweep import Sweep, Trial
from bitbell.comparison.words import lead
from bitbell.data import prepare_images
from bitbell.reports.drawing import drawing_rules

pytest.importorskip("sklearn")
Finish = Callable[..., None]
RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_images("digits", tmp_path_factory.mktemp("images") / "digits", size=8).path


@pytest.fixture
def image_values(values: dict[str, Any], digits: Path) -> dict[str, Any]:
    train = {"data": str(digits), "preset": "resnet-micro", "steps": 3, "batch_size": 8, "augment": "crop"}
    train |= {"weight_decay": 0.05, "precision": "float32", "final_windows": 32}
    return values | {"methods": ["none", "bbq-vision", "lsq"], "train": train}


def score(folder: SweepFolder, trial: Trial, **numbers: float) -> None:
    """Give a made-up run the numbers of an image classifier."""
    file = folder.run(trial) / "summary.json"
    summary = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("perplexity", "bits_per_byte")}
    file.write_text(json.dumps(summary | numbers))


def test_a_sweep_of_classifiers_records_accuracy_and_continues(image_values: dict[str, Any], tmp_path: Path) -> None:
    image_values |= {"methods": ["none", "bbq-vision"], "learning_rates": [4e-3]}
    said: list[str] = []
    result = run_sweep(image_values, tmp_path / "out", say=said.append)
    assert (result.ended, result.done, result.failed) == ("done", 4, ())
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    for line in lines:
        assert 0 < line["accuracy"] * 32 == round(line["accuracy"] * 32) <= line["accuracy_top5"] * 32
        assert line["loss"] > 0
        assert "perplexity" not in line
    head = result.table.splitlines()[0]
    assert "| validation loss (nats/image) |" in head
    assert "| accuracy (%) | spread of accuracy (of seeds) | top-5 accuracy (%) | weight entropy (bits) |" in head
    assert "accuracy 0." in said[0]
    page = (tmp_path / "out" / "index.html").read_text()
    for title in ("Accuracy against bits", "Loss against bits", "Accuracy over training, W2A2"):
        assert f"<h3>{title}</h3>" in page
    assert "Each trains the preset resnet-micro on digits for 3 steps of 8 images (24)." in page
    config = json.loads((tmp_path / "out" / "runs" / "bbq-vision-w2a2-lr0.004-seed1" / "config.json").read_text())
    assert (config["augment"], config["weight_decay"], config["batch_size"]) == ("crop", 0.05, 8)
    assert run_sweep(None, tmp_path / "out", say=said.append).table == result.table
    assert len(said) == 4
    with pytest.raises(ValueError, match=r"would not be comparable \(augment was 'crop', is 'none'\)"):
        run_sweep(image_values | {"train": image_values["train"] | {"augment": "none"}}, tmp_path / "out")


def test_one_library_augments_in_all_of_a_sweep(image_values: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("kornia")
    values = image_values | {"train": image_values["train"] | {"augment": "mixup", "augment_library": "kornia"}}
    open_folder(tmp_path / "out", values)
    facts = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert facts["augmented_by"] == "kornia"
    (tmp_path / "out" / "sweep.json").write_text(json.dumps(facts | {"augmented_by": "torchvision"}))
    with pytest.raises(ValueError, match=r"\(augment_library was 'torchvision', is 'kornia'\)"):
        open_folder(tmp_path / "out", values)


def test_the_loss_chooses_and_the_words_tell_where_accuracy_disagrees(
    image_values: dict[str, Any], finish: Finish, tmp_path: Path
) -> None:
    folder, sweep = SweepFolder(tmp_path), Sweep.from_dict(image_values)
    none, bbq, lsq = sweep.settings
    losses = {none: 0.2, bbq: 0.3, lsq: 0.4}
    accuracies = {none: 0.95, bbq: 0.9, lsq: 0.92}
    while todo := pending(sweep, folder.look):
        for trial in todo:
            worse = trial.learning_rate == 1e-3
            finish(folder, sweep, trial, losses[trial.setting] + 0.1 * worse)
            better = 0.04 * worse + 0.02 * trial.seed  # the rate of the higher loss has the higher accuracy
            score(folder, trial, accuracy=accuracies[trial.setting] + better, accuracy_top5=0.99)
    rows = make_rows(sweep, folder.look)
    assert {row.choice.learning_rate for row in rows if row.choice} == {4e-3}
    row = next(row for row in rows if row.label == "bbq-vision")
    assert row.numbers["accuracy"] == pytest.approx(0.91)
    assert row.deviations["accuracy"] == pytest.approx(0.02 / math.sqrt(2))
    assert "| **0.3000** | 0.0000 | 2 | 91.00 | 1.41 | 99.00 |" in markdown(sweep, folder.look)
    words = lead(folder, sweep, rows)
    assert "Full precision reached 0.200 ± 0.000 nats per image (accuracy 96.00 %)." in words
    assert "With W2A2, bbq-vision is lowest: 0.300 ± 0.000 nats per image (accuracy 91.00 %), 0.100 below lsq" in words
    assert "The highest accuracy there has lsq: 93.00 %." in words
    with drawing_rules():
        pictures = {picture.name: picture for picture in draw_all(folder, sweep, rows)}
    expected = "Validation accuracy (%) by width: full precision 96.00; bbq-vision W2A2 91.00; lsq W2A2 93.00."
    assert pictures["accuracy"].alt == expected
    lines: list[Any] = [line.get_ydata() for line in pictures["accuracy"].figure.axes[0].lines]
    assert any(list(y) == pytest.approx([96.0, 96.0]) for y in lines)  # full precision, across
    assert "it chooses nothing" in make_page(folder, sweep)


def test_five_classes_have_no_top_five(image_values: dict[str, Any], finish: Finish, tmp_path: Path) -> None:
    folder, sweep = SweepFolder(tmp_path), Sweep.from_dict(image_values | {"methods": ["none"]})
    trial = pending(sweep, folder.look)[0]
    finish(folder, sweep, trial)
    score(folder, trial, accuracy=0.5)
    assert "top-5" not in markdown(sweep, folder.look)
    line = next(line for line in records(sweep, folder.look) if line["run"] == trial.name)
    assert (line["accuracy"], line["accuracy_top5"]) == (0.5, None)


def test_data_and_preset_that_do_not_fit_stop_a_sweep_before_any_work(
    image_values: dict[str, Any], small_data: Path, digits: Path, tmp_path: Path
) -> None:
    train = image_values["train"]
    for change, message in [
        ({"data": str(small_data)}, "preset=resnet-micro is a model of images, and .* is a data set of text"),
        ({"preset": "micro"}, "preset=micro is a model of text, and .*digits is a data set of images"),
        ({"preset": "vit-tiny"}, "image_size must be a multiple of the 16 pixels of a patch, got 8"),
        ({"data": str(tmp_path / "nowhere")}, "nowhere.*bitbell images"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run_sweep(image_values | {"train": train | change}, tmp_path / "out")
    with pytest.raises(ValueError, match=r"overrides\.lsq may not hold augment: it must be the same for every method"):
        run_sweep(image_values | {"overrides": {"lsq": {"augment": "none"}}}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["methods", "ablations", "estimators"])
def test_the_published_sweeps_of_text_load_as_they_were(name: str, tmp_path: Path) -> None:
    from bitbell.comparison.folder import _outcome

    sweep, _ = read_sweep(RESULTS / name)
    assert kind_of(sweep) is TEXT is not IMAGES
    lines = read_earlier(RESULTS / name / "results.jsonl")
    folder = SweepFolder(tmp_path, earlier={run: _outcome(line) for run, line in lines.items()})
    written = {line["run"]: line for line in records(sweep, folder.look)}
    assert all(written[run] == line for run, line in lines.items() if run in written)
    assert len(set(written) & set(lines)) >= 12
    assert "perplexity" in markdown(sweep, folder.look)
