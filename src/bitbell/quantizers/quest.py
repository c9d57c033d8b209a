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

from typing import Any

import torch
from torch import Tensor

from bitbell.kernels import ROTATION_BLOCK, rotate
from bitbell.quantizers.base import Quantized, Quantizer, wide

# Clip that minimises the mean squared error of a standard Gaussian on 2**bits uniform symmetric levels.
OPTIMAL_CLIP = {
    1: 0.7978845608,
    2: 1.4935346,
    3: 2.0510684,
    4: 2.5139306,
    5: 2.9160939,
    6: 3.2765973,
    7: 3.6010497,
    8: 3.8849387,
}
TUNED_ONE_BIT_MASK = 1.30


class QuEST(Quantizer):
    """Quantize to `bits` bits with the least squared error on a Gaussian.

    Weights: `rows` gives one scale per row. Activations: `rms` is "token" (the paper's: over the last dimension) or
    "tensor". mask_scale: width of the gradient mask in units of the clip; None for the trust mask. `scale` holds the
    clip of the tensor last calibrated on, for `decode`; every forward pass computes its own.
    """

    method = "quest"
    scale_is_learned = False

    def __init__(
        self,
        bits: int,
        rows: int | None = None,
        rms: str = "token",
        mask_scale: float | None = None,
        rotation: int | None = ROTATION_BLOCK,
    ) -> None:
        super().__init__(bits, rows, rotation, zero_point=-0.5)
        if rms not in ("token", "tensor"):
            raise ValueError(f"rms must be token or tensor, got rms={rms!r}")
        if mask_scale is not None and not mask_scale > 0:
            raise ValueError(f"mask_scale must be positive or None (the trust mask), got {mask_scale}")
        self.rms = "row" if rows is not None else rms
        self.mask_scale = mask_scale

    def quantize(self, x: Tensor) -> Quantized:
        self.check_input(x)
        n = 2**self.bits
        mask_scale = n / (n - 1) if self.mask_scale is None else self.mask_scale
        return Quantized(*_TrustQuantize.apply(x, self.rms == "tensor", self.bits, mask_scale, self.rotation))

    def initial_scale(self, x: Tensor) -> Tensor:
        clip = _clip(rotate(wide(x), self.rotation), self.rms == "tensor", self.bits)
        return clip.mean().reshape(1) if self.rms == "token" else clip

    def step(self) -> Tensor:
        return 2 * self.scale / (2**self.bits - 1)

    def decode(self, codes: Tensor, step: Tensor | None = None) -> Tensor:
        """Values of `codes`. With one scale per token the step belongs to the input: pass `quantize(x).step`."""
        if step is None and self.rms == "token":
            raise ValueError("QuEST with rms='token' has a step for each token: pass step=quantizer.quantize(x).step")
        return super().decode(codes, step)

    def options(self) -> dict[str, Any]:
        kept = {name: value for name, value in super().options().items() if name != "zero_point"}
        return kept | {"rms": "token" if self.rms == "row" else self.rms, "mask_scale": self.mask_scale}


def _clip(h: Tensor, whole_tensor: bool, bits: int) -> Tensor:
    square = h.square()
    mean = square.mean().reshape(1) if whole_tensor else square.mean(-1, keepdim=True)
    return OPTIMAL_CLIP[bits] * mean.sqrt() + 1e-8


class _TrustQuantize(torch.autograd.Function):
    """The formulas above. Keeps only `x` for the backward pass and recomputes the mask from it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, whole_tensor: bool, bits: int, mask_scale: float, rotation: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = rotate(wide(x), rotation)
        step = 2 * _clip(h, whole_tensor, bits) / (2**bits - 1)
        half = 2 ** (bits - 1)
        code = (h / step - 0.5).round().clamp(-half, half - 1)
        codes = code.to(torch.int8)
        ctx.save_for_backward(x)
        ctx.whole_tensor, ctx.bits, ctx.mask_scale, ctx.rotation = whole_tensor, bits, mask_scale, rotation
        ctx.mark_non_differentiable(codes, step)
        return (code + 0.5) * step, codes, step

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        h = rotate(wide(x), ctx.rotation)
        # |y - h| <= D/2 holds for every h inside the clip, and outside it up to half a step: |h| <= a * n / (n - 1).
        trusted = h.abs() <= ctx.mask_scale * _clip(h, ctx.whole_tensor, ctx.bits)
        return rotate(g * trusted, ctx.rotation).to(x.dtype), None, None, None, None
