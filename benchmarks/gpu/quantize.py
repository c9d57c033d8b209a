"""Quantizers: gigabytes a second of what they must read and write, as a share of what a copy on the device reaches.

A case reads its input once and writes what it returns; intermediate passes over memory show as a lower share. Codes are
first compared with those of the definitions in plain PyTorch: they may differ by one where an input is within float
rounding of a threshold.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measure import Calls, Machine, OneByOne, Report, Row, compare, copies_for, median
from torch import Tensor, nn

from bitbell.kernels import pack_codes, triton
from bitbell.kernels.quantize import encode_packed, serves
from bitbell.layers import as_recipe
from bitbell.quantizers import Quantizer

RECIPES = ["bbq-w4a4", "bbq-w2a2", "bbq-w1a1", "bbq-token-w4a4", "quest-w4a4", "lsq-w4a4", "absmax-w4a4"]
MANY, WEIGHT = (16384, 4096), (4096, 4096)
LARGEST_SHARE = 1e-4  # of codes that may differ
TARGET = (0.6, 0.85)


def run(machine: Machine, report: Report, args: argparse.Namespace) -> None:
    shapes = [(33, 128), (48, 128)] if machine.quick else [MANY, WEIGHT]
    for dtype in (torch.bfloat16, torch.float32):
        for recipe in RECIPES[:2] if machine.quick else RECIPES:
            with report.guarded(f"{recipe} activations, {dtype}"):
                activations(machine, report, recipe, shapes[0], dtype)
    for recipe in RECIPES[1:2] if machine.quick else RECIPES:
        with report.guarded(f"{recipe} weight"):
            weight(machine, report, recipe, shapes[1])


def activations(machine: Machine, report: Report, recipe: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    _, quantizer = as_recipe(recipe).quantizers_for(shape[0], shape[1])
    one_case(machine, report, f"{recipe} activations", quantizer, shape, dtype, backward=dtype == torch.bfloat16)


def weight(machine: Machine, report: Report, recipe: str, shape: tuple[int, int]) -> None:
    quantizer, _ = as_recipe(recipe).quantizers_for(*shape)
    one_case(machine, report, f"{recipe} weight", quantizer, shape, torch.float32, backward=True)


def one_case(
    machine: Machine,
    report: Report,
    name: str,
    quantizer: Quantizer,
    shape: tuple[int, int],
    dtype: torch.dtype,
    backward: bool,
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(machine.device, dtype)
    quantizer = quantizer.to(machine.device)
    quantizer.calibrate(x)
    check = check_codes(quantizer, x)
    copies = copies_for(x.numel() * x.element_size(), machine, 128 << 20)
    inputs = [x.clone() for _ in range(copies)]
    outputs = [torch.empty_like(x) for _ in inputs]
    candidates: dict[str, Calls] = {
        "copy": [lambda a=a, b=b: b.copy_(a) for a, b in zip(inputs, outputs, strict=True)],
    }
    moved = {"copy": 2 * size_of(x)}
    for what, function in forwards(quantizer, x).items():
        candidates[what] = [lambda a=a, f=function: f(a) for a in inputs]
        moved[what] = size_of(x) + written(function(x))
    if backward:
        g = torch.randn_like(x, dtype=torch.float32)
        calls, bytes_moved = backwards(quantizer, inputs, g)
        candidates["backward"], moved["backward"] = calls, bytes_moved
    seconds = compare(candidates, machine)
    rate = {what: moved[what] / median(seconds[what]) for what in seconds}
    for what in list(seconds)[1:]:
        share = rate[what] / rate["copy"]
        case = f"{name}: {what}, {str(dtype).removeprefix('torch.')} {shape[0]} x {shape[1]}"
        target = TARGET if what == "codes" else (None, None)
        report.add(
            Row(case, 1e3 * median(seconds[what]), f"{rate[what] / 1e9:.4g} GB/s", "copy", share, *target, check=check)
        )


def forwards(quantizer: Quantizer, x: Tensor) -> dict[str, Callable[[Tensor], tuple[Tensor | None, ...]]]:
    """Codes without values, as products of integers take them; codes packed to their width, where there is a kernel for
    that; and values with codes."""

    def without_gradient(function: Callable[[Tensor], tuple[Tensor | None, ...]]) -> Callable[[Tensor], tuple]:
        def call(x: Tensor) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                return function(x)

        return call

    found = {"codes": without_gradient(quantizer.quantize_codes)}
    plan = quantizer.plan()
    if plan is not None and serves(plan, x):
        scale = quantizer.scale if quantizer.scale_is_learned else None
        operands = scale, quantizer.given_size(), quantizer.offset, *plan.encoded()
        found["packed codes"] = without_gradient(lambda x: encode_packed(x, *operands))
        check_packed(quantizer, x, found["packed codes"](x)[0])
    return found | {"values and codes": without_gradient(quantizer.quantize)}


def backwards(quantizer: nn.Module, inputs: list[Tensor], g: Tensor) -> tuple[Calls, int]:
    """Backward passes of forward passes that are done before, and the bytes of one: gradient and input read, gradient
    written."""

    def call(values: Tensor, sources: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(values, sources, g.to(values.dtype), retain_graph=True, allow_unused=True)

    calls = OneByOne()
    for x in inputs:
        source = x.clone().requires_grad_()
        values = quantizer.quantize(source).values  # type: ignore[operator]
        sources = [source, *(p for p in quantizer.parameters() if p.requires_grad)]
        calls.append(lambda values=values, sources=sources: call(values, sources))
    return calls, g.numel() * g.element_size() + 2 * size_of(inputs[0])


def check_codes(quantizer: Quantizer, x: Tensor) -> str:
    """Raises AssertionError if codes are not those of the definitions, but for inputs near a threshold."""
    quantizer.eval()
    with torch.no_grad():
        found = quantizer.quantize(x)
        with triton.using("off"):
            expected = quantizer.quantize(x)
    quantizer.train()
    distance = (found.codes.int() - expected.codes.int()).abs()
    share = float((distance > 0).float().mean())
    assert int(distance.max()) <= 1, f"codes differ by {int(distance.max())}"
    assert share <= LARGEST_SHARE, f"{share:.2e} of the codes differ"
    steps = float(((found.step - expected.step).abs() / expected.step.abs()).max())
    assert steps < 1e-4, f"steps differ by {steps:.1e}"
    return f"{share:.0e} of the codes differ"


def check_packed(quantizer: Quantizer, x: Tensor, words: Tensor | None) -> None:
    """Raises AssertionError unless packed codes are the codes, packed."""
    with torch.no_grad():
        codes = (quantizer.quantize_codes(x).codes.to(torch.int16) + 2 ** (quantizer.bits - 1)).to(torch.uint8)
    assert torch.equal(words, pack_codes(codes, quantizer.bits)), "packed codes are not the codes"


def size_of(t: Tensor) -> int:
    return t.numel() * t.element_size()


def written(tensors: tuple[Tensor | None, ...]) -> int:
    """Bytes of the distinct storages of a result."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())
