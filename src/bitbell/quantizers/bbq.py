"""BBQ, Bell Box Quantization (Yang and Aamodt, ICLR 2026, arXiv 2603.01599).

Bins are equally likely on the way in (quantiles of a Gaussian) and equally spaced on the way out, so that every code
is used as often as any other and the product of two quantized tensors is still an integer product.

    h = x H                                     block-diagonal Hadamard: bell-shaped
    v = h / RMS(h)                              unit variance
    k = clip(round(n Phi(v) - 1/2), 0, n - 1)   the box: uniform code, n = 2**bits
    y = scale / 2**(bits-1) * (k - n/2 - z)     uniform grid, learned scale

Backward, straight through the rounding only, with u = 2 scale phi(v) * dL/dy and the mean over the group that shares
an RMS:

    dL/dh = (u - v mean(u v)) / RMS(h)          dL/dx = dL/dh H
    dL/dscale = sum(dL/dy * (k - n/2 - z)) / 2**(bits-1) / sqrt(numel)

The output stays in the rotated domain: both operands of a layer are rotated, so the rotations cancel in their product.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitbell.kernels import ROTATION_BLOCK, rotate
from bitbell.quantizers.base import Quantized, Quantizer, sum_to, wide

INITIAL_SCALE = 1.694  # times the RMS; the published code's constant (the limit for many bits is 3 / sqrt(pi) = 1.6926)
RUNNING_DECAY = 0.99  # of BBQ-Fast's running average of 1 / RMS
SMALLEST_RMS = 1e-8  # an all-zero group stays finite, forward and backward

RMS_GROUPS = ("tensor", "running", "token")


class BBQ(Quantizer):
    """Quantize to `bits` bits with equally likely codes.

    Weights: `rows` gives one RMS and one learned scale per row of an (O, I) matrix. Activations: one learned scale,
    and `rms` says where the RMS is taken: "tensor" (the paper's BBQ: over the whole tensor, so a token's code depends
    on later tokens), "running" (BBQ-Fast: the batch's in training, a running average of 1/RMS in evaluation, hence
    causal) or "token" (over the last dimension). zero_point: the paper's z; default 0 for 3 bits and more, -0.5 for 1
    and 2 bits. Any float is allowed.

    >>> q = BBQ(bits=2, rows=4)
    >>> w = torch.randn(4, 256)
    >>> q.calibrate(w)
    >>> bool((q.decode(q.encode(w)) == q(w)).all())
    True
    """

    method = "bbq"
    layer_activation_options: ClassVar[dict[str, Any]] = {"rms": "running"}  # causal; see the class docstring
    running_inverse_rms: Tensor

    def __init__(
        self,
        bits: int,
        rows: int | None = None,
        rms: str = "tensor",
        zero_point: float | None = None,
        rotation: int | None = ROTATION_BLOCK,
    ) -> None:
        super().__init__(bits, rows, rotation, _paper_zero_point(bits) if zero_point is None else zero_point)
        if rms not in RMS_GROUPS:
            raise ValueError(f"rms must be one of {', '.join(RMS_GROUPS)}, got rms={rms!r}")
        self.rms = "row" if rows is not None else rms
        if self.rms == "running":
            self.register_buffer("running_inverse_rms", torch.ones(1))

    def quantize(self, x: Tensor) -> Quantized:
        self.check_input(x)
        self.require_calibrated()
        frozen = self.running_inverse_rms if self.rms == "running" and not self.training else None
        values, codes, step, inverse_rms = _BellBox.apply(
            x, self.scale, frozen, self.rms, self.bits, self.zero_point, self.rotation
        )
        if self.rms == "running" and self.training:
            self._update_running_statistics(inverse_rms)
        return Quantized(values, codes, step)

    def _update_running_statistics(self, inverse_rms: Tensor) -> None:
        """An average step, but for a batch that says nothing: empty, all zero (1/RMS would be 1e8), or not finite."""
        running = self.running_inverse_rms
        usable = (inverse_rms > 0) & (inverse_rms < 1 / SMALLEST_RMS)
        running.lerp_(torch.where(usable, inverse_rms.to(running.dtype), running), 1 - RUNNING_DECAY)

    def initial_scale(self, x: Tensor) -> Tensor:
        rms = rotate(wide(x), self.rotation).square().mean().sqrt()
        if self.rms == "running":
            self.running_inverse_rms.copy_(1 / rms.clamp_min(SMALLEST_RMS))
        return INITIAL_SCALE * rms.clamp_min(SMALLEST_RMS)

    def step(self) -> Tensor:
        return self.scale / 2 ** (self.bits - 1)

    def options(self) -> dict[str, Any]:
        return super().options() | {"rms": "tensor" if self.rms == "row" else self.rms}


def _paper_zero_point(bits: int) -> float:
    return -0.5 if bits in (1, 2) else 0.0


def _inverse_rms(h: Tensor, group: str) -> Tensor:
    """1 / RMS over the group: shape (1,) for the whole tensor, (..., 1) over the last dimension."""
    if group in ("row", "token"):
        norm, count = torch.linalg.vector_norm(h, dim=-1, keepdim=True), h.shape[-1]
    else:
        norm, count = torch.linalg.vector_norm(h).reshape(1), h.numel()
    return (norm * max(count, 1) ** -0.5).clamp_min(SMALLEST_RMS).reciprocal()


class _BellBox(torch.autograd.Function):
    """The formulas above. Keeps `x` and the codes (int8) for the backward pass and recomputes the rest from them.

    Works in place on tensors of its own: in eager mode the passes over memory, not the arithmetic, are what it costs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        frozen_inverse_rms: Tensor | None,
        group: str,
        bits: int,
        zero_point: float,
        rotation: int | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h = rotate(wide(x), rotation)
        inverse_rms = _inverse_rms(h, group) if frozen_inverse_rms is None else frozen_inverse_rms.to(h.dtype)
        half = 2 ** (bits - 1)
        # n Phi(v) - 1/2 = n/2 erf(v / sqrt(2)) + (n - 1)/2
        place = (h * (inverse_rms * math.sqrt(0.5))).erf_().mul_(half).add_(half - 0.5)
        # round() breaks ties to even, so a saturated place of exactly n - 1/2 would give n without the clip.
        code = place.round_().clamp_(0, 2 * half - 1).sub_(half)
        codes = code.to(torch.int8)
        # Statistics of x carry its NaN (and, as 0/0, an infinite RMS) into the step; a frozen RMS has seen
        # nothing of x.
        trace_of_nan = 0 / inverse_rms if frozen_inverse_rms is None else 0 * h.sum()
        step = scale.to(h.dtype) / half + trace_of_nan
        ctx.save_for_backward(x, scale, codes, inverse_rms)
        ctx.group = None if frozen_inverse_rms is not None else group
        ctx.bits, ctx.zero_point, ctx.rotation = bits, zero_point, rotation
        ctx.mark_non_differentiable(codes, step, inverse_rms)
        return code.sub_(zero_point).mul_(step), codes, step, inverse_rms

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, codes, inverse_rms = ctx.saved_tensors
        grad_x = grad_scale = None
        if ctx.needs_input_grad[1]:
            levels = codes.to(g.dtype).sub_(ctx.zero_point)
            damping = 2.0 ** (1 - ctx.bits) / math.sqrt(max(x.numel(), 1))
            grad_scale = (sum_to(levels.mul_(g), scale) * damping).to(scale.dtype)
        if ctx.needs_input_grad[0]:
            v = rotate(wide(x), ctx.rotation) * inverse_rms
            u = v.square().mul_(-0.5).exp_().mul_(g).mul_(scale.to(v.dtype) * inverse_rms * math.sqrt(2 / math.pi))
            grad_x = rotate(_remove_radial_part(u, v, ctx.group), ctx.rotation).to(x.dtype)
        return grad_x, grad_scale, None, None, None, None, None


def _remove_radial_part(u: Tensor, v: Tensor, group: str | None) -> Tensor:
    """u - v mean(u v), in place: the gradient through the RMS. A frozen RMS (None) has none."""
    if group is None:
        return u
    if group in ("row", "token"):
        return u.addcmul_(v, torch.linalg.vecdot(u, v).unsqueeze(-1) / max(v.shape[-1], 1), value=-1)
    return u.addcmul_(v, torch.dot(u.flatten(), v.flatten()) / max(v.numel(), 1), value=-1)
