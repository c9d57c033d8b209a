"""PACT (Choi et al., arXiv 1805.06085): a learned clip. Symmetric here, for values of both signs.

    s = 2 a / (2**bits - 1)
    y = s (clip(round(x / s - 1/2)) + 1/2)             2**bits symmetric levels from -a to a
    dL/dx = dL/dy where |x| <= a, zero beyond
    dL/da = sum(dL/dy * sign(x) where |x| > a)

Only clipped values teach the clip. BBQ's and QuEST's comparison code cuts the gradient to x everywhere by mistake; here
it is the paper's. The clip starts where LSQ's step starts, and takes part in weight decay, which is what makes it
shrink.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitbell.kernels import rotate
from bitbell.kernels.quantize import Plan, mid_rise_codes
from bitbell.quantizers.base import Quantized, wide
from bitbell.quantizers.formula import FormulaQuantizer
from bitbell.quantizers.lsq import lsq_start
from bitbell.quantizers.steps import SMALLEST_SIZE, at_least, mid_rise, straight_through


class PACT(FormulaQuantizer):
    """Quantize to `bits` bits between -a and a, a learned: one for the tensor, or with `rows` one per row. No rotation
    by default."""

    method = "pact"
    rotates = False
    weights_share_scale = True
    scale_decays = True

    def __init__(self, bits: int, rows: int | None = None, rotation: int | None = None) -> None:
        super().__init__(bits, rows, rotation=rotation)

    def formula(self, h: Tensor, size: Tensor) -> Quantized:
        clip = at_least(self.scale.to(h.dtype), SMALLEST_SIZE)
        step = 2 * clip.detach() / (2**self.bits - 1)
        code = mid_rise(h / step, self.bits)
        # The clipped input carries both gradients: to h inside the clip, to the clip itself beyond it.
        clipped = torch.clamp(h, -clip, clip)
        return Quantized(straight_through((code + 0.5) * step, clipped), code.to(torch.int8), step)

    def plan(self) -> Plan:
        steps = 2**self.bits - 1
        return Plan(
            self.bits,
            self.rotation or 1,
            smallest=SMALLEST_SIZE,
            divisor=2 / steps,
            step_factor=2 / steps,
            **mid_rise_codes(self.bits),
            slope="window",
            window_low=-steps / 2,
            window_high=steps / 2,
            scale_gradient="sign",
            damped=False,
        )

    def initial_scale(self, x: Tensor) -> Tensor:
        step = lsq_start(rotate(wide(x), self.rotation), self.bits, self.rows is not None, self.ranks)
        return (step * (2**self.bits - 1) / 2).clamp_min(SMALLEST_SIZE)

    def step(self) -> Tensor:
        return 2 * self.scale.clamp_min(SMALLEST_SIZE) / (2**self.bits - 1)
