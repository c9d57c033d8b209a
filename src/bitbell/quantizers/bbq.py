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

`restore_rms` (the paper's BBQ for images) multiplies the RMS back, so that scale is in units of it:

    y = scale RMS(h) / 2**(bits-1) * (k - n/2 - z)
    dL/dh = u' - v mean(u' v) + v mean(dL/dy y / RMS(h))       u' = 2 scale phi(v) * dL/dy
    dL/dscale = sum(dL/dy * RMS(h) * (k - n/2 - z)) / 2**(bits-1) / sqrt(numel)

The output stays in the rotated domain: both operands of a layer are rotated, so the rotations cancel in their product.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitbell.kernels import ROTATION_BLOCK, product_dtype, rotate, rotate_gradient, triton
from bitbell.kernels.quantize import Plan
from bitbell.kernels.training import computes
from bitbell.quantizers.base import Quantized, Quantizer, is_recomputing, sum_to, wide
from bitbell.quantizers.fused_bbq import FusedBellBox
from bitbell.quantizers.ranks import ALONE, Ranks, mean_over
from bitbell.quantizers.steps import BELL_SCALE, OPTIMAL_CLIP, RUNNING_DECAY, SMALLEST_SIZE

RMS_GROUPS = ("tensor", "running", "token")
ESTIMATORS = ("bell", "trust", "clip", "identity")


