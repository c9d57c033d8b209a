"""Absmax with the plain straight-through estimator: the baseline that every other method improves on.

    s = 2 max|h| / (2**bits - 1)                       the outermost level is the largest magnitude
    y = s (clip(round(h / s - 1/2)) + 1/2)             2**bits symmetric levels
    dL/dh = dL/dy

The straight-through estimator is that of Bengio et al. (arXiv 1308.3432). One outlier sets the scale of all that share
it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitbell.kernels.quantize import Plan, mid_rise_codes
from bitbell.quantizers.base import Quantized
from bitbell.quantizers.formula import FormulaQuantizer
from bitbell.quantizers.steps import mid_rise, straight_through


class AbsMax(FormulaQuantizer):
    """Quantize to `bits` bits between -max|x| and max|x|. Options: see `FormulaQuantizer`; no rotation by default."""

    method = "absmax"
    rotates = False
    statistic = "absmax"

    def formula(self, h: Tensor, size: Tensor) -> Quantized:
        step = 2 * size / (2**self.bits - 1)
        code = mid_rise(h / step, self.bits)
        return Quantized(straight_through((code + 0.5) * step, h), code.to(torch.int8), step)

    def plan(self) -> Plan | None:
        measured, step = self.measured(), 2 / (2**self.bits - 1)
        if measured is None:
            return None
        return Plan(
            self.bits, self.rotation or 1, **measured, divisor=step, step_factor=step, **mid_rise_codes(self.bits)
        )
