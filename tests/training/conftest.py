"""A model small enough that a training step takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitbell.models.presets import PRESETS, Preset
from bitbell.training import TrainConfig

MICRO = Preset(layers=2, width=64, heads=2, feed_forward=128, learning_rate=4e-3, tokens=1e4, vocabulary=300)


@pytest.fixture(autouse=True)
def micro_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "micro", MICRO)
    monkeypatch.setitem(PRESETS, "micro-gpt", replace(MICRO, architecture="gpt"))


@pytest.fixture
def make_config(small_data: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A configuration of a run in `tmp_path`; any field can be given."""

    def make(**fields: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "data": str(small_data),
            "out": str(tmp_path / "run"),
            "preset": "micro",
            "steps": 20,
            "batch_size": 4,
            "sequence_length": 32,
            "evaluate_windows": 4,
            "log_every": 1,
            "entropy_every": 10,
            "evaluate_every": 10,
            "checkpoint_every": 5,
            "tensorboard": False,
        }
        return TrainConfig(**values | fields)

    return make