class BBQ(Quantizer):
    """Quantize to `bits` bits with equally likely codes.

    Weights: `rows` gives one RMS and one scale per row. Activations (`rows=None`): one scale; `rms` says over what the
    RMS is taken: "tensor" (the paper's BBQ: over the whole tensor, so a token's code depends on later tokens),
    "running" (BBQ-Fast: the batch's in training, a running average of 1/RMS in evaluation, hence causal) or "token"
    (over the last dimension). zero_point: the paper's z; default 0 for 3 bits and more, -0.5 for 1 and 2 bits. Any
    float is allowed.

    restore_rms: multiply the output by the RMS that the input was divided by (formulas above); the scale then starts
    at 1.694, or at `start`.

    For ablation: normalise: False leaves the RMS out. rms_gradient: whether the gradient flows through the RMS.
    learn_scale, learn_offset: whether the scale, and an offset added to every value, are learned. start: the scale to
    start from, by default 1.694 RMS. estimator: "bell" (above), or the gradient straight through everything: untouched
    ("identity"), times QuEST's "trust" mask for as many bits, or times a "clip" mask (one bin beyond the outermost
    threshold: |v| <= 1.35 at 2 bits, 1.92 at 4).

    >>> q = BBQ(bits=2, rows=4)
    >>> w = torch.randn(4, 256)
    >>> q.calibrate(w)
    >>> bool((q.decode(q.encode(w)) == q(w)).all())
    True
    """

    method = "bbq"
    granularity_option = "rms"
    layer_activation_options: ClassVar[dict[str, Any]] = {"rms": "running"}  # causal; see the class docstring
    running_inverse_rms: Tensor
    compact: bool = False  # whether the gradient goes by 256 bins, one byte an element, see `keep_bins`

    def __init__(
        self,
        bits: int,
        rows: int | None = None,
        rms: str | None = None,
        zero_point: float | None = None,
        rotation: int | None = ROTATION_BLOCK,
        *,
        normalise: bool = True,
        estimator: str = "bell",
        rms_gradient: bool = True,
        learn_scale: bool = True,
        learn_offset: bool = False,
        start: float | None = None,
        restore_rms: bool = False,
    ) -> None:
        super().__init__(bits, rows, rotation, _paper_zero_point(bits) if zero_point is None else zero_point)
        if rms is not None and (rms not in RMS_GROUPS or rows is not None):
            allowed = (
                f"one of {', '.join(RMS_GROUPS)}" if rows is None else "left out with rows, which have an RMS each"
            )
            raise ValueError(f"rms must be {allowed}, got rms={rms!r}")
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got estimator={estimator!r}")
        if start is not None and not start > 0:
            raise ValueError(f"start must be positive or None (1.694 RMS), got start={start!r}")
        self.rms = rms or ("tensor" if rows is None else "row")
        self.normalise, self.estimator, self.rms_gradient, self.start = normalise, estimator, rms_gradient, start
        self.restore_rms = restore_rms
        self.clip_window = bell_clip(bits)
        self.scale.requires_grad_(learn_scale)
        if learn_offset:
            self.offset = nn.Parameter(torch.zeros_like(self.scale))
        if self.rms == "running":
            self.register_buffer("running_inverse_rms", torch.ones(1))

    def quantize(self, x: Tensor) -> Quantized:
        self.check_input(x)
        self.require_calibrated()
        fused = self.fuse(x)
        if fused is not None:
            return fused[0]
        frozen = self.running_inverse_rms if self._uses_running_rms and not self.training else None
        group = self.rms if self.normalise else "none"
        how = group, self.bits, self.zero_point, self.rotation, self.estimator, self.rms_gradient, self.rows is not None
        rest = self.ranks, self._restores_rms
        values, codes, step, inverse_rms = _BellBox.apply(x, self.scale, self.offset, frozen, *how, *rest)
        if self._uses_running_rms and self.training:
            self._update_running_statistics(inverse_rms)
        return Quantized(values, codes, step, None if self.offset is None else self.offset.detach())

    def quantize_codes(self, x: Tensor) -> Quantized:
        if not self._is_fused_for(x):
            return super().quantize_codes(x)
        self.check_input(x)
        self.require_calibrated()
        frozen = self.running_inverse_rms if self.rms == "running" and not self.training else None
        group = "row" if self.rms in ("row", "token") else "tensor"
        how = group, self.bits, self.zero_point, self.rotation, self.rms_gradient
        rest = self.rows is not None, self.ranks.size, self.compact
        values, codes, step, inverse_rms, bins = FusedBellBox.apply(x, self.scale, frozen, *how, *rest)
        if self.rms == "running" and self.training:
            self._update_running_statistics(inverse_rms)
        return Quantized(values, codes, step, bins=bins if self.compact else None)

    def keep_bins(self) -> None:
        if not self._is_published:
            raise ValueError("compact is for the gradient of bbq as published, these activations have another")
        self.compact = True

    @property
    def _is_published(self) -> bool:
        return self.estimator == "bell" and self.normalise and not self.restore_rms and self.offset is None

    def _is_fused_for(self, x: Tensor) -> bool:
        """Whether `FusedBellBox` quantizes `x`: BBQ as published, in float32 or narrower, its statistics this process's
        own, where the C++ kernels compute; with `compact`, which nothing else knows, on every device."""
        if not self._is_published or self.ranks.group is not None or x.dtype == torch.float64:
            return False
        return self.compact or (computes(x) and not triton.computes(x))

    def fuse(self, x: Tensor, wants_values: bool = True) -> tuple[Quantized, Tensor] | None:
        fused = super().fuse(x, wants_values)
        if fused is not None and self._uses_running_rms and self.training:
            self._update_running_statistics(1 / fused[1])
        return fused

    def given_size(self) -> Tensor | None:
        return 1 / self.running_inverse_rms if self._uses_running_rms and not self.training else None

    def plan(self) -> Plan | None:
        """None with restore_rms, and where several processes share the RMS."""
        frozen, by_row = self._uses_running_rms and not self.training, self.rms in ("row", "token")
        measures = self.normalise and not frozen
        if self._restores_rms or (measures and not by_row and self.ranks.group is not None):
            return None
        n, bell = 2**self.bits, self.estimator == "bell"
        windows = {"trust": OPTIMAL_CLIP[self.bits] * n / (n - 1), "clip": self.clip_window}
        window = windows.get(self.estimator, 0.0)
        return Plan(
            self.bits,
            self.rotation or 1,
            statistic="rms" if measures else "given",
            by_row=by_row and measures,
            smallest=SMALLEST_SIZE if measures else 0.0,
            divisor=1.0 if self.normalise else 0.0,
            divisor_plus=0.0 if self.normalise else 1.0,
            codes="bell",
            zero_point=self.zero_point,
            step_from_scale=True,
            step_factor=2 / n,
            slope="bell" if bell else "identity" if self.estimator == "identity" else "window",
            slope_factor=math.sqrt(2 / math.pi) if bell else 1.0,
            relative="scale" if bell else "one",
            radial=bell and measures and self.rms_gradient,
            window_low=-window,
            window_high=window,
            scale_gradient="level",
            scale_factor=2 / n / math.sqrt(self.ranks.size),
            offset_gradient="none" if self.offset is None else "all",
            offset_factor=1 / math.sqrt(self.ranks.size),
        )

    @property
    def _uses_running_rms(self) -> bool:
        return self.rms == "running" and self.normalise

    @property
    def _restores_rms(self) -> bool:
        return self.restore_rms and self.normalise

    def _update_running_statistics(self, inverse_rms: Tensor) -> None:
        """An average step, but for a batch that says nothing: empty, all zero (1/RMS would be 1e8), or not finite."""
        if is_recomputing():
            return
        running = self.running_inverse_rms
        usable = (inverse_rms > 0) & (inverse_rms < 1 / SMALLEST_SIZE)
        running.lerp_(torch.where(usable, inverse_rms.to(running.dtype), running), 1 - RUNNING_DECAY)

    def initial_scale(self, x: Tensor) -> Tensor:
        rms = mean_over(rotate(wide(x), self.rotation).square().mean(), self.ranks).sqrt()
        if self.rms == "running":
            self.running_inverse_rms.copy_(1 / rms.clamp_min(SMALLEST_SIZE))
        if self.start is not None:
            return self.start + 0 * rms  # an overflow shows
        return BELL_SCALE * (1 + 0 * rms if self._restores_rms else rms.clamp_min(SMALLEST_SIZE))

    def step(self) -> Tensor:
        step = self.scale / 2 ** (self.bits - 1)
        return step / self.running_inverse_rms if self._restores_rms and self.rms == "running" else step

    def decode(self, codes: Tensor, step: Tensor | None = None) -> Tensor:
        """Values of `codes`. Where the input's RMS is in the step, the step belongs to it: pass `quantize(x).step`."""
        if step is None and self._restores_rms and self.rms != "running":
            why = "the step of bbq with restore_rms holds the input's RMS"
            raise ValueError(f"{why}: pass step=quantizer.quantize(x).step")
        return super().decode(codes, step)

    @torch.no_grad()
    def bin_width(self, x: Tensor) -> Tensor:
        """One code is 1 / (n phi(v)) wide in v; over a Gaussian the mean of phi(v) is 1 / (2 sqrt(pi))."""
        inverse_rms = _inverse_rms(rotate(wide(x), self.rotation), self.rms if self.normalise else "none")
        return 2 * math.sqrt(math.pi) / 2**self.bits / inverse_rms

    def options(self) -> dict[str, Any]:
        return super().options() | {
            "rms": None if self.rms == "row" else self.rms,
            "normalise": self.normalise,
            "estimator": self.estimator,
            "rms_gradient": self.rms_gradient,
            "learn_scale": self.scale.requires_grad,
            "learn_offset": self.offset is not None,
            "start": self.start,
            "restore_rms": self.restore_rms,
        }


