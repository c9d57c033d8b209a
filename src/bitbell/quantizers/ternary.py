"""Ternary weights (TriLM of Spectra, Kaushal et al., arXiv 2407.12327; BitNet b1.58, Ma et al., arXiv 2402.17764).

    s = mean|h|
    y = s clip(round(h / s), -1, 1)                    three levels: -s, 0, s
    dL/dh = dL/dy

Three of the four codes of 2 bits are used, so the recipe says 2 bits and the entropy is at most log2(3) = 1.585.
Activations go with absmax by default, as in BitNet; TriLM leaves them alone (`ternary-w2a16`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitbell.kernels.quantize import Plan
from bitbell.quantizers.base import Quantized
from bitbell.quantizers.formula import FormulaQuantizer
from bitbell.quantizers.steps import straight_through


class Ternary(FormulaQuantizer):
    """Quantize to -s, 0 and s, stored in 2 bits. Options: see `FormulaQuantizer`; no rotation, and one scale for a
    whole weight, by default."""

    method = "ternary"
    widths = range(2, 3)
    rotates = False
    weights_share_scale = True
    activation_method = "absmax"
    statistic = "absmean"
    grid_zero_point = 0.0

    def __init__(
        self,
        bits: int = 2,
        rows: int | None = None,
        granularity: str | None = None,
        rotation: int | None = None,
    ) -> None:
        super().__init__(bits, rows, granularity, rotation)

    def formula(self, h: Tensor, size: Tensor) -> Quantized:
        code = (h / size).round().clamp(-1, 1)
        return Quantized(straight_through(code * size, h), code.to(torch.int8), size)

    def plan(self) -> Plan | None:
        measured = self.measured()
        if measured is None:
            return None
        codes: dict[str, Any] = {"round_add": 0.0, "low": -1.0, "high": 1.0, "zero_point": 0.0}
        return Plan(self.bits, self.rotation or 1, **measured, **codes)
