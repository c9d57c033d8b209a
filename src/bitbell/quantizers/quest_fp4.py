"""QuEST on the FP4 grid (Panferov et al., ICML 2025, arXiv 2502.05003): the 16 codes of E2M1, scaled for a Gaussian.

    h = x H                                            block-diagonal Hadamard
    s = 0.4870795 RMS(h)                               least squared error of a Gaussian on this grid
    y = s * (the nearest of +-0, +-1/2, +-1, +-3/2, +-2, +-3, +-4, +-6 to h / s)

Backward: the gradient passes up to half a gap beyond the outermost level, |h| <= 7 s, as QuEST's trust mask does on
uniform levels. Products of these levels are multiples of 1/4, exact in float32 and on FP4 hardware, but the grid is not
uniform, so integer hardware does not multiply it as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitbell.kernels import ROTATION_BLOCK
from bitbell.quantizers.base import Quantized, table_like
from bitbell.quantizers.formula import FormulaQuantizer
from bitbell.quantizers.steps import nearest, straight_through

E2M1 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
OPTIMAL_STEP = 0.4870795  # in units of the RMS
TRUSTED = 6.0 + (6.0 - 4.0) / 2


class QuESTFP4(FormulaQuantizer):
    """Quantize to the 16 values of E2M1. bits: 4. Options: see `FormulaQuantizer`; rotates by default."""

    method = "quest-fp4"
    widths = range(4, 5)
    statistic = "rms"
    table = E2M1

    def __init__(
        self,
        bits: int = 4,
        rows: int | None = None,
        granularity: str | None = None,
        rotation: int | None = ROTATION_BLOCK,
    ) -> None:
        super().__init__(bits, rows, granularity, rotation)

    def formula(self, h: Tensor, size: Tensor) -> Quantized:
        step = OPTIMAL_STEP * size
        levels = table_like(E2M1, h)
        code, level = nearest(h / step, levels)
        values = straight_through(level * step, h, h.abs() <= TRUSTED * step)
        return Quantized(values, (code - 8).to(torch.int8), step)
