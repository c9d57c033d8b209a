"""Packed layers: decode (1 and 8 rows) and prefill (4096 rows), against bfloat16 and other 4-bit layers if installed.

A layer's time includes quantizing its input. It is first compared with its definition in plain PyTorch; peers with a
product of the weight that they rounded themselves.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from measure import Calls, Machine, Report, Row, compare, copies_for, first_line, median, ratio
from torch import Tensor, nn

import bitbell
from bitbell.kernels import triton

DECODE = [f"bbq-w{bits}a{bits}" for bits in (1, 2, 3, 4)] + ["bbq-w2a16", "bbq-w4a16", "quest-w2a2"]
PREFILL = ["bbq-w4a4", "bbq-w2a2", "bbq-w1a1", "bbq-w4a16", "quest-w4a4"]
TARGETS = {("bbq-w2a2", 1): (4.0, 6.0), ("bbq-w4a4", 4096): (1.4, 1.8)}
LARGEST_ERROR = 0.02  # of a layer's mean output, on average: inputs near a threshold may get the next code


def run(machine: Machine, report: Report, args: argparse.Namespace) -> None:
    cases = [(1, 4096, 11008, DECODE), (8, 4096, 11008, DECODE), (4096, 4096, 4096, PREFILL)]
    if machine.quick:
        cases = [(1, 128, 96, DECODE[:2]), (33, 128, 96, PREFILL[:2])]
    for rows, inputs, outputs, recipes in cases:
        with report.guarded(f"{rows} rows, {inputs} -> {outputs}"):
            one_case(machine, report, rows, inputs, outputs, recipes)


def one_case(machine: Machine, report: Report, rows: int, inputs: int, outputs: int, recipes: list[str]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=False)
    x = torch.randn(rows, inputs).to(machine.device, torch.bfloat16)
    where = f"{rows} rows, {inputs} -> {outputs}"
    candidates: dict[str, Calls] = {"bfloat16": layer_calls(linear.to(machine.device, torch.bfloat16), x, machine)}
    checks: dict[str, str] = {}
    makers: dict[str, Callable[[], tuple[nn.Module, str]]] = {
        **{recipe: (lambda recipe=recipe: packed_layer(linear, recipe, x)) for recipe in recipes},
        "bitsandbytes NF4": lambda: nf4(linear, x),
        "torchao int4": lambda: torchao_int4(linear, x),
    }
    for name, make in makers.items():
        try:
            layer, checks[name] = make()
        except ImportError as error:
            report.add(Row(f"{name}, {where}", check=f"not installed: {first_line(error)}"))
            continue
        except Exception as error:
            report.add(Row(f"{name}, {where}", check=f"FAILED: {type(error).__name__}: {first_line(error)}"))
            continue
        candidates[name] = layer_calls(layer, x, machine)
    seconds = compare(candidates, machine)
    for name, taken in seconds.items():
        floor, aim = TARGETS.get((name, rows), (None, None))
        against = None if name == "bfloat16" else ratio(seconds["bfloat16"], taken)
        rate = f"{2 * rows * inputs * outputs / median(taken) / 1e12:.3g} T/s" if rows > 16 else ""
        base = "bfloat16" if against else ""
        report.add(Row(f"{name}, {where}", 1e3 * median(taken), rate, base, against, floor, aim, checks.get(name, "")))


def layer_calls(layer: nn.Module, x: Tensor, machine: Machine) -> Calls:
    """Calls of copies of a layer, so that with few rows weights come from memory."""
    size = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
    copies = copies_for(size, machine) if x.shape[0] <= 16 else 1
    layers = [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]

    def call(layer: nn.Module) -> Tensor:
        with torch.no_grad():
            return layer(x)

    return [lambda layer=layer: call(layer) for layer in layers]


@torch.no_grad()
def packed_layer(linear: nn.Linear, recipe: str, x: Tensor) -> tuple[nn.Module, str]:
    """The packed layer, and how far it is from its definition."""
    model = nn.Sequential(copy.deepcopy(linear).float().cpu())
    bitbell.quantize(model, recipe)
    bitbell.calibrate(model, x.float().cpu())
    layer = bitbell.pack(model.eval()).model[0].to(x.device)
    found = layer(x)
    with triton.using("off"):
        expected = copy.deepcopy(layer)(x)
    error = float((found.float() - expected.float()).abs().mean() / expected.float().abs().mean())
    assert error <= LARGEST_ERROR, f"mean error {error:.3g} above {LARGEST_ERROR}"
    return layer, f"mean error {error:.1e}"


@torch.no_grad()
def nf4(linear: nn.Linear, x: Tensor) -> tuple[nn.Module, str]:
    """bitsandbytes' NF4, weights in blocks of 64, products in bfloat16."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(linear.weight.detach().cpu(), requires_grad=False, quant_type="nf4")
    layer = layer.to(x.device)
    rounded = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(x.dtype)
    return layer, peer_error(layer, x, rounded)


@torch.no_grad()
def torchao_int4(linear: nn.Linear, x: Tensor) -> tuple[nn.Module, str]:
    """torchao's 4-bit weights in groups of 128, products in bfloat16."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    model = nn.Sequential(copy.deepcopy(linear).to(x.device, torch.bfloat16))
    quantize_(model, Int4WeightOnlyConfig(group_size=128))
    return model[0], peer_error(model[0], x, linear.weight.to(x.device, x.dtype), 0.2)


def peer_error(layer: nn.Module, x: Tensor, weight: Tensor, allowed: float = 0.02) -> str:
    """Raises AssertionError for a peer whose output is not that of `weight`, within what rounding may do to it."""
    expected = x.float() @ weight.float().T
    error = float((layer(x).float() - expected).abs().mean() / expected.abs().mean())
    assert error <= allowed, f"mean error {error:.3g} above {allowed}"
    return f"mean error {error:.1e}"
