"""BBQ without its values: codes in one pass over the input, and the gradient in one over what was kept of it.

The formulas are those of `bitbell.quantizers.bbq`; `bitbell.kernels.training` has the operators. For the backward pass
a weight keeps its codes, and an activation its codes and the rotated input in the type of the products. A compact
activation keeps one byte: its code in 256 equally likely bins. The code proper is the upper bits of it, and the slope
is known to one bin; gradients then differ from those of fake quantization by about as much as bfloat16 rounds.
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
    gradient flows through an RMS that is not frozen; shares: how many processes hold parts of the batch; compact: keep
    bins, which are returned last."""

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
        compact: bool,
    ) -> tuple[Tensor, ...]:
        narrow, block = product_dtype(x), rotation or 1
        keep = None if is_weight else torch.int8 if compact else narrow
        codes, inverse_rms, kept = bell_quantize(x, bits, block, group, frozen, SMALLEST_SIZE, keep)
        step = scale.float() / 2 ** (bits - 1) + 0 / inverse_rms
        ctx.save_for_backward(x if is_weight else kept, scale, kept if compact else codes, inverse_rms)
        radial = group if rms_gradient and frozen is None else "none"
        ctx.how, ctx.x_dtype, ctx.kept_rotated = (bits, zero_point, block, radial), x.dtype, not is_weight
        ctx.factor = 2.0 ** (1 - bits) / math.sqrt(max(x.numel(), 1) * shares)
        bins = kept if compact else codes.new_empty(0)
        ctx.mark_non_differentiable(codes, step, inverse_rms, bins)
        # A weight's gradient comes from one product. An input's is a sum over the layers that it feeds: in float32.
        return gradient_carrier(x, narrow if is_weight else torch.float32), codes, step, inverse_rms, bins

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        kept, scale, codes, inverse_rms = ctx.saved_tensors
        slope = scale.float() * inverse_rms * BELL_SLOPE
        grad_x, sums = bell_gradient(g, kept, ctx.kept_rotated, codes, inverse_rms, slope, *ctx.how, ctx.x_dtype)
        grad_scale = (sums.sum_to_size(scale.shape) * ctx.factor).to(scale.dtype)
        return grad_x, grad_scale, *[None] * 9
