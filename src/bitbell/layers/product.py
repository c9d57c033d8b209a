"""The integer product of training: the same integers, and the same last steps, as the packed model's.

    y = (levels_x . levels_w^T) * step_w * step_x          and where a method adds an offset to its values
      + offset_x * (sum of levels_w) * step_w + (sum of levels_x) * step_x * offset_w + K offset_x offset_w

Fake quantization multiplies levels as floats. Levels are small integers or half-integers, so float32 multiplies and
sums them exactly, and only the two steps round. Under bfloat16 autocast the operands are exact too, but the sum is
rounded to bfloat16 before the steps. A method whose grid is not uniform has its levels looked up in a table; their
products are as exact as the table's numbers allow. With `bits` the codes themselves are multiplied, int8 with
sums in int32, exactly in every precision (`bitbell.kernels.training.integer_linear`). Either way codes (one byte an
element) are kept for the backward pass instead of float tensors, and gradients are products of floats.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitbell.kernels import no_autocast
from bitbell.kernels import training as kernels
from bitbell.quantizers import Quantized, Quantizer
from bitbell.quantizers.base import table_like

Grid = tuple[float, tuple[float, ...] | None]
Bits = tuple[int, int]
Operand = tuple[Tensor, Tensor, Tensor | None, Grid]  # codes, step, offset, and what codes mean


def grid_of(quantizer: Quantizer) -> Grid:
    """What turns a quantizer's codes into levels: its zero point, and its table if the grid is not uniform."""
    return quantizer.zero_point, quantizer.table


def levels_of(codes: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Levels of centred int8 codes, a tensor of its own in `dtype`."""
    zero_point, table = grid
    if table is not None:
        return table_like(table, torch.empty(0, dtype=dtype, device=codes.device))[codes.int() + len(table) // 2]
    levels = codes.to(dtype)
    return levels.sub_(zero_point) if zero_point else levels


def integer_linear(
    x: Quantized, w: Quantized, x_grid: Grid, w_grid: Grid, dtype: torch.dtype, bits: Bits | None = None
) -> Tensor:
    """Multiply quantized `x` (..., I) by quantized `w` (O, I) transposed: (..., O) in `dtype`, differentiable in both
    values. bits: of the codes of x and w, to multiply them as integers; None: levels as floats."""
    operands = x.values, w.values, x.codes, w.codes, x.step, w.step, x.offset, w.offset
    return _IntegerLinear.apply(*operands, x_grid, w_grid, dtype, bits, x.bins)


def add_offsets(
    y: Tensor,
    x_sums: Tensor,
    w_sums: Tensor,
    x: tuple[Tensor, Tensor | None],
    w: tuple[Tensor, Tensor | None],
    k: int | Tensor,
) -> Tensor:
    """`y` (..., O) plus what the operands' offsets contribute. x, w: step and offset; x_sums (..., 1), w_sums (O,):
    sums of levels over the `k` inputs. In an image `w_sums` and `k` differ from place to place."""
    (x_step, x_offset), (w_step, w_offset) = x, w
    if x_offset is not None:
        y = y + x_offset * (w_sums * w_step.reshape(-1))
    if w_offset is not None:
        y = y + x_sums * x_step * w_offset.reshape(-1)
    if x_offset is not None and w_offset is not None:
        y = y + k * x_offset * w_offset.reshape(-1)
    return y


class _IntegerLinear(torch.autograd.Function):
    """`x_values` and `w_values` are here for their gradients only: the numbers come from codes and steps."""

    @staticmethod
    def forward(
        ctx: Any,
        x_values: Tensor,
        w_values: Tensor,
        x_codes: Tensor,
        w_codes: Tensor,
        x_step: Tensor,
        w_step: Tensor,
        x_offset: Tensor | None,
        w_offset: Tensor | None,
        x_grid: Grid,
        w_grid: Grid,
        dtype: torch.dtype,
        bits: Bits | None,
        x_bins: Tensor | None,
    ) -> Tensor:
        ctx.x_shift = 0 if x_bins is None or bits is None else 8 - bits[0]
        ctx.save_for_backward(x_bins if ctx.x_shift else x_codes, w_codes, x_step, w_step, x_offset, w_offset)
        ctx.x_grid, ctx.w_grid, ctx.dtype = x_grid, w_grid, dtype
        ctx.x_dtype, ctx.w_dtype = x_values.dtype, w_values.dtype
        x, w = (x_codes, x_step, x_offset, x_grid), (w_codes, w_step, w_offset, w_grid)
        with no_autocast(x_codes.device):
            return _multiply_levels(x, w, dtype) if bits is None else _multiply_codes(x, w, dtype, bits)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, w_codes, x_step, w_step, x_offset, w_offset = ctx.saved_tensors
        g = g.to(ctx.dtype)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = (g @ values_of(w_codes, ctx.w_grid, w_step, w_offset, ctx.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            x_codes = x_codes >> ctx.x_shift if ctx.x_shift else x_codes
            x = values_of(x_codes, ctx.x_grid, x_step, x_offset, ctx.dtype)
            grad_w = (g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])).to(ctx.w_dtype)
        return grad_x, grad_w, *[None] * 11


def _multiply_levels(x: Operand, w: Operand, dtype: torch.dtype) -> Tensor:
    """In floats. float16 ends at 65504, which sums of levels pass."""
    (x_codes, x_step, x_offset, x_grid), (w_codes, w_step, w_offset, w_grid) = x, w
    sums = torch.float32 if dtype == torch.float16 else dtype
    x_levels, w_levels = levels_of(x_codes, x_grid, sums), levels_of(w_codes, w_grid, sums)
    y = (x_levels @ w_levels.T) * w_step.reshape(-1) * x_step
    if x_offset is not None or w_offset is not None:
        wide = torch.promote_types(x_step.dtype, torch.float32)
        x_sums, w_sums = x_levels.sum(-1, keepdim=True, dtype=wide), w_levels.sum(-1, dtype=wide)
        y = add_offsets(y, x_sums, w_sums, (x_step, x_offset), (w_step, w_offset), x_codes.shape[-1])
    return y.to(dtype)


def _multiply_codes(x: Operand, w: Operand, dtype: torch.dtype, bits: Bits) -> Tensor:
    """In integers."""
    (x_codes, x_step, x_offset, (x_zero, _)), (w_codes, w_step, w_offset, (w_zero, _)) = x, w
    if x_offset is None and w_offset is None:
        return kernels.integer_linear(x_codes, w_codes, x_step, w_step, x_zero, w_zero, dtype, *bits)
    wide, columns = torch.promote_types(x_step.dtype, torch.float32), x_codes.shape[-1]
    y = kernels.integer_linear(x_codes, w_codes, x_step, w_step, x_zero, w_zero, wide, *bits)
    x_sums = x_codes.sum(-1, keepdim=True, dtype=torch.int32) - columns * x_zero
    w_sums = w_codes.sum(-1, dtype=torch.int32) - columns * w_zero
    return add_offsets(y, x_sums.to(wide), w_sums.to(wide), (x_step, x_offset), (w_step, w_offset), columns).to(dtype)


def values_of(codes: Tensor, grid: Grid, step: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Values of centred int8 codes in `dtype`: level times step plus offset, which broadcast to the codes."""
    values = levels_of(codes, grid, dtype).mul_(step.to(dtype))
    return values if offset is None else values.add_(offset.to(dtype))
