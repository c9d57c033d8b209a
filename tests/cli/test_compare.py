"""`bitbell compare`: flags over a file, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import bitbell.training
from bitbell.cli.main import main
from bitbell.models.presets import PRESETS, Preset
from bitbell.training import TrainConfig, train

MICRO = Preset(layers=1, width=32, heads=2, feed_forward=64, learning_rate=4e-3, tokens=1e4, vocabulary=300)


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "micro", MICRO)
    monkeypatch.setattr("bitbell.comparison.page.make_page", lambda folder, sweep: "")


@pytest.fixture
def flags(small_data: Path) -> list[str]:
    return [
        *("compare", "--data", str(small_data), "--preset", "micro", "--steps", "2", "--methods", "none", "bbq"),
        *("--bits", "2", "--seeds", "0", "--learning-rates", "4e-3"),
        *("--set", "batch_size=2", "sequence-length=16", "final_windows=2", 'precision="float32"', "device=cpu"),
    ]


def test_flags_alone_make_a_sweep(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "| bbq | W2A2 | 0.004 |" in captured.out
    assert f"2 of 2 runs done: {tmp_path / 'out' / 'index.html'}" in captured.out
    assert "[2/2] bbq-w2a2-lr0.004-seed0  loss " in captured.err
    stored = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert stored["train"]["sequence_length"] == 16
    assert stored["train"]["device"] == "cpu"
    assert main(["compare", "--out", str(tmp_path / "out")]) == 0


def test_flags_win_over_the_file(small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(
        'methods = ["none", "bbq"]\nbits = [2]\nseeds = [0]\nlearning_rates = [1e-3]\n'
        f'[train]\ndata = "{small_data}"\npreset = "micro"\nsteps = 900\nbatch_size = 2\nsequence_length = 16\n'
    )
    out = tmp_path / "out"
    words = ["compare", str(file), "--out", str(out), "--methods", "none", "--steps", "2", "--set", "final_windows=2"]
    assert main(words) == 0
    stored = json.loads((out / "sweep.json").read_text())
    assert (list(stored["methods"]), stored["train"]["steps"]) == (["none"], 2)
    assert stored["train"]["batch_size"] == 2
    assert main(["compare", str(file), "--out", str(out)]) == 1
    assert "would not be comparable (steps was 2, is 900" in capsys.readouterr().err


def test_the_budget_ends_it_and_a_failure_shows_in_the_status(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: TrainConfig, *rest: Any) -> Any:
        if config.recipe == "none":
            raise RuntimeError("no luck")
        return train(config, *rest)

    out = ["--out", str(tmp_path / "out")]
    assert main([*flags, *out, "--budget", "0.000001"]) == 0
    assert "0 of 2 runs done, the budget is spent; the same command continues" in capsys.readouterr().out
    monkeypatch.setattr(bitbell.training, "train", fail)
    assert main([*flags, *out]) == 1
    captured = capsys.readouterr()
    assert "none-lr0.004-seed0 failed: RuntimeError: no luck" in captured.out
    assert "bitbell compare: failed: none-lr0.004-seed0" in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "out"], "out holds no sweep (no sweep.json in it)"),
        (["nowhere.toml", "--out", "out"], "cannot read the sweep nowhere.toml"),
        (["--out", "out", "--methods", "bbq"], "the command line: seeds is missing"),
        (["--out", "out", "--methods", "bbq", "--set", "steps"], "--set takes name=value"),
        (["--out", "out", "--methods", "bbq", "--budget", "soon"], "budget must be a positive time"),
        (["--out", "out", "--methods", "bbq", "--workers", "0"], "workers must be at least 1"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
