"""The arithmetic of big trainings: what it counts is there in a small one, and the documentation shows its numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bitbell
from bitbell.cli.main import main
from bitbell.kernels import native
from bitbell.models.presets import PRESETS, Preset
from bitbell.training.plan import KEPT, SHAPES, Job, Shape, plan

WIDTH, FEED_FORWARD = 128, 256


def bytes_kept(layers: int, tokens: int, recipe: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """What a forward pass in bfloat16 keeps for the backward pass, without the parameters themselves."""
    monkeypatch.setitem(PRESETS, "kept", Preset(layers, WIDTH, 2, FEED_FORWARD, 1e-3, 1e4, 128))
    model = bitbell.build_model("kept", vocab_size=128, sequence_length=tokens)
    batch = torch.randint(0, 128, (2, tokens))
    if recipe != "none":
        bitbell.calibrate(bitbell.quantize(model, recipe), batch)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # holding them keeps their addresses apart

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model.train()(batch, labels=batch, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("method", KEPT)
def test_a_block_keeps_as_many_bytes_as_the_plan_says(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = method if method == "none" else f"{method}-w4a4"
    with native.using(native.REFERENCE):
        few, many = (
            bytes_kept(3, tokens, recipe, monkeypatch) - bytes_kept(2, tokens, recipe, monkeypatch)
            for tokens in (128, 256)
        )
    a_token = (many - few) / 256
    assert a_token == pytest.approx(KEPT[method].width * WIDTH + KEPT[method].feed_forward * FEED_FORWARD, rel=0.02)
    weights = Shape(1, WIDTH, FEED_FORWARD, WIDTH, 128).block_weights
    assert (few - 256 * a_token) / weights == pytest.approx(KEPT[method].weight, rel=0.1)


def test_parameters_are_those_of_the_models() -> None:
    assert SHAPES["7b"].parameters == 6_738_415_616
    assert SHAPES["13b"].parameters == 13_015_864_320
    assert SHAPES["70b"].parameters == 68_976_648_192
    assert SHAPES["1b"].parameters - SHAPES["1b"].vocabulary * SHAPES["1b"].width == 1_235_814_400  # tied there


def test_more_gpus_hold_less_and_low_bits_move_less() -> None:
    job = Job(params="7b", gpus=64)
    whole, parts = plan(replace(job, distributed="ddp")), plan(job)
    assert whole.moments == 8 * SHAPES["7b"].parameters
    assert parts.moments == whole.moments / 64
    assert whole.moved == pytest.approx(2 * 63 / 64 * 4 * SHAPES["7b"].parameters)
    narrow, low = plan(replace(job, gather="bfloat16")), plan(replace(job, gather="low-bit"))
    assert parts.moved > narrow.moved > low.moved
    quantized = SHAPES["7b"].layers * SHAPES["7b"].block_weights
    codes_and_steps = quantized * 2 / 8 + 4 * SHAPES["7b"].layers * SHAPES["7b"].block_rows
    outer = 4 * SHAPES["7b"].outer
    reduced = 4 * SHAPES["7b"].parameters
    assert low.moved == pytest.approx(63 / 64 * (2 * codes_and_steps + outer + reduced))
    assert low.kept == 0
    assert plan(Job(params="7b", gpus=1, distributed="ddp")).moved == 0


def test_accumulation_keeps_whole_gradients_or_reduces_each_time() -> None:
    once = Job(params="1b", gpus=8, accumulation=4)
    every = replace(once, reduce_every=True)
    assert plan(once).gradients == 4 * SHAPES["1b"].parameters
    assert plan(every).gradients < plan(once).gradients
    assert plan(every).moved - plan(once).moved == pytest.approx(7 / 8 * 3 * 4 * SHAPES["1b"].parameters)
    assert plan(once).statistics == 4 * 2 * 4 * 16


def test_a_low_bit_gather_reduces_gradients_of_codes_each_time() -> None:
    once = Job(params="7b", gpus=8, gather="low-bit")
    four = replace(once, accumulation=4)
    shape = SHAPES["7b"]
    quantized, rest = shape.layers * shape.block_weights, shape.parameters - shape.layers * shape.block_weights
    assert 4 * plan(once).moved - plan(four).moved == pytest.approx(7 / 8 * 3 * 4 * rest)
    assert plan(four).gradients == pytest.approx(4 * (quantized / 8 + rest + 2 * shape.block_weights))
    assert plan(replace(four, reduce_every=True)).moved == pytest.approx(4 * plan(once).moved)


def test_one_gpu_holds_the_whole_model() -> None:
    for gather in ("float32", "low-bit"):
        assert plan(Job(params="1b", gpus=1, gather=gather)) == plan(Job(params="1b", gpus=1, distributed="ddp"))


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"params must be one of 1b, .*got params='8b'"):
        Job(params="8b")
    with pytest.raises(ValueError, match="gpus must be positive, got gpus=0"):
        Job(params="7b", gpus=0)
    with pytest.raises(ValueError, match="gather=low-bit moves codes"):
        Job(params="7b", gather="low-bit", method="none")
    with pytest.raises(ValueError, match="gather and reduce_every are for distributed=fsdp"):
        Job(params="7b", distributed="ddp", gather="bfloat16")
    with pytest.raises(ValueError, match="bits must be at most 8, got bits=16"):
        Job(params="7b", bits=16)
    with pytest.raises(ValueError, match=r"utilisation must be at most 1, got utilisation=40"):
        Job(params="7b", utilisation=40)


PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def test_the_page_shows_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    commands = re.findall(r"^    bitbell (plan .*)\n\n((?:.+\n)+)", text, re.MULTILINE)
    assert len(commands) >= 2
    for command, shown in commands:
        assert main(command.split()) == 0
        assert capsys.readouterr().out.strip() == "\n".join(line.removeprefix("    ") for line in shown.splitlines())
