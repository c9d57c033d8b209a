"""Quantizers as operators: every method with a uniform grid in one formula, `Plan`, with its gradient.

    quantize_plan      x (..., C) float -> values, centred codes int8, step, size; differentiable
    quantize_gradient  its backward pass, from x again: no intermediate is kept
    encode_packed      x (..., C) float -> packed words (rows, W) int32, and step

    h = rotate(x)                                       blocks of `rotation`
    size = max(statistic(h) or what is given, smallest)
    v = (h - offset) / (size * divisor + divisor_plus)
    code = clip(round(v + round_add), low, high) + code_plus, or by the Gaussian CDF
    step = (size or scale) * step_factor + step_plus
    value = (code - zero_point) * step + offset

Registered under `bitbell::`. The definitions here are plain PyTorch in float32; on GPUs the Triton kernels compute them
(`bitbell.kernels.triton.quantize`). Operators take no dataclasses, so that a plan travels as integers and numbers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitbell.kernels import triton
from bitbell.kernels.operators import pack_codes, packed_words, rotate, rotate_gradient

STATISTICS = ("given", "rms", "absmax", "absmean")
CODES = ("round", "bell")
SLOPES = ("identity", "window", "bell")
RELATIVE = ("one", "scale", "inverse")
SCALE_GRADIENTS = ("none", "level", "error", "sign")
OFFSET_GRADIENTS = ("none", "all", "outside")
LARGEST_ROTATION = 128  # that the Triton kernels have


class Plan(NamedTuple):
    """A quantizer as the numbers that its codes and its gradient need (a `native.InputPlan` with more to it).

    statistic: "given" (a tensor: a learned scale, or a running average), or measured over each row (by_row) or over
    everything. codes: "round", or "bell": clip(round(n Phi(v) - 1/2)) - n / 2 with n = 2**bits. step_from_scale: the
    step comes from the learned scale, not from the size. centred: whether the offset is subtracted before rounding, not
    only added after.

    dL/dh = dL/dy * slope * slope_factor * relative. slope: 1; 1 where window_low <= v <= window_high, else 0; or
    exp(-(bell_factor v)**2 / 2). relative: 1, scale / unit, or 1 / unit, where unit is what v is in. radial: the part
    along v is taken out, v mean(dL/dh v) over whatever shares a size: the gradient through an RMS.

    scale_gradient: the sum of dL/dy times "level", the "error" (level - v inside the window, level outside), or the
    "sign" of v outside it; times scale_factor, and over sqrt(numel) where damped. offset_gradient: likewise, of dL/dy
    ("all") or of dL/dy outside the window.
    """

    bits: int
    rotation: int = 1
    statistic: str = "given"
    by_row: bool = False
    codes: str = "round"
    step_from_scale: bool = False
    centred: bool = False
    slope: str = "identity"
    relative: str = "one"
    radial: bool = False
    scale_gradient: str = "none"
    offset_gradient: str = "none"
    damped: bool = True
    zero_point: float = -0.5
    smallest: float = 0.0
    divisor: float = 1.0
    divisor_plus: float = 0.0
    step_factor: float = 1.0
    step_plus: float = 0.0
    round_add: float = -0.5
    low: float = 0.0
    high: float = 0.0
    code_plus: float = 0.0
    window_low: float = 0.0
    window_high: float = 0.0
    bell_factor: float = 1.0
    slope_factor: float = 1.0
    scale_factor: float = 1.0
    offset_factor: float = 1.0

    def encoded(self) -> tuple[list[int], list[float]]:
        """What the operators take."""
        integers = [
            self.bits,
            self.rotation,
            STATISTICS.index(self.statistic),
            int(self.by_row),
            CODES.index(self.codes),
            int(self.step_from_scale),
            int(self.centred),
            SLOPES.index(self.slope),
            RELATIVE.index(self.relative),
            int(self.radial),
            SCALE_GRADIENTS.index(self.scale_gradient),
            OFFSET_GRADIENTS.index(self.offset_gradient),
            int(self.damped),
        ]
        return integers, list(self[13:])

    @classmethod
    def decoded(cls, integers: list[int], numbers: list[float]) -> Plan:
        bits, rotation, statistic, by_row, codes, from_scale, centred, slope, relative, radial, s, o, damped = integers
        names = STATISTICS[statistic], bool(by_row), CODES[codes], bool(from_scale), bool(centred)
        gradient = SLOPES[slope], RELATIVE[relative], bool(radial), SCALE_GRADIENTS[s], OFFSET_GRADIENTS[o]
        return cls(bits, rotation, *names, *gradient, bool(damped), *numbers)


def mid_rise_codes(bits: int) -> dict[str, Any]:
    """The rounding to the nearest half-integer level, for a plan: clip(round(v - 1/2))."""
    half = 2 ** (bits - 1)
    return {"round_add": -0.5, "low": float(-half), "high": float(half - 1)}


def serves(plan: Plan | None, x: Tensor) -> bool:
    """Whether the Triton kernels quantize `x` by this plan."""
    if plan is None or x.dtype == torch.float64 or not triton.computes(x):
        return False
    return plan.rotation <= LARGEST_ROTATION and x.dim() > 0 and x.shape[-1] % plan.rotation == 0


# Operators ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("bitbell::quantize_plan", mutates_args=())
def quantize_plan(
    x: Tensor,
    scale: Tensor | None,
    size: Tensor | None,
    offset: Tensor | None,
    integers: list[int],
    numbers: list[float],
    narrow: torch.dtype,
    wants_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values float32, centred codes int8, step and size float32 of `x` (..., C), by a `Plan`'s `encoded()`.

    scale: the learned scale, (1,) or (rows, 1). size: what is given; the scale where it is None. narrow: the type that
    gradients are rotated in. Without wants_values, the values are one zero, expanded: they carry the gradient and take
    no memory. The step is not finite wherever its part of x holds NaN or infinity. The size that comes back is the
    measured one, or empty where it was given.
    """
    plan = Plan.decoded(integers, numbers)
    h = rotate(x.float(), plan.rotation)
    measured = _size(plan, h)
    base = _base(plan, scale, size, measured)
    codes = _codes(plan, _place(plan, h, base, offset))
    trace = 0 * (h.sum().reshape(1) if measured is None else measured)
    step = _step(plan, scale, base) + trace
    values = _no_values(x)
    if wants_values:
        values = (codes.float() - plan.zero_point) * step
        values = values if offset is None else values + offset
    return values, codes, step, x.new_empty(0, dtype=torch.float32) if measured is None else measured


