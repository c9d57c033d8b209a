"""Packed products for GPUs: planes and their definitions here, the kernels through the interpreter and the compiler."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ahead_of_time import compile_launch, compiles, needs_triton, resources
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbell.kernels import pack_codes, planes


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 400), st.integers(1, 8), st.integers(0, 99))
def test_planes_keep_every_code(rows: int, columns: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    arranged, sums = planes.arrange_planes(pack_codes(codes, bits), bits, columns)
    centred = codes.int() - 2 ** (bits - 1)
    assert torch.equal(planes.restore_planes(arranged, bits, columns).int(), centred)
    assert torch.equal(sums, centred.sum(1, dtype=torch.int32))
    least = columns * (bits if bits <= 4 else 8) / 8
    assert least <= arranged.shape[1] < least + planes.ALIGNMENT * planes.planes_of(bits)


def test_a_byte_holds_columns_that_lie_a_plane_apart() -> None:
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, [5, 69, 133, 197]] = torch.tensor([1, 2, 3, 1], dtype=torch.uint8)
    arranged, _ = planes.arrange_planes(pack_codes(codes, 2), 2, 256)
    assert arranged.shape == (1, 64)
    assert arranged[0, 5] == 1 | 2 << 2 | 3 << 4 | 1 << 6
    assert arranged.count_nonzero() == 1


def test_three_bits_take_two_planes_of_two_bits_and_one_of_one() -> None:
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    codes[0, [3, 19, 35]] = torch.tensor([7, 5, 2], dtype=torch.uint8)  # fields 0, 1 and 2
    arranged, _ = planes.arrange_planes(pack_codes(codes, 3), 3, 128)
    assert arranged.shape == (1, 48)
    assert [int(arranged[0, at]) for at in (3, 19, 35)] == [3 | 2 << 2, 1, 1 | 1 << 1]


def test_wrong_planes_are_named() -> None:
    x, arranged = torch.zeros(2, 100, dtype=torch.int8), torch.zeros(3, 32, dtype=torch.uint8)
    assert planes.planes_product(x, arranged, 2).shape == (2, 3)
    with pytest.raises(ValueError, match=r"planes of 4 bits for 100 columns .* have 64 bytes a row, got 32"):
        planes.planes_product(x, arranged, 4)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        planes.planes_product(x, arranged, 9)


def test_operators_are_what_they_say_to_the_compiler() -> None:
    codes = torch.randint(0, 4, (3, 100), dtype=torch.uint8)
    words = pack_codes(codes, 2)
    arranged, sums = planes.arrange_planes(words, 2, 100)
    x, ones = torch.randint(-2, 2, (2, 100), dtype=torch.int8), torch.ones(3)
    for operator, args in (
        (planes.arrange_planes, (words, 2, 100)),
        (planes.planes_product, (x, arranged, 2)),
        (planes.planes_linear, (x, ones[:1], arranged, sums, ones, 2, 2, -0.5, -0.5, torch.bfloat16)),
        (planes.planes_linear_floats, (x.float(), arranged, ones, 2, -0.5, torch.float32)),
        (planes.scaled_integer_product, (x, x, ones[:1], ones[:1], -0.5, -0.5, torch.float32)),
    ):
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


@needs_triton
def test_kernels_through_the_interpreter(pass_interpreted: Callable[[Path, int], None]) -> None:
    pass_interpreted(Path(__file__).with_name("interpreted_product.py"), 75)


# Compiled ahead of time: nothing here has a GPU, but the compiler needs none ------------------------------------------

DEVICES = {80: (108, 163 * 1024, 8), 90: (132, 227 * 1024, 9)}  # A100, H200: what `product._device` says of them


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What would be launched, instead of launching it."""
    from bitbell.kernels.triton import product

    made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        assert all(0 < size < 2**31 for size in grid)
        made.append((kernel, args, options | {"enable_fp_fusion": False}))

    monkeypatch.setattr(product, "_launch", note)
    return made


