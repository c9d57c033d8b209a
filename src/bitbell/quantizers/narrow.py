"""Narrow: a uniform grid clipped so narrowly that its codes are nearly equally likely, without a Gaussian CDF.

    s_in = c(bits) RMS(h)                              the step of the thresholds: greatest entropy on a Gaussian
    k = clip(round(h / s_in - 1/2))
    y = s_out (k + 1/2), s_out = d(bits) RMS(h)        the step of the levels: least squared error for these codes
    dL/dh = dL/dy where |h| <= (2**bits / 2) s_in, zero beyond

bitbell's own control experiment for BBQ (arXiv 2603.01599): 3.948 bits of entropy at 4 bits with a lower error than
BBQ's, so that entropy and companding can be told apart.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bitbell.kernels import ROTATION_BLOCK
from bitbell.kernels.quantize import Plan, mid_rise_codes
from bitbell.quantizers.base import Quantized
from bitbell.quantizers.formula import FormulaQuantizer
from bitbell.quantizers.steps import mid_rise, straight_through

# Step, in units of the RMS, with the greatest entropy of 2**bits uniform symmetric cells on a Gaussian; at 1 bit every
# step has it, and the one here is the least squared error's.
WIDEST_ENTROPY_STEP = {1: 2 * math.sqrt(2 / math.pi), 2: 0.6744898, 3: 0.3694858, 4: 0.1999421}


class Narrow(FormulaQuantizer):
    """Quantize to `bits` bits, 1 to 4, with a narrow clip. Options: see `FormulaQuantizer`; rotates by default."""

    method = "narrow"
    widths = range(1, 5)
    statistic = "rms"

    def __init__(
        self,
        bits: int,
        rows: int | None = None,
        granularity: str | None = None,
        rotation: int | None = ROTATION_BLOCK,
    ) -> None:
        super().__init__(bits, rows, granularity, rotation)
        self.level_step = least_error_step(WIDEST_ENTROPY_STEP[bits], bits)

    def formula(self, h: Tensor, size: Tensor) -> Quantized:
        threshold_step, step = WIDEST_ENTROPY_STEP[self.bits] * size, self.level_step * size
        code = mid_rise(h / threshold_step, self.bits)
        inside = h.abs() <= 2 ** (self.bits - 1) * threshold_step
        return Quantized(straight_through((code + 0.5) * step, h, inside), code.to(torch.int8), step)

    def plan(self) -> Plan | None:
        measured, half = self.measured(), float(2 ** (self.bits - 1))
        if measured is None:
            return None
        steps: dict[str, Any] = {"divisor": WIDEST_ENTROPY_STEP[self.bits], "step_factor": self.level_step}
        window: dict[str, Any] = {"slope": "window", "window_low": -half, "window_high": half}
        return Plan(self.bits, self.rotation or 1, **measured, **steps, **mid_rise_codes(self.bits), **window)

    def bin_width(self, x: Tensor) -> Tensor:
        return super().bin_width(x) * (WIDEST_ENTROPY_STEP[self.bits] / self.level_step)


def least_error_step(threshold_step: float, bits: int) -> float:
    """The step s with the least E[(v - s (k + 1/2))**2] for a standard Gaussian v cut into cells of `threshold_step`:
    E[v (k + 1/2)] / E[(k + 1/2)**2], by the Gaussian's own integrals over the cells."""
    half = 2 ** (bits - 1)
    edges = [i * threshold_step for i in range(half)] + [math.inf]
    density = [math.exp(-e * e / 2) / math.sqrt(2 * math.pi) for e in edges]
    below = [0.5 * math.erf(e / math.sqrt(2)) for e in edges]
    first = sum((i + 0.5) * (density[i] - density[i + 1]) for i in range(half))
    return first / sum((i + 0.5) ** 2 * (below[i + 1] - below[i]) for i in range(half))
