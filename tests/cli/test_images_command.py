"""`bitbell images`, and the way from an image set to a verified packed classifier."""

from pathlib import Path

import pytest

from bitbell.cli.main import main


def test_from_digits_to_a_verified_classifier(
    tmp_path: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    data, run, packed = (str(tmp_path / name) for name in ("data", "run", "packed"))
    assert main(["images", "digits", "--out", data, "--size", "8"]) == 0
    assert "10 classes, 8 x 8 x 1" in capsys.readouterr().out
    options = ["--steps", "3", "--batch-size", "16", "--precision", "float32", "--augment", "crop"]
    options += ["--preset", "resnet-micro", "--recipe", "bbq-vision-w2a2"]
    assert main(["train", "--data", data, "--out", run, *options]) == 0
    assert main(["pack", run, packed]) == 0
    assert "validation accuracy" in (Path(packed) / "README.md").read_text()
    capsys.readouterr()
    assert main(["verify", run, packed]) == 0
    out = capsys.readouterr().out
    assert "verified 5 layers" in out
    assert "over 64 images" in out
    assert main(["evaluate", packed, "--data", data, "--limit", "32"]) == 0
    out = capsys.readouterr().out
    assert "over 32 images" in out
    assert "accuracy" in out
    assert main(["evaluate", run, "--json"]) == 0
    assert '"accuracy_top5"' in capsys.readouterr().out
    for arguments in (["generate", run, "--prompt", "a"], ["generate", packed, "--prompt", "a"], ["bench", packed]):
        assert main(arguments) == 1
        assert "is a ResNetForImageClassification, which makes no text" in capsys.readouterr().err
    assert main(["evaluate", packed, "--data", str(small_data)]) == 1
    assert "is a ResNetForImageClassification, which makes no text" in capsys.readouterr().err
    assert main(["evaluate", packed, "--data", data, "--limit", "0"]) == 1
    assert "limit must be at least 1" in capsys.readouterr().err


def test_skipped_images_are_named_and_mistakes_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    for name in ("a", "b"):
        (tmp_path / "source" / name).mkdir(parents=True)
        for index in range(12):
            image.new("L", (5, 5), index).save(tmp_path / "source" / name / f"{index}.png")
    (tmp_path / "source" / "a" / "bad.png").write_text("x")
    command = ["images", str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--size", "4"]
    assert main([*command, "--valid-fraction", "0.3"]) == 0
    out = capsys.readouterr().out
    assert "skipped a/bad.png: UnidentifiedImageError" in out
    assert "skipped 1 in all, listed in" in out
    assert main([*command, "--overwrite", "--on-error", "fail"]) == 1
    assert "a/bad.png cannot be decoded" in capsys.readouterr().err
    assert main(command) == 1
    assert "holds an image set already" in capsys.readouterr().err