@quantize_plan.register_fake
def _(
    x: Tensor,
    scale: Tensor | None,
    size: Tensor | None,
    offset: Tensor | None,
    integers: list[int],
    numbers: list[float],
    narrow: torch.dtype,
    wants_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    step, size_shape = shapes(Plan.decoded(integers, numbers), x, scale, size)
    values = x.new_empty(x.shape, dtype=torch.float32) if wants_values else _no_values(x)
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return values, codes, values.new_empty(step), values.new_empty(size_shape)


@quantize_plan.register_kernel("cpu")
@quantize_plan.register_kernel("cuda")
def _(
    x: Tensor,
    scale: Tensor | None,
    size: Tensor | None,
    offset: Tensor | None,
    integers: list[int],
    numbers: list[float],
    narrow: torch.dtype,
    wants_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = Plan.decoded(integers, numbers)
    if not x.numel() or not serves(plan, x):
        return quantize_plan._init_fn(x, scale, size, offset, integers, numbers, narrow, wants_values)
    from bitbell.kernels.triton import launch

    values = torch.empty(x.shape, dtype=torch.float32, device=x.device) if wants_values else None
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    step, measured = launch.quantize(plan, x, scale, size, offset, values=values, codes=codes)
    return _no_values(x) if values is None else values, codes, step, measured


def shapes(plan: Plan, x: Tensor, scale: Tensor | None, size: Tensor | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the step and of the measured size."""
    rows = (*x.shape[:-1], 1)
    if plan.statistic != "given":
        by_row = plan.by_row or (plan.step_from_scale and scale is not None and scale.dim() > 1)
        return (rows if by_row else (1,)), (rows if plan.by_row else (1,))
    given = scale if size is None or (plan.step_from_scale and scale is not None) else size
    return (tuple(given.shape) if given is not None else (1,)), (0,)


@torch.library.custom_op("bitbell::quantize_gradient", mutates_args=())
def quantize_gradient(
    g: Tensor,
    x: Tensor,
    scale: Tensor | None,
    size: Tensor | None,
    offset: Tensor | None,
    integers: list[int],
    numbers: list[float],
    narrow: torch.dtype,
    wants_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `quantize_plan`'s values to x (its type), scale and offset (float32); empty where not asked for.

    g: dL/dvalues. size: the measured size, or what was given.
    """
    plan = Plan.decoded(integers, numbers)
    h = rotate(x.float(), plan.rotation)
    base = _base(plan, scale, size, None if plan.statistic == "given" else size)
    v = _place(plan, h, base, offset)
    inside = (v >= plan.window_low) & (v <= plan.window_high)
    damping = max(x.numel(), 1) ** -0.5 if plan.damped else 1.0
    grad_x, grad_scale, grad_offset = x.new_empty(0), v.new_empty(0), v.new_empty(0)
    g = g.float()
    if plan.scale_gradient != "none" and scale is not None:
        level = _codes(plan, v).float() - plan.zero_point
        if plan.scale_gradient == "error":
            level = level - torch.where(inside, v, 0.0)
        elif plan.scale_gradient == "sign":
            level = torch.where(inside, 0.0, v.sign())
        grad_scale = (g * level).sum_to_size(scale.shape) * (plan.scale_factor * damping)
    if plan.offset_gradient != "none" and offset is not None:
        asked = g if plan.offset_gradient == "all" else torch.where(inside, 0.0, g)
        grad_offset = (asked.sum_to_size(offset.shape) * (plan.offset_factor * damping)).clone()
    if wants_x:
        u = g * _slope(plan, v, inside) * (plan.slope_factor * _relative(plan, scale, base))
        if plan.radial:
            along = (u * v).mean(-1, keepdim=True) if plan.by_row else (u * v).mean()
            u = u - v * along
        grad_x = rotate_gradient(u, plan.rotation, narrow).to(x.dtype)
    return grad_x, grad_scale, grad_offset


@quantize_gradient.register_fake
def _(
    g: Tensor,
    x: Tensor,
    scale: Tensor | None,
    size: Tensor | None,
    offset: Tensor | None,
    integers: list[int],
    numbers: list[float],
    narrow: torch.dtype,
    wants_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    plan, empty = Plan.decoded(integers, numbers), x.new_empty(0, dtype=torch.float32)
    grad_x = x.new_empty(x.shape) if wants_x else x.new_empty(0)
    to_scale = plan.scale_gradient != "none" and scale is not None
    to_offset = plan.offset_gradient != "none" and offset is not None
    grad_scale = empty.new_empty(scale.shape) if to_scale and scale is not None else empty
    return grad_x, grad_scale, empty.new_empty(offset.shape) if to_offset and offset is not None else empty.clone()


@quantize_gradient.register_kernel("cpu")
@quantize_gradient.register_kernel("cuda")
def _(
    g: Tensor,
    x: Tensor,
    scale: Tensor | None,
    size: Tensor | None,
    offset: Tensor | None,
    integers: list[int],
    numbers: list[float],
    narrow: torch.dtype,
    wants_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = Plan.decoded(integers, numbers)
    if not x.numel() or not serves(plan, x):
        return quantize_gradient._init_fn(g, x, scale, size, offset, integers, numbers, narrow, wants_x)
    from bitbell.kernels.triton import launch

    grad_x, to_scale, to_offset = launch.gradient(plan, g, x, scale, size, offset, narrow, wants_x)
    damping = x.numel() ** -0.5 if plan.damped else 1.0
    grad_scale, grad_offset = to_scale.new_empty(0), to_scale.new_empty(0)
    if plan.scale_gradient != "none" and scale is not None:
        grad_scale = _sum_rows(to_scale, scale) * (plan.scale_factor * damping)
    if plan.offset_gradient != "none" and offset is not None:
        grad_offset = _sum_rows(to_offset, offset) * (plan.offset_factor * damping)
    return x.new_empty(0) if grad_x is None else grad_x, grad_scale, grad_offset


def _sum_rows(sums: Tensor, like: Tensor) -> Tensor:
    """Sums (rows, ranges) -> the shape of a scale, (rows, 1) or (1,)."""
    return (sums.sum(-1) if like.numel() == sums.shape[0] else sums.sum()).reshape(like.shape)


@torch.library.custom_op("bitbell::encode_packed", mutates_args=())
def encode_packed(
    x: Tensor,
    scale: Tensor | None,
    size: Tensor | None,
    offset: Tensor | None,
    integers: list[int],
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    """`quantize_plan`'s codes packed as `pack_codes` does, (rows, packed_words(C, bits)) int32, and the step."""
    plan = Plan.decoded(integers, numbers)
    _, codes, step, _ = quantize_plan._init_fn(x, scale, size, offset, integers, numbers, x.dtype, False)
    unsigned = (codes.to(torch.int16) + 2 ** (plan.bits - 1)).to(torch.uint8)
    return pack_codes(unsigned.reshape(-1, x.shape[-1]), plan.bits), step


@encode_packed.register_fake
def _(
    x: Tensor,
    scale: Tensor | None,
    size: Tensor | None,
    offset: Tensor | None,
    integers: list[int],
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    plan = Plan.decoded(integers, numbers)
    rows = math.prod(x.shape[:-1])
    step = x.new_empty(shapes(plan, x, scale, size)[0], dtype=torch.float32)
    return x.new_empty((rows, packed_words(x.shape[-1], plan.bits)), dtype=torch.int32), step


@encode_packed.register_kernel("cpu")
@encode_packed.register_kernel("cuda")
def _(
    x: Tensor,
    scale: Tensor | None,
    size: Tensor | None,
    offset: Tensor | None,
    integers: list[int],
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    plan = Plan.decoded(integers, numbers)
    if not x.numel() or not serves(plan, x):
        return encode_packed._init_fn(x, scale, size, offset, integers, numbers)
    from bitbell.kernels.triton import launch

    words = torch.empty(launch.packed_shape(x, plan.bits), dtype=torch.int32, device=x.device)
    step, _ = launch.quantize(plan, x, scale, size, offset, words=words)
    return words, step


def _keep(ctx: object, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    x, scale, size, offset, integers, numbers, narrow, _ = inputs
    plan = Plan.decoded(integers, numbers)  # type: ignore[arg-type]
    measured = output[3] if plan.statistic != "given" else size
    ctx.save_for_backward(x, scale, measured, offset)  # type: ignore[attr-defined]
    ctx.how = integers, numbers, narrow  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(*output[1:])  # type: ignore[attr-defined]


def _backward(ctx: object, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, size, offset = ctx.saved_tensors  # type: ignore[attr-defined]
    wanted = ctx.needs_input_grad  # type: ignore[attr-defined]
    integers, numbers, narrow = ctx.how  # type: ignore[attr-defined]
    plan = Plan.decoded(integers, numbers)
    grad_x, grad_scale, grad_offset = quantize_gradient(g, x, scale, size, offset, integers, numbers, narrow, wanted[0])
    to_scale = scale is not None and wanted[1] and plan.scale_gradient != "none"
    to_offset = offset is not None and wanted[3] and plan.offset_gradient != "none"
    return (
        grad_x if wanted[0] else None,
        grad_scale.to(scale.dtype) if to_scale else None,
        None,
        grad_offset.to(offset.dtype) if to_offset else None,
        *[None] * 4,
    )


quantize_plan.register_autograd(_backward, setup_context=_keep)


# The formula ----------------------------------------------------------------------------------------------------------


def _no_values(x: Tensor) -> Tensor:
    return x.new_zeros((1,) * x.dim(), dtype=torch.float32).expand(x.shape)


def _size(plan: Plan, h: Tensor) -> Tensor | None:
    """What is measured, never below `smallest`; None where the size is given."""
    if plan.statistic == "given":
        return None
    if not h.numel():
        return h.new_full((*h.shape[:-1], 1) if plan.by_row else (1,), plan.smallest)
    group = h if plan.by_row else h.reshape(1, -1)
    if plan.statistic == "rms":
        size = group.square().mean(-1, keepdim=True).sqrt()
    elif plan.statistic == "absmax":
        size = group.abs().amax(-1, keepdim=True)
    else:
        size = group.abs().mean(-1, keepdim=True)
    return (size if plan.by_row else size.reshape(1)).clamp_min(plan.smallest)


def _base(plan: Plan, scale: Tensor | None, size: Tensor | None, measured: Tensor | None) -> Tensor:
    """The size that v is in units of."""
    if measured is not None:
        return measured
    given = scale if size is None else size
    assert given is not None
    return given.float().clamp_min(plan.smallest)


def _step(plan: Plan, scale: Tensor | None, base: Tensor) -> Tensor:
    if plan.step_from_scale:
        assert scale is not None
        base = scale.float()
    return base * plan.step_factor + plan.step_plus


def _place(plan: Plan, h: Tensor, base: Tensor, offset: Tensor | None) -> Tensor:
    centred = h if offset is None or not plan.centred else h - offset
    return centred / (base * plan.divisor + plan.divisor_plus)


def _codes(plan: Plan, v: Tensor) -> Tensor:
    half = 2 ** (plan.bits - 1)
    if plan.codes == "bell":
        place = (v * math.sqrt(0.5)).erf() * half + (half - 0.5)
        codes = place.round().clamp(0, 2 * half - 1) - half
    else:
        codes = (v + plan.round_add).clamp(plan.low, plan.high).round() + plan.code_plus
        return torch.where(v.isnan(), plan.low + plan.code_plus, codes).to(torch.int8)
    return torch.where(v.isnan(), -half, codes).to(torch.int8)


def _slope(plan: Plan, v: Tensor, inside: Tensor) -> Tensor | float:
    if plan.slope == "identity":
        return 1.0
    if plan.slope == "window":
        return inside.to(v.dtype)
    return (v * plan.bell_factor).square().mul(-0.5).exp()


def _relative(plan: Plan, scale: Tensor | None, base: Tensor) -> Tensor | float:
    if plan.relative == "one":
        return 1.0
    unit = base * plan.divisor + plan.divisor_plus
    if plan.relative == "inverse":
        return 1 / unit
    assert scale is not None
    return scale.float() / unit


__all__ = ["Plan", "encode_packed", "mid_rise_codes", "quantize_gradient", "quantize_plan", "serves", "shapes"]
