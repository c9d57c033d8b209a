"""The integer product of training: the same integers, and the same last steps, as the packed model's.

    y = (levels_x . levels_w^T) * step_w * step_x

Levels are small integers or half-integers, so float32 multiplies and sums them exactly, and only the two steps round.
Under bfloat16 autocast the operands are exact too, but the sum is rounded to bfloat16 before the steps. For the
backward pass it keeps codes (one byte an element) instead of float tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitbell.kernels import no_autocast
from bitbell.quantizers import Quantized


def integer_linear(x: Quantized, w: Quantized, x_zero_point: float, w_zero_point: float, dtype: torch.dtype) -> Tensor:
    """Multiply quantized `x` (..., I) by quantized `w` (O, I) transposed: (..., O) in `dtype`, differentiable in both
    values."""
    return _IntegerLinear.apply(x.values, w.values, x.codes, w.codes, x.step, w.step, x_zero_point, w_zero_point, dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer would compute in for input `x`: autocast's type where that is on, else the input's own."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


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
        x_zero_point: float,
        w_zero_point: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x_codes, w_codes, x_step, w_step)
        ctx.x_zero_point, ctx.w_zero_point, ctx.dtype = x_zero_point, w_zero_point, dtype
        ctx.x_dtype, ctx.w_dtype = x_values.dtype, w_values.dtype
        with no_autocast(x_codes.device):
            # float16 ends at 65504, which sums of levels pass.
            sums = torch.float32 if dtype == torch.float16 else dtype
            total = _levels(x_codes, x_zero_point, sums) @ _levels(w_codes, w_zero_point, sums).T
        return (total * w_step.reshape(-1) * x_step).to(dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, w_codes, x_step, w_step = ctx.saved_tensors
        g = g.to(ctx.dtype)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            w = _levels(w_codes, ctx.w_zero_point, ctx.dtype).mul_(w_step.to(ctx.dtype))
            grad_x = (g @ w).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            x = _levels(x_codes, ctx.x_zero_point, ctx.dtype).mul_(x_step.to(ctx.dtype))
            grad_w = (g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])).to(ctx.w_dtype)
        return grad_x, grad_w, *[None] * 7


def _levels(codes: Tensor, zero_point: float, dtype: torch.dtype) -> Tensor:
    levels = codes.to(dtype)
    return levels.sub_(zero_point) if zero_point else levels
