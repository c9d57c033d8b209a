"""SEQ, stretched elastic quantization (ParetoQ, Liu et al., arXiv 2502.02631): a learned range, cut into even levels.

    m = 2**(bits - 1)
    k = round(clip(x / a, -0.99, 0.99) m - 1/2)
    y = a (k + 1/2) / m                                1 bit: y = a sign(x)

Backward, straight through the rounding: dL/dx where |x / a| <= 0.99; dL/da = sum(dL/dy * t) / sqrt(numel Qp), where
t = y/a - x/a inside the clip and y/a outside it (1 bit: t = sign(x)), and Qp = max(m - 1, 1). The range starts at
max|x|, per row for weights and one for activations; at 1 bit at mean|x|, the least squared error, as ParetoQ's
binarization does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitbell.kernels import rotate
from bitbell.kernels.quantize import Plan, mid_rise_codes
from bitbell.quantizers.base import Quantized, wide
from bitbell.quantizers.formula import FormulaQuantizer
from bitbell.quantizers.steps import at_least, mid_rise, round_through, scale_gradient, size_of, straight_through

CLIP = 0.99
SMALLEST_RANGE = 1e-5


class SEQ(FormulaQuantizer):
    """Quantize to `bits` bits within a learned range: one for the tensor, or with `rows` one per row. No rotation by
    default."""

    method = "seq"
    rotates = False

    def __init__(self, bits: int, rows: int | None = None, rotation: int | None = None) -> None:
        super().__init__(bits, rows, rotation=rotation)

    def formula(self, h: Tensor, size: Tensor) -> Quantized:
        m = 2 ** (self.bits - 1)
        factor = 1 / math.sqrt(max(h.numel(), 1) * self.ranks.size * max(m - 1, 1))
        reach = scale_gradient(at_least(self.scale.to(h.dtype), SMALLEST_RANGE), factor)
        ratio = h / reach
        if self.bits == 1:
            code = mid_rise(ratio, 1)
            through = straight_through(torch.zeros_like(h), h, ratio.detach().abs() <= CLIP)
            return Quantized(2 * (code + 0.5) * reach + through, code.to(torch.int8), 2 * reach)
        code = round_through(ratio.clamp(-CLIP, CLIP) * m - 0.5)
        return Quantized((code + 0.5) * (reach / m), code.detach().to(torch.int8), reach / m)

    def plan(self) -> Plan:
        m = 2 ** (self.bits - 1)
        codes = mid_rise_codes(self.bits)
        if self.bits > 1:
            codes |= {"low": float(round(-CLIP * m - 0.5)), "high": float(round(CLIP * m - 0.5))}
        return Plan(
            self.bits,
            self.rotation or 1,
            smallest=SMALLEST_RANGE,
            divisor=1 / m,
            step_factor=2.0 if self.bits == 1 else 1 / m,
            **codes,
            slope="window",
            window_low=-CLIP * m,
            window_high=CLIP * m,
            scale_gradient="level" if self.bits == 1 else "error",
            scale_factor=(2.0 if self.bits == 1 else 1 / m) / math.sqrt(max(m - 1, 1) * self.ranks.size),
        )

    def initial_scale(self, x: Tensor) -> Tensor:
        statistic = "absmean" if self.bits == 1 else "absmax"
        size = size_of(rotate(wide(x), self.rotation), statistic, self.rows is not None, self.ranks)
        return size.clamp_min(SMALLEST_RANGE)

    def step(self) -> Tensor:
        reach = self.scale.clamp_min(SMALLEST_RANGE)
        return 2 * reach if self.bits == 1 else reach / 2 ** (self.bits - 1)
