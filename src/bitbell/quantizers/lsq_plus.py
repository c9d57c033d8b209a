"""LSQ+ (Bhalgat et al., CVPR Workshops 2020, arXiv 2004.09576): LSQ with a learned offset for activations.

    r = clip(round((x - b) / s - 1/2), -Qn, Qp) + 1/2      Qn = 2**(bits-1), Qp = Qn - 1
    y = s r + b

Backward, straight through the rounding: dL/dx inside the clip; dL/ds as in LSQ; dL/db = sum of dL/dy outside the clip;
both times 1 / sqrt(numel Qp). They start at the mean and at the step with the least squared error on a Gaussian of the
data's variance. Weights have no offset.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitbell.kernels import rotate
from bitbell.kernels.quantize import Plan, mid_rise_codes
from bitbell.quantizers.base import Quantized, wide
from bitbell.quantizers.formula import FormulaQuantizer
from bitbell.quantizers.ranks import mean_over
from bitbell.quantizers.steps import OPTIMAL_CLIP, SMALLEST_SIZE, at_least, round_through, scale_gradient


class LSQPlus(FormulaQuantizer):
    """Quantize to `bits` bits with a learned step, and (asymmetric=True) a learned offset: one for the tensor, or
    with `rows` one per row. No rotation by default. The step takes part in weight decay, as LSQ's."""

    method = "lsq-plus"
    rotates = False
    weights_share_scale = True
    scale_decays = True
    layer_activation_options: ClassVar[dict[str, Any]] = {"asymmetric": True}

    def __init__(
        self, bits: int, rows: int | None = None, asymmetric: bool = False, rotation: int | None = None
    ) -> None:
        super().__init__(bits, rows, rotation=rotation)
        self.asymmetric = asymmetric
        if asymmetric:
            self.offset = nn.Parameter(torch.zeros_like(self.scale))

    def formula(self, h: Tensor, size: Tensor) -> Quantized:
        half = 2 ** (self.bits - 1)
        factor = 1 / math.sqrt(max(h.numel(), 1) * self.ranks.size * max(half - 1, 1))
        step = scale_gradient(at_least(self.scale.to(h.dtype), SMALLEST_SIZE), factor)
        offset = None if self.offset is None else scale_gradient(self.offset.to(h.dtype), factor)
        centred = h if offset is None else h - offset
        code = round_through((centred / step - 0.5).clamp(-half, half - 1))
        values = (code + 0.5) * step
        return Quantized(values if offset is None else values + offset, code.detach().to(torch.int8), step, offset)

    def plan(self) -> Plan:
        half = 2 ** (self.bits - 1)
        factor = 1 / math.sqrt(max(half - 1, 1) * self.ranks.size)
        return Plan(
            self.bits,
            self.rotation or 1,
            smallest=SMALLEST_SIZE,
            centred=self.offset is not None,
            **mid_rise_codes(self.bits),
            slope="window",
            window_low=0.5 - half,
            window_high=half - 0.5,
            scale_gradient="error",
            scale_factor=factor,
            offset_gradient="outside" if self.offset is not None else "none",
            offset_factor=factor,
        )

    def initial_scale(self, x: Tensor) -> Tensor:
        h = rotate(wide(x), self.rotation)
        h = h.reshape(1, -1) if self.rows is None else h
        mean = mean_over(h.mean(-1, keepdim=True), self.ranks)
        if self.offset is not None:
            self.offset.copy_(mean.reshape(self.offset.shape))
            h = h - mean
        rms = mean_over(h.square().mean(-1, keepdim=True), self.ranks).sqrt()
        step = 2 * OPTIMAL_CLIP[self.bits] / (2**self.bits - 1) * rms
        return step.reshape(self.scale.shape).clamp_min(SMALLEST_SIZE)

    def step(self) -> Tensor:
        return self.scale.clamp_min(SMALLEST_SIZE)

    def options(self) -> dict[str, Any]:
        return super().options() | {"asymmetric": self.asymmetric}
