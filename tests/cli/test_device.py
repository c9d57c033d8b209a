"""`--device`: every command that runs a model takes it, and says when it cannot be had."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

import bitbell
from bitbell.cli.main import main
from bitbell.models.presets import PRESETS, Preset

MICRO = Preset(layers=1, width=64, heads=2, feed_forward=128, learning_rate=4e-3, tokens=1e4, vocabulary=300)


@pytest.fixture(scope="module")
def folders(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A run, and a folder for what is packed."""
    folder = tmp_path_factory.mktemp("device")
    sizes = ["--steps", "1", "--batch-size", "2", "--sequence-length", "32", "--evaluate-windows", "1"]
    arguments = ["--preset", "micro", "--recipe", "bbq-w2a2", "--data", str(small_data), "--out", str(folder / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "micro", MICRO)
        assert main(["train", *arguments, *sizes, "--device", "cpu"]) == 0
    return str(folder / "run"), str(folder / "packed")


def commands(run: str, packed: str) -> list[list[str]]:
    return [
        ["pack", run, packed, "--overwrite"],
        ["verify", run, packed, "--limit", "1"],
        ["evaluate", packed, "--data", "", "--limit", "1"],
        ["generate", packed, "--prompt", "In", "--max-new-tokens", "2"],
        ["bench", packed, "--prompt-tokens", "4", "--new-tokens", "2", "--rounds", "1"],
    ]


def test_every_command_runs_on_the_device_it_is_told(
    folders: tuple[str, str], small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "micro", MICRO)
    monkeypatch.setattr(import_module("bitbell.serving.bench"), "STREAM_LIMITS", (1, 2))
    for command in commands(*folders):
        arguments = [str(small_data) if argument == "" else argument for argument in command]
        assert main([*arguments, "--device", "cpu"]) == 0, command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_an_error(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "micro", MICRO)
    for command in commands(*folders):
        assert main([*command, "--device", "cuda"]) == 1
        assert "PyTorch sees no GPU here" in capsys.readouterr().err
    assert main([*commands(*folders)[-1], "--device", "tpu"]) == 1
    assert "device must be auto, cpu, cuda or cuda:N, got 'tpu'" in capsys.readouterr().err


def test_load_puts_a_model_where_it_is_told(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "micro", MICRO)
    assert main(["pack", *folders, "--overwrite"]) == 0
    packed = bitbell.load(folders[1], device="meta")
    assert {t.device.type for t in packed.state_dict().values()} == {"meta"}
    assert {t.device.type for t in bitbell.load(folders[1]).state_dict().values()} == {"cpu"}
