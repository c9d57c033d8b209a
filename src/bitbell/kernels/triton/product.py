"""Products of packed weights on GPUs: the operators of `bitbell.kernels.planes`, and how their kernels are launched.

`product_kernels.py` has the kernels, and the reasons for their shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from bitbell.kernels.operators import _check_operands
from bitbell.kernels.planes import (
    ALIGNMENT,
    _check_planes,
    _of_outputs,
    fields_of,
    is_wide,
    plane_width,
    planes_of,
)
from bitbell.kernels.triton import interpreted
from bitbell.kernels.triton.product_kernels import few_kernel, finish_kernel, many_kernel, sums_kernel

FEW_ROWS = 4  # up to which dp4a is enough
LITTLE_SHARED = 48 * 1024  # bytes of shared memory that every GPU gives a program
INTERPRETER_PROCESSORS = 4  # what a GPU without a GPU is taken to have, so that K is split there too


# How they are launched ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """What a program of `many_kernel` computes. rows x outputs, bytes of a plane at a time; warps; steps in flight;
    into how many parts K is split."""

    rows: int
    outputs: int
    bytes: int
    warps: int
    stages: int
    parts: int


@lru_cache(maxsize=8)
def _device(index: int | None) -> tuple[int, int, int]:
    """Multiprocessors, bytes of shared memory that a program may have, and the major compute capability."""
    if index is None:
        return INTERPRETER_PROCESSORS, 227 * 1024, 9
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", LITTLE_SHARED)
    return properties.multi_processor_count, shared, properties.major


def tile_for(
    rows: int,
    outputs: int,
    columns: int,
    bits: int,
    itemsize: int,
    wide: bool,
    processors: int,
    shared: int,
    major: int,
) -> Tile:
    """A tile for (rows, columns) inputs of that many bytes each, on a device of so many multiprocessors.

    Large tiles move few bytes for an operation; but each multiprocessor should have one at least, and where there are
    not so many, K is split.
    """
    width = plane_width(columns, bits)
    if rows <= 64:
        shapes = [(max(16, triton.next_power_of_2(rows)), 64, 4)]
        shared //= 2  # two programs a multiprocessor: one loads while the other multiplies
    elif itemsize == 1 and major == 9 and not wide:  # sums in float64 take twice the registers
        shapes = [(128, 256, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4)]
    elif itemsize <= 2:
        shapes = [(128, 128, 8), (64, 128, 4), (64, 64, 4)]
    else:
        shapes = [(64, 64, 4)]
    shape = next((s for s in shapes if triton.cdiv(rows, s[0]) * triton.cdiv(outputs, s[1]) >= processors), shapes[-1])
    size, stages = _steps(shape[0], shape[1], bits, itemsize, width, shared)
    tiles = triton.cdiv(rows, shape[0]) * triton.cdiv(outputs, shape[1])
    parts = max(1, min(2 * processors // tiles, width // (2 * size), 16)) if rows <= 64 else 1
    return Tile(shape[0], shape[1], size, shape[2], stages, parts)


def _steps(rows: int, outputs: int, bits: int, itemsize: int, width: int, shared: int) -> tuple[int, int]:
    """Bytes of a plane at a time, and how many such steps are in flight: what shared memory has room for. Sizes that
    divide the plane come first, since masks cost address arithmetic."""
    smallest = 32 if itemsize == 1 else 16
    fitting = []
    for size, stages in ((128, 3), (64, 4), (64, 3), (64, 2), (32, 3), (32, 2), (16, 2)):
        a_step = size * (outputs * planes_of(bits) + rows * fields_of(bits) * itemsize)
        if smallest <= size <= 128 // itemsize and stages * a_step <= shared - 1024:
            fitting.append((size, stages))
    return next((s for s in fitting if s[0] >= 64 and width % s[0] == 0), fitting[0] if fitting else (smallest, 1))


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    if interpreted():  # which knows nothing of warps and stages
        options = {name: value for name, value in options.items() if name.isupper()}
    else:
        options["enable_fp_fusion"] = False  # the reference rounds products before it adds
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **options)


@dataclass
class _Epilogue:
    """What follows the sums. Absent tensors are replaced by one that is not read."""

    kind: str
    bits: int
    out: Tensor
    scale: Tensor
    sums: Tensor | None = None
    step: Tensor | None = None
    x_offset: Tensor | None = None
    offset: Tensor | None = None
    bias: Tensor | None = None
    x_zero: float = 0.0
    zero: float = 0.0
    columns: int = 0
    wide: bool = False

    def tensors(self) -> tuple[Tensor, ...]:
        found = self.sums, self.scale, self.step, self.x_offset, self.offset, self.bias
        return tuple((self.scale if t is None else t).contiguous() for t in found)

    def numbers(self) -> tuple[float, ...]:
        return self.x_zero, self.zero, float(self.columns), self.columns * self.x_zero * self.zero

    def step_stride(self) -> int:
        return 0 if self.step is None or self.step.numel() == 1 else 1

    def flags(self) -> dict[str, Any]:
        given = {"X_OFFSET": self.x_offset, "W_OFFSET": self.offset, "BIAS": self.bias}
        return {name: t is not None for name, t in given.items()} | {"WIDE": self.wide, "BASE": self.base()}

    def base(self) -> int:
        """What codes of planes are above centred ones."""
        return 2 ** (self.bits - 1) if self.bits <= 4 else 0


def _few(x: Tensor, planes: Tensor, epilogue: _Epilogue) -> Tensor:
    """(M, K) int8, M at most FEW_ROWS."""
    bits, fields = epilogue.bits, fields_of(epilogue.bits)
    (rows, columns), outputs = x.shape, planes.shape[0]
    planes = planes.contiguous()
    x = pad(x, (0, -columns % 4)).contiguous()
    words = plane_width(columns, bits) // 4
    block = 512 if words % 512 == 0 or words > 2048 else 256 if words > 128 else 128
    # One row: fields of half a byte in sums of their own. More rows share the shifts, and need the registers.
    spread = 4 // bits if rows == 1 and bits in (1, 2, 4) else 1
    per_program = 4 if rows == 1 and bits != 3 else 2
    _launch(
        few_kernel,
        (triton.cdiv(outputs, per_program),),
        _aligned(x).view(torch.int32),
        planes.view(torch.int32),
        epilogue.out,
        *epilogue.tensors(),
        *epilogue.numbers(),
        outputs,
        x.shape[1] // 4,
        words,
        epilogue.step_stride(),
        M=rows,
        BITS=bits if bits <= 4 else 8,
        FIELDS=fields,
        SPREAD=spread,
        OUTPUTS=per_program,
        BLOCK=block,
        EPILOGUE=epilogue.kind == "codes",
        ASSEMBLY=not interpreted(),
        num_warps=max(1, block // 128),
        **epilogue.flags(),
    )
    return epilogue.out


def _many(
    x: Tensor, planes: Tensor, epilogue: _Epilogue, table: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """(M, K) int8 or floats on tensor cores. tile: other than `tile_for`'s, to measure."""
    bits, out = epilogue.bits, epilogue.out
    (rows, columns), outputs = x.shape, planes.shape[0]
    width, x, planes = plane_width(columns, bits), _aligned(x), planes.contiguous()
    if tile is None:
        device = _device(x.device.index if x.is_cuda else None)
        tile = tile_for(rows, outputs, columns, bits, x.element_size(), epilogue.wide, *device)
    floats = epilogue.kind == "floats"
    sums = out
    if tile.parts > 1:
        kind = torch.float32 if floats else torch.int32
        sums = torch.empty(tile.parts, rows, outputs, dtype=kind, device=x.device)
    rest = _x_sums(x, epilogue), *epilogue.tensors(), *epilogue.numbers()
    grid = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs), tile.parts
    _launch(
        many_kernel,
        grid,
        x,
        planes if bits <= 4 else planes.view(torch.int8),  # as they are, from shared memory to the tensor cores
        epilogue.scale if table is None else table.contiguous(),
        sums,
        *rest,
        rows,
        outputs,
        columns,
        width,
        epilogue.step_stride(),
        BITS=bits if bits <= 4 else 8,
        HALF=2 ** (bits - 1),
        FIELDS=fields_of(bits),
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        BYTES=tile.bytes,
        PARTS=tile.parts,
        GROUP=8,
        EVEN=width % tile.bytes == 0 and columns == width * fields_of(bits),
        TABLE=table is not None,
        KIND=epilogue.kind,
        ASSEMBLY=not interpreted(),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **epilogue.flags(),
    )
    if tile.parts > 1:
        grid = triton.cdiv(outputs, 256), rows
        sizes = rows, outputs, epilogue.step_stride()
        how: dict[str, Any] = {"PARTS": tile.parts, "BLOCK": 256, "KIND": epilogue.kind, "num_warps": 4}
        _launch(finish_kernel, grid, sums, out, *rest, *sizes, **how, **epilogue.flags())
    return out


