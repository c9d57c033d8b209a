"""LSQ, Learned Step Size Quantization (Esser et al., ICLR 2020, arXiv 1902.08153), with symmetric half-integer levels.

    r = clip(round(x / s - 1/2), -Qn, Qp) + 1/2        Qn = 2**(bits-1), Qp = Qn - 1
    y = s r

Backward: dL/dx = dL/dy inside the clip and zero outside; dL/ds = sum(dL/dy * (r - x/s inside, r outside)) /
sqrt(numel Qp). The grid is the one of BBQ's and QuEST's comparison (2**bits levels, none of them zero). Their code
divides by Qp = 0 at 1 bit; here Qp counts as 1 in the start value and in the gradient's factor, so 1 bit works: y =
+-s/2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bitbell.kernels import product_dtype, rotate, rotate_gradient
from bitbell.kernels.quantize import Plan, mid_rise_codes
from bitbell.quantizers.base import Quantized, Quantizer, sum_to, wide
from bitbell.quantizers.ranks import ALONE, Ranks
from bitbell.quantizers.steps import SMALLEST_SIZE, size_of


class LSQ(Quantizer):
    """Quantize to `bits` bits with a learned step: one for the tensor, or with `rows` one per row. No rotation by
    default.

    The scale is the step. As in the published comparisons it takes part in weight decay.
    """

    method = "lsq"
    scale_decays = True
    rotates = False
    weights_share_scale = True

    def __init__(self, bits: int, rows: int | None = None, rotation: int | None = None) -> None:
        super().__init__(bits, rows, rotation, zero_point=-0.5)

    def quantize(self, x: Tensor) -> Quantized:
        self.check_input(x)
        self.require_calibrated()
        fused = self.fuse(x)
        if fused is not None:
            return fused[0]
        return Quantized(*_LearnedStep.apply(x, self.scale, self.bits, self.rotation, self.ranks.size))

    def plan(self) -> Plan:
        half = 2 ** (self.bits - 1)
        return Plan(
            self.bits,
            self.rotation or 1,
            smallest=SMALLEST_SIZE,
            **mid_rise_codes(self.bits),
            slope="window",
            window_low=0.5 - half,
            window_high=half - 0.5,
            scale_gradient="error",
            scale_factor=1 / math.sqrt(_top(self.bits) * self.ranks.size),
        )

    def initial_scale(self, x: Tensor) -> Tensor:
        return lsq_start(rotate(wide(x), self.rotation), self.bits, self.rows is not None, self.ranks)

    def step(self) -> Tensor:
        return self.scale.clamp_min(SMALLEST_SIZE)

    def options(self) -> dict[str, Any]:
        return {name: value for name, value in super().options().items() if name != "zero_point"}


def lsq_start(h: Tensor, bits: int, by_row: bool, ranks: Ranks = ALONE) -> Tensor:
    """The step 2 mean|h| / sqrt(Qp) to start from: (1,), or (rows, 1) by row."""
    return (2 * size_of(h, "absmean", by_row, ranks) / math.sqrt(_top(bits))).clamp_min(SMALLEST_SIZE)


def _top(bits: int) -> int:
    return max(2 ** (bits - 1) - 1, 1)


class _LearnedStep(torch.autograd.Function):
    """The formulas above. Keeps `x` and the codes (int8) for the backward pass and recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, bits: int, rotation: int | None, shares: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = rotate(wide(x), rotation)
        step = scale.to(h.dtype).clamp_min(SMALLEST_SIZE)
        half = 2 ** (bits - 1)
        code = (h / step - 0.5).round().clamp(-half, half - 1)
        codes = code.to(torch.int8)
        traced_step = step + 0 * h.sum()  # NaN or infinity in x shows in the step, since int8 cannot carry it
        ctx.save_for_backward(x, scale, codes)
        ctx.bits, ctx.rotation, ctx.narrow = bits, rotation, product_dtype(x)
        ctx.numel = max(x.numel(), 1) * shares  # of the whole batch, of which `x` may be one share
        ctx.mark_non_differentiable(codes, traced_step)
        return (code + 0.5) * traced_step, codes, traced_step

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, codes = ctx.saved_tensors
        h = rotate(wide(x), ctx.rotation)
        half = 2 ** (ctx.bits - 1)
        ratio = h / scale.to(h.dtype).clamp_min(SMALLEST_SIZE)
        inside = (ratio - 0.5 >= -half) & (ratio - 0.5 <= half - 1)
        error = codes.to(g.dtype) + 0.5 - torch.where(inside, ratio, 0.0)
        grad_scale = sum_to(g * error, scale) / math.sqrt(ctx.numel * _top(ctx.bits))
        grad_x = rotate_gradient(g * inside, ctx.rotation, ctx.narrow).to(x.dtype)
        return grad_x, grad_scale.to(scale.dtype), None, None, None
