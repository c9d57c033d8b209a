"""Sweeps of a model that trains in milliseconds, and sweeps whose runs are made up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitbell.comparison.folder import SweepFolder
from bitbell.comparison.sweep import Sweep, Trial
from bitbell.models.presets import PRESETS, Preset

MICRO = Preset(layers=1, width=32, heads=2, feed_forward=64, learning_rate=4e-3, tokens=1e4, vocabulary=300)


@pytest.fixture(autouse=True)
def micro_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "micro", MICRO)


@pytest.fixture
def values(small_data: Path) -> dict[str, Any]:
    """Plain values of a small sweep."""
    return {
        "methods": ["none", "bbq"],
        "bits": [2],
        "seeds": [0, 1],
        "learning_rates": [1e-3, 4e-3],
        "train": {
            "data": str(small_data),
            "preset": "micro",
            "steps": 3,
            "batch_size": 2,
            "sequence_length": 16,
            "evaluate_windows": 2,
            "final_windows": 4,
            "log_every": 1,
        },
    }


@pytest.fixture
def finish() -> Callable[..., None]:
    """Make up how a trial ended: a finished run with a loss, or another status."""
    return make_up_run


def make_up_run(folder: SweepFolder, sweep: Sweep, trial: Trial, loss: float = 3.0, status: str = "finished") -> None:
    """Write a run folder as training and the sweep would have left it."""
    run = folder.run(trial)
    run.mkdir(parents=True, exist_ok=True)
    note = {"status": status, "message": "" if status == "finished" else "at step 7", "seconds": 10.0}
    (run / "outcome.json").write_text(json.dumps(note))
    config = sweep.config(trial, folder.runs).to_dict()
    (run / "config.json").write_text(json.dumps(config))
    events = [{"event": "train", "step": step, "loss": loss + 1 / step, "seconds": float(step)} for step in range(1, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if status == "finished":
        bits = int(trial.setting.bits[1]) if trial.setting.bits else None
        summary = {
            "name": trial.name,
            "method": trial.setting.label if bits else None,
            "weight_bits": bits,
            "activation_bits": bits,
            "steps": 8,
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": loss / 2,
            "weight_entropy": bits and 0.9 * bits,
            "activation_entropy": bits and 0.8 * bits,
            "bytes": 4_000_000,
            "packed_bytes": bits and 500_000,
            "seconds_per_step": 0.25,
        }
        (run / "summary.json").write_text(json.dumps(summary))