def _paper_zero_point(bits: int) -> float:
    return -0.5 if bits in (1, 2) else 0.0


def _inverse_rms(h: Tensor, group: str, ranks: Ranks = ALONE) -> Tensor:
    """1 / RMS over the group: shape (1,) for the whole tensor (of all `ranks`), (..., 1) over the last dimension."""
    if group == "none":
        return 1 + 0 * h.sum().reshape(1)
    if group in ("row", "token"):
        norm, count = torch.linalg.vector_norm(h, dim=-1, keepdim=True), h.shape[-1]
    else:
        norm, count = torch.linalg.vector_norm(h).reshape(1), h.numel()
        norm = norm if ranks.group is None else mean_over(norm.square(), ranks).sqrt()
    return (norm * max(count, 1) ** -0.5).clamp_min(SMALLEST_SIZE).reciprocal()


class _BellBox(torch.autograd.Function):
    """The formulas above. Keeps `x` and the codes (int8) for the backward pass and recomputes the rest from them.

    Works in place on tensors of its own: in eager mode the passes over memory, not the arithmetic, are what it costs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        frozen_inverse_rms: Tensor | None,
        group: str,
        bits: int,
        zero_point: float,
        rotation: int | None,
        estimator: str,
        rms_gradient: bool,
        is_weight: bool,
        ranks: Ranks,
        restore_rms: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h = rotate(wide(x), rotation)
        inverse_rms = _inverse_rms(h, group, ranks) if frozen_inverse_rms is None else frozen_inverse_rms.to(h.dtype)
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
        step = step / inverse_rms if restore_rms else step
        # Gradients come out of products in this type; what is kept for them, and their rotation, may be as narrow. A
        # weight is there anyway; of activations keep the rotated ones, which spares the backward pass a rotation.
        ctx.narrow, ctx.kept_rotated = product_dtype(x), not is_weight
        ctx.save_for_backward(h.to(ctx.narrow) if ctx.kept_rotated else x, scale, codes, inverse_rms)
        ctx.group = group if frozen_inverse_rms is None and group != "none" and rms_gradient else None
        ctx.bits, ctx.zero_point, ctx.rotation, ctx.estimator = bits, zero_point, rotation, estimator
        ctx.ranks, ctx.restore_rms = ranks, restore_rms
        ctx.x_dtype, ctx.offset = x.dtype, None if offset is None else (offset.shape, offset.dtype)
        ctx.mark_non_differentiable(codes, step, inverse_rms)
        values = code.sub_(zero_point).mul_(step)
        return values if offset is None else values.add_(offset), codes, step, inverse_rms

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        kept, scale, codes, inverse_rms = ctx.saved_tensors
        grad_x = grad_scale = grad_offset = None
        damping = 1 / math.sqrt(max(kept.numel(), 1) * ctx.ranks.size)
        if ctx.needs_input_grad[1]:
            levels = codes.to(g.dtype).sub_(ctx.zero_point)
            levels = levels.div_(inverse_rms) if ctx.restore_rms else levels
            grad_scale = (sum_to(levels.mul_(g), scale) * (2.0 ** (1 - ctx.bits) * damping)).to(scale.dtype)
        if ctx.needs_input_grad[2]:
            shape, dtype = ctx.offset
            grad_offset = (g.sum_to_size(shape) * damping).to(dtype)
        if ctx.needs_input_grad[0]:
            h = wide(kept) if ctx.kept_rotated else rotate(wide(kept), ctx.rotation)
            relative_scale = scale.to(h.dtype) * (1 if ctx.restore_rms else inverse_rms)
            v = h * inverse_rms
            grad_h = _estimate(g, v, relative_scale, ctx)
            if ctx.restore_rms and ctx.group is not None and ctx.estimator == "bell":
                levels = codes.to(v.dtype).sub_(ctx.zero_point)
                through_rms = levels.mul_(g).mul_(scale.to(v.dtype) * 2.0 ** (1 - ctx.bits))
                grad_h = grad_h + v * _mean_over_group(through_rms, ctx.group, ctx.ranks)
            grad_x = rotate_gradient(grad_h, ctx.rotation, ctx.narrow).to(ctx.x_dtype)
        return grad_x, grad_scale, grad_offset, *[None] * 10


def _estimate(g: Tensor, v: Tensor, relative_scale: Tensor, ctx: Any) -> Tensor:
    """dL/dh from g = dL/dy and v = h / RMS(h), but for what passes through a restored RMS; relative_scale = the
    output's scale / RMS(h)."""
    if ctx.estimator == "bell":
        u = v.square().mul_(-0.5).exp_().mul_(g).mul_(relative_scale * math.sqrt(2 / math.pi))
        return _remove_radial_part(u, v, ctx.group, ctx.ranks)
    if ctx.estimator == "identity":
        return g
    n = 2**ctx.bits
    window = OPTIMAL_CLIP[ctx.bits] * n / (n - 1) if ctx.estimator == "trust" else bell_clip(ctx.bits)
    return g * (v.abs() <= window)


def bell_clip(bits: int) -> float:
    """Where the "clip" estimator cuts off, in units of the RMS: the outermost threshold Phi^-1(1 - 1/n) plus the width
    of the last bounded bin; 2 at 1 bit, which has no such bin."""
    if bits == 1:
        return 2.0
    n, quantile = 2**bits, NormalDist().inv_cdf
    return 2 * quantile(1 - 1 / n) - quantile(1 - 2 / n)


def _remove_radial_part(u: Tensor, v: Tensor, group: str | None, ranks: Ranks) -> Tensor:
    """u - v mean(u v), in place: the gradient through the RMS. A constant RMS (None) has none."""
    if group is None:
        return u
    if group in ("row", "token"):
        return u.addcmul_(v, torch.linalg.vecdot(u, v).unsqueeze(-1) / max(v.shape[-1], 1), value=-1)
    return u.addcmul_(v, mean_over(torch.dot(u.flatten(), v.flatten()) / max(v.numel(), 1), ranks), value=-1)


def _mean_over_group(x: Tensor, group: str, ranks: Ranks) -> Tensor:
    if group in ("row", "token"):
        return x.mean(-1, keepdim=True)
    return mean_over(x.mean(), ranks)
