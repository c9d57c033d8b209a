"""The steps that a method's formula is composed of: measure, round, look up, and what their gradients are.

    size_of            what a group of values measures: its RMS, its largest or its mean magnitude
    round_through      nearest integer; the gradient passes unchanged
    straight_through   given values in place of x; the gradient passes, all of it or where a mask says
    scale_gradient     the same value; its gradient times a factor
    at_least           a learned scale, never below a floor; the gradient passes
    mid_rise           code of the nearest half-integer level
    nearest            index of the nearest level, by the midpoints between levels

Rotation is in `bitbell.kernels`. Everything here is an ordinary differentiable function of tensors in float32 or
float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitbell.quantizers.ranks import ALONE, Ranks, largest_over, mean_over

SMALLEST_SIZE = 1e-8  # of a group of zeros, so that everything divided by it stays finite
STATISTICS = ("rms", "absmax", "absmean")
RUNNING_DECAY = 0.99  # of the running average of a statistic: BBQ-Fast's, and every method's with granularity "running"
LONGEST_CHAIN = 16  # entries of a table that comparisons find faster than a search and a gather
BELL_SCALE = (
    1.694  # of BBQ, in units of the RMS: published code's constant (the limit for many bits: 3 / sqrt(pi) = 1.6926)
)
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


@torch.no_grad()
def size_of(h: Tensor, statistic: str, by_row: bool, ranks: Ranks = ALONE) -> Tensor:
    """RMS, largest or mean magnitude of `h` (..., C): (..., 1) over the last dimension, or (1,) over all of it
    and over all `ranks`.

    Never below 1e-8; not finite where the group holds NaN or infinity. An empty group measures 1e-8.
    """
    if not h.numel():
        return h.new_full((*h.shape[:-1], 1) if by_row else (1,), SMALLEST_SIZE)
    if statistic == "absmax":
        size = h.abs().amax(-1, keepdim=True) if by_row else largest_over(h.abs().amax().reshape(1), ranks)
    elif statistic == "absmean":
        size = h.abs().mean(-1, keepdim=True) if by_row else mean_over(h.abs().mean().reshape(1), ranks)
    else:
        square = h.square()
        size = (square.mean(-1, keepdim=True) if by_row else mean_over(square.mean().reshape(1), ranks)).sqrt()
    return size.clamp_min(SMALLEST_SIZE)


def round_through(x: Tensor) -> Tensor:
    """`x` rounded half to even, exactly; backward the identity."""
    return _RoundThrough.apply(x)


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def straight_through(values: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """`values`, with the gradient handed to `x`, of the same shape: all of it, or where the boolean `mask` holds."""
    return _StraightThrough.apply(values, x, mask)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(*() if mask is None else (mask,))
        return values.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, g * ctx.saved_tensors[0] if ctx.saved_tensors else g, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` itself; its gradient times `factor`."""
    return _ScaleGradient.apply(x, factor)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.factor, None


def at_least(scale: Tensor, smallest: float) -> Tensor:
    """`scale`, or `smallest` where training has driven it below; the gradient passes, so that it may come back."""
    return straight_through(scale.clamp_min(smallest), scale)


def mid_rise(ratio: Tensor, bits: int) -> Tensor:
    """Centred code (float, no gradient) of the nearest half-integer level to `ratio`: clip(round(ratio - 1/2))."""
    half = 2 ** (bits - 1)
    return (ratio.detach() - 0.5).round_().clamp_(-half, half - 1)


def nearest(ratio: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The level nearest to each value of `ratio`, the lower one on a tie: its index, and itself (no gradient).
    `levels`: (L,), rising."""
    index, level = look_up(ratio.detach(), (levels[1:] + levels[:-1]) / 2, levels)
    return index, level


def look_up(x: Tensor, edges: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    """Where each value of `x` lies between `edges` (K - 1, rising), on an edge below it: index 0 to K - 1, no gradient.
    Then each table's (K,) entry there, with gradient to the table."""
    if not torch.compiler.is_compiling() or len(edges) >= LONGEST_CHAIN:
        index = torch.bucketize(x.detach().contiguous(), edges.detach())
        return (index, *(table[index] for table in tables))
    # Compilers make vector instructions of this, and none of a search and a gather.
    index, found = torch.zeros_like(x, dtype=torch.int32), [table[0] for table in tables]
    for i in range(len(edges)):
        above = x.detach() > edges[i].detach()
        index = index + above
        found = [torch.where(above, table[i + 1], entry) for table, entry in zip(tables, found, strict=True)]
    return (index, *found)
