"""Launches of the quantizers' kernels: tensors and a plan in, tensors out. Imports Triton.

How many programs: a multiprocessor of an H200 keeps 4.8 TB/s / 132 busy with about 25 KB on the way, which is two
tiles, and three or four programs of eight warps fit into it. So there should be at least 4 x 132 programs, and from
there on each should take several tiles, since it reads the rotation's matrix (32 KB, two tiles) from the cache first. A
row that is measured belongs to one program; where the size is given, rows are cut into ranges of columns too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from bitbell.kernels.operators import hadamard, packed_words
from bitbell.kernels.quantize import Plan, mid_rise_codes, shapes
from bitbell.kernels.thresholds import bell_thresholds
from bitbell.kernels.triton.gradient import gradient_kernel
from bitbell.kernels.triton.quantize import measure_kernel, quantize_kernel

TILE, BLOCK = 64, 128  # entries and columns of a tile
GRADIENT_TILE = 32  # entries; of 64, the gradient's tensors would not fit into registers
PROGRAMS = 4 * 132
MOST_TILES = 16  # of a program whose rows are cut
WARPS = 8
MOST_PARTIALS = 512  # programs of a measurement of everything
NARROW = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Tiling(NamedTuple):
    """span: entries of a tile that lie in one row. chunk: columns of a program. grid: programs by rows, by columns."""

    span: int
    chunk: int
    grid: tuple[int, int]

    @classmethod
    def of(cls, rows: int, columns: int, tile: int, whole_rows: bool) -> Tiling:
        blocks = -(-columns // BLOCK)
        widest = min(_power_of_two(blocks), tile)
        if whole_rows:
            span = min(_power_of_two(-(-PROGRAMS * tile // rows)), widest)
            return cls(span, columns, (-(-rows * span // tile), 1))
        span = min(4, widest)
        tiles = -(-rows * span // tile) * -(-blocks // span)
        chunk = min(max(tiles // PROGRAMS, 1), MOST_TILES) * span * BLOCK
        return cls(span, chunk, (-(-rows * span // tile), -(-columns // chunk)))


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def quantize(
    plan: Plan,
    x: Tensor,
    scale: Tensor | None,
    size: Tensor | None,
    offset: Tensor | None,
    *,
    table: Tensor | None = None,
    values: Tensor | None = None,
    codes: Tensor | None = None,
    words: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill `values` float32, `codes` int8 and `words` int32, whichever there are; returns the step and the measured
    size (empty where it was given). x (..., C), not empty. table: thresholds to compare v with, (2**bits - 1,) float32,
    instead of what the plan says."""
    x = x.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    step_shape, size_shape = shapes(plan, x, scale, size)
    given = plan.statistic == "given"
    base = (scale if size is None else size) if given else None
    measured = torch.empty(size_shape, dtype=torch.float32, device=x.device)
    step = _known_step(plan, scale, base, step_shape) if given else measured.new_empty(step_shape)
    tiling = Tiling.of(rows, columns, TILE, whole_rows=not given and plan.by_row)
    partials = None if given or plan.by_row else _measure(plan, x)
    table = _bell_table(plan, x.device) if table is None else table
    with torch.cuda.device_of(x):
        quantize_kernel[tiling.grid](
            x, scale, base, offset, partials, table, rotation_matrix(plan.rotation, x.device),
            codes, words, values, step, measured,
            rows, columns, tiling.chunk, 0 if words is None else words.shape[1], x.numel(),
            plan.smallest, plan.divisor, plan.divisor_plus, plan.step_factor, plan.step_plus, plan.zero_point,
            PARTIALS=1 if partials is None else partials.numel(),
            BITS=plan.bits, ROTATION=plan.rotation, STATISTIC=plan.statistic, BY_ROW=plan.by_row,
            SIZE_ROWS=_by_row(base), SCALE_ROWS=_by_row(scale), STEP_ROWS=len(step_shape) > 1,
            CODES=plan.codes if table is None else "table",
            STEP_FROM_SCALE=plan.step_from_scale, CENTRED=plan.centred and offset is not None,
            ADD=plan.round_add, LOW=plan.low, HIGH=plan.high, PLUS=plan.code_plus,
            TILE=TILE, SPAN=tiling.span, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return step, measured


def quantize_rows(
    x: Tensor, thresholds: Tensor | None, bits: int, rotation: int, statistic: str, numbers: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """`bitbell.kernels.packed.quantize_rows`: codes and steps (rows, 1) of x (rows, columns) float32."""
    size = torch.zeros(1, device=x.device) if statistic == "none" else None
    measured = "given" if statistic == "none" else statistic
    plan = Plan(bits, rotation, measured, by_row=True, **mid_rise_codes(bits), **numbers)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    table = None if thresholds is None else thresholds.to(x.device)
    step, _ = quantize(plan, x, None, size, None, table=table, codes=codes)
    return codes, step.expand(len(x), 1).contiguous()


def gradient(
    plan: Plan,
    g: Tensor,
    x: Tensor,
    scale: Tensor | None,
    size: Tensor | None,
    offset: Tensor | None,
    narrow: torch.dtype,
    wants_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dL/dx (None where not wanted), and each row's sums for the scale and the offset, (rows, ranges of columns)
    float32, which mean nothing where the plan has no such gradient."""
    g, x = g.contiguous(), x.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    radial = "none" if not plan.radial or not wants_x else "row" if plan.by_row else "sum"
    tiling = Tiling.of(rows, columns, GRADIENT_TILE, whole_rows=radial == "row")
    sums = torch.empty((3, rows, tiling.grid[1] * tiling.span), dtype=torch.float32, device=x.device)
    grad = torch.empty_like(x) if wants_x else None
    base = scale if size is None else size
    along, table = None, _bell_table(plan, x.device)
    with torch.cuda.device_of(x):
        for part in ("sum", "given") if radial == "sum" else (radial,):
            gradient_kernel[tiling.grid](
                g, x, scale, base, offset, along, table, rotation_matrix(plan.rotation, x.device),
                None if part == "sum" else grad, sums, rows, columns, tiling.chunk, tiling.grid[1],
                plan.smallest, plan.divisor, plan.divisor_plus, plan.zero_point,
                plan.window_low, plan.window_high, plan.bell_factor, plan.slope_factor,
                BITS=plan.bits, ROTATION=plan.rotation, SIZE_ROWS=_by_row(base), SCALE_ROWS=_by_row(scale),
                CODES=plan.codes if table is None else "table", CENTRED=plan.centred and offset is not None,
                ADD=plan.round_add, LOW=plan.low, HIGH=plan.high, PLUS=plan.code_plus,
                SLOPE=plan.slope, RELATIVE=plan.relative, RADIAL=part,
                SCALE_GRADIENT="none" if scale is None else plan.scale_gradient,
                OFFSET_GRADIENT="none" if offset is None else plan.offset_gradient,
                NARROW=NARROW.get(narrow, tl.float32), TILE=GRADIENT_TILE, SPAN=tiling.span,
                BLOCK=BLOCK, num_warps=WARPS, num_stages=2, enable_fp_fusion=True,
            )  # fmt: skip
            if part == "sum":
                along = sums[2].sum() / x.numel()
    return grad, sums[0], sums[1]


def _measure(plan: Plan, x: Tensor) -> Tensor:
    """Partial statistics of all of x, (a power of two,) float32."""
    tiles = -(-x.numel() // (TILE * BLOCK))
    programs = min(_power_of_two(tiles), MOST_PARTIALS)
    partials = torch.empty(programs, dtype=torch.float32, device=x.device)
    matrix = rotation_matrix(plan.rotation, x.device)
    with torch.cuda.device_of(x):
        measure_kernel[(programs,)](
            x,
            matrix,
            partials,
            x.numel(),
            plan.statistic,
            plan.rotation,
            TILE=TILE,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return partials


def _known_step(plan: Plan, scale: Tensor | None, base: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """The step where nothing is measured; the kernel writes NaN over it where x holds NaN or infinity."""
    source = scale if plan.step_from_scale else base
    assert source is not None
    source = source.detach().float()
    if not plan.step_from_scale:
        source = source.clamp_min(plan.smallest)
    return (source * plan.step_factor + plan.step_plus).expand(shape).contiguous()


def _bell_table(plan: Plan, device: torch.device) -> Tensor | None:
    """Up to 4 bits, comparing is faster than the Gaussian CDF."""
    return _bell_thresholds_on(plan.bits, device) if plan.codes == "bell" and plan.bits <= 4 else None


@lru_cache(maxsize=32)
def _bell_thresholds_on(bits: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return bell_thresholds(bits).to(device)


def _by_row(t: Tensor | None) -> bool:
    return t is not None and t.numel() > 1


@lru_cache(maxsize=32)
def rotation_matrix(rotation: int, device: torch.device) -> Tensor | None:
    """(128, 128) bfloat16 of +-1 in blocks of `rotation` along the diagonal, 0 elsewhere."""
    if rotation == 1:
        return None
    with torch.inference_mode(False), torch.no_grad():
        block = (hadamard(rotation, device=device) * rotation**0.5).round().to(torch.bfloat16)
        return torch.block_diag(*[block] * (BLOCK // rotation)).contiguous()


def packed_shape(x: Tensor, bits: int) -> tuple[int, int]:
    """Of the words that hold x's codes."""
    return x.numel() // x.shape[-1], packed_words(x.shape[-1], bits)
