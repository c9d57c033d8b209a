"""The integer convolution of training: the integers of `bitbell.layers.product`, summed over windows of an image.

    y = (levels_x * levels_w) * step_w * step_x        * is convolution; then offsets, as for a linear layer

Zero padding is of real zeros: outside the image there is no code and no offset, and nothing is added to a sum. A code
could not say it, since half-integer levels have no zero. The packed layer masks the same places.

Images lie channels last, (N, H, W, I), so that a quantizer sees the channels of a pixel side by side; a filter is a row
of its kernel_height * kernel_width * I / groups weights, in the same order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbell.kernels import no_autocast
from bitbell.layers.product import Grid, add_offsets, levels_of, values_of
from bitbell.quantizers import Quantized

Pair = tuple[int, int]
StepAndOffset = tuple[Tensor, Tensor | None]
HAS_ONEDNN = torch.backends.mkldnn.is_available()  # asked once: torch.compile would break its graph at the question


class Geometry(NamedTuple):
    """Where a convolution's windows lie. padding: how much left, right, top and bottom, as `F.pad` takes it.

    mode: what the padding holds: "zeros"; or "reflect", "replicate", "circular", which is put around the input before
    it is quantized.
    """

    in_channels: int
    out_channels: int
    kernel: Pair
    stride: Pair
    padding: tuple[int, int, int, int]
    dilation: Pair
    groups: int
    mode: str = "zeros"

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        """Of a layer."""
        found: Any = conv
        window = found.kernel_size, found.stride, tuple(found._reversed_padding_repeated_twice), found.dilation
        return cls(conv.in_channels, conv.out_channels, *window, conv.groups, conv.padding_mode)

    @property
    def zeros(self) -> tuple[int, int, int, int]:
        """How many zeros lie left, right, above and below of a quantized image."""
        return self.padding if self.mode == "zeros" else (0, 0, 0, 0)

    @property
    def group_channels(self) -> int:
        """Channels that a filter sees."""
        return self.in_channels // self.groups

    @property
    def columns(self) -> int:
        """Weights of a filter."""
        return self.kernel[0] * self.kernel[1] * self.group_channels

    @property
    def spans(self) -> Pair:
        """Height and width of a window."""
        return self.dilation[0] * (self.kernel[0] - 1) + 1, self.dilation[1] * (self.kernel[1] - 1) + 1

    def output_size(self, height: int, width: int) -> Pair:
        """Rows and columns of windows in an image. Raises ValueError where not even one fits."""
        left, right, top, bottom = self.zeros
        sizes = (height + top + bottom, width + left + right)
        spans = self.spans
        if sizes[0] < spans[0] or sizes[1] < spans[1]:
            raise ValueError(
                f"an image of {height} x {width}, padded to {sizes[0]} x {sizes[1]}, is smaller than the kernel, "
                f"which spans {spans[0]} x {spans[1]}"
            )
        rows, columns = ((size - span) // s + 1 for size, span, s in zip(sizes, spans, self.stride, strict=True))
        return rows, columns

    def patches(self, image: Tensor, group: int = 0) -> Tensor:
        """The windows of `image` (N, H, W, I), zeros where they leave it: (N, rows, columns, weights of a filter).

        Also of an image of fewer channels, all of which then belong to the one group.
        """
        rows, columns = self.output_size(*image.shape[1:3])
        image = F.pad(image, (0, 0, *self.zeros)).contiguous()
        channels = min(self.group_channels, image.shape[3])
        of_sample, of_row, of_pixel, _ = image.stride()
        size = (len(image), rows, columns, *self.kernel, channels)
        steps = (of_row * self.stride[0], of_pixel * self.stride[1], of_row * self.dilation[0])
        strides = (of_sample, *steps, of_pixel * self.dilation[1], 1)
        windows = image.as_strided(size, strides, image.storage_offset() + group * channels)
        return windows.reshape(len(image), rows, columns, self.kernel[0] * self.kernel[1] * channels)


def channels_last(x: Tensor, geometry: Geometry) -> Tensor:
    """`x` (N, I, H, W), or (I, H, W) for a batch of one, as (N, H, W, I), with edges that are not zeros around it.

    Raises ValueError for another shape.
    """
    x = x.unsqueeze(0) if x.dim() == 3 else x
    if x.dim() != 4 or x.shape[1] != geometry.in_channels:
        raise ValueError(f"the input must be (N, {geometry.in_channels}, height, width), got {tuple(x.shape)}")
    if geometry.mode != "zeros":
        x = F.pad(x, geometry.padding, mode=geometry.mode)
    return x.permute(0, 2, 3, 1)


def as_images(y: Tensor, x: Tensor) -> Tensor:
    """`y` (N, H, W, O) as (N, O, H, W), lying in memory as the layer's input `x` does; without N where `x` has none."""
    y = y.permute(0, 3, 1, 2)
    y = y.contiguous() if x.is_contiguous() else y
    return y.squeeze(0) if x.dim() == 3 else y


