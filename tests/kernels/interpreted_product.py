"""Packed products through Triton's interpreter; `test_triton_product.py` runs this file in a process of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitbell.kernels import integer_product, pack_codes, planes, triton
from bitbell.kernels.triton import product
from bitbell.kernels.triton.product import Tile

WIDTHS = (1, 2, 3, 4, 5, 8)
SHAPES = [(1, 1, 300), (1, 2, 100), (3, 2, 17), (7, 65, 33), (20, 3, 200)]


def test_this_process_interprets() -> None:
    assert triton.interpreted()
    assert triton.computes(torch.empty(0))


def weights(outputs: int, columns: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Centred codes (outputs, columns) int8, their planes and row sums."""
    codes = torch.randint(0, 2**bits, (outputs, columns), dtype=torch.uint8, generator=seeded(bits))
    arranged, sums = planes.arrange_planes(pack_codes(codes, bits), bits, columns)
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8), arranged, sums


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(rows: int, columns: int, bits: int) -> Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), dtype=torch.int8, generator=seeded(rows))


def exact(x: Tensor, w: Tensor) -> Tensor:
    return (x.double() @ w.double().T).to(torch.int32)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact(bits: int, shape: tuple[int, int, int]) -> None:
    rows, outputs, columns = shape
    codes, arranged, _ = weights(outputs, columns, bits)
    x = inputs(rows, columns, 8)
    assert torch.equal(planes.planes_product(x, arranged, bits), exact(x, codes))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("parts", [1, 3])
def test_sums_are_exact_in_every_part_of_a_split(bits: int, parts: int) -> None:
    codes, arranged, _ = weights(3, 1100, bits)
    x = inputs(5, 1100, 4)
    found = product.planes_product(x, arranged, bits, tile=Tile(16, 64, 32, 4, 2, parts))
    assert torch.equal(found, exact(x, codes))


@pytest.mark.parametrize(("zero_x", "zero_w"), [(0.0, 0.0), (-0.5, -1.0), (-0.25, 0.3)])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("bits", [2, 8])
def test_outputs_are_those_of_the_definition_to_the_last_bit(
    zero_x: float, zero_w: float, rows: int, bits: int
) -> None:
    _, arranged, sums = weights(2, 72, bits)
    x, g = inputs(rows, 72, 4), seeded(1)
    step, scale, offset, bias = (torch.rand(n, generator=g) for n in (rows, 2, 2, 2))
    for x_offset, w_offset, added in ((None, None, None), (torch.rand(1, generator=g), offset, bias)):
        for dtype in (torch.float32, torch.bfloat16):
            how = arranged, sums, scale, bits, 4, zero_x, zero_w, dtype, x_offset, w_offset, added
            expected = planes.planes_linear._init_fn(x, step, *how)
            found = planes.planes_linear(x, step, *how)
            if dtype == torch.bfloat16:  # the interpreter cuts what a GPU rounds
                assert torch.allclose(found.float(), expected.float(), rtol=2**-7)
            else:
                assert torch.equal(found, expected)
    one = planes.planes_linear(x, step[:1], *how)
    assert torch.equal(one, planes.planes_linear(x, step[:1].expand(rows), *how))


@pytest.mark.parametrize("rows", [2, 6])
def test_tensors_need_not_lie_together(rows: int) -> None:
    _, arranged, sums = weights(4, 72, 2)
    x, step, every = inputs(rows, 144, 2)[:, ::2], torch.rand(rows, 2)[:, 0], slice(None, None, 2)
    scale, bias = torch.rand(1).expand(2), torch.rand(4)[every]
    how = arranged[every], sums[every], scale, 2, 2, -0.5, -0.5, torch.float32, None, scale, bias
    assert torch.equal(planes.planes_linear(x, step, *how), planes.planes_linear._init_fn(x, step, *how))
    floats = x.float(), arranged[every], scale, 2, -0.5, torch.float32, torch.rand(8)[every], scale, bias
    found, expected = planes.planes_linear_floats(*floats), planes.planes_linear_floats._init_fn(*floats)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_operands_that_do_not_fit_are_named() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"got \(2, 40\) and \(3, 41\)"):
        planes.scaled_integer_product(inputs(2, 40, 8), inputs(3, 41, 8), one, one, 0.0, 0.0, torch.float32)


@pytest.mark.parametrize("rows", [2, 6])
def test_wide_sums_lose_no_bit_before_the_last_rounding(rows: int) -> None:
    codes, arranged, sums = weights(2, 1500, 8)
    x, ones = torch.full((rows, 1500), 127, dtype=torch.int8), torch.ones(2)
    found = planes.planes_linear(x, ones[:1], arranged, sums, ones, 8, 8, -0.5, -0.5, torch.float32)
    assert torch.equal(found, ((x.double() + 0.5) @ (codes.double() + 0.5).T).float())


@pytest.mark.parametrize("rows", [1, 6])
def test_a_step_that_is_nan_shows_in_its_row_alone(rows: int) -> None:
    _, arranged, sums = weights(3, 40, 2)
    step = torch.ones(rows)
    step[-1] = torch.nan
    y = planes.planes_linear(inputs(rows, 40, 2), step, arranged, sums, torch.ones(3), 2, 2, -0.5, -0.5, torch.float32)
    assert y[-1].isnan().all()
    assert y[:-1].isfinite().all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_meet_levels(bits: int, dtype: torch.dtype) -> None:
    _, arranged, _ = weights(5, 200, bits)
    for rows in (1, 18):
        x, g = torch.randn(rows, 200, generator=seeded(rows)).to(dtype), seeded(2)
        scale, offset, bias, table = (torch.rand(n, generator=g) for n in (5, 5, 5, 2**bits))
        for levels in (None, table):
            how = arranged, scale, bits, -0.5, torch.float32, levels, offset, bias
            expected = planes.planes_linear_floats._init_fn(x, *how)
            found = planes.planes_linear_floats(x, *how)
            # The interpreter cuts a table's numbers where a GPU rounds them; other levels are exact in every type.
            within = 2**-6 if levels is not None and dtype == torch.bfloat16 else 1e-6
            assert (found - expected).abs().max() <= within * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_int8(shape: tuple[int, int, int]) -> None:
    rows, outputs, columns = shape
    a, b, g = inputs(rows, columns, 8), inputs(outputs, columns, 8), seeded(3)
    assert torch.equal(product.integer_product(a, b), integer_product(a, b))
    for step_a, step_b in (
        (torch.rand(rows, 1, generator=g), torch.rand(outputs, 1, generator=g)),
        [torch.rand(1)] * 2,
    ):
        for zeros in ((0.0, 0.0), (-0.5, 0.25)):
            how = step_a, step_b, *zeros, torch.float32
            expected = planes.scaled_integer_product._init_fn(a, b, *how)
            assert torch.equal(planes.scaled_integer_product(a, b, *how), expected)


def test_nothing_in_nothing_out() -> None:
    _, arranged, sums = weights(3, 40, 2)
    none = torch.empty(0, 40, dtype=torch.int8)
    assert planes.planes_product(none, arranged, 2).shape == (0, 3)
    linear = planes.planes_linear(none, torch.ones(1), arranged, sums, torch.ones(3), 2, 2, 0.0, 0.0, torch.float16)
    assert linear.shape == (0, 3)
    assert linear.dtype == torch.float16
