"""BBQ without its values: codes in one pass over the input, and the gradient in one over what was kept of it.

The formulas are those of `bitbell.quantizers.bbq`; `bitbell.kernels.training` has the operators. For the backward pass
a weight keeps its codes, and an activation its codes and the rotated input in the type of the products.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bitbell.kernels import product_dtype
from bitbell.kernels.training import BELL_SLOPE, bell_gradient, bell_quantize
from bitbell.quantizers.base import gradient_carrier
from bitbell.quantizers.steps import SMALLEST_SIZE


class FusedBellBox(torch.autograd.Function):
    """Carrier of the gradient, codes, step and 1 / RMS of `x`. group: "row" or "tensor"; rms_gradient: whether the
    gradient flows through an RMS that is not frozen; shares: how many processes hold parts of the batch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        frozen: Tensor | None,
        group: str,
        bits: int,
        zero_point: float,
        rotation: int | None,
        rms_gradient: bool,
        is_weight: bool,
        shares: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        narrow, block = product_dtype(x), rotation or 1
        how = bits, block, group, frozen, SMALLEST_SIZE
        codes, inverse_rms, kept = bell_quantize(x, *how, None if is_weight else narrow)
        step = scale.float() / 2 ** (bits - 1) + 0 / inverse_rms
        ctx.save_for_backward(x if is_weight else kept, scale, codes, inverse_rms)
        radial = group if rms_gradient and frozen is None else "none"
        ctx.how, ctx.x_dtype, ctx.kept_rotated = (zero_point, block, radial), x.dtype, not is_weight
        ctx.factor = 2.0 ** (1 - bits) / math.sqrt(max(x.numel(), 1) * shares)
        ctx.mark_non_differentiable(codes, step, inverse_rms)
        # A weight's gradient comes from one product. An input's is a sum over the layers that it feeds: in float32.
        return gradient_carrier(x, narrow if is_weight else torch.float32), codes, step, inverse_rms

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        kept, scale, codes, inverse_rms = ctx.saved_tensors
        slope = scale.float() * inverse_rms * BELL_SLOPE
        grad_x, sums = bell_gradient(g, kept, ctx.kept_rotated, codes, inverse_rms, slope, *ctx.how, ctx.x_dtype)
        grad_scale = (sums.sum_to_size(scale.shape) * ctx.factor).to(scale.dtype)
        return grad_x, grad_scale, *[None] * 8
