"""Products of int8 codes: torch's, ours with the two steps in its epilogue, and packed weights, against bfloat16.

All multiply the same operands' worth: (rows, inputs) times (outputs, inputs) transposed. A product of codes is first
compared with exact sums of a sample of rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measure import Calls, Machine, Report, Row, compare, copies_for, median, ratio
from torch import Tensor

from bitbell.kernels import integer_product, pack_codes
from bitbell.kernels.planes import arrange_planes, planes_product, scaled_integer_product

SHAPES = [(8192, 4096, 4096), (8192, 1280, 3584), (8192, 4096, 11008)]  # rows, inputs, outputs
SAMPLE = 64


def run(machine: Machine, report: Report, args: argparse.Namespace) -> None:
    for rows, inputs, outputs in [(33, 96, 48)] if machine.quick else SHAPES:
        with report.guarded(f"{rows} x {inputs} -> {outputs}"):
            one_shape(machine, report, rows, inputs, outputs)


def one_shape(machine: Machine, report: Report, rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    wide = (torch.randn(rows, inputs).to(machine.device), torch.randn(outputs, inputs).to(machine.device))
    x, w = (t.bfloat16() for t in wide)
    copies = copies_for(2 * (x.numel() + w.numel()), machine, 128 << 20)
    operands = [(x.clone(), w.clone()) for _ in range(copies)]
    candidates: dict[str, Calls] = {"bfloat16": [lambda a=a, b=b: a @ b.T for a, b in operands]}
    checks: dict[str, str] = {}
    for name, make in products(machine, rows, inputs, outputs).items():
        with report.guarded(f"{name}, {rows} x {inputs} -> {outputs}"):
            product, check = make()
            checks[name] = check()
            candidates[name] = [product] * copies
    seconds = compare(candidates, machine)
    for name, taken in seconds.items():
        rate = f"{2 * rows * inputs * outputs / median(taken) / 1e12:.3g} T/s"
        against = None if name == "bfloat16" else ratio(seconds["bfloat16"], taken)
        case = f"{name}, {rows} x {inputs} -> {outputs}"
        report.add(
            Row(case, 1e3 * median(taken), rate, "bfloat16" if against else "", against, check=checks.get(name, ""))
        )


Product = Callable[[], Tensor]


def products(
    machine: Machine, rows: int, inputs: int, outputs: int
) -> dict[str, Callable[[], tuple[Product, Callable[[], str]]]]:
    """Name -> what makes a product and its check."""

    def codes(bits: int) -> tuple[Tensor, Tensor]:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        return tuple(
            torch.randint(low, high, (n, inputs), dtype=torch.int8).to(machine.device) for n in (rows, outputs)
        )  # type: ignore[return-value]

    def torch_int8() -> tuple[Product, Callable[[], str]]:
        a, b = codes(8)
        return lambda: torch._int_mm(a, b.T), lambda: equal_sums(torch._int_mm(a, b.T), a, b)

    def ours() -> tuple[Product, Callable[[], str]]:
        a, b = codes(8)
        return lambda: integer_product(a, b), lambda: equal_sums(integer_product(a, b), a, b)

    def scaled() -> tuple[Product, Callable[[], str]]:
        a, b = codes(4)
        steps = [torch.rand(n, device=machine.device) + 0.5 for n in (rows, outputs)]

        def product(dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return scaled_integer_product(a, b, *steps, -0.5, -0.5, dtype)

        def check() -> str:
            sums = (a[:SAMPLE].double() + 0.5) @ (b.double() + 0.5).T
            expected = sums * steps[0][:SAMPLE, None].double() * steps[1].double()
            # Triton's interpreter cuts bfloat16 off where a GPU rounds it, so the check is of float32.
            return close(product(torch.float32)[:SAMPLE], expected, 1e-6)

        return product, check

    def packed(bits: int) -> tuple[Product, Callable[[], str]]:
        a, b = codes(bits)
        words = pack_codes((b.cpu() + 2 ** (bits - 1)).to(torch.uint8), bits).to(machine.device)
        planes, _ = arrange_planes(words, bits, inputs)
        return lambda: planes_product(a, planes, bits), lambda: equal_sums(planes_product(a, planes, bits), a, b)

    return {
        "torch._int_mm": torch_int8,
        "integer_product": ours,
        "scaled_integer_product": scaled,
        **{f"planes_product, {bits} bits": (lambda bits=bits: packed(bits)) for bits in (4, 3, 2, 1)},
    }


def equal_sums(found: Tensor, a: Tensor, b: Tensor) -> str:
    """Raises AssertionError unless a sample of rows holds the exact sums."""
    expected = (a[:SAMPLE].double() @ b.double().T).to(torch.int32)
    assert torch.equal(found[:SAMPLE], expected), f"{int((found[:SAMPLE] != expected).sum())} sums differ"
    return "sums exact"


def close(found: Tensor, expected: Tensor, tolerance: float) -> str:
    """Raises AssertionError unless `found` is within `tolerance` of the largest expected magnitude."""
    error = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
    assert error <= tolerance, f"relative error {error:.3g} above {tolerance:.3g}"
    return f"error {error:.1e}"
