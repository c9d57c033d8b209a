"""QuEST (Panferov et al., ICML 2025, arXiv 2502.05003): MSE-optimal clipping and a trust mask.

    h = x H                                          block-diagonal Hadamard
    a = c RMS(h)          over the last dimension    c: MSE-optimal clip of a Gaussian for this bit width
    D = 2 a / (2**bits - 1)                          step
    y = D (round(clip(h, -a, a) / D - 1/2) + 1/2)    2**bits symmetric levels

Backward: the gradient passes where the error is at most half a step, |y - h| <= D / 2, and is zero elsewhere; the
scale is computed, not learned. `mask_scale` replaces the mask by |h| <= mask_scale * a, with which the paper's 1-bit
curve was made (mask_scale = 1.30; the default mask is the same as mask_scale = 2**bits / (2**bits - 1)).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bitbell.kernels import ROTATION_BLOCK, product_dtype, rotate, rotate_gradient
from bitbell.kernels.quantize import Plan, mid_rise_codes
from bitbell.quantizers.base import Quantized, Quantizer, wide
from bitbell.quantizers.ranks import Ranks, mean_over
from bitbell.quantizers.steps import BELL_SCALE, OPTIMAL_CLIP

TUNED_ONE_BIT_MASK = 1.30
ESTIMATORS = ("trust", "clip", "identity", "bell")


class QuEST(Quantizer):
    """Quantize to `bits` bits with the least squared error on a Gaussian.

    Weights: `rows` gives one scale per row. Activations: `rms` is "token" (the paper's: over the last dimension) or
    "tensor". mask_scale: width of the gradient mask in units of the clip; None for the trust mask. estimator, for
    ablation: "trust"; "clip" (a mask up to the clip itself); "identity"; "bell" (BBQ's slope 2 z phi(h / RMS), z =
    1.694). `scale` holds the clip of the tensor last calibrated on, for `decode`; every forward pass computes its own.
    """

    method = "quest"
    granularity_option = "rms"
    scale_is_learned = False

    def __init__(
        self,
        bits: int,
        rows: int | None = None,
        rms: str | None = None,
        mask_scale: float | None = None,
        rotation: int | None = ROTATION_BLOCK,
        estimator: str = "trust",
    ) -> None:
        super().__init__(bits, rows, rotation, zero_point=-0.5)
        if rms is not None and (rms not in ("token", "tensor") or rows is not None):
            allowed = "token or tensor" if rows is None else "left out with rows, which have an RMS each"
            raise ValueError(f"rms must be {allowed}, got rms={rms!r}")
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got estimator={estimator!r}")
        if mask_scale is not None and not mask_scale > 0:
            raise ValueError(f"mask_scale must be positive or None (the trust mask), got {mask_scale}")
        if mask_scale is not None and estimator != "trust":
            raise ValueError(f"mask_scale is of estimator='trust', got it with estimator={estimator!r}")
        self.rms = "row" if rows is not None else rms or "token"
        self.mask_scale, self.estimator = mask_scale, estimator

    def quantize(self, x: Tensor) -> Quantized:
        self.check_input(x)
        fused = self.fuse(x)
        if fused is not None:
            return fused[0]
        n = 2**self.bits
        mask_scale = n / (n - 1) if self.mask_scale is None else self.mask_scale
        mask_scale = 1.0 if self.estimator == "clip" else mask_scale
        how = self.bits, mask_scale, self.rotation, self.estimator, self.ranks
        return Quantized(*_TrustQuantize.apply(x, self.rms == "tensor", *how))

    def plan(self) -> Plan | None:
        if self.rms == "tensor" and self.ranks.group is not None:
            return None
        n = 2**self.bits
        clip_steps = (n - 1) / 2  # the clip, in steps
        mask = n / (n - 1) if self.mask_scale is None else self.mask_scale
        window = clip_steps * (1.0 if self.estimator == "clip" else mask)
        slope = {"trust": "window", "clip": "window", "identity": "identity", "bell": "bell"}[self.estimator]
        bell = self.estimator == "bell"
        factor, plus = OPTIMAL_CLIP[self.bits] / clip_steps, 1e-8 / clip_steps
        return Plan(
            self.bits,
            self.rotation or 1,
            statistic="rms",
            by_row=self.rms != "tensor",
            divisor=factor,
            divisor_plus=plus,
            step_factor=factor,
            step_plus=plus,
            **mid_rise_codes(self.bits),
            slope=slope,
            window_low=-window,
            window_high=window,
            bell_factor=factor,
            slope_factor=BELL_SCALE * math.sqrt(2 / math.pi) if bell else 1.0,
        )

    def initial_scale(self, x: Tensor) -> Tensor:
        clip = _clip(rotate(wide(x), self.rotation), self.rms == "tensor", self.bits, self.ranks)
        return mean_over(clip.mean().reshape(1), self.ranks) if self.rms == "token" else clip

    def step(self) -> Tensor:
        return 2 * self.scale / (2**self.bits - 1)

    def decode(self, codes: Tensor, step: Tensor | None = None) -> Tensor:
        """Values of `codes`. With one scale per token the step belongs to the input: pass `quantize(x).step`."""
        if step is None and self.rms == "token":
            raise ValueError("QuEST with rms='token' has a step for each token: pass step=quantizer.quantize(x).step")
        return super().decode(codes, step)

    def options(self) -> dict[str, Any]:
        kept = {name: value for name, value in super().options().items() if name != "zero_point"}
        rms = None if self.rms == "row" else self.rms
        return kept | {"rms": rms, "mask_scale": self.mask_scale, "estimator": self.estimator}


def _clip(h: Tensor, whole_tensor: bool, bits: int, ranks: Ranks) -> Tensor:
    square = h.square()
    mean = mean_over(square.mean().reshape(1), ranks) if whole_tensor else square.mean(-1, keepdim=True)
    return OPTIMAL_CLIP[bits] * mean.sqrt() + 1e-8


class _TrustQuantize(torch.autograd.Function):
    """The formulas above. Keeps only the mask for the backward pass, one byte an element."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        whole_tensor: bool,
        bits: int,
        mask_scale: float,
        rotation: int | None,
        estimator: str,
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = rotate(wide(x), rotation)
        clip = _clip(h, whole_tensor, bits, ranks)
        step = 2 * clip / (2**bits - 1)
        half = 2 ** (bits - 1)
        code = (h / step - 0.5).round().clamp(-half, half - 1)
        codes = code.to(torch.int8)
        # Gradients come out of products in this type; their rotation may be as narrow.
        ctx.rotation, ctx.narrow, ctx.x_dtype = rotation, product_dtype(x), x.dtype
        ctx.save_for_backward(_slope(h, clip, bits, mask_scale, estimator, ctx.narrow))
        ctx.mark_non_differentiable(codes, step)
        return (code + 0.5) * step, codes, step

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        grad_h = g if slope is None else g * slope
        return rotate_gradient(grad_h, ctx.rotation, ctx.narrow).to(ctx.x_dtype), *[None] * 6


def _slope(h: Tensor, clip: Tensor, bits: int, mask_scale: float, estimator: str, dtype: torch.dtype) -> Tensor | None:
    """What the gradient is multiplied by: a boolean mask, BBQ's slope in `dtype`, or None for one everywhere."""
    if estimator == "identity":
        return None
    if estimator == "bell":
        v = h * (OPTIMAL_CLIP[bits] / clip)
        return ((-0.5 * v.square()).exp() * (BELL_SCALE * math.sqrt(2 / math.pi))).to(dtype)
    # |y - h| <= D/2 holds for every h inside the clip, and outside it up to half a step: |h| <= a n / (n - 1).
    return h.abs() <= mask_scale * clip
