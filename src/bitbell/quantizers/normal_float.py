"""NormalFloat (QLoRA, Dettmers et al., NeurIPS 2023, arXiv 2305.14314): levels at quantiles of a Gaussian.

    p = linspace(d, 1/2, n/2) and linspace(1/2, 1 - d, n/2 + 1) without the 1/2     n = 2**bits
    d = (1 / (2 n) + 1 / (2 n - 2)) / 2
    levels = Phi^-1(p) / max                           from -1 to 1, zero among them
    y = max|h| * (the level nearest to h / max|h|)
    dL/dh = dL/dy

The grid is not uniform: the product of two such tensors is no integer product, and the packed model looks its levels
up. NF4 is the published table; NF2 and NF3 follow the same rule, as in BBQ's comparison (arXiv 2603.01599).
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from bitbell.quantizers.base import Quantized, table_like
from bitbell.quantizers.formula import FormulaQuantizer
from bitbell.quantizers.steps import nearest, straight_through


class NormalFloat(FormulaQuantizer):
    """Quantize to the NormalFloat levels of 2 to 4 bits, scaled to the largest magnitude. Options: see
    `FormulaQuantizer`; no rotation by default."""

    method = "nf"
    widths = range(2, 5)
    rotates = False
    statistic = "absmax"

    def __init__(
        self,
        bits: int,
        rows: int | None = None,
        granularity: str | None = None,
        rotation: int | None = None,
    ) -> None:
        super().__init__(bits, rows, granularity, rotation)
        self.table = normal_float_levels(bits)

    def formula(self, h: Tensor, size: Tensor) -> Quantized:
        assert self.table is not None
        levels = table_like(self.table, h)
        code, level = nearest(h / size, levels)
        values = straight_through(level * size, h)
        return Quantized(values, (code - 2 ** (self.bits - 1)).to(torch.int8), size)


def normal_float_levels(bits: int) -> tuple[float, ...]:
    """The 2**bits levels, rising from -1 to 1."""
    half = 2 ** (bits - 1)
    d = (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    p = [d + (0.5 - d) * i / (half - 1) for i in range(half)] + [0.5 + (0.5 - d) * i / half for i in range(1, half + 1)]
    quantiles = [NormalDist().inv_cdf(share) for share in p]
    largest = max(map(abs, quantiles))
    return tuple(round(q / largest, 12) for q in quantiles)
