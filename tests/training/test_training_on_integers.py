"""Runs with an integer forward: the losses of fake quantization, from the configuration to the packed model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitbell
from bitbell.kernels import native
from bitbell.layers import QuantLinear, quantized_layers
from bitbell.training import TrainConfig, load_run, train
from bitbell.training.journal import read_metrics

Make = Callable[..., TrainConfig]


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in read_metrics(run / "metrics.jsonl") if event["event"] == "train"]


def run(make: Make, tmp_path: Path, name: str, **fields: Any) -> list[float]:
    return losses(train(make(out=str(tmp_path / name), evaluate_windows=2, final_windows=2, **fields)).run)


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "quest-w4a4", "lsq-plus-w2a2"])
def test_losses_in_float32_are_those_of_fake_quantization(make_config: Make, tmp_path: Path, recipe: str) -> None:
    fields = {"recipe": recipe, "precision": "float32", "steps": 12, "learning_rate": 1e-3}
    fake = run(make_config, tmp_path, "fake", **fields)
    exact = run(make_config, tmp_path, "exact", integer_forward=True, **fields)
    assert fake[-1] < fake[0] - 0.1
    # A rounding now and then turns a code over; the first steps have not seen many.
    assert exact[:3] == pytest.approx(fake[:3], rel=1e-4)
    assert exact == pytest.approx(fake, rel=5e-3)


def test_compact_and_bfloat16_learn_as_well(make_config: Make, tmp_path: Path) -> None:
    fields = {"steps": 12, "precision": "bfloat16", "learning_rate": 1e-3}
    fake = run(make_config, tmp_path, "fake", **fields)
    for name, how in (("exact", {}), ("compact", {"compact": True})):
        assert run(make_config, tmp_path, name, integer_forward=True, **how, **fields) == pytest.approx(fake, rel=0.02)


def test_a_stopped_run_goes_on_and_its_model_is_packed(make_config: Make, tmp_path: Path) -> None:
    whole = run(make_config, tmp_path, "whole", integer_forward=True, compact=True, steps=8)
    out = {"out": str(tmp_path / "parts"), "integer_forward": True, "compact": True, "steps": 8}
    assert train(make_config(stop_after=5, **out)).status == "stopped"
    again = train(make_config(**out)).run
    assert losses(again) == whole
    model, config, _ = load_run(again)
    assert config.integer_forward
    assert all(layer.integer_forward for _, layer in quantized_layers(model))
    bitbell.verify(model, bitbell.pack(model))
    with pytest.raises(ValueError, match="integer_forward was True, is False"):
        train(make_config(out=out["out"], steps=8))


def test_the_configuration_refuses_compact_alone(make_config: Make) -> None:
    with pytest.raises(ValueError, match="compact must be left out without integer_forward"):
        make_config(compact=True)
    with pytest.raises(ValueError, match="integer_forward needs even levels"):
        train(make_config(recipe="nf-w4a4", integer_forward=True))


def test_threads_do_not_change_a_bit() -> None:
    x = torch.randn(64, 128)
    found = []
    for threads in (1, 3):
        native.set_threads(threads)
        try:
            torch.manual_seed(0)
            layer = QuantLinear(128, 64, "bbq-w2a2")
            layer.weight_quantizer.calibrate(layer.weight)
            layer.activation_quantizer.calibrate(x)
            layer.multiply_integers()
            layer(x).square().sum().backward()
            found.append(layer.weight.grad)
        finally:
            native.set_threads(None)
    assert torch.equal(*found)