def _x_sums(x: Tensor, epilogue: _Epilogue) -> Tensor:
    """Sums of the inputs of each row, where something needs them."""
    if epilogue.kind == "floats":
        return epilogue.scale if epilogue.offset is None else x.sum(-1, dtype=torch.float32)
    if not epilogue.base() and not epilogue.zero and epilogue.offset is None:
        return torch.zeros(len(x), dtype=torch.int32, device=x.device)
    out = torch.empty(len(x), dtype=torch.int32, device=x.device)
    _launch(sums_kernel, (len(x),), x, out, x.shape[1], BLOCK=2048, num_warps=4)
    return out


def _aligned(x: Tensor) -> Tensor:
    """`x` with its rows one after the other, from a 16-byte boundary on."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


# The operators --------------------------------------------------------------------------------------------------------


def planes_product(codes: Tensor, planes: Tensor, bits: int, tile: Tile | None = None) -> Tensor:
    """`bitbell.kernels.planes.planes_product`."""
    _check_planes(codes, planes, bits)
    out = codes.new_empty(codes.shape[0], planes.shape[0], dtype=torch.int32)
    if not out.numel() or not codes.shape[1]:
        return out.zero_()
    epilogue = _Epilogue("sums", bits, out, scale=out)
    if codes.shape[0] <= FEW_ROWS and tile is None:
        return _few(codes, planes, epilogue)
    return _many(codes, planes, epilogue, tile=tile)


def planes_linear(
    codes: Tensor,
    step: Tensor,
    planes: Tensor,
    sums: Tensor,
    scale: Tensor,
    bits: int,
    x_bits: int,
    x_zero_point: float,
    zero_point: float,
    dtype: torch.dtype,
    x_offset: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """`bitbell.kernels.planes.planes_linear`."""
    _check_planes(codes, planes, bits)
    rows, columns = codes.shape
    out = codes.new_empty(rows, planes.shape[0], dtype=dtype)
    if not out.numel():
        return out
    wide = is_wide(columns, bits, x_bits)
    numbers = x_zero_point, zero_point, columns, wide
    epilogue = _Epilogue("codes", bits, out, scale, sums, step, x_offset, offset, bias, *numbers)
    if rows <= FEW_ROWS and tile is None:
        return _few(codes, planes, epilogue)
    return _many(codes, planes, epilogue, tile=tile)


def planes_linear_floats(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    bits: int,
    zero_point: float,
    dtype: torch.dtype,
    table: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """`bitbell.kernels.planes.planes_linear_floats`."""
    _check_planes(x, planes, bits)
    out = x.new_empty(x.shape[0], planes.shape[0], dtype=dtype)
    if not out.numel():
        return out
    epilogue = _Epilogue("floats", bits, out, scale, offset=offset, bias=bias, zero=zero_point, columns=x.shape[1])
    return _many(x, planes, epilogue, table, tile)


def scaled_integer_product(
    a: Tensor,
    b: Tensor,
    step_a: Tensor,
    step_b: Tensor,
    zero_a: float,
    zero_b: float,
    dtype: torch.dtype,
    bits_a: int = 8,
    bits_b: int = 8,
) -> Tensor:
    """`bitbell.kernels.planes.scaled_integer_product`: a matrix of int8 is its own plane."""
    _check_operands(a, b)
    planes, scale = _as_planes(b), _of_outputs(step_b, b.shape[0])
    sums = torch.empty(len(b), dtype=torch.int32, device=b.device)
    if zero_a:
        _launch(sums_kernel, (len(b),), b.contiguous(), sums, b.shape[1], BLOCK=2048, num_warps=4)
    else:
        sums.zero_()
    out = a.new_empty(a.shape[0], b.shape[0], dtype=dtype)
    if not out.numel():
        return out
    numbers = zero_a, zero_b, a.shape[1], is_wide(a.shape[1], bits_a, bits_b)
    epilogue = _Epilogue("codes", 8, out, scale, sums, step_a, None, None, None, *numbers)
    return (_few if len(a) <= FEW_ROWS else _many)(a, planes, epilogue)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """`bitbell.kernels.integer_product`."""
    _check_operands(a, b)
    return planes_product(a, _as_planes(b), 8)


def _as_planes(b: Tensor) -> Tensor:
    return _aligned(pad(b, (0, plane_width(b.shape[1], 8) - b.shape[1]))).view(torch.uint8)