def convolve(x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
    """`x` (N, H, W, I) with filters `w` (O, columns): (N, rows, columns, O); exact for integers as far as the type is.

    A library may choose an algorithm that is fast and not exact (Winograd, FFT). oneDNN computes directly; elsewhere
    windows are copied and multiplied. Types narrower than float32 round their sums anyway. Raises ValueError where the
    image is smaller than a window.
    """
    geometry.output_size(*x.shape[1:3])
    if x.dtype.itemsize < 4 or (x.device.type == "cpu" and HAS_ONEDNN):
        image, padding = _pad_unevenly(x.permute(0, 3, 1, 2), geometry)
        window = geometry.stride, padding, geometry.dilation, geometry.groups
        return F.conv2d(image, _filters(w, geometry), None, *window).permute(0, 2, 3, 1)
    parts = w.view(geometry.groups, -1, geometry.columns)
    return torch.cat([geometry.patches(x, group) @ part.T for group, part in enumerate(parts)], dim=-1)


def _filters(w: Tensor, geometry: Geometry) -> Tensor:
    return w.view(len(w), *geometry.kernel, geometry.group_channels).permute(0, 3, 1, 2)


def _pad_unevenly(x: Tensor, geometry: Geometry) -> tuple[Tensor, Pair]:
    """`x` (N, I, H, W) and the padding that is left to do, which has to be the same on both sides."""
    left, right, top, bottom = geometry.zeros
    if left == right and top == bottom:
        return x, (top, left)
    return F.pad(x, geometry.zeros), (0, 0)


def integer_convolution(
    x: Quantized, w: Quantized, x_grid: Grid, w_grid: Grid, size: Pair, geometry: Geometry, dtype: torch.dtype
) -> Tensor:
    """Quantized images `x` (N, H * W * I) with quantized filters `w` (O, columns): (N, rows, columns, O) in `dtype`.

    size: H, W. The steps of `x` are one in all or one a sample. Differentiable in both values.
    """
    operands = x.values, w.values, x.codes, w.codes, x.step, w.step, x.offset, w.offset
    return _IntegerConvolution.apply(*operands, x_grid, w_grid, size, geometry, dtype)


def with_offsets(
    y: Tensor, x_levels: Tensor, w_levels: Tensor, x: StepAndOffset, w: StepAndOffset, geometry: Geometry
) -> Tensor:
    """`y` (N, rows, columns, O) plus what offsets contribute inside the image. x, w: step and offset."""
    if x[1] is None and w[1] is None:
        return y
    inside = x_levels.new_ones(x_levels.shape[1:]).unsqueeze(0)
    ones = torch.ones_like(w_levels)
    x_sums, w_sums, count = convolve(x_levels, ones, geometry), convolve(inside, w_levels, geometry), None
    if x[1] is not None and w[1] is not None:
        count = convolve(inside, ones, geometry)
    x_step = x[0].view(-1, 1, 1, 1)
    wide = torch.promote_types(x_step.dtype, torch.float32)
    return add_offsets(y, x_sums.to(wide), w_sums.to(wide), (x_step, x[1]), w, 0 if count is None else count.to(wide))


class _IntegerConvolution(torch.autograd.Function):
    """`x_values` and `w_values` are here for their gradients only: the numbers come from codes and steps."""

    @staticmethod
    def forward(
        ctx: Any,
        x_values: Tensor,
        w_values: Tensor,
        x_codes: Tensor,
        w_codes: Tensor,
        x_step: Tensor,
        w_step: Tensor,
        x_offset: Tensor | None,
        w_offset: Tensor | None,
        x_grid: Grid,
        w_grid: Grid,
        size: Pair,
        geometry: Geometry,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x_codes, w_codes, x_step, w_step, x_offset, w_offset)
        ctx.x_grid, ctx.w_grid, ctx.dtype = x_grid, w_grid, dtype
        ctx.image, ctx.geometry = (-1, *size, geometry.in_channels), geometry
        ctx.x_dtype, ctx.w_dtype = x_values.dtype, w_values.dtype
        with no_autocast(x_codes.device):
            # float16 ends at 65504, which sums of levels pass.
            sums = torch.float32 if dtype == torch.float16 else dtype
            x_levels = levels_of(x_codes, x_grid, sums).view(_image(x_codes, ctx.image))
            w_levels = levels_of(w_codes, w_grid, sums)
            y = convolve(x_levels, w_levels, geometry) * w_step.reshape(-1) * x_step.view(-1, 1, 1, 1)
            y = with_offsets(y, x_levels, w_levels, (x_step, x_offset), (w_step, w_offset), geometry)
        return y.to(dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, w_codes, x_step, w_step, x_offset, w_offset = ctx.saved_tensors
        wanted, geometry = ctx.needs_input_grad[:2], ctx.geometry
        x = values_of(x_codes, ctx.x_grid, x_step, x_offset, ctx.dtype).view(_image(x_codes, ctx.image))
        w = _filters(values_of(w_codes, ctx.w_grid, w_step, w_offset, ctx.dtype), geometry)
        image, padding = _pad_unevenly(x.permute(0, 3, 1, 2), geometry)
        window = geometry.stride, padding, geometry.dilation, False, [0, 0], geometry.groups
        g = g.to(ctx.dtype).permute(0, 3, 1, 2)
        grad_x, grad_w, _ = torch.ops.aten.convolution_backward(g, image, w, None, *window, [*wanted, False])
        if grad_x is not None:
            if grad_x.shape[2:] != x.shape[1:3]:
                left, _, top, _ = geometry.zeros
                grad_x = grad_x[:, :, top : top + x.shape[1], left : left + x.shape[2]]
            grad_x = grad_x.permute(0, 2, 3, 1).reshape(x_codes.shape).to(ctx.x_dtype)
        if grad_w is not None:
            grad_w = grad_w.permute(0, 2, 3, 1).reshape(w_codes.shape).to(ctx.w_dtype)
        return grad_x, grad_w, *[None] * 11


def _image(rows: Tensor, shape: tuple[int, int, int, int]) -> tuple[int, ...]:
    """(N, H, W, I) of rows (N, H * W * I), of which there may be none."""
    return (len(rows), *shape[1:])