def linear(arch: int, bits: int, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitbell.kernels.triton import product

    monkeypatch.setattr(product, "_device", lambda index: DEVICES[arch])
    width = planes.planes_of(bits) * planes.plane_width(columns, bits)
    arranged, sums = torch.empty(4096, width, dtype=torch.uint8), torch.empty(4096, dtype=torch.int32)
    x, scale = torch.empty(rows, columns, dtype=torch.int8), torch.empty(4096)
    how = arranged, sums, scale, bits, 4, -0.5, -0.5, torch.bfloat16
    product.planes_linear(x, torch.empty(rows), *how, None, scale, scale)


QUICK = [(90, 2, 1, 11008), (90, 4, 4096, 4096), (90, 2, 16, 11008), (80, 4, 4096, 4096)]
ALL = [(arch, bits, rows, 4096) for arch in DEVICES for bits in (1, 2, 3, 4, 8) for rows in (1, 4, 16, 64, 512, 4096)]


@compiles
@pytest.mark.parametrize(
    ("arch", "bits", "rows", "columns"), QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in ALL]
)
def test_integer_kernels_compile_without_spills(
    arch: int, bits: int, rows: int, columns: int, launches: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    linear(arch, bits, rows, columns, monkeypatch)
    assert launches
    for kernel, args, options in launches:
        compiled = compile_launch(kernel, args, options, arch)
        registers, stack = resources(compiled, tmp_path)
        assert registers <= 255
        assert stack == 0, "what is kept in memory because registers are full is slow"
        assert compiled.metadata.shared <= DEVICES[arch][1]
        ptx = compiled.asm["ptx"]
        if kernel.__name__ == "many_kernel":
            # The integer product is one of tensor cores, and 16 bytes a thread come straight into shared memory.
            assert ("wgmma.mma_async" if arch == 90 else "mma.sync") in ptx
            assert ".s32.s8.s8" in ptx
            assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx)
        if kernel.__name__ == "few_kernel":
            assert "dp4a" in ptx
            assert re.search(r"ld\.global[a-z0-9_.:]*\.v4", ptx)


@compiles
@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("rows", [1, pytest.param(4096, marks=pytest.mark.slow)])
def test_float_kernels_compile_without_spills(
    arch: int, rows: int, launches: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from bitbell.kernels.triton import product

    monkeypatch.setattr(product, "_device", lambda index: DEVICES[arch])
    arranged, scale = torch.empty(4096, 2048, dtype=torch.uint8), torch.empty(4096)
    x = torch.empty(rows, 4096, dtype=torch.bfloat16)
    product.planes_linear_floats(x, arranged, scale, 4, -0.5, torch.bfloat16, torch.empty(16) if rows == 1 else None)
    for kernel, args, options in launches:
        compiled = compile_launch(kernel, args, options, arch)
        assert resources(compiled, tmp_path)[1] == 0
        assert compiled.metadata.shared <= DEVICES[arch][1]


@needs_triton
def test_every_shape_has_a_tile_that_fits() -> None:
    from bitbell.kernels.triton.product import tile_for

    for shared in (48, 99, 163, 227):
        for bits in (1, 2, 3, 4, 8):
            for itemsize in (1, 2, 4):
                for rows, outputs, columns in ((1, 1, 1), (17, 64, 4096), (64, 4096, 11008), (4096, 4096, 4096)):
                    tile = tile_for(rows, outputs, columns, bits, itemsize, False, 132, shared * 1024, 9)
                    assert tile.rows >= 16
                    assert tile.bytes >= 16
                    assert 1 <= tile.parts <= 16
                    weights = tile.outputs * planes.planes_of(bits)
                    step = tile.bytes * (weights + tile.rows * planes.fields_of(bits) * itemsize)
                    assert tile.stages == 1 or tile.stages * step <= shared * 1024
