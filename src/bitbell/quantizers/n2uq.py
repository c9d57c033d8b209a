"""N2UQ, nonuniform-to-uniform quantization (Liu et al., CVPR 2022, arXiv 2111.14826).

Activations: thresholds are learned, levels are even. With K = 2**bits - 1 segments of widths a_1 .. a_K from t on:

    count = how many segments' midpoints lie below u = s1 x
    y = s2 D (count - K/2)
    backward: as if count were the line through the segments, slope 1 / a_k in segment k, zero before and after

so x, s1, t and every a_k learn from where the line bends, and s2 from y. Start: s1 = s2 = 1, a_k = D = 4 RMS / K,
t = -2 RMS. No segment gets narrower than D / 1000.

Weights: an even grid with a computed scale that keeps the entropy high,

    s = (2**bits - 1) / 2**(bits - 1) * mean|w|        per row
    y = s (2 round((clip(w / s, -1, 1) + 1) (2**bits - 1) / 2) / (2**bits - 1) - 1)
    dL/dw = dL/dy / s                                  as published; "identity" passes dL/dy
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitbell.kernels import rotate
from bitbell.kernels.quantize import Plan
from bitbell.quantizers.base import Quantized, wide
from bitbell.quantizers.formula import FormulaQuantizer
from bitbell.quantizers.steps import look_up, round_through, size_of, straight_through

NARROWEST = 1e-3  # of a segment, in units of D


class N2UQ(FormulaQuantizer):
    """N2UQ of weights. Options: see `FormulaQuantizer`; estimator: "published" or "identity". No rotation by default;
    a layer's activations go with `N2UQActivations`."""

    method = "n2uq"
    rotates = False
    activation_method = "n2uq-activations"
    statistic = "absmean"

    def __init__(
        self,
        bits: int,
        rows: int | None = None,
        granularity: str | None = None,
        estimator: str = "published",
        rotation: int | None = None,
    ) -> None:
        super().__init__(bits, rows, granularity, rotation)
        if estimator not in ("published", "identity"):
            raise ValueError(f"estimator must be published or identity, got estimator={estimator!r}")
        self.estimator = estimator

    def formula(self, h: Tensor, size: Tensor) -> Quantized:
        top = 2**self.bits - 1
        scale = size * (top / 2 ** (self.bits - 1))
        step = 2 * scale / top
        count = ((h.detach() / scale).clamp(-1, 1).add(1) * (top / 2)).round()
        through = h / scale if self.estimator == "published" else h
        values = straight_through((count - top / 2) * step, through)
        return Quantized(values, (count - 2 ** (self.bits - 1)).to(torch.int8), step)

    def plan(self) -> Plan | None:
        measured, half, top = self.measured(), 2 ** (self.bits - 1), 2**self.bits - 1
        if measured is None:
            return None
        codes = {"round_add": half - 0.5, "low": 0.0, "high": float(top), "code_plus": -float(half)}
        slope = {"relative": "inverse", "slope_factor": 2 / top} if self.estimator == "published" else {}
        return Plan(self.bits, self.rotation or 1, **measured, divisor=2 / half, step_factor=2 / half, **codes, **slope)

    def options(self) -> dict[str, Any]:
        return super().options() | {"estimator": self.estimator}


class N2UQActivations(FormulaQuantizer):
    """N2UQ of activations: one set of learned thresholds for the tensor. No rotation by default.

    scale: s2, the step in units of D. input_scale: s1. start: t. segments: a_1 .. a_K, (2**bits - 1,). interval: D.
    """

    method = "n2uq-activations"
    for_weights = False
    rotates = False
    interval: Tensor

    def __init__(self, bits: int, rotation: int | None = None) -> None:
        super().__init__(bits, rotation=rotation)
        self.input_scale = nn.Parameter(torch.ones(1))
        self.start = nn.Parameter(torch.zeros(1))
        self.segments = nn.Parameter(torch.ones(2**bits - 1))
        self.register_buffer("interval", torch.ones(1))

    def formula(self, h: Tensor, size: Tensor) -> Quantized:
        top = 2**self.bits - 1
        widths = torch.maximum(self.segments, NARROWEST * self.interval).to(h.dtype)
        u = h * self.input_scale.to(h.dtype)
        edges = self.start.to(h.dtype) + torch.cat([widths.new_zeros(1), widths.cumsum(0)])
        k, edge, width = look_up(u, edges[1:-1], edges[:-1], widths)
        count = round_through(((u - edge) / width).clamp(0, 1) + k)
        step = (self.scale * self.interval).to(h.dtype)
        codes = (count.detach() - 2 ** (self.bits - 1)).to(torch.int8)
        return Quantized((count - top / 2) * step, codes, step)

    def initial_scale(self, x: Tensor) -> Tensor:
        rms = size_of(rotate(wide(x), self.rotation), "rms", by_row=False, ranks=self.ranks)
        self.interval.copy_(4 * rms / (2**self.bits - 1))
        self.segments.copy_(self.interval.expand_as(self.segments))
        self.start.copy_(-2 * rms)
        self.input_scale.fill_(1.0)
        return 1 + 0 * rms  # an overflow shows

    def step(self) -> Tensor:
        return self.scale * self.interval

    def options(self) -> dict[str, Any]:
        return {"bits": self.bits, "rotation": self.rotation}
