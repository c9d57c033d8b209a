"""A run of two steps, and models packed from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitbell
from bitbell.models import PRESETS
from bitbell.models.presets import Preset


@pytest.fixture(autouse=True)
def compare_bits(reference_kernels: None) -> None:
    """Logits are compared bit by bit."""


@pytest.fixture(scope="session")
def micro() -> Iterator[None]:
    PRESETS["micro"] = Preset(layers=2, width=64, heads=2, feed_forward=128, learning_rate=4e-3, tokens=1e4)
    yield
    del PRESETS["micro"]


@pytest.fixture(scope="session")
def run(micro: None, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a LLaMA over the byte tokenizer. Read only."""
    out = tmp_path_factory.mktemp("runs") / "bbq"
    settings: dict[str, Any] = {"batch_size": 2, "sequence_length": 32, "steps": 2, "final_windows": 2, "seed": 7}
    bitbell.train(
        bitbell.TrainConfig(
            data=str(small_data), out=str(out), preset="micro", recipe="bbq-w2a2", device="cpu", **settings
        )
    )
    return out


@pytest.fixture(scope="session")
def directory(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, packed by the command. Read only."""
    from bitbell.cli.main import main

    out = tmp_path_factory.mktemp("packed") / "bbq"
    assert main(["pack", str(run), str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    return torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(3))
